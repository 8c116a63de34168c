"""Prompts that are conversations: the tokenizer's chat template makes them text."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from quark_fast.data.tokenizer import opening
from quark_fast.errors import UsageError

Row = dict[str, Any]
Chat = Callable[[list[dict[str, Any]]], str]
"""Renders messages as the text that a model continues: a tokenizer's chat template."""


class ChatTemplateError(UsageError):
    """A chat template has no form for these messages."""


def messages(value: Any) -> Row:
    """The column that keeps a prompt's messages for the reward; none for a text."""
    if not isinstance(value, list) or not value:
        return {}
    for message in value:
        if not isinstance(message, Mapping):
            return {}
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            return {}
    return {"messages": value}


class Rendered(str):
    """A prompt that was written from messages by a chat template.

    Marked when it is, not told by rendering again: a template may write today's date, or leave something out.
    """


def is_chat(row: Row) -> bool:
    """Whether the row's prompt was written from its messages. A text may have some beside it."""
    return isinstance(row["prompt"], Rendered)


def to_file(row: Row) -> Row:
    """The row as a file of the run has it, which keeps the mark; ``from_file`` gives it back."""
    return {**row, "rendered": True} if is_chat(row) else row


def from_file(row: Row) -> Row:
    """A row that ``to_file`` made; any other as it is."""
    if row.get("rendered") is not True or not messages(row.get("messages")):
        return row
    bare = {name: value for name, value in row.items() if name != "rendered"}
    return {**bare, "prompt": Rendered(row["prompt"])}


def given(row: Row) -> str:
    """What the user gave: the prompt's text, or its messages as JSON. Two runs share what is given alike."""
    return json.dumps(row["messages"], sort_keys=True) if is_chat(row) else str(row["prompt"])


def as_rendered(rows: Sequence[Row], before: Sequence[Row]) -> list[Row]:
    """The rows with their chats as they were rendered ``before``, where the same messages stand there."""
    known = {given(row): row["prompt"] for row in before if is_chat(row)}
    return [{**row, "prompt": known.get(given(row), row["prompt"])} if is_chat(row) else row for row in rows]


def chat_template(source: str, tokenizer: Callable[[], Any]) -> Chat:
    """What renders messages for the model ``source``: its tokenizer's chat template.

    Messages that end with the assistant's are a text to go on with; otherwise the assistant's turn is opened.
    What opens a text is left to the policy, which puts it before the reward token: ``tokenizer.opening``, and
    what an exported model's template puts in front. (SmolLM2's bos_token is none, but the mark of a turn.)

    Args:
        tokenizer: gives the tokenizer; called once, with the first messages.
    Raises (what is returned):
        UsageError: the tokenizer has no template.
        ChatTemplateError: the template refuses the messages.
    """
    loaded = functools.cache(tokenizer)

    def render(messages: list[dict[str, Any]]) -> str:
        if not getattr(loaded(), "chat_template", None):
            raise UsageError(
                f"the prompts are messages, and the tokenizer of {source} has no chat template; give a chat"
                " model, or texts"
            )
        goes_on = messages[-1]["role"] == "assistant"
        try:
            text = loaded().apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=not goes_on,
                continue_final_message=goes_on,
                reward_front="",
            )
        except Exception as error:  # a template is a program of its own and raises what it likes
            raise ChatTemplateError(f"the chat template of {source} refuses messages: {error}") from error
        return Rendered(str(text).removeprefix(opening(loaded())))

    return render
