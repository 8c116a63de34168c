"""The task that a name stands for, and the reward of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from quark_fast.config import Config
from quark_fast.data.assets import AssetError
from quark_fast.errors import UsageError
from quark_fast.rewards.by_name import described, labels_of, reward_by_name
from quark_fast.rewards.reward import NO_REWARD, Function, Reward
from quark_fast.rewards.weighted_sum import terms, weighted_sum
from quark_fast.tasks import repetition, sentiment, toxicity
from quark_fast.tasks.task import Task

GivenReward = Function | Reward | Sequence[str | Function | Reward]
"""What a program may hand over as its reward; several of them stand for their sum."""


def choose_reward(
    config: Config, task: Task, device: torch.device | str, given: GivenReward | None = None
) -> Reward:
    """The reward given, else the one that ``config`` names, else the task's own.

    Raises:
        UsageError: a list without any, or what is no reward.
    """
    if isinstance(given, list | tuple):
        return _sum_of(given, config, device)
    if given is not None:
        return described(given, config)
    if config.reward == NO_REWARD.name:
        return NO_REWARD
    if config.reward:
        return load_reward(config.reward, config, device)
    if config.scorer_label is not None:
        raise UsageError(f"scorer_label = {config.scorer_label!r}, but reward names no classifier (hf:NAME)")
    return task.reward()


def _sum_of(given: Sequence[str | Function | Reward], config: Config, device: torch.device | str) -> Reward:
    if not given:
        raise UsageError("reward is an empty list; give one function or more, which are added up")
    names = [one for one in given if isinstance(one, str)]
    labels = iter(labels_of(names, config.scorer_label) if names else [])
    parts: list[Reward] = [
        load_reward(one, dataclasses.replace(config, scorer_label=next(labels)), device)
        if isinstance(one, str)
        else described(one, config)
        for one in given
    ]
    seen: dict[tuple[str, ...], Any] = {}
    for i, (one, part) in enumerate(zip(given, parts, strict=True)):
        if seen.setdefault((*part.identity, part.held), one) is not one:
            # Two objects of which nothing tells one from the other: their answers may differ.
            parts[i] = dataclasses.replace(part, held=f"{part.held} {i}")
    return parts[0] if len(parts) == 1 else weighted_sum([(1.0, part) for part in parts], 0.0)


def choose_judges(
    config: Config,
    task: Task,
    device: torch.device | str,
    trained_by: Iterable[Sequence[str]],
    rewarded_by_task: bool,
) -> tuple[Reward, ...]:
    """The scorers that judge what the reward has trained.

    Args:
        trained_by: identities of the reward that trains, or of its terms, which cannot judge themselves.
        rewarded_by_task: whether that is the task's own; else the task's judge is for those who name it.
    """
    names = [name.strip() for name in config.judge.split(",") if name.strip()]
    if names == ["auto"]:
        if task.judge is None or not rewarded_by_task:
            return ()
        try:
            return (task.judge(config.score_batch),)
        except AssetError as error:
            raise UsageError(f"{error}; --judge none leaves out the judge, which needs it") from error
    if names == ["none"]:
        return ()
    # --scorer-label is the reward's; a judge names its own, hf:NAME:LABEL.
    own = dataclasses.replace(config, scorer_label=None)
    judges = tuple(load_reward(name, own, device) for name in names)
    trained = {_told_apart_by(identity) for identity in trained_by}
    for name, one in zip(names, judges, strict=True):
        if any(_told_apart_by(term.identity) in trained for term in terms(one)):
            raise UsageError(
                f"judge = {config.judge!r}: {name} is the reward itself, or a term of it; name another"
            )
    if len({one.name for one in judges}) < len(judges) or not judges:
        raise UsageError(f"judge = {config.judge!r}; name each scorer once, or give auto or none")
    return judges


def _told_apart_by(identity: Sequence[str]) -> tuple[str, ...]:
    """What of an identity names a scorer: of a classifier label and weights, however its name is spelled."""
    name, version, sha256 = identity
    return (name, version, sha256) if version == "source" else (version, sha256)


def find_task(name: str, target: str = "positive") -> Task:
    """The task of that name; ``target`` is the sentiment's."""
    tasks = {task.name: task for task in (toxicity.TASK, sentiment.task(target), repetition.TASK)}
    if name not in tasks:
        raise UsageError(f"unknown task {name!r}; choose from: {', '.join(tasks)}")
    return tasks[name]


def load_reward(spec: str, config: Config | None = None, device: torch.device | str = "cpu") -> Reward:
    """``reward_by_name`` with the tasks' own rewards, and their judges under the name TASK-judge."""
    config = config or Config()

    def of_task(name: str) -> Reward:
        task = find_task(name.removesuffix("-judge"), config.target)
        if not name.endswith("-judge"):
            return task.reward()
        if task.judge is None:
            raise UsageError(f"the task {task.name} has no judge")
        return task.judge(config.score_batch)

    return reward_by_name(spec, config, device, of_task)
