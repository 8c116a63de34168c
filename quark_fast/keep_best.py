"""``--keep-best``: what makes one round of a run better than another, by measures on development prompts."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

from quark_fast.errors import UsageError

FORM = (
    "a measure with min or max, then bounds relative to the base model's value, as in"
    " 'judge:min, perplexity<=1.10'"
)

Measures = Mapping[str, float]
"""Of a round, or of the base model, by name; NaN where a measure has no value."""


@dataclass(frozen=True)
class Bound:
    """``measure`` may be at most (<=) or at least (>=) ``factor`` times the base model's value."""

    measure: str
    sign: str
    factor: float

    def __str__(self) -> str:
        return f"{self.measure}{self.sign}{self.factor:g}"

    @property
    def in_words(self) -> str:
        most = "at most" if self.sign == "<=" else "at least"
        return f"{self.measure} {most} {self.factor:g} times the base model's"

    def ratio(self, measures: Measures, base: Measures) -> float:
        """The measure relative to the base model's, which ``Goal.check_base`` has found above 0."""
        return measures[self.measure] / base[self.measure]

    def excess(self, measures: Measures, base: Measures) -> float:
        """How far beyond the bound, as a factor; at most 1: within it. NaN where it is not known."""
        ratio = self.ratio(measures, base)
        if self.sign == "<=":
            return ratio / self.factor
        return self.factor / ratio if ratio > 0 else math.inf

    def loosened(self, measures: Measures, base: Measures) -> Self | None:
        """The nearest bound of two decimals that lets these in; None: only no bound does."""
        ratio = self.ratio(measures, base)
        if self.excess(measures, base) <= 1:
            return self
        outwards = 1 if self.sign == "<=" else -1
        nearest = outwards * math.ceil(outwards * ratio * 100)
        for hundredths in (nearest, nearest + outwards):  # by its rounding the nearest may miss
            made = replace(self, factor=hundredths / 100)
            if hundredths > 0 and made.excess(measures, base) <= 1:
                return made
        return None


@dataclass(frozen=True)
class Goal:
    """The best round is that with the lowest (min) or highest (max) ``measure`` of those within the bounds.

    Of equal ones it is the first. A round whose measure is not known is none of them.
    """

    measure: str
    direction: str
    bounds: tuple[Bound, ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """What a text such as "judge:min, perplexity<=1.10" asks for.

        Raises:
            UsageError: it is not of that form.
        """
        first, *others = (part.strip() for part in text.split(","))
        found = re.fullmatch(r"(.*\S)\s*:\s*(min|max)", first)
        if found is None:
            raise UsageError(f"keep_best = {text!r}: {first!r} has no min or max; give {FORM}")
        return cls(found[1], found[2], tuple(_bound(part, text) for part in others))

    def __str__(self) -> str:
        return ", ".join([f"{self.measure}:{self.direction}", *map(str, self.bounds)])

    @property
    def names(self) -> list[str]:
        """The measures that it looks at, the one to lower or to raise first."""
        return list(dict.fromkeys([self.measure, *(bound.measure for bound in self.bounds)]))

    def check_names(self, known: Iterable[str]) -> None:
        """Raise UsageError for a measure that is not among the ``known`` ones."""
        known = list(known)
        for name in self.names:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]}? Else " if near else ""
                raise UsageError(
                    f"keep_best = {str(self)!r}: no measure {name!r}; {hint}choose from {', '.join(known)}"
                )

    def check_base(self, base: Measures) -> None:
        """Raise UsageError if the base model lacks the measure, or a value above 0 for a bound to be of."""
        if math.isnan(base[self.measure]):
            raise UsageError(
                f"keep_best = {str(self)!r}: the base model has no {self.measure} on the development prompts,"
                " so rounds cannot be compared by it; name another measure"
            )
        for bound in self.bounds:
            if not 0 < base[bound.measure] < math.inf:
                raise UsageError(
                    f"keep_best = {str(self)!r}: {bound} is relative to the base model's {bound.measure},"
                    f" which is {base[bound.measure]:.4g} on the development prompts and must be above 0;"
                    " leave that bound out, or bound another measure"
                )

    def beyond(self, measures: Measures, base: Measures) -> list[Bound]:
        """The bounds that the measures do not keep."""
        return [bound for bound in self.bounds if not bound.excess(measures, base) <= 1]

    def best(self, base: Measures, rounds: Sequence[Measures]) -> int | None:
        """Index of the best round; None: none is within the bounds."""
        within = [
            i
            for i, measures in enumerate(rounds)
            if not math.isnan(measures[self.measure]) and not self.beyond(measures, base)
        ]
        sign = 1 if self.direction == "min" else -1
        return min(within, key=lambda i: sign * rounds[i][self.measure], default=None)

    def without_gain(self, base: Measures, rounds: Sequence[Measures]) -> int:
        """How many rounds came since the best one; without a best one, all of them."""
        best = self.best(base, rounds)
        return len(rounds) if best is None else len(rounds) - 1 - best

    def shown(self, measures: Measures, base: Measures) -> str:
        """What it looks at, in words: "judge 0.171, perplexity 1.04 times the base model's"."""
        ratios = {bound.measure: bound.ratio(measures, base) for bound in self.bounds}
        parts = [f"{self.measure} {measures[self.measure]:.3g}"]
        parts += [f"{name} {ratio:.3g} times the base model's" for name, ratio in ratios.items()]
        return ", ".join(parts)

    def looser(self, base: Measures, rounds: Sequence[Measures]) -> Goal | None:
        """The same with bounds just loose enough for the round that is nearest to them; None: none is."""

        def distance(measures: Measures) -> float:
            """Infinite where one is not known: max() alone would pass over a NaN that is not its first."""
            beyond = [bound.excess(measures, base) for bound in self.bounds]
            return math.inf if any(map(math.isnan, beyond)) else max(beyond, default=math.inf)

        near = [m for m in rounds if distance(m) < math.inf and not math.isnan(m[self.measure])]
        if not near:
            return None
        nearest = min(near, key=distance)
        loosened = (bound.loosened(nearest, base) for bound in self.bounds)
        return replace(self, bounds=tuple(bound for bound in loosened if bound is not None))


def _bound(part: str, text: str) -> Bound:
    """The bound that one part of ``--keep-best`` names."""
    found = re.fullmatch(r"(.*\S)\s*(<=|>=)\s*(\S+)", part)
    try:
        factor = float(found[3]) if found else math.nan
    except ValueError:
        factor = math.nan
    if found is None or not 0 < factor < math.inf:
        raise UsageError(
            f"keep_best = {text!r}: {part!r} is no MEASURE<=NUMBER or MEASURE>=NUMBER with a number above 0;"
            f" give {FORM}"
        )
    return Bound(found[1], found[2], factor)
