"""The rows of the table: which model, under which reward token, by which sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quark_fast.config import Config
from quark_fast.data.row import Row
from quark_fast.rollout.sampling import Conditioning, Sampling


@dataclass(frozen=True)
class Mode:
    """One row of the table: a name, whose logits, and what stands before the prompt."""

    name: str
    conditioning: Conditioning
    untouched: bool = False

    @property
    def guidance(self) -> float | None:
        """Place on the curve over w: the worst token is 0, the best 1; None is off the curve."""
        if self.conditioning.quantile is None:
            return None
        if self.conditioning.against is not None:
            return self.conditioning.guidance
        return {"worst token": 0.0, "best token": 1.0}.get(self.name)

    @property
    def quantile(self) -> int | None:
        """Place on the curve over quantiles; None where two tokens are mixed, or none is there."""
        return self.conditioning.quantile if self.conditioning.against is None else None

    @property
    def places(self) -> dict[str, float | None]:
        """Both, by name."""
        return {"guidance": self.guidance, "quantile": self.quantile}


def modes(quantiles: int, guidance: Sequence[float], every_quantile: bool = True) -> list[Mode]:
    """Untouched, best, guided by each w, the quantiles between, worst, no token.

    A single quantile's token is the best one.

    Args:
        every_quantile: False leaves out those between the best and the worst.
    """
    best = quantiles - 1
    guided = [Mode(f"guided w={w:g}", Conditioning(best, 0, w)) for w in guidance if w != 1.0]
    between = [Mode(f"quantile {k}", Conditioning(k)) for k in range(best - 1, 0, -1) if every_quantile]
    against = [*guided, *between, Mode("worst token", Conditioning(0))] if best else []
    return [
        Mode("untouched", Conditioning(), untouched=True),
        Mode("best token", Conditioning(best)),
        *against,
        Mode("no token", Conditioning()),
    ]


@dataclass(frozen=True)
class HeldOut:
    """Prompts to evaluate on: rows (for the reward), token ids, and completions wanted of each.

    ``texts``, where there are any, are the ids of each prompt's held-out text, the prompt its beginning.
    """

    rows: Sequence[Row]
    ids: Sequence[Sequence[int]]
    samples: int
    texts: Sequence[Sequence[int]] = ()


def evaluation_sampling(config: Config) -> Sampling:
    """How completions are drawn in an evaluation."""
    return Sampling(
        config.max_new_tokens,
        config.min_new_tokens,
        config.eval_temperature,
        config.eval_top_p,
        config.sample_batch,
    )


def generation_settings(sampling: Sampling) -> dict[str, Any]:
    """How completions were drawn, as transformers' generation config spells it."""
    if sampling.temperature == 0:
        return {"do_sample": False, "min_new_tokens": sampling.min_new_tokens or None}
    return {
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": 0,  # off; left out it is 50
        "min_new_tokens": sampling.min_new_tokens or None,
    }
