"""Guided generation of this model by transformers alone.

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
    model.generate(**tokenizer(texts, return_tensors="pt", padding=True), guidance=1.5)

The model has learned a token for its best and one for its worst texts, and its tokenizer puts the best one in
front. With ``guidance`` w the next token is drawn from

    log p = log p(. | worst) + w (log p(. | best) - log p(. | worst)),   renormalised,

before ``repetition_penalty``, logits processors of your own, temperature, top-k and top-p; w = 1 is the best
token alone. Above 1 top-p is the nucleus of log p(. | best), below 0 that of log p(. | worst): there the mix
makes much of tokens that neither would write. Each token takes a second forward pass.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
)

BEST, WORST = -1, -1
# Layers of states alone, which take a mask for what they read now, not for what they have read.
MASKED_ONCE = ("falcon_mamba", "mamba")
# The state of a text is kept in the model, where a second text would overwrite it.
ONE_TEXT = ("recurrent_gemma",)


class Guidance(LogitsProcessor):
    """Mixes in what the model predicts when the worst token stands where the best one does."""

    def __init__(
        self, model: Any, weight: float, mask: Tensor | None, top_p: float, temperature: float
    ) -> None:
        self.model, self.weight, self.mask = model, weight, mask
        self.top_p, self.temperature = top_p, temperature
        self.takes = set(inspect.signature(model.forward).parameters)
        # Its name depends on the version of transformers.
        self.cache_name = next((name for name in ("cache", "past_key_values") if name in self.takes), "")
        self.cache: Any = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # Logits are log p up to a constant of each row, and so is their mix.
        best, worst = scores.float(), self._under_worst(input_ids).float()
        mixed = worst + self.weight * (best - worst)
        suppressed = scores == -torch.inf  # stays so, whatever the weight
        if self.top_p < 1:
            one = best if self.weight > 1 else worst.masked_fill(suppressed, -torch.inf)
            suppressed |= self._outside_nucleus(one)
        return mixed.masked_fill(suppressed, -torch.inf).to(scores.dtype)

    def _outside_nucleus(self, scores: Tensor) -> Tensor:
        """(N, V) bool: the tokens that top-p leaves out of softmax(scores / temperature)."""
        p = (scores / self.temperature).softmax(-1)
        falling = p.sort(-1, descending=True).values
        last = (falling.cumsum(-1) < self.top_p).sum(-1, keepdim=True).clamp(max=p.shape[-1] - 1)
        return p < falling.gather(-1, last)

    @torch.no_grad()
    def _under_worst(self, input_ids: Tensor) -> Tensor:
        """(N, V) logits of the next token."""
        rows, length = input_ids.shape
        if self.mask is None:
            self.mask = torch.ones_like(input_ids)
        # Several samples of a prompt are neighbours.
        self.mask = self.mask.repeat_interleave(rows // len(self.mask), dim=0)
        new = self.mask.new_ones(rows, length - self.mask.shape[1])
        self.mask = torch.cat([self.mask, new], dim=1)
        ids = torch.where(input_ids == BEST, WORST, input_ids)
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)
        if self.cache is not None:
            ids, positions = ids[:, -1:], positions[:, -1:]
        read = self.cache is not None and self.model.config.model_type in MASKED_ONCE
        mask = None if read else self.mask
        inputs = {"attention_mask": mask, "position_ids": positions, self.cache_name: self.cache}
        inputs["logits_to_keep"] = 1  # of a long prompt, all would take gigabytes
        given = {name: value for name, value in inputs.items() if name in self.takes}
        # A model without a cache by either name reads the whole text again for every token.
        output = self.model(input_ids=ids, use_cache=bool(self.cache_name), **given)
        self.cache = output.get(self.cache_name)
        logits: Tensor = output.logits[:, -1]
        return logits


def _padding_of(ids: Tensor, setting: Callable[[str], Any]) -> Tensor | None:
    """The mask that transformers finds by itself: padding is what no text ends with."""
    ends, pad = setting("eos_token_id"), setting("pad_token_id")
    padded = pad is not None and pad not in (ends if isinstance(ends, list) else [ends])
    return (ids != pad).long() if padded and bool((ids == pad).any()) else None


def generate(
    inputs: Tensor | None = None,
    generation_config: Any = None,
    logits_processor: LogitsProcessorList | None = None,
    *,
    model: Any,
    guidance: float | None = 1.0,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """As ``model.generate``, with ``guidance``.

    Raises:
        ValueError: ``guidance`` is not finite, a text has no best token in front, the model keeps a text's
            state in itself, decoding is by beams or assisted (their texts change places, or are taken back),
            or a setting would act before the mix.
    """
    ids = inputs if input_ids is None else input_ids
    processors = LogitsProcessorList(logits_processor or [])

    def setting(name: str) -> Any:
        """As transformers finds it: an argument, else of the config given, else of the model's own."""
        configs = (generation_config, model.generation_config)
        found = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
        return next((value for value in found if value is not None), None)

    if guidance is not None and guidance != 1:
        if not math.isfinite(guidance):
            raise ValueError(f"guidance = {guidance}; give a finite number, 1 for the best token alone")
        if ids is None or not bool((ids == BEST).any(dim=1).all()):
            raise ValueError(
                f"guidance: token {BEST} must stand before every text; use this folder's tokenizer"
            )
        if (kind := model.config.model_type) in ONE_TEXT:
            raise ValueError(
                f"guidance: {kind} keeps a text's state in the model, where those after the best and the"
                " worst token would overwrite one another; sample by python -m quark_fast.generate RUN"
            )
        if (setting("num_beams") or 1) > 1:
            raise ValueError("guidance: beams are not supported; leave num_beams at 1")
        for name in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp"):
            if setting(name):
                raise ValueError(f"guidance: assisted decoding is not supported; leave out {name}")
        for name in ("sequence_bias", "encoder_repetition_penalty", "exponential_decay_length_penalty"):
            if setting(name) not in (None, 1.0):
                raise ValueError(
                    f"guidance: {name} would count {guidance:g} times, as transformers applies it before the"
                    " mix; give it as a logits processor of your own"
                )
        if attention_mask is None:
            attention_mask = _padding_of(ids, setting)
        top_p = setting("top_p") or 1.0
        if setting("do_sample") and not 0 <= guidance <= 1 and 0 < top_p < 1:
            kwargs["top_p"] = 1.0  # the nucleus is one token's, taken before the mix
        else:
            top_p = 1.0
        mix = Guidance(model, guidance, attention_mask, top_p, setting("temperature") or 1.0)
        processors.insert(0, mix)
        if (penalty := setting("repetition_penalty")) not in (None, 1.0):
            # Transformers' own would stand in front of the mix, and count w times.
            kwargs["repetition_penalty"] = 1.0
            processors.insert(1, RepetitionPenaltyLogitsProcessor(penalty))
    if attention_mask is not None:
        kwargs["attention_mask"] = attention_mask
    return GenerationMixin.generate(model, ids, generation_config, processors, **kwargs)
