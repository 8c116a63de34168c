"""Sampling against plain forwards: padding, cache, guidance, and where a completion ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import WORDS, assert_drawn_from, lively_policy, tiny_config
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from quark_fast.model.attention import attend_by_sdpa, grouped_attention
from quark_fast.model.cache import ROOM, decoding_cache, with_room
from quark_fast.model.copies import frozen_copy
from quark_fast.model.policy import Policy
from quark_fast.model.reading import Reading, cache_argument, pad_left
from quark_fast.rollout import transformers as rollout
from quark_fast.rollout.sampling import Conditioning, SampleRequest, Sampling
from quark_fast.rollout.tokens import NextToken, NotFinite, scores_of
from quark_fast.rollout.transformers import _parts, sample

ARCHITECTURES = ["gpt2", "llama", "qwen2"]
STOP = WORDS
VOCABULARY = WORDS + 2
# float32 logits up to 10 by two kernels, in another order of summation; the bugs make 0.1 and more.
KERNELS = {"rtol": 0, "atol": 1e-4}

Make = Callable[..., Path]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def run(policy: Policy, model: Any, *request: Any) -> list[list[list[int]]]:
    """The completions of ``sample`` in the order of the prompts."""
    found = {}
    for indices, groups, *_ in sample(policy, model, SampleRequest(*request)):
        assert not found.keys() & set(indices), "a prompt is sampled once"
        found.update(zip(indices, groups, strict=True))
    return [found[i] for i in sorted(found)]


# --- Padding, cache and guidance, against one plain forward for each token -------------------------

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [7], [2, 7, 1], [9, 9]]
CONTINUATION = [11, 22, 33, 44, 55]


def seen_logits(
    monkeypatch: pytest.MonkeyPatch,
    policy: Policy,
    conditioning: Conditioning,
    samples: int,
    **sampling: Any,
) -> Tensor:
    """(steps, rows, V): what the tokens of ``CONTINUATION`` would have been drawn from, prompt by prompt."""
    steps: list[Tensor] = []

    def scripted(logits: Tensor, wanted: NextToken, *_: Any) -> Tensor:
        scores = scores_of(logits, wanted)
        steps.append(scores.clone())
        return torch.full((len(scores),), CONTINUATION[len(steps) - 1])

    monkeypatch.setattr(rollout, "draw_tokens", scripted)
    settings = {"max_new_tokens": len(CONTINUATION), "min_new_tokens": 0} | sampling
    model = frozen_copy(policy, torch.float32)
    request = SampleRequest(PROMPTS, conditioning, Sampling(**settings), samples, 0)
    ((indices, groups, *_),) = sample(policy, model, request)
    assert groups == [[CONTINUATION] * samples] * len(PROMPTS)
    by_prompt = torch.stack(steps).view(len(steps), len(PROMPTS), samples, -1)
    order = [indices.index(i) for i in range(len(PROMPTS))]
    return by_prompt[:, order].flatten(1, 2)


def plain_logits(policy: Policy, quantile: int | None, samples: int) -> Tensor:
    """The same by the model itself: every prefix alone, no padding, no cache, transformers' attention."""
    policy.model.set_attn_implementation("eager")
    steps = []
    with torch.no_grad():
        for length in range(len(CONTINUATION)):
            contexts = [policy.conditioned(p, quantile) + CONTINUATION[:length] for p in PROMPTS]
            rows = [policy.model(torch.tensor([c])).logits[0, -1, :VOCABULARY] for c in contexts]
            steps.append(torch.stack(rows).repeat_interleave(samples, 0))
    return torch.stack(steps)


def test_prompts_are_read_without_a_copy_of_the_head_for_each(tiny_model: Make) -> None:
    policy = Policy.create(tiny_model("llama"), quantiles=2)
    prompts = [[3, 1, 4, 1, 5], [9, 2], [6]]
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        run(policy, frozen_copy(policy, torch.float32), prompts, Conditioning(1), Sampling(2), 1, 0)
    hidden, vocabulary = policy.model.config.hidden_size, policy.model.config.vocab_size
    shapes = [shape for event in profiler.events() for shape in event.input_shapes]
    assert [hidden, vocabulary] in shapes
    assert [len(prompts), hidden, vocabulary] not in shapes


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("quantile", [None, 2])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_cache_and_samples_do_not_change_what_tokens_are_drawn_from(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Make, architecture: str, quantile: int | None, samples: int
) -> None:
    policy = lively_policy(tiny_model(architecture, padded_vocabulary=10))
    seen = seen_logits(monkeypatch, policy, Conditioning(quantile), samples)
    expected = plain_logits(policy, quantile, samples)
    assert seen.shape == expected.shape, "one row a completion, the base vocabulary alone"
    torch.testing.assert_close(seen, expected, **KERNELS)
    # The reward token is heard, or else this says nothing about it.
    other = plain_logits(policy, 1, samples)
    assert (expected - other).abs().amax((0, 2)).min() > 0.1


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_guided_logits_are_the_formula_over_two_plain_streams(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Make, architecture: str, samples: int
) -> None:
    policy = lively_policy(tiny_model(architecture))
    seen = seen_logits(monkeypatch, policy, Conditioning(2, 0, 3.0), samples)
    best, worst = (plain_logits(policy, k, samples).log_softmax(-1) for k in (2, 0))
    torch.testing.assert_close(seen, worst + 3.0 * (best - worst), rtol=0, atol=1e-3)  # 3 + 2 times KERNELS


def test_temperature_divides_the_guided_log_probabilities(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Make
) -> None:
    policy = lively_policy(tiny_model())
    plain = seen_logits(monkeypatch, policy, Conditioning(2, 0, 3.0), 1)
    warm = seen_logits(monkeypatch, policy, Conditioning(2, 0, 3.0), 1, temperature=2.0)
    torch.testing.assert_close(warm, plain / 2)


def test_guidance_by_hand(stub: Callable[..., Any]) -> None:
    # After the last word, p(w0, w1, w2) is best: .6 .3 .1, worst: .6 .1 .3; w = 2: .6, .9, 1/30 -> w1.
    policy, model = stub({"best": [0.6, 0.3, 0.1], "worst": [0.6, 0.1, 0.3]})
    sampling = Sampling(max_new_tokens=1, min_new_tokens=0, temperature=0.0)
    for conditioning, expected in [
        (Conditioning(1), 0),
        (Conditioning(1, 0, 1.0), 0),
        (Conditioning(1, 0, 2.0), 1),
        (Conditioning(1, 0, -2.0), 2),  # .6, 1/90, 2.7: what the worst token would rather say
        (Conditioning(0, 1, 2.0), 2),
    ]:
        assert run(policy, model, [[5]], conditioning, sampling, 1, 0) == [[[expected]]]
    # Renormalised: at w = 2 the shares are .6 : .9 : .033.
    for w, top_p, shares in [
        (2.0, 1.0, [0.6, 0.9, 1 / 30]),
        (2.0, 0.8, [0.6, 0.9, 0.0]),  # the best token's nucleus has the first two
        (2.0, 0.5, [0.6, 0.0, 0.0]),  # and here the first alone, which the mix holds second
        (0.5, 0.8, [0.6, 0.03**0.5, 0.03**0.5]),  # the mix's own: two that tie are both in it, or none is
        (0.5, 0.6, [0.6, 0.0, 0.0]),
        (-2.0, 0.8, [0.6, 0.0, 2.7]),  # the worst token's
    ]:
        sampling = Sampling(1, 0, top_p=top_p, rows=4000)
        (many,) = run(policy, model, [[5]], Conditioning(1, 0, w), sampling, 4000, 0)
        counts = torch.tensor([row[0] for row in many]).bincount(minlength=3)
        assert_drawn_from(counts, torch.tensor(shares))


def test_the_nucleus_is_that_of_the_weight_between_0_and_1() -> None:
    assert [Conditioning(3, 0, w).nucleus_of() for w in (-0.5, 0.0, 0.5, 1.0, 1.5)] == [
        1,
        None,
        None,
        None,
        0,
    ]
    assert Conditioning(3, None, 2.0).nucleus_of() is None
    assert Conditioning(3, 3, 2.0).nucleus_of() is None, "a single quantile is its own opposite"


def test_greedy_takes_the_most_probable_token_each_time_whatever_the_seed(stub: Callable[..., Any]) -> None:
    def chain(last: int, quantile: int | None) -> Tensor:
        # The worst token counts upwards, the best downwards; the rest of the mass is close behind.
        probs = torch.full((VOCABULARY,), 0.5 / VOCABULARY)
        probs[(last + (1 if quantile == 0 else -1)) % WORDS] += 0.5
        return probs

    policy, model = stub(chain)
    greedy = Sampling(5, 0, temperature=0.0, top_p=0.1)
    for seed in range(3):
        assert run(policy, model, [[5], [7]], Conditioning(0), greedy, 1, seed) == [
            [[6, 7, 8, 9, 10]],
            [[8, 9, 10, 11, 12]],
        ]
        assert run(policy, model, [[5]], Conditioning(1), greedy, 1, seed) == [[[4, 3, 2, 1, 0]]]


def test_greedy_blocks_the_end_of_text_and_mixes_guided_streams(stub: Callable[..., Any]) -> None:
    shares = {"best": [0.6, 0.3, 0.1], "worst": [0.6, 0.1, 0.3]}
    policy, model = stub(shares)
    greedy = Sampling(1, 0, temperature=0.0)
    assert run(policy, model, [[5]], Conditioning(1, 0, 2.0), greedy, 1, 0) == [[[1]]]
    assert run(policy, model, [[5]], Conditioning(1, 0, -2.0), greedy, 1, 0) == [[[2]]]

    def ends(last: int, quantile: int | None) -> Tensor:
        probs = torch.zeros(VOCABULARY)
        probs[STOP], probs[3] = 0.9, 0.1
        return probs

    policy, model = stub(ends)
    assert run(policy, model, [[5]], Conditioning(1), Sampling(4, 2, 0.0), 1, 0) == [[[3, 3, STOP]]]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_completions_are_those_of_transformers_generate(tiny_model: Make, architecture: str) -> None:
    policy = lively_policy(tiny_model(architecture))
    found = run(policy, policy.model, PROMPTS, Conditioning(2), Sampling(30, 30, temperature=0.0), 1, 0)
    for prompt, (ours,) in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([policy.conditioned(prompt, 2)])
        theirs = policy.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=30,
            min_new_tokens=30,
            do_sample=False,
            eos_token_id=policy.stop_ids,
            pad_token_id=0,
            suppress_tokens=list(range(policy.vocabulary, policy.model.get_output_embeddings().out_features)),
        )
        assert ours == theirs[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("conditioning", [Conditioning(2), Conditioning(2, 0, 2.0)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_way_of_reading_gives_the_same_completions(
    tiny_model: Make, architecture: str, conditioning: Conditioning, samples: int
) -> None:
    policy = lively_policy(tiny_model(architecture))
    sampling = Sampling(9, 9, temperature=0.0, rows=4)
    found = []
    for policy.reading in (Reading(p, c) for p in (True, False) for c in (True, False)):
        found.append(run(policy, policy.model, PROMPTS, conditioning, sampling, samples, 0))
    assert all(one == found[0] for one in found)
    assert len({len(row) for group in found[0] for row in group}) == 1 and found[0][0] != found[0][2]


def test_reading_without_padding_has_rows_of_one_length_alone(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Make
) -> None:
    policy = lively_policy(tiny_model())
    policy.reading = Reading(padding=False)
    seen: list[Any] = []
    own = rollout.next_logits

    def watched(model: Any, contexts: Any, *rest: Any, **named: Any) -> Any:
        seen.append(sorted({len(one) for one in contexts}))
        return own(model, contexts, *rest, **named)

    monkeypatch.setattr(rollout, "next_logits", watched)
    prompts = [[1] * n for n in (1, 4, 1, 2, 4, 4)]
    drawn = run(policy, policy.model, prompts, Conditioning(1, 0, 2.0), Sampling(3, 3, rows=6), 1, 0)
    assert [len(group) for group in drawn] == [1] * 6
    assert seen == [[3], [4], [6]], "prefix and token with them"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (1.0, 1.0), (0.7, 0.9)])
def test_logits_that_are_no_numbers_are_an_error_and_nothing_is_drawn(
    tiny_model: Make, temperature: float, top_p: float, value: float
) -> None:
    policy = Policy.create(tiny_model(), quantiles=2)
    policy.model.eval()
    head = policy.model.get_output_embeddings().weight
    with torch.no_grad():
        policy.model.get_input_embeddings().base.weight[7] = torch.nan  # only a row that reads it is broken
    sampling = Sampling(5, 2, temperature, top_p)
    assert len(run(policy, policy.model, [[1, 2], [3]], Conditioning(1), sampling, 1, 0)) == 2
    with pytest.raises(NotFinite, match="NaN or infinite, so there is nothing to sample from"):
        run(policy, policy.model, [[1, 2], [7]], Conditioning(1), sampling, 1, 0)
    with torch.no_grad():
        head[3, 0] = value
    with pytest.raises(NotFinite):
        run(policy, policy.model, [[1, 2]], Conditioning(1), sampling, 1, 0)


def test_guidance_of_one_reads_one_stream() -> None:
    assert Conditioning(0, 0, 3.0).streams() == [(0, 1.0)], "a single quantile is its own opposite"
    assert Conditioning(2, 0, 1.0).streams() == [(2, 1.0)]
    assert Conditioning(2, None, 5.0).streams() == [(2, 1.0)]
    assert Conditioning(2, 0, 3.0).streams() == [(2, 3.0), (0, -2.0)]
    assert Conditioning().streams() == [(None, 1.0)]


# --- grouped_attention -----------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["none", "bool", "additive"])
@pytest.mark.parametrize("queries", [1, 6])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (3, 1)])
def test_grouped_attention_is_sdpa(heads: int, groups: int, queries: int, mask: str) -> None:
    batch, keys, width = 3, 6, 8
    query = torch.randn(batch, queries, heads, width, generator=generator()).transpose(1, 2)
    key, value = torch.randn(2, batch, groups, keys, width, generator=generator(1))
    allowed = torch.ones(batch, 1, queries, keys, dtype=torch.bool).tril(keys - queries)
    allowed[0, ..., :3] = False  # left padding
    allowed[..., -1] |= ~allowed.any(-1)
    given = {"none": None, "bool": allowed, "additive": torch.where(allowed, 0.0, -torch.inf)}[mask]
    module = SimpleNamespace(num_key_value_groups=heads // groups, is_causal=True, training=False)
    for scaling in (None, 0.2):
        ours, _ = grouped_attention(module, query, key, value, given, scaling=scaling)
        theirs, _ = sdpa_attention_forward(module, query, key, value, given, scaling=scaling)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # float32, sums of 8 and 6 terms
        if queries == 1:  # as on a GPU
            rows = query.reshape(batch, groups, heads // groups, width)
            packed = attend_by_sdpa(rows, key, value, given, scaling)
            torch.testing.assert_close(packed, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tokens_to_come_are_not_attended_to(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values are multiplied with the room behind them, whatever its memory held before."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **how: empty(*size, **how).fill_(torch.nan))
    model, given = SimpleNamespace(config=tiny_config("llama", VOCABULARY)), generator()
    layer = decoding_cache(model).layers[0]
    query = torch.randn(3, 6, 1, 8, generator=given).to(dtype)
    wide = 0
    for _ in range(2 * ROOM):
        key, value = layer.update(*torch.randn(2, 3, 2, 1, 8, generator=given).to(dtype))
        wide += with_room(value).shape[2] > value.shape[2]
        ours, _ = grouped_attention(SimpleNamespace(), query, key, value, None)
        alone, _ = grouped_attention(SimpleNamespace(), query, key.clone(), value.clone(), None)
        torch.testing.assert_close(ours, alone)  # the same sums, in another order
    assert (wide > ROOM) == (dtype != torch.float32)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_decoding_step_with_padding_is_the_same_with_grouped_attention_and_sdpa(
    tiny_model: Make, architecture: str
) -> None:
    policy = lively_policy(tiny_model(architecture))
    logits = []
    for attention in ("quark_grouped", "sdpa"):
        policy.model.set_attn_implementation(attention)
        ids, mask = pad_left([policy.conditioned(p, 1) for p in PROMPTS], torch.device("cpu"))
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = {cache_argument(policy.model): DynamicCache(config=policy.model.config)}
        with torch.no_grad():
            first = policy.model(ids, attention_mask=mask, position_ids=positions, use_cache=True, **cache)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            step = policy.model(
                torch.full((len(ids), 1), 8),
                attention_mask=mask,
                position_ids=positions[:, -1:] + 1,
                **cache,
            )
        logits.append(torch.stack([first.logits[:, -1], step.logits[:, -1]]))
    torch.testing.assert_close(*logits, **KERNELS)


# --- Where completions end, who is independent of whom ---------------------------------------------


class StubModel:
    """Logits by the last token alone, and by the reward token in front where there is one."""

    def __init__(self, policy: Policy, next_probs: Callable[[int, int | None], Tensor]) -> None:
        self.device = torch.device("cpu")
        self.config = tiny_config("llama", VOCABULARY)
        self.policy = policy
        self.next_probs = next_probs

    def __call__(self, ids: Tensor, **_: Any) -> SimpleNamespace:
        by_id = {i: k for k, i in enumerate(self.policy.reward_ids)}
        probs = []
        for row in ids.tolist():
            quantile = next((by_id[i] for i in row if i in by_id), None)
            probs.append(self.next_probs(row[-1], quantile))
        # Finite, as real logits are: guidance subtracts them from each other.
        return SimpleNamespace(logits=torch.stack(probs).clamp(min=1e-30).log().unsqueeze(1))

    forward = __call__


@pytest.fixture
def stub(tiny_model: Make) -> Callable[..., tuple[Policy, StubModel]]:
    """A policy of two quantiles and a stand-in for its model, whose next token has given probabilities."""
    policy = Policy.create(tiny_model(), quantiles=2)
    policy.reading = Reading(cache=False)  # each row is seen whole, with its reward token

    def make(shares: dict[str, Sequence[float]] | Callable[[int, int | None], Tensor]) -> Any:
        if callable(shares):
            return policy, StubModel(policy, shares)

        def by_quantile(last: int, quantile: int | None) -> Tensor:
            given = shares["best" if quantile else "worst"]
            return torch.tensor([*given, *[0.0] * (VOCABULARY - len(given))])

        return policy, StubModel(policy, by_quantile)

    return make


def tokens(*, also: Sequence[int] = (), width: int = VOCABULARY) -> Tensor:
    """Equal probability for w0 ... w3 and ``also``."""
    probs = torch.zeros(width)
    probs[[0, 1, 2, 3, *also]] = 1.0
    return probs


def test_completion_ends_with_its_first_stop_id_and_nothing_after(stub: Callable[..., Any]) -> None:
    policy, model = stub(lambda last, quantile: tokens(also=[STOP]))
    groups = run(policy, model, [[5], [6, 7]], Conditioning(1), Sampling(6, 0), 50, 0)
    lengths = set()
    for completion in groups[0] + groups[1]:
        lengths.add(len(completion))
        assert STOP not in completion[:-1]
        assert completion[-1] == STOP or len(completion) == 6
    assert lengths == {1, 2, 3, 4, 5, 6}


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_no_stop_id_among_the_first_min_new_tokens(stub: Callable[..., Any], guidance: float) -> None:
    eager_to_stop = tokens(also=[STOP])
    eager_to_stop[STOP] = 1e4
    policy, model = stub(lambda last, quantile: eager_to_stop)
    conditioning = Conditioning(1, 0, guidance)
    (group,) = run(policy, model, [[5]], conditioning, Sampling(9, 3), 60, 0)
    # One in 2500 goes on past the fourth; 60 of them see at most a handful.
    assert all(STOP not in completion[:3] for completion in group)
    assert sum(len(completion) == 4 for completion in group) >= 58
    (group,) = run(policy, model, [[5]], conditioning, Sampling(9, 0), 60, 0)
    assert sum(completion == [STOP] for completion in group) >= 58


def test_reward_tokens_and_padding_of_the_table_are_never_sampled(stub: Callable[..., Any]) -> None:
    beyond = tokens(also=range(VOCABULARY, VOCABULARY + 8), width=VOCABULARY + 8)
    beyond[VOCABULARY:] = 1e6
    policy, model = stub(lambda last, quantile: beyond)
    for conditioning in (Conditioning(), Conditioning(1), Conditioning(1, 0, 4.0)):
        (group,) = run(policy, model, [[5]], conditioning, Sampling(5), 40, 0)
        assert {token for completion in group for token in completion} == {0, 1, 2, 3}


def test_each_prompt_gets_its_own_completions_and_as_many_as_asked(stub: Callable[..., Any]) -> None:
    # The next token is the last one plus 1, so that a completion names its prompt.
    policy, model = stub(lambda last, quantile: torch.eye(VOCABULARY)[last + 1])
    prompts = [[5], [1, 2, 30], [20, 10], [40], [3, 15]]
    for rows in (2, 6, 100):
        groups = run(policy, model, prompts, Conditioning(1, 0, 2.0), Sampling(3, rows=rows), 3, 0)
        assert groups == [[[p[-1] + 1, p[-1] + 2, p[-1] + 3]] * 3 for p in prompts]


def test_batches_hold_prompts_of_similar_length_and_at_most_the_rows_asked(stub: Callable[..., Any]) -> None:
    policy, model = stub(lambda last, quantile: tokens())
    prompts = [[1] * length for length in (4, 1, 3, 2, 1)]
    request = SampleRequest(prompts, Conditioning(), Sampling(2, rows=7), 3, 0)
    batches = [batch.indices for batch in sample(policy, model, request)]
    assert batches == [[1, 4], [3, 2], [0]]


@pytest.mark.parametrize(("prompts", "samples"), [(1, 1), (5, 3), (7, 4), (3, 12)])
@pytest.mark.parametrize("size", [1, 2, 5, 8, 100])
def test_parts_of_a_batch_hold_every_sample_of_every_prompt_once(
    prompts: int, samples: int, size: int
) -> None:
    counts = [0] * prompts
    for part, each in _parts([3] * prompts, samples, size, padding=True):
        places = range(prompts)[part]
        assert len(places) * each <= size
        for i in places:
            counts[i] += each
    assert counts == [samples] * prompts


@pytest.mark.parametrize(("guidance", "most"), [(1.0, 12), (1.5, 6)])
def test_guided_completions_whose_streams_need_a_cache_each_are_half_as_many_side_by_side(
    tiny_model: Make, monkeypatch: pytest.MonkeyPatch, guidance: float, most: int
) -> None:
    policy = Policy.create(tiny_model(), quantiles=2)
    together: list[int] = []
    own = rollout._sample_batch

    def seen(policy: Policy, model: Any, request: SampleRequest, generator: torch.Generator) -> Any:
        together.append(len(request.prompts) * request.samples)
        return own(policy, model, request, generator)

    monkeypatch.setattr(rollout, "_sample_batch", seen)
    how = Conditioning(1, 0, guidance)
    request = SampleRequest([[i] for i in range(1, 7)], how, Sampling(3, 0, rows=12), 3, 0)
    drawn = list(sample(policy, frozen_copy(policy, torch.float32), request))
    assert [len(group) for batch in drawn for group in batch.completions] == [3] * 6
    assert max(together) == most and sum(together) == 18


@pytest.mark.parametrize("at_once", [0, 7, 1000])
def test_fewer_side_by_side_draw_from_the_same_distribution(tiny_model: Make, at_once: int) -> None:
    policy, prompts = lively_policy(tiny_model()), [[1], [2, 3]]
    model = frozen_copy(policy, torch.float32)
    groups = run(policy, model, prompts, Conditioning(), Sampling(1, 0, rows=6000, at_once=at_once), 3000, 0)
    for prompt, group in zip(prompts, groups, strict=True):
        with torch.no_grad():
            logits = policy.model(torch.tensor([policy.conditioned(prompt, None)])).logits[0, -1, :VOCABULARY]
        counts = torch.tensor([token for (token,) in group]).bincount(minlength=VOCABULARY)
        assert counts.sum() == 3000
        assert_drawn_from(counts, logits.softmax(-1))


def test_same_seed_same_completions_and_another_seed_others(tiny_model: Make) -> None:
    policy = lively_policy(tiny_model())
    model = frozen_copy(policy, torch.float32)
    first, again, other = (
        run(policy, model, PROMPTS, Conditioning(2, 0, 3.0), Sampling(8, top_p=0.9), 4, seed)
        for seed in (1, 1, 2)
    )
    assert first == again and first != other
    assert len({tuple(c) for group in first for c in group}) > 10, "samples of a prompt differ"


def test_batches_of_one_call_do_not_share_their_luck(tiny_model: Make) -> None:
    policy = lively_policy(tiny_model())
    model = frozen_copy(policy, torch.float32)
    first, second = run(policy, model, [[5], [5]], Conditioning(2), Sampling(8, rows=4), 4, 0)
    assert first != second


def test_batch_comes_out_the_same_whatever_came_before_it(stub: Callable[..., Any]) -> None:
    def next_probs(last: int, quantile: int | None) -> Tensor:
        return tokens(also=[STOP] * (last == 50))

    policy, model = stub(next_probs)

    def last_batch(first: list[list[int]], disturb: bool) -> list[list[list[int]]]:
        torch.manual_seed(disturb)  # the global generator is not used either
        settings = (Conditioning(), Sampling(8, 0, rows=8), 4, 3)
        request = SampleRequest([*first, [4, 5, 6], [7, 8, 9]], *settings)
        batches = list(sample(policy, model, request))
        return batches[-1].completions

    assert last_batch([[10], [11]], False) == last_batch([[50], [50]], True)
