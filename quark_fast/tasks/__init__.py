"""Tasks: what to unlearn. A task gives prompts, a reward, and words that name its quantiles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from quark_fast.config import UsageError
from quark_fast.prompts import Row
from quark_fast.reward import Reward


@dataclass(frozen=True)
class Task:
    """One property to unlearn.

    Attributes:
        prompts: () -> (training rows, held-out rows).
        reward: () -> the task's reward.
        words: texts from the worst quantile to the best that name it; the reward tokens start there.
    """

    name: str
    prompts: Callable[[], tuple[list[Row], list[Row]]]
    reward: Callable[[], Reward]
    words: Sequence[str]

    def words_for(self, quantiles: int) -> list[str]:
        """One text per quantile, spread evenly over the task's words."""
        last = len(self.words) - 1
        return [self.words[round(k * last / (quantiles - 1))] for k in range(quantiles)]


def find_task(name: str) -> Task:
    """The task of that name."""
    # Each import here is a task's own; a run loads the one it needs.
    from quark_fast.tasks import toxicity

    tasks = {"toxicity": toxicity.TASK}
    if name not in tasks:
        raise UsageError(f"unknown task {name!r}; choose from: {', '.join(tasks)}")
    return tasks[name]
