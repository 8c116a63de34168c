"""How numbers are shown: a column for each metric, and the ways to write a value, a bound, a change."""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from typing import Any, Literal

from quark_fast.files.safe_text import clean
from quark_fast.metrics import ENOUGH_PROMPTS, FEWEST_PROMPTS, Change, judge_measure
from quark_fast.report.records import Record, judges_of, runs_trained_by


@dataclass(frozen=True)
class Column:
    """One metric as the tables show it; `fill` puts in `{property}` and `{target}`.

    Attributes:
        plain: a number of any size and sign, as a reward is, whose change is a difference; see `is_plain`.
    """

    key: str
    title: str
    short: str
    style: Literal["3 digits", "2 digits", "percent", "1 digit"]
    meaning: str
    plain: bool = False


# Every metric that a table may show; which ones it does, the task decides.
COLUMNS = (
    Column(
        "target",
        "share {target}",
        "{target}",
        "percent",
        "Completions with a reward above 0.5: those that the scorer calls {target}.",
    ),
    Column(
        "target_negative",
        "{target} on negative prompts",
        "on neg.",
        "percent",
        "The same over prompts that the base model mostly continues with negative text.",
    ),
    Column(
        "target_neutral",
        "{target} on neutral prompts",
        "on neutr.",
        "percent",
        "The same over prompts that it continues with positive and negative text alike.",
    ),
    Column(
        "target_positive",
        "{target} on positive prompts",
        "on pos.",
        "percent",
        "The same over prompts that it mostly continues with positive text.",
    ),
    Column(
        "rep4",
        "repeated 4-grams",
        "rep-4",
        "percent",
        "rep-4: 4-grams of a completion's tokens that it held before.",
    ),
    Column("rep3", "repeated 3-grams", "rep-3", "percent", "rep-3: the same with 3-grams."),
    Column("rep2", "repeated 2-grams", "rep-2", "percent", "rep-2: the same with 2-grams."),
    Column(
        "diversity",
        "diversity",
        "divers.",
        "2 digits",
        "The product of 1 − rep-n over n = 2, 3, 4: 1 repeats nothing.",
    ),
    Column("distinct", "different tokens", "distinct", "1 digit", "Different tokens of a completion."),
    Column(
        "mean",
        "mean {property}",
        "mean",
        "3 digits",
        "The scorer's {property} of the completion alone, averaged over all completions.",
    ),
    Column(
        "share",
        "share ≥ .5",
        "≥ .5",
        "percent",
        "Completions with a {property} of at least .5.",
    ),
    Column(
        "expected_max",
        "expected max",
        "exp. max",
        "2 digits",
        "The worst of a prompt's completions, averaged over prompts; grows with their number.",
    ),
    Column(
        "probability",
        "probability",
        "prob.",
        "2 digits",
        "Prompts of which any completion reaches .5; grows with their number.",
    ),
    Column(
        "perplexity",
        "perplexity",
        "perpl.",
        "1 digit",
        "exp of the mean negative log-likelihood per token under the base model, or the one of --ppl-model: "
        "how odd it finds the text.",
    ),
    Column(
        "entropy",
        "entropy",
        "entropy",
        "3 digits",
        "The mean of −log q per token, in nats, where q is the distribution that drew the token, after "
        "temperature, guided mix and nucleus: how freely the row writes. Greedy decoding has 0.",
    ),
    Column(
        "base_kl",
        "KL to base",
        "KL",
        "3 digits",
        "The mean of log q − log p per token, in nats, p being the model that measures the perplexity: how "
        "far what is drawn has moved from it. Perplexity is exp(entropy + KL). The base model's own row has "
        "a KL above 0 where a nucleus cuts its distribution.",
        plain=True,  # without a nucleus that row's is 0
    ),
    Column(
        "prompt_fit",
        "fit to prompt",
        "fit",
        "2 digits",
        "How much likelier the model that measures the perplexity finds a completion after its own prompt "
        "than after another's, in nats per token, a completion a prompt: it falls as the model leaves the "
        "subject.",
    ),
    Column(
        "text_perplexity",
        "perplexity of text",
        "text ppl",
        "1 digit",
        "The model's own perplexity on held-out text, with the same token in front; the text's first half, "
        "at most 32 tokens, is a prompt and does not count.",
    ),
    Column(
        "text_accuracy",
        "accuracy on text",
        "accuracy",
        "percent",
        "Tokens of held-out text, after a prompt of its first half, at most 32 tokens, that the model's most "
        "probable next token gets right.",
    ),
    Column("dist2", "dist-2", "dist-2", "2 digits", "Distinct word pairs per word of a prompt."),
    Column("dist3", "dist-3", "dist-3", "2 digits", "Distinct word triples per word of a prompt."),
)


def scores_are_rewards(evaluation: Record) -> bool:
    """Whether its scores are a reward as it is: higher is better, of any size and sign.

    Else they are a property to be rid of, 1 - reward, in [0, 1].
    """
    return evaluation.get("property") == "reward"


def is_plain(column: Column, evaluation: Record) -> bool:
    """Whether its numbers are as rewards are: of one of 0 or below a percentage says nothing."""
    return column.plain or (column.key == "mean" and scores_are_rewards(evaluation))


def columns_of(evaluation: Record, more: bool = True) -> list[Column]:
    """What the tables of an evaluation show, its headline metric first; without `more`, the terminal's."""
    keys = [headline_column(evaluation).key, *evaluation.get("columns", _TOXICITY_COLUMNS)]
    if more:
        keys += evaluation.get("more_columns", ["share"])
    elif {"perplexity", "text_perplexity"} <= set(keys):
        keys = [key for key in keys if key != "dist3"]  # for which a terminal has no room
    if scores_are_rewards(evaluation):
        keys = [key for key in keys if key not in _OF_A_PROPERTY]
    known = [column for column in COLUMNS if column.key in keys]
    first, *others = sorted(known, key=lambda column: column.key != keys[0])
    return [first, *judge_columns(evaluation), *others]


def numbered_judges(evaluation: Record) -> list[tuple[str, Record]]:
    """Each judge with what it is called where its name has no room: "judge", or "judge 2" of several."""
    judges = judges_of(evaluation)
    return [(f"judge {n}" if len(judges) > 1 else "judge", judge) for n, judge in enumerate(judges, start=1)]


def part_in_training(evaluation: Record, judge: Record) -> str:
    """That a judge took none, or whose reward it was: another run's may stand beside another scorer."""
    runs = [shortened(run) for run in runs_trained_by(evaluation, judge)]
    return f"was in the reward that trained {' and '.join(runs)}" if runs else "took no part in training"


def judge_columns(evaluation: Record) -> list[Column]:
    """One for each scorer beside the reward."""
    found = []
    for heading, judge in numbered_judges(evaluation):
        if name := shortened(str(judge.get("name"))):
            what = shortened(str(judge.get("property") or "score"))
            title = f"{what} by {name}"
            meaning = f"The mean {title}, which {part_in_training(evaluation, judge)}."
            key = judge_measure(str(judge.get("name")))
            found.append(Column(key, title, heading, "3 digits", meaning, judge.get("property") is None))
    return found


def main_columns(evaluation: Record) -> list[Column]:
    """The headline metric, and what it may have cost: in fluency, and in variety or in other text."""
    keys = {column.key for column in columns_of(evaluation, more=False)}
    fluency = "perplexity" if "perplexity" in keys else "text_perplexity"
    others = (key for key in ("diversity", "text_perplexity") if key in keys and key != fluency)
    return [headline_column(evaluation), find_column(fluency), find_column(next(others, "dist3"))]


def headline_column(evaluation: Record) -> Column:
    return find_column(str(evaluation.get("headline", "mean")))


def find_column(key: str) -> Column:
    return next(column for column in COLUMNS if column.key == key)


# Metrics of a score in [0, 1] whose highest value is the worst.
_OF_A_PROPERTY = {"share", "expected_max", "probability"}

# What an evaluation without a choice of its own shows.
_TOXICITY_COLUMNS = ("mean", "expected_max", "probability", "perplexity", "dist2", "dist3")


def format_value(value: float, style: str) -> str:
    if not math.isfinite(value):
        return "–"
    if style == "percent":
        return f"{100 * value:.1f}%"
    if style == "1 digit":
        return f"{value:.1f}"
    digits = f"{value:z.{style[0]}f}"  # z: no -0.000
    if style == "3 digits" and 1e-12 < abs(value) < 0.001:  # rewards may be so small; below, it is rounding
        digits = f"{value:.3g}"
    return re.sub(r"^(-?)0\.", r"\1.", digits)


def format_bounds(low: float, high: float, style: str) -> str:
    if not (math.isfinite(low) and math.isfinite(high)):
        return ""
    between = "–" if low >= 0 else " to "  # a dash beside a minus sign reads as another one
    return f"{format_value(low, style)}{between}{format_value(high, style)}".replace("%", "")


def _format_percent(fraction: float) -> str:
    """A relative change in percent with its sign, -0.401 -> "−40%"; a decimal below 1%."""
    if not math.isfinite(fraction):
        return "–"
    percent = 100 * fraction
    digits = f"{abs(percent):.{0 if abs(percent) >= 0.95 else 1}f}"
    if -100 < percent <= -99.5:  # which is not all of it
        digits = f"{math.floor(-10 * percent) / 10:.1f}"
    sign = "" if float(digits) == 0 else "−" if percent < 0 else "+"
    return f"{sign}{digits.removesuffix('.0')}%"


def _format_difference(difference: float, style: str) -> str:
    if not math.isfinite(difference):
        return "–"
    return ("−" if difference < 0 else "+") + format_value(abs(difference), style)


def format_change(change: Change, column: Column, evaluation: Record) -> tuple[str, str]:
    """A change and its bounds: in percent; of what `is_plain` as a difference."""
    if is_plain(column, evaluation):
        parts = (change.difference, change.low, change.high)
        value, low, high = (_format_difference(part, column.style) for part in parts)
    else:
        parts = (change.relative, change.relative_low, change.relative_high)
        value, low, high = map(_format_percent, parts)
    return value, "" if "–" in (low, high) else f"{low} to {high}".replace("%", "")


def intervals_note(prompts: Any) -> str:
    """What intervals of so few prompts are worth; empty where there are enough, or a file does not say."""
    if not isinstance(prompts, int) or prompts >= ENOUGH_PROMPTS:
        return ""
    if prompts < FEWEST_PROMPTS:
        few = counted(prompts, "prompt is", "prompts are")
        return f"{few} too few for an interval, which takes {FEWEST_PROMPTS}: no change is told from chance."
    return f"{prompts} prompts: a 95% interval of so few holds the true value in some 90 of 100 cases."


def fill(text: str, evaluation: Record) -> str:
    """The text with what the evaluation calls the scores and the target; other braces are of names in it."""
    for key, word in {"property": "score", "target": "positive"}.items():
        text = text.replace(f"{{{key}}}", one_line(clean(str(evaluation.get(key, word))))[:60])
    return text


def shortened(name: str, most: int = 60) -> str:
    """A name from anywhere in one line; of a long one the end, by which runs differ as a rule.

    A hash of the whole keeps those apart that differ elsewhere.
    """
    line = one_line(clean(name))
    mark = hashlib.sha256(line.encode(errors="backslashreplace")).hexdigest()[:6]
    return line if len(line) <= most else f"{line[:8]}…{mark}…{line[16 - most :]}"


def counted(number: int, thing: str, things: str | None = None) -> str:
    return f"{number:,} {thing if number == 1 else things or f'{thing}s'}"


def duration(minutes: float) -> str:
    return f"{minutes:.1f} minutes" if minutes >= 2 else f"{60 * minutes:.0f} seconds"


def one_line(text: str) -> str:
    return " ".join(text.split())
