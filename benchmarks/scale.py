"""What a run needs on 1, 8 and 64 GPUs, worked out on paper: the tables of docs/scale.md.

    python benchmarks/scale.py
    python benchmarks/scale.py --plan                               # 1B and 8B on GPUs of 24, 80 and 141 GB
    python benchmarks/scale.py --plan --model FOLDER --memory 48    # any causal LM, by its config alone
    python benchmarks/scale.py --plan --optimizer adamw-8bit        # as a run of that setting

Nothing here is measured. Every number follows from the shapes below by the formulas in the functions, in
``step_bytes.py`` or in ``quark_fast/model/sizes.py``, by which a run on a GPU chooses how many rows are side
by side.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

import step_bytes

from quark_fast.config import Config
from quark_fast.errors import UsageError
from quark_fast.model import sizes

GB = 1e9


@dataclass(frozen=True)
class Shape:
    """A Llama: grouped-query attention, SwiGLU, RMSNorm, no biases."""

    name: str
    layers: int
    width: int
    feed_forward: int
    heads: int
    key_heads: int
    vocabulary: int
    tied: bool

    @property
    def key_width(self) -> int:
        return self.key_heads * (self.width // self.heads)

    @property
    def layer(self) -> int:
        """Parameters of a layer."""
        attention = 2 * self.width * self.width + 2 * self.width * self.key_width
        return attention + 3 * self.width * self.feed_forward + 2 * self.width

    @property
    def outside(self) -> int:
        """Parameters beside the layers: embedding, head, last norm."""
        tables = 1 if self.tied else 2
        return tables * self.vocabulary * self.width + self.width

    @property
    def parameters(self) -> int:
        return self.layers * self.layer + self.outside

    @property
    def saved(self) -> int:
        """Bytes a token and layer that the backward pass needs in bf16; attention keeps no scores.

        All weights, as autocast has it: ``step_bytes.saved_bytes``, with queries as wide as the model.
        """
        return step_bytes.saved_bytes(self.sizes, lora_rank=0)

    @property
    def sizes(self) -> sizes.Shape:
        width, key_width = self.width, self.key_width
        return sizes.Shape(
            self.layers, width, self.feed_forward, self.heads, key_width, width, self.vocabulary
        )

    def config(self) -> Any:
        """As transformers has it."""
        from transformers import LlamaConfig

        return LlamaConfig(
            num_hidden_layers=self.layers,
            hidden_size=self.width,
            intermediate_size=self.feed_forward,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads,
            vocab_size=self.vocabulary,
            tie_word_embeddings=self.tied,
        )


SHAPES = [
    Shape("1B", 16, 2048, 8192, 32, 8, 128_256, tied=True),  # Llama 3.2 1B
    Shape("8B", 32, 4096, 14_336, 32, 8, 128_256, tied=False),  # Llama 3.1 8B
    Shape("70B", 80, 8192, 28_672, 64, 8, 128_256, tied=False),  # Llama 3.1 70B
]

# One setting for all rows: the defaults with longer texts.
MICRO_BATCH = 16  # samples a forward pass and GPU
STREAMS = 2  # own and mirror token: the contrast term
TOKENS = 256  # of prompt and completion together
COMPLETION = 128
SAMPLE_BATCH = 128  # completions side by side
POOL = 1_000_000  # samples


def state(p: float, sharded_over: int) -> float:
    """Float32 weights, gradients, Adam's two moments: 16 bytes a parameter, of a shard or of all."""
    return 16 * p / sharded_over


def zero_state(p: float, n: int, stage: int) -> float:
    """ZeRO: whole float32 weights, gradients whole (1) or of a part (2), of a part a copy and two moments."""
    return 4 * p + (4 * p if stage == 1 else 4 * p / n) + 12 * p / n


def frozen(p: float) -> float:
    """A whole bf16 model."""
    return 2 * p


def gathered(shape: Shape, sharded: bool) -> float:
    """bf16 weights to compute with: autocast's copies of all, or of two layers and what is beside them."""
    return 2 * (2 * shape.layer + shape.outside if sharded else shape.parameters)


def activations(shape: Shape, recompute: bool) -> float:
    """What the backward of a micro-batch needs; recomputed, the inputs of all layers and the rest of one."""
    return step_bytes.activation_bytes(shape.sizes, MICRO_BATCH * STREAMS * TOKENS, 0, recompute)


def loss(shape: Shape) -> float:
    """bf16 logits of a chunk of both models, and the float32 gradient of the head's weight."""
    return step_bytes.loss_bytes(shape.sizes, MICRO_BATCH * STREAMS * COMPLETION, 0)


def whole_logits(shape: Shape) -> float:
    """What the linear loss saves: float32 logits of policy (both streams), reference, and a gradient."""
    return 4 * (2 * STREAMS + 1) * MICRO_BATCH * COMPLETION * shape.vocabulary


def cache(shape: Shape, guided: bool = True) -> float:
    """bf16 keys and values of a sampling batch; guided sampling has two streams."""
    return 2 * 2 * shape.layers * shape.key_width * TOKENS * SAMPLE_BATCH * (2 if guided else 1)


def pool() -> float:
    """Host RAM of each process: int32 ids, and 14 bytes a sample for rewards and order."""
    return POOL * (4 * TOKENS + 14)


def ddp_traffic(p: float, n: int) -> float:
    """Bytes that a GPU sends a step: the float32 gradient, all-reduced in a ring."""
    return 2 * (n - 1) / n * 4 * p


def fsdp_traffic(p: float, n: int) -> float:
    """Bytes that a GPU sends a micro-batch: bf16 weights gathered twice, the float32 gradient scattered."""
    return (n - 1) / n * (2 * 2 * p + 4 * p)


def copy_traffic(p: float, n: int) -> float:
    """Bytes that a GPU sends when a sampling copy is gathered: float32 weights, once a round."""
    return (n - 1) / n * 4 * p


def table(rows: list[list[str]]) -> str:
    head, *body = rows
    return "\n".join("| " + " | ".join(r) + " |" for r in (head, ["---"] * len(head), *body))


def gb(value: float) -> str:
    return f"{value / GB:.1f}" if value < 100 * GB else f"{value / GB:.0f}"


def memory() -> str:
    rows = [["GB a GPU", *(f"{s.name} {n}" for s in SHAPES for n in ("DDP", "FSDP2 x8", "FSDP2 x64"))]]
    layouts = [(s, n) for s in SHAPES for n in (1, 8, 64)]
    rows.append(["weights, gradients, Adam (float32)", *(gb(state(s.parameters, n)) for s, n in layouts)])
    rows.append(["weights to compute with (bf16)", *(gb(gathered(s, n > 1)) for s, n in layouts)])
    rows.append(["reference (bf16, whole)", *(gb(frozen(s.parameters)) for s, _ in layouts)])
    rows.append(["activations, recomputed", *(gb(activations(s, True)) for s, _ in layouts)])
    rows.append(["loss from hidden states", *(gb(loss(s)) for s, _ in layouts)])
    rows.append(["**learning**", *(f"**{gb(learning(s, n))}**" for s, n in layouts)])
    rows.append(["sampling copy (bf16, whole)", *(gb(frozen(s.parameters)) for s, _ in layouts)])
    rows.append(["KV cache", *(gb(cache(s)) for s, _ in layouts)])
    rows.append(["**sampling**", *(f"**{gb(sampling(s, n))}**" for s, n in layouts)])
    return table(rows)


def learning(shape: Shape, n: int) -> float:
    p = shape.parameters
    return state(p, n) + gathered(shape, n > 1) + frozen(p) + activations(shape, True) + loss(shape)


def sampling(shape: Shape, n: int) -> float:
    """No activations meanwhile, but two whole models; gradients only of DDP, in the buffers it keeps."""
    p = shape.parameters
    return (16 if n == 1 else 12) * p / n + 2 * frozen(p) + cache(shape)


def engines() -> str:
    rows = [["weights, gradients, Adam, GB a GPU", *(s.name for s in SHAPES)]]
    for name, n, stage in (("DDP", 8, 0), ("ZeRO 1 x8", 8, 1), ("ZeRO 2 x8", 8, 2), ("FSDP2 x8", 8, 3)):
        p = [s.parameters for s in SHAPES]
        needed = [zero_state(x, n, stage) if stage in (1, 2) else state(x, n if stage else 1) for x in p]
        rows.append([name, *(gb(x) for x in needed)])
    return table(rows)


def traffic() -> str:
    rows = [["GB sent by a GPU", *(f"{s.name} x{n}" for s in SHAPES for n in (8, 64))]]
    layouts = [(s.parameters, n) for s in SHAPES for n in (8, 64)]
    rows.append(["DDP, a step", *(gb(ddp_traffic(p, n)) for p, n in layouts)])
    rows.append(["FSDP2, a micro-batch", *(gb(fsdp_traffic(p, n)) for p, n in layouts)])
    rows.append(["FSDP2, a sampling copy", *(gb(copy_traffic(p, n)) for p, n in layouts)])
    rows.append(["seconds: DDP at 450 GB/s", *(f"{ddp_traffic(p, n) / 450e9:.2f}" for p, n in layouts)])
    rows.append(["seconds: FSDP2 at 450 GB/s", *(f"{fsdp_traffic(p, n) / 450e9:.2f}" for p, n in layouts)])
    rows.append(["seconds: FSDP2 at 50 GB/s", *(f"{fsdp_traffic(p, n) / 50e9:.1f}" for p, n in layouts)])
    return table(rows)


def time_shares() -> str:
    """A round of 100,000 completions and 64 steps of 1,024 samples, on 8 H100 (bf16, on paper)."""
    rate, bandwidth, gpus = 400e12, 3.35e12, 8  # operations a second at 40% of the peak; bytes a second
    completions, steps, batch = 100_000, 64, 1_024
    rows = [["seconds on 8 H100", *(s.name for s in SHAPES)]]
    decode, prefill, learn = [], [], []
    for s in SHAPES:
        p = s.parameters
        batches = completions / SAMPLE_BATCH / gpus
        # Each token reads all weights, and on average half of the final cache.
        decode.append(batches * COMPLETION * (2 * p + cache(s) / 2) / bandwidth)
        prefill.append(completions * STREAMS * (TOKENS - COMPLETION) * 2 * p / rate / gpus)
        # Forward, backward and recomputation: 8 operations a parameter and token; the reference: 2.
        learn.append(steps * batch * TOKENS * (8 * STREAMS + 2) * p / rate / gpus)
    rows.append(["decoding, at the memory's speed", *(f"{x:.0f}" for x in decode)])
    rows.append(["prefill", *(f"{x:.0f}" for x in prefill)])
    rows.append(["learning", *(f"{x:.0f}" for x in learn)])
    shares = [(d + f) / (d + f + x) for d, f, x in zip(decode, prefill, learn, strict=True)]
    rows.append(["sampling's share", *(f"{x:.0%}" for x in shares)])
    return table(rows)


RANK = 16
OPTIMIZERS = get_args(get_type_hints(Config)["optimizer"])


def step_that_fits(
    shape: step_bytes.TrainedShape, memory: float, rank: int, recompute: bool, optimizer: str
) -> int:
    """Samples a forward pass of a step: the first of 16, 8, 4, 2 and 1 that fits; 0: not even one does."""
    most = Config().samples_a_pass(on_cpu=False)

    def fits(samples: int) -> bool:
        need = step_bytes.step_bytes(shape, samples, TOKENS, COMPLETION, rank, recompute, optimizer)
        state = step_bytes.state_bytes(shape, rank, optimizer)
        return (need - state) <= (memory - state) * sizes.SHARE

    tried = [most >> halved for halved in range(int(math.log2(most)) + 1)]
    return next((samples for samples in tried if fits(samples)), 0)


def plan(shape: step_bytes.TrainedShape, memories: list[float], optimizer: str) -> list[list[str]]:
    """The rows of a model's table: what it takes, and what is chosen for each size of memory, bytes."""
    rows = [["", "GB", *(f"{memory / GB:g} GB" for memory in memories)]]
    side_by_side = Config().sample_batch
    for rank, kind in ((RANK, f"LoRA {RANK}"), (0, "all weights")):
        for name in OPTIMIZERS:
            moments = step_bytes.optimizer_bytes(shape, rank, name)
            rows.append([f"{kind}: state of {name}", f"{moments / GB:.3g}", *("" for _ in memories)])
        for recompute in (False, True):
            how = ", recomputed" if recompute else ""
            peak = step_bytes.step_bytes(shape, MICRO_BATCH, TOKENS, COMPLETION, rank, recompute, optimizer)
            found = [step_that_fits(shape, memory, rank, recompute, optimizer) for memory in memories]
            chosen = [f"{samples} a pass" if samples else "does not fit" for samples in found]
            rows.append([f"{kind}: step of {MICRO_BATCH} x {TOKENS}{how}", gb(peak), *chosen])
        held = step_bytes.held_while_sampling(shape, rank, optimizer)
        completion = sizes.sampling_bytes(shape, TOKENS)
        for streams, name in ((1, "sampled"), (2, "sampled, guided")):
            most = side_by_side // streams
            chosen = [_fitting(streams * completion, memory - held, most) for memory in memories]
            need = held + most * streams * completion
            rows.append([f"{kind}: {most} completions {name}", gb(need), *chosen])
        read = sizes.reading_bytes(shape, TOKENS)
        chosen = [
            str(sizes.rows_that_fit(read, int(memory - held)))
            if read <= (memory - held) * sizes.SHARE
            else "does not fit"
            for memory in memories
        ]
        rows.append([f"{kind}: texts read side by side, beside the model", gb(held + read), *chosen])
    return rows


def _fitting(row: int, free: float, most: int) -> str:
    size = sizes.halved_to_fit(most, row, int(free))
    return str(size) if size * row <= free * sizes.SHARE else "does not fit"


def show_plan(model: str | None, memories: list[float], optimizer: str) -> None:
    """Print the tables of ``--plan``."""
    if model is None:
        shapes = [(s.name, s.config()) for s in SHAPES if s.name in ("1B", "8B")]
    else:
        from transformers import AutoConfig

        try:
            shapes = [(model, AutoConfig.from_pretrained(model))]
        except (OSError, ValueError) as error:
            first = str(error).splitlines()[0]
            raise UsageError(
                f"--model {model}: {first}; give a folder or a hub name with a config.json"
            ) from error
    rows = f"{TOKENS} tokens a row, {COMPLETION} of them the completion"
    print(f"Computed, not measured: {rows}; bf16, {optimizer}.\n")
    for name, config in shapes:
        try:
            shape = step_bytes.shape_on_meta(config)
        except ValueError as error:
            raise UsageError(f"--model {name}: {error}; give a decoder") from error
        cache = sizes.cache_bytes(shape, TOKENS)
        print(
            f"{name}: {shape.parameters / GB:.2f} billion parameters, {cache / 1e6:.1f} MB of cache a row\n"
        )
        print(table(plan(shape, memories, optimizer)) + "\n")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--plan", action="store_true", help="peak bytes, and the sizes that a GPU gets")
    made.add_argument("--model", metavar="FOLDER|NAME", help="with --plan: only this; its config is read")
    made.add_argument(
        "--memory", type=float, nargs="+", default=[24, 80, 141], metavar="GB", help="with --plan, 10^9 bytes"
    )
    made.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="with --plan: the run's")
    return made


def main() -> int:
    asked = parser().parse_args()
    if not asked.plan:
        everything()
        return 0
    try:
        if any(not 0 < memory < math.inf for memory in asked.memory):
            raise UsageError(f"--memory {asked.memory}: give numbers above 0, GB")
        show_plan(asked.model, [memory * GB for memory in asked.memory], asked.optimizer)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def everything() -> None:
    """Print the tables of docs/scale.md."""
    for s in SHAPES:
        print(f"{s.name}: {s.parameters / GB:.2f} billion parameters, {s.saved:,} bytes a token and layer")
    print(f"\nMemory of a GPU\n\n{memory()}\n\n{engines()}\n")
    print(f"Traffic\n\n{traffic()}\n\nTime\n\n{time_shares()}\n")
    print("Whole float32 logits would take, GB:", *(f"{s.name} {gb(whole_logits(s))}" for s in SHAPES))
    print(
        "Activations without recomputation, GB:", *(f"{s.name} {gb(activations(s, False))}" for s in SHAPES)
    )
    print(f"Pool of {POOL:,} samples in every process's RAM, GB: {gb(pool())}")


if __name__ == "__main__":
    sys.exit(main())
