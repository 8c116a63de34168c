"""Completions that were scored before, as a pool's first samples."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES
from tiny_runs import SHORT, even_words, rows, small, timeless
from transformers import AutoModelForCausalLM, AutoTokenizer

from quark_fast.config import Config
from quark_fast.data.chat import chat_template
from quark_fast.data.row import Rendered, Row, given
from quark_fast.data.scored import ScoredText, load_scored
from quark_fast.errors import UsageError
from quark_fast.evaluation.side_by_side import Evaluator
from quark_fast.model.policy import Policy
from quark_fast.report.results import headline
from quark_fast.report.tables import markdown_page
from quark_fast.report.texts import pick_examples
from quark_fast.training.explore import Explorer
from quark_fast.training.progress import Progress
from quark_fast.training.scored import encode_scored
from quark_fast.training.trainer import Trainer

Make = Callable[..., Path]
NO_CHAT = chat_template("no model", lambda: pytest.fail("no chat here"))


class Killed(BaseException):
    """The process is gone: nobody handles it."""


def written(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def texts(path: Path, records: list[dict[str, Any]], chat: Any = NO_CHAT) -> list[tuple[Any, ...]]:
    found, _ = load_scored(written(path, records), None, chat)
    return [(one.row["prompt"], one.completion, one.reward, one.ended) for one in found]


# --- files ----------------------------------------------------------------------------------------


def test_rewards_preferences_and_conversations_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    own = {"prompt": "p", "completion": " a", "reward": 0.25, "ended": False, "quantile": 1, "round": 0}
    # CSV spells what is true as a text.
    records = [own, *(own | {"reward": value, "ended": None} for value in (True, "True", "false"))]
    assert [one[2:] for one in texts(path, records)] == [(0.25, False), (1.0, None), (1.0, None), (0.0, None)]
    assert texts(path, [{"prompt": "p", "chosen": " good", "rejected": " bad"}]) == [
        ("p", " good", 1.0, None),
        ("p", " bad", 0.0, None),
    ]

    def chat(talk: list[dict[str, str]]) -> str:
        return "|".join(f"{one['role']}:{one['content']}" for one in talk) + "|"

    asked, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"}
    no = {"role": "assistant", "content": "no"}
    expected = [("user:q|", "yes", 1.0, None), ("user:q|", "no", 0.0, None)]
    assert texts(path, [{"chosen": [asked, answer], "rejected": [asked, no]}], chat) == expected
    assert texts(path, [{"prompt": [asked], "chosen": [answer], "rejected": [no]}], chat) == expected
    scored = {"messages": [asked, answer], "reward": 3}
    assert texts(path, [scored], chat) == [("user:q|", "yes", 3.0, None)]
    parts = {"role": "assistant", "content": [{"type": "text", "text": "y"}, {"type": "text", "text": "es"}]}
    assert texts(path, [{"messages": [asked, parts], "reward": 3}], chat) == [("user:q|", "yes", 3.0, None)]
    assert texts(path, [{"prompt": [asked], "chosen": [parts], "rejected": [no]}], chat) == expected
    # Turns before the last answer are the prompt's, whether the prompt stands there again or not.
    longer = [("user:q|assistant:no|user:q|", "yes", 1.0, None), ("user:q|", "no", 0.0, None)]
    for before in ([asked], []):
        pair = {"chosen": [*before, no, asked, answer], "rejected": [*before, no]}
        assert texts(path, [{"prompt": [asked], **pair}], chat) == longer
        one = {"prompt": [asked], "completion": pair["chosen"], "reward": 1}
        assert texts(path, [one], chat) == longer[:1]
    without = {
        "prompt": [asked | {"role": "system"}, asked],
        "chosen": [asked, answer],
        "rejected": [asked, no],
    }
    assert texts(path, [without], chat)[0] == ("system:q|user:q|", "yes", 1.0, None)
    # A prompt column that is the first turn, as some data sets have it.
    beside = {"prompt": "q", "chosen": [asked, answer], "rejected": [asked, no]}
    assert texts(path, [beside], chat) == expected
    rendered = {"prompt": "user:q|", "messages": [asked], "rendered": True, "completion": "yes", "reward": 1}
    (one,), _ = load_scored(written(path, [rendered]), None, chat)
    assert given(one.row) == given({"prompt": Rendered("x"), "messages": [asked]}), "of a run's own file"
    for told, ended in (("False", False), ("true", True), (0, False), ("", None)):
        assert texts(path, [own | {"ended": told}])[0][3] is ended
    # The prompt's other columns stay, those of a completion do not.
    (one,), _ = load_scored(written(path, [own | {"topic": "t"}]), None, NO_CHAT)
    assert one.row == {"prompt": "p", "topic": "t"}


def test_what_cannot_be_used_is_counted_and_a_file_without_rewards_is_to_be_scored(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = {"prompt": "p", "completion": "c", "reward": 1}
    records = [good, good | {"reward": None}, good | {"completion": ""}, good | {"prompt": " "}]
    found, counts = load_scored(written(path, records), None, NO_CHAT)
    assert [one.reward for one in found] == [1.0]
    assert counts.startswith("4 read, left out: ")
    for reason in ("1 without a reward", "1 without a completion", "1 with a prompt that is empty"):
        assert reason in counts
    # Not the same as a file without rewards, nor as none.
    records = [{"prompt": "p", "completion": "c", "reward": None}, good | {"completion": ""}]
    reasons = r"no completion to use; 1 without a completion; 1 without a reward; it has 'prompt'"
    with pytest.raises(UsageError, match=reasons):
        load_scored(written(path, records), None, NO_CHAT)
    found, counts = load_scored(written(path, [{"prompt": "p", "completion": "c"}] * 2), None, NO_CHAT)
    assert ([one.reward for one in found], counts) == ([None, None], "2 read")


def test_label_of_kto_is_a_reward_of_1_or_0_and_any_other_label_is_the_prompts(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    own = {"prompt": "p", "completion": " a"}
    for label, reward in ((True, 1.0), (False, 0.0), ("True", 1.0), ("false", 0.0)):
        (one,), _ = load_scored(written(path, [own | {"label": label}]), None, NO_CHAT)
        assert (one.reward, one.row) == (reward, {"prompt": "p"}), "no column that a later sample would get"
    for other in (
        {"label": 1},
        {"label": "toxic"},
        {"label": True, "reward": 0.5},
        {"label": True, "reward": None},
    ):
        (one,), said = load_scored(written(path, [own | other]), None, NO_CHAT)
        assert (one.reward, one.row["label"]) == (other.get("reward"), other["label"])
        assert ("its labels are not true and false" in said) == ("reward" not in other)


def test_completions_of_prompts_that_are_too_short_or_long_are_left_out(first: Path, tmp_path: Path) -> None:
    path, good = tmp_path / "a.jsonl", {"completion": "c", "reward": 1}
    records = [good | {"prompt": "p" * n} for n in (1, 2, 3, 4)]
    records.append({"prompt": "p" * 5, "chosen": "a", "rejected": "b"})
    found, counts = load_scored(written(path, records), None, NO_CHAT, 2, 3)
    assert [one.row["prompt"] for one in found] == ["pp", "ppp"]
    assert "3 with a prompt that is longer than 3 characters" in counts
    assert "1 with a prompt that is shorter than 2 characters" in counts
    written(tmp_path / "held.jsonl", [{"prompt": "Once upon a long time"}])
    own = str(first / "completions.jsonl")
    second = run(tmp_path / "second", scored=own, initial_samples=0, min_prompt_characters=17)
    made, every = (rows(folder / "completions.jsonl") for folder in (second, first))
    assert 0 < len(made) == sum(len(row["prompt"]) >= 17 for row in every) < len(every)


@pytest.mark.parametrize(
    "record, message",
    [
        ({"prompt": "p", "completion": "c", "reward": "good"}, "record 1: reward 'good' is no finite number"),
        ({"prompt": "p", "completion": "c", "reward": float("inf")}, "reward inf is no finite number"),
        ({"prompt": "p", "completion": "c", "reward": 10**400}, "is no finite number"),
        ({"prompt": "p", "completion": "c", "reward": -1e308}, r"reward -1e\+308 is no finite number below"),
        ({"prompt": "p", "completion": "c", "reward": 1, "ended": "no"}, "'no' is neither true nor false"),
        ({"chosen": "a", "rejected": "b"}, "no completion to use; 2 without a prompt; it has 'chosen'"),
        ({"prompt": "p", "text": "c"}, "holds no completion to use; it has 'prompt', 'text'"),
    ],
)
def test_file_without_what_is_needed_is_refused(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_scored(written(tmp_path / "a.jsonl", [record]), None, NO_CHAT)


def test_texts_alone_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    with pytest.raises(UsageError, match="holds texts alone"):
        load_scored(str(tmp_path / "a.txt"), None, NO_CHAT)


# --- as ids ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_completion_is_spelled_as_the_model_writes_it(tmp_path: Path, family: str) -> None:
    policy = Policy.create(FAMILIES[family].save(tmp_path), quantiles=3)
    prompt = "The man said that"
    ids = policy.encode(prompt)
    for text in (" it was good", ", and", "\n1 2", "é", " <|reward_1|>"):
        own = policy.encode_completion(prompt, ids, text)
        if policy.decode(policy.encode(prompt + text), []) != prompt + text:
            assert own is None, "a tokenizer that has not all characters"
            continue
        assert own is not None and policy.decode(own, ids) == text
        assert max(own) < policy.vocabulary, "no reward token, whatever is spelled"
        # What no longer stands after the whole of its prompt, whose beginning was cut off.
        cut = policy.encode_completion(prompt, ids[1:], text)
        assert cut is not None and policy.decode(cut, ids[1:]) == text
    chat = policy.encode("[user] q\n[assistant] ", chat=True)
    answer = policy.encode_completion("[user] q\n[assistant] ", chat, "yes, it was", chat=True)
    assert answer is not None and policy.decode(answer, chat) == "yes, it was"
    words = policy.encode_completion(prompt, ids, " it was good")
    assert words == policy.encode(f"{prompt} it was good")[len(ids) :]


GEMMAS = (
    "{{ bos_token }}{% for m in messages %}<turn>{{ m.role }}\n{{ m.content | trim }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)
LLAMA_2S = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}"
    " {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
THINKING = (
    "{% for m in messages %}{% if m.role == 'user' %}[user]{{ m.content }}{% else %}"
    "[assistant]<think>\n\n</think>\n\n{{ m.content }}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]<think>\n{% endif %}"
)


@pytest.mark.parametrize("family", ["gemma", "llama", "qwen2"])
def test_answer_of_a_chat_is_what_its_template_writes_with_the_end_of_its_turn(
    tmp_path: Path, family: str
) -> None:
    folder = FAMILIES[family].save(tmp_path / "model")
    model, tokenizer = (kind.from_pretrained(folder) for kind in (AutoModelForCausalLM, AutoTokenizer))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>", "<end>"]})
    tokenizer.chat_template = {"gemma": GEMMAS, "llama": LLAMA_2S, "qwen2": THINKING}[family]
    model.resize_token_embeddings(len(tokenizer))
    end = tokenizer.convert_tokens_to_ids("<end>")
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, end]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    policy = Policy.create(folder, quantiles=2)
    asked = [{"role": "user", "content": "was it good?"}]
    answer = [{"role": "assistant", "content": "it was good"}]
    record = {"prompt": asked, "chosen": answer, "rejected": [{"role": "assistant", "content": "no"}]}
    found, _ = load_scored(
        written(tmp_path / "a.jsonl", [record]), None, chat_template("x", lambda: tokenizer)
    )
    row = found[0].row
    ids = policy.encode(row["prompt"], chat=True)
    one, _ = encode_scored(policy, found, [row], [ids], 50, [])
    assert one.text == "it was good", "what is scored"
    whole = tokenizer.apply_chat_template(asked + answer, tokenize=False).rstrip("\n")
    assert tokenizer.decode([*policy.prefix, *ids, *one.ids]).removeprefix("<|endoftext|>") == whole


def test_end_is_added_where_the_text_ended(tmp_path: Path) -> None:
    policy = Policy.create(FAMILIES["gpt2"].save(tmp_path), quantiles=3)
    prompts: list[Row] = [{"prompt": "a man"}, {"prompt": "a woman"}]
    prompt_ids = [policy.encode(row["prompt"]) for row in prompts]
    about: list[str] = []

    def ids(completion: str, ended: bool | None, most: int, prompt: str = "a man") -> list[list[int]]:
        text = ScoredText({"prompt": prompt}, completion, 0.5, ended)
        encoded = encode_scored(policy, [text], prompts, prompt_ids, most, about)
        assert all(one.prompt == 0 and one.reward == 0.5 for one in encoded)
        return [one.ids for one in encoded]

    end, own = policy.stop_ids[0], policy.encode_completion("a man", prompt_ids[0], " said it")
    assert own is not None
    assert ids(" said it", None, len(own) + 1) == [[*own, end]]
    assert ids(" said it", False, len(own) + 1) == [own]
    assert ids(" said it", None, len(own)) == [own], "as long as a completion may be: cut off"
    assert about == [
        f"1 of 1 scored completions have max_new_tokens = {len(own)} tokens or more and count as cut off, so"
        " that the model learns no end of theirs; give a higher --max-new-tokens, or say by a column 'ended'"
        " which have one"
    ]
    assert ids(" said it", True, len(own)) == [[*own, end]]
    # A chat's answer ends as the model's chats do, a text as its texts.
    policy.stop_ids = [0, policy.tokenizer.eos_token_id]
    chat: Row = {"prompt": Rendered("[user] q"), "messages": [{"role": "user", "content": "q"}]}
    prompts.append(chat)
    prompt_ids.append(policy.encode("[user] q", chat=True))
    answer = encode_scored(policy, [ScoredText(chat, " said", 0.5, True)], prompts, prompt_ids, 9, about)
    assert answer[0].ids[-1] == policy.tokenizer.eos_token_id != 0 == ids(" said", True, 9)[0][-1]
    with pytest.raises(UsageError, match="can be used: their prompts are held out, or left out of training"):
        ids(" said", None, 9, "a dog")
    assert about[-1].startswith("1 scored completions left out: their prompts are held out")
    with pytest.raises(UsageError, match="positions leave"):
        ids(" said" * 5000, None, 9)


# --- runs -----------------------------------------------------------------------------------------


PROMPTS = [f"The {one} said {two}" for one in ("man", "woman", "dog", "child") for two in ("a", "that", "no")]


def variety(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [len(set(text)) / 10 for text in completions]


def run(folder: Path, **settings: Any) -> Path:
    model = FAMILIES["gpt2"].save(folder.parent / "model")
    config = small(folder, model, **{**SHORT, "held_out": str(folder.parent / "held.jsonl"), **settings})
    return Trainer(config, reward=variety).train().folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    written(folder / "prompts.jsonl", [{"prompt": one} for one in PROMPTS])
    written(folder / "held.jsonl", [{"prompt": one} for one in ("Once upon a time", "a", "1 2")])
    return run(folder / "first", prompts=str(folder / "prompts.jsonl"))


@pytest.fixture
def first(made: Path, tmp_path: Path) -> Path:
    """The folder of a run, which no test changes; what it read is in this test's own folder, too."""
    shutil.copytree(made.parent, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("first"))
    return made


def test_runs_own_completions_teach_another_run_what_they_taught_it_without_sampling(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_sampling(*_: Any) -> Any:
        pytest.fail("nothing is sampled")

    monkeypatch.setattr(Explorer, "_scored", no_sampling)
    own = str(first / "completions.jsonl")
    second = run(tmp_path / "second", scored=own, initial_samples=0)
    sampled, brought = (rows(folder / "completions.jsonl") for folder in (first, second))
    # Batches sampled prompts in another order; what counts is who has which reward, quantile and end.
    kinds = [{json.dumps(row, sort_keys=True) for row in each} for each in (sampled, brought)]
    assert kinds[0] == kinds[1] and len(brought) == len(sampled) == 2 * len(PROMPTS)
    steps = [row["nll"] for row in rows(second / "metrics.jsonl", kind="step")]
    assert len(steps) == SHORT["steps"] and steps[-1] < steps[0]
    assert (second / "evaluation.json").exists()
    again = run(tmp_path / "third", scored=own, initial_samples=0)
    assert timeless(again / "metrics.jsonl") == timeless(second / "metrics.jsonl")


def test_scored_completions_stand_before_those_that_are_sampled(first: Path, tmp_path: Path) -> None:
    records = [
        {"prompt": row["prompt"], "completion": row["completion"]}  # to be scored
        for row in rows(first / "completions.jsonl")[:12]
    ]
    scored = written(tmp_path / "some.jsonl", records)
    second = run(tmp_path / "second", scored=scored, initial_samples=1, rounds=2, explore_samples=1)
    made = rows(second / "completions.jsonl")
    prompts = {row["prompt"] for row in records}
    assert len(made) == len(records) + 2 * len(prompts)
    assert [row["completion"] for row in made[: len(records)]] == [row["completion"] for row in records]
    assert [row["reward"] for row in made] == variety([], [row["completion"] for row in made])
    (one, two) = rows(second / "metrics.jsonl", kind="round")
    assert (one["samples"], two["samples"]) == (len(records) + len(prompts), len(prompts))


def test_each_record_is_scored_with_its_own_columns_and_none_is_scored_twice(
    first: Path, tmp_path: Path
) -> None:
    records = [
        {"prompt": row["prompt"], "completion": row["completion"], **own}
        for row, own in zip(
            rows(first / "completions.jsonl"),
            [{"wanted": "a"}, {"wanted": "b"}, {}] * 8,  # two of each prompt
            strict=True,
        )
    ]
    scored = written(tmp_path / "some.jsonl", records)
    asked: list[tuple[str, Any]] = []
    dies = iter(
        [False, False, False, True]
    )  # after two trials, of training and held-out prompts, and a batch

    def reward(prompts: list[str], completions: list[str], wanted: list[Any]) -> list[float]:
        if next(dies, False):
            raise Killed
        asked.extend(zip(completions, wanted, strict=True))
        return variety(prompts, completions)

    how = {"held_out": str(tmp_path / "held.jsonl"), "scored": scored, "initial_samples": 0}
    config = small(tmp_path / "second", tmp_path / "model", **SHORT | how, sample_batch=8)
    with pytest.raises(Killed):
        Trainer(config, reward=reward).train()
    before = len(asked)
    heard: list[Progress] = []
    Trainer(dataclasses.replace(config, resume=True), reward=reward, listen=heard.append).train()
    assert [event.done for event in heard if "brought along" in event.stage] == [8, 16, 24]
    brought = [(one["completion"], one.get("wanted")) for one in records]
    assert asked[before - 8 : before] + asked[before : before + 16] == brought


def test_file_that_changed_before_the_pool_was_there_is_refused(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first round's batches are kept, and the completions are read again."""
    made = rows(first / "completions.jsonl")
    scored = written(tmp_path / "some.jsonl", made)

    def killed(self: Explorer, *given: Any) -> Any:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Explorer, "_metrics", killed)
        run(tmp_path / "second", scored=scored, initial_samples=1)
    assert list((tmp_path / "second" / "pending").glob("round-1.*")), "sampled, and no checkpoint yet"
    texts = "scored completions of .*some.jsonl"
    for changed, what in (
        ({"reward": 0.123}, texts),
        ({"completion": made[0]["completion"] + "a"}, texts),
        ({"prompt": "another one"}, "training prompts"),
    ):
        written(Path(scored), [*made[1:], made[0] | changed])
        with pytest.raises(UsageError, match=f"the {what} are not those that the run in .*second began with"):
            run(tmp_path / "second", scored=scored, initial_samples=1, resume=True)
    written(Path(scored), made)
    run(tmp_path / "second", scored=scored, initial_samples=1, resume=True)
    run(tmp_path / "whole", scored=scored, initial_samples=1)
    assert timeless(tmp_path / "second" / "metrics.jsonl") == timeless(tmp_path / "whole" / "metrics.jsonl")


def test_rewards_of_another_scale_are_refused_unless_nothing_is_sampled(first: Path, tmp_path: Path) -> None:
    records = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": " no no"}
        for row in rows(first / "completions.jsonl")
    ]
    scored = written(tmp_path / "pairs.jsonl", records)
    counted = r"pairs, of which chosen counts 1 and rejected 0: these are not the rewards of .*variety"
    fix = r"one pool .*--reward none --initial-samples 0 --rounds 1 \(without .* the evaluation\)"
    with pytest.raises(UsageError, match=f"{counted} .*{fix}"):
        run(tmp_path / "second", scored=scored)
    assert not (tmp_path / "second" / "config.yaml").exists(), "before any work"
    alone = run(tmp_path / "alone", scored=scored, initial_samples=0)
    about = json.loads((alone / "versions.json").read_text())["prompts"]
    assert any("only the evaluation uses" in line for line in about)
    assert {row["reward"] for row in rows(alone / "completions.jsonl")} == {0.0, 1.0}
    answers = [{"prompt": one["prompt"], "completion": one["chosen"]} for one in records]
    written(Path(scored), [one | {"label": True} for one in answers])
    with pytest.raises(UsageError, match=r"labels, of which true counts 1 and false 0: .*--reward none"):
        run(tmp_path / "second", scored=scored)
    written(Path(scored), [one | {"reward": 1} for one in answers])
    with pytest.raises(UsageError, match=r"has rewards that are not those of .*variety .*leave the column"):
        run(tmp_path / "second", scored=scored)


def one_at_a_time(prompt: str, completion: str, **columns: Any) -> float | None:
    return None if "a" in completion else 0.9999


def test_rewards_are_compared_at_random_and_with_a_reward_that_is_cached(first: Path, tmp_path: Path) -> None:
    # Every second one agrees: preferences come by turns.
    records = [
        {"prompt": row["prompt"], "chosen": " b", "rejected": " c"}
        for row in rows(first / "completions.jsonl")
    ][:20]
    scored = written(tmp_path / "pairs.jsonl", records)
    model, given = tmp_path / "model", {"held_out": str(tmp_path / "held.jsonl"), "scored": scored}
    with pytest.raises(UsageError, match=r"of 32 looked at\): 0 for ' c'"):
        Trainer(small(tmp_path / "second", model, **SHORT | given), reward=one_at_a_time)
    told = [one | {"completion": " b", "reward": 0.9999 if i % 10 else 7.0} for i, one in enumerate(records)]
    written(
        tmp_path / "pairs.jsonl",
        [{k: v for k, v in one.items() if k not in ("chosen", "rejected")} for one in told],
    )
    some = Trainer(small(tmp_path / "some", model, **SHORT | given), reward=one_at_a_time)
    (said,) = (note for note in some.setup.prompts.notes if "looked at" in note)
    assert "(2 of 20 looked at): 7 for ' b', which" in said and "the others agree" in said
    own = [one | {"completion": " b", "reward": 0.9999} for one in records] + [
        one | {"completion": " a", "reward": 0.5}
        for one in records  # which the reward leaves out
    ]
    written(
        tmp_path / "pairs.jsonl",
        [{k: v for k, v in one.items() if k not in ("chosen", "rejected")} for one in own],
    )
    Trainer(small(tmp_path / "third", model, **SHORT | given), reward=one_at_a_time)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"initial_samples": 0}, "give at least 1, or --scored"),
        ({"scored": "a.jsonl", "prompts": "b.jsonl"}, "leave out --prompts"),
        ({"reward": "none"}, "reward = none leaves nothing to score samples by"),
        ({"reward": "none", "scored": "a.jsonl", "initial_samples": 0}, "it is for --scored FILE with"),
        ({"scored": "a.jsonl", "prefix_tokens": 3, "task": "repetition"}, "give --prefix-tokens 0"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Config(**settings).check()


def test_run_without_a_reward_learns_and_its_table_says_what_it_lacks(first: Path, tmp_path: Path) -> None:
    scored = written(
        tmp_path / "scored.jsonl",
        [
            {"prompt": row["prompt"], "completion": row["completion"], "reward": row["reward"]}
            for row in rows(first / "completions.jsonl")
        ],
    )
    given = {"held_out": str(tmp_path / "held.jsonl"), "reward": "none", "initial_samples": 0}
    config = small(tmp_path / "run", tmp_path / "model", **SHORT | given | {"scored": scored})
    folder = Trainer(config).train().folder
    assert [row["kind"] for row in rows(folder / "metrics.jsonl")] == ["round"] + ["step"] * SHORT["steps"]
    card = (folder / "model" / "README.md").read_text()
    assert "to write what scored.jsonl scores high or prefers, whose completions it learnt from" in card
    about = json.loads((folder / "versions.json").read_text())["prompts"]
    assert "no reward: the table has no score; --judge adds one" in about
    table = json.loads((folder / "evaluation.json").read_text())
    assert table["headline"] == "perplexity" and "mean" not in table["columns"]
    shown = headline(table)
    said = "No reward was given, so nothing here says how good the completions are."
    assert shown.startswith(said) and "perplexity went from" in shown
    assert "Unscored" not in markdown_page(table)
    assert len(pick_examples(rows(folder / "evaluation.jsonl"), 3)) == 3
    # evaluate goes by the run's own choice, and by a reward where one is named.
    assert Evaluator([folder], samples=1).evaluate().table["scorer"]["name"] == "none"
    assert Evaluator([folder], samples=1, reward=one_at_a_time).evaluate().table["headline"] == "mean"
    again = Evaluator([folder / "evaluation.json"], judge="repetition").evaluate().table
    assert again["headline"] == "perplexity" and again["judges"][0]["name"] == "diversity"
    # Nothing tells the classes of sentiment's prompts.
    settings = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(settings.replace("task: toxicity", "task: sentiment"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quark_fast.evaluation.side_by_side.classify_prompts", lambda *_: pytest.fail("asked"))
        assert Evaluator([folder], samples=1).evaluate().table["task"] == "sentiment"
    (folder / "config.yaml").write_text(settings)
    bare = [{k: v for k, v in row.items() if k != "reward"} for row in rows(Path(scored))]
    config = small(tmp_path / "other", tmp_path / "model", **SHORT | given)
    config.scored = written(tmp_path / "bare.jsonl", bare)
    with pytest.raises(UsageError, match="brings no rewards; name what scores it by --reward"):
        Trainer(config)


def test_prompts_of_the_program_beside_scored_ones_are_refused(tmp_path: Path, tiny_model: Make) -> None:
    scored = written(tmp_path / "a.jsonl", [{"prompt": "w1", "completion": " w2", "reward": 1}])
    with pytest.raises(UsageError, match="brings its own prompts"):
        Trainer(small(tmp_path / "run", tiny_model(), scored=scored), reward=even_words, prompts=PROMPTS)
