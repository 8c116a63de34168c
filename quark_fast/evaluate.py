"""``python -m quark_fast.evaluate RUN --prompts FILE``: a finished run's metrics on other prompts."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.progress import Progress

from quark_fast.command import Terminal, exit_status
from quark_fast.config import Parser, UsageError


def parser() -> argparse.ArgumentParser:
    made = Parser(prog="python -m quark_fast.evaluate", description=__doc__)
    made.add_argument("run", metavar="RUN", help="run folder of quark_fast.train")
    made.add_argument(
        "--prompts", metavar="FILE", help="in any format of training; default: the run's own held-out prompts"
    )
    made.add_argument("--prompt-column", help="column of --prompts; default: the run's own")
    made.add_argument("--reward", help="in any form of training; default: the run's own")
    made.add_argument("--scorer-label", help="label that a classifier of --reward rewards")
    made.add_argument("--samples", type=int, help="completions a prompt and mode; default: the run's own")
    made.add_argument("--temperature", type=float, help="of the sampling, 0: greedy; default: the run's own")
    made.add_argument("--top-p", type=float, help="nucleus, share of mass; default: the run's own")
    made.add_argument("--guidance", default=None, help="values of w, comma-separated; default: the run's own")
    made.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: 0)")
    made.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the Python code that the run's models bring along",
    )
    made.add_argument("--threads", type=int, default=0, help="CPU threads; 0: every core (default: 0)")
    made.add_argument("--json", metavar="FILE", help="also write the table here")
    return made


def run(arguments: argparse.Namespace, console: Terminal) -> None:
    """Evaluate every mode and print the table."""
    from quark_fast.config import numbers
    from quark_fast.evaluation import (
        HeldOut,
        classify_prompts,
        describe_evaluation,
        evaluate,
        evaluation_sampling,
        modes,
        summarise,
    )
    from quark_fast.finished import open_run
    from quark_fast.machine import quiet_libraries, set_threads
    from quark_fast.metrics import Sample
    from quark_fast.prompts import chat_template, load_prompts
    from quark_fast.report import headline, results_table
    from quark_fast.run_folder import HELD_OUT, REWARDS
    from quark_fast.scoring import cached, choose_reward
    from quark_fast.tasks import find_task

    if arguments.samples is not None and arguments.samples < 1:
        raise UsageError(f"--samples {arguments.samples}: give at least 1")
    if arguments.top_p is not None and not 0 < arguments.top_p <= 1:
        raise UsageError(f"--top-p {arguments.top_p}: give a share in (0, 1]")
    if arguments.json and not Path(arguments.json).parent.is_dir():
        raise UsageError(f"--json {arguments.json}: no such folder")
    quiet_libraries()
    set_threads(arguments.threads)
    finished = open_run(Path(arguments.run), arguments.trust_remote_code)
    policy = finished.policy
    given = {
        "eval_samples": arguments.samples,
        "eval_temperature": arguments.temperature,
        "eval_top_p": arguments.top_p,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if arguments.reward:  # the run's own label is that of its own classifier
        given |= {"reward": arguments.reward, "scorer_label": arguments.scorer_label}
    elif arguments.scorer_label:
        raise UsageError("--scorer-label names a label of --reward hf:NAME; give both")
    config = dataclasses.replace(finished.config, **given)
    config.check()
    task = find_task(config.task, config.target)
    reward = choose_reward(config, task, finished.device)
    trained_on = json.loads((Path(arguments.run) / "evaluation.json").read_text())["scorer"]["name"]
    if not arguments.reward and reward.name != trained_on:
        raise UsageError(
            f"the run's reward was {trained_on}, a function of its program; name one by --reward"
        )
    if arguments.prompts:
        column = arguments.prompt_column or config.prompt_column
        chat = chat_template(arguments.run, lambda: policy.tokenizer)
        loaded = load_prompts(arguments.prompts, column=column, chat=chat)
        console.print(f"{arguments.prompts}: {loaded.counts}")
    else:
        loaded = load_prompts(Path(arguments.run) / HELD_OUT)
    rows = loaded.rows
    reward.check(rows)
    reward = cached(reward, config.reward_cache, Path(arguments.run) / REWARDS)
    rows, ids, texts = policy.encode_rows(rows, config.max_prompt_tokens, config.prefix_tokens)
    policy.check_fits(ids, config.max_new_tokens)
    guidance = config.guidances() if arguments.guidance is None else numbers("guidance", arguments.guidance)
    table = modes(policy.quantiles, guidance, config.eval_quantiles == "all")
    sampling = evaluation_sampling(config)
    held_out = HeldOut(rows, ids, config.eval_samples, texts)
    with Progress(console=console) as bar:
        if task.prompt_classes and not all("prompt_class" in row for row in rows):
            classified = bar.add_task("classes of the prompts", total=len(rows))
            for i, name in classify_prompts(
                policy, finished.reference, reward, held_out, sampling, config.seed, config.target
            ):
                rows[i] = {**rows[i], "prompt_class": name}
                bar.advance(classified)
        shown = {m.name: bar.add_task(m.name, total=len(rows) * config.eval_samples) for m in table}
        samples: dict[str, list[Sample]] = {m.name: [] for m in table}
        for name, part in evaluate(
            policy,
            policy.model,
            finished.reference,
            reward,
            held_out,
            table,
            sampling,
            arguments.seed,
            task.measures,
        ):
            samples[name] += part
            bar.update(shown[name], completed=len(samples[name]))
    about = describe_evaluation(task, config.target, reward, policy, sampling, held_out)
    about["sampling"]["guidance"] = next(iter(guidance), None)
    evaluation = summarise(samples, table, about)
    console.print(headline(evaluation))
    console.print(results_table(evaluation))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(evaluation, indent=2, ensure_ascii=False))


def main(arguments: Sequence[str] | None = None) -> int:
    return exit_status(lambda: run(parser().parse_args(arguments), Terminal()))


if __name__ == "__main__":
    sys.exit(main())
