"""A whole training step of ours beside the authors' eager loop: forward, loss, backward, clipping, AdamW.

Both train all weights of the same random model, of SmolLM2-135M's shape, on the same samples, one pass for
all of them, by the loss of the paper:

    mean over tokens of  nll + KL_COEF KL(policy || reference) - ENTROPY_COEF H

- `authors` is their loop (github.com/GXimingLu/Quark): transformers' forward with the logits of every
  position and the attention that PyTorch chooses, the terms by log_softmax, gather and sums over the
  vocabulary (losses.authors), the terms read for the log, clipping, AdamW, a schedule. In float32, as
  published, and under autocast in the precision that ours takes.
- `ours` is the trainer's own step (quark_fast.training.learn), without the contrast, which theirs lacks.

Before the clock starts, the terms and the norm of the gradient are compared. The roof is the arithmetic that
no program can spare, by the rate of a large product in bfloat16: with P the parameters of the layers and H
those of the head,   8 (P tokens + H completion tokens)   operations, 6 of the policy and 2 of the reference.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from losses import ENTROPY_COEF, KL_COEF, authors
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from quark_fast.config import Config
from quark_fast.model.batch import make_batch
from quark_fast.model.structure import linear_head
from quark_fast.pool.pool import RolloutBatch
from quark_fast.runtime.machine import quiet_libraries
from quark_fast.training.trainer import Trainer

QUANTILES = 5
Numbers = dict[str, float]


class StepCase(NamedTuple):
    samples: int
    prompt: int
    completion: int
    vocab: int = 49152
    width: int = 576
    feed_forward: int = 1536
    layers: int = 30
    heads: int = 9
    key_heads: int = 3

    def __str__(self) -> str:
        return f"step-{self.samples}x{self.prompt}+{self.completion}-V{self.vocab}"


# The paper's batch and lengths, then longer texts.
CASES = [StepCase(128, 16, 20), StepCase(32, 128, 128)]
TINY = StepCase(3, 4, 5, vocab=61, width=16, feed_forward=32, layers=2, heads=2, key_heads=1)


def save_random_model(case: StepCase, folder: Path) -> None:
    words = {f"w{i}": i for i in range(case.vocab - 2)}
    end = case.vocab - 2
    backend = Tokenizer(models.WordLevel(words | {"<end>": end, "<unk>": end + 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"eos_token": "<end>", "unk_token": "<unk>", "pad_token": "<end>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **named).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=case.vocab,
        hidden_size=case.width,
        intermediate_size=case.feed_forward,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.key_heads,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def samples(case: StepCase) -> RolloutBatch:
    """Random ids; completions of all lengths from a half of the longest on."""
    g = np.random.default_rng(0)
    lengths = [case.prompt, *g.integers(case.prompt // 2, case.prompt + 1, case.samples - 1)]
    written = [case.completion, *g.integers(case.completion // 2, case.completion + 1, case.samples - 1)]

    def ids(counts: list[Any]) -> list[Any]:
        return [g.integers(0, case.vocab - 2, count).astype(np.int32) for count in counts]

    return RolloutBatch(
        ids=np.arange(case.samples),
        prompts=ids(lengths),
        completions=ids(written),
        rewards=np.zeros(case.samples),
        quantiles=g.integers(0, QUANTILES, case.samples),
        rounds=np.zeros(case.samples, dtype=np.int64),
    )


def operations(case: StepCase, model: Any, batch: RolloutBatch) -> float:
    head = case.vocab * case.width
    layers = sum(weight.numel() for weight in model.parameters() if weight.dim() > 1) - head
    completions = sum(map(len, batch.completions))
    return 8.0 * (layers * (completions + sum(map(len, batch.prompts))) + head * completions)


# --- Ours --------------------------------------------------------------------------------------


def make_trainer(case: StepCase, folder: Path, precision: Any, device: str) -> Trainer:
    config = Config(
        model=str(folder / "model"),
        output=str(folder / "run"),
        quantiles=QUANTILES,
        batch_size=case.samples,
        micro_batch=case.samples,
        max_new_tokens=case.completion,
        lora_rank=0,
        contrast_coef=0.0,
        kl_coef=KL_COEF,
        entropy_coef=ENTROPY_COEF,
        kl="policy_ref",
        precision=precision,
    )
    prompts = ["w1 w2 w3", "w4 w5"]

    def no_reward(prompts: list[str], completions: list[str], **_: Any) -> list[float | None]:
        return [float(len(text)) for text in completions]

    trainer = Trainer(config, reward=no_reward, prompts=prompts, held_out=prompts[:1], listen=None)
    # As far from the reference as training takes it: the KL of equal models is 0, and so is its gradient.
    g = torch.Generator(device).manual_seed(1)
    with torch.no_grad():
        for weight in trainer.policy.model.parameters():
            noise = torch.empty_like(weight).normal_(generator=g)
            weight.add_(noise, alpha=0.1 * float(weight.std()) if weight.numel() > 1 else 0.0)
    return trainer


def our_step(trainer: Trainer, batch: RolloutBatch) -> Callable[[], Numbers]:
    def smaller(size: int) -> None:
        raise torch.OutOfMemoryError(f"not all {len(batch)} samples fit in one pass, {size} would")

    return lambda: trainer.learner.step(trainer.state, batch, smaller)


# --- Theirs ------------------------------------------------------------------------------------


def their_model(trainer: Trainer, folder: Path, case: StepCase) -> Any:
    """transformers' own model with rows for the reward tokens, and the policy's weights in it."""
    policy = trainer.policy
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    model.resize_token_embeddings(case.vocab + QUANTILES, mean_resizing=False)
    own = dict(policy.model.named_parameters())
    embedding = policy.model.get_input_embeddings()
    head = linear_head(policy.model)
    assert head is not None
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight is model.get_input_embeddings().weight:
                weight.copy_(torch.cat([head.weight[: case.vocab], embedding.rows]))
            else:
                weight.copy_(own[name])
    return model.to(trainer.setup.device).eval()


def their_step(
    trainer: Trainer, model: Any, reference: Any, batch: RolloutBatch, autocast: Callable[[], Any]
) -> Callable[[], Numbers]:
    policy, device = trainer.policy, trainer.setup.device
    vocab, config = policy.vocabulary, trainer.config
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.step_size, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    prompts, completions = ([x.tolist() for x in rows] for rows in (batch.prompts, batch.completions))

    def logits(of: Any, quantiles: list[Any]) -> tuple[Tensor, Tensor, Tensor]:
        made = make_batch(policy, prompts, completions, quantiles, device)
        positions = (made.attention_mask.cumsum(1) - 1).clamp(min=0)
        found = of(made.ids, attention_mask=made.attention_mask, position_ids=positions).logits
        length = made.labels.shape[1]
        return found[:, -length - 1 : -1, :vocab].flatten(0, 1), made.labels.flatten(), made.mask.flatten()

    def step() -> Numbers:
        optimizer.zero_grad()
        with autocast():
            z, labels, mask = logits(model, batch.quantiles.tolist())
            with torch.no_grad():
                r, *_ = logits(reference, [None] * len(prompts))
            loss = authors(z, r, labels, mask.float(), "policy_ref")
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        schedule.step()
        return {"loss": loss.item(), "grad_norm": norm.item()}

    return step


# --- Beside each other -------------------------------------------------------------------------


def every_step(
    trainer: Trainer, folder: Path, case: StepCase, batch: RolloutBatch
) -> dict[str, Callable[[], Numbers]]:
    """Name of the row -> one step: the loss before it, and the norm of its gradient."""
    device = trainer.setup.device
    half = trainer.config.precision == "bf16"

    def theirs(dtype: torch.dtype) -> Callable[[], Numbers]:
        loaded = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype)
        reference = loaded.to(device).eval().requires_grad_(False)
        autocast = nullcontext
        if dtype == torch.bfloat16:
            autocast = partial(torch.autocast, device.type, torch.bfloat16)
        return their_step(trainer, their_model(trainer, folder, case), reference, batch, autocast)

    found = {"authors": theirs(torch.float32)}
    if half:
        found["authors-bf16"] = theirs(torch.bfloat16)
    found["ours-step"] = our_step(trainer, batch)
    return found


def measure_step(
    case: StepCase,
    device: str,
    rounds: int,
    extra_memory: Callable[[Callable[[], Any]], int],
    tflop_per_s: float | None,
) -> list[dict[str, Any]]:
    """A dict for every row of a case's table.

    Args:
        extra_memory: the most bytes that a call holds beyond those that were there before.
        tflop_per_s: of a large product, for the roof; None: not known.
    """
    quiet_libraries()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_random_model(case, folder / "model")
        trainer = make_trainer(case, folder, "bf16" if device == "cuda" else "fp32", device)
        batch = samples(case)
        steps = every_step(trainer, folder, case, batch)
        needed = operations(case, trainer.policy.model, batch)
        # All from the same weights, before any of them moves them again.
        first = {name: step() for name, step in steps.items()}
        extra = {name: extra_memory(step) / 1e6 for name, step in steps.items()}
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(rounds):
            for name, step in steps.items():
                begun = time.perf_counter()
                step()  # each ends by reading the gradient's norm, and what follows that is waited for here
                if device == "cuda":
                    torch.cuda.synchronize()
                times[name].append(time.perf_counter() - begun)
    found = []
    for name, taken in times.items():
        seconds = statistics.median(taken)
        error = max(abs(first[name][key] / first["authors"][key] - 1) for key in ("loss", "grad_norm"))
        about = {"case": str(case), **case._asdict(), "row": name, "lacks": [], "error": error}
        right = error < (1e-4 if trainer.config.precision == "fp32" else 2e-2)
        figures = {"us": seconds * 1e6, "wall_us": seconds * 1e6, "extra_mb": extra[name], "right": right}
        if tflop_per_s is not None:
            roof = needed / tflop_per_s / 1e12
            figures |= {"to_roof": seconds / roof, "roof_us": roof * 1e6}
        found.append(about | figures)
    return found
