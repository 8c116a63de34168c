"""A sequence-classification model as a reward: its probabilities, its labels, what identifies it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WORDS, save_tiny_classifier, sharpen, word_tokenizer
from tokenizers import normalizers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    pipeline,
)

from quark_fast.classifier import SequenceClassifier
from quark_fast.config import Config, UsageError
from quark_fast.scoring import load_reward

TEXTS = ["w1 w2", "w3", "w4 w5 w6 w7 w8 w9 w10", "w11 w12 w13", " ", "w14"]
ROWS = [{"prompt": f"w{i} "} for i in range(6)]
LABELS = {0: "neutral", 1: "Toxic", 2: "threat"}


def config_of(architecture: str, **settings: Any) -> PretrainedConfig:
    body = {"vocab_size": WORDS + 2, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    if architecture == "bert":
        return BertConfig(
            intermediate_size=64, max_position_embeddings=40, pad_token_id=WORDS, **body, **settings
        )
    if architecture == "llama":
        return LlamaConfig(intermediate_size=64, pad_token_id=WORDS, **body, **settings)
    # GPT-2 has no pad token, neither in its tokenizer nor in its settings.
    return GPT2Config(vocab_size=WORDS + 2, n_embd=32, n_layer=2, n_head=2, n_positions=64, **settings)


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., str]:
    """Saves a tiny random classifier and returns its folder."""

    def make(architecture: str = "bert", name: str = "scorer", **settings: Any) -> str:
        settings = {"id2label": LABELS, "label2id": {v: k for k, v in LABELS.items()}, **settings}
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config_of(architecture, **settings))
        sharpen(model)
        model.save_pretrained(tmp_path / name)
        word_tokenizer(pad=architecture != "gpt2").save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return make


@pytest.mark.parametrize("architecture", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification", None])
def test_reward_is_the_probability_that_transformers_pipeline_gives(
    save: Callable[..., str], architecture: str, problem: str | None
) -> None:
    folder = save(architecture, problem_type=problem)
    reward = load_reward(f"hf:{folder}", Config(scorer_label="Toxic"))
    rewards = reward(ROWS, TEXTS)
    # The pipeline, one text at a time: no padding on that side of the comparison.
    judge = pipeline("text-classification", folder, device="cpu", top_k=None)
    for text, value in zip(TEXTS, rewards, strict=True):
        if text.strip():
            scores = {row["label"]: row["score"] for row in judge([text])[0]}
            assert value == pytest.approx(scores["Toxic"], abs=2e-5)  # float32, padded or not
        else:
            assert value != value, "a blank completion is left out"
    assert len({f"{value:.6f}" for value in rewards}) == 6, "the model tells the texts apart"


def test_one_logit_is_a_sigmoid_and_a_regression_the_logit_itself(save: Callable[..., str]) -> None:
    one = {"id2label": {0: "score"}, "label2id": {"score": 0}}
    logit = load_reward(f"hf:{save(name='r', problem_type='regression', **one)}")(ROWS[:1], TEXTS[:1])
    sigmoid = load_reward(f"hf:{save(name='s', **one)}")(ROWS[:1], TEXTS[:1])
    assert sigmoid == pytest.approx(1 / (1 + torch.exp(-torch.tensor(logit))).numpy())
    assert abs(logit[0]) > 0.01


def test_probabilities_close_to_one_stay_apart(save: Callable[..., str]) -> None:
    model = SequenceClassifier(save(), "0")
    with torch.no_grad():
        model.model.classifier.bias.copy_(torch.tensor([20.0, 0.0, 0.0]))
    values = [v for v in model([""] * 6, TEXTS) if v is not None]
    assert len(set(values)) == 5 and min(values) > 1 - 1e-7, "float32 would make ties of them"


@pytest.mark.parametrize(("label", "index"), [("Toxic", 1), ("toxic", 1), ("THREAT", 2), ("0", 0), ("2", 2)])
def test_label_is_found_by_name_in_any_case_or_by_number(
    save: Callable[..., str], label: str, index: int
) -> None:
    assert SequenceClassifier(save(), label).index == index


def test_exact_name_wins_over_another_case(save: Callable[..., str]) -> None:
    folder = save(id2label={0: "a", 1: "A", 2: "0"}, label2id={"a": 0, "A": 1, "0": 2})
    assert [SequenceClassifier(folder, label).index for label in ("a", "A", "0", "1")] == [0, 1, 2, 1]


@pytest.mark.parametrize("label", [None, "toxicity", "3", "-1", ""])
def test_label_that_is_missing_or_unknown_is_refused_with_those_there_are(
    save: Callable[..., str], label: str | None
) -> None:
    with pytest.raises(UsageError) as caught:
        SequenceClassifier(save(), label)
    assert "neutral (0), Toxic (1), threat (2)" in str(caught.value)
    assert ("--scorer-label" if label is None else repr(label)) in str(caught.value)


def test_prompt_is_read_only_when_asked_for(save: Callable[..., str]) -> None:
    folder = save()
    others = [{"prompt": "w40 w41 "} for _ in ROWS]
    for reads, same in (("completion", True), ("prompt+completion", False)):
        reward = load_reward(f"hf:{folder}", Config(scorer_label="0", scorer_reads=reads))
        assert (reward(ROWS[:4], TEXTS[:4]).tolist() == reward(others[:4], TEXTS[:4]).tolist()) is same
    model = SequenceClassifier(folder, "0", "prompt+completion")
    assert model(["w1 "], ["w2"]) == SequenceClassifier(folder, "0")([""], ["w1 w2"])


def test_long_text_is_cut_to_what_the_model_takes(save: Callable[..., str]) -> None:
    (value,) = SequenceClassifier(save(), "0")([""], [" ".join(["w1"] * 500)])
    assert value is not None and 0 <= value <= 1


def test_weights_labels_and_tokenizer_identify_the_scorer(save: Callable[..., str]) -> None:
    folder = save()
    first = load_reward(f"hf:{folder}", Config(scorer_label="0"))
    assert load_reward(f"hf:{folder}", Config(scorer_label="0")).sha256 == first.sha256
    assert first.name == f"hf:{folder}" and first.version == "label neutral, reads completion"
    assert load_reward(f"hf:{folder}", Config(scorer_label="1")).version != first.version
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        model.classifier.weight[0, 0] += 1e-3
    model.save_pretrained(folder)
    other_weights = load_reward(f"hf:{folder}", Config(scorer_label="0")).sha256
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save_pretrained(folder)
    other_tokenizer = load_reward(f"hf:{folder}", Config(scorer_label="0")).sha256
    assert len({first.sha256, other_weights, other_tokenizer}) == 3


def test_labels_go_to_the_classifiers_in_order_and_a_complement_names_its_property(
    save: Callable[..., str],
) -> None:
    one, two = save(name="one"), save(name="two")
    reward = load_reward(f"hf:{one} + -1*hf:{two}", Config(scorer_label="neutral, 1"))
    assert [part.function.label for _, part in reward.function.parts] == ["neutral", "Toxic"]
    both = load_reward(f"hf:{one} + hf:{two}", Config(scorer_label="threat"))
    assert [part.function.label for _, part in both.function.parts] == ["threat", "threat"]
    complement = load_reward(f"1 - hf:{one}", Config(scorer_label="toxic"))
    plain = load_reward(f"hf:{one}", Config(scorer_label="toxic"))
    assert complement.property == "toxic"
    assert complement(ROWS[:3], TEXTS[:3]) == pytest.approx(1 - plain(ROWS[:3], TEXTS[:3]))


def test_what_is_no_classifier_is_refused(
    save: Callable[..., str], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    # A causal model has no head for labels; transformers would make one of random numbers.
    with pytest.raises(UsageError, match="give a complete sequence-classification model"):
        SequenceClassifier(str(tiny_model()), "0")
    with pytest.raises(UsageError, match="no folder"):
        load_reward("hf:./nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no usable tokenizer"):
        load_reward(f"hf:{tmp_path / 'empty'}")


def test_texts_that_run_out_of_memory_are_scored_by_halves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scorer = SequenceClassifier(str(save_tiny_classifier(tmp_path / "rude")), "rude", batch_size=8)
    texts = [f"w{i} w{i + 1}" for i in range(20)]
    expected = scorer([""] * 20, texts)
    own = scorer._probabilities

    def limited(part: list[str]) -> torch.Tensor:
        if len(part) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return own(part)

    monkeypatch.setattr(scorer, "_probabilities", limited)
    assert scorer([""] * 20, texts) == pytest.approx(expected, abs=1e-6)
    assert "out of memory: from here on 2 texts side by side" in caplog.text
