"""Plants bugs in a copy of the pool's C++ core, one at a time, and requires that its checks see each.

usage: python tests/mutate_pool.py    CXX chooses the compiler; exits 1 if a bug goes unseen
"""

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
CORE = HERE.parent / "csrc"

# what goes wrong, the source as it is, and as it would be wrong
PLANTED = [
    (
        "the last sample of a quantile's slice of a run is never drawn",
        "members.append(runs_[r]->begin() + first, end - first);",
        "members.append(runs_[r]->begin() + first, end - first - (end - first > 1));",
    ),
    (
        "the last sample of the whole quantile is never drawn",
        "members[random.below(members.size())];",
        "members[random.below(members.size() > 1 ? members.size() - 1 : 1)];",
    ),
    (
        "a slice begins with its neighbour's last sample",
        "members.append(runs_[r]->begin() + first, end - first);",
        "members.append(runs_[r]->begin() + first - (first > 0), end - first);",
    ),
    (
        "some are drawn twice as often, by the remainder of a division",
        "if (x < n) return x;",
        "return x % n;",
    ),
    (
        "an epoch leaves its last sample out",
        "while (x >= n) x = bijection.forward(x);",
        "while (x >= n) x = bijection.forward(x) % (n - (n > 1));",
    ),
    (
        "a cut is rounded down",
        "(j * n + k - 1) / k",
        "(j * n) / k",
    ),
    (
        "what ties with a boundary is drawn from the worse quantile",
        "split = std::move(reaches ? block.end : block.begin);",
        "reaches ? void() : void(split = std::move(block.begin));",
    ),
    (
        "a block of equal rewards goes where its best lies",
        "return 2 * cut >= 2 * better + equal;",
        "return cut > better;",
    ),
    (
        "the middle of a block is rounded",
        "return 2 * cut >= 2 * better + equal;",
        "return cut >= better + equal / 2;",
    ),
    (
        "the lowest reward may stand above the worst quantile",
        "if (equal < n && better + equal == n) return false;",
        "",
    ),
    (
        "the highest reward may stand below the best quantile",
        "if (equal < n && better == 0) return true;",
        "",
    ),
    (
        "of a block's samples the first of each run is not seen",
        "std::lower_bound(low, run.begin() + at, first)",
        "std::upper_bound(low, run.begin() + at, first)",
    ),
    (
        "the merge takes the worse of two",
        "const bool b_first = item_b < item_a;",
        "const bool b_first = item_a < item_b;",
    ),
]


COMPILE = [os.environ.get("CXX", "c++"), "-std=c++17", "-O1", "-pthread"]


def seen(mutant: str, driver: Path) -> str:
    """What the checks, compiled before as ``driver``, say of the mutant; empty: they pass."""
    with tempfile.TemporaryDirectory() as scratch:
        core, program = Path(scratch, "quantile_pool.cpp"), Path(scratch, "check")
        core.write_text(mutant)
        subprocess.run([*COMPILE, f"-I{CORE}", core, driver, "-o", program], check=True)
        try:
            done = subprocess.run([program, "1"], capture_output=True, text=True, timeout=120)
        except subprocess.TimeoutExpired:
            return "never ends"
    return "" if done.returncode == 0 else done.stderr.strip() or f"ends by signal {-done.returncode}"


def main() -> int:
    source = (CORE / "quantile_pool.cpp").read_text()
    for what, right, _ in PLANTED:
        if source.count(right) != 1:
            print(f"{right!r} stands {source.count(right)} times in quantile_pool.cpp: {what}")
            return 1
    mutants = [source, *(source.replace(right, wrong) for _, right, wrong in PLANTED)]
    unseen = 0
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(cores) as checks:
        driver = Path(scratch, "driver.o")
        subprocess.run([*COMPILE, "-c", HERE / "sanitize_pool.cpp", "-o", driver], check=True)
        messages = checks.map(lambda mutant: seen(mutant, driver), mutants)
        if message := next(messages):
            print(f"without a planted bug: {message}")
            return 1
        for (what, _, _), message in zip(PLANTED, messages, strict=True):
            unseen += not message
            print(f"{'seen' if message else 'UNSEEN'}: {what}: {message}", flush=True)
    return 1 if unseen else 0


if __name__ == "__main__":
    sys.exit(main())
