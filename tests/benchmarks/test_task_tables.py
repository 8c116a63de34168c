"""What runs leave in docs/results, and the tables of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from quark_fast.errors import UsageError
from quark_fast.metrics import Sample, judge_measure


@pytest.fixture
def task_tables(from_benchmarks: Callable[[str], ModuleType]) -> ModuleType:
    return from_benchmarks("task_tables")


def finished_run(folder: Path, score: float, **other: Any) -> Path:
    """A folder with what is read of a finished run of four completions a row."""
    folder.mkdir()
    judge = judge_measure("toxicity-judge")
    rows = {"base model": 0.5, "best token": score}
    samples = [
        {"row": row, **vars(Sample(i, f"p{i}", f"a b c {i}", value, 8.0 + value, 4, {judge: value / 2}))}
        for row, value in rows.items()
        for i in range(4)
    ]
    evaluation = {
        **{"task": "toxicity", "target": "positive", "split": "development", "headline": "mean"},
        **{
            "columns": ["mean", "perplexity"],
            "more_columns": ["dist3"],
            "judges": [{"name": "toxicity-judge"}],
        },
        "judges": [{"name": "toxicity-judge"}],
        **{"scorer": {"name": "x"}, "sampling": {}, "prompts": 4, "samples_per_prompt": 1},
        "rows": [{"name": name} for name in rows],
    }
    about = {"machine": "a machine", "command": f"train {score}", "minutes": 3.0, "memory_gb": 1.0}
    started = {"prompts": ["4 read"], "starts": [{"torch": "x"}], "torch": "x"}
    (folder / "versions.json").write_text(json.dumps(about | started))
    (folder / "config.yaml").write_text("task: toxicity\nseed: 0\n")
    (folder / "evaluation.json").write_text(json.dumps(evaluation | other))
    (folder / "evaluation.jsonl").write_text("".join(json.dumps(one) + "\n" for one in samples))
    return folder


def test_what_is_kept_of_a_run_is_its_evaluation_with_settings_machine_and_command(
    task_tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished_run(tmp_path / "run", 0.2)
    output = tmp_path / "toxicity-seed0.json"
    monkeypatch.setattr("sys.argv", ["task_tables.py", "--keep", str(run), "--output", str(output)])
    task_tables.main()
    made = json.loads(output.read_text())
    assert made["versions"] == {
        "torch": "x",
        **{"machine": "a machine", "command": "train 0.2", "minutes": 3.0, "memory_gb": 1.0},
    }
    assert made["settings"] == {"task": "toxicity", "seed": 0}
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert {name: made[name] for name in evaluation} == evaluation
    assert list(made) == ["versions", "settings", *evaluation]
    assert output.read_text().startswith('{\n "versions": {\n  "torch"'), "indented by 1, as the others"


def test_what_is_kept_of_a_run_has_no_path_of_this_machine(task_tables: ModuleType, tmp_path: Path) -> None:
    run = finished_run(tmp_path / "seed-0", 0.2)
    (run / "config.yaml").write_text(f"output: {run}\n")
    versions = json.loads((run / "versions.json").read_text())
    (run / "versions.json").write_text(json.dumps(versions | {"command": f"train --output {run} --seed 0"}))
    made = task_tables.kept(run)
    assert made["settings"] == {"output": "runs/seed-0"}
    assert made["versions"]["command"] == "train --output runs/seed-0 --seed 0"


def test_tries_are_compared_with_their_own_base_model(
    task_tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [
        f"{name}={finished_run(tmp_path / f'{name[0]}{score}', score)}"
        for name, score in (("a=1", 0.25), ("b", 0.1), ("c", 0.2), ("c", 0.3))
    ]
    output = tmp_path / "tries.json"
    monkeypatch.setattr("sys.argv", ["task_tables.py", "--tries", *runs, "--output", str(output)])
    task_tables.main()
    made = json.loads(output.read_text())
    assert made["what"] == "tries on 4 development prompts of toxicity: changes against the base model"
    assert [row["try"] for row in made["rows"]] == ["a=1", "b", "c"]
    one, other, two_runs = made["rows"]
    assert (one["command"], one["machine"], one["minutes"]) == ("train 0.25", "a machine", 3.0)
    assert one["mean"]["value"] == 0.25 and one["mean"]["relative"] == -0.5
    assert other["judge toxicity-judge"]["relative"] == -0.8
    assert one["perplexity"]["relative"] == round(math.exp(-0.25 / 4) - 1, 4)
    assert "against the first try" not in one
    assert other["against the first try"]["mean"]["relative"] == -0.6
    assert (two_runs["command"], two_runs["minutes"]) == (["train 0.2", "train 0.3"], 3.0)
    assert (two_runs["mean"]["value"], two_runs["against the first try"]["mean"]["relative"]) == (0.25, 0.0)
    assert made["base"] == {
        **{"mean": 0.5, "judge toxicity-judge": 0.25},
        **{"perplexity": round(math.exp(8.5 / 4), 4), "dist3": 0.5},
    }


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "versions.json").unlink(), "is no folder of a run"),
        (lambda run: (run / "versions.json").write_text("{}"), "is not finished; go on with --resume"),
    ],
)
@pytest.mark.parametrize("flag", ["--keep", "--tries"])
def test_a_run_that_is_none_or_not_finished_is_refused(
    task_tables: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], object],
    message: str,
    flag: str,
) -> None:
    run = finished_run(tmp_path / "run", 0.2)
    spoil(run)
    named = str(run) if flag == "--keep" else f"a={run}"
    monkeypatch.setattr("sys.argv", ["task_tables.py", flag, named, "--output", str(tmp_path / "x.json")])
    with pytest.raises(SystemExit):
        task_tables.main()
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()


def test_tries_of_other_prompts_are_refused(task_tables: ModuleType, tmp_path: Path) -> None:
    runs = [
        (name, finished_run(tmp_path / name, 0.2, prompts_sha256=digest))
        for name, digest in (("a", "aa"), ("b", "bb"))
    ]
    with pytest.raises(UsageError, match="do not compare: prompts 4 of sha256 aa in the one, 4 of sha256 bb"):
        task_tables.tries(runs)
