"""The task that a name stands for, and the reward of a run."""

from __future__ import annotations

import torch

from quark_fast.config import Config
from quark_fast.errors import UsageError
from quark_fast.rewards.by_name import calls, reward_by_name
from quark_fast.rewards.reward import Function, Reward, describe
from quark_fast.tasks import repetition, sentiment, toxicity
from quark_fast.tasks.task import Task


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


def find_task(name: str, target: str = "positive") -> Task:
    """The task of that name; ``target`` is the sentiment's."""
    tasks = {task.name: task for task in (toxicity.TASK, sentiment.task(target), repetition.TASK)}
    if name not in tasks:
        raise UsageError(f"unknown task {name!r}; choose from: {', '.join(tasks)}")
    return tasks[name]


def load_reward(spec: str, config: Config | None = None, device: torch.device | str = "cpu") -> Reward:
    """``reward_by_name`` with the tasks' own rewards."""
    config = config or Config()
    return reward_by_name(spec, config, device, lambda name: find_task(name, config.target).reward())
