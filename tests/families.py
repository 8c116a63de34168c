"""Tiny models of the common architectures, each with the kind of tokenizer it comes with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from architectures import byte_level, sentencepiece
from conftest import sharpen
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Family:
    """A tiny model of an architecture; ``wider``: rows of the table that no token has."""

    config: type[transformers.PretrainedConfig]
    tokenizer: Callable[[], PreTrainedTokenizerFast]
    settings: dict[str, Any]
    wider: int = 0

    def save(self, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
        torch.manual_seed(0)
        tokenizer = self.tokenizer()
        tokenizer.chat_template = TEMPLATE
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        # What models without padding say: many a config names an id beyond a tiny table.
        ids["pad_token_id"] = tokenizer.pad_token_id
        config = self.config(vocab_size=len(tokenizer) + self.wider, **ids, **self.settings)
        model = AutoModelForCausalLM.from_config(config)
        sharpen(model)
        for (
            name,
            weight,
        ) in model.named_parameters():  # Gemma's layers are normalised against large embeddings
            if "post_" in name and "norm" in name:
                weight.data.fill_(4.0)
        model.to(dtype).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder


# BOS first, as Llama's and Gemma's templates write it themselves; then turns.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
BODY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
ALL_HEADS = {name: value for name, value in BODY.items() if name != "num_key_value_heads"}
WINDOW = {"sliding_window": 6}  # shorter than most of the prompts

FAMILIES = {
    "gpt2": Family(
        transformers.GPT2Config, byte_level, {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}
    ),
    "opt": Family(
        transformers.OPTConfig,
        lambda: byte_level(bos=True, pad="<pad>"),
        {
            "hidden_size": 32,
            "word_embed_proj_dim": 16,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 128,
        },
        wider=6,
    ),
    "llama": Family(
        transformers.LlamaConfig, lambda: sentencepiece("bpe"), {**BODY, "tie_word_embeddings": False}
    ),
    "llama, unigram": Family(
        transformers.LlamaConfig,
        lambda: sentencepiece("unigram", prepend="always", pad="<unk>"),
        {**BODY, "tie_word_embeddings": True},
        wider=3,
    ),
    "qwen2": Family(
        transformers.Qwen2Config,
        lambda: byte_level(pad="<pad>"),
        {**BODY, "tie_word_embeddings": True},
        wider=9,
    ),
    "qwen3": Family(
        transformers.Qwen3Config,
        lambda: byte_level(pad="<pad>"),
        {**BODY, "tie_word_embeddings": False, "head_dim": 16},
        wider=9,
    ),
    "gemma": Family(
        transformers.GemmaConfig,
        lambda: sentencepiece("bpe", prepend="never", pad="<unk>"),
        {**BODY, "head_dim": 16},
    ),
    "gemma2": Family(
        transformers.Gemma2Config,
        lambda: sentencepiece("bpe", prepend="never", pad="<unk>"),
        {**BODY, **WINDOW, "head_dim": 16, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
    ),
    "gemma3": Family(
        transformers.Gemma3TextConfig,
        lambda: sentencepiece("bpe", prepend="never", pad="<unk>"),
        {**BODY, **WINDOW, "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]},
        wider=5,
    ),
    "mistral": Family(
        transformers.MistralConfig, lambda: sentencepiece("bpe", prepend="always"), {**BODY, **WINDOW}
    ),
    "gpt_neox": Family(
        transformers.GPTNeoXConfig, byte_level, {**ALL_HEADS, "tie_word_embeddings": False}, wider=6
    ),
    "phi": Family(transformers.PhiConfig, byte_level, ALL_HEADS, wider=6),
    "phi3": Family(
        transformers.Phi3Config,
        lambda: sentencepiece("unigram", pad="</s>"),
        {**BODY, **WINDOW, "tie_word_embeddings": False},
    ),
}
