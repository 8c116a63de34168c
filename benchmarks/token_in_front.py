"""What a reward token in front costs on held-out text: in its first tokens, and after a prompt of them.

    python benchmarks/token_in_front.py RUN ... --output FILE

The best token stands before the first token of a text. Whoever samples has a prompt between the two, and so
the tables of a run count what is after a prompt of 32 tokens. Here each is measured twice: over these first
32 tokens, of which one is given, and over those after them. Rows are the base model without a token, with
the token of each built-in task before any training, and the given runs. The texts are the held-out passages
of runs of repetition; for others those on which evaluations measure what a training cost elsewhere.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quark_fast.arguments import load_config
from quark_fast.config import Config
from quark_fast.data import assets
from quark_fast.evaluation.held_out import CONTROLS
from quark_fast.evaluation.open_run import open_run
from quark_fast.evaluation.perplexity import text_fit
from quark_fast.model.policy import Policy
from quark_fast.rollout.sampling import Conditioning
from quark_fast.runtime.machine import quiet_libraries, versions
from quark_fast.tasks.by_name import find_task

PROMPT = 32
RESAMPLES = 1000


def fit(policy: Policy, texts: list[str], conditioning: Conditioning) -> np.ndarray:
    """(texts, 2, 3): nats, tokens predicted right, tokens; of the first ``PROMPT`` tokens, and the rest."""
    every = [policy.text_tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    first, whole = (
        np.array(text_fit(policy, policy.model, part, conditioning, prompt=1))
        for part in ([ids[:PROMPT] for ids in every], every)
    )
    return np.stack([first, whole - first], 1)


def rows(runs: list[Path], texts: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Each row's name and fit; the base model first."""
    for name in ("toxicity", "sentiment", "repetition"):
        quantiles = Config(task=name).quantiles
        words = find_task(name).words_for(quantiles)
        policy = Policy.create(assets.default_model(), quantiles=quantiles, words=words)
        policy.model.eval()
        if name == "toxicity":
            yield "base model", fit(policy, texts, Conditioning())
        yield f"best token of {name}, untrained", fit(policy, texts, Conditioning(quantiles - 1))
    for run in runs:
        policy = open_run(run).policy
        yield run.name, fit(policy, texts, Conditioning(policy.quantiles - 1))


def texts_of(run: Path) -> list[str]:
    """The run's held-out texts, where its prompts are the beginnings of texts; else passages of novels."""
    if not load_config(run / "config.yaml").prefix_tokens:
        return assets.book_passages()[:CONTROLS]
    return [json.loads(line)["prompt"] for line in (run / "held_out.jsonl").read_text().splitlines()]


def measures(sums: np.ndarray) -> dict[str, float]:
    nats, right, tokens = sums
    return {"perplexity": math.exp(nats / tokens), "accuracy": right / tokens}


def changes(base: np.ndarray, row: np.ndarray) -> dict[str, Any]:
    """Each measure, and its relative change with the 95% bootstrap interval over texts."""
    drawn = np.random.default_rng(0).integers(len(base), size=(RESAMPLES, len(base)))
    made: dict[str, Any] = {}
    for part, place in (("first tokens", 0), ("after a prompt", 1)):
        before, after = measures(base[:, place].sum(0)), measures(row[:, place].sum(0))
        for name in before:
            resampled = [
                measures(row[some, place].sum(0))[name] / measures(base[some, place].sum(0))[name] - 1
                for some in drawn
            ]
            low, high = np.quantile(resampled, [0.025, 0.975])
            made[f"{name}, {part}"] = {
                "value": round(after[name], 4),
                "relative": round(after[name] / before[name] - 1, 4),
                "low": round(float(low), 4),
                "high": round(float(high), 4),
            }
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="finished runs")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON file to write")
    asked = parser.parse_args()
    quiet_libraries()
    every = [texts_of(run) for run in asked.runs]
    if any(texts != every[0] for texts in every):
        parser.error("the runs have other held-out texts; give runs that were evaluated on the same")
    texts = every[0]
    found, base = [], None
    for name, row in rows(asked.runs, texts):
        base = row if base is None else base
        found.append({"row": name, **changes(base, row)})
        cells = (
            f"{key} {one['value']} ({one['relative']:+.1%})" for key, one in found[-1].items() if key != "row"
        )
        print(f"{name}: {'; '.join(cells)}", flush=True)
    command = {"command": shlex.join(["python", *sys.argv]), "texts": len(texts), "prompt_tokens": PROMPT}
    result = versions(torch.device("cpu")) | command | {"rows": found}
    asked.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
