"""Sampling completions with a transformers model, plain or guided between best and worst reward token.

transformers brings the model and its KV cache. The decoding loop is ours, as sampling limits how much a run
learns in a given time: a prompt is prefilled once for all its samples, attention of one new token skips the
flash kernel on the CPU, and a token is drawn with one uniform number and no sort (``tokens.py``).
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

from quark_fast.model.attention import is_free_to_read
from quark_fast.model.copies import SharedCopy
from quark_fast.model.fixed_step import FixedSteps
from quark_fast.model.policy import Policy
from quark_fast.model.reading import Read, Sent, next_logits, runs_of_one_length
from quark_fast.model.sizes import rows_sampled
from quark_fast.rollout.live_rows import WORTH_DROPPING, LiveRows
from quark_fast.rollout.sampling import Draw, DrawnBatch, Sampler, SampleRequest
from quark_fast.rollout.tokens import NextToken, draw_tokens, model_log_p
from quark_fast.runtime.memory import within_memory
from quark_fast.runtime.seeds import seed_for
from quark_fast.runtime.transfer import to_device

Drawn = tuple[list[int], list[float]]  # a completion, and its NLLs as they are asked for: own, the model's


def sample(
    policy: Policy, model: Any, request: SampleRequest, done: Container[int] = ()
) -> Iterator[DrawnBatch]:
    """Sample the completions of a request, a batch of prompts at a time.

    Each batch has a generator of its own, derived from the seed and the batch's number, so that it comes out
    the same whatever was sampled before it. Guided completions, of two streams each, are sampled half a batch
    at a time. Where the memory does not suffice for so many, half of them are, and a warning says so; on a
    GPU arithmetic finds that out before (``sizes.rows_sampled``), unless ``at_once`` says how many.

    Args:
        model: ``frozen_copy(policy, ...)``, or the reference.
        done: numbers of batches that are there already and are left out.
    Yields:
        Per index into the prompts its ``samples`` completions, and where asked how likely they were.
    Raises:
        OutOfMemory: the memory does not suffice for one completion.
    """
    at_once = _side_by_side(policy, model, request)
    decoding, read = request.sampling.decoding, functools.partial(next_logits, model, reading=policy.reading)
    steps = None if decoding == "eager" else FixedSteps(model, policy.reading, decoding)
    if steps is not None:
        read = functools.partial(steps.next_logits, new_tokens=request.sampling.max_new_tokens)

    def smaller(size: int) -> None:
        if steps is not None:
            steps.forget()
        _warn_smaller(size)

    for number, indices in request.batches(done):
        prompts, seed = [request.prompts[i] for i in indices], seed_for(request.seed, "batch", number)
        batch = dataclasses.replace(request, prompts=prompts, seed=seed)
        draw = functools.partial(_sample_by_parts, policy, model, read, batch)
        drawn, at_once = within_memory(draw, at_once, smaller)
        completions = [[ids for ids, _ in group] for group in drawn]
        own_nll = [[nll[0] for _, nll in group] for group in drawn] if request.own_nll else None
        model_nll = [[nll[-1] for _, nll in group] for group in drawn] if request.model_nll else None
        yield DrawnBatch(indices, completions, own_nll, model_nll)


def _side_by_side(policy: Policy, model: Any, request: SampleRequest) -> int:
    """How many completions to begin with: as asked, else a batch, or what of it a GPU's free memory holds."""
    sampling, streams = request.sampling, request.conditioning.streams()
    asked = sampling.at_once or max(sampling.rows, request.samples)
    asked = max(1, asked // len(streams))  # each has a cache of its own
    if sampling.at_once or not request.prompts:
        return asked
    longest = max(len(policy.conditioned(prompt, k)) for k, _ in streams for prompt in request.prompts)
    return rows_sampled(model, asked, longest + sampling.max_new_tokens, len(streams))


def _sample_by_parts(
    policy: Policy, model: Any, read: Read, batch: SampleRequest, size: int
) -> list[list[Drawn]]:
    """A batch with at most ``size`` completions side by side."""
    generator = torch.Generator(model.device).manual_seed(batch.seed)
    found: list[list[Drawn]] = [[] for _ in batch.prompts]
    lengths = [len(prompt) for prompt in batch.prompts]
    for part, samples in _parts(lengths, batch.samples, size, policy.reading.padding):
        request = dataclasses.replace(batch, prompts=batch.prompts[part], samples=samples)
        drawn = _sample_batch(policy, read, request, generator)
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
    policy: Policy, read: Read, request: SampleRequest, generator: torch.Generator
) -> list[list[Drawn]]:
    sampling, samples, device = request.sampling, request.samples, generator.device
    streams, nucleus_of = request.conditioning.streams(), request.conditioning.nucleus_of()
    rows = len(request.prompts) * samples
    stop = to_device(policy.stop_ids, device, torch.long)
    weights = to_device([weight for _, weight in streams], device, torch.float32)
    of_any = NextToken(weights, policy.vocabulary, stop[:0], sampling.temperature, sampling.top_p, nucleus_of)
    no_stop = dataclasses.replace(of_any, suppressed=stop)

    contexts = [policy.conditioned(prompt, k) for k, _ in streams for prompt in request.prompts]
    reader = read(contexts, samples)
    logits = next(reader)
    live = LiveRows(rows, sampling.max_new_tokens, stop, request.own_nll + request.model_nll)
    # A step of fixed shapes has all its rows to the end.
    drops = sampling.decoding == "eager"
    look_every = 1 if is_free_to_read(stop) else 8
    for length in range(1, sampling.max_new_tokens + 1):
        wanted = no_stop if length <= sampling.min_new_tokens else of_any
        log_q = torch.empty(len(live), dtype=torch.float32, device=device) if request.own_nll else None
        tokens, kept = draw_tokens(logits, wanted, generator, log_q), None
        told = [] if log_q is None else [log_q]
        if request.model_nll:
            told.append(model_log_p(logits, tokens, policy.vocabulary))
        live.add(tokens, *told)
        if length == sampling.max_new_tokens:
            break
        if length % look_every == 0:
            alive = live.alive()
            if alive == 0:
                break
            if drops and alive <= WORTH_DROPPING * len(live):
                kept = live.drop_ended(alive)
        logits = reader.send(_of_streams(tokens, kept, len(streams)))
    every = live.completions(policy.stop_ids)
    return [every[i : i + samples] for i in range(0, rows, samples)]


def _of_streams(tokens: Tensor, kept: Tensor | None, streams: int) -> Sent:
    """What is drawn for a row, each of its streams reads; rows that are not kept read no more in any."""
    rows = None
    if kept is not None:
        rows = torch.cat([kept + stream * len(tokens) for stream in range(streams)])
        tokens = tokens[kept]
    # A row whose logits are not finite, which has no token, is reported after the last one.
    return Sent(tokens.clamp(min=0).repeat(streams), rows)


class TransformersRollout:
    """Sampling in this process, by ``sample``.

    Args:
        copied: of the policy, which is sampled.
        reference: the base model.
        sampler: samples it, as ``sample`` does.
    """

    def __init__(self, copied: SharedCopy, reference: Any, sampler: Sampler = sample) -> None:
        self.copied, self.reference, self.sampler = copied, reference, sampler

    @contextlib.contextmanager
    def synchronised(self, from_base: bool) -> Iterator[Draw]:
        policy = self.copied.policy
        if from_base:
            yield functools.partial(self.sampler, policy, self.reference)
        else:
            try:
                yield functools.partial(sample, policy, self.copied.get())
            finally:
                self.copied.drop()  # learning needs its memory

    def close(self) -> None:
        """Nothing is kept between rounds."""
