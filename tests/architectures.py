"""Tiny random causal language models of most architectures that transformers has, by it alone.

Between them they have what a model may do with its texts: positions learned, rotary, of ALiBi or none;
windows, experts, latent attention, states in place of keys and values; tables of embeddings in every layer;
texts read from both sides. Each comes with a tokenizer of the kind that its family has.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import log
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from conftest import sharpen
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CohereTokenizer,
    GemmaTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    Qwen3_5Tokenizer,
)

CORPUS = [
    "The man said that the reward was good, and the woman said that it was better.",
    "There was a time when the cat sat on the mat; then it was the dog's turn to sit there.",
    "Once upon a time 1, 2 and 3 were said to be numbers that the man and the woman had.",
]

# --- Tokenizers ------------------------------------------------------------------------------------


def byte_level(*, bos: bool = False, pad: str | None = None) -> PreTrainedTokenizerFast:
    """As GPT-2's: <|endoftext|> behind the pieces, and with ``bos`` in front of every text, as OPT's."""
    special = ["<|endoftext|>", *([pad] if pad else [])]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=special[0], eos_token=special[0], pad_token=pad
    )
    if bos:
        _put_first(tokenizer)
    return tokenizer


SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]


def sentencepiece(kind: str, *, prepend: str = "first", pad: str | None = None) -> PreTrainedTokenizerFast:
    """As Llama's and Gemma's: BPE or Unigram over words that begin with U+2581, the unknown as bytes."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=True)
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=60, show_progress=False))
    trained = json.loads(backend.to_str())["model"]
    pieces = sorted(trained["vocab"], key=trained["vocab"].get)
    if kind == "bpe":
        vocabulary = {piece: i for i, piece in enumerate([*SPECIAL, *BYTES, *pieces])}
        merges = [tuple(pair) for pair in trained["merges"]]
        backend.model = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    else:
        # A UnigramTrainer, which sums in any order, gives other pieces in every process.
        text = " ".join(["", *CORPUS]).replace(" ", "▁")
        entries = [*((name, 0.0) for name in SPECIAL), *((name, -99.0) for name in BYTES)]
        entries += [(piece, log(max(text.count(piece), 1) / len(text))) for piece in pieces]
        backend.model = models.Unigram(entries, 0, byte_fallback=True)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0) if prepend != "never" else decoders.Fuse(),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token=pad
    )
    _put_first(tokenizer)
    return tokenizer


def _put_first(tokenizer: PreTrainedTokenizerFast) -> None:
    bos = str(tokenizer.bos_token)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.bos_token_id)]
    )


def enclosing() -> PreTrainedTokenizerFast:
    """As RoBERTa's: <s> in front of every text and </s> behind it; they come first, as its positions want."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return _around(backend, *special)


def wordpiece() -> PreTrainedTokenizerFast:
    """As BERT's: lower case, [CLS] in front and [SEP] behind, ## inside of words, the unknown as [UNK]."""
    special = ["[CLS]", "[PAD]", "[SEP]", "[UNK]"]
    words = sorted({word for text in CORPUS for word in text.lower().replace("'", " ' ").split()})
    letters = sorted({letter for word in words for letter in word})
    pieces = [*special, *letters, *(f"##{letter}" for letter in letters), *(w for w in words if len(w) > 1)]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return _around(backend, *special)


def _around(backend: Tokenizer, bos: str, pad: str, eos: str, unk: str) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=eos,
        cls_token=bos,
        sep_token=eos,
        pad_token=pad,
        unk_token=unk,
    )
    backend = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(
        single=f"{bos} $A {eos}",
        pair=f"{bos} $A {eos} $B {eos}",
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in (bos, eos)],
    )
    return tokenizer


def ended() -> PreTrainedTokenizerFast:
    """As Pegasus' and Marian's: nothing in front, </s> behind every text."""
    tokenizer = sentencepiece("unigram", prepend="always", pad="<unk>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", pair="$A $B </s>", special_tokens=[("</s>", tokenizer.eos_token_id)]
    )
    return tokenizer


def _as(kind: Callable[..., Any], base: Callable[[], Any], **named: str) -> Any:
    """``base``'s pieces in a class of transformers' own, which builds its backend itself, at load as well."""
    model = json.loads(base().backend_tokenizer.to_str())["model"]
    return kind(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]], **named)


# The kinds, in short. LLAMA3: bytes behind BOS, LLAMA2: sentencepiece.
GPT2 = byte_level
GPT2_PAD = partial(byte_level, pad="<pad>")
OPT = partial(byte_level, bos=True, pad="<pad>")
LLAMA3 = partial(byte_level, bos=True)
LLAMA2 = partial(sentencepiece, "bpe")
MISTRAL = partial(sentencepiece, "bpe", prepend="always")
UNIGRAM = partial(sentencepiece, "unigram", prepend="always", pad="<unk>")
UNIGRAM_FIRST = partial(sentencepiece, "unigram", pad="</s>")
GEMMA = partial(sentencepiece, "bpe", prepend="never", pad="<unk>")
GEMMA_CLASS = partial(_as, GemmaTokenizer, GEMMA, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
COHERE_CLASS = partial(_as, CohereTokenizer, GPT2)
# Whatever a folder of qwen2 or qwen3_5_moe_text names, transformers puts its pieces into these classes,
# which split numbers into digits: GPT2's ids would not come back.
QWEN2_CLASS = partial(_as, Qwen2Tokenizer, GPT2_PAD, pad_token="<pad>")
QWEN3_5_CLASS = partial(_as, Qwen3_5Tokenizer, GPT2_PAD, pad_token="<pad>")

# --- Models ----------------------------------------------------------------------------------------

Settings = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """A tiny model; its ``name`` is its model_type, with what is special to a variant behind a comma."""

    name: str
    config: Callable[[int, Settings], PretrainedConfig]  # of the size of the vocabulary and the special ids
    tokenizer: Callable[[], Any] = GPT2
    wider: int = 0  # rows of the table that no token has
    tokenizer_class: str | None = None  # what tokenizer_config.json is to name
    whole: bool = False  # saved with its eyes, of which AutoModelForCausalLM leaves out what writes no text

    def save(self, folder: Path) -> Path:
        torch.manual_seed(0)
        tokenizer = self.tokenizer()
        # What models without padding say: many a config names an id beyond a tiny table.
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        kind = AutoModelForImageTextToText if self.whole else AutoModelForCausalLM
        model = kind.from_config(self.config(len(tokenizer) + self.wider, ids))
        sharpen(model)
        for name, weight in model.named_parameters():
            if "post_" in name and "norm" in name:  # Gemma's layers are normalised against large embeddings
                weight.data.fill_(4.0)
        model.float().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if self.tokenizer_class:
            path = folder / "tokenizer_config.json"
            path.write_text(
                json.dumps(json.loads(path.read_text()) | {"tokenizer_class": self.tokenizer_class})
            )
        return folder


def _tiny(model_type: str, settings: Settings, vocabulary: int, ids: Settings) -> PretrainedConfig:
    return AutoConfig.for_model(model_type, **_resolved(settings, {"vocab_size": vocabulary, **ids}))


def _nested(model_type: str, settings: Settings, vocabulary: int, ids: Settings) -> PretrainedConfig:
    """Of a model of several modalities, whose text model has a config of its own inside."""
    text = _resolved(settings["text_config"], {"vocab_size": vocabulary, **ids})
    return AutoConfig.for_model(model_type, **ids, **(settings | {"text_config": text}))


def _resolved(settings: Settings, known: Settings) -> Settings:
    """With what is said to be read from ``known``, the size of the vocabulary and the special ids."""
    return known | {key: value(known) if callable(value) else value for key, value in settings.items()}


def _of(
    name: str, *sizes: Settings, tokenizer: Callable[[], Any] = GPT2, wider: int = 0,
    tokenizer_class: str | None = None, whole: bool = False, **settings: Any,
) -> Architecture:  # fmt: skip
    given = {key: value for each in [*sizes, settings] for key, value in each.items()}
    config = partial(_nested if "text_config" in given else _tiny, name.split(",")[0], given)
    return Architecture(name, config, tokenizer, wider, tokenizer_class, whole)


# Sizes under the names that most configs have, and under those of GPT-2's kin and of BART's.
ALL_HEADS: Settings = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
BODY: Settings = {**ALL_HEADS, "num_key_value_heads": 2}
WIDE: Settings = {**BODY, "head_dim": 16}  # heads wider than hidden_size / heads
THREE: Settings = {"num_hidden_layers": 3}
FOUR: Settings = {"num_hidden_layers": 4}  # where kinds of layers alternate
WINDOW: Settings = {"sliding_window": 6}  # shorter than most prompts
GPT: Settings = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
SEQ2SEQ: Settings = {
    f"{part}_{name}": value
    for part in ("encoder", "decoder")
    for name, value in {"layers": 2, "attention_heads": 4, "ffn_dim": 48}.items()
} | {"d_model": 32, "max_position_embeddings": 128}
BOTH: Settings = {"layer_types": ["sliding_attention", "full_attention"]}
FULL_FIRST = BOTH["layer_types"][::-1]
ROPE: Settings = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
OWN_HEAD: Settings = {"tie_word_embeddings": False}
TIED: Settings = {"tie_word_embeddings": True}

# Experts, under the names that are about.
LOCAL: Settings = {"num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS: Settings = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
SHARED: Settings = {**EXPERTS, "shared_expert_intermediate_size": 24}
ROUTED: Settings = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 24,
}
ONE_DENSE: Settings = {"first_k_dense_replace": 1}
DENSE_SPARSE: Settings = {"mlp_layer_types": ["dense", "sparse"]}

# Latent attention: keys of 12, values of 16.
LATENT: Settings = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}

# States in place of keys and values.
MAMBA: Settings = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2}
MAMBA2: Settings = {
    **MAMBA,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
COMPRESSED = [
    "sliding_attention",
    "heavily_compressed_attention",
    "compressed_sparse_attention",
    "sliding_attention",
]
STATES: Settings = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
DELTA: Settings = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
HYBRID: Settings = {"layer_types": ["linear_attention", "full_attention"]}

VISION: Settings = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
VISION_QWEN: Settings = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
    "num_position_embeddings": 16,
}
VISION_GOT: Settings = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "output_channels": 8,
    "image_size": 16,
    "patch_size": 8,
    "mlp_dim": 16,
    "global_attn_indexes": [0],
}
# Each of its four models has a table of its own, of at least the tokenizer's size.
BLT: Settings = {**BODY, "num_hidden_layers": 1, "num_key_value_heads": 4, "vocab_size": 400}
VISION_LLAMA4: Settings = {
    **VISION,
    "intermediate_size": 64,
    "vision_output_dim": 16,
    "projector_input_dim": 16,
    "projector_output_dim": 16,
}
VISION_MLLAMA: Settings = {
    "hidden_size": 16,
    "attention_heads": 2,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_global_layers": 1,
    "vision_output_dim": 32,
    "intermediate_layers_indices": [0],
    "image_size": 16,
    "patch_size": 8,
    "max_num_tiles": 1,
    "supported_aspect_ratios": [[1, 1]],
}
GEMMA3: Settings = {**WIDE, **WINDOW, **BOTH}
PER_LAYER: Settings = {
    **WIDE,
    **WINDOW,
    **FOUR,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": itemgetter("vocab_size"),
    "num_kv_shared_layers": 0,
}

# fmt: off
DECODERS = [
    _of("gpt2", GPT),
    _of("opt", ALL_HEADS, tokenizer=OPT, wider=6, word_embed_proj_dim=16, ffn_dim=48),
    _of("bloom", tokenizer=GPT2_PAD, hidden_size=32, n_layer=2, n_head=4),
    _of(
        "gpt_neo", hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        window_size=6, max_position_embeddings=128,
    ),
    _of("gptj", GPT, OWN_HEAD, wider=6, rotary_dim=4),
    _of("codegen", GPT, OWN_HEAD, wider=6, rotary_dim=4),
    # As Pythia's files say; the class builds its backend itself, and wants the token that it pads with.
    _of(
        "gpt_neox", ALL_HEADS, OWN_HEAD, tokenizer=partial(byte_level, pad="<|padding|>"), wider=6,
        tokenizer_class="GPTNeoXTokenizer",
    ),
    _of("gpt_neox, one branch after another", ALL_HEADS, OWN_HEAD, use_parallel_residual=False),
    _of("gpt_neox_japanese", ALL_HEADS, intermediate_multiple_size=2),
    _of("gpt_bigcode", GPT),
    _of("mpt", d_model=32, n_heads=4, n_layers=2, max_seq_len=128, expansion_ratio=2),
    _of("falcon", ALL_HEADS, ffn_hidden_size=48),
    _of("falcon, alibi", ALL_HEADS, ffn_hidden_size=48, alibi=True),
    _of("falcon, new decoder", ALL_HEADS, ffn_hidden_size=48, new_decoder_architecture=True, num_kv_heads=2),
    _of("biogpt", ALL_HEADS, tokenizer=OPT),
    _of(
        "xglm", tokenizer=UNIGRAM, d_model=32, ffn_dim=48, num_layers=2, attention_heads=4,
        max_position_embeddings=128,
    ),
    _of("ctrl", GPT, dff=48),
    _of("openai-gpt", GPT),
    _of("llama", BODY, OWN_HEAD, tokenizer=LLAMA2),
    _of("llama, unigram and tied", BODY, TIED, tokenizer=UNIGRAM, wider=3),
    _of("llama, byte-level", BODY, OWN_HEAD, tokenizer=LLAMA3),
    _of("mistral, sliding window", BODY, WINDOW, tokenizer=MISTRAL),
    _of("ministral", BODY, WINDOW, BOTH, ROPE, tokenizer=LLAMA3, head_dim=8),
    _of("ministral3", BODY, tokenizer=LLAMA3, head_dim=8),
    _of("qwen2", BODY, TIED, tokenizer=QWEN2_CLASS, wider=9),
    _of(
        "qwen2, sliding window", BODY, WINDOW, tokenizer=QWEN2_CLASS, use_sliding_window=True,
        max_window_layers=1,
    ),
    _of("qwen3", WIDE, OWN_HEAD, tokenizer=GPT2_PAD, wider=9),
    _of("gemma", WIDE, tokenizer=GEMMA_CLASS),
    _of("gemma2", WIDE, WINDOW, tokenizer=GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=5.0),
    _of("gemma3_text", GEMMA3, tokenizer=GEMMA, wider=5),
    _of("gemma3", tokenizer=GEMMA, text_config=GEMMA3, vision_config=VISION, mm_tokens_per_image=4),
    _of("vaultgemma", WIDE, WINDOW, tokenizer=GEMMA),
    _of("phi", ALL_HEADS, wider=6),
    _of("phi3", BODY, WINDOW, OWN_HEAD, tokenizer=UNIGRAM_FIRST),
    _of("stablelm", BODY, OWN_HEAD),
    _of("starcoder2", BODY, WINDOW),
    _of("cohere", BODY, tokenizer=COHERE_CLASS, logit_scale=0.5),
    _of("cohere2", BODY, WINDOW, BOTH, tokenizer=LLAMA3, logit_scale=0.5),
    _of(
        "granite", BODY, tokenizer=GPT2_PAD, embedding_multiplier=4.0, logits_scaling=2.0,
        residual_multiplier=0.5, attention_multiplier=0.2,
    ),
    _of("olmo", BODY, tokenizer=GPT2_PAD, clip_qkv=2.0),
    _of("olmo2", BODY, OWN_HEAD, tokenizer=GPT2_PAD),
    _of("olmo3", BODY, WINDOW, BOTH, tokenizer=GPT2_PAD),
    _of("persimmon", ALL_HEADS, OWN_HEAD, tokenizer=UNIGRAM),
    _of("nemotron", BODY, OWN_HEAD, tokenizer=UNIGRAM),
    _of("glm", WIDE, tokenizer=GPT2_PAD),
    _of("glm4", WIDE, tokenizer=GPT2_PAD),
    _of("exaone4", BODY, WINDOW, BOTH, tokenizer=GPT2_PAD),
    _of("smollm3", BODY, tokenizer=LLAMA3, no_rope_layers=[1, 0]),
    _of("helium", BODY, tokenizer=UNIGRAM, head_dim=8),
    _of("ernie4_5", BODY, tokenizer=LLAMA2, head_dim=8),
    _of("seed_oss", WIDE, tokenizer=LLAMA3),
    _of("arcee", BODY, tokenizer=LLAMA3),
    _of("apertus", BODY, tokenizer=LLAMA3),
    _of("hunyuan_v1_dense", BODY, tokenizer=GPT2_PAD, head_dim=8),
    _of("bitnet", BODY, tokenizer=LLAMA3),
    _of("diffllama", BODY, tokenizer=LLAMA2),
    _of("doge", BODY, tokenizer=LLAMA3),
    _of(
        "modernbert-decoder", ALL_HEADS, tokenizer=GPT2_PAD, local_attention=12, global_attn_every_n_layers=2,
        layer_types=FULL_FIRST, cls_token_id=0, sep_token_id=0,
    ),
    _of("jais2", BODY, head_dim=8),
    _of("nanochat", BODY, tokenizer=LLAMA3),
    _of("internlm3", BODY, tokenizer=LLAMA2, head_dim=8),
    _of("cwm", WIDE, WINDOW, tokenizer=LLAMA3, layer_types=FULL_FIRST),
    _of("exaone", BODY, tokenizer=GPT2_PAD, head_dim=8),
    _of("hyperclovax", BODY, tokenizer=GPT2_PAD, head_dim=8),
    _of(
        "granite_swa", BODY, WINDOW, tokenizer=GPT2_PAD, layer_types=FULL_FIRST,
        layer_rope_theta=[10000.0, 10000.0],
    ),
    _of("iquestcoder", BODY, tokenizer=LLAMA3, head_dim=8),
    _of("apertus1p5_text", BODY, tokenizer=LLAMA3),
    _of("opt, norms behind", ALL_HEADS, tokenizer=OPT, do_layer_norm_before=False, ffn_dim=48),
    _of("gpt_bigcode, keys for every head", GPT, multi_query=False),
    _of(
        "dory", WIDE, WINDOW, tokenizer=LLAMA3, n_input_layers=2, n_recurrent_layers=4, n_output_layers=2,
        num_hidden_layers=8, layer_types=["sliding_attention", "mlp", "full_attention", "mlp"] * 2,
    ),
    _of(
        "hrm_text", ALL_HEADS, tokenizer=LLAMA3, head_dim=8, num_layers_per_stack=1, H_cycles=2, L_cycles=2,
        num_hidden_layers=6,
    ),
    _of(
        "qwen3_5", whole=True, tokenizer=QWEN3_5_CLASS, text_config={**WIDE, **DELTA},
        vision_config=VISION_QWEN,
    ),
    _of(
        "llama4", whole=True, tokenizer=LLAMA3,
        text_config={**BODY, **LOCAL, "head_dim": 8, "intermediate_size_mlp": 48},
        vision_config=VISION_LLAMA4,
    ),
    _of(
        "mllama", whole=True, tokenizer=LLAMA3,
        text_config={**BODY, **ROPE, **THREE, "pad_token_id": 0, "cross_attention_layers": [1]},
        vision_config=VISION_MLLAMA,
    ),
    _of("got_ocr2", tokenizer=GPT2_PAD, text_config=BODY, vision_config=VISION_GOT),
    _of(
        "fuyu", tokenizer=UNIGRAM, text_config={**ALL_HEADS, "model_type": "persimmon"}, hidden_size=32,
        patch_size=4,
    ),
    _of("git", ALL_HEADS, tokenizer=wordpiece, vision_config=VISION),
    _of("moshi", BODY, tokenizer=UNIGRAM, ffn_dim=48, head_dim=8, audio_vocab_size=16, num_codebooks=2),
]

MIXTURES = [
    _of("mixtral", BODY, LOCAL, tokenizer=MISTRAL),
    _of("qwen2_moe", BODY, SHARED, tokenizer=GPT2_PAD),
    _of("qwen3_moe", WIDE, EXPERTS, tokenizer=GPT2_PAD),
    _of("olmoe", BODY, EXPERTS, tokenizer=GPT2_PAD),
    _of("granitemoe", BODY, LOCAL, tokenizer=GPT2_PAD),
    _of("granitemoeshared", BODY, LOCAL, tokenizer=GPT2_PAD, shared_intermediate_size=24),
    _of("phimoe", BODY, LOCAL, WINDOW, tokenizer=LLAMA2),
    _of("gpt_oss", WIDE, LOCAL, WINDOW, BOTH, tokenizer=GPT2_PAD),
    _of(
        "dbrx", d_model=32, n_heads=4, n_layers=2, max_seq_len=128,
        attn_config={"kv_n_heads": 2, "clip_qkv": 4.0, "rope_theta": 10000.0},
        ffn_config={"hidden_size": 32, "ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    ),
    _of("jetmoe", BODY, LOCAL, tokenizer=LLAMA2, kv_channels=8, num_attention_heads=4),
    _of(
        "ernie4_5_moe", BODY, tokenizer=LLAMA2, moe_num_experts=4, moe_k=2, moe_num_shared_experts=1,
        moe_intermediate_size=24, moe_layer_start_index=1, moe_layer_end_index=1,
    ),
    _of("glm4_moe", BODY, ROUTED, ONE_DENSE, tokenizer=GPT2_PAD, head_dim=8),
    _of("dots1", BODY, ROUTED, ONE_DENSE, tokenizer=GPT2_PAD, head_dim=8),
    _of("hunyuan_v1_moe", BODY, tokenizer=GPT2_PAD, head_dim=8, num_experts=4, moe_topk=2),
    _of("minimax_m2", BODY, LOCAL, tokenizer=GPT2_PAD, head_dim=8),
    _of("flex_olmo", BODY, EXPERTS, tokenizer=GPT2_PAD),
    _of(
        "llama4_text", BODY, LOCAL, FOUR, tokenizer=LLAMA3, head_dim=8, intermediate_size_mlp=48,
        interleave_moe_layer_step=2, no_rope_layers=[1, 0, 1, 0], attention_chunk_size=8,
    ),
    _of("afmoe", WIDE, EXPERTS, WINDOW, BOTH, tokenizer=LLAMA3, num_dense_layers=1, num_shared_experts=1),
    _of(
        "aria_text", BODY, tokenizer=LLAMA2, head_dim=8, moe_num_experts=4, moe_topk=2,
        moe_num_shared_experts=1,
    ),
    _of(
        "cohere2_moe", WIDE, EXPERTS, WINDOW, BOTH, tokenizer=LLAMA3, logit_scale=0.5,
        mlp_layer_types=["sparse", "sparse"],
    ),
    _of("exaone_moe", BODY, EXPERTS, WINDOW, BOTH, DENSE_SPARSE, tokenizer=GPT2_PAD, n_group=1, topk_group=1),
    _of(
        "granitemoe_swa", BODY, LOCAL, WINDOW, tokenizer=GPT2_PAD, layer_types=FULL_FIRST,
        layer_rope_theta=[10000.0, 10000.0],
    ),
    _of("hy_v3", WIDE, EXPERTS, DENSE_SPARSE, tokenizer=GPT2_PAD, num_shared_experts=1),
    _of(
        "kolibri1", WIDE, LOCAL, WINDOW, BOTH, tokenizer=LLAMA3, moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
    ),
    _of(
        "laguna", WIDE, SHARED, WINDOW, DENSE_SPARSE, tokenizer=LLAMA3, layer_types=FULL_FIRST,
        num_attention_heads_per_layer=[4, 4],
    ),
    _of(
        "mellum", WIDE, LOCAL, WINDOW, tokenizer=GPT2_PAD, moe_intermediate_size=24, layer_types=FULL_FIRST,
        mlp_layer_types=["sparse", "sparse"],
    ),
    _of(
        "mimo_v2_flash", WIDE, ROUTED, WINDOW, DENSE_SPARSE, tokenizer=GPT2_PAD, v_head_dim=8,
        layer_types=FULL_FIRST,
    ),
    _of("solar_open", BODY, ROUTED, tokenizer=LLAMA3, head_dim=8),
    _of("sarvam_moe", BODY, ROUTED, ONE_DENSE, tokenizer=LLAMA3, head_dim=8),
    _of("flint", WIDE, SHARED, WINDOW, tokenizer=LLAMA3, layer_types=FULL_FIRST, mlp_only_layers=[0]),
    _of("beam", WIDE, EXPERTS, WINDOW, BOTH, DENSE_SPARSE, tokenizer=GPT2_PAD, n_group=1, topk_group=1),
    # Not causal: a token changes the logits in front of it, by the experts that those tokens go to.
    _of("doge, experts", BODY, EXPERTS, tokenizer=LLAMA3, is_moe=True),
    _of(
        "minimax_m3_vl_text", BODY, LOCAL, tokenizer=GPT2_PAD, head_dim=8, dense_intermediate_size=48,
        shared_intermediate_size=24, rotary_dim=4, mlp_layer_types=["dense", "sparse"], index_n_heads=2,
        index_head_dim=8, index_block_size=4, index_topk_blocks=2,
        layer_types=["full_attention", "full_attention"],
    ),
    _of(
        "zaya", WIDE, tokenizer=GEMMA, num_experts=4, num_experts_per_tok=1, moe_intermediate_size=24,
        router_hidden_size=16, layer_types=["hybrid", "hybrid"],
    ),
]

LATENT_AND_LINEAR = [
    _of("deepseek_v2", ALL_HEADS, LATENT, ROUTED, ONE_DENSE, tokenizer=LLAMA3),
    _of("deepseek_v3", ALL_HEADS, LATENT, ROUTED, ONE_DENSE, tokenizer=LLAMA3),
    _of(
        "deepseek_v32", ALL_HEADS, LATENT, ROUTED, DENSE_SPARSE, tokenizer=LLAMA3, index_topk=4,
        index_head_dim=8, index_n_heads=2,
    ),
    _of("glm4_moe_lite", ALL_HEADS, LATENT, ROUTED, DENSE_SPARSE, tokenizer=GPT2_PAD),
    _of("youtu", ALL_HEADS, LATENT, tokenizer=LLAMA3),
    _of("minicpm3", ALL_HEADS, LATENT, tokenizer=LLAMA2, head_dim=4, scale_emb=2, dim_model_base=16),
    _of(
        "longcat_flash", ALL_HEADS, LATENT, tokenizer=LLAMA3, num_layers=2, ffn_hidden_size=48, head_dim=4,
        moe_topk=2, n_routed_experts=4, zero_expert_num=2, expert_ffn_hidden_size=24,
    ),
    _of("minimax", BODY, LOCAL, HYBRID, tokenizer=GPT2_PAD, block_size=8, head_dim=8),
    _of("qwen3_next", WIDE, SHARED, DELTA, tokenizer=GPT2_PAD),
    _of("qwen3_5_text", WIDE, DELTA, tokenizer=GPT2_PAD),
    _of("qwen3_5_moe_text", WIDE, SHARED, DELTA, tokenizer=QWEN3_5_CLASS),
    _of("olmo_hybrid", BODY, DELTA, tokenizer=GPT2_PAD, linear_num_value_heads=2),
    _of(
        "kimi_linear", ALL_HEADS, LATENT, HYBRID, DENSE_SPARSE, num_experts=4, num_experts_per_token=2,
        num_shared_experts=1, moe_intermediate_size=24, linear_head_dim=8, linear_num_heads=4,
    ),
    _of("axk1", ALL_HEADS, LATENT, ROUTED, DENSE_SPARSE, tokenizer=LLAMA3),
    _of(
        "axk2", ALL_HEADS, LATENT, ROUTED, DENSE_SPARSE, tokenizer=LLAMA3, index_topk=4, index_head_dim=8,
        index_n_heads=2, gated_norm_rank=4,
    ),
    _of(
        "glm_moe_dsa", ALL_HEADS, LATENT, ROUTED, DENSE_SPARSE, tokenizer=GPT2_PAD, index_topk=4,
        index_head_dim=8, index_n_heads=2,
    ),
    _of(
        "hy_v4", ALL_HEADS, LATENT, ROUTED, DENSE_SPARSE, tokenizer=GPT2_PAD, index_topk=4, index_head_dim=8,
        index_n_heads=2, hc_mult=2,
    ),
    _of("sarvam_mla", ALL_HEADS, LATENT, ROUTED, ONE_DENSE, tokenizer=LLAMA3),
    _of(
        "bailing_hybrid", ALL_HEADS, LATENT, HYBRID, DENSE_SPARSE, tokenizer=GPT2_PAD, num_experts=4,
        num_experts_per_token=2, num_shared_experts=1, moe_intermediate_size=24, num_expert_group=1,
        topk_group=1, linear_head_dim=8, linear_num_heads=4, first_k_dense_replace=1,
    ),
    _of(
        "lara_mini", WIDE, SHARED, DELTA, WINDOW, tokenizer=GPT2_PAD,
        layer_types=["linear_attention", "sliding_attention"],
    ),
    _of(
        "deepseek_v4", ALL_HEADS, FOUR, WINDOW, tokenizer=LLAMA3, num_key_value_heads=1, head_dim=16,
        q_lora_rank=16, num_experts_per_tok=2, n_routed_experts=4, n_shared_experts=1,
        moe_intermediate_size=24, hc_mult=2, hc_sinkhorn_iters=4, o_groups=2, o_lora_rank=8, index_n_heads=2,
        index_head_dim=8, index_topk=4, qk_rope_head_dim=4, layer_types=COMPRESSED,
        mlp_layer_types=["hash_moe", "moe", "moe", "moe"],
        compress_rates={"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    ),
    _of(
        "inkling_text", WIDE, tokenizer=GPT2_PAD, swa_num_attention_heads=4, swa_num_key_value_heads=2,
        swa_head_dim=16, sliding_window_size=6, d_rel=4, rel_extent=16,
        layer_types=["hybrid_sliding", "hybrid"], mlp_layer_types=["dense", "sparse"], n_routed_experts=4,
        num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=24,
    ),
]

STATE_SPACES = [
    _of("mamba", STATES, time_step_rank=4),
    _of("falcon_mamba", STATES, time_step_rank=4),
    _of("mamba2", STATES, tokenizer=GPT2_PAD, num_heads=4, head_dim=16, n_groups=1, chunk_size=8),
    _of("falcon_h1", BODY, MAMBA2, tokenizer=GPT2_PAD, mamba_d_ssm=64),
    _of(
        "jamba", BODY, MAMBA, tokenizer=LLAMA2, num_experts=4, num_experts_per_tok=2, attn_layer_period=2,
        attn_layer_offset=1, mamba_dt_rank=4, use_mamba_kernels=False,
    ),
    _of("bamba", BODY, MAMBA2, tokenizer=LLAMA3, attn_layer_indices=[1]),
    _of(
        "zamba2", ALL_HEADS, MAMBA, tokenizer=LLAMA2, layers_block_type=["mamba", "hybrid"], mamba_ngroups=1,
        n_mamba_heads=4, mamba_headdim=16, chunk_size=8, adapter_rank=4, use_mamba_kernels=False,
    ),
    _of("recurrent_gemma", BODY, tokenizer=GEMMA, num_hidden_layers=3, lru_width=32, attention_window_size=6),
    _of("lfm2", BODY, tokenizer=LLAMA3, layer_types=["conv", "full_attention"]),
    _of(
        "lfm2_moe", BODY, EXPERTS, tokenizer=LLAMA3, num_dense_layers=1,
        layer_types=["conv", "full_attention"],
    ),
    _of("granitemoehybrid", BODY, MAMBA2, LOCAL, HYBRID, tokenizer=GPT2_PAD, shared_intermediate_size=24),
    _of(
        "nemotron_h", WIDE, ROUTED, tokenizer=LLAMA3, mamba_num_heads=4, mamba_head_dim=16, ssm_state_size=8,
        n_groups=1, chunk_size=8, use_mamba_kernels=False, moe_shared_expert_intermediate_size=24,
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp"], num_hidden_layers=4,
    ),
    _of(
        "rwkv", hidden_size=32, num_hidden_layers=2, attention_hidden_size=32, intermediate_size=48,
        context_length=128,
    ),
    _of(
        "xlstm", hidden_size=128, embedding_dim=128, num_hidden_layers=2, num_blocks=2, ffn_proj_factor=0.5,
        v_dim_factor=0.5, ffn_round_up_to_multiple_of=8, num_heads=2, chunk_size=8,
    ),
    _of(
        "zamba", ALL_HEADS, MAMBA, FOUR, tokenizer=LLAMA2, num_key_value_heads=4, attn_layer_period=2,
        attn_layer_offset=1, attention_head_dim=16, attention_hidden_size=64, n_mamba_heads=2,
        mamba_dt_rank=4, use_mamba_kernels=False, layers_block_type=["mamba", "hybrid"] * 2,
    ),
    _of("lfm3", WIDE, WINDOW, tokenizer=LLAMA3, layer_types=["conv", "sliding_attention"], conv_L_cache=3),
]

PER_LAYER_TABLES = [
    _of(
        "gemma3n_text", PER_LAYER, tokenizer=GEMMA, laurel_rank=8, altup_num_inputs=2, intermediate_size=48,
        activation_sparsity_pattern=[0.0, 0.0, 0.0, 0.0],
    ),
    _of("gemma4_text", PER_LAYER, tokenizer=GEMMA, global_head_dim=16),
    _of(
        "gemma4_text, no table in the layers", PER_LAYER, tokenizer=GEMMA, global_head_dim=16,
        hidden_size_per_layer_input=0,
    ),
    _of(
        "gemma4_text, experts and shared keys", PER_LAYER, tokenizer=GEMMA, global_head_dim=16,
        num_kv_shared_layers=2, enable_moe_block=True, num_experts=4, top_k_experts=2,
        moe_intermediate_size=24,
    ),
    _of("gemma4", tokenizer=GEMMA, text_config={**PER_LAYER, "global_head_dim": 16}),
    _of("gemma4_unified_text", PER_LAYER, tokenizer=GEMMA, global_head_dim=16),
    _of(
        "gemma3n_text, shared keys", PER_LAYER, tokenizer=GEMMA, laurel_rank=8, altup_num_inputs=2,
        intermediate_size=48, activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0], num_kv_shared_layers=2,
    ),
    _of(
        "qwen4_exp_text", WIDE, SHARED, DELTA, tokenizer=GPT2_PAD, hc_count=2, hc_lowrank=8,
        ple_layer_ids=[1], ple_embed_dim=8, ngram_vocab_size_base=500, make_ngram_vocab_size_divisible_by=8,
        split_ngram_parts=4, heads_per_ngram=2, indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16,
        indexer_budget=8, indexer_compress_ratio=2,
    ),
]

UNUSUAL = [
    # From both sides; generate() puts a token behind the text that it is to replace, as it does for both xlm.
    _of("xlnet", d_model=32, n_layer=2, n_head=4, d_inner=48, tokenizer=UNIGRAM),
    _of(
        "reformer", tokenizer=UNIGRAM, is_decoder=True, attn_layers=["local", "local"], hidden_size=32,
        attention_head_size=8, num_attention_heads=4, feed_forward_size=48, max_position_embeddings=128,
        axial_pos_embds=False, local_attn_chunk_length=8,
    ),
    _of("xlm", tokenizer=GPT2_PAD, emb_dim=32, n_layers=2, n_heads=4, max_position_embeddings=128),
    # The prompt in front of every text is the model's own, and read from both sides.
    _of("cpmant", ALL_HEADS, tokenizer=GPT2_PAD, dim_head=8, dim_ff=48, prompt_length=4),
    _of(
        "reformer, hashed", tokenizer=UNIGRAM, is_decoder=True, attn_layers=["local", "lsh"], hidden_size=32,
        attention_head_size=8, num_attention_heads=4, feed_forward_size=48, max_position_embeddings=128,
        axial_pos_embds=False, local_attn_chunk_length=8, lsh_attn_chunk_length=8, num_buckets=4, hash_seed=0,
    ),
    _of(
        "xlm, causal", tokenizer=GPT2_PAD, emb_dim=32, n_layers=2, n_heads=4, max_position_embeddings=128,
        causal=True,
    ),
    # With a cache it does not run in transformers 5.24: its config counts no layers.
    _of(
        "blt", tokenizer=GPT2_PAD, use_cache=False, max_position_embeddings=128,
        encoder_hash_byte_group_vocab=50, local_attention_window_len=8, patcher_config=BLT,
        encoder_config={**BLT, "hidden_size_global": 64}, decoder_config={**BLT, "hidden_size_global": 64},
        global_config={**BLT, "hidden_size": 64},
    ),
]

# Texts read from both sides, unless they say that they are decoders.
TWO_SIDED = [
    # generate() nevertheless caches: a token is written as if those in front of it had not seen it.
    _of("bert", ALL_HEADS, tokenizer=wordpiece),
    _of("bert, decoder", ALL_HEADS, tokenizer=wordpiece, is_decoder=True),
    # generate() counts its positions from 0, the forward pass by itself from behind the padding's id: they
    # differ in all of RoBERTa's kin below (camembert, data2vec-text, xlm-roberta ..., xmod).
    _of("roberta", ALL_HEADS, tokenizer=enclosing),
    _of("roberta, decoder", ALL_HEADS, tokenizer=enclosing, is_decoder=True),
    _of("electra", ALL_HEADS, tokenizer=wordpiece, embedding_size=16),
    _of("electra, decoder", ALL_HEADS, tokenizer=wordpiece, embedding_size=16, is_decoder=True),
    _of("big_bird, decoder", ALL_HEADS, tokenizer=wordpiece, is_decoder=True, attention_type="original_full"),
    _of("roformer, decoder", ALL_HEADS, tokenizer=wordpiece, embedding_size=32, is_decoder=True),
    _of("megatron-bert, decoder", ALL_HEADS, tokenizer=wordpiece, is_decoder=True),
    _of("bert-generation, decoder", ALL_HEADS, tokenizer=UNIGRAM, is_decoder=True),
    _of("camembert, decoder", ALL_HEADS, tokenizer=enclosing, is_decoder=True),
    _of("data2vec-text, decoder", ALL_HEADS, tokenizer=enclosing, is_decoder=True),
    _of("ernie, decoder", ALL_HEADS, tokenizer=wordpiece, is_decoder=True),
    _of(
        "rembert, decoder", ALL_HEADS, tokenizer=UNIGRAM, is_decoder=True, input_embedding_size=16,
        output_embedding_size=48,
    ),
    _of("roberta-prelayernorm, decoder", ALL_HEADS, tokenizer=enclosing, is_decoder=True),
    _of(
        "roc_bert, decoder", ALL_HEADS, tokenizer=wordpiece, is_decoder=True, enable_pronunciation=False,
        enable_shape=False, pronunciation_vocab_size=8, shape_vocab_size=8, pronunciation_embed_dim=8,
        shape_embed_dim=8,
    ),
    _of("xlm-roberta, decoder", ALL_HEADS, tokenizer=enclosing, is_decoder=True),
    _of("xlm-roberta-xl, decoder", ALL_HEADS, tokenizer=enclosing, is_decoder=True),
    _of(
        "xmod, decoder", ALL_HEADS, tokenizer=enclosing, is_decoder=True, languages=["en_XX"],
        default_language="en_XX",
    ),
]

# Decoders of pairs of encoder and decoder, alone.
HALVES = [
    # The last token that generate() may write is EOS by force, as in BART's own folders.
    _of("bart", SEQ2SEQ, tokenizer=enclosing, forced_eos_token_id=itemgetter("eos_token_id")),
    _of("marian", SEQ2SEQ, tokenizer=ended, decoder_start_token_id=0, forced_eos_token_id=None),
    _of("pegasus", SEQ2SEQ, tokenizer=ended, forced_eos_token_id=None),
    _of("trocr", SEQ2SEQ, tokenizer=enclosing),
    _of("mbart", SEQ2SEQ, tokenizer=enclosing, forced_eos_token_id=None),
    _of("mvp", SEQ2SEQ, tokenizer=enclosing),
    _of("plbart", SEQ2SEQ, tokenizer=enclosing, forced_eos_token_id=None),
    _of("blenderbot", SEQ2SEQ, tokenizer=enclosing, forced_eos_token_id=None),
    _of("blenderbot-small", SEQ2SEQ, tokenizer=enclosing, forced_eos_token_id=None),
    _of("bigbird_pegasus", SEQ2SEQ, tokenizer=ended),
    _of(
        "whisper", SEQ2SEQ, tokenizer=GPT2_PAD, max_source_positions=16, max_target_positions=128,
        begin_suppress_tokens=None, decoder_start_token_id=0,
    ),
    # generate() fails: it hands on positions, which this wants only to find itself.
    _of(
        "prophetnet", tokenizer=wordpiece, hidden_size=32, encoder_ffn_dim=48, decoder_ffn_dim=48,
        num_encoder_layers=2, num_decoder_layers=2, num_encoder_attention_heads=4,
        num_decoder_attention_heads=4, max_position_embeddings=128,
    ),
]

# fmt: on
ARCHITECTURES = {
    each.name: each
    for group in (
        DECODERS,
        MIXTURES,
        LATENT_AND_LINEAR,
        STATE_SPACES,
        PER_LAYER_TABLES,
        UNUSUAL,
        TWO_SIDED,
        HALVES,
    )
    for each in group
}
