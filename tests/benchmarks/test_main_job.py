"""benchmarks/main_job.py counts the products that a run makes, and loses none of its seconds."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import save_tiny_model, word_tokenizer
from tiny_runs import PROMPTS, small
from tokenizers import decoders
from torch.utils.flop_counter import FlopCounterMode

from quark_fast.runtime.run_folder import RunFolder


@pytest.fixture
def main_job(from_benchmarks: Callable[[str], ModuleType]) -> ModuleType:
    return from_benchmarks("main_job")


# Nothing is padded and nothing ends early; every prompt of the evaluation has one sample.
EVEN = {"min_new_tokens": 8, "eval_samples": 1, "rounds": 2, "steps": 3, "batch_size": 8, "micro_batch": 4}


def ones(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    return [text.count("1") / len(text) for text in completions]


def settings(tmp_path: Path) -> dict[str, Any]:
    file, model = tmp_path / "prompts.txt", save_tiny_model(tmp_path / "tiny", "llama")
    file.write_text("\n".join(PROMPTS))
    spaced = word_tokenizer()  # a text has as many words as it had tokens
    spaced.backend_tokenizer.decoder = decoders.Sequence([decoders.Replace("w", " w"), decoders.Fuse()])
    spaced.save_pretrained(model)
    given = {"model": str(model), "prompts": str(file), "held_out": "4", "reward": f"{__name__}:ones"}
    return EVEN | given


def test_stages_multiply_what_is_counted_and_add_up_to_the_whole_time(
    main_job: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: dict[str, float] = {}
    count = main_job.Clock.count

    def counted(self: Any, stage: str) -> None:
        count(self, stage)
        flops = counter.get_flop_counts()["Global"]  # attention's products are others: bmm
        total = sum(found for op, found in flops.items() if "mm" in str(op) and "bmm" not in str(op))
        made[stage] = made.get(stage, 0.0) + total - sum(made.values())

    monkeypatch.setattr(main_job.Clock, "count", counted)
    given = settings(tmp_path)
    config = small(tmp_path / "run", given.pop("model"), **given)
    begun = time.time()
    with FlopCounterMode(display=False) as counter:
        folder, spent = main_job.clocked(config, begun)
    took = time.time() - begun
    assert math.fsum(stage.seconds for stage in spent.values()) == pytest.approx(took, abs=0.1)
    assert all(stage.peak_mb > 100 for stage in spent.values())  # torch alone takes as much

    work = main_job.RunWork(RunFolder(folder), on_cpu=True).by_stage()
    assert made.keys() - {main_job.START, main_job.CHECKPOINTS, main_job.EXPORT} == work.keys()
    for name, stage in work.items():
        flops = sum(one.flops for one in stage.products)
        # Beyond that a run reads the last of 11 tokens, and each probe computes the reference's head again; a
        # sample with two unknown words has a text of one token fewer.
        most = 1.02 if "sampling" in name else 1.5 if name == "probing" else 1.15
        assert flops <= made[name] <= most * flops, name
    learning = work["round 1/2: learning"]
    assert learning.completion_tokens == 3 * 8 * 8 and learning.prompt_tokens == 3 * 8 * (1 + 1 + 2)

    table = main_job.table(folder, spent)
    assert {row["stage"] for row in table["stages"]} == {*spent, *work}
    row = next(row for row in table["stages"] if row["stage"] == "round 1/2: learning")
    assert row["to_floor"] > 1 and row["tflop"] >= 0
    json.dumps(table)
    files = main_job.from_files(RunFolder(folder))  # the time of a start is in whole seconds
    rest = took - spent["start and check"].seconds
    assert math.fsum(stage.seconds for stage in files.values()) == pytest.approx(rest, abs=1.5)


def test_short_job_samples_learns_and_evaluates(main_job: ModuleType, tmp_path: Path) -> None:
    tiny = settings(tmp_path) | {"rounds": 1, "max_new_tokens": 4, "precision": "fp32", "threads": 1}
    del tiny["min_new_tokens"]
    assert all(seconds > 0 for seconds in main_job.small_job(main_job.SMALL | tiny).values())


@pytest.mark.parametrize("power", [1, 2])
def test_growth_beyond_that_of_the_work_is_an_error(
    main_job: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, power: int
) -> None:
    def small_job(given: dict[str, Any]) -> dict[str, float]:
        length = given["max_new_tokens"] ** power
        return {
            "sampling": length * given["initial_samples"],
            "learning": length * given["steps"],
            "evaluating": length,
        }

    monkeypatch.setattr(main_job, "small_job", small_job)
    monkeypatch.setattr(sys, "argv", ["main_job.py", "--grow", "--output", str(tmp_path / "growth.json")])
    if power == 1:
        main_job.main()
    else:
        with pytest.raises(SystemExit, match="grows more"):
            main_job.main()
    rows = json.loads((tmp_path / "growth.json").read_text())["rows"]
    ratios = {row["grown"]: row["ratio"] for row in rows if row["stage"] == "sampling"}
    assert ratios["initial_samples 4 to 8"] == 2 and ratios["max_new_tokens 20 to 40"] == 2**power
