"""Columns of rows."""

from __future__ import annotations

from quark_fast.data.row import with_same_columns


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
