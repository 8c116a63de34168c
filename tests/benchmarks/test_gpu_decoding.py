"""benchmarks/gpu_decoding.py meets a GPU rarely: here it runs at a tiny size on the CPU, without graphs."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM
from warm import Process

ROOT = Path(__file__).parents[2]


def test_the_benchmark_of_decoding_runs_to_its_end(tmp_path: Path) -> None:
    options = ["--tiny", "--rows", "3", "--prompt", "5", "--tokens", "4", "--rounds", "2"]
    options += ["--output", str(tmp_path / "out.json")]
    folder = ROOT / "benchmarks"
    done = Process("gpu_decoding", *options, folder=folder, environment={"PYTHONPATH": str(ROOT)})
    assert done.wait() == 0, done.output + done.errors
    found = json.loads((tmp_path / "out.json").read_text())["rows"]
    ways = [(row["way"], row["streams"]) for row in found]
    assert ways == [("eager", 1), ("static", 1), ("generate", 1), ("eager", 2), ("static", 2), ("vllm", 1)]
    assert found.pop() == {"way": "vllm", "streams": 1, "left_out": "timed on a GPU alone"}
    assert all(row["right"] and row["floor_ms"] > 0 and row["first_s"] > 0 for row in found)


@pytest.fixture
def gpu_decoding(from_benchmarks: Callable[[str], ModuleType]) -> ModuleType:
    return from_benchmarks("gpu_decoding")


def test_vllm_decodes_the_same_weights_and_lengths_where_it_is_installed(
    gpu_decoding: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = argparse.Namespace(rows=3, prompt=5, tokens=4, rounds=2, tiny=False)
    model = LlamaForCausalLM(LlamaConfig(**gpu_decoding.TINY))
    find_spec, there = importlib.util.find_spec, list[Any]()

    def found(name: str, *given: Any) -> Any:
        return (there or [None])[0] if name == "vllm" else find_spec(name, *given)

    monkeypatch.setattr(importlib.util, "find_spec", found)
    assert gpu_decoding.row_of_vllm(model, asked)["left_out"] == "not installed: pip install vllm"
    lacking = 0

    class Engine:
        def __init__(self, model: str, max_model_len: int, **_: Any) -> None:
            held = LlamaForCausalLM.from_pretrained(model)  # what is saved is a whole model
            assert held.config.vocab_size == 515 and max_model_len == 9

        def generate(self, prompts: list[Any], wanted: Any, use_tqdm: bool) -> list[Any]:
            assert [len(one["prompt_token_ids"]) for one in prompts] == [5] * 3 and wanted.ignore_eos
            drawn = SimpleNamespace(token_ids=[1] * (wanted.max_tokens - lacking))
            return [SimpleNamespace(outputs=[drawn])] * len(prompts)

    stand_in = SimpleNamespace(LLM=Engine, SamplingParams=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    there.append(stand_in)
    row = gpu_decoding.row_of_vllm(model, asked)
    assert row["right"] and len(row["seconds"]) == 2 and row["floor_ms"] > 0
    lacking = 1
    assert not gpu_decoding.row_of_vllm(model, asked)["right"]


def test_a_way_that_fails_costs_no_other_row(
    gpu_decoding: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("cannot be recorded")

    monkeypatch.setattr(gpu_decoding, "generate", fails)
    options = ["--tiny", "--rows", "3", "--prompt", "5", "--tokens", "4", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", ["gpu_decoding.py", *options, "--output", str(tmp_path / "out.json")])
    with pytest.raises(SystemExit, match="wrong: generate"):
        gpu_decoding.main()
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["way"] for row in rows if "seconds" in row] == ["eager", "static", "eager", "static"]
    (failed,) = [row for row in rows if "failed" in row]
    assert failed["way"] == "generate" and failed["failed"] == "RuntimeError: cannot be recorded"
