"""``python -m quark_fast.generate RUN PROMPT ...``: the base and the unlearned model side by side."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from quark_fast.arguments import Parser, add_number
from quark_fast.errors import UsageError
from quark_fast.runtime.console import Terminal
from quark_fast.settings import COLDEST, STRONGEST, THREADS
from quark_fast.terminal import command

if TYPE_CHECKING:
    from quark_fast.model.policy import Policy


def parser() -> Parser:
    made = Parser(prog="python -m quark_fast.generate", description=__doc__)
    made.add_argument("run", metavar="RUN", help="run folder of quark_fast.train")
    made.add_argument("prompts", metavar="PROMPT", nargs="+", help="text to continue, or to answer")
    made.add_argument(
        "--bare",
        action="store_true",
        help="of a run of chats: the prompt as it is, not as a user's message",
    )
    made.add_argument("--samples", type=int, help="completions a prompt (default: 3, greedy 1)")
    made.add_argument(
        "--guidance",
        type=float,
        default=None,
        help="w: 1 is the best token alone; default: the run's own",
    )
    made.add_argument("--quantile", type=int, default=None, help="condition on this quantile; default: best")
    made.add_argument("--max-new-tokens", type=int, default=40, help="length, tokens (default: 40)")
    made.add_argument(
        "--temperature", type=float, default=1.0, help="of the sampling, 0: greedy (default: 1)"
    )
    made.add_argument("--top-p", type=float, default=0.9, help="nucleus, share of mass (default: 0.9)")
    made.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: 0)")
    made.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the Python code that the run's models bring along",
    )
    add_number(made, "sample_at_once", "0")
    made.add_argument("--threads", type=int, default=0, help=f"{THREADS} (default: 0)")
    made.add_argument(
        "--show-offensive", action="store_true", help="do not mask the worst words in the terminal"
    )
    return made


@command
def main(arguments: Sequence[str], console: Terminal, notices: Terminal) -> None:
    """Sample both models on every prompt and print them side by side."""
    asked = parser().parse_args(arguments)
    if asked.samples is None:
        asked.samples = 3 if asked.temperature else 1
    _check(asked)
    from quark_fast.evaluation.open_run import open_run
    from quark_fast.evaluation.table_rows import row_name
    from quark_fast.files.safe_text import clean
    from quark_fast.report.texts import mask_profanity
    from quark_fast.rollout.sampling import Conditioning, SampleRequest, Sampling
    from quark_fast.rollout.transformers import sample
    from quark_fast.runtime.machine import quiet_libraries, set_threads

    quiet_libraries()
    set_threads(asked.threads)
    finished = open_run(Path(asked.run), asked.trust_remote_code)
    policy = finished.policy
    best = policy.quantiles - 1
    quantile = best if asked.quantile is None else asked.quantile
    if not 0 <= quantile <= best:
        raise UsageError(f"--quantile {quantile}: this run has quantiles 0 (worst) to {best} (best)")
    if finished.config.one_token and asked.guidance not in (None, 1.0):
        raise UsageError(
            f"--guidance {asked.guidance:g}: this run trained one token alone, so there is none to move away"
            " from; leave it out"
        )
    guidance = finished.guidance if asked.guidance is None else asked.guidance
    at_once = asked.sample_at_once or 0
    sampling = Sampling(asked.max_new_tokens, 1, asked.temperature, asked.top_p, at_once=at_once)
    prompts = _encoded(policy, asked, notices)
    policy.check_fits(prompts, asked.max_new_tokens)

    def completions(model: object, conditioning: Conditioning) -> list[list[str]]:
        texts: list[list[str]] = [[] for _ in prompts]
        request = SampleRequest(prompts, conditioning, sampling, asked.samples, asked.seed)
        for indices, drawn, *_ in sample(policy, model, request):
            for i, group in zip(indices, drawn, strict=True):
                texts[i] = [policy.decode(completion, prompts[i]) for completion in group]
        return texts

    before = completions(finished.reference, Conditioning())
    after = completions(policy.model, Conditioning(quantile, 0 if quantile else best, guidance))
    show = clean if asked.show_offensive else mask_profanity
    for prompt, lefts, rights in zip(asked.prompts, before, after, strict=True):
        table = Table(title=show(prompt), title_justify="left", expand=True, show_lines=True)
        table.add_column("base model", ratio=1, overflow="fold")
        table.add_column(row_name(quantile, best, guidance), ratio=1, overflow="fold")
        for left, right in zip(lefts, rights, strict=True):
            table.add_row(show(left), show(right))
        console.print(table)


def _encoded(policy: Policy, asked: argparse.Namespace, notices: Terminal) -> list[list[int]]:
    """The prompts as ids; of a run of chats each is a user's message, as what the run was trained on."""
    from quark_fast.data.chat import ChatTemplateError, chat_template
    from quark_fast.report.files import of_chats

    if asked.bare or not of_chats(Path(asked.run)):
        return [policy.encode(text) for text in asked.prompts]
    chat = chat_template(asked.run, lambda: policy.tokenizer)
    try:
        texts = [chat([{"role": "user", "content": text}]) for text in asked.prompts]
    except ChatTemplateError as error:
        raise UsageError(f"{error}; --bare gives the prompt as it is") from error
    notices.print("the run is of chats, so each prompt is a user's message; --bare gives it as it is")
    return [policy.encode(text, chat=True) for text in texts]


def _check(asked: argparse.Namespace) -> None:
    """Raise UsageError for a flag that cannot be, before anything is loaded."""
    if asked.samples < 1 or asked.max_new_tokens < 1 or not 0 < asked.top_p <= 1:
        raise UsageError("--samples and --max-new-tokens need at least 1, --top-p a share in (0, 1]")
    if not math.isfinite(asked.temperature) or 0 != asked.temperature < COLDEST:
        raise UsageError(
            f"--temperature {asked.temperature}: give at least {COLDEST:g}, or 0, which is greedy"
        )
    if asked.temperature == 0 and asked.samples > 1:
        raise UsageError(f"--samples {asked.samples}: greedy ones are all the same; give 1")
    if asked.sample_at_once is not None and asked.sample_at_once < 0:
        raise UsageError(f"--sample-at-once {asked.sample_at_once}: give at least 1, or 0 for all that fit")
    if not 0 <= asked.seed < 2**63:
        raise UsageError(f"--seed {asked.seed}: give a number from 0 to 2**63 - 1")
    if asked.guidance is not None and not abs(asked.guidance) <= STRONGEST:
        raise UsageError(f"--guidance {asked.guidance}: give a number, 1 for the best token alone")
    for text in asked.prompts:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # bytes of the command line that are no text
            raise UsageError(f"prompt {text!r:.80} is no text in UTF-8") from error


if __name__ == "__main__":
    sys.exit(main())
