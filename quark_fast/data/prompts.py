"""Prompts: from a file or a data set to training and held-out rows, and a count of what was left out.

A row is a dict with a text under ``prompt``; its other columns go to the reward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quark_fast.data.chat import Chat, ChatTemplateError
from quark_fast.data.readers import json_form, listed, read_rows
from quark_fast.data.row import Rendered, Row, from_file, given, messages, no_messages
from quark_fast.errors import UsageError
from quark_fast.files.safe_read import DEEPEST, too_deep


@dataclass
class Loaded:
    """Rows of one source, each prompt once, in its order.

    Attributes:
        read: how many records the source holds.
        left_out: reason -> how many records were left out for it.
    """

    rows: list[Row] = field(default_factory=list)
    read: int = 0
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def counts(self) -> str:
        """Such as "12 read, left out: 2 duplicate, 1 empty"."""
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.left_out.most_common())
        return f"{self.read:,} read" + (f", left out: {reasons}" if reasons else "")


def load_prompts(
    source: str | Path,
    column: str | None = None,
    chat: Chat | None = None,
    min_characters: int = 1,
    max_characters: int = 0,
) -> Loaded:
    """The usable prompts of a file or data set, each once, in its order, with a count of the others.

    Args:
        source: a file of ``readers.FORMATS``, or ``hf:NAME``, ``hf:NAME:SPLIT``, ``hf:NAME:CONFIG:SPLIT`` for
            a data set of the ``datasets`` library, by hub name or folder; without a split it is ``train``.
        column: where the prompt stands, with dots into nested objects ("meta.question"). Without it
            ``prompt``: a text, an object with a ``text`` as in RealToxicityPrompts, or a list of messages;
            else ``messages``. That is a conversation, whose closing answers of the assistant are cut off.
        chat: renders messages. A record that holds messages is refused without it.
        min_characters, max_characters: shorter and longer prompts are left out; maximum 0: no limit.
    Raises:
        UsageError: the source is missing, malformed (the message names the line), has no such column, or
            holds no usable prompt at all.
    """
    loaded = Loaded()
    seen: set[str] = set()
    names: dict[str, None] = {}  # an ordered set
    found = False
    for record in read_rows(str(source)):
        loaded.read += 1
        check_depth(record, f"{source}, record {loaded.read}")
        row = {"prompt": record} if isinstance(record, str) else from_file(json_form(record))
        names |= dict.fromkeys(map(str, row))
        held, value = (True, record) if isinstance(record, str) else find_prompt(row, column)
        found |= held
        made, reason = usable(row, value, chat, min_characters, max_characters)
        if not reason and given(made) in seen:
            reason = "duplicate"
        if reason:
            loaded.left_out[reason] += 1
            continue
        seen.add(given(made))
        loaded.rows.append(made)
    if loaded.read and not found:
        wanted = "'prompt' or 'messages'" if column is None else repr(column)
        if column is None and "messages" in names:
            raise UsageError(
                f"{source}: its messages are no lists, as in .jsonl, .json or .parquet, and it has no column"
                " 'prompt'"
            )
        raise UsageError(
            f"{source} has no column {wanted}, but {listed(names)}; name the prompts' by --prompt-column"
        )
    if not loaded.rows:
        raise UsageError(f"{source} holds no prompt" + (f" to use: {loaded.counts}" if loaded.read else ""))
    return loaded


# --------------------------------------------------------------------- one record


def check_depth(record: Any, where: str) -> None:
    """Refuse a record that is too deep: it will be written as JSON, where that ends in a crash."""
    if too_deep(record):
        raise UsageError(f"{where}: more than {DEEPEST} lists or objects stand in one another; flatten it")


def find_prompt(row: Mapping[str, Any], column: str | None) -> tuple[bool, Any]:
    """(whether the row has the column, its value)."""
    # A conversation, with its end. Of a table of both kinds each row has both columns, and None in one.
    whole = column == "messages" or (column is None and row.get("prompt") is None)
    if whole and isinstance(row.get("messages"), list):
        asked = row["messages"]
        while asked and isinstance(asked[-1], Mapping) and asked[-1].get("role") == "assistant":
            asked = asked[:-1]
        return True, asked
    column = column or "prompt"
    value: Any = row
    if column in row:  # a name with a dot in it is a name first
        return True, row[column]
    for part in column.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return False, None
        value = value[part]
    return True, value


def with_prompt(row: Row, value: Any, chat: Chat | None) -> tuple[Row, str]:
    """(the row with the prompt that ``value`` holds, "") or (the row, the reason why that holds none).

    A chat of a run's file is rendered anew: it may have been written for another model.
    """
    if isinstance(value, Mapping):
        value = value.get("text")
    if isinstance(value, Rendered) and chat is not None:
        value = row["messages"]
    columns = messages(value)
    if columns:
        if chat is None:
            raise UsageError("these prompts are messages, and no chat template renders them; give texts")
        value = Rendered(chat(value))
    if value is None:
        return row, "without a prompt"
    if not isinstance(value, str):
        return row, no_messages(value)
    if not value.strip():
        return row, "empty"
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half a character
        return row, "not text"
    return {**row, **columns, "prompt": value}, ""


def usable(row: Row, value: Any, chat: Chat | None, least: int, most: int) -> tuple[Row, str]:
    """``with_prompt``, with the reasons of template and length, too; ``most`` 0: no limit."""
    try:
        made, reason = with_prompt(row, value, chat)
    except ChatTemplateError as error:
        return row, f"refused by the chat template ({str(error.__cause__)[:80]})"
    if not reason and len(made["prompt"]) < least:
        reason = f"shorter than {least:,} characters"
    if not reason and 0 < most < len(made["prompt"]):
        reason = f"longer than {most:,} characters"
    return made, reason
