"""Tasks: what to unlearn. A task gives prompts, a reward, words that name its quantiles, and its measures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from quark_fast.data.row import Row
from quark_fast.rewards.reward import Reward


def no_measures(row: Row, completion: Sequence[int], reward: float) -> dict[str, float]:
    """Nothing beyond what every task has."""
    return {}


@dataclass(frozen=True)
class Task:
    """One property to unlearn.

    Its defaults, where they differ from the settings' own, are in ``config.TASK_DEFAULTS``.

    Attributes:
        prompts: () -> (training rows, held-out rows).
        reward: () -> the task's reward.
        words: texts from the worst quantile to the best that name it; the reward tokens start there.
        property: the reward's own, known before that is loaded.
        judge: (texts side by side, as ``score_batch``) -> a scorer of another kind, which no run trains on;
            None: the task has none.
        texts: () -> ordinary texts, by which an evaluation tells what a training cost elsewhere.
        measures: (held-out row, completion as ids, its reward, NaN where it has none) -> numbers by name,
            whose means over completions join the table. A name that a completion lacks leaves it out of that
            mean.
        headline: the metric that the report opens with.
        columns: metrics of the terminal's table; ``report.columns.COLUMNS`` knows them all.
        more_columns: those that the report has beside them.
        prompt_classes: sort the held-out prompts by what the base model makes of them first.
    """

    name: str
    prompts: Callable[[], tuple[list[Row], list[Row]]]
    reward: Callable[[], Reward]
    words: Sequence[str]
    property: str = ""
    judge: Callable[[int], Reward] | None = None
    texts: Callable[[], list[str]] = list
    measures: Callable[[Row, Sequence[int], float], dict[str, float]] = no_measures
    headline: str = "mean"
    columns: Sequence[str] = (
        "mean",
        "expected_max",
        "perplexity",
        "prompt_fit",
        "text_perplexity",
        "dist3",
    )
    more_columns: Sequence[str] = (
        "entropy",
        "base_kl",
        "share",
        "probability",
        "dist2",
        "text_accuracy",
    )
    prompt_classes: bool = False

    def shows(self, metric: str) -> bool:
        """Whether a column of the report shows it."""
        return metric in self.columns or metric in self.more_columns

    def words_for(self, quantiles: int) -> list[str]:
        """One text per quantile, spread evenly over the task's words; a single quantile gets the best."""
        last = len(self.words) - 1
        if quantiles == 1:
            return [self.words[last]]
        return [self.words[round(k * last / (quantiles - 1))] for k in range(quantiles)]
