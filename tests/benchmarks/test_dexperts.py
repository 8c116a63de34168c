"""benchmarks/dexperts.py mixes three models as its equation says, with their caches and without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import sharpen

from quark_fast.model.copies import frozen_copy
from quark_fast.model.policy import Policy
from quark_fast.rollout.sampling import Conditioning, SampleRequest, Sampling
from quark_fast.rollout.transformers import sample


@pytest.mark.parametrize("top_p", [1.0, 0.5])
@pytest.mark.parametrize("alpha", [0.0, 1.5])
def test_mixture_of_three_models_samples_what_whole_forward_passes_say(
    tiny_model: Callable[..., Path], from_benchmarks: Callable[[str], ModuleType], alpha: float, top_p: float
) -> None:
    policy = Policy.create(tiny_model(), quantiles=2)
    models = [frozen_copy(policy, torch.float32) for _ in range(3)]
    for place, model in enumerate(models):
        sharpen(model)
        with torch.no_grad():
            model.lm_head.weight.mul_(1 + place / 3)
    prompts = [[1, 2, 3], [4, 5]]
    mixed = from_benchmarks("dexperts").Mixture(*models, alpha, top_p)
    greedy = Sampling(max_new_tokens=5, min_new_tokens=5, temperature=0.0, rows=4)
    drawn = {
        i: group
        for places, groups, *_ in sample(policy, mixed, SampleRequest(prompts, Conditioning(), greedy, 2, 0))
        for i, group in zip(places, groups, strict=True)
    }
    for i, prompt in enumerate(prompts):
        ids = [*policy.prefix, *prompt]
        for _ in range(5):
            base, expert, anti = (
                model(torch.tensor([ids])).logits[0, -1, : policy.vocabulary].log_softmax(-1)
                for model in models
            )
            scores = base + alpha * (expert - anti)
            falling = base.exp().sort(descending=True).values
            scores[base.exp() < falling[falling.cumsum(0) >= top_p - 1e-6][0]] = -torch.inf
            scores[policy.stop_ids] = -torch.inf  # blocked for the first five tokens
            ids.append(int(scores.argmax()))
        assert drawn[i] == [ids[-5:]] * 2
