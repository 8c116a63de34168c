"""What a run does about a disk that is full, read-only or damaged, and a second process in its folder."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import WORDS, save_tiny_model
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny_runs import PROMPTS, SHORT, even_words, small, timeless

from quark_fast.config import Config
from quark_fast.errors import OutOfResources, UsageError
from quark_fast.files.atomic import TRIAL, flush, replacing
from quark_fast.model.check_model import check_model
from quark_fast.runtime.checkpoint_files import cut_back, load_checkpoint, save_checkpoint
from quark_fast.runtime.run_folder import RunFolder
from quark_fast.training.progress import Progress
from quark_fast.training.trainer import Trainer

GIVEN: dict[str, Any] = {"reward": even_words, "prompts": PROMPTS, "held_out": PROMPTS[:2]}
FILES = ("metrics.jsonl", "completions.jsonl", "evaluation.jsonl")


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, an undisturbed run "whole", and "stopped", which died after step 5: checkpoints 4 and 2."""
    here = tmp_path_factory.mktemp("disk")
    save_tiny_model(here / "model", "llama")
    Trainer(config(here / "whole"), **GIVEN).train()
    AcceleratorState._reset_state(reset_partial_state=True)

    def die(progress: Progress) -> None:
        if progress.stage.endswith("learning") and progress.done == 5:
            raise Killed

    with pytest.raises(Killed):
        Trainer(config(here / "stopped"), listen=die, **GIVEN).train()
    return here


def config(folder: Path, **settings: Any) -> Config:
    return small(folder, folder.parent / "model", **(SHORT | settings))


@pytest.fixture
def stopped(here: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    folder = here / f"stopped-{abs(hash(request.node.name))}"
    shutil.copytree(here / "stopped", folder, ignore=shutil.ignore_patterns(".lock"))
    yield folder
    shutil.rmtree(folder)


def go_on(folder: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    Trainer(config(folder, resume=True), **GIVEN).train()
    for name in FILES:
        assert timeless(folder / name) == timeless(folder.parent / "whole" / name), name
    assert (folder / "evaluation.json").read_bytes() == (folder.parent / "whole/evaluation.json").read_bytes()
    ours, theirs = (load_file(of / "model" / "model.safetensors") for of in (folder, folder.parent / "whole"))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        # The head's rows for reward tokens, which nothing ever samples, are as transformers fills them.
        rows = WORDS + 2 if name == "lm_head.weight" else len(value)
        assert torch.equal(value[:rows], theirs[name][:rows]), name


# --- a damaged checkpoint ------------------------------------------------------------------------


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "a bit of the weights": lambda folder: flip_a_byte(folder / "model.safetensors"),
    "a digit of the state": lambda folder: flip_a_byte(folder / "state.json"),
    "half of a file": lambda folder: os.truncate(folder / "optimizer.safetensors", 1000),
    "no state": lambda folder: (folder / "state.json").unlink(),
    "no checksums": lambda folder: (folder / "checksums.json").unlink(),
    "a foreign file": lambda folder: (folder / "more.safetensors").write_bytes(b""),
}


def loaded_and_cut_back(folder: Path) -> Any:
    loaded = load_checkpoint(RunFolder(folder))
    cut_back(RunFolder(folder), loaded and loaded[0])
    return loaded


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_noticed_and_the_one_before_it_used(
    stopped: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    DAMAGES[damage](stopped / "checkpoint")
    loaded = loaded_and_cut_back(stopped)
    assert loaded is not None and loaded[0]["step"] == 2
    assert "checkpoint is damaged" in caplog.text and "of step 2" in caplog.text
    steps = [row["step"] for row in timeless(stopped / "metrics.jsonl") if row["kind"] == "step"]
    assert steps == [1, 2], "the rows are cut back to the checkpoint that is used"


def test_run_goes_on_from_the_checkpoint_before_the_damaged_one_to_the_same_end(stopped: Path) -> None:
    flip_a_byte(stopped / "checkpoint" / "optimizer.safetensors")
    go_on(stopped)
    assert not list(stopped.glob("checkpoint*")), "nor is the damaged one kept for ever"


def test_two_damaged_checkpoints_are_an_error_that_names_both(stopped: Path) -> None:
    for name in ("checkpoint", "checkpoint.old"):
        flip_a_byte(stopped / name / "pool.safetensors")
    with pytest.raises(UsageError, match=r"checkpoint is damaged .*; checkpoint.old is damaged"):
        load_checkpoint(RunFolder(stopped))


def test_next_checkpoint_does_not_push_out_the_good_one_in_favour_of_the_damaged(stopped: Path) -> None:
    flip_a_byte(stopped / "checkpoint" / "model.safetensors")
    folder = RunFolder(stopped)
    loaded = load_checkpoint(folder)
    assert loaded is not None
    save_checkpoint(folder, {"step": 3}, loaded[1])
    flip_a_byte(stopped / "checkpoint" / "model.safetensors")
    again = load_checkpoint(folder)
    assert again is not None and again[0]["step"] == 2


def test_checkpoint_that_was_read_can_be_removed_also_on_nfs_which_keeps_mapped_files(stopped: Path) -> None:
    loaded = load_checkpoint(RunFolder(stopped))
    assert loaded is not None and str(stopped) not in Path("/proc/self/maps").read_text()


def test_lost_rows_and_torn_ones_are_mended_by_a_checkpoint(stopped: Path) -> None:
    metrics = stopped / "metrics.jsonl"
    whole = metrics.read_bytes()
    metrics.write_bytes(whole + b'{"kind": "step", "st')
    loaded = loaded_and_cut_back(stopped)
    assert loaded is not None and loaded[0]["step"] == 4
    assert whole.startswith(metrics.read_bytes()) and metrics.read_bytes().endswith(b"\n")
    # A disk that lost what was appended last: the newest checkpoint counts on rows that are gone.
    metrics.write_bytes(metrics.read_bytes()[:-5])
    loaded = loaded_and_cut_back(stopped)
    assert loaded is not None and loaded[0]["step"] == 2
    assert metrics.read_bytes().endswith(b"\n")


# --- a disk that takes no more -------------------------------------------------------------------


def test_output_that_takes_no_file_is_refused_before_anything_is_loaded(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quark_fast.training.start.choose_reward", lambda *_: pytest.fail("loading began"))
    with pytest.raises(UsageError, match=r"cannot write to /proc: .*; choose another --output"):
        Trainer(small(Path("/proc/of_nobody/run"), here / "model"), **GIVEN).train()


def test_folder_that_is_there_and_empty_is_enough_though_nothing_can_be_made_beside_it(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, made = here / "mounted", tempfile.mkdtemp
    folder.mkdir()

    def mkdtemp(suffix: str | None = None, prefix: str | None = None, dir: Path | None = None) -> str:
        if dir == here:  # as where the folder is mounted into a place of another user
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return made(suffix, prefix, dir)

    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
    Trainer(config(folder), **GIVEN).train()
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        path.name for path in (here / "whole").iterdir()
    )


def test_disk_without_room_for_a_trial_export_is_not_blamed_on_the_model(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("quark_fast.training.start.check_model", check_model)  # not once for all tests
    monkeypatch.setattr("quark_fast.model.check_export.write_export", full)
    with pytest.raises(OutOfResources, match=r"cannot write an export to .*: No space left on device; make"):
        Trainer(config(here / "no-room"), **GIVEN).train()
    assert not [*here.glob(f"{TRIAL}*")]


def test_file_system_that_flushes_no_folder_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {"folder": errno.EINVAL, "file": 0}

    def fsync(handle: int) -> None:
        number = answers["folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file"]
        if number:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    with replacing(tmp_path / "file") as scratch:
        scratch.write_text("whole")
    assert (tmp_path / "file").read_text() == "whole"
    answers["folder"] = errno.EIO
    with pytest.raises(OSError, match="Input/output"):
        flush(tmp_path)
    answers["file"] = errno.EINVAL
    with pytest.raises(OSError, match="Invalid argument"):
        flush(tmp_path / "file")


def test_disk_that_is_full_before_the_first_file_says_to_start_again(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Config, path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Config, "save", full)
        with pytest.raises(OutOfResources, match=r"No space left on device; fix that, then start the run ag"):
            Trainer(config(here / "early"), **GIVEN)
    assert Trainer(config(here / "early"), **GIVEN).folder.resumed_by.startswith("--resume --output ")


def test_full_disk_ends_the_run_in_one_line_and_it_goes_on_when_there_is_room(here: Path) -> None:
    folder = here / "full"

    def fill(progress: Progress) -> None:
        if progress.stage.endswith("learning") and progress.done == 3:
            os.rename(folder / "metrics.jsonl", folder / "metrics")
            (folder / "metrics.jsonl").symlink_to("/dev/full")

    with pytest.raises(OutOfResources, match=r"cannot write .*No space left.*--resume --output"):
        Trainer(config(folder), listen=fill, **GIVEN).train()
    os.replace(folder / "metrics", folder / "metrics.jsonl")
    go_on(folder)


@pytest.mark.parametrize("stage", ["learning", "evaluating: best token"], ids=["checkpoint", "export"])
def test_file_that_cannot_be_written_whole_leaves_the_last_checkpoint(here: Path, stage: str) -> None:
    folder, limits = here / f"limit-{stage[0]}", resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(progress: Progress) -> None:
        if progress.stage.endswith(stage):
            resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))  # less than the weights take

    try:
        with pytest.raises(OutOfResources, match=r"cannot write .*File too large.*--resume --output"):
            Trainer(config(folder), listen=fill, **GIVEN).train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    go_on(folder)
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in (here / "whole").iterdir())


@pytest.fixture
def read_only(stopped: Path) -> Iterator[Path]:
    """The stopped run where nothing can be written: root may write past permissions, but not past a mount."""
    if os.geteuid() != 0:
        stopped.chmod(0o555)
        yield stopped
        stopped.chmod(0o755)
        return
    bind = ["mount", "--bind", str(stopped), str(stopped)]
    if subprocess.run(bind, capture_output=True).returncode != 0:
        pytest.skip("root, and not allowed to mount")
    subprocess.run(["mount", "-o", "remount,ro,bind", str(stopped)], check=True)
    yield stopped
    subprocess.run(["umount", str(stopped)], check=True)


def test_read_only_folder_is_refused_before_any_work(read_only: Path) -> None:
    with pytest.raises(OutOfResources, match=r"cannot write to the run folder .*: (Read-only|Permission)"):
        Trainer(config(read_only, resume=True), **GIVEN)
    with pytest.raises(UsageError, match=r"cannot make the run folder .*(Read-only|Permission)"):
        RunFolder(read_only / "new").create()


# --- two processes -------------------------------------------------------------------------------

HOLDER = """
import os, sys, time
from pathlib import Path
from quark_fast.files.locks import try_lock
assert try_lock(Path(sys.argv[1]) / ".lock")
child = os.fork()
if child == 0:
    time.sleep(100)
print(child, flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def held(folder: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """(a process that has the folder, a child of it that outlives it)."""
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        child = int(holder.stdout.readline())
        try:
            yield holder, child
        finally:
            holder.kill()
            os.kill(child, signal.SIGKILL)


def test_second_process_is_refused_while_the_first_lives_and_not_after_its_death(stopped: Path) -> None:
    with held(stopped) as (holder, child):
        with pytest.raises(UsageError, match=f"process {holder.pid} on .* is at work in"):
            Trainer(config(stopped, resume=True), **GIVEN)
        empty = RunFolder(stopped / "new")
        empty.create()
        RunFolder(stopped / "new").create()  # the same process may
        holder.kill()
        holder.wait()
        RunFolder(stopped).check_resumable()  # although its child lives
        os.kill(child, 0)


def test_run_that_is_refused_keeps_the_lock_of_the_one_beside_it_in_the_process(tmp_path: Path) -> None:
    first, second = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    first.create()
    (first / "config.yaml").touch()
    with pytest.raises(UsageError, match="exists: a run that is not finished"), second.free_after_errors():
        second.check_free()
    assert (first / ".lock").exists()
    with pytest.raises(Killed), first.free_after_errors():
        raise Killed
    assert not (first / ".lock").exists()


def test_second_new_run_in_one_folder_is_refused_although_nothing_is_written_yet(tmp_path: Path) -> None:
    with held(tmp_path), pytest.raises(UsageError, match="is at work in"):
        RunFolder(tmp_path).create()
    RunFolder(tmp_path).create()


def test_finished_run_whose_process_died_in_its_last_moment_is_left_without_its_lock(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    (tmp_path / "finished.json").touch()
    (tmp_path / ".lock").touch()
    with pytest.raises(UsageError, match="is finished: nothing to resume"):
        RunFolder(tmp_path).check_resumable()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "finished.json"]


def test_settings_that_may_change_are_those_that_change_no_sample_or_weight() -> None:
    free = {"max_bad_steps", "kl_stop", "micro_batch"}
    mine, saved = Config(), Config()
    for field in dataclasses.fields(Config):
        if field.name in free:
            setattr(mine, field.name, 7)
    mine.check_resumes(saved)
    for name in ("kl_target", "kl_horizon"):
        with pytest.raises(UsageError, match=name):
            Config(**{name: 100_000}).check_resumes(saved)
