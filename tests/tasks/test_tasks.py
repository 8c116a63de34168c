"""Sentiment and repetition: their rewards, prompts and measures, and tiny runs of the whole protocol."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import save_tiny_classifier, save_tiny_model
from tiny_runs import rows, small

from quark_fast import evaluate, generate, train
from quark_fast.config import TASK_DEFAULTS, Config
from quark_fast.errors import UsageError
from quark_fast.evaluation.prompt_classes import CLASSES
from quark_fast.model.encode import encode_rows
from quark_fast.model.policy import Policy
from quark_fast.pool.pool import RolloutPool
from quark_fast.report.columns import COLUMNS
from quark_fast.tasks import repetition, sentiment
from quark_fast.tasks.by_name import find_task
from quark_fast.training.trainer import Trainer

# --- sentiment --------------------------------------------------------------------------------------

# Compound scores that VADER's own README publishes for its examples.
PUBLISHED = {
    "VADER is smart, handsome, and funny.": 0.8316,
    "VADER is smart, handsome, and funny!": 0.8439,
    "VADER is very smart, handsome, and funny.": 0.8545,
    "VADER is VERY SMART, handsome, and FUNNY.": 0.9227,
    "VADER is not smart, handsome, nor funny.": -0.7424,
    "The book was good.": 0.4404,
    "At least it isn't a horrible book.": 0.431,
    "The book was only kind of good.": 0.3832,
    "The plot was good, but the characters are uncompelling and the dialog is not great.": -0.7042,
    "Today SUX!": -0.5461,
    "Today only kinda sux! But I'll get by, lol": 0.5249,
    "Make sure you :) or :D today!": 0.8633,
    "Not bad at all": 0.431,
}


def test_sentiment_reward_is_vaders_published_compound_mapped_to_its_target() -> None:
    texts = [*PUBLISHED, "The table is made of wood.", " \n"]
    positive = sentiment.sentiment_reward("positive").function(prompts=[""] * 15, completions=texts)
    negative = sentiment.sentiment_reward("negative").function(prompts=[""] * 15, completions=texts)
    expected = [(1 + compound) / 2 for compound in PUBLISHED.values()]
    assert positive[:13] == pytest.approx(expected, abs=1e-9)
    assert negative[:13] == pytest.approx([1 - value for value in expected], abs=1e-9)
    assert positive[13] == negative[13] == 0.5, "a text without any of its words is exactly in the middle"
    assert positive[14] is None and negative[14] is None


def test_completions_without_sentiment_share_a_quantile() -> None:
    pool = RolloutPool(quantiles=5)
    rewards = [0.1, 0.2, *[0.5] * 5, 0.8, 0.9, 0.95]
    pool.add([[1]] * 10, [[2]] * 10, rewards)
    assert len(set(pool.labels()[2:7].tolist())) == 1


def test_sentiment_property_is_what_should_fall() -> None:
    assert sentiment.sentiment_reward("positive").property == "negativity"
    assert sentiment.sentiment_reward("negative").property == "positivity"
    # Runs that were begun with VADER out of its wheel go on.
    assert sentiment.sentiment_reward("positive").identity == [
        "vader",
        "vaderSentiment 3.3.2",
        "3bf1d243b98b1afad575b9f22bc2cb1e212b94ff89ca74f8a23a588d024ea311",
    ]
    # The two are opposite scales: no pool holds both.
    assert sentiment.sentiment_reward("negative").identity[1] == "vaderSentiment 3.3.2, of negative text"


def test_words_of_the_quantiles_rise_with_the_reward() -> None:
    for target in ("positive", "negative"):
        task = find_task("sentiment", target)
        worst, best = task.reward().function(prompts=["", ""], completions=task.words_for(2))
        assert best > 0.8 and worst < 0.2


def test_completion_counts_as_positive_above_the_middle_and_in_its_prompts_class_alone() -> None:
    def measured(reward: float, name: str | None = "neutral") -> dict[str, float]:
        return sentiment.measures({"prompt": "x", "prompt_class": name}, [1, 2], reward)

    assert measured(float("nan")) == {}
    assert measured(0.51) == {"target": 1.0, "target_neutral": 1.0}
    assert measured(0.5) == {"target": 0.0, "target_neutral": 0.0}, "a tie is no positive text"
    assert measured(0.9, "negative") == {"target": 1.0, "target_negative": 1.0}
    assert measured(0.9, None) == {"target": 1.0}, "other rows have a class, this one has none yet"


def test_prompts_beside_some_of_which_a_class_is_given_are_classed(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    def evens(prompts: list[str], completions: list[str], prompt_class: list[Any]) -> list[float]:
        return [0.5 + len(text) % 3 / 10 for text in completions]

    train_rows: list[Any] = [{"prompt": f"w{i} w{i + 1}"} for i in range(8)]
    train_rows[0]["prompt_class"] = "positive"
    held_out = [{"prompt": "w9", "prompt_class": "negative"}, {"prompt": "w8"}]
    settings = {"task": "sentiment", "judge": "none", "rounds": 1, "eval_rows": "best"}
    config = small(tmp_path / "run", tiny_model(), **settings)
    Trainer(config, reward=evens, listen=None, prompts=train_rows, held_out=held_out).train()
    classes = [row["prompt_class"] for row in rows(tmp_path / "run" / "held_out.jsonl")]
    assert classes[0] == "negative" and classes[1] in CLASSES
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["classes_sha256"]
    train_rows[0]["prompt_class"] = "hard"
    config = small(tmp_path / "other", tiny_model(), **settings)
    with pytest.raises(UsageError, match="prompt_class = 'hard': this task keeps a prompt's class there"):
        Trainer(config, reward=evens, listen=None, prompts=train_rows, held_out=held_out)


def digest(rows: list[dict[str, Any]]) -> str:
    return hashlib.sha256("\n".join(row["prompt"] for row in rows).encode()).hexdigest()[:16]


def test_sentiment_prompts_are_the_fixed_split() -> None:
    train_rows, held_out = sentiment.embedded_prompts()
    assert (len(train_rows), len(held_out)) == (1023, 200)
    prompts = [row["prompt"] for row in [*train_rows, *held_out]]
    assert len(set(prompts)) == len(prompts)
    assert {row["source"] for row in held_out} == {"book", "realtoxicityprompts"}
    assert not any("[MASK]" in prompt for prompt in prompts)
    assert digest(held_out) == "f9af5fbcf2e4c642"


# --- repetition -------------------------------------------------------------------------------------


def test_diversity_reward_of_hand_counted_texts() -> None:
    reward = repetition.repetition_reward()
    texts = [
        "a b c d e f",  # nothing twice
        "a b a b a b",  # of 5, 4, 3 n-grams 2, 2, 2 differ
        "!!!!!!!!",  # marks count each by itself: 1 of 7, 6, 5
        "Yes. Yes. Yes.",  # 6 words and marks: 2 of 5, 2 of 4, 2 of 3
        "a b c",  # no 4-gram
        "",
    ]
    values = reward.function(prompts=[""] * 6, completions=texts)
    assert values[:4] == pytest.approx(
        [1.0, 2 / 5 * 2 / 4 * 2 / 3, 1 / 7 * 1 / 6 * 1 / 5, 2 / 5 * 2 / 4 * 2 / 3]
    )
    assert values[4:] == [None, None]
    assert reward.property == "repetition"
    assert reward.identity == [
        "diversity",
        "1",
        "87ed78e3f5c3b55d559e7b765e2991492ae9028a81f065b8a9356adec250499c",
    ]


def test_repetition_measures_of_hand_counted_ids() -> None:
    found = repetition.measures({"prompt": ""}, [1, 2, 1, 2, 1, 2], 0.5)
    assert found == pytest.approx(
        {"rep2": 3 / 5, "rep3": 2 / 4, "rep4": 1 / 3, "diversity": 2 / 5 * 2 / 4 * 2 / 3, "distinct": 2.0}
    )
    assert repetition.measures({"prompt": ""}, [1, 2, 3], 0.5).keys() == {"rep2", "rep3", "distinct"}


def test_repetition_texts_are_the_fixed_split() -> None:
    train_rows, held_out = repetition.embedded_prompts()
    assert (len(train_rows), len(held_out)) == (192, 128)
    assert digest(held_out) == "75460e6350811393"
    assert not any("[MASK]" in row["prompt"] for row in train_rows)


# --- what a task promises ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASK_DEFAULTS)
def test_every_metric_of_a_task_has_its_column(name: str) -> None:
    task = find_task(name)
    known = {column.key for column in COLUMNS}
    assert task.name == name
    assert {task.headline, *task.columns, *task.more_columns} <= known
    assert not set(task.columns) & set(task.more_columns)
    assert len(task.words_for(1)) == 1 and task.words_for(1)[0] == task.words[-1]


# --- texts and their prefixes -----------------------------------------------------------------------


def test_prefix_is_the_prompt_and_the_whole_text_is_held_out(tiny_model: Callable[..., Path]) -> None:
    policy = Policy.create(tiny_model(), quantiles=2)
    rows = [{"prompt": "w1 w2 w3 w4 w5", "text": "own"}, {"prompt": "w6 w7 w8"}, {"prompt": "w9 w8 w7 w6"}]
    asked, ids, texts, _ = encode_rows(policy, rows, 4, 3)
    assert ids == [[1, 2, 3], [9, 8, 7]], "a text of 3 tokens has none beyond its prefix"
    assert texts == [[1, 2, 3, 4], [9, 8, 7, 6]], "cut behind max_tokens"
    assert asked == [
        {"prompt": policy.decode([1, 2, 3]), "text": "own"},
        {"prompt": policy.decode([9, 8, 7])},
    ], "other columns are the user's own"
    cut = encode_rows(policy, rows, 4, 0, cut=True)
    assert cut == (rows, [[2, 3, 4, 5], [6, 7, 8], [9, 8, 7, 6]], [], 1)
    with pytest.raises(UsageError, match=r"none of 3 texts has more than prefix_tokens = 5 tokens"):
        encode_rows(policy, rows, 9, 5)


# --- tiny runs --------------------------------------------------------------------------------------

TINY = {
    "--quantiles": "3",
    "--rounds": "2",
    "--steps": "4",
    "--batch-size": "8",
    "--micro-batch": "8",
    "--precision": "fp32",
    "--threads": "1",
    "--model": "model",
    "--prompts": "texts.txt",
}
REWARDS = """
def evens(prompts, completions, **columns):
    assert "prompt_class" not in columns, "a reward without such a parameter would fail on it"
    numbers = [[int(w) for w in c.replace("<unk>", "").split("w") if w] for c in completions]
    return [sum(n % 2 == 0 for n in each) / len(each) if each else None for each in numbers]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    here = tmp_path_factory.mktemp("tasks")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.syspath_prepend(here)
        save_tiny_model(here / "model", "llama")
        (here / "few_rewards.py").write_text(REWARDS)
        lines = [f"w{i} w{j} w{i + 1} w{j + 1} w{i + 2} w{j + 2}" for i in range(10) for j in (20, 30, 40)]
        (here / "texts.txt").write_text("\n".join(lines))
        yield here


def flags(**other: str) -> list[str]:
    chosen = TINY | {f"--{name.replace('_', '-')}": value for name, value in other.items()}
    return [part for name, value in chosen.items() for part in (name, value)]


def values(path: Path, metric: str) -> dict[str, float]:
    rows = json.loads(path.read_text())["rows"]
    return {row["name"]: row["metrics"][metric]["value"] for row in rows}


# The tiny model writes no spaces, so the task's own reward, of words, would see one word.
REPETITION = {
    "task": "repetition",
    "reward": "few_rewards:evens",
    "prefix_tokens": "4",
    "max_new_tokens": "24",
    "min_new_tokens": "24",
    "unlikelihood_ngram": "1",
}


@pytest.mark.usefixtures("reports", "no_plots")
def test_repetition_run_decodes_greedily_and_measures_text_and_repeats(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(flags(**REPETITION, output="repetition")) == 0
    heard = capsys.readouterr()
    assert "rep-4" in heard.out and "text ppl" in heard.out
    run = folder / "repetition"
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["sampling"]["temperature"] == 0
    assert evaluation["headline"] == "rep4" and evaluation["samples_per_prompt"] == 1
    for row in rows(run / "evaluation.jsonl"):
        assert row["tokens"] == 24, "no completion ends early"
        assert row["text_tokens"] == 3, "the second half of a text of six"
        assert len(row["prompt"].split("w")) == 5, "the first four tokens"
        assert 0 <= row["measures"]["rep4"] <= 1
    for name in ("rep2", "rep3", "rep4", "diversity", "distinct", "text_perplexity", "text_accuracy"):
        assert name in evaluation["rows"][1]["metrics"] and name in evaluation["rows"][1]["change"]
    report = (run / "report.html").read_text()
    assert "perplexity of text" in report and "repeated 3-grams" in report
    assert "expected max" not in report, "a column of another task"
    steps = rows(run / "metrics.jsonl", kind="step")
    assert all(row["unlikelihood"] >= 0 for row in steps) and any(row["unlikelihood"] for row in steps)

    # The same numbers again from the folder alone: its held-out file holds the whole texts.
    assert evaluate.main(["repetition", "--threads", "1", "--json", "again.json"]) == 0
    again = json.loads((folder / "again.json").read_text())
    assert again["rows"][0]["metrics"] == evaluation["rows"][0]["metrics"]
    assert again["prompts"] == evaluation["prompts"] == 3


def test_prefix_and_completion_are_as_long_as_the_papers() -> None:
    config = Config(task="repetition")
    assert (config.prefix_tokens, config.max_new_tokens, config.min_new_tokens) == (32, 128, 128)
    assert config.eval_temperature == 0


def test_texts_too_short_for_a_prefix_are_left_out_and_counted(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (folder / "texts.txt").read_text().split("\n")
    (folder / "some_short.txt").write_text("\n".join(["w1 w2", "w3 w4 w5 w6", *lines]))
    (folder / "held.txt").write_text("w7 w8 w9 w7 w8\nw7")
    given = REPETITION | {"prompts": "some_short.txt", "held_out": "held.txt", "rounds": "1", "steps": "1"}
    assert train.main(flags(**given, output="short")) == 0
    heard = " ".join(capsys.readouterr().err.split())
    assert "2 of 32 training texts left out: no longer than prefix_tokens = 4" in heard
    assert "1 of 2 held-out texts left out: no longer than prefix_tokens = 4" in heard
    assert "30 training and 1 held-out prompts" in heard
    assert evaluate.main(["short", "--prompts", "some_short.txt", "--threads", "1"]) == 0
    said = capsys.readouterr()
    assert "2 of 32 texts of some_short.txt left out" in " ".join(said.err.split())
    assert "30 prompts" in " ".join(said.out.split())


def test_generate_decodes_greedily_on_demand(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["repetition", "w1 w2", "--temperature", "0", "--max-new-tokens", "4", "--threads", "1"]
    heard = []
    for seed in ("0", "1"):
        assert generate.main([*arguments, "--seed", seed]) == 0
        heard.append(capsys.readouterr().out)
    assert heard[0] == heard[1]
    assert generate.main([*arguments, "--samples", "2"]) == 2
    assert "greedy ones are all the same" in capsys.readouterr().err
    assert generate.main([*arguments, "--temperature", "-1"]) == 2
    assert "--temperature -1.0" in capsys.readouterr().err


def test_evaluate_takes_another_temperature_and_refuses_copies(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main(["repetition", "--samples", "2"]) == 2
    assert "eval_temperature = 0" in capsys.readouterr().err
    arguments = ["repetition", "--samples", "2", "--temperature", "1", "--threads", "1", "--json", "t.json"]
    assert evaluate.main(arguments) == 0
    table = json.loads((folder / "t.json").read_text())
    assert table["sampling"]["temperature"] == 1 and table["samples_per_prompt"] == 2


# Unlikelihood without Quark.
ALONE = {"quantiles": "1", "contrast_coef": "0", "guidance": "1", "eval_guidance": ""}


def test_unlikelihood_runs_without_quark(folder: Path) -> None:
    # One quantile: one token before every sample, no conditioning on reward.
    assert train.main(flags(**(REPETITION | ALONE), output="alone")) == 0
    run = folder / "alone"
    assert list(values(run / "evaluation.json", "rep4")) == ["base model", "best token", "no token"]
    metrics = rows(run / "metrics.jsonl")
    assert not [row for row in metrics if row["kind"] == "probe"], "one token tells nothing apart"
    assert "unlikelihood" in metrics[-1] and "contrast" not in metrics[-1]
    assert {row["quantile"] for row in rows(run / "completions.jsonl") if row["reward"] is not None} == {0}
    # Its export generates like any other.
    assert generate.main(["alone", "w1 w2", "--max-new-tokens", "4", "--threads", "1"]) == 0


def test_sentiment_run_classes_its_prompts_first_and_reports_the_share_of_each(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {
        "task": "sentiment",
        "reward": "few_rewards:evens",
        "max_new_tokens": "6",
        "eval_samples": "4",
        "eval_guidance": "2",
        "output": "sentiment",
    }
    assert train.main(flags(**given)) == 0
    heard = " ".join(capsys.readouterr().out.split())
    assert "hare positive" in heard
    run = folder / "sentiment"
    classes = {row["prompt"]: row["prompt_class"] for row in rows(run / "held_out.jsonl")}
    assert len(classes) == 3 and set(classes.values()) <= {"negative", "neutral", "positive"}
    evaluation = json.loads((run / "evaluation.json").read_text())
    samples = rows(run / "evaluation.jsonl")
    for of_table in evaluation["rows"]:
        mine = [row for row in samples if row["row"] == of_table["name"] and row["score"] is not None]
        # few_rewards:evens names no property: the score is the reward.
        share = sum(row["score"] > 0.5 for row in mine) / len(mine)
        assert of_table["metrics"]["target"]["value"] == pytest.approx(share)
        for name in set(classes.values()):
            of_class = [row["score"] > 0.5 for row in mine if classes[row["prompt"]] == name]
            found = of_table["metrics"][f"target_{name}"]["value"]
            assert found == pytest.approx(sum(of_class) / len(of_class))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "quark_fast.evaluation.side_by_side.classify_prompts", lambda *_: pytest.fail("classed again")
        )
        assert evaluate.main(["sentiment", "--threads", "1", "--json", "again.json"]) == 0
    again = json.loads((folder / "again.json").read_text())
    assert again["rows"][0]["metrics"]["target"] == evaluation["rows"][0]["metrics"]["target"]

    # Other prompts are classed by sampling.
    (folder / "other.txt").write_text("w1 w2\nw3 w4")
    assert evaluate.main(["sentiment", "--prompts", "other.txt", "--threads", "1", "--json", "o.json"]) == 0
    assert json.loads((folder / "o.json").read_text())["prompts"] == 2


def test_negative_sentiment_by_a_classifier_from_training_to_evaluation(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny_classifier(folder / "scorer")
    given = {
        "task": "sentiment",
        "target": "negative",
        "scorer": "scorer",
        "scorer_label": "rude",
        "scorer_reads": "prompt+completion",  # its tokenizer takes each completion for one unknown word
        "max_new_tokens": "6",
        "eval_samples": "2",
        "rounds": "1",
        "output": "rude",
    }
    assert train.main(flags(**given)) == 0
    assert "hare negative" in " ".join(capsys.readouterr().out.split())
    evaluation = json.loads((folder / "rude" / "evaluation.json").read_text())
    assert evaluation["scorer"]["name"] == "hf:scorer" and evaluation["target"] == "negative"
    best = rows(folder / "rude" / "evaluation.jsonl", row="best token")
    share = sum(row["score"] > 0.5 for row in best) / len(best)
    assert values(folder / "rude" / "evaluation.json", "target")["best token"] == pytest.approx(share)

    # Another label is another scorer; --scorer is --reward hf: there, too.
    other = ["--scorer", "scorer", "--scorer-label", "kind", "--threads", "1", "--json", "kind.json"]
    assert evaluate.main(["rude", *other]) == 0
    again = json.loads((folder / "kind.json").read_text())
    assert again["scorer"]["name"] == "hf:scorer" and again["scorer"] != evaluation["scorer"]
