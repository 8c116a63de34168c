"""A decoding step of fixed shapes, which a GPU can be handed as a whole.

The cache has room for all tokens to come, and what a step is told stands in tensors of its own: its tokens,
their positions, which columns of the cache are read, and where the next one is written. From step to step
these are written in place, and no value of theirs is read by the program. So every step of a shape is the
same sequence of kernels at the same addresses: a CUDA graph, recorded once, that the program starts with one
call where it would start each kernel by itself. Without a GPU the same step runs kernel by kernel.

The draw of the token is not part of the graph: its kernels differ before and after ``min_new_tokens``, and
as nothing is waited for, the program starts them while the graph is still running.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import StaticLayer

from quark_fast.errors import UsageError
from quark_fast.model.cache import decoding_cache, keeps_all
from quark_fast.model.reading import Reader, Reading, last_column, pad_left, positions_of, read

COLUMNS = 64  # a cache's columns are a multiple of it: prompts of similar length share a step
WARM_UPS = 2  # the first run of a kernel may allocate or load, which must not be recorded

Step = Callable[[], Tensor]


class FixedSteps:
    """The decoding steps of a model, each made once for the shapes that occur.

    Args:
        decoding: "static": run kernel by kernel; "graph": recorded by ``cuda_graph``.
    Raises:
        UsageError: the model is not read with padding and a cache.
    """

    def __init__(self, model: Any, reading: Reading, decoding: Literal["static", "graph"]) -> None:
        if not (reading.padding and reading.cache):
            raise not_for(model, f"it is read as {reading}")
        self.model, self.decoding = model, decoding
        self._made: dict[tuple[int, int], tuple[_FixedStep, Step]] = {}

    def next_logits(self, contexts: Sequence[Sequence[int]], samples: int, new_tokens: int) -> Reader:
        """``reading.next_logits`` for at most ``new_tokens``; the next step writes over its logits.

        All rows go on to the end: with fewer of them it would be another step.

        Raises:
            UsageError: the model has a layer that does not keep every key and value.
        """
        ids, mask = pad_left(contexts, self.model.device)
        positions = positions_of(mask)
        rows = torch.arange(len(ids), device=ids.device).repeat_interleave(samples)
        prompts = decoding_cache(self.model)
        last = last_column(ids.device)
        logits = read(self.model, ids, mask, positions, columns=last, cache=prompts).logits[:, -1]
        sent = yield logits[rows]
        # Of the last token nothing is written: one column at least is never read.
        fixed, run = self._step(prompts, len(rows), ids.shape[1] + new_tokens)
        fixed.begin(prompts, mask, positions, rows)
        del prompts, logits  # their memory
        while True:
            assert sent.rows is None, "a step of fixed shapes has all its rows"
            fixed.tokens.copy_(sent.tokens.unsqueeze(1))
            sent = yield run()

    def forget(self) -> None:
        """The steps made so far, whose memory is needed otherwise."""
        self._made.clear()

    def _step(self, prompts: DynamicCache, rows: int, columns: int) -> tuple[_FixedStep, Step]:
        columns = -(-columns // COLUMNS) * COLUMNS
        if (rows, columns) not in self._made:
            # Batches come by the length of their prompts: what is shorter does not come back.
            self._made = {shape: made for shape, made in self._made.items() if shape[1] == columns}
            fixed = _FixedStep(self.model, prompts, rows, columns)
            run = cuda_graph(fixed.run, self.model.device) if self.decoding == "graph" else fixed.run
            self._made[rows, columns] = fixed, run
        return self._made[rows, columns]


class _FixedStep:
    """What a step reads and writes, all of it allocated once."""

    def __init__(self, model: Any, prompts: DynamicCache, rows: int, columns: int) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.long, device=model.device)

        self.model = model
        self.tokens, self.positions, self.mask = zeros(rows, 1), zeros(rows, 1), zeros(rows, columns)
        self.place = zeros(1)  # of the cache's columns, where the tokens are written
        self.last = zeros(1) - 1
        _check_layers(model, prompts)
        self.layers = [_FixedLayer(layer, rows, columns, self.place) for layer in prompts.layers]
        self.cache = Cache(layers=self.layers)  # type: ignore[arg-type]

    def begin(self, prompts: DynamicCache, mask: Tensor, positions: Tensor, rows: Tensor) -> None:
        """Behind these prompts; ``rows``: which of them stands in each row."""
        length = mask.shape[1]
        for layer, held in zip(self.layers, prompts.layers, strict=True):
            layer.begin(held, rows)
        self.mask.zero_()[:, :length] = mask[rows]
        self.positions.copy_(positions[rows, -1:] + 1)
        self.place.fill_(length)

    def run(self) -> Tensor:
        """(rows, >= V) logits of the tokens after ``tokens``, which are then part of the cache."""
        self.mask.index_fill_(1, self.place, 1)
        output = read(self.model, self.tokens, self.mask, self.positions, columns=self.last, cache=self.cache)
        self.positions.add_(1)
        self.place.add_(1)
        logits: Tensor = output.logits[:, -1]
        return logits


class _FixedLayer(StaticLayer):  # type: ignore[no-untyped-call]
    """transformers' layer of fixed size, which writes where the step says.

    Its own counts by itself: three kernels more a layer, and another count for each.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, like: Any, rows: int, columns: int, place: Tensor) -> None:
        super().__init__(max_cache_len=columns)
        self.place = place
        self.keys, self.values = (
            held.new_zeros((rows, held.shape[1], columns, held.shape[3])) for held in _held(like)
        )
        self.device, self.is_initialized = self.keys.device, True

    def begin(self, prompts: Any, rows: Tensor) -> None:
        for mine, held in zip(_held(self), _held(prompts), strict=True):
            length = held.shape[2]
            mine[:, :, :length] = held[rows]
            # A column that is not read counts 0 times its value, which must be no NaN of an earlier batch.
            mine[:, :, length:].zero_()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.place, key_states)
        self.values.index_copy_(2, self.place, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> Any:
        """() as a tensor, which transformers' masks take, too."""
        return self.place[0]


def _held(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.keys, layer.values


def _check_layers(model: Any, prompts: DynamicCache) -> None:
    for number, layer in enumerate(prompts.layers):
        if not keeps_all(layer):
            kind = type(layer).__name__
            raise not_for(model, f"its layer {number} does not keep every token's key and value ({kind})")


def not_for(model: Any, why: str) -> UsageError:
    return UsageError(
        f"decoding in steps of fixed shapes is not for {type(model).__name__}: {why}; give --decoding eager"
    )


def check_device(decoding: str, device: torch.device) -> None:
    """Raise UsageError where ``decoding`` is not for the device."""
    if decoding == "graph" and device.type != "cuda":
        raise UsageError(
            f"decoding = graph records CUDA graphs, which a {device.type} does not have; give --decoding"
            " static, the same steps without graphs, or --decoding eager"
        )


def cuda_graph(step: Step, device: torch.device) -> Step:
    """The step as a CUDA graph: called, it runs the kernels recorded here, and returns the same tensor.

    The step runs ``WARM_UPS`` times before, on whatever its tensors hold.
    """
    check_device("graph", device)
    main = torch.cuda.current_stream(device)
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(main)
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            step()
    main.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # thread_local: a reward of another thread may use the GPU meanwhile. Around it the stream of now, which a
    # recording that fails does not go back to.
    with torch.cuda.stream(main), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        logits = step()

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay
