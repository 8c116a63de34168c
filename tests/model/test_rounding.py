"""Rounding that keeps what was learned: unbiased, exact on the grid, and the model of the table exported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from conftest import export, save_tiny_model, sharpen
from rich.console import Console
from safetensors.torch import load_file
from tiny_runs import PROMPTS, SHORT, rows, small
from transformers import AutoModelForCausalLM

from quark_fast.evaluation.side_by_side import Evaluator
from quark_fast.model import rounding
from quark_fast.model.copies import exported_copy, whole_copy
from quark_fast.model.lora import Lora
from quark_fast.model.policy import Policy
from quark_fast.model.rounding import LOST_BITS, stochastic_rounding
from quark_fast.training.trainer import Trainer

Make = Callable[..., Path]
HALVES = list(LOST_BITS)


def spacing(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Between the neighbours of ``dtype`` around each normal number, from its exponent."""
    mantissa = {torch.bfloat16: 8, torch.float16: 11}[dtype]
    return torch.ldexp(torch.ones_like(x), x.frexp().exponent - mantissa)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_each_number_becomes_one_of_its_two_neighbours_with_the_probability_that_keeps_the_mean(
    dtype: torch.dtype,
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, generator=generator) * torch.logspace(-3, 3, 64)
    draws = 4000
    found = stochastic_rounding(dtype)(x.repeat(draws, 1)).double()
    step = spacing(x, dtype).double()
    below = (x.abs().double() / step).floor() * step
    up = x.abs().double() / step - below / step  # the probability of going away from zero
    away = (found.abs() - below) / step
    assert set(away.unique().tolist()) == {0.0, 1.0}
    assert (found.sign() == x.sign()).all()
    error = (away.mean(0) - up).abs() / (up * (1 - up) / draws).sqrt().clamp(min=1e-9)
    assert error.max() < 4.5  # of 64 standard normal numbers: 1 in 2,300 has one beyond


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_what_the_dtype_holds_and_what_is_not_finite_stays(dtype: torch.dtype) -> None:
    every = torch.arange(2**16).to(torch.uint16).view(dtype)
    found = stochastic_rounding(dtype)(every.float())
    assert torch.equal(found.isnan(), every.isnan())
    assert torch.equal(found[~every.isnan()], every[~every.isnan()])
    huge = torch.tensor([3.4e38, -3.4e38])
    assert set(stochastic_rounding(dtype)(huge).abs().tolist()) <= {torch.finfo(dtype).max, float("inf")} | {
        float(torch.tensor(3.4e38).to(torch.bfloat16).float())
    }


def test_same_seed_same_bits_in_blocks_and_for_tensors_of_any_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(50, 30, generator=torch.Generator().manual_seed(1))
    first = stochastic_rounding(torch.bfloat16)(x)
    assert torch.equal(first, stochastic_rounding(torch.bfloat16)(x))
    assert not torch.equal(first, stochastic_rounding(torch.bfloat16, seed=1)(x))
    again = stochastic_rounding(torch.bfloat16)
    assert torch.equal(again(x), first)
    assert not torch.equal(again(x), first), "one stream: the next tensor has luck of its own"
    assert torch.equal(stochastic_rounding(torch.bfloat16)(x.t().contiguous().t()), first)
    monkeypatch.setattr(rounding, "BLOCK", 64)
    blocks = stochastic_rounding(torch.bfloat16)(x)
    assert ((blocks.float() - x).abs() <= spacing(x, torch.bfloat16)).all()
    assert abs((blocks.float() - x).sum()) < 5 * (spacing(x, torch.bfloat16).square().sum() / 4).sqrt()


# --- Policies --------------------------------------------------------------------------------------


def stored(folder: Path, dtype: torch.dtype) -> Path:
    save_tiny_model(folder, "llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    sharpen(model)
    model.to(dtype).save_pretrained(folder)
    return folder


def test_small_changes_of_a_bfloat16_model_are_in_copies_where_the_nearest_had_none(tmp_path: Path) -> None:
    policy = Policy.create(stored(tmp_path / "source", torch.bfloat16), quantiles=2)
    name = "model.layers.0.mlp.up_proj.weight"
    weight = dict(policy.model.named_parameters())[name]
    before = weight.detach().clone()
    assert torch.equal(whole_copy(policy, torch.bfloat16).state_dict()[name].float(), before), "untouched"
    change = 0.2 * spacing(before, torch.bfloat16)
    with torch.no_grad():
        weight += change
    assert torch.equal(weight.detach().bfloat16().float(), before)
    for dtype in (torch.bfloat16, torch.float16):  # bfloat16's grid is part of float16's
        kept = (whole_copy(policy, dtype).state_dict()[name].float() - before).sum() / change.sum()
        assert 0.8 < kept < 1.2, dtype
    export(policy, tmp_path / "out", torch.bfloat16)
    exported = load_file(tmp_path / "out" / "model.safetensors")[name]
    assert torch.equal(exported, whole_copy(policy, torch.bfloat16).state_dict()[name])


def test_a_float32_model_is_rounded_to_the_nearest_as_the_reference_is(tmp_path: Path) -> None:
    policy = Policy.create(stored(tmp_path / "source", torch.float32), quantiles=2)
    copied = whole_copy(policy, torch.bfloat16).state_dict()
    for name, parameter in policy.model.named_parameters():
        assert torch.equal(copied[name], parameter.detach().bfloat16()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("came_in", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", [None, Lora(1, 1.0)])
def test_copies_share_no_memory_with_the_policy_and_evaluate_what_is_exported(
    tmp_path: Path, came_in: torch.dtype, dtype: torch.dtype, lora: Lora | None
) -> None:
    policy = Policy.create(stored(tmp_path / "source", came_in), quantiles=2, lora=lora, low=dtype)
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    whole = whole_copy(policy, came_in)
    exported = exported_copy(policy, dtype)
    own = {p.data_ptr() for p in policy.model.parameters()}
    for copied, kind in ((whole, came_in), (exported, dtype)):
        assert {p.dtype for p in copied.parameters()} == {kind}
        assert not own & {p.data_ptr() for p in copied.parameters()}
        assert (copied.lm_head.weight is copied.get_input_embeddings().weight) == (
            policy.model.lm_head.weight is policy.model.get_input_embeddings().weight
        )
    for name, weight in whole.named_parameters():
        assert torch.equal(exported.get_parameter(name), weight.to(dtype)), name
        weight.data.zero_()
    for name, p in policy.model.named_parameters():
        assert torch.equal(p, before[name]), name


def test_adapters_small_beside_their_weights_survive_being_merged(tmp_path: Path) -> None:
    source = stored(tmp_path / "source", torch.bfloat16)
    policy = Policy.create(source, quantiles=2, lora=Lora(1, 1.0), low=torch.bfloat16)
    layer = policy.model.get_submodule("model.layers.0.mlp.up_proj")
    weight = layer.base_layer.weight.detach().float()
    change = 0.2 * spacing(weight, torch.bfloat16).min()
    with torch.no_grad():
        layer.lora_A["default"].weight.fill_(1.0)
        layer.lora_B["default"].weight.fill_(change)
    merged = whole_copy(policy, torch.bfloat16).get_submodule("model.layers.0.mlp.up_proj").weight
    assert merged.dtype == torch.bfloat16
    error = spacing(weight, torch.bfloat16).square().sum().div(4).sqrt() / weight.numel()
    assert abs((merged.float() - weight).mean() - change) < 5 * error
    assert (merged.float() != weight).any()
    assert layer.base_layer.weight.dtype == torch.bfloat16, "the policy's own weights are as they were"


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.bfloat16, "fp32"), (torch.float32, "bf16"), (torch.float16, "fp32")],
    ids=str,
)
def test_the_table_of_a_run_is_that_of_the_model_it_exports(
    tmp_path: Path, dtype: torch.dtype, precision: str
) -> None:
    """A rate so small that rounding matters: the run's own evaluation and one of its folder agree in all."""
    source = stored(tmp_path / "source", dtype)
    settings: dict[str, Any] = {**SHORT, "learning_rate": 3e-4, "precision": precision}
    settings |= {"eval_rows": "ends", "eval_guidance": "2"}
    config = small(tmp_path / "run", source, reward="tiny_runs:even_words", **settings)
    Trainer(config, prompts=PROMPTS, held_out=PROMPTS[:6]).train()
    again = Evaluator([tmp_path / "run"]).evaluate().samples
    own = rows(tmp_path / "run" / "evaluation.jsonl")
    names = {row["row"] for row in own}
    assert names >= {"base model", "best token", "guided w=2", "worst token"}
    assert [row for row in again if row["row"] in names] == own


def test_benchmark_rounds_a_float32_export_both_ways_and_refuses_another(
    tmp_path: Path, from_benchmarks: Callable[[str], ModuleType]
) -> None:
    benchmark = from_benchmarks("rounding")
    settings: dict[str, Any] = {**SHORT, "learning_rate": 1e-5, "reward": "tiny_runs:even_words"}
    for dtype in (torch.bfloat16, torch.float32):
        source = stored(tmp_path / f"{dtype}", torch.bfloat16)
        AutoModelForCausalLM.from_pretrained(source).to(dtype).save_pretrained(source)
        config = small(tmp_path / f"run-{dtype}", source, **settings)
        Trainer(config, prompts=PROMPTS, held_out=PROMPTS[:6]).train()
    with pytest.raises(SystemExit, match="what it lost is gone"):
        benchmark.measure(tmp_path / "run-torch.bfloat16", Console())
    found = benchmark.measure(tmp_path / "run-torch.float32", Console())
    own = rows(tmp_path / "run-torch.float32" / "evaluation.jsonl", row="best token")
    assert found["rows"][1]["metrics"]["mean"]["value"] == pytest.approx(
        sum(row["score"] for row in own) / len(own)
    )
    assert [row["name"] for row in found["rows"]] == ["base model", *found["weights_moved"]]
    whole, nearest, stochastic = found["weights_moved"].values()
    assert whole > 0.9 > stochastic > 2 * nearest


@pytest.mark.parametrize("kind", ["ernie4_5_moe", "hunyuan_v1_moe", "olmo_hybrid"])
@pytest.mark.parametrize("lora", [Lora(4, 8.0), None])
def test_weights_that_a_model_keeps_in_float32_are_those_of_the_base_in_every_copy(
    tmp_path: Path, kind: str, lora: Lora | None
) -> None:
    ARCHITECTURES[kind].save(tmp_path / "model")
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    wide = {name: one for name, one in made.named_parameters() if one.dtype == torch.float32}
    assert wide, "a router, or the decay of a state"
    for one in wide.values():
        one.data += 1e-4 * torch.randn(one.shape, generator=torch.Generator().manual_seed(0))
    made.save_pretrained(tmp_path / "model")
    low = {"lora": lora, "low": torch.bfloat16} if lora else {}
    policy = Policy.create(str(tmp_path / "model"), quantiles=2, **low)
    for copied in (whole_copy(policy, torch.bfloat16), exported_copy(policy, torch.float32)):
        found = dict(copied.named_parameters())
        for name, one in wide.items():
            assert found[name].dtype == torch.float32
            torch.testing.assert_close(found[name].data, one.data, rtol=0, atol=0)
