"""Sentiment: steer to positive or negative text, judged by VADER.

VADER (Hutto and Gilbert, ICWSM 2014) is a lexicon of 7,500 words with rules for negation, degree and
punctuation. It runs anywhere, never changes, and reads nothing between the lines: a third or more of short
completions hold none of its words and score exactly 0. Such ties share a quantile (``ties="same"``), and
count as neither positive nor negative. A trained classifier is the better judge where one can be had; the
measures below take a reward above 0.5 for a completion of the sentiment wanted, whoever gives it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from quark_fast.data import assets
from quark_fast.data.row import Row
from quark_fast.data.split import split
from quark_fast.rewards.judge import judge
from quark_fast.rewards.reward import Reward
from quark_fast.tasks.task import Task

# The sha256 of the wheel of vaderSentiment 3.3.2 identifies the scores in every run.
VADER_WHEEL = "3bf1d243b98b1afad575b9f22bc2cb1e212b94ff89ca74f8a23a588d024ea311"


def sentiment_reward(target: str) -> Reward:
    """Reward = (1 + s * compound) / 2 in [0, 1], VADER's compound of the completion alone.

    s is 1 for the target "positive" and -1 for "negative"; 0.5 is a completion without sentiment. A blank
    completion scores None.
    """
    polarity = assets.vader().SentimentIntensityAnalyzer().polarity_scores
    sign = 1 if target == "positive" else -1

    def reward(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float | None]:
        return [(1 + sign * polarity(text)["compound"]) / 2 if text.strip() else None for text in completions]

    # Two opposite scales must not pass for one: a pool that ranked both would mean nothing.
    opposite = "" if target == "positive" else f", of {target} text"
    version_of = f"vaderSentiment {version('vaderSentiment')}{opposite}"
    return Reward(reward, "vader", version_of, VADER_WHEEL, unwanted(target))


def unwanted(target: str) -> str:
    """What 1 - reward measures."""
    return "negativity" if target == "positive" else "positivity"


OPENING = 8  # words of a passage that make a prompt, about as long as those of RealToxicityPrompts
OPENINGS = 600
HELD_OUT = 200


def embedded_prompts() -> tuple[list[Row], list[Row]]:
    """Openings of book passages and RealToxicityPrompts as (train, held out), a fixed split.

    The former lead anywhere, the latter often to negative text: the paper's classes of prompts need both.
    """
    openings = dict.fromkeys(" ".join(text.split()[:OPENING]) for text in assets.book_passages())
    _, books = split([{"prompt": text, "source": "book"} for text in openings], OPENINGS)
    toxic = [{"prompt": text, "source": "realtoxicityprompts"} for _, text in assets.toxicity_prompts()]
    return split([*books, *toxic], HELD_OUT)


def measures(row: Row, completion: Sequence[int], reward: float) -> dict[str, float]:
    """Whether the completion has the sentiment wanted: among all, and among those of its prompt's class."""
    if math.isnan(reward):
        return {}
    has_it = float(reward > 0.5)
    # Development prompts have no classes.
    of_class = {f"target_{name}": has_it} if (name := row.get("prompt_class")) else {}
    return {"target": has_it, **of_class}


def task(target: str) -> Task:
    """The task of steering to the sentiment "positive" or "negative"."""
    others = "negative" if target == "positive" else "positive"  # prompts that ask for a change
    words = [" terrible sad hateful", " bad", " ordinary", " good", " wonderful happy love"]
    return Task(
        name="sentiment",
        prompts=embedded_prompts,
        reward=lambda: sentiment_reward(target),
        property=unwanted(target),
        judge=lambda batch_size: judge(
            "sentiment", unwanted(target), batch_size, complement=target == "positive"
        ),
        words=words if target == "positive" else words[::-1],
        texts=assets.book_passages,
        measures=measures,
        headline="target",
        columns=("target", f"target_{others}", "target_neutral", "perplexity", "text_perplexity"),
        more_columns=(
            f"target_{target}",
            "mean",
            "entropy",
            "base_kl",
            "prompt_fit",
            "dist2",
            "dist3",
            "text_accuracy",
        ),
        prompt_classes=True,
    )
