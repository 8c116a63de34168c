"""Prompts that are conversations: the tokenizer's chat template makes them text."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

from quark_fast.data.row import Rendered, text_of
from quark_fast.data.tokenizer import is_conditioned, opening
from quark_fast.errors import UsageError

Chat = Callable[[list[dict[str, Any]]], str]
"""Renders messages as the text that a model continues: a tokenizer's chat template."""


class ChatTemplateError(UsageError):
    """A chat template has no form for these messages."""


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

    @functools.cache
    def front() -> str:
        # A conditioned template has left its opening out; what begins like that is the first turn's own.
        return "" if is_conditioned(loaded()) else opening(loaded())

    def render(messages: list[dict[str, Any]]) -> str:
        if not getattr(loaded(), "chat_template", None):
            raise UsageError(
                f"the prompts are messages, and the tokenizer of {source} has no chat template; give a chat"
                " model, or texts"
            )
        try:
            text = _written(loaded(), messages)
        except Exception as error:  # a template is a program of its own and raises what it likes
            raise ChatTemplateError(f"the chat template of {source} refuses messages: {error}") from error
        return Rendered(text.removeprefix(front()))

    return render


def writes_opening(tokenizer: Any, messages: list[dict[str, Any]]) -> bool:
    """Whether the tokenizer's chat template itself opens a text of these messages; no template does not."""
    with contextlib.suppress(Exception):  # as above
        return bool(front := opening(tokenizer)) and _written(tokenizer, messages).startswith(front)
    return False


def _written(tokenizer: Any, messages: list[dict[str, Any]]) -> str:
    """What the template writes of the messages.

    Content in parts goes to the template as it is, where that writes all of its text. Many templates take
    texts alone, and fail at parts, leave them out, or write them as Python would; there they are joined. A
    text that a template leaves out goes to it as a part.
    """

    def write(messages: list[dict[str, Any]]) -> str:
        goes_on = messages[-1]["role"] == "assistant"
        text = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=not goes_on,
            continue_final_message=goes_on,
            reward_front="",
        )
        return str(text)

    def whole(messages: list[dict[str, Any]]) -> str | None:
        """What it writes of content in parts; None: it leaves some out."""
        parts = [part for one in messages if not isinstance(one["content"], str) for part in one["content"]]
        with contextlib.suppress(Exception):  # whatever it is, it may not be so of the joined ones
            text = write(messages)
            if _TYPE not in text and all(part["text"].strip() in text for part in parts):
                return text
        return None

    joined = [{**message, "content": text_of(message)} for message in messages]
    if joined != messages:
        return whole(messages) or write(joined)
    text = write(joined)
    if all(one["content"].strip() in text for one in joined if one["role"] == "user"):
        return text
    # Some templates take parts alone, and leave out what is none.
    apart = [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in joined]
    return whole(apart) or text


_TYPE = "'type': 'text'"  # of a part as Python writes it
