"""The kernels compiled for GPUs that are not there, by the launchers' own calls: their machine code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton

from quark_fast.ops import triton_kernels

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

pytestmark = pytest.mark.skipif(
    not all((TOOLS / tool).exists() for tool in ("cuobjdump", "nvdisasm")),
    reason="this build of Triton brings no cuobjdump and nvdisasm",
)

# Registers a thread; 65,536 of them make a multiprocessor. One wide program on each is the plan of the fused
# kernel (more would push each other's rows out of the cache): 512 threads may have 128 each. The others are
# there to keep loads on their way, by many threads: four programs of 8 warps at 64, eight of 4 warps.
MOST_REGISTERS = {
    ("row_kernel", 16): 128,
    ("row_kernel", 8): 64,
    ("partial_kernel", 4): 64,
    ("merge_kernel", 1): 64,
    ("gradient_kernel", 8): 64,
    ("gradient_kernel", 4): 64,
    ("scale_kernel", 8): 64,
}

# The kernel of each kind of case; of the others it is the fused one.
KERNELS = {"gradient": "gradient_kernel", "gradient_again": "gradient_kernel", "rescale": "scale_kernel"}


@pytest.fixture(scope="module")
def every_case() -> dict[str, dict[str, Any]]:
    """Case -> kernel -> what tests/ops/aot_kernels.py measures."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("aot_kernels.py")
    done = subprocess.run(
        [sys.executable, script, "--json"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def compiled(every_case: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The kernels of the loss."""
    return {case: kernels for case, kernels in every_case.items() if not case.startswith("tokens")}


def every_kernel(compiled: dict[str, dict[str, Any]]) -> list[tuple[str, str, dict[str, Any]]]:
    return [(case, name, found) for case, kernels in compiled.items() for name, found in kernels.items()]


def computing(found: dict[str, Any]) -> list[dict[str, int]]:
    """The loops over whole tiles: they take powers of what comes 16 bytes at a time. Others write zeros, or
    look by single columns at a row with an infinite KL again."""
    return [
        loop
        for loop in found["loops"]
        if any(op.startswith("MUFU.EX2") for op in loop) and any(re.match(r"LDG.*\.128", op) for op in loop)
    ]


def test_every_variant_compiles_to_the_kernels_of_its_plan(compiled: dict[str, dict[str, Any]]) -> None:
    assert len(compiled) >= 20
    for case, kernels in compiled.items():
        if case.endswith("split"):
            assert set(kernels) == {"partial_kernel", "merge_kernel", "gradient_kernel"}, case
        else:
            (kernel,) = kernels
            assert kernel == KERNELS.get(case.split("-")[1], "row_kernel"), case


def test_nothing_spills_and_registers_leave_room_for_the_planned_programs(
    compiled: dict[str, dict[str, Any]],
) -> None:
    for case, name, found in every_kernel(compiled):
        assert found["stack"] == 0, f"{case}, {name} spills {found['stack']} bytes a thread"
        most = MOST_REGISTERS[name, found["warps"]]
        assert found["registers"] <= most, f"{case}, {name}: {found['registers']} registers, planned {most}"


def test_of_the_fused_kernel_one_program_fits_on_a_multiprocessor(
    compiled: dict[str, dict[str, Any]],
) -> None:
    """A second one's rows would push the first's out of the cache before they are read again. The sampled KL
    reads the policy's rows alone again, of which two are no more than one pair."""
    shared = {"sm80": 164 << 10, "sm90": 228 << 10}
    found = [(c, kernel) for c, name, kernel in every_kernel(compiled) if name == "row_kernel"]
    fused = [(case, kernel) for case, kernel in found if "one_pass" in case and "sampled" not in case]
    assert len(fused) >= 9
    for case, kernel in fused:
        by_registers = 65536 // (kernel["registers"] * 32 * kernel["warps"])
        by_shared = shared[case[:4]] // (kernel["shared"] + 1024)
        assert min(by_registers, by_shared) == 1, (
            f"{case}: {by_registers} by registers, {by_shared} by shared"
        )


def test_loops_over_a_row_load_and_store_16_bytes(
    compiled: dict[str, dict[str, Any]],
) -> None:
    for case, name, found in every_kernel(compiled):
        loops = computing(found)
        expected = {
            "row_kernel": 2 if "one_pass" in case else 1,
            "merge_kernel": 0,
            "scale_kernel": 0,  # it computes nothing, and moves single numbers side by side
        }.get(name, 1)
        assert len(loops) == expected, f"{case}, {name}: {len(loops)} loops"
        for loop in loops:
            # The fused kernel's tiles come through shared memory, where a thread finds what it has asked for.
            fused = name == "row_kernel" and "one_pass" in case
            assert any(op.startswith("LDGSTS") for op in loop) == fused, f"{case}, {name}"
            sums = [
                op for op in loop if re.match("SHFL|STS|RED|ATOM" if fused else "SHFL|STS|RED|ATOM|BAR", op)
            ]
            assert not sums, f"{case}, {name}: threads add up within the loop: {sums}"
            moves = [op for op in loop if re.match("LDG|STG", op) and op != "LDGDEPBAR"]
            narrow = [op for op in moves if not op.endswith(".128")]
            # Half of the bytes of a float32 policy's columns are 8 in a bfloat16 reference.
            if "float32-bfloat16" in case:
                narrow = [op for op in narrow if not op.endswith(".64")]
            assert not narrow, f"{case}, {name}: {narrow}"
            stores = loop.get("STG.E.128", 0)
            assert (stores > 0) == (name == "gradient_kernel" or loop is not loops[0]), f"{case}, {name}"


def test_a_loop_issues_few_instructions_an_element(compiled: dict[str, dict[str, Any]]) -> None:
    """An H100 issues some 57 instructions an element in the time of 6 bytes of HBM, the least traffic of
    bfloat16; both loops together must stay well below. A thread takes 16 columns a turn, 8 of float32."""
    for case, name, found in every_kernel(compiled):
        total = sum(sum(loop.values()) for loop in computing(found))
        each = total / (8 if "float32" in case else 16)
        # Of float32, there are twice as many bytes.
        assert each <= (60 if "float32" in case else 45), (
            f"{case}, {name}: {each:.1f} instructions an element"
        )


def test_the_kernel_from_logits_to_tokens_spills_nothing_and_reads_16_bytes_at_a_time(
    every_case: dict[str, dict[str, Any]],
) -> None:
    found = {case: kernels for case, kernels in every_case.items() if case.startswith("tokens")}
    assert len(found) == 14
    for case, kernels in found.items():
        (kernel,) = kernels.values()
        assert kernel["stack"] == 0, f"{case} spills {kernel['stack']} bytes a thread"
        if "float32" in case:  # of an odd vocabulary
            continue
        # Two programs of 8 warps on a multiprocessor: 128 rows or more keep all of them busy.
        assert kernel["registers"] <= 128, f"{case}: {kernel['registers']} registers"
        # The nucleus of the best stream is looked for first.
        streams = 1 if case.endswith("of-best") else int(case.split("-")[2])
        first = next(loop for loop in kernel["loops"] if any(op.startswith("LDG") for op in loop))
        assert first["LDG.E.128"] == 2 * streams and first.get("LDG.E", 0) == 0, f"{case}: {first}"


def test_the_fused_kernel_takes_more_than_half_of_any_multiprocessor_s_shared_memory() -> None:
    """Of an RTX 30 or 40, an A100 and an H100, where pairs of rows are read again; or of rows alone."""
    tile = 32 << 10
    for kilobytes in (100, 164, 228):
        used = (triton_kernels.fused_stages(kilobytes << 10, pairs=True) - 1) * tile
        assert (kilobytes << 10) // 2 < used + 1024 <= kilobytes << 10, kilobytes
        assert triton_kernels.fused_stages(kilobytes << 10, pairs=False) == 3
    assert triton_kernels.fused_stages(0, pairs=True) == 1
