"""The evaluation's own measures against plain forwards, and the classes of prompts."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import lively_policy
from torch import Tensor

from quark_fast.data.row import Row
from quark_fast.errors import UsageError
from quark_fast.evaluation import perplexity
from quark_fast.evaluation.held_out import (
    Completion,
    EncodedPrompts,
    EvaluationSetup,
    control_texts,
    evaluate,
    first_completions,
    fit_to_prompts,
)
from quark_fast.evaluation.judging import judged
from quark_fast.evaluation.perplexity import (
    TEXT_PROMPT,
    ReferenceLogits,
    completion_nll,
    completion_nll_and_kl,
    id_nll,
    text_fit,
)
from quark_fast.evaluation.probe import Probe, noise_note
from quark_fast.evaluation.prompt_classes import CLASS_SAMPLES, check_classes, classify_prompts, prompt_class
from quark_fast.evaluation.table_rows import TableRow, table_rows
from quark_fast.metrics import RankCorrelation, Sample, evaluate_samples
from quark_fast.model.policy import Policy
from quark_fast.model.reading import Reading
from quark_fast.rewards.reward import describe
from quark_fast.rollout.sampling import Conditioning, DrawnBatch, SampleRequest, Sampling
from quark_fast.rollout.shared_samples import SharedSamples
from quark_fast.rollout.transformers import sample
from quark_fast.runtime.overlap import Begun

Make = Callable[..., Path]
TEXTS = [[3, 1, 4, 1, 5, 9, 2, 6], [7, 8], [2, 7, 1, 8, 2], [9, 9, 9]]
LONG = [i % 9 for i in range(72)]  # more than two prompts of a text
GREEDY = Sampling(4, 0, temperature=0.0, rows=3)


@pytest.fixture
def policy(tiny_model: Make) -> Policy:
    return lively_policy(tiny_model("llama", padded_vocabulary=10))


@torch.no_grad()
def by_hand(
    policy: Policy, text: list[int], conditioning: Conditioning, first: int | None = None
) -> tuple[float, int, int]:
    """One token at a time, nothing batched or padded, in float64 after the model; from ``first`` on."""
    nll, correct, first = 0.0, 0, min(TEXT_PROMPT, len(text) // 2) if first is None else first
    for place in range(first, len(text)):
        mixed = torch.zeros(policy.vocabulary, dtype=torch.float64)
        for quantile, weight in conditioning.streams():
            ids = torch.tensor([policy.conditioned(text[:place], quantile)])
            logits = policy.model(ids).logits[0, -1, : policy.vocabulary].double()
            mixed += weight * logits.log_softmax(-1)
        logp = mixed.log_softmax(-1)
        nll -= float(logp[text[place]])
        correct += int(logp.argmax()) == text[place]
    return nll, correct, len(text) - first


@pytest.mark.parametrize(
    "conditioning", [Conditioning(), Conditioning(2), Conditioning(2, 0, 2.0)], ids=["plain", "best", "w=2"]
)
def test_text_fit_is_that_of_one_forward_a_token(policy: Policy, conditioning: Conditioning) -> None:
    expected = [by_hand(policy, text, conditioning) for text in (*TEXTS, LONG)]
    # A token that the model does get right, so that counting none would be seen.
    greedy = [by_hand(policy, [7, token], conditioning)[1] for token in range(policy.vocabulary)]
    right = [7, greedy.index(1)]
    assert [tokens for _, _, tokens in expected] == [4, 1, 3, 2, 72 - 32], "half, or all but 32"
    found = text_fit(policy, policy.model, [*TEXTS, LONG, right], conditioning, rows=2)
    for (nll, correct, tokens), (a, b, c) in zip(found, expected, strict=False):
        assert nll == pytest.approx(a, rel=1e-4)  # float32 logits up to 10
        assert (correct, tokens) == (b, c)
    assert found[-1][1:] == (1, 1)


def test_sample_carries_the_fit_of_its_own_text_and_the_tasks_measures(policy: Policy) -> None:
    rows: list[Row] = [{"prompt": f"w{text[0]}", "place": i} for i, text in enumerate(TEXTS)]
    held_out = EncodedPrompts(rows, [text[:1] for text in TEXTS], 1, TEXTS)
    reward = describe(lambda prompts, completions, **columns: [None, 0.25, 0.5, 0.75], "four")

    def measures(row: Row, completion: list[int], reward: float) -> dict[str, float]:
        rewarded = {} if math.isnan(reward) else {"reward": reward}
        return {"place": row["place"], "length": len(completion), **rewarded}

    table = table_rows(policy.quantiles, [2.0], "all")
    sampling = Sampling(4, 4, temperature=0.0, rows=4)
    setup = EvaluationSetup(policy, policy.model, reward, held_out, sampling, 0)
    seen = list(evaluate(setup, policy.model, table, measures))
    assert [name for name, _ in seen] == [row.name for row in table]
    for row, (_, samples) in zip(table, seen, strict=True):
        for one in samples:
            nll, correct, tokens = by_hand(policy, TEXTS[one.prompt_id], row.conditioning)
            assert one.text_nll == pytest.approx(nll, rel=1e-4)
            assert (one.text_correct, one.text_tokens) == (correct, tokens)
            # A completion without a score has what needs none: the tokens of the worst loops, say.
            rewarded = {} if one.score is None else {"reward": one.score}
            assert one.measures == {"place": one.prompt_id, "length": 4, **rewarded}
        assert sum(one.score is None for one in samples) == 1


def test_ordinary_texts_are_measured_beside_the_first_prompts_under_each_rows_token(policy: Policy) -> None:
    rows: list[Row] = [{"prompt": f"w{i}"} for i in range(3)]
    held_out = EncodedPrompts(rows, [[0], [1], [2]], 2)
    reward = describe(lambda prompts, completions, **columns: [0.5] * len(prompts), "half")
    controls = control_texts(policy, ["w3 w1 w4 w1 w5", "w9", "w2 w7 w1"])
    assert controls == [[3, 1, 4, 1, 5], [2, 7, 1]], "one word leaves nothing to predict"
    setup = EvaluationSetup(policy, policy.model, reward, held_out, Sampling(2, 0), 0, controls=controls)
    table = table_rows(policy.quantiles, [2.0], "all")
    for row, (_, samples) in zip(table, evaluate(setup, policy.model, table), strict=True):
        for one in samples:
            fit = (one.text_nll, one.text_correct, one.text_tokens)
            if one.prompt_id == 2:
                assert fit == (0.0, 0, 0)
            else:
                expected = by_hand(policy, controls[one.prompt_id], row.conditioning)
                assert fit == pytest.approx(expected, rel=1e-4)
        accuracy = evaluate_samples(samples)["text_accuracy"].value
        correct, tokens = (
            sum(getattr(one, f"text_{what}") for one in samples) for what in ("correct", "tokens")
        )
        assert accuracy == pytest.approx(correct / tokens)


def test_fit_to_prompt_compares_the_first_completion_after_its_prompt_and_after_another(
    policy: Policy,
) -> None:
    rows: list[Row] = [{"prompt": f"w{i}"} for i in range(5)]
    held_out = EncodedPrompts(rows, [[0], [1, 4], [2], [3], [4, 2, 1]], 2)
    reward = describe(lambda prompts, completions, **columns: [None] * len(prompts), "none")
    setup = EvaluationSetup(
        policy, policy.model, reward, held_out, Sampling(3, 3, rows=4), 0, prompt_fit=True
    )
    drawn: dict[int, list[list[int]]] = {}
    made = setup.draw("evaluation", policy.model, Conditioning(), lambda batch: Begun(lambda: batch))
    for indices, groups, *_ in (batch.finish() for batch in made):
        drawn |= zip(indices, groups, strict=True)
    samples = [
        one for _, part in evaluate(setup, policy.model, [TableRow("base", base=True)]) for one in part
    ]
    for i, of_prompt in itertools.groupby(samples, key=lambda one: one.prompt_id):
        first, second = of_prompt
        assert not second.measures
        own, other = (
            by_hand(policy, [*held_out.ids[j], *drawn[i][0]], Conditioning(), len(held_out.ids[j]))[0]
            for j in (i, (i + 2) % 5)
        )
        # Counted whether or not it has a score.
        assert first.measures == {"prompt_fit": pytest.approx((other - own) / 3, rel=1e-3)}
        assert abs(other - own) > 1e-3, "a model that reads its prompt"
    assert "prompt_fit" in evaluate_samples(samples)


# --- entropy and KL -------------------------------------------------------------------------------


@torch.no_grad()
def log_q_by_hand(
    policy: Policy, prompt: list[int], completion: list[int], how: Conditioning, sampling: Sampling
) -> float:
    """One token at a time, in float64 after the model, the nucleus by sorting."""

    def probabilities(how: Conditioning, place: int) -> Tensor:
        mixed = torch.zeros(policy.vocabulary, dtype=torch.float64)
        for quantile, weight in how.streams():
            ids = torch.tensor([[*policy.conditioned(prompt, quantile), *completion[:place]]])
            mixed += weight * policy.model(ids).logits[0, -1, : policy.vocabulary].double().log_softmax(-1)
        if place < sampling.min_new_tokens:
            mixed[policy.stop_ids] = -torch.inf
        return (mixed / sampling.temperature).softmax(-1)

    total = 0.0
    for place, token in enumerate(completion):
        nearest = dataclasses.replace(how, guidance=min(max(how.guidance, 0.0), 1.0))  # whose nucleus it is
        falling = probabilities(nearest, place).sort(descending=True)
        inside = falling.indices[falling.values.cumsum(0) - falling.values < sampling.top_p]
        probs = probabilities(how, place)
        assert token in inside
        total += float((probs[token] / probs[inside].sum()).log())
    return total


@pytest.mark.parametrize("top_p", [0.8, 1.0])
@pytest.mark.parametrize(
    "conditioning", [Conditioning(), Conditioning(2), Conditioning(2, 0, 2.0)], ids=["plain", "best", "w=2"]
)
def test_own_nll_is_that_of_every_token_drawn_by_one_forward_a_token(
    policy: Policy, conditioning: Conditioning, top_p: float
) -> None:
    rows: list[Row] = [{"prompt": f"w{text[0]}"} for text in TEXTS]
    held_out = EncodedPrompts(rows, TEXTS, 6)
    reward = describe(lambda prompts, completions, **columns: [None] * len(prompts), "none")
    policy.stop_ids = [*policy.stop_ids, *range(0, 50, 3)]  # completions of all lengths
    sampling = Sampling(5, 1, temperature=0.7, top_p=top_p, rows=12, at_once=5)
    setup = EvaluationSetup(policy, policy.model, reward, held_out, sampling, 0)

    def drawn(own_nll: bool) -> list[DrawnBatch]:
        how = ("evaluation", policy.model, conditioning, lambda batch: Begun(lambda: batch), None, own_nll)
        return [batch.finish() for batch in setup.draw(*how)]

    lengths = set()
    for batch, untold in zip(drawn(True), drawn(False), strict=True):
        assert untold == DrawnBatch(batch.indices, batch.completions), "telling changes no draw"
        assert batch.own_nll is not None
        for i, group, told in zip(batch.indices, batch.completions, batch.own_nll, strict=True):
            expected = [-log_q_by_hand(policy, TEXTS[i], one, conditioning, sampling) for one in group]
            # float32 logits up to 10, guided up to 3 times that, through softmax and a cold temperature.
            assert told == pytest.approx(expected, abs=2e-3)
            lengths |= set(map(len, group))
    assert lengths == {2, 3, 4, 5}, "the ends count, and nothing after them"


@pytest.mark.parametrize("own_nll", [False, True])
@pytest.mark.parametrize("conditioning", [Conditioning(), Conditioning(2)], ids=["plain", "best"])
def test_model_nll_is_that_of_the_whole_vocabulary_at_temperature_one_however_it_was_drawn(
    policy: Policy, conditioning: Conditioning, own_nll: bool
) -> None:
    held_out = EncodedPrompts([{"prompt": f"w{text[0]}"} for text in TEXTS], TEXTS, 6)
    reward = describe(lambda prompts, completions, **columns: [None] * len(prompts), "none")
    policy.stop_ids = [*policy.stop_ids, *range(0, 50, 3)]  # of which two tokens are drawn without
    sampling = Sampling(5, 2, temperature=0.7, top_p=0.8, rows=12, at_once=5)
    setup = EvaluationSetup(policy, policy.model, reward, held_out, sampling, 0)

    def drawn(*tell: bool) -> list[DrawnBatch]:
        how = ("evaluation", policy.model, conditioning, lambda batch: Begun(lambda: batch), None)
        return [batch.finish() for batch in setup.draw(*how, *tell)]

    for batch, untold in zip(drawn(own_nll, True), drawn(own_nll), strict=True):
        assert untold == batch._replace(model_nll=None), "telling changes neither a draw nor the other"
        assert batch.model_nll is not None
        for i, group, told in zip(batch.indices, batch.completions, batch.model_nll, strict=True):
            every = [by_hand(policy, TEXTS[i] + one, conditioning, len(TEXTS[i]))[0] for one in group]
            assert told == pytest.approx(every, rel=1e-4)  # float32 logits up to 10


def test_completions_of_two_streams_have_no_model_whose_nll_could_be_told() -> None:
    with pytest.raises(ValueError, match="model_nll with guidance = 2"):
        SampleRequest([[1]], Conditioning(2, 0, 2.0), Sampling(), 1, 0, model_nll=True)


def test_what_the_base_model_drew_is_not_read_again_and_has_the_nll_of_a_second_reading(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out = EncodedPrompts([{"prompt": f"w{text[0]}"} for text in TEXTS], TEXTS, 3)
    reward = describe(lambda prompts, completions, **columns: [0.5] * len(prompts), "half")
    reference = copy.deepcopy(policy.model)
    with torch.no_grad():
        policy.model.get_input_embeddings().rows.mul_(2.0)  # in place of training: they are heard
    setup = EvaluationSetup(policy, reference, reward, held_out, Sampling(5, 2, top_p=0.8, rows=6), 0)
    table = table_rows(policy.quantiles, [2.0])
    read: list[int] = []
    nll = perplexity.completion_nll

    def counted(policy: Policy, model: Any, prompts: Any, completions: Any, **how: Any) -> list[float]:
        read.append(len(completions))
        return nll(policy, model, prompts, completions, **how)

    monkeypatch.setattr(perplexity, "completion_nll", counted)
    twice = list(evaluate(setup, policy.model, table, nll=id_nll(policy, reference, TEXTS)))
    assert sum(read) == 12 * len(table)
    read.clear()
    once = list(evaluate(setup, policy.model, table))
    assert sum(read) == 12 * (len(table) - 1), "what others drew is"
    for (name, part), (_, same) in zip(once, twice, strict=True):
        # Another order of float32 sums.
        assert [one.nll for one in part] == pytest.approx([one.nll for one in same], rel=1e-4), name
        assert [dataclasses.replace(one, nll=0.0) for one in part] == [
            dataclasses.replace(one, nll=0.0) for one in same
        ]


def test_shared_samples_tell_the_models_nll_from_their_file(policy: Policy, tmp_path: Path) -> None:
    shared = SharedSamples(tmp_path / "shared")
    untold = SampleRequest(TEXTS, Conditioning(), Sampling(4, 1, rows=4), 2, 0)
    request = dataclasses.replace(untold, own_nll=True, model_nll=True)
    assert all(batch.model_nll is None for batch in shared(policy, policy.model, untold))
    drawn, kept = (list(shared(policy, policy.model, request)) for _ in range(2))
    assert drawn == kept == list(sample(policy, policy.model, request))
    assert len([*shared.folder.iterdir()]) == 2 and all(batch.model_nll for batch in kept)


def constant_model(policy: Policy, seed: int) -> torch.Tensor:
    """A GPT-2 predicts the same whatever it reads; returns its (V,) log-probabilities in float64."""
    norm = policy.model.transformer.ln_f
    with torch.no_grad():
        norm.weight.zero_()
        norm.bias.copy_(12 * torch.randn(norm.bias.shape, generator=torch.Generator().manual_seed(seed)))
        logits = policy.model(torch.tensor([[1]])).logits[0, -1, : policy.vocabulary]
    return logits.double().log_softmax(-1)


def test_entropy_and_kl_of_a_known_distribution_are_its_own_and_make_up_the_perplexity(
    tiny_model: Make,
) -> None:
    policy = Policy.create(tiny_model("gpt2"), quantiles=3)
    policy.model.eval()
    reference = copy.deepcopy(policy)
    log_p, log_base = constant_model(policy, 1), constant_model(reference, 2)
    rows: list[Row] = [{"prompt": f"w{i}"} for i in range(20)]
    held_out = EncodedPrompts(rows, [[i] for i in range(20)], 60)
    reward = describe(lambda prompts, completions, **columns: [0.5] * len(prompts), "half")
    sampling = Sampling(4, 0, temperature=0.8, top_p=0.8, rows=400)
    setup = EvaluationSetup(policy, reference.model, reward, held_out, sampling, 0)
    table = [TableRow("base model", base=True), TableRow("best token", Conditioning(2))]
    entropies = []
    rows_of = _by_row(evaluate(setup, policy.model, table))
    for own, (name, part) in zip((log_base, log_p), rows_of, strict=True):
        probs = (own / sampling.temperature).softmax(-1)
        falling = probs.sort(descending=True).values
        inside = probs >= falling[(falling.cumsum(0) < sampling.top_p).sum()]
        q, base = probs[inside] / probs[inside].sum(), log_base[inside]
        found, tokens = evaluate_samples(part), sum(one.tokens for one in part)
        for metric, values in (("entropy", -q.log()), ("base_kl", q.log() - base)):
            mean = (q * values).sum()
            error = ((q * (values - mean) ** 2).sum() / tokens).sqrt()
            assert abs(found[metric].value - mean) < 4 * error + 1e-4, (name, metric)
        total = found["entropy"].value + found["base_kl"].value
        assert total == pytest.approx(math.log(found["perplexity"].value), abs=1e-12)
        whole = float(-(probs * probs.log()).sum())
        assert whole - found["entropy"].value > 0.2, "that of what was drawn, not of the whole distribution"
        entropies.append(found["entropy"].value)
    assert abs(entropies[0] - entropies[1]) > 0.1, "each row by its own model"


def test_nucleus_of_the_base_model_alone_costs_the_log_of_its_mass(tiny_model: Make) -> None:
    """With q = p0 / mass inside the nucleus, log q - log p0 is -log mass at every token."""
    policy = Policy.create(tiny_model("gpt2"), quantiles=3)
    policy.model.eval()
    probs = constant_model(policy, 2).exp()
    falling = probs.sort(descending=True).values
    mass = float(falling[: int((falling.cumsum(0) < 0.7).sum()) + 1].sum())
    held_out = EncodedPrompts([{"prompt": "w1"}], [[1]], 30)
    reward = describe(lambda prompts, completions, **columns: [0.5] * len(prompts), "half")
    for top_p, expected in ((0.7, -math.log(mass)), (1.0, 0.0)):
        setup = EvaluationSetup(policy, policy.model, reward, held_out, Sampling(4, 0, top_p=top_p), 0)
        ((_, part),) = evaluate(setup, policy.model, [TableRow("base model", base=True)])
        for one in part:
            assert one.own_nll is not None
            assert (one.nll - one.own_nll) / one.tokens == pytest.approx(expected, abs=1e-5)


def test_greedy_rows_have_no_entropy_and_all_of_their_perplexity_is_kl(policy: Policy) -> None:
    held_out = EncodedPrompts([{"prompt": f"w{i}"} for i in range(3)], [[0], [1], [2]], 1)
    reward = describe(lambda prompts, completions, **columns: [0.5] * len(prompts), "half")
    setup = EvaluationSetup(policy, policy.model, reward, held_out, GREEDY, 0)
    table = [TableRow("base model", base=True), TableRow("guided w=2", Conditioning(2, 0, 2.0))]
    for _, part in evaluate(setup, policy.model, table):
        assert [math.copysign(1, one.own_nll or 0.0) for one in part] == [1.0] * 3, "and it is no -0"
        found = evaluate_samples(part)
        assert found["entropy"].value == 0
        assert found["base_kl"].value == pytest.approx(math.log(found["perplexity"].value), abs=1e-12)


def test_sampler_that_does_not_tell_leaves_entropy_and_kl_out(policy: Policy) -> None:
    def chosen(*asked: Any) -> Iterator[DrawnBatch]:
        for indices, completions, *_ in sample(*asked):
            yield DrawnBatch(indices, completions)

    held_out = EncodedPrompts([{"prompt": "w1"}, {"prompt": "w2"}], [[1], [2]], 2)
    reward = describe(lambda prompts, completions, **columns: [0.5] * len(prompts), "half")
    setup = EvaluationSetup(policy, policy.model, reward, held_out, Sampling(4, 0), 0, sampler=chosen)
    for one in (setup, dataclasses.replace(setup, sampler=sample, own_nll=False)):
        ((_, part),) = evaluate(one, policy.model, [TableRow("base model", base=True)])
        assert [sample.own_nll for sample in part] == [None] * 4
        assert not {"entropy", "base_kl"} & evaluate_samples(part).keys()


def _by_row(parts: Iterator[tuple[str, list[Sample]]]) -> list[tuple[str, list[Sample]]]:
    groups = itertools.groupby(parts, key=lambda part: part[0])
    return [(name, [one for _, part in group for one in part]) for name, group in groups]


def test_fit_to_prompt_leaves_out_what_has_no_token_and_a_lone_prompt() -> None:
    def nll(
        indices: Sequence[int], completions: Sequence[list[int]], texts: Sequence[str]
    ) -> list[tuple[float, int]]:
        asked.append(list(indices))
        return [(10.0, len(ids)) for ids in completions]

    asked: list[list[int]] = []
    completions: list[Completion] = [(0, [], "", 0.5), (0, [5], "a", 0.5), (1, [5, 6], "b", 0.5)]
    own = [(0.0, 0), (1.0, 1), (4.0, 2)]
    found = fit_to_prompts(nll, ["p", "q"], completions, own)
    assert found == {2: 3.0}, "the first of prompt 0 has no token"
    assert asked == [[0]]
    for alone in (["p"], ["p", "p"]):
        assert fit_to_prompts(nll, alone, completions[:2], own[:2]) == {}
    assert len(asked) == 1
    # Half of the list further on stands the same text again: the next other one is taken.
    completions = [(i, [5], "a", 0.5) for i in range(6)]
    fit_to_prompts(nll, ["p", "q", "r", "p", "q", "r"], completions, [(1.0, 1)] * 6)
    assert asked[1:] == [[4, 5, 0, 1, 2, 3]]


def test_sample_that_is_judged_anew_keeps_no_number_of_the_judge_before() -> None:
    def silent_on_a(prompts: list[str], completions: list[str], **columns: object) -> list[float | None]:
        return [None if text == "a" else 0.25 for text in completions]

    old = {"judge J": 0.75, "judge other": 0.5}
    samples = [Sample(i, "w1", text, 0.5, 1.0, 1, old) for i, text in enumerate("ab")]
    found = [one.measures for one in judged([describe(silent_on_a, "J")], samples)]
    assert found == [{"judge other": 0.5}, {"judge other": 0.5, "judge J": 0.25}]


def test_ordinary_texts_are_cut_to_the_models_positions(tiny_model: Make) -> None:
    short = Policy.create(tiny_model("gpt2"), quantiles=3)
    assert short.positions is not None
    (ids,) = control_texts(short, [" ".join(["w1"] * 500)])
    assert len(ids) == min(TEXT_PROMPT + 64, short.positions - len(short.prefix) - 1)


def test_single_quantile_is_evaluated_with_its_token_and_without() -> None:
    assert [row.name for row in table_rows(1, [1.5], "all")] == ["base model", "best token", "no token"]
    assert [row.name for row in table_rows(1, [1.5], "ends")] == ["base model", "best token"]
    assert table_rows(1, [])[1].conditioning == Conditioning(0)


def test_curves_over_guidance_and_over_quantiles_hold_the_rows_that_lie_on_them() -> None:
    table = {row.name: row for row in table_rows(4, [1.5], "all")}
    by_guidance = {name: row.guidance for name, row in table.items() if row.guidance is not None}
    by_quantile = {name: row.quantile for name, row in table.items() if row.quantile is not None}
    assert by_guidance == {"worst token": 0.0, "best token": 1.0, "guided w=1.5": 1.5}
    assert by_quantile == {"worst token": 0, "quantile 1": 1, "quantile 2": 2, "best token": 3}
    # Fewer rows are the same rows.
    ends = {row.name: row for row in table_rows(4, [1.0, 1.5], "ends")}
    assert list(ends) == ["base model", "best token", "guided w=1.5", "worst token"]
    assert ends == {name: table[name] for name in ends}
    assert table_rows(4, [1.5], "best") == [table["base model"], table["best token"]]
    close = [row.name for row in table_rows(2, [2.0, 1.0, 2.0000001, 2.0], "ends")]
    assert close == ["base model", "best token", "guided w=2", "guided w=2.0000001", "worst token"]
    two = [row.name for row in table_rows(2, [], "all")]
    assert two == ["base model", "best token", "worst token", "no token"]


def test_nll_of_many_and_of_long_completions_is_that_of_each_alone(policy: Policy) -> None:
    completions = [[5] * 40, [1, 2], [3] * 17, [4]] * 20
    prompts = [[i % 50] for i in range(len(completions))]
    together = completion_nll(policy, policy.model, prompts, completions, 1)
    alone = [
        completion_nll(policy, policy.model, [p], [c], 1)[0]
        for p, c in zip(prompts, completions, strict=True)
    ]
    assert together == pytest.approx(alone, rel=1e-4)
    assert completion_nll(policy, policy.model, [], []) == []


@pytest.mark.parametrize("padding", [True, False])
def test_prompt_is_read_once_for_its_completions_that_are_neighbours(policy: Policy, padding: bool) -> None:
    policy.reading = Reading(padding=padding)
    samples, last = 5, [1, 2, 3]
    prompts = [prompt for prompt in ([1] * 30, [2] * 30, [3] * 30) for _ in range(samples)] + [last]
    completions = [[i + 4, *range(i % 4)] for i in range(len(prompts))]
    read: list[int] = []
    embedding = policy.model.get_input_embeddings()
    with embedding.register_forward_hook(lambda _, given, out: read.append(given[0].numel())):
        together = completion_nll(policy, policy.model, prompts, completions, 1)
    width = len(policy.conditioned(prompts[0], 1))
    # Completions of up to 4 tokens, of which the last predicts nothing.
    rows, alone = 3 * samples, len(policy.conditioned(last, 1)) + 4
    assert sum(read) == (4 * width + (rows + 1) * 3 if padding else 3 * width + rows * 3 + alone)
    one_by_one = [
        completion_nll(policy, policy.model, [p], [c], 1)[0]
        for p, c in zip(prompts, completions, strict=True)
    ]
    assert together == pytest.approx(one_by_one, rel=1e-4)


@torch.no_grad()
def test_kl_is_exact_at_every_token_of_every_completion_against_no_token(policy: Policy) -> None:
    reference = copy.deepcopy(policy.model)
    for weight in reference.parameters():
        weight.mul_(0.9)
    completions = [[5] * 40, [1, 2], [3] * 17, [4]] * 10  # 640 tokens a batch: several, of unlike lengths
    prompts = [[i % 50] for i in range(len(completions))]
    total, tokens = 0.0, 0
    for prompt, completion in zip(prompts, completions, strict=True):
        logp, logq = (
            model(torch.tensor([[*policy.conditioned(prompt, quantile), *completion]]))
            .logits[0, -len(completion) - 1 : -1, : policy.vocabulary]
            .double()
            .log_softmax(-1)
            for model, quantile in ((policy.model, 2), (reference, None))
        )
        total += float((logp.exp() * (logp - logq)).sum())
        tokens += len(completion)
    kept = ReferenceLogits(policy, reference, prompts, completions)
    passes: list[Any] = []
    reference.base_model.register_forward_hook(lambda *given: passes.append(given))
    nll, found = completion_nll_and_kl(policy, policy.model, kept, 2)
    assert found == pytest.approx(total / tokens, rel=1e-4)  # float32 logits
    assert found > 0.01
    assert nll == pytest.approx(completion_nll(policy, policy.model, prompts, completions, 2), rel=1e-4)
    assert len(passes) == 3
    assert completion_nll_and_kl(policy, policy.model, kept, 2) == (nll, found)
    assert len(passes) == 3, "what the reference makes of them is kept"
    kept._head = None  # as of a model whose logits are not its hidden states times one matrix
    again, once_more = completion_nll_and_kl(policy, policy.model, kept, 2)
    assert again == pytest.approx(nll, rel=1e-4) and once_more == pytest.approx(found, rel=1e-4)
    assert len(passes) == 6


@pytest.mark.parametrize(
    ("value", "kl", "told"),
    [
        (0.11, 0.9, []),
        (math.nan, 0.9, []),
        (0.09, 0.2, ["no better than chance"]),
        (-0.3, 0.84, ["no better than chance", "0.84 nats", "--initial-samples"]),
    ],
)
def test_tokens_that_mean_nothing_are_told_and_how_far_the_model_went(
    value: float, kl: float, told: list[str]
) -> None:
    note = noise_note(RankCorrelation(value, 0.1), kl)
    assert all(part in note for part in told) and bool(note) == bool(told)
    assert ("nats" in note) == (len(told) > 1)


@pytest.mark.parametrize(("tokens", "prompts"), [(80, 40), (72, 36), (4, 20)])
def test_probe_of_long_completions_has_fewer_prompts_but_not_few(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, tokens: int, prompts: int
) -> None:
    monkeypatch.setattr("quark_fast.evaluation.probe.PROBE_TOKENS", tokens)
    monkeypatch.setattr("quark_fast.evaluation.probe.PROBE_PROMPTS", 20)
    rows: list[Row] = [{"prompt": f"w{i}"} for i in range(40)]
    held_out = EncodedPrompts(rows, [[i] for i in range(40)], 1)
    reward = describe(lambda prompts, **_: [float(prompt[1:]) for prompt in prompts], "number")
    drawn = Probe.draw(EvaluationSetup(policy, policy.model, reward, held_out, Sampling(2, 0), 0))
    probe = Probe.of(batch for _, batch in drawn)
    assert list(probe.rewards) == list(range(prompts)) and len(probe.prompts) == prompts


# --- classes of prompts ---------------------------------------------------------------------------


def test_classes_hold_the_papers_counts_of_25() -> None:
    assert prompt_class(0 / 25) == "negative" and prompt_class(25 / 25) == "positive"
    assert prompt_class(12 / 25) == prompt_class(13 / 25) == "neutral"
    assert [prompt_class(x) for x in (0.4, 0.41, 0.59, 0.6)] == ["negative", "neutral", "neutral", "positive"]


@pytest.mark.parametrize("target", ["positive", "negative"])
def test_prompt_is_classed_by_its_share_of_positive_completions_ties_counting_half(
    policy: Policy, target: str
) -> None:
    # (positive, tied, unscored) of each prompt's 25 completions; the others are negative.
    wanted = {
        "w0": ((8, 4, 0), "negative"),  # 10 / 25
        "w1": ((8, 5, 0), "neutral"),  # 10.5 / 25
        "w2": ((15, 0, 0), "positive"),
        "w3": ((12, 5, 0), "neutral"),  # 14.5 / 25
        "w4": ((6, 0, 15), "positive"),  # 6 / 10: the unscored are left out
        "w5": ((0, 0, 25), "neutral"),
        "w6": ((0, 25, 0), "neutral"),
    }
    calls = []

    def reward(prompts: list[str], completions: list[str], **columns: object) -> list[float | None]:
        assert len(set(prompts)) == 1 and len(completions) == CLASS_SAMPLES
        calls.append(len(set(completions)))
        positive, tied, unscored = wanted[prompts[0]][0]
        high, low = (0.9, 0.1) if target == "positive" else (0.1, 0.9)
        rest = CLASS_SAMPLES - positive - tied - unscored
        return [*[high] * positive, *[0.5] * tied, *[None] * unscored, *[low] * rest]

    # As rows have it beside others with a count: of a file's own columns, of another file, of a CSV file.
    # And a column of that name that is another: no number, or none of 25.
    numbers = (None, "", "12 of 25", math.nan, 60, -1, [3])
    absent: list[Row] = [{}, *({"num_positive": number} for number in numbers)]
    rows: list[Row] = [{"prompt": name} | absent[i % len(absent)] for i, name in enumerate(wanted)]
    held_out = EncodedPrompts(rows, [[i] for i in range(len(rows))], 1)
    setup = EvaluationSetup(policy, policy.model, describe(reward), held_out, GREEDY, 0)
    found = dict(classify_prompts(setup, target))
    assert found == {i: name for i, (_, name) in enumerate(wanted.values())}
    assert max(calls) > 1, "greedy in the evaluation, but sampled here: or else all 25 were the same"


def test_a_column_of_the_users_by_the_name_of_the_classes_is_refused() -> None:
    check_classes([{"prompt": "a"}, {"prompt": "b", "prompt_class": "neutral"}, {"prompt_class": None}])
    with pytest.raises(UsageError, match="prompt_class = 'b': this task keeps a prompt's class there"):
        check_classes([{"prompt": "a", "prompt_class": "positive"}, {"prompt": "b", "prompt_class": "b"}])


def test_dexperts_own_count_is_believed_and_not_sampled_for(policy: Policy) -> None:
    rows: list[Row] = [{"prompt": "w1", "num_positive": n} for n in (0, 12, "13", 25)]
    held_out = EncodedPrompts(rows, [[1]] * 4, 1)
    reward = describe(lambda **_: pytest.fail("scored"), "none")
    setup = EvaluationSetup(policy, policy.model, reward, held_out, GREEDY, 0)
    found = dict(classify_prompts(setup, "negative"))
    assert found == {0: "negative", 1: "neutral", 2: "neutral", 3: "positive"}


@pytest.mark.parametrize("classified", [False, True])
def test_class_of_a_prompt_reaches_the_reward_only_as_a_column_of_the_users(
    policy: Policy, classified: bool
) -> None:
    seen: list[set[str]] = []

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        seen.append(set(columns))
        return [0.0] * len(prompts)

    rows = [{"prompt": f"w{i}", "prompt_class": "neutral", "n": i} for i in range(5)]
    held_out = EncodedPrompts(rows, [[i] for i in range(5)], 1, classified=classified)
    asked = EvaluationSetup(policy, policy.model, describe(reward), held_out, Sampling(2, 0), 0)
    asked.scored(asked.with_texts(DrawnBatch([0, 4], [[[1]], [[2]]])))
    tried = first_completions(policy, policy.model, held_out, Sampling(2, 0), 0)
    given = [row for part, _ in tried for row in part]
    expected = {"n"} if classified else {"n", "prompt_class"}
    assert seen == [expected] and all(row.keys() - {"prompt"} == expected for row in given)
    assert sorted(row["n"] for row in given) == list(range(5))
