"""Completions that were written and scored before: a file or data set of them, or of preferences."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from quark_fast.data.chat import Chat, ChatTemplateError
from quark_fast.data.prompts import Loaded, check_depth, find_prompt, usable
from quark_fast.data.readers import listed, read_rows
from quark_fast.data.row import Rendered, Row, from_file, is_chat, messages, text_of
from quark_fast.errors import UsageError
from quark_fast.metrics import LARGEST


@dataclass(frozen=True)
class ScoredText:
    """A completion of a prompt.

    Attributes:
        row: the prompt and the other columns, as ``load_prompts`` gives them.
        reward: None: none is in the file, so the run's reward is asked.
        ended: whether the text ended by itself; None: the file does not say.
        written: what the chat template writes of it after the prompt, where it is an answer of a chat; "":
            the completion itself.
        after: what the template writes between it and a next question.
        counts: where no column of rewards says so, what the reward comes of, for a sentence.
    """

    row: Row
    completion: str
    reward: float | None
    ended: bool | None = None
    counts: str = ""
    written: str = ""
    after: str = ""


PAIRS = "pairs, of which chosen counts 1 and rejected 0"
LABELS = "labels, of which true counts 1 and false 0"

# Columns that are no prompt's: the reward of a later sample is not to get an earlier one's.
_OF_THE_COMPLETION = {"completion", "reward", "chosen", "rejected", "ended", "messages"}
_OF_THE_COMPLETION |= {"round", "step", "quantile", "rendered"}  # in a run's completions.jsonl


def load_scored(
    source: str, column: str | None, chat: Chat, min_characters: int = 1, max_characters: int = 0
) -> tuple[list[ScoredText], str]:
    """The completions of a source, in its order, and a count of what was left out.

    A record has a prompt as of ``load_prompts``, and one of

    - ``completion`` (a text, or a message of the assistant) with ``reward``, a number, higher is better;
      without that column in any record the run's reward scores them (a run's completions.jsonl has it),
    - ``completion`` with ``label``, true or false, the columns of KTO, which get the rewards 1 and 0; beside
      a ``reward``, or of any other kind, ``label`` is a column of the prompt,
    - ``chosen`` and ``rejected``, the columns of DPO, which get the rewards 1 and 0; as conversations without
      a prompt column they begin with the prompt's messages.

    ``ended``, true or false, tells whether the text ended by itself.

    Args:
        min_characters, max_characters: those of shorter and longer prompts are left out; maximum 0: no limit.
    Raises:
        UsageError: the source is missing, malformed, lacks these columns, or has a reward that is no number.
    """
    found: list[ScoredText] = []
    left_out: Counter[str] = Counter()
    read, rewarded, names = 0, 0, dict[str, None]()
    for read, record in enumerate(read_rows(source), start=1):
        if not isinstance(record, Mapping):
            raise UsageError(f"{source} holds texts alone; give records with prompt, completion and reward")
        names |= dict.fromkeys(map(str, record))
        where = f"{source}, record {read}"
        check_depth(record, where)
        record = from_file(dict(record))
        ended, own = _ended(record.get("ended"), where), _prompts_own(record)
        counts = PAIRS if _is_pair(record) else LABELS if _kto(record) is not None else ""
        for value, completion, reward in _completions(record, column, where):
            rewarded += reward is not None
            text = _text(completion)
            row, reason = usable(own, value, chat, min_characters, max_characters)
            if reason or not text:
                left_out[_left_out(reason)] += 1
                continue
            written = ("", "") if isinstance(completion, str) else _as_written(row, text, chat)
            found.append(ScoredText(row, text, reward, ended, counts, *written))
    if rewarded:  # else all are to be scored
        left_out["without a reward"] = sum(one.reward is None for one in found)
        found = [one for one in found if one.reward is not None]
    left_out = +left_out  # without zeros
    if not found:
        wanted = "prompt and completion (with reward), or chosen and rejected"
        has = f"it has {listed(names)}" if names else "it is empty"
        why = "".join(f"; {count:,} {reason}" for reason, count in left_out.items())
        raise UsageError(
            f"{source} holds no completion to use{why}; {has}, and {wanted} is wanted (--prompt-column names"
            " another column of prompts)"
        )
    said = Loaded(read=read, left_out=left_out).counts
    if not rewarded and "label" in names and "reward" not in names:
        said += "; its labels are not true and false, so no rewards: the run's reward scores them"
    return found, said


def _completions(record: Row, column: str | None, where: str) -> Iterator[tuple[Any, Any, float | None]]:
    """(prompt, completion, reward) of each completion that a record holds."""
    if _is_pair(record):
        for name, reward in (("chosen", 1.0), ("rejected", 0.0)):
            held, prompt = find_prompt(record, column)
            answer = record[name]
            if messages(answer) and not (held and messages(prompt)) and len(answer) > 1:
                prompt, answer = answer[:-1], answer[-1:]  # a text beside it is its first turn
            yield *_last_answer(prompt, answer), reward
    elif "completion" in record:
        scored = _reward(record["reward"], where) if "reward" in record else _kto(record)
        yield *_last_answer(find_prompt(record, column)[1], record["completion"]), scored
    elif talk := messages(record.get("messages")).get("messages"):
        yield talk[:-1], talk[-1:], _reward(record.get("reward"), where)


def _last_answer(prompt: Any, completion: Any) -> tuple[Any, Any]:
    """(prompt, last answer): the turns before that are the prompt's, with which a completion may begin."""
    asked, turns = messages(prompt).get("messages"), messages(completion).get("messages")
    if asked and turns and turns[: len(asked)] == asked:
        return turns[:-1], turns[-1:]
    if asked and turns and turns[0]["role"] == "assistant":
        return [*asked, *turns[:-1]], turns[-1:]
    return prompt, completion


def _as_written(row: Row, answer: str, chat: Chat) -> tuple[str, str]:
    """What the template writes of an answer after a chat's prompt, and what between it and a next question.

    It may put a space or empty thoughts before it, and end it otherwise than a text. Two times "" where what
    it writes of the prompt and the answer does not begin with what it writes of the prompt.
    """
    if not is_chat(row) or row["messages"][-1]["role"] == "assistant":
        return "", ""
    talk = [*row["messages"], {"role": "assistant", "content": answer}]
    with contextlib.suppress(ChatTemplateError):
        whole = chat(talk)
        written = whole.removeprefix(row["prompt"])
        if written == whole or not written.rstrip().endswith(answer.strip()):
            return "", ""
        longer = chat([*talk, {"role": "user", "content": _NEXT}])
        after = longer.removeprefix(whole)
        return written, "" if after == longer else after.partition(_NEXT)[0]
    return "", ""


_NEXT = "And then?"
_TRUTHS = {"true": 1.0, "false": 0.0}  # CSV spells what is true as a text


def _is_pair(record: Row) -> bool:
    return "chosen" in record and "rejected" in record


def _left_out(reason: str) -> str:
    if not reason:
        return "without a completion"
    return reason if reason.startswith(("without", "refused")) else f"with a prompt that is {reason}"


def _prompts_own(record: Row) -> Row:
    others = _OF_THE_COMPLETION | ({"label"} if _kto(record) is not None else set())
    own = {str(name): value for name, value in record.items() if name not in others}
    chat = isinstance(record.get("prompt"), Rendered)  # of a run's file: its messages are the prompt's
    return own | {"messages": record["messages"]} if chat else own


def _kto(record: Row) -> float | None:
    """The reward that KTO's column says: whether a completion is wanted; None: it is no such column."""
    if "completion" not in record or "reward" in record:
        return None
    return _TRUTHS.get(str(record.get("label")).lower())  # a number may be a class of the prompt's


def _ended(value: Any, where: str) -> bool | None:
    if value is None or value == "":
        return None
    known = {"true": True, "1": True, "false": False, "0": False}.get(str(value).lower())
    if known is None:
        raise UsageError(f"{where}: ended {value!r:.80} is neither true nor false")
    return known


def _reward(value: Any, where: str) -> float | None:
    if value is None or value == "":  # CSV has no other way to leave it out
        return None
    try:
        number = float(_TRUTHS.get(str(value).lower(), value))
    except (TypeError, ValueError, OverflowError):
        number = math.inf
    if math.isnan(number):
        return None
    if abs(number) >= LARGEST:
        raise UsageError(
            f"{where}: reward {value!r:.80} is no finite number below {LARGEST:g} in size; give such numbers,"
            " higher is better"
        )
    return number


def _text(completion: Any) -> str:
    """The text of a completion, which may be a message, or a conversation that ends in one; "": neither."""
    if isinstance(completion, list) and completion:
        completion = completion[-1]
    if isinstance(completion, Mapping):
        answer = completion.get("role") == "assistant" and bool(messages([completion]))
        completion = text_of(completion) if answer else None
    if not isinstance(completion, str):
        return ""
    try:
        completion.encode()
    except UnicodeEncodeError:  # JSON can spell half a character
        return ""
    return completion
