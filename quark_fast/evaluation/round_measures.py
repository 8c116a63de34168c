"""By what the rounds of a run are compared: the measures that ``--keep-best`` may name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from quark_fast.config import Config
from quark_fast.errors import UsageError
from quark_fast.keep_best import Goal
from quark_fast.metrics import Interval, Sample, evaluate_samples, judge_measure
from quark_fast.rewards.reward import Reward
from quark_fast.tasks.task import Task


def measure_names(task: Task, reward: Reward, judges: Sequence[Reward]) -> dict[str, str]:
    """The word that a user types for a measure -> the metric of a table."""
    names = dict.fromkeys([reward.property or "reward", "reward"], "mean")
    for judge in judges:
        names["judge" if len(judges) == 1 else judge.name] = judge_measure(judge.name)
    return names | _of_table(task, of_property=reward.property is not None)


def _of_table(task: Task, of_property: bool) -> dict[str, str]:
    """The metrics that development prompts have, by their own names: those of any text, and the task's."""
    lacking = {"mean", "text_perplexity", "text_accuracy"}
    if not of_property:
        lacking |= {"share", "expected_max", "probability"}
    usual = ("perplexity", "prompt_fit", "dist3", "dist2")
    names = dict.fromkeys([*usual, *task.columns, *task.more_columns])
    # Development prompts have no classes.
    return {name: name for name in names if name not in lacking and not name.startswith("target_")}


def round_measures(
    samples: Sequence[Sample], names: Mapping[str, str], reward: Reward
) -> dict[str, Interval]:
    """Each of the ``names`` as ``measure_names`` has them; NaN where the samples have none."""
    found, unknown = evaluate_samples(samples), Interval(math.nan, math.nan, math.nan)
    measures = {name: found.get(metric, unknown) for name, metric in names.items()}
    if reward.property is not None and "reward" in names:  # the samples' scores are 1 - reward
        score = found["mean"]
        measures["reward"] = Interval(1 - score.value, 1 - score.high, 1 - score.low)
    return measures


def check_goal(config: Config, task: Task, reward: Reward, judges: Sequence[Reward]) -> None:
    """Raise UsageError for a measure of ``--keep-best`` that the run does not have, or has no bound by."""
    if goal := config.goal():
        _check_names(goal, measure_names(task, reward, judges), judged=bool(judges))
        _check_bounds(goal, config)


def check_goal_of_task(config: Config, task: Task) -> None:
    """The same of a run by its task's own reward and judge, before these are loaded."""
    if goal := config.goal():
        judge = ["judge"] if task.judge and config.judge == "auto" else []
        known = [task.property, "reward", *judge, *_of_table(task, of_property=True)]
        _check_names(goal, known, judged=bool(judge))
        _check_bounds(goal, config)


def _check_bounds(goal: Goal, config: Config) -> None:
    """Refuse a bound relative to a KL of the base model to itself, which only a nucleus makes more than 0."""
    whole = config.eval_top_p == 1 and config.eval_temperature == 1
    for bound in goal.bounds:
        if bound.measure == "base_kl" and whole:
            raise UsageError(
                f"keep_best = {str(goal)!r}: {bound} is relative to the base model's base_kl, which is 0 with"
                " eval_top_p = 1; bound perplexity, or give an --eval-top-p below 1"
            )


def _check_names(goal: Goal, known: Iterable[str], judged: bool) -> None:
    try:
        goal.check_names(known)
    except UsageError as error:
        if judged or "judge" not in goal.names:
            raise
        raise UsageError(f"{error}; for the measure 'judge', name a judge by --judge") from None
