"""Decoding on a GPU: eager, in steps of fixed shapes, as a CUDA graph; transformers.generate, and vLLM.

    python benchmarks/gpu_decoding.py --output benchmarks/results/decoding-CARD.json
    python benchmarks/gpu_decoding.py --tiny        # on the CPU, in seconds: it runs; the times mean nothing

Random weights in the shapes of SmolLM2-135M, bfloat16, as no time depends on their values. Each row of the
table reads a prompt for each completion and draws all tokens, at top_p 0.9: the whole call, the median of the
rounds. `first_s` is the first call, with the recording of the graph or the compilation. `floor_ms` a token is
one read of the weights and of the cache, half of its new tokens filled, at the rate of a large copy. Before
the clock starts, the logits of each way of ours are compared with the eager ones, for the same tokens.
transformers has the attention that PyTorch chooses for it. vLLM comes last, where it is installed, plain
alone: its first call has its start, and it keeps no prompt from one call to the next.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from quark_fast.model.fixed_step import FixedSteps
from quark_fast.model.loading import frozen
from quark_fast.model.reading import Read, Reading, Sent, next_logits
from quark_fast.rollout.tokens import NextToken, draw_tokens

SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
TINY = SMOLLM2 | {"vocab_size": 515, "hidden_size": 36, "intermediate_size": 48, "num_hidden_layers": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=128, help="completions side by side (default: 128)")
    parser.add_argument("--prompt", type=int, default=16, help="length of a prompt, tokens (default: 16)")
    parser.add_argument("--tokens", type=int, default=20, help="of a completion (default: 20)")
    parser.add_argument("--rounds", type=int, default=10, help="timed calls (default: 10)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--output", type=Path, help="JSON to write")
    asked = parser.parse_args()
    if not asked.tiny and not torch.cuda.is_available():
        sys.exit("no CUDA device here; --tiny tries this file out on the CPU")
    device = torch.device("cpu" if asked.tiny else "cuda")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(TINY if asked.tiny else SMOLLM2)))
    model = frozen(model.to(torch.float32 if asked.tiny else torch.bfloat16), device)
    about = {
        "command": shlex.join(["python", *sys.argv]),
        "device": "a tiny model: the times mean nothing"
        if asked.tiny
        else torch.cuda.get_device_name(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(json.dumps(about, indent=1))
    rows: list[dict[str, Any]] = []
    parts = [functools.partial(measure, model, asked, streams) for streams in (1, 2)]
    for part in (*parts, lambda: [row_of_vllm(model, asked)]):
        rows += part()
        if asked.output is not None:
            asked.output.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    if wrong := [row["way"] for row in rows if not row.get("right", True)]:
        sys.exit(f"wrong: {', '.join(wrong)}")


def measure(model: Any, asked: argparse.Namespace, streams: int) -> list[dict[str, Any]]:
    """All ways to decode, plain (one stream) or guided (two), as rows of the table."""
    contexts = torch.randint(1, model.config.vocab_size, (asked.rows * streams, asked.prompt)).tolist()
    fixed = ["static"] if asked.tiny else ["static", "graph"]
    ways: dict[str, Read] = {"eager": functools.partial(next_logits, model, reading=Reading())}
    for kind in fixed:
        steps = FixedSteps(model, Reading(), kind)
        ways[kind] = functools.partial(steps.next_logits, new_tokens=asked.tokens)
    weights = torch.tensor([1.0] if streams == 1 else [1.5, -0.5], device=model.device)
    wanted: list[Tensor] = []  # eager's logits, which come first

    def ours(name: str, read: Read) -> dict[str, Any]:
        begun = time.monotonic()
        logits = logits_of(read, contexts, asked.tokens)
        first = seconds_since(begun, model.device)
        wanted.append(logits)
        # bfloat16 keeps 8 bits, and each layer rounds anew; a wrong column or position makes tenths.
        gap = float((logits - wanted[0]).abs().max() / (wanted[0].amax() - wanted[0].amin()))
        times = clocked(functools.partial(decode, read, contexts, weights, asked.tokens), asked, model.device)
        return row_of(name, streams, times, asked) | {"first_s": first, "right": gap < 0.05}

    def theirs(name: str, cache: str | None) -> dict[str, Any]:
        call = functools.partial(generate, model, contexts, asked.tokens, cache)
        begun = time.monotonic()
        call()
        first = seconds_since(begun, model.device)
        row = row_of(name, streams, clocked(call, asked, model.device), asked)
        return row | {"first_s": first, "right": True}

    measured = {name: functools.partial(ours, name, read) for name, read in ways.items()}
    if streams == 1:
        measured["generate"] = functools.partial(theirs, "generate", None)
        if not asked.tiny:  # it compiles
            measured["generate static"] = functools.partial(theirs, "generate static", "static")
    found = [row_or_why_not(name, streams, call) for name, call in measured.items()]
    show(found, model, asked)
    return found


def row_or_why_not(name: str, streams: int, call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A row, or what it failed by: time on a GPU is scarce, and the other rows are there."""
    try:
        return call()
    except Exception as error:
        return {"way": name, "streams": streams, "failed": in_words(error), "right": False}


def in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()[:300]}"


def show(rows: list[dict[str, Any]], model: Any, asked: argparse.Namespace) -> None:
    """Print the rows, all of one number of streams, with the floor that they get here."""
    floor = least_bytes(model, asked, rows[0]["streams"]) / bytes_per_second(model.device) * 1e3
    for row in rows:
        row["floor_ms"] = floor
        if "failed" in row:
            print(f"{row['way']:16} {row['streams']} streams  {row['failed']}")
            continue
        print(
            f"{row['way']:16} {row['streams']} streams  {row['ms_a_token']:8.3f} ms a token"
            f"  floor {floor:.3f}  {row['tokens_per_s']:10.0f} tokens/s  first call {row['first_s']:.2f} s"
        )


def row_of_vllm(model: Any, asked: argparse.Namespace) -> dict[str, Any]:
    """vLLM's, with the same weights; or why it is left out."""
    about: dict[str, Any] = {"way": "vllm", "streams": 1}
    if asked.tiny:
        about["left_out"] = "timed on a GPU alone"
    elif importlib.util.find_spec("vllm") is None:
        about["left_out"] = "not installed: pip install vllm"
    else:
        try:
            about |= timed_vllm(model, asked)
            show([about], model, asked)
        except Exception as error:  # time on a GPU is scarce: the other rows are there
            about["left_out"] = in_words(error)
    if "left_out" in about:
        print(f"vllm             left out: {about['left_out']}")
    return about


def timed_vllm(model: Any, asked: argparse.Namespace) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    contexts = torch.randint(1, model.config.vocab_size, (asked.rows, asked.prompt)).tolist()
    prompts = [{"prompt_token_ids": ids} for ids in contexts]
    # top_k 0: all tokens.
    wanted = SamplingParams(top_p=0.9, top_k=0, max_tokens=asked.tokens, ignore_eos=True, detokenize=False)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        begun = time.monotonic()
        engine = LLM(
            model=folder,
            dtype="bfloat16",
            skip_tokenizer_init=True,
            generation_config="vllm",
            max_model_len=asked.prompt + asked.tokens,
            max_num_seqs=asked.rows,
            enable_prefix_caching=False,
            gpu_memory_utilization=0.5,
        )
    call = functools.partial(engine.generate, prompts, wanted, use_tqdm=False)
    lengths = {len(one.outputs[0].token_ids) for one in call()}
    first = seconds_since(begun, model.device)
    row = row_of("vllm", 1, clocked(call, asked, model.device), asked)
    return row | {"first_s": first, "right": lengths == {asked.tokens}}


def row_of(name: str, streams: int, times: list[float], asked: argparse.Namespace) -> dict[str, Any]:
    taken = statistics.median(times)
    return {
        "way": name,
        "streams": streams,
        "rows": asked.rows,
        "prompt": asked.prompt,
        "tokens": asked.tokens,
        "ms_a_token": taken / asked.tokens * 1e3,
        "tokens_per_s": asked.rows * asked.tokens / taken,
        "seconds": times,
    }


@torch.inference_mode()
def logits_of(read: Read, contexts: list[list[int]], tokens: int) -> Tensor:
    """(tokens, rows, V) float32, after tokens that are the same for every way."""
    reader = read(contexts, 1)
    found = [next(reader).float()]
    for step in range(tokens - 1):
        given = torch.arange(len(contexts), device=found[0].device) + step
        found.append(reader.send(Sent(given % found[0].shape[1])).float().clone())
    return torch.stack(found)


@torch.inference_mode()
def decode(read: Read, contexts: list[list[int]], weights: Tensor, tokens: int) -> None:
    """A batch as ``rollout.transformers`` draws it."""
    generator = torch.Generator(weights.device).manual_seed(0)
    none = torch.empty(0, dtype=torch.long, device=weights.device)
    reader = read(contexts, 1)
    logits = next(reader)
    wanted = NextToken(weights, logits.shape[1], none, 1.0, 0.9)
    for _ in range(tokens - 1):
        drawn = draw_tokens(logits, wanted, generator).clamp(min=0)
        logits = reader.send(Sent(drawn.repeat(len(weights))))
    draw_tokens(logits, wanted, generator)


def generate(model: Any, contexts: list[list[int]], tokens: int, cache: str | None) -> None:
    """The same by transformers, with its own attention."""
    own = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    ids = torch.tensor(contexts, device=model.device)
    more = {} if cache is None else {"cache_implementation": cache}
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=True,
        top_p=0.9,
        top_k=0,
        pad_token_id=0,
        **more,
    )
    model.set_attn_implementation(own)


def clocked(call: Callable[[], Any], asked: argparse.Namespace, device: torch.device) -> list[float]:
    call()
    times = []
    for _ in range(asked.rounds):
        begun = time.monotonic()
        call()
        times.append(seconds_since(begun, device))
    return times


def seconds_since(begun: float, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic() - begun


def least_bytes(model: Any, asked: argparse.Namespace, streams: int) -> float:
    """What one decoding step has to read, in the middle of a completion."""
    config, size = model.config, model.dtype.itemsize
    weights = sum(p.numel() for p in model.parameters()) * size
    width = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    columns = asked.prompt + asked.tokens / 2
    return weights + 2 * config.num_hidden_layers * streams * asked.rows * columns * width * size


def bytes_per_second(device: torch.device) -> float:
    """Of a large copy, read and written."""
    source = torch.empty((1 << 30 if device.type == "cuda" else 1 << 22), dtype=torch.uint8, device=device)
    target, times = torch.empty_like(source), []
    for _ in range(5):
        seconds_since(0.0, device)
        begun = time.monotonic()
        target.copy_(source)
        times.append(seconds_since(begun, device))
    return 2 * source.numel() / min(times)


if __name__ == "__main__":
    main()
