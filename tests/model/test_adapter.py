"""The adapters as peft reads them, beside the merged export."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES
from peft import AutoPeftModelForCausalLM, PeftModel
from tiny_runs import PROMPTS, SHORT, even_words, small
from transformers import AutoModelForCausalLM, AutoTokenizer

from quark_fast.errors import UsageError
from quark_fast.training.trainer import Trainer


@pytest.mark.parametrize(
    ("architecture", "targets"), [("llama", "all-linear"), ("gpt2", "all-linear"), ("gpt2", "c_attn,wpe")]
)
def test_adapter_on_the_base_model_has_the_logits_of_the_merged_export(
    tmp_path: Path, tiny_model: Callable[..., Path], architecture: str, targets: str
) -> None:
    source = tiny_model(architecture)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "rag": "{{ documents }}"}
    tokenizer.save_pretrained(source)
    settings = SHORT | {"lora_rank": 4, "lora_targets": targets, "eval": False, "export_adapter": True}
    config = small(tmp_path / "run", source, **settings)
    folder = (
        Trainer(config, reward=even_words, prompts=PROMPTS, held_out=PROMPTS[:4]).train().folder / "model"
    )
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    vocabulary = base.config.vocab_size
    base.resize_token_embeddings(merged.config.vocab_size)
    exported = AutoTokenizer.from_pretrained(folder)
    ids = exported(PROMPTS[:4], return_tensors="pt").input_ids
    assert AutoTokenizer.from_pretrained(folder / "adapter").chat_template == exported.chat_template
    assert exported.chat_template.keys() == {"default", "rag"}
    assert (ids >= vocabulary).any(), "the best token stands in front"
    plain = base(ids).logits
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # peft only warns of keys that it does not know, or does not find
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        adapted = PeftModel.from_pretrained(base, folder / "adapter")
    with torch.no_grad():
        found, expected = (model(ids).logits[..., :vocabulary] for model in (adapted, merged))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (plain[..., :vocabulary] - expected).abs().max() > 0.1, "the training moved it"
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ] == str(source)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        auto = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(auto(ids).logits[..., :vocabulary], found, rtol=1e-4, atol=1e-4)


def test_model_with_another_table_of_tokens_is_refused_before_the_work(tmp_path: Path) -> None:
    ARCHITECTURES["gemma4_text"].save(tmp_path / "model")
    config = small(tmp_path / "run", tmp_path / "model", lora_rank=4, export_adapter=True, **SHORT)
    with pytest.raises(UsageError, match=r"export_adapter: the model also .* model\.embed_tokens_per_layer,"):
        Trainer(config, reward=even_words, prompts=PROMPTS, held_out=PROMPTS[:4])
    assert not (tmp_path / "run").exists()


def test_without_adapters_there_is_none_to_write(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"export_adapter needs adapters, but lora_rank = 0"):
        small(tmp_path, tmp_path, lora_rank=0, export_adapter=True).check()
