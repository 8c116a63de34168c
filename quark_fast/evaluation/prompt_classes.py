"""Which class the base model's completions put a prompt into."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from quark_fast.data.row import Row
from quark_fast.errors import UsageError
from quark_fast.evaluation.held_out import Completion, EncodedPrompts, EvaluationSetup
from quark_fast.rollout.sampling import Conditioning, DrawnBatch
from quark_fast.runtime.journal import Kept
from quark_fast.runtime.overlap import Begun

CLASS_SAMPLES = 25
CLASSES = ("negative", "neutral", "positive")


def prompt_class(positive: float) -> str:
    """The class of a prompt by its share of positive completions: negative, neutral or positive."""
    # The paper's 0, 12 or 13, and 25 of 25 fall into the middle of these. VADER's shares lie closer together.
    return "negative" if positive <= 0.4 else "positive" if positive >= 0.6 else "neutral"


def check_classes(rows: Sequence[Row]) -> None:
    """Raise UsageError for a column of the user's own that has the name of the classes'."""
    for row in rows:
        if row.get("prompt_class") not in (None, *CLASSES):
            raise UsageError(
                f"prompt_class = {row['prompt_class']!r:.80}: this task keeps a prompt's class there, one"
                f" of {', '.join(CLASSES)}; name that column of the prompts otherwise"
            )


def classify_prompts(
    setup: EvaluationSetup, target: str, kept: Kept[list[tuple[int, str]]] | None = None
) -> Iterator[tuple[int, str]]:
    """Sort prompts as the paper does, by how many of 25 completions of the base model are positive.

    The paper keeps the prompts with 0, 12 or 13, and 25 of them (Liu et al., "DExperts", 2021); here each
    prompt has a class, see ``prompt_class``, and a completion that the reward puts at exactly 0.5 counts
    half. The samples are not those of the evaluation: the base model's results would be biased by the
    choice. A row with a ``num_positive``, DExperts' own count, is believed.

    Args:
        setup: as in the evaluation; greedy sampling is replaced by that at temperature 1.
        target: "positive" or "negative", the sentiment whose reward it is.
    Yields:
        (index of the prompt, its class), by ``num_positive`` first.
    """
    rows, ids = setup.held_out.rows, setup.held_out.ids
    numbers = ((i, _count(row.get("num_positive"))) for i, row in enumerate(rows))
    counted = {i: number for i, number in numbers if number is not None}
    for i, number in counted.items():
        yield i, prompt_class(number / CLASS_SAMPLES)
    others = [i for i in range(len(ids)) if i not in counted]
    setup = dataclasses.replace(
        setup,
        held_out=EncodedPrompts([rows[i] for i in others], [ids[i] for i in others], CLASS_SAMPLES),
        sampling=dataclasses.replace(setup.sampling, temperature=setup.sampling.temperature or 1.0),
    )

    def share(rewards: list[float]) -> float:
        """Of a prompt's scored completions, how many have the target's sentiment."""
        values = np.array(rewards)
        having = np.where(values == 0.5, 0.5, values > 0.5)[~np.isnan(values)]
        return float(having.mean()) if len(having) else 0.5

    def classes_of(completions: list[Completion]) -> list[tuple[int, str]]:
        rewards: dict[int, list[float]] = {}
        for i, _, _, reward in completions:
            rewards.setdefault(i, []).append(reward)
        shares = {i: share(own) for i, own in rewards.items()}
        positive = {i: one if target == "positive" else 1 - one for i, one in shares.items()}
        return [(others[i], prompt_class(one)) for i, one in positive.items()]

    def classes(drawn: DrawnBatch) -> Begun[list[tuple[int, str]]]:
        return setup.scored(setup.with_texts(drawn)).then(classes_of)

    batches = setup.draw("prompt classes", setup.reference, Conditioning(), classes, kept)
    for _, batch in setup.in_order(("", batch) for batch in batches):
        yield from batch


def _count(value: Any) -> float | None:
    """``num_positive`` of a row; None where it has none, or a column of that name that is no such count."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if 0 <= number <= CLASS_SAMPLES else None
