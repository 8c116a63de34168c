"""What a GPU would be waited for, counted on the CPU: reads of a tensor's values by the program."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import PROMPTS, SHORT, even_words, small
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from quark_fast.model import attention
from quark_fast.model.loading import decode_fast
from quark_fast.ops import linear
from quark_fast.ops import loss as ops
from quark_fast.ops.linear import _counted as counted
from quark_fast.rollout import transformers
from quark_fast.rollout.sampling import Conditioning, SampleRequest, Sampling
from quark_fast.training import learn
from quark_fast.training.trainer import Trainer

READS = {
    "aten::_local_scalar_dense",
    "aten::item",  # in inference mode; elsewhere it is seen as what it calls, the one above
    "aten::nonzero",
    "aten::is_nonzero",
    "aten::equal",
    "aten::masked_select",
}


class Reads(TorchDispatchMode):
    """Counts the operations whose result the program has to wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name
        if name in READS or (
            name == "aten::index"
            and any(isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1])
        ):
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


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


def test_nothing_is_read_between_the_first_micro_batch_and_the_end_of_the_gradient(
    trainer: Trainer, as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode_fast(trainer.policy.model)  # as it is on a GPU, where eager attention is no faster
    trainer._explore()
    state, plan = trainer.state, trainer._quantize()
    batch = state.pool[state.pool.ids[plan[0]]]
    at_the_end: list[Counter[str]] = []
    inside, read_terms, loss = Reads(), learn.read_terms, linear._linear_loss

    def read(parts: Any) -> Any:
        assert len(parts) == 4, "micro-batches"
        at_the_end.append(Counter(reads.found))
        return read_terms(parts)

    def opened(*given: Any) -> Any:
        # To the mode around it the operator is a single one: what it reads is counted here.
        with torch.no_grad(), inside:
            loss._init_fn(*given)
        return loss(*given)

    def as_elsewhere(lengths: Any, labels: Tensor, weights: Tensor) -> Any:
        with _disable_current_modes():  # indices of tokens are made on the CPU, of weights that are not there
            return counted(lengths, labels, weights.to("meta"))

    monkeypatch.setattr(learn, "read_terms", read)
    monkeypatch.setattr(linear, "_linear_loss", opened)
    monkeypatch.setattr(linear, "_counted", as_elsewhere)
    # What is done for tensors on the CPU alone: the indices of tokens, errors of labels, a scale of 1.
    monkeypatch.setattr(ops, "check_labels", lambda *_: None)
    monkeypatch.setattr(linear, "_scaled", lambda grad, scale, dtype, keep: (grad * scale).to(dtype))
    with Reads() as reads:
        trainer.learner.step(state, batch, lambda _: None)
    assert at_the_end == [Counter()]
    assert not inside.found, inside.found
    assert reads.found == {"aten::_local_scalar_dense": 1}, "the norm of the gradient, beside the terms"


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
