"""Reward tokens and their rows, the prefix, what load_pretrained refuses, and the exported folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import WORDS, export, save_tiny_model, sharpen, tiny_config, word_tokenizer
from families import FAMILIES
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GPT2Config,
    PreTrainedTokenizerFast,
)
from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

from quark_fast.data.row import Rendered
from quark_fast.errors import UsageError
from quark_fast.model.check_export import check_export
from quark_fast.model.check_reading import check_policy
from quark_fast.model.copies import frozen_copy
from quark_fast.model.encode import encode_rows
from quark_fast.model.loading import load_pretrained, load_reference
from quark_fast.model.policy import Policy, reward_token
from quark_fast.model.reward_embedding import RewardEmbedding
from quark_fast.model.structure import linear_head, positions, recompute_layers
from quark_fast.rollout.sampling import Conditioning, SampleRequest, Sampling
from quark_fast.rollout.transformers import sample

ARCHITECTURES = ["gpt2", "llama", "qwen2"]  # tied, untied, tied
SEPARATOR_ID = WORDS
VOCABULARY = WORDS + 2
LOAD = torch.load

Make = Callable[..., Path]


# --- Reward tokens and their rows ----------------------------------------------------------------


@pytest.mark.parametrize("padding", [0, 10])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_reward_ids_follow_the_tokenizer_even_where_the_table_is_padded(
    tiny_model: Make, architecture: str, padding: int
) -> None:
    policy = Policy.create(tiny_model(architecture, padded_vocabulary=padding), quantiles=3)
    assert policy.vocabulary == VOCABULARY
    assert policy.reward_ids == [VOCABULARY, VOCABULARY + 1, VOCABULARY + 2]
    assert policy.tokenizer.convert_ids_to_tokens(policy.reward_ids) == [reward_token(k) for k in range(3)]
    assert policy.quantiles == 3


@pytest.mark.parametrize("padding", [0, 10])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_base_ids_embed_as_before_and_reward_ids_as_their_own_rows(
    tiny_model: Make, architecture: str, padding: int
) -> None:
    folder = tiny_model(architecture, padded_vocabulary=padding)
    policy = Policy.create(folder, quantiles=3)
    untouched, _ = load_pretrained(folder, torch.float32)
    embedding = policy.model.get_input_embeddings()
    base_ids = torch.arange(VOCABULARY)
    assert torch.equal(embedding(base_ids), untouched.get_input_embeddings()(base_ids))
    assert torch.equal(embedding(torch.tensor(policy.reward_ids)), embedding.rows)
    # The model without reward tokens is the base model, to the bit.
    ids = torch.tensor([[SEPARATOR_ID, 5, 9, 11]])
    assert torch.equal(policy.model(ids).logits, untouched(ids).logits)


def test_gradient_reaches_only_the_rows_that_were_read() -> None:
    embedding = RewardEmbedding(torch.nn.Embedding(10, 4), 10, torch.randn(3, 4))
    ids = torch.tensor([[1, 11, 11], [1, 5, 10]])
    embedding(ids).sum().backward()
    assert embedding.rows.grad.sum(1).tolist() == [4.0, 8.0, 0.0]
    # In particular not row 0, which stands in for the reward ids in the base lookup.
    assert embedding.weight.grad.sum(1).tolist() == [0.0, 8.0, 0, 0, 0, 4.0, 0, 0, 0, 0]


def test_scaled_embedding_scales_reward_rows_too() -> None:
    base = torch.nn.Embedding(10, 4)
    base.embed_scale = 3.0  # as Gemma's
    embedding = RewardEmbedding(base, 10, torch.ones(2, 4))
    assert embedding(torch.tensor([10])).tolist() == [[3.0] * 4]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_head_has_no_logit_for_a_reward_token_and_tied_heads_stay_tied(
    tiny_model: Make, architecture: str
) -> None:
    policy = Policy.create(tiny_model(architecture), quantiles=3)
    logits = policy.model(torch.tensor([[SEPARATOR_ID, policy.reward_ids[2], 4]])).logits
    assert logits.shape[-1] == VOCABULARY
    tied = policy.model.get_output_embeddings().weight is policy.model.get_input_embeddings().base.weight
    assert tied == (architecture != "llama")


def test_rows_start_as_the_mean_of_the_words_that_name_their_quantile(tiny_model: Make) -> None:
    policy = Policy.create(tiny_model(), quantiles=2, words=["w7 w9", "w3"])
    table = policy.model.get_input_embeddings().weight
    torch.testing.assert_close(
        policy.model.get_input_embeddings().rows,
        torch.stack([(table[7] + table[9]) / 2, table[3]]),
        rtol=1e-6,  # float32
        atol=0,
    )


def test_rows_start_as_without_words_where_the_tokenizer_reads_none_of_one(tmp_path: Path) -> None:
    letters = Tokenizer(models.BPE({"A": 0, "B": 1, "<end>": 2}, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="<end>")
    tokenizer.save_pretrained(tmp_path)
    config = GPT2Config(vocab_size=3, n_embd=8, n_layer=1, n_head=2, n_positions=16)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    worded, plain = (
        Policy.create(tmp_path, quantiles=2, words=words).model.get_input_embeddings().rows
        for words in (["A B", "lower case"], None)
    )
    assert worded.isfinite().all() and torch.equal(worded, plain)


def test_rows_without_words_have_mean_and_spread_of_the_base_table_alone(tiny_model: Make) -> None:
    folder = tiny_model(padded_vocabulary=10)
    model = AutoModelForCausalLM.from_pretrained(folder)
    scale = torch.linspace(0.1, 3.0, 32)
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table[:VOCABULARY] = 5.0 + scale * torch.randn(VOCABULARY, 32)
        table[VOCABULARY:] = 1e3  # padding is no part of the statistics
    model.save_pretrained(folder)
    rows = Policy.create(folder, quantiles=400, seed=3).model.get_input_embeddings().rows.detach()
    base = table[:VOCABULARY].detach()
    # 400 draws: the mean errs by std / 20, the spread by 1 / 28 of it; 4.5 of that for 32 dimensions.
    assert ((rows.mean(0) - base.mean(0)).abs() < 4.5 / 20 * base.std(0)).all()
    assert ((rows.std(0) / base.std(0) - 1).abs() < 4.5 / 28).all()
    again = Policy.create(folder, quantiles=400, seed=3).model.get_input_embeddings().rows
    other = Policy.create(folder, quantiles=400, seed=4).model.get_input_embeddings().rows
    assert torch.equal(rows, again) and not torch.equal(rows, other)


@pytest.mark.parametrize(
    ("trained", "expected"),
    [
        ({0, 4}, [0, 25, 50, 75, 100]),
        ({0, 1, 2, 3, 4}, [0, 7, 8, 9, 100]),  # all trained: all stay
        ({0, 2, 4}, [0, 4, 8, 54, 100]),
        ({4}, [100, 100, 100, 100, 100]),
        ({1, 3}, [7, 7, 8, 9, 9]),
    ],
)
def test_rows_that_nothing_was_drawn_for_lie_between_their_trained_neighbours(
    tiny_model: Make, trained: set[int], expected: list[float]
) -> None:
    policy = Policy.create(tiny_model(), quantiles=5)
    rows = policy.model.get_input_embeddings().rows
    with torch.no_grad():
        rows.copy_(torch.tensor([0.0, 7, 8, 9, 100]).unsqueeze(1).expand_as(rows))
    policy.place_untrained_rows(trained)
    assert torch.equal(rows, torch.tensor(expected, dtype=rows.dtype).unsqueeze(1).expand_as(rows))


# --- Prefix, prompts and stop ids ------------------------------------------------------------------


def bare_tokenizer(template: str | None = None, separator: bool = True) -> PreTrainedTokenizerFast:
    """'w0' ... 'w59', <s>, </s>, <unk> and maybe <|endoftext|>, with what ``template`` puts around."""
    names = [f"w{i}" for i in range(WORDS)] + ["<s>", "</s>", "<unk>"] + ["<|endoftext|>"] * separator
    vocabulary = {name: i for i, name in enumerate(names)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template:
        marks = [(name, vocabulary[name]) for name in ("<s>", "</s>")]
        backend.post_processor = TemplateProcessing(single=template, special_tokens=marks)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def policy_with(tokenizer: PreTrainedTokenizerFast, folder: Path, **settings: Any) -> Policy:
    AutoModelForCausalLM.from_config(tiny_config("llama", 80)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Policy.create(folder, **({"quantiles": 2} | settings))


@pytest.mark.parametrize(
    ("template", "separator", "prefix", "expected"),
    [
        pytest.param("<s> $A", True, "auto", [60], id="own-bos-before-the-separator"),
        pytest.param("<s> $A </s>", True, "auto", [60], id="own-bos-of-a-tokenizer-that-adds-eos-too"),
        pytest.param("$A </s>", True, "auto", [63], id="eos-behind-is-no-prefix"),
        pytest.param(None, True, "auto", [63], id="separator"),
        pytest.param(None, False, "auto", [], id="nothing"),
        pytest.param("<s> $A", True, "w4 w5", [4, 5], id="explicit"),
        pytest.param("<s> $A", True, "", [], id="explicitly-empty"),
    ],
)
def test_prefix_rule(
    tmp_path: Path, template: str | None, separator: bool, prefix: str, expected: list[int]
) -> None:
    policy = policy_with(bare_tokenizer(template, separator), tmp_path, prefix=prefix)
    assert policy.prefix == expected
    assert policy.conditioned([7, 8], 1) == [*expected, policy.reward_ids[1], 7, 8]
    assert policy.conditioned([7, 8], None) == [*expected, 7, 8]
    assert policy.encode("w1 w2 w3", 10) == [1, 2, 3], "the prompt alone, without any mark of the tokenizer"


@pytest.mark.parametrize("letters", ["ACDEFGHIKLMNPQRSTVWY", "0123456789", "αβγ"])
def test_bos_of_a_tokenizer_that_reads_no_a_is_its_prefix(tmp_path: Path, letters: str) -> None:
    backend = Tokenizer(models.BPE({name: i for i, name in enumerate(("<s>", "</s>", *letters))}, []))
    backend.decoder = decoders.Fuse()
    backend.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    assert tokenizer("a").input_ids == [0, 1]
    policy = policy_with(tokenizer, tmp_path)
    assert policy.prefix == [0]
    export(policy, tmp_path / "out", torch.float32)
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again(letters[0]).input_ids == [0, policy.reward_ids[-1], 2]


def test_prompt_too_long_loses_its_beginning(tiny_model: Make) -> None:
    assert Policy.create(tiny_model(), quantiles=2).encode("w1 w2 w3 w4", 3) == [2, 3, 4]


def test_stop_ids_are_all_ends_that_model_and_tokenizer_know(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    assert policy_with(bare_tokenizer(), folder).stop_ids == [60, 61, 63], "model's, tokenizer's, separator"
    model = AutoModelForCausalLM.from_pretrained(folder)
    # Generation configs of chat models list several; one in the table's padding can never be drawn.
    model.generation_config.eos_token_id = [4, 61, 79]
    model.save_pretrained(folder)
    assert Policy.create(folder, quantiles=2).stop_ids == [4, 61, 63]


def test_decoded_completion_shows_no_special_token(tiny_model: Make) -> None:
    assert Policy.create(tiny_model(), quantiles=2).decode([1, 2, SEPARATOR_ID]) == "w1w2"


def test_completion_may_spell_an_accent_otherwise_than_the_tokenizer(tmp_path: Path) -> None:
    policy = Policy.create(FAMILIES["qwen2"].save(tmp_path), quantiles=2)
    ids = policy.encode("The man said")
    composed = policy.encode_completion("The man said", ids, " caf\u00e9")
    assert composed and policy.encode_completion("The man said", ids, " cafe\u0301") == composed
    assert policy.encode_completion("The man said", ids, " cafe") != composed


@pytest.mark.parametrize("family", ["llama", "gemma", "mistral", "gpt2"])
def test_completion_in_characters_of_several_tokens_is_itself_after_any_prompt(
    tmp_path: Path, family: str
) -> None:
    policy = Policy.create(FAMILIES[family].save(tmp_path), quantiles=2)
    for letters in range(10):  # three bytes each: the last 16 tokens begin anywhere in one
        prompt = "The man said " + letters * "\u1000"
        ids = policy.encode(prompt)
        completion = policy.encode(prompt + "\u1000\u1000 it")[len(ids) :]
        assert policy.decode(completion, ids) == "\u1000\u1000 it", letters
        assert policy.encode_completion(prompt, ids, "\u1000\u1000 it") == completion
        cut = policy.encode(prompt + 2 * "\u1000")[len(ids) : -1]
        assert policy.decode(cut, ids) == "\u1000\ufffd", letters


def test_end_of_turn_that_the_tokenizer_does_not_call_special_is_no_text(
    tmp_path: Path, tiny_model: Make
) -> None:
    model, tokenizer = (kind.from_pretrained(tiny_model()) for kind in (AutoModelForCausalLM, AutoTokenizer))
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=False, normalized=False)])
    model.resize_token_embeddings(len(tokenizer))
    end, word = len(tokenizer) - 1, 4
    model.generation_config.eos_token_id = [word, end]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    policy = Policy.create(tmp_path, quantiles=2)
    assert policy.decode([1, 2, end], [3]) == "w1w2" == policy.decode([1, 2])
    assert policy.decode([end]) == ""
    assert policy.decode([1, end, 2]) == "w1<|im_end|>w2", "no end of the completion"
    assert policy.decode([1, word]) == "w1w4", "a word that ends completions, too, is text"


def test_tokenizer_with_gaps_in_its_ids_is_refused_before_reward_tokens_share_one(tmp_path: Path) -> None:
    backend = Tokenizer(models.WordLevel({f"w{i}": 2 * i for i in range(30)}, unk_token="w1"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(UsageError, match=r"'w15' of the tokenizer .* without gaps"):
        policy_with(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w0"), tmp_path)


# --- What cannot be loaded -------------------------------------------------------------------------


def drop(pattern: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        for file in folder.glob(pattern):
            file.unlink()

    return edit


def write(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


def deeper(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))


def change(name: str, **fields: object) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        made = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(made | fields))

    return spoil


def larger_tokenizer(folder: Path) -> None:
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["x", "y"])
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        pytest.param(drop("*"), "tokenizer", id="empty-folder"),
        pytest.param(drop("tokenizer*"), "no tokenizer files in", id="no-tokenizer"),
        pytest.param(write("tokenizer.json", "{"), "no usable tokenizer at", id="cut-tokenizer"),
        pytest.param(larger_tokenizer, "ids up to 63, but the model embeds 62", id="tokenizer-does-not-fit"),
        pytest.param(drop("config*"), "no causal language model at", id="no-config"),
        pytest.param(drop("*.safetensors"), "no causal language model at", id="no-weights"),
        pytest.param(write("model.safetensors", "cut"), "no causal language model at", id="cut-weights"),
        # Libraries raise what they like for these: a bare Exception, their own kinds, TypeErrors.
        pytest.param(change("tokenizer.json", added_tokens=[{"id": -1}]), "no usable", id="odd-tokenizer"),
        pytest.param(
            change("tokenizer_config.json", model_max_length="x"), "no usable", id="odd-tokenizer-config"
        ),
        pytest.param(change("config.json", eos_token_id={}), "no usable", id="odd-config"),
        pytest.param(change("config.json", num_hidden_layers=0.5), "no ", id="half-a-layer"),
        # transformers would fill what is missing with random numbers.
        pytest.param(deeper, r"lack 'model.layers.2.input_layernorm.weight' and 8 more", id="missing-layer"),
    ],
)
def test_folder_that_cannot_be_used_is_one_clear_line(
    tiny_model: Make, spoil: Callable[[Path], None], message: str
) -> None:
    folder = tiny_model()
    spoil(folder)
    with pytest.raises(UsageError, match=message) as caught:
        load_pretrained(folder, torch.float32)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("model_type", ["bart", "t5"])
def test_encoder_decoder_is_refused_as_one(tmp_path: Path, model_type: str) -> None:
    """Of BART's kin transformers would load the decoder alone."""
    sizes = {
        "d_model": 16,
        "num_layers": 1,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "decoder_start_token_id": 0,
    }
    config = AutoConfig.for_model(model_type, vocab_size=WORDS + 2, **sizes)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="is an encoder-decoder; give a causal language model"):
        load_pretrained(tmp_path, torch.float32)


def test_special_tokens_behind_the_table_are_characters_in_a_text(tmp_path: Path, tiny_model: Make) -> None:
    folder = tiny_model("llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<image_soft_token>"], special_tokens=True)
    assert tokenizer("<image_soft_token>").input_ids == [WORDS + 2], "an id more than the table has"
    tokenizer.save_pretrained(folder)
    policy = Policy.create(folder, quantiles=3)
    policy.model.eval()
    assert policy.vocabulary == WORDS + 2 and policy.reward_ids == [WORDS + 2, WORDS + 3, WORDS + 4]
    assert max(policy.encode("w1 <image_soft_token> w2")) < policy.vocabulary
    assert check_policy(policy, policy.model) == []
    assert check_export(policy, tmp_path, {}, untie=True) == (True, [])
    export(policy, tmp_path / "out", torch.float32)
    again = Policy.from_export(tmp_path / "out", torch.float32)
    assert (again.vocabulary, again.reward_ids) == (policy.vocabulary, policy.reward_ids)
    assert again.encode("w1 <image_soft_token> w2") == policy.encode("w1 <image_soft_token> w2")


def test_padding_of_minus_1_as_old_llamas_have_it_is_exported_as_an_id_of_the_table(
    tmp_path: Path, tiny_model: Make
) -> None:
    folder = tiny_model("llama")
    for file in ("config.json", "generation_config.json"):
        change(file, pad_token_id=-1)(folder)
    policy = Policy.create(folder, quantiles=3)
    policy.model.eval()
    assert check_export(policy, tmp_path, {}, untie=True) == (True, [])
    export(policy, tmp_path / "out", torch.float32)
    padding = AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.pad_token_id
    assert padding == policy.stop_ids[0]


@pytest.mark.parametrize("role", ["image_token", "pad_token"])
def test_export_of_a_model_with_a_named_token_behind_the_table_is_trained_on_and_pads(
    tmp_path: Path, tiny_model: Make, role: str
) -> None:
    """transformers adds a token that the settings name anew, after the reward tokens."""
    folder = tiny_model("llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<behind>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    change("tokenizer_config.json", **{role: "<behind>"})(folder)
    change("generation_config.json", pad_token_id=WORDS + 2)(folder)
    assert AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<behind>") == WORDS + 2
    source = folder
    for made, quantiles in (("a", 3), ("b", 3), ("c", 2), ("d", 2), ("e", 4)):
        policy = Policy.create(source, quantiles=quantiles)
        policy.model.eval()
        source = tmp_path / made
        assert policy.vocabulary == WORDS + 2 == policy.reward_ids[0]
        assert check_export(policy, tmp_path, {}, untie=True) == (True, [])
        export(policy, source, torch.float32)
        model, tokenizer = (c.from_pretrained(source) for c in (AutoModelForCausalLM, AutoTokenizer))
        assert tokenizer.pad_token_id != 61, "of the unknown"
        assert max(tokenizer.pad_token_id, model.generation_config.pad_token_id) < policy.vocabulary
        batch = tokenizer(["w1 w2", "w3"], padding=True, return_tensors="pt")
        assert not batch["attention_mask"].all() and batch["input_ids"].max() == policy.reward_ids[-1]
        model.generate(**batch, max_new_tokens=2)


@pytest.mark.parametrize("quantiles", [2, 3])
def test_tokens_that_an_export_was_given_since_are_refused_not_read_as_others(
    tmp_path: Path, tiny_model: Make, quantiles: int
) -> None:
    export(Policy.create(tiny_model(), quantiles=3), tmp_path, torch.float32)
    model, tokenizer = (c.from_pretrained(tmp_path) for c in (AutoModelForCausalLM, AutoTokenizer))
    tokenizer.add_tokens(["<new>"])
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="'<new>' of the tokenizer stands among or after"):
        Policy.create(tmp_path, quantiles=quantiles)


def test_outputs_that_a_config_switches_on_do_not_matter(tiny_model: Make) -> None:
    plain = Policy.create(tiny_model("llama"), quantiles=2)
    folder = tiny_model("llama")
    change("config.json", output_hidden_states=True, output_attentions=True, return_dict=False)(folder)
    policy = Policy.create(folder, quantiles=2)
    policy.model.eval()
    assert check_policy(policy, load_reference(folder, torch.float32, torch.device("cpu"))) == []
    drawn = [
        list(sample(one, one.model.eval(), SampleRequest([[1, 2], [3]], Conditioning(1), Sampling(5), 2, 0)))
        for one in (plain, policy)
    ]
    assert drawn[0] == drawn[1]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's
@pytest.mark.parametrize("also_config", [False, True])
def test_adapters_given_as_a_model_are_named_as_such(tiny_model: Make, also_config: bool) -> None:
    folder = tiny_model("llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(folder)
    if not also_config:
        for name in ("config.json", "model.safetensors"):
            (folder / name).unlink()
    with pytest.raises(UsageError, match=r"holds the adapters of a model .*merge_and_unload\(\)") as caught:
        Policy.create(folder, quantiles=2)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_weights_in_eight_bits_are_refused(tiny_model: Make) -> None:
    folder = tiny_model("llama")
    change("config.json", dtype="float8_e4m3fn")(folder)
    with pytest.raises(UsageError, match=r"in torch.float8_e4m3fn, which cannot be trained"):
        Policy.create(folder, quantiles=2)


def test_quantised_weights_are_refused_as_what_they_are(
    tiny_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = AutoModelForCausalLM.from_pretrained

    def quantised(*given: Any, **how: Any) -> Any:
        model, info = load(*given, **how)
        model.config.quantization_config = QuantizationConfigMixin(QuantizationMethod.BITS_AND_BYTES)
        return model, info

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", quantised)
    with pytest.raises(UsageError, match=r"are quantised \(bitsandbytes\), which cannot .* made of$"):
        Policy.create(tiny_model("llama"), quantiles=2)


def test_model_of_few_positions_can_be_exported_and_an_end_below_0_is_none(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=2, n_positions=12)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    change("generation_config.json", eos_token_id=[3, -1])(tmp_path / "model")
    policy = Policy.create(tmp_path / "model", quantiles=2)
    policy.model.eval()
    assert policy.positions == 12 and policy.stop_ids == [3, SEPARATOR_ID]
    assert check_policy(policy, policy.model) == []
    assert check_export(policy, tmp_path, {}, untie=True) == (True, [])


def test_learned_positions_are_a_limit_whatever_the_config_says(tiny_model: Make) -> None:
    folder = tiny_model("gpt2")
    assert Policy.create(folder, quantiles=2).positions == 128
    model, tokenizer = load_pretrained(folder, torch.float32)
    model.config.n_positions = 10**6  # it overstates
    assert Policy(model, tokenizer, 2).positions == 128
    opt = transformers.OPTConfig(
        vocab_size=70, hidden_size=32, word_embed_proj_dim=32, ffn_dim=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=40,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(opt)
    assert len(model.model.decoder.embed_positions.weight) == 42
    model.config.max_position_embeddings = 42  # what the table has, two places for padding included
    assert Policy(model, word_tokenizer(), 2).positions == 40


@pytest.mark.parametrize("odd", ["x", 0.5, {}, [1, "x"]])
def test_end_of_text_that_is_no_id_is_one_clear_line(tiny_model: Make, odd: object) -> None:
    folder = tiny_model()
    change("generation_config.json", eos_token_id=odd)(folder)
    with pytest.raises(UsageError, match=r"eos_token_id") as caught:
        Policy.create(folder, quantiles=2)
    assert "\n" not in str(caught.value)


def test_weights_that_are_a_pickle_are_never_loaded_whatever_names_them(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'pwned'}",)

    model = tiny_model("llama")
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(weights, model / "pytorch_model.bin")  # genuine ones are refused just the same

    def refused() -> None:
        with pytest.raises(UsageError, match=r"no weights in safetensors, and others .* save_pretrained"):
            load_pretrained(model, torch.float32)

    refused()
    for name in ("pytorch_model.bin", "adapter_model.bin"):
        torch.save({"a": Payload()}, model / name)
    refused()
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "pytorch_model.bin")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    refused()
    (model / "model.safetensors.index.json").unlink()
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"transformers_weights": "adapter_model.bin"}))
    refused()
    assert not (tmp_path / "pwned").exists()
    assert torch.load is LOAD, "nobody else's loading is refused"


def test_missing_folder_is_called_missing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no folder '.*nowhere'"):
        load_pretrained(tmp_path / "nowhere", torch.float32)


def test_export_is_asked_for_where_a_model_has_no_reward_tokens(tiny_model: Make) -> None:
    with pytest.raises(UsageError, match="holds no reward tokens"):
        Policy.from_export(tiny_model(), torch.float32)


# --- The exported folder ---------------------------------------------------------------------------

# A tied head without padding, of the table or by the tokenizer, and the opposite; test_models.py has others.
CASES = [("gpt2", 0), ("llama", 10)]
IDS = [f"{architecture}-padded{padding}" for architecture, padding in CASES]
PROMPT = "w4 w8"

# What a user's own program does with an export; it never hears of quark_fast.
USE = """
import json, sys
import numpy as np, torch
torch.set_num_threads(1)
from transformers import AutoTokenizer, pipeline
from transformers.utils import logging
logging.set_verbosity_error()

reports = {}
for folder in sys.argv[1:]:
    pipe = pipeline("text-generation", folder)
    seen = []
    def watch(module, arguments, keywords, output):
        seen.append(keywords["input_ids"].tolist())
        if forced:
            output.logits[..., forced] += 100.0
    pipe.model.register_forward_hook(watch, with_kwargs=True)
    def ids(generated):
        return [[row["generated_token_ids"] for row in rows] for rows in generated]
    report = reports[folder] = {}
    forced = []
    report["text"] = pipe("w4 w8", max_new_tokens=5)[0]["generated_text"]
    report["read"] = seen[0]
    seen.clear()
    texts = pipe(["w4 w8", "w1 w2 w3"], batch_size=2, max_new_tokens=5)
    report["batch"] = [rows[0]["generated_text"] for rows in texts]
    report["read_in_batch"] = seen[0]
    size = pipe.model.get_input_embeddings().weight.shape[0]
    settings = {"max_new_tokens": 12, "num_return_sequences": 100, "return_tensors": True}
    report["drawn"] = [r["generated_token_ids"] for r in pipe("w4 w8", **settings)]
    forced = list(range(62, size))
    report["drawn_by_force"] = [r["generated_token_ids"] for r in pipe("w4 w8", **settings)]
    forced = []
    tokenizer = AutoTokenizer.from_pretrained(folder)
    report["encoded"] = tokenizer("w4 w8").input_ids
    report["encoded_batch"] = tokenizer(["w4 w8", "w1"], padding=True).input_ids
    with torch.no_grad():
        logits = pipe.model(input_ids=torch.tensor([json.load(open(folder + ".ids"))])).logits
    np.save(folder + ".npy", logits.float().numpy())
reports["imported"] = sorted(name for name in sys.modules if name.startswith("quark"))
print(json.dumps(reports))
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], dict[str, Any]]:
    """The cases exported, and what a process without this package makes of the folder."""
    cases: dict[tuple[str, int], dict[str, Any]] = {}
    for architecture, padding in CASES:
        folder = tmp_path_factory.mktemp(f"{architecture}-{padding}")
        policy = Policy.create(save_tiny_model(folder, architecture, padded_vocabulary=padding), quantiles=3)
        sharpen(policy.model)  # in place of training: body and rows are no longer what was loaded
        export(policy, folder / "model", torch.float32)
        ids = policy.conditioned(policy.encode(PROMPT, 9), 2)
        (folder / "model.ids").write_text(json.dumps(ids))
        cases[architecture, padding] = {"policy": policy, "folder": folder / "model", "ids": ids}
    folders = [str(case["folder"]) for case in cases.values()]
    done = subprocess.run(
        [sys.executable, "-c", USE, *folders],
        capture_output=True,
        text=True,
        cwd=tmp_path_factory.mktemp("elsewhere"),
    )
    assert done.returncode == 0, done.stderr
    reports = json.loads(done.stdout.splitlines()[-1])
    assert reports["imported"] == [], "an export must work without this package"
    for case in cases.values():
        case.update(reports[str(case["folder"])], logits=np.load(f"{case['folder']}.npy"))
    return cases


@pytest.fixture(params=CASES, ids=IDS)
def case(request: pytest.FixtureRequest, exported: dict[tuple[str, int], dict[str, Any]]) -> dict[str, Any]:
    return exported[request.param]


def test_exported_pipeline_reads_prefix_and_best_token_before_the_prompt(case: dict[str, Any]) -> None:
    front = [SEPARATOR_ID, VOCABULARY + 2]
    assert case["read"] == [[*front, 4, 8]]
    # Left-padded: generation goes on from the last position.
    short, long = case["read_in_batch"]
    assert short[1:] == [*front, 4, 8] and long == [*front, 1, 2, 3]
    assert case["encoded"] == [*front, 4, 8] and case["encoded_batch"] == [
        [*front, 4, 8],
        [SEPARATOR_ID, *front, 1],
    ]
    texts = [case["text"], *case["batch"]]
    assert all("<|" not in text and "w" in text for text in texts), "the user sees no special token"
    assert case["text"].replace(" ", "").startswith("w4w8")


def test_exported_model_generates_nothing_beyond_the_base_vocabulary(case: dict[str, Any]) -> None:
    for drawn in (case["drawn"], case["drawn_by_force"]):
        new = [i for row in drawn for i in row[4:]]
        assert len(drawn) == 100 and len(set(new)) > 5
        assert max(new) < VOCABULARY


def test_exported_logits_are_those_of_the_policy_in_training(case: dict[str, Any]) -> None:
    policy: Policy = case["policy"]
    with torch.no_grad():
        trained = policy.model(torch.tensor([case["ids"]])).logits[..., :VOCABULARY].numpy()
    # float32, logits up to 10, the same kernels in another process.
    np.testing.assert_allclose(case["logits"][..., :VOCABULARY], trained, rtol=0, atol=1e-4)
    without = torch.tensor([[i for i in case["ids"] if i < VOCABULARY]])
    with torch.no_grad():
        unconditioned = policy.model(without).logits[0, -1, :VOCABULARY].numpy()
    assert np.abs(unconditioned - trained[0, -1]).max() > 0.1, "or else this would prove nothing of the row"


def test_exported_weights_are_safetensors_and_nothing_pickled(case: dict[str, Any]) -> None:
    files = {file.name for file in case["folder"].iterdir()}
    assert "model.safetensors" in files
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl", ".py"))]


def test_export_leaves_the_policy_as_it_was(case: dict[str, Any]) -> None:
    policy: Policy = case["policy"]
    assert isinstance(policy.model.get_input_embeddings(), RewardEmbedding)
    assert policy.tokenizer("w4").input_ids == [4]
    assert policy.model.generation_config.suppress_tokens is None


def test_policy_comes_back_from_its_export(case: dict[str, Any]) -> None:
    policy: Policy = case["policy"]
    again = Policy.from_export(case["folder"], torch.float32)
    for name in ("prefix", "reward_ids", "vocabulary", "stop_ids", "quantiles"):
        assert getattr(again, name) == getattr(policy, name), name
    assert again.encode(PROMPT, 9) == policy.encode(PROMPT, 9)
    for quantile in (0, 1, 2, None):
        ids = torch.tensor([policy.conditioned([4, 8], quantile)])
        assert ids.tolist() == [again.conditioned([4, 8], quantile)]
        with torch.no_grad():
            old, new = (p.model(ids).logits[..., :VOCABULARY] for p in (policy, again))
        torch.testing.assert_close(new, old, rtol=0, atol=1e-5)  # the same float32 weights and kernels


@pytest.mark.parametrize("prefix", ["", "w4 w5", "Q: $A"])
def test_any_prefix_survives_the_export(tmp_path: Path, prefix: str) -> None:
    tokenizer = bare_tokenizer("<s> $A")
    tokenizer.add_tokens(["Q:", "$A"])  # what the language of templates would take for its own
    policy = policy_with(tokenizer, tmp_path, prefix=prefix)
    export(policy, tmp_path / "out", torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(policy.prefix) == len(prefix.split())
    assert tokenizer("w7").input_ids == [*policy.prefix, policy.reward_ids[-1], 7]
    assert Policy.from_export(tmp_path / "out", torch.float32).prefix == policy.prefix


def test_processor_of_a_model_of_images_is_exported_without_its_chat_template(
    tiny_model: Make, tmp_path: Path
) -> None:
    folder, settings = tiny_model(), {"image_processor_type": "Gemma3ImageProcessor"}
    for name in ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"):
        (folder / name).write_text(json.dumps(settings | {"chat_template": "of the processor"}))
        export(Policy.create(folder, quantiles=2), tmp_path / "out", torch.float32)
        assert json.loads((tmp_path / "out" / name).read_text()) == settings


def test_export_in_bfloat16_is_stored_in_bfloat16(tiny_model: Make, tmp_path: Path) -> None:
    policy = Policy.create(tiny_model(), quantiles=2)
    export(policy, tmp_path / "out", torch.bfloat16)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert policy.model.dtype == torch.float32


def test_base_model_with_clashing_decoding_settings_can_be_exported(tiny_model: Make, tmp_path: Path) -> None:
    folder = tiny_model()
    settings = json.loads((folder / "generation_config.json").read_text())
    settings |= {"temperature": 0.6, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    export(Policy.create(folder, quantiles=2), tmp_path / "out", torch.float32)
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_training_on_from_an_export_starts_without_its_reward_token_in_front(case: dict[str, Any]) -> None:
    again = Policy.create(case["folder"], quantiles=3)
    assert again.prefix == [SEPARATOR_ID]
    assert again.vocabulary == VOCABULARY
    fewer = Policy.create(case["folder"], quantiles=2)
    assert fewer.vocabulary == VOCABULARY
    assert fewer.reward_ids == [VOCABULARY, VOCABULARY + 1]
    assert "<|reward_1|>" in fewer.tokenizer.get_vocab()
    assert not any(":" in token for token in fewer.tokenizer.get_vocab()), "the export's own are gone"


# --- The head -------------------------------------------------------------------------------------

HEADS = {
    # name: (configuration, whether its logits are its hidden states times one matrix)
    "llama": (lambda v: tiny_config("llama", v), True),
    "gpt2": (lambda v: tiny_config("gpt2", v), True),
    "qwen2": (lambda v: tiny_config("qwen2", v), True),
    "opt, projected": (
        lambda v: transformers.OPTConfig(
            vocab_size=v, hidden_size=32, word_embed_proj_dim=16, ffn_dim=64, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=64,
        ),
        True,
    ),
    "phi, with a bias": (
        lambda v: transformers.PhiConfig(
            vocab_size=v, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
        ),
        True,
    ),
    "gemma2, soft-capped": (
        lambda v: transformers.Gemma2Config(
            vocab_size=v, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16,
        ),
        False,
    ),
    "granite, scaled": (
        lambda v: transformers.GraniteConfig(
            vocab_size=v, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, logits_scaling=8.0,
        ),
        False,
    ),
    "cohere, scaled": (
        lambda v: transformers.CohereConfig(
            vocab_size=v, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1,
        ),
        False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_head_is_linear_only_where_the_logits_are_hidden_states_times_one_matrix(name: str) -> None:
    """At a random start the logits are so small that a soft cap changes none by more than rounding."""
    make, expected = HEADS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(make(64)).eval()
    head = linear_head(model)
    assert (head is not None) == expected
    assert not model.get_output_embeddings()._forward_hooks, "what was hooked is as before"
    if head is not None:
        ids = torch.arange(20, 30).unsqueeze(0)
        with torch.no_grad():
            hidden = model.base_model(input_ids=ids).last_hidden_state
            torch.testing.assert_close(head(hidden), model(input_ids=ids).logits)


def test_head_of_a_model_that_changes_hidden_states_on_their_way_is_not_linear() -> None:
    """As MiniCPM does: the capped output alone would not show it."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config("llama", 64)).eval()
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0] / 4,))
    assert linear_head(model) is None
    hook.remove()
    assert linear_head(model) is head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_head_of_a_frozen_copy_with_fast_attention_is_linear(dtype: torch.dtype, tiny_model: Make) -> None:
    policy = Policy.create(tiny_model(), quantiles=3)
    assert linear_head(policy.model) is policy.model.lm_head
    assert linear_head(frozen_copy(policy, dtype)) is not None


class OwnLayer(torch.nn.Module):
    """Of a model's own code: its body recomputes it ``if self.gradient_checkpointing and self.training``."""

    gradient_checkpointing = False


def test_layers_that_would_recompute_in_training_mode_alone_are_refused() -> None:
    model = transformers.AutoModelForCausalLM.from_config(tiny_config("llama", 64)).eval()
    model.model.layers = torch.nn.ModuleList([OwnLayer()])
    with pytest.raises(UsageError, match="LlamaForCausalLM does not support gradient checkpointing"):
        recompute_layers(model)


# --- Long prompts ---------------------------------------------------------------------------------


def test_prompts_that_are_too_long_are_left_out_and_counted_or_cut_but_for_chats(
    tiny_model: Callable[..., Path],
) -> None:
    policy = Policy.create(tiny_model(), quantiles=2)
    chat = [{"role": "system", "content": "w1 w2"}, {"role": "user", "content": "w3 w4"}]
    rows = [
        {"prompt": "w1 w2 w3 w4 w5"},
        {"prompt": "w6 w7"},
        {"prompt": Rendered("w1 w2 w3 w4 w9"), "messages": chat},
        {"prompt": "w1 w2 w3 w4 w8", "messages": chat},  # a text, with a chat beside it
    ]
    for cut, kept, said in (
        (False, [[6, 7]], ["3 of 4 prompts left out: longer than 3 tokens (the longest 5)"]),
        (
            True,
            [[3, 4, 5], [6, 7], [3, 4, 8]],
            [
                "2 of 4 prompts cut to their last 3 tokens",
                "1 of 4 prompts left out: longer than 3 tokens (the longest 5)",
            ],
        ),
    ):
        told: list[str] = []
        found, ids, _, shortened = encode_rows(policy, rows, 3, 0, cut=cut, log=told.append)
        assert (ids, told, shortened) == (kept, said, 2 if cut else 0)
        assert len(found) == len(ids) and all(row["prompt"] != "w1 w2 w3 w4 w9" for row in found)
    with pytest.raises(UsageError, match=r"prefix_tokens = 4 leaves no held-out text within the 4 tokens"):
        encode_rows(policy, rows[:2], 4, 4)
    with pytest.raises(UsageError, match=r"prefix_tokens = 2 cuts .* some prompts are messages"):
        encode_rows(policy, rows, 4, 2)
    with pytest.raises(UsageError, match=r"leave no room for a prompt .*lower max_new_tokens"):
        encode_rows(policy, rows, -3, 0)
    with pytest.raises(
        UsageError, match=r"none of 4 prompts fits: the shortest has 2 .* or lower max_new_tokens$"
    ):
        encode_rows(policy, rows, 1, 0)


def test_longest_prompt_follows_from_the_positions_also_of_a_model_within_a_model(
    tiny_model: Callable[..., Path],
) -> None:
    policy = Policy.create(tiny_model("gpt2"), quantiles=2)
    assert policy.room(20) == 128 - 2 - 20
    assert policy.room(20, 50) == 50
    assert Policy.create(tiny_model("llama"), quantiles=2).room(20) == 1024, "of 2048 positions"
    text = transformers.LlamaConfig(max_position_embeddings=77)
    assert positions(transformers.LlavaConfig(text_config=text)) == 77
    assert positions(transformers.MambaConfig()) is None
