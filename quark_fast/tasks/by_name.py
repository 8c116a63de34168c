"""Which reward a run has: by name, as a weighted sum, with a cache of what was scored before."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import itertools
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from quark_fast.config import Config
from quark_fast.errors import UsageError
from quark_fast.rewards.asynchronous import Calls
from quark_fast.rewards.cache import RewardCache
from quark_fast.rewards.identity import NO_SOURCE
from quark_fast.rewards.reward import Function, Reward, describe
from quark_fast.tasks import repetition, sentiment, toxicity
from quark_fast.tasks.task import Task

FORMS = (
    "a task's name, package.module:function, hf:NAME for a classifier, a sum such as 0.7*toxicity +"
    " 0.3*package.module:function, or 1 - NAME for what the reward is to lower"
)


def choose_reward(
    config: Config, task: Task, device: torch.device | str, given: Function | Reward | None = None
) -> Reward:
    """The reward given, else the one that ``config`` names, else the task's own."""
    if isinstance(given, Reward):
        return given
    if given is not None:
        return describe(given, calls=calls(config))
    if config.reward:
        return load_reward(config.reward, config, device)
    if config.scorer_label is not None:
        raise UsageError(f"scorer_label = {config.scorer_label!r}, but reward names no classifier (hf:NAME)")
    return task.reward()


def calls(config: Config) -> Calls:
    """How asynchronous rewards are called."""
    return Calls(
        config.reward_batch,
        config.reward_concurrency,
        config.reward_timeout,
        config.reward_retries,
        config.reward_backoff,
    )


def load_reward(spec: str, config: Config | None = None, device: torch.device | str = "cpu") -> Reward:
    """The reward that a text names. One of a module runs the module's code.

        spec := "1 - " name | term (" + " term)*
        term := [weight "*"] name
        name := task | package.module:function | hf:FOLDER_OR_HUB_NAME

    A sum is of the plain values, each times its weight (1 unless given, may be negative); a sample that any
    part leaves out is left out. ``1 - name`` makes what ``name`` measures the property of the tables.

    Args:
        config: its ``scorer_*`` and ``reward_*`` settings; default: their defaults.
        device: where a classifier runs.
    """
    config = config or Config()
    offset, terms = _parse(spec)
    labels = _labels(spec, [name for _, name in terms], config.scorer_label)
    parts: list[tuple[float, Reward]] = []
    for (weight, name), label in zip(terms, labels, strict=True):
        if name.startswith("hf:"):
            part = _classifier(name, config, device, label)
        elif ":" in name:
            part = _function(name, config)
        else:
            part = _of_task(spec, name, config)
        parts.append((weight, part))
    return parts[0][1] if offset == 0 and len(parts) == 1 and parts[0][0] == 1 else _sum(parts, offset)


def refuse_code_of(folder: Path, spec: str | None) -> None:
    """Refuse a reward whose module lies in the run folder that names it.

    A run folder may be anyone's, and its settings name the reward to go on with, or to evaluate by. They may
    name what is installed here, or lies beside the folder, but bring no code along to be run.
    """
    for _, name in _parse(spec)[1] if spec is not None else []:
        module = name.partition(":")[0]
        if ":" in name and not name.startswith("hf:"):
            paths = [Path(entry, *module.split(".")).resolve() for entry in sys.path]
            if any(path.is_relative_to(folder.resolve()) for path in paths):
                raise UsageError(
                    f"reward {name!r} is code in {folder}, the run folder that names it, and is not run; if"
                    " you trust it, move it out of there and name it by --reward package.module:function"
                )


def _parse(spec: str) -> tuple[float, list[tuple[float, str]]]:
    """(offset, (weight, name) of each term); 1 - NAME is the offset 1 and NAME with the weight -1."""
    if complement := re.fullmatch(r"1\s*-\s+(\S.*)", spec):
        return 1.0, [(-1.0, complement[1].strip())]
    return 0.0, [_term(spec, text.strip()) for text in re.split(r"\s\+\s", spec)]


def _term(spec: str, text: str) -> tuple[float, str]:
    """(weight, name) of one term."""
    before, star, after = text.partition("*")
    name = (after if star else before).strip()
    try:
        weight = float(before) if star else 1.0
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight) or not name:
        raise UsageError(f"reward {spec!r}: {text!r} is no weight*name; give {FORMS}")
    return weight, name


def _labels(spec: str, names: Sequence[str], given: str | None) -> list[str | None]:
    """The label of each name that is a classifier's: the one given for all, or the next of several."""
    if given is None:
        return [None] * len(names)
    count = sum(name.startswith("hf:") for name in names)
    labels = [label.strip() for label in given.split(",")]
    if not count or len(labels) not in (1, count):
        raise UsageError(
            f"scorer_label = {given!r} names {len(labels)} labels, but reward {spec!r} has {count}"
            " classifiers (hf:NAME); give one label for all or one for each, with commas between"
        )
    left = itertools.cycle(labels)
    return [next(left) if name.startswith("hf:") else None for name in names]


def _classifier(name: str, config: Config, device: torch.device | str, label: str | None) -> Reward:
    from quark_fast.rewards.classifier import SequenceClassifier

    model = SequenceClassifier(
        name.removeprefix("hf:"),
        label,
        config.scorer_reads,
        device,
        trust_remote_code=config.trust_remote_code,
    )
    # The words are part of what identifies the scores: a long text's were other ones when its end was cut.
    reads = model.reads if model.reads == "completion" else f"{model.reads}, its front cut"
    return Reward(model, name, f"label {model.label}, reads {reads}", model.sha256)


def _function(name: str, config: Config) -> Reward:
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise UsageError(f"reward {name!r}: write it as package.module:function")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a script without a main guard may exit
        raise UsageError(
            f"reward {name!r}: importing {module_name} failed, {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UsageError(f"reward {name!r}: {module_name} has no function {attribute!r}")
    return describe(function, name, calls(config))


def _of_task(spec: str, name: str, config: Config) -> Reward:
    try:
        return find_task(name, config.target).reward()
    except UsageError as error:
        raise UsageError(f"reward {spec!r}: {error}; or give {FORMS}") from error


# --------------------------------------------------------------------- sums


@dataclass(frozen=True)
class WeightedSum:
    """offset + sum of weight times reward; NaN, which leaves a sample out, where any part is."""

    parts: Sequence[tuple[float, Reward]]
    offset: float = 0.0

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], **columns: Any
    ) -> npt.NDArray[np.float64]:
        rows = [
            {"prompt": prompt, **{name: values[i] for name, values in columns.items()}}
            for i, prompt in enumerate(prompts)
        ]
        total = np.full(len(rows), self.offset)
        for weight, part in self.parts:
            total += weight * part(rows, completions)
        return total


def _sum(parts: Sequence[tuple[float, Reward]], offset: float) -> Reward:
    names = [part.name if weight == 1 else f"{weight:g}*{part.name}" for weight, part in parts]
    name = f"1 - {parts[0][1].name}" if offset else " + ".join(names)
    version = "; ".join(part.version for _, part in parts)
    content = repr([offset, *((weight, part.name, part.version, part.sha256) for weight, part in parts)])
    sha256 = hashlib.sha256(content.encode()).hexdigest()
    measures = _measured(parts[0][1]) if offset else None
    return Reward(WeightedSum(tuple(parts), offset), name, version, sha256, measures)


def _measured(part: Reward) -> str:
    """What the tables call the values of a reward of which less is better."""
    label = getattr(part.function, "label", None)  # a classifier's
    return str(label).lower() if label else part.name.rpartition(":")[2]


# --------------------------------------------------------------------- the cache


def cached(reward: Reward, mode: Literal["auto", "on", "off"], path: Path) -> Reward:
    """The reward with a cache in the file ``path``: "auto" for those that are called in many calls a batch.

    Asynchronous rewards and those of one completion at a time are slow or paid for, and a batch of them is
    not to be lost by a kill in the middle of it.

    A sum's parts are cached each by itself. A key holds the hash of the scorer, prompt, completion and
    columns; the hash of a function is that of the file it stands in, not of what that imports.

    Raises:
        UsageError: mode "on" for a function without source, whose versions no key could tell apart.
    """
    if mode == "off":
        return reward
    if isinstance(reward.function, WeightedSum):
        parts = [(weight, cached(part, mode, path)) for weight, part in reward.function.parts]
        return dataclasses.replace(reward, function=dataclasses.replace(reward.function, parts=parts))
    if reward.sha256 == NO_SOURCE:
        if mode == "on":
            raise UsageError(
                f"reward_cache = on, but reward {reward.name} has no source to tell its versions apart by;"
                " give reward_cache off"
            )
        return reward
    wanted = mode == "on" or reward.asynchronous or reward.one_at_a_time
    return dataclasses.replace(reward, cache=RewardCache(path)) if wanted else reward


def find_task(name: str, target: str = "positive") -> Task:
    """The task of that name; ``target`` is the sentiment's."""
    tasks = {task.name: task for task in (toxicity.TASK, sentiment.task(target), repetition.TASK)}
    if name not in tasks:
        raise UsageError(f"unknown task {name!r}; choose from: {', '.join(tasks)}")
    return tasks[name]
