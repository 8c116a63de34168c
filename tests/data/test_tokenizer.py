"""How chat templates are conditioned, and files of tokenizers that transformers reads as another kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from architectures import sentencepiece
from conftest import qwen2_tokenizer, save_tiny_model, word_tokenizer
from families import FAMILIES
from transformers import AutoTokenizer

from quark_fast.data.tokenizer import check_tokenizer, conditioned_template
from quark_fast.errors import UsageError
from quark_fast.model.loading import load_tokenizer, stored_dtype

# --- Foreign tokenizers ----------------------------------------------------------------------------


def qwen2_folder(folder: Path, tokenizer: Any) -> Path:
    save_tiny_model(folder, "qwen2")
    tokenizer.save_pretrained(folder)
    return folder


def test_file_that_transformers_reads_as_another_kind_is_refused(tmp_path: Path) -> None:
    """transformers makes a Qwen2Tokenizer of whatever a Qwen2 folder holds: here, one that reads nothing."""
    words = word_tokenizer()
    folder = qwen2_folder(tmp_path / "words", words)
    read = AutoTokenizer.from_pretrained(folder)("w1 w2", add_special_tokens=False).input_ids
    assert read != words("w1 w2").input_ids, "or else there is nothing to refuse"
    with pytest.raises(UsageError, match=r"of another kind than Qwen2Tokenizer, .* is read as") as caught:
        load_tokenizer(folder)
    assert str(folder) in str(caught.value)
    with pytest.raises(UsageError, match="of another kind"):
        load_tokenizer(qwen2_folder(tmp_path / "pieces", sentencepiece("bpe")))


@pytest.mark.parametrize("name", FAMILIES)
def test_tokenizer_of_its_own_kind_passes(tmp_path: Path, name: str) -> None:
    FAMILIES[name].tokenizer().save_pretrained(tmp_path)
    check_tokenizer(tmp_path, AutoTokenizer.from_pretrained(tmp_path))
    load_tokenizer(qwen2_folder(tmp_path / "own", qwen2_tokenizer()))


def test_tokenizer_that_only_splits_otherwise_passes(tmp_path: Path) -> None:
    """transformers mends the rules of some files so: the text is whole, and its class is right about it."""
    merged = FAMILIES["qwen3"].tokenizer()
    merged.save_pretrained(tmp_path)
    single = AutoTokenizer.from_pretrained(tmp_path)
    single.backend_tokenizer.model = type(single.backend_tokenizer.model)(
        {piece: i for piece, i in merged.get_vocab().items() if i < 330}, []
    )
    assert single("The man").input_ids != merged("The man").input_ids
    check_tokenizer(tmp_path, single)


@pytest.mark.parametrize(
    "saved", [{"truncation": True, "max_length": 8}, {"padding": "max_length", "max_length": 128}], ids=str
)
def test_settings_of_the_last_texts_that_were_read_are_no_other_kind(
    tmp_path: Path, saved: dict[str, Any]
) -> None:
    folder = FAMILIES["qwen2"].save(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer(["The man said", "that it is good"], **saved)
    tokenizer.save_pretrained(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    assert content["truncation"] or content["padding"], "saved in the file"
    load_tokenizer(folder)


def test_folder_without_a_tokenizer_file_passes(tmp_path: Path) -> None:
    check_tokenizer(tmp_path, word_tokenizer())
    check_tokenizer("no-such-name-in-the-cache", word_tokenizer())


@pytest.mark.parametrize("name", FAMILIES)
def test_model_saved_without_its_tokenizer_says_so_and_how_to_save_it(tmp_path: Path, name: str) -> None:
    """transformers makes a tokenizer of special tokens alone, which reads a text as nothing or as <unk>."""
    FAMILIES[name].config().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="no tokenizer files in") as caught:
        load_tokenizer(tmp_path)
    assert f"tokenizer.save_pretrained({str(tmp_path)!r})" in str(caught.value)


def test_tokenizer_without_a_vocabulary_is_refused(tmp_path: Path) -> None:
    """As a run that was begun without a tokenizer would have saved it."""
    FAMILIES["gpt2"].config().save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="a GPT2Tokenizer, reads nothing in 'The man said"):
        load_tokenizer(tmp_path)


def test_name_that_is_no_hub_models_either_may_be_a_misspelt_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nor is there a folder 'nofolder' here"):
        load_tokenizer("nofolder")
    with pytest.raises(UsageError, match="nor is there a folder 'nofolder' here"):
        stored_dtype("nofolder")
    with pytest.raises(UsageError, match="no usable tokenizer") as caught:
        load_tokenizer(tmp_path)
    assert "nor is there" not in str(caught.value)


# --- Conditioned chat templates --------------------------------------------------------------------

CHAT = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]


@pytest.mark.parametrize(
    ("template", "rendered"),
    [
        pytest.param("{{ messages[0].content }}", "w1", id="plain"),
        pytest.param("\n  {{ messages[0].content }}\n\n", "\n  w1\n", id="white space at both ends"),
        pytest.param("{% if true %}\nx{% endif %}\n", "x", id="tags at both ends"),
        pytest.param("  {% if true %}\nx{% endif %}\n", "x", id="blanks before a tag"),
        pytest.param("  {%- if true %}\nx{%- endif %}{{ eos_token }}\n\n", "xE\n", id="another mark"),
        pytest.param(
            "  {%- for m in messages -%}\n {{ m.role }} {%- endfor -%} \n", "userassistant", id="trimming"
        ),
        pytest.param(
            "<|endoftext|>{{ bos_token }}|{{ bos_token }}", "<|endoftext|>|<|endoftext|>", id="opening"
        ),
        pytest.param("  {% if true %}{{ bos_token }}\nx{% endif %}\n\n", "\nx", id="opening in a tag"),
        pytest.param(
            "{% set ns = namespace(n=0) %}{% macro f(m) %}({{ m }}){% endmacro %}"
            "{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ f(m.content) }}{% endfor %}{{ ns.n }}",
            "(w1)(w2)2",
            id="names of its own",
        ),
        pytest.param("{% set reward_text = 'x' %}{{ reward_text }}", "x", id="a name of ours"),
    ],
)
def test_conditioned_template_writes_the_front_and_then_what_it_wrote(template: str, rendered: str) -> None:
    tokenizer = word_tokenizer()
    tokenizer.bos_token, tokenizer.eos_token = "<|endoftext|>", "E"
    own = tokenizer.apply_chat_template(CHAT, chat_template=template, tokenize=False)
    assert own.removeprefix("<|endoftext|>") == rendered
    front = "Q: \"'\\ {{ é😀 }}\n<|reward_4|>"
    conditioned = conditioned_template(template, tokenizer, front)
    write = {"chat_template": conditioned, "tokenize": False}
    assert tokenizer.apply_chat_template(CHAT, **write) == front + rendered
    assert tokenizer.apply_chat_template(CHAT, **write, reward_front="") == rendered
    assert (
        tokenizer.apply_chat_template(CHAT, **write, reward_front="<|reward_0|>") == "<|reward_0|>" + rendered
    )
    # An export that is trained on, and exported again.
    again = conditioned_template(conditioned, tokenizer, "<|reward_1|>")
    assert (
        tokenizer.apply_chat_template(CHAT, chat_template=again, tokenize=False) == "<|reward_1|>" + rendered
    )
    assert (
        tokenizer.apply_chat_template(CHAT, chat_template=again, tokenize=False, reward_front="") == rendered
    )


@pytest.mark.parametrize(
    "opened",
    [
        "",
        "{{ messages[0].content }}: ",
        "{{ bos_token }} ",
        "{{- bos_token }}{{ '\n' }}",
        "{% set first = bos_token + ' w3 ' %}{{ first }}",
        "{% if bos_token %}{{ bos_token }}{% endif %}\n",
    ],
    ids=["turns", "text before", "BOS", "trimmed", "BOS in a text", "BOS if there is one"],
)
def test_conditioned_template_marks_the_assistants_tokens_as_it_did(opened: str) -> None:
    tokenizer = word_tokenizer()
    tokenizer.bos_token = "<|endoftext|>"
    template = (
        opened + "{% for m in messages %}{{ m.role }} {% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %} {% endfor %}"
    )
    conditioned = conditioned_template(template, tokenizer, "w5 w6 ")
    for written in (template, conditioned, conditioned_template(conditioned, tokenizer, "w7 ")):
        out = tokenizer.apply_chat_template(
            CHAT * 2, chat_template=written, return_dict=True, return_assistant_tokens_mask=True
        )
        pairs = zip(out["input_ids"], out["assistant_masks"], strict=True)
        assert tokenizer.decode([i for i, mask in pairs if mask]) == "w2w2"


@pytest.mark.parametrize(
    "turn",
    [
        pytest.param(
            "{% if m.role == 'user' %}{{ bos_token }}{% endif %}", id="BOS in every turn, as Llama 2's"
        ),
        pytest.param("{% if loop.first %}<|endoftext|>{% endif %}", id="spelled"),
    ],
)
def test_template_that_cannot_mark_with_a_front_marks_nothing_and_writes_what_it_did(turn: str) -> None:
    tokenizer = word_tokenizer()
    tokenizer.bos_token = "<|endoftext|>"
    template = (
        f"{{% for m in messages %}}{turn} {{{{ m.role }}}} \n {{%- generation -%}}\n{{% set x = 'w8' %}}"
        "{{ m.content }}{% endgeneration %}\n {{ x }} {% endfor %}"
    )
    own = tokenizer.apply_chat_template(CHAT * 2, chat_template=template, tokenize=False)
    conditioned = conditioned_template(template, tokenizer, "w5 w6 ")
    for written in (conditioned, conditioned_template(conditioned, tokenizer, "w5 w6 ")):
        text = tokenizer.apply_chat_template(CHAT * 2, chat_template=written, tokenize=False)
        assert text == "w5 w6 " + own.removeprefix("<|endoftext|>")
        warned: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("transformers.utils.chat_template_utils.logger.warning_once", warned.append)
            out = tokenizer.apply_chat_template(
                CHAT * 2, chat_template=written, return_dict=True, return_assistant_tokens_mask=True
            )
        assert not any(out["assistant_masks"]) and "generation" in warned[0]
