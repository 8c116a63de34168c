"""What a GPU would be waited for, counted on the CPU: reads of a tensor's values by the program."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from tiny_runs import PROMPTS, SHORT, even_words, small
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import quark_fast
from quark_fast.model import attention
from quark_fast.model.loading import decode_fast
from quark_fast.ops import cpp, linear
from quark_fast.ops import loss as ops
from quark_fast.ops.linear import _counted as counted
from quark_fast.rollout import transformers
from quark_fast.rollout.sampling import Conditioning, SampleRequest, Sampling
from quark_fast.training import learn
from quark_fast.training.quantize import plan_round
from quark_fast.training.trainer import Trainer

READS = {
    "aten::_local_scalar_dense",
    "aten::item",  # in inference mode; elsewhere it is seen as what it calls, the one above
    "aten::nonzero",
    "aten::is_nonzero",
    "aten::equal",
    "aten::masked_select",
}


PACKAGE = str(Path(quark_fast.__file__).parent)


class Operations(TorchDispatchMode):
    """Counts the operations whose result the program has to wait for."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name
        if name in READS or (
            name in ("aten::index", "aten::index_put_")
            and any(isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1])
        ):
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


class Copies(TorchFunctionMode):
    """Counts what waits for a GPU and leaves no operation on the CPU, where there is nothing to copy."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        if (
            name in ("cpu", "tolist", "new_tensor")  # a GPU's numpy() is an error
            or (
                name in ("tensor", "as_tensor")
                and args[0] != []
                and kwargs.get("device") not in (None, "cpu")
            )
            or (name in ("__getitem__", "__setitem__") and _has_list(args[1]))
            or (name == "to" and _names_device(args, kwargs) and not kwargs.get("non_blocking", False))
        ):
            caller = sys._getframe(1)
            of_package = caller.f_code.co_filename.startswith(PACKAGE)
            # A model's own tensors, which transformers moves about, are there already.
            if (of_package or name != "to") and not _of_the_cpu(caller):
                self.found[name] += 1
        return function(*args, **kwargs)


def _has_list(index: Any) -> bool:
    """Such an index is made a tensor, and copied."""
    return any(isinstance(one, list) for one in (index if isinstance(index, tuple) else (index,)))


def _names_device(args: Any, kwargs: Any) -> bool:
    """Whether this ``Tensor.to`` may be a copy from or to a GPU."""
    given = (*args[1:], kwargs.get("device"))
    return any(isinstance(one, torch.device | str | Tensor) for one in given)


def _of_the_cpu(caller: FrameType) -> bool:
    """Whether this is asked of indices of tokens, which are made there; or is counted by a mode within."""
    if caller.f_code.co_filename == __file__:
        return True
    return caller.f_code is linear._plan.__code__ and caller.f_locals["counted"] is not None


class Reads(contextlib.ExitStack):
    """Counts both, while it is open."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __enter__(self) -> Reads:
        self.enter_context(Copies(self.found))
        self.enter_context(Operations(self.found))
        return self


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is free on the CPU is left out, as on a GPU."""
    for module in (attention, transformers):
        monkeypatch.setattr(module, "is_free_to_read", lambda values: False)


@pytest.fixture
def trainer(tmp_path: Path, tiny_model: Callable[..., Path]) -> Iterator[Trainer]:
    config = small(tmp_path / "run", tiny_model(), **SHORT | {"micro_batch": 2, "batch_size": 8})
    trainer = Trainer(config, reward=even_words, prompts=PROMPTS, held_out=PROMPTS[:2])
    trainer.started = 0.0
    yield trainer


@pytest.mark.parametrize("whole_logits", [False, True], ids=["hidden states", "whole logits"])
def test_nothing_is_read_between_the_first_micro_batch_and_the_end_of_the_gradient(
    trainer: Trainer, as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch, whole_logits: bool
) -> None:
    if whole_logits:
        trainer.setup.objective.heads = None
    decode_fast(trainer.policy.model)  # as it is on a GPU, where eager attention is no faster
    trainer._explore()
    state = trainer.state
    plan = plan_round(trainer.config, state, trainer.setup.prompts.train_ids)
    batch = state.pool[state.pool.ids[plan[0]]]
    at_the_end: list[Counter[str]] = []
    inside, read_terms, loss = Reads(), learn.read_terms, linear._linear_loss

    def read(parts: Any) -> Any:
        assert len(parts) == 5, "micro-batches, and the norm of their gradient"
        at_the_end.append(Counter(reads.found))
        return read_terms(parts)

    def opened(*given: Any) -> Any:
        # To the mode around it the operator is a single one: what it reads is counted here.
        with torch.no_grad(), inside:
            loss._init_fn(*given)
        return loss(*given)

    def unseen(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*given: Any) -> Any:
            with _disable_current_modes():
                return function(*given)

        return called

    def as_elsewhere(lengths: Any, labels: Tensor, weights: Tensor) -> Any:
        return unseen(counted)(lengths, labels, weights.to("meta"))  # of weights that are not there

    monkeypatch.setattr(learn, "read_terms", read)
    monkeypatch.setattr(linear, "_linear_loss", opened)
    monkeypatch.setattr(linear, "_counted", as_elsewhere)
    # What is done for tensors on the CPU alone: indices of tokens, errors of labels and of the mask's sum,
    # a scale of 1.
    monkeypatch.setattr(ops, "check_labels", lambda *_: None)
    monkeypatch.setattr(ops, "_weights", unseen(ops._weights))
    monkeypatch.setattr(cpp, "rescale", lambda grad, scale: grad.mul_(scale))
    monkeypatch.setattr(linear, "_scaled", lambda grad, scale, dtype, *_: (grad * scale).to(dtype))
    with Reads() as reads:
        trainer.learner.step(state, batch, lambda _: None)
    assert at_the_end == [Counter()]
    assert not inside.found, inside.found
    assert reads.found == {"tolist": 1}, "the terms with the norm"


@pytest.mark.parametrize("decoding", ["eager", "static"])
@pytest.mark.parametrize("conditioning", [Conditioning(2), Conditioning(2, 0, 2.0)], ids=["plain", "guided"])
def test_nothing_is_read_in_a_decoding_step_but_every_eighth_look_at_the_ends(
    trainer: Trainer,
    as_on_a_gpu: None,
    monkeypatch: pytest.MonkeyPatch,
    conditioning: Conditioning,
    decoding: Any,
) -> None:
    # In place of the Triton kernel, whose interpreter is no part of PyTorch.
    def drawn_ones(logits: Tensor, wanted: Any, *_: Any) -> Tensor:
        return torch.ones(len(logits) // len(wanted.weights), dtype=torch.long)

    monkeypatch.setattr(transformers, "draw_tokens", drawn_ones)
    policy, counts = trainer.policy, {}
    model, tell = trainer.setup.copied.get(), len(conditioning.streams()) == 1
    for tokens in (4, 12, 20):
        sampling = Sampling(tokens, tokens, decoding=decoding)
        request = SampleRequest([[1, 2], [3]], conditioning, sampling, 2, 0, model_nll=tell)
        with Reads() as reads:
            ((_, drawn, *_),) = transformers.sample(policy, model, request)
        assert all(len(one) == tokens for group in drawn for one in group)
        counts[tokens] = sum(reads.found.values())
    assert counts[4] == 1, "the completions, at their end"
    assert counts[12] - counts[4] == 1 and counts[20] - counts[12] == 1, "the looks after token 8 and 16"


def test_rows_are_dropped_by_what_the_look_has_read(
    trainer: Trainer, as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    (stop,) = trainer.policy.stop_ids

    def drawn_ends(logits: Tensor, *_: Any) -> Tensor:
        """The first two end with the sixth token."""
        rows.append(len(logits) // 2)
        tokens = torch.ones(rows[-1], dtype=torch.long)
        if len(rows) == 6:
            tokens[:2] = stop
        return tokens

    monkeypatch.setattr(transformers, "draw_tokens", drawn_ends)
    model, counts = trainer.setup.copied.get(), []
    for tokens in (8, 12):
        rows.clear()
        request = SampleRequest([[1, 2], [3]], Conditioning(2, 0, 2.0), Sampling(tokens, 0), 2, 0)
        with Reads() as reads:
            list(transformers.sample(trainer.policy, model, request))
        counts.append(sum(reads.found.values()))
    assert rows == [4] * 8 + [2] * 4
    assert counts[1] - counts[0] == 1, "the look after token 8"


def test_a_row_that_is_not_finite_is_an_error_behind_the_last_token(
    trainer: Trainer, as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []

    def broken(logits: Tensor, *_: Any) -> Tensor:
        given.append(len(logits))
        return torch.full((len(logits),), -1 if len(given) == 2 else 1)

    monkeypatch.setattr(transformers, "draw_tokens", broken)
    request = SampleRequest([[1, 2]], Conditioning(), Sampling(5, 5), 1, 0)
    with pytest.raises(ValueError, match="logits are NaN or infinite"):
        list(transformers.sample(trainer.policy, trainer.setup.copied.get(), request))
    assert len(given) == 5
