"""Runs of a tiny model that learn something in seconds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from quark_fast.config import Config
from quark_fast.training.progress import Progress

PROMPTS = [f"w{i} w{j}" for i in range(12) for j in range(12, 14)]


def even_words(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    """Share of the words whose number is even: learnable from single tokens."""
    rewards: list[float | None] = []
    for text in completions:
        numbers = [int(word) for word in text.replace("<unk>", "").split("w") if word]
        rewards.append(sum(n % 2 == 0 for n in numbers) / len(numbers) if numbers else None)
    return rewards


class Told(list[Any]):
    """A list for a reward to note things in, which looks the same to the cache at every start."""

    __repr__ = object.__repr__


# A run of one round, so short that it can be had often.
SHORT = {
    "rounds": 1,
    "steps": 6,
    "batch_size": 8,
    "initial_samples": 2,
    "eval_samples": 1,
    "checkpoint_every": 2,
}


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
        "sample_batch": 128,
        "lora_rank": 0,  # whose adapters of float32 weights would learn too little in such short runs
        "learning_rate": 3e-3,
        "reward_token_lr": 1e-2,
        "eval_samples": 8,
        "eval_rows": "best",  # of which tables consist otherwise is for "ends" or "all" to say
        "precision": "fp32",
        "threads": 1,
        "checkpoint_every": 10,
    }
    return Config(**(values | settings))


def rows(path: Path, **wanted: Any) -> list[dict[str, Any]]:
    every = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row for row in every if all(row[k] == v for k, v in wanted.items())]


def copies_at(
    moments: Sequence[tuple[str, int]], folder: Path, seen: Callable[[int], None] = lambda _: None
) -> Callable[[Progress], None]:
    """Copies a run's folder when so much of a stage is done: what a kill at that moment would leave there.

    One run so gives what many killed ones would, each of which would begin anew. The copy of moment n is
    "killed-n" beside the folder; ``seen`` hears of n.
    """
    left = dict(enumerate(moments))

    def listen(progress: Progress) -> None:
        for number, (stage, done) in list(left.items()):
            if progress.stage == stage and progress.done >= done:
                del left[number]
                shutil.copytree(folder, folder.with_name(f"killed-{number}"))
                seen(number)

    return listen


# What a clock decides may differ between a resumed and an undisturbed run; nothing else may.
CLOCK = {"seconds", "tokens_per_s"}


def timeless(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in rows(path)]
