"""Prompts: from a file or a data set to training and held-out rows, and a count of what was left out.

A row is a dict with a text under ``prompt``; its other columns go to the reward.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
import re
import reprlib
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quark_fast.config import Config, UsageError
from quark_fast.tokenizer import opening
from quark_fast.untrusted import DEEPEST, TooLarge, read_bytes, too_deep

Row = dict[str, Any]
Chat = Callable[[list[dict[str, Any]]], str]
"""Renders messages as the text that a model continues: a tokenizer's chat template."""

FORMATS = ".jsonl, .json, .csv, .tsv or .txt (each also .gz), .parquet, or hf:NAME for a data set"


class ChatTemplateError(UsageError):
    """A chat template has no form for these messages."""


@dataclass
class Loaded:
    """Rows of one source, each prompt once, in its order.

    Attributes:
        read: how many records the source holds.
        left_out: reason -> how many records were left out for it.
    """

    source: str
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
    *,
    column: str | None = None,
    chat: Chat | None = None,
    min_characters: int = 1,
    max_characters: int = 0,
) -> Loaded:
    """The usable prompts of a file or data set, each once, in its order, with a count of the others.

    Args:
        source: a file of ``FORMATS``, or ``hf:NAME``, ``hf:NAME:SPLIT``, ``hf:NAME:CONFIG:SPLIT`` for a data
            set of the ``datasets`` library, by hub name or folder; without a split it is ``train``.
        column: where the prompt stands, with dots into nested objects ("meta.question"). Without it
            ``prompt``: a text, an object with a ``text`` as in RealToxicityPrompts, or a list of messages;
            else ``messages``, a conversation, whose closing answers of the assistant are cut off.
        chat: renders messages. A record that holds messages is refused without it.
        min_characters, max_characters: shorter and longer prompts are left out; maximum 0: no limit.
    Raises:
        UsageError: the source is missing, malformed (the message names the line), has no such column, or
            holds no usable prompt at all.
    """
    loaded = Loaded(str(source))
    seen: set[str] = set()
    names: dict[str, None] = {}  # an ordered set
    found = False
    for record in _read(str(source)):
        loaded.read += 1
        if too_deep(record):  # it will be written as JSON, where that ends in a crash
            raise UsageError(
                f"{source}, record {loaded.read}: more than {DEEPEST} lists or objects stand in one another;"
                " flatten it"
            )
        row = {"prompt": record} if isinstance(record, str) else from_file(record)
        names |= dict.fromkeys(map(str, row))
        held, value = (True, record) if isinstance(record, str) else _find(row, column)
        found |= held
        try:
            prompt, reason = _prompt(value, chat)
        except ChatTemplateError:
            prompt, reason = "", "refused by the chat template"
        if not reason and len(prompt) < min_characters:
            reason = f"shorter than {min_characters:,} characters"
        if not reason and 0 < max_characters < len(prompt):
            reason = f"longer than {max_characters:,} characters"
        made = {**row, **_messages(value), "prompt": prompt}
        if not reason and given(made) in seen:
            reason = "duplicate"
        if reason:
            loaded.left_out[reason] += 1
            continue
        seen.add(given(made))
        loaded.rows.append(made)
    if loaded.read and not found:
        wanted = "'prompt' or 'messages'" if column is None else repr(column)
        raise UsageError(
            f"{source} has no column {wanted}, but {_listed(names)}; name the prompts' by --prompt-column"
        )
    if not loaded.rows:
        raise UsageError(f"{source} holds no prompt" + (f" to use: {loaded.counts}" if loaded.read else ""))
    return loaded


def _listed(names: Iterable[str], most: int = 8) -> str:
    shown = [repr(name[:40]) for name in names]
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")


# --------------------------------------------------------------------- one record


def _find(row: Mapping[str, Any], column: str | None) -> tuple[bool, Any]:
    """(whether the row has the column, its value)."""
    if column is None and "prompt" not in row and isinstance(row.get("messages"), list):
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


def _prompt(value: Any, chat: Chat | None) -> tuple[str, str]:
    """(the prompt, "") or ("", the reason why there is none)."""
    if isinstance(value, Mapping):
        value = value.get("text")
    if _messages(value):
        if chat is None:
            raise UsageError("these prompts are messages, and no chat template renders them; give texts")
        value = Rendered(chat(value))
    if value is None:
        return "", "without a prompt"
    if not isinstance(value, str):
        return "", "not text"
    if not value.strip():
        return "", "empty"
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half a character
        return "", "not text"
    return value, ""


def _messages(value: Any) -> Row:
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
    if row.get("rendered") is not True or not _messages(row.get("messages")):
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


# --------------------------------------------------------------------- files


def _read(source: str) -> Iterator[Row | str]:
    """The records of a source; a text stands for a row with that prompt alone."""
    if source.startswith("hf:"):
        yield from _read_dataset(source)
        return
    path = Path(source)
    suffix = path.with_suffix("").suffix if path.suffix.lower() == ".gz" else path.suffix
    read = {
        ".jsonl": _read_jsonl,
        ".ndjson": _read_jsonl,
        ".json": _read_json,
        ".csv": _read_csv,
        ".tsv": _read_csv,
        ".txt": _read_lines,
    }.get(suffix.lower())
    if suffix.lower() == ".parquet" and path.suffix.lower() != ".gz":
        yield from _read_parquet(path)
    elif read is None:
        raise UsageError(f"prompts {source}: cannot read {suffix!r}; give {FORMATS}")
    else:
        yield from read(source, _text(path))


def _text(path: Path) -> str:
    """The file's text: UTF-8, with or without a byte-order mark."""
    try:
        content = read_bytes(path)
    except TooLarge as error:  # a few kilobytes of gzip unpack to gigabytes
        raise UsageError(f"prompts file {path}: {error}; split it") from error
    except (OSError, EOFError, zlib.error, ValueError) as error:  # gzip's own; a NUL in the name
        raise UsageError(f"prompts file {path} cannot be read: {error}") from error
    # UTF-16 without a byte-order mark passes as UTF-8 with NULs between the letters.
    bad = content.find(b"\0")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        bad = error.start
    if bad >= 0:
        line = content.count(b"\n", 0, bad) + 1
        raise UsageError(
            f"{path}:{line}: byte 0x{content[bad]:02x} at offset {bad:,} is no UTF-8 text; save the file as"
            " UTF-8"
        )
    return text


def _read_lines(source: str, text: str) -> Iterator[str]:
    # Not splitlines(): JSON and prose hold U+2028 and other "line ends" inside a line.
    return (line.strip() for line in text.split("\n") if line.strip())


def _read_jsonl(source: str, text: str) -> Iterator[Row | str]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _record(f"{source}:{number}", _parse_json(source, number, line))


def _read_json(source: str, text: str) -> Iterator[Row | str]:
    """A list of objects or texts, or an object of columns of one length."""
    value = _parse_json(source, 1, text)
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        lengths = {name: len(column) for name, column in value.items()}
        if len(set(lengths.values())) > 1:
            raise UsageError(f"{source}: the columns have different lengths: {lengths}")
        value = [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)]
    if not isinstance(value, list):
        raise UsageError(f"{source}: needs a list of objects, found {reprlib.repr(value)[:60]}")
    for number, item in enumerate(value, start=1):
        yield _record(f"{source}, item {number}", item)


def _parse_json(source: str, first_line: int, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise UsageError(f"{source}:{line}: not JSON ({error.msg} at column {error.colno})") from error
    except (RecursionError, ValueError) as error:  # nested too deep; a number of thousands of digits
        raise UsageError(f"{source}:{first_line}: JSON beyond all limits ({error})") from error


def _record(where: str, value: Any) -> Row | str:
    if isinstance(value, dict | str):
        return value
    raise UsageError(f"{where}: needs an object, found {reprlib.repr(value)[:60]}")


def _read_csv(source: str, text: str) -> Iterator[Row]:
    tabs = Path(source.removesuffix(".gz")).suffix.lower() == ".tsv"
    # Columns beside the prompt may hold whole articles; the module's limit is for the whole process.
    limit = csv.field_size_limit(2**31 - 1)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if tabs else ",", strict=True)
        rows = [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise UsageError(f"{source}:{reader.line_num}: not CSV ({error})") from error
    finally:
        csv.field_size_limit(limit)
    if not rows:
        return
    names = rows[0][1]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UsageError(f"{source}:1: the columns {_listed(twice)} stand there twice; rename one")
    for number, row in rows[1:]:
        if len(row) > len(names):
            raise UsageError(f"{source}:{number}: {len(row)} fields under {len(names)} column names")
        yield dict(zip(names, row, strict=False))


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UsageError(
            f"reading {path} needs pyarrow: pip install 'pyarrow>=17', or give .jsonl"
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if len(set(names)) < len(names):
                raise UsageError(f"{path}: column names stand there twice: {_listed(names)}")
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except UsageError:
        raise
    except Exception as error:  # each of Arrow's types has exceptions of its own on the way to Python
        raise UsageError(f"prompts file {path} cannot be read: {error}") from error


def _read_dataset(source: str) -> Iterator[Row]:
    parts = re.fullmatch(r"hf:([^:]+?)(?::([^:\[\]]+))??(?::([^:\[\]]+(?:\[[^\]]*\])?))?", source)
    if parts is None:
        raise UsageError(
            f"prompts {source!r}: write a data set as hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT"
        )
    name, config, split = parts[1], parts[2], parts[3] or "train"
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            f"prompts {source} need the datasets library: pip install 'datasets>=4', or give a file"
        ) from error
    try:
        if (Path(name) / "state.json").exists() or (Path(name) / "dataset_dict.json").exists():
            data = datasets.load_from_disk(name)
            data = data[split] if isinstance(data, datasets.DatasetDict) else data
        else:
            data = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the network's, the hub's, and every builder's own
        raise UsageError(f"prompts {source}: {type(error).__name__}: {str(error)[:300]}") from error
    yield from data


# --------------------------------------------------------------------- training and held out


def split(rows: Sequence[Row], held_out: int | None = None, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """(train, held out): a split by the hash of what was given as a prompt, so adding rows moves few others.

    Without ``held_out`` a tenth is held out, at least 1 and at most 200. Another seed, another split.
    """
    if held_out is None:
        held_out = max(1, min(200, len(rows) // 10))
    by_hash = sorted(rows, key=lambda row: _hash(row, seed))
    return by_hash[held_out:], by_hash[:held_out]


def choose_prompts(
    config: Config,
    tasks_own: Callable[[], tuple[list[Row], list[Row]]],
    chat: Chat,
    prompts: Sequence[str | Row] | None = None,
    held_out: Sequence[str | Row] | None = None,
) -> Chosen:
    """What a run trains and is measured on: the rows given, else those ``config`` names, else the task's own.

    Args:
        tasks_own: () -> (training rows, held-out rows) of the task.
        prompts, held_out: rows of the program that calls; they are taken as they are.
    Raises:
        UsageError: a source cannot be read, or leaves nothing to train on or to measure.
    """
    notes: list[str] = []

    def load(source: str) -> list[Row]:
        loaded = load_prompts(
            source,
            column=config.prompt_column,
            chat=chat,
            min_characters=config.min_prompt_characters,
            max_characters=config.max_prompt_characters,
        )
        notes.append(f"{source}: {loaded.counts}")
        return loaded.rows

    count = config.held_out_count()
    train = test = None
    if prompts is not None:
        train = _given("prompts", prompts, chat)
    elif config.prompts:
        train = load(config.prompts)
    if held_out is not None:
        test = _given("held_out", held_out, chat)
    elif config.held_out and count is None:
        test = load(config.held_out)
    if train is None and test is None:
        train, test = tasks_own()
        if count is not None or config.split_seed:
            train, test = split([*train, *test], count or len(test), config.split_seed)
    elif train is None:
        train = tasks_own()[0]
    if test is None:
        train, test = split(train, count, config.split_seed)
    elif prompts is None:  # what is measured must not have been trained on
        measured = set(map(given, test))
        kept = [row for row in train if given(row) not in measured]
        if len(kept) < len(train):
            notes.append(f"{len(train) - len(kept):,} left out of training, as they are held out, too")
        train = kept
    if not train or not test:
        raise UsageError(
            f"{len(train) + len(test)} prompts are too few to hold {count or 'some'} out; give more, or"
            " others by --held-out"
        )
    if 0 < config.prompt_limit < len(train):
        notes.append(f"{config.prompt_limit:,} of {len(train):,} to train on by prompt_limit")
        hashes = [_hash(row, config.split_seed) for row in train]
        first = sorted(range(len(train)), key=hashes.__getitem__)[: config.prompt_limit]
        train = [train[i] for i in sorted(first)]
    return Chosen(train, test, notes)


@dataclass(frozen=True)
class Chosen:
    """Training rows, held-out rows, and what was left out of the files (nothing without files)."""

    train: list[Row]
    held_out: list[Row]
    about: list[str]


def _given(name: str, rows: Sequence[str | Row], chat: Chat) -> list[Row]:
    """Rows of a program: nothing is left out of them quietly."""
    made: list[Row] = []
    for i, one in enumerate(rows):
        row: Row = {"prompt": one} if isinstance(one, str) else dict(one)
        prompt, reason = _prompt(row.get("prompt"), chat)
        if reason:
            raise UsageError(f"{name}[{i}] is {reason}: {one!r:.80}")
        made.append({**row, **_messages(row["prompt"]), "prompt": prompt})
    return made


def digest(rows: Sequence[Row]) -> str:
    """sha256 over the prompts as they were given, in their order."""
    return hashlib.sha256(json.dumps([given(row) for row in rows]).encode()).hexdigest()


def _hash(row: Row, seed: int) -> str:
    text = given(row) if seed == 0 else f"{seed}\n{given(row)}"
    return hashlib.sha256(text.encode()).hexdigest()
