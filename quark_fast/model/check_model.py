"""Whether a model can be trained here: everything is tried out when it is loaded, before any long work."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from torch import Tensor

from quark_fast.model.batch import Counts
from quark_fast.model.check_export import check_export
from quark_fast.model.check_reading import LONGEST, SHORT, Trial, check_decoding, check_policy
from quark_fast.model.copies import frozen_copy
from quark_fast.model.loading import first_line
from quark_fast.model.lora import has_adapters
from quark_fast.model.policy import Policy
from quark_fast.model.reading import Reading
from quark_fast.model.wrong_model import blamed, wrong
from quark_fast.runtime.memory import OutOfMemory, within_memory

# (prompts, completions, quantiles, counts of the batch) -> the loss of a training step, and its terms.
Loss = Callable[
    [Sequence[Sequence[int]], Sequence[Sequence[int]], Sequence[int], Counts],
    tuple[Tensor, dict[str, Any]],
]


@dataclass(frozen=True)
class Checked:
    """The outcome of a check: whether an export's head is to be untied, and lines for the user."""

    untie: bool
    lines: list[str]


def check_model(
    policy: Policy,
    reference: Any,
    near: Path | None,
    sampling: Mapping[str, Any],
    *,
    untie: bool,
    longest: int = SHORT,
    objective: Callable[[], Loss] | None = None,
    notes: Path | None = None,
) -> Checked:
    """Check a policy that is to be trained, and what will be exported of it.

    Args:
        near, sampling, untie: as of ``check_export``; without ``near`` the export is not checked.
        longest: of the prompts, tokens; on a CPU no more than ``LONGEST`` are tried.
        objective: makes the training objective, with which a step is tried out.
        notes: a folder for a note that this model passed without remarks; then it is not checked again.
    Raises:
        WrongModel: it cannot be read right, trained or exported.
        OutOfMemory: not even that fits.
    """
    started = time.monotonic()
    if policy.model.device.type == "cpu":
        longest = min(longest, LONGEST)
    made_of = (sorted(sampling.items()), untie, longest)
    note = None if notes is None else notes / f"model-{_fingerprint(policy, reference, made_of)}"
    if note is not None and note.exists():
        return Checked(untie, ["model checked before, with the same versions"])
    try:
        remarks = check_policy(policy, reference, longest)
        if objective is not None:
            _check_step(policy, reference, objective)
        if near is not None:
            untie, more = check_export(policy, near, sampling, untie)
            remarks += more
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"the memory does not hold a few short texts ({first_line(error)}); give a smaller --model, or"
            " --lora-rank"
        ) from error
    if note is not None and near is not None and not remarks and policy.reading == Reading():
        with contextlib.suppress(OSError):  # a cache that cannot be written: it is checked each time
            note.parent.mkdir(parents=True, exist_ok=True)
            note.touch()
    seconds = f"model checked in {time.monotonic() - started:.1f} s"
    return Checked(untie, [f"{seconds}: {policy.reading}", *remarks] if not remarks else [seconds, *remarks])


def _fingerprint(policy: Policy, reference: Any, more: Any) -> str:
    """Of all that a check depends on but the model's files: the package's sources, versions, settings."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(file.read_bytes())
    versions = (torch.__version__, transformers.__version__, tokenizers.__version__)
    kind = [
        (model.dtype, model.device.type, model.config._attn_implementation, has_adapters(model))
        for model in (policy.model, reference)
    ]
    made = (policy.prefix, policy.reward_ids, policy.stored_dtype, more)
    digest.update(repr((versions, kind, made)).encode())
    return digest.hexdigest()[:16]


@torch.enable_grad()
def _check_step(policy: Policy, reference: Any, objective: Callable[[], Loss]) -> None:
    """Try out a training step in its precision, and a copy for sampling after it, as every round has."""
    best = policy.quantiles - 1
    probe = Trial.of(policy, [best, 0, best // 2])
    completions = [first for first, *_ in probe.continuations]
    quantiles = [k for k in probe.quantiles if k is not None]

    def step(size: int) -> Tensor:
        some = slice(0, size)
        prompts, written = probe.prompts[some], completions[some]
        loss, _ = objective()(prompts, written, quantiles[some], Counts.of(prompts, written))
        # Through all layers, but with no gradient kept of any weight but the reward tokens'.
        torch.autograd.grad(loss, [policy.model.get_input_embeddings().rows])
        return loss.detach()

    with blamed(reference, "cannot be trained"):
        loss, _ = within_memory(step, len(quantiles), lambda _: None)
        copied = frozen_copy(policy, reference.dtype)
    if not bool(loss.isfinite()):
        raise wrong(reference, "cannot be trained: the loss of a step is NaN or infinite")
    check_decoding(policy, copied, [best, 0, None])
