"""The points of a grid: which settings differ from the usual ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quark_fast.config import Config
from quark_fast.errors import UsageError

# What the points of a grid have otherwise than a run of its own: a quarter of the steps, one way of sampling;
# and what is chosen by a grid is chosen on development prompts.
DEFAULTS: dict[str, Any] = {
    "output": "runs/ablations",
    "evaluate_on": "development",
    "prompt_limit": 200,
    "initial_samples": 8,
    "explore_samples": 2,
    "rounds": 2,
    "steps": 16,
    "warmup_steps": 4,
    "eval_rows": "best",
}

# Settings that may be others when a grid goes on: no number depends on them, and each run has its own seed.
FREE = {"seed"} | {field.name for field in dataclasses.fields(Config) if field.metadata["changes"] == "grid"}


@dataclass(frozen=True)
class Point:
    """One run of the grid, at every seed.

    Attributes:
        value: what the axis has here, as the table names it.
        settings: the settings that differ from the base's; none at the base.
        against: likewise, of the point that it is compared with.
    """

    axis: str
    value: str
    settings: dict[str, Any]
    against: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return name_of(self.settings)


def name_of(settings: Mapping[str, Any]) -> str:
    return "_".join(f"{name}={value}" for name, value in settings.items()) or "base"


# --- the axes: (base) -> (value, settings) ----------------------------------------------------------

Values = Iterator[tuple[str, dict[str, Any]]]


def _kl(base: Config) -> Values:
    """beta at 0, 1/4, 1 and 4 times the base's; at the base's beta the other direction, and the estimate."""
    if not base.kl_coef:
        raise UsageError("the axis kl takes multiples of kl_coef, which is 0; give the base one by --kl-coef")
    for factor in (0.0, 0.25, 1.0, 4.0):
        yield f"beta {factor * base.kl_coef:g}", {"kl_coef": factor * base.kl_coef}
    for name in ("policy_ref", "ref_policy", "sampled"):
        if name != base.kl:
            yield name, {"kl": name}


def _quantiles(base: Config) -> Values:
    """K."""
    for quantiles in sorted({2, 5, 8, base.quantiles}):
        yield f"K {quantiles}", {"quantiles": quantiles}


def _exploration(base: Config) -> Values:
    """Rounds x steps, the total as in the base; one round never explores again."""
    total = base.rounds * base.steps
    for rounds in sorted({1, 2, 4, base.rounds}):
        if total % rounds:
            raise UsageError(
                f"the axis exploration cuts the {base.rounds} * {base.steps} = {total} steps into {rounds}"
                " rounds; give --rounds and --steps whose product divides by that"
            )
        yield f"{rounds} x {total // rounds}", {"rounds": rounds, "steps": total // rounds}


def _tokens(base: Config) -> Values:
    """The token that explores: the best one, guided and plain; one drawn at random for each prompt."""
    if base.rounds == 1:
        raise UsageError("the axis tokens is about exploring, but rounds = 1 never does; give --rounds 2")
    guidance = f", w {base.guidance:g}" if base.guidance != 1 else ""
    yield f"best{guidance}", {"explore_token": "best"}
    if base.guidance != 1:
        yield "best, w 1", {"explore_token": "best", "guidance": 1.0}
    yield f"random{guidance}", {"explore_token": "random"}


def _selection(base: Config) -> Values:
    """The quantiles trained on: extremes, all equally, the best alone; the last two without contrast, too.

    The contrast pulls the best and the worst token apart whichever samples it sees, so that the best alone
    means what it does in the paper only without it; then in the paper's loss, which all three have.
    """
    plain: dict[str, Any] = {"contrast_coef": 0.0, "kl_coef": 0.05} if base.contrast_coef else {}
    suffix = ", no contrast" if plain else ""
    if plain:
        for weights in ("extremes", "equal"):
            yield weights, {"quantile_weights": weights}
    for weights in ("extremes", "equal", "best"):
        yield weights + suffix, {**plain, "quantile_weights": weights}


def _contrast(base: Config) -> Values:
    """What the contrast compares a completion with, or with nothing; and other margins."""
    if not base.contrast_coef:
        raise UsageError("the axis contrast takes a base that has it, but contrast_coef = 0; give one")
    for other in ("both", "mirror", "base"):
        yield other, {"contrast_with": other}
    yield "none", {"contrast_coef": 0.0}
    for margin in sorted({1.0, 2 * base.contrast_margin} - {base.contrast_margin}):
        yield f"margin {margin:g}", {"contrast_margin": margin}


def _unlikelihood(base: Config) -> Values:
    """Quark with the unlikelihood of repeated n-grams, and each of the two alone.

    Without Quark there is one quantile, so one token stands before every sample, whatever its reward.
    """
    if not base.unlikelihood_coef or base.quantiles == 1:
        raise UsageError(
            f"the axis unlikelihood takes a base apart that has both, not unlikelihood_coef ="
            f" {base.unlikelihood_coef:g} with quantiles = {base.quantiles}; --task repetition has"
        )
    yield "Quark + unlikelihood", {}
    yield "Quark alone", {"unlikelihood_coef": 0.0}
    yield "unlikelihood alone", {"quantiles": 1, "contrast_coef": 0.0, "guidance": 1.0, "eval_guidance": ""}


AXES: dict[str, Callable[[Config], Values]] = {
    "kl": _kl,
    "quantiles": _quantiles,
    "exploration": _exploration,
    "tokens": _tokens,
    "selection": _selection,
    "contrast": _contrast,
    "unlikelihood": _unlikelihood,
}


def left_out(base: Config) -> dict[str, str]:
    """The axes that this base cannot have, and why."""
    found = {}
    for axis in AXES:
        try:
            points_of(base, [axis])
        except UsageError as error:
            found[axis] = str(error)
    return found


def points_of(base: Config, axes: Sequence[str]) -> list[Point]:
    """The points of the axes, in order; one that stands on several axes stands here once for each.

    Raises:
        UsageError: an unknown axis, or one that this base cannot have.
    """
    return _points(base, axes)[0]


def copies(base: Config, axes: Sequence[str]) -> list[str]:
    """A line for each point that is left out, since one before it on its axis trains as it would."""
    return _points(base, axes)[1]


_Effect = tuple[tuple[str, Any], ...]


def _points(base: Config, axes: Sequence[str]) -> tuple[list[Point], list[str]]:
    named: dict[_Effect, dict[str, Any]] = {_effect(base): {}}  # how the first point of an effect writes it
    found, copied = [], []
    for axis in axes:
        values: dict[_Effect, str] = {}  # of this axis
        for value, settings in _checked(base, axis):
            config = dataclasses.replace(base, **settings)
            if (effect := _effect(config)) in values:
                copied.append(f"{axis}, point {value!r}, which trains as {values[effect]!r} does")
                continue
            values[effect] = value
            own = named.setdefault(effect, settings)
            against: dict[str, Any] = {}
            if axis == "selection" and {"contrast_coef", "kl_coef"} & own.keys():
                equal = dataclasses.replace(config, quantile_weights="equal")
                changed = {k: v for k, v in settings.items() if k != "quantile_weights"}
                if base.quantile_weights != "equal":
                    changed["quantile_weights"] = "equal"
                against = named.get(_effect(equal), changed)
            found.append(Point(axis, value, own, against))
        if len(values) == 1:
            raise UsageError(f"all points of the axis {axis} train alike with quantiles = {base.quantiles}")
    return found, copied


def _checked(base: Config, axis: str) -> Values:
    """The points of an axis, each with the settings alone that differ from the base's."""
    if axis not in AXES:
        raise UsageError(f"grid = {axis!r}; choose from {', '.join(AXES)}")
    for value, settings in AXES[axis](base):
        differing = {name: v for name, v in settings.items() if v != getattr(base, name)}
        try:
            dataclasses.replace(base, **differing).check()
        except UsageError as error:
            raise UsageError(f"axis {axis}, point {value}: {error}") from error
        yield value, differing


def _effect(config: Config) -> _Effect:
    """The settings as they work: the same of two configs that train alike, however these are written."""
    worked = dataclasses.asdict(config)
    worked["quantile_weights"] = tuple(round(share, 12) for share in config.quantile_shares())
    if config.quantiles == 1:  # its token alone explores, with no other to guide it
        worked |= {"explore_token": "best", "guidance": 1.0}
    return tuple(worked.items())


def distinct_settings(points: Sequence[Point]) -> list[dict[str, Any]]:
    """The settings of each different point, the base first: it is what the others are compared with."""
    unique: dict[str, dict[str, Any]] = {name_of({}): {}}
    for point in points:
        unique.setdefault(point.name, point.settings)
    return list(unique.values())


def run_path(folder: Path, seed: int, settings: Mapping[str, Any]) -> Path:
    return folder / f"seed-{seed}" / name_of(settings)


def binding(base: Config) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(base).items() if name not in FREE}
