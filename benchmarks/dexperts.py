"""Guided conditioning beside DExperts, which needs two more models: same samples, prompts, scorer and draws.

    python benchmarks/dexperts.py RUN --output FILE

RUN is a finished run. DExperts (Liu et al. 2021, arXiv 2105.03023) samples from

    log p = log p0 + alpha (log p_expert - log p_anti-expert),   renormalised,

within p0's nucleus of the run's --eval-top-p, p0 the base model, the experts copies of it, fine-tuned by the
LM loss alone: the expert on the run's samples of the best quantile of their rewards, the anti-expert on those
of the worst. Each takes as many samples, in as many steps, as the run drew for the token of that quantile,
with the run's learning rate and schedule. The run's own rows are those of its evaluation; all rows share
held-out prompts, prefix, scorer, sampling and seed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from finished_run import FinishedRun, begin, end, options
from rich.console import Console
from torch import Tensor
from transformers import DynamicCache

from quark_fast.data import assets
from quark_fast.evaluation.open_run import OpenRun
from quark_fast.evaluation.table_rows import TableRow
from quark_fast.metrics import Sample
from quark_fast.model.attention import FAST_ATTENTION
from quark_fast.model.batch import completion_logits, make_batch
from quark_fast.model.loading import load_pretrained, stored_dtype
from quark_fast.model.reading import cache_argument
from quark_fast.model.rounding import conversion
from quark_fast.ops.loss import quark_loss
from quark_fast.report.results import BASE
from quark_fast.rollout.tokens import outside_nucleus


class Mixture(torch.nn.Module):
    """Three models that sampling takes for one, each with a cache of its own.

    What the base model's nucleus of ``top_p`` leaves out has no mass, as in the authors' code: the mix itself
    is then drawn from whole.
    """

    def __init__(self, base: Any, expert: Any, anti: Any, alpha: float, top_p: float) -> None:
        super().__init__()
        self.top_p = top_p
        self.models, self.weights = [base, expert, anti], [1.0, alpha, -alpha]
        self.config, self.device = base.config, base.device

    def forward(self, ids: Tensor, cache: Any = None, logits_to_keep: Any = 0, **inputs: Any) -> Any:
        if ids.shape[1] > 1:  # a new batch of prompts
            self.rows, self.caches = len(ids), [DynamicCache(config=self.config) for _ in self.models]
        elif len(ids) > self.rows:  # several samples of each prompt from here on
            for one in self.caches:
                one.batch_repeat_interleave(len(ids) // self.rows)
            self.rows = len(ids)
        outputs = [
            model(ids, logits_to_keep=logits_to_keep, **{cache_argument(model): own}, **inputs)
            for model, own in zip(self.models, self.caches, strict=True)
        ]
        scaled = [w * o.logits.float().log_softmax(-1) for w, o in zip(self.weights, outputs, strict=True)]
        mixed = torch.stack(scaled).sum(0)
        if self.top_p < 1:
            mixed = mixed.masked_fill(outside_nucleus(scaled[0], self.top_p), -torch.inf)
        outputs[0].logits = mixed
        return outputs[0]


def finetune(run: OpenRun, rows: Sequence[dict[str, Any]], batch: int, steps: int, seed: int) -> Any:
    """A copy of the base model after ``steps`` steps of the LM loss on the completions of ``rows``."""
    config, policy = run.config, run.policy
    source = config.model or assets.default_model()
    model, _ = load_pretrained(source, torch.float32)
    model.to(run.device).eval()  # no dropout, as in the run
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.step_size, weight_decay=0.0)
    prompts = [policy.encode(row["prompt"], config.max_prompt_tokens) for row in rows]
    completions = [policy.encode(row["completion"], config.max_new_tokens) for row in rows]
    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(len(rows)) for _ in range(-(-steps * batch // len(rows)))])
    for step in range(steps):
        chosen = order[step * batch : (step + 1) * batch]
        made = make_batch(
            policy,
            [prompts[i] for i in chosen],
            [completions[i] for i in chosen],
            [None] * len(chosen),
            run.device,
        )
        out = quark_loss(
            completion_logits(model, made),
            None,
            made.labels,
            made.mask,
            kl_coef=0.0,
            entropy_coef=0.0,
            vocab_size=policy.vocabulary,
        )
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        # As many steps as the run took, so its schedule is theirs.
        optimizer.param_groups[0]["lr"] = config.step_size * config.decay(step)
        optimizer.step()
        optimizer.zero_grad()
    converted = conversion(run.reference.dtype, stored_dtype(source))
    for parameter in model.requires_grad_(False).parameters():
        parameter.data = converted(parameter.data)
    model.set_attn_implementation(FAST_ATTENTION)
    return model


def measure(folder: Path, alphas: Sequence[float], console: Console) -> dict[str, Any]:
    finished = FinishedRun(folder)
    run, record = finished.run, finished.record
    config = run.config
    scored = [dict(row) for row in record.completions if row["reward"] is not None and row["completion"]]
    scored.sort(key=lambda row: row["reward"])
    size, steps = len(scored) // config.quantiles, config.rounds * config.steps
    shares = config.quantile_shares()
    experts = {}
    for name, part, share in (
        ("expert", scored[-size:], shares[-1]),
        ("anti-expert", scored[:size], shares[0]),
    ):
        begun, batch = time.monotonic(), max(1, round(share * config.batch_size))
        experts[name] = finetune(run, part, batch, steps, config.seed)
        console.print(
            f"{name}: {len(part)} texts, {steps} steps of {batch}, {time.monotonic() - begun:.0f} s"
        )
    kept = {BASE, "best token"} | {f"guided w={w:g}" for w in config.guidances()}
    table = [
        TableRow(name, base=name == BASE)
        for name in dict.fromkeys(row["row"] for row in record.evaluation_rows)
        if name in kept
    ]
    samples: dict[str, list[Sample]] = {row.name: [] for row in table}
    for fields in record.evaluation_rows:
        if (name := fields["row"]) in samples:
            samples[name].append(Sample(**{key: value for key, value in fields.items() if key != "row"}))
    for alpha in alphas:
        mixture = Mixture(
            run.reference, experts["expert"], experts["anti-expert"], alpha, finished.setup.sampling.top_p
        )
        row = TableRow(f"DExperts alpha={alpha:g}")
        samples[row.name] = finished.draw(row, mixture, top_p=1.0)
        table.append(row)
        console.print(f"{row.name}: sampled")
    return finished.table(table, samples)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--alphas", default="0.5,1,2", help="values of alpha (default: 0.5,1,2)")
    arguments = parser.parse_args()
    console = begin(arguments)
    found = measure(arguments.run, [float(a) for a in arguments.alphas.split(",")], console)
    command = f"python benchmarks/dexperts.py {arguments.run} --alphas {arguments.alphas}"
    end(arguments, console, found, command)


if __name__ == "__main__":
    main()
