"""Files and data sets of prompts as rows."""

from __future__ import annotations

import base64
import csv
import dataclasses
import datetime
import functools
import io
import json
import math
import os
import re
import reprlib
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

from quark_fast.data.row import Row
from quark_fast.errors import UsageError, nor_folder
from quark_fast.files.safe_read import TooLarge, read_bytes

FORMATS = ".jsonl, .json, .csv, .tsv or .txt (each also .gz), .parquet, or hf:NAME for a data set"


def listed(names: Iterable[str]) -> str:
    """The first eight of them."""
    shown = [repr(str(name)[:40]) for name in names]
    return ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")


# --------------------------------------------------------------------- files


def read_rows(source: str) -> Iterable[Row | str]:
    """The records of a source; a text stands for a row with that prompt alone."""
    if source.startswith("hf:"):
        return _read_dataset(source)
    path = Path(source)
    packed = path.suffix.lower() == ".gz"
    suffix = (path.with_suffix("") if packed else path).suffix
    if suffix.lower() == ".parquet" and not packed:
        return _read_parquet(path)
    if read := _READERS.get(suffix.lower()):
        return read(source, _text(path))
    raise UsageError(f"prompts {source}: cannot read {suffix!r}; give {FORMATS}")


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
    # An empty line is an empty prompt, which is counted; after the last "\n" stands no line.
    return (line.strip() for line in text.removesuffix("\n").split("\n") if text)


def _read_jsonl(source: str, text: str) -> Iterator[Row | str]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _record(f"{source}:{number}", _parse_json(source, number, line))


def _read_json(source: str, text: str) -> Iterator[Row | str]:
    """A list of objects or texts, or an object of columns of one length."""
    value = _parse_json(source, 1, text, "; if every line is an object, name the file .jsonl")
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        lengths = {name: len(column) for name, column in value.items()}
        if len(set(lengths.values())) > 1:
            raise UsageError(f"{source}: the columns have different lengths: {lengths}")
        value = [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)]
    if not isinstance(value, list):
        raise UsageError(f"{source}: needs a list of objects, found {reprlib.repr(value)[:60]}")
    for number, item in enumerate(value, start=1):
        yield _record(f"{source}, item {number}", item)


def _parse_json(source: str, first_line: int, text: str, if_several: str = "") -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line, hint = first_line + error.lineno - 1, if_several if error.msg == "Extra data" else ""
        raise UsageError(f"{source}:{line}: not JSON ({error.msg} at column {error.colno}){hint}") from error
    except (RecursionError, ValueError) as error:  # nested too deep; a number of thousands of digits
        raise UsageError(f"{source}:{first_line}: JSON beyond all limits ({error})") from error


def _record(where: str, value: Any) -> Row | str:
    if isinstance(value, dict | str):
        return value
    raise UsageError(f"{where}: needs an object, found {reprlib.repr(value)[:60]}")


def _read_csv(source: str, text: str, delimiter: str = ",") -> Iterator[Row]:
    # Columns beside the prompt may hold whole articles; the module's limit is for the whole process.
    limit = csv.field_size_limit(2**31 - 1)
    try:
        rows = _lines_of_cells(source, text, delimiter)
    finally:
        csv.field_size_limit(limit)
    names = rows[0][1] if rows else []
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UsageError(f"{source}:1: the columns {listed(twice)} stand there twice; rename one")
    for number, row in rows[1:]:
        if len(row) > len(names):
            raise UsageError(f"{source}:{number}: {len(row)} fields under {len(names)} column names")
        yield dict(zip(names, row, strict=False))


def _lines_of_cells(source: str, text: str, delimiter: str) -> list[tuple[int, list[str]]]:
    """The rows that are not empty, each with the number of its last line."""
    lines, is_tsv = functools.partial(io.StringIO, text, newline=""), delimiter == "\t"
    # TSV as most tools write it has no quoting: a field may begin with a quotation mark.
    plain = csv.reader(lines(), delimiter=delimiter, quoting=csv.QUOTE_NONE)
    unquoted_rows = [(plain.line_num, row) for row in plain if row] if is_tsv else []
    fields = {len(row) for _, row in unquoted_rows}
    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    try:
        rows = [(reader.line_num, row) for row in reader if row]
        # A mark that opens one field and one that closes a later one would swallow the rows between.
        swallows = len(fields) == 1 and fields != {1} and len(unquoted_rows) > len(rows)
        return unquoted_rows if swallows else rows
    except csv.Error as error:
        if len(fields) == 1:
            return unquoted_rows
        form, unquoted = (
            ("TSV", ", nor as many fields in every line without quoting") if is_tsv else ("CSV", "")
        )
        why = str(error).replace("\t", r"\t")
        raise UsageError(f"{source}:{reader.line_num}: not {form} ({why}){unquoted}") from error


# Not by the ``datasets`` library: it turns texts like dates into dates, fills missing keys with None, refuses
# mixed types, and names no line of a malformed file.
_READERS: dict[str, Callable[[str, str], Iterable[Row | str]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": functools.partial(_read_csv, delimiter="\t"),
    ".txt": _read_lines,
}


def _read_parquet(path: Path) -> list[Row]:
    # Not by ``datasets`` either: it copies the file into its cache, takes [1] in a name for a pattern, and
    # has no type for maps.
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UsageError(
            f"reading {path} needs pyarrow: pip install 'pyarrow>=17', or give .jsonl"
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names, texts = file.schema_arrow.names, _texts_in_bytes(file)
            rows = [
                json_form({k: v.decode() if k in texts and v else v for k, v in row.items()})
                for batch in file.iter_batches()
                for row in batch.to_pylist()
            ]
    except Exception as error:  # each of Arrow's types has exceptions of its own on the way to Python
        raise UsageError(f"prompts file {path} cannot be read: {error}") from error
    if len(set(names)) < len(names):
        raise UsageError(f"{path}: column names stand there twice: {listed(names)}")
    return rows


def _texts_in_bytes(file: Any) -> set[str]:
    """The columns of bytes that are all UTF-8: older writers do not mark their texts as such."""
    import pyarrow

    found = set()
    for field in file.schema_arrow:
        if pyarrow.types.is_binary(field.type) or pyarrow.types.is_large_binary(field.type):
            try:
                file.read(columns=[field.name]).column(0).cast(pyarrow.large_string())
                found.add(field.name)
            except pyarrow.ArrowInvalid:  # such as an image
                pass
    return found


def _read_dataset(source: str) -> Iterator[Row]:
    parts = re.fullmatch(r"hf:([^:]+?)(?::([^:\[\]]+))??(?::([^:\[\]]+(?:\[[^\]]*\])?))?", source)
    if parts is None:
        raise UsageError(
            f"prompts {source!r}: write a data set as hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT"
        )
    name, config, split = os.path.expanduser(parts[1]), parts[2], parts[3] or "train"
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            f"prompts {source} need the datasets library: pip install 'datasets>=4', or give a file"
        ) from error
    try:
        if (Path(name) / "state.json").exists() or (Path(name) / "dataset_dict.json").exists():
            data = datasets.load_from_disk(name)
            if isinstance(data, datasets.DatasetDict):
                if split not in data:
                    raise ValueError(f"it has no split {split!r}, but {listed(data)}")
                data = data[split]
            elif parts[2] or parts[3]:
                raise ValueError("it is a single data set without splits; leave them out")
        else:
            data = datasets.load_dataset(name, config, split=split)
        for column, kind in list(data.features.items()):
            if (stored := _as_stored(kind)) != kind:
                data = data.cast_column(column, stored)
        # Saved with a format, as torch's, a data set would give that library's numbers.
        yield from map(json_form, data.with_format(None))
    except Exception as error:  # the network's, the hub's, and every builder's own
        raise UsageError(
            f"prompts {source}: {type(error).__name__}: {str(error)[:300]}{nor_folder(name)}"
        ) from error


def _as_stored(kind: Any) -> Any:
    """A feature of a data set whose images, sounds and the like are given as their bytes, as of a file.

    Decoded they are objects without a text of their own, or need a library more.
    """
    if isinstance(kind, Mapping):
        return {name: _as_stored(one) for name, one in kind.items()}
    if isinstance(kind, list):
        return [_as_stored(one) for one in kind]
    if not dataclasses.is_dataclass(kind):
        return kind
    media = hasattr(kind, "decode") and type(kind).__name__ != "Json"  # which decodes to what JSON knows
    changed: dict[str, Any] = {"decode": False} if media else {}
    if hasattr(kind, "feature"):
        changed["feature"] = _as_stored(kind.feature)
    replace: Callable[..., Any] = dataclasses.replace
    return replace(kind, **changed) if changed else kind


def json_form(value: Any) -> Any:
    """A column's value as JSON has it, so that a reward gets the same from the run's own files later.

    NaN and infinities are None; bytes, such as those of an image, are base64; whatever else JSON does not
    know is its text.
    """
    if isinstance(value, Mapping):
        return {name: json_form(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [json_form(one) for one in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, Decimal):
        return float(value)
    return value if value is None or isinstance(value, str | int | float) else str(value)
