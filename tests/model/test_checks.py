"""The check of a model against faults that are planted: each is repaired or refused, none is let pass."""

from __future__ import annotations

import contextlib
import functools
import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from conftest import lively_policy, sharpen
from torch import Tensor, nn

from quark_fast.config import Config
from quark_fast.model import export
from quark_fast.model.batch import completion_logits, make_batch, shared_logits
from quark_fast.model.check_export import check_export
from quark_fast.model.check_model import check_model
from quark_fast.model.check_reading import check_policy
from quark_fast.model.copies import frozen_copy, whole_copy
from quark_fast.model.loading import load_reference
from quark_fast.model.policy import Policy
from quark_fast.model.reading import Reading
from quark_fast.model.wrong_model import WrongModel
from quark_fast.training.objective import Objective

Make = Callable[..., Path]
CPU = torch.device("cpu")


@pytest.fixture
def policy(tiny_model: Make) -> Policy:
    return lively_policy(tiny_model("llama"))


def plant(policy: Policy, change: Callable[..., Any]) -> Policy:
    """Have the model's forward pass go through ``change(forward, ids, **inputs)``."""
    own = policy.model.forward

    def forward(self: Any, input_ids: Tensor, **inputs: Any) -> Any:
        return change(own, input_ids, **inputs)

    policy.model.forward = types.MethodType(forward, policy.model)
    return policy


def check(policy: Policy) -> list[str]:
    # The policy's own model in the reference's place: the fault is planted in that object alone.
    return check_policy(policy, policy.model)


def test_ordinary_model_is_read_in_the_ordinary_way(policy: Policy) -> None:
    assert check(policy) == [] and policy.reading == Reading()


def without(*names: str) -> Callable[..., Any]:
    def change(forward: Any, ids: Tensor, **inputs: Any) -> Any:
        return forward(ids, **{name: value for name, value in inputs.items() if name not in names})

    return change


def test_model_that_ignores_padding_is_read_without_it(policy: Policy) -> None:
    remarks = check(plant(policy, without("attention_mask")))
    assert policy.reading == Reading(padding=False)
    assert len(remarks) == 1
    assert "LlamaForCausalLM is read as rows of one length together, with a cache, since" in remarks[0]
    assert "from those of each text alone" in remarks[0]


def test_model_that_counts_positions_its_own_way_is_read_without_padding(tiny_model: Make) -> None:
    policy = lively_policy(
        tiny_model("gpt2")
    )  # rotary positions, such as Llama's, are the same wherever they begin
    check(plant(policy, without("position_ids")))
    assert policy.reading == Reading(padding=False)


def test_model_without_a_cache_is_read_whole(policy: Policy) -> None:
    remarks = check(plant(policy, without("cache", "past_key_values")))
    assert policy.reading == Reading(cache=False)
    assert "without a cache (the whole text again for each token)" in remarks[0]


def test_model_that_takes_many_tokens_behind_a_cache_for_one_is_read_without_sharing_prompts(
    policy: Policy,
) -> None:
    def change(forward: Any, ids: Tensor, **inputs: Any) -> Any:
        cache = inputs.get("cache") or inputs.get("past_key_values")
        if cache is not None and cache.get_seq_length() and ids.shape[1] > 1:
            raise RuntimeError("one token at a time")
        return forward(ids, **inputs)

    assert check(plant(policy, change)) == [] and policy.reading == Reading(many=False)
    batch = make_batch(policy, [[1, 2]] * 3, [[3, 4], [5, 6], [7, 8]], [1] * 3, CPU)
    with torch.no_grad():
        assert torch.equal(shared_logits(policy.model, batch), completion_logits(policy.model, batch))


def test_cache_that_fails_when_it_is_repeated_is_not_used(policy: Policy) -> None:
    def change(forward: Any, ids: Tensor, **inputs: Any) -> Any:
        if ids.shape == (6, 1):  # two samples of each of three prompts
            raise RuntimeError("no such states\nmore about it")
        return forward(ids, **inputs)

    remarks = check(plant(policy, change))
    assert policy.reading == Reading(padding=False), "two samples of one prompt are no six rows"
    assert "RuntimeError: no such states" in remarks[0] and "more about it" not in remarks[0]


def test_cache_whose_rows_cannot_be_dropped_is_not_used(policy: Policy) -> None:
    rows = [0]

    def change(forward: Any, ids: Tensor, **inputs: Any) -> Any:
        fewer, rows[0] = ids.shape[1] == 1 and len(ids) < rows[0], len(ids)
        out = forward(ids, **inputs)
        if fewer:  # as where a state stays what it was, outside of the cache
            out.logits = out.logits.flip(-1)
        return out

    remarks = check(plant(policy, change))
    assert policy.reading == Reading(cache=False)
    assert "from those of each text alone" in remarks[0]


def test_model_that_fails_in_every_way_is_refused_with_all_of_them(policy: Policy) -> None:
    def change(forward: Any, ids: Tensor, **inputs: Any) -> Any:
        out = forward(ids, **inputs)
        if len(ids) > 1:  # right alone, wrong in any company
            out.logits = out.logits.roll(1, 0)
        return out

    with pytest.raises(WrongModel, match="cannot be read right") as caught:
        check(plant(policy, change))
    text = str(caught.value)
    assert text.startswith("LlamaForCausalLM (llama, float32)") and "\n" not in text
    assert text.count("from those of each text alone") == 2 and "another --model" in text


def test_model_that_reads_what_follows_is_refused(policy: Policy) -> None:
    def change(forward: Any, ids: Tensor, **inputs: Any) -> Any:
        out = forward(ids, **inputs)
        out.logits = out.logits + out.logits.mean(1, keepdim=True)
        return out

    with pytest.raises(WrongModel, match=r"no causal language model.*is_decoder"):
        check(plant(policy, change))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_refused(policy: Policy, value: float) -> None:
    with torch.no_grad():
        policy.model.model.layers[1].mlp.down_proj.weight[0, 0] = value
    with pytest.raises(WrongModel, match="NaN or infinite, already on ordinary text"):
        check(policy)


def test_model_that_is_not_the_same_twice_is_refused(policy: Policy) -> None:
    def change(forward: Any, ids: Tensor, **inputs: Any) -> Any:
        out = forward(ids, **inputs)
        out.logits = out.logits + torch.rand_like(out.logits)
        return out

    with pytest.raises(WrongModel):
        check(plant(policy, change))


def test_reference_that_fails_in_low_precision_is_refused_with_the_precision(
    policy: Policy, tiny_model: Make
) -> None:
    reference = load_reference(tiny_model("llama"), torch.bfloat16, CPU)
    own = reference.forward

    def forward(self: Any, input_ids: Tensor, **inputs: Any) -> Any:
        raise RuntimeError("expected Float but found BFloat16")

    reference.forward = types.MethodType(forward, reference)
    with pytest.raises(WrongModel, match=r"llama, bfloat16.*expected Float.*--precision fp32"):
        check_policy(policy, reference)
    reference.forward = own
    assert check_policy(policy, reference) == []


def test_number_of_a_quantile_may_be_a_reward_tokens_id_too(tiny_model: Make) -> None:
    policy = Policy.create(tiny_model("llama"), quantiles=300)
    sharpen(policy.model.eval())
    assert policy.reward_ids[0] < 300
    assert check(policy) == [] and policy.reading == Reading()


def test_fault_behind_some_tokens_is_found_where_the_run_has_such_texts(policy: Policy) -> None:
    def change(forward: Any, ids: Tensor, **inputs: Any) -> Any:
        out = forward(ids, **inputs)
        if ids.shape[1] > 40 and len(ids) > 1:  # long texts are wrong in company
            out.logits = out.logits.flip(0)
        return out

    plant(policy, change)
    assert check_policy(policy, policy.model, 14) == []
    with pytest.raises(WrongModel, match="cannot be read right"):
        check_policy(policy, policy.model, 60)


# --- A step ----------------------------------------------------------------------------------------


def step_of(policy: Policy, reference: Any) -> Callable[[], Objective]:
    return functools.partial(Objective, Config(), policy, reference, CPU, contextlib.nullcontext)


def test_step_that_fails_is_refused_before_the_run(policy: Policy, tmp_path: Path) -> None:
    def change(forward: Any, ids: Tensor, **inputs: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("index_add_(): self (Float) and source (BFloat16)")
        return forward(ids, **inputs)

    reference = frozen_copy(policy, torch.float32)

    def check() -> list[str]:
        objective = step_of(policy, reference)
        return check_model(policy, reference, tmp_path, HOW, untie=True, objective=objective).lines

    assert check()[0].startswith("model checked in")
    assert all(p.grad is None for p in policy.model.parameters()), "nothing is left of the step"
    own = policy.model.model.forward

    def forward(self: Any, input_ids: Tensor, **inputs: Any) -> Any:  # a step reads the body by itself
        return change(own, input_ids, **inputs)

    policy.model.model.forward = types.MethodType(forward, policy.model.model)
    with pytest.raises(WrongModel, match=r"cannot be trained: RuntimeError: index_add_\(\)"):
        check()


def test_state_that_a_module_keeps_of_a_step_is_no_hindrance_to_a_copy(policy: Policy) -> None:
    layer = policy.model.model.layers[0]
    layer.state = (layer.mlp.up_proj.weight * 2).sum()
    assert layer.state.grad_fn is not None
    assert whole_copy(policy, torch.float32).model.layers[0].state.grad_fn is None


@pytest.mark.parametrize("name", ["xglm", "minimax", "llama"])
def test_copy_has_the_buffers_of_a_model_loaded_in_its_precision(name: str, tmp_path: Path) -> None:
    folder = ARCHITECTURES[name].save(tmp_path / "model")
    policy = Policy.create(folder, quantiles=2)
    policy.model.eval()
    for dtype in (torch.bfloat16, torch.float32):
        reference = load_reference(folder, dtype, CPU)
        copied = frozen_copy(policy, dtype)
        kinds = {k.replace(".base.", "."): b.dtype for k, b in copied.named_buffers()}
        assert kinds == {k: b.dtype for k, b in reference.named_buffers()}
        with torch.no_grad():
            assert copied(torch.tensor([[5, 6, 7]])).logits.isfinite().all()


# --- Tables ----------------------------------------------------------------------------------------


class Twice(nn.Module):
    """The input embedding with another table beside it, as models with tables in every layer have."""

    def __init__(self, first: nn.Module, rows: int) -> None:
        super().__init__()
        self.first, self.second = first, nn.Embedding(rows, first.weight.shape[1])
        nn.init.normal_(self.second.weight)

    def forward(self, ids: Tensor) -> Tensor:
        return self.first(ids) + self.second(ids)


@pytest.mark.parametrize("wider", [0, 8])
def test_second_table_sees_reward_tokens_as_token_0(policy: Policy, wider: int) -> None:
    model, own = policy.model, policy.model.get_input_embeddings()
    both = Twice(own, policy.vocabulary + wider)
    model.extra = both.second
    plant(
        policy,
        lambda forward, ids, **inputs: forward(None, inputs_embeds=both(ids), **inputs),
    )
    remarks = check(policy)
    assert policy.other_tables == ["extra"] and "extra, too, where reward tokens share" in remarks[0]
    ids = torch.tensor([[policy.reward_ids[1], 5]])
    assert torch.equal(both.second(ids), both.second(torch.tensor([[0, 5]])))


def test_table_that_is_no_module_is_refused(policy: Policy) -> None:
    table = torch.randn(policy.vocabulary + 8, 62)

    def change(forward: Any, ids: Tensor, **inputs: Any) -> Any:
        table[ids]
        return forward(ids, **inputs)

    with pytest.raises(WrongModel, match=r"reward tokens in a table of its own, of shape \(70, 62\)"):
        check(plant(policy, change))


# --- The export ------------------------------------------------------------------------------------

HOW = {"do_sample": True, "temperature": 1.0}


def test_export_is_checked_and_the_scratch_folder_is_gone(policy: Policy, tmp_path: Path) -> None:
    (tmp_path / "near").mkdir()
    assert check_export(policy, tmp_path / "near", HOW, untie=True) == (True, [])
    assert not any((tmp_path / "near").iterdir())


def test_no_file_of_the_scratch_folder_is_mapped_when_it_is_removed(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed, own = [], shutil.rmtree

    def rmtree(path: str, *rest: Any, **named: Any) -> None:
        removed.append(path)
        # NFS keeps a mapped file in its folder, under another name.
        assert path not in Path("/proc/self/maps").read_text()
        own(path, *rest, **named)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    check_export(policy, tmp_path, HOW, untie=True)
    assert removed


def test_export_that_loads_as_another_model_is_refused(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = export.write_export

    def spoiled(self: Policy, folder: Path, model: Any, *rest: Any, **named: Any) -> None:
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
        own(self, folder, model, *rest, **named)

    monkeypatch.setattr("quark_fast.model.check_export.write_export", spoiled)
    with pytest.raises(WrongModel, match=r"another model when its export is loaded: its logits differ by \d"):
        check_export(policy, tmp_path, HOW, untie=True)
    assert not any(tmp_path.glob(".quark*"))


def test_export_whose_tokenizer_forgets_the_front_is_refused(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgetful(tokenizer: Any, folder: Path, trust: bool) -> None:
        tokenizer.backend_tokenizer.post_processor = None
        tokenizer.save_pretrained(folder)

    monkeypatch.setattr("quark_fast.model.export.save_tokenizer", forgetful)
    with pytest.raises(WrongModel, match=r"TokenizersBackend\) reads 'The man said that it is good.' as"):
        check_export(policy, tmp_path, HOW, untie=True)


def test_export_that_cannot_be_written_is_refused_before_the_run(policy: Policy, tmp_path: Path) -> None:
    with pytest.raises(WrongModel, match=r"cannot be exported: .*cache_implementation"):
        check_export(policy, tmp_path, {"cache_implementation": "nonsense"}, untie=True)


def test_head_stays_tied_where_an_own_one_makes_another_model(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(policy: Policy, near: Path, sampling: Any, untie: bool) -> None:
        if untie:
            raise WrongModel("Kind (kind)", "is another model", "give another")

    monkeypatch.setattr("quark_fast.model.check_export._check_export", check)
    untie, lines = check_export(policy, tmp_path, HOW, untie=True)
    assert untie is False and lines == [
        "the export's head stays tied (--export-head tied), since otherwise the model is another model"
    ]


# --- What is kept ----------------------------------------------------------------------------------


def test_note_of_an_ordinary_model_saves_the_check_until_anything_changes(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(untie: bool = True) -> list[str]:
        return check_model(policy, policy.model, tmp_path, HOW, untie=untie, notes=tmp_path / "notes").lines

    assert run()[0].startswith("model checked in") and len(list((tmp_path / "notes").iterdir())) == 1
    assert run() == ["model checked before, with the same versions"]
    assert run(untie=False)[0].startswith("model checked in")
    monkeypatch.setattr("transformers.__version__", "5.99")
    assert run()[0].startswith("model checked in")


def test_model_with_remarks_is_checked_each_time(policy: Policy, tmp_path: Path) -> None:
    plant(policy, without("cache", "past_key_values"))
    for _ in range(2):
        lines = check_model(policy, policy.model, None, HOW, untie=True, notes=tmp_path / "notes").lines
        assert "without a cache" in lines[1]
    assert not (tmp_path / "notes").exists()
