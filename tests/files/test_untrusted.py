"""What nobody vetted: no text of it steers a terminal, and no part of the package gives it power."""

from __future__ import annotations

import ast
import gzip
import hashlib
import io
import json
import sqlite3
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from quark_fast import train
from quark_fast.config import Config
from quark_fast.errors import UsageError
from quark_fast.evaluation.side_by_side import Evaluator
from quark_fast.files import atomic
from quark_fast.files.safe_read import TooLarge, read_bytes, too_deep
from quark_fast.files.safe_text import clean
from quark_fast.pool.pool import RolloutPool
from quark_fast.report.files import read_run
from quark_fast.report.page import render_html
from quark_fast.report.results import after_names, headline
from quark_fast.report.tables import before_after, markdown_table, results_table
from quark_fast.rewards.by_name import refuse_code_of
from quark_fast.rewards.cache import RewardCache
from quark_fast.runtime.checkpoint_files import CHECKSUMS, load_checkpoint, save_checkpoint
from quark_fast.runtime.console import Terminal
from quark_fast.runtime.run_folder import COMPLETIONS, METRICS, RunFolder
from quark_fast.terminal import exit_status
from quark_fast.training.display import Display
from quark_fast.training.progress import Progress as Event
from quark_fast.training.progress import Texts
from quark_fast.training.trainer import Trainer

HOSTILE = "a\x1b[31mred\x1b[0m\x1b]0;title\x07b\x1b[2J\x9b1mc\x1bcd\r\u202e\ud800[link=http://x]e[/link][/x]"
HARMLESS = "aredbcd[link=http://x]e[/link][/x]"


# --- text ----------------------------------------------------------------------------------------


def test_terminal_escape_sequences_go_whole() -> None:
    assert clean(HOSTILE) == HARMLESS


def test_control_bidirectional_and_broken_characters_go_and_real_text_stays() -> None:
    assert clean("a\x00\x07\x08\rb\u202ec\u200bd\ud800e\x1b") == "abcde"
    assert clean("naïve 東京 🙂\n\tend") == "naïve 東京 🙂\n\tend"


@given(st.text(st.sampled_from("\x1b\x9b\x9d\x90\x07\x9c\\[]0;mJP \r\n\u202eab"), max_size=30))
def test_no_sequence_is_left_or_made_by_what_is_taken_out(text: str) -> None:
    cleaned = clean(text)
    assert clean(cleaned) == cleaned
    assert not set(cleaned) & set("\x1b\x9b\x9d\x90\x07\x9c\r\u202e")


def terminal(width: int = 200) -> tuple[Terminal, io.StringIO]:
    file = io.StringIO()
    return Terminal(file=file, width=width, force_terminal=True, color_system=None), file


def no_sequence(shown: str) -> bool:
    """Whether the terminal is steered by nobody but rich: its own codes move the cursor of a bar."""
    for code in ("\x1b[?25l", "\x1b[?25h", "\x1b[2K", "\x1b[1A", "\r"):
        shown = shown.replace(code, "")
    return not set(shown) & set("\x1b\x9b\x07\r\u202e\ud800") and "title" not in shown


def test_tables_titles_headers_and_plain_lines_obey_no_markup_and_no_escape_code() -> None:
    console, file = terminal()
    table = Table(title=HOSTILE)
    table.add_column(HOSTILE)
    table.add_row(HOSTILE)
    table.add_row(Text(HOSTILE))
    console.print(HOSTILE)
    console.print(table)
    assert file.getvalue().count(HARMLESS) == 4
    assert no_sequence(file.getvalue())


def test_progress_lines_obey_no_markup_and_no_escape_code() -> None:
    console, file = terminal()
    display = Display(console)
    with display.live:
        display(Event(HOSTILE, 1, 2, {HOSTILE: 0.5}, texts=Texts(HOSTILE, HOSTILE, HOSTILE)))
        display(Event(HOSTILE, 2, 2, {HOSTILE: 0.5}))
    with Progress(console=console) as bar:
        bar.add_task("b", total=1)
    assert f"{HARMLESS}: {HARMLESS} 0.5" in file.getvalue()
    assert no_sequence(file.getvalue())


def test_errors_and_stops_of_a_command_steer_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse() -> None:
        raise UsageError(f"prompts {HOSTILE}: not there")

    def stop() -> None:
        raise KeyboardInterrupt(HOSTILE)

    assert (exit_status(refuse), exit_status(stop)) == (2, 130)
    assert capsys.readouterr().err == f"error: prompts {HARMLESS}: not there\n{HARMLESS}\n"


# --- files ---------------------------------------------------------------------------------------


def test_half_a_character_is_written_as_json_spells_it_and_comes_back(tmp_path: Path) -> None:
    # Rows of a file of prompts keep their other columns, which may hold what UTF-8 cannot.
    row = {"prompt": "a", "note\udfff": ["\ud800", "é"]}
    folder = RunFolder(tmp_path)
    folder.append("rows.jsonl", [row])
    folder.write_json("value.json", row)
    assert json.loads((tmp_path / "rows.jsonl").read_text(encoding="utf-8")) == row
    assert json.loads((tmp_path / "value.json").read_text(encoding="utf-8")) == row
    assert "é" in (tmp_path / "rows.jsonl").read_text(encoding="utf-8")


def test_what_a_kill_leaves_of_a_first_config_is_in_no_new_runs_way(tmp_path: Path) -> None:
    with atomic.replacing(tmp_path / "config.yaml") as scratch:
        scratch.write_text("task: toxicity\n")
        left = [path.name for path in tmp_path.iterdir()]
    (tmp_path / "config.yaml").unlink()
    (tmp_path / left[0]).touch()  # as if the process had been killed
    (tmp_path / f".{left[0]}.mode.tmp").touch()
    RunFolder(tmp_path).check_free()
    (tmp_path / "notes.tmp").touch()
    with pytest.raises(UsageError, match="exists and is no run"):
        RunFolder(tmp_path).check_free()


def test_file_is_read_whole_up_to_the_limit_and_not_beyond(tmp_path: Path) -> None:
    for name, write in (("plain", Path.write_bytes), ("packed.gz", _pack)):
        write(tmp_path / name, b"12345")
        assert read_bytes(tmp_path / name, limit=5) == b"12345"
        with pytest.raises(TooLarge, match="more than 4 bytes"):
            read_bytes(tmp_path / name, limit=4)


def _pack(path: Path, content: bytes) -> None:
    path.write_bytes(gzip.compress(content))


def test_depth_counts_lists_and_objects_within_one_another() -> None:
    assert not too_deep("text", 0) and not too_deep({}, 1) and too_deep([], 0)
    assert not too_deep([{"a": [1]}, []], 3) and too_deep([{"a": [1]}, []], 2)
    shared: list[Any] = []
    for _ in range(99):
        shared = [shared]
    assert not too_deep(shared) and too_deep([shared])


def test_checkpoint_that_names_other_files_to_cut_is_refused_and_cuts_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("untouched")
    folder = RunFolder(tmp_path / "run")
    folder.create()
    folder.append(METRICS, [{"a": 1}])
    save_checkpoint(folder, {"step": 1}, {"model": {"w": torch.zeros(2)}})
    state = folder / "checkpoint" / "state.json"
    sound = json.loads(state.read_text())
    sums = folder / "checkpoint" / CHECKSUMS
    known = json.loads(sums.read_text())

    def plant(sizes: dict[str, Any]) -> None:
        planted = json.dumps(sound | {"sizes": sizes}).encode()
        state.write_bytes(planted)
        sums.write_text(json.dumps(known | {"state.json": hashlib.sha256(planted).hexdigest()}))

    for sizes in (
        {"../other.txt": 0},
        {str(other): 3, METRICS: 1},
        {METRICS: -1, COMPLETIONS: 0},
        {METRICS: "1"},
    ):
        plant(sizes)
        with pytest.raises(UsageError, match=r"is damaged .sizes of"):
            load_checkpoint(folder)
        assert other.read_text() == "untouched"
    state.write_text(json.dumps(sound))
    sums.write_text(json.dumps(known))
    assert load_checkpoint(folder) is not None
    # With another to go on from there is a warning: log lines go to the terminal as they are.
    save_checkpoint(folder, {"step": 1}, {"model": {"w": torch.zeros(2)}})
    plant({HOSTILE: 0})
    assert load_checkpoint(folder) is not None
    (warning,) = caplog.messages
    assert HARMLESS.split("[")[0] in warning and no_sequence(warning)


@pytest.mark.parametrize("value", ["much", b"\xff", 10**12, 1e999])
def test_cached_reward_that_is_no_number_is_refused(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "rewards.sqlite"
    cache = RewardCache(path)
    cache.add({b"k": 0.5})
    database = sqlite3.connect(path)
    database.execute("UPDATE rewards SET value = ?", (value,))
    database.commit()
    database.close()
    with pytest.raises(UsageError, match=r"cannot be used .*delete it"):
        cache.find([b"k"])


def test_saved_pool_makes_no_folder_where_it_says(tmp_path: Path) -> None:
    pool = RolloutPool(store=tmp_path / "samples")
    pool.add([[1]], [[2]], [0.5])
    pool.save(tmp_path / "pool.safetensors")
    (tmp_path / "samples").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="samples is not there; name it by store="):
        RolloutPool.load(tmp_path / "pool.safetensors")
    assert not (tmp_path / "samples").exists()
    assert len(RolloutPool.load(tmp_path / "pool.safetensors", store=tmp_path / "moved")) == 1


ODD: list[Any] = [None, True, -1, 1e308, 10**400, "x", [], ["x", 5, [1]], {}, {"name": 3}, {"mean": 5}]


@pytest.mark.parametrize("odd", ODD, ids=lambda value: repr(value)[:20])
def test_report_of_a_run_with_odd_values_says_what_it_leaves_out(tmp_path: Path, odd: Any) -> None:
    number = {"value": 0.5, "low": 0.4, "high": 0.6}
    names = (
        "headline columns more_columns property target task threshold level prompts samples_per_prompt scorer"
    )
    rows = [{"name": "base model", "metrics": {"mean": odd}, "change": odd}, odd]
    rows += [
        {"name": odd, "metrics": odd},
        {"name": "best token", "metrics": {"mean": {**number, "low": odd}}},
    ]
    evaluation = {"rows": rows, "sampling": odd, **dict.fromkeys(names.split(), odd)}
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    metrics = [
        {"kind": "round", "round": 0, "reward_by_quantile": odd, "reward_mean": odd, "thresholds": [odd]}
    ]
    metrics += [{"kind": kind, "step": 1, "loss": odd, "rank_correlation": odd} for kind in ("step", "probe")]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, metrics)))
    texts = [{"row": "base model", "prompt_id": odd, "prompt": odd, "completion": odd, "score": 0.5}]
    (tmp_path / "evaluation.jsonl").write_text(json.dumps(texts[0]))
    (tmp_path / "completions.jsonl").mkdir()
    run = read_run(tmp_path)
    lost = [name for name, kind in KINDS.items() if odd is not None and not isinstance(odd, kind)]
    lost += ["headline"] if odd == "x" else []  # a text, but no measure
    assert [line for line in run.missing if line.startswith("evaluation.json ")] == (
        [f"evaluation.json holds no sound {', '.join(sorted(lost))}, so these are not shown"] if lost else []
    )
    assert (
        "completions.jsonl cannot be read (Is a directory), so the sampled texts are not shown" in run.missing
    )
    console, file = terminal()
    console.print(results_table(run.evaluation), before_after(run.evaluation_rows))
    page = render_html(run)
    for shown in (file.getvalue(), markdown_table(run.evaluation), page):
        assert "best token" in shown and ".500" in shown, "what is sound beside it"
    assert ".500" in headline(run.evaluation) and after_names(run.evaluation) == ["best token"]
    for line in run.missing:
        assert line in unescape(page)


# What an evaluation holds under these names.
KINDS = {
    **dict.fromkeys(("columns", "more_columns"), list),
    **dict.fromkeys(("headline", "property", "target", "task"), str),
    **dict.fromkeys(("scorer", "sampling"), dict),
    **dict.fromkeys(("prompts", "samples_per_prompt"), int),
}


def test_cell_of_a_markdown_table_breaks_no_row() -> None:
    planted = "a|b\nc\x1b[2J"
    evaluation = {"property": planted, "rows": [{"name": planted, "metrics": {}, "change": None}]}
    lines = markdown_table(evaluation).splitlines()
    assert len(lines) == 3 and len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert "a\\|b c" in lines[2]


@pytest.mark.parametrize("spec", ["{}", "1 - {}", "0.5*vader_like + 0.5*{}", "2*{} + hf:there"])
@pytest.mark.parametrize("own", ["runs.theirs.payload:score", "runs.theirs:score", "linked.payload:score"])
def test_run_folder_brings_no_code_that_its_settings_have_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, own: str
) -> None:
    monkeypatch.syspath_prepend(tmp_path)  # as `python -m` does with the folder that it is called in
    folder = tmp_path / "runs" / "theirs"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text("{}")
    (tmp_path / "linked").symlink_to(folder)
    for name in ("__init__", "payload"):
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nscore = len\n")
    settings = Config(reward=spec.format(own), output=str(folder), resume=True)
    settings.save(folder / "config.yaml")
    for go_on in (lambda: Evaluator([folder]), lambda: Trainer(settings)):
        with pytest.raises(UsageError, match=r"is code in .*theirs, the run folder that names it"):
            go_on()
    assert not (tmp_path / "ran").exists()


def test_help_says_that_a_function_is_code_that_is_run() -> None:
    told = {name: field.metadata["help"] for name, field in Config.__dataclass_fields__.items()}
    assert "this imports and runs its code" in told["reward"]
    assert "run the Python code" in told["trust_remote_code"]


def test_run_folder_may_name_code_that_lies_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "theirs").mkdir()
    for spec in (None, "toxicity", "hf:theirs", "mine:score", "1 - theirs_too.payload:score"):
        refuse_code_of(tmp_path / "theirs", spec)


def test_run_folder_that_python_looks_in_brings_no_code_where_it_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder that a command is called in, which Python looks in first."""
    monkeypatch.syspath_prepend(tmp_path)
    refuse_code_of(tmp_path, "mine:score")
    (tmp_path / "mine.py").touch()
    with pytest.raises(UsageError, match="is code in"):
        refuse_code_of(tmp_path, "mine:score")
    (tmp_path / "mine.py").rename(tmp_path / "mine.cpython-311-x86_64-linux-gnu.so")
    with pytest.raises(UsageError, match="is code in"):
        refuse_code_of(tmp_path, "mine.deeper:score")


# --- the package ---------------------------------------------------------------------------------

PACKAGE = Path(train.__file__).parent
# What can run code that a file holds, and the one place for each where that is meant.
FORBIDDEN: dict[str, set[str]] = {
    "pickle": {"assets"},  # through an allow-list
    "import_module": {"by_name", "__init__"},  # --reward module:function; the package's own, when used
    "subprocess": {"assets"},  # pip
}
FORBIDDEN |= {
    name: set()
    for name in [
        "dill",
        "joblib",
        "cloudpickle",
        "marshal",
        "shelve",
        "cPickle",
        "runpy",
        "pty",
        "code",
        "exec",
        "exec_module",
        "__import__",
        "system",
        "popen",
        "unsafe_load",
        "full_load",
        "UnsafeLoader",
        "read_pickle",
        "extractall",
        "extract",
        "unpack_archive",
        "mktemp",
    ]
}


def names_in(tree: ast.AST) -> set[str]:
    """Modules imported and functions called, by the last part of their names."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {part for alias in node.names for part in alias.name.split(".")}
        elif isinstance(node, ast.ImportFrom):
            found |= {*str(node.module).split("."), *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Call):
            found.add(getattr(node.func, "attr", getattr(node.func, "id", "")))
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_nothing_but_what_is_meant_can_run_code_out_of_a_file(path: Path) -> None:
    tree = ast.parse(path.read_text())
    for name in names_in(tree) & FORBIDDEN.keys():
        assert path.stem in FORBIDDEN[name], f"{path.name} uses {name}"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given_by_name = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert called not in ("eval", "compile"), f"{path.name} calls {called}"
        assert called not in ("torch.load", "np.load", "numpy.load", "yaml.load"), f"{path.name}: {called}"
        for option in ("allow_pickle", "shell"):
            assert given_by_name.get(option, "False") == "False", f"{path.name} passes {option}"
