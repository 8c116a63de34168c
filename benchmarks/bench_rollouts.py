"""Our decoding loop beside transformers' ``generate``, its continuous batching, and the products alone.

    pytest benchmarks/bench_rollouts.py --benchmark-only
    QUARK_FAST_BENCH=full OMP_NUM_THREADS=2 pytest benchmarks/bench_rollouts.py --benchmark-only \\
        --results benchmarks/results/rollouts-2-threads.json

Without QUARK_FAST_BENCH=full a tiny model runs, in seconds, to show that everything works. In full the
embedded model samples 5 completions of 20 tokens for each of 25 prompts of the toxicity task, in bfloat16 and
with the nucleus of .9, as in a batch of a run; none ends sooner. First all have to find the same greedy
completions in float32. Rounds are interleaved: before each of ours come all the others, whose medians stand
beside ours.

`products` is the roof: the prompts, and 19 tokens of 125 rows, through the weights of all linear layers and
nothing else.

The second one has completions that end: as long as a geometric distribution says, 24 tokens on average and at
most 96. Beside ours, which drops rows that have ended, stands the same loop that keeps all rows to the end.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from matrix_products import linear_weights, multiply
from pytest_benchmark.fixture import BenchmarkFixture
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from quark_fast.data import assets
from quark_fast.model.loading import load_pretrained, load_reference
from quark_fast.model.policy import Policy
from quark_fast.model.reading import pad_left
from quark_fast.rollout import transformers as rollout
from quark_fast.rollout.live_rows import LiveRows
from quark_fast.rollout.sampling import Conditioning, SampleRequest, Sampling
from quark_fast.rollout.transformers import sample
from quark_fast.runtime.memory import keep_freed_memory
from quark_fast.tasks.by_name import find_task

FULL = os.environ.get("QUARK_FAST_BENCH") == "full"
PROMPTS, SAMPLES, TOKENS = 25, 5, 20
# As many rows as a run's batch of 128 has of 5 samples each.
DRAWN = Sampling(TOKENS, TOKENS, temperature=1.0, top_p=0.9, rows=PROMPTS * SAMPLES)
LONG, MEAN, ROWS = 96, 24, 64  # of completions that end
GREEDY = Sampling(TOKENS, TOKENS, temperature=0.0, rows=PROMPTS * SAMPLES)

Engine = Callable[[Sampling], list[list[int]]]  # the completions, those of a prompt side by side


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's folder: the embedded one, or a tiny one."""
    if FULL:
        return assets.default_model()
    folder = tmp_path_factory.mktemp("tiny")
    words = {f"w{i}": i for i in range(60)} | {"<|endoftext|>": 60}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>").save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=61, eos_token_id=60, **shape)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def policy(source: Path) -> Policy:
    return Policy.create(source, quantiles=1)


@pytest.fixture(scope="module")
def prompts(policy: Policy) -> list[list[int]]:
    if FULL:
        texts = [row["prompt"] for row in find_task("toxicity").prompts()[0]]
    else:
        texts = [" ".join(f"w{i + j}" for j in range(1 + i % 5)) for i in range(PROMPTS)]
    return [policy.encode(text) for text in texts[:PROMPTS]]


def engines(source: Path, policy: Policy, dtype: torch.dtype, prompts: list[list[int]]) -> dict[str, Engine]:
    device = torch.device("cpu")
    fast = load_reference(source, dtype, device)
    plain: Any = load_pretrained(source, dtype)[0].eval()  # its attention is transformers' choice, sdpa
    contexts = [policy.conditioned(prompt, None) for prompt in prompts]

    def settings(sampling: Sampling, samples: int = 1) -> GenerationConfig:
        # Our loop blocks the end of text; in the clock nothing has to, as nothing stops at it.
        how = {"suppress_tokens": policy.stop_ids}
        if sampling.temperature:
            how = {"do_sample": True, "top_p": sampling.top_p, "top_k": 0}
        return GenerationConfig(
            max_new_tokens=TOKENS,
            num_return_sequences=samples,
            eos_token_id=None,
            pad_token_id=policy.stop_ids[0],
            **how,
        )

    def ours(sampling: Sampling) -> list[list[int]]:
        request = SampleRequest(prompts, Conditioning(), sampling, SAMPLES, seed=0)
        found = {
            i: group
            for indices, drawn, *_ in sample(policy, fast, request)
            for i, group in zip(indices, drawn, strict=True)
        }
        return [one for i in range(len(prompts)) for one in found[i]]

    def generate(sampling: Sampling) -> list[list[int]]:
        # Greedily it finds one completion a prompt, and refuses to find it five times.
        samples = SAMPLES if sampling.temperature else 1
        ids, mask = pad_left(contexts, device)
        made = plain.generate(ids, attention_mask=mask, generation_config=settings(sampling, samples))
        every = made[:, ids.shape[1] :].repeat_interleave(SAMPLES // samples, 0)
        return every.tolist()

    def generate_batch(sampling: Sampling) -> list[list[int]]:
        made = plain.generate_batch(
            [context for context in contexts for _ in range(SAMPLES)],
            generation_config=settings(sampling),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=64, num_blocks=2 * PROMPTS * SAMPLES, max_batch_tokens=1024
            ),
        )
        by_index = sorted(made, key=lambda name: int(name.rsplit("_", 1)[1]))
        return [made[name].generated_tokens for name in by_index]

    return {"ours": ours, "generate": generate, "generate_batch": generate_batch}


def products_alone(source: Path, dtype: torch.dtype, contexts: int) -> Callable[[], float]:
    """The seconds that the matrix products of the same work take."""
    model = load_reference(source, dtype, torch.device("cpu"))
    head, weights = model.get_output_embeddings().weight.detach(), linear_weights(model)
    body = [weight for weight in weights if weight.data_ptr() != head.data_ptr()]

    def seconds() -> float:
        with torch.inference_mode():
            prefill = multiply(body, contexts) + multiply([head], PROMPTS)
            return prefill + sum(multiply(weights, PROMPTS * SAMPLES) for _ in range(TOKENS - 1))

    return seconds


def bench_sampling(
    benchmark: BenchmarkFixture, source: Path, policy: Policy, prompts: list[list[int]]
) -> None:
    greedy = {name: run(GREEDY) for name, run in engines(source, policy, torch.float32, prompts).items()}
    for name, found in greedy.items():
        assert found == greedy["ours"], name
    assert [*map(len, greedy["ours"])] == [TOKENS] * PROMPTS * SAMPLES

    keep_freed_memory()  # as every command here does
    timed = engines(source, policy, torch.bfloat16, prompts)
    ours = timed.pop("ours")
    products = products_alone(
        source, torch.bfloat16, sum(len(policy.conditioned(prompt, None)) for prompt in prompts)
    )
    seconds: dict[str, list[float]] = {name: [] for name in [*timed, "products"]}

    def others() -> None:
        for name, run in timed.items():
            if name == "generate_batch" and len(seconds[name]) == 2:
                continue  # the slowest by far: once will do, after the round that warms up
            begun = time.perf_counter()
            completions = run(DRAWN)
            seconds[name].append(time.perf_counter() - begun)
            assert [*map(len, completions)] == [TOKENS] * PROMPTS * SAMPLES, name
        seconds["products"].append(products())

    benchmark.group = f"{PROMPTS} prompts, {SAMPLES} completions of {TOKENS} tokens, bfloat16"
    benchmark.pedantic(ours, args=(DRAWN,), setup=others, rounds=5 if FULL else 2, warmup_rounds=1)
    if benchmark.stats is None:  # under --benchmark-disable
        return
    median = benchmark.stats.stats.median
    medians = {name: statistics.median(found[1:]) for name, found in seconds.items()}  # the first warms up
    benchmark.extra_info |= {f"{name}_ms": round(1e3 * found, 1) for name, found in medians.items()}
    benchmark.extra_info["completions_per_s"] = round(PROMPTS * SAMPLES / median, 1)
    benchmark.extra_info["generate_to_ours"] = round(medians["generate"] / median, 2)
    benchmark.extra_info["to_products"] = round(median / medians["products"], 2)


class Ending(LiveRows):
    """Rows that end at lengths of their own, whatever is drawn for them."""

    ends = torch.rand(LONG, ROWS, generator=torch.Generator().manual_seed(0)) < 1 / MEAN

    def add(self, tokens: torch.Tensor, *told: torch.Tensor) -> None:
        ends = self.ends[self._length, self._held]
        super().add(torch.where(ends, self.stop[0], tokens), *told)


def bench_completions_that_end(
    benchmark: BenchmarkFixture,
    monkeypatch: pytest.MonkeyPatch,
    source: Path,
    policy: Policy,
    prompts: list[list[int]],
) -> None:
    """The answer checked first: the greedy completions in float32 with all rows."""
    monkeypatch.setattr(rollout, "LiveRows", Ending)
    share, cpu = rollout.WORTH_DROPPING, torch.device("cpu")
    many = (prompts * 3)[:ROWS]

    def run(model: Any, share: float, **how: Any) -> list[list[list[int]]]:
        monkeypatch.setattr(rollout, "WORTH_DROPPING", share)
        request = SampleRequest(many, Conditioning(), Sampling(LONG, LONG, rows=ROWS, **how), 1, seed=0)
        ((_, drawn, *_),) = sample(policy, model, request)
        return drawn

    model = load_reference(source, torch.float32, cpu)
    greedy = run(model, share, temperature=0.0)
    assert greedy == run(model, 0.0, temperature=0.0)
    lengths = [len(one) for group in greedy for one in group]
    assert len({*lengths}) > 20 and max(lengths) > 2 * MEAN

    keep_freed_memory()
    model = load_reference(source, torch.bfloat16, cpu)
    seconds: list[float] = []

    def all_rows() -> None:
        begun = time.perf_counter()
        run(model, 0.0, top_p=0.9)
        seconds.append(time.perf_counter() - begun)

    benchmark.group = f"{ROWS} completions of at most {LONG} tokens, {MEAN} on average, bfloat16"
    benchmark.pedantic(
        run,
        args=(model, share),
        kwargs={"top_p": 0.9},
        setup=all_rows,
        rounds=3 if FULL else 2,
        warmup_rounds=1,
    )
    if benchmark.stats is None:  # under --benchmark-disable
        return
    kept = statistics.median(seconds[1:])
    benchmark.extra_info["all_rows_ms"] = round(1e3 * kept, 1)
    benchmark.extra_info["all_rows_to_ours"] = round(kept / benchmark.stats.stats.median, 2)
