"""A sequence-classification model as a reward: the probability of one of its labels."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import logging
from collections.abc import Mapping, Sequence
from itertools import chain, groupby
from typing import Any, Literal, NamedTuple

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from quark_fast.errors import UsageError
from quark_fast.model.loading import load_pretrained
from quark_fast.model.lookups import Lookups
from quark_fast.runtime.memory import by_parts

Reads = Literal["completion", "prompt+completion"]

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


class SequenceClassifier:
    """reward(completion) = p(label | text), in float64 from the model's float32 logits.

    The probabilities are those of transformers' text-classification pipeline: a softmax over the labels, or
    a sigmoid of each logit where the model has one label or the problem type is multi-label; the logit itself
    where the problem type is regression.

    A text's score is the one it gets alone, whatever stands beside it in a batch. A few short texts are
    scored alone and side by side when the model is loaded, and batches are made in the first way in which
    the two agree: padded on the right, padded on the left, texts of equal length together, one at a time.

    A text of more tokens than model and tokenizer take is cut, but not its special tokens. With
    ``reads="completion"`` it is cut where the tokenizer says, which is at its end but for a few models. With
    ``reads="prompt+completion"`` it is cut at its front, so the prompt goes first; of a completion that alone
    is too long, its end is read.

    Args:
        source: a transformers folder or hub name.
        label: the label by its name, in any case, or by its number; not needed where there is only one.
        reads: what the model is shown. A completion that is blank, or without any token, scores None.
        trust_remote_code: run what Python code the source brings along.
    Attributes:
        limit: the most tokens of a text that are read, special tokens included; None: no limit is known.
        batching: how texts share a batch.
    Raises:
        UsageError: no such model, one without a trained head, no such label, or a model that does not score
            every text by a number of its own: it fails, is random, or gives NaN.
    """

    def __init__(
        self,
        source: str,
        label: str | None = None,
        reads: Reads = "completion",
        device: torch.device | str = "cpu",
        batch_size: int = 32,
        trust_remote_code: bool = False,
    ) -> None:
        model, tokenizer = load_pretrained(
            source,
            torch.float32,
            AutoModelForSequenceClassification,
            "sequence-classification model",
            trust_remote_code,
        )
        self.sha256 = _digest(model, tokenizer)
        self.index = find_label(source, model.config.id2label, label)
        self.label = str(model.config.id2label[self.index])
        self.source = source
        self.reads = reads
        self.batch_size = batch_size
        self.batching: Batching = "right"
        if reads == "prompt+completion":
            tokenizer.truncation_side = "left"
        self.tokenizer = tokenizer
        self.model = model.eval().requires_grad_(False)
        self._settle_config()
        self._find_padding()
        # While it is on the CPU: a position beyond its table ends the process on a GPU.
        self.limit = self._longest_input()
        self.model.to(device)
        self._check_batching()

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], **columns: Any
    ) -> list[float | None]:
        """The score of each completion, None for a blank one.

        Raises:
            UsageError: the model's score of a text is not a finite number.
        """
        texts = list(completions)
        if self.reads == "prompt+completion":
            texts = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
        rows = dict(enumerate(self._encode(texts)))
        order = [i for i, row in rows.items() if completions[i].strip() and row.ids]
        order.sort(key=lambda i: self._group(rows[i]))  # as given where all may stand together
        parts = by_parts(
            len(order),
            self.batch_size,
            lambda part: self._probabilities([rows[i] for i in order[part]]).tolist(),
        )
        values = dict(zip(order, chain.from_iterable(parts), strict=True))
        return [values.get(i) for i in rows]

    def _encode(self, texts: Sequence[str]) -> list[Encoded]:
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
    def _probabilities(self, rows: Sequence[Encoded]) -> Tensor:
        """(N,) float64, the label's."""
        logits = self._logits(rows)
        kind = self.model.config.problem_type
        if kind == "regression":
            scores = logits
        elif kind == "multi_label_classification" or logits.shape[1] == 1:
            scores = logits.sigmoid()
        else:
            scores = logits.softmax(-1)
        chosen: Tensor = scores[:, self.index]
        return chosen

    def _logits(self, rows: Sequence[Encoded]) -> Tensor:
        """(N, labels) float64, of rows that stand in the order of ``_group``."""
        groups = [list(group) for _, group in groupby(rows, key=self._group)]
        return torch.cat([self._together_or_alone(group) for group in groups])

    def _group(self, row: Encoded) -> int:
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
        longest = max(len(row.ids) for row in rows)
        fill = {"input_ids": self._padding(rows), "token_type_ids": self.tokenizer.pad_token_type_id}
        inputs = {}
        for name in rows[0].inputs:
            if name in self._takes or "input_ids" not in self._takes:
                columns = [row.inputs[name] for row in rows]
                padding = [[fill.get(name, 0)] * (longest - len(column)) for column in columns]
                pairs = zip(columns, padding, strict=True)
                full = [pad + own if self.batching == "left" else own + pad for own, pad in pairs]
                inputs[name] = torch.tensor(full, device=self.model.device)
        output = self.model(**inputs)
        logits: Tensor = output[0] if isinstance(output, tuple) else output.logits
        if logits.shape != (len(rows), len(self.model.config.id2label)):
            raise ValueError(f"logits of shape {tuple(logits.shape)} for {len(rows)} texts")
        return logits.double()

    def _settle_config(self) -> None:
        """What the configs say of the model's input."""
        self.configs = _configs(self.model.config)
        rope = getattr(self.configs[-1], "rope_parameters", None) or {}
        self._stretched = rope.get("original_max_position_embeddings") or float("inf")
        self._takes = inspect.signature(self.model.forward).parameters

    def _find_padding(self) -> None:
        """Settle what padding is: the id by which the model knows it, whatever the tokenizer has.

        Decoders are read at the last token that is not this id, RoBERTa's kind counts positions by it.
        """
        self._rows = len(self.model.get_input_embeddings().weight)
        named = [_padding_of(config, self._rows) for config in self.configs]
        # The text model's first.
        self.pad_id = next((i for i in reversed(named) if i is not None), None)
        self._unpadded = [config for config, i in zip(self.configs, named, strict=True) if i is None]
        if self.pad_id is not None:
            self._tell_padding(self.pad_id)

    def _tell_padding(self, pad_id: int) -> None:
        for config in self._unpadded:
            config.pad_token_id = pad_id

    def _padding(self, rows: Sequence[Encoded]) -> int:
        """The padding id for this batch.

        A model that knows none reads a text's last token, whatever it is: it is told one that ends no text.
        """
        if self.pad_id is not None:
            return self.pad_id
        last = {row.ids[-1] for row in rows} | {None}
        named = [self.tokenizer.pad_token_id, self.tokenizer.eos_token_id]
        chosen: int = next(i for i in chain(named, range(self._rows)) if i not in last)
        self._tell_padding(chosen)
        return chosen

    def _longest_input(self) -> int | None:
        """Tokens that fit: the least of what tokenizer, config and tables of positions say.

        Raises:
            UsageError: the model fails on a short text, or has no room for more than special tokens.
        """
        claims = [getattr(config, name, None) for config in self.configs for name in LIMIT_NAMES]
        claims.append(self.tokenizer.model_max_length)
        known = [int(n) for n in claims if isinstance(n, int | float) and 0 < n < UNSET]
        self.limit = min(known, default=None)
        # There and back: numbers that the model looks up in order are then not the text's own.
        (probe,) = self._encode([" ".join(self._sample(3))])
        if len(probe.ids) > 2:
            with Lookups() as lookups:
                self._alone(probe)
            known += [rows - start for rows, start in lookups.counted(len(probe.ids))]
        limit = min(known, default=None)
        if limit is not None and limit <= self.tokenizer.num_special_tokens_to_add():
            raise UsageError(f"{self.source} takes {limit} tokens, which leaves no room for a text")
        return limit

    @torch.inference_mode()
    def _alone(self, row: Encoded) -> Tensor:
        """(labels,) float64 of a text by itself.

        Raises:
            UsageError: the model fails, or gives what is no number.
        """
        try:
            logits = self._batch([row])[0]
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            if should_reduce_batch_size(error):  # out of memory
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

    @torch.inference_mode()
    def _check_batching(self) -> None:
        """Find the way to batch in which texts score as they do alone.

        Raises:
            UsageError: a text by itself does not score alike twice.
        """
        # One word; four, and the same four backwards, which are as many tokens; many.
        texts = [*self._sample(1)[:1], *self._sample(4), *self._sample(self._cheap_length())[:1]]
        rows = sorted((row for row in self._encode(texts) if row.ids), key=lambda row: len(row.ids))
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
            found = torch.cat([self._batch(list(group)) for _, group in groupby(rows, key=self._group)])
        except (LookupError, RuntimeError, ValueError) as error:  # such as "Cannot handle batch sizes > 1"
            if should_reduce_batch_size(error):
                raise
            return False
        return (found - alone).abs().max().item() <= allowed  # NaN is not


def _configs(config: Any) -> list[Any]:
    """The config, and behind it the text model's where that is another."""
    try:
        text = config.get_text_config()
    except ValueError:  # of several
        return [config]
    return [config] if text is config else [config, text]


def _padding_of(config: Any, rows: int) -> int | None:
    """The padding id of a config; None: it has none that is in the vocabulary."""
    found = getattr(config, "pad_token_id", None)
    return found if isinstance(found, int) and 0 <= found < rows else None


def _beginning(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:60] + "...")


def find_label(source: str, labels: Mapping[int, str], wanted: str | None) -> int:
    """The number of the label meant; an error lists them all."""
    shown = ", ".join(f"{label} ({i})" for i, label in list(labels.items())[:20])
    shown += f" and {len(labels) - 20} more" if len(labels) > 20 else ""
    if wanted is None:
        if len(labels) == 1:
            return next(iter(labels))
        raise UsageError(f"{source} has the labels {shown}; name the one to reward by --scorer-label")
    exact = [i for i, label in labels.items() if label == wanted]
    near = exact or [i for i, label in labels.items() if str(label).casefold() == wanted.casefold()]
    if not near and wanted.isdecimal() and int(wanted) in labels:
        near = [int(wanted)]
    if len(near) != 1:
        raise UsageError(f"scorer_label = {wanted!r}, but {source} has the labels {shown}; name one of these")
    return near[0]


def _digest(model: Any, tokenizer: Any) -> str:
    """sha256 over everything that decides a score: weights, labels, tokenizer."""
    digest = hashlib.sha256(repr((model.config.id2label, model.config.problem_type)).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    return digest.hexdigest()
