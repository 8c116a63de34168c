"""Float32 weights to the 16 bits that they came in, without losing what was learned.

A model that comes in bfloat16 starts on bfloat16's grid, where neighbours lie 2^-8 to 2^-7 of a weight apart.
A short training moves most weights by less than half of that, and rounding to the nearest takes each of those
back to where it was. Stochastic rounding goes up or down with the probabilities that keep a weight on
average, so that in the sums over hundreds of weights that a layer computes the change is still there (Gupta
et al. 2015, arXiv 1502.02551).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Bits of a float32's mantissa that the dtype has no room for.
LOST_BITS = {torch.bfloat16: 16, torch.float16: 13}
BLOCK = 2**24  # weights at a time: the random bits of a whole embedding table would take twice its memory


def conversion(dtype: torch.dtype, stored: torch.dtype) -> Callable[[Tensor], Tensor]:
    """How weights of a model that came in ``stored`` get to ``dtype``: to the nearest, or stochastically.

    Stochastically where they were numbers of ``dtype`` before training: rounding to the nearest would undo
    most changes, which are smaller than half a step. Other weights keep their changes on average by rounding
    to the nearest, and a model that learned nothing then equals the reference.
    """
    if dtype in LOST_BITS and stored in (dtype, torch.bfloat16):
        return stochastic_rounding(dtype)
    return lambda weights: weights.to(dtype)


def stochastic_rounding(dtype: torch.dtype, seed: int = 0) -> Callable[[Tensor], Tensor]:
    """A function from tensors to ``dtype`` with E[result] = tensor.

        up with probability (x - below) / (above - below), else down, of x's two neighbours in dtype

    Numbers that ``dtype`` holds, infinities and NaN stay what they are. Subnormal float16 (below 6.1e-5) are
    rounded to the nearest, which is 3e-8 away at most; beyond the largest number of ``dtype`` is infinity.
    The same seed and sequence of tensors on the same kind of device give the same results.

    Args:
        dtype: bfloat16 or float16.
        seed: of the random bits, one stream for each device.
    """
    lost = LOST_BITS[dtype]
    generators: dict[torch.device, torch.Generator] = {}

    def rounded(tensor: Tensor) -> Tensor:
        if tensor.dtype == dtype:
            return tensor
        device = tensor.device
        if device not in generators:
            generators[device] = torch.Generator(device).manual_seed(seed)
        out = torch.empty(tensor.shape, dtype=dtype, device=device)
        parts = (torch.split(flat, BLOCK) for flat in (out.view(-1), tensor.reshape(-1)))
        for some, wide in zip(*parts, strict=True):
            # Random bits added to those that are lost carry into the others with just the probability wanted,
            # and cutting them off rounds towards zero.
            wide = wide.float()
            bits = torch.randint(
                2**lost, wide.shape, generator=generators[device], dtype=torch.int32, device=device
            )
            bits.add_(wide.view(torch.int32)).bitwise_and_(-(2**lost))
            some.copy_(torch.where(wide.isfinite(), bits.view(torch.float32), wide))
        return out

    return rounded
