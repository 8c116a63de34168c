"""The rows of the table: whose completions, after which reward token, under which guidance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from quark_fast.report.results import BASE
from quark_fast.rollout.sampling import Conditioning


@dataclass(frozen=True)
class TableRow:
    """A row that is to be sampled: its name, which model writes it, and what stands before the prompt.

    Attributes:
        base: the base model writes it, not the policy.
    """

    name: str
    conditioning: Conditioning = field(default_factory=Conditioning)
    base: bool = False

    @property
    def guidance(self) -> float | None:
        """Position on the curve over w: 0 for the worst token, 1 for the best, else w; None: not on it."""
        if self.conditioning.quantile is None:
            return None
        if self.conditioning.against is not None:
            return self.conditioning.guidance
        return {"worst token": 0.0, "best token": 1.0}.get(self.name)

    @property
    def quantile(self) -> int | None:
        """Position on the curve over quantiles; None where two tokens are mixed, or none is there."""
        return self.conditioning.quantile if self.conditioning.against is None else None

    @property
    def on_curves(self) -> dict[str, float | None]:
        """Both positions, by name."""
        return {"guidance": self.guidance, "quantile": self.quantile}


def table_rows(
    quantiles: int,
    guidance: Sequence[float],
    rows: Literal["ends", "all", "best"] = "ends",
    one_token: bool = False,
) -> list[TableRow]:
    """Base model, best token, guided by each w, the quantiles between, worst token, no token.

    A single quantile's token is the best one.

    Args:
        rows: "ends" leaves out the quantiles between and no token; "best" all but the first two.
        one_token: one token alone was trained: the best one stands for all.
    """
    best = quantiles - 1

    def after(quantile: int) -> TableRow:
        return TableRow(row_name(quantile, best), Conditioning(quantile))

    chosen = [TableRow(BASE, base=True), after(best)]
    if rows != "best" and best and not one_token:
        weights = [w for w in dict.fromkeys(guidance) if w != 1.0]
        chosen += [TableRow(row_name(best, best, w), Conditioning(best, 0, w)) for w in weights]
        if rows == "all":
            chosen += [after(k) for k in range(best - 1, 0, -1)]
        chosen.append(after(0))
    if rows == "all":
        chosen.append(TableRow("no token"))
    return chosen


def row_name(quantile: int, best: int, guidance: float = 1.0) -> str:
    """What sampling after a quantile's token is called, guided by w or, where that is 1, by itself."""
    token = {0: "worst token", best: "best token"}.get(quantile, f"quantile {quantile}")
    if guidance == 1:
        return token
    guided = f"guided w={_shown(guidance)}"
    return guided if quantile == best else f"{token}, {guided}"


def _shown(w: float) -> str:
    """In six digits, or in all where these are another number: rows that differ have names that do."""
    return f"{w:g}" if float(f"{w:g}") == w else repr(w)
