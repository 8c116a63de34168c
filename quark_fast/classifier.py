"""A sequence-classification model as a reward: the probability of one of its labels."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from quark_fast.config import UsageError
from quark_fast.machine import by_parts
from quark_fast.policy import load_pretrained

Reads = Literal["completion", "prompt+completion"]


class SequenceClassifier:
    """reward(completion) = p(label | text), in float64 from the model's float32 logits.

    The probabilities are those of transformers' text-classification pipeline: a softmax over the labels, or
    a sigmoid of each logit where the model has one label or the problem type is multi-label; the logit itself
    where the problem type is regression.

    Args:
        source: a transformers folder or hub name.
        label: the label by its name, in any case, or by its number; not needed where there is only one.
        reads: what the model is shown. A blank completion scores None.
        trust_remote_code: run what Python code the source brings along.
    Raises:
        UsageError: no such model, one without a trained head, or no such label.
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
        self.reads = reads
        self.batch_size = batch_size
        if tokenizer.pad_token is None:  # GPT-2's, say; the model finds each row's last token by its id
            tokenizer.pad_token = tokenizer.eos_token
        if model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id
        self.tokenizer = tokenizer
        self.model = model.to(device).eval().requires_grad_(False)
        self.limit = _longest_input(model.config, tokenizer)

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], **columns: Any
    ) -> list[float | None]:
        """The probability of the label for each completion, None for a blank one."""
        texts = list(completions)
        if self.reads == "prompt+completion":
            texts = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
        parts = by_parts(len(texts), self.batch_size, lambda part: self._probabilities(texts[part]).tolist())
        values = [value for part in parts for value in part]
        return [value if text.strip() else None for value, text in zip(values, completions, strict=True)]

    @torch.inference_mode()
    def _probabilities(self, texts: Sequence[str]) -> Tensor:
        """(N,) float64, the label's."""
        inputs = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.limit, return_tensors="pt"
        )
        logits = self.model(**inputs.to(self.model.device)).logits.double()
        kind = self.model.config.problem_type
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
        raise UsageError(f"{source} has the labels {shown}; name the one to reward by --scorer-label")
    exact = [i for i, label in labels.items() if label == wanted]
    near = exact or [i for i, label in labels.items() if str(label).casefold() == wanted.casefold()]
    if not near and wanted.isdecimal() and int(wanted) in labels:
        near = [int(wanted)]
    if len(near) != 1:
        raise UsageError(f"scorer_label = {wanted!r}, but {source} has the labels {shown}; name one of these")
    return near[0]


def _longest_input(config: Any, tokenizer: Any) -> int | None:
    """Tokens that fit the model; None: no limit is known."""
    if tokenizer.model_max_length < 10**6:  # unset it is 10**30
        return int(tokenizer.model_max_length)
    positions = getattr(config, "max_position_embeddings", None)
    # RoBERTa's first position is the one behind its padding's.
    return None if positions is None else int(positions) - 2


def _digest(model: Any, tokenizer: Any) -> str:
    """sha256 over everything that decides a score: weights, labels, tokenizer."""
    digest = hashlib.sha256(repr((model.config.id2label, model.config.problem_type)).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    return digest.hexdigest()
