"""Scored completions of the training prompts, sampled by the run or brought along."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from quark_fast.data.row import Row, given, is_chat
from quark_fast.data.scored import ScoredText
from quark_fast.errors import UsageError
from quark_fast.model.policy import Policy


@dataclass(frozen=True)
class Scored:
    """One completion of a training prompt; reward NaN: not scored.

    Attributes:
        row: of one that was brought along: its record's own columns, which another record of the same prompt
            may not share.
        counts: of one that was brought along: as ``ScoredText`` has it.
    """

    prompt: int
    ids: list[int]
    text: str
    reward: float
    row: Row | None = field(default=None, compare=False)
    counts: str = field(default="", compare=False)

    @staticmethod
    def to_json(batch: list[Scored]) -> list[Any]:
        return [
            [one.prompt, one.ids, one.text, None if math.isnan(one.reward) else one.reward] for one in batch
        ]

    @staticmethod
    def from_json(batch: list[Any]) -> list[Scored]:
        return [Scored(i, ids, text, math.nan if s is None else s) for i, ids, text, s in batch]


def scored_digest(completions: Sequence[Scored]) -> str:
    """sha256 over completions with their prompts and rewards, in their order."""
    return hashlib.sha256(json.dumps(Scored.to_json([*completions])).encode()).hexdigest()


def encode_scored(
    policy: Policy,
    texts: Sequence[ScoredText],
    prompts: Sequence[Row],
    prompt_ids: Sequence[Sequence[int]],
    max_new_tokens: int,
    notes: list[str],
) -> list[Scored]:
    """Completions as the model would have written them after these prompts, their end included.

    A text that does not say whether it ended has done so if it is shorter than ``max_new_tokens``. Those of
    other prompts are left out, and so are those longer than the model has positions for; ``notes`` gets the
    count.

    Raises:
        UsageError: none is left.
    """
    index = {given(row): i for i, row in enumerate(prompts)}
    left_out: Counter[str] = Counter()
    found, without_end = [], 0
    for one in texts:
        i = index.get(given(one.row))
        if i is None:
            left_out["their prompts are held out, or left out of training themselves"] += 1
            continue
        chat = is_chat(prompts[i])
        text = one.written or one.completion
        ids = policy.encode_completion(prompts[i]["prompt"], prompt_ids[i], text, chat)
        if ids is None:
            left_out["the tokenizer cannot spell them after their prompts"] += 1
            continue
        ended = len(ids) < max_new_tokens if one.ended is None else one.ended
        without_end += one.ended is None and not ended
        if ended:
            ids = [*ids, *_end(policy, chat, one.after)]
        needed = len(policy.prefix) + 1 + len(prompt_ids[i]) + len(ids)
        if policy.positions is not None and needed > policy.positions:
            left_out[f"longer than the model's {policy.positions:,} positions leave"] += 1
            continue
        reward = math.nan if one.reward is None else one.reward
        row = {**one.row, "prompt": prompts[i]["prompt"]}
        found.append(Scored(i, ids, one.completion, reward, row, one.counts))
    notes += [f"{count:,} scored completions left out: {reason}" for reason, count in left_out.items()]
    if without_end:
        notes.append(
            f"{without_end:,} of {len(found):,} scored completions have max_new_tokens = {max_new_tokens}"
            " tokens or more and count as cut off, so that the model learns no end of theirs; give a higher"
            " --max-new-tokens, or say by a column 'ended' which have one"
        )
    if texts and not found:
        raise UsageError(f"none of {len(texts):,} scored completions can be used: {'; '.join(left_out)}")
    return found


def _end(policy: Policy, chat: bool, after: str) -> list[int]:
    """What a text ends with, or an answer: of several ends a text's has the lowest id in all known models.

    Args:
        after: what the chat template writes after an answer.
    """
    ends = policy.text_tokenizer(after, add_special_tokens=False).input_ids if after else []
    if own := [token for token in ends if token in policy.stop_ids]:
        return own[:1]
    eos = policy.tokenizer.eos_token_id
    return [eos] if chat and eos in policy.stop_ids else policy.stop_ids[:1]
