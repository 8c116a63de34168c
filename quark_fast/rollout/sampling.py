"""What is asked of an engine that samples: prompts, settings of the decoding, reward tokens, batches."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

from quark_fast.model.policy import Policy
from quark_fast.runtime.journal import Kept
from quark_fast.runtime.overlap import Begun

T = TypeVar("T")


class DrawnBatch(NamedTuple):
    """Completions of some prompts.

    Attributes:
        indices: of the prompts.
        completions: of each prompt, as token ids, the stop id included.
        own_nll: -log q of each completion, nats, over all its ids; q is what they were drawn from. None: not
            asked for, or the engine does not tell.
        model_nll: likewise -log p, p being the model's softmax over the whole base vocabulary: temperature 1,
            no nucleus, no token suppressed. None: not asked for, or the engine does not tell.
    """

    indices: list[int]
    completions: list[list[list[int]]]
    own_nll: list[list[float]] | None = None
    model_nll: list[list[float]] | None = None

    def each(self) -> list[tuple[int, list[int]]]:
        """(index of its prompt, completion), one after the other."""
        groups = zip(self.indices, self.completions, strict=True)
        return [(i, ids) for i, group in groups for ids in group]


@dataclass(frozen=True)
class Sampling:
    """How to draw tokens. Lengths in tokens; ``rows`` completions are a batch, drawn by one generator.

    ``temperature`` 0 is greedy decoding: the most probable token every time, the lowest id among equals;
    ``top_p`` and the seed then do not matter. ``at_once``: fewer completions of a batch side by side, for
    less memory, which changes what is drawn in that batch; 0: all of it, on a GPU what of it fits.
    ``decoding``: how the model is run for each token, as the setting of that name.
    """

    max_new_tokens: int = 20
    min_new_tokens: int = 3
    temperature: float = 1.0
    top_p: float = 1.0
    rows: int = 128
    at_once: int = 0
    decoding: Literal["eager", "static", "graph"] = "eager"

    def what_is_drawn(self) -> dict[str, Any]:
        """As JSON, what decides the tokens; the rest may change at a resume, in the middle of a stage."""
        how = dataclasses.asdict(dataclasses.replace(self, at_once=0))
        del how["decoding"]
        return how


@dataclass(frozen=True)
class Conditioning:
    """What stands before the prompt.

    ``quantile`` None is no reward token. With ``against`` a second stream is conditioned on that quantile
    and the two are mixed token by token (guided conditioning; classifier-free guidance of Ho and Salimans
    2022 with reward tokens):

        log p = log p(against) + w (log p(quantile) - log p(against)),   renormalised; w = guidance.

    With w above 1 ``top_p`` is the nucleus of log p(quantile), below 0 that of log p(against): there the mix
    makes much of tokens that neither would write. (The expert's nucleus before the mix: Liu et al. 2021.)
    """

    quantile: int | None = None
    against: int | None = None
    guidance: float = 1.0

    def streams(self) -> list[tuple[int | None, float]]:
        """(quantile, weight of its log p) of each stream; w = 1, or two equal ones, need no second."""
        if self.against in (None, self.quantile) or self.guidance == 1.0:
            return [(self.quantile, 1.0)]
        return [(self.quantile, self.guidance), (self.against, 1.0 - self.guidance)]

    def nucleus_of(self) -> int | None:
        """The index of the stream whose nucleus is drawn from; None: that of the mix, or of the only one."""
        if len(self.streams()) == 1 or 0 <= self.guidance <= 1:
            return None
        return 0 if self.guidance > 1 else 1


@dataclass(frozen=True)
class SampleRequest:
    """``samples`` completions of each prompt.

    Attributes:
        prompts: token ids without prefix.
        shard: (index, count) of a process among several: every count-th batch, from the index-th on.
        own_nll: also tell how likely each completion was to be drawn, where the engine can.
        model_nll: also tell how likely each completion is to the model, where the engine can. Guided
            completions, which two streams draw, have none.

    Raises:
        ValueError: ``model_nll`` of guided completions.
    """

    prompts: Sequence[Sequence[int]]
    conditioning: Conditioning
    sampling: Sampling
    samples: int
    seed: int
    shard: tuple[int, int] = (0, 1)
    own_nll: bool = False
    model_nll: bool = False

    def __post_init__(self) -> None:
        if self.model_nll and len(self.conditioning.streams()) > 1:
            guidance = self.conditioning.guidance
            raise ValueError(f"model_nll with guidance = {guidance:g}: two streams draw; give 1, or False")

    def batches(self, done: Container[int] = ()) -> list[tuple[int, list[int]]]:
        """(number, indices of prompts) of each of the shard's batches, without those that are ``done``.

        Prompts of similar length share a batch.
        """
        by_length = sorted(range(len(self.prompts)), key=lambda i: (len(self.prompts[i]), i))
        size = max(1, self.sampling.rows // self.samples)
        index, count = self.shard
        every = [by_length[start : start + size] for start in range(0, len(by_length), size)]
        own = list(enumerate(every))[index::count]
        return [(number, batch) for number, batch in own if number not in done]


class Draw(Protocol):
    """``sample`` of some model: the request's batches in order, without those whose numbers are ``done``."""

    def __call__(self, request: SampleRequest, done: Container[int] = ...) -> Iterator[DrawnBatch]: ...


# ``sample``, or what stands in for it: ``shared_samples.SharedSamples``.
Sampler = Callable[[Policy, Any, SampleRequest, Container[int]], Iterator[DrawnBatch]]


class Rollout(Protocol):
    """The engine that samples a round's completions: ``TransformersRollout``, ``VllmRollout``."""

    def synchronised(self, from_base: bool) -> AbstractContextManager[Draw]:
        """Sample from the policy as it is now; ``from_base``: from the reference, as it has learned nothing.

        All processes of a run have to ask, since the policy may be sharded among them.
        """

    def close(self) -> None:
        """No further round is sampled."""


def kept_or_drawn(
    draw: Draw,
    request: SampleRequest,
    kept: Kept[T],
    make: Callable[[DrawnBatch], Begun[T]],
) -> Iterator[Begun[T]]:
    """Each batch, as it was kept or as it is drawn now; what ``make`` begins of it is kept when it ends."""
    drawn = draw(request, kept)

    def keep(number: int, made: T) -> T:
        kept.keep(number, made)
        return made

    for number, _ in request.batches():
        if number in kept:
            yield Begun(functools.partial(kept.__getitem__, number))
        else:
            yield make(next(drawn)).then(functools.partial(keep, number))
    if request.batches(done=kept):
        next(drawn, None)  # ``SharedSamples`` writes its file after the last batch
