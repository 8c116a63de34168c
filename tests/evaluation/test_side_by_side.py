"""Runs, plain models and saved tables side by side: who is sampled, after what, and what does not compare."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WORDS, export, save_tiny_classifier, save_tiny_model, sharpen
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, PreTrainedTokenizerFast

from quark_fast.arguments import load_config
from quark_fast.config import Config
from quark_fast.data.row import Rendered, to_file
from quark_fast.errors import UsageError
from quark_fast.evaluation import perplexity
from quark_fast.evaluation.open_run import run_config
from quark_fast.evaluation.perplexity import text_nll
from quark_fast.evaluation.saved_tables import OUT_OF_DOMAIN, check_comparable
from quark_fast.evaluation.side_by_side import Evaluated, Evaluator
from quark_fast.evaluation.subjects import Run, find_subject, find_subjects, labels
from quark_fast.evaluation.summary import scorer_in_words
from quark_fast.metrics import Sample, as_json, compare
from quark_fast.model.loading import frozen
from quark_fast.model.policy import Policy
from quark_fast.report.results import headline
from quark_fast.report.tables import as_text
from quark_fast.rewards.reward import NO_REWARD
from quark_fast.rollout import transformers
from quark_fast.rollout.sampling import SampleRequest
from quark_fast.runtime.run_folder import COMPLETIONS, RunFolder
from quark_fast.runtime.run_folder import PROMPTS as CHATS
from quark_fast.tasks.by_name import choose_reward, find_task
from quark_fast.training.trained import TrainedRun

CPU = torch.device("cpu")
PROMPTS = [f"w{i} w{i + 1}" for i in range(6)]


def evens(prompts: list[str], completions: list[str], **columns: object) -> list[float | None]:
    """Share of even words; None for a completion without any."""
    numbers = [[int(n) for n in re.findall(r"\d+", c)] for c in completions]
    return [sum(n % 2 == 0 for n in each) / len(each) if each else None for each in numbers]


def odds(prompts: list[str], completions: list[str], **columns: object) -> list[float | None]:
    return [None if r is None else 1 - r for r in evens(prompts, completions)]


def save_sharp(folder: Path, architecture: str, seed: int) -> Path:
    save_tiny_model(folder, architecture)
    model = AutoModelForCausalLM.from_pretrained(folder)
    sharpen(model)
    with torch.no_grad():
        next(iter(model.parameters())).mul_(1 + 0.1 * seed)
    model.save_pretrained(folder)
    return folder


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """Letters, digits and pairs of "w" with a digit: it takes the words of the others to pieces."""
    letters = ["w", *map(str, range(10)), " ", "<", ">", "u", "n", "k"]
    vocabulary = {text: i for i, text in enumerate([*letters, *(f"w{d}" for d in range(10))])}
    vocabulary["<|endoftext|>"] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocabulary, [("w", str(d)) for d in range(10)]))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


def save_run(folder: Path, base: str, seed: int, quantiles: int = 3, **settings: Any) -> Path:
    """A finished run as the evaluation reads it: settings, exported model, prompts, scorer."""
    config = Config(
        model=base,
        quantiles=quantiles,
        max_new_tokens=5,
        eval_samples=2,
        precision="fp32",
        eval_guidance="2",
        eval_rows="all",
        **settings,
    )
    policy = Policy.create(base, quantiles=quantiles, seed=seed)
    export(policy, folder / "model", torch.float32)
    config.save(folder / "config.yaml")
    lines = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS)
    (folder / "held_out.jsonl").write_text(lines)
    trained = [
        {"prompt": "w9 w9", "round": 0},
        {"prompt": PROMPTS[1], "round": 0},
        {"prompt": "w1", "round": 1},
    ]
    (folder / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in trained))
    (folder / "evaluation.json").write_text(json.dumps({"scorer": {"name": "test_side_by_side:evens"}}))
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working folder: two models of one tokenizer, one of another, two runs of the first model."""
    here = tmp_path_factory.mktemp("evaluator")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        # The oracles are of float32; which one "auto" is hangs on what else the machine does just now.
        patch.setattr("quark_fast.runtime.machine._bf16_is_faster", lambda: False)
        save_sharp(here / "base", "llama", 0)
        save_sharp(here / "cousin", "gpt2", 1)
        torch.manual_seed(0)
        tokenizer = letter_tokenizer()
        config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=64)
        stranger = AutoModelForCausalLM.from_config(config)
        sharpen(stranger)
        stranger.save_pretrained(here / "stranger")
        tokenizer.save_pretrained(here / "stranger")
        save_run(here / "runs" / "a", "base", 1, reward="test_side_by_side:evens")
        save_run(here / "runs" / "b", "base", 2, reward="test_side_by_side:evens")
        (here / "prompts.txt").write_text("\n".join(PROMPTS))
        (here / "others.txt").write_text("w7\nw8 w9\nw30 w31")
        yield here


def test_prompts_that_a_program_gave_twice_are_measured_twice(place: Path) -> None:
    shutil.copytree(place / "runs" / "a", place / "runs" / "twice")
    lines = "".join(json.dumps({"prompt": "w1 w2", "answer": n}) + "\n" for n in range(3))
    (place / "runs" / "twice" / "held_out.jsonl").write_text(lines)
    (domain,) = Evaluator(["runs/twice"], reward=evens).domains
    assert [row["answer"] for row in domain.rows] == [0, 1, 2]


def test_a_base_model_beside_the_run_is_found_from_other_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "project" / "models" / "base").mkdir(parents=True)
    run = tmp_path / "project" / "runs" / "a"
    (run / "model").mkdir(parents=True)
    (run / "model" / "config.json").touch()

    def base(folder: Path | str = run, **settings: Any) -> str | None:
        Config(**{"model": "models/base", "output": "runs/a"} | settings).save(run / "config.yaml")
        return run_config(Path(folder)).model

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert base() == base("../project/runs/a") == "../project/models/base"
    assert base(model="someone/model") == "someone/model", "a name of the hub"
    assert base(model=None) is None
    assert base(output=str(run)) == base(output="other/a") == "models/base", "where it began is not known"
    monkeypatch.chdir(tmp_path / "project")
    assert base() == "models/base"


def made(*subjects: str, **settings: Any) -> Evaluated:
    return Evaluator(subjects, **settings).evaluate()


SMALL: dict[str, Any] = {
    "task": "toxicity",
    "reward": evens,
    "prompts": "prompts.txt",
    "samples": 2,
    "max_new_tokens": 5,
}


def flat(prompts: list[str], completions: list[str], **columns: object) -> list[float | None]:
    return [len(text) / 100 for text in completions]


def test_judges_stand_beside_the_scorer_and_change_nothing_else(place: Path) -> None:
    alone = made("runs/a", judge="none")
    judged = made("runs/a", judge="test_side_by_side:odds, test_side_by_side:flat")
    assert alone.table["judges"] == []
    assert not any("judge" in name for row in alone.samples for name in row["measures"])
    names = ["test_side_by_side:odds", "test_side_by_side:flat"]
    assert [one["name"] for one in judged.table["judges"]] == names
    for before, after in zip(alone.samples, judged.samples, strict=True):
        of_odds = odds([], [after["completion"]])[0]
        expected = before["measures"] | {"judge test_side_by_side:flat": len(after["completion"]) / 100}
        if of_odds is not None:
            expected["judge test_side_by_side:odds"] = of_odds
        assert after["measures"] == pytest.approx(expected)
        assert before == after | {"measures": before["measures"]}
    change = row_of(judged, "best token")["change"]["judge test_side_by_side:flat"]
    assert change["relative"] is not None
    shown = judged.markdown().replace("\\", "")
    assert "score by test_side_by_side:odds" in shown and "Judge 1: test_side_by_side:odds source" in shown
    with pytest.raises(UsageError, match="evens is the reward itself"):
        made("runs/a", judge="test_side_by_side:evens")


def in_one_line(done: Evaluated) -> str:
    return " ".join(as_text(done.table).split())


def test_judge_that_rewarded_a_run_is_not_said_to_have_taken_no_part(place: Path, tmp_path: Path) -> None:
    judges = "test_side_by_side:evens, test_side_by_side:odds"
    found = made("runs/a", reward="test_side_by_side:flat", judge=judges)
    assert found.table["trained_by"] == {"a": ["test_side_by_side:evens"]}
    shown = in_one_line(found)
    assert "By test_side_by_side:evens, which was in the reward that trained a, score with" in shown
    assert "By test_side_by_side:odds, which took no part in training, score with" in shown
    page = found.markdown().replace("\\", "")
    assert re.search("Judge 1: test_side_by_side:evens .*; it was in the reward that trained a.", page)
    assert re.search("Judge 2: test_side_by_side:odds .*; it took no part in training.", page)

    kept = saved(tmp_path / "kept.json", found)
    beside = made("runs/b", kept, reward="test_side_by_side:flat", judge=judges)
    assert beside.table["trained_by"] == {
        "b": ["test_side_by_side:evens"],
        "kept: a": ["test_side_by_side:evens"],
    }
    assert "in the reward that trained b and kept: a" in in_one_line(beside)


def test_run_of_which_nothing_says_the_reward_is_evaluated_by_one_that_is_named(place: Path) -> None:
    run = save_run(place / "runs" / "unknown", "base", 3, reward="test_side_by_side:evens")
    (run / "evaluation.json").unlink()
    said = "runs/unknown/versions.json does not say what the run's scorer was"
    with pytest.raises(UsageError, match=f"{said}; name one by --reward"):
        Evaluator("runs/unknown")
    both = Evaluator(["runs/unknown", "runs/a"], reward="test_side_by_side:evens")
    assert both.remarks[0] == f"{said}, so a judge may have rewarded it"
    assert both.tables[""]["trained_by"] == {"a": ["test_side_by_side:evens"]}
    shutil.rmtree(run)


def test_sum_that_rewarded_a_run_names_its_terms(place: Path) -> None:
    run = save_run(
        place / "runs" / "sum", "base", 3, reward="0.5*test_side_by_side:evens + test_side_by_side:odds"
    )
    config = load_config(run / "config.yaml")
    reward = choose_reward(config, find_task(config.task), "cpu", None)
    about = {"scorer": scorer_in_words(reward)}
    assert [one["name"] for one in about["scorer"]["terms"]] == [
        f"test_side_by_side:{n}" for n in ("evens", "odds")
    ]
    (run / "evaluation.json").write_text(json.dumps(about))
    found = made("runs/sum", reward="test_side_by_side:flat", judge="test_side_by_side:odds")
    assert "By test_side_by_side:odds, which was in the reward that trained sum" in in_one_line(found)
    shutil.rmtree(run)


def test_run_of_one_token_has_no_rows_of_others(place: Path) -> None:
    settings = {"reward": "test_side_by_side:evens", "quantile_weights": "best", "contrast_coef": 0.0}
    run = save_run(place / "runs" / "best", "base", 3, **settings)
    evaluator = Evaluator(["runs/best", "runs/a"], rows="ends")
    assert "best trained one reward token alone" in evaluator.remarks[0]
    names = [row["name"] for row in evaluator.evaluate().table["rows"]]
    assert [name for name in names if name.startswith("best: ")] == ["best: best token"]
    assert "a: worst token" in names
    with pytest.raises(UsageError, match="runs/best trained one token alone; leave guidance out"):
        Evaluator(["runs/best"], guidance="2")
    shutil.rmtree(run)


def test_saved_samples_are_judged_as_they_are(place: Path, tmp_path: Path) -> None:
    done = made("runs/a", judge="none")
    table = saved(tmp_path / "old.json", done)
    again = made(table, judge="test_side_by_side:odds")
    live = made("runs/a", judge="test_side_by_side:odds")
    assert [row["measures"] for row in again.samples] == [row["measures"] for row in live.samples]
    assert again.table["judges"] == live.table["judges"]
    beside = made(table, saved(tmp_path / "judged.json", live)).table
    assert beside["judges"] == live.table["judges"], "of the second table alone"
    with pytest.raises(UsageError, match="evens is the reward itself"):
        made(table, judge="test_side_by_side:evens")


def test_judge_of_another_version_does_not_compare(place: Path, tmp_path: Path) -> None:
    done = made("runs/a", judge="test_side_by_side:odds")
    done.table["judges"][0]["sha256"] = "other"
    table = saved(tmp_path / "old.json", done)
    with pytest.raises(UsageError, match="judge test_side_by_side:odds"):
        made(table, "runs/b", judge="test_side_by_side:odds")
    assert made(table, "runs/b", judge="none").table["judges"] == []
    other = saved(tmp_path / "other.json", made("runs/a", judge="test_side_by_side:odds", seed=1))
    with pytest.raises(UsageError, match="judge test_side_by_side:odds"):
        made(table, other)
    again = made(table, other, judge="test_side_by_side:odds").table
    assert [one["sha256"] == "other" for one in again["judges"]] == [False], (
        "one judge for all of their samples"
    )


def test_as_many_are_sampled_read_and_scored_side_by_side_as_asked(
    place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sampled, read = list[int](), list[int]()
    own, by_parts = transformers._sample_batch, perplexity.by_parts

    def seen(policy: Any, read: Any, request: SampleRequest, generator: Any) -> Any:
        sampled.append(len(request.prompts) * request.samples)
        return own(policy, read, request, generator)

    def parted(count: int, size: int, work: Any) -> Any:
        read.append(size)
        return by_parts(count, size, work)

    monkeypatch.setattr(transformers, "_sample_batch", seen)
    monkeypatch.setattr(perplexity, "by_parts", parted)
    scorer = f"hf:{save_tiny_classifier(tmp_path / 'rude')}:rude"
    asked = {"sample_at_once": 4, "read_batch": 3, "score_batch": 5}
    evaluator = Evaluator("runs/a", reward=scorer, judge="none", **asked)
    sampled.clear()  # those that the reward was tried out on
    evaluator.evaluate()
    # 6 prompts, 2 samples each: in one stream 4 side by side, in two 2.
    assert set(sampled) == {4, 2} and set(read) == {3}
    assert evaluator.reward.function.batch_size == 5
    with pytest.raises(UsageError, match="sample_at_once = -1"):
        Evaluator("runs/a", judge="none", sample_at_once=-1)


def test_how_many_are_side_by_side_is_of_a_tables_judge_alone(place: Path, tmp_path: Path) -> None:
    table = saved(tmp_path / "a.json", made("runs/a", judge="none"))
    judge = f"hf:{save_tiny_classifier(tmp_path / 'rude')}:rude"
    assert made(table, judge=judge, score_batch=2).table["judges"]
    for asked in ({"score_batch": 2}, {"judge": judge, "read_batch": 2}):
        with pytest.raises(UsageError, match="only tables are named"):
            made(table, **asked)


def samples_of(done: Evaluated, name: str) -> list[str]:
    return [row["completion"] for row in done.samples if row["row"] == name]


def row_of(done: Evaluated, name: str) -> dict[str, Any]:
    return next(row for row in done.table["rows"] if row["name"] == name)


def saved(path: Path, done: Evaluated) -> str:
    path.write_text(json.dumps(done.table))
    path.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in done.samples))
    return str(path)


# --- who stands in the table, after what ----------------------------------------------------------


def test_rows_of_several_runs_can_be_told_apart_and_share_their_base_model(place: Path) -> None:
    one = made("runs/a")
    modes = ["best token", "guided w=2", "quantile 1", "worst token", "no token"]
    assert [row["name"] for row in one.table["rows"]] == ["base model", *modes]
    both = made("runs/a", "runs/b")
    expected = ["base model", *(f"{run}: {mode}" for run in "ab" for mode in modes)]
    assert [row["name"] for row in both.table["rows"]] == expected
    assert len(set(expected)) == len(both.table["rows"]) and both.table["prompts"] == len(PROMPTS)
    # The same seed, prompts and sampling for all, whoever stands beside them.
    assert samples_of(both, "a: best token") == samples_of(one, "best token")
    assert samples_of(both, "b: best token") == samples_of(made("runs/b"), "best token")
    assert samples_of(both, "a: best token") != samples_of(both, "b: best token")


def test_table_names_what_its_models_compute_in(place: Path) -> None:
    run = Path(shutil.copytree("runs/b", "runs/c"))
    settings = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(settings.replace("precision: fp32", "precision: bf16"))
    for subjects, dtype in (
        (["runs/a"], "float32"),
        (["runs/c"], "bfloat16"),
        (["runs/a", "runs/c"], "bfloat16 and float32"),
    ):
        assert f"seed 0, dtype {dtype}." in made(*subjects).markdown()


def test_changes_are_against_the_first_row_and_paired_by_prompt(place: Path) -> None:
    done = made("cousin", "base", **SMALL)
    by_row: dict[str, list[Sample]] = {"cousin": [], "base": []}
    for row in done.samples:
        by_row[row["row"]].append(Sample(**{k: v for k, v in row.items() if k != "row"}))
    expected = {k: as_json(v) for k, v in compare(by_row["cousin"], by_row["base"]).items()}
    assert row_of(done, "cousin")["change"] is None
    assert row_of(done, "base")["change"] == expected


def test_plain_model_of_a_run_is_its_base_row_after_the_runs_own_prefix(place: Path) -> None:
    run = made("runs/a")
    for subjects in (("runs/a", "base"), ("base", "runs/a")):
        beside = made(*subjects)
        names = [row["name"] for row in beside.table["rows"]]
        assert names[0] == "base" and "base model" not in " ".join(names) and names[1] == "a: best token"
        assert samples_of(beside, "base") == samples_of(run, "base model")
        assert row_of(beside, "base")["prefix"] == "<|endoftext|>"
    # Alone it gets what its tokenizer puts in front, which here is nothing.
    alone = made("base", **SMALL)
    assert row_of(alone, "base")["prefix"] == ""
    assert samples_of(alone, "base") != samples_of(run, "base model")


def test_exported_model_as_a_plain_one_writes_what_the_run_does_with_its_best_token(place: Path) -> None:
    run, export = made("runs/a"), made("runs/a/model", **SMALL)
    (row,) = export.table["rows"]
    prefix = re.sub(r":[0-9a-f]{12}", "", row["prefix"])
    assert (row["name"], prefix) == ("a/model", "<|endoftext|><|reward_2|>")
    assert samples_of(export, "a/model") == samples_of(run, "best token")


def test_short_names_tell_subjects_apart_and_keep_hub_names_whole(place: Path) -> None:
    (place / "old" / "a").mkdir(parents=True, exist_ok=True)
    (place / "old" / "a" / "config.yaml").write_bytes((place / "runs/a/config.yaml").read_bytes())
    (place / "old" / "a" / "model").symlink_to(place / "runs" / "a" / "model")
    found = [find_subject(one) for one in ("runs/a", "old/a", "base", "org/no-such-model")]
    assert labels(found) == ["runs/a", "old/a", f"{place.name}/base", "org/no-such-model"]
    with pytest.raises(UsageError, match=r"base is named twice"):
        labels([find_subject("base"), find_subject("base")])
    with pytest.raises(UsageError, match=r"\./base is named twice"):
        labels([find_subject("./base"), find_subject(str(place / "base"))])


def test_run_that_training_returned_is_its_folder_and_one_subject_needs_no_list(place: Path) -> None:
    run = TrainedRun(Path("runs/a"))
    for given in ([run], run, "runs/a", Path("runs/a")):
        assert {label: one.given for label, one in find_subjects(given).items()} == {"a": "runs/a"}
    assert Evaluator(run, prompts=Path("prompts.txt")).tables[""]["source"] == "prompts.txt"
    for given in (torch.nn.Linear(1, 1), [torch.nn.Linear(1, 1)]):
        with pytest.raises(UsageError, match="a Linear cannot be evaluated; give a run"):
            find_subjects(given)  # type: ignore[arg-type]


def test_a_program_gives_its_prompts_as_to_the_trainer(place: Path) -> None:
    rows = [{"prompt": text, "kind": "a"} for text in PROMPTS[1:]]
    done = Evaluator("runs/a", prompts=PROMPTS, out_of_domain=rows)
    own, other = done.tables.values()
    assert own["source"] == other["source"] == "the program's own"
    assert (own["prompts"], other["prompts"]) == (len(PROMPTS), len(PROMPTS) - 1)
    from_file = Evaluator("runs/a", prompts="prompts.txt").tables[""]
    assert own["prompts_sha256"] == from_file["prompts_sha256"]
    for given, said in (
        ([], "prompts: an empty list"),
        ([{"text": "a"}], r"prompts\[0\] has no column"),
        (3, "prompts is of type int"),
    ):
        with pytest.raises(UsageError, match=said):
            Evaluator("runs/a", prompts=given)  # type: ignore[arg-type]


def test_prompts_that_a_run_was_trained_on_are_counted(place: Path) -> None:
    assert made("runs/a").table["trained_on"] == {"a": 1}
    assert made("runs/a", prompts="others.txt").table["trained_on"] == {}
    kept = place / "runs" / "a" / "completions.jsonl"
    content = kept.read_bytes()
    try:
        for damaged in (b"{", b"[]\n", b"{}\n"):
            kept.write_bytes(damaged)
            with pytest.raises(UsageError, match=r"completions.jsonl does not say what"):
                made("runs/a")
    finally:
        kept.write_bytes(content)


def test_chats_that_a_template_renders_otherwise_today_are_still_those_of_the_training(
    tmp_path: Path,
) -> None:
    chats = [[{"role": "user", "content": text}] for text in ("a", "b", "c")]
    then, today = (
        [{"prompt": Rendered(f"{day} {chat[0]['content']}"), "messages": chat} for chat in chats]
        for day in ("Monday", "Tuesday")
    )
    folder = RunFolder(tmp_path)
    folder.write_rows(CHATS, map(to_file, then))
    folder.write_rows(COMPLETIONS, ({"round": 0, "prompt": row["prompt"]} for row in then[:2]))
    run = Run("run", tmp_path, Config())
    assert [run.trained_on(rows) for rows in (then, today, today[2:])] == [2, 2, 0]


# --- perplexity -----------------------------------------------------------------------------------


def measured_by(done: Evaluated) -> tuple[str, str]:
    """Who measured the perplexity, on which tokens."""
    return done.table["perplexity"]["model"], done.table["perplexity"]["tokens"]


@torch.no_grad()
def by_hand(folder: Path, prompt: str, text: str) -> tuple[float, int]:
    """-log p of the tokens that hold a letter of the text, one forward of the whole, float64 after it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer(prompt + text).input_ids
    logp = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    place, nll, tokens = 0, 0.0, 0
    for at, i in enumerate(ids):
        place += len(tokenizer.convert_ids_to_tokens(i))
        if place > len(prompt) and at > 0:
            nll -= float(logp[at - 1, i])
            tokens += 1
    return nll, tokens


def test_perplexity_model_reads_the_text_with_its_own_tokenizer_prompt_in_front(place: Path) -> None:
    done = made("base", ppl_model="stranger", **SMALL)
    assert measured_by(done) == ("stranger", "re-tokenised")
    for row in done.samples:
        nll, tokens = by_hand(place / "stranger", row["prompt"], row["completion"])
        assert row["tokens"] == tokens and row["nll"] == pytest.approx(nll, rel=1e-4)
    total, count = (sum(row[name] for row in done.samples) for name in ("nll", "tokens"))
    value = row_of(done, "base")["metrics"]["perplexity"]["value"]
    assert value == pytest.approx(math.exp(total / count), rel=1e-9)


def test_perplexity_of_every_row_is_split_into_entropy_and_kl_where_it_is_of_the_tokens_drawn(
    place: Path, tmp_path: Path
) -> None:
    live = made("runs/a", "cousin", task="toxicity", reward=evens)
    for row in live.table["rows"]:
        found = {name: row["metrics"][name]["value"] for name in ("entropy", "base_kl", "perplexity")}
        assert found["entropy"] + found["base_kl"] == pytest.approx(math.log(found["perplexity"]), abs=1e-9)
        assert found["entropy"] > 0.1 and found["base_kl"] > 0, "the nucleus alone makes one for the base"
    assert {"entropy", "base_kl"} <= set(live.table["more_columns"])
    assert "| entropy | KL to base |" in live.markdown()
    # Kept with the samples, and left out of what others drew or counted in other tokens.
    table = saved(tmp_path / "old.json", live)
    assert made(table).table["rows"] == live.table["rows"]
    by_text = made("base", ppl_model="stranger", **SMALL)
    for row in live.samples:
        del row["own_nll"]
    older = made(saved(tmp_path / "older.json", live))
    for done in (by_text, older):
        assert not {"entropy", "base_kl"} & set(done.table["more_columns"])
        assert not any("base_kl" in row["metrics"] for row in done.table["rows"])
        assert "KL to base" not in done.markdown()


def test_token_across_the_border_of_prompt_and_completion_counts_to_the_completion(place: Path) -> None:
    policy = Policy.plain(place / "stranger", torch.float32)
    # Together "w" and "1" are one token. A text without any token counts nothing.
    pairs = [("w2 w", "1 w3"), ("w", "1w"), ("w5", " 7"), ("w4", "")]
    measure = text_nll(policy, frozen(policy.model, CPU), [prompt for prompt, _ in pairs], 40)
    found = measure(range(len(pairs)), [], [text for _, text in pairs])
    for (nll, tokens), (prompt, text) in zip(found, pairs, strict=True):
        expected, count = by_hand(place / "stranger", prompt, text) if text else (0.0, 0)
        assert tokens == count and nll == pytest.approx(expected, rel=1e-4)


def test_long_prompt_is_cut_in_front_and_a_completion_beyond_all_positions_refused(place: Path) -> None:
    policy = Policy.plain(place / "stranger", torch.float32)  # 64 positions
    model = frozen(policy.model, CPU)
    prompt = "w1" + " w1" * 60  # 121 tokens
    for most, kept in ((10, 5), (100, 31)):  # the completion has 2 tokens
        (cut,) = text_nll(policy, model, [prompt], most)([0], [], [" w3"])
        nll, tokens = by_hand(place / "stranger", " w1" * kept, " w3")
        assert cut[1] == tokens == 2 and cut[0] == pytest.approx(nll, rel=1e-4)
    with pytest.raises(UsageError, match=r"longer than the 64 positions .* --ppl-model"):
        text_nll(policy, model, ["w1"], 10)([0], [], [" w3" * 33])


def test_models_of_different_tokenizers_are_measured_on_the_text_of_all(place: Path) -> None:
    assert measured_by(made("base", "cousin", **SMALL)) == ("base", "sampled")
    done = made("base", "stranger", **SMALL)
    assert measured_by(done) == ("base", "re-tokenised")
    for row in done.samples:
        ids = AutoTokenizer.from_pretrained("base")(row["prompt"] + row["completion"]).input_ids
        # The last word of the prompt is one with the completion, unless that begins with a space.
        grown = bool(row["completion"]) and not row["completion"].startswith(" ")
        assert row["tokens"] == len(ids) - len(row["prompt"].split()) + grown


def test_chats_are_refused_where_models_of_one_vocabulary_write_them_differently(
    place: Path, tmp_path: Path
) -> None:
    turns = "{% for m in messages %}{{ m.content }} w5 {% endfor %}"
    template = "{{ bos_token }}" + turns
    strict = "{% if messages[1:] %}{{ raise_exception('one turn') }}{% endif %}" + template
    for name, own in (
        ("ours", template),
        ("same", turns),
        ("other", turns.replace("w5", "w6")),
        ("strict", strict),
    ):
        shutil.copytree(place / "base", tmp_path / name)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        tokenizer.bos_token, tokenizer.chat_template = "<|endoftext|>", own
        tokenizer.save_pretrained(tmp_path / name)
    one, two = ([{"role": "user", "content": f"w{i}"}] * count for i, count in ((3, 1), (4, 2)))
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"prompt": chat}) + "\n" for chat in (one, two)))
    chats = {**SMALL, "prompts": str(tmp_path / "chats.jsonl")}

    def evaluator(*names: str, **settings: Any) -> Evaluator:
        return Evaluator([tmp_path / name for name in names], **{**chats, **settings})

    # Each stands by itself: what its template opens a chat with is before it, and no text.
    prefixes = {name: evaluator(name).opened.policy.prefix for name in ("ours", "same")}
    assert prefixes == {"ours": [WORDS], "same": []}
    assert evaluator("ours", prompts="prompts.txt").opened.policy.prefix == []
    done = evaluator("ours", "same").evaluate()
    assert {row["prompt"] for row in done.samples} == {"w3 w5 ", "w4 w5 w4 w5 "}
    for other in ("other", "strict"):
        with pytest.raises(UsageError, match=f"ours and {other} have different chat templates, which write"):
            evaluator("ours", "same", other)
    # One without a template reads what the others write, and texts need none.
    Evaluator([tmp_path / "ours", "base"], **chats)
    evaluator("ours", "other", prompts="prompts.txt")
    with pytest.raises(UsageError, match="ours and stranger have different tokenizers, which write messages"):
        Evaluator([tmp_path / "ours", "stranger"], **chats)
    # A text may have the conversation that it is from in a column.
    (tmp_path / "texts.jsonl").write_text(json.dumps({"prompt": "w3", "messages": one}))
    Evaluator(["base", "stranger"], **{**chats, "prompts": str(tmp_path / "texts.jsonl")})


def test_task_that_counts_tokens_refuses_two_tokenizers(place: Path) -> None:
    settings = {**SMALL, "task": "repetition", "max_new_tokens": 8, "min_new_tokens": 8}
    (place / "texts.txt").write_text("\n".join(" ".join([f"w{i}"] * 40) for i in range(3)))
    settings |= {"prompts": "texts.txt", "samples": 1}
    assert made("base", "cousin", **settings).table["prompts"] == 3
    with pytest.raises(
        UsageError, match=r"base and stranger have different tokenizers, but repetition counts"
    ):
        Evaluator(["base", "stranger"], **settings)


# --- saved tables ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table(place: Path) -> Evaluated:
    return made("runs/a", "base", **SMALL, out_of_domain="others.txt")


def test_saved_table_stands_beside_a_new_one_paired_by_prompt_and_repeats_no_row(
    place: Path, table: Evaluated, tmp_path: Path
) -> None:
    path = saved(tmp_path / "before.json", table)
    evaluator = Evaluator(["base", path, "runs/b"], **SMALL, out_of_domain="others.txt")
    beside = evaluator.evaluate()
    assert evaluator.remarks[-1] == f"{path}: 1 row left out, the same to the last sample as one of base"
    names = [row["name"] for row in beside.table["rows"]]
    # base of the saved table is, to the last sample, the base of this one.
    assert names[:2] == ["base", "before: a: best token"] and names[-1] == "b: no token"
    assert len(names) == len(set(names)) == 11
    for mine, theirs in (
        (beside.table, table.table),
        (beside.table[OUT_OF_DOMAIN], table.table[OUT_OF_DOMAIN]),
    ):
        old = {row["name"]: row for row in theirs["rows"]}
        for row in mine["rows"]:
            if row["name"].startswith("before: "):
                before = old[row["name"].removeprefix("before: ")]
                assert {k: row[k] for k in ("metrics", "change", "prefix", "guidance")} == {
                    k: before[k] for k in ("metrics", "change", "prefix", "guidance")
                }


def test_what_is_evaluated_prints_as_a_run_does_and_has_its_tables_in_markdown_too(table: Evaluated) -> None:
    shown = repr(table)
    assert shown == str(table) and " ".join(shown.split()).startswith(headline(table.table))
    assert max(map(len, shown.splitlines())) <= 80 and "\\" not in shown and "| base" not in shown
    # The names of two models stand above one another, "label:" and the row.
    words = [word for row in table.table["rows"] for word in row["name"].split(": ")]
    assert all(word in shown for word in words) and "Out of domain: " in shown
    written = table.markdown()
    assert written.startswith("### ") and all(f"| {row['name']} |" in written for row in table.table["rows"])


def test_saved_tables_alone_need_no_model(place: Path, table: Evaluated, tmp_path: Path) -> None:
    other = made("base", "cousin", **SMALL)
    paths = [saved(tmp_path / "one.json", table), saved(tmp_path / "two.json", other)]
    evaluator = Evaluator(paths)
    assert "two.json has no table of out-of-domain prompts" in evaluator.remarks[0]
    done = evaluator.evaluate()
    assert [row["name"] for row in done.table["rows"]][-1] == "two: cousin"
    again = Evaluator([paths[0], saved(tmp_path / "copy.json", table)])
    again.evaluate()
    count, copy = len(table.table["rows"]), tmp_path / "copy.json"
    same = f"{copy}: {count} rows left out, the same to the last sample as those of {paths[0]}"
    assert again.remarks[-1:] == [same]
    assert OUT_OF_DOMAIN not in done.table
    assert made(paths[0]).table["rows"] == table.table["rows"]
    unscored = made("base", "cousin", **{**SMALL, "reward": NO_REWARD})
    alone = made(saved(tmp_path / "unscored.json", unscored))
    assert alone.table == unscored.table and alone.table["headline"] == "perplexity", "no column of scores"


def test_tables_side_by_side_say_of_all_what_may_differ_between_them(
    place: Path, table: Evaluated, tmp_path: Path
) -> None:
    one, two = (json.loads(json.dumps(table.table)) for _ in range(2))
    one |= {"trained_on": {"a": 2}, "kept_round": {"round": 1, "why": "the lowest judge"}}
    two |= {"trained_on": {"a": 3}}
    two["sampling"] |= {"seed": 7, "dtype": "bfloat16 and float32"}
    others = [{**row, "completion": row["completion"] + " w1"} for row in table.samples]
    paths = [
        saved(tmp_path / "one.json", Evaluated(one, table.samples)),
        saved(tmp_path / "two.json", Evaluated(two, others)),
    ]
    assert made(paths[0]).table["kept_round"] == one["kept_round"]
    joint = made(*paths).table
    for found in (joint, joint[OUT_OF_DOMAIN]):
        assert {row["name"].partition(": ")[0] for row in found["rows"]} == {"one", "two"}
    assert (joint["sampling"]["seed"], joint["sampling"]["dtype"]) == ("0 and 7", "float32 and bfloat16")
    assert joint["trained_on"] == {"one: a": 2, "two: a": 3} and "kept_round" not in joint
    assert joint[OUT_OF_DOMAIN]["sampling"]["seed"] == 0
    live = made("base", paths[1], **SMALL).table
    assert live["sampling"]["seed"] == "0 and 7" and live["trained_on"] == {"two: a": 3}
    # All rows of the copy are the first table's, of which alone the table then is.
    copy = made(paths[0], saved(tmp_path / "copy.json", Evaluated(one, table.samples))).table
    assert copy["trained_on"] == {"a": 2} and copy["sampling"] == one["sampling"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"reward": odds}, r"scorer test_side_by_side:odds .*test_side_by_side:evens"),
        ({"prompts": "others.txt"}, r"prompts 3 of sha256 .* 6 of sha256"),
        ({"samples": 3}, r"samples a prompt 3 in the one, 2 in the other"),
        ({"top_p": 0.5}, r"top_p 0\.5 in the one, 0\.9 in the other"),
        ({"temperature": 0.5}, r"temperature 0\.5"),
        ({"max_new_tokens": 6}, r"max_new_tokens 6 in the one, 5 in the other"),
        ({"ppl_model": "base"}, r"perplexity is of tokens re-tokenised in the one, sampled in the other"),
        ({"task": "repetition", "samples": 2, "temperature": 1.0, "min_new_tokens": 3}, "task repetition"),
        ({"out_of_domain": "others.txt"}, r"has no table of out-of-domain prompts"),
    ],
)
def test_tables_that_differ_refuse_to_be_compared_and_name_both(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], named: str
) -> None:
    path = tmp_path / "saved.json"
    if not (place / "plain.json").exists():
        saved(place / "plain.json", made("base", **SMALL))
    for suffix in (".json", ".jsonl"):
        path.with_suffix(suffix).write_bytes((place / "plain").with_suffix(suffix).read_bytes())
    monkeypatch.setattr(
        "quark_fast.evaluation.held_out.kept_or_drawn", lambda *_, **__: pytest.fail("sampling began")
    )
    if "task" in change:
        (place / "texts.txt").write_text("\n".join(" ".join([f"w{i}"] * 40) for i in range(6)))
        change = {**change, "prompts": "texts.txt"}
    with pytest.raises(UsageError, match=named) as refused:
        Evaluator(["base", str(path)], **{**SMALL, **change})
    assert str(path) in str(refused.value)


def test_perplexity_model_is_known_by_its_weights_wherever_it_lies(place: Path, tmp_path: Path) -> None:
    how = {**SMALL, "samples": 1}
    one = made("base", ppl_model="base", **how)
    path = saved(tmp_path / "one.json", one)
    for name, source in (("same", "base"), ("other", "cousin")):
        shutil.copytree(place / source, tmp_path / name / "base")
    for spelled in ("./base", str(tmp_path / "same" / "base")):
        Evaluator(["cousin", path], ppl_model=spelled, **how)
    for spelled in ("cousin", str(tmp_path / "other" / "base")):
        with pytest.raises(UsageError, match=r"perplexity by weights of sha256 .* in the one, by weights of"):
            Evaluator(["cousin", path], ppl_model=spelled, **how)
    # Tables of earlier versions have the name alone.
    del one.table["perplexity"]["sha256"]
    old = saved(tmp_path / "old.json", one)
    Evaluator(["cousin", old], ppl_model="base", **how)
    with pytest.raises(UsageError, match="perplexity by cousin in the one, by base in the other"):
        Evaluator(["base", old], ppl_model="cousin", **how)


def test_texts_measured_behind_other_prompts_do_not_compare() -> None:
    now = {"task": "toxicity", "text_prompt_tokens": 32}
    check_comparable("now", now, "also now", dict(now))
    with pytest.raises(UsageError, match=r"now and before do not compare: tokens of a text .* 32 in .*16 in"):
        check_comparable("now", now, "before", {**now, "text_prompt_tokens": 16})
    # One reward for two targets, under a task that has none.
    down, up = ({**now, "property": name} for name in ("negativity", "positivity"))
    with pytest.raises(UsageError, match=r"do not compare: what is measured negativity .* positivity in the"):
        check_comparable("down", down, "up", up)


def test_guided_rows_of_two_nuclei_do_not_stand_side_by_side(place: Path, tmp_path: Path) -> None:
    new = made("runs/a")
    assert new.table["sampling"]["guided_nucleus"] == "one token alone"
    sampling = {name: value for name, value in new.table["sampling"].items() if name != "guided_nucleus"}
    old = Evaluated({**new.table, "sampling": sampling}, new.samples)  # as earlier versions wrote it
    path = {name: saved(tmp_path / f"{name}.json", one) for name, one in (("new", new), ("old", old))}
    path["ends"] = saved(tmp_path / "ends.json", made("runs/a", guidance="0.5"))
    named = r"old.json do not compare: rows with guidance .* of one token alone in the one, of the mix in"
    for first in (["runs/b"], [path["new"]], [path["ends"], path["new"]]):
        with pytest.raises(UsageError, match=named):
            Evaluator([*first, path["old"]])
    # Where one of them has no such row, or no nucleus cuts it, there is nothing to compare.
    joint = made(path["ends"], path["old"])
    Evaluator(["runs/b", path["old"]], rows="best")
    assert "guided_nucleus" not in made("runs/a", top_p=1.0).table["sampling"]
    # What the tables have, their joint one has, too.
    with pytest.raises(UsageError, match="of the mix in the one, of one token alone in the other"):
        Evaluator([saved(tmp_path / "joint.json", joint), path["new"]])
    joint = made(path["ends"], path["new"])
    Evaluator([saved(tmp_path / "joint.json", joint), path["new"]])


WITH_TEXTS: dict[str, Any] = {
    "task": "toxicity",
    "judge": "none",
    "prompts": "prompts.txt",
    "samples": 1,
    "max_new_tokens": 3,
}
OF_TEXTS = {"text_perplexity", "text_accuracy"}


def of_texts(done: Evaluated) -> set[str]:
    """The measures of ordinary texts that any row has, and none else may have a column."""
    found = {key for row in done.table["rows"] for part in ("metrics", "change") for key in row[part] or ()}
    assert OF_TEXTS & {*done.table["columns"], *done.table["more_columns"]} == OF_TEXTS & found
    assert ("perplexity of text" in done.markdown()) == ("text_perplexity" in found)
    assert all(bool(row["text_tokens"]) == bool(OF_TEXTS & found) for row in done.samples)
    return OF_TEXTS & found


def test_measures_of_text_stay_out_of_tables_of_different_tokenizers_as_of_such_models(
    place: Path, tmp_path: Path
) -> None:
    how = {**WITH_TEXTS, "ppl_model": "base"}
    done = {name: made(name, **how) for name in ("base", "cousin", "stranger")}
    path = {name: saved(tmp_path / f"{name}.json", one) for name, one in done.items()}
    assert of_texts(done["base"]) == of_texts(done["stranger"]) == OF_TEXTS, "each alone has them"
    assert "Perplexity of text: of 6 passages, one beside each prompt." in done["base"].markdown()
    assert "Perplexity of text: of" not in made("base", "stranger", **how).markdown()
    assert of_texts(made("base", "stranger", **how)) == set()
    for subjects, settings in ((["stranger"], how), ([path["stranger"]], {})):
        evaluator = Evaluator([path["base"], *subjects], **settings)
        assert "perplexity of text and accuracy on text are left out" in evaluator.remarks[-1]
        beside = evaluator.evaluate()
        assert of_texts(beside) == set() and beside.table["text_tokens_sha256"] is None
        again = made(saved(tmp_path / "again.json", beside))
        assert of_texts(again) == set() and len(again.table["rows"]) == 2
    # Of one tokenizer they stay, and change as in an evaluation of both models together.
    beside, together = made(path["base"], path["cousin"]), made("base", "cousin", **how)
    assert of_texts(beside) == OF_TEXTS
    changes = [{key: one.table["rows"][1]["change"][key] for key in OF_TEXTS} for one in (beside, together)]
    assert changes[0] == changes[1]


@pytest.fixture(scope="module")
def long_prompts(place: Path) -> dict[str, Any]:
    """Runs that read the last 3 tokens of a prompt, the last 4, or all; prompts of 6 words, and one of 3."""
    for name, most in (("cut", 3), ("cut-too", 3), ("longer", 4), ("whole", 0)):
        settings = {"long_prompts": "cut", "max_prompt_tokens": most, "reward": "test_side_by_side:evens"}
        save_run(place / "runs" / name, "base", 4, **settings)
    (place / "long.txt").write_text("w1 w2 w3 w4 w5 w6\nw7 w8 w9 w10 w11 w12\nw1 w2 w3")
    return {"prompts": "long.txt", "rows": "best"}


def test_prompts_cut_for_a_model_are_told_of_every_model_and_under_the_table(
    place: Path, long_prompts: dict[str, Any]
) -> None:
    told = "2 of 3 texts of long.txt cut to their last 3 tokens"
    assert Evaluator(["runs/cut"], **long_prompts).remarks[1:] == [told]
    evaluator = Evaluator(["runs/cut", "stranger"], **long_prompts)
    # The stranger's tokens are letters and pairs of them.
    assert f"cut: {told}" in evaluator.remarks
    assert "stranger: 3 of 3 texts of long.txt cut to their last 3 tokens" in evaluator.remarks
    shown = evaluator.evaluate().markdown()
    assert "2 of these prompts were cut to the last 3 tokens for cut." in shown
    assert "3 of these prompts were cut to the last 3 tokens for stranger." in shown
    assert "were cut" not in made("runs/whole", **long_prompts).markdown()


def test_tables_compare_where_the_models_read_the_same_of_their_prompts(
    place: Path, tmp_path: Path, long_prompts: dict[str, Any]
) -> None:
    runs = {
        "cut": ["runs/cut"],
        "both": ["runs/cut", "runs/cut-too"],
        "longer": ["runs/longer"],
        "whole": ["runs/whole"],
    }
    done = {name: made(*subjects, **long_prompts) for name, subjects in runs.items()}
    path = {name: saved(tmp_path / f"{name}.json", one) for name, one in done.items()}
    Evaluator([path["cut"], path["both"]])
    for one, other, named in (
        ("cut", "whole", r"read cut to the last 3 tokens \(sha256 \w{12}\) in the one, whole in the other"),
        ("whole", "cut", r"prompts are read whole in the one, cut to the last 3 tokens"),
        ("longer", "cut", r"prompts are read cut to the last 4 tokens .* in the one, cut to the last 3 tok"),
    ):
        with pytest.raises(UsageError, match=named):
            Evaluator([path[one], path[other]])
        with pytest.raises(UsageError, match=named):
            Evaluator([*runs[one], path[other]], **long_prompts)
    older = {key: value for key, value in done["whole"].table.items() if key != "cut"}
    old = saved(tmp_path / "old.json", Evaluated(older, done["whole"].samples))
    names = [row["name"] for row in made(path["whole"], old).table["rows"]]
    assert names == ["whole: base model", "whole: best token"], "of which old repeats every row"


def test_same_scorer_of_another_hash_or_version_does_not_compare(place: Path, tmp_path: Path) -> None:
    done = made("base", **SMALL)
    first = saved(tmp_path / "first.json", done)
    for field, other in (("sha256", "0" * 64), ("version", "2")):
        changed = {**done.table, "scorer": {**done.table["scorer"], field: other}}
        second = saved(tmp_path / "second.json", Evaluated(changed, done.samples))
        with pytest.raises(
            UsageError, match=r"first.json and .*second.json do not compare: scorer .*evens"
        ) as no:
            Evaluator([first, second])
        assert other in str(no.value)


def test_table_that_names_no_prompts_is_refused(place: Path, tmp_path: Path) -> None:
    done = made("base", **SMALL)
    old = {k: v for k, v in done.table.items() if k not in ("prompts_sha256", "perplexity")}
    paths = [saved(tmp_path / "new.json", done), saved(tmp_path / "old.json", Evaluated(old, done.samples))]
    with pytest.raises(UsageError, match=r"prompts .* unknown ones"):
        Evaluator(paths)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda t, s: (None, s), r"no 'rows' of one in it"),
        (lambda t, s: ({**t, "scorer": "x"}, s), r"no 'scorer' of one in it"),
        (lambda t, s: ({**t, "rows": [{"name": 1}]}, s), r"rows need a name each"),
        (lambda t, s: (t, s[:-1]), r"has not 2 samples of each of 6 prompts"),
        # No list is made of as many as a file names.
        (lambda t, s: (t | {"prompts": 2**62}, s), r"has not 2 samples of each of 4611686018427387904"),
        (lambda t, s: (t, [{**s[0], "row": "x"}, *s[1:]]), r"jsonl:1 is no sample of .*KeyError"),
        (lambda t, s: (t, [{**s[0], "nll": math.inf}, *s[1:]]), r"jsonl:1 .*not finite"),
        (lambda t, s: (t, [{**s[0], "score": 1e308}, *s[1:]]), r"jsonl:1 .*beyond 1e\+30"),
        (lambda t, s: (t, [*s[:-1], {**s[-1], "tokens": "9"}]), r"jsonl:12 .*counts"),
        (lambda t, s: (t, [{**s[0], "measures": [1]}, *s[1:]]), r"jsonl:1 is no sample"),
        (lambda t, s: (t, [[1]]), r"jsonl:1 is no sample"),
    ],
)
def test_damaged_table_is_refused_with_its_file_and_line(
    place: Path, tmp_path: Path, damage: Callable[[Any, Any], tuple[Any, Any]], named: str
) -> None:
    done = made("base", **SMALL)
    path = saved(tmp_path / "table.json", Evaluated(*damage(done.table, done.samples)))
    with pytest.raises(UsageError, match=named) as refused:
        Evaluator([path])
    assert "table.json" in str(refused.value)


def test_table_without_its_samples_is_refused(place: Path, tmp_path: Path) -> None:
    path = Path(saved(tmp_path / "table.json", made("base", **SMALL)))
    path.with_suffix(".jsonl").unlink()
    with pytest.raises(UsageError, match=r"table\.jsonl cannot be read: No such file"):
        Evaluator([str(path)])
    (tmp_path / "not.json").write_text("{")
    path.with_name("not.jsonl").write_text("")
    with pytest.raises(UsageError, match=r"not\.json is no table of an evaluation"):
        Evaluator([str(tmp_path / "not.json")])


# --- what all must share --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (
            {"task": "sentiment"},
            r"runs/a unlearned toxicity, but runs/c unlearned sentiment to positive; .*--task",
        ),
        (
            {"reward": "toxicity"},
            r"runs/a was rewarded by .*evens, but runs/c was rewarded by toxicity; .*--reward",
        ),
        ({"reward": None}, r"but runs/c was rewarded by its task, or its program; .*--reward"),
    ],
)
def test_runs_of_different_tasks_or_rewards_need_one_named(
    place: Path, settings: dict[str, str | None], named: str
) -> None:
    config = {"reward": "test_side_by_side:evens", **settings}
    save_run(place / "runs" / "c", "base", 3, **config)
    with pytest.raises(UsageError, match=named):
        Evaluator(["runs/a", "runs/c"])
    assert Evaluator(["runs/a", "runs/c"], **SMALL).reward.name.endswith("evens")


def test_what_is_asked_of_another_task_or_of_no_run_or_file_is_refused(place: Path) -> None:
    save_run(
        place / "runs" / "single", "base", 3, quantiles=1, reward="test_side_by_side:evens", contrast_coef=0.0
    )
    for subject, asked, named in (
        (
            "runs/a",
            {"target": "positive"},
            "target = 'positive' is of the task sentiment, but the task is toxi",
        ),
        ("runs/a/model", {**SMALL, "guidance": "2"}, "guidance = '2' is of a run's .* not its model/"),
        ("base", {**SMALL, "rows": "all"}, "rows = 'all' is of a run's reward tokens, but no run is named"),
        (
            "runs/single",
            {"guidance": "2"},
            "runs/single trained one token alone; leave guidance out",
        ),
        ("runs/a", {"prompt_column": "text"}, "the column 'text' is of no file"),
        ("runs/a", {"prompts": "prompts.txt", "out_of_domain_column": "x"}, "the column 'x' is of no file"),
    ):
        with pytest.raises(UsageError, match=named):
            Evaluator([subject], **asked)


def test_reward_and_prompts_measure_plain_models_without_a_task(place: Path) -> None:
    asked = {name: value for name, value in SMALL.items() if name != "task"}
    alone, of_task = made("base", "cousin", **asked), made("base", "cousin", **SMALL)
    assert alone.samples == of_task.samples and alone.table["scorer"]["name"].endswith("evens")
    with pytest.raises(UsageError, match=r"base: no run .*; name the prompts for the reward .*evens by"):
        Evaluator(["base"], reward=evens)


def test_nothing_embedded_is_fetched_for_models_rewards_and_prompts_of_ones_own(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUARK_FAST_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr("quark_fast.data.assets.fetch", lambda wheel: pytest.fail(wheel.filename))
    asked = {name: value for name, value in SMALL.items() if name != "task"}
    path = saved(tmp_path / "t.json", made("base", **asked))
    assert made("runs/a", judge="test_side_by_side:flat").table["perplexity"]["model"] == "base"
    assert made(path, judge="test_side_by_side:flat").table["judges"][0]["name"].endswith("flat")


def test_run_that_may_only_be_read_is_evaluated_without_its_cache(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = save_run(tmp_path / "run", "base", 1, reward="test_side_by_side:evens", reward_cache="on")
    assert Evaluator(run).reward.cache is not None
    monkeypatch.setattr("os.access", lambda *_: False)  # a test may be root, who may write anywhere
    assert Evaluator(run).reward.cache is None


def test_run_is_measured_by_another_task_on_that_tasks_own_prompts_and_sampling(place: Path) -> None:
    evaluator = Evaluator(["runs/a"], task="sentiment", prompts="prompts.txt")
    assert evaluator.reward.name == "vader" and evaluator.config.eval_samples == Config().eval_samples
    assert evaluator.tables[""]["headline"] == "target" and evaluator.config.precision == "fp32"
    evaluator = Evaluator("runs/a", task="toxicity")
    assert evaluator.reward.name == "jigsaw-bilstm" and len(evaluator.domains[0].rows) == len(PROMPTS)
    assert evaluator.config.eval_samples == 2, "the same task, the run's own sampling"


def test_classes_of_prompts_are_the_first_subjects_and_must_be_the_saved_tables(
    place: Path, tmp_path: Path
) -> None:
    settings = {**SMALL, "task": "sentiment", "samples": 1}
    done = made("base", "cousin", **settings)
    counted = {name for row in done.samples for name in row["measures"]}
    assert "target" in counted and len(counted) >= 2
    path = saved(tmp_path / "classed.json", done)
    again = made("base", path, **settings)
    assert [row["name"] for row in again.table["rows"]] == ["base", "classed: cousin"]
    # A class that the user gave to one prompt is believed, and the others get theirs.
    rows: list[Any] = [{"prompt": text} for text in PROMPTS]
    rows[0]["prompt_class"] = "negative"
    partly = Evaluator("base", **{**settings, "prompts": rows})
    assert partly.evaluate().table["classes_sha256"]
    found = [row["prompt_class"] for row in partly.domains[0].held_out[partly.lead].rows]
    assert found[0] == "negative" and all(found)
    changed = {**done.table, "classes_sha256": "0" * 64}
    other = saved(tmp_path / "other.json", Evaluated(changed, done.samples))
    with pytest.raises(UsageError, match=r"classes of the prompts of sha256 .* of sha256 000000000000"):
        made("base", other, **settings)
