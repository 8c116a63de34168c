"""``python -m quark_fast.evaluate RUN|MODEL|TABLE ...``: runs and models side by side on the same prompts."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from quark_fast.arguments import Parser, add_number, add_scorer
from quark_fast.errors import UsageError
from quark_fast.report.records import samples_path
from quark_fast.runtime.console import Terminal
from quark_fast.settings import THREADS
from quark_fast.terminal import check_output, command


def parser() -> Parser:
    made = Parser(prog="python -m quark_fast.evaluate", description=__doc__)
    made.add_argument(
        "subjects",
        metavar="RUN|MODEL|TABLE",
        nargs="+",
        help="run folder of quark_fast.train, any causal LM (a folder or a hub name), or FILE.json of an"
        " earlier evaluation; the first row is what the others are compared with",
    )
    made.add_argument(
        "--task",
        help="what to measure: toxicity, sentiment or repetition; default: what the runs unlearned; models"
        " alone need none with --reward and --prompts",
    )
    made.add_argument("--target", choices=["positive", "negative"], help="sentiment of the task of that name")
    made.add_argument(
        "--prompts",
        metavar="FILE",
        help="in any format of training; default: the first run's held-out prompts, or the task's",
    )
    made.add_argument("--prompt-column", help="column of --prompts; default: the first run's own")
    made.add_argument("--out-of-domain", metavar="FILE", help="other prompts, for a second table")
    made.add_argument("--out-of-domain-column", help="column of these; default: --prompt-column")
    made.add_argument(
        "--reward",
        help="in any form of training; default: the runs' own, or that of --task where it is given",
    )
    add_scorer(made)
    made.add_argument(
        "--judge",
        metavar="SPEC",
        help="scorers beside the reward, in any of its forms, with commas between; auto: the task's own"
        " judge; none; default: the first run's own; without one, or for another task than its own, auto; of"
        " tables alone, their samples are judged as they are",
    )
    made.add_argument("--scorer-label", help="label that a classifier of --reward rewards")
    _add_sampling(made)
    made.add_argument(
        "--rows",
        choices=["ends", "all", "best"],
        help="rows of a run, as --eval-rows of training; default: its own, with --guidance at least ends",
    )
    made.add_argument("--guidance", help="values of w, comma-separated; default: each run's own")
    made.add_argument(
        "--ppl-model",
        metavar="MODEL",
        help="causal LM that measures the perplexity, by its own tokenizer; default: the first base model",
    )
    made.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: 0)")
    trust = "run the Python code that the models bring along"
    made.add_argument("--trust-remote-code", action="store_true", help=trust)
    made.add_argument("--threads", type=int, default=0, help=f"{THREADS} (default: 0)")
    made.add_argument(
        "--json",
        metavar="FILE",
        help="also write the table here, and the samples to the same name in .jsonl: both are a TABLE",
    )
    made.add_argument("--markdown", metavar="FILE", help="also write it as Markdown")
    made.add_argument("--html", metavar="FILE", help="also write it as a page with plots and texts")
    return made


def _add_sampling(made: argparse.ArgumentParser) -> None:
    own = "default: the first run's own; without one, or for another task than its own, the task's"
    made.add_argument("--samples", type=int, help=f"completions a prompt and row; {own}")
    made.add_argument("--temperature", type=float, help=f"of the sampling, 0: greedy; {own}")
    made.add_argument("--top-p", type=float, help=f"nucleus, share of mass; {own}")
    made.add_argument("--max-new-tokens", type=int, help=f"length of a completion, tokens; {own}")
    made.add_argument("--min-new-tokens", type=int, help=f"end of text is blocked before these; {own}")
    for name in ("sample_at_once", "read_batch", "score_batch"):
        add_number(made, name, "the first run's own; without one, or for another task than its own, 0")


OUTPUTS = ("json", "markdown", "html")


@command
def main(arguments: Sequence[str], console: Terminal, notices: Terminal) -> None:
    """Evaluate every subject, print the tables and write them."""
    asked = parser().parse_args(arguments)
    settings = vars(asked).copy()
    threads, subjects = settings.pop("threads"), settings.pop("subjects")
    files = {name: Path(given) for name in OUTPUTS if (given := settings.pop(name))}
    if asked.samples is not None and asked.samples < 1:
        raise UsageError(f"--samples {asked.samples}: give at least 1")
    if asked.top_p is not None and not 0 < asked.top_p <= 1:
        raise UsageError(f"--top-p {asked.top_p}: give a share in (0, 1]")
    _check_files(files, subjects, [*filter(None, (asked.prompts, asked.out_of_domain))])
    from quark_fast.evaluation.side_by_side import Evaluator
    from quark_fast.files.atomic import replacing
    from quark_fast.report.results import headline
    from quark_fast.report.tables import results_table, tables
    from quark_fast.runtime.machine import quiet_libraries, set_threads, versions
    from quark_fast.training.display import Display
    from quark_fast.training.progress import Progress

    quiet_libraries()
    set_threads(threads)
    display = Display(notices)
    with display.shown():
        evaluator = Evaluator(subjects, **settings, listen=lambda *given: display(Progress(*given)))
        for remark in evaluator.remarks:
            notices.print(remark)
        told = len(evaluator.remarks)
        made = evaluator.evaluate()
        for remark in evaluator.remarks[told:]:
            notices.print(remark)
    # First the files: standard output may be a pipe that is not read any more.
    for path, text in _texts(files, made.table, made.samples, versions(evaluator.device)):
        with replacing(path) as scratch:
            scratch.write_text(text, encoding="utf-8", errors="backslashreplace")
        notices.print(f"written: {path}")
    console.print(headline(made.table))
    for title, table in tables(made.table):
        console.print(results_table(table, title))


def _texts(
    files: dict[str, Path], table: dict[str, Any], samples: list[dict[str, Any]], record: dict[str, Any]
) -> Iterator[tuple[Path, str]]:
    """What stands in each file asked for, and in that of the samples.

    One after the other: what goes wrong with a page must not cost the table and its samples.
    """
    if path := files.get("json"):
        yield path, json.dumps(table | {"versions": record}, indent=2, ensure_ascii=False) + "\n"
        yield samples_path(path), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in samples)
    if path := files.get("markdown"):
        from quark_fast.report.tables import markdown_page

        yield path, markdown_page(table)
    if path := files.get("html"):
        from quark_fast.report.page import comparison_page

        yield path, comparison_page(table, samples, record)


def _check_files(files: dict[str, Path], subjects: Sequence[str], prompts: Sequence[str]) -> None:
    """Raise UsageError for a file that cannot be written, or that is read and must not be lost."""
    read = [Path(one) for one in (*subjects, *prompts)]
    read += [samples_path(Path(one)) for one in subjects if one.endswith(".json")]
    named = {path.resolve() for path in read}
    for name, path in files.items():
        if name == "json" and path.suffix != ".json":
            raise UsageError(f"--json {path}: give a name in .json; the samples go beside it, in .jsonl")
        check_output(f"--{name} {path}", path, named)
    written = list(files.values())
    if table := files.get("json"):
        written.append(samples := samples_path(table))
        check_output(f"--json {table} (its samples go to {samples.name})", samples, named)
    if len({path.resolve() for path in written}) < len(written):
        raise UsageError(f"{', '.join(f'--{name}' for name in files)} name one file; give each its own")


if __name__ == "__main__":
    sys.exit(main())
