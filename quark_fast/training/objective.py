"""What a step minimises: the loss of one micro-batch, without whole logits where the model allows it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quark_fast.config import Config
from quark_fast.model.batch import Batch, Counts, completion_hidden, completion_logits, make_batch
from quark_fast.model.policy import Policy
from quark_fast.model.structure import linear_head
from quark_fast.ops.contrast import Contrast, ContrastWeights, contrast_loss
from quark_fast.ops.linear import linear_contrast_loss, linear_quark_loss
from quark_fast.ops.loss import NLL_ALONE, QuarkLoss, quark_loss
from quark_fast.ops.unlikelihood import repeated_ngrams, unlikelihood_loss
from quark_fast.runtime.transfer import to_device


@dataclass(frozen=True)
class MicroBatch:
    """The samples of one forward and backward pass, as the models read them.

    Attributes:
        batch: every sample under its own token and, in a second stream, under its mirror token.
        plain: every sample without a token, for the reference; None where nothing asks it.
        better: which of the two tokens is the better one, as of ``compare``; None: not asked.
        lengths: of the completions, tokens.
        counts: of the whole batch.
    """

    batch: Batch
    plain: Batch | None
    better: Tensor | None
    streams: int
    lengths: Sequence[int]
    counts: Counts

    @property
    def own(self) -> tuple[Tensor, Tensor]:
        """Labels and mask of one stream; the others have the same."""
        count = len(self.batch.labels) // self.streams
        return self.batch.labels[:count], self.batch.mask[:count]


# Weights (streams N, T) of the tokens -> their weighted NLL, without KL and entropy, over the batch's tokens.
WeightedNll = Callable[[Tensor], QuarkLoss]


class LossParts(NamedTuple):
    """What a micro-batch's loss is made of.

    Attributes:
        out: NLL, KL and entropy under each sample's own token; its loss is theirs with the contrast and the
            mirror tokens' KL. The prompts' KL and the unlikelihood are still to be added.
        contrast: the comparisons; None without.
        mirror_kl: the KL under the mirror tokens; None where it is not held.
        prompt_kl: the KL on the prompts' own tokens; None without.
        weighted_nll: the NLL again, with weights for the tokens.
    """

    out: QuarkLoss
    contrast: Contrast | None
    mirror_kl: Tensor | None
    prompt_kl: QuarkLoss | None
    weighted_nll: WeightedNll


# (sum, count) of each term of the loss: its share of the batch's mean is their quotient.
Terms = dict[str, tuple[Tensor, float]]


def read_terms(parts: Sequence[Terms]) -> dict[str, float]:
    """The terms of a step from those of its micro-batches, by one read: a GPU is waited for at each."""
    totals = torch.stack([total.float() for terms in parts for total, _ in terms.values()]).tolist()
    found: dict[str, float] = {}
    counted = ((name, count) for terms in parts for name, (_, count) in terms.items())
    for total, (name, count) in zip(totals, counted, strict=True):
        found[name] = found.get(name, 0.0) + total / count
    return found


class Objective:
    """NLL under each sample's own reward token + KL to the reference - entropy + contrast + unlikelihood.

    Attributes:
        heads: the heads of policy and reference, applied to a chunk of rows at a time; None where a model
            does more to its logits than a linear layer does: then they are whole.
        description: which of the two, for the run's record.
    """

    def __init__(
        self,
        config: Config,
        policy: Policy,
        reference: Any,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.config, self.policy, self.reference = config, policy, reference
        self.device, self.autocast = device, autocast
        self.kl_coef = config.kl_coef  # a controller may change it from step to step
        self.contrast = ContrastWeights(*config.contrast_coefs, config.contrast_margin)
        head, ref_head = linear_head(policy.model), linear_head(reference)
        self.heads = None if head is None or ref_head is None else (head, ref_head)
        self.description = (
            "whole logits, since the model's are not its hidden states times one matrix"
            if self.heads is None
            else "chunks of hidden states"
        )

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        quantiles: Sequence[int],
        counts: Counts,
    ) -> tuple[Tensor, Terms]:
        """The micro-batch's share of the loss of a batch with these counts.

        The reference sees no reward token. With ``prompt_kl_coef`` a KL holds the policy on the prompts' own
        tokens, too, under every reward token that is read; but for a prompt's first one, since no completion
        stands right after a reward token. The contrast compares the sample's own token k with its mirror
        token, K - 1 - k, and the better of these two with the base model; with the latter comparison the KL
        holds both. The unlikelihood lowers tokens that repeat an n-gram, under the better of the two; without
        any contrast, under the sample's own.

        Returns:
            (scalar to call backward on; the terms as the micro-batch's share of the batch's means, which
            ``read_terms`` reads).
        """
        streams = [list(quantiles)]
        if self.config.contrast_coef:
            streams.append([self.policy.quantiles - 1 - k for k in quantiles])
        part = self._micro_batch(prompts, completions, streams, counts)
        compute = self._from_logits if self.heads is None else self._from_hidden
        out, contrast, mirror_kl, prompt_kl, weighted_nll = compute(part)
        loss, (tokens, samples, prompt_tokens) = out.loss, counts
        measured = ("nll", "kl", "entropy") if part.plain is not None else ("nll", "entropy")
        terms = {name: (getattr(out, name).sum(), tokens) for name in measured}
        if contrast is not None:
            terms["contrast"] = contrast.mirror.sum(), samples
        if contrast is not None and mirror_kl is not None and part.better is not None:
            terms["base_contrast"] = contrast.base.sum(), samples
            terms["mirror_kl"] = mirror_kl.sum(), tokens
        if prompt_kl is not None:
            loss = loss + prompt_kl.loss
            terms["prompt_kl"] = prompt_kl.kl.sum(), prompt_tokens * len(streams)
        if self.config.unlikelihood_coef:
            repeated = _repeated(completions, self.config.unlikelihood_ngram, part.batch.mask, streams)
            value, surrogate = unlikelihood_loss(weighted_nll, repeated)
            mean = value.sum() / tokens
            loss = loss + self.config.unlikelihood_coef * _with_gradient_of(surrogate, mean)
            terms["unlikelihood"] = mean.detach(), 1.0
        terms["loss"] = loss.detach(), 1.0
        return loss, terms

    def _micro_batch(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        streams: Sequence[Sequence[int]],
        counts: Counts,
    ) -> MicroBatch:
        """The samples under each stream's tokens and, where the reference is asked, without any."""
        hold = self.config.prompt_kl_coef > 0 and counts.prompt_tokens > 0
        batch = make_batch(
            self.policy,
            list(prompts) * len(streams),
            list(completions) * len(streams),
            [k for stream in streams for k in stream],
            self.device,
            prompts_too=hold,
        )
        plain = better = None
        if self.contrast.base:
            own, mirror = (to_device(stream, self.device) for stream in streams)
            better = torch.sign(own - mirror)
        if self.kl_coef or self.contrast.base or hold:
            plain = make_batch(
                self.policy, prompts, completions, [None] * len(prompts), self.device, prompts_too=hold
            )
        return MicroBatch(batch, plain, better, len(streams), [*map(len, completions)], counts)

    def _options(self) -> dict[str, Any]:
        return {
            "kl_coef": self.kl_coef,
            "entropy_coef": self.config.entropy_coef,
            "kl": self.config.kl,
            "impl": self.config.impl,
            "vocab_size": self.policy.vocabulary,
        }

    def _from_hidden(self, part: MicroBatch) -> LossParts:
        assert self.heads is not None
        head, ref_head = self.heads
        labels, mask = part.own
        prompt_ref = ref_hidden = ref_weight = ref_bias = None
        if part.plain is not None:
            with torch.no_grad():
                prompt_ref, ref_hidden = _split(part.plain, completion_hidden(self.reference, part.plain))
            ref_weight, ref_bias = ref_head.weight, ref_head.bias

        def weighted_nll(weights: Tensor) -> QuarkLoss:
            with self.autocast():
                return linear_quark_loss(
                    hidden,
                    head.weight,
                    None,
                    None,
                    part.batch.labels,
                    weights,
                    **{**self._options(), **NLL_ALONE},
                    bias=head.bias,
                    normalizer=part.counts.tokens,
                )

        def on_prompts(labels: Tensor, mask: Tensor, with_reference: bool, **options: Any) -> QuarkLoss:
            options |= {"bias": head.bias, "lengths": part.batch.prompt_lengths}
            if not with_reference or prompt_ref is None:
                return linear_quark_loss(prompt_hidden, head.weight, None, None, labels, mask, **options)
            ref = prompt_ref.repeat(part.streams, 1, 1), ref_weight
            return linear_quark_loss(
                prompt_hidden, head.weight, *ref, labels, mask, ref_bias=ref_bias, **options
            )

        with self.autocast():
            prompt_hidden, hidden = _split(part.batch, completion_hidden(self.policy.model, part.batch))
            prompt_kl = self._kl_on_prompts(part, on_prompts)
            options = {
                **self._options(),
                "bias": head.bias,
                "ref_bias": ref_bias,
                "normalizer": part.counts.tokens,
                "lengths": part.lengths,
            }
            if part.streams == 1:
                out = linear_quark_loss(hidden, head.weight, ref_hidden, ref_weight, labels, mask, **options)
                return LossParts(out, None, None, prompt_kl, weighted_nll)
            found = linear_contrast_loss(
                torch.unflatten(hidden, 0, (part.streams, -1)),
                head.weight,
                ref_hidden,
                ref_weight,
                labels,
                mask,
                part.better,
                weights=self.contrast,
                samples=part.counts.samples,
                **options,
            )
            return LossParts(*found, prompt_kl, weighted_nll)

    def _kl_on_prompts(self, part: MicroBatch, loss_of: Callable[..., QuarkLoss]) -> QuarkLoss | None:
        """The KL on the prompts' tokens, as a loss whose NLL is taken away again; None: not asked for.

        Args:
            loss_of: (labels, mask, whether with the reference, options) -> the loss in these columns.
        """
        if not part.batch.prompt_lengths:
            return None
        lengths = to_device(part.batch.prompt_lengths, self.device)
        mask = torch.arange(max(part.batch.prompt_lengths), device=self.device) < lengths.unsqueeze(1)
        labels = torch.zeros_like(mask, dtype=torch.long)  # any will do
        options = {**self._options(), "normalizer": part.counts.prompt_tokens, "entropy_coef": 0.0}
        held = loss_of(labels, mask, True, **options | {"kl_coef": self.config.prompt_kl_coef})
        nll = loss_of(labels, mask, False, **options | NLL_ALONE)
        return held._replace(loss=held.loss - nll.loss)

    def _from_logits(self, part: MicroBatch) -> LossParts:
        labels, mask = part.own
        with self.autocast():
            prompt_logits, every = _split(part.batch, completion_logits(self.policy.model, part.batch))
        logits = torch.unflatten(every, 0, (part.streams, -1))

        def weighted_nll(weights: Tensor) -> QuarkLoss:
            options = {**self._options(), **NLL_ALONE, "normalizer": part.counts.tokens}
            return quark_loss(every, None, part.batch.labels, weights, **options)

        prompt_ref = ref_logits = None
        if part.plain is not None:
            with torch.no_grad():
                prompt_ref, ref_logits = _split(part.plain, completion_logits(self.reference, part.plain))

        def on_prompts(labels: Tensor, mask: Tensor, with_reference: bool, **options: Any) -> QuarkLoss:
            ref = prompt_ref.repeat(part.streams, 1, 1) if with_reference and prompt_ref is not None else None
            return quark_loss(prompt_logits, ref, labels, mask, **options)

        prompt_kl = self._kl_on_prompts(part, on_prompts)
        options = {**self._options(), "normalizer": part.counts.tokens}
        # The contrast, the unlikelihood and the KL on prompts read the logits, too.
        inplace = part.streams == 1 and not self.config.unlikelihood_coef and prompt_kl is None
        out = quark_loss(logits[0], ref_logits, labels, mask, inplace=inplace, **options)
        if part.streams == 1:
            return LossParts(out, None, None, prompt_kl, weighted_nll)
        contrast, surrogate = contrast_loss(
            logits,
            ref_logits,
            labels,
            mask,
            part.better,
            weights=self.contrast,
            vocab_size=self.policy.vocabulary,
            samples=part.counts.samples,
            impl=self.config.impl,
        )
        value = self.contrast.total(contrast) / part.counts.samples
        loss = out.loss + _with_gradient_of(surrogate, value)
        mirror_kl = None
        if part.better is not None:
            held = quark_loss(logits[1], ref_logits, labels, mask, **{**options, "entropy_coef": 0.0})
            nll = quark_loss(logits[1], None, labels, mask, **{**options, **NLL_ALONE})
            loss, mirror_kl = loss + (held.loss - nll.loss), held.kl  # the KL alone
        return LossParts(out._replace(loss=loss), contrast, mirror_kl, prompt_kl, weighted_nll)


def _with_gradient_of(surrogate: Tensor, value: Tensor) -> Tensor:
    """The number ``value``, with the gradient of ``surrogate``."""
    return surrogate + (value - surrogate).detach()


def _split(batch: Batch, columns: Tensor) -> tuple[Tensor, Tensor]:
    """(N, H, ...) of the prompts and (N, C, ...) of the completions."""
    prompts = max(batch.prompt_lengths, default=0)
    return columns[:, :prompts], columns[:, prompts:]


def _repeated(
    completions: Sequence[Sequence[int]], n: int, mask: Tensor, streams: Sequence[Sequence[int]]
) -> Tensor:
    """(streams N, T) bool, aligned as ``mask``: tokens that repeat an n-gram of their completion.

    Each completion is marked in one stream only, that of its best token: a worse token stands for, among
    other things, the loops that are to go.
    """
    found = torch.zeros_like(mask, device="cpu")
    for i, (completion, *tokens) in enumerate(zip(completions, *streams, strict=True)):
        row = tokens.index(max(tokens)) * len(completions) + i
        found[row, : len(completion)] = torch.tensor(repeated_ngrams(completion, n))
    return to_device(found, mask.device)
