"""What a run's result is worth in bfloat16: as float32, rounded to the nearest, and rounded stochastically.

    python benchmarks/rounding.py RUN --output FILE

RUN is a finished run of a model that came, and so was exported, in float32. The embedded model, which comes
in bfloat16, is one after ``model.float().save_pretrained(FOLDER)``; its weights still lie on bfloat16's grid.
All rows compute in the run's precision, under the best token, with the prompts, scorer, sampling and seed of
the run's evaluation.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from finished_run import FinishedRun, begin, end, options
from rich.console import Console

from quark_fast.evaluation.table_rows import TableRow
from quark_fast.metrics import Sample
from quark_fast.model.loading import stored_dtype
from quark_fast.model.rounding import stochastic_rounding
from quark_fast.report.results import BASE
from quark_fast.rollout.sampling import Conditioning


def measure(folder: Path, console: Console) -> dict[str, Any]:
    """The run's evaluation with a row for each way of rounding; ``weights_moved`` is each one's share.

    Raises:
        SystemExit: the run's model is not float32.
    """
    if (found := stored_dtype(folder / "model")) != torch.float32:
        raise SystemExit(f"{folder}/model is {found}: what it lost is gone; train a model stored in float32")
    finished = FinishedRun(folder)
    policy, reference = finished.run.policy, finished.run.reference
    ways = {
        "float32": lambda weights: weights,
        "bfloat16, nearest": lambda weights: weights.bfloat16(),
        "bfloat16, stochastic": stochastic_rounding(torch.bfloat16),
    }
    best = Conditioning(policy.quantiles - 1)
    base = TableRow(BASE, base=True)
    samples: dict[str, list[Sample]] = {base.name: finished.draw(base, reference)}
    console.print(f"{base.name}: sampled")
    moved = {}
    for name, way in ways.items():
        model = copy.deepcopy(policy.model)
        for parameter in model.parameters():
            parameter.data = way(parameter.data).to(parameter.dtype)
        moved[name] = share_moved(model, reference)
        samples[name] = finished.draw(TableRow(name, best), model)
        console.print(f"{name}: sampled")
    table = [base, *(TableRow(name, best) for name in ways)]
    return finished.table(table, samples) | {"weights_moved": moved}


def share_moved(model: Any, reference: Any) -> float:
    """Share of the reference's weights that are another number in the model, whose table is longer."""
    before = dict(reference.named_parameters())
    pairs = [(p[: len(before[name])], before[name]) for name, p in model.named_parameters() if name in before]
    moved = sum(int((after != old).sum()) for after, old in pairs)
    return moved / sum(old.numel() for _, old in pairs)


def main() -> None:
    arguments = options(__doc__).parse_args()
    console = begin(arguments)
    found = measure(arguments.run, console)
    end(arguments, console, found, f"python benchmarks/rounding.py {arguments.run}")
    for name, share in found["weights_moved"].items():
        console.print(f"{name}: {share:.0%} of the weights differ from the base model's")


if __name__ == "__main__":
    main()
