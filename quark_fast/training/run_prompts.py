"""The prompts of a run: chosen, rendered, encoded."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from quark_fast.config import Config
from quark_fast.data import assets
from quark_fast.data.chat import chat_template
from quark_fast.data.row import Row, as_rendered, from_file, is_chat
from quark_fast.data.split import choose_prompts
from quark_fast.evaluation.held_out import HeldOut
from quark_fast.model.encode import encode_rows
from quark_fast.model.loading import load_tokenizer
from quark_fast.model.policy import Policy
from quark_fast.runtime.run_folder import PROMPTS, RunFolder
from quark_fast.tasks.task import Task


@dataclass
class RunPrompts:
    """What a run trains and is measured on.

    Attributes:
        train, train_ids: rows of the training prompts, and their token ids without prefix.
        held_out_rows, held_out: rows of the evaluation's prompts as they were given, and as it uses them.
        chats: every row that was rendered from messages, also those that are left out: another day's
            rendering might fit.
        about: what was left out, and why, in words.
    """

    train: list[Row]
    train_ids: list[list[int]]
    held_out_rows: list[Row]
    held_out: HeldOut
    chats: list[Row]
    about: list[str]


@dataclass(frozen=True)
class Given:
    """Prompts that a program gives in place of those that the settings name."""

    train: Sequence[str | Row] | None = None
    held_out: Sequence[str | Row] | None = None


def load_run_prompts(
    config: Config, task: Task, folder: RunFolder, given: Given, own_reward: bool
) -> Callable[[Policy], RunPrompts]:
    """Read the prompts; they are encoded once there is a policy.

    Args:
        own_reward: the reward is not the task's, so a note says whose prompts these are.
    Raises:
        UsageError: a source cannot be read, or leaves nothing to train on or to measure.
    """
    source = config.model or assets.default_model()
    chat = chat_template(
        config.model or "the embedded model", lambda: load_tokenizer(source, config.trust_remote_code)
    )
    chosen = choose_prompts(config, task.prompts, chat, given.train, given.held_out)
    # A resumed run goes on with what its chats were rendered as.
    before = list(map(from_file, folder.rows_of(PROMPTS))) if config.resume else []
    train, held_out = (as_rendered(rows, before) for rows in (chosen.train, chosen.held_out))
    about = list(chosen.about)
    if own_reward and given.train is None and config.prompts is None:
        about.append(f"no --prompts, so those of the task {task.name}")
    return functools.partial(_encode, config, train, held_out, about)


def _encode(
    config: Config, train: list[Row], held_out: list[Row], about: list[str], policy: Policy
) -> RunPrompts:
    """The prompts as ids; those that are too long, or too short, are left out and counted."""
    encode = functools.partial(
        encode_rows,
        policy,
        max_tokens=policy.room_of(config),
        prefix_tokens=config.prefix_tokens,
        cut=config.long_prompts == "cut",
        log=about.append,
    )
    chats = [row for row in [*train, *held_out] if is_chat(row)]
    what = "texts" if config.prefix_tokens else "prompts"
    train, train_ids, _ = encode(train, what=f"training {what}")
    rows, ids, texts = encode(held_out, what=f"held-out {what}")
    policy.check_fits([*train_ids, *ids], config.max_new_tokens)
    return RunPrompts(
        train=train,
        train_ids=train_ids,
        held_out_rows=held_out if config.prefix_tokens else rows,
        held_out=HeldOut(rows, ids, config.eval_samples, texts),
        chats=chats,
        about=about,
    )
