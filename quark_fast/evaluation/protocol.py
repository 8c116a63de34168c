"""What all rows of a table share: the task, its settings, the scorer and the prompts."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from quark_fast.config import Config
from quark_fast.data.chat import ChatTemplateError, chat_template
from quark_fast.data.prompts import load_prompts
from quark_fast.data.row import Prompt, Row, given, is_chat, with_same_columns
from quark_fast.data.split import program_rows
from quark_fast.errors import UsageError
from quark_fast.evaluation.held_out import EncodedPrompts
from quark_fast.evaluation.open_run import held_out_rows
from quark_fast.evaluation.prompt_classes import check_classes
from quark_fast.evaluation.saved_tables import OUT_OF_DOMAIN
from quark_fast.evaluation.subjects import Model, Named, Run, agree
from quark_fast.model.loading import load_tokenizer
from quark_fast.model.policy import Policy
from quark_fast.rewards.by_name import refuse_code_of
from quark_fast.rewards.reward import Reward
from quark_fast.rewards.weighted_sum import cached, terms
from quark_fast.runtime.machine import sampling_dtype
from quark_fast.runtime.run_folder import HELD_OUT, REWARDS
from quark_fast.tasks.by_name import GivenReward, choose_judges, choose_reward, find_task
from quark_fast.tasks.task import Task


@dataclass(frozen=True)
class EvaluationProtocol:
    """How everything is evaluated.

    Attributes:
        config: the first run's settings or the task's own, with those that were asked for in their place.
        texts: ordinary ones, of a task whose own reward scores.
        keeps_runs_task: the task is the runs' own.
        task_named: it was asked for, or is the runs'; else a reward alone measures plain models, and the task
            is the one whose settings such a reward has in training.
    """

    config: Config
    task: Task
    reward: Reward
    judges: tuple[Reward, ...]
    texts: Sequence[str]
    device: torch.device
    dtype: torch.dtype
    keeps_runs_task: bool
    task_named: bool


def choose_protocol(
    models: Sequence[Model],
    asked: Mapping[str, Any],
    reward: str | GivenReward | None,
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
    keeps_runs_reward = reward is None and not settings.keys() & {"task", "target"}
    task_named = bool(runs or settings.get("task"))
    settings["task"] = settings.get("task") or _common_task(models, runs, reward)
    if "target" in settings and settings["task"] != "sentiment":
        raise UsageError(
            f"target = {settings['target']!r} is of the task sentiment, but the task is {settings['task']};"
            " leave it out, or name that task"
        )
    if reward is None and label is not None:
        raise UsageError("--scorer-label names a label of --reward hf:NAME; give both")
    for run in runs if "judge" not in settings else ():
        for spec in run.config.judge.split(","):
            refuse_code_of(run.folder, spec)
    if keeps_runs_reward:
        _check_rewards_agree(runs)
    else:
        settings |= {"reward": reward if isinstance(reward, str) else None, "scorer_label": label}
    keeps_runs_task = bool(runs) and all(
        settings[name] == getattr(runs[0].config, name) for name in ("task", "target") if name in settings
    )
    config = dataclasses.replace(runs[0].config, **settings) if keeps_runs_task else Config(**settings)
    if runs:
        config.precision = runs[0].config.precision
    config.trust_remote_code = trust_remote_code
    config.check()
    task = find_task(config.task, config.target)
    dtype = sampling_dtype(config.precision, device)
    scorer = choose_reward(config, task, device, None if isinstance(reward, str) else reward)
    rewarded_by_task = config.reward in (None, task.name) and (reward is None or isinstance(reward, str))
    judges = choose_judges(config, task, device, [term.identity for term in terms(scorer)], rewarded_by_task)
    for run in runs if keeps_runs_reward else ():
        if (trained_by := run.scorer()) != scorer.name:
            raise UsageError(
                f"the run's reward was {trained_by}, a function of its program: hand it over as reward=,"
                " or name one by --reward"
            )
    if runs and os.access(runs[0].folder, os.W_OK):  # others may read a run alone
        scorer = cached(scorer, config.reward_cache, runs[0].folder / REWARDS)
        judges = tuple(cached(judge, config.reward_cache, runs[0].folder / REWARDS) for judge in judges)
    texts = task.texts() if rewarded_by_task else []
    return EvaluationProtocol(config, task, scorer, judges, texts, device, dtype, keeps_runs_task, task_named)


def _common_task(models: Sequence[Model], runs: Sequence[Run], reward: str | GivenReward | None) -> str:
    """The task that all runs have; without any, that of a reward alone."""

    def in_words(config: Config) -> str:
        return f"{config.task} to {config.target}" if config.task == "sentiment" else config.task

    if not runs and reward is not None:
        return Config().task
    if not runs:
        raise UsageError(f"{_named(models)}; name what to measure by --task, or by --reward with --prompts")
    agree(runs, "unlearned", in_words, "name what to measure by --task")
    return runs[0].config.task


def _named(models: Sequence[Model]) -> str:
    """What is said of models among which is no run, one of which may be a run's name with a slip in it."""
    return f"{', '.join(model.given for model in models)}: no run folder here, so a model"


def _check_rewards_agree(runs: Sequence[Run]) -> None:
    """Raise UsageError unless all runs have one reward, none of whose code lies in a run folder."""

    def in_words(config: Config) -> str:
        how = [config.scorer_label] if config.scorer_label else []
        how += [f"reads {config.scorer_reads}"] if config.scorer_reads != "completion" else []
        return (config.reward or "its task, or its program") + (f" ({', '.join(how)})" if how else "")

    agree(runs, "was rewarded by", in_words, "name one scorer for all by --reward or --task")
    for run in runs:
        refuse_code_of(run.folder, run.config.reward)


# --------------------------------------------------------------------- prompts


@dataclass
class PromptSet:
    """The prompts of one table.

    Attributes:
        key: "" or OUT_OF_DOMAIN.
        split: which of a run's or the task's prompts these are; None: neither.
        classified: as of ``EncodedPrompts``.
        held_out: each model's ids of them, by the model's short name.
    """

    key: str
    source: str
    rows: list[Row]
    split: str | None = None
    classified: bool = False
    held_out: dict[str, EncodedPrompts] = field(default_factory=dict)

    def stage(self, name: str) -> str:
        """What a stage of the evaluation on these prompts is called."""
        return f"{name}, out of domain" if self.key else name

    def encode(self, label: str, policy: Policy, config: Config, remark: Callable[[str], None]) -> None:
        """Have a model read the prompts."""
        what = f"texts of {self.source}"
        held_out = EncodedPrompts.encoded(policy, self.rows, config, what=what, log=remark)
        policy.check_fits(held_out.ids, config.max_new_tokens)
        self.held_out[label] = dataclasses.replace(held_out, classified=self.classified)

    def keep_what_fits_all(self, remark: Callable[[str], None]) -> None:
        """Leave out prompts that are too long for one of the models: all rows have the same ones."""
        fitting = [{given(row) for row in held.rows} for held in self.held_out.values()]
        common = set.intersection(*fitting)
        if not common:
            raise UsageError(f"no text of {self.source} is short enough for all of the models")
        if left_out := max(map(len, fitting)) - len(common):
            remark(f"{left_out:,} texts of {self.source} left out: too long for one of the models")
        for label, held in self.held_out.items():
            kept = [i for i, row in enumerate(held.rows) if given(row) in common]
            rows, ids = [held.rows[i] for i in kept], [held.ids[i] for i in kept]
            self.held_out[label] = dataclasses.replace(held, rows=rows, ids=ids)

    def set_classes(self, rows: Sequence[Row]) -> None:
        """Give all models' prompts the rows that have classes."""
        self.held_out = {label: one.with_classes(rows) for label, one in self.held_out.items()}


def chats_as_written(rows: Sequence[Row], model: str, tokenizer: Any) -> list[str] | None:
    """What a model's own chat template writes today for the rows' messages; None: it has no template.

    A template that refuses some, as far as it came.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    chat, written = chat_template(model, lambda: tokenizer), list[str]()
    with contextlib.suppress(ChatTemplateError):
        for row in filter(is_chat, rows):
            written.append(chat(row["messages"]))
    return written


def check_chats(chats: Mapping[str, list[str] | None]) -> None:
    """Refuse models whose own templates write the prompts in different ways: all of them read the same text.

    A model without a template has no other form for them.
    """
    own = [(label, written) for label, written in chats.items() if written is not None]
    for label, written in own:
        if written != own[0][1]:
            raise UsageError(
                f"{own[0][0]} and {label} have different chat templates, which write messages differently:"
                " give prompts that are texts"
            )


def load_prompt_sets(
    models: Sequence[Model],
    protocol: EvaluationProtocol,
    prompts: tuple[Named | Sequence[Prompt] | None, str | None],
    out_of_domain: tuple[Named | Sequence[Prompt] | None, str | None],
    remark: Callable[[str], None],
) -> list[PromptSet]:
    """One set of prompts for each table; the first model's chat template renders messages.

    Args:
        prompts, out_of_domain: (file, data set or a program's rows, their column).
    """
    both = (prompts, out_of_domain)
    used = {column for source, column in both if source is not None}
    if unused := {column for _, column in both if column} - used:
        raise UsageError(
            f"the column {min(unused)!r} is of no file: prompt_column needs prompts or out_of_domain, and"
            " out_of_domain_column the latter; give the file, too"
        )
    trust = protocol.config.trust_remote_code
    chat = chat_template(models[0].given, lambda: load_tokenizer(models[0].tokenizer_at, trust))
    run = next((model for model in models if isinstance(model, Run) and protocol.keeps_runs_task), None)

    def load(key: str, source: Any, column: str | None) -> PromptSet:
        if isinstance(source, str | os.PathLike):
            source = os.fspath(source)
            loaded = load_prompts(source, column=column, chat=chat)
            remark(f"{source}: {loaded.counts}")
            rows = loaded.rows
        else:
            rows, source = program_rows(key or "prompts", source, chat, column), "the program's own"
        (rows,) = with_same_columns(rows)
        if protocol.task.prompt_classes:
            check_classes(rows)
        return PromptSet(key, source, rows)

    source, column = prompts
    if source is not None:
        own = load("", source, run.config.prompt_column if run and column is None else column)
    elif run:
        rows, split = held_out_rows(run.folder), run.config.evaluate_on
        own = PromptSet("", str(run.folder / HELD_OUT), rows, split, protocol.task.prompt_classes)
    elif not protocol.task_named:
        raise UsageError(
            f"{_named(models)}; name the prompts for the reward {protocol.reward.name} by --prompts, or a"
            " task, which has some, by --task"
        )
    else:
        source = f"the task's own ({protocol.task.name})"
        own = PromptSet("", source, protocol.task.prompts()[1], "test")
    source, column = out_of_domain
    return [own] if source is None else [own, load(OUT_OF_DOMAIN, source, column)]
