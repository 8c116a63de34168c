"""A sequence-classification model as a reward: its probabilities, its labels, what identifies it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WORDS, save_tiny_classifier, sharpen, word_tokenizer
from pairwise import pairwise
from tiny_runs import even_words
from tokenizers import normalizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    FNetConfig,
    Gemma3Config,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    RobertaConfig,
    XLNetConfig,
    pipeline,
)

from quark_fast.config import Config
from quark_fast.errors import UsageError
from quark_fast.rewards.classifier import SequenceClassifier
from quark_fast.rewards.reward import Reward
from quark_fast.rewards.text_logits import TextLogits
from quark_fast.rewards.weighted_sum import terms
from quark_fast.tasks.by_name import choose_judges, choose_reward, find_task, load_reward

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
        model.logits.model.classifier.bias.copy_(torch.tensor([20.0, 0.0, 0.0]))
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
    assert label is not None or ":neutral" in str(caught.value)


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
    own = load_reward(f"hf:{one}:threat + hf:{two}", Config(scorer_label="0"))
    assert [part.function.label for _, part in own.function.parts] == ["threat", "neutral"]
    given = [even_words, f"hf:{one} + hf:{two}", "repetition", f"hf:{one}"]
    for labels, chosen in (("threat", ["threat"] * 3), ("0,1,2", ["neutral", "Toxic", "threat"])):
        config = Config(scorer_label=labels)
        parts = terms(choose_reward(config, find_task("repetition"), "cpu", given))
        assert [part.function.label for part in parts if part.name.startswith("hf:")] == chosen
    plain = load_reward(f"hf:{one}", Config(scorer_label="toxic"))
    for spec, label in ((f"1 - hf:{one}", "toxic"), (f"1 - hf:{one}:toxic", None)):
        complement = load_reward(spec, Config(scorer_label=label))
        assert complement.property == "toxic"
        assert complement(ROWS[:3], TEXTS[:3]) == pytest.approx(1 - plain(ROWS[:3], TEXTS[:3]))


def test_judges_may_be_several_labels_of_one_classifier(save: Callable[..., str]) -> None:
    def choose(judge: str) -> Sequence[Reward]:
        return choose_judges(Config(judge=judge), find_task("repetition"), "cpu", [], True)

    one = save()
    judges = choose(f"hf:{one}:toxic, 1 - hf:{one}:threat")
    assert [judge.name for judge in judges] == [f"hf:{one}:toxic", f"1 - hf:{one}:threat"]
    with pytest.raises(UsageError, match=f"as in hf:{one}:neutral, or"):
        choose(f"hf:{one}")


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


# ------------------------------------------------------- any model and tokenizer: a text's score is its own

PLACES = 40  # of the models below
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
SMALL = {"vocab_size": WORDS + 2, "max_position_embeddings": PLACES, **SHAPE}
ENDS = {"pad_token_id": WORDS + 1, "eos_token_id": WORDS}
BART = {
    f"{part}_{name}": size
    for part in ("encoder", "decoder")
    for name, size in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 48))
}
ANY: dict[str, Callable[..., PretrainedConfig]] = {
    "bert": lambda **k: BertConfig(**{**SMALL, **k}),
    "roberta": lambda **k: RobertaConfig(**{**SMALL, "pad_token_id": 1, **k}),
    "distilbert": lambda **k: DistilBertConfig(
        vocab_size=WORDS + 2,
        dim=32,
        n_layers=2,
        n_heads=2,
        hidden_dim=48,
        max_position_embeddings=PLACES,
        **k,
    ),
    "deberta-v2": lambda **k: DebertaV2Config(
        relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8, **{**SMALL, **k}
    ),
    "gpt2": lambda **k: GPT2Config(
        vocab_size=WORDS + 2, n_embd=32, n_layer=2, n_head=2, n_positions=PLACES, **k
    ),
    "opt": lambda **k: OPTConfig(
        word_embed_proj_dim=32,
        ffn_dim=48,
        **{**{name: value for name, value in SMALL.items() if name != "intermediate_size"}, **k},
    ),
    "llama": lambda **k: LlamaConfig(**{**SMALL, **k}),
    "xlnet": lambda **k: XLNetConfig(vocab_size=WORDS + 2, d_model=32, n_layer=2, n_head=2, d_inner=48, **k),
    "bart": lambda **k: BartConfig(
        vocab_size=WORDS + 2, d_model=32, max_position_embeddings=PLACES, **BART, **{**ENDS, **k}
    ),
    "fnet": lambda **k: FNetConfig(
        **{**{name: value for name, value in SMALL.items() if name != "num_attention_heads"}, **k}
    ),
    "gemma3": lambda **k: Gemma3Config(
        text_config={"head_dim": 16, "num_key_value_heads": 1, "sliding_window": 8, **SMALL, **k},
        vision_config={"image_size": 28, "patch_size": 14, **SHAPE},
    ),
}
LIMITS = {"roberta": PLACES - 2, "xlnet": None}  # RoBERTa's first position is behind its padding's
VARIED = ["w3", "w5 w6", "w9 w8 w7 w6 w5 w4 w3 w2 w1", "w11 w12 w13", "w20 w21 w22 w23 w24", "w5 w1 w1"]
LONG = " ".join(f"w{7 * i % 59}" for i in range(90))


@pytest.fixture
def save_any(tmp_path: Path) -> Callable[..., str]:
    """Saves any of the classifiers above beside a tokenizer, whose settings may be odd; its folder."""

    def make(
        kind: str, side: str = "right", pad: str | None = None, longest: int | None = None, **settings: Any
    ) -> str:
        torch.manual_seed(0)
        config = ANY[kind](**settings)
        config.id2label, config.label2id = LABELS, {label: i for i, label in LABELS.items()}
        model = AutoModelForSequenceClassification.from_config(config)
        sharpen(model)
        folder = tmp_path / kind
        model.save_pretrained(folder)
        tokenizer = word_tokenizer(pad=False)
        tokenizer.padding_side = side
        tokenizer.pad_token = pad
        if longest is not None:
            tokenizer.model_max_length = longest
        if kind == "bart":  # reads the last end token
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
                single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", WORDS)]
            )
        tokenizer.save_pretrained(folder)
        return str(folder)

    return make


@torch.inference_mode()
def by_hand(folder: str, texts: list[str], limit: int | None = None, front: bool = False) -> list[float]:
    """p(Toxic | text) of each text by the model as transformers loads it: no padding, no batch."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for text in texts:
        ids = tokenizer(text).input_ids
        if limit is not None and len(ids) > limit:
            ids = ids[-limit:] if front else ids[:limit]
        output = model(input_ids=torch.tensor([ids]), return_dict=True)
        found.append(float(output.logits.double().softmax(-1)[0, 1]))
    return found


def alike(found: list[float | None], expected: list[float]) -> None:
    assert found == pytest.approx(expected, abs=2e-6)
    assert max(expected) - min(expected) > 1e-3, "the model tells the texts apart"


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ANY)
def test_score_is_the_same_alone_and_beside_others(
    save_any: Callable[..., str], kind: str, side: str
) -> None:
    folder = save_any(kind, side)
    scorer = SequenceClassifier(folder, "Toxic")
    expected = by_hand(folder, VARIED)
    alike(scorer([""] * 6, VARIED), expected)
    alike(scorer([""] * 7, [*VARIED, LONG])[:6], expected)  # the longest brings the most padding
    way = {"xlnet": "left", "fnet": "equal"}.get(kind, "right")
    assert scorer.logits.batching == way, "at most as slow as need be"


@pytest.mark.parametrize(
    ("kind", "longest", "reads"),
    pairwise(list(ANY), [None, 10 * PLACES], ["completion", "prompt+completion"]),
)
def test_long_text_is_cut_to_all_that_the_model_takes(
    save_any: Callable[..., str], kind: str, longest: int | None, reads: Any
) -> None:
    folder = save_any(kind, longest=longest)
    scorer = SequenceClassifier(folder, "Toxic", reads)
    limit = LIMITS.get(kind, PLACES) or longest
    assert scorer.logits.limit == limit
    if kind != "bart":  # which would lose its end token by hand
        (value,) = scorer([""], [LONG])
        front = reads == "prompt+completion"
        assert [value] == pytest.approx(by_hand(folder, [LONG], limit, front), abs=2e-6)


@pytest.mark.parametrize(
    ("kind", "pad", "own", "side"),
    pairwise(
        ["gpt2", "gemma3"],
        [None, "<|endoftext|>", "<unk>", "w30"],  # "<|endoftext|>" is the end, too
        [None, WORDS, WORDS + 1, 3],
        ["right", "left"],
    ),
)
def test_last_token_is_found_whatever_the_padding_of_tokenizer_and_model(
    save_any: Callable[..., str], kind: str, pad: str | None, own: int | None, side: str
) -> None:
    folder = save_any(kind, side, pad, pad_token_id=own)
    texts = [*VARIED, "w9 w30", "w9 w3", "w9 <|endoftext|>", "w8 <unk>", "w30"]
    scorer = SequenceClassifier(folder, "Toxic")
    alike(scorer([""] * len(texts), texts), by_hand(folder, texts))


def test_padding_id_that_is_no_token_is_as_none(save_any: Callable[..., str]) -> None:
    folder = save_any("llama", pad_token_id=-1)
    alike(SequenceClassifier(folder, "Toxic")([""] * 6, VARIED), by_hand(folder, VARIED))


def test_completions_of_a_prompt_that_is_too_long_are_told_apart_and_keep_special_tokens(
    save_any: Callable[..., str],
) -> None:
    folder = save_any("bert")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="w50 $A w51", special_tokens=[("w50", 50), ("w51", 51)]
    )
    tokenizer.save_pretrained(folder)
    completions = [" w1", " w2 w3", " w4"]
    found = SequenceClassifier(folder, "Toxic", "prompt+completion")([LONG] * 3, completions)
    plain = save_any("bert")  # the same model; its tokenizer adds nothing
    kept = [" ".join(["w50", *(LONG + text).split()[2 - PLACES :], "w51"]) for text in completions]
    alike(found, by_hand(plain, kept))


def test_bart_reads_texts_apart_that_spell_its_end_token(save_any: Callable[..., str]) -> None:
    folder = save_any("bart")
    texts = ["w1 w2", "w3 <|endoftext|> w4", "w5"]
    alike(SequenceClassifier(folder, "Toxic")([""] * 3, texts), by_hand(folder, texts))


def test_text_without_a_token_scores_none(save_any: Callable[..., str]) -> None:
    folder = save_any("gpt2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("-", "")
    tokenizer.save_pretrained(folder)
    scorer = SequenceClassifier(folder, "Toxic")
    assert scorer([""] * 3, ["-", " ", ""]) == [None] * 3
    assert scorer([""] * 2, ["w1", "--"]) == [*scorer([""], ["w1"]), None]
    assert scorer([], []) == []


def test_outputs_switched_on_in_the_config_do_not_matter(save_any: Callable[..., str]) -> None:
    for kind in ("bert", "gpt2", "llama"):
        plain = SequenceClassifier(save_any(kind), "Toxic")([""] * 6, VARIED)
        # output_attentions needs attention that is computed step by step.
        odd = save_any(kind, return_dict=False, output_hidden_states=True)
        assert SequenceClassifier(odd, "Toxic")([""] * 6, VARIED) == plain


def test_scaled_positions_of_short_texts_are_not_those_of_a_long_neighbour(
    save_any: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [3.0] * 8,
        "original_max_position_embeddings": 16,
        "factor": 2.5,
    }
    folder = save_any("llama", rope_parameters=rope)
    # As for a large model: no text of the check is so long.
    monkeypatch.setattr(TextLogits, "_cheap_length", lambda self: 9)
    scorer = SequenceClassifier(folder, "Toxic")
    texts = [VARIED[0], " ".join(LONG.split()[:30]), *VARIED[1:]]
    alike(scorer([""] * 7, texts), by_hand(folder, texts))
    assert scorer.logits.batching == "right"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_score_that_is_no_number_is_refused_with_its_text(save_any: Callable[..., str], value: float) -> None:
    folder = save_any("bert")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[WORDS + 1] = value
    model.save_pretrained(folder)
    scorer = SequenceClassifier(folder, "Toxic")  # no text of the check has a special token
    assert None not in scorer([""] * 2, ["w1", "w2"])
    with pytest.raises(UsageError, match=r"'w6 <unk>' the logits \[nan, nan, nan\]"):
        scorer([""] * 3, ["w1", "w6 <unk>", "w2"])
    with torch.no_grad():
        model.classifier.bias[1] = value
    model.save_pretrained(folder)
    with pytest.raises(UsageError, match="the logits of a reward are finite numbers"):
        SequenceClassifier(folder, "Toxic")


def test_random_model_is_refused(save_any: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_any("bert")
    model = type(AutoModelForSequenceClassification.from_pretrained(folder))
    forward = model.forward

    def noisy(self: Any, input_ids: Any = None, **inputs: Any) -> Any:
        output = forward(self, input_ids, **inputs)
        output.logits = output.logits + 0.01 * torch.randn_like(output.logits)
        return output

    monkeypatch.setattr(model, "forward", noisy)
    with pytest.raises(
        UsageError, match=r"scores one text differently each time: 'w.*a reward must not be ran"
    ):
        SequenceClassifier(folder, "Toxic")


def test_model_that_reads_its_neighbours_is_given_one_text_at_a_time_and_says_so(
    save_any: Callable[..., str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_any("bert")
    expected = by_hand(folder, VARIED)
    model = type(AutoModelForSequenceClassification.from_pretrained(folder))
    forward = model.forward

    def sociable(self: Any, input_ids: Any = None, **inputs: Any) -> Any:
        output = forward(self, input_ids, **inputs)
        output.logits = output.logits + 0.1 * (output.logits.mean(0) - output.logits)
        return output

    monkeypatch.setattr(model, "forward", sociable)
    with caplog.at_level(logging.INFO):
        scorer = SequenceClassifier(folder, "Toxic")
    assert (
        "texts padded on the right score otherwise than alone; they are scored one at a time" in caplog.text
    )
    alike(scorer([""] * 6, VARIED), expected)


def test_model_that_fails_on_a_text_is_refused_in_a_line(
    save_any: Callable[..., str],
) -> None:
    folder = save_any("bart")
    word_tokenizer().save_pretrained(folder)  # adds no end token, which the model looks for
    with pytest.raises(UsageError, match=r"cannot score a text of \d+ tokens, 'w.*ValueError"):
        SequenceClassifier(folder, "Toxic")


def test_batches_are_of_the_texts_in_the_order_given_and_padded_as_transformers_pads(
    save_any: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_any("bert", pad="<|endoftext|>", pad_token_id=WORDS)
    scorer = SequenceClassifier(folder, "Toxic", batch_size=3)
    seen: list[list[str]] = []
    own = scorer.logits._batch

    def record(rows: Any) -> torch.Tensor:
        seen.append([row.text for row in rows])
        return own(rows)

    monkeypatch.setattr(scorer.logits, "_batch", record)
    found = scorer([""] * 6, VARIED)
    assert seen == [VARIED[:3], VARIED[3:]]
    inputs = AutoTokenizer.from_pretrained(folder)(VARIED[:3], padding=True, return_tensors="pt")
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        assert found[:3] == model(**inputs).logits.double().softmax(-1)[:, 1].tolist(), "to the last bit"
