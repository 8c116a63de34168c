"""A micro-batch's loss: from hidden states as from whole logits, and which of the two a model gets."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import sharpen, word_tokenizer
from torch import Tensor

from quark_fast.config import Config
from quark_fast.model.batch import Counts
from quark_fast.model.loading import load_pretrained
from quark_fast.model.policy import Policy
from quark_fast.training.objective import Objective, read_terms
from quark_fast.training.trainer import Trainer

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8], [9, 10]]
COMPLETIONS = [[11, 12], [13, 14, 15, 16, 17], [18], [19, 20, 60]]
QUANTILES = [0, 2, 1, 2]


def lengths(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def objective(source: Path, **settings: Any) -> Objective:
    policy = Policy.create(source, quantiles=3)
    sharpen(policy.model)
    reference, _ = load_pretrained(source, torch.float32)
    config = Config(**({"kl_coef": 0.5, "entropy_coef": 0.1} | settings))
    return Objective(
        config, policy, reference.requires_grad_(False), torch.device("cpu"), contextlib.nullcontext
    )


def gradients(of: Objective) -> tuple[dict[str, float], dict[str, Tensor]]:
    of.policy.model.zero_grad()
    loss, terms = of(PROMPTS, COMPLETIONS, QUANTILES, Counts(tokens=20, samples=6, prompt_tokens=9))
    terms = read_terms([terms])
    assert terms["loss"] == loss.item()
    loss.backward()
    return terms, {n: p.grad.clone() for n, p in of.policy.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("contrast_coef", "contrast_with"), [(0.0, "both"), (0.7, "mirror"), (0.7, "base"), (0.7, "both")]
)
@pytest.mark.parametrize("kl_coef", [0.0, 0.5])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
def test_chunks_of_hidden_states_give_what_whole_logits_give(
    tiny_model: Callable[..., Path],
    architecture: str,
    kl_coef: float,
    contrast_coef: float,
    contrast_with: str,
) -> None:
    """Own head, tied head, tied head with a padded table."""
    source = tiny_model(architecture, padded_vocabulary=7)
    contrast = {"contrast_coef": contrast_coef, "contrast_with": contrast_with, "contrast_margin": 2.0}
    of = objective(source, kl_coef=kl_coef, prompt_kl_coef=0.3 * bool(contrast_coef), **contrast)
    assert of.heads is not None
    ours, ours_grads = gradients(of)
    of.heads = None
    whole, whole_grads = gradients(of)
    assert ours == pytest.approx(whole, rel=1e-5, abs=1e-6)
    base = bool(contrast_coef) and contrast_with != "mirror"
    assert ours.get("kl", 1.0) > 0.01
    assert ours.keys() == {"nll", "entropy", "loss"} | (
        ({"kl"} if kl_coef or contrast_coef else set())  # wherever the reference is read
        | ({"contrast", "prompt_kl"} if contrast_coef else set())
        | ({"base_contrast", "mirror_kl"} if base else set())
    )
    weighted = ours["nll"] + kl_coef * (ours.get("kl", 0) + ours.get("mirror_kl", 0)) - 0.1 * ours["entropy"]
    compared = (contrast_with != "base") * ours.get("contrast", 0) + ours.get("base_contrast", 0)
    on_prompts = 0.3 * 2 * ours.get("prompt_kl", 0)  # under each of the two tokens
    assert ours["loss"] == pytest.approx(weighted + 2 * contrast_coef * compared + on_prompts, rel=1e-5)
    assert ours_grads.keys() == whole_grads.keys()
    for name, grad in whole_grads.items():
        scale = grad.abs().max().item()
        torch.testing.assert_close(ours_grads[name], grad, rtol=1e-4, atol=1e-5 * scale + 1e-9)


@pytest.mark.parametrize("kl", ["policy_ref", "ref_policy"])
@pytest.mark.parametrize("contrast_coef", [0.0, 0.7])
@pytest.mark.parametrize("whole_logits", [False, True])
def test_prompts_are_held_behind_their_first_token_under_every_token_that_is_read(
    tiny_model: Callable[..., Path], kl: str, contrast_coef: float, whole_logits: bool
) -> None:
    source, settings = tiny_model(), {"kl_coef": 0.0, "contrast_coef": contrast_coef, "kl": kl}
    of, without = objective(source, prompt_kl_coef=0.3, **settings), objective(source, **settings)
    if whole_logits:
        of.heads = without.heads = None
    policy, reference = of.policy, of.reference
    terms, grads = gradients(of)
    policy.model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for prompt, quantile in zip(PROMPTS, QUANTILES, strict=True):
        for k in {quantile, 2 - quantile} if contrast_coef else {quantile}:
            twice = 1 + (contrast_coef > 0 and k == 2 - k)  # the middle token is its own mirror
            both = []
            for model, token in ((policy.model, k), (reference, None)):
                ids = torch.tensor([policy.conditioned(prompt, token)])
                logits = model(ids).logits[0, :, : policy.vocabulary].double()
                both.append(logits[-len(prompt) : -1].log_softmax(-1))
            p, q = both if kl == "policy_ref" else both[::-1]
            total = total + twice * (p.exp() * (p - q)).sum()
    (0.3 * total / 9).backward()
    streams = 2 if contrast_coef else 1
    assert terms["prompt_kl"] == pytest.approx(float(total.detach()) / (9 * streams), rel=1e-5)
    assert terms["prompt_kl"] > 0.1
    expected = {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}
    _, rest = gradients(without)
    for name, grad in grads.items():
        held = grad - rest[name]
        scale = max(grad.abs().max().item(), rest[name].abs().max().item())
        torch.testing.assert_close(held, expected[name], rtol=1e-3, atol=1e-5 * scale)


def test_prompts_of_one_token_have_nothing_to_hold(tiny_model: Callable[..., Path]) -> None:
    of = objective(tiny_model(), prompt_kl_coef=0.3)
    prompts, written = [[1], [2]], COMPLETIONS[:2]
    with_others, terms = of(prompts, written, QUANTILES[:2], Counts(7, 2, prompt_tokens=5))
    alone, none = of(prompts, written, QUANTILES[:2], Counts.of(prompts, written))
    assert with_others.item() == pytest.approx(alone.item()) and "prompt_kl" not in none
    assert read_terms([terms])["prompt_kl"] == 0


@pytest.mark.parametrize("contrast", [0.0, 1.0])
@pytest.mark.parametrize("whole_logits", [False, True], ids=["hidden", "logits"])
def test_unlikelihood_adds_the_gradient_of_its_formula_under_the_best_of_a_samples_tokens(
    tiny_model: Callable[..., Path], contrast: float, whole_logits: bool
) -> None:
    prompts = [[1, 2, 3], [4], [5, 6], [3]]
    # Repeated 2-grams stand at places 2-3 of the first and 1-2, 4-5 of the second; the third has none, the
    # fourth has them at 2-3.
    completions = [[7, 8, 7, 8], [9, 9, 9, 1, 9, 9], [1, 2, 3], [2, 6, 2, 6]]
    repeated = {(0, 2), (0, 3), (1, 1), (1, 2), (1, 4), (1, 5), (3, 2), (3, 3)}
    quantiles, tokens = [0, 1, 2, 2], 17
    source, found = tiny_model(), []
    for coefficient in (0.0, 3.0):
        settings = {"contrast_coef": contrast, "unlikelihood_coef": coefficient, "unlikelihood_ngram": 2}
        of = objective(source, **settings)
        if whole_logits:
            of.heads = None
        loss, terms = of(prompts, completions, quantiles, Counts(tokens, 4, 0))
        loss.backward()
        found.append({n: p.grad.clone() for n, p in of.policy.model.named_parameters()})

    policy = of.policy
    policy.model.zero_grad()
    total = torch.zeros(())
    under = [max(k, 2 - k) if contrast else k for k in quantiles]
    for i, (prompt, completion, k) in enumerate(zip(prompts, completions, under, strict=True)):
        context = policy.conditioned(prompt, k)
        logits = policy.model(torch.tensor([context + completion])).logits[0, :, : policy.vocabulary]
        for t, token in enumerate(completion):
            if (i, t) in repeated:
                total = total - torch.log1p(-logits[len(context) + t - 1].softmax(-1)[token])
    total = total / tokens
    (3.0 * total).backward()
    assert read_terms([terms])["unlikelihood"] == pytest.approx(total.item(), rel=1e-3)
    for name, parameter in policy.model.named_parameters():
        added = found[1][name] - found[0][name]
        assert parameter.grad is not None
        scale = max(float(g.abs().max()) for g in (found[0][name], parameter.grad))
        torch.testing.assert_close(added, parameter.grad, rtol=1e-3, atol=1e-4 * scale)
    assert any(p.grad.abs().max() > 1e-3 for p in policy.model.parameters())


def test_model_that_caps_its_logits_trains_on_whole_ones_and_says_so(tmp_path: Path) -> None:
    """Head times hidden states would be other logits, and the loss silently another model's."""
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=62, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, final_logit_softcapping=2.0, attn_logit_softcapping=None,
        bos_token_id=60, eos_token_id=60, pad_token_id=60,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    sharpen(model)
    model.save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    of = objective(tmp_path / "model", contrast_coef=0.0, kl_coef=0.0)
    assert of.heads is None
    terms, _ = gradients(of)
    # Capped at 2, no token is less likely than e^-4 / 62.
    assert terms["nll"] * 20 / 11 < 4 + 4.2
    settings = Config(
        model=str(tmp_path / "model"), output=str(tmp_path / "run"), quantiles=2, initial_samples=2, rounds=1,
        steps=1, batch_size=4, micro_batch=4, max_new_tokens=4, eval_samples=1, precision="fp32", threads=1,
    )  # fmt: skip
    prompts = [f"w{i}" for i in range(4)]
    Trainer(settings, reward=lengths, prompts=prompts, held_out=prompts)
    versions = json.loads((tmp_path / "run" / "versions.json").read_text())
    assert versions["loss"] == of.description
    assert versions["loss"].startswith("whole logits")
