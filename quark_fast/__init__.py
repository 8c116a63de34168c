"""quark_fast: make a causal language model unlearn a property (Quark, Lu et al. 2022), fast."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Here, as whoever imports _C imports this first. Raised with the number in csrc/bindings.cpp.
_INTERFACE = 2
try:
    import quark_fast._C as _compiled
except ImportError:  # the Triton kernels need none; whoever calls the C++ imports it
    pass
else:
    if getattr(_compiled, "interface", None) != _INTERFACE:
        raise ImportError(
            "the compiled part of quark_fast is of another version than the package: "
            "run `pip install -e .` again",
            name=_compiled.__name__,
            path=_compiled.__file__,
        )

if TYPE_CHECKING:
    from quark_fast.config import Config
    from quark_fast.errors import Diverged, Interrupted, NotUploaded, OutOfResources, UsageError
    from quark_fast.evaluation.side_by_side import Evaluator
    from quark_fast.ops.linear import linear_quark_loss
    from quark_fast.ops.loss import QuarkLoss, quark_loss
    from quark_fast.pool.pool import RolloutPool
    from quark_fast.training.trainer import Trainer

_HOME = {
    "Config": "config",
    "Diverged": "errors",
    "Interrupted": "errors",
    "NotUploaded": "errors",
    "OutOfResources": "errors",
    "UsageError": "errors",
    "Evaluator": "evaluation.side_by_side",
    "QuarkLoss": "ops.loss",
    "linear_quark_loss": "ops.linear",
    "quark_loss": "ops.loss",
    "RolloutPool": "pool.pool",
    "Trainer": "training.trainer",
}

__all__ = [
    "Config",
    "Diverged",
    "Evaluator",
    "Interrupted",
    "NotUploaded",
    "OutOfResources",
    "QuarkLoss",
    "RolloutPool",
    "Trainer",
    "UsageError",
    "linear_quark_loss",
    "quark_loss",
]


def __getattr__(name: str) -> Any:
    # The loss and the pool are useful alone: importing them must not wait for transformers.
    if name == "assets":  # rewards that users wrote import it from here
        return import_module("quark_fast.data.assets")
    if name in _HOME:
        return getattr(import_module(f"quark_fast.{_HOME[name]}"), name)
    raise AttributeError(f"module 'quark_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    # Completion in a notebook shows what is imported at its first use, too.
    return sorted({*globals(), *__all__} - {"Any", "TYPE_CHECKING", "import_module"})
