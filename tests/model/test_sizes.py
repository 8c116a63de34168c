"""Bytes by arithmetic against the bytes that are there, and the rows that are chosen by them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, GPT2Config, LlamaConfig, MambaConfig

from quark_fast.evaluation import perplexity
from quark_fast.model import sizes
from quark_fast.model.cache import ROOM, decoding_cache
from quark_fast.model.copies import frozen_copy
from quark_fast.model.lora import Lora, add_adapters
from quark_fast.model.policy import Policy
from quark_fast.model.reading import cache_argument
from quark_fast.model.sizes import Shape
from quark_fast.model.structure import recompute_layers
from quark_fast.ops import linear
from quark_fast.rollout import transformers as rollout
from quark_fast.rollout.sampling import Conditioning, SampleRequest, Sampling
from quark_fast.rollout.transformers import sample


def config(layers: int = 2, **other: Any) -> LlamaConfig:
    """Two query heads share a key head; the heads together are wider than the model."""
    shape = {"hidden_size": 48, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaConfig(**shape | {"head_dim": 16, "num_hidden_layers": layers, "vocab_size": 97} | other)


def saved(layers: int, rank: int, recompute: bool, rows: int = 5, tokens: int = 16) -> int:
    """Bytes that the backward pass of a body holds, without weights, as autograd saves them."""
    model = AutoModelForCausalLM.from_config(config(layers), dtype=torch.bfloat16 if rank else torch.float32)
    if rank:
        add_adapters(model, Lora(rank, 32), 0)
    if recompute:
        recompute_layers(model.eval())
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    # autocast's copies of weights, which the state has: no other saved tensor is a matrix of these shapes.
    shapes = {tuple(weight.T.shape) for weight in model.parameters() if weight.ndim == 2}
    found: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own and tuple(tensor.shape) not in shapes:
            found.setdefault(place, tensor)
        return tensor

    mask = torch.ones(rows, tokens, dtype=torch.long)
    mask[0, :3] = 0
    inputs = model.get_input_embeddings()(torch.ones_like(mask)).detach().requires_grad_()
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        model.model(inputs_embeds=inputs, attention_mask=mask)
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


@pytest.mark.parametrize("rank", [0, 16])
def test_bytes_saved_by_a_layer_are_those_that_autograd_saves(step_bytes: ModuleType, rank: int) -> None:
    rows, tokens = 5, 16  # as many together as no weight has columns
    layer = saved(2, rank, recompute=False) - saved(1, rank, recompute=False)
    shape = Shape.of(config())
    assert shape is not None
    mask = 2 * tokens  # which each layer has a copy of
    assert layer == rows * tokens * (step_bytes.saved_bytes(shape, rank) + mask)
    assert step_bytes.activation_bytes(shape, rows * tokens, rank, False) == 2 * (
        layer - rows * tokens * mask
    )


@pytest.mark.parametrize("rank", [0, 16])
def test_recomputed_layer_keeps_its_input_alone(step_bytes: ModuleType, rank: int) -> None:
    two, three = (Shape.of(config(layers)) for layers in (2, 3))
    assert two is not None and three is not None
    more = step_bytes.activation_bytes(three, 80, rank, True) - step_bytes.activation_bytes(
        two, 80, rank, True
    )
    assert more == saved(3, rank, recompute=True) - saved(2, rank, recompute=True)


@pytest.mark.parametrize("tokens", [1, 2047, 2048, 4095, 4096, 6143, 10_000, 16_383, 16_384, 100_000])
def test_chunk_that_is_planned_with_is_the_one_that_the_linear_loss_makes(
    step_bytes: ModuleType, tokens: int
) -> None:
    elsewhere = torch.ones(tokens, device="meta")  # as a GPU's
    largest = max(len(rows) for _, rows in linear._plan(elsewhere, False, None, 1, 0))
    shape = Shape.of(config())
    assert shape is not None
    assert step_bytes.loss_bytes(shape, tokens, 16) == 5 * largest * 97, "bfloat16: five of half the rows"
    assert step_bytes.loss_bytes(shape, tokens, 0) == 5 * largest * 97 + 4 * 97 * 48


def test_cache_has_as_many_bytes_as_the_arithmetic_says() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_config(config(3), dtype=dtype)
        cache = DynamicCache()
        model(torch.ones(5, 7, dtype=torch.long), **{cache_argument(model): cache})
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        shape = Shape.of(model.config)
        assert shape is not None
        assert held == 5 * sizes.cache_bytes(shape, 7, dtype.itemsize)


def test_sampled_row_is_at_least_the_cache_that_it_decodes_with() -> None:
    model = AutoModelForCausalLM.from_config(config(3))
    cache = decoding_cache(model)
    for _ in range(3):
        model(torch.ones(5, 7, dtype=torch.long), **{cache_argument(model): cache})
    held = sum(layer.key_room.nbytes + layer.value_room.nbytes for layer in cache.layers)
    shape = Shape.of(model.config)
    assert shape is not None
    assert 5 * sizes.cache_bytes(shape, 21, 4) < held <= 5 * sizes.cache_bytes(shape, 21 + ROOM, 4)
    beside = sizes.layer_bytes(shape, 21, 4) + 97 * (4 + 4)
    assert 5 * (sizes.sampling_bytes(shape, 21, 4) - beside) > held


def test_parameters_and_adapters_are_counted_without_weights(step_bytes: ModuleType) -> None:
    for tied in (True, False):
        made = AutoModelForCausalLM.from_config(config(tie_word_embeddings=tied))
        shape = step_bytes.shape_on_meta(made.config)
        assert shape.parameters == sum(weight.numel() for weight in made.parameters())
    add_adapters(made, Lora(4, 8), 0)
    trained = sum(weight.numel() for weight in made.parameters() if weight.requires_grad)
    assert trained == 4 * shape.adapted * shape.layers
    assert step_bytes.state_bytes(shape, 4) == 2 * shape.parameters + 18 * trained
    assert step_bytes.state_bytes(shape, 0) == 20 * shape.parameters


def test_shape_is_read_from_other_names_and_refused_where_there_is_none() -> None:
    gpt2 = Shape.of(GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=97))
    assert gpt2 == Shape(3, 32, 128, 4, 32, 32, 97)
    assert Shape.of(MambaConfig(hidden_size=32, num_hidden_layers=2)) is None


@pytest.mark.parametrize(
    ("free", "rows"), [(10**6, 100), (111_200, 100), (111_000, 50), (50_000, 25), (1_200, 1), (0, 1)]
)
def test_rows_are_halved_until_nine_tenths_of_free_memory_hold_them(free: int, rows: int) -> None:
    assert sizes.halved_to_fit(100, 1000, free) == rows


def test_rows_that_are_read_fill_free_memory_up_to_a_limit() -> None:
    assert [sizes.rows_that_fit(1000, free) for free in (0, 10_000, 10**9)] == [1, 9, sizes.MOST_ROWS]


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Have this machine be one whose GPU has so many bytes left."""
    return lambda count: monkeypatch.setattr(sizes, "free_memory", lambda device: count)


def sampled(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, sampling: Sampling, guidance: float = 1.0
) -> list[int]:
    """How many completions each decoding loop has."""
    together: list[int] = []
    own = rollout._sample_batch

    def seen(policy: Policy, model: Any, request: SampleRequest, generator: torch.Generator) -> Any:
        together.append(len(request.prompts) * request.samples)
        return own(policy, model, request, generator)

    with monkeypatch.context() as patched:
        patched.setattr(rollout, "_sample_batch", seen)
        how = Conditioning(1, 0, guidance)
        request = SampleRequest([[i] for i in range(1, 9)], how, sampling, 2, 0)
        list(sample(policy, frozen_copy(policy, torch.float32), request))
    return together


def test_sampling_begins_with_as_many_rows_as_free_memory_holds_and_says_so(
    tiny_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    free: Callable[[int], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    policy = Policy.create(tiny_model(), quantiles=2)
    batch = Sampling(3, 0, rows=16)
    assert sampled(policy, monkeypatch, batch) == [16], "on a CPU the whole batch, whatever is free"
    shape = Shape.of(policy.model.config)
    assert shape is not None
    row = sizes.sampling_bytes(shape, len(policy.conditioned([1], 1)) + 3, 4)
    free(int(row * 16 / sizes.SHARE) + 9)
    assert sampled(policy, monkeypatch, batch) == [16] and not caplog.records
    free(int(row * 15 / sizes.SHARE))
    with caplog.at_level(logging.WARNING):
        assert sampled(policy, monkeypatch, batch) == [8, 8]
    assert "hold 8 completions" in caplog.text and "not 16; --sample-at-once" in caplog.text
    # Each of two streams has a cache: a half for them, and half of that for the memory.
    assert sampled(policy, monkeypatch, batch, guidance=1.5) == [4, 4, 4, 4]
    assert sampled(policy, monkeypatch, Sampling(3, 0, rows=16, at_once=16)) == [16], "asked for, so tried"


def test_reading_fills_free_memory_on_a_gpu_and_keeps_to_1280_tokens_on_a_cpu(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, free: Callable[[int], None]
) -> None:
    policy = Policy.create(tiny_model(), quantiles=2)
    asked: list[int] = []
    own = perplexity.by_parts

    def seen(count: int, size: int, work: Callable[[slice], Any]) -> Any:
        asked.append(size)
        return own(count, size, work)

    monkeypatch.setattr(perplexity, "by_parts", seen)
    prompts, completions = [[1]] * 6, [[2] * 20] * 6
    on_cpu = perplexity.completion_nll(policy, policy.model, prompts, completions)
    fit = perplexity.text_fit(policy, policy.model, completions, Conditioning())
    assert asked == [1280 // 20, 4]
    shape = Shape.of(policy.model.config)
    assert shape is not None
    free(int(3 * sizes.reading_bytes(shape, len(policy.prefix) + 21, 4) / sizes.SHARE) + 9)
    assert perplexity.completion_nll(policy, policy.model, prompts, completions) == pytest.approx(on_cpu)
    found = perplexity.text_fit(policy, policy.model, completions, Conditioning())
    assert [one[0] for one in found] == pytest.approx([one[0] for one in fit])
    perplexity.completion_nll(policy, policy.model, prompts, completions, rows=2)
    assert asked[2:] == [3, 3, 2]


@pytest.fixture
def scale(from_benchmarks: Callable[[str], ModuleType]) -> ModuleType:
    return from_benchmarks("scale")


def test_plan_says_that_a_step_of_8b_with_lora_fits_in_80_gb_and_all_weights_do_not(
    scale: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["scale.py", "--plan"])
    assert scale.main() == 0
    small, large = capsys.readouterr().out.split("\n8B:")
    assert "1B: 1.24 billion parameters" in small and "8.03 billion parameters" in large
    cells = {line.split(" | ")[0]: line.split(" | ")[1:] for line in large.splitlines() if "|" in line}
    assert cells["| LoRA 16: step of 16 x 256, recomputed"][2:] == ["16 a pass", "16 a pass |"]
    assert cells["| all weights: step of 16 x 256, recomputed"][1:3] == ["does not fit", "does not fit"]
    assert cells["| LoRA 16: 128 completions sampled, guided"][1:] == ["does not fit", "128", "128 |"]


def test_plan_reads_a_config_without_weights_and_refuses_what_is_none(
    scale: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config().save_pretrained(tmp_path)
    monkeypatch.setattr("sys.argv", ["scale.py", "--plan", "--model", str(tmp_path), "--memory", "1"])
    assert scale.main() == 0 and "| 1 GB |" in capsys.readouterr().out
    for wrong, named in ((["--model", str(tmp_path / "no")], "--model"), (["--memory", "0"], "--memory")):
        monkeypatch.setattr("sys.argv", ["scale.py", "--plan", *wrong])
        assert scale.main() == 2 and named in capsys.readouterr().err
