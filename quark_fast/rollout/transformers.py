"""Sampling completions with a transformers model, plain or guided between best and worst reward token.

transformers brings the model and its KV cache. The decoding loop is ours, as sampling limits how much a run
learns in a given time: a prompt is prefilled once for all its samples, attention of one new token skips the
flash kernel on the CPU, and a token is drawn with one uniform number and no sort.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Container, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from quark_fast.errors import UsageError
from quark_fast.model.copies import frozen_copy
from quark_fast.model.policy import Policy
from quark_fast.model.reading import next_logits, runs_of_one_length
from quark_fast.rollout.sampling import Draw, DrawnBatch, Sampler, SampleRequest
from quark_fast.runtime.memory import within_memory
from quark_fast.runtime.seeds import seed_for


def sample(
    policy: Policy, model: Any, request: SampleRequest, done: Container[int] = ()
) -> Iterator[DrawnBatch]:
    """Sample the completions of a request, a batch of prompts at a time.

    Each batch has a generator of its own, derived from the seed and the batch's number, so that it comes out
    the same whatever was sampled before it. Where the memory does not suffice for a batch, half of it is
    sampled at a time, and a warning says so.

    Args:
        model: ``frozen_copy(policy, ...)``, or the reference.
        done: numbers of batches that are there already and are left out.
    Yields:
        (indices into prompts, per index its ``samples`` completions as token ids, the stop id included).
    Raises:
        OutOfMemory: the memory does not suffice for one completion.
    """
    at_once = request.sampling.at_once or max(request.sampling.rows, request.samples)
    for number, indices in request.batches(done):
        prompts, seed = [request.prompts[i] for i in indices], seed_for(request.seed, "batch", number)
        batch = dataclasses.replace(request, prompts=prompts, seed=seed)
        draw = functools.partial(_sample_by_parts, policy, model, batch)
        completions, at_once = within_memory(draw, at_once, _warn_smaller)
        yield indices, completions


def _sample_by_parts(policy: Policy, model: Any, batch: SampleRequest, size: int) -> list[list[list[int]]]:
    """A batch with at most ``size`` completions side by side."""
    generator = torch.Generator(model.device).manual_seed(batch.seed)
    found: list[list[list[int]]] = [[] for _ in batch.prompts]
    lengths = [len(prompt) for prompt in batch.prompts]
    for part, samples in _parts(lengths, batch.samples, size, policy.reading.padding):
        request = dataclasses.replace(batch, prompts=batch.prompts[part], samples=samples)
        drawn = _sample_batch(policy, model, request, generator)
        for own, more in zip(found[part], drawn, strict=True):
            own += more
    return found


def _parts(lengths: Sequence[int], samples: int, size: int, padding: bool) -> Iterator[tuple[slice, int]]:
    """(prompts, how many samples of each) so that at most ``size`` are side by side, all of one length
    without ``padding``."""
    together = max(1, size // samples)
    every = slice(0, len(lengths))
    for run in [every] if padding else runs_of_one_length(lengths):
        for first in range(run.start, run.stop, together):
            part = slice(first, min(first + together, run.stop))
            at_once = size if part.stop - first == 1 else samples
            for start in range(0, samples, at_once):
                yield part, min(at_once, samples - start)


def _warn_smaller(size: int) -> None:
    logging.getLogger(__name__).warning(
        "out of memory: from here on %d completions side by side, whose draws are others", size
    )


@torch.inference_mode()
def _sample_batch(
    policy: Policy, model: Any, request: SampleRequest, generator: torch.Generator
) -> list[list[list[int]]]:
    sampling, samples = request.sampling, request.samples
    streams = request.conditioning.streams()
    rows = len(request.prompts) * samples
    weights = torch.tensor([weight for _, weight in streams], device=model.device).view(-1, 1, 1)
    stop = torch.tensor(policy.stop_ids, dtype=torch.long, device=model.device)

    contexts = [policy.conditioned(prompt, k) for k, _ in streams for prompt in request.prompts]
    reader = next_logits(model, contexts, samples, policy.reading)
    logits = next(reader)
    drawn: list[Tensor] = []
    ended = torch.zeros(rows, dtype=torch.bool, device=model.device)
    for length in range(sampling.max_new_tokens):
        scores = logits[:, : policy.vocabulary].float()
        if len(streams) > 1:
            scores = (scores.log_softmax(-1).view(len(streams), rows, -1) * weights).sum(0)
        if length < sampling.min_new_tokens:
            scores[:, stop] = -torch.inf
        if sampling.temperature == 0:
            highest, tokens = scores.max(-1)
            check_finite(highest)
        else:
            if sampling.temperature != 1:  # a division by 1 would read and write a vocabulary a row
                scores = scores / sampling.temperature
            tokens = sample_tokens(scores, sampling.top_p, generator)
        drawn.append(tokens)
        ended |= torch.isin(tokens, stop)
        if length + 1 == sampling.max_new_tokens or bool(ended.all()):
            break
        logits = reader.send(tokens.repeat(len(streams)))

    completions = [_until_stop(row, policy.stop_ids) for row in torch.stack(drawn, 1).tolist()]
    return [completions[i : i + samples] for i in range(0, rows, samples)]


class NotFinite(UsageError):
    """A model's logits are NaN or infinite."""


def check_finite(found: Tensor) -> None:
    """Raise NotFinite for what a model's logits cannot give if they are numbers."""
    if not bool(found.isfinite().all()):
        raise NotFinite(
            "the model's logits are NaN or infinite, so there is nothing to sample from: its weights have"
            " diverged, or it overflows in this precision; give sound weights, or --precision fp32"
        )


def _until_stop(tokens: list[int], stop_ids: Sequence[int]) -> list[int]:
    """The tokens up to the first stop id, that id included: ending there is learned, too."""
    for index, token in enumerate(tokens):
        if token in stop_ids:
            return tokens[: index + 1]
    return tokens


def sample_tokens(logits: Tensor, top_p: float, generator: torch.Generator | None = None) -> Tensor:
    """One token a row from softmax(logits) restricted to its nucleus.

    The nucleus is the smallest set of most probable tokens whose mass reaches ``top_p`` (Holtzman et al.
    2020), so a token belongs to it when the tokens more probable than it hold less than ``top_p``. A draw
    from the whole distribution is therefore kept if that holds, and redrawn if not: exact, without
    sorting the vocabulary, 1 / top_p draws on average.

    Args:
        logits: (N, V) float32.
    Returns:
        (N,) token ids.
    Raises:
        NotFinite: a row has a NaN or +inf.
    """
    probs = logits.softmax(-1)
    # Inverse CDF takes one uniform number a row; torch.multinomial draws an exponential for each of V.
    cdf = probs.cumsum(-1)
    check_finite(cdf[:, -1])
    tokens = torch.empty(len(probs), dtype=torch.long, device=probs.device)
    open_rows = torch.arange(len(probs), device=probs.device)  # those that probs and cdf hold
    while len(open_rows):
        uniform = torch.rand(len(open_rows), 1, generator=generator, device=probs.device)
        target = uniform * cdf[:, -1:]
        # right=True: the first token whose cumulative mass is above the target, never one of mass 0.
        draw = torch.searchsorted(cdf, target, right=True).clamp(max=probs.shape[1] - 1)
        tokens[open_rows] = draw.squeeze(1)
        if top_p >= 1.0:
            break
        above = (probs * (probs > probs.gather(1, draw))).sum(-1)
        outside = (above >= top_p).nonzero().squeeze(1)  # indices: as a mask a GPU is waited for at each use
        open_rows, probs, cdf = open_rows[outside], probs[outside], cdf[outside]
    return tokens


class TransformersRollout:
    """Sampling in this process, by ``sample``.

    Args:
        reference: the base model.
        sampler: samples it, as ``sample`` does.
    """

    def __init__(self, policy: Policy, reference: Any, dtype: torch.dtype, sampler: Sampler = sample) -> None:
        self.policy, self.reference, self.dtype, self.sampler = policy, reference, dtype, sampler

    @contextlib.contextmanager
    def synchronised(self, from_base: bool) -> Iterator[Draw]:
        if from_base:
            yield functools.partial(self.sampler, self.policy, self.reference)
        else:
            # The copy goes when the round is sampled: learning needs its memory.
            yield functools.partial(sample, self.policy, frozen_copy(self.policy, self.dtype))

    def close(self) -> None:
        """Nothing is kept between rounds."""
