"""What keeps a run from diverging unseen: bad steps are skipped and counted, the KL is held or ends it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quark_fast.config import Config
from quark_fast.errors import Diverged

# In this order: the parts of the loss before their sum, and the gradient last, which all of them spoil.
TERMS = (
    "nll",
    "kl",
    "entropy",
    "contrast",
    "base_contrast",
    "mirror_kl",
    "prompt_kl",
    "unlikelihood",
    "loss",
    "gradient",
)
REMEMBERED = 8  # gradient norms that a diagnosis shows


@dataclass
class BadSteps:
    """Counts steps whose loss or gradient is not finite, which are skipped: weights and optimizer stay.

    Attributes:
        in_row, skipped: such steps since the last good one, and in all.
        norms: gradient norms of the last good steps.
    """

    in_row: int = 0
    skipped: int = 0
    norms: list[float] = field(default_factory=list)

    def judge(self, terms: Mapping[str, float], norm: float, scale: float | None) -> str | None:
        """The first term that is not finite, or None for a step to be made; counted either way.

        Args:
            terms: the parts of the loss.
            norm: of the whole gradient.
            scale: fp16's scale of the loss, None without one. Above 1 an infinite gradient of a finite loss
                is how the scale finds its size: the scaler skips the step itself, and it is none of ours.
        """
        values = {**terms, "gradient": norm}
        bad = next((name for name in TERMS if not math.isfinite(values.get(name, 0.0))), None)
        if bad == "gradient" and scale is not None and scale > 1:
            return None
        if bad is None:
            self.in_row = 0
            self.norms = [*self.norms, norm][-REMEMBERED:]
        else:
            self.in_row += 1
            self.skipped += 1
        return bad

    def state_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def stop(self, config: Config, step: int, row: Mapping[str, Any]) -> None:
        """Raise Diverged where the steps up to this one, whose metrics are ``row``, call for it."""
        norms = ", ".join(f"{norm:.3g}" for norm in self.norms) or "none"
        where = f"learning rate {row['lr']:.3g}; gradient norms of the last good steps: {norms}"
        kept = "The last checkpoint is kept, with weights from before;"
        if config.max_bad_steps and self.in_row >= config.max_bad_steps:
            raise Diverged(
                f"steps {step - self.in_row + 1} to {step} had no finite {row['skipped_for']} and were"
                f" skipped; {where}. {kept} start anew with a lower --learning-rate, or go on with --resume"
                " --max-bad-steps 0, which skips any number"
            )
        kl = row.get("kl")
        if config.kl_stop and kl is not None and kl > config.kl_stop:
            raise Diverged(
                f"step {step}: the KL to the base model is {kl:.4g} nats per token, above kl_stop ="
                f" {config.kl_stop:g}; {where}. {kept} start anew with a higher --kl-coef or a --kl-target,"
                " or go on with --resume and a higher --kl-stop"
            )


@dataclass
class KLController:
    """The weight of the KL, raised above a target KL and lowered below it (Ziegler et al. 2019, section 2.2).

    coef *= 1 + clip(kl / target - 1, -0.2, 0.2) * samples / horizon, after each step.

    Attributes:
        target: nats per token; 0: the weight stays as it is.
        horizon: in samples; the larger, the slower.
    """

    coef: float
    target: float
    horizon: int

    def update(self, kl: float, samples: int) -> None:
        if self.target:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + error * samples / self.horizon
