"""What a run reports while it works."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Texts:
    """A training prompt, what the base model wrote for it and, once it has learned something, the model."""

    prompt: str
    before: str
    after: str = ""


@dataclass(frozen=True)
class Progress:
    """One report: the stage, how far it is, numbers worth showing, now and then a note, or texts.

    ``seconds`` is what a finished stage took; None: it is not measured yet.
    """

    stage: str
    done: int
    total: int
    numbers: dict[str, float] = field(default_factory=dict)
    note: str = ""
    texts: Texts | None = None
    seconds: float | None = None

    @property
    def finished(self) -> bool:
        """Whether the stage is over; a note is then about all of it, and is shown below its line."""
        return self.done >= self.total

    @property
    def shown_numbers(self) -> str:
        return "  ".join(f"{name} {value:.4g}" for name, value in self.numbers.items())

    def __str__(self) -> str:
        parts = (f"{self.stage}: {self.done}/{self.total}", self.shown_numbers, self.note)
        return "  ".join(part for part in parts if part)


class StageClock:
    """How long each stage takes; it is to hear every report."""

    def __init__(self) -> None:
        self.stage, self.started = "", 0.0
        self.last = time.monotonic()  # when something was last reported

    def seconds(self, event: Progress) -> float:
        """What the report's stage has taken so far."""
        now = time.monotonic()
        if event.stage != self.stage:
            # What is done already has taken its time since the stage before.
            self.stage, self.started = event.stage, self.last if event.done else now
        self.last = now
        return now - self.started if event.seconds is None else event.seconds
