"""The matrix products of a finished run, stage by stage, and how fast this machine is in them alone.

Counted is what no way of doing it can spare: 2 x inputs x outputs of a linear layer for each token that a
model has to read, the head at tokens that are sampled or scored, and each prompt once for all samples that
are drawn of it. A step's backward pass is twice its forward pass, and as long with LoRA, whose frozen weights
need no gradient. Not counted: attention's own products (1% at 30 tokens), the adapters', padding, the scorer,
and the check at the start.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from quark_fast.arguments import load_config
from quark_fast.data import assets
from quark_fast.evaluation.probe import PROBE_PROMPTS, PROBE_TOKENS
from quark_fast.model.fixed_step import cuda_graph
from quark_fast.model.policy import Policy
from quark_fast.report.results import BASE
from quark_fast.runtime.run_folder import COMPLETIONS, HELD_OUT, METRICS, RunFolder
from quark_fast.tasks.by_name import find_task


@dataclass(frozen=True)
class Products:
    """Matrix products with so many rows at a time; ``passes``: 1 forward, 2 with the gradient of a layer's
    inputs, 3 with that of its weights, too."""

    rows: int
    flops: float
    passes: int = 1


@dataclass(frozen=True)
class Work:
    """What a stage reads and multiplies."""

    prompt_tokens: int
    completion_tokens: int
    products: list[Products] = field(default_factory=list)


def linear_weights(model: nn.Module) -> list[Tensor]:
    """(outputs, inputs) of every linear layer, in order."""
    return [module.weight.detach() for module in model.modules() if type(module) is nn.Linear]


def products(weights: Sequence[Tensor], rows: int, passes: int = 1) -> Callable[[], Tensor]:
    """A pass of random rows through all layers and nothing else, with the gradients of each."""
    like = {"dtype": weights[0].dtype, "device": weights[0].device}
    inputs = {w.shape[1]: torch.randn(rows, w.shape[1]).to(**like) for w in weights}
    gradients = {w.shape[0]: torch.randn(rows, w.shape[0]).to(**like) for w in weights if passes > 1}

    def run() -> Tensor:
        for w in weights:
            last = nn.functional.linear(inputs[w.shape[1]], w)
            if passes > 1:
                last = gradients[w.shape[0]] @ w
            if passes > 2:
                last = gradients[w.shape[0]].t() @ inputs[w.shape[1]]
        return last

    return run


def multiply(weights: Sequence[Tensor], rows: int, passes: int = 1) -> float:
    """Seconds of such a pass on the CPU."""
    return _seconds(products(weights, rows, passes), weights[0].device)


@torch.inference_mode()
def speed(weights: Sequence[Tensor], rows: int, passes: int) -> float:
    """FLOPs a second of the best of three times, where the weights are.

    On a GPU the products are a CUDA graph: their floor is not what the program takes to start each.
    """
    run, device = products(weights, rows, passes), weights[0].device
    if device.type == "cuda":
        run = cuda_graph(run, device)
    flops = 2 * passes * rows * sum(map(Tensor.numel, weights))
    return flops / min(_seconds(run, device) for _ in range(3))


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    begun = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


class RunWork:
    """The work of a run's stages, from its files and the shapes of its model.

    The tokens of its steps and of its evaluation are those that the run counted; of its samples they are
    counted again from the texts, which may tell a few from the sampled ones.

    Args:
        on_cpu: whether the run was on a CPU, where a step takes its samples in smaller parts.
    """

    def __init__(self, folder: RunFolder, on_cpu: bool) -> None:
        self.folder = folder
        self.config = config = load_config(folder / "config.yaml")
        self.policy = Policy.create(
            config.model or assets.default_model(), quantiles=config.quantiles, prefix=config.prefix
        )
        self.weights = linear_weights(self.policy.model)
        self.head = self.policy.model.get_output_embeddings().weight.numel()
        self.body = sum(map(Tensor.numel, self.weights)) - self.head
        self.lengths: dict[str, int] = {}
        self.metrics, self.samples = folder.rows_of(METRICS), folder.rows_of(COMPLETIONS)
        self.prompts = list(dict.fromkeys(row["prompt"] for row in self.samples))
        self.streams = 2 if config.contrast_coef else 1
        self.steps = [row for row in self.metrics if row["kind"] == "step"]
        self.learned = [round(row["tokens_per_s"] * row["seconds"]) for row in self.steps]
        mean = self._context(self.prompts, True) / len(self.prompts)
        mean += sum(self.learned) / len(self.learned) / config.batch_size
        self.step_rows = round(self.streams * config.samples_a_pass(on_cpu) * mean)

    def by_stage(self) -> dict[str, Work]:
        """By the names that the run itself has for its stages."""
        found: dict[str, Work] = {}
        for row in self.metrics:
            if row["kind"] == "round":
                name = f"round {row['round'] + 1}/{self.config.rounds}"
                found[f"{name}: sampling"] = self._round(row["round"], row["step"] > 0, row["guidance"])
                found[f"{name}: learning"] = self._learning(row["round"])
        rows = self._evaluation()
        probes = sum(row["kind"] == "probe" for row in self.metrics)
        found["probing"] = self._probing(probes, rows[f"evaluating: {BASE}"].completion_tokens)
        return found | rows

    # ---------------------------------------------------------------- parts

    def _context(self, prompts: Iterable[str], token: bool) -> int:
        """Tokens of the prompts, each with the prefix and, with ``token``, a reward token in front."""
        total = 0
        for prompt in prompts:
            if prompt not in self.lengths:
                self.lengths[prompt] = len(self.policy.encode(prompt))
            total += len(self.policy.prefix) + token + self.lengths[prompt]
        return total

    def _flops(self, tokens: float, scored: float) -> float:
        """Of reading so many tokens, with the head at so many."""
        return 2 * (self.body * tokens + self.head * scored)

    def _sampling(self, prompts: list[str], samples: int, tokens: int, streams: int, token: bool) -> Work:
        """So many samples of each prompt, of ``tokens`` in all, in one stream or guided by two."""
        context = streams * self._context(prompts, token)
        # The prompt's last logits give the first token of each; nobody reads the last one.
        decoded = streams * (tokens - samples * len(prompts))
        together = streams * samples * min(len(prompts), max(1, self.config.sample_batch // samples))
        prefill = Products(self.step_rows, self._flops(context, streams * len(prompts)))
        return Work(context, tokens, [prefill, Products(together, self._flops(decoded, decoded))])

    def _scoring(self, prompts: list[str], samples: int, tokens: int, token: bool = False) -> Products:
        """The probabilities of these samples' tokens."""
        read = self._context(prompts, token) + tokens - samples * len(prompts)
        return Products(self.step_rows, self._flops(read, tokens))

    # ---------------------------------------------------------------- stages

    def _round(self, number: int, learned: bool, guidance: float) -> Work:
        texts = [row["completion"] for row in self.samples if row["round"] == number]
        ids = self.policy.text_tokenizer(texts, add_special_tokens=False).input_ids
        # The end of a text is a token, too.
        tokens = sum(min(len(one) + 1, self.config.max_new_tokens) for one in ids)
        each = len(texts) // len(self.prompts)
        return self._sampling(self.prompts, each, tokens, 1 if guidance == 1 else 2, learned)

    def _learning(self, number: int) -> Work:
        pairs = [(n, row) for n, row in zip(self.learned, self.steps, strict=True) if row["round"] == number]
        tokens, samples = sum(n for n, _ in pairs), len(pairs) * self.config.batch_size
        # Which samples a step drew is in no file: their prompts are taken for average ones.
        mean = self._context(self.prompts, True) / len(self.prompts)
        context = round(samples * mean)
        flops = self.streams * self._flops(context + tokens - samples, tokens)
        passes = 2 if self.config.lora_rank else 3
        products = [Products(self.step_rows, passes * flops, passes)]
        if self.config.kl_coef or self.config.contrast_coefs[1]:  # the reference sees no reward token
            products.append(Products(self.step_rows, self._flops(context + tokens - 2 * samples, tokens)))
        return Work(context, tokens, products)

    def _evaluation(self) -> dict[str, Work]:
        """Each row's samples, and their probabilities under the reference, which draws its own by them."""
        found: dict[str, Work] = {}
        rows = self.folder.rows_of("evaluation.jsonl")
        fitted = find_task(self.config.task, self.config.target).shows("prompt_fit")
        for name, group in itertools.groupby(rows, key=lambda row: row["row"]):
            part = list(group)
            prompts = list(dict.fromkeys(row["prompt"] for row in part))
            each, tokens = len(part) // len(prompts), sum(row["tokens"] for row in part)
            streams = 2 if name.startswith("guided") else 1
            work = self._sampling(prompts, each, tokens, streams, name not in (BASE, "no token"))
            if name != BASE:
                work.products.append(self._scoring(prompts, each, tokens))
            if fitted:  # one of each prompt after another
                work.products.append(self._scoring(prompts, 1, round(tokens / each)))
            found[f"evaluating: {name}"] = work
        return found

    def _probing(self, probes: int, base_tokens: int) -> Work:
        """One sample of some prompts, which two tokens score in each probe, and the reference once.

        They are in no file: their length is that of the base model's samples in the evaluation.
        """
        every = [row["prompt"] for row in self.folder.rows_of(HELD_OUT)]
        some = every[: max(PROBE_PROMPTS, PROBE_TOKENS // self.config.max_new_tokens)]
        tokens = round(base_tokens / self.config.eval_samples * len(some) / len(every))
        work = self._sampling(some, 1, tokens, 1, False)
        for token in [True, True] * probes + [False]:
            work.products.append(self._scoring(some, 1, tokens, token))
        return work
