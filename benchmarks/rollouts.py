"""Our decoding loop beside transformers' ``generate`` and its continuous batching.

    python benchmarks/rollouts.py --threads 1 --output benchmarks/results/rollouts-1-thread.json

The embedded model samples one completion of 20 tokens of each of 32 prompts of the toxicity task; none ends
sooner, so that all do the same work. Before the clock starts all three have to find the same greedy
completions in float32. Rounds are interleaved: what else the machine does strikes all alike. With one thread
the time is the processor's, which other processes do not lengthen as they do the wall clock's.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import ContinuousBatchingConfig, GenerationConfig

from quark_fast.data import assets
from quark_fast.model.loading import load_pretrained, load_reference
from quark_fast.model.policy import Policy
from quark_fast.model.reading import pad_left
from quark_fast.rollout.sampling import Conditioning, SampleRequest, Sampling
from quark_fast.rollout.transformers import sample
from quark_fast.runtime.machine import quiet_libraries, sampling_dtype, set_threads, versions
from quark_fast.runtime.memory import keep_freed_memory
from quark_fast.tasks.by_name import find_task

Engine = Callable[[Sampling], list[list[int]]]


def engines(policy: Policy, dtype: torch.dtype, prompts: list[list[int]]) -> dict[str, Engine]:
    """Each samples one completion a prompt, in the prompts' order."""
    device = torch.device("cpu")
    fast = load_reference(assets.default_model(), dtype, device)
    plain, _ = load_pretrained(assets.default_model(), dtype)
    plain.eval()
    contexts = [policy.conditioned(prompt, None) for prompt in prompts]

    def wanted(sampling: Sampling) -> GenerationConfig:
        greedy = sampling.temperature == 0
        draws = {} if greedy else {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        # Without an end of text, which our loop blocks: continuous batching has no minimum length.
        return GenerationConfig(
            do_sample=not greedy,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=None,
            pad_token_id=policy.stop_ids[0],
            suppress_tokens=policy.stop_ids,
            **draws,
        )

    def ours(sampling: Sampling) -> list[list[int]]:
        found: dict[int, list[int]] = {}
        for indices, drawn in sample(policy, fast, SampleRequest(prompts, Conditioning(), sampling, 1, 0)):
            found.update(zip(indices, (one for (one,) in drawn), strict=True))
        return [found[i] for i in range(len(prompts))]

    def generate(sampling: Sampling) -> list[list[int]]:
        ids, mask = pad_left(contexts, device)
        made = plain.generate(ids, attention_mask=mask, generation_config=wanted(sampling))
        return [row.tolist() for row in made[:, ids.shape[1] :]]

    def continuous(sampling: Sampling) -> list[list[int]]:
        made = plain.generate_batch(
            contexts,
            generation_config=wanted(sampling),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=64, num_blocks=64, max_batch_tokens=512
            ),
        )
        by_place = sorted(made, key=lambda name: int(name.rsplit("_", 1)[1]))
        return [made[name].generated_tokens for name in by_place]

    return {"quark_fast": ours, "generate": generate, "generate_batch": continuous}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    quiet_libraries()
    keep_freed_memory()
    set_threads(arguments.threads)
    policy = Policy.create(assets.default_model(), quantiles=1)
    rows, _ = find_task("toxicity").prompts()
    prompts = [policy.encode(row["prompt"], 128) for row in rows[: arguments.prompts]]
    tokens = 20
    sampling = Sampling(tokens, tokens, temperature=1.0, top_p=0.9, rows=len(prompts))

    greedy = {
        name: engine(Sampling(tokens, tokens, temperature=0.0, rows=len(prompts)))
        for name, engine in engines(policy, torch.float32, prompts).items()
    }
    same = {
        name: sum(a == b for a, b in zip(found, greedy["quark_fast"], strict=True))
        for name, found in greedy.items()
    }
    console = Console()
    console.print(f"greedy completions like ours: {same}")

    dtype = sampling_dtype("bf16", torch.device("cpu"))
    timed = engines(policy, dtype, prompts)
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    for _ in range(arguments.rounds + 1):
        for name, engine in timed.items():
            begun = clock()
            assert [len(one) for one in engine(sampling)] == [tokens] * len(prompts)
            seconds[name].append(clock() - begun)
    about = versions(torch.device("cpu"))
    about["command"] = shlex.join(["python", *sys.argv])
    made: list[dict[str, Any]] = [
        {
            "name": name,
            "dtype": str(dtype),
            "clock": clock.__name__,
            "prompts": len(prompts),
            "tokens": tokens,
            "same_greedy_completions": same[name],
            "median_s": round(statistics.median(found[1:]), 3),  # the first warms up
            "min_s": round(min(found[1:]), 3),
            "completions_per_s": round(len(prompts) / statistics.median(found[1:]), 2),
        }
        for name, found in seconds.items()
    ]
    for row in made:
        console.print(row)
    arguments.output.write_text(json.dumps(about | {"rows": made}, indent=1) + "\n")


if __name__ == "__main__":
    main()
