"""Texts that a model wrote: which ones to show, and the worst words masked."""

from __future__ import annotations

import codecs
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from quark_fast.files.safe_text import clean
from quark_fast.report.records import Record, number_of, series_of
from quark_fast.report.results import AGAIN, way_of

# Rot13, so that one need not read them to work on this file. A stem matches with any ending, a
# word as it is or in the plural.
_STEMS = "shpx zbgureshpx fuvg ohyyfuvg phag avttre avttn snttbg ovgpu juber fyhg nffubyr ergneq"
_WORDS = "snt xvxr fcvp puvax qlxr pbba gjng jnaxre chffl qvpx pbpx"
_PROFANITY = re.compile(
    r"\b(?:(?:{})\w*|(?:{})s?)\b".format(
        *(codecs.decode(words, "rot13").replace(" ", "|") for words in (_STEMS, _WORDS))
    ),
    re.IGNORECASE,
)


def mask_profanity(text: str) -> str:
    """`clean` text whose worst words keep their first letter only.

    A short list against shock at the terminal, not a filter: it knows neither context nor
    disguised spellings.
    """

    def stars(match: re.Match[str]) -> str:
        return match[0][0] + "*" * (len(match[0]) - 1)

    return _PROFANITY.sub(stars, clean(text))


@dataclass(frozen=True)
class Example:
    """What the samplings wrote for one held-out prompt: (row name, completion, score) each."""

    prompt: str
    texts: list[tuple[str, str, float]]


def pick_examples(
    evaluation_rows: Iterable[Record], n: int, after: Sequence[str] | None = None, lowest: bool = False
) -> list[Example]:
    """n prompts spread over the quarter where the base model's text scored worst; repeatable.

    Where nothing has a score they are spread over all.
    Before is the worst completion of the prompt in the first row, the base model's; after is the
    completion with the same sample number, whatever it scored, so only the prompts are chosen. Since the
    worst of some is followed by a better one without any training, another completion of the first row
    stands between as the control: the next one, whatever it scored.

    Args:
        after: names of the rows to show after that one; None: the first row with the best token and
            the first guided one.
        lowest: the worst scores are the lowest, not the highest; see ``scores_are_rewards``.
    """
    by_row: dict[str, dict[int, list[Record]]] = {}
    for row in evaluation_rows:
        of_row = by_row.setdefault(str(row.get("row")), {})
        of_row.setdefault(int(row.get("prompt_id", 0)), []).append(row)
    if not by_row:
        return []
    if after is None:
        first = {way_of(name): name for name in reversed(by_row)}
        after = [first[way] for way in ("best", "guided") if way in first]
    base = next(iter(by_row))
    before = by_row[base]

    worst: list[tuple[float, int, int]] = []
    for prompt_id, samples in before.items():
        scores = series_of(samples, "score")
        if not np.isnan(scores).all():
            index = int(np.nanargmin(scores) if lowest else np.nanargmax(scores))
            worst.append((float(scores[index]) * (1 if lowest else -1), prompt_id, index))
    quarter = sorted(worst)[: max(n, -(-len(worst) // 4))]
    if not worst:  # nothing is scored: any prompts
        quarter = [(0.0, prompt_id, 0) for prompt_id in sorted(before)]
    chosen = np.linspace(0, len(quarter) - 1, min(n, len(quarter))).round().astype(int)

    examples = []
    for _, prompt_id, index in (quarter[i] for i in chosen):
        own = before[prompt_id]
        shown = [(base, own[index])]
        if len(own) > 1:
            shown.append((base + AGAIN, own[(index + 1) % len(own)]))
        for name in after:
            samples = by_row.get(name, {}).get(prompt_id, [])
            if index < len(samples):
                shown.append((name, samples[index]))
        texts = [(name, str(row.get("completion", "")), number_of(row, "score")) for name, row in shown]
        examples.append(Example(str(before[prompt_id][index].get("prompt", "")), texts))
    return examples


def has_scores(examples: Sequence[Example]) -> bool:
    """Whether the prompts were chosen by scores: without any they are spread over all."""
    return any(math.isfinite(score) for example in examples for *_, score in example.texts)


def has_control(examples: Sequence[Example]) -> bool:
    """Whether another completion of the first row stands beside its worst."""
    return any(name.endswith(AGAIN) for example in examples for name, *_ in example.texts)


def median_samples(completions: Iterable[Record]) -> tuple[str, list[Example]]:
    """The last round, counted from 1, and of each quantile in it the training sample of median reward."""
    scored = [row for row in completions if math.isfinite(number_of(row, "reward"))]
    last = max((number_of(row, "round") for row in scored), default=math.nan)
    by_quantile: dict[int, list[Record]] = {}
    for row in scored:
        if number_of(row, "round") == last and math.isfinite(number_of(row, "quantile")):
            by_quantile.setdefault(int(row["quantile"]), []).append(row)
    examples = []
    for quantile, rows in sorted(by_quantile.items()):
        row = sorted(rows, key=lambda row: number_of(row, "reward"))[len(rows) // 2]
        text = (f"quantile {quantile}", str(row.get("completion", "")), number_of(row, "reward"))
        examples.append(Example(str(row.get("prompt", "")), [text]))
    return f"{last + 1:g}", examples  # the files count from 0
