"""Who hears of a run, and what ``train`` returns."""

from __future__ import annotations

import errno
import io
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from tiny_runs import PROMPTS, SHORT, even_words, rows, small, timeless
from transformers import PreTrainedModel, TrainerCallback

from quark_fast.config import Config
from quark_fast.errors import UsageError
from quark_fast.rewards.reward import describe
from quark_fast.rollout.transformers import sample
from quark_fast.runtime.console import Terminal
from quark_fast.training.display import Display
from quark_fast.training.progress import Progress
from quark_fast.training.run_log import RunLog
from quark_fast.training.trainer import Trainer

GIVEN: dict[str, Any] = {"reward": even_words, "prompts": PROMPTS, "held_out": PROMPTS[:4]}
TWO_ROUNDS = SHORT | {"rounds": 2, "steps": 3, "explore_samples": 2}


def test_every_listener_hears_the_progress_and_every_callback_the_rows_of_the_metrics(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    heard: list[Progress] = []
    also: list[Progress] = []
    told: list[dict[str, Any]] = []
    config = small(tmp_path / "run", tiny_model(), **TWO_ROUNDS)
    listen = [heard.append, also.append]
    run = Trainer(config, listen=listen, callbacks=[told.append], **GIVEN).train()
    assert heard == also and {"probing", "round 2/2: sampling"} <= {event.stage for event in heard}
    assert told == rows(run.folder / "metrics.jsonl")
    assert {row["kind"] for row in told} == {"step", "round", "probe"}


def test_what_a_probe_says_of_the_tokens_is_told_with_it(
    tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quark_fast.training.results.noise_note", lambda found, kl: f"{found.value} {kl}")
    heard: list[Progress] = []
    run = Trainer(small(tmp_path / "run", tiny_model(), **SHORT), listen=heard.append, **GIVEN).train()
    (row,) = rows(run.folder / "metrics.jsonl", kind="probe")
    (note,) = (event.note for event in heard if event.stage == "probing" and event.finished)
    assert note == f"{row['rank_correlation']} {row['kl']}"


@pytest.mark.parametrize("what", ["callback", "listener"])
def test_file_of_a_callback_is_not_the_run_folders(
    tmp_path: Path, tiny_model: Callable[..., Path], what: str
) -> None:
    def write(_: object) -> None:
        raise PermissionError(13, "Permission denied", "elsewhere.csv")

    given = {"callbacks": write} if what == "callback" else {"listen": write}
    with pytest.raises(UsageError) as caught:
        Trainer(small(tmp_path / "run", tiny_model(), **SHORT), **({"listen": None} | given), **GIVEN).train()
    assert str(caught.value).startswith(f"the {what} write raised PermissionError: ")
    assert "elsewhere.csv" in str(caught.value) and caught.value.exit_status == 2


def test_terminal_that_is_closed_ends_no_run() -> None:
    class Closed(io.StringIO):
        errno = errno.EIO

        def write(self, text: str) -> int:
            raise OSError(self.errno, os.strerror(self.errno))

    file = Closed()
    console = Terminal(file=file, force_terminal=True)
    display = Display(console)
    with display.shown():
        display(Progress("sampling", 1, 2))
        display(Progress("sampling", 2, 2))
    console.print("the end")
    file.errno = errno.ENOSPC
    with pytest.raises(OSError, match="No space left"):
        console.print("what a full disk does not hold")
    file.errno = errno.EIO


def test_reader_that_goes_away_ends_no_run() -> None:
    reader, writer = os.pipe()
    file = os.fdopen(writer, "w")
    console = Terminal(file=file)
    console.print("read")
    os.close(reader)
    console.print("not read")
    console.print("nor this")
    assert not console.quiet, "what the program does by that stays as it was"
    file.write("what Python flushes when it ends")
    file.close()


def test_callback_that_changes_its_row_changes_nothing_of_the_run(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    model = tiny_model()
    for name, callbacks in (("run", dict.clear), ("other", ())):
        config = small(tmp_path / name, model, **TWO_ROUNDS)
        Trainer(config, listen=None, callbacks=callbacks, **GIVEN).train()
    assert timeless(tmp_path / "run" / "metrics.jsonl") == timeless(tmp_path / "other" / "metrics.jsonl")


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"callbacks": [print, 1]}, "callbacks: 1 is no function"),
        (
            {"callbacks": [TrainerCallback]},
            "callbacks: <class .*TrainerCallback'> is no function",
        ),
        ({"listen": "print"}, "listen: 'print' is no function"),
        ({"listen": 5}, "listen: 5 is no function"),
    ],
)
def test_what_cannot_be_called_is_no_listener(
    tmp_path: Path, tiny_model: Callable[..., Path], given: dict[str, Any], named: str
) -> None:
    with pytest.raises(UsageError, match=named):
        Trainer(small(tmp_path / "run", tiny_model(), **SHORT), **given, **GIVEN)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"reward_funcs": even_words}, "no argument 'reward_funcs'; did you mean 'reward'"),
        ({"eval_dataset": PROMPTS}, "no argument 'eval_dataset'; did you mean 'held_out'"),
        ({"model": "gpt2"}, r"no argument 'model'; a run is Trainer\(Config\(model=..., output=...\)"),
        ({"config": "gpt2"}, r"config is of type str; a run is Trainer\(Config\("),
        ({"config": Config(), "held_out": 0.1}, r"held_out = 0.1; give at least 1 and at most .*, or a file"),
    ],
)
def test_arguments_of_another_trainer_are_refused_with_what_stands_for_them(
    given: dict[str, Any], named: str
) -> None:
    with pytest.raises(UsageError, match=named):
        Trainer(**given)


def test_trainer_is_one_run(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    trainer = Trainer(small(tmp_path / "run", tiny_model(), **SHORT), listen=None, **GIVEN)
    trainer.train()
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    with pytest.raises(UsageError, match=r"train\(\) was called before, .* another output, or with resume"):
        trainer.train()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before


def test_texts_of_a_round_stand_beside_what_the_base_model_wrote_for_the_same_prompt(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    heard: list[Progress] = []
    config = small(tmp_path / "run", tiny_model(), sample_batch=16, **TWO_ROUNDS)
    run = Trainer(config, listen=heard.append, **GIVEN).train()
    made = rows(run.folder / "completions.jsonl")
    wrote = {(row["round"], row["prompt"], row["completion"]) for row in made}
    first = [event.texts for event in heard if event.stage == "round 1/2: sampling" and event.texts]
    then = [event.texts for event in heard if event.stage == "round 2/2: sampling" and event.texts]
    assert len(first) > 1 and all((0, one.prompt, one.before) in wrote and not one.after for one in first)
    assert len(then) > 1 and len({one.prompt for one in then}) > 1
    for one in then:
        assert (0, one.prompt, one.before) in wrote and (1, one.prompt, one.after) in wrote


def test_trained_run_is_the_path_of_its_folder_and_has_table_and_model(
    tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = Trainer(small(Path("run"), tiny_model(), **SHORT), **GIVEN)
    monkeypatch.chdir("/")
    run = trainer.train()
    assert os.fspath(run) == str(run.folder) == str(tmp_path / "run")
    assert (Path(run) / "report.html").parent == run.folder
    assert [row["name"] for row in run.table["rows"]][:2] == ["base model", "best token"]
    assert isinstance(run.model, PreTrainedModel) and run.model is run.model
    ids = run.tokenizer("w1 w2", return_tensors="pt")
    assert run.model.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] > ids.input_ids.shape[1]
    shown = repr(run)
    assert (
        shown.startswith(f"run folder {run.folder}\n")
        and "best token" in shown
        and max(map(len, shown.splitlines()[1:])) <= 80
        and str(run) == shown
    )


def test_trainer_shows_a_display_by_itself_where_somebody_looks_and_to_nobody_else(
    tmp_path: Path,
    tiny_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    listeners: dict[str, tuple[Any, bool]] = {
        "auto": ("auto", True),
        "none": (None, False),
        "own": (lambda _: None, False),
    }
    model = tiny_model()
    transformers.logging.enable_progress_bar()
    Trainer(small(tmp_path / "unseen", model, **SHORT), **GIVEN).train()
    out, err = capfd.readouterr()
    assert out == err == "", "a program whose output goes to a file"
    assert transformers.logging.is_progress_bar_enabled(), "the program's own"
    monkeypatch.setattr(Terminal, "is_terminal", property(lambda _: True))
    for name, (listen, shows) in listeners.items():
        Trainer(small(tmp_path / name, model, **SHORT), listen=listen, **GIVEN).train()
        out, err = capfd.readouterr()
        assert out == "" and ("round 1/1: learning" in err) == shows, name
        assert timeless(tmp_path / name / "metrics.jsonl") == timeless(tmp_path / "unseen" / "metrics.jsonl")


def test_every_stage_has_its_seconds_on_the_terminal_and_in_the_log_and_the_start_its_own(
    tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=0.0)
    for module in ("progress", "listeners", "trainer"):
        own = SimpleNamespace(monotonic=lambda: clock.now, perf_counter=lambda: clock.now)
        monkeypatch.setattr(f"quark_fast.training.{module}.time", own)

    def slow(prompts: list[str], completions: list[str]) -> list[float]:
        clock.now += 30  # its first call is the check before the run
        return even_words(prompts, completions)

    shown = io.StringIO()
    display = Display(Terminal(file=shown))
    config = small(tmp_path / "run", tiny_model(), **SHORT)
    heard: list[Progress] = []
    trainer = Trainer(config, listen=[display, heard.append], **GIVEN | {"reward": slow})
    assert shown.getvalue() == "" and clock.now == 30
    clock.now += 1000  # the program does something else
    trainer.train()
    first, sampling, *_ = shown.getvalue().splitlines()
    assert first == "start and check  (30 s)"
    seconds = re.fullmatch(r"round 1/1: sampling: reward .*  \((\d+) s\)", sampling)
    assert seconds and 30 <= int(seconds[1]) < 1000
    # The log and every listener have the same seconds.
    logged = [line[20:] for line in (tmp_path / "run" / "run.log").read_text().splitlines()]
    assert "start and check: done (30 s)" in logged
    finished = [event for event in heard if event.finished]
    of_log = [line for line in logged if re.search(r"\(\d+ s\)$", line)]
    assert [line.rpartition("(")[2] for line in of_log] == [f"{one.seconds:.0f} s)" for one in finished]
    assert len(finished) > 3 and f"({seconds[1]} s)" in of_log[1]
    assert all(event.seconds is None for event in heard if not event.finished)


def test_note_of_a_finished_stage_stands_below_its_line_and_one_on_the_way_at_once(tmp_path: Path) -> None:
    shown = io.StringIO()
    display, log = Display(Terminal(file=shown)), RunLog(tmp_path / "run.log")
    for event in (
        Progress("learning", 1, 2, note="one step skipped"),
        Progress("learning", 2, 2, {"loss": 2.5}),
        Progress("measuring", 4, 4, {"reward": 0.5}, "round 1 is the best so far"),
    ):
        display(event)
        log(event)
    expected = [
        "one step skipped",
        "learning: loss 2.5",
        "measuring: reward 0.5",
        "round 1 is the best so far",
    ]
    assert [line.removesuffix("  (0 s)") for line in shown.getvalue().splitlines()] == expected
    assert [line[20:] for line in (tmp_path / "run.log").read_text().splitlines()] == expected


def test_notebook_shows_the_display() -> None:
    console = Terminal(stderr=True, force_jupyter=True)
    assert Display.usual_on(console) and not Display.usual_on(Terminal(stderr=True))


def test_warnings_are_in_the_log_and_still_where_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's
    log, own = RunLog(tmp_path / "run.log"), logging.getLogger("quark_fast.runtime.memory")
    with log.kept(["begins"]):
        own.warning("out of memory:\nfrom here on %d side by side", 4)
        own.info("unimportant")
    own.warning("later")
    lines = [line[20:] for line in (tmp_path / "run.log").read_text().splitlines()]
    assert lines == ["begins", "warning: out of memory: from here on 4 side by side", "finished"]
    shown = capsys.readouterr().err
    assert shown == "out of memory:\nfrom here on 4 side by side\nlater\n", "Python's own way for warnings"
    # Who took warnings of the package, or silenced them, has them no second time.
    taken = logging.NullHandler()
    logging.getLogger("quark_fast").addHandler(taken)
    try:
        with log.kept([]):
            own.warning("taken")
    finally:
        logging.getLogger("quark_fast").removeHandler(taken)
    assert capsys.readouterr().err == ""


def test_traceback_of_foreign_code_is_in_the_log_below_the_line_that_ends_it(tmp_path: Path) -> None:
    def failing(prompts: list[str], completions: list[str]) -> list[float]:
        raise KeyError("no such key")

    log = RunLog(tmp_path / "run.log")
    with pytest.raises(UsageError), log.kept([]):
        describe(failing, "mine")([{"prompt": "a"}], ["b"])
    first, *others = (tmp_path / "run.log").read_text().splitlines()
    assert first[20:].startswith("ended: reward mine raised KeyError at ")
    assert all(line.startswith("    ") for line in others)
    assert others[-1] == "    KeyError: 'no such key'" and any(
        'raise KeyError("no' in line for line in others
    )
    with pytest.raises(UsageError), log.kept([]):
        raise UsageError("a line says all")
    assert (tmp_path / "run.log").read_text().splitlines()[len(others) + 1 :][0].endswith("a line says all")
    with pytest.raises(ZeroDivisionError), log.kept([]):
        1 / 0  # noqa: B018, a bug
    assert (tmp_path / "run.log").read_text().endswith("    ZeroDivisionError: division by zero\n")


def test_full_disk_under_the_log_ends_the_run_in_one_line_as_elsewhere(
    tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: RunLog, text: str) -> None:
        raise OSError(28, "No space left on device")

    trainer = Trainer(small(tmp_path / "run", tiny_model(), **SHORT), sampler=sample, **GIVEN)
    monkeypatch.setattr(RunLog, "write", full)
    with pytest.raises(ValueError, match=r"cannot write to the run folder .*No space left"):
        trainer.train()
