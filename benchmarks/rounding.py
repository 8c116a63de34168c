"""What a run's result is worth in bfloat16: as float32, rounded to the nearest, and rounded stochastically.

    python benchmarks/rounding.py RUN --output FILE

RUN is a finished run of a model that came, and so was exported, in float32. The embedded model, which comes
in bfloat16, is one after ``model.float().save_pretrained(FOLDER)``; its weights still lie on bfloat16's grid.
All rows compute in the run's precision, under the best token, with the prompts, scorer, sampling and seed of
the run's evaluation.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from quark_fast.evaluation import HeldOut, Mode, evaluate, evaluation_sampling, summarise
from quark_fast.finished import open_run
from quark_fast.machine import keep_freed_memory, quiet_libraries, set_threads, versions
from quark_fast.metrics import Sample
from quark_fast.policy import stored_dtype
from quark_fast.prompts import load_prompts
from quark_fast.report import read_run, results_table
from quark_fast.rollout import Conditioning
from quark_fast.rounding import stochastic_rounding
from quark_fast.run_folder import HELD_OUT
from quark_fast.scoring import choose_reward
from quark_fast.tasks import find_task


def measure(folder: Path, console: Console) -> dict[str, Any]:
    """The run's evaluation with a row for each way of rounding; ``versions`` has the share of weights moved.

    Raises:
        SystemExit: the run's model is not float32.
    """
    if (found := stored_dtype(folder / "model")) != torch.float32:
        raise SystemExit(f"{folder}/model is {found}: what it lost is gone; train a model stored in float32")
    run, record = open_run(folder), read_run(folder)
    config = run.config
    task = find_task(config.task, config.target)
    reward = choose_reward(config, task, run.device)
    loaded = load_prompts(folder / HELD_OUT)
    rows, ids, texts = run.policy.encode_rows(loaded.rows, config.max_prompt_tokens, config.prefix_tokens)
    held_out = HeldOut(rows, ids, config.eval_samples, texts)
    before = dict(run.reference.named_parameters())
    ways = {
        "float32": lambda weights: weights,
        "bfloat16, nearest": lambda weights: weights.bfloat16(),
        "bfloat16, stochastic": stochastic_rounding(torch.bfloat16),
    }
    best = Conditioning(run.policy.quantiles - 1)
    table = [Mode("untouched", Conditioning(), untouched=True), *(Mode(name, best) for name in ways)]
    samples: dict[str, list[Sample]] = {mode.name: [] for mode in table}
    moved = {}
    for mode in table:
        model = run.policy.model
        if mode.name in ways:
            model = copy.deepcopy(model)
            for parameter in model.parameters():
                parameter.data = ways[mode.name](parameter.data).to(parameter.dtype)
            own = {name: p for name, p in model.named_parameters() if name in before}
            same = sum(int((p[: len(before[name])] == before[name]).sum()) for name, p in own.items())
            moved[mode.name] = 1 - same / sum(before[name].numel() for name in own)
        for _, part in evaluate(
            run.policy,
            model,
            run.reference,
            reward,
            held_out,
            [mode],
            evaluation_sampling(config),
            config.seed,
            task.measures,
        ):
            samples[mode.name] += part
        console.print(f"{mode.name}: sampled")
    about = {name: value for name, value in record.evaluation.items() if name != "rows"}
    return summarise(samples, table, about) | {"versions": versions(run.device), "weights_moved": moved}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: every core (default: 0)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    console = Console()
    quiet_libraries()
    keep_freed_memory()
    set_threads(arguments.threads)
    found = measure(arguments.run, console)
    found["versions"]["command"] = f"python benchmarks/rounding.py {arguments.run}"
    console.print(results_table(found))
    for name, share in found["weights_moved"].items():
        console.print(f"{name}: {share:.0%} of the weights differ from the untouched model's")
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
