"""A sequence-classification model's logits of texts: each text's are those that it gets alone."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Sequence
from itertools import chain, groupby
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from quark_fast.errors import UsageError
from quark_fast.model.attention import without_cudnn
from quark_fast.model.lookups import Lookups
from quark_fast.runtime.memory import is_lack_of_memory

# How texts share a batch, in the order in which the ways are tried.
Batching = Literal["right", "left", "equal", "alone"]
BATCHINGS: dict[Batching, str] = {
    "right": "padded on the right",
    "left": "padded on the left",
    "equal": "only beside texts of as many tokens",
    "alone": "one at a time",
}

# What configs call the number of tokens that a model takes.
LIMIT_NAMES = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_seq_length",
    "max_sequence_length",
    "max_source_positions",
    "seq_length",
)
UNSET = 10**6  # a tokenizer without a limit says 10**30
TOLERANCE = 1e-4  # of logits, relative to the largest: far above float32's rounding


class Encoded(NamedTuple):
    """A text and what the tokenizer makes of it."""

    text: str
    inputs: dict[str, list[int]]

    @property
    def ids(self) -> list[int]:
        return self.inputs["input_ids"]


class TextLogits:
    """What a model says of texts; how to batch them and where to cut them is found out at the beginning.

    A few short texts are scored alone and side by side, and batches are made in the first way in which the
    two agree: padded on the right, padded on the left, texts of equal length together, one at a time.

    Args:
        source: the model's name in messages.
        tokenizer: it cuts a text that is too long, but not its special tokens.
        device: where the model computes.
    Attributes:
        limit: the most tokens of a text that are read, special tokens included; None: no limit is known.
        batching: how texts share a batch.
    Raises:
        UsageError: the model does not score every text by a number of its own: it fails, is random, or
            gives NaN.
    """

    def __init__(self, source: str, model: Any, tokenizer: Any, device: torch.device | str) -> None:
        self.source, self.tokenizer = source, tokenizer
        self.model = model.eval().requires_grad_(False)
        self.configs = _configs(model.config)
        rope = getattr(self.configs[-1], "rope_parameters", None) or {}
        self._stretched = rope.get("original_max_position_embeddings") or float("inf")
        self._takes = inspect.signature(model.forward).parameters
        self._vocabulary = range(len(model.get_input_embeddings().weight))
        padded = [c for c in self.configs if getattr(c, "pad_token_id", None) in self._vocabulary]
        self._unpadded = [config for config in self.configs if config not in padded]
        self._pad_id: int | None = padded[-1].pad_token_id if padded else None  # the text model's first
        self.batching: Batching = "right"
        # While it is on the CPU: a position beyond its table ends the process on a GPU.
        self.limit = self._longest_input()
        self.model.to(device)
        self._find_batching()

    # ------------------------------------------------------------- logits of texts

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """The texts as ids, none longer than the limit."""
        if not texts:
            return []
        found = self.tokenizer(
            list(texts),
            padding=False,
            truncation=self.limit is not None,
            max_length=self.limit,
            return_attention_mask=True,
        )
        return [Encoded(text, {name: list(found[name][i]) for name in found}) for i, text in enumerate(texts)]

    @torch.inference_mode()
    def __call__(self, rows: Sequence[Encoded]) -> Tensor:
        """(N, labels) float64, of rows that stand in the order of ``group``."""
        groups = [list(group) for _, group in groupby(rows, key=self.group)]
        return torch.cat([self._together_or_alone(group) for group in groups])

    def group(self, row: Encoded) -> int:
        """Texts that may share a batch have the same number."""
        if self.batching in ("equal", "alone"):
            return len(row.ids)
        # Some scaled rotary positions (longrope) turn otherwise once the batch's longest text is beyond this.
        return int(len(row.ids) > self._stretched)

    def _together_or_alone(self, rows: Sequence[Encoded]) -> Tensor:
        """A batch, or its texts one at a time where the model can only read these so.

        BART's kind refuses texts side by side of which one spells the end token once more than another.
        """
        if len(rows) > 1 and self.batching != "alone":
            with contextlib.suppress(LookupError, ValueError):
                logits = self._batch(rows)
                if logits.isfinite().all():
                    return logits
        return torch.stack([self._alone(row) for row in rows])

    def _batch(self, rows: Sequence[Encoded]) -> Tensor:
        """(N, labels) float64 of one forward pass."""
        fill = {"input_ids": self._padding(rows), "token_type_ids": self.tokenizer.pad_token_type_id}
        side = "left" if self.batching == "left" else "right"
        inputs = {}
        for name in rows[0].inputs:
            if name in self._takes or "input_ids" not in self._takes:
                columns = [torch.tensor(row.inputs[name]) for row in rows]
                padded = pad_sequence(columns, True, fill.get(name, 0), side)
                inputs[name] = padded.to(self.model.device)
        with without_cudnn():
            output = self.model(**inputs)
        logits: Tensor = output[0] if isinstance(output, tuple) else output.logits
        if logits.shape != (len(rows), len(self.model.config.id2label)):
            raise ValueError(f"logits of shape {tuple(logits.shape)} for {len(rows)} texts")
        return (logits.cpu() if logits.device.type == "mps" else logits).double()  # which has no float64

    @torch.inference_mode()
    def _alone(self, row: Encoded) -> Tensor:
        """(labels,) float64 of a text by itself.

        Raises:
            UsageError: the model fails, or gives what is no number.
        """
        try:
            logits = self._batch([row])[0]
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            if is_lack_of_memory(error):
                raise
            raise UsageError(
                f"{self.source} cannot score a text of {len(row.ids)} tokens, {_beginning(row.text)}:"
                f" {type(error).__name__}: {error}"
            ) from error
        if not logits.isfinite().all():
            raise UsageError(
                f"{self.source} gives the text {_beginning(row.text)} the logits {logits.tolist()}; the"
                " logits of a reward are finite numbers"
            )
        return logits

    def _padding(self, rows: Sequence[Encoded]) -> int:
        """The padding id for this batch: the one by which the model knows it, whatever the tokenizer has.

        Decoders are read at the last token that is not this id, RoBERTa's kind counts positions by it. A
        model without one reads a text's last token, whatever it is: it gets an id that ends no text.
        """
        chosen = self._pad_id
        if chosen is None:
            last = {row.ids[-1] for row in rows} | {None}
            named = [self.tokenizer.pad_token_id, self.tokenizer.eos_token_id]
            chosen = next(i for i in chain(named, self._vocabulary) if i not in last)
        for config in self._unpadded:
            config.pad_token_id = chosen
        return chosen

    # ------------------------------------------------------------- trials at the beginning

    def _longest_input(self) -> int | None:
        """Tokens that fit: the least of what tokenizer, config and tables of positions say.

        Raises:
            UsageError: the model fails on a short text, or has no room for more than special tokens.
        """
        claims = [getattr(config, name, None) for config in self.configs for name in LIMIT_NAMES]
        claims.append(self.tokenizer.model_max_length)
        known = [int(n) for n in claims if isinstance(n, int | float) and 0 < n < UNSET]
        self.limit = min(known, default=None)
        # Three words whose ids do not ascend: where 0, 1, 2, ... are looked up is then a table of positions.
        (probe,) = self.encode([" ".join(self._sample(3))])
        if len(probe.ids) > 2:
            with Lookups() as lookups:
                self._alone(probe)
            known += [rows - start for rows, start in lookups.counted(len(probe.ids))]
        limit = min(known, default=None)
        if limit is not None and limit <= self.tokenizer.num_special_tokens_to_add():
            raise UsageError(f"{self.source} takes {limit} tokens, which leaves no room for a text")
        return limit

    @torch.inference_mode()
    def _find_batching(self) -> None:
        """Find the way to batch in which texts score as they do alone.

        Raises:
            UsageError: a text by itself does not score alike twice.
        """
        # One word; four, and the same four backwards, which are as many tokens; many.
        texts = [*self._sample(1)[:1], *self._sample(4), *self._sample(self._cheap_length())[:1]]
        rows = sorted((row for row in self.encode(texts) if row.ids), key=lambda row: len(row.ids))
        if len(rows) < 2:
            raise UsageError(f"the tokenizer of {self.source} makes no tokens of its own words")
        alone = torch.stack([self._alone(row) for row in rows])
        twice = [0, len(rows) - 1]
        again = torch.stack([self._alone(rows[i]) for i in twice])
        allowed = TOLERANCE * alone.abs().max().item()
        for i, second in zip(twice, again, strict=True):
            if (alone[i] - second).abs().max() > allowed:
                raise UsageError(
                    f"{self.source} scores one text differently each time: {_beginning(rows[i].text)} has the"
                    f" logits {alone[i].tolist()}, then {second.tolist()}; a reward must not be random"
                )
        self.batching = next(way for way in BATCHINGS if self._agrees(way, rows, alone, allowed))
        if self.batching != "right":
            logging.getLogger(__name__).log(
                logging.INFO if self.batching == "left" else logging.WARNING,
                "%s: texts padded on the right score otherwise than alone; they are scored %s",
                self.source,
                BATCHINGS[self.batching],
            )

    def _sample(self, length: int) -> list[str]:
        """A text of so many words, forwards and backwards, of tokens from all over the vocabulary."""
        special = set(self.tokenizer.all_special_ids)
        for config in self.configs:
            special |= {getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad", "sep")}
        ids = sorted(i for i in self.tokenizer.get_vocab().values() if i not in special)
        count = len(ids)
        words = [self.tokenizer.decode([ids[(k * 7919 + count // 2) % count]]) for k in range(length)]
        return [" ".join(words), " ".join(reversed(words))]

    def _cheap_length(self) -> int:
        """Words of a text that is as long as the limit where that takes little time."""
        size = sum(weight.numel() for weight in self.model.parameters())
        budget = 2 * 10**9 if self.model.device.type == "cpu" else 10**13
        return max(9, min(self.limit or 1024, 1024, int(budget // size)))

    def _agrees(self, way: Batching, rows: Sequence[Encoded], alone: Tensor, allowed: float) -> bool:
        """Whether texts score this way as they do alone, which is ``alone``.

        The way is this classifier's from here on.
        """
        self.batching = way
        if way == "alone":
            return True
        try:
            found = torch.cat([self._batch(list(group)) for _, group in groupby(rows, key=self.group)])
        except (LookupError, RuntimeError, ValueError) as error:  # such as "Cannot handle batch sizes > 1"
            if is_lack_of_memory(error):
                raise
            return False
        return (found - alone).abs().max().item() <= allowed  # NaN is not


def _configs(config: Any) -> list[Any]:
    """The config, and after it the text model's where that is another."""
    try:
        text = config.get_text_config()
    except ValueError:  # of several
        return [config]
    return [config] if text is config else [config, text]


def _beginning(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:60] + "...")
