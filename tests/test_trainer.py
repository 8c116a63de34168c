"""The loop on a problem known to be learnable, its resume, and what it writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quark_fast.config import Config, UsageError
from quark_fast.trainer import Progress, Trainer

PROMPTS = [f"w{i} w{j}" for i in range(12) for j in range(12, 14)]


def even_words(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    """Share of the words whose number is even: learnable from single tokens."""
    rewards: list[float | None] = []
    for text in completions:
        numbers = [int(word) for word in text.replace("<unk>", "").split("w") if word]
        rewards.append(sum(n % 2 == 0 for n in numbers) / len(numbers) if numbers else None)
    return rewards


def small(folder: Path, model: Path, **settings: Any) -> Config:
    values: dict[str, Any] = {
        "model": str(model),
        "output": str(folder),
        "quantiles": 3,
        "initial_samples": 8,
        "explore_samples": 8,
        "rounds": 3,
        "steps": 30,
        "batch_size": 32,
        "micro_batch": 32,
        "max_new_tokens": 8,
        "learning_rate": 3e-3,
        "reward_token_lr": 1e-2,
        "eval_samples": 8,
        "precision": "fp32",
        "threads": 1,
        "checkpoint_every": 10,
    }
    return Config(**(values | settings))


def rows(path: Path, **wanted: Any) -> list[dict[str, Any]]:
    every = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in every if all(row[k] == v for k, v in wanted.items())]


def test_reward_rises_and_best_is_above_none_above_worst(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    folder = tmp_path / "run"
    trainer = Trainer(
        small(folder, tiny_model()), reward=even_words, prompts=PROMPTS, held_out=PROMPTS[:10]
    )
    trainer.train()
    rounds = rows(folder / "metrics.jsonl", kind="round")
    assert rounds[-1]["reward_mean"] > rounds[0]["reward_mean"] + 0.2
    table = {row["name"]: row["metrics"]["mean"]["value"] for row in _evaluation(folder)["rows"]}
    assert table["best token"] > table["no token"] > table["worst token"]
    assert table["best token"] > table["untouched"] + 0.2


def _evaluation(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "evaluation.json").read_text())
