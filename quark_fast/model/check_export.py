"""Whether an export, read by plain transformers, is the policy: the same ids, the same logits."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from quark_fast.data.tokenizer import SENTENCE
from quark_fast.files.atomic import TRIAL
from quark_fast.model.check_reading import gap_of, logits_alone, tolerance_of
from quark_fast.model.copies import whole_copy
from quark_fast.model.export import write_export
from quark_fast.model.loading import load_pretrained
from quark_fast.model.policy import Policy
from quark_fast.model.wrong_model import WrongModel, blamed, wrong

TEXTS = (SENTENCE, "a", " 1 2")


def check_export(
    policy: Policy, near: Path, sampling: Mapping[str, Any], untie: bool
) -> tuple[bool, list[str]]:
    """Export into a scratch folder and have plain transformers read it: the same ids, the same logits.

    Args:
        near: an existing folder, where there will have to be room for the export anyway.
        sampling, untie: as of ``write_export``. Some models share more than a head by the setting
            that ties it; theirs then stays tied.
    Returns:
        (whether the head is to be untied, log lines where that is not as asked).
    Raises:
        WrongModel: it cannot be written or loaded, or reads a text otherwise than the policy does.
    """
    try:
        _check_export(policy, near, sampling, untie)
    except WrongModel as error:
        if not untie:
            raise
        try:
            _check_export(policy, near, sampling, untie=False)
        except WrongModel:
            raise error from None
        line = f"the export's head stays tied (--export-head tied), since otherwise the model {error.what}"
        return False, [line]
    return untie, []


def _check_export(policy: Policy, near: Path, sampling: Mapping[str, Any], untie: bool) -> None:
    trust = policy.trust_remote_code
    texts = [policy.conditioned(policy.encode(text), policy.quantiles - 1) for text in TEXTS]
    with (
        torch.no_grad(),
        # On NFS a file that is still mapped stays in its folder; an error in here may keep the model.
        tempfile.TemporaryDirectory(prefix=TRIAL, dir=near, ignore_cleanup_errors=True) as scratch,
        blamed(policy.model, "cannot be exported", scratch),
    ):
        model = whole_copy(policy, policy.stored_dtype)
        own = torch.cat([logits_alone(policy, model, ids) for ids in texts])
        write_export(policy, Path(scratch), model, sampling, untie=untie)
        del model  # not both in memory
        again, tokenizer = load_pretrained(scratch, policy.stored_dtype, trust_remote_code=trust)
        again.to(policy.model.device)
        read_as = [list(tokenizer(text).input_ids) for text in TEXTS]
        logits = torch.cat([logits_alone(policy, again, ids) for ids in texts])
        gap, tolerance = gap_of(again, logits, own), tolerance_of(again) / 2
        del again  # its weights may be mapped
    for text, found, expected in zip(TEXTS, read_as, texts, strict=True):
        if found != expected:
            kind = type(tokenizer).__name__
            raise wrong(
                policy.model,
                f"has a tokenizer whose export ({kind}) reads {text!r} as {found}, the policy as {expected}",
            )
    if gap > tolerance:
        what = f"is another model when its export is loaded: its logits differ by {gap:.1%} of their spread"
        raise wrong(policy.model, what)
