"""Rows of prompts as token ids: what is too long, or too short, is left out and counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from quark_fast.data.row import Row, is_chat
from quark_fast.errors import UsageError
from quark_fast.model.policy import Policy


class Encoded(NamedTuple):
    """Rows with what is asked of the model, that as ids, the ids of the rows' held-out texts, where there are
    any, and how many prompts were cut."""

    rows: list[Row]
    ids: list[list[int]]
    texts: list[list[int]]
    cut: int = 0


def encode_rows(
    policy: Policy,
    rows: Sequence[Row],
    max_tokens: int,
    prefix_tokens: int,
    *,
    cut: bool = False,
    what: str = "prompts",
    log: Callable[[str], None] = lambda _: None,
    fix: str = "give shorter ones, or lower max_new_tokens",
) -> Encoded:
    """The rows as token ids.

    With ``prefix_tokens`` a row's text is held-out text, cut after its first ``max_tokens`` tokens, and
    its first ``prefix_tokens`` are the prompt; rows without any token more are left out. With 0 a row's
    text is the prompt, and there are no held-out texts; rows of more than ``max_tokens`` are left out.

    Args:
        cut: prompts that are too long are cut to their last tokens, but for chats.
        what: what the rows are called in the line that ``log`` gets for those left out or cut.
        fix: what the error says to do where none of the prompts fits.
    Raises:
        UsageError: no row is left; a conversation, of which ``prefix_tokens`` would leave the opening alone.
    """
    if prefix_tokens == 0:
        return _encode_prompts(policy, rows, max_tokens, cut, what, log, fix)
    if any(map(is_chat, rows)):
        raise UsageError(
            f"prefix_tokens = {prefix_tokens} cuts prompts out of texts, but some {what} are messages, whose"
            " opening must stay; give --prefix-tokens 0, or texts"
        )
    if prefix_tokens >= max_tokens:
        raise UsageError(
            f"prefix_tokens = {prefix_tokens} leaves no held-out text within the {max_tokens} tokens that"
            " a text may have; give fewer"
        )
    every = [policy.text_tokenizer(row["prompt"], add_special_tokens=False).input_ids for row in rows]
    kept = [i for i, ids in enumerate(every) if len(ids) > prefix_tokens]
    if not kept:
        raise UsageError(
            f"none of {len(rows)} texts has more than prefix_tokens = {prefix_tokens} tokens; give longer"
            " texts, or another prefix_tokens"
        )
    texts = [list(every[i])[:max_tokens] for i in kept]
    prompts = [ids[:prefix_tokens] for ids in texts]
    asked = [
        {**rows[i], "prompt": policy.decode(ids, prompt=[])} for i, ids in zip(kept, prompts, strict=True)
    ]
    if len(kept) < len(rows):
        count = f"{len(rows) - len(kept):,} of {len(rows):,}"
        log(f"{count} {what} left out: no longer than prefix_tokens = {prefix_tokens}")
    return Encoded(asked, prompts, texts)


def _encode_prompts(
    policy: Policy,
    rows: Sequence[Row],
    most: int,
    cut: bool,
    what: str,
    log: Callable[[str], None],
    fix: str,
) -> Encoded:
    """Those of the rows that are not too long."""
    if most < 1:
        raise UsageError(
            f"the model's {policy.positions} positions leave no room for a prompt beside"
            " prefix, reward token and the new tokens; lower max_new_tokens"
        )
    every = [policy.encode(row["prompt"], chat=is_chat(row)) for row in rows]
    long = [i for i, ids in enumerate(every) if len(ids) > most]
    shortened = {i for i in long if cut and not is_chat(rows[i])}
    kept = [i for i, ids in enumerate(every) if len(ids) <= most or i in shortened]
    if not kept:
        raise UsageError(
            f"none of {len(rows):,} {what} fits: the shortest has {min(map(len, every))} tokens, and"
            f" {most} is the limit (the model's positions: {policy.positions or 'any'}); {fix}"
        )
    if shortened:
        log(f"{len(shortened):,} of {len(rows):,} {what} cut to their last {most:,} tokens")
    if len(kept) < len(rows):
        count = f"{len(rows) - len(kept):,} of {len(rows):,}"
        log(f"{count} {what} left out: longer than {most:,} tokens (the longest {max(map(len, every)):,})")
    return Encoded([rows[i] for i in kept], [every[i][-most:] for i in kept], [], len(shortened))
