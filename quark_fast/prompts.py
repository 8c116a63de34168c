"""Prompts from files: one row per prompt, its other columns kept for the reward."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quark_fast.config import UsageError

Row = dict[str, Any]


def load_prompts(path: str | Path) -> list[Row]:
    """Rows with a text under ``prompt``, in the file's order, each prompt once.

    ``.jsonl``: an object a line whose ``prompt`` is a text, or an object with a ``text`` as in
    RealToxicityPrompts; other fields are passed to the reward. ``.txt``: a prompt a line.

    Raises:
        UsageError: unreadable, empty, another format, or a bad line, which is named by its number.
    """
    path = Path(path)
    if path.suffix not in (".jsonl", ".txt"):
        raise UsageError(f"prompts file {path}: cannot read {path.suffix!r}; give .jsonl or .txt")
    try:
        # Not splitlines(): JSON and prose hold U+2028 and other "line ends" inside a line.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"prompts file {path} cannot be read: {error}") from error
    rows: dict[str, Row] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = {"prompt": line.strip()} if path.suffix == ".txt" else _parse(path, number, line)
        rows.setdefault(row["prompt"], row)
    if not rows:
        raise UsageError(f"prompts file {path} holds no prompt")
    return list(rows.values())


def _parse(path: Path, number: int, line: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"{path}:{number}: not JSON ({error.msg} at column {error.colno})") from error
    prompt = row.get("prompt") if isinstance(row, dict) else None
    if isinstance(prompt, dict):
        prompt = prompt.get("text")
    if not isinstance(prompt, str) or not prompt.strip():
        raise UsageError(f"{path}:{number}: needs a text under 'prompt', found {line[:80]!r}")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{path}:{number}: the prompt holds half a character (a lone surrogate)") from None
    return {**row, "prompt": prompt}


def split(rows: Sequence[Row], held_out: int | None = None) -> tuple[list[Row], list[Row]]:
    """(train, held out): a split by the hash of each prompt's text, so it never moves.

    Without ``held_out`` a tenth is held out, at least 1 and at most 200.
    """
    if held_out is None:
        held_out = max(1, min(200, len(rows) // 10))
    by_hash = sorted(rows, key=lambda row: hashlib.sha256(row["prompt"].encode()).hexdigest())
    return by_hash[held_out:], by_hash[:held_out]
