"""What a run reports while it works."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Texts:
    """A training prompt, what the base model wrote for it and, once it has learned something, the model."""

    prompt: str
    before: str
    after: str = ""


@dataclass(frozen=True)
class Progress:
    """One report: the stage, how far it is, numbers worth showing, now and then a note, or texts."""

    stage: str
    done: int
    total: int
    numbers: dict[str, float] = field(default_factory=dict)
    note: str = ""
    texts: Texts | None = None

    @property
    def shown_numbers(self) -> str:
        return "  ".join(f"{name} {value:.4g}" for name, value in self.numbers.items())

    def __str__(self) -> str:
        parts = (f"{self.stage}: {self.done}/{self.total}", self.shown_numbers, self.note)
        return "  ".join(part for part in parts if part)
