"""Prompts that are conversations: the tokenizer's chat template makes them text."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from quark_fast.data.row import Rendered
from quark_fast.data.tokenizer import opening
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
