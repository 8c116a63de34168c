"""Samples of the base model, kept on disk for all runs that ask for the same."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

from quark_fast.files.atomic import replacing
from quark_fast.model.policy import Policy
from quark_fast.rollout.sampling import DrawnBatch, SampleRequest
from quark_fast.rollout.transformers import sample


class SharedSamples:
    """``sample`` for a model that stays as it is: what was written once is read, not sampled again.

    The samples follow from the arguments alone. Neither training nor the number of quantiles changes them,
    so a run gets the very ids that it would have sampled itself. A file is there whole or not at all.

    Args:
        folder: where the files are, one for each request; made with the first.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(
        self, policy: Policy, model: Any, request: SampleRequest, done: Container[int] = ()
    ) -> Iterator[DrawnBatch]:
        path = self.folder / f"{_digest(policy, model, request)}.jsonl"
        batches = request.batches()
        if path.exists():
            for (number, _), line in zip(batches, path.read_text(encoding="utf-8").splitlines(), strict=True):
                if number not in done:
                    yield DrawnBatch(*json.loads(line))
            return
        lines = []
        for batch in sample(policy, model, request, done):
            lines.append(json.dumps(batch))
            yield batch
        if len(lines) < len(batches):
            return  # the others were kept by the run that was killed: no file without them
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as scratch:
            scratch.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _digest(policy: Policy, model: Any, request: SampleRequest) -> str:
    """Of all that the samples follow from."""
    asked = {
        "model": [model.config.name_or_path, str(model.dtype), str(model.device)],
        "prefix": policy.prefix,
        "vocabulary": policy.vocabulary,
        "stop": policy.stop_ids,
        **dataclasses.asdict(request),
    }
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]
