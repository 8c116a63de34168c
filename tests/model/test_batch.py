"""From samples to tensors: the layout, and the logits of completions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import WORDS, lively_policy

from quark_fast.model.batch import completion_logits, make_batch
from quark_fast.model.policy import Policy
from quark_fast.model.reading import Reading

ARCHITECTURES = ["gpt2", "llama", "qwen2"]
CPU = torch.device("cpu")

Make = Callable[..., Path]


def test_layout_by_hand(tiny_model: Make) -> None:
    policy = Policy.create(tiny_model(), quantiles=3)
    end, rewards = WORDS, policy.reward_ids
    batch = make_batch(policy, [[1, 2], [3]], [[4], [5, 6, end]], [2, None], CPU)
    assert batch.ids.tolist() == [
        [end, rewards[2], 1, 2, 4, 0, 0],
        [0, 0, end, 3, 5, 6, end],
    ]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1]]
    assert batch.labels.tolist() == [[4, 0, 0], [5, 6, end]]
    # The end of text is a target though it is also what other libraries pad with.
    assert batch.mask.tolist() == [[True, False, False], [True, True, True]]


PROMPTS = [[1, 2, 3, 4, 5, 6], [7], [8, 9, 10], [], [11]]
COMPLETIONS = [[12], [13, 14, 15, 16, WORDS], [17, 18], [19, 20, 21], [0, 0, 0]]
QUANTILES = [0, 2, None, 1, 2]


@pytest.mark.parametrize("padding", [True, False])
@pytest.mark.parametrize("attention", ["quark_grouped", "sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_and_gradients_are_those_of_each_sequence_alone(
    tiny_model: Make, architecture: str, attention: str, padding: bool
) -> None:
    policy = lively_policy(tiny_model(architecture, padded_vocabulary=10))
    policy.reading = Reading(padding=padding)
    parameters = list(policy.model.parameters())

    policy.model.set_attn_implementation(attention)
    batch = make_batch(policy, PROMPTS, COMPLETIONS, QUANTILES, CPU, prompts_too=True)
    assert list(batch.prompt_lengths) == [5, 0, 2, 0, 0]
    every = completion_logits(policy.model, batch)
    prompts, logits = every[:, :5], every[:, 5:]
    assert logits.shape[:2] == batch.labels.shape
    own = [prompts[row, :count].tanh().sum() for row, count in enumerate(batch.prompt_lengths)]
    score = (logits * batch.mask.unsqueeze(-1)).tanh().sum() + sum(own)
    together = torch.autograd.grad(score, parameters)

    policy.model.set_attn_implementation("eager")
    total = logits.new_zeros(())
    for row, (prompt, completion, k) in enumerate(zip(PROMPTS, COMPLETIONS, QUANTILES, strict=True)):
        context = policy.conditioned(prompt, k)
        whole = policy.model(torch.tensor([context + completion])).logits[0]
        alone = whole[len(context) - 1 : -1]
        # float32 logits up to 10 by other kernels; a shifted position or a read padding makes 0.1 and more.
        torch.testing.assert_close(logits[row, : len(completion)], alone, rtol=0, atol=1e-4)
        total = total + alone.tanh().sum()
        for back in range(max(0, len(prompt) - 1)):  # what predicts the prompt's last token, and so on
            predicting = whole[len(context) - 2 - back]
            torch.testing.assert_close(prompts[row, back], predicting, rtol=0, atol=1e-4)
            total = total + predicting.tanh().sum()
    for ours, expected in zip(together, torch.autograd.grad(total, parameters), strict=True):
        scale = float(expected.abs().max())
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4 * scale + 1e-6)


def test_head_runs_on_completion_positions_alone(tiny_model: Make) -> None:
    policy = Policy.create(tiny_model(), quantiles=3)
    rows = []
    policy.model.get_output_embeddings().register_forward_hook(lambda m, given, out: rows.append(out.shape))
    batch = make_batch(policy, PROMPTS, COMPLETIONS, QUANTILES, CPU)
    completion_logits(policy.model, batch)
    assert [shape[:2] for shape in rows] == [batch.labels.shape]
