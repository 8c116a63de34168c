"""Compile the kernels of loss and sampling for GPUs that are not there, by their launchers; read the code.

    python tests/ops/aot_kernels.py

prints a table; `--json` prints the measurements of every kernel, which test_triton_aot.py judges. It needs
a Triton that does not interpret, so that the tests run it in a process of its own.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from quark_fast.ops import token_kernel, triton_kernels
from quark_fast.ops.rows import Nucleus
from quark_fast.ops.triton_kernels import Blocking

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


SHARED = {80: 164 << 10, 90: 228 << 10}  # bytes of a multiprocessor of an A100, and of an H100


def cut_for(what: str, dtype: torch.dtype, kl: str, arch: int) -> Blocking:
    """What `blocking` chooses for many rows."""
    per_thread = 32 // dtype.itemsize
    if what == "one_pass":
        stages = triton_kernels.fused_stages(SHARED[arch], pairs=kl != "sampled")
        return Blocking(splits=1, warps=16, per_thread=per_thread, stages=stages)
    return Blocking(splits=1, warps=8, per_thread=per_thread)


SPLIT = Blocking(splits=12, warps=4, per_thread=16)  # for few rows


class NoGpu:
    """As much of a driver as compiling asks for."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # the key of Triton's cache of kernels

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled_by(arch: int, call: Any) -> dict[str, Any]:
    """The kernels that a call of a launcher would run, by name."""
    kernels = {}

    def record(self: triton.JITFunction, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            kernels[self.__name__.strip("_")] = self.run(*args, grid=grid, warmup=True, **kwargs)

        return launch

    triton.runtime.driver.set_active(NoGpu(arch))
    triton.JITFunction.__getitem__ = record
    call()
    return kernels


def measurements(kernel: Any) -> dict[str, Any]:
    """Registers, bytes of stack (spills) and of shared memory, and the instructions of each loop."""
    found = disassembled(kernel.asm["cubin"])
    return {**found, "shared": kernel.metadata.shared, "warps": kernel.metadata.num_warps}


@functools.cache  # some variants have kernels in common
def disassembled(cubin: bytes) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.check_output([TOOLS / "cuobjdump", "-res-usage", file.name], text=True)
        code = subprocess.run(
            [TOOLS / "nvdisasm", "-c", "-ndf", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    instructions: list[str] = []
    labels, loops = {}, []
    for line in code.splitlines():
        if label := re.match(r"\s*\.(L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(.*?);", line):
            instructions.append(instruction[1])
            target = re.match(r"BRA.*`\(\.(L_x_\d+)\)", instruction[1])
            # A jump back; a jump to itself ends the program.
            if target and labels.get(target[1], len(instructions)) < len(instructions) - 1:
                loops.append(Counter(i.split()[0] for i in instructions[labels[target[1]] :]))
    return {
        "registers": int(registers),
        "stack": int(stack),
        "loops": loops,
        "instructions": len(instructions),
    }


def launch(
    what: str,
    dtype: torch.dtype,
    kl: str,
    vocab: int,
    width: int,
    cut: Blocking | None = None,
    ref_dtype: torch.dtype | None = None,
    first: int = 0,
    *,
    arch: int,
) -> None:
    """One call of a launcher, on 3 rows of `width` columns, `first` elements behind 16 whole bytes."""
    logits, ref = (
        torch.empty(first + 3 * width, dtype=kind)[first:].view(3, width)
        for kind in (dtype, ref_dtype or dtype)
    )
    labels, weights = torch.zeros(3, dtype=torch.long), torch.ones(3)
    options = (vocab, 0.05, 0.06, kl)
    cut = cut or cut_for(what, dtype, kl, arch)
    if what == "one_pass":
        triton_kernels.forward(logits, ref, labels, weights, *options, grad=logits, cut=cut)
    elif what == "sums":
        triton_kernels.forward(logits, ref, labels, weights, *options, cut=cut)
    elif what == "rescale":
        triton_kernels.rescale(logits, torch.tensor(1.0))
    else:
        stats = torch.empty(3, triton_kernels.STATS_PER_ROW)
        triton_kernels.backward(
            *(torch.tensor(1.0), stats, logits, ref, labels, weights, *options),
            grad=logits,
            unless_one=what == "gradient_again",
            cut=cut,
        )


def cases() -> dict[str, tuple[int, dict[str, Any]]]:
    """The variants that matter, by name: architecture, arguments of launch."""
    found: dict[str, tuple[int, dict[str, Any]]] = {}

    def add(arch: int, **arguments: Any) -> None:
        words = [str(v).removeprefix("torch.") for k, v in arguments.items() if k != "cut"]
        found["-".join([f"sm{arch}", *words, "split" if arguments.get("cut") else "rows"])] = arch, arguments

    bf16 = torch.bfloat16
    for dtype in (bf16, torch.float16, torch.float32):
        for kl in ("policy_ref", "ref_policy", "sampled"):
            add(90, what="one_pass", dtype=dtype, kl=kl, vocab=50257, width=50257)
    for what in ("one_pass", "sums", "gradient"):
        add(90, what=what, dtype=bf16, kl="policy_ref", vocab=49152, width=49152)
        add(90, what=what, dtype=bf16, kl="policy_ref", vocab=50257, width=50264)
        add(80, what=what, dtype=bf16, kl="policy_ref", vocab=50257, width=50257)
    for kl in ("ref_policy", "sampled"):
        add(80, what="one_pass", dtype=bf16, kl=kl, vocab=50257, width=50257)
    add(80, what="one_pass", dtype=torch.float32, kl="policy_ref", vocab=50257, width=50257)
    for arch in (80, 90):
        # What a backward does whose scale may be 1.
        add(arch, what="gradient_again", dtype=bf16, kl="policy_ref", vocab=50257, width=50257)
        for dtype in (bf16, torch.float32):
            add(arch, what="rescale", dtype=dtype, kl="policy_ref", vocab=49152, width=49152)
    for kl in ("policy_ref", "ref_policy", "sampled"):
        add(90, what="one_pass", dtype=bf16, kl=kl, vocab=50257, width=50257, cut=SPLIT)
        add(90, what="sums", dtype=bf16, kl=kl, vocab=50257, width=50257)
        add(90, what="gradient", dtype=bf16, kl=kl, vocab=50257, width=50257)
    add(90, what="one_pass", dtype=bf16, kl="policy_ref", vocab=50257, width=50257, first=5)
    mixed = {"dtype": torch.float32, "ref_dtype": bf16}
    # Of 50,257 columns the second loop has 12 turns of 4096, which the compiler writes out.
    add(90, what="one_pass", kl="policy_ref", vocab=128257, width=128264, **mixed)
    return found


def sample(
    dtype: torch.dtype,
    vocab: int,
    streams: int,
    greedy: bool,
    suppressed: int = 1,
    told: bool = False,
    nucleus_of: int = -1,
) -> None:
    """One call of the launcher that goes from logits to tokens, on 3 rows."""
    logits, ids = torch.empty(3 * streams, vocab, dtype=dtype), torch.zeros(suppressed, dtype=torch.long)
    uniform = None if greedy else torch.rand(3, token_kernel.DRAWS)
    log_p = torch.empty(3) if told else None
    nucleus = Nucleus(0.9, nucleus_of)
    token_kernel.sample_tokens(logits, torch.ones(streams), ids, nucleus, uniform, vocab, log_p=log_p)


def token_cases() -> dict[str, tuple[int, dict[str, Any]]]:
    """The same for the arguments of sample."""
    found: dict[str, tuple[int, dict[str, Any]]] = {}
    for arch in (80, 90):
        for streams, greedy in ((1, False), (2, False), (1, True)):
            options = {"streams": streams, "greedy": greedy}
            name = f"tokens-sm{arch}-{streams}-{'greedy' if greedy else 'nucleus'}"
            found[name] = arch, {"dtype": torch.bfloat16, "vocab": 49152, **options}
            if not greedy:
                found[f"{name}-told"] = arch, {**found[name][1], "told": True}
        of_best = {"streams": 2, "greedy": False, "nucleus_of": 0, "told": True}
        found[f"tokens-sm{arch}-2-of-best"] = arch, {"dtype": torch.bfloat16, "vocab": 49152, **of_best}
        wide = {"dtype": torch.float32, "vocab": 50257, "streams": 2, "greedy": False}
        found[f"tokens-sm{arch}-2-float32"] = arch, wide
    return found


def main() -> None:
    results = {}
    every = [(launch, case, arch, {**arguments, "arch": arch}) for case, (arch, arguments) in cases().items()]
    every += [(sample, case, *one) for case, one in token_cases().items()]
    for call, case, arch, arguments in every:
        kernels = compiled_by(arch, lambda call=call, arguments=arguments: call(**arguments))
        results[case] = {name: measurements(kernel) for name, kernel in kernels.items()}
    if "--json" in sys.argv:
        print(json.dumps(results))
        return
    for case, kernels in results.items():
        print(case)
        for name, found in kernels.items():
            print("   ", name, {k: v for k, v in found.items() if k != "loops"})
            for loop in found["loops"]:
                if wide := {k: v for k, v in loop.items() if re.match("LDG|STG|LDS|STS|SHFL|BAR|MUFU", k)}:
                    print("        loop of", sum(loop.values()), wide)


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    main()
