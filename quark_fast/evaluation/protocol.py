"""What all rows of a table share: the task, its settings, the scorer, and what the models compute in."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from quark_fast.config import Config
from quark_fast.errors import UsageError
from quark_fast.evaluation.subjects import Model, Run, agree
from quark_fast.rewards.reward import Function, Reward
from quark_fast.runtime.machine import sampling_dtype
from quark_fast.runtime.run_folder import REWARDS
from quark_fast.tasks.by_name import cached, choose_reward, find_task, refuse_code_of
from quark_fast.tasks.task import Task


@dataclass(frozen=True)
class EvaluationProtocol:
    """How everything is evaluated.

    Attributes:
        config: the first run's settings or the task's own, with those that were asked for in their place.
        own_task: the task is the runs' own.
    """

    config: Config
    task: Task
    reward: Reward
    device: torch.device
    dtype: torch.dtype
    own_task: bool


def choose_protocol(
    models: Sequence[Model],
    asked: Mapping[str, Any],
    reward: str | Function | Reward | None,
    device: torch.device,
    trust_remote_code: bool,
) -> EvaluationProtocol:
    """What was asked for, and what was not as the runs have it, who must agree.

    Args:
        asked: settings by name; None: as the first run or the task has it.
        reward: in any form of training, or a callable; None: the task's, or the runs' own without any task.
    Raises:
        UsageError: something is missing, or the runs do not agree.
    """
    runs = [model for model in models if isinstance(model, Run)]
    settings = {name: value for name, value in asked.items() if value is not None}
    label = settings.pop("scorer_label", None)
    own_reward = reward is None and not settings.keys() & {"task", "target"}
    settings["task"] = settings.get("task") or _common_task(models, runs)
    if reward is None and label is not None:
        raise UsageError("--scorer-label names a label of --reward hf:NAME; give both")
    if own_reward:
        _check_rewards_agree(runs)
    else:
        settings |= {"reward": reward if isinstance(reward, str) else None, "scorer_label": label}
    first = runs[0].config if runs else None
    own_task = all(getattr(first, n, None) == settings[n] for n in ("task", "target") if n in settings)
    if first is None:
        config = Config(**settings)
    elif own_task:
        config = dataclasses.replace(first, **settings)
    else:
        config = Config(**settings)
        config.precision = first.precision
    config.trust_remote_code = trust_remote_code
    config.check()
    task = find_task(config.task, config.target)
    dtype = sampling_dtype(config.precision, device)
    scorer = choose_reward(config, task, device, None if isinstance(reward, str) else reward)
    for run in runs if own_reward else ():
        if (trained_by := run.scorer()) != scorer.name:
            raise UsageError(
                f"the run's reward was {trained_by}, a function of its program: hand it over as reward=,"
                " or name one by --reward"
            )
    if runs:
        scorer = cached(scorer, config.reward_cache, runs[0].folder / REWARDS)
    return EvaluationProtocol(config, task, scorer, device, dtype, own_task)


def _common_task(models: Sequence[Model], runs: Sequence[Run]) -> str:
    """The task that all runs have."""

    def in_words(config: Config) -> str:
        return f"{config.task} to {config.target}" if config.task == "sentiment" else config.task

    if not runs:
        names = ", ".join(model.given for model in models)
        raise UsageError(f"{names}: no run folder here, so a model; name what to measure by --task")
    agree(runs, "unlearned", in_words, "name what to measure by --task")
    return runs[0].config.task


def _check_rewards_agree(runs: Sequence[Run]) -> None:
    """Raise UsageError unless all runs have one reward, none of whose code lies in a run folder."""

    def in_words(config: Config) -> str:
        return f"{config.reward or 'its task'}{f' ({config.scorer_label})' if config.scorer_label else ''}"

    agree(runs, "was rewarded by", in_words, "name one scorer for all by --reward or --task")
    for run in runs:
        refuse_code_of(run.folder, run.config.reward)
