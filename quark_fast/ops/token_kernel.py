"""From logits to tokens on a GPU, in Triton: what csrc/sampling_rows.cpp is on the CPU.

One program a row. It reads the logits once from the GPU's memory, and nothing as long as the vocabulary is
written; what is read again comes from the cache, as a row of 50k columns in bfloat16 takes 100 KB.

With y = sum over streams s of weight_s z_s, the weights already divided by the temperature, m = max y and
e = exp(y - m), the first pass keeps the sum of e of each block of columns. A draw walks to the block, then
within the block to the first token up to which the mass exceeds u times the whole. It is in the nucleus if
the tokens above it hold less than top_p of the whole, which a further pass says. If they hold more, no token
from it downwards is in the nucleus: the next draw is among those above it, whose block sums that pass has
made. So the draws are exact, without a sort; on average half of what is outside is left from draw to draw.

log p of the token, restricted to the nucleus, takes the nucleus's mass, which no draw needs. Bisection of y
finds its lowest token, by a pass over the row in the cache for each halving, and no more of them than there
are different y, as every pass moves an end to one of these. It is compiled only where it is asked for.

Where the nucleus is that of one stream, the same bisection finds the lowest of its tokens first, and what
lies below is left out of all passes over y: the first draw is in it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quark_fast.ops.rows import Nucleus
from quark_fast.ops.triton_kernels import LOG2_E, LOWEST, on_device

DRAWS = 32  # uniform numbers of a row; even the nucleus of one token in 50,000 is missed by one row in 10^6
BLOCK_BYTES = 8192  # 256 threads take two loads of 16 bytes each


@triton.jit
def _exp(x):
    """e^x, 0 below 2^-126: two instructions, where tl.exp spends three more on smaller numbers."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def _mixed(row, column, V: tl.constexpr, STREAMS: tl.constexpr, SUPPRESSED: tl.constexpr, CUT: tl.constexpr):
    """(y at the columns, -inf where there is no token; whether a logit or y is NaN or +inf).

    With CUT only those are tokens whose weighted logit in another row is at least the lowest one there.
    """
    logits_ptr, stream_stride, weights_ptr, suppressed_ptr, cut = row
    inside = column < V
    y = tl.zeros(column.shape, tl.float32)
    broken = tl.zeros(column.shape, tl.int32)
    for s in tl.static_range(STREAMS):
        z = tl.load(logits_ptr + s * stream_stride + column, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(weights_ptr + s)
        # Fused by name: two passes that the compiler rounds differently could not be compared.
        y = weight * z if s == 0 else tl.fma(weight, z, y)
        broken |= (z < float("inf")).to(tl.int32) ^ 1
    broken |= (y < float("inf")).to(tl.int32) ^ 1
    for i in tl.static_range(SUPPRESSED):
        inside &= column != tl.load(suppressed_ptr + i)
    if CUT:
        cut_ptr, cut_weight_ptr, lowest = cut
        z = tl.load(cut_ptr + column, mask=inside, other=0.0).to(tl.float32)
        inside &= tl.load(cut_weight_ptr) * z >= lowest
    return tl.where(inside, y, float("-inf")), broken


@triton.jit
def _first_pass(
    row,
    V: tl.constexpr,
    STREAMS: tl.constexpr,
    SUPPRESSED: tl.constexpr,
    CUT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """(max y; the mass of each block relative to it; whether the row has a token, and no NaN or +inf)."""
    lane, place = tl.arange(0, WIDTH), tl.arange(0, BLOCKS)
    m = tl.full((), LOWEST, tl.float32)
    masses = tl.zeros(place.shape, tl.float32)
    broken = tl.zeros(lane.shape, tl.int32)
    for block in range((V + WIDTH - 1) // WIDTH):
        y, bad = _mixed(row, block * WIDTH + lane, V, STREAMS, SUPPRESSED, CUT)
        broken |= bad
        raised = tl.maximum(m, tl.max(y, 0))
        masses = masses * _exp(m - raised) + tl.where(place == block, tl.sum(_exp(y - raised), 0), 0.0)
        m = raised
    return m, masses, (tl.max(broken, 0) == 0) & (m > LOWEST)


@triton.jit
def _masses_above(
    row,
    limit,
    m,
    V: tl.constexpr,
    STREAMS: tl.constexpr,
    SUPPRESSED: tl.constexpr,
    CUT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The mass of each block's tokens with y > limit."""
    place = tl.arange(0, BLOCKS)
    masses = tl.zeros(place.shape, tl.float32)
    for block in range((V + WIDTH - 1) // WIDTH):
        y, _ = _mixed(row, block * WIDTH + tl.arange(0, WIDTH), V, STREAMS, SUPPRESSED, CUT)
        mass = tl.sum(tl.where(y > limit, _exp(y - m), 0.0), 0)
        masses += tl.where(place == block, mass, 0.0)
    return masses


@triton.jit
def _token_at(
    row,
    share,
    masses,
    limit,
    m,
    V: tl.constexpr,
    STREAMS: tl.constexpr,
    SUPPRESSED: tl.constexpr,
    CUT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """(the first token up to which the mass of those with y > limit exceeds a share of it all; its y)."""
    place, lane = tl.arange(0, BLOCKS), tl.arange(0, WIDTH)
    reached = tl.cumsum(masses, 0)
    target = share * tl.max(reached, 0)
    # Rounding may leave the target at the very end, of all blocks or of one: then it is the last with a mass.
    block = tl.sum((reached <= target).to(tl.int32), 0)
    block = tl.minimum(block, tl.max(tl.where(masses > 0, place, 0), 0))
    before = tl.sum(tl.where(place < block, masses, 0.0), 0)
    y, _ = _mixed(row, block * WIDTH + lane, V, STREAMS, SUPPRESSED, CUT)
    e = tl.where(y > limit, _exp(y - m), 0.0)
    first = tl.min(tl.where((before + tl.cumsum(e, 0) > target) & (e > 0), lane, WIDTH), 0)
    first = tl.where(first < WIDTH, first, tl.max(tl.where(e > 0, lane, 0), 0))
    return block * WIDTH + first, tl.max(tl.where(lane == first, y, float("-inf")), 0)


@triton.jit
def _split_at(
    row,
    limit,
    m,
    V: tl.constexpr,
    STREAMS: tl.constexpr,
    SUPPRESSED: tl.constexpr,
    CUT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """(the mass of the tokens with y > limit; the lowest y of those; the highest of the others)."""
    lane = tl.arange(0, WIDTH)
    mass = tl.zeros(lane.shape, tl.float32)
    least = tl.full(lane.shape, float("inf"), tl.float32)
    most = tl.full(lane.shape, float("-inf"), tl.float32)
    for block in range((V + WIDTH - 1) // WIDTH):
        y, _ = _mixed(row, block * WIDTH + lane, V, STREAMS, SUPPRESSED, CUT)
        mass += tl.where(y > limit, _exp(y - m), 0.0)
        least = tl.minimum(least, tl.where(y > limit, y, float("inf")))
        most = tl.maximum(most, tl.where(y > limit, float("-inf"), y))
    return tl.sum(mass, 0), tl.min(least, 0), tl.max(most, 0)


@triton.jit
def _nucleus(
    row,
    least,
    whole,
    inside,
    m,
    V: tl.constexpr,
    STREAMS: tl.constexpr,
    SUPPRESSED: tl.constexpr,
    CUT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """(the mass of all tokens above each of which there is less than `least`; the lowest y among them).

    One of them has y = `inside`. `whole` is the mass of all; those with y < m - 87 have none to speak of.
    """
    low, high = m - 87.0, inside  # the lowest y of the nucleus is one of those from here to there
    reached = whole  # the mass from low on
    while low < high:
        middle = low + (high - low) * 0.5
        middle = tl.where(middle < high, middle, low)
        mass, above, below = _split_at(row, middle, m, V, STREAMS, SUPPRESSED, CUT, WIDTH)
        enough = mass >= least
        low, high = tl.where(enough, above, low), tl.where(enough, high, tl.maximum(low, below))
        reached = tl.where(enough, mass, reached)
    return reached, high


@triton.jit
def _token_kernel(
    logits_ptr,
    row_stride,
    stream_stride,
    weights_ptr,
    suppressed_ptr,
    uniform_ptr,
    top_p,
    nucleus_weight_ptr,
    token_ptr,
    log_p_ptr,
    V: tl.constexpr,
    STREAMS: tl.constexpr,
    SUPPRESSED: tl.constexpr,
    GREEDY: tl.constexpr,
    NUCLEUS: tl.constexpr,
    NUCLEUS_OF: tl.constexpr,
    LOG_P: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    DRAWN: tl.constexpr,
):
    """One token of a row, -1: it has none; and its log p, NaN where it has none.

    V columns in blocks of WIDTH, of which a power of two, BLOCKS, is at least as many; DRAWN uniform numbers.
    NUCLEUS: that of y; NUCLEUS_OF: that of a stream, -1: of none.
    """
    n = tl.program_id(0)
    row_ptr = logits_ptr + n.to(tl.int64) * row_stride
    CUT: tl.constexpr = NUCLEUS_OF >= 0
    cut = (row_ptr, nucleus_weight_ptr, float("-inf"))
    if CUT:
        stream_ptr = row_ptr + NUCLEUS_OF * stream_stride
        alone = (stream_ptr, stream_stride, nucleus_weight_ptr, suppressed_ptr, cut)
        top, masses, sound = _first_pass(alone, V, 1, SUPPRESSED, False, WIDTH, BLOCKS)
        whole = tl.sum(masses, 0)
        mass, lowest = _nucleus(alone, top_p * whole, whole, top, top, V, 1, SUPPRESSED, False, WIDTH)
        cut = (stream_ptr, nucleus_weight_ptr, lowest)
    row = (row_ptr, stream_stride, weights_ptr, suppressed_ptr, cut)
    m, masses, sound = _first_pass(row, V, STREAMS, SUPPRESSED, CUT, WIDTH, BLOCKS)
    token = tl.full((), -1, tl.int32)
    whole = tl.sum(masses, 0)
    least = top_p * whole
    limit = tl.full((), float("-inf"), tl.float32)  # the candidates' y is above it; then the token's own
    if sound & (not GREEDY):
        draw = 0
        while (token < 0) & (draw < DRAWN):
            share = tl.load(uniform_ptr + n * DRAWN + draw)
            drawn, limit = _token_at(row, share, masses, limit, m, V, STREAMS, SUPPRESSED, CUT, WIDTH, BLOCKS)
            inside = draw >= 0
            if NUCLEUS:
                masses = _masses_above(row, limit, m, V, STREAMS, SUPPRESSED, CUT, WIDTH, BLOCKS)
                inside = tl.sum(masses, 0) < least
            token = tl.where(inside, drawn, token)
            draw += 1
    if sound & (token < 0):
        # The most probable one, the lowest of equals: greedy, or no draw was in the nucleus.
        token = tl.full((), V, tl.int32)
        for block in range((V + WIDTH - 1) // WIDTH):
            column = block * WIDTH + tl.arange(0, WIDTH)
            y, _ = _mixed(row, column, V, STREAMS, SUPPRESSED, CUT)
            token = tl.minimum(token, tl.min(tl.where(y == m, column, V), 0))
        limit = m
    tl.store(token_ptr + n, token.to(tl.int64))
    if LOG_P:
        log_p = tl.where(sound, 0.0, float("nan"))
        if sound & (not GREEDY):
            mass = whole
            if NUCLEUS:
                mass, lowest = _nucleus(row, least, whole, limit, m, V, STREAMS, SUPPRESSED, CUT, WIDTH)
            log_p = limit - m - tl.log(mass)
        tl.store(log_p_ptr + n, log_p)


def sample_tokens(
    logits: Tensor,
    weights: Tensor,
    suppressed: Tensor,
    nucleus: Nucleus,
    uniform: Tensor | None,
    vocabulary: int,
    width: int = 0,
    log_p: Tensor | None = None,
) -> Tensor:
    """One token a row from softmax(sum over streams s of weights_s logits_s) within the nucleus.

    Args:
        logits: (streams N, >= V) float32, bfloat16 or float16, all rows of a stream, then those of the next;
            neighbouring columns adjacent.
        weights: (streams,) float32, divided by the temperature.
        suppressed: int64 ids that are not drawn.
        nucleus: of which tokens; a stream's own is without the suppressed ones, too.
        uniform: (N, draws) float32 in [0, 1), contiguous; None: the most probable token, the lowest id among
            equals, which is also what a row gets none of whose draws is in the nucleus.
        vocabulary: V, how many columns are tokens.
        width: columns of a block, a power of two; 0: as many as ``BLOCK_BYTES`` holds.
        log_p: (N,) float32, contiguous: where log p of each token goes, p restricted to the nucleus; 0
            without uniform numbers, NaN where the token is -1. None: it is not computed.
    Returns:
        (N,) int64 ids; -1 for a row with a NaN or +inf, or without a token of a probability above 0. Nothing
        is waited for.
    """
    rows = len(logits) // len(weights)
    of_stream = nucleus.stream >= 0 and nucleus.top_p < 1 and uniform is not None
    tokens = torch.empty(rows, dtype=torch.long, device=logits.device)
    if not rows:
        return tokens
    width = min(width or BLOCK_BYTES // logits.itemsize, triton.next_power_of_2(vocabulary))
    with on_device(logits.device):
        _token_kernel[(rows,)](
            logits,
            logits.stride(0),
            rows * logits.stride(0),
            weights,
            suppressed,
            tokens if uniform is None else uniform,
            nucleus.top_p,
            weights.new_full((1,), nucleus.weight) if of_stream else weights,
            tokens,
            tokens if log_p is None else log_p,
            V=vocabulary,
            STREAMS=len(weights),
            SUPPRESSED=len(suppressed),
            GREEDY=uniform is None,
            NUCLEUS=nucleus.top_p < 1 and not of_stream,
            NUCLEUS_OF=nucleus.stream if of_stream else -1,
            LOG_P=log_p is not None,
            WIDTH=width,
            BLOCKS=triton.next_power_of_2(triton.cdiv(vocabulary, width)),
            DRAWN=0 if uniform is None else uniform.shape[1],
            num_warps=8,
        )
    return tokens
