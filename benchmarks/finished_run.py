"""More rows for a finished run's table: other models, sampled, scored and measured as its evaluation was."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from quark_fast.evaluation.held_out import EncodedPrompts, EvaluationSetup, evaluate, evaluation_sampling
from quark_fast.evaluation.open_run import held_out_rows, open_run
from quark_fast.evaluation.summary import MeasuredRow, summarise
from quark_fast.evaluation.table_rows import TableRow
from quark_fast.metrics import Sample
from quark_fast.report.files import read_run
from quark_fast.report.tables import results_table
from quark_fast.runtime.machine import quiet_libraries, set_threads, versions
from quark_fast.runtime.memory import keep_freed_memory
from quark_fast.tasks.by_name import choose_reward, find_task


class FinishedRun:
    """A run with what its evaluation had: held-out prompts, scorer, sampling, seed.

    Attributes:
        run: its models and settings. record: what it wrote.
    """

    def __init__(self, folder: Path) -> None:
        self.run, self.record = open_run(folder), read_run(folder)
        config = self.run.config
        self.task = find_task(config.task, config.target)
        self.setup = EvaluationSetup(
            self.run.policy,
            self.run.reference,
            choose_reward(config, self.task, self.run.device),
            EncodedPrompts.encoded(self.run.policy, held_out_rows(folder), config),
            evaluation_sampling(config),
            config.seed,
            prompt_fit=self.task.shows("prompt_fit"),
        )

    def draw(self, row: TableRow, model: Any, top_p: float | None = None) -> list[Sample]:
        """The samples of a row: of ``model``, or where the row says so of the base model.

        top_p: another nucleus than the evaluation's, for a model that has taken that one itself.
        """
        setup = self.setup
        if top_p is not None:
            setup = replace(setup, sampling=replace(setup.sampling, top_p=top_p))
        batches = evaluate(setup, model, [row], self.task.measures)
        return [sample for _, part in batches for sample in part]

    def table(self, rows: Sequence[TableRow], samples: Mapping[str, list[Sample]]) -> dict[str, Any]:
        """What ``evaluation.json`` holds, with these rows in place of the run's, and this machine."""
        about = {name: value for name, value in self.record.evaluation.items() if name != "rows"}
        measured = [MeasuredRow(row.name, row.on_curves, samples[row.name]) for row in rows]
        return summarise(measured, about) | {"versions": versions(self.run.device)}


def options(description: str | None) -> argparse.ArgumentParser:
    """What such a script is asked."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: every core (default: 0)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser


def begin(arguments: argparse.Namespace) -> Console:
    quiet_libraries()
    keep_freed_memory()
    set_threads(arguments.threads)
    return Console()


def end(arguments: argparse.Namespace, console: Console, found: Mapping[str, Any], command: str) -> None:
    """Show the table, and write it where that was asked for, with the command that made it."""
    found["versions"]["command"] = command
    console.print(results_table(found))
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=1))
