"""The loss from hidden states: last linear layer and `quark_loss` in one, logits of many rows never whole.

The rows are cut into chunks. Each chunk's logits of policy and reference are made, turned into the
gradient of the logits where they lie, and multiplied back into the gradients of hidden states and
weight before the next chunk takes their place. So all gradients exist when the forward ends, and the
backward only scales them (as Liger Kernel's fused cross entropy does, arXiv 2410.10989).

Columns whose gradient is small everywhere in a chunk are not skipped, as cut cross-entropy does (arXiv
2411.09009). On English text (SmolLM2-135M, 160 rows, one thread, bfloat16) skipping below 2^-12 takes a
quarter of the time of the two backward products, but moves the gradient of the hidden states by 4.2%,
nineteen times what bfloat16 rounds; below 2^-16 still by 0.6%, with a sixth of the time saved. And it is a
bias: the small gradients of the NLL all have one sign.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from quark_fast.ops import eager
from quark_fast.ops import loss as ops
from quark_fast.ops.contrast import Contrast, ContrastWeights, compare
from quark_fast.ops.eager import Kl
from quark_fast.ops.loss import Implementation, QuarkLoss
from quark_fast.runtime.transfer import to_device

# Rows of a chunk below which the matrix products lose time: measured on one and two CPU threads
# (benchmarks/bench_linear.py); elsewhere from bytes, so that adding up the weight's gradient, which is read
# and written once a chunk, stays below the product itself.
LEAST_ROWS_A_THREAD, LEAST_ROWS_CPU = 160, 640
LEAST_ROWS_ELSEWHERE = 2048
MOST_CHUNKS = 8
# Elements of the weight's gradient that are made in half precision at a time, to be added in float32: on a
# CPU while they are still in the cache; elsewhere in few large products.
BLOCK_CPU, BLOCK_ELSEWHERE = 2**21, 2**26


def linear_quark_loss(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    kl_coef: float = 0.05,
    entropy_coef: float = 0.06,
    kl: Kl = "policy_ref",
    impl: Implementation = "auto",
    normalizer: float | None = None,
    vocab_size: int | None = None,
    lengths: Sequence[int] | None = None,
    chunk: int | None = None,
) -> QuarkLoss:
    """`quark_loss` by chunks of rows: of many rows no logits are whole, neither policy's nor reference's.

        logits = hidden @ weight.T + bias,   ref_logits = ref_hidden @ ref_weight.T + ref_bias

    and then the equation of `quark_loss`, to the same accuracy. Extra memory is the logits of one chunk,
    twice, and the weight's gradient; `quark_loss` needs both logits and a gradient of their size.

    It is right only where the model's logits are just that product. Soft-capped or scaled logits
    (Gemma 2, Granite, Cohere) need `quark_loss`.

    Rows of mask 0 are dropped before any product: they cost nothing, and a NaN there does not matter.
    On a GPU, finding the rest waits for the device, unless ``lengths`` says which they are; rows of mask 0
    within the lengths are then computed as rows of zeros.

    Args:
        hidden: (..., D) last hidden states of the policy, as its head takes them; float32, bfloat16,
            float16, or float64 (in "eager").
        weight: (>= V, D) of the policy's head, in the dtype of hidden; tied or not. Under torch.autocast
            both may differ and the products run in autocast's dtype, as torch.nn.Linear's do.
        ref_hidden, ref_weight: (..., D_ref) and (>= V, D_ref), likewise, of the frozen reference; None and
            None for no KL, with kl_coef=0 and vocab_size.
        labels, mask: (...) as for `quark_loss`.
        bias, ref_bias: (>= V,) of the heads that have one.
        kl_coef, entropy_coef, kl, impl, normalizer: as for `quark_loss`.
        vocab_size: V; by default the rows of ref_weight.
        lengths: where labels are (N, T), how many tokens at the start of each row count, if the mask is 0
            after them; it saves a GPU the wait.
        chunk: rows at a time; by default an eighth of the rows, which is a twelfth of the memory for whole
            logits, but at least 160 for each CPU thread up to 640, and 2048 elsewhere: below that, time is
            lost.

    Returns:
        loss (scalar, differentiable in hidden, weight and bias, each where it requires grad), and nll, kl,
        entropy (shaped like labels), all in float32. The weight's gradient is summed over chunks in
        float32 before it is rounded to the weight's dtype. In float16 no gradient underflows for being
        divided by the number of tokens: they are made of size 1 and scaled in float32.

    Raises:
        ValueError: shapes, dtypes, devices, labels or options that do not fit, or a reference that
            requires grad; the message names the value and the fix.
        TypeError: an argument of another type altogether.
        RuntimeError: a second derivative, or one by torch.func or forward-mode AD, is asked for.

    Under torch.compile it is one opaque operator, without a graph break; in "eager" there the logits are
    whole, for the compiler to plan.
    """
    heads = (hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
    options = (vocab_size, kl_coef, entropy_coef, kl)
    problem, chosen = _checked(heads, labels, mask, options, impl, normalizer, chunk)
    _, _, long_labels, weights, *terms = problem
    if chosen == "eager" and torch.compiler.is_compiling():  # autograd inside an operator fails there
        hidden = torch.where((weights != 0).unsqueeze(-1), hidden, 0)
        z = torch.nn.functional.linear(hidden, weight, bias)
        r = None
        if ref_hidden is not None and ref_weight is not None:
            r = torch.nn.functional.linear(ref_hidden, ref_weight, ref_bias)
        loss, *values = eager.quark_loss(z, r, *problem[2:])
        return QuarkLoss(loss, *(value.detach() for value in values))
    rows = labels.numel()
    loss, *values = _linear_loss(
        hidden.reshape(1, rows, 1, hidden.shape[-1]),
        weight,
        bias,
        None if ref_hidden is None else ref_hidden.reshape(rows, 1, ref_hidden.shape[-1]),
        ref_weight,
        ref_bias,
        long_labels.reshape(rows, 1),
        weights.reshape(rows, 1),
        mask is not None,
        _counted(lengths, labels, weights),
        *terms,
        None,
        [],
        chosen,
        *(_product_dtype(t) for t in (hidden, ref_hidden)),
        0 if chunk is None else chunk,
        *_wanted(hidden, weight, bias),
    )[:4]
    return QuarkLoss(loss, *(value.detach().view(labels.shape) for value in values))


def linear_contrast_loss(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    labels: Tensor,
    mask: Tensor,
    better: Tensor | None = None,
    *,
    weights: ContrastWeights,
    samples: float,
    normalizer: float,
    vocab_size: int,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    kl_coef: float = 0.05,
    entropy_coef: float = 0.06,
    kl: Kl = "policy_ref",
    impl: Implementation = "auto",
    lengths: Sequence[int] | None = None,
    chunk: int | None = None,
) -> tuple[QuarkLoss, Contrast, Tensor]:
    """`linear_quark_loss` of the own rows + the contrast, from one pass over both.

    The contrast (see `quark_fast.ops.contrast`) of a sample needs nothing but the sample's own, mirror and
    reference rows, so a chunk is some whole samples: each row goes through the head once, as without it. With
    the comparison with the base model the KL holds the mirror rows, too, with the same weight.

    Args:
        hidden: (2, N, T, D), the own rows first, then the same completions under the mirror token.
        ref_hidden: (N, T, D_ref), or None for neither KL nor comparison with the base model.
        labels, mask: (N, T); the mask is bool.
        better: (N,) as for ``compare``; None without the comparison with the base model.
        weights: of the comparisons, whose sums are divided by ``samples``.
        samples: number of samples in the whole batch, of which N may be a part; or what else to divide by.
        normalizer: number of tokens in the whole batch.
        lengths: as for ``linear_quark_loss``.
        chunk: rows at a time, of both streams together; a sample is never cut.
    Returns:
        (the loss, contrast included, with nll, kl, entropy of the own rows; the comparisons, -log sigma(...)
        of each sample, detached; (N, T) KL of the mirror rows, 0 without the comparison with the base model).
    """
    ops.check_kinds({"hidden": hidden, "mask": mask}, {"better": better})
    if mask.dtype != torch.bool:
        raise ValueError(f"mask is {mask.dtype}; the contrast counts whole tokens, pass bool")
    if hidden.dim() != 4 or len(hidden) != 2:
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}; pass (2, N, T, D), own and mirror rows")
    if weights.base and (better is None or ref_hidden is None):
        raise ValueError(
            f"base = {weights.base} compares with the base model; pass better, ref_hidden and ref_weight"
        )
    heads = (hidden[0], weight, bias, ref_hidden, ref_weight, ref_bias)
    options = (vocab_size, kl_coef, entropy_coef, kl)
    problem, chosen = _checked(heads, labels, mask, options, impl, normalizer, chunk)
    _, _, labels, token_weights, *terms = problem
    labels, token_weights = labels.contiguous(), token_weights.contiguous()  # the operator flattens them
    loss, *values, contrast, mirror_kl = _linear_loss(
        hidden,
        *heads[1:],
        labels,
        token_weights,
        True,
        _counted(lengths, labels, token_weights),
        *terms,
        better if weights.base else None,
        [float(weights.mirror) / samples, float(weights.base) / samples, weights.margin],
        chosen,
        *(_product_dtype(t) for t in (hidden, ref_hidden)),
        0 if chunk is None else chunk,
        *_wanted(hidden, weight, bias),
    )[:6]
    return (
        QuarkLoss(loss, *(value.detach() for value in values)),
        Contrast(*contrast.detach()),
        mirror_kl.detach(),
    )


# --- What can be known before the work ---------------------------------------------------------


def _product_dtype(hidden: Tensor | None) -> torch.dtype:
    """The dtype in which torch.nn.Linear would compute here: autocast's where it is on."""
    if hidden is None:
        return torch.float32
    if _in_autocast(hidden) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(hidden.device.type)
    return hidden.dtype


def _in_autocast(tensor: Tensor) -> bool:
    device = tensor.device.type  # of which some have none, as meta
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _counted(lengths: Sequence[int] | None, labels: Tensor, weights: Tensor) -> Tensor | None:
    """Indices of the tokens within the lengths, on the CPU; None: the weights themselves are to be asked.

    On a CPU they are, which costs no wait and tells more.
    """
    if lengths is None:
        return None
    try:
        lengths = [operator.index(length) for length in lengths]
    except TypeError as error:
        raise TypeError(f"lengths = {lengths!r}; pass a whole number for each row of labels") from error
    if labels.dim() != 2 or len(lengths) != len(labels):
        raise ValueError(f"{len(lengths)} lengths do not fit labels of shape {tuple(labels.shape)}")
    most = labels.shape[1]
    for sample, length in enumerate(lengths):
        if not 0 <= length <= most:
            raise ValueError(
                f"lengths[{sample}] = {length} does not fit labels of shape {tuple(labels.shape)}; give 0 to"
                f" {most} tokens"
            )
    each = torch.tensor(lengths, dtype=torch.long, device="cpu")
    if weights.device.type == "cpu":
        if not torch.compiler.is_compiling():  # which cannot branch on what tensors hold
            after = torch.arange(most, device="cpu") >= each.view(-1, 1)
            if bool((weights[after] != 0).any()):
                raise ValueError(
                    "the mask is not 0 after the lengths; leave out lengths, or give the mask's own"
                )
        return None
    # Of the total that Python knows: how many a nonzero() finds, torch.compile does not.
    firsts = torch.arange(len(lengths), device="cpu") * most - (each.cumsum(0) - each)
    total = sum(lengths)
    return torch.arange(total, device="cpu") + firsts.repeat_interleave(each, output_size=total)


# hidden, weight and bias of the policy's head, then of the reference's
Heads = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _checked(
    heads: Heads,
    labels: Tensor,
    mask: Tensor | None,
    options: ops.Options,
    impl: str,
    normalizer: float | None,
    chunk: int | None,
) -> tuple[ops.Problem, ops.Chosen]:
    """The problem that `quark_loss` would solve for these heads, and its implementation, after all checks.

    Its logits are stand-ins of no size.
    """
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias = heads
    ops.check_kinds(
        {"hidden": hidden, "weight": weight, "labels": labels},
        {
            "bias": bias,
            "ref_hidden": ref_hidden,
            "ref_weight": ref_weight,
            "ref_bias": ref_bias,
            "mask": mask,
        },
    )
    _check_heads(heads, labels, chunk)
    logits, ref_logits = _stand_in(hidden, weight), _stand_in(ref_hidden, ref_weight)
    assert logits is not None
    problem, chosen = ops.checked(logits, ref_logits, labels, mask, options, impl, normalizer)
    ops.check_labels(*problem[2:5])
    if not (chosen == "eager" and torch.compiler.is_compiling()):  # where there is no operator
        ops.check_no_transform({"hidden": hidden, "weight": weight, "bias": bias}, "linear_quark_loss")
    return problem, chosen


def _check_heads(heads: Heads, labels: Tensor, chunk: int | None) -> None:
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias = heads
    if (ref_hidden is None) != (ref_weight is None):
        given, other = ("ref_weight", "ref_hidden") if ref_hidden is None else ("ref_hidden", "ref_weight")
        raise ValueError(f"{given} without {other}; pass both, or neither and kl_coef=0")
    if chunk is not None and not isinstance(chunk, int):
        raise TypeError(f"chunk is a {type(chunk).__name__}; pass a whole number of rows, or None")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk = {chunk}; give at least 1 row, or None")
    for name, tensor in (("ref_hidden", ref_hidden), ("ref_weight", ref_weight), ("ref_bias", ref_bias)):
        if tensor is not None:
            ops.check_frozen(name, tensor)
    _check_head("", hidden, weight, bias, labels)
    if ref_hidden is not None and ref_weight is not None:
        _check_head("ref_", ref_hidden, ref_weight, ref_bias, labels)


def _check_head(side: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> None:
    if not hidden.is_floating_point() or hidden.dim() == 0 or hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"{side}hidden is {hidden.dtype} of shape {tuple(hidden.shape)}; for labels of shape"
            f" {tuple(labels.shape)} pass floating-point hidden states of the same shape and one more"
            " dimension"
        )
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{side}weight of shape {tuple(weight.shape)} does not fit {side}hidden of width"
            f" {hidden.shape[-1]}; pass the (vocabulary, width) weight of the head"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{side}bias of shape {tuple(bias.shape)} does not fit {side}weight of shape"
            f" {tuple(weight.shape)}"
        )
    autocast = _in_autocast(hidden)
    for name, tensor in ((f"{side}weight", weight), (f"{side}bias", bias)):
        if tensor is None:
            continue
        if tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, {side}hidden on {hidden.device}; move one")
        if tensor.dtype != hidden.dtype and not (autocast and tensor.is_floating_point()):
            raise ValueError(
                f"{name} is {tensor.dtype}, {side}hidden {hidden.dtype}; convert one, or use torch.autocast"
            )


def _stand_in(hidden: Tensor | None, weight: Tensor | None) -> Tensor | None:
    """Something with the shape, dtype and device of the logits, in the memory of one number."""
    if hidden is None or weight is None:
        return None
    one = hidden.detach().new_empty((), dtype=_product_dtype(hidden))
    return one.expand(*hidden.shape[:-1], weight.shape[0])


def _wanted(*tensors: Tensor | None) -> list[bool]:
    """Whether each gradient is wanted."""
    return [torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors]


# --- The operator ------------------------------------------------------------------------------


@torch.library.custom_op("quark_fast::linear_loss", mutates_args=())
def _linear_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    labels: Tensor,
    weights: Tensor,
    masked: bool,
    counted: Tensor | None,
    vocab_size: int,
    kl_coef: float,
    entropy_coef: float,
    kl: str,
    better: Tensor | None,
    contrast: list[float],
    impl: str,
    dtype: torch.dtype,
    ref_dtype: torch.dtype,
    chunk: int,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, nll, KL, H, the comparisons, the mirror rows' KL; and the gradients of loss / unit, with unit.

    Args:
        hidden: (1, N, T, D), or (2, N, T, D) with the mirror rows, which add the contrast.
        ref_hidden: (N, T, D_ref). labels, weights: (N, T). masked: whether a weight may be 0.
        counted: on the CPU, indices of the N T tokens whose weight may not be 0; None: those of weight 0 are
            looked for.
        contrast: ``ContrastWeights``, over the number of samples; empty without mirror rows.
    Returns:
        loss (), nll, KL, H (N, T), comparisons (2, N), KL of the mirror rows (N, T), or (2, 0) and (0, T),
        unit (), and the gradients of hidden in `dtype`, of weight and bias in float32 (float64 for float64);
        (0,) for one that is not wanted.
    """
    streams, samples, length, width = hidden.shape
    exact = weights.dtype
    want_any = want_hidden or want_weight or want_bias
    unit = _unit(weights, dtype, max(contrast[:2], default=0))
    options: tuple[Any, ...] = (vocab_size, kl_coef, entropy_coef, kl)

    # Autocast would act on the products below, too; their dtype is already decided.
    with torch.autocast(hidden.device.type, enabled=False):
        head = _Head(weight, bias, dtype)
        ref_head = None if ref_weight is None else _Head(ref_weight, ref_bias, ref_dtype)
        nll, divergence, entropy = (weights.new_zeros(samples * length) for _ in range(3))
        comparisons = weights.new_zeros(2, samples if streams == 2 else 0)
        mirror_kl = weights.new_zeros(comparisons.shape[1] * length)
        loss = weights.new_zeros(())
        grad_hidden = weights.new_zeros(hidden.shape if want_hidden else 0, dtype=dtype)
        grad_weight = weights.new_empty(weight.shape if want_weight else 0)
        grad_bias = weights.new_zeros(bias.shape if bias is not None and want_bias else 0)
        first = True
        all_hidden, all_grad = hidden.reshape(-1, width), grad_hidden.view(-1, width)
        for part, rows in _plan(weights, masked, counted, streams, chunk):
            both = torch.cat([rows + stream * samples * length for stream in range(streams)])
            # Of the indices some may be of weight 0, where there may be anything: 0 times NaN is NaN.
            dead = None if counted is None else weights.view(-1)[rows] == 0
            dead_of_both = None if dead is None else dead.repeat(streams)
            h = _rows(all_hidden, both, dead_of_both).to(dtype)
            z = head.logits(h)
            r = None
            if ref_head is not None and ref_hidden is not None:
                r = ref_hidden.reshape(-1, ref_hidden.shape[-1])
                r = ref_head.logits(_rows(r, rows, dead).to(ref_dtype))
            problem = (z, r, labels.view(-1)[rows], weights.view(-1)[rows] / unit, *options)
            if streams == 2:
                share, *terms, mirror_kl[rows], comparisons[:, part], grad = _contrast(
                    problem,
                    impl,
                    rows - part.start * length,
                    (part.stop - part.start, length),
                    None if better is None else better[part],
                    ContrastWeights(contrast[0] / unit, contrast[1] / unit, contrast[2]),
                    want_any,
                )
            else:
                share, *terms, grad = ops.terms_and_gradient(problem, impl, want_grad=want_any)
            loss += share
            for whole, term in zip((nll, divergence, entropy), terms, strict=True):
                whole[rows] = term
            if want_hidden:
                all_grad[both] = grad @ head.weight
            if want_weight:
                _add_product(grad_weight, grad, h, first)
            if want_bias:
                grad_bias += grad.sum(0, dtype=exact)
            first = False
        if first:
            grad_weight.zero_()
    nll, divergence, entropy = (term.view(samples, length) for term in (nll, divergence, entropy))
    mirror_kl = mirror_kl.view(comparisons.shape[1], length)
    values = (loss * unit, nll, divergence, entropy, comparisons, mirror_kl, unit)
    return *values, grad_hidden, grad_weight, grad_bias


def _unit(weights: Tensor, dtype: torch.dtype, least: float) -> Tensor:
    """What the weights are divided by while gradients are computed, which are multiplied by it at the end.

    A float16 gradient divided by the number of tokens would underflow, so it is computed of size 1. The unit
    is a power of two, so that multiplying by it rounds nothing.
    """
    unit = weights.new_ones(())
    if dtype == torch.float16 and weights.numel():
        unit = torch.ldexp(unit, weights.abs().max().clamp(min=least).frexp().exponent)
    return unit


def _rows(hidden: Tensor, rows: Tensor, dead: Tensor | None) -> Tensor:
    """A copy of these rows, 0 where they are dead."""
    chosen = hidden[rows]
    return chosen if dead is None else chosen.masked_fill_(dead.unsqueeze(1), 0)


class _Head:
    """A linear layer that writes the logits of every chunk to the same memory.

    A GPU is slow at products of rows that do not start at multiples of 16 bytes, so there each has room for a
    multiple of 8 columns; on a CPU such products would go through a copy.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.weight = weight.detach().to(dtype)
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.columns = _columns(len(self.weight), self.weight.device)
        self.room = self.weight.new_empty(0, self.columns)

    def logits(self, hidden: Tensor) -> Tensor:
        if len(self.room) < len(hidden):
            self.room = self.weight.new_empty(0)  # or else old and new would be there at once
            self.room = self.weight.new_empty(len(hidden), self.columns)
            # Some products read on (oneDNN's for AMX), and 0 times what lay there may be NaN.
            self.room[:, len(self.weight) :] = 0
        out = self.room[: len(hidden), : len(self.weight)]
        if self.bias is None:
            return torch.mm(hidden, self.weight.t(), out=out)
        return torch.addmm(self.bias, hidden, self.weight.t(), out=out)


def _columns(vocabulary: int, device: torch.device) -> int:
    return vocabulary if device.type == "cpu" else -(-vocabulary // 8) * 8


def chunk_rows(rows: int, least: int) -> int:
    """Rows whose logits are made at a time, of so many: at most 8 chunks of at least ``least`` rows.

    They are even, since a small last chunk would be a slow one; so fewer than 2 x ``least`` rows are one.
    """
    return -(-rows // min(MOST_CHUNKS, max(1, rows // least)))


def _plan(
    weights: Tensor, masked: bool, counted: Tensor | None, streams: int, chunk: int
) -> Iterator[tuple[slice, Tensor]]:
    """Chunks as (the samples it holds, its rows as indices into the N T tokens): those that are counted, or
    all but those of weight 0."""
    samples = len(weights)
    if weights.device.type == "cpu":
        least = min(LEAST_ROWS_A_THREAD * torch.get_num_threads(), LEAST_ROWS_CPU)
    else:
        least = LEAST_ROWS_ELSEWHERE
    rows = torch.arange(weights.numel(), device=weights.device)
    if counted is not None:
        rows = to_device(counted, weights.device)
    elif masked:
        rows = rows[(weights != 0).view(-1)]
    at_once = chunk // streams if chunk else -(-chunk_rows(streams * len(rows), least) // streams)
    if streams == 1:
        yield from ((slice(0, 0), some) for some in torch.split(rows, max(1, at_once)) if len(some))
        return
    if counted is None:
        counts = (weights != 0).sum(1).tolist()
    else:
        counts = (counted // weights.shape[1]).bincount(minlength=samples).tolist()
    first, begin, end = 0, 0, 0
    for sample, count in enumerate(counts):
        if end + count - begin > at_once and end > begin:
            yield slice(first, sample), rows[begin:end]
            first, begin = sample, end
        end += count
    if samples:
        yield slice(first, samples), rows[begin:end]


def _contrast(
    problem: ops.Problem,
    impl: str,
    position: Tensor,
    shape: tuple[int, int],
    better: Tensor | None,
    contrast: ContrastWeights,
    want_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, nll, KL, H, the mirror rows' KL, comparisons (2, samples), gradient, of some whole samples.

    Args:
        problem: its logits are (2 n, >= V), the own rows, then the mirror rows; its other tensors (n, ...).
        position: (n,) of each row among the tokens of these samples, which are of `shape` (samples, length).
    """
    z, r, labels, weights, vocab_size, kl_coef, _, kl = problem
    count, nll_alone = len(labels), (vocab_size, 0.0, 0.0, kl)
    held = better is not None and r is not None  # by the KL: the mirror rows
    loss, nll, divergence, entropy, grad_own = ops.terms_and_gradient(
        (z[:count], *problem[1:]), impl, want_grad=want_grad, inplace=False
    )
    mirrored = (
        z[count:],
        r if held else None,
        labels,
        weights,
        vocab_size,
        kl_coef if held else 0.0,
        0.0,
        kl,
    )
    _, mirror, mirror_kl, _, grad_mirror = ops.terms_and_gradient(
        mirrored, impl, want_grad=want_grad and held, inplace=False
    )

    def of_samples(rows: Tensor) -> Tensor:
        sums = weights.new_zeros(shape)
        sums.view(-1)[position] = rows
        return sums.sum(-1)

    reference = None
    if r is not None and held:
        reference = of_samples(
            ops.terms_and_gradient((r, None, labels, weights, *nll_alone), impl, want_grad=False)[1]
        )
        if kl_coef:  # 0 times an infinite KL would be NaN
            loss = loss + kl_coef * (weights * mirror_kl).sum()
    values, *on = compare(of_samples(nll), of_samples(mirror), reference, better, contrast)
    loss = loss + contrast.total(values)
    both_values = torch.stack(values)
    if not want_grad:
        return loss, nll, divergence, entropy, mirror_kl, both_values, grad_own
    sample = position // shape[1]
    on_own, on_mirror = (weight[sample] * (weights != 0) for weight in on)
    if held:
        on_mirror = on_mirror - weights  # the NLL came with the KL
    both = (z, None, labels.repeat(2), torch.cat([on_own, on_mirror]), *nll_alone)
    *_, grad = ops.terms_and_gradient(both, impl, want_grad=True)
    grad[:count] += grad_own
    if held:
        grad[count:] += grad_mirror
    return loss, nll, divergence, entropy, mirror_kl, both_values, grad


def _add_product(total: Tensor, grad: Tensor, hidden: Tensor, first: bool) -> None:
    """total += grad.T @ hidden, or = for the first; the sum over chunks stays in the precision of total."""
    if total.dtype == grad.dtype:
        torch.addmm(total, grad.t(), hidden, beta=0 if first else 1, out=total)
        return
    unit = None
    if grad.dtype == torch.float16 and len(hidden):
        # A product is rounded to float16 before it is added, and no loss scale, which comes later, keeps that
        # from overflowing. So no sum over the rows may exceed 2^15; a power of two rounds nothing.
        most = grad.abs().amax().to(total.dtype) * hidden.abs().amax() * (len(hidden) / 2**15)
        unit = torch.ldexp(torch.ones_like(most), most.frexp().exponent.clamp(min=0))
        hidden = hidden / unit.to(hidden.dtype)
    block = max(1, (BLOCK_CPU if total.device.type == "cpu" else BLOCK_ELSEWHERE) // total.shape[1])
    for some, columns in zip(torch.split(total, block), torch.split(grad, block, 1), strict=True):
        product = columns.t() @ hidden
        if unit is not None:
            product = product * unit  # in float32
        some.copy_(product) if first else some.add_(product)


@_linear_loss.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    labels: Tensor,
    weights: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    dtype, (want_hidden, want_weight, want_bias) = rest[-6], rest[-3:]
    nll, divergence, entropy = (torch.empty_like(weights) for _ in range(3))
    samples = len(labels) if len(hidden) == 2 else 0
    return (
        weights.new_empty(()),
        nll,
        divergence,
        entropy,
        weights.new_empty(2, samples),
        weights.new_empty(samples, labels.shape[1]),
        weights.new_empty(()),
        weights.new_empty(hidden.shape if want_hidden else 0, dtype=dtype),
        weights.new_empty(weight.shape if want_weight else 0),
        weights.new_empty(bias.shape if bias is not None and want_bias else 0),
    )


# --- Gradients ---------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[-4:])
    ctx.dtypes = [None if t is None else t.dtype for t in inputs[:3]]
    ctx.inputs, ctx.impl = len(inputs), inputs[-7]
    ops._only_the_loss_is_differentiable(ctx, output)


def _gradient(ctx: Any, grad_loss: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
    if grad_loss is None:  # the loss takes no part in what is differentiated
        return tuple([None] * ctx.inputs)
    unit, *grads = ctx.saved_tensors
    traced = type(unit) is not Tensor
    if torch.is_grad_enabled() and not traced:
        raise RuntimeError(
            "create_graph=True asks for a second derivative, which linear_quark_loss does not have; use"
            " quark_loss(..., impl='eager') of whole logits"
        )
    scale = grad_loss.to(unit.dtype) * unit
    keep = traced or ops._graph_is_kept()
    scaled = [
        _scaled(grad, scale, dtype, keep, ctx.impl) if wanted else None
        for grad, dtype, wanted in zip(grads, ctx.dtypes, ctx.needs_input_grad, strict=False)
    ]
    return *scaled, *[None] * (ctx.inputs - len(scaled))


def _scaled(grad: Tensor, scale: Tensor, dtype: torch.dtype, keep: bool, impl: str) -> Tensor:
    """(scale * grad) in dtype, rounded once; in grad's own memory unless that must be kept."""
    if impl == "triton" and not keep:
        # A scale of 1 is the usual one. The kernel leaves such a gradient alone, and rounds any other once.
        scaled = grad if grad.dtype == dtype else grad.to(scale.dtype)
        ops.rescale(scaled, scale, impl)
        return scaled.to(dtype)
    wide = grad.to(scale.dtype)
    if keep and wide is grad:
        return (wide * scale).to(dtype)
    if keep or scale.device.type != "cpu" or scale.item() != 1:  # on a GPU, asking would wait for it
        wide.mul_(scale)
    return wide.to(dtype)


_linear_loss.register_autograd(_gradient, setup_context=_save)
