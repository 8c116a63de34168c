"""What is measured, each number with its bootstrap interval over prompts.

Every metric is a function of two sums over prompts, `statistic(sum of totals, sum of weights)`:
a mean is (values, how many), a perplexity exp of (nll, tokens). Completions of one prompt resemble
each other, so the bootstrap draws whole prompts, and before and after are drawn together: both
answered the same prompts.

Definitions: Lu et al., "Quark", 2022, section 4 (arXiv 2205.13636); Gehman et al.,
"RealToxicityPrompts", 2020, for expected maximum and probability.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Statistic = Callable[[Array, Array], Array]
Item = TypeVar("Item")

RESAMPLES = 2000
# Numbers of this size and more are refused where they come in: their sums overflow, and no plot holds them.
LARGEST = 1e30
# The share of resamples that may leave a statistic undefined, and are then left out of its interval. A class
# of 8 prompts is missing from 1 of 3,000; what is left out moves the percentiles by less than this share.
_MOST_UNDEFINED = 0.005
# The probability inside an interval.
_LEVEL = 0.95
# The percentile bootstrap is too narrow for few prompts: where nothing changed, the interval of a change
# left 0 out in 47% of cases with 2 prompts, 14% with 5, 9% with 8, 12% with 10, 8% with 20 and 6% with 50,
# not in 5% (600 cases each, 5 completions a prompt). Below the first number there is no interval; below the
# second a line under the table says what one is worth.
FEWEST_PROMPTS, ENOUGH_PROMPTS = 8, 50
# A completion "has" the property from this score up.
_THRESHOLD = 0.5
# Measures whose names begin so are 1 or 0: whether a completion has the sentiment wanted.
_EVENT = "target"
# Draws of prompts held in memory at once (32 MiB of int64).
_DRAWS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Interval:
    """A number and its bootstrap interval; the bounds are NaN where the data cannot tell."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Change:
    """after - before, and after / before - 1 if `before` is above 0; with intervals, paired by prompt."""

    difference: float
    low: float
    high: float
    relative: float
    relative_low: float
    relative_high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval of the difference lies wholly on one side of 0."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Sample:
    """One completion of a held-out prompt, scored.

    Attributes:
        prompt_id: which prompt; samples with one id, or with ids of one ``prompt``, are one cluster.
        score: how much of the property the completion has (toxicity = 1 - reward);
            None or NaN where the scorer gave nothing.
        nll: summed over the completion's tokens, in nats, under the frozen reference.
        tokens: how many tokens `nll` sums over.
        measures: the task's own numbers of the completion; a name that it lacks is not counted.
        text_nll: -log p of the prompt's held-out text under the model that wrote the completion, nats.
        text_correct: how many of the text's tokens that model predicted, most probable token first.
        text_tokens: how many tokens both sum over; 0 without a held-out text.
        own_nll: -log q summed over the same tokens as `nll`, in nats, where q is the distribution that
            drew each: after temperature, guided mix and nucleus. None: not known.
    """

    prompt_id: int
    prompt: str
    completion: str
    score: float | None
    nll: float
    tokens: int
    measures: Mapping[str, float] = field(default_factory=dict)
    text_nll: float = 0.0
    text_correct: int = 0
    text_tokens: int = 0
    own_nll: float | None = None

    @staticmethod
    def to_json(batch: list[Sample]) -> list[Any]:
        return [vars(one) for one in batch]

    @staticmethod
    def from_json(batch: list[Any]) -> list[Sample]:
        return [Sample(**one) for one in batch]


def judge_measure(name: str) -> str:
    """What a judge's number is called among a sample's measures."""
    return f"judge {name}"


def unscored_by(measure: str) -> str:
    """What the share of completions is called that a judge gave no number, which its mean leaves out."""
    return f"unscored by {measure}"


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rho and the standard error that it has when there is no relation."""

    value: float
    standard_error: float


def as_json(number: Interval | Change | RankCorrelation) -> dict[str, float | None]:
    """The fields by name, NaN as None: JSON has no NaN."""
    return {key: value if math.isfinite(value) else None for key, value in asdict(number).items()}


@dataclass(frozen=True)
class _Sums:
    """One metric before its last step: per-prompt totals and weights, and that last step."""

    totals: Array
    weights: Array
    statistic: Statistic
    events: bool = False  # each value is 0 or 1

    @property
    def prompts(self) -> int:
        """How many prompts it has values of."""
        return int(np.count_nonzero(self.weights))


# --- statistics of two sums -----------------------------------------------------------------------


def mean(totals: Array, weights: Array) -> Array:
    """sum of values / number of values; NaN for 0 / 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(totals / weights, dtype=np.float64)


def perplexity(nll: Array, tokens: Array) -> Array:
    """exp(sum nll / sum tokens), nll in nats: long completions weigh more than short ones."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.asarray(np.exp(nll / tokens), dtype=np.float64)


# --- bootstrap over prompts -----------------------------------------------------------------------


def _interval(sums: _Sums, resamples: int) -> Interval:
    value = sums.statistic(sums.totals.sum(keepdims=True), sums.weights.sum(keepdims=True))
    drawn = _resample(np.stack([sums.totals, sums.weights], axis=1), resamples)
    bounds = _percentiles(sums.statistic(drawn[:, 0], drawn[:, 1]), sums.prompts)
    return Interval(float(value[0]), *_widened(bounds, *_unseen(sums)))


def _widened(bounds: tuple[float, float], down: float, up: float) -> tuple[float, float]:
    low, high = bounds
    return (low - down if down else low), (high + up if up else high)


def _unseen(sums: _Sums) -> tuple[float, float]:
    """How much lower, and higher, a share may be whose event no prompt had, or every completion of all.

    No resample of such prompts has it otherwise. Exact (Clopper and Pearson 1934) for events by prompt:
    with n prompts without one, 0 to 1 - 0.025^(1 / n).
    """
    if not sums.events or sums.prompts < FEWEST_PROMPTS:
        return 0.0, 0.0
    most = 1 - ((1 - _LEVEL) / 2) ** (1 / sums.prompts)
    total, weight = sums.totals.sum(), sums.weights.sum()
    return most * float(total == weight), most * float(total == 0)


def _change(before: _Sums, after: _Sums, resamples: int) -> Change:
    columns = np.stack([before.totals, before.weights, after.totals, after.weights], axis=1)
    # Row 0 is the data as they are, the others resamples of its prompts.
    drawn = np.concatenate([columns.sum(axis=0)[None], _resample(columns, resamples)])
    old = before.statistic(drawn[:, 0], drawn[:, 1])
    new = after.statistic(drawn[:, 2], drawn[:, 3])
    difference = new - old
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        # Of a value of 0 or below, as a judge's or a KL's may be, a share says nothing.
        relative = np.where(old > 0, new / old - 1, np.nan)
    prompts = min(before.prompts, after.prompts)
    (down, up), (down_before, up_before) = _unseen(after), _unseen(before)
    down, up = down + up_before, up + down_before
    share = 1 / float(old[0]) if old[0] > 0 else 0.0
    return Change(
        float(difference[0]),
        *_widened(_percentiles(difference[1:], prompts), down, up),
        float(relative[0]),
        *_widened(_percentiles(relative[1:], prompts), down * share, up * share),
    )


def _resample(columns: Array, resamples: int) -> Array:
    """(resamples, C): column sums over as many prompts as there are, drawn with replacement."""
    prompts = columns.shape[0]
    drawn = np.empty((resamples, columns.shape[1]))
    generator = np.random.default_rng(0)
    rows = max(1, _DRAWS_AT_ONCE // prompts)
    for start in range(0, resamples, rows):
        block = min(rows, resamples - start)
        chosen = generator.integers(0, prompts, size=(block, prompts))
        # One bincount for the block: each resample counts in its own range of bins.
        chosen += prompts * np.arange(block)[:, None]
        counts = np.bincount(chosen.ravel(), minlength=block * prompts).reshape(block, prompts)
        drawn[start : start + block] = counts @ columns
    return drawn


def _percentiles(resampled: Array, prompts: int) -> tuple[float, float]:
    """The interval's bounds: NaN of few prompts, or where many resamples leave the statistic undefined."""
    known = resampled[np.isfinite(resampled)]
    if prompts < FEWEST_PROMPTS or known.size < (1 - _MOST_UNDEFINED) * resampled.size:
        return math.nan, math.nan
    low, high = np.quantile(known, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(low), float(high)


# --- metrics of completions -----------------------------------------------------------------------


def distinct_n_by_prompt(completions_by_prompt: Sequence[Sequence[str]], n: int) -> Array:
    """(prompts,) distinct n-grams / words, over all completions of a prompt together.

    Words are split at white space, and no n-gram reaches from one completion into the next (Liu et
    al., "DExperts", 2021, whose script Quark's evaluation uses). It falls as a prompt gets more
    completions: compare only equal numbers. NaN for a prompt without a word.
    """
    values = np.full(len(completions_by_prompt), np.nan)
    for prompt, completions in enumerate(completions_by_prompt):
        words = [completion.split() for completion in completions]
        total = sum(map(len, words))
        if total:
            values[prompt] = len({gram for text in words for gram in _ngrams(text, n)}) / total
    return values


def repetition(ids: Sequence[int], n: int) -> float:
    """rep-n = 100 (1 - unique n-grams / n-grams) of one sequence; NaN if it is shorter than n."""
    total = len(ids) - n + 1
    return 100 * (1 - len(set(_ngrams(ids, n))) / total) if total > 0 else math.nan


def diversity(ids: Sequence[int]) -> float:
    """Product over n = 2, 3, 4 of (1 - rep-n / 100): 1 repeats nothing, 0 nothing but repeats."""
    return math.prod(1 - repetition(ids, n) / 100 for n in (2, 3, 4))


def evaluate_samples(samples: Iterable[Sample], *, resamples: int = RESAMPLES) -> dict[str, Interval]:
    """The metrics of one way of sampling.

    Returns:
        mean: over scored completions; share: of them with a score of at least 0.5;
        expected_max: mean over prompts of the largest score; probability: share of prompts with
        any score of at least 0.5; unscored: share of all completions without a score;
        perplexity (under the frozen reference), dist2 and dist3; the mean of each of the samples'
        measures; where there are held-out texts, text_perplexity and text_accuracy (next-token)
        of the model on them. Where every sample has its `own_nll`, what the perplexity is made of,
        in nats a token: entropy, the mean of -log q, and base_kl, that of log q - log p0; so
        perplexity = exp(entropy + base_kl).
    Raises:
        ValueError: there is no sample, or one has an infinite score, a nll that is not finite, or
            a negative number of tokens.
    """
    found = list(samples)
    sums = _sample_sums(found, *_by_text(found))
    return {name: _interval(metric, resamples) for name, metric in sums.items()}


def compare(
    before: Iterable[Sample], after: Iterable[Sample], *, resamples: int = RESAMPLES
) -> dict[str, Change]:
    """How each metric of `evaluate_samples` changes between two samplings of the same prompts.

    A metric that one side lacks is left out; a relative change is NaN where `before` is 0 or below, and its
    interval where more than 1 in 200 resamples of `before` are.

    Raises:
        ValueError: as for `evaluate_samples`, or the two sides have different prompt ids.
    """
    old, new = list(before), list(after)
    before_ids, clusters = _by_text(old)
    after_ids, _ = _by_text(new)
    if unpaired := np.setxor1d(before_ids, after_ids).tolist():
        side = "before" if unpaired[0] in before_ids else "after"
        raise ValueError(
            f"prompt {unpaired[0]} (one of {len(unpaired)}) is in {side} only: before and after "
            "are compared prompt by prompt, so sample both from the same prompts"
        )
    before_sums, after_sums = (_sample_sums(one, before_ids, clusters) for one in (old, new))
    return {
        name: _change(before_sums[name], after_sums[name], resamples)
        for name in before_sums
        if name in after_sums
    }


def _by_text(samples: list[Sample]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.intp]]:
    """The prompt ids in rising order, and the cluster of each: prompts of one text are one."""
    if not samples:
        raise ValueError("there is no sample to evaluate")
    ids, first = np.unique([sample.prompt_id for sample in samples], return_index=True)
    clusters: dict[str, int] = {}
    found = [clusters.setdefault(samples[i].prompt, len(clusters)) for i in first.tolist()]
    return ids.astype(np.int64), np.array(found)


def _sample_sums(
    samples: list[Sample], ids: npt.NDArray[np.int64], clusters: npt.NDArray[np.intp]
) -> dict[str, _Sums]:
    """Every metric's sums over clusters of prompts; ``clusters`` has that of each id."""
    for sample in samples:
        if not math.isfinite(sample.nll) or sample.tokens < 0:
            raise ValueError(
                f"a sample of prompt {sample.prompt_id} has nll = {sample.nll} over "
                f"{sample.tokens} tokens: the nll must be finite and the tokens not negative"
            )
    index = np.searchsorted(ids, [sample.prompt_id for sample in samples])
    completions: list[list[str]] = [[] for _ in ids]
    for prompt, sample in zip(index.tolist(), samples, strict=True):
        completions[prompt].append(sample.completion)

    def numbers(name: str) -> Array:
        return np.array([getattr(sample, name) for sample in samples], dtype=np.float64)

    def over_samples(values: Array, weights: Array | None = None, statistic: Statistic = mean) -> _Sums:
        return _sums_of(values, clusters[index], clusters.max() + 1, weights, statistic)

    def over_prompts(values: Array) -> _Sums:
        # One value of each id: a maximum, or dist-n, of more completions is another number.
        return _sums_of(values, clusters, clusters.max() + 1)

    def events(sums: _Sums) -> _Sums:
        return replace(sums, events=True)

    scores = numbers("score")
    nll, own_nll, tokens = numbers("nll"), numbers("own_nll"), numbers("tokens")
    largest = np.full(ids.size, np.nan)
    np.fmax.at(largest, index, scores)
    sums = {
        "mean": over_samples(scores),
        "share": events(over_samples(_at_least(scores, _THRESHOLD))),
        "expected_max": over_prompts(largest),
        "probability": events(over_prompts(_at_least(largest, _THRESHOLD))),
        "unscored": over_samples(np.isnan(scores).astype(np.float64)),
        "perplexity": over_samples(nll, tokens, perplexity),
        "dist2": over_prompts(distinct_n_by_prompt(completions, 2)),
        "dist3": over_prompts(distinct_n_by_prompt(completions, 3)),
    }
    if not np.isnan(own_nll).any():
        # E_q[-log p0] = H(q) + KL(q || p0), here of the tokens drawn: sums over the same ones, so that it
        # holds for these numbers, too.
        sums["entropy"] = over_samples(own_nll, tokens)
        sums["base_kl"] = over_samples(nll - own_nll, tokens)
    for name in dict.fromkeys(name for sample in samples for name in sample.measures):
        values = np.array([sample.measures.get(name, math.nan) for sample in samples])
        sums[name] = events(over_samples(values)) if name.startswith(_EVENT) else over_samples(values)
        if name.startswith(judge_measure("")) and np.isnan(values).any():
            sums[unscored_by(name)] = over_samples(np.isnan(values).astype(np.float64))
    if (text_tokens := numbers("text_tokens")).any():
        sums["text_perplexity"] = over_samples(numbers("text_nll"), text_tokens, perplexity)
        sums["text_accuracy"] = over_samples(numbers("text_correct"), text_tokens)
    return sums


def _sums_of(
    values: Array,
    index: npt.NDArray[np.intp],
    prompts: int,
    weights: Array | None = None,
    statistic: Statistic = mean,
) -> _Sums:
    """Sums of the values and of their weights (None: 1 each) over each cluster, which `index` names.

    NaN is left out together with its weight.
    """
    if np.isinf(values).any():
        raise ValueError(f"values[{int(np.isinf(values).argmax())}] is infinite")
    known = ~np.isnan(values)
    mass = known if weights is None else np.where(known, weights, 0.0)
    totals, masses = (np.bincount(index, each, prompts) for each in (np.where(known, values, 0.0), mass))
    return _Sums(totals.astype(np.float64), masses.astype(np.float64), statistic)


def _at_least(values: Array, threshold: float) -> Array:
    """1 or 0 for each value; NaN stays."""
    return np.where(np.isnan(values), np.nan, values >= threshold)


def _ngrams(items: Sequence[Item], n: int) -> Iterable[tuple[Item, ...]]:
    return (tuple(items[i : i + n]) for i in range(len(items) - n + 1))


# --- probe ----------------------------------------------------------------------------------------


def rank_correlation(x: npt.ArrayLike, y: npt.ArrayLike) -> RankCorrelation:
    """Spearman's rho: the correlation of ranks, ties sharing their average rank.

    The standard error is that of no relation, 1 / sqrt(n - 1), exact under permutation of either
    side, with ties too (Kendall and Gibbons, "Rank Correlation Methods"): rho counts as seen
    beyond two of them.

    Returns:
        NaN for both with fewer than two pairs; a NaN value where one side is constant.
    Raises:
        ValueError: the two differ in length, or one holds a NaN.
    """
    first, second = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if first.ndim != 1 or first.shape != second.shape:
        raise ValueError(f"x {first.shape} and y {second.shape} must be one-dimensional and equal")
    if np.isnan(first).any() or np.isnan(second).any():
        raise ValueError("a NaN has no rank: leave unscored completions out of both x and y")
    if first.size < 2:
        return RankCorrelation(math.nan, math.nan)
    a, b = _average_ranks(first), _average_ranks(second)
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float(a @ a) * float(b @ b))
    value = float(a @ b) / scale if scale else math.nan
    return RankCorrelation(value, 1 / math.sqrt(first.size - 1))


def _average_ranks(values: Array) -> Array:
    """(N,) ranks from 1; equal values share the mean of the ranks that they take up together."""
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[index], dtype=np.float64)
