"""A row: a prompt as a text, and its other columns, which go to the reward; a chat keeps its messages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

Row = dict[str, Any]
Prompt = str | Row | list[dict[str, Any]]
"""What a program gives as one: a text, a row with a ``prompt``, or a list of messages."""


def messages(value: Any) -> Row:
    """The column that keeps a prompt's messages for the reward; none for a text."""
    return {} if no_messages(value) else {"messages": value}


def no_messages(value: Any) -> str:
    """The reason why a value is no list of messages that are text; "" for one.

    A message's content is a text, or parts of one: ``{"type": "text", "text": ...}``.
    """
    if not isinstance(value, list):
        return "not text"
    if not value:
        return "empty"
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            return "not text"
        content = message.get("content")
        if content is None or content == []:
            return "without content in a message"
        if not isinstance(content, str | list):
            return "not text"
        if not isinstance(content, str) and not all(map(_is_text, content)):
            return "more than text"
    return ""


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def text_of(message: Mapping[str, Any]) -> str:
    """A message's content as one text."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


class Rendered(str):
    """A prompt that was written from messages by a chat template.

    Marked when it is written, not found out by rendering again: a template may write today's date, or leave
    something out.
    """


def with_same_columns(*parts: Sequence[Row]) -> list[list[Row]]:
    """The rows with every column that any of them has, None where a row had none.

    A reward is called with the columns by name, and must get the same ones whatever rows stand in a batch.
    """
    names = dict.fromkeys(name for rows in parts for row in rows for name in row)
    return [[dict.fromkeys(names) | row if len(row) < len(names) else row for row in rows] for rows in parts]


def is_chat(row: Row) -> bool:
    """Whether the row's prompt was written from its messages. A text may have some beside it."""
    return isinstance(row["prompt"], Rendered)


def to_file(row: Row) -> Row:
    """The row as a file of the run has it, which keeps the mark; ``from_file`` gives it back."""
    return {**row, "rendered": True} if is_chat(row) else row


def from_file(row: Row) -> Row:
    """A row that ``to_file`` made; any other as it is."""
    written = row.get("rendered") is True and isinstance(row.get("prompt"), str)
    if not written or not messages(row.get("messages")):
        return row
    bare = {name: value for name, value in row.items() if name != "rendered"}
    return {**bare, "prompt": Rendered(row["prompt"])}


def given(row: Row) -> str:
    """The prompt as the user gave it: its text, or its messages as JSON. Prompts are compared by this."""
    chat = is_chat(row)
    return json.dumps(row["messages"], sort_keys=True, default=str) if chat else str(row["prompt"])


def as_rendered(rows: Sequence[Row], before: Sequence[Row]) -> list[Row]:
    """The rows with their chats as they were rendered ``before``, where the same messages stand there."""
    known = {given(row): row["prompt"] for row in before if is_chat(row)}
    return [{**row, "prompt": known.get(given(row), row["prompt"])} if is_chat(row) else row for row in rows]
