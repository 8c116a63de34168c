"""Which prompts are trained on, and which are held out: for the test, or for development."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from quark_fast.config import Config
from quark_fast.data.chat import Chat, ChatTemplateError
from quark_fast.data.prompts import find_prompt, load_prompts, with_prompt
from quark_fast.data.readers import listed
from quark_fast.data.row import Prompt, Row, given, is_chat
from quark_fast.data.scored import ScoredText, load_scored
from quark_fast.errors import UsageError
from quark_fast.runtime.journal import spelled


def split(rows: Sequence[Row], held_out: int | None = None, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """(train, held out): a split by the hash of what was given as a prompt, so adding rows moves few others.

    Without ``held_out`` a tenth is held out, at least 1 and at most 200. Another seed, another split. Of
    prompts that stand there several times, which a program may give, one is held out, and none trained on.
    """
    by_hash: dict[str, list[Row]] = {}
    for row in rows:
        by_hash.setdefault(_hash(row, seed), []).append(row)
    if held_out is None:
        held_out = max(1, min(200, len(by_hash) // 10))
    alike = [by_hash[one] for one in sorted(by_hash)]
    return [row for some in alike[held_out:] for row in some], [first for first, *_ in alike[:held_out]]


@dataclass(frozen=True)
class Chosen:
    """Training rows, held-out rows, and what was left out of the files (nothing without files).

    Attributes:
        scored: completions that were scored before.
        development: rows by which rounds are compared, if they are (``keep_best``).
    """

    train: list[Row]
    held_out: list[Row]
    notes: list[str]
    scored: list[ScoredText] = field(default_factory=list)
    development: list[Row] = field(default_factory=list)


def choose_prompts(
    config: Config,
    task_prompts: Callable[[], tuple[list[Row], list[Row]]],
    chat: Chat,
    prompts: Sequence[Prompt] | None = None,
    held_out: Sequence[Prompt] | None = None,
) -> Chosen:
    """What a run trains and is measured on: the rows given, else those ``config`` names, else the task's own.

    Args:
        task_prompts: () -> (training rows, held-out rows) of the task.
        prompts, held_out: rows of the program that calls; they are taken as they are, also where one is both.
    Raises:
        UsageError: a source cannot be read, or leaves nothing to train on or to measure.
    """
    notes: list[str] = []
    scored: list[ScoredText] = []
    lengths = config.min_prompt_characters, config.max_prompt_characters
    if config.scored is not None:
        if prompts is not None:
            raise UsageError(f"scored = {config.scored!r} brings its own prompts; give no others")
        scored, counts = load_scored(config.scored, config.prompt_column, chat, *lengths)
        notes.append(f"{config.scored}: {counts}")

    def rows(name: str, of_program: Sequence[Prompt] | None, source: str | None) -> list[Row] | None:
        if of_program is not None:
            return program_rows(name, of_program, chat, config.prompt_column)
        if not source:
            return None
        loaded = load_prompts(source, config.prompt_column, chat, *lengths)
        notes.append(f"{source}: {loaded.counts}")
        return loaded.rows

    count = config.held_out_count()
    train = rows("prompts", prompts, config.prompts)
    if config.scored is not None:
        first: dict[str, Row] = {}
        for one in scored:
            first.setdefault(given(one.row), one.row)
        train = list(first.values())
    test = rows("held_out", held_out, config.held_out if count is None else None)
    if train is None and test is None:
        train, test = task_prompts()
        if count is not None or config.split_seed:
            train, test = split([*train, *test], count or len(test), config.split_seed)
    elif train is None:
        train = task_prompts()[0]
    if test is None:
        train, test = split(train, count, config.split_seed)
    elif prompts is None:
        train = _not_in(test, train, notes)
    elif both := len(set(map(given, train)) & set(map(given, test))):
        notes.append(f"held out and trained on, as the program gives them, so no test: {both:,} prompts")
    if config.evaluate_on == "development":
        unseen = f"the {len(test):,} test prompts stay unseen"
        train, test = _for_development(train, len(test), config, "evaluate_on = development")
        notes.append(f"evaluated on {len(test):,} development prompts; {unseen}")
    development: list[Row] = []
    if config.goal() is not None:
        train, development = _for_development(train, min(len(test), MOST_TO_COMPARE), config, "keep_best")
        notes.append(f"rounds are compared on {len(development):,} development prompts of their own")
    if not train or not test:
        found = len({given(row) for row in [*train, *test]})
        fix = "a lower --held-out" if count else "others by --held-out"
        raise UsageError(f"{found} prompts are too few to hold {count or 'some'} out; give more, or {fix}")
    return Chosen(_limited(train, config, notes), test, notes, scored, development)


MOST_TO_COMPARE = 200  # development prompts that every round is measured on


def _for_development(
    train: list[Row], most: int, config: Config, setting: str
) -> tuple[list[Row], list[Row]]:
    """(the other training rows, development rows): at most so many, and at most a quarter of the prompts."""
    prompts = len(set(map(given, train)))
    if prompts < 2:
        raise UsageError(
            f"{setting}: {prompts} training prompts are too few to take some for development; give more"
        )
    return split(train, max(1, min(most, prompts // 4)), config.split_seed)


def program_rows(name: str, rows: Sequence[Prompt], chat: Chat, column: str | None) -> list[Row]:
    """Rows of a program: nothing is left out of them quietly."""
    # A DataFrame, a dict of columns and a DatasetDict list names, not rows.
    if isinstance(rows, Mapping) or hasattr(rows, "columns") or not isinstance(rows, Iterable):
        raise UsageError(
            f"{name} is of type {type(rows).__name__}; give a list of texts, rows or lists of messages, such"
            " as df.to_dict('records') of a DataFrame, or one split of a data set, as data['train']"
        )
    made: list[Row] = []
    for i, one in enumerate(rows):
        if not isinstance(one, str):
            one = _as_lists(one)
        row: Row = {str(k): v for k, v in one.items()} if isinstance(one, Mapping) else {"prompt": one}
        held, value = find_prompt(row, column) if isinstance(one, Mapping) else (True, one)
        if not held:
            wanted = repr(column) if column else "'prompt' or 'messages'"
            raise UsageError(
                f"{name}[{i}] has no column {wanted}, but {listed(row)}; name the prompts' by prompt_column"
            )
        try:
            row, reason = with_prompt(row, value, chat)
        except ChatTemplateError as error:
            raise UsageError(f"{name}[{i}]: {error}") from error
        if reason:
            raise UsageError(f"{name}[{i}] is {reason}: {one!r:.80}")
        made.append(row)
    if not made:
        raise UsageError(f"{name}: an empty list; give prompts, or leave it out")
    return made


def _as_lists(value: Any) -> Any:
    """A row or list of messages whose arrays, as a DataFrame of a Parquet file has them, are lists."""
    if isinstance(value, Mapping):
        return {name: _as_lists(one) for name, one in value.items()}
    if isinstance(value, np.ndarray) and value.dtype == object:
        return [_as_lists(one) for one in value]
    return value


def _not_in(held_out: Sequence[Row], train: Sequence[Row], notes: list[str]) -> list[Row]:
    """The training rows that are not held out: what is measured must not have been trained on."""
    measured = set(map(given, held_out))
    kept = [row for row in train if given(row) not in measured]
    if train and not kept:
        raise UsageError(
            f"all {len(train):,} training prompts are held out, too; give others by --held-out, or how many"
            " of these"
        )
    if len(kept) < len(train):
        notes.append(f"{len(train) - len(kept):,} left out of training, as they are held out, too")
    return kept


def _limited(train: list[Row], config: Config, notes: list[str]) -> list[Row]:
    """At most ``prompt_limit`` rows, those of the lowest hashes, in the order of all."""
    if not 0 < config.prompt_limit < len(train):
        return train
    notes.append(f"{config.prompt_limit:,} of {len(train):,} to train on by prompt_limit")
    hashes = [_hash(row, config.split_seed) for row in train]
    first = sorted(range(len(train)), key=hashes.__getitem__)[: config.prompt_limit]
    return [train[i] for i in sorted(first)]


def digest(rows: Sequence[Row]) -> str:
    """sha256 over the prompts as they were given, in their order."""
    return hashlib.sha256(json.dumps([given(row) for row in rows]).encode()).hexdigest()


def columns_digest(rows: Sequence[Row]) -> str:
    """sha256 over what stands beside the prompts in their rows, in their order; of missing values nothing."""
    own = []
    for row in rows:
        prompt = ("prompt", "messages") if is_chat(row) else ("prompt",)
        own.append({k: row[k] for k in sorted(row) if k not in prompt and row[k] is not None})
    return hashlib.sha256(json.dumps(own, default=spelled, skipkeys=True).encode()).hexdigest()


def _hash(row: Row, seed: int) -> str:
    text = given(row) if seed == 0 else f"{seed}\n{given(row)}"
    return hashlib.sha256(text.encode()).hexdigest()
