"""The fused loss on a GPU, in Triton: `forward` and `backward`, as in `cpp`.

The loss is bound by memory, so the blocking is about bytes. With z the policy's logits and r the
reference's, a row needs its sums before its gradient: two loops over it.

- One wide program a row, and only one on a multiprocessor at a time. 132 pairs of bfloat16 rows of 50k
  columns are 26 MB, which stay in the 50 MB L2 of an H100, so that the second loop, which walks backwards
  from what was read last, finds them there: 2 reads and 1 write of HBM an element, not 4 and 1.
- With fewer rows than twice the multiprocessors, several programs share a row: each sums its part
  (`_partial_kernel`), the parts are merged (`_merge_kernel`), and the gradient is written part by part.
- A tile is (U, T, E): E neighbouring columns fill one 16-byte load, T is the number of threads, and each
  thread takes U loads before it raises its maxima. Every thread keeps moments of its own, so that the loop
  adds nothing up across threads; they meet once, at the end of the row.
- A row that starts between two 16-byte boundaries (an odd vocabulary) gets a short head, one column a
  thread, after which its tiles are aligned, provided policy, reference and gradient are equally far off.
  Else E is 1. Head and tail are masked; the loop over whole tiles is not, or it would lose its wide loads.

Moments of a row are in bits, relative to the maxima m = max z / ln 2 and u = max r / ln 2: y = z / ln 2 - m
and q = r / ln 2 - u are one operation each, and so are their powers of 2.

    s = sum 2^y    a = sum 2^y y    t = sum 2^q    b = sum 2^y (y - q)  policy_ref
                                                     = sum 2^q (q - y)  ref_policy

Rescaled to new maxima, with d = m - m' and k = u - u' (two parts of a row merge by the same rule):

    a = 2^d (a + d s)    b = 2^d (b + (d - k) s)  or  2^k (b + (k - d) t)    s = 2^d s    t = 2^k t

A padded lane holds -inf, a token of probability 0, which every sum has to survive anyway.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from quark_fast.errors import UsageError
from quark_fast.ops.rows import Rows, rows_of, with_rows

STATS_PER_ROW = 6  # m, s, u, t; KL, or log p[label] - log p_ref[label] if it is sampled; H

# Below every logit, but finite: the maximum of a thread that has met only -inf, or nothing.
LOWEST = tl.constexpr(-1e30)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _bits(x, top):
    """x / ln 2 - top. Fused by name: a product of its own would be rounded, a large one by much."""
    return tl.fma(x, LOG2_E, -top)


# --- Tiles -------------------------------------------------------------------------------------


@triton.jit
def _row_start(row, first, inner, outer_stride, inner_stride, UNIT: tl.constexpr):
    """First element of a row, in int64: rows times columns pass 2^31. Strides come in UNITs.

    `first` is that of row 0, where UNIT is 1.
    """
    start = (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride
    if UNIT == 1:
        return start + first
    return start * UNIT


@triton.jit
def _aligned(start, UNIT: tl.constexpr, E: tl.constexpr):
    """start, or the next multiple of E, written so that the compiler knows it for one."""
    if UNIT == E:
        return start
    return (start + (E - 1)) // E * E


@triton.jit
def _lanes(U: tl.constexpr, T: tl.constexpr, E: tl.constexpr):
    """(U, T, E) offsets 0 ... UTE - 1 in the order of memory."""
    loads = tl.arange(0, U)[:, None, None] * T + tl.arange(0, T)[None, :, None]
    return loads * E + tl.arange(0, E)[None, None, :]


@triton.jit
def _edge(head, body, end, T: tl.constexpr):
    """(1, T, 1) columns before the first and after the last whole group of E, and which of them exist."""
    lane = _lanes(1, T, 1)
    column = tl.where(lane < 16, lane, head + body + lane - 16)
    return column, column < tl.where(lane < 16, head, end)


@triton.jit
def _load(ptr, column, mask, MASKED: tl.constexpr, KEEP: tl.constexpr):
    """Logits at columns, in float32; if MASKED, -inf where the mask is not set.

    Unless it is to KEEP them, the cache may give up their place before that of others.
    """
    kept: tl.constexpr = "" if KEEP else "evict_first"
    if MASKED:
        x = tl.load(ptr + column, mask=mask, other=float("-inf"), eviction_policy=kept)
    else:
        x = tl.load(ptr + column, eviction_policy=kept)
    return x.to(tl.float32)


@triton.jit
def _load_both(
    z_ptr,
    r_ptr,
    column,
    mask,
    WITH_REF: tl.constexpr,
    MASKED: tl.constexpr,
    KEEP: tl.constexpr,
):
    """z and r at columns; z twice without a reference."""
    z = _load(z_ptr, column, mask, MASKED, KEEP)
    r = z
    if WITH_REF:
        r = _load(r_ptr, column, mask, MASKED, KEEP)
    return z, r


@triton.jit
def _part(split, splits, tiles):
    """The tiles [begin, end) of one of `splits` parts."""
    each = tl.cdiv(tiles, splits)
    begin = tl.minimum(split * each, tiles)
    return begin, tl.minimum(begin + each, tiles)


# --- Moments -----------------------------------------------------------------------------------


@triton.jit
def _accumulate(m, u, s, t, a, b, z, r, KL: tl.constexpr):
    """Every thread's moments (T,) with its columns (U, T, E) of z and r added."""
    new_m = tl.maximum(m, tl.max(tl.max(z, 2), 0) * LOG2_E)
    d = m - new_m
    c = tl.exp2(d)
    y = _bits(z, new_m[None, :, None])
    p = tl.exp2(y)
    a = c * (a + d * s) + tl.sum(tl.sum(p * tl.where(p > 0, y, 0.0), 2), 0)
    if KL != "none":
        new_u = tl.maximum(u, tl.max(tl.max(r, 2), 0) * LOG2_E)
        k = u - new_u
        ck = tl.exp2(k)
        q = _bits(r, new_u[None, :, None])
        p_ref = tl.exp2(q)
        # One product of (y - q): separate sums would lose 2 to 3 times the accuracy of the KL. A sum that is
        # infinite, or the rescaling factor 0, must not become NaN.
        if KL == "policy_ref":
            b = tl.where(c > 0, c * (b + (d - k) * s), 0.0)
            b += tl.sum(tl.sum(p * tl.where(p > 0, y - q, 0.0), 2), 0)
        if KL == "ref_policy":
            b = tl.where(ck > 0, ck * (b + (k - d) * t), 0.0)
            b += tl.sum(tl.sum(p_ref * tl.where(p_ref > 0, q - y, 0.0), 2), 0)
        t = ck * t + tl.sum(tl.sum(p_ref, 2), 0)
        u = new_u
    s = c * s + tl.sum(tl.sum(p, 2), 0)
    return new_m, u, s, t, a, b


@triton.jit
def _larger(m, u, other_m, other_u):
    return tl.maximum(m, other_m), tl.maximum(u, other_u)


@triton.jit
def _added(s, t, a, b, other_s, other_t, other_a, other_b):
    return s + other_s, t + other_t, a + other_a, b + other_b


@triton.jit
def _merged(m, u, s, t, a, b, KL: tl.constexpr):
    """The moments of a row from those (T,) of its parts."""
    top_m, top_u = tl.reduce((m, u), 0, _larger)
    d = m - top_m
    k = u - top_u
    c = tl.exp2(d)
    ck = tl.exp2(k)
    a = c * (a + d * s)
    if KL == "ref_policy":
        b = tl.where(ck > 0, ck * (b + (k - d) * t), 0.0)
    else:
        b = tl.where(c > 0, c * (b + (d - k) * s), 0.0)
    s, t, a, b = tl.reduce((c * s, ck * t, a, b), 0, _added)
    return top_m, top_u, s, t, a, b


@triton.jit
def _moments(
    z_ptr,
    z_start,
    r_ptr,
    r_start,
    split,
    splits,
    V: tl.constexpr,
    KL: tl.constexpr,
    UNIT: tl.constexpr,
    U: tl.constexpr,
    T: tl.constexpr,
    E: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The moments of one of `splits` parts of a row."""
    m = tl.full((T,), LOWEST, tl.float32)
    u = tl.full((T,), LOWEST, tl.float32)
    s = tl.zeros((T,), tl.float32)
    t = tl.zeros((T,), tl.float32)
    a = tl.zeros((T,), tl.float32)
    b = tl.zeros((T,), tl.float32)

    z_body = _aligned(z_start, UNIT, E)
    r_body = _aligned(r_start, UNIT, E)
    head = tl.minimum(z_body - z_start, V).to(tl.int32)
    body = (V - head) // E * E
    tiles = body // (U * T * E)
    begin, end = _part(split, splits, tiles)

    if UNIT != E or V % E != 0:
        # On their way while the tiles are summed.
        edge, exists = _edge(head, body, V, T)
        exists &= split == splits - 1
        z_edge, r_edge = _load_both(z_ptr + z_start, r_ptr + r_start, edge, exists, KL != "none", True, True)
    column = _lanes(U, T, E)
    for tile in tl.range(begin, end, num_stages=STAGES):
        tile_column = tile * (U * T * E) + column
        z, r = _load_both(z_ptr + z_body, r_ptr + r_body, tile_column, None, KL != "none", False, True)
        m, u, s, t, a, b = _accumulate(m, u, s, t, a, b, z, r, KL)
    if split == splits - 1:
        if tiles * (U * T * E) < body:
            last = tiles * (U * T * E) + column
            z, r = _load_both(z_ptr + z_body, r_ptr + r_body, last, last < body, KL != "none", True, True)
            m, u, s, t, a, b = _accumulate(m, u, s, t, a, b, z, r, KL)
        if UNIT != E or V % E != 0:
            m, u, s, t, a, b = _accumulate(m, u, s, t, a, b, z_edge, r_edge, KL)
    return _merged(m, u, s, t, a, b, KL)


@triton.jit(noinline=True)
def _finite_sum(z_ptr, r_ptr, m, u, V: tl.constexpr, KL: tl.constexpr, T: tl.constexpr):
    """b anew by the final maxima, for a row whose b is infinite.

    A term may have become infinite beside the maxima so far, by a token whose probability is 0 beside the
    final ones. Without a second look the order of the columns would decide. It is a function of its own, and
    reads single columns, so that it takes no registers from the loops over every row.
    """
    sums = tl.zeros((T,), tl.float32)
    for start in tl.range(0, V, T, num_stages=1):
        column = start + tl.arange(0, T)
        z, r = _load_both(z_ptr, r_ptr, column, column < V, True, True, True)
        y, q = _bits(z, m), _bits(r, u)
        if KL == "ref_policy":
            y, q = q, y
        p = tl.exp2(y)
        sums += p * tl.where(p > 0, y - q, 0.0)
    return tl.sum(sums, 0)


@triton.jit
def _looked_at_again(z_ptr, r_ptr, m, u, b, V: tl.constexpr, KL: tl.constexpr, T: tl.constexpr):
    if b == float("inf"):
        b = _finite_sum(z_ptr, r_ptr, m, u, V, KL, T)
    return b


# --- What a row is worth -----------------------------------------------------------------------


@triton.jit
def _label_logits(z_ptr, z_start, r_ptr, r_start, label, V: tl.constexpr, KL: tl.constexpr):
    """z and r of the label; NaN for a label outside the vocabulary, which is not read."""
    inside = (label >= 0) & (label < V)
    z = tl.load(z_ptr + z_start + label, mask=inside, other=float("nan")).to(tl.float32)
    r = z
    if KL != "none":
        r = tl.load(r_ptr + r_start + label, mask=inside, other=float("nan")).to(tl.float32)
    return z, r


@triton.jit
def _store_row(
    row,
    weight,
    m,
    u,
    s,
    t,
    a,
    b,
    z_label,
    r_label,
    kl_coef,
    entropy_coef,
    loss_ptr,
    nll_ptr,
    kl_ptr,
    entropy_ptr,
    stats_ptr,
    KL: tl.constexpr,
):
    """Store weight_n times the loss of the row, nll, KL, H and statistics; return the last two of those."""
    log_s = tl.log(s)
    nll = log_s - LN_2 * _bits(z_label, m)
    entropy = log_s - LN_2 * (a / s)
    kl = tl.zeros_like(nll)
    kept = kl
    if KL == "policy_ref":
        kl = LN_2 * (b / s) - log_s + tl.log(t)
        kept = kl
    if KL == "ref_policy":
        kl = LN_2 * (b / t) - tl.log(t) + log_s
        kept = kl
    if KL == "sampled":
        kept = (tl.log(t) - LN_2 * _bits(r_label, u)) - nll
        kl = kept * kept / 2
    loss = nll - entropy_coef * entropy
    loss = tl.where(kl_coef == 0, loss, loss + kl_coef * kl)  # 0 times an infinite KL would be NaN
    tl.store(loss_ptr + row, weight * loss)
    tl.store(nll_ptr + row, nll)
    tl.store(kl_ptr + row, kl)
    tl.store(entropy_ptr + row, entropy)
    tl.store(stats_ptr + row * 6 + 0, m)
    tl.store(stats_ptr + row * 6 + 1, s)
    tl.store(stats_ptr + row * 6 + 2, u)
    tl.store(stats_ptr + row * 6 + 3, t)
    tl.store(stats_ptr + row * 6 + 4, kept)
    tl.store(stats_ptr + row * 6 + 5, entropy)
    return kept, entropy


@triton.jit
def _store_masked_row(row, loss_ptr, nll_ptr, kl_ptr, entropy_ptr, stats_ptr):
    tl.store(loss_ptr + row, 0.0)
    tl.store(nll_ptr + row, 0.0)
    tl.store(kl_ptr + row, 0.0)
    tl.store(entropy_ptr + row, 0.0)
    for i in tl.static_range(6):
        tl.store(stats_ptr + row * 6 + i, 0.0)


# --- Gradient ----------------------------------------------------------------------------------


@triton.jit
def _gradient_at(z, r, m, u, c0, c1, c2, zero, KL: tl.constexpr):
    """d loss / d z, but for the label's own term."""
    y = _bits(z, m)
    p = tl.exp2(y)
    factor = c0 + c1 * y
    if KL == "policy_ref":
        factor += c2 * _bits(r, u)
    grad = tl.where(p > 0, p * factor, zero)
    if KL == "ref_policy":
        grad += c2 * tl.exp2(_bits(r, u))
    return grad


@triton.jit
def _write_tile(
    grad_ptr,
    z_ptr,
    r_ptr,
    column,
    mask,
    m,
    u,
    c0,
    c1,
    c2,
    zero,
    KL: tl.constexpr,
    MASKED: tl.constexpr,
):
    # For the last time: rows that are still to be read again stay in the cache.
    with_ref: tl.constexpr = KL == "policy_ref" or KL == "ref_policy"
    z, r = _load_both(z_ptr, r_ptr, column, mask, with_ref, MASKED, False)
    grad = _gradient_at(z, r, m, u, c0, c1, c2, zero, KL).to(grad_ptr.dtype.element_ty)
    if MASKED:
        tl.store(grad_ptr + column, grad, mask=mask)
    else:
        tl.store(grad_ptr + column, grad)


@triton.jit
def _zero_columns(ptr, begin, end, T: tl.constexpr):
    for start in tl.range(begin, end, T):
        column = start + tl.arange(0, T)
        tl.store(ptr + column, tl.zeros((T,), ptr.dtype.element_ty), mask=column < end)


@triton.jit
def _zero_row(
    ptr,
    start,
    split,
    splits,
    width,
    UNIT: tl.constexpr,
    U: tl.constexpr,
    T: tl.constexpr,
    E: tl.constexpr,
):
    body_start = _aligned(start, UNIT, E)
    head = tl.minimum(body_start - start, width).to(tl.int32)
    body = (width - head) // E * E
    begin, end = _part(split, splits, tl.cdiv(body, U * T * E))
    for tile in tl.range(begin, end):
        column = tile * (U * T * E) + _lanes(U, T, E)
        tl.store(ptr + body_start + column, tl.zeros((U, T, E), ptr.dtype.element_ty), mask=column < body)
    if split == splits - 1:
        edge, exists = _edge(head, body, width, T)
        tl.store(ptr + start + edge, tl.zeros((1, T, 1), ptr.dtype.element_ty), mask=exists)


@triton.jit
def _store_gradient(
    grad_ptr,
    grad_start,
    z_ptr,
    z_start,
    r_ptr,
    r_start,
    label,
    z_label,
    r_label,
    weight,
    kl_coef,
    entropy_coef,
    m,
    s,
    u,
    t,
    kept,
    entropy,
    split,
    splits,
    width,
    V: tl.constexpr,
    KL: tl.constexpr,
    UNIT: tl.constexpr,
    U: tl.constexpr,
    T: tl.constexpr,
    E: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write weight times the gradient of one of `splits` parts of a row.

    policy_ref: 2^y (c0 + c1 y + c2 q)    ref_policy: 2^y (c0 + c1 y) + c2 2^q    and at the label, less
    weight * nll_coef. The sampled KL changes with log p[label] alone: by d = log p[label] - log p_ref[label]
    times what the nll does, negated.
    """
    inside = (label >= 0) & (label < V)
    weight = tl.where(inside, weight, float("nan"))
    log_s = tl.log(s)
    nll_coef = 1.0
    k0 = 1.0 + entropy_coef * (entropy - log_s)
    k1 = entropy_coef
    c2 = 0.0
    if KL == "policy_ref":
        k0 += kl_coef * (tl.log(t) - log_s - kept)
        k1 += kl_coef
        c2 = -kl_coef * weight / s * LN_2
    if KL == "ref_policy":
        k0 += kl_coef * tl.where(tl.abs(kept) < float("inf"), 1.0, float("nan"))
        c2 = -kl_coef * weight / t
    if KL == "sampled":
        nll_coef -= kl_coef * kept
        k0 -= kl_coef * kept
    c0 = weight / s * k0
    c1 = weight / s * k1 * LN_2
    # A row that is not finite gets NaN in all columns, also where p is 0.
    zero = tl.where(tl.abs(c0) < float("inf"), 0.0, float("nan"))
    c0 += zero
    at_label = _gradient_at(z_label, r_label, m, u, c0, c1, c2, zero, KL) - weight * nll_coef

    z_body = _aligned(z_start, UNIT, E)
    r_body = _aligned(r_start, UNIT, E)
    grad_body = _aligned(grad_start, UNIT, E)
    head = tl.minimum(z_body - z_start, V).to(tl.int32)
    body = (V - head) // E * E
    tiles = body // (U * T * E)
    begin, end = _part(split, splits, tiles)
    # From here the gradient may overwrite z: every thread must have read the label's.
    tl.debug_barrier()

    column = _lanes(U, T, E)
    if split == splits - 1:
        if UNIT != E or V % E != 0:
            edge, exists = _edge(head, body, V, T)
            _write_tile(
                *(grad_ptr + grad_start, z_ptr + z_start, r_ptr + r_start, edge, exists),
                *(m, u, c0, c1, c2, zero, KL, True),
            )
        if tiles * (U * T * E) < body:
            last = tiles * (U * T * E) + column
            _write_tile(
                *(grad_ptr + grad_body, z_ptr + z_body, r_ptr + r_body, last, last < body),
                *(m, u, c0, c1, c2, zero, KL, True),
            )
        _zero_columns(grad_ptr + grad_start, V, width, T)
    for i in tl.range(begin, end, num_stages=STAGES):
        tile = begin + end - 1 - i
        _write_tile(
            *(grad_ptr + grad_body, z_ptr + z_body, r_ptr + r_body, tile * (U * T * E) + column, None),
            *(m, u, c0, c1, c2, zero, KL, False),
        )

    # By the part that wrote the label's column, after all of its threads have.
    tl.debug_barrier()
    label_tile = tl.where(label < head, tiles, (label - head) // (U * T * E))
    mine = (label_tile >= begin) & (label_tile < end) | (label_tile >= tiles) & (split == splits - 1)
    tl.store(grad_ptr + grad_start + label, at_label.to(grad_ptr.dtype.element_ty), mask=inside & mine)


# --- Kernels -----------------------------------------------------------------------------------

# Of no use as compile-time knowledge, and a new value must not compile the kernel again.
_NOT_SPECIALIZED = [
    *("z_inner", "z_outer", "z_step", "r_inner", "r_outer", "r_step"),
    *("grad_inner", "grad_outer", "grad_step", "first", "splits", "rows", "width"),
]


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _row_kernel(
    z_ptr,
    z_inner,
    z_outer,
    z_step,
    r_ptr,
    r_inner,
    r_outer,
    r_step,
    first,
    grad_ptr,
    grad_inner,
    grad_outer,
    grad_step,
    labels_ptr,
    weights_ptr,
    loss_ptr,
    nll_ptr,
    kl_ptr,
    entropy_ptr,
    stats_ptr,
    kl_coef,
    entropy_coef,
    width,
    V: tl.constexpr,
    KL: tl.constexpr,
    GRADIENT: tl.constexpr,
    UNIT: tl.constexpr,
    U: tl.constexpr,
    T: tl.constexpr,
    E: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One row: its terms and statistics, and then, unless GRADIENT is "off", its gradient.

    GRADIENT is the KL that the gradient knows: "none" if its coefficient is 0.
    """
    row = tl.program_id(0)
    weight = tl.load(weights_ptr + row)
    label = tl.load(labels_ptr + row)  # of a masked row it is not followed
    grad_start = _row_start(row, first, grad_inner, grad_outer, grad_step, UNIT)
    if weight != 0:
        z_start = _row_start(row, first, z_inner, z_outer, z_step, UNIT)
        r_start = _row_start(row, first, r_inner, r_outer, r_step, UNIT)
        z_label, r_label = _label_logits(z_ptr, z_start, r_ptr, r_start, label, V, KL)
        m, u, s, t, a, b = _moments(z_ptr, z_start, r_ptr, r_start, 0, 1, V, KL, UNIT, U, T, E, STAGES)
        if KL == "policy_ref" or KL == "ref_policy":
            b = _looked_at_again(z_ptr + z_start, r_ptr + r_start, m, u, b, V, KL, T)
        kept, entropy = _store_row(
            row,
            weight,
            m,
            u,
            s,
            t,
            a,
            b,
            z_label,
            r_label,
            kl_coef,
            entropy_coef,
            loss_ptr,
            nll_ptr,
            kl_ptr,
            entropy_ptr,
            stats_ptr,
            KL,
        )
        if GRADIENT != "off":
            _store_gradient(
                grad_ptr,
                grad_start,
                z_ptr,
                z_start,
                r_ptr,
                r_start,
                label,
                z_label,
                r_label,
                weight,
                kl_coef,
                entropy_coef,
                m,
                s,
                u,
                t,
                kept,
                entropy,
                0,
                1,
                width,
                V,
                GRADIENT,
                UNIT,
                U,
                T,
                E,
                STAGES,
            )
    else:
        _store_masked_row(row, loss_ptr, nll_ptr, kl_ptr, entropy_ptr, stats_ptr)
        if GRADIENT != "off":
            _zero_row(grad_ptr, grad_start, 0, 1, width, UNIT, U, T, E)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _partial_kernel(
    z_ptr,
    z_inner,
    z_outer,
    z_step,
    r_ptr,
    r_inner,
    r_outer,
    r_step,
    first,
    weights_ptr,
    partials_ptr,
    splits,
    V: tl.constexpr,
    KL: tl.constexpr,
    UNIT: tl.constexpr,
    U: tl.constexpr,
    T: tl.constexpr,
    E: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The moments of one part of a row, into partials (rows, splits, 6)."""
    program = tl.program_id(0)
    row = program // splits
    if tl.load(weights_ptr + row) != 0:
        z_start = _row_start(row, first, z_inner, z_outer, z_step, UNIT)
        r_start = _row_start(row, first, r_inner, r_outer, r_step, UNIT)
        m, u, s, t, a, b = _moments(
            z_ptr, z_start, r_ptr, r_start, program % splits, splits, V, KL, UNIT, U, T, E, STAGES
        )
        tl.store(partials_ptr + program * 6 + 0, m)
        tl.store(partials_ptr + program * 6 + 1, u)
        tl.store(partials_ptr + program * 6 + 2, s)
        tl.store(partials_ptr + program * 6 + 3, t)
        tl.store(partials_ptr + program * 6 + 4, a)
        tl.store(partials_ptr + program * 6 + 5, b)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _merge_kernel(
    z_ptr,
    z_inner,
    z_outer,
    z_step,
    r_ptr,
    r_inner,
    r_outer,
    r_step,
    first,
    labels_ptr,
    weights_ptr,
    partials_ptr,
    loss_ptr,
    nll_ptr,
    kl_ptr,
    entropy_ptr,
    stats_ptr,
    kl_coef,
    entropy_coef,
    splits,
    V: tl.constexpr,
    KL: tl.constexpr,
    UNIT: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
):
    """One row's terms and statistics from the moments of its parts."""
    row = tl.program_id(0)
    weight = tl.load(weights_ptr + row)
    label = tl.load(labels_ptr + row)  # of a masked row it is not followed
    if weight != 0:
        z_start = _row_start(row, first, z_inner, z_outer, z_step, UNIT)
        r_start = _row_start(row, first, r_inner, r_outer, r_step, UNIT)
        z_label, r_label = _label_logits(z_ptr, z_start, r_ptr, r_start, label, V, KL)
        split = tl.arange(0, MOST_SPLITS)
        part = partials_ptr + (row * splits + split) * 6
        m = tl.load(part + 0, mask=split < splits, other=LOWEST)
        u = tl.load(part + 1, mask=split < splits, other=LOWEST)
        s = tl.load(part + 2, mask=split < splits, other=0.0)
        t = tl.load(part + 3, mask=split < splits, other=0.0)
        a = tl.load(part + 4, mask=split < splits, other=0.0)
        b = tl.load(part + 5, mask=split < splits, other=0.0)
        m, u, s, t, a, b = _merged(m, u, s, t, a, b, KL)
        if KL == "policy_ref" or KL == "ref_policy":
            b = _looked_at_again(z_ptr + z_start, r_ptr + r_start, m, u, b, V, KL, 32)
        _store_row(
            row,
            weight,
            m,
            u,
            s,
            t,
            a,
            b,
            z_label,
            r_label,
            kl_coef,
            entropy_coef,
            loss_ptr,
            nll_ptr,
            kl_ptr,
            entropy_ptr,
            stats_ptr,
            KL,
        )
    else:
        _store_masked_row(row, loss_ptr, nll_ptr, kl_ptr, entropy_ptr, stats_ptr)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _gradient_kernel(
    z_ptr,
    z_inner,
    z_outer,
    z_step,
    r_ptr,
    r_inner,
    r_outer,
    r_step,
    first,
    grad_ptr,
    grad_inner,
    grad_outer,
    grad_step,
    labels_ptr,
    weights_ptr,
    stats_ptr,
    scale_ptr,
    kl_coef,
    entropy_coef,
    splits,
    width,
    V: tl.constexpr,
    KL: tl.constexpr,
    UNIT: tl.constexpr,
    U: tl.constexpr,
    T: tl.constexpr,
    E: tl.constexpr,
    STAGES: tl.constexpr,
    UNLESS_ONE: tl.constexpr,
):
    """The gradient of scale * loss on one part of a row, from the row's statistics.

    With UNLESS_ONE it is there already for a scale of 1, which only the GPU knows.
    """
    scale = tl.load(scale_ptr).to(tl.float32)
    if (scale != 1) | (not UNLESS_ONE):
        # Backwards: what the sums read last is still in the cache.
        program = tl.num_programs(0) - 1 - tl.program_id(0)
        row = program // splits
        split = program % splits
        weight = tl.load(weights_ptr + row)
        label = tl.load(labels_ptr + row)  # of a masked row it is not followed
        grad_start = _row_start(row, first, grad_inner, grad_outer, grad_step, UNIT)
        if weight != 0:
            z_start = _row_start(row, first, z_inner, z_outer, z_step, UNIT)
            r_start = _row_start(row, first, r_inner, r_outer, r_step, UNIT)
            z_label, r_label = _label_logits(z_ptr, z_start, r_ptr, r_start, label, V, KL)
            _store_gradient(
                grad_ptr,
                grad_start,
                z_ptr,
                z_start,
                r_ptr,
                r_start,
                label,
                z_label,
                r_label,
                weight * scale,
                kl_coef,
                entropy_coef,
                tl.load(stats_ptr + row * 6 + 0),
                tl.load(stats_ptr + row * 6 + 1),
                tl.load(stats_ptr + row * 6 + 2),
                tl.load(stats_ptr + row * 6 + 3),
                tl.load(stats_ptr + row * 6 + 4),
                tl.load(stats_ptr + row * 6 + 5),
                split,
                splits,
                width,
                V,
                KL,
                UNIT,
                U,
                T,
                E,
                STAGES,
            )
        else:
            _zero_row(grad_ptr, grad_start, split, splits, width, UNIT, U, T, E)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _scale_kernel(
    grad_ptr,
    grad_inner,
    grad_outer,
    grad_step,
    scale_ptr,
    rows,
    width,
    BLOCK: tl.constexpr,
):
    """grad *= scale. A scale of 1 is the usual case, but only the GPU knows it: the host must not wait."""
    scale = tl.load(scale_ptr).to(tl.float32)
    if scale != 1:
        for row in tl.range(tl.program_id(0), rows, tl.num_programs(0)):
            grad_row = grad_ptr + _row_start(row, 0, grad_inner, grad_outer, grad_step, 1)
            for start in tl.range(0, width, BLOCK):
                column = start + tl.arange(0, BLOCK)
                grad = tl.load(grad_row + column, mask=column < width).to(tl.float32)
                tl.store(grad_row + column, (grad * scale).to(grad_ptr.dtype.element_ty), mask=column < width)


# --- Launchers ---------------------------------------------------------------------------------

# Triton looks at TRITON_INTERPRET once for its own functions and once for ours.
INTERPRETED = not any(isinstance(function, triton.JITFunction) for function in (tl.sum, _row_kernel))


class Blocking(NamedTuple):
    """How rows are cut into programs and tiles; chosen by `blocking`."""

    splits: int  # programs that share a row
    warps: int  # of a program; T = 32 * warps
    per_thread: int  # columns of each tensor that a thread loads before it computes: U * E
    stages: int = 1  # tiles on their way at once, through shared memory if more than one


def blocking(rows: int, vocab_size: int, logits: Tensor, *, fused: bool, pairs: bool = False) -> Blocking:
    """The blocking for `rows` rows like those of logits; `fused` if one program makes sums and gradient.

    With `pairs`, the gradient reads the reference again, and not the policy's logits alone.

    One fused program fills a multiprocessor: 32 KB of loads in flight would not hide its latency between
    loops, so more tiles are prefetched through shared memory. Of the other kernels several programs run
    on one multiprocessor.
    """
    if not logits.is_cuda:  # Triton's interpreter goes through the threads one by one
        return Blocking(splits=1, warps=1, per_thread=16)
    processors, shared = _processors(logits.device)
    per_thread = 32 // logits.element_size()
    if rows >= 2 * processors:
        if fused:
            return Blocking(splits=1, warps=16, per_thread=per_thread, stages=fused_stages(shared, pairs))
        return Blocking(splits=1, warps=8, per_thread=per_thread)
    warps = 4
    most = max(1, vocab_size // (32 * warps * per_thread))
    return Blocking(min(most, -(-4 * processors // max(1, rows))), warps, per_thread)


def fused_stages(shared: int, pairs: bool) -> int:
    """Tiles on their way at once in the fused kernel, of which all but one lie in shared memory.

    Where pairs of rows wait to be read again, so many that a second program does not fit beside the first,
    whatever its registers: its pair would push the first's out of the cache. Two rows of the policy alone
    are no more than one pair, and there is room for both programs.

    Args:
        shared: bytes of a multiprocessor; 0 if it does not copy to them by itself.
    """
    if not shared:
        return 1
    tile = 2 * 32 * 16 * 32  # z and r: 16 warps of threads that take 32 bytes of each
    usable = shared - 1024  # a program has that much beside its own
    return 1 + min(usable // (2 * tile) + 1, usable // tile) if pairs else 3


@functools.cache
def _processors(device: torch.device) -> tuple[int, int]:
    """How many there are, and the bytes of shared memory of each, 0 if it does not copy there by itself."""
    properties = torch.cuda.get_device_properties(device)
    asynchronous = properties.major >= 8
    return properties.multi_processor_count, asynchronous and properties.shared_memory_per_multiprocessor


class _Tile(NamedTuple):
    """E neighbouring columns a thread and load; strides count UNITs: E if it divides all, else 1."""

    E: int
    UNIT: int
    first: int = 0  # elements from a multiple of 16 bytes, which is what the kernel gets, to the first row


def _tile(tensors: list[Tensor], rows: list[Rows]) -> _Tile:
    """The widest loads of at most 16 bytes that all tensors allow."""
    widest = 16 // max(tensor.element_size() for tensor in tensors)
    firsts = [tensor.data_ptr() % 16 // tensor.element_size() for tensor in tensors]
    strides = [(r.outer_stride % widest, r.inner_stride % widest) for r in rows]
    if not any(firsts) and all(stride == (0, 0) for stride in strides):
        return _Tile(widest, widest)
    # All rows n start equally far from a multiple of E.
    same = all(r.inner == rows[0].inner for r in rows)
    first = firsts[0]
    in_memory = all(tensor.storage_offset() >= first for tensor in tensors)
    if same and in_memory and len(set(strides)) == len(set(firsts)) == 1:
        return _Tile(widest, 1, first)
    return _Tile(1, 1)


def _before(tensor: Tensor, first: int) -> Tensor:
    """An element `first` elements before the tensor's own, whose address is what a kernel gets."""
    return tensor.as_strided((1,), (1,), tensor.storage_offset() - first) if first else tensor


def _numbers(name: str, rows: Rows, unit: int) -> dict[str, int]:
    return {
        f"{name}_inner": rows.inner,
        f"{name}_outer": rows.outer_stride // unit,
        f"{name}_step": rows.inner_stride // unit,
    }


class _Problem:
    """What the kernels share in one call."""

    def __init__(
        self,
        logits: Tensor,
        ref_logits: Tensor | None,
        labels: Tensor,
        weights: Tensor,
        vocab_size: int,
        kl_coef: float,
        entropy_coef: float,
        kl: str,
        *,
        grad: Tensor | None,
    ) -> None:
        self.rows = labels.numel()
        self.device = logits.device
        self.logits, z_rows = with_rows(logits)
        # Without a reference its pointer is not followed.
        self.ref, r_rows = (self.logits, z_rows) if ref_logits is None else with_rows(ref_logits)
        tensors, all_rows = [self.logits, self.ref], [z_rows, r_rows]
        if grad is not None:
            grad_rows = rows_of(grad)
            assert grad_rows is not None
            tensors.append(grad)
            all_rows.append(grad_rows)
        self.tile = _tile(tensors, all_rows)
        self.read: dict[str, Any] = {
            "z_ptr": _before(self.logits, self.tile.first),
            **_numbers("z", z_rows, self.tile.UNIT),
            "r_ptr": _before(self.ref, self.tile.first),
            **_numbers("r", r_rows, self.tile.UNIT),
            "first": self.tile.first,
            "weights_ptr": weights.contiguous(),
        }
        self.row: dict[str, Any] = {
            "labels_ptr": labels.contiguous(),
            "kl_coef": kl_coef,
            "entropy_coef": entropy_coef,
        }
        target = self.logits if grad is None else grad
        self.written: dict[str, Any] = {
            "grad_ptr": _before(target, self.tile.first),
            **_numbers("grad", all_rows[-1], self.tile.UNIT),
            "width": logits.shape[-1],
        }
        self.vocab_size = vocab_size
        self.kl = "none" if ref_logits is None else kl
        self.gradient_kl = "none" if kl_coef == 0 else self.kl

    def tiles(self, cut: Blocking) -> dict[str, Any]:
        return {
            "UNIT": self.tile.UNIT,
            "U": max(1, cut.per_thread // self.tile.E),
            "T": 32 * cut.warps,
            "E": self.tile.E,
            "STAGES": cut.stages,
            "num_warps": cut.warps,
        }


def new_gradient(logits: Tensor) -> Tensor:
    """An empty tensor like logits, whose rows start as far from a multiple of 16 bytes as theirs.

    Contiguous as a rule. Rows of logits[:, :-1] of an odd vocabulary, or cut from more columns, lie where the
    logits' do, so that all of them are read and written 16 bytes at a time. A layout that would take half as
    much memory again is not followed.
    """
    first = logits.storage_offset() % (16 // logits.itemsize)
    if (logits.is_contiguous() and first == 0) or rows_of(logits) is None:
        return logits.new_empty(logits.shape)
    extent = 1
    for stride, size in sorted(zip(logits.stride(), logits.shape, strict=True)):
        if size > 1 and stride < extent:  # rows overlap
            return logits.new_empty(logits.shape)
        extent += (size - 1) * stride
    if logits.numel() == 0 or 2 * extent > 3 * logits.numel():
        return logits.new_empty(logits.shape)
    return logits.new_empty(first + extent).as_strided(logits.shape, logits.stride(), first)


def forward(
    *problem: Any,
    grad: Tensor | None = None,
    cut: Blocking | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, nll, KL, H (float32), and the per-row statistics that `backward` takes.

    Args:
        problem: logits, ref_logits, labels, weights, vocab_size, kl_coef, entropy_coef, kl, as for `eager`.
        grad: like logits, or logits itself: where the gradient of the loss is written.
    """
    p, (logits, _, labels, *_) = _Problem(*problem, grad=grad), problem
    pairs = p.gradient_kl in ("policy_ref", "ref_policy")
    cut = cut or blocking(p.rows, p.vocab_size, logits, fused=grad is not None, pairs=pairs)
    loss, nll, divergence, entropy = (logits.new_empty(labels.shape, dtype=torch.float32) for _ in range(4))
    stats = logits.new_empty((p.rows, STATS_PER_ROW), dtype=torch.float32)
    if p.rows == 0:
        return loss.sum(), nll, divergence, entropy, stats
    terms = {
        "loss_ptr": loss,
        "nll_ptr": nll,
        "kl_ptr": divergence,
        "entropy_ptr": entropy,
        "stats_ptr": stats,
    }
    with on_device(p.device):
        if cut.splits == 1:
            _row_kernel[(p.rows,)](
                **p.read,
                **p.row,
                **p.written,
                **terms,
                V=p.vocab_size,
                KL=p.kl,
                GRADIENT="off" if grad is None else p.gradient_kl,
                **p.tiles(cut),
            )
        else:
            partials = logits.new_empty((p.rows, cut.splits, 6), dtype=torch.float32)
            _partial_kernel[(p.rows * cut.splits,)](
                **p.read,
                partials_ptr=partials,
                splits=cut.splits,
                V=p.vocab_size,
                KL=p.kl,
                **p.tiles(cut),
            )
            _merge_kernel[(p.rows,)](
                **p.read,
                **p.row,
                **terms,
                partials_ptr=partials,
                splits=cut.splits,
                V=p.vocab_size,
                KL=p.kl,
                UNIT=p.tile.UNIT,
                MOST_SPLITS=triton.next_power_of_2(cut.splits),
                num_warps=1,
            )
            if grad is not None:
                one = torch.ones((), dtype=torch.float32, device=p.device)
                _write_gradient(p, one, stats, cut)
    return loss.sum(), nll, divergence, entropy, stats


def backward(
    scale: Tensor,
    stats: Tensor,
    *problem: Any,
    grad: Tensor,
    unless_one: bool = False,
    cut: Blocking | None = None,
) -> None:
    """Write the gradient of scale * loss into grad (like logits, or logits itself).

    With unless_one, grad holds the gradient of the loss already, and a scale of 1 leaves it alone.
    """
    p = _Problem(*problem, grad=grad)
    if p.rows == 0:
        return
    with on_device(p.device):
        cut = cut or blocking(p.rows, p.vocab_size, problem[0], fused=False)
        _write_gradient(p, scale, stats, cut, unless_one)


def _write_gradient(
    p: _Problem, scale: Tensor, stats: Tensor, cut: Blocking, unless_one: bool = False
) -> None:
    _gradient_kernel[(p.rows * cut.splits,)](
        **p.read,
        **p.row,
        **p.written,
        stats_ptr=stats,
        scale_ptr=scale,
        splits=cut.splits,
        V=p.vocab_size,
        KL=p.gradient_kl,
        UNLESS_ONE=unless_one,
        **p.tiles(cut),
    )


def rescale(grad: Tensor, scale: Tensor) -> None:
    """grad *= scale, in place; where scale is 1, which the host does not ask, nothing is touched."""
    rows = rows_of(grad)
    assert rows is not None
    count = grad.numel() // max(1, grad.shape[-1])
    if count == 0:
        return
    programs = 4 * _processors(grad.device)[0] if grad.is_cuda else 4
    with on_device(grad.device):
        _scale_kernel[(min(count, programs),)](
            grad_ptr=grad,
            **_numbers("grad", rows, 1),
            scale_ptr=scale,
            rows=count,
            width=grad.shape[-1],
            BLOCK=4096,
            num_warps=8,
        )


@contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """Triton launches on the current device, which need not be that of the tensors.

    Raises:
        UsageError: the GPU has less shared memory than a program wants, whatever the number of rows; or
            Triton, which compiles a launcher in C for each kernel, cannot do so here.
    """
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            yield
    except triton.OutOfResources as error:
        raise UsageError(
            f"the loss's Triton kernels are not for this GPU: {error.name}, {error.required} bytes wanted,"
            f" {error.limit} there; give impl='eager' (--impl eager)"
        ) from error
    except Exception as error:  # what Triton has for it is of two kinds
        if type(error).__name__ != "CalledProcessError" and "C compiler" not in str(error):
            raise
        raise UsageError(
            f"Triton cannot compile the launcher of its kernels ({error}); install a C compiler and Python's"
            " headers (gcc and python3-dev, or as they are called here)"
        ) from error
