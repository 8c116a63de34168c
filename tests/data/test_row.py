"""Columns of rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from quark_fast.data.row import with_same_columns
from quark_fast.runtime.run_folder import RunFolder


def test_every_row_has_every_column_of_any_part_and_its_own_values() -> None:
    whole = {"prompt": "a", "label": 1}
    train, held_out = with_same_columns([whole, {"prompt": "b"}], [{"prompt": "c", "keywords": ["k"]}])
    assert train == [
        {"prompt": "a", "label": 1, "keywords": None},
        {"prompt": "b"} | dict.fromkeys(("label", "keywords")),
    ]
    assert held_out == [{"prompt": "c", "label": None, "keywords": ["k"]}]
    assert whole == {"prompt": "a", "label": 1}, "a program's rows stay as they are"
    assert with_same_columns([{"prompt": "a"}], []) == [[{"prompt": "a"}], []]


def test_numbers_and_arrays_of_a_programs_rows_are_those_of_json_in_the_runs_files(tmp_path: Path) -> None:
    """So that the reward of a later evaluation does not get "False", which is true."""
    row = {"label": np.bool_(False), "n": np.int64(3), "x": np.float32("nan"), "more": [np.arange(2)]}
    RunFolder(tmp_path).write_rows("rows.jsonl", [row | {"t": torch.tensor(1.5)}])
    found = json.loads((tmp_path / "rows.jsonl").read_text())
    assert found == {"label": False, "n": 3, "x": None, "more": [[0, 1]], "t": 1.5}
    assert found["label"] is False
