"""A sequence-classification model as a reward: the probability of one of its labels."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from quark_fast.errors import UsageError
from quark_fast.model.loading import load_pretrained
from quark_fast.model.sizes import rows_read, scoring_bytes
from quark_fast.rewards.text_logits import Encoded, TextLogits
from quark_fast.runtime.memory import by_parts

USUAL_ROWS = 32  # texts side by side on a CPU
Reads = Literal["completion", "prompt+completion"]


class SequenceClassifier:
    """reward(completion) = p(label | text), in float64 from the model's float32 logits.

    The probabilities are those of transformers' text-classification pipeline: a softmax over the labels, or
    a sigmoid of each logit where the model has one label or the problem type is multi-label; the logit itself
    where the problem type is regression.

    A text's score is the one it gets alone, whatever stands beside it in a batch: see ``TextLogits``.

    A text of more tokens than model and tokenizer take is cut, but not its special tokens. With
    ``reads="completion"`` it is cut where the tokenizer says, which is at its end but for a few models. With
    ``reads="prompt+completion"`` it is cut at its front, so the prompt goes first; of a completion that alone
    is too long, its end is read.

    Args:
        source: a transformers folder or hub name.
        label: the label by its name, in any case, or by its number; not needed where there is only one.
        reads: what the model is shown. A completion that is blank, or without any token, scores None.
        batch_size: texts side by side; 0: 32, on a GPU what its free memory holds. Halved where it runs out.
        trust_remote_code: run what Python code the source brings along.
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
        batch_size: int = 0,
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
        self.reads = reads
        self.batch_size = batch_size
        if reads == "prompt+completion":
            tokenizer.truncation_side = "left"
        self.logits = TextLogits(source, model, tokenizer, device)

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
        rows = dict(enumerate(self.logits.encode(texts)))
        order = [i for i, row in rows.items() if completions[i].strip() and row.ids]
        order.sort(key=lambda i: self.logits.group(rows[i]))  # as given where all may stand together
        parts = by_parts(
            len(order),
            self._together([rows[i] for i in order]),
            lambda part: self._probabilities([rows[i] for i in order[part]]).tolist(),
        )
        values = dict(zip(order, chain.from_iterable(parts), strict=True))
        return [values.get(i) for i in rows]

    def _together(self, rows: Sequence[Encoded]) -> int:
        longest = max((len(row.ids) for row in rows), default=1)
        return self.batch_size or rows_read(self.logits.model, longest, USUAL_ROWS, scoring_bytes)

    @torch.inference_mode()
    def _probabilities(self, rows: Sequence[Encoded]) -> Tensor:
        """(N,) float64, the label's."""
        logits = self.logits(rows)
        kind = self.logits.model.config.problem_type
        if kind == "regression":
            scores = logits
        elif kind == "multi_label_classification" or logits.shape[1] == 1:
            scores = logits.sigmoid()
        else:
            scores = logits.softmax(-1)
        chosen: Tensor = scores[:, self.index]
        return chosen


def find_label(source: str, labels: Mapping[int, str], wanted: str | None) -> int:
    """The number of the label meant; an error lists them all."""
    shown = ", ".join(f"{label} ({i})" for i, label in list(labels.items())[:20])
    shown += f" and {len(labels) - 20} more" if len(labels) > 20 else ""
    if wanted is None:
        if len(labels) == 1:
            return next(iter(labels))
        first = next(iter(labels.values()))
        raise UsageError(
            f"{source} has the labels {shown}; name the one that scores, as in hf:{source}:{first}, or a"
            " reward's by --scorer-label"
        )
    exact = [i for i, label in labels.items() if label == wanted]
    near = exact or [i for i, label in labels.items() if str(label).casefold() == wanted.casefold()]
    if not near and wanted.isdecimal() and int(wanted) in labels:
        near = [int(wanted)]
    if len(near) != 1:
        raise UsageError(f"the label {wanted!r} is none of {source}, which has {shown}; name one of these")
    return near[0]


def _digest(model: Any, tokenizer: Any) -> str:
    """sha256 over everything that decides a score: weights, labels, tokenizer."""
    digest = hashlib.sha256(repr((model.config.id2label, model.config.problem_type)).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    return digest.hexdigest()
