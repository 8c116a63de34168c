"""The C++ core of quark_fast (csrc/bindings.cpp)."""

import enum

import numpy as np
import numpy.typing as npt

interface: int  # what quark_fast/__init__.py asks for

# --- rows of logits ---

class Rows:
    def __init__(
        self, data: int, dtype: str, inner: int, outer_stride: int, inner_stride: int, elements: int
    ) -> None: ...

def isa() -> str: ...
def prefer_huge_pages(data: int, bytes: int) -> None: ...

# --- quark_loss ---

STATS_PER_ROW: int

class Problem:
    def __init__(
        self,
        logits: Rows,
        ref: Rows | None,
        labels: npt.NDArray[np.int64],
        weights: npt.NDArray[np.float32],
        vocab: int,
        width: int,
        kl: str,
        kl_coef: float,
        entropy_coef: float,
    ) -> None: ...

def quark_loss_forward(
    problem: Problem,
    nll: npt.NDArray[np.float32],
    kl: npt.NDArray[np.float32],
    entropy: npt.NDArray[np.float32],
    stats: npt.NDArray[np.float32],
    grad: Rows | None,
    threads: int,
) -> float: ...
def quark_loss_backward(
    problem: Problem, stats: npt.NDArray[np.float32], scale: float, grad: Rows, threads: int
) -> None: ...

# --- sampling ---

def sample_tokens(
    logits: Rows,
    rows: int,
    vocab: int,
    weights: npt.NDArray[np.float32],
    suppressed: npt.NDArray[np.int64],
    top_p: float,
    nucleus_of: int,
    nucleus_weight: float,
    drawn_rows: npt.NDArray[np.int64],
    uniform: npt.NDArray[np.float32] | None,
    tokens: npt.NDArray[np.int64],
    inside: npt.NDArray[np.bool_],
    log_p: npt.NDArray[np.float32] | None,
    threads: int,
) -> bool: ...

# --- quantile_pool ---

class Ties(enum.Enum):
    same = ...
    arrival = ...
    random = ...

class Remainder(enum.Enum):
    spread = ...
    last = ...

class QuantilePool32:
    def __init__(self, quantiles: int, ties: Ties, remainder: Remainder, seed: int) -> None: ...
    def add(self, rewards: npt.NDArray[np.floating]) -> npt.NDArray[np.int64]: ...
    def restore(self, rewards: npt.NDArray[np.floating], run_sizes: list[int]) -> None: ...
    def __len__(self) -> int: ...
    @property
    def run_sizes(self) -> list[int]: ...
    def rewards(self) -> npt.NDArray[np.floating]: ...
    def labels(self) -> npt.NDArray[np.int32]: ...
    def labels_into(self, out: npt.NDArray[np.integer]) -> int: ...
    def look_up(
        self, ids: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.floating], npt.NDArray[np.int64]]: ...
    def thresholds(self) -> npt.NDArray[np.floating]: ...
    def quantile_sizes(self) -> npt.NDArray[np.int64]: ...
    def sample(
        self, count: int, quantiles: list[int], key: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.floating], npt.NDArray[np.int64]]: ...
    def count_up_to(
        self, keys: npt.NDArray[np.unsignedinteger], ties: npt.NDArray[np.unsignedinteger]
    ) -> npt.NDArray[np.int64]: ...
    def impose(
        self,
        keys: npt.NDArray[np.unsignedinteger],
        ties: npt.NDArray[np.unsignedinteger],
        thresholds: npt.NDArray[np.unsignedinteger],
    ) -> None: ...
    imposed: bool

class QuantilePool64(QuantilePool32): ...  # of double; the same members, no real subclass

def quantile_cut(n: int, j: int, k: int, remainder: Remainder) -> int: ...
def block_reaches(
    n: npt.ArrayLike, cut: npt.ArrayLike, better: npt.ArrayLike, equal: npt.ArrayLike
) -> npt.NDArray[np.bool_]: ...
def permutation_slice(n: int, key: int, start: int, stop: int) -> npt.NDArray[np.int64]: ...

# --- token rows ---

def pack_rows(
    rows: list[list[int]] | list[object],
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]] | None: ...
