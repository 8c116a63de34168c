"""Judges: small scorers that no run trains on, which tell whether a result holds beyond its own scorer.

A judge reads a text with the first layers of the embedded model and takes one linear function of what they
make of it. Its weights were fitted to published scores by ``benchmarks/fit_judge.py``; docs/judges.md says
how well it agrees with them, and where it fails.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from quark_fast.data import assets
from quark_fast.files.atomic import sha256
from quark_fast.model.attention import without_cudnn
from quark_fast.model.sizes import Shape, rows_read, scoring_bytes
from quark_fast.rewards.reward import Reward
from quark_fast.runtime.machine import without_bars
from quark_fast.runtime.memory import by_parts

FOLDER = Path(__file__).parent / "judges"
TOKENS = 128  # of a text that are read
USUAL_ROWS = 64  # parts of texts side by side on a CPU


class Embedder:
    """Texts as the mean over their tokens of the embedded model's hidden states after some layers.

    In float32, so that a text has the same score on every machine, up to its last digits. The model's end of
    text, which it was trained to begin texts with, stands in front and does not count.

    Args:
        batch_size: parts of texts side by side; 0: 64, on a GPU what its free memory holds. Halved where it
            runs out.
    """

    @without_bars()
    def __init__(self, layers: int, batch_size: int = 0) -> None:
        from transformers import AutoModel, AutoTokenizer

        folder = assets.default_model()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        (self.start,) = self.tokenizer("<|endoftext|>", add_special_tokens=False).input_ids
        model = AutoModel.from_pretrained(folder)
        model.layers = model.layers[:layers]
        model.norm = torch.nn.Identity()  # made for the states after the last layer of all
        model.layers.float()  # the embeddings, half of it, stay as they are stored
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = model.to(device).eval().requires_grad_(False)
        self.batch_size = batch_size

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(N, D) float32."""
        ids = [self.tokenizer(text, add_special_tokens=False).input_ids for text in texts]
        # A long text is read in parts, each as if the text began there.
        parts = [(i, one[at : at + TOKENS]) for i, one in enumerate(ids) for at in range(0, len(one), TOKENS)]
        parts.sort(key=lambda part: len(part[1]))
        total = torch.zeros(len(ids), self.model.config.hidden_size)
        size = self.batch_size or rows_read(self.model, 1 + TOKENS, USUAL_ROWS, _bytes_of_part)
        found = by_parts(len(parts), size, lambda some: self._sums([one for _, one in parts[some]]))
        for (i, _), own in zip(parts, itertools.chain.from_iterable(found), strict=True):
            total[i] += own
        return total / torch.tensor([max(1, len(one)) for one in ids])[:, None]

    @torch.inference_mode()
    def _sums(self, parts: Sequence[Sequence[int]]) -> Tensor:
        """(N, D) float32 on the CPU: of each part the sum of its tokens' states."""
        lengths = torch.tensor([len(one) for one in parts])
        rows = torch.full((len(parts), 1 + int(lengths.max())), self.start)
        for row, one in zip(rows, parts, strict=True):
            row[1 : 1 + len(one)] = torch.tensor(one, dtype=torch.long)
        rows, lengths = rows.to(self.model.device), lengths.to(self.model.device)
        read = torch.arange(rows.shape[1], device=rows.device) <= lengths[:, None]
        embedded = self.model.embed_tokens(rows).float()
        with without_cudnn():
            read_as = self.model(inputs_embeds=embedded, attention_mask=read.long(), use_cache=False)
        states = read_as.last_hidden_state[:, 1:]
        sums: Tensor = (states * read[:, 1:, None]).sum(1)
        return sums.cpu()


def _bytes_of_part(shape: Shape, tokens: int, _: int) -> int:
    # The layers compute in float32, whatever the embeddings are stored in.
    return scoring_bytes(shape, tokens)


class LinearJudge:
    """sigmoid(weights . embedding + bias), in [0, 1].

    Args:
        batch_size: as of ``Embedder``.
    Attributes:
        sha256: of the file of the weights.
    """

    def __init__(self, name: str, batch_size: int = 0) -> None:
        self.batch_size = batch_size
        path = FOLDER / f"{name}.safetensors"
        with safe_open(path, "pt") as file:
            self.layers = int(file.metadata()["layers"])
            self.weights, self.bias = file.get_tensor("weights"), file.get_tensor("bias")
        self.sha256 = sha256(path)
        assets.default_model()  # there before any long work begins

    @functools.cached_property
    def embed(self) -> Embedder:
        """Loaded when the first text is read: a run may never be judged."""
        return Embedder(self.layers, self.batch_size)

    def __call__(self, texts: Sequence[str]) -> list[float]:
        """One number for each text; NaN for a blank one."""
        scores = torch.sigmoid(self.embed(texts) @ self.weights + self.bias)
        return [
            score if text.strip() else float("nan")
            for text, score in zip(texts, scores.tolist(), strict=True)
        ]


def judge(name: str, property: str, batch_size: int = 0, complement: bool = False) -> Reward:
    """The judge ``name`` of this package as a reward, 1 - its number; with ``complement`` its number itself.

    ``property`` is what 1 - reward measures. Both read the completion alone; a blank one scores None.
    ``batch_size`` is that of ``Embedder``.
    """
    found = LinearJudge(name, batch_size)

    def reward(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
        return [score if complement else 1.0 - score for score in found(completions)]

    version = f"of {found.layers} layers of {assets.DEFAULT_MODEL}"
    return Reward(reward, f"{name}-judge", version, found.sha256, property=property)
