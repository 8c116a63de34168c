import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quark_fast.metrics import (
    Interval,
    Sample,
    as_json,
    compare,
    distinct_n_by_prompt,
    diversity,
    evaluate_samples,
    rank_correlation,
    repetition,
)


def sample(prompt_id, completion="a b c", score=0.1, nll=6.0, tokens=3):
    return Sample(prompt_id, f"prompt {prompt_id}", completion, score, nll, tokens)


def scored(scores, prompts=None):
    """A sample for each score; None: a prompt for each, too."""
    prompts = range(len(scores)) if prompts is None else prompts
    return [sample(int(prompt), score=score) for prompt, score in zip(prompts, scores, strict=True)]


def mean_score(scores, prompts=None, **options):
    return evaluate_samples(scored(scores, prompts), **options)["mean"]


def mean_change(before, after, prompts=None):
    return compare(scored(before, prompts), scored(after, prompts))["mean"]


def distinct_n(completions_by_prompt, n):
    """dist-n of a table with these completions."""
    samples = [sample(i, text) for i, texts in enumerate(completions_by_prompt) for text in texts]
    return evaluate_samples(samples)[f"dist{n}"].value


# --- distinct n-grams and repetition --------------------------------------------------------------


def test_distinct_n_divides_by_words_and_pools_a_prompts_samples():
    # Bigrams of the first prompt: a-b, b-a, b-c = 3 distinct over 3 + 2 words.
    assert distinct_n_by_prompt([["a b a", "b c"], ["x y", "x y"]], 2) == pytest.approx([3 / 5, 1 / 4])
    assert distinct_n([["a b a", "b c"], ["x y", "x y"]], 2) == pytest.approx((3 / 5 + 1 / 4) / 2)


def test_no_ngram_reaches_from_one_sample_into_the_next():
    assert distinct_n([["a", "b", "c"]], 2) == 0.0


def test_a_prompt_without_words_is_left_out_of_the_average():
    assert np.isnan(distinct_n_by_prompt([["", "  "]], 1)).all()
    assert distinct_n([["a b"], [""]], 2) == 0.5
    assert math.isnan(distinct_n([[""]], 2))


def test_repetition_of_hand_counted_ids():
    ids = [1, 2, 1, 2, 1]  # bigrams 12 21 12 21: 2 of 4; trigrams 121 212 121: 2 of 3
    assert repetition(ids, 2) == pytest.approx(50.0)
    assert repetition(ids, 3) == pytest.approx(100 / 3)
    assert diversity(ids) == pytest.approx(0.5 * (2 / 3) * 1.0)
    assert repetition(list(range(9)), 2) == 0.0
    assert math.isnan(repetition([1], 2))


# --- bootstrap ------------------------------------------------------------------------------------


def test_bootstrap_agrees_with_a_loop_that_concatenates_the_drawn_groups():
    generator = np.random.default_rng(1)
    groups = np.array([0, 0, 0, 1, 2, 2, 3, 4, 4, 4, 5, 6, 6, 7, 8, 8])
    values = generator.normal(size=groups.size)
    got = mean_score(values, groups, resamples=300)

    draws = np.random.default_rng(0).integers(0, 9, size=(300, 9))
    means = [np.concatenate([values[groups == g] for g in draw]).mean() for draw in draws]
    assert got.value == pytest.approx(values.mean())
    assert (got.low, got.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))


def test_copies_of_a_completion_do_not_narrow_the_interval_of_grouped_values():
    values = np.random.default_rng(0).normal(size=50)
    once = mean_score(values)
    copied = np.repeat(values, 4)
    grouped = mean_score(copied, np.repeat(np.arange(50), 4))
    assert (grouped.low, grouped.high) == pytest.approx((once.low, once.high))
    alone = mean_score(copied)
    # Drawn one by one the copies pass for new evidence: half the width at four copies.
    assert alone.high - alone.low < 0.6 * (grouped.high - grouped.low)


def test_prompt_that_was_given_twice_is_one_prompt_to_the_interval_and_two_to_measures_of_a_prompt():
    generator = np.random.default_rng(1)
    # 20 texts, each under two ids, with 5 completions of each.
    twice = [
        Sample(i, f"text {i % 20}", f"a b c{i} d{j}", float(generator.uniform()), 6.0, 3)
        for i in range(40)
        for j in range(5)
    ]
    one_id = [replace(one, prompt_id=one.prompt_id % 20) for one in twice]
    got, merged = evaluate_samples(twice), evaluate_samples(one_id)
    for name in ("mean", "share", "perplexity"):
        assert got[name] == merged[name]
    # More completions of a prompt would have a higher maximum and a lower dist-n.
    apart = evaluate_samples([replace(one, prompt=f"text {one.prompt_id}") for one in twice])
    for name in ("expected_max", "probability", "dist2", "dist3"):
        assert got[name].value == pytest.approx(apart[name].value, rel=1e-12)
    after = [replace(one, score=one.score / 2 + 0.01 * (one.prompt_id % 20)) for one in twice]
    change = compare(twice, after)["mean"]
    assert change == compare(one_id, [replace(one, prompt_id=one.prompt_id % 20) for one in after])["mean"]
    seven = [one for one in twice if one.prompt_id % 20 < 7]
    assert math.isnan(evaluate_samples(seven)["mean"].low), "14 ids of 7 texts"


def test_interval_has_the_width_of_the_normal_theory():
    values = np.random.default_rng(0).normal(size=2000)
    got = mean_score(values, resamples=4000)
    # 2 * 1.96 s / sqrt(n); the percentiles of 4,000 resamples are known to about 2 %.
    theory = 2 * 1.96 * values.std() / math.sqrt(values.size)
    assert got.high - got.low == pytest.approx(theory, rel=0.06)


def test_interval_covers_the_true_mean_about_as_often_as_it_says():
    generator = np.random.default_rng(3)
    hits = 0
    for _ in range(200):
        prompt_effect = generator.normal(size=(40, 1))
        scores = prompt_effect + 0.3 * generator.normal(size=(40, 5))
        got = mean_score(scores.ravel(), np.repeat(np.arange(40), 5), resamples=400)
        hits += got.low <= 0 <= got.high
    # 190 expected, standard deviation 3; the percentile bootstrap of 40 groups runs a little short.
    assert 178 <= hits <= 199


def test_bootstrap_is_repeatable_and_blocks_do_not_change_the_statistics(monkeypatch):
    values = np.random.default_rng(0).normal(size=100)
    whole = mean_score(values, resamples=50)
    assert whole == mean_score(values, resamples=50)
    monkeypatch.setattr("quark_fast.metrics._DRAWS_AT_ONCE", 1000)
    in_blocks = mean_score(values, resamples=50)
    # Not bit by bit: a matrix product may add in another order for another number of rows.
    assert (in_blocks.low, in_blocks.high) == pytest.approx((whole.low, whole.high), rel=1e-12)


def test_nan_is_left_out_with_its_weight():
    assert mean_score([1.0, math.nan, 3.0]).value == 2.0
    texts = [(1.0, 2), (math.nan, 9)]
    samples = [replace(sample(0), text_nll=nll, text_tokens=tokens) for nll, tokens in texts]
    assert evaluate_samples(samples)["text_perplexity"].value == pytest.approx(math.exp(0.5))


def test_too_little_data_gives_a_value_without_bounds():
    one = mean_score([0.2, 0.4], [7, 7])
    assert one.value == pytest.approx(0.3) and math.isnan(one.low) and math.isnan(one.high)
    nothing = mean_score([None])
    assert math.isnan(nothing.value) and math.isnan(nothing.low)
    assert as_json(nothing) == {"value": None, "low": None, "high": None}


def test_few_prompts_have_no_interval_and_clear_no_change():
    values = np.random.default_rng(0).normal(size=8)
    for prompts, known in ((7, False), (8, True)):
        number, change = mean_score(values[:prompts]), mean_change(values[:prompts], values[:prompts] + 1)
        assert math.isfinite(number.low) == math.isfinite(number.high) == known
        assert change.difference == pytest.approx(1.0) and change.excludes_zero == known
        # More completions of a prompt are no more prompts.
        copies = mean_score(np.repeat(values[:prompts], 5), np.repeat(np.arange(prompts), 5))
        assert math.isfinite(copies.low) == known


def test_prompts_without_a_score_do_not_count_for_an_interval_of_the_scores():
    # So few resamples that none of them is without a score, which would leave the interval open anyway.
    scored_on = np.random.default_rng(0).normal(size=7).tolist()
    samples = scored([*scored_on, *[None] * 3])
    assert math.isnan(evaluate_samples(samples, resamples=5)["mean"].low)
    assert math.isfinite(evaluate_samples(samples, resamples=5)["perplexity"].low)
    before, after = scored(range(10)), scored([*range(1, 8), *[None] * 3])
    assert not compare(before, after, resamples=5)["mean"].excludes_zero


def test_class_of_few_prompts_has_an_interval_where_nearly_all_resamples_hold_it():
    """One in 3,500 misses all 8 of 190 prompts: such a resample is left out."""
    values = np.random.default_rng(0).uniform(0.2, 0.8, size=190)

    def of_class(size, values):
        return [
            replace(sample(i), measures={"of class": float(v)} if i < size else {})
            for i, v in enumerate(values)
        ]

    draws = np.random.default_rng(0).integers(0, 190, size=(2000, 190))
    missing = (draws >= 8).all(axis=1)
    assert 0 < missing.sum() <= 10
    means = [values[draw[draw < 8]].mean() for draw in draws[~missing]]
    before, after = of_class(8, values), of_class(8, values + 0.1)
    got, change = evaluate_samples(before)["of class"], compare(before, after)["of class"]
    assert (got.low, got.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))
    assert change.low == pytest.approx(0.1) and change.excludes_zero and math.isfinite(change.relative_high)


def test_share_of_a_value_whose_resamples_are_often_below_zero_has_no_interval():
    values = np.random.default_rng(0).normal(0.33, 1.0, size=40)
    draws = np.random.default_rng(0).integers(0, 40, size=(2000, 40))
    below = (values[draws].mean(axis=1) <= 0).mean()
    assert 0.005 < below < 0.025, "more than may be left out, and few enough for bounds of the others"
    change = mean_change(values, values + 1)
    assert math.isfinite(change.relative) and math.isnan(change.relative_low)


def test_paired_difference_is_narrower_than_the_spread_between_prompts():
    generator = np.random.default_rng(0)
    before = generator.uniform(0.1, 0.9, size=100)  # prompts differ much,
    after = before - 0.05 + generator.normal(scale=0.02, size=100)  # the change hardly
    change = mean_change(before, after)
    assert change.difference == pytest.approx((after - before).mean())
    assert change.relative == pytest.approx(after.mean() / before.mean() - 1)
    assert change.excludes_zero and change.high - change.low < 0.01
    unpaired = mean_change(before, generator.permutation(after))
    assert not unpaired.excludes_zero


def test_no_change_is_exactly_zero_with_an_empty_interval():
    values = np.random.default_rng(0).uniform(size=30)
    change = mean_change(values, values, np.repeat(np.arange(10), 3))
    assert (change.difference, change.low, change.high) == (0.0, 0.0, 0.0)
    assert (change.relative, change.relative_low, change.relative_high) == (0.0, 0.0, 0.0)
    assert not change.excludes_zero


def test_relative_change_of_a_value_below_zero_is_undefined_and_its_difference_known():
    change = mean_change([-2.0, -2.2] * 4, [-1.0, -1.2] * 4)
    assert change.difference == pytest.approx(1.0) and change.excludes_zero
    assert math.isnan(change.relative) and math.isnan(change.relative_low)
    # A resample below zero leaves the share's interval open, not its value.
    change = mean_change([-1.0, 3.0] * 4, [-1.0, 4.0] * 4)
    assert change.relative == pytest.approx(0.5) and math.isnan(change.relative_high)
    assert math.isfinite(change.high)


def test_relative_change_from_zero_is_undefined_and_not_infinite():
    change = mean_change([0.0] * 8, [1.0] * 8)
    assert (change.difference, change.low, change.high) == (1.0, 1.0, 1.0)
    assert math.isnan(change.relative) and math.isnan(change.relative_low)


# --- toxicity -------------------------------------------------------------------------------------


def test_score_metrics_of_a_hand_counted_table():
    nan = math.nan
    prompts = [0, 0, 1, 1, 2, 2, 3, 3]
    got = evaluate_samples(scored([0.1, 0.9, 0.5, nan, 0.2, 0.3, nan, nan], prompts))
    assert got["mean"].value == pytest.approx((0.1 + 0.9 + 0.5 + 0.2 + 0.3) / 5)
    assert got["share"].value == pytest.approx(2 / 5)  # 0.5 itself counts
    assert got["expected_max"].value == pytest.approx((0.9 + 0.5 + 0.3) / 3)
    assert got["probability"].value == pytest.approx(2 / 3)
    assert got["unscored"].value == pytest.approx(3 / 8)
    assert got == evaluate_samples(scored([0.1, 0.9, 0.5, None, 0.2, 0.3, None, None], prompts))


def test_evaluate_samples_agrees_with_its_parts_whatever_the_order():
    samples = [
        sample(3, "a b c", 0.9, nll=3.0, tokens=3),
        sample(1, "x y", 0.2, nll=8.0, tokens=2),
        sample(3, "a b d", None, nll=1.0, tokens=3),
        sample(1, "x y", 0.4, nll=0.0, tokens=0),
    ]
    got = evaluate_samples(samples)
    table = evaluate_samples(scored([0.2, 0.4, 0.9, None], [0, 0, 1, 1]))
    for name in ("mean", "share", "expected_max", "probability", "unscored"):
        assert got[name] == table[name]
    assert got["perplexity"].value == pytest.approx(math.exp(12 / 8))
    assert got["dist2"].value == pytest.approx(distinct_n([["x y", "x y"], ["a b c", "a b d"]], 2))
    assert got["dist3"].value == pytest.approx((0 / 4 + 2 / 6) / 2)
    assert evaluate_samples(samples[::-1]) == got


def test_measures_are_averaged_over_the_samples_that_have_them():
    samples = [
        replace(sample(0), measures={"target": 1.0, "target_negative": 1.0}),
        replace(sample(0), measures={"target": 0.0, "target_negative": 0.0}),
        replace(sample(1), measures={"target": 1.0, "target_positive": 1.0}),
        replace(sample(2, score=None), measures={}),
    ]
    got = evaluate_samples(samples)
    assert got["target"].value == pytest.approx(2 / 3)
    assert got["target_negative"].value == pytest.approx(1 / 2)
    assert got["target_positive"].value == 1.0
    change = compare(samples, [replace(one, measures=dict.fromkeys(one.measures, 0.5)) for one in samples])
    assert change["target"].difference == pytest.approx(0.5 - 2 / 3)
    assert change["target_negative"].difference == pytest.approx(0.0)


def test_completions_that_a_judge_gave_no_number_are_counted():
    def judged(*values):
        return [
            replace(sample(i), measures={} if value is None else {"judge J": value})
            for i, value in enumerate(values)
        ]

    before, after = evaluate_samples(judged(0.5, None, None, 0.5)), evaluate_samples(judged(0.5, 0.1))
    assert before["judge J"].value == 0.5 and before["unscored by judge J"].value == 0.5
    assert "unscored by judge J" not in after
    assert not any("unscored by" in name for name in evaluate_samples(judged(None, None))), "not asked"


def test_a_measure_that_one_side_lacks_is_not_compared():
    # Every completion of the only negative prompt may go unscored on one side.
    before = [replace(sample(0), measures={"target": 1.0, "target_negative": 1.0})]
    after = [replace(sample(0), measures={"target": 1.0})]
    assert "target_negative" not in compare(before, after)
    assert "target_negative" not in compare(after, before)
    assert compare(before, after)["target"].difference == 0.0


def test_text_perplexity_and_accuracy_weigh_every_token_alike_and_a_text_once_or_twice_the_same():
    first = {"text_nll": 10.0, "text_correct": 1, "text_tokens": 5}
    second = {"text_nll": 2.0, "text_correct": 6, "text_tokens": 15}
    once = [replace(sample(0), **first), replace(sample(1), **second)]
    for samples in (once, [*once, *once]):
        got = evaluate_samples(samples)
        assert got["text_perplexity"].value == pytest.approx(math.exp(12 / 20))
        assert got["text_accuracy"].value == pytest.approx(7 / 20)
    assert "text_perplexity" not in evaluate_samples([sample(0)])


def test_entropy_and_kl_weigh_every_token_alike_and_their_sum_is_the_log_of_the_perplexity():
    samples = [
        replace(sample(0, nll=9.0, tokens=3), own_nll=4.0),
        replace(sample(1, nll=5.5, tokens=5), own_nll=6.0),  # one text may be likelier to the base model
    ]
    got = evaluate_samples(samples)
    assert got["entropy"].value == pytest.approx(10 / 8)
    assert got["base_kl"].value == pytest.approx((5 - 0.5) / 8)
    assert got["perplexity"].value == pytest.approx(math.exp(got["entropy"].value + got["base_kl"].value))
    change = compare(samples, [replace(one, own_nll=0.0) for one in samples])
    assert change["entropy"].difference == pytest.approx(-10 / 8)
    # Where one sample does not tell, the two could not add up to the perplexity of all.
    partly = evaluate_samples([samples[0], replace(samples[1], own_nll=None)])
    assert not {"entropy", "base_kl"} & partly.keys()


def test_compare_pairs_by_prompt_id_and_not_by_position():
    generator = np.random.default_rng(0)
    level = generator.uniform(0.1, 0.9, size=60)
    before = [sample(p, score=level[p]) for p in range(60) for _ in range(2)]
    after = [sample(p, score=0.8 * level[p]) for p in reversed(range(60))]
    change = compare(before, after)["mean"]
    assert change.relative == pytest.approx(-0.2)
    # Every prompt changed by the same factor: paired, the factor has no spread at all.
    assert (change.relative_low, change.relative_high) == pytest.approx((-0.2, -0.2))
    assert set(compare(before, after)) == set(evaluate_samples(before))


def test_compare_names_a_prompt_that_one_side_lacks():
    with pytest.raises(ValueError, match=r"prompt 2 .* in after only"):
        compare([sample(1)], [sample(1), sample(2)])


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "no sample"),
        ([sample(4, nll=math.nan)], "prompt 4 has nll = nan"),
        ([sample(4, tokens=-1)], "-1 tokens"),
        ([sample(4, score=math.inf)], "infinite"),
    ],
)
def test_evaluate_samples_refuses_what_it_cannot_measure(samples, message):
    with pytest.raises(ValueError, match=message):
        evaluate_samples(samples)


def test_a_model_whose_every_completion_is_unscored_has_no_toxicity_but_a_perplexity():
    got = evaluate_samples([sample(p, score=None) for p in range(8)])
    assert math.isnan(got["mean"].value) and math.isnan(got["expected_max"].value)
    assert got["unscored"] == Interval(1.0, 1.0, 1.0)
    assert got["perplexity"].value == pytest.approx(math.exp(2))


# --- rank correlation -----------------------------------------------------------------------------


def naive_ranks(values):
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2
        for value in values
    ]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=30))
def test_rank_correlation_is_the_correlation_of_average_ranks(pairs):
    x, y = zip(*pairs, strict=True)
    got = rank_correlation(x, y).value
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert math.isnan(got)
    else:
        assert got == pytest.approx(np.corrcoef(naive_ranks(x), naive_ranks(y))[0, 1], abs=1e-12)


def test_rank_correlation_sees_order_only():
    x = np.random.default_rng(0).normal(size=50)
    assert rank_correlation(x, np.exp(3 * x)).value == pytest.approx(1.0)
    assert rank_correlation(x, -(x**3)).value == pytest.approx(-1.0)


def test_standard_error_is_the_spread_of_unrelated_pairs():
    generator = np.random.default_rng(0)
    x = generator.integers(0, 4, size=26)  # with ties
    found = [rank_correlation(x, generator.permutation(26)) for _ in range(3000)]
    spread = np.std([one.value for one in found])
    # The standard deviation of 3,000 draws is known to 1.3 %.
    assert found[0].standard_error == pytest.approx(0.2) == pytest.approx(spread, rel=0.05)


def test_rank_correlation_refuses_unequal_or_missing_numbers():
    with pytest.raises(ValueError, match="equal"):
        rank_correlation([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="NaN has no rank"):
        rank_correlation([1.0, math.nan], [1.0, 2.0])
    assert math.isnan(rank_correlation([1.0], [1.0]).standard_error)


def test_share_of_an_event_that_no_prompt_had_is_known_up_to_an_exact_bound():
    """No resample of 200 zeros has a one in it, but 1.8% of all prompts may."""
    none, every, half = scored([0.0] * 200), scored([1.0] * 200), scored([0.0, 1.0] * 100)
    bound = 1 - 0.025 ** (1 / 200)
    assert (1 - bound) ** 200 == pytest.approx(0.025)
    for name in ("share", "probability"):
        assert evaluate_samples(none)[name] == Interval(0.0, 0.0, pytest.approx(bound))
        assert evaluate_samples(every)[name] == Interval(1.0, pytest.approx(1 - bound), 1.0)
        change = compare(half, none)[name]
        assert (change.relative, change.relative_low) == (-1.0, -1.0)
        assert change.relative_high == pytest.approx(-1 + bound / 0.5) and change.high > -0.5
        assert compare(none, none)[name].high == pytest.approx(bound)
    for name in ("target", "target_negative"):
        of_sentiment = [replace(one, measures={name: one.score}) for one in every]
        assert evaluate_samples(of_sentiment)[name] == evaluate_samples(every)["share"]
    assert evaluate_samples(half)["share"].high < 0.6  # a bootstrap interval, as it was
    assert math.isnan(evaluate_samples(scored([0.0] * 7))["share"].high), "too few prompts for any"
