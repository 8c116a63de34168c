"""Prompts: formats, what is refused and on which line, what is left out and counted, the fixed split."""

from __future__ import annotations

import copy
import csv
import datetime
import gzip
import hashlib
import io
import json
import math
import os
import pickle
import sys
import tarfile
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import word_tokenizer
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from quark_fast.config import Config
from quark_fast.data.chat import chat_template
from quark_fast.data.prompts import load_prompts, with_prompt
from quark_fast.data.row import Row, as_rendered, is_chat, to_file
from quark_fast.data.split import Chosen, choose_prompts, digest, split
from quark_fast.data.tokenizer import conditioned_template
from quark_fast.errors import UsageError

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "[{{ m['role'] }}]{{ m['content'] }}[/]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def rows(source: str | Path, **how: Any) -> list[Row]:
    return load_prompts(source, **how).rows


def refusal(source: str | Path, **how: Any) -> str:
    with pytest.raises(UsageError) as caught:
        load_prompts(source, **how)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- Formats -------------------------------------------------------------------------------------


def test_text_file_gives_a_prompt_a_line_and_counts_blank_ones(tmp_path: Path) -> None:
    file = write(tmp_path / "p.txt", "first one", "", "  second\t", "   ", "dritter: Äpfel")
    assert rows(file) == [{"prompt": p} for p in ("first one", "second", "dritter: Äpfel")]
    assert load_prompts(file).counts == "5 read, left out: 2 empty"
    file.write_text(file.read_text().rstrip("\n"))
    assert load_prompts(file).counts == "5 read, left out: 2 empty", "a last line may have an end, or none"


def test_jsonl_rows_keep_their_order_and_their_other_columns(tmp_path: Path) -> None:
    file = write(tmp_path / "p.jsonl", '{"prompt": " b ", "label": 1}', "", '{"id": [2], "prompt": "a"}')
    # A prompt's own spaces are tokens to a model: JSON says exactly what it means.
    assert rows(file) == [{"prompt": " b ", "label": 1}, {"id": [2], "prompt": "a"}]


def test_real_toxicity_prompts_as_published_are_read(tmp_path: Path) -> None:
    row = {
        "filename": "0766186-bc7f2a64cb271f5f56cf6f25570cd9ed.txt",
        "challenging": False,
        "prompt": {"text": "So, I'm starting to think she's full", "toxicity": 0.4},
        "continuation": {"text": " of crap.", "toxicity": 0.9},
    }
    (loaded,) = rows(write(tmp_path / "rtp.jsonl", json.dumps(row)))
    assert loaded == {**row, "prompt": "So, I'm starting to think she's full"}


TABLE = [
    {"prompt": 'say "hi",\nplease', "label": "1", "meta.id": "x"},
    {"prompt": " Äpfel\u2028und ", "label": "", "meta.id": "y"},
]


def as_csv(delimiter: str) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, TABLE[0].keys(), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(TABLE)
    return text.getvalue().encode()


CONTENTS = {
    "p.csv": as_csv(","),
    "p.tsv": as_csv("\t"),
    "p.json": json.dumps(TABLE, indent=1).encode(),
    "columns.json": json.dumps({name: [row[name] for row in TABLE] for name in TABLE[0]}).encode(),
    "p.jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in TABLE).encode(),
    "p.ndjson": "\n".join(map(json.dumps, TABLE)).encode(),
}


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str, zipped: bool, mark: bytes) -> None:
    content = mark + CONTENTS[name]
    file = tmp_path / (name + ".gz" if zipped else name.upper())
    file.write_bytes(gzip.compress(content) if zipped else content)
    assert rows(file) == TABLE


def test_parquet_gives_the_same_rows_with_their_types(tmp_path: Path) -> None:
    table = [{**row, "n": i, "prompt": row["prompt"]} for i, row in enumerate(TABLE)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "p.parquet")
    assert rows(tmp_path / "p.parquet") == table


def test_columns_are_as_the_runs_own_files_will_have_them(tmp_path: Path) -> None:
    """So that the reward of a later evaluation gets what it got in training."""
    day = datetime.datetime(2024, 1, 2, 3, 4, 5)
    table = [
        {
            "prompt": "a",
            "day": day,
            "price": Decimal("1.5"),
            "score": math.nan,
            "more": {"at": [day.date()]},
            "image": {"bytes": b"\xff\xd8", "path": None},
            "wait": datetime.timedelta(hours=2),
        }
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "p.parquet")
    (row,) = rows(tmp_path / "p.parquet")
    assert row == {
        "prompt": "a",
        "day": "2024-01-02T03:04:05",
        "price": 1.5,
        "score": None,
        "more": {"at": ["2024-01-02"]},
        "image": {"bytes": "/9g=", "path": None},
        "wait": "2:00:00",
    }
    assert json.loads(json.dumps(row)) == row


@pytest.mark.parametrize("name", ["p.jsonl", "p.json"])
def test_numbers_that_json_does_not_know_are_none(tmp_path: Path, name: str) -> None:
    lines = ['{"prompt": "a", "n": [NaN, 1]}', '{"prompt": "b", "n": -Infinity}']
    text = "\n".join(lines) if name == "p.jsonl" else f"[{', '.join(lines)}]"
    expected = [{"prompt": "a", "n": [None, 1]}, {"prompt": "b", "n": None}]
    assert rows(write(tmp_path / name, text)) == expected


def test_texts_that_parquet_holds_as_bytes_are_texts(tmp_path: Path) -> None:
    table = pyarrow.table(
        {
            "prompt": pyarrow.array(["é".encode(), b"b"]),
            "more": pyarrow.array([b"x", None]),
            "image": pyarrow.array([b"x", b"\xff\xd8"]),
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "p.parquet")
    assert rows(tmp_path / "p.parquet") == [
        {"prompt": "é", "more": "x", "image": "eA=="},
        {"prompt": "b", "more": None, "image": "/9g="},
    ]


def test_lists_of_texts_are_prompts(tmp_path: Path) -> None:
    for name, text in (("p.json", '["a", "b"]'), ("p.jsonl", '"a"\n"b"')):
        assert rows(write(tmp_path / name, text)) == [{"prompt": "a"}, {"prompt": "b"}]


@pytest.mark.parametrize(("name", "library"), [("p.parquet", "pyarrow"), ("hf:somewhere", "datasets")])
def test_missing_library_is_named_with_what_installs_it(
    monkeypatch: pytest.MonkeyPatch, name: str, library: str
) -> None:
    for module in ("pyarrow", "pyarrow.parquet", "datasets"):
        monkeypatch.setitem(sys.modules, module, None)
    message = refusal(name)
    assert f"pip install '{library}>=" in message and name in message


@pytest.fixture
def data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the ``datasets`` library loads by name, without a network."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    folder = tmp_path / "mine"
    folder.mkdir()
    for part, count in (("train", 5), ("test", 2)):
        lines = [json.dumps({"question": f"{part} {i}", "n": i}) for i in range(count)]
        (folder / f"{part}.jsonl").write_text("\n".join(lines))
    return folder


def test_data_set_is_loaded_by_name_and_split(data_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    how = {"column": "question"}
    assert [row["prompt"] for row in rows(f"hf:{data_set}", **how)] == [f"train {i}" for i in range(5)]
    assert rows(f"hf:{data_set}:test", **how)[1] == {"question": "test 1", "prompt": "test 1", "n": 1}
    assert len(rows(f"hf:{data_set}:train[:2]", **how)) == 2
    assert len(rows(f"hf:{data_set}:default:train[:40%]", **how)) == 2
    monkeypatch.setenv("HOME", str(data_set.parent))
    assert len(rows("hf:~/mine:test", **how)) == 2
    assert "nosuch" in refusal(f"hf:{data_set}:nosuch", **how)
    assert "BuilderConfig" in refusal(f"hf:{data_set}:other:train", **how)
    assert "nor is there a folder 'nosuchfolder' here" in refusal("hf:nosuchfolder", **how)
    for bad in ("hf:", "hf:a:b:c:d", "hf:a:train[:10"):
        assert "hf:NAME:CONFIG:SPLIT" in refusal(bad)


def test_data_set_saved_to_disk_is_loaded_too(data_set: Path, tmp_path: Path) -> None:
    import datasets

    table = datasets.Dataset.from_list([{"prompt": "a", "n": 1}])
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "two")
    for name in (f"hf:{tmp_path / 'one'}", f"hf:{tmp_path / 'two'}:test"):
        assert rows(name) == [{"prompt": "a", "n": 1}]
    assert "no split 'validation', but 'train', 'test'" in refusal(f"hf:{tmp_path / 'two'}:validation")
    for name in (f"hf:{tmp_path / 'one'}:test", f"hf:{tmp_path / 'one'}:other:train"):
        assert "single data set without splits" in refusal(name)


# --- Which column --------------------------------------------------------------------------------


def test_prompt_column_is_a_name_or_a_path_into_nested_objects(tmp_path: Path) -> None:
    row = {"prompt": "p", "q": {"text": "q", "de": {"kurz": "k"}}, "a.b": "dot", "a": {"b": "nested"}}
    file = write(tmp_path / "p.jsonl", json.dumps(row))
    found = {c: rows(file, column=c)[0]["prompt"] for c in ("prompt", "q", "q.text", "q.de.kurz", "a.b")}
    assert found == {"prompt": "p", "q": "q", "q.text": "q", "q.de.kurz": "k", "a.b": "dot"}
    assert rows(file, column="q.de.kurz") == [{**row, "prompt": "k"}], "the other columns stay"


def test_missing_column_is_refused_with_those_there_are(tmp_path: Path) -> None:
    file = write(tmp_path / "p.csv", "id,question", "1,why")
    message = refusal(file)
    assert "'prompt' or 'messages'" in message and "'id', 'question'" in message
    assert "--prompt-column" in message
    assert "'quest.ion'" in refusal(file, column="quest.ion")
    assert rows(file, column="question")[0]["id"] == "1"
    chats = write(tmp_path / "chats.csv", "messages", "\"[{'role': 'user', 'content': 'x'}]\"")
    assert "its messages are no lists" in refusal(chats)
    # A file without a header: its first prompt is taken for one.
    assert "'once upon a time'" in refusal(write(tmp_path / "q.csv", "once upon a time", "a second one"))


# --- What is left out ----------------------------------------------------------------------------


def test_unusable_prompts_are_left_out_and_counted_by_reason(tmp_path: Path) -> None:
    lines = [
        '{"prompt": "a", "n": 1}',
        '{"prompt": "b"}',
        '{"prompt": "a", "n": 2}',
        '{"prompt": ""}',
        '{"prompt": " \\n "}',
        '{"prompt": null}',
        '{"prompt": 7, "rendered": true, "messages": [{"role": "user", "content": "x"}]}',
        '{"other": "x"}',
        '{"prompt": {"toxicity": 1}}',
        '{"prompt": 7}',
        '{"prompt": ["x"]}',
        '{"prompt": []}',
        r'{"prompt": "\ud800"}',
        '{"prompt": "longer than ten"}',
    ]
    loaded = load_prompts(write(tmp_path / "p.jsonl", *lines), max_characters=10)
    # The first of equal prompts stays, with its own columns.
    assert loaded.rows == [{"prompt": "a", "n": 1}, {"prompt": "b"}]
    assert loaded.read == 14
    assert loaded.left_out == {
        "not text": 4,
        "without a prompt": 3,
        "empty": 3,
        "duplicate": 1,
        "longer than 10 characters": 1,
    }
    counted = "14 read, left out: 4 not text, 3 empty, 3 without a prompt, 1 duplicate, 1 longer than 10"
    assert loaded.counts == f"{counted} characters"


def test_length_limits_keep_prompts_of_exactly_that_length(tmp_path: Path) -> None:
    file = write(tmp_path / "p.txt", *("x" * n for n in range(1, 9)))
    kept = [len(row["prompt"]) for row in rows(file, min_characters=3, max_characters=5)]
    assert kept == [3, 4, 5]


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.csv"])
@pytest.mark.parametrize("content", ["", "\n  \n\n"])
def test_file_without_a_prompt_is_refused(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert name in refusal(tmp_path / name)
    if name != "p.csv":
        assert "holds no prompt" in refusal(tmp_path / name)


def test_file_whose_every_prompt_is_left_out_is_refused_with_the_counts(tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "p.jsonl", '{"prompt": ""}', '{"prompt": 1}'))
    assert "holds no prompt to use: 2 read, left out: 1 empty, 1 not text" in message


# --- What is refused -----------------------------------------------------------------------------


def test_unicode_line_separators_inside_a_line_do_not_break_it(tmp_path: Path) -> None:
    text = "one\u2028two\x85three\x0cfour"
    file = write(tmp_path / "p.jsonl", json.dumps({"prompt": text[:-5]}, ensure_ascii=False))
    assert rows(file) == [{"prompt": text[:-5]}]
    assert rows(write(tmp_path / "p.txt", text)) == [{"prompt": text}]
    assert rows(write(tmp_path / "p.csv", "prompt", text)) == [{"prompt": text}]


def test_windows_files_with_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    contents = {
        "p.txt": "\ufeffone\r\ntwo\r\n",
        "p.csv": "\ufeffprompt\r\none\r\ntwo\r\n",
        "p.jsonl": '\ufeff{"prompt": "one"}\r\n{"prompt": "two"}\r\n',
    }
    for name, text in contents.items():
        (tmp_path / name).write_bytes(text.encode())
        assert [row["prompt"] for row in rows(tmp_path / name)] == ["one", "two"]


def test_quotation_marks_of_a_tsv_that_would_swallow_rows_are_letters(tmp_path: Path) -> None:
    found = rows(write(tmp_path / "p.tsv", "prompt\tx", '"To be\t1', "or not\t0", 'to be"\t1', "that is\t0"))
    assert [row["prompt"] for row in found] == ['"To be', "or not", 'to be"', "that is"]
    quoted = rows(write(tmp_path / "q.tsv", "x\tprompt", '1\t"To be', 'or not"', "2\tto be"))
    assert [row["prompt"] for row in quoted] == ["To be\nor not", "to be"], "a line within a field"


def test_quotation_marks_of_a_tsv_without_quoting_are_letters(tmp_path: Path) -> None:
    found = rows(write(tmp_path / "p.tsv", "prompt\tx", '"Hi" he said\t1', "", 'She: "Hi"\t"2', "a,b\t3"))
    assert found == [
        {"prompt": '"Hi" he said', "x": "1"},
        {"prompt": 'She: "Hi"', "x": '"2'},
        {"prompt": "a,b", "x": "3"},
    ]


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("p.jsonl", b'{"prompt": "a"}\n\n{"prompt": "x"', ["p.jsonl:3:", "not JSON", "column 15"]),
        ("p.jsonl", b'{"prompt": "a"}\nplain text', ["p.jsonl:2:", "not JSON"]),
        ("p.jsonl", b'{"prompt": "a"}\n["x"]', ["p.jsonl:2:", "needs an object", "['x']"]),
        ("p.jsonl", b"7", ["p.jsonl:1:", "needs an object"]),
        ("p.jsonl", b'"a"\n' + b"[" * 100_000, ["p.jsonl:2:", "beyond all limits"]),
        ("p.jsonl", b"9" * 5000, ["p.jsonl:1:", "beyond all limits"]),
        ("p.json", b'[{"prompt": "a"},\n{"prompt": }]', ["p.json:2:", "not JSON"]),
        ("p.json", b'{"prompt": "a"}\n{"prompt": "b"}', ["p.json:2:", "not JSON", "name the file .jsonl"]),
        ("p.json", b'{"prompt": "a"}', ["needs a list of objects"]),
        ("p.json", b"{}", ["needs a list of objects"]),
        ("p.json", b'[{"prompt": "a"}, 7]', ["p.json, item 2", "needs an object, found 7"]),
        ("p.json", b'{"prompt": ["a", "b"], "n": [1]}', ["different lengths", "'n': 1"]),
        ("p.csv", b"id,prompt,id\n1,a,2", ["p.csv:1:", "'id'", "twice"]),
        ("p.csv", b'prompt,n\na,1\n"b\nb",2,3', ["p.csv:4:", "3 fields under 2 column names"]),
        ("p.csv", b'prompt\na\n"never closed', ["p.csv:", "not CSV"]),
        ("p.csv", b'prompt\n"a" b', ["p.csv:2:", "not CSV"]),
        ("p.tsv", b'prompt\tn\n"a" b\t1\nc', ["p.tsv:2:", r"not TSV ('\t' expected", "as many fields"]),
        ("p.txt", b"one\ncaf\xe9", ["p.txt:2:", "byte 0xe9 at offset 7", "UTF-8"]),
        ("p.txt", "hello".encode("utf-16"), ["p.txt:1:", "UTF-8"]),
        ("p.csv", "prompt\nhello".encode("utf-16-le"), ["p.csv:1:", "byte 0x00", "UTF-8"]),
        ("p.jsonl", b'{"prompt": "a"}\n\x00', ["p.jsonl:2:", "byte 0x00"]),
        ("p.txt.gz", b"not gzipped", ["p.txt.gz cannot be read"]),
        ("p.txt.gz", gzip.compress(b"cut" * 1000, mtime=0)[:-9], ["p.txt.gz cannot be read"]),
        ("p.parquet", b"PAR1 no", ["p.parquet cannot be read"]),
        ("p.parquet", b"", ["p.parquet cannot be read"]),
        ("p.xlsx", b"PK", ["'.xlsx'", ".jsonl", "hf:NAME"]),
        ("p", b"a", ["cannot read ''", ".jsonl"]),
        ("p.gz", b"a", ["cannot read ''"]),
        ("p.parquet.gz", b"a", ["cannot read '.parquet'"]),
    ],
)
def test_malformed_file_is_refused_with_its_line(
    tmp_path: Path, name: str, content: bytes, named: list[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    message = refusal(tmp_path / name)
    for words in named:
        assert words in message


def test_gzip_bomb_is_refused_after_the_limit_and_not_after_the_memory(tmp_path: Path) -> None:
    # A gigabyte in a megabyte; in a hundred bytes, once packed again.
    bomb = tmp_path / "p.jsonl.gz"
    bomb.write_bytes(gzip.compress(bytes(1 << 25), compresslevel=1) * 33)
    assert "holds more than 1,073,741,824 bytes; split it" in refusal(bomb)
    endless = tmp_path / "p.txt"
    endless.symlink_to("/dev/zero")
    assert "holds more than" in refusal(endless)


def test_record_nested_so_deep_that_it_could_not_be_written_again_is_refused(tmp_path: Path) -> None:
    def nested(depth: int) -> str:
        return '{"prompt": "a", "b": ' + "[" * depth + "]" * depth + "}"

    assert rows(write(tmp_path / "p.jsonl", nested(99)))
    assert "record 1: more than 100" in refusal(write(tmp_path / "p.jsonl", nested(100)))


def test_data_set_that_brings_code_or_a_pickle_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'pwned'}",)

    for name in ("script", "pickled"):
        (tmp_path / name).mkdir()
    code = f"import pathlib; pathlib.Path({str(tmp_path / 'pwned')!r}).touch()"
    (tmp_path / "script" / "script.py").write_text(code)
    for suffix in ("pkl", "pickle", "pt", "npy"):
        (tmp_path / "pickled" / f"data.{suffix}").write_bytes(pickle.dumps(Payload()))
    for name in (f"hf:{tmp_path / 'script'}", f"hf:{tmp_path / 'script' / 'script.py'}"):
        refusal(name)
    refusal(f"hf:{tmp_path / 'pickled'}")
    with tarfile.open(tmp_path / "pickled" / "data.tar", "w") as archive:
        for path in sorted((tmp_path / "pickled").glob("data.p*")):
            archive.add(path, path.name)
    refusal(f"hf:{tmp_path / 'pickled'}")
    assert not (tmp_path / "pwned").exists()


def test_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for suffix in ("txt", "csv", "parquet", "json.gz"):
        (tmp_path / f"folder.{suffix}").mkdir()
        for name in (f"missing.{suffix}", f"folder.{suffix}"):
            assert f"{name} cannot be read" in refusal(tmp_path / name)


def test_parquet_with_a_column_twice_is_refused(tmp_path: Path) -> None:
    table = pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["prompt", "prompt"])
    pyarrow.parquet.write_table(table, tmp_path / "p.parquet")
    assert "twice" in refusal(tmp_path / "p.parquet")


def test_long_fields_are_read_and_the_limit_of_the_csv_module_stays(tmp_path: Path) -> None:
    before = csv.field_size_limit(131_072)
    article = "x" * 300_000
    assert rows(write(tmp_path / "p.csv", "prompt,article", f"a,{article}"))[0]["article"] == article
    assert rows(write(tmp_path / "p.txt", article))[0]["prompt"] == article
    assert csv.field_size_limit(before) == 131_072


SUFFIXES = ["jsonl", "json", "csv", "tsv", "txt", "parquet", "jsonl.gz", "csv.gz"]
PARQUET = io.BytesIO()
pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a", "b"], "n": [1, 2]}), PARQUET)


def damaged(whole: bytes) -> st.SearchStrategy[bytes]:
    """``whole`` with a few bytes replaced and its end perhaps missing."""
    places = st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), max_size=4)

    def damage(changes: list[tuple[int, int]], end: int) -> bytes:
        made = bytearray(whole)
        for place, value in changes:
            made[place] = value
        return bytes(made[:end])

    return st.builds(damage, places, st.sampled_from([len(whole), len(whole) // 2]))


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.one_of(
        st.binary(max_size=200),
        st.text(max_size=60).map(str.encode),
        st.text('{}[]":,\\ \n\r\tprompt01\ufeff', max_size=60).map(str.encode),
        st.sampled_from([*CONTENTS.values(), PARQUET.getvalue()]).flatmap(damaged),
        st.sampled_from([*CONTENTS.values()]).flatmap(damaged).map(gzip.compress),
        st.sampled_from([gzip.compress(c, mtime=0) for c in CONTENTS.values()]).flatmap(damaged),
    ),
    column=st.sampled_from([None, "prompt", "meta.id", "a.b"]),
)
@example(content=b'{"prompt": [{"role": "user", "content": "x"}]}', column=None)
@example(content=b'[{"prompt": [{"role": 1}]}]', column=None)
@example(content=b'{"messages": [1]}', column=None)
def test_any_bytes_give_rows_or_a_usage_error(
    tmp_path: Path, suffix: str, content: bytes, column: str | None
) -> None:
    file = tmp_path / f"p.{suffix}"
    file.write_bytes(content)
    try:
        loaded = load_prompts(file, column=column, chat=lambda messages: "rendered")
    except UsageError as error:
        assert "\n" not in str(error)
        return
    texts = [row["prompt"] for row in loaded.rows]
    assert texts and len(set(texts)) == len(texts)
    assert all(isinstance(text, str) and text.strip() and text.encode() for text in texts)
    assert loaded.read == len(texts) + sum(loaded.left_out.values())


# --- Messages ------------------------------------------------------------------------------------


def chat_tokenizer(*, first: bool) -> Any:
    """One with a template; ``first``: it puts its bos_token before every text by itself."""
    tokenizer = word_tokenizer()
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.chat_template = TEMPLATE
    if first:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
        )
    return tokenizer


@pytest.fixture
def chat() -> Callable[[list[dict[str, Any]]], str]:
    return chat_template("tiny", lambda: chat_tokenizer(first=True))


ASK = {"role": "user", "content": "w1"}
ANSWER = {"role": "assistant", "content": "w2"}
SYSTEM = {"role": "system", "content": "w3"}
IMAGE = {"role": "user", "content": [{"type": "text", "text": "w1"}, {"type": "image", "url": "x.png"}]}


@pytest.mark.parametrize("template", ["{{ bos_token }}" + TEMPLATE, TEMPLATE])
def test_an_export_renders_what_training_did_also_where_a_turn_begins_like_a_text(template: str) -> None:
    tokenizer = chat_tokenizer(first=True)
    tokenizer.chat_template = template
    trained = chat_template("tiny", lambda: tokenizer)([ASK])
    exported = copy.deepcopy(tokenizer)
    exported.chat_template = conditioned_template(template, tokenizer, "<|reward_2|>")
    assert chat_template("export", lambda: exported)([ASK]) == trained


def test_messages_become_the_text_of_the_chat_template(tmp_path: Path, chat: Any) -> None:
    records: list[Row] = [
        {"prompt": [ASK], "n": 1},
        {"prompt": [ASK, ANSWER]},  # TRL's conversational prompt: the answer's beginning is given
        {"messages": [ASK, ANSWER, ASK, ANSWER], "n": 2},  # a whole conversation: its last answer is not
        {"messages": [ANSWER]},
        {"messages": [SYSTEM, ASK]},
        {"prompt": [{"role": "user", "content": ["an image"]}]},
        {"prompt": [{"role": "user", "content": None}]},
        {"prompt": [{"role": "user", "content": []}]},
        {"prompt": [ASK, {"role": "assistant"}, ASK]},
        {"prompt": [{"role": "user", "content": 5}]},
    ]
    loaded = load_prompts(write(tmp_path / "p.jsonl", *map(json.dumps, records)), chat=chat)
    # The separator that opens the document is the policy's to put in front.
    assert loaded.rows == [
        {"prompt": "[user]w1[/][assistant]", "messages": [ASK], "n": 1},
        {"prompt": "[user]w1[/][assistant]w2", "messages": [ASK, ANSWER]},
        {
            "prompt": "[user]w1[/][assistant]w2[/][user]w1[/][assistant]",
            "messages": [ASK, ANSWER, ASK],
            "n": 2,
        },
    ]
    # The column is the same by its name, beside a text, too.
    both = [{"prompt": "a", "messages": [ASK, ANSWER]}, {"prompt": None, "messages": [ASK, ANSWER, ASK]}]
    asked = write(tmp_path / "m.jsonl", *map(json.dumps, both))
    first, second = "[user]w1[/][assistant]", "[user]w1[/][assistant]w2[/][user]w1[/][assistant]"
    assert [row["prompt"] for row in rows(asked, column="messages", chat=chat)] == [first, second]
    assert [row["prompt"] for row in rows(asked, chat=chat)] == ["a", second]
    assert loaded.left_out == {
        "refused by the chat template (no system role)": 1,
        "empty": 1,
        "more than text": 1,
        "without content in a message": 3,
        "not text": 1,
    }


def test_object_whose_text_is_messages_keeps_them_for_the_reward(tmp_path: Path, chat: Any) -> None:
    (row,) = rows(write(tmp_path / "p.jsonl", json.dumps({"prompt": {"text": [ASK]}})), chat=chat)
    assert row == {"prompt": "[user]w1[/][assistant]", "messages": [ASK]}


PARTS = "{% for part in m.content if part.type == 'text' %}{{ part.text }}{{ '\n' }}{% endfor %}"
BOTH = f"{{% if m.content is string %}}{{{{ m.content }}}}{{% else %}}{PARTS}{{% endif %}}"


def test_text_goes_as_a_part_to_a_template_that_takes_parts_alone() -> None:
    tokenizer = chat_tokenizer(first=False)
    tokenizer.chat_template = f"{{% for m in messages %}}[{{{{ m.role }}}}]{PARTS}{{% endfor %}}[assistant]"
    assert chat_template("tiny", lambda: tokenizer)([ASK]) == "[user]w1\n[assistant]"


@pytest.mark.parametrize(
    ("content", "written"),
    [
        pytest.param("{{ m.content }}", "w1w 2", id="texts, parts as Python writes them"),
        pytest.param("{{ '' + m.content }}", "w1w 2", id="texts, parts are an error"),
        pytest.param("{% if m.content is string %}{{ m.content }}{% endif %}", "w1w 2", id="texts alone"),
        pytest.param("{{ m.content | trim }}", "w1w 2", id="texts, trimmed"),
        pytest.param(PARTS, "w1\nw 2\n", id="parts alone"),
        pytest.param(BOTH, "w1\nw 2\n", id="both"),
    ],
)
def test_text_in_parts_is_written_as_the_template_takes_it(content: str, written: str) -> None:
    tokenizer = chat_tokenizer(first=False)
    tokenizer.chat_template = (
        f"{{{{ bos_token }}}}{{% for m in messages %}}[{{{{ m.role }}}}]{content}{{% endfor %}}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    chat = chat_template("tiny", lambda: tokenizer)
    parts = [{"type": "text", "text": "w1"}, {"type": "text", "text": "w 2"}]
    ask, answer = ({"role": role, "content": parts} for role in ("user", "assistant"))
    row, reason = with_prompt({}, [ask], chat)
    assert (row, reason) == ({"prompt": f"[user]{written}[assistant]", "messages": [ask]}, "")
    begun = with_prompt({}, [ask, answer], chat)[0]["prompt"]
    assert begun == f"[user]{written}[assistant]{written.rstrip()}", "an answer to go on with"


def test_token_that_opens_a_turn_stays_and_what_opens_every_text_goes() -> None:
    for first in (True, False):  # by the tokenizer itself, or by the policy's prefix
        rendered = chat_template("tiny", lambda first=first: chat_tokenizer(first=first))([ASK])
        assert rendered == "[user]w1[/][assistant]"
    turns = chat_tokenizer(first=False)
    turns.bos_token = "w9"  # as SmolLM2's, whose documents open with another token
    assert chat_template("tiny", lambda: turns)([ASK]) == "w9[user]w1[/][assistant]"


def test_messages_without_a_template_are_refused_and_texts_need_none(tmp_path: Path) -> None:
    asked: list[int] = []

    def tokenizer() -> Any:
        asked.append(1)
        return word_tokenizer()

    chat = chat_template("tiny", tokenizer)
    texts = write(tmp_path / "t.jsonl", '{"prompt": "x"}')
    assert rows(texts, chat=chat) == [{"prompt": "x"}]
    assert not asked, "a tokenizer was loaded for texts"
    file = write(tmp_path / "m.jsonl", json.dumps({"messages": [ASK]}))
    message = refusal(file, chat=chat)
    assert "the tokenizer of tiny has no chat template" in message
    assert "no chat template" in refusal(file)


# --- Training and held out -----------------------------------------------------------------------


def test_split_is_disjoint_whole_and_does_not_depend_on_the_order() -> None:
    every = [{"prompt": f"prompt {i}"} for i in range(50)]
    train, held_out = split(every, 7)
    assert (len(train), len(held_out)) == (43, 7)
    assert sorted(r["prompt"] for r in train + held_out) == sorted(r["prompt"] for r in every)
    assert split(every[::-1], 7) == (train, held_out)


def test_prompts_held_out_stay_held_out_when_others_are_added() -> None:
    every = [{"prompt": f"prompt {i}"} for i in range(50)]
    _, held_out = split(every, 10)
    _, fewer = split([r for r in every if r not in held_out[:5]], 5)
    assert fewer == held_out[5:]


def test_another_seed_is_another_split_and_0_the_first_one() -> None:
    every = [{"prompt": f"prompt {i}"} for i in range(50)]
    # Runs are compared on the prompts that were held out at first: those of the lowest hashes.
    by_hash = sorted(every, key=lambda row: hashlib.sha256(row["prompt"].encode()).digest())
    assert split(every, 10, seed=0) == split(every, 10) == (by_hash[10:], by_hash[:10])
    assert split(every, 10, seed=1) == split(every, 10, seed=1) != split(every, 10)
    assert len(split(every, 10, seed=2)[1]) == 10


@pytest.mark.parametrize(("rows", "held_out"), [(1, 1), (2, 1), (9, 1), (40, 4), (1999, 199), (5000, 200)])
def test_a_tenth_is_held_out_unless_said_otherwise(rows: int, held_out: int) -> None:
    assert len(split([{"prompt": str(i)} for i in range(rows)])[1]) == held_out


OWN = ([{"prompt": f"own {i}"} for i in range(6)], [{"prompt": f"held {i}"} for i in range(4)])


def choose(
    prompts: list[str | Row] | None = None, held_out: list[str | Row] | None = None, **settings: Any
) -> tuple[list[str], list[str], str]:
    """(training prompts, held-out prompts, what was said); Config's own prompts and held_out: set_*."""
    config = Config(**{name.removeprefix("set_"): value for name, value in settings.items()})
    chat = chat_template("tiny", word_tokenizer)
    chosen = choose_prompts(config, lambda: OWN, chat, prompts, held_out)
    return (
        [r["prompt"] for r in chosen.train],
        [r["prompt"] for r in chosen.held_out],
        "; ".join(chosen.notes),
    )


def test_tasks_own_prompts_stay_as_the_task_splits_them() -> None:
    train, held_out = ([row["prompt"] for row in part] for part in OWN)
    assert choose() == (train, held_out, "")
    moved = choose(set_held_out="3")
    assert len(moved[1]) == 3 and sorted(moved[0] + moved[1]) == sorted(train + held_out)
    assert len(choose(split_seed=5)[1]) == 4 and choose(split_seed=5)[1] != held_out


def test_development_prompts_are_taken_from_those_to_train_on_and_leave_the_test_alone(
    tmp_path: Path,
) -> None:
    file = str(write(tmp_path / "p.txt", *(f"prompt {i}" for i in range(100))))
    whole, test, _ = choose(set_prompts=file)
    train, development, about = choose(set_prompts=file, evaluate_on="development")
    assert len(test) == len(development) == 10 and sorted(train + development) == sorted(whole)
    assert not set(development) & set(test)
    assert "10 development prompts; the 10 test prompts stay unseen" in about
    # A quarter at most, whoever names the test prompts; a limit keeps of what is trained on.
    limited = choose(set_prompts=file, held_out=test * 9, evaluate_on="development", prompt_limit=7)
    assert len(limited[1]) == 90 // 4 and len(limited[0]) == 7
    # Of prompts that stand there several times the different ones count.
    copies = [f"prompt {i}" for i in range(10)] * 4
    train, development, _ = choose(copies, [f"other {i}" for i in range(12)], evaluate_on="development")
    assert (len(set(train)), len(development), len(train)) == (8, 2, 32)
    for few in (["a"], ["a", "a"]):
        with pytest.raises(UsageError, match="1 training prompts are too few"):
            choose(few, ["b"], evaluate_on="development")


def test_no_copy_of_a_held_out_prompt_is_trained_on() -> None:
    train, test, _ = choose(prompts=[f"prompt {i}" for i in range(30)] * 4)
    assert len(test) == len(set(test)) == 3, "a tenth of the different ones, each once"
    assert len(train) == 27 * 4 and not set(train) & set(test)
    assert choose(prompts=[f"prompt {i}" for i in range(30)])[1] == test, "the same as without copies"


def test_held_out_prompts_are_never_trained_on(tmp_path: Path) -> None:
    train = str(write(tmp_path / "train.txt", "a", "b", "c", "a", "d"))
    held_out = str(write(tmp_path / "held.txt", "c", "x", "d", "own 2"))
    kept, held, about = choose(set_prompts=train, set_held_out=held_out)
    assert (kept, held) == (["a", "b"], ["c", "x", "d", "own 2"])
    assert about == (
        f"{train}: 5 read, left out: 1 duplicate; {held_out}: 4 read;"
        " 2 left out of training, as they are held out, too"
    )
    # Also from the task's own prompts.
    kept, _, about = choose(set_held_out=held_out)
    assert "own 2" not in kept and len(kept) == 5 and "1 left out of training" in about
    with pytest.raises(UsageError, match="all 4 training prompts are held out, too; give others by --held"):
        choose(set_prompts=train, set_held_out=train)


def test_settings_of_a_file_reach_its_prompts(tmp_path: Path) -> None:
    file = str(write(tmp_path / "p.txt", "a", *(f"prompt {i}" for i in range(20)), "a much longer prompt"))
    limits = {"min_prompt_characters": 2, "max_prompt_characters": 9}
    train, held_out, about = choose(set_prompts=file, **limits)
    assert sorted(train + held_out) == sorted(f"prompt {i}" for i in range(20))
    assert "22 read, left out: 1 shorter than 2 characters, 1 longer than 9 characters" in about
    other = choose(set_prompts=file, **limits, split_seed=3)[1]
    assert len(other) == len(held_out) and other != held_out


def test_number_of_held_out_prompts_and_limit_of_training_ones(tmp_path: Path) -> None:
    file = str(write(tmp_path / "p.txt", *(f"prompt {i}" for i in range(30))))
    every, held_out, _ = choose(set_prompts=file, set_held_out="12")
    assert (len(every), len(held_out)) == (18, 12)
    fewer, same, about = choose(set_prompts=file, set_held_out="12", prompt_limit=5)
    assert same == held_out and len(fewer) == 5
    assert "5 of 18 to train on by prompt_limit" in about
    more, _, _ = choose(set_prompts=file, set_held_out="12", prompt_limit=9)
    assert [r for r in more if r in fewer] == fewer, "a smaller limit is a part of a larger one"
    assert choose(set_prompts=file, set_held_out="12", prompt_limit=18)[0] == every
    in_order = choose(set_prompts=file, prompt_limit=5, held_out=["other"])[0]
    assert len(in_order) == 5
    assert in_order == sorted(in_order, key=lambda prompt: int(prompt.split()[1])), "the file's order"
    with pytest.raises(UsageError, match="too few to hold 30 out; give more, or a lower --held-out"):
        choose(set_prompts=file, set_held_out="30")


def test_prompts_of_a_program_are_taken_as_they_are_or_refused() -> None:
    assert choose(prompts=["a", {"prompt": "a", "n": 1}], held_out=["a"])[:2] == (["a", "a"], ["a"])
    for bad, reason in (
        ("  ", "is empty"),
        ({"text": "a"}, "has no column 'prompt' or 'messages', but 'text'; name the prompts'"),
        ({"prompt": None}, "is without a prompt"),
        ({"prompt": 5}, "is not text"),
    ):
        with pytest.raises(UsageError, match=rf"prompts\[1\] {reason}"):
            choose(prompts=["fine", bad], held_out=["x"])
    with pytest.raises(UsageError, match="no chat template"):
        choose(prompts=[{"prompt": [ASK]}], held_out=["x"])


def test_prompts_of_a_program_stand_where_those_of_a_file_do(chat: Any) -> None:
    rows: list[Any] = [{"prompt": "a", "question": "b"}, {"prompt": "c", "question": "d"}]
    assert choose(rows, ["x"], prompt_column="question")[:2] == (["b", "d"], ["x"])
    with pytest.raises(UsageError, match=r"prompts.0. has no column 'quest', but 'prompt', 'question';"):
        choose(rows, ["x"], prompt_column="quest")
    talk = [{"messages": [ASK, ANSWER]}]  # whose closing answer is no part of the prompt
    chosen = choose_prompts(Config(), lambda: ([], []), chat, talk, held_out=["x"])
    assert chosen.train == [{"prompt": "[user]w1[/][assistant]", "messages": [ASK]}]


@pytest.mark.parametrize(
    "table",
    [
        {"train": [{"prompt": "a"}], "test": [{"prompt": "b"}]},  # a DatasetDict is a dict, too
        pyarrow.table({"prompt": ["a", "b"], "n": [1, 2]}).to_pandas(),
        5,
    ],
    ids=lambda table: type(table).__name__,
)
def test_names_of_columns_and_splits_are_not_trained_on(table: Any) -> None:
    with pytest.raises(UsageError, match=rf"^prompts is of type {type(table).__name__}; give a list"):
        choose(prompts=table, held_out=["x"])


def test_prompts_of_a_program_may_be_lists_of_messages(chat: Any) -> None:
    def chosen(*prompts: Any) -> Chosen:
        return choose_prompts(Config(), lambda: ([], []), chat, prompts, held_out=[[ASK, ANSWER, ASK]])

    made = chosen([ASK], "w4", {"prompt": [ASK, ANSWER], "n": 1})
    assert made.train == [
        {"prompt": "[user]w1[/][assistant]", "messages": [ASK]},
        {"prompt": "w4"},
        {"prompt": "[user]w1[/][assistant]w2", "messages": [ASK, ANSWER], "n": 1},
    ]
    assert [is_chat(row) for row in made.train] == [True, False, True]
    assert made.held_out[0]["messages"] == [ASK, ANSWER, ASK]
    with pytest.raises(
        UsageError, match=r"^prompts\[1\]: the chat template of tiny refuses .* no system role"
    ):
        chosen("w4", [SYSTEM, ASK])
    for bad in (
        [],
        (ASK,),
        ("w1", "w2"),
        [ASK, "w2"],
        [{"role": "user"}],
        [{"role": "user", "content": 5}],
        [IMAGE],
        5,
    ):
        with pytest.raises(UsageError, match=r"^prompts\[1\] is [a-z ]+: ") as refused:
            chosen("w4", bad)
        assert "\n" not in str(refused.value)


# --- templates that write the date ----------------------------------------------------------------


def test_chats_are_split_and_identified_by_what_was_given_and_not_by_the_date() -> None:
    chats = [[{"role": "user", "content": f"question {i}?"}] for i in range(40)]

    def on(date: str) -> Chosen:
        def render(messages: list[dict[str, Any]]) -> str:
            return f"Today is {date}. " + " ".join(m["content"] for m in messages) + " Answer:"

        return choose_prompts(
            Config(), lambda: ([], []), render, prompts=[{"prompt": chat} for chat in chats]
        )

    today, tomorrow = on("28 Nov"), on("29 Nov")
    assert [row["messages"] for row in today.held_out] == [row["messages"] for row in tomorrow.held_out]
    assert digest(today.train) == digest(tomorrow.train)
    assert today.train[0]["prompt"] != tomorrow.train[0]["prompt"]
    again = as_rendered(tomorrow.train, [*today.train, *today.held_out])
    assert [row["prompt"] for row in again] == [row["prompt"] for row in today.train]
    assert all(is_chat(row) for row in again)


def test_digest_of_texts_is_that_of_earlier_versions() -> None:
    rows = [{"prompt": "a"}, {"prompt": "b", "messages": [{"role": "user", "content": "beside"}]}]
    assert digest(rows) == hashlib.sha256(json.dumps(["a", "b"]).encode()).hexdigest()


def test_prompt_of_a_program_that_is_trained_on_and_held_out_is_told() -> None:
    *_, said = choose(["a", "b", "c"], ["c", "d"])
    assert said == "held out and trained on, as the program gives them, so no test: 1 prompts"
    for train, test in (([], ["x"]), (["x"], [])):
        with pytest.raises(UsageError, match="an empty list; give prompts, or leave it out"):
            choose(train, test)


def test_records_of_a_dataframe_may_hold_messages_in_arrays_and_names_that_are_numbers(chat: Any) -> None:
    """``df.to_dict("records")`` of a Parquet file."""
    talk = np.array([ASK, ANSWER, ASK], dtype=object)
    for row in ({"messages": talk, 7: 1}, {"prompt": talk, 7: 1}):
        (train,) = choose_prompts(Config(), lambda: ([], []), chat, [row], held_out=["x"]).train
        assert train["messages"] == [ASK, ANSWER, ASK] and train["7"] == 1
    with pytest.raises(UsageError, match=r"has no column 'prompt' or 'messages', but '7'"):
        choose([{7: "a"}], ["x"])


def test_chats_of_a_runs_file_are_written_by_the_template_of_the_model_that_gets_them(
    tmp_path: Path,
) -> None:
    talks = [[ASK], [ASK, ANSWER, ASK]]
    ours, theirs = (lambda talk, mark=mark: mark + json.dumps(talk) for mark in "AB")
    made = choose_prompts(Config(), lambda: ([], []), ours, talks, held_out=["x"]).train
    file = tmp_path / "held_out.jsonl"
    file.write_text("".join(json.dumps(to_file(row)) + "\n" for row in made))
    again = load_prompts(str(file), chat=theirs).rows
    assert [row["prompt"] for row in again] == [theirs(talk) for talk in talks]
    assert [row["messages"] for row in again] == talks


def test_images_and_sounds_of_a_data_set_are_their_bytes_as_those_of_a_file(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    stored = {"bytes": b"\x89PNG", "path": None}
    columns = {"prompt": ["a", "b"], "shown": [stored, stored], "heard": [[stored], []]}
    image = datasets.Image()
    features = {"prompt": datasets.Value("string"), "shown": image, "heard": datasets.List(image)}
    data = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    data.save_to_disk(tmp_path / "data")
    data.to_parquet(tmp_path / "data.parquet")
    found = load_prompts(f"hf:{tmp_path}/data").rows
    assert found[0]["shown"] == found[0]["heard"][0] == {"bytes": "iVBORw==", "path": None}
    assert found[0]["shown"] == load_prompts(str(tmp_path / "data.parquet")).rows[0]["shown"]
    if hasattr(datasets, "Json"):
        mixed = datasets.Features({"prompt": datasets.Value("string"), "mixed": datasets.Json()})
        values = [{"a": 1}, ["b", 2.5]]
        datasets.Dataset.from_dict({"prompt": ["a", "b"], "mixed": values}, features=mixed).save_to_disk(
            tmp_path / "mixed"
        )
        assert [row["mixed"] for row in load_prompts(f"hf:{tmp_path}/mixed").rows] == values
    # No library is needed for what is not looked at.
    data.cast_column("shown", datasets.Audio()).save_to_disk(tmp_path / "sounds")
    assert load_prompts(f"hf:{tmp_path}/sounds").rows == found


def test_saved_format_of_a_data_set_does_not_change_its_columns(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"prompt": ["a", "b"], "label": [3, 4], "weight": [0.5, 1.5]})
    data.with_format("torch").save_to_disk(tmp_path / "data")
    assert [(row["label"], row["weight"]) for row in rows(f"hf:{tmp_path / 'data'}")] == [(3, 0.5), (4, 1.5)]
