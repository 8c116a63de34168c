"""Decoding in steps of fixed shapes: the eager loop's tokens, by what a GPU could record and replay."""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import heard_policy
from families import FAMILIES
from tiny_runs import PROMPTS as TEXTS
from tiny_runs import SHORT, even_words, rows, small
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from quark_fast.errors import UsageError
from quark_fast.model import attention, fixed_step, reading
from quark_fast.model.check_reading import check_fixed_steps
from quark_fast.model.copies import frozen_copy
from quark_fast.model.policy import Policy
from quark_fast.model.reading import Reading, Sent
from quark_fast.rollout import transformers as rollout
from quark_fast.rollout.sampling import Conditioning, DrawnBatch, SampleRequest, Sampling
from quark_fast.rollout.transformers import sample
from quark_fast.training.trainer import Trainer

CPU = torch.device("cpu")
# Those whose layers keep every token; the others have layers of a window.
WHOLE = ["gpt2", "opt", "llama", "llama, unigram", "qwen2", "qwen3", "gemma", "gpt_neox", "phi"]
WINDOWED = sorted(FAMILIES.keys() - set(WHOLE))
HOW = {"plain": Conditioning(2), "guided": Conditioning(2, 0, 1.7)}
PROMPTS = [[11, 12, 13, 14, 15, 16, 17], [18, 19], [20, 21, 22, 23], [24], [25, 26, 27]]

Make = Callable[..., Path]


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is free on the CPU is left out, as on a GPU."""
    for module in (attention, rollout):
        monkeypatch.setattr(module, "is_free_to_read", lambda values: False)


@pytest.fixture
def all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The eager loop keeps rows that have ended, too: without them the others take other uniform numbers."""
    monkeypatch.setattr(rollout, "WORTH_DROPPING", 0.0)


@pytest.fixture(scope="module", params=WHOLE)
def policy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Policy]:
    yield policy_of(request.param, tmp_path_factory.mktemp("model"))


def policy_of(family: str, folder: Path) -> Policy:
    return heard_policy(FAMILIES[family].save(folder))


def drawn(
    policy: Policy, model: Any, conditioning: Conditioning, decoding: Any, **sampling: Any
) -> list[DrawnBatch]:
    """Two batches and a smaller one, whose prompts are of different lengths: three samples each."""
    how = Sampling(**{"max_new_tokens": 9, "top_p": 0.9, "rows": 6, "decoding": decoding} | sampling)
    return list(sample(policy, model, SampleRequest(PROMPTS, conditioning, how, 3, 5)))


@pytest.mark.parametrize("conditioning", HOW.values(), ids=HOW)
def test_fixed_steps_draw_the_tokens_of_the_eager_loop(
    policy: Policy, all_rows: None, conditioning: Conditioning
) -> None:
    model = frozen_copy(policy, torch.float32)
    eager = drawn(policy, model, conditioning, "eager")
    assert drawn(policy, model, conditioning, "static") == eager
    assert len({tuple(one) for batch in eager for group in batch.completions for one in group}) > 10


def test_mask_shows_what_a_row_has_and_nothing_of_the_batch_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = policy_of("llama", tmp_path)
    seen: list[int] = []

    def watched(model: Any, ids: Tensor, mask: Tensor, positions: Tensor, **named: Any) -> Any:
        seen.append(mask.shape[1])
        assert torch.equal(mask.sum(1), positions[:, -1] + 1)
        return reading.read(model, ids, mask, positions, **named)

    monkeypatch.setattr(fixed_step, "read", watched)
    drawn(policy, frozen_copy(policy, torch.float32), Conditioning(2), "static", min_new_tokens=9)
    assert [width for width in seen if width == fixed_step.COLUMNS] == [fixed_step.COLUMNS] * 24


def test_batch_that_was_not_finite_leaves_nothing_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = policy_of("llama", tmp_path)
    steps = fixed_step.FixedSteps(frozen_copy(policy, torch.float32), Reading(), "static")
    layers: list[Any] = []
    create = fixed_step._FixedLayer.__init__

    def watched(self: Any, *given: Any) -> None:
        create(self, *given)
        layers.append(self)

    monkeypatch.setattr(fixed_step._FixedLayer, "__init__", watched)
    with torch.inference_mode():
        for batch in range(2):
            reader = steps.next_logits([[1, 2, 3]], 2, 4)
            next(reader)
            assert reader.send(Sent(torch.tensor([4, 5]))).isfinite().all(), batch
            for layer in layers:
                layer.keys.fill_(torch.nan)
                layer.values.fill_(torch.nan)
    assert len(layers) == policy.model.config.num_hidden_layers, "the second batch has those of the first"


# --- What a GPU would record -----------------------------------------------------------------------


class Recording(TorchDispatchMode):
    """The operations of a step, with whose tensors they are called: what a CUDA graph holds of it.

    ``replay`` runs them again on the same memory, without the program that once started them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[tuple[int, Tensor]]]] = []
        self.signature: list[Any] = []
        self._made: dict[int, int] = {}  # a tensor's memory: which of the step's own it is
        self._alive: list[Any] = []  # or else another tensor would take its place

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.signature.append((function._schema.name, tree_map(self._seen, (args, kwargs))))
        given = {place(one) for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        made = function(*args, **kwargs)
        own = []
        for number, one in enumerate(tree_leaves(made)):
            if isinstance(one, Tensor) and place(one) not in given:
                self._made.setdefault(place(one), len(self._made))
                own.append((number, one))
        self._alive.append(made)
        self.operations.append((function, args, kwargs, own))
        return made

    def _seen(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value if isinstance(value, (int, float, bool, str)) else str(value)
        whose = self._made.get(place(value))
        origin = ("outside", value.data_ptr()) if whose is None else ("made here", whose)
        return (*value.shape, *value.stride(), value.storage_offset(), str(value.dtype), *origin)

    def replay(self) -> None:
        for function, args, kwargs, own in self.operations:
            again = tree_leaves(function(*args, **kwargs))
            for number, one in own:
                one.copy_(again[number])


def place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize("conditioning", HOW.values(), ids=HOW)
def test_what_a_graph_would_record_is_the_same_in_every_step_of_every_batch(
    policy: Policy, as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch, conditioning: Conditioning
) -> None:
    of_shape: list[list[Any]] = []

    def watched(step: fixed_step.Step, _: torch.device) -> fixed_step.Step:
        seen: list[Any] = []
        of_shape.append(seen)

        def run() -> Tensor:
            with Recording() as recording:
                logits = step()
            seen.append(recording.signature)
            return logits

        return run

    monkeypatch.setattr(fixed_step, "cuda_graph", watched)
    model, new = frozen_copy(policy, torch.float32), 5
    drawn(policy, model, conditioning, "graph", max_new_tokens=new, min_new_tokens=new)
    plain, steps = conditioning is HOW["plain"], new - 1
    found = [len(seen) for seen in of_shape]
    assert found == ([2 * steps, steps] if plain else [5 * steps]), "of each shape one is made"
    for seen in of_shape:
        assert all(signature == seen[0] for signature in seen)
        reads = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal"}
        assert not reads & {name.removeprefix("aten::") for name, _ in seen[0]}


@pytest.mark.parametrize("conditioning", HOW.values(), ids=HOW)
def test_replayed_operations_of_one_step_draw_all_tokens_of_all_batches(
    policy: Policy,
    as_on_a_gpu: None,
    all_rows: None,
    monkeypatch: pytest.MonkeyPatch,
    conditioning: Conditioning,
) -> None:
    model = frozen_copy(policy, torch.float32)
    eager = drawn(policy, model, conditioning, "eager")
    recorded = as_if_cuda(monkeypatch)
    assert drawn(policy, model, conditioning, "graph") == eager
    assert len(recorded) == (2 if conditioning is HOW["plain"] else 1), "one for each shape"


def as_if_cuda(monkeypatch: pytest.MonkeyPatch) -> list[Recording]:
    """What ``cuda_graph`` calls, with a recording in the place of the graph; all that are made."""
    made: list[Recording] = []
    signature = inspect.signature(torch.cuda.graph)

    def graph() -> Recording:
        made.append(Recording())
        return made[-1]

    def record(graph: Recording, **named: Any) -> Recording:
        signature.bind(graph, **named)
        return graph

    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(fixed_step, "check_device", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda side: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    return made


def test_longer_prompts_take_another_step_and_the_shorter_one_is_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = policy_of("llama", tmp_path)
    model = frozen_copy(policy, torch.float32)
    made: list[weakref.ref[Any]] = []
    create = fixed_step._FixedStep.__init__

    def watched(self: Any, *given: Any) -> None:
        made.append(weakref.ref(self))
        create(self, *given)

    monkeypatch.setattr(fixed_step._FixedStep, "__init__", watched)
    steps = fixed_step.FixedSteps(model, Reading(), "static")
    for length, alive in ((3, [True]), (60, [True]), (61, [False, True]), (62, [False, True])):
        with torch.inference_mode():
            reader = steps.next_logits([[1] * length], 1, 4)
            next(reader)
            reader.send(Sent(torch.tensor([2])))
        reader.close()
        assert [one() is not None for one in made] == alive, length


def test_steps_that_memory_does_not_suffice_for_are_given_back_before_smaller_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = policy_of("llama", tmp_path)
    model = frozen_copy(policy, torch.float32)
    made: list[tuple[int, weakref.ref[Any]]] = []
    create = fixed_step._FixedStep.__init__

    def watched(self: Any, model: Any, prompts: Any, rows: int, columns: int) -> None:
        if len(made) == 1 and rows == 4:
            assert made[0][1]() is not None
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        if len(made) == 1:
            assert made[0][1]() is None, "the larger one is there"
        made.append((rows, weakref.ref(self)))
        create(self, model, prompts, rows, columns)

    monkeypatch.setattr(fixed_step._FixedStep, "__init__", watched)
    how = Sampling(3, 3, rows=6, decoding="static")
    request = SampleRequest([[1], [2], [3], [4], [5]], Conditioning(2), how, 2, 0)
    (first, *_), (second, groups, *_) = sample(policy, model, request)
    assert (first, second) == ([0, 1, 2], [3, 4]) and [len(group) for group in groups] == [2, 2]
    assert [rows for rows, _ in made] == [6, 2]


# --- Whose it is not -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", WHOLE[:3])
def test_model_whose_layers_keep_every_token_passes_the_check(tmp_path: Path, family: str) -> None:
    policy = policy_of(family, tmp_path)
    check_fixed_steps(policy, frozen_copy(policy, torch.float32), "static")


@pytest.mark.parametrize("family", WINDOWED)
def test_model_with_layers_of_a_window_is_refused(tmp_path: Path, family: str) -> None:
    policy = policy_of(family, tmp_path)
    with pytest.raises(
        UsageError, match=r"fixed shapes is not for .*: its layer 0 .*Sliding.*--decoding eager"
    ):
        check_fixed_steps(policy, frozen_copy(policy, torch.float32), "static")


@pytest.mark.parametrize("other", [Reading(padding=False), Reading(cache=False)], ids=str)
def test_model_that_is_read_in_another_way_is_refused(tmp_path: Path, other: Reading) -> None:
    policy = policy_of("llama", tmp_path)
    policy.reading = other
    model = frozen_copy(policy, torch.float32)
    with pytest.raises(UsageError, match=r"is not for LlamaForCausalLM: it is read as .*--decoding eager"):
        check_fixed_steps(policy, model, "static")
    with pytest.raises(UsageError, match="is not for LlamaForCausalLM: it is read as"):
        drawn(policy, model, Conditioning(2), "static")


def test_model_whose_logits_change_with_the_room_in_the_cache_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = policy_of("llama", tmp_path)
    model = frozen_copy(policy, torch.float32)

    def by_columns(model: Any, ids: Tensor, mask: Tensor, *given: Any, **named: Any) -> Any:
        output = reading.read(model, ids, mask, *given, **named)
        if mask.shape[1] == fixed_step.COLUMNS:
            output.logits = output.logits.flip(-1)
        return output

    monkeypatch.setattr(fixed_step, "read", by_columns)
    with pytest.raises(UsageError, match="of their spread from those of each text alone; give --decoding"):
        check_fixed_steps(policy, model, "static")


def test_graph_without_a_gpu_is_refused_before_the_model_is_loaded(tmp_path: Path, tiny_model: Make) -> None:
    config = small(tmp_path / "run", tmp_path / "no model is here", **SHORT, decoding="graph")
    with pytest.raises(UsageError, match=r"decoding = graph .* a cpu does not have; give --decoding static"):
        Trainer(config, reward=even_words, prompts=TEXTS, held_out=TEXTS[:2])
    policy = policy_of("llama", tmp_path / "other")
    with pytest.raises(UsageError, match="give --decoding static"):
        drawn(policy, frozen_copy(policy, torch.float32), Conditioning(2), "graph")


def test_run_in_fixed_steps_has_the_samples_of_an_eager_one(
    tmp_path: Path, tiny_model: Make, all_rows: None
) -> None:
    found, told, fits = [], [], []
    for decoding in ("eager", "static"):
        folder = tmp_path / decoding
        config = small(folder, tiny_model(), **SHORT, decoding=decoding)
        Trainer(config, reward=even_words, prompts=TEXTS, held_out=TEXTS[:2]).train()
        evaluated = rows(folder / "evaluation.jsonl")
        # Of logits that are rounded otherwise.
        told.append([row.pop(name) for row in evaluated for name in ("nll", "own_nll")])
        fits.append([row["measures"].pop("prompt_fit") for row in evaluated])
        found.append((rows(folder / "completions.jsonl"), evaluated))
    assert found[0] == found[1]
    assert told[0] == pytest.approx(told[1], rel=1e-5)
    assert fits[0] == pytest.approx(fits[1], abs=1e-5)  # of differences of these


def test_run_with_a_model_that_fixed_steps_are_not_for_is_refused(tmp_path: Path) -> None:
    source = FAMILIES["mistral"].save(tmp_path / "model")
    config = small(tmp_path / "run", source, **SHORT, decoding="static")
    with pytest.raises(UsageError, match="fixed shapes is not for MistralForCausalLM: its layer 0"):
        Trainer(config, reward=even_words, prompts=TEXTS, held_out=TEXTS[:2])
