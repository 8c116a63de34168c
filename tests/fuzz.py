"""Bad input, and good: random loss arguments, pools, prompts, settings, run folders, checkpoints.

Every target makes one input out of a `random.Random` and requires what is documented: a right answer by
an independent rule, or an error of the documented kind in one line; never a crash, a hang, a silent NaN or a
file written elsewhere. `test_fuzz.py` lets Hypothesis choose the random numbers. The long form:

    python tests/fuzz.py --inputs 100000 [--targets loss,pool] [--seed 0] [--json FILE]

splits the inputs over the targets by their weights, each in a process of its own, so that a crash or a hang
is seen, too, with the seed that repeats it: `python tests/fuzz.py --targets loss --seed 4711 --inputs 1`.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import io
import json
import logging
import math
import multiprocessing
import platform
import random
import resource
import shutil
import sqlite3
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from conftest import export, save_tiny_model
from rich.text import Text

from quark_fast.arguments import load_config, parse
from quark_fast.config import Config
from quark_fast.data.prompts import load_prompts
from quark_fast.errors import UsageError
from quark_fast.evaluation.side_by_side import Evaluator
from quark_fast.files.atomic import sha256
from quark_fast.files.safe_text import clean
from quark_fast.metrics import Sample
from quark_fast.model.policy import Policy
from quark_fast.ops.loss import quark_loss
from quark_fast.pool.pool import RolloutPool
from quark_fast.report.files import read_run
from quark_fast.report.page import write_report
from quark_fast.report.results import after_names, headline
from quark_fast.report.tables import before_after, markdown_page, markdown_table, results_table
from quark_fast.rewards.cache import RewardCache
from quark_fast.rewards.reward import describe
from quark_fast.runtime.checkpoint_files import CHECKSUMS, cut_back, load_checkpoint, save_checkpoint
from quark_fast.runtime.console import Terminal
from quark_fast.runtime.machine import quiet_libraries
from quark_fast.runtime.run_folder import COMPLETIONS, METRICS, RunFolder

Random = random.Random

SCRATCH = Path(tempfile.mkdtemp(prefix="quark_fast_fuzz_"))
HANG = 60.0  # seconds for one input
MEMORY = 4 << 30  # bytes of a target's process; more is a finding

# --- values that nobody expects -------------------------------------------------------------------

TEXTS = [
    "",
    " ",
    "a",
    "prompt",
    "\0",
    "\x1b]0;title\x07",
    "\x1b[2J",
    "\x9b31m",
    "\r",
    "\u202e",
    "\ud800",
    "<script>alert(1)</script>",
    "</style><svg onload=x>",
    '"onmouseover="x',
    "[link=http://x]y[/link]",
    "[/]",
    "{property}",
    "{0.__class__}",
    "$\\frac{$",
    "../../etc/passwd",
    "é東🙂",
    "|",
    "-1",
    "1e309",
    "nan",
    "true",
    "9" * 5000,
    "x" * 3000,
]
NUMBERS = [0, 1, -1, 2, 7, 0.5, -0.0, 1e-320, 1e308, -1e308, 2**31, 2**63, -(2**63), 10**400]
NOT_FINITE = [math.nan, math.inf, -math.inf]


def text(r: Random) -> str:
    return "".join(r.choice(TEXTS) for _ in range(r.choice([1, 1, 1, 2, 3])))


def value(r: Random, depth: int = 3) -> Any:
    """Any value that JSON can spell, and some that it should not."""
    kind = r.randrange(8)
    if kind == 0 and depth:
        return [value(r, depth - 1) for _ in range(r.randrange(4))]
    if kind == 1 and depth:
        return {text(r): value(r, depth - 1) for _ in range(r.randrange(4))}
    if kind == 2:
        return r.choice([None, True, False])
    if kind in (3, 4):
        return text(r)
    return r.choice([*NUMBERS, *NOT_FINITE])


def as_json(made: Any) -> str:
    try:
        return json.dumps(made)
    except ValueError:  # a number of thousands of digits
        return "1e999"


def damaged(r: Random, content: bytes) -> bytes:
    """The content with a few bytes changed, taken out or put in, or its end missing."""
    made = bytearray(content)
    for _ in range(r.randrange(4)):
        at = r.randrange(len(made) + 1)
        kind = r.randrange(3)
        if kind == 0:
            made[at:at] = r.randbytes(r.randrange(1, 5))
        elif kind == 1:
            del made[at : at + r.randrange(1, 9)]
        elif made:
            made[min(at, len(made) - 1)] = r.randrange(256)
    return bytes(made[: r.choice([len(made)] * 4 + [r.randrange(len(made) + 1)])])


def refused(error: Exception) -> str:
    """One line that steers no terminal, as every refusal is."""
    message = str(error)
    assert message and "\n" not in message and message == clean(message), repr(message)
    assert len(message) <= 2000, "a page"
    return "refused"


# --- the loss: against eager in float64 -----------------------------------------------------------

DTYPES = [torch.float32, torch.float32, torch.bfloat16, torch.float16]


def logits(r: Random, g: torch.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    made = torch.randn(shape, generator=g) * r.choice([0.1, 3.0, 3.0, 30.0, 1e4])
    kind = r.randrange(8)
    if kind == 0 and made.numel():
        at = torch.randint(made.numel(), (r.randrange(1, 4),), generator=g)
        made.view(-1)[at] = r.choice([math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-45])
    if kind == 1:
        made += r.choice([1e3, -1e4])
    if kind == 2 and made.numel():
        made[..., r.randrange(shape[-1])] = -math.inf
    return made.to(r.choice(DTYPES))


def laid_out(r: Random, tensor: torch.Tensor) -> torch.Tensor:
    kind = r.randrange(6)
    if kind == 0 and tensor.dim() > 1:
        return torch.cat([tensor, tensor[..., :1, :]], -2)[..., :-1, :]
    if kind == 1:
        return torch.cat([tensor[..., :1], tensor], -1)[..., 1:]
    if kind == 2 and tensor.dim() > 2:
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if kind == 3:
        return tensor.repeat_interleave(2, -1)[..., ::2]
    if kind == 4 and tensor.dim() > 1:
        return tensor[:1].expand(tensor.shape)
    return tensor


def loss(r: Random) -> str:
    g = torch.Generator().manual_seed(r.randrange(2**31))
    shape = r.choice([(), (1,), (3,), (2, 3), (3, 1, 2), (0,), (2, 0)])
    vocab, extra = r.choice([1, 2, 5, 16, 33, 250, 2049]), r.choice([0, 0, 1, 5])
    given: dict[str, Any] = {
        "logits": laid_out(r, logits(r, g, (*shape, vocab + extra))),
        "ref_logits": laid_out(r, logits(r, g, (*shape, vocab))),
        "labels": torch.randint(0, vocab, shape, generator=g),
        "mask": r.choice([None, torch.rand(shape, generator=g), torch.rand(shape, generator=g) > 0.4]),
        "kl_coef": r.choice([0.05, 0.0, 1.0]),
        "entropy_coef": r.choice([0.0, 0.06, -0.5]),
        "kl": r.choice(["policy_ref", "ref_policy", "sampled"]),
        "impl": r.choice(["cpp", "auto"]),
    }
    if r.random() < 0.2:
        given |= {"ref_logits": None, "kl_coef": 0.0, "vocab_size": vocab}
    if given["mask"] is not None and given["mask"].numel() and r.random() < 0.5:
        away = given["mask"] == 0
        given["labels"] = torch.where(away, torch.tensor(r.choice([-100, 2**62])), given["labels"])
        given["logits"] = given["logits"].clone()
        given["logits"][away] = math.nan
    bad = r.random() < 0.5
    if bad:
        spoil(r, given, shape, vocab)
    inplace = r.random() < 0.3
    try:
        return check_loss(given, inplace, bad)
    except (ValueError, TypeError) as error:
        if not bad and "inplace=True" not in str(error):  # not every layout can be written over
            raise
        assert len(str(error)) < 2000
        return "refused"


def spoil(r: Random, given: dict[str, Any], shape: tuple[int, ...], vocab: int) -> None:
    """One argument that may not fit."""
    name = r.choice(list(given))
    wrong: dict[str, list[Any]] = {
        "logits": [
            torch.ones(*shape, vocab, dtype=torch.long),
            torch.ones(*shape, max(vocab - 1, 0)),
            torch.ones(2, *shape, vocab),
            torch.ones(*shape, vocab).to_sparse(),
            torch.ones(*shape, vocab, device="meta"),
            torch.ones(*shape, vocab, dtype=torch.complex64),
            torch.ones(()),
            np.ones((*shape, vocab)),
            None,
        ],
        "labels": [
            torch.full(shape, r.choice([vocab, -1, -100, 2**62, -(2**63)])),
            torch.zeros(shape),
            torch.zeros(shape, dtype=torch.bool),
            torch.zeros(shape, dtype=torch.uint8),
            torch.zeros((*shape, 1), dtype=torch.long),
            [0],
        ],
        "mask": [
            torch.full(shape, r.choice([math.nan, math.inf, 3e38, -1.0])),
            torch.ones(shape, dtype=torch.complex64),
            torch.ones((*shape, 2)),
            torch.zeros(shape),
            [1],
        ],
        "kl_coef": [*NOT_FINITE, "1", None],
        "entropy_coef": [*NOT_FINITE, "1", None],
        "kl": ["", "kl", None],
        "impl": ["cuda", "", None],
        "vocab_size": [0, -1, vocab + 1, 10**12, 2.5],
    }
    wrong["ref_logits"] = wrong["logits"][:-1]
    given[name] = r.choice(wrong[name])
    if r.random() < 0.2:
        given["normalizer"] = r.choice([0, -1, math.nan, math.inf, 1e-40, "1"])


def check_loss(given: dict[str, Any], inplace: bool, bad: bool) -> str:
    own = given["logits"]
    leaf = own
    if isinstance(own, torch.Tensor) and own.is_floating_point() and own.layout == torch.strided:
        leaf = own.detach().requires_grad_()
    start = leaf * 1 if inplace and isinstance(leaf, torch.Tensor) else leaf
    out = quark_loss(**given | {"logits": start}, inplace=inplace)
    if out.loss.device.type == "meta":
        return "right"
    out.loss.backward()
    exact = own.detach().double().requires_grad_()
    wide = given | {"logits": exact, "impl": "eager"}
    if given["ref_logits"] is not None:
        wide["ref_logits"] = given["ref_logits"].double()
    true = quark_loss(**wide)
    true.loss.backward()
    weights = torch.ones(given["labels"].shape) if given["mask"] is None else given["mask"]
    live = weights.detach().double() != 0
    size = own.detach().double().abs()
    if given["ref_logits"] is not None:
        size = size[..., : given["ref_logits"].shape[-1]] + given["ref_logits"].double().abs()
    # What float32 can tell of logits so large.
    rough = 2e-6 * torch.where(size.isfinite(), size, 0).amax(-1) if size.numel() else torch.zeros(())
    # Beyond 1e37 the difference of two logits may be infinite in float32.
    plain = live & (size < 1e37).all(-1) if size.numel() else live
    for name in ("nll", "kl", "entropy"):
        ours, theirs = getattr(out, name).double(), getattr(true, name).double()
        assert (ours[~live] == 0).all(), f"{name} of a masked token"
        error = (ours - theirs).abs()
        spread = rough * (rough * 5e5 + 1) if given["kl"] == "sampled" and name == "kl" else rough
        allowed = 2e-5 + 2e-5 * theirs.abs() + spread
        wrong = plain & ~(error <= allowed) & (theirs < 1e38)
        assert not wrong.any(), f"{name}: {ours[wrong]} is not {theirs[wrong]}"
    # A NaN or +inf that counts shows in the loss; nothing else makes a NaN.
    if plain.all() or not live.any():
        assert out.loss.isfinite() or not (true.loss.abs() < 1e38), f"{out.loss} for {true.loss}"
    hidden = (true.nll.isnan() & ~out.nll.isnan() & ~out.entropy.isnan()).any()
    assert not hidden, "a NaN is hidden"
    gradient = leaf.grad.double()
    assert (gradient[~live] == 0).all(), "gradient of a masked token"
    small = plain & (rough < 1e-3)
    if small.any() and (true.loss.abs() < 1e30) and exact.grad.isfinite().all():
        eager = own.detach().clone().requires_grad_()
        quark_loss(**given | {"logits": eager, "impl": "eager"}).loss.backward()
        step = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[own.dtype]
        error = (gradient - exact.grad)[small].abs()
        budget = (eager.grad.double() - exact.grad)[small].abs().amax() if error.numel() else 0
        assert error.numel() == 0 or error.amax() <= budget + step * (1 + exact.grad[small].abs().amax())
    return "right"


# --- the pool: against numpy's sort ---------------------------------------------------------------


def labels_by_sorting(rewards: np.ndarray, k: int, ties: str, remainder: str) -> np.ndarray:
    n = len(rewards)
    order = np.lexsort((np.arange(n), -rewards))
    labels = np.zeros(n, np.int64)
    for j in range(1, k):
        cut = -(-j * n // k) if remainder == "spread" else j * (n // k)
        if ties == "same":
            better, equal = (
                (compare(rewards, rewards[:, None])).sum(1) for compare in (np.greater, np.equal)
            )
            labels += 2 * cut >= 2 * better + equal
        else:
            labels[order[:cut]] += 1
    if ties == "same" and n and rewards.min() < rewards.max():
        labels[rewards == rewards.min()], labels[rewards == rewards.max()] = 0, k - 1
    return labels


def pool(r: Random) -> str:
    k, ties, remainder = r.choice([1, 2, 5, 9]), r.choice(["same", "arrival"]), r.choice(["spread", "last"])
    dtype = r.choice(["float32", "float64"])
    made = RolloutPool(k, ties=ties, remainder=remainder, dtype=dtype, seed=r.randrange(2**31))
    known: dict[int, float] = {}
    outcome = "right"
    for _ in range(r.randrange(1, 5)):
        if r.random() < 0.3:
            before = made.ids.tolist(), made.unscored
            try:
                misuse(r, made)
            except (ValueError, TypeError, KeyError):
                outcome = "refused"
                assert (made.ids.tolist(), made.unscored) == before, "a refused call changed the pool"
            known = dict(zip(made.ids.tolist(), made.rewards.tolist(), strict=True))
        n = r.choice([0, 1, 3, 20])
        rewards = [
            r.choice([0.0, -0.0, 1.0, r.uniform(-3, 3), math.inf, -math.inf, math.nan, None])
            for _ in range(n)
        ]
        ids = made.add([[1] * r.randrange(3)] * n, [[2, 3]] * n, rewards)
        for i, reward in zip(ids.tolist(), rewards, strict=True):
            assert (i < 0) == (reward is None or math.isnan(reward))
            if i >= 0:
                known[i] = float(np.dtype(dtype).type(reward))
        expected = np.array([known[i] for i in sorted(known)])
        assert made.ids.tolist() == sorted(known)
        assert np.array_equal(made.rewards, expected.astype(dtype))
        assert np.array_equal(made.labels(), labels_by_sorting(expected, k, ties, remainder))
        if known:
            batch = made.sample(r.randrange(5))
            assert set(batch.ids.tolist()) <= known.keys()
    return outcome


def misuse(r: Random, made: RolloutPool) -> None:
    odd: list[Any] = [None, "x", 1.5, -1, 2**31, 2**63, [], [[]], object(), math.nan, [[1, [2]]], {"a": 1}]
    call = r.randrange(7)
    a, b, c = (r.choice(odd) for _ in range(3))
    if call == 0:
        made.add([a], [[1]], [0.5])
    elif call == 1:
        made.add([[1]], [b], [0.5])
    elif call == 2:
        made.add(
            r.choice([[[1]], [], [[1], [2]]]), [[1]], r.choice([c, [c], [0.5, "x"], "ab", [[1.0]], [1e39]])
        )
    elif call == 3:
        made.load_state_dict(made.state_dict() | {r.choice(["rewards", "rounds", "settings"]): a})
    elif call == 4:
        made.sample(r.choice([-1, 2.5, "x", None]), quantiles=r.choice([None, [99], [-1], "x", [], 0.5]))
    elif call == 5:
        made[r.choice([-1, 10**9, "x", 0.5, [[0]], None])]
    else:
        RolloutPool(r.choice([0, -1, 2.5, "x", None, 2**40]), ties=r.choice(["same", "x", None]))


def pool_file(r: Random) -> str:
    """A saved pool with its bytes or its values changed."""
    own: dict[str, Any] = {"quantiles": r.choice([1, 3]), "dtype": r.choice(["float32", "float64"])}
    saved = RolloutPool(**own)
    n = r.randrange(1, 9)
    saved.add([[1, 2]] * n, [[3]] * n, [r.uniform(-3, 3) for _ in range(n)])
    again = RolloutPool(**own)
    if r.random() < 0.4:
        path = SCRATCH / "pool.safetensors"
        saved.save(path)
        path.write_bytes(content := damaged(r, path.read_bytes()))
        try:
            again = RolloutPool.load(path)
        except ValueError:
            return "refused"
        assert np.array_equal(again.labels(), saved.labels()) or content != path.read_bytes()
        return "right"
    state = saved.state_dict()
    name = r.choice(list(state))
    if isinstance(state[name], np.ndarray) and r.random() < 0.7:
        array = state[name].copy()
        if r.random() < 0.5 and len(array):
            array[r.randrange(len(array))] = r.choice([-1, 0, 1, 5, 2**30])
        else:
            array = r.choice(
                [array[:-1], array[::-1].copy(), array.astype(np.int8), array.reshape(-1, 1), array * 0]
            )
        state[name] = array
    elif r.random() < 0.3:
        del state[name]
    else:
        state[name] = r.choice([None, "x", -1, 2**64, [], {}, math.nan, [1, 2], np.array(["x"])])
    try:
        again.load_state_dict(state)
    except ValueError:
        assert len(again) == 0, "a refused state changed the pool"
        return "refused"
    again.sync()
    assert len(again.labels()) == len(again) and ((again.labels() >= 0) & (again.labels() < 3)).all()
    again.add([[1]], [[2]], [0.5])
    again.sample(4)
    again.rounds  # noqa: B018, it may raise
    return "right"


# --- files of prompts ------------------------------------------------------------------------------

SUFFIXES = [
    "jsonl",
    "json",
    "csv",
    "tsv",
    "txt",
    "parquet",
    "jsonl.gz",
    "json.gz",
    "csv.gz",
    "txt.gz",
    "ndjson",
    "x",
]


def _parquet() -> bytes:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return b"PAR1"
    file = io.BytesIO()
    table = pyarrow.table({"prompt": ["a", "b"], "n": [1, 2], "l": [[1], []]})
    pyarrow.parquet.write_table(table, file)
    return file.getvalue()


PARQUET = _parquet()


def prompts(r: Random) -> str:
    suffix = r.choice(SUFFIXES)
    kind = r.randrange(6)
    if kind == 0:
        content = r.randbytes(r.randrange(200))
    elif kind == 1:
        content = "".join(r.choice('{}[]":,\\ \n\r\t\ufeffprompt01') for _ in range(r.randrange(80))).encode()
    elif kind == 2:
        depth = r.choice([3, 99, 100, 101, 300, 900, 990, 1000, 5000, 100_000])
        inner = r.choice(["[", '{"a":']) * depth
        content = ('{"prompt": "a", "b": ' + inner).encode()
        if r.random() < 0.8:
            content = ('{"prompt": "a", "b": ' + "[" * depth + "]" * depth + "}").encode()
    else:
        rows = []
        for _ in range(r.randrange(5)):
            row = value(r, 2) if r.random() < 0.3 else {"prompt": value(r, 1), text(r): value(r)}
            rows.append(as_json(row))
        joined = (
            "[" + ",".join(rows) + "]" if suffix.startswith("json.") or suffix == "json" else "\n".join(rows)
        )
        content = joined.encode("utf-8", "surrogatepass")
        if suffix.startswith("csv"):
            content = ('prompt,"b"\n' + "\n".join(f'"{i}",{text(r)}' for i in range(3))).encode(
                "utf-8", "replace"
            )
    if suffix == "parquet":
        content = damaged(r, PARQUET)
    if r.random() < 0.3:
        content = damaged(r, content)
    if suffix.endswith(".gz") and r.random() < 0.9:
        content = gzip.compress(content, 1)
        if r.random() < 0.3:
            content = damaged(r, content)
    path = SCRATCH / f"prompts.{suffix}"
    path.write_bytes(content)
    try:
        loaded = load_prompts(
            path, column=r.choice([None, "prompt", "b.c", text(r)]), chat=lambda _: "rendered"
        )
    except UsageError as error:
        return refused(error)
    kept = [row["prompt"] for row in loaded.rows]
    assert kept and len(set(kept)) == len(kept)
    assert all(isinstance(one, str) and one.strip() and one.encode() for one in kept)
    assert loaded.read == len(kept) + sum(loaded.left_out.values())
    # What a run does with the rows: they are written, and read again.
    folder = RunFolder(SCRATCH / "run")
    folder.path.mkdir(exist_ok=True)
    (folder / "held_out.jsonl").unlink(missing_ok=True)
    folder.append("held_out.jsonl", loaded.rows)
    again = load_prompts(folder / "held_out.jsonl")
    assert [row["prompt"] for row in again.rows] == kept
    # And its reward gets the columns.
    describe(lambda prompts, completions, **columns: [1.0] * len(prompts))(loaded.rows, kept)
    return "right"


# --- settings --------------------------------------------------------------------------------------

SETTINGS = [*Config.__dataclass_fields__, "unknown", "", "<<"]
SNIPPETS = [
    "a: &a [x]\n",
    "b: *a\n",
    "!!python/object/apply:os.system [ls]\n",
    "- 1\n",
    "? [x]\n: y\n",
    "---\n",
]
SNIPPETS += [
    "steps: !!int ''\n",
    "{a: {b: {c: d}}}\n",
    "steps: [1, 2]\n",
    "[" * 1000,
    "steps: 9" + "9" * 5000 + "\n",
]
SNIPPETS += [
    "prompts: 2020-13-45\n",
    "\t\n",
    "%YAML 9.9\n",
    "a\0b: c\n",
    "steps: 1:2:3\n",
    "'\n",
    "steps: 5 # \u2028\n",
]


def settings(r: Random) -> str:
    path = SCRATCH / "settings.yaml"
    lines = []
    for _ in range(r.randrange(5)):
        if r.random() < 0.25:
            lines.append(r.choice(SNIPPETS))
            continue
        shown = value(r, 1)
        try:
            spelled = yaml.safe_dump({r.choice(SETTINGS): shown}, allow_unicode=r.random() < 0.5)
        except (ValueError, yaml.YAMLError):
            spelled = f"{r.choice(SETTINGS)}: {text(r)}\n"
        lines.append(spelled)
    content = "".join(lines).encode("utf-8", "surrogatepass")
    path.write_bytes(damaged(r, content) if r.random() < 0.3 else content)
    try:
        made = load_config(path)
    except UsageError as error:
        return refused(error)
    made.check()
    made.save(path)
    assert load_config(path) == made, "settings that are saved come back otherwise"
    return "right"


def flags(r: Random) -> str:
    arguments: list[str] = []
    for _ in range(r.randrange(4)):
        name = r.choice([*SETTINGS[:-3], "config", "unknown"]).replace("_", r.choice("_-"))
        arguments.append(f"--{name}" if r.random() < 0.95 else text(r))
        if r.random() < 0.9:
            arguments.append(r.choice([text(r), str(r.choice(NUMBERS[:-1])), str(r.choice(NOT_FINITE)), "1"]))
    if any((a.startswith("--h") and "--help".startswith(a)) or a == "-h" for a in arguments):
        return "right"
    try:
        parse(arguments, "train").check()
    except UsageError as error:
        return refused(error)
    return "right"


# --- run folders -----------------------------------------------------------------------------------


class _Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.names: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.names |= {name for name, _ in attrs}

    handle_startendtag = handle_starttag


def _evaluation(r: Random) -> Any:
    """An evaluation with something odd in it, as a rule."""
    number = {"value": 0.5, "low": 0.4, "high": 0.6}
    change = {"difference": -0.1, "low": -0.2, "high": -0.05, "relative": -0.2, "relative_low": -0.3}
    rows: list[Any] = [
        {"name": n, "guidance": w, "metrics": {"mean": dict(number), "perplexity": dict(number)}, "change": c}
        for n, w, c in [
            ("base model", None, None),
            ("best token", 1.0, {"mean": change | {"relative_high": -0.1}}),
        ]
    ]
    made: dict[str, Any] = {"task": "toxicity", "property": "toxicity", "rows": rows, "prompts": 3}
    made |= {"samples_per_prompt": 2, "scorer": {"name": "a", "version": "1"}, "sampling": {"guidance": 1.5}}
    for _ in range(r.randrange(4)):
        _spoil_value(r, made, lambda: value(r, 2))
    for name in ("headline", "columns", "more_columns", "threshold", "level", "target"):
        if r.random() < 0.15:
            made[name] = value(r, 2)
    return made if r.random() < 0.9 else value(r)


def _spoil_value(r: Random, made: Any, other: Callable[[], Any]) -> None:
    """Another value at a place within lists and objects."""
    place = made
    while isinstance(place, dict | list) and place:
        key = r.choice(list(place)) if isinstance(place, dict) else r.randrange(len(place))
        if r.random() < 0.4 or not isinstance(place[key], dict | list):
            place[key] = other()
            return
        place = place[key]


def _folder(r: Random) -> Path:
    folder = SCRATCH / r.choice(["run", "<script>run"])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()

    def row(kind: str) -> Any:
        known = {
            "kind": kind,
            "step": r.randrange(9),
            "round": r.randrange(3),
            "loss": 0.5,
            "reward_mean": 0.1,
        }
        known |= {"reward_by_quantile": [0.1, 0.2], "thresholds": [0.1], "samples": 4, "unscored": 1}
        known |= {"prompt": "p", "completion": text(r), "reward": 0.5, "quantile": 0, "rank_correlation": 0.1}
        known |= {"row": r.choice(["base model", "best token"]), "prompt_id": r.randrange(3), "score": 0.5}
        for _ in range(r.randrange(3)):
            known[r.choice(list(known))] = value(r, 2)
        return known if r.random() < 0.9 else value(r)

    files = {
        "metrics.jsonl": [row(r.choice(["step", "round", "probe"])) for _ in range(r.randrange(6))],
        "completions.jsonl": [row("") for _ in range(r.randrange(4))],
        "evaluation.jsonl": [row("") for _ in range(r.randrange(6))],
        "evaluation.json": [_evaluation(r)],
        "versions.json": [value(r)],
        "config.yaml": [text(r)],
    }
    for name, rows in files.items():
        if r.random() < 0.1:
            continue
        if r.random() < 0.02:
            (folder / name).mkdir()
            continue
        content = "\n".join(map(as_json, rows)).encode("utf-8", "surrogatepass")
        (folder / name).write_bytes(damaged(r, content) if r.random() < 0.2 else content)
    return folder


def run_folder(r: Random) -> str:
    run = read_run(_folder(r))
    file = io.StringIO()
    console = Terminal(file=file, width=r.choice([40, 80, 200]), color_system=None)
    after = after_names(run.evaluation)
    console.print(headline(run.evaluation))
    console.print(results_table(run.evaluation))
    console.print(before_after(run.evaluation_rows, mask=r.random() < 0.5, after=after))
    console.print(text(r), Text(text(r)))
    shown = file.getvalue()
    assert shown == clean(shown), "something steers the terminal"
    table = markdown_table(run.evaluation).partition("\n\n")[0]  # notes follow
    bars = {line.replace("\\|", "").count("|") for line in table.splitlines()}
    assert len(bars) == 1, "a cell breaks the table"
    return "right"


def page(r: Random) -> str:
    """As `run_folder`, with the whole report and its plots: slow."""
    html = write_report(_folder(r)).read_text(encoding="utf-8")
    seen = _Tags(html)
    assert not seen.tags & {"script", "img", "iframe", "object", "embed", "link", "base", "form", "math"}
    assert not [name for name in seen.names if name.startswith("on")]
    assert html.count("<style") == 1 and html.count("</style") == 1
    assert html == clean(html)
    return "right"


def checkpoint(r: Random) -> str:
    """Two checkpoints, files of them changed: one as it was written is found, and nothing foreign is cut."""
    root = SCRATCH / "checkpoints"
    shutil.rmtree(root, ignore_errors=True)
    folder = RunFolder(root / "run")
    folder.path.mkdir(parents=True)
    other = root / "other.txt"
    other.write_text("untouched")
    weights = {"model": {"w": torch.arange(3.0)}}
    for step in (2, 3):
        folder.append(METRICS, [{"a": step}])
        folder.append(COMPLETIONS, [{"b": step}] * (step - 2))
        save_checkpoint(folder, {"step": step}, weights)
    written = {name: (folder / name).read_bytes() for name in (METRICS, COMPLETIONS)}
    names = ["checkpoint", "checkpoint.old"]
    for name in r.choice([names, names[:1]]):
        _spoil_checkpoint(r, folder / name, other)
    if r.random() < 0.2:
        (folder / METRICS).write_bytes(written[METRICS][: r.randrange(len(written[METRICS]))])
    said: list[str] = []
    log = logging.getLogger("quark_fast.runtime.checkpoint_files")
    log.addFilter(hear := lambda record: said.append(record.getMessage()))  # and let nothing through
    try:
        loaded = load_checkpoint(folder)
        cut_back(folder, loaded and loaded[0])
    except UsageError as error:
        assert other.read_text() == "untouched"
        return refused(error)
    finally:
        log.removeFilter(hear)
    assert other.read_text() == "untouched"
    assert all(line == clean(line) and "\n" not in line for line in said)
    assert loaded is not None and loaded[0]["step"] in (2, 3)
    assert (loaded[0]["step"] == 2) == bool(said), "the older one is used, and nothing said"
    assert torch.equal(loaded[1]["model"]["w"], weights["model"]["w"])
    for name, content in written.items():
        assert content.startswith((folder / name).read_bytes() if (folder / name).exists() else b"")
    return "right"


def _spoil_checkpoint(r: Random, folder: Path, other: Path) -> None:
    state, sums = folder / "state.json", folder / CHECKSUMS
    kind = r.randrange(5)
    if kind < 2:  # by somebody who knows the checksums
        made = json.loads(state.read_text())
        if kind == 0:
            made["sizes"][r.choice(["../other.txt", str(other), METRICS, text(r)])] = value(r, 1)
        else:
            made["sizes"] = value(r)
        state.write_text(as_json(made))
        sums.write_text(json.dumps(json.loads(sums.read_text()) | {state.name: sha256(state)}))
    elif kind == 2:
        path = r.choice(sorted(folder.iterdir()))
        path.write_bytes(damaged(r, path.read_bytes()))
    elif kind == 3:
        (folder / r.choice(["model.safetensors", "x.safetensors", "state.json"])).write_bytes(r.randbytes(99))
    else:
        sums.write_text(as_json(value(r)))


# --- models, tables of earlier evaluations ---------------------------------------------------------


SMALL: list[Any] = [None, True, 0, -1, 1, 0.5, "", "x", "../../etc/passwd", [], {}, [1], "\x1b]0;t\x07"]


@functools.cache
def _exported() -> Path:
    policy = Policy.create(save_tiny_model(SCRATCH / "tiny", "llama"), quantiles=2)
    export(policy, SCRATCH / "exported", torch.float32)
    return SCRATCH / "exported"


def model(r: Random) -> str:
    """An exported model with one or two of its files changed.

    Not by numbers that ask for a larger one: transformers makes what config.json says.
    """
    folder = SCRATCH / "model"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(_exported(), folder)
    for path in r.sample(sorted(filter(Path.is_file, folder.iterdir())), r.choice([1, 1, 2])):
        if path.suffix == ".json" and r.random() < 0.6:
            made = json.loads(path.read_text())
            _spoil_value(r, made, lambda: r.choice(SMALL))
            path.write_text(json.dumps(made))
        elif r.random() < 0.9:
            path.write_bytes(damaged(r, path.read_bytes()))
        else:
            path.unlink()
    try:
        policy = Policy.from_export(folder, torch.float32)
    except UsageError as error:
        return refused(error)
    ids = policy.conditioned(policy.encode("w1 w2 w3", 9), 0)
    assert len(policy.model(input_ids=torch.tensor([ids])).logits[0]) == len(ids)
    return "right"


def table(r: Random) -> str:
    """A table of an earlier evaluation and its samples, changed, shown alone or beside a sound one."""
    names = ["base model", text(r)]
    rows: list[Any] = [{"name": name, "guidance": None, "metrics": {}, "change": None} for name in names]
    made: dict[str, Any] = {"task": "toxicity", "property": text(r), "rows": rows, "prompts": 2}
    made |= {"samples_per_prompt": 1, "scorer": {"name": "s", "sha256": "0"}, "sampling": {"guidance": 1.5}}
    sample = asdict(Sample(0, "p", "c", 0.5, 3.0, 4, {}, 0.1, 1, 2))
    samples: list[Any] = [sample | {"row": name, "prompt_id": i} for name in names for i in range(2)]
    paths = [SCRATCH / "sound.json", SCRATCH / "table.json"]
    for path in paths:
        path.write_bytes(as_json(made).encode())
        path.with_suffix(".jsonl").write_bytes("\n".join(map(as_json, samples)).encode())
        for changed in (made, samples) * r.randrange(2):
            _spoil_value(r, changed, lambda: value(r, 1))
    if r.random() < 0.2:
        path = r.choice([paths[1], paths[1].with_suffix(".jsonl")])
        path.write_bytes(damaged(r, path.read_bytes()))
    try:
        found = Evaluator(r.choice([paths, paths[1:]])).evaluate().table
    except UsageError as error:
        return refused(error)
    file = io.StringIO()
    console = Terminal(file=file, width=80, color_system=None)
    console.print(headline(found), results_table(found))
    shown = file.getvalue() + markdown_page(found)
    assert shown == clean(shown), "something steers the terminal"
    return "right"


# --- caches ----------------------------------------------------------------------------------------


def reward_cache(r: Random) -> str:
    path = SCRATCH / "rewards.sqlite"
    for one in SCRATCH.glob("rewards.sqlite*"):
        one.unlink()
    cache = RewardCache(path)
    cache.add({b"k": 0.5, b"n": math.nan})
    cache._database.close()
    if r.random() < 0.5:
        database = sqlite3.connect(path)
        odd = r.choice(["x", b"\xff", 5, 10**12, None, math.inf, 0.25])
        database.execute("UPDATE rewards SET value = ?", (odd,))
        database.commit()
        database.close()
    else:
        path.write_bytes(damaged(r, path.read_bytes()))
    again = RewardCache(path)
    try:
        found = again.find([b"k", b"n", b"z"])
    except UsageError as error:
        return refused(error)
    finally:
        if "_database" in vars(again):
            again._database.close()
    assert all(isinstance(one, float) and not math.isinf(one) for one in found.values())
    return "right"


def terminal(r: Random) -> str:
    raw = "".join(
        r.choice(["\x1b", "\x9b", "\x9d", "[", "]", "0", ";", "m", "\x07", "\\", "P", "a", "\n"])
        for _ in range(20)
    )
    cleaned = clean(raw + text(r))
    assert clean(cleaned) == cleaned and not set(cleaned) & set("\x1b\x9b\x9d\x07\r\u202e\ud800")
    return "right"


Target = Callable[[Random], str]
# How large a part of the inputs each gets: the quick ones get more.
TARGETS: dict[str, tuple[Target, float]] = {
    "loss": (loss, 15),
    "pool": (pool, 22),
    "pool_file": (pool_file, 4),
    "prompts": (prompts, 18),
    "settings": (settings, 3),
    "flags": (flags, 1),
    "run_folder": (run_folder, 1),
    "page": (page, 0.06),
    "checkpoint": (checkpoint, 1),
    "model": (model, 1),
    "table": (table, 1),
    "reward_cache": (reward_cache, 0.5),
    "terminal": (terminal, 10.44),
}

NEVER_REFUSED = {"run_folder", "page", "terminal"}  # they show what can be read, and name the rest

# --- the long form ---------------------------------------------------------------------------------


def _work(name: str, seeds: range, pipe: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    quiet_libraries()
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    target, _ = TARGETS[name]
    for seed in seeds:
        pipe.send(("at", seed))
        begun = time.monotonic()
        try:
            outcome = target(random.Random(seed))
        except Exception:
            pipe.send(("finding", traceback.format_exc()))
            outcome = "finding"
        pipe.send(("done", outcome, time.monotonic() - begun))
    pipe.send(("end",))


def fuzz(name: str, seeds: range) -> dict[str, Any]:
    """The outcomes of a target's inputs; one that crashes or hangs is a finding, and the others go on."""
    outcomes: Counter[str] = Counter()
    findings: list[dict[str, Any]] = []
    slowest, begun = 0.0, time.monotonic()
    context = multiprocessing.get_context("fork")
    while len(seeds):
        ours, theirs = context.Pipe(duplex=False)
        worker = context.Process(target=_work, args=(name, seeds, theirs))
        worker.start()
        theirs.close()
        at, ended = seeds[0], False
        try:
            while True:
                if not ours.poll(HANG):
                    findings.append({"seed": at, "what": f"no answer in {HANG:g} s"})
                    worker.kill()
                    break
                message = ours.recv()
                if message[0] == "at":
                    at = message[1]
                elif message[0] == "finding":
                    findings.append({"seed": at, "what": message[1]})
                elif message[0] == "done":
                    outcomes[message[1]] += 1
                    slowest = max(slowest, message[2])
                else:
                    ended = True
                    break
        except EOFError:
            findings.append({"seed": at, "what": "the process died"})
        worker.join()
        seeds = range(0) if ended else range(at + 1, seeds.stop)
    return {
        "inputs": sum(outcomes.values()),
        "right": outcomes["right"],
        "refused": outcomes["refused"],
        "findings": findings,
        "slowest_s": round(slowest, 2),
        "seconds": round(time.monotonic() - begun, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=100_000, help="in all (default: 100000)")
    parser.add_argument(
        "--targets", default=",".join(TARGETS), help="names, with commas between; default: all"
    )
    parser.add_argument("--seed", type=int, default=0, help="of a target's first input (default: 0)")
    parser.add_argument("--json", help="also write the result here")
    given = parser.parse_args()
    chosen = given.targets.split(",")
    total = sum(TARGETS[name][1] for name in chosen)
    result: dict[str, Any] = {
        "command": " ".join(["python", "tests/fuzz.py", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {platform.python_version()}, torch {torch.__version__}",
        "targets": {},
    }
    for name in chosen:
        count = math.ceil(given.inputs * TARGETS[name][1] / total)
        one = fuzz(name, range(given.seed, given.seed + count))
        result["targets"][name] = one
        print(
            f"{name:12} {one['inputs']:7,} inputs, {one['right']:7,} right, {one['refused']:7,} refused,"
            f" {len(one['findings'])} findings, {one['seconds']:.0f} s, slowest {one['slowest_s']:.2f} s",
            flush=True,
        )
        for finding in one["findings"][:3]:
            print(f"  seed {finding['seed']}: {finding['what']}", flush=True)
    parts = result["targets"].values()
    result["inputs"] = sum(part["inputs"] for part in parts)
    found = sum(len(part["findings"]) for part in parts)
    print(f"{result['inputs']:,} inputs, {found} findings")
    if given.json:
        Path(given.json).write_text(json.dumps(result, indent=1) + "\n")
    return 1 if found else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    finally:
        shutil.rmtree(SCRATCH, ignore_errors=True)
