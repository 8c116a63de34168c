"""Work in batches that the processes of a run share out among themselves and keep on disk as it is made."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from quark_fast.rewards.reward import Reward
from quark_fast.rewards.weighted_sum import forget_unscored
from quark_fast.rollout.sampling import Sampler
from quark_fast.runtime.distributed import Processes
from quark_fast.runtime.journal import Journal
from quark_fast.training.signals import Stop

T = TypeVar("T")


class SharedWork:
    """How sampling, scoring and evaluation are done: each process its batches, none of them twice.

    Attributes:
        journal: has what is on disk of each stage's batches.
        sampler: samples the base model, as ``rollout.transformers.sample`` does.
        stop: asked for while the run trains; None before.
    """

    def __init__(self, processes: Processes, journal: Journal, sampler: Sampler) -> None:
        self.processes, self.journal, self.sampler = processes, journal, sampler
        self.stop: Stop | None = None

    def all_gather(self, work: Callable[[], T]) -> list[T]:
        """What every process makes of its batches, by its index."""
        return self.processes.all_gather(self.stoppable(work))

    def ask_again(self, stage: str, rewards: Iterable[Reward]) -> None:
        """Have a resumed run score a stage's completions anew: a scorer was out of order."""
        self.journal.forget(stage)
        forget_unscored(rewards)

    def stoppable(self, work: Callable[[], T]) -> Callable[[], T]:
        """The same work, which a signal may end at once: a resumed run does what is left of it."""

        def stoppable() -> T:
            if self.stop is None:
                return work()
            with self.stop.allowed_at_once():
                return work()

        return stoppable
