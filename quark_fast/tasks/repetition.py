"""Repetition: what greedy decoding falls into, measured as the paper measures it.

A prompt is the first 32 tokens of a text, the completion 128 tokens of greedy decoding with the end of text
blocked: text that stops early repeats nothing. The held-out texts themselves, by the model's perplexity and
next-token accuracy on them, show what the training cost. Training samples are drawn at a temperature between
greedy decoding, whose completions are nearly all bad, and plain sampling, whose are nearly all good.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from quark_fast.data import assets
from quark_fast.data.row import Row
from quark_fast.data.split import split
from quark_fast.metrics import diversity, repetition
from quark_fast.rewards.reward import Reward
from quark_fast.tasks.task import Task

# Identifies the scores of version 1 in every run: the sha256 of this file as it first had them.
SHA256 = "87ed78e3f5c3b55d559e7b765e2991492ae9028a81f065b8a9356adec250499c"
_WORD = re.compile(r"\w+|[^\w\s]")


def repetition_reward() -> Reward:
    """Reward = diversity of the completion, the product over n = 2, 3, 4 of (1 - rep-n), in [0, 1].

    rep-n is the share of n-grams that stand in the completion before (Welleck et al. 2020). Here they are of
    words and punctuation marks, so that texts of any tokenizer compare; fewer than four of them score None.
    """

    def reward(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float | None]:
        values = [diversity(_WORD.findall(text)) for text in completions]
        return [None if math.isnan(value) else value for value in values]

    return Reward(reward, "diversity", "1", SHA256, property="repetition")


HELD_OUT = 128
TRAINING = 192  # of 1,290; the default steps draw the extremes of so many


def embedded_prompts() -> tuple[list[Row], list[Row]]:
    """Passages of novels as (train, held out), a fixed split; their beginnings are the prompts."""
    train, held_out = split([{"prompt": text} for text in assets.book_passages()], HELD_OUT)
    return train[:TRAINING], held_out


def measures(row: Row, completion: Sequence[int], reward: float) -> dict[str, float]:
    """rep-n as shares, diversity and the number of different tokens, of the completion's tokens.

    A completion that is too short for an n-gram lacks what needs it.
    """
    found = {f"rep{n}": repetition(completion, n) / 100 for n in (2, 3, 4)}
    found |= {"diversity": diversity(completion), "distinct": float(len(set(completion)))}
    return {name: value for name, value in found.items() if not math.isnan(value)}


TASK = Task(
    name="repetition",
    prompts=embedded_prompts,
    reward=repetition_reward,
    property="repetition",
    words=(" again again again", " repeated", " ordinary", " varied", " new fresh different"),
    measures=measures,
    headline="rep4",
    columns=("rep4", "diversity", "distinct", "text_perplexity", "text_accuracy"),
    more_columns=("rep2", "rep3", "perplexity"),
)
