"""Adapters: what trains, that they come and go exactly, and a run with them from start to export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES as EVERY
from conftest import export, save_tiny_model, sharpen
from safetensors.torch import load_file
from tiny_runs import PROMPTS, copies_at, even_words, rows, small, timeless
from transformers import AutoModelForCausalLM

from quark_fast.config import Config
from quark_fast.errors import UsageError
from quark_fast.model.check_reading import TOLERANCE, tolerance_of
from quark_fast.model.copies import frozen_copy, shared_reference, whole_copy
from quark_fast.model.loading import load_reference
from quark_fast.model.lora import Lora, adapted_layers
from quark_fast.model.policy import Policy
from quark_fast.training.trainer import Trainer

Make = Callable[..., Path]
CPU = torch.device("cpu")
IDS = [3, 1, 4, 1, 5, 9, 2, 6]
ARCHITECTURES = ["gpt2", "llama", "qwen2"]  # Conv1D and tied, untied, tied


def adapted(source: Path, **settings: Any) -> Policy:
    """A policy whose adapters and rows are as training might leave them."""
    policy = Policy.create(source, quantiles=3, lora=Lora(4, 12.0), **settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return policy


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits


def test_a_model_in_bf16_under_float32_adapters_is_judged_as_one_in_bf16(tiny_model: Make) -> None:
    source = tiny_model("llama")
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(source)
    policy = Policy.create(source, quantiles=3, lora=Lora(4, 8.0), low=torch.bfloat16)
    assert {p.dtype for p in policy.model.parameters()} == {torch.float32, torch.bfloat16}
    assert tolerance_of(policy.model) == TOLERANCE[torch.bfloat16]
    assert tolerance_of(Policy.create(source, quantiles=3).model) == TOLERANCE[torch.float32]


def test_updates_too_small_for_bf16_add_up_beside_bf16_weights(tiny_model: Make) -> None:
    source = tiny_model("llama")
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(source)
    policy = Policy.create(source, quantiles=3, lora=Lora(4, 8.0), low=torch.bfloat16)
    trained = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    first = next(p for name, p in trained.items() if "lora_A" in name)
    before = first.detach().clone()
    optimizer = torch.optim.AdamW([first], lr=1e-5, weight_decay=0.0)
    for _ in range(10):  # a step of bfloat16 at .1 is 5e-4
        first.grad = torch.ones_like(first)
        optimizer.step()
    torch.testing.assert_close(before - first, torch.full_like(first, 1e-4), rtol=1e-2, atol=0)


def test_under_autocast_adapters_in_float32_give_what_those_in_bf16_gave(tiny_model: Make) -> None:
    source = tiny_model("llama")
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(source)
    policy = adapted(source, low=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = logits(policy.model, IDS)
    assert found.dtype == torch.bfloat16
    for name, parameter in policy.model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    assert torch.equal(logits(policy.model, IDS), found)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_only_adapters_and_reward_rows_train_and_new_adapters_change_nothing(
    tiny_model: Make, architecture: str
) -> None:
    source = tiny_model(architecture)
    policy = Policy.create(source, quantiles=3, lora=Lora(4, 8.0))
    trained = {name for name, p in policy.model.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in trained if "lora_" not in name} == {"rows"}
    # Two matrices for every linear layer of the two blocks; none for the head.
    assert len(trained) == 1 + 2 * 2 * (4 if architecture == "gpt2" else 7)
    plain = load_reference(source, torch.float32, CPU)
    assert torch.equal(logits(policy.model, IDS), logits(plain, IDS))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_merged_copies_and_exports_are_the_adapted_model_and_hold_no_adapter(
    tiny_model: Make, tmp_path: Path, architecture: str
) -> None:
    policy = adapted(tiny_model(architecture))
    ids = policy.conditioned(IDS, 2)
    expected = logits(policy.model, ids)
    assert (expected - logits(shared_reference(policy, torch.float32), IDS)[:, -1:]).abs().max() > 0.1
    copy = frozen_copy(policy, torch.float32)
    torch.testing.assert_close(logits(copy, ids), expected, rtol=1e-4, atol=1e-4)  # W x + B A x, (W + B A) x
    assert not [name for name, _ in copy.named_modules() if "lora" in name]
    export(policy, tmp_path / "out", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    found = logits(model, ids)[..., : policy.vocabulary]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not [name for name in load_file(tmp_path / "out" / "model.safetensors") if "lora" in name]
    assert not list((tmp_path / "out").glob("adapter*"))
    assert torch.equal(logits(policy.model, ids), expected), "copies leave the policy as it was"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shared_reference_is_the_untouched_model_to_the_bit_on_the_policys_own_weights(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    source = save_tiny_model(tmp_path / "source", "llama")
    model = AutoModelForCausalLM.from_pretrained(source)
    sharpen(model)
    model.to(dtype).save_pretrained(source)
    policy = adapted(source, low=dtype)
    shared = shared_reference(policy, dtype)
    mine = {id(parameter) for parameter in policy.model.parameters()}
    assert all(id(parameter) in mine for parameter in shared.parameters())
    plain = load_reference(source, dtype, CPU)
    assert torch.equal(logits(shared, IDS), logits(plain, IDS))
    assert not torch.equal(logits(policy.model, IDS), logits(plain, IDS))
    assert policy.model.get_input_embeddings().rows.dtype == torch.float32, "what trains is float32"
    assert shared_reference(policy, torch.float16) is None, "in another dtype it would be another model"
    assert shared_reference(Policy.create(source, quantiles=3), torch.float32) is None


def test_weights_stored_in_another_dtype_than_the_references_are_adapted_in_float32(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "source", "llama")
    policy = adapted(source, low=torch.bfloat16)
    assert policy.model.get_input_embeddings().weight.dtype == torch.float32
    assert shared_reference(policy, torch.bfloat16) is None


def test_same_seed_same_adapters_whatever_else_was_drawn(tiny_model: Make) -> None:
    source = tiny_model()
    drawn = []
    for seed in (1, 1, 2):
        state = torch.get_rng_state()
        policy = Policy.create(source, quantiles=3, lora=Lora(4, 8.0), seed=seed)
        assert torch.equal(torch.get_rng_state(), state), "the global generator is not ours"
        drawn.append(next(p for name, p in policy.model.named_parameters() if "lora_A" in name))
        torch.rand(7)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_targets_by_name_and_alpha_over_rank_scales_the_update(tiny_model: Make) -> None:
    def change(alpha: float) -> torch.Tensor:
        policy = Policy.create(tiny_model(), quantiles=3, lora=Lora(2, alpha, " q_proj, v_proj"))
        layers = {name.split(".")[-4] for name, p in policy.model.named_parameters() if "lora_" in name}
        assert layers == {"q_proj", "v_proj"}
        layer = policy.model.model.layers[0].self_attn.q_proj
        torch.nn.init.ones_(layer.lora_B["default"].weight)
        return layer.get_delta_weight("default") / (
            layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        )

    torch.testing.assert_close(change(8.0), torch.full((32, 32), 4.0))
    torch.testing.assert_close(change(3.0), torch.full((32, 32), 1.5))


@pytest.mark.parametrize(
    ("targets", "named"),
    [
        ("q_prj", "q_prj"),
        ("q_proj, gate_prj", "no layer is called 'gate_prj'"),
        ("q_proj,j", "no layer is called 'j'"),
        ("all-linear,q_proj", "no layer is called 'all-linear'"),
        ("q_proj,lm_head", "the model's head, lm_head"),
        ("embed_tokens", "the model's embedding, model.embed_tokens"),
    ],
)
def test_targets_that_are_no_layers_of_the_body_are_refused(
    tiny_model: Make, targets: str, named: str
) -> None:
    with pytest.raises(UsageError, match="lora_targets") as caught:
        Policy.create(tiny_model(), quantiles=3, lora=Lora(2, 4.0, targets))
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_a_tied_head_is_named_as_the_head_not_as_a_weight_that_is_shared(tiny_model: Make) -> None:
    with pytest.raises(UsageError, match="the model's head, lm_head"):
        Policy.create(tiny_model("qwen2"), quantiles=3, lora=Lora(2, 4.0, "q_proj,lm_head"))


def test_a_layers_whole_name_is_an_end_of_it(tiny_model: Make) -> None:
    name = "model.layers.0.self_attn.q_proj"
    policy = Policy.create(tiny_model(), quantiles=3, lora=Lora(2, 4.0, f"{name},mlp.up_proj"))
    found = [layer for layer, _ in adapted_layers(policy.model)]
    assert found == [name, "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("llama", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("gpt2", {"c_attn", "c_proj"}),
        ("gpt_neox", {"query_key_value", "dense"}),
        ("mpt", {"Wqkv", "out_proj"}),
        ("dbrx", {"Wqkv", "out_proj"}),  # in norm_attn_norm.attn
    ],
)
def test_attention_is_its_layers_whatever_a_model_calls_them(
    tmp_path: Path, name: str, names: set[str]
) -> None:
    source = EVERY[name].save(tmp_path / "model")
    policy = Policy.create(source, quantiles=2, lora=Lora(2, 4.0, "attention"))
    found = [layer for layer, _ in adapted_layers(policy.model)]
    assert {layer.rpartition(".")[2] for layer in found} == names and not any(
        "mlp" in layer for layer in found
    )


def test_attention_of_a_model_without_any_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="MambaForCausalLM has no layers of that name; give all-linear"):
        Policy.create(EVERY["mamba"].save(tmp_path / "model"), quantiles=2, lora=Lora(2, 4.0, "attention"))


def test_settings_give_the_adapters() -> None:
    assert Lora.of(Config(lora_rank=0)) is None
    assert Lora.of(Config()) == Lora(16, 32.0, "all-linear")
    assert [Config(lora_rank=rank).step_size for rank in (0, 16)] == [2e-4, 5e-4]
    assert [Config(task="sentiment", lora_rank=rank).step_size for rank in (0, 16)] == [2e-4, 1e-3]
    assert Config(lora_rank=0, learning_rate=0.5).step_size == 0.5
    assert Lora.of(Config(lora_rank=8)) == Lora(8, 16.0, "all-linear")
    assert Lora.of(Config(lora_rank=8, lora_alpha=4.0, lora_targets="q_proj")) == Lora(8, 4.0, "q_proj")


def test_run_with_adapters_learns_resumes_to_identical_results_and_exports_the_merged_model(
    tmp_path: Path,
) -> None:
    model = save_tiny_model(tmp_path / "model", "llama")
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(model)

    def run(name: str, resume: bool = False) -> Trainer:
        moment = ("round 2/2: learning", 10)
        listen = (lambda _: None) if resume else copies_at([moment], tmp_path / name)
        config = small(
            tmp_path / name, model, lora_rank=4, rounds=2, steps=20, learning_rate=1e-2, checkpoint_every=4,
            eval_samples=1, eval_rows="ends", eval_guidance="2", precision="bf16", resume=resume,
        )  # fmt: skip
        trainer = Trainer(config, reward=even_words, prompts=PROMPTS, held_out=PROMPTS[:4], listen=listen)
        mine = {id(p) for p in trainer.policy.model.parameters()}
        assert all(id(p) in mine for p in trainer.setup.reference.parameters()), "one copy of the weights"
        trainer.train()
        return trainer

    trainer = run("undisturbed")
    rewards = [row["reward_mean"] for row in rows(tmp_path / "undisturbed" / "metrics.jsonl", kind="round")]
    assert rewards[1] > rewards[0] + 0.05
    saved = load_file(tmp_path / "killed-0" / "checkpoint" / "model.safetensors")
    assert all("lora_" in key or key.endswith("rows") for key in saved), "not the whole model"
    run("killed-0", resume=True)
    for file in ("metrics.jsonl", "completions.jsonl", "evaluation.jsonl"):
        assert timeless(tmp_path / "killed-0" / file) == timeless(tmp_path / "undisturbed" / file), file
    exported = load_file(tmp_path / "undisturbed" / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in exported.values()} == {torch.bfloat16}
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(exported[name], frozen_copy(trainer.policy, torch.bfloat16).state_dict()[name])
    assert not torch.equal(exported[name], load_file(model / "model.safetensors")[name])


def test_experts_and_routers_are_left_as_they_are_or_refused_by_name(tmp_path: Path) -> None:
    folder = EVERY["mixtral"].save(tmp_path / "model")
    policy = Policy.create(folder, quantiles=2, lora=Lora(2, 4.0))
    adapted = [name for name, _ in policy.model.named_parameters() if "lora_A" in name]
    assert adapted and all("self_attn" in name for name in adapted)
    copied = whole_copy(policy, torch.float32)
    assert not any("lora" in name for name, _ in copied.named_parameters())
    for targets, said in (
        ("q_proj,w1,w3", "experts, whose weights are no linear layers"),
        ("experts", "lora_targets"),
    ):
        with pytest.raises(UsageError, match=said):
            Policy.create(folder, quantiles=2, lora=Lora(2, 4.0, targets))


def test_layers_that_share_a_weight_are_refused_since_merged_it_would_have_the_adapters_of_all(
    tmp_path: Path,
) -> None:
    folder = EVERY["zamba"].save(tmp_path / "model")
    for targets in ("all-linear", "q_proj"):
        with pytest.raises(UsageError, match=r"q_proj share one weight, .* --lora-rank 0"):
            Policy.create(folder, quantiles=2, lora=Lora(2, 4.0, targets))
    policy = Policy.create(folder, quantiles=2, lora=Lora(2, 4.0, "mamba.in_proj"))
    assert {layer.rpartition(".")[2] for layer, _ in adapted_layers(policy.model)} == {"in_proj"}


@pytest.mark.parametrize(
    ("name", "out"),
    [
        ("mamba", "mixer.out_proj"),
        ("nemotron_h", "mixer.out_proj"),
        ("phimoe", "mlp.router"),
        ("llama4_text", "feed_forward.router"),
    ],
)
def test_all_linear_leaves_out_what_peft_refuses_and_routers_that_are_linear_layers(
    tmp_path: Path, name: str, out: str
) -> None:
    policy = Policy.create(EVERY[name].save(tmp_path / "model"), quantiles=2, lora=Lora(2, 4.0))
    layers = [layer for layer, _ in adapted_layers(policy.model)]
    assert layers and not any(layer.endswith(out) for layer in layers)
    assert any(layer.endswith(out) for layer, _ in policy.model.named_modules()), "or nothing is left out"


def test_linear_layers_of_a_class_of_their_own_are_linear_layers(tmp_path: Path) -> None:
    policy = Policy.create(EVERY["falcon"].save(tmp_path / "model"), quantiles=2, lora=Lora(2, 4.0))
    assert {type(layer.get_base_layer()).__name__ for _, layer in adapted_layers(policy.model)} == {
        "FalconLinear"
    }
