"""Samples of the untouched model, kept on disk for all runs that ask for the same."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any

from quark_fast.files.atomic import replacing
from quark_fast.model.policy import Policy
from quark_fast.rollout.sampling import Conditioning, Sampling, batches
from quark_fast.rollout.transformers import sample


class UntouchedSamples:
    """``rollout.sample`` for a model that stays as it is: what it wrote once is read, not sampled again.

    The samples follow from the arguments alone, no training and no number of quantiles has a say, so a run
    gets the very ids that it would have sampled itself. A file is there whole or not at all.

    Args:
        folder: where the files are, one for each call; made with the first.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(
        self,
        policy: Policy,
        model: Any,
        prompts: Sequence[Sequence[int]],
        conditioning: Conditioning,
        sampling: Sampling,
        samples: int,
        seed: int,
        share: tuple[int, int] = (0, 1),
        done: Container[int] = (),
    ) -> Iterator[tuple[list[int], list[list[list[int]]]]]:
        asked = {
            "model": [model.config.name_or_path, str(model.dtype), str(model.device)],
            "prefix": policy.prefix,
            "vocabulary": policy.vocabulary,
            "stop": policy.stop_ids,
            "conditioning": dataclasses.asdict(conditioning),
            "prompts": [list(ids) for ids in prompts],
            "sampling": dataclasses.asdict(sampling),
            "samples": samples,
            "seed": seed,
        }
        if share != (0, 1):
            asked["share"] = share
        path = self.folder / f"{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]}.jsonl"
        places = [place for place, _ in batches(prompts, sampling, samples, share)]
        if path.exists():
            for place, line in zip(places, path.read_text().splitlines(), strict=True):
                if place not in done:
                    indices, completions = json.loads(line)
                    yield indices, completions
            return
        lines = []
        for batch in sample(policy, model, prompts, conditioning, sampling, samples, seed, share, done):
            lines.append(json.dumps(batch))
            yield batch
        if len(lines) < len(places):
            return  # the others were kept by the run that was killed: no file without them
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as scratch:
            scratch.write_text("".join(f"{line}\n" for line in lines))
