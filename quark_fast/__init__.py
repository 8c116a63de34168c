"""quark_fast: make a causal language model unlearn a property (Quark, Lu et al. 2022), fast."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from quark_fast.config import Config, UsageError
    from quark_fast.evaluator import Evaluator
    from quark_fast.ops.linear import linear_quark_loss
    from quark_fast.ops.loss import QuarkLoss, quark_loss
    from quark_fast.pool import RolloutPool
    from quark_fast.trainer import Trainer

_HOME = {
    "Config": "config",
    "UsageError": "config",
    "Evaluator": "evaluator",
    "QuarkLoss": "ops.loss",
    "linear_quark_loss": "ops.linear",
    "quark_loss": "ops.loss",
    "RolloutPool": "pool",
    "Trainer": "trainer",
}

__all__ = [
    "Config",
    "Evaluator",
    "QuarkLoss",
    "RolloutPool",
    "Trainer",
    "UsageError",
    "linear_quark_loss",
    "quark_loss",
]


def __getattr__(name: str) -> Any:
    # The loss and the pool are useful alone: importing them must not wait for transformers.
    if name in _HOME:
        return getattr(import_module(f"quark_fast.{_HOME[name]}"), name)
    raise AttributeError(f"module 'quark_fast' has no attribute {name!r}")
