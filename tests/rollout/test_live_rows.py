"""Rows that have ended are dropped: the same completions from forward passes of fewer rows."""

from __future__ import annotations

import itertools
import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from conftest import assert_drawn_from, heard_policy, tiny_config
from families import FAMILIES
from torch import Tensor

from quark_fast.model.cache import decoding_cache
from quark_fast.model.check_reading import check_reading
from quark_fast.model.copies import frozen_copy
from quark_fast.model.policy import Policy
from quark_fast.model.reading import Reading, read
from quark_fast.rollout import transformers as rollout
from quark_fast.rollout.live_rows import WORTH_DROPPING, LiveRows
from quark_fast.rollout.sampling import Conditioning, DrawnBatch, SampleRequest, Sampling
from quark_fast.rollout.tokens import NotFinite
from quark_fast.rollout.transformers import sample

MOST = 24
# Keys and values of all tokens, of a window, of both; a state; a state and keys, in layers of their own and
# in one layer.
KINDS = ["llama", "gpt2", "mistral", "gemma2", "gemma3", "mamba", "lfm2", "jamba", "falcon_h1"]
HOW = {"plain": Conditioning(2), "guided": Conditioning(2, 0, 1.7)}
PROMPTS = [[11, 12, 13, 14, 15, 16, 17, 18, 19], [18, 19], [20, 21, 22, 23], [24], [25, 26, 27], [9, 8, 7]]
# Looks at whether rows have ended come after every token on the CPU, after every eighth on a GPU.
LOOKS = {"on the CPU": 1, "as on a GPU": 8}

Make = Callable[..., Path]


def policy_of(kind: str, folder: Path) -> Policy:
    made = heard_policy((FAMILIES.get(kind) or ARCHITECTURES[kind]).save(folder))
    check_reading(made, made.model, [2, 0, None])
    # One token in twelve ends a completion, so that completions end at many lengths.
    made.stop_ids = list(range(3, made.vocabulary, 12))
    return made


@pytest.fixture(scope="module", params=KINDS)
def policy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Policy]:
    yield policy_of(request.param, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Policy]:
    yield policy_of("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def without_dropping(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return lambda: monkeypatch.setattr(rollout, "WORTH_DROPPING", 0.0)


@pytest.fixture(params=LOOKS.values(), ids=LOOKS)
def look_every(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(rollout, "is_free_to_read", lambda values: request.param == 1)
    return int(request.param)


def drawn(policy: Policy, conditioning: Conditioning, **sampling: Any) -> tuple[list[DrawnBatch], list[int]]:
    """Three completions of each prompt; and of each forward pass that read one token a row, its rows."""
    passes: list[int] = []

    def count(_: Any, given: Any, found: Tensor) -> None:
        if found.shape[1] == 1:
            passes.append(found.shape[0])

    model = frozen_copy(policy, torch.float32)
    model.get_input_embeddings().register_forward_hook(count)
    how = Sampling(**{"max_new_tokens": MOST, "min_new_tokens": 0, "rows": 99} | sampling)
    request = SampleRequest(PROMPTS, conditioning, how, 3, 5, own_nll=True)
    return list(sample(policy, model, request)), passes


def completions_of(batches: list[DrawnBatch]) -> list[list[int]]:
    return [one for batch in batches for group in batch.completions for one in group]


# --- The same completions --------------------------------------------------------------------------


class Ending(LiveRows):
    """Rows that end at lengths of their own, whatever is drawn for them: greedy ones may never end."""

    def add(self, tokens: Tensor, *told: Tensor) -> None:
        ends = self._held * 5 % (MOST - 1) == self._length
        super().add(torch.where(ends, self.stop[0], tokens), *told)


@pytest.mark.parametrize("conditioning", HOW.values(), ids=HOW)
def test_greedy_completions_are_the_same_where_rows_are_dropped_and_where_none_is(
    policy: Policy,
    without_dropping: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    conditioning: Conditioning,
) -> None:
    monkeypatch.setattr(rollout, "LiveRows", Ending)
    greedy = {"temperature": 0.0, "min_new_tokens": MOST}
    dropping, fewer = drawn(policy, conditioning, **greedy)
    without_dropping()
    every, passes = drawn(policy, conditioning, **greedy)
    found = completions_of(every)
    assert completions_of(dropping) == found
    assert len({*map(len, found)}) > 2 and len({tuple(one[:5]) for one in found if len(one) > 5}) > 3
    assert len(fewer) == len(passes) and sum(fewer) < 0.7 * sum(passes)


@torch.no_grad()
def nll_by_plain_forwards(
    policy: Policy, prompt: list[int], completion: list[int], conditioning: Conditioning
) -> float:
    """By the model's own logits of the whole text alone: no cache, no other rows."""
    mixed = torch.zeros(len(completion), policy.vocabulary)
    for quantile, weight in conditioning.streams():
        ids = policy.conditioned(prompt, quantile) + completion
        logits = read(policy.model, torch.tensor([ids])).logits[0, -len(completion) - 1 : -1]
        mixed += weight * logits[:, : policy.vocabulary].log_softmax(-1)
    return -float(mixed.log_softmax(-1)[range(len(completion)), completion].sum())


@pytest.mark.parametrize("conditioning", HOW.values(), ids=HOW)
def test_each_token_is_drawn_from_what_the_model_says_behind_its_own_row(
    policy: Policy, conditioning: Conditioning
) -> None:
    batches, passes = drawn(policy, conditioning)
    assert len({*passes}) > 3, "rows are dropped several times"
    for indices, groups, own_nll, _ in batches:
        assert own_nll is not None
        for i, group, told in zip(indices, groups, own_nll, strict=True):
            expected = [nll_by_plain_forwards(policy, PROMPTS[i], one, conditioning) for one in group]
            # float32, at most 24 log-probabilities of mixed logits; another row's are nats away.
            assert told == pytest.approx(expected, rel=1e-3, abs=1e-2)


class Chain:
    """A model of two words and the end, by the last token alone."""

    def __init__(self, after: dict[int, tuple[float, float, float]], vocabulary: int, stop: int) -> None:
        self.after, self.vocabulary, self.stop = after, vocabulary, stop
        self.device, self.config = torch.device("cpu"), tiny_config("llama", vocabulary)
        self.table = torch.full((vocabulary, vocabulary), 1e-30)
        for last, shares in after.items():
            self.table[last, [0, 1, stop]] = torch.tensor(shares)

    def __call__(self, ids: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table.log()[ids[:, -1:]])

    forward = __call__

    def share(self, completion: tuple[int, ...]) -> float:
        """The probability of a completion after the prompt [0]."""
        found = 1.0
        for last, token in itertools.pairwise((0, *completion)):
            found *= self.after[last][[0, 1, self.stop].index(token)]
        return found


def test_completions_are_drawn_with_the_probabilities_of_a_chain(tiny_model: Make, look_every: int) -> None:
    # Up to 10 tokens, of which many rows end each time: 8 of them before a GPU is first looked at.
    policy, most = Policy.create(tiny_model(), quantiles=2), 10
    (stop,) = policy.stop_ids
    # The stop id's own row is read by rows that have ended and are not dropped yet.
    chain = Chain({0: (0.3, 0.4, 0.3), 1: (0.6, 0.1, 0.3), stop: (0.5, 0.5, 0.0)}, policy.vocabulary, stop)
    how = Sampling(most, 0, rows=4000)
    ((_, (group,), *_),) = sample(policy, chain, SampleRequest([[0]], Conditioning(), how, 4000, 0))
    counts = Counter(map(tuple, group))
    words = [one for n in range(most) for one in itertools.product([0, 1], repeat=n)]
    every = [(*one, stop) for one in words] + [*itertools.product([0, 1], repeat=most)]
    shares = torch.tensor([chain.share(one) for one in every])
    assert float(shares.sum()) == pytest.approx(1)
    assert counts.keys() <= {*every}
    assert_drawn_from(torch.tensor([counts[one] for one in every]), shares)


# --- What is dropped, and when ---------------------------------------------------------------------


def expected_passes(lengths: list[int], streams: int, look_every: int) -> list[int]:
    """The rows of each pass, by the rule and the completions' lengths; one that is full has not ended."""
    held, found = len(lengths), []
    for length in range(1, MOST):
        if length % look_every == 0:
            alive = sum(one > length for one in lengths)
            if alive == 0:
                break
            if alive <= WORTH_DROPPING * held:
                held = alive
        found.append(held * streams)
    return found


@pytest.mark.parametrize("conditioning", HOW.values(), ids=HOW)
def test_passes_have_the_rows_that_the_rule_leaves_in_both_streams(
    llama: Policy, conditioning: Conditioning, look_every: int
) -> None:
    batches, passes = drawn(llama, conditioning)
    lengths = [*map(len, completions_of(batches))]
    assert passes == expected_passes(lengths, len(conditioning.streams()), look_every)
    assert passes[-1] < passes[0] / 2


def test_what_is_drawn_does_not_change_where_no_row_ends(
    llama: Policy, without_dropping: Callable[[], None]
) -> None:
    (with_ends, _), (found, passes) = (drawn(llama, HOW["guided"], min_new_tokens=n) for n in (0, MOST))
    assert passes == [2 * 3 * len(PROMPTS)] * (MOST - 1)
    without_dropping()
    assert drawn(llama, HOW["guided"], min_new_tokens=MOST) == (found, passes)
    assert drawn(llama, HOW["guided"])[0] != with_ends, "other rows take other uniform numbers"


def test_same_seed_same_completions_also_where_rows_are_dropped_and_memory_is_short(
    llama: Policy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first, passes = drawn(llama, HOW["guided"], top_p=0.9)
    assert drawn(llama, HOW["guided"], top_p=0.9) == (first, passes) and passes[-1] < passes[0]
    sent: list[int] = []
    send = rollout._of_streams

    def fails_once(*given: Any) -> Any:
        sent.append(0)
        if len(sent) == 6:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return send(*given)

    half = drawn(llama, HOW["guided"], top_p=0.9, at_once=18)
    monkeypatch.setattr(rollout, "_of_streams", fails_once)
    with caplog.at_level(logging.WARNING):
        again = drawn(llama, HOW["guided"], top_p=0.9, at_once=36)
    assert again[0] == half[0], "as where half of it was asked for"
    assert "9 completions side by side" in caplog.text


def test_steps_of_fixed_shapes_keep_their_rows(llama: Policy) -> None:
    _, passes = drawn(llama, HOW["plain"], decoding="static")
    assert {*passes} == {3 * len(PROMPTS)} and len(passes) > MOST / 2


@pytest.mark.parametrize("padding", [True, False])
def test_rows_are_dropped_without_a_cache_too(
    llama: Policy, monkeypatch: pytest.MonkeyPatch, padding: bool
) -> None:
    usual, _ = drawn(llama, HOW["guided"], temperature=0.0)
    monkeypatch.setattr(llama, "reading", Reading(padding=padding, cache=False))
    kept: list[int] = []
    drop = LiveRows.drop_ended

    def watched(self: LiveRows, alive: int) -> Tensor:
        kept.append(alive)
        return drop(self, alive)

    monkeypatch.setattr(LiveRows, "drop_ended", watched)
    found, _ = drawn(llama, HOW["guided"], temperature=0.0)
    assert completions_of(found) == completions_of(usual) and kept


def test_memory_of_dropped_rows_is_given_back_layer_by_layer(llama: Policy) -> None:
    cache = decoding_cache(llama.model)
    with torch.inference_mode():
        read(llama.model, torch.tensor([[1, 2, 3]] * 4), cache=cache)
        held = [weakref.ref(room) for layer in cache.layers for room in (layer.key_room, layer.value_room)]
        assert len(held) == 4 and all(one() is not None for one in held)
        cache.reorder_cache(torch.tensor([2]))
    assert not any(one() is not None for one in held), "beside the cache of one row that of all is there"


# --- LiveRows --------------------------------------------------------------------------------------


def test_rows_keep_their_places_through_several_drops() -> None:
    live = LiveRows(5, 4, torch.tensor([9]), told=2)
    first = torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0])
    live.add(torch.tensor([1, 9, 3, 4, 9]), first, 2 * first)
    assert (len(live), live.alive()) == (5, 3)
    assert live.drop_ended(3).tolist() == [0, 2, 3]
    live.add(torch.tensor([9, 5, 6]), torch.tensor([-0.5, -0.25, -0.125]), torch.zeros(3))
    third = torch.tensor([-8.0, -1.0, -0.5])
    live.add(torch.tensor([7, 9, 8]), third, third)  # row 0 has ended and is still there
    assert (len(live), live.alive()) == (3, 1)
    assert live.drop_ended(1).tolist() == [2]
    live.add(torch.tensor([2]), torch.tensor([-0.0]), torch.tensor([-1.0]))
    assert live.completions([9]) == [
        ([1, 9], [1.5, 2.0]),
        ([9], [2.0, 4.0]),
        ([3, 5, 9], [4.25, 7.0]),
        ([4, 6, 8, 2], [4.625, 9.5]),
        ([9], [5.0, 10.0]),
    ]


def test_row_without_a_token_is_an_error_also_once_it_is_dropped() -> None:
    live = LiveRows(2, 3, torch.tensor([9]), told=0)
    live.add(torch.tensor([-1, 1]))
    live.add(torch.tensor([9, 1]))
    live.drop_ended(1)
    live.add(torch.tensor([9]))
    with pytest.raises(NotFinite):
        live.completions([9])
