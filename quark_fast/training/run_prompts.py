"""The prompts of a run: chosen, rendered, encoded."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from quark_fast.config import Config
from quark_fast.data import assets
from quark_fast.data.chat import chat_template
from quark_fast.data.row import Prompt, Row, as_rendered, from_file, is_chat, with_same_columns
from quark_fast.data.split import Chosen, choose_prompts, columns_digest
from quark_fast.evaluation.held_out import EncodedPrompts
from quark_fast.evaluation.prompt_classes import check_classes
from quark_fast.model.loading import load_tokenizer
from quark_fast.model.policy import Policy
from quark_fast.runtime.run_folder import PROMPTS, RunFolder
from quark_fast.tasks.task import Task
from quark_fast.training.scored import Scored, encode_scored

DEVELOPMENT_SAMPLES = 2  # completions of a development prompt, of each round


@dataclass
class RunPrompts:
    """What a run trains and is measured on.

    Attributes:
        train, train_ids: rows of the training prompts, and their token ids without prefix.
        columns: ``columns_digest`` of these rows, as they were before a reward saw them.
        held_out_rows, held_out: rows of the evaluation's prompts as they were given, and as it uses them.
        chats: every row that was rendered from messages, also those that are left out: a template may write
            the date, so that a resumed run would render them differently.
        notes: what was left out, and why, in words.
        scored: completions of training prompts that were scored before; reward NaN: not yet.
        development: what rounds are compared on; None: they are not.
    """

    train: list[Row]
    train_ids: list[list[int]]
    columns: str
    held_out_rows: list[Row]
    held_out: EncodedPrompts
    chats: list[Row]
    notes: list[str]
    scored: list[Scored]
    development: EncodedPrompts | None = None

    def longest(self, new_tokens: int) -> int:
        """The most tokens of a prompt with a completion, of ``new_tokens`` if it is sampled."""
        development = self.development.ids if self.development else ()
        sampled = max(map(len, [*self.train_ids, *self.held_out.ids, *development])) + new_tokens
        return max([sampled, *(len(self.train_ids[one.prompt]) + len(one.ids) for one in self.scored)])


@dataclass(frozen=True)
class Given:
    """Prompts that a program gives in place of those that the settings name."""

    train: Sequence[Prompt] | None = None
    held_out: Sequence[Prompt] | None = None


def read_prompts(
    config: Config, task: Task, folder: RunFolder, given: Given, rewarded_by_task: bool
) -> Chosen:
    """The rows to train on and to hold out, as texts.

    Args:
        rewarded_by_task: whether the reward is the task's; else a note says whose prompts these are.
    Raises:
        UsageError: a source cannot be read, or leaves nothing to train on or to measure.
    """
    source = config.model or assets.default_model()
    chat = chat_template(
        config.model or "the embedded model", lambda: load_tokenizer(source, config.trust_remote_code)
    )
    chosen = choose_prompts(config, task.prompts, chat, given.train, given.held_out)
    # A resumed run goes on with what its chats were rendered as, and so does one from another.
    runs = [folder] * config.resume + [RunFolder(run) for run in [config.from_run] if run]
    before = [from_file(row) for run in runs for row in run.rows_of(PROMPTS)]
    if not rewarded_by_task and given.train is None and config.prompts is None and config.scored is None:
        chosen.notes.append(f"no --prompts, so those of the task {task.name}")
    parts = (chosen.train, chosen.held_out, chosen.development)
    if task.prompt_classes:
        check_classes([*chosen.train, *chosen.held_out, *(one.row for one in chosen.scored)])
    train, held_out, development, scored = with_same_columns(
        *(as_rendered(rows, before) for rows in parts), [one.row for one in chosen.scored]
    )
    return dataclasses.replace(
        chosen,
        train=train,
        held_out=held_out,
        development=development,
        scored=[dataclasses.replace(one, row=row) for one, row in zip(chosen.scored, scored, strict=True)],
    )


# How prompts that are too long get room.
ROOM = "give shorter ones, lower max_new_tokens, raise max_prompt_tokens, or give --long-prompts cut"


def encode_prompts(config: Config, policy: Policy, chosen: Chosen) -> RunPrompts:
    """The prompts as ids; those that are too long, or too short, are left out and counted."""
    what = "texts" if config.prefix_tokens else "prompts"

    def encoded(whose: str, rows: list[Row]) -> EncodedPrompts:
        return EncodedPrompts.encoded(
            policy, rows, config, what=f"{whose} {what}", log=chosen.notes.append, fix=ROOM
        )

    train, held_out = encoded("training", chosen.train), encoded("held-out", chosen.held_out)
    development = None
    if chosen.development:
        some = encoded("development", chosen.development)
        samples = DEVELOPMENT_SAMPLES if config.eval_temperature else 1
        development = dataclasses.replace(some, samples=samples, texts=())
    every = [*train.ids, *held_out.ids, *(development.ids if development else ())]
    policy.check_fits(every, config.max_new_tokens)
    return RunPrompts(
        scored=encode_scored(
            policy, chosen.scored, train.rows, train.ids, config.max_new_tokens, chosen.notes
        ),
        train=list(train.rows),
        columns=columns_digest(train.rows),
        train_ids=[list(ids) for ids in train.ids],
        held_out_rows=chosen.held_out if config.prefix_tokens else list(held_out.rows),
        held_out=held_out,
        chats=[row for row in [*chosen.train, *chosen.held_out, *chosen.development] if is_chat(row)],
        notes=chosen.notes,
        development=development,
    )
