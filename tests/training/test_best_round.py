"""Rounds compared on development prompts: which one is kept, what a kill or another goal changes."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tiny_runs import copies_at, even_words, rows, small, timeless
from torch import Tensor

from quark_fast.errors import UsageError
from quark_fast.keep_best import Goal
from quark_fast.pool.pool import RolloutBatch
from quark_fast.tasks import repetition, sentiment, toxicity
from quark_fast.tasks.task import Task
from quark_fast.training.best_round import BestRound
from quark_fast.training.checkpoint import Checkpoint
from quark_fast.training.learn import Learner
from quark_fast.training.progress import Progress
from quark_fast.training.state import State
from quark_fast.training.trainer import Trainer

PROMPTS = [f"w{i} w{j}" for i in range(14) for j in range(12, 15)]
GIVEN: dict[str, Any] = {"prompts": PROMPTS[6:], "held_out": PROMPTS[:6]}
SHORT: dict[str, Any] = {
    "rounds": 4,
    "steps": 8,
    "batch_size": 16,
    "initial_samples": 8,
    "explore_samples": 2,
    "sample_batch": 16,
    "eval_samples": 2,
    "checkpoint_every": 3,
    "keep_best": "reward:max",
}
FILES = ("metrics.jsonl", "completions.jsonl", "evaluation.jsonl", "held_out.jsonl")
Weights = dict[str, Tensor]


class Killed(BaseException):
    """The process is gone: nobody handles it."""


def killed_in(stage: str) -> Callable[[Progress], None]:
    """Ends the process when some of that stage is done."""

    def listen(progress: Progress) -> None:
        if progress.stage == stage and progress.done:
            raise Killed

    return listen


@pytest.fixture
def spoiled(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Has a round (from 1) and those after it learn the opposite: good samples under the worst token."""
    step = Learner.step

    def spoil(first: int) -> None:
        def spoiling(self: Learner, state: State, batch: RolloutBatch, smaller: Any) -> dict[str, Any]:
            if state.round + 1 >= first:
                batch = dataclasses.replace(batch, quantiles=2 - batch.quantiles)
            return step(self, state, batch, smaller)

        monkeypatch.setattr(Learner, "step", spoiling)

    return spoil


def run(folder: Path, model: Path, **settings: Any) -> Trainer:
    AcceleratorState._reset_state(reset_partial_state=True)
    listen = settings.pop("listen", lambda _: None)
    reward = settings.pop("reward", even_words)
    given = {name: settings.pop(name, usual) for name, usual in GIVEN.items()}
    trainer = Trainer(small(folder, model, **(SHORT | settings)), reward=reward, listen=listen, **given)
    trainer.train()
    return trainer


@pytest.fixture
def after_rounds(monkeypatch: pytest.MonkeyPatch) -> list[Weights]:
    """The weights as they are measured: of the base model, then after every round."""
    found: list[Weights] = []
    measure = BestRound.measure

    def watched(self: BestRound, state: State) -> dict[str, Any] | None:
        model = self.setup.policy.model
        found.append({name: value.detach().clone() for name, value in model.named_parameters()})
        return measure(self, state)

    monkeypatch.setattr(BestRound, "measure", watched)
    return found


def evaluation(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    return found


def rewards(folder: Path) -> list[float]:
    """Of the base model, then of each round."""
    return [row["measures"]["reward"] for row in rows(folder / "metrics.jsonl", kind="development")]


def assert_exported(folder: Path, weights: Weights) -> None:
    exported = load_file(folder / "model" / "model.safetensors")
    same = [name for name in weights if name in exported]
    assert len(same) > 10
    for name in same:
        # Of a table the words alone, to which the export adds the reward tokens.
        words = exported[name][: len(weights[name])]
        torch.testing.assert_close(words, weights[name], rtol=0, atol=0)


@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.usefixtures("reports")
def test_round_before_a_bad_one_is_what_is_evaluated_and_exported(
    tmp_path: Path,
    tiny_model: Callable[..., Path],
    spoiled: Callable[[int], None],
    after_rounds: list[Weights],
    lora_rank: int,
) -> None:
    spoiled(3)
    folder = tmp_path / "run"
    trainer = run(folder, tiny_model(), lora_rank=lora_rank, learning_rate=2e-2 if lora_rank else 3e-3)
    found = rewards(folder)
    assert len(found) == 5 and max(found) == found[2] > max(found[3:]), "the bad rounds are seen"
    kept = evaluation(folder)["kept_round"]
    assert (kept["round"], kept["rounds"], kept["keep_best"]) == (2, 4, "reward:max")
    final = dict(trainer.policy.model.named_parameters())
    trained = [name for name, value in final.items() if value.requires_grad]
    rows_of_tokens = [name for name in trained if name.endswith("rows")]
    for name in trained:  # the rows between the extremes are interpolated
        chosen = [0, -1] if name in rows_of_tokens else slice(None)
        torch.testing.assert_close(final[name][chosen], after_rounds[2][name][chosen], rtol=0, atol=0)
    if not lora_rank:
        assert_exported(folder, after_rounds[2])
    best = next(row for row in evaluation(folder)["rows"] if row["name"] == "best token")
    # Other prompts, so not the same number; the last round is far below.
    assert abs(best["metrics"]["mean"]["value"] - found[2]) < abs(best["metrics"]["mean"]["value"] - found[4])
    assert not (folder / "rounds").exists()
    for page in ("report.html", "model/README.md"):
        assert "Round 2 of 4 was kept: highest reward on" in (folder / page).read_text()
    page = (folder / "report.html").read_text()
    assert (
        "Which round is the best?" in page and 'aria-label="Measures on development prompts by round"' in page
    )


def test_development_prompts_are_neither_trained_on_nor_in_the_table(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    asked: set[str] = set()

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        asked.update(prompts)
        return even_words(prompts, completions)

    trainer = run(tmp_path / "run", tiny_model(), reward=reward, rounds=1)
    development = trainer.setup.prompts.development
    assert development is not None
    compared = {row["prompt"] for row in development.rows}
    trained = {row["prompt"] for row in rows(tmp_path / "run" / "completions.jsonl")}
    measured = {row["prompt"] for row in rows(tmp_path / "run" / "evaluation.jsonl")}
    assert len(compared) == 6 and not compared & trained and not compared & measured
    assert compared | trained | measured == set(PROMPTS) == asked


def test_runs_end_without_gain_and_stay_apart_from_the_rounds_that_were_left_out(
    tmp_path: Path, tiny_model: Callable[..., Path], spoiled: Callable[[int], None]
) -> None:
    spoiled(2)
    run(tmp_path / "run", tiny_model(), stop_after=2)
    assert len(rewards(tmp_path / "run")) == 4, "the base model and three rounds"
    why = evaluation(tmp_path / "run")["kept_round"]["why"]
    assert why.startswith("Round 1 of 3 was kept: ")
    assert why.endswith("The run stopped after round 3 of 4, 2 rounds without gain.")
    log = [line[20:] for line in (tmp_path / "run" / "run.log").read_text().splitlines()]
    judged = log.index("round 1 is the best so far")
    assert log[judged - 1].startswith(f"round 1/4: {MEASURING}: reward ")


MEASURING = "measuring on development prompts"


KILLS = [
    (f"base model: {MEASURING}", 8),
    (f"round 1/4: {MEASURING}", 8),
    (f"round 2/4: {MEASURING}", 12),  # all is measured, and nothing of that is in a checkpoint
    ("round 3/4: sampling", 40),
    ("round 3/4: learning", 4),
    (f"round 4/4: {MEASURING}", 8),
    ("evaluating: best token", 6),
    ("writing the model and the report", 0),
]


def test_run_killed_at_any_moment_keeps_the_same_round_with_the_same_weights(
    tmp_path: Path, tiny_model: Callable[..., Path], spoiled: Callable[[int], None]
) -> None:
    spoiled(3)
    model = tiny_model()
    run(tmp_path / "whole", model, listen=copies_at(KILLS, tmp_path / "whole"))
    assert evaluation(tmp_path / "whole")["kept_round"]["round"] == 2
    for number, (stage, _) in enumerate(KILLS):
        folder = tmp_path / f"killed-{number}"
        run(folder, model, resume=True)
        for name in FILES:
            assert timeless(folder / name) == timeless(tmp_path / "whole" / name), (stage, name)
        for name in ("evaluation.json", "model/model.safetensors"):
            assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), (stage, name)


def test_no_round_within_the_bounds_ends_in_one_line_and_a_looser_bound_goes_on(
    tmp_path: Path, tiny_model: Callable[..., Path], after_rounds: list[Weights]
) -> None:
    folder, model = tmp_path / "run", tiny_model()
    with pytest.raises(UsageError, match=r"no round meets .*: round 1 has reward .*; round 2 has") as caught:
        run(folder, model, rounds=2, keep_best="reward:max, perplexity<=0.01")
    assert not (folder / "evaluation.json").exists()
    weights = sorted(path.name for path in (folder / "rounds").iterdir())
    assert weights == ["round-1.safetensors", "round-2.safetensors"], "any of them may still be chosen"
    message = str(caught.value)
    assert f"--resume --output {folder} --keep-best '" in message
    looser = message.partition("--keep-best '")[2].partition("'")[0]
    ratios = [
        row["measures"]["perplexity"]
        / rows(folder / "metrics.jsonl", kind="development")[0]["measures"]["perplexity"]
        for row in rows(folder / "metrics.jsonl", kind="development")[1:]
    ]
    assert looser == f"reward:max, perplexity<={math.ceil(min(ratios) * 100) / 100:g}"
    with pytest.raises(UsageError, match="no round meets"):
        run(folder, model, rounds=2, keep_best="reward:max, perplexity<=0.02", resume=True)
    steps = len(rows(folder / "metrics.jsonl", kind="step"))
    run(folder, model, rounds=2, keep_best=looser, resume=True)
    assert len(rows(folder / "metrics.jsonl", kind="step")) == steps, "nothing is trained again"
    chosen = ratios.index(min(ratios)) + 1
    assert evaluation(folder)["kept_round"]["round"] == chosen
    assert_exported(folder, after_rounds[chosen])


def test_another_goal_at_a_resume_takes_no_completion_of_the_round_chosen_before(
    tmp_path: Path, tiny_model: Callable[..., Path], spoiled: Callable[[int], None]
) -> None:
    spoiled(2)
    model, writing = tiny_model(), ("writing the model and the report", 0)
    moments = [("evaluating: best token", 6), writing, writing]
    settings: dict[str, Any] = {"rounds": 2, "keep_best": "reward:max, perplexity<=1000"}
    # None is beaten as long as none is within the bounds, so both rounds can be chosen.
    with pytest.raises(UsageError, match="no round meets"):
        run(tmp_path / "run", model, **settings | {"keep_best": "reward:max, perplexity<=0.01"})
    for name in ("best", "worst"):
        shutil.copytree(tmp_path / "run", tmp_path / name)
    listen = copies_at(moments, tmp_path / "best")
    run(tmp_path / "best", model, **settings, resume=True, listen=listen)
    settings["keep_best"] = "reward:min, perplexity<=1000"
    run(tmp_path / "worst", model, **settings, resume=True)
    kept = {name: evaluation(tmp_path / name)["kept_round"]["round"] for name in ("best", "worst")}
    assert kept == {"best": 1, "worst": 2}
    for number in (0, 1):
        run(tmp_path / f"killed-{number}", model, **settings, resume=True)
        own, whole = (timeless(tmp_path / name / FILES[2]) for name in (f"killed-{number}", "worst"))
        assert own == whole
    assert (tmp_path / "killed-2" / "evaluation.json").exists()
    run(tmp_path / "killed-2", model, **settings, eval=False, resume=True)
    assert not list((tmp_path / "killed-2").glob("evaluation.json*")), "of the other round"


def refuse(*_: Any) -> None:
    raise UsageError("the base model's values are looked at before a bound is")


def test_goal_of_a_resumed_run_that_chooses_a_round_whose_weights_are_gone_is_refused_at_once(
    tmp_path: Path, tiny_model: Callable[..., Path], spoiled: Callable[[int], None]
) -> None:
    spoiled(2)
    folder, model = tmp_path / "run", tiny_model()

    with pytest.raises(Killed):
        run(folder, model, listen=killed_in("round 4/4: sampling"))
    assert [path.name for path in (folder / "rounds").iterdir()] == ["round-1.safetensors"]
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(UsageError, match=r"chooses round [23], whose weights \(.*\) are gone"):
        run(folder, model, resume=True, keep_best="reward:min")
    assert (folder / "metrics.jsonl").read_bytes() == before
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Goal, "check_base", refuse)
        with pytest.raises(UsageError, match="looked at before a bound is"):
            run(folder, model, resume=True, keep_best="reward:max, dist3<=2")
    for changed in ({"keep_best": ""}, {"eval_top_p": 0.5}, {"judge": "none"}):
        with pytest.raises(UsageError, match=r"but the run to resume has"):
            run(folder, model, resume=True, **changed)
    another = {"reward": lambda prompts, completions, **_: even_words(prompts, completions)}
    with pytest.raises(UsageError, match="is not the one that scored the samples"):
        run(folder, model, resume=True, **another)
    path = folder / "rounds" / "round-1.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UsageError, match=r"whose weights \(.*round-1.safetensors\) are damaged"):
        run(folder, model, resume=True)
    path.write_bytes(content)
    run(folder, model, resume=True)
    assert evaluation(folder)["kept_round"]["round"] == 1


def test_rounds_are_compared_by_a_changed_reward_on_purpose_alone(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    """A reward that failed late is mended in its file: the run must have a way on."""
    folder, model = tmp_path / "run", tiny_model()

    with pytest.raises(Killed):
        run(folder, model, listen=killed_in("round 2/4: learning"))
    mended = {"reward": lambda prompts, completions, **_: even_words(prompts, completions)}
    run(folder, model, resume=True, accept_changed_reward=True, **mended)
    assert "kept_round" in evaluation(folder)


def test_damaged_checkpoint_costs_no_round_that_the_one_before_it_may_choose(
    tmp_path: Path, tiny_model: Callable[..., Path], spoiled: Callable[[int], None]
) -> None:
    """What a better round has beaten is dropped only when both checkpoints know of the better one."""
    spoiled(4)
    folder, model, kept = tmp_path / "run", tiny_model(), []
    save = Checkpoint.save

    def watched(self: Checkpoint, state: State) -> None:
        save(self, state)
        for name in ("checkpoint", "checkpoint.old"):
            path = folder / name / "state.json"
            measured = json.loads(path.read_text())["measured"] if path.exists() else []
            if len(measured) > 1:
                best = max(measured[1:], key=lambda one: one["measures"]["reward"])
                kept.append((folder / "rounds" / f"round-{best['round']}.safetensors").exists())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "save", watched)
        run(folder, model)
    assert len(kept) > 8 and all(kept)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_best": "juge:min"}, "no measure 'juge'; did you mean judge"),
        ({"keep_best": "judge:min, perplexty<=1.1"}, "no measure 'perplexty'; did you mean perplexity"),
        ({"keep_best": "judge:min", "judge": "none"}, "choose from toxicity, reward.*by --judge$"),
        ({"keep_best": "rep4:min"}, "no measure 'rep4'"),
        (
            {"keep_best": "judge:min, base_kl<=3", "eval_top_p": 1.0},
            "base_kl, which is 0 with eval_top_p = 1",
        ),
    ],
)
def test_unknown_measure_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], message: str
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("loaded")

    for name in ("choose_reward", "choose_judges", "read_prompts", "_load_policy"):
        monkeypatch.setattr(f"quark_fast.training.start.{name}", load)
    with pytest.raises(UsageError, match=message):
        Trainer(small(tmp_path / "run", tmp_path / "none", **settings))


def test_measure_that_an_own_reward_has_not_is_refused_and_one_of_a_judge_is_found(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    judges = {"judge": f"{__name__}:length,{__name__}:even_words"}
    with pytest.raises(UsageError, match=rf"no measure 'judge'; .*choose from reward, {__name__}:length,"):
        run(tmp_path / "run", tiny_model(), keep_best="judge:min", **judges)
    with pytest.raises(UsageError, match=r"choose from reward, perplexity, .*, name a judge by --judge$"):
        run(tmp_path / "run", tiny_model(), keep_best="judge:min, perplexity<=1.10")
    with pytest.raises(UsageError, match=r"no measure 'toxicity'; [^;]*$"):
        run(tmp_path / "run", tiny_model(), keep_best="toxicity:min")
    enough = {"prompts": PROMPTS[8:], "held_out": PROMPTS[:8]}  # 8 for development, the fewest with intervals
    run(tmp_path / "run", tiny_model(), keep_best=f"{__name__}:length:min", rounds=1, **enough, **judges)
    base, _ = rows(tmp_path / "run" / "metrics.jsonl", kind="development")
    assert {f"{__name__}:length", "reward", "perplexity", "dist3", "prompt_fit"} <= base["measures"].keys()
    assert base["intervals"]["reward"][0] <= base["measures"]["reward"] <= base["intervals"]["reward"][1]


def length(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    return [float(len(text)) for text in completions]


def test_bound_relative_to_a_value_below_zero_is_refused_before_the_first_round(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    def below(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        return [-1.0 - len(text) for text in completions]

    with pytest.raises(UsageError, match=r"reward>=1.1 is relative to the base model's reward, which is -"):
        run(tmp_path / "run", tiny_model(), reward=below, keep_best="perplexity:min, reward>=1.1")
    assert not (tmp_path / "run" / "completions.jsonl").exists()


def test_scorer_that_was_silent_for_the_base_model_is_asked_again_at_a_resume(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    model, works = tiny_model(), [True]

    async def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        return even_words(prompts, completions) if works[0] else [None] * len(completions)

    def out_of_order(progress: Progress) -> None:
        works[0] = progress.stage == "start and check" and not progress.finished

    with pytest.raises(UsageError, match="the base model has no reward on the development prompts"):
        run(tmp_path / "run", model, reward=reward, keep_best="reward:max", listen=out_of_order)
    works[0] = True
    run(tmp_path / "run", model, reward=reward, keep_best="reward:max", resume=True)
    assert len(rewards(tmp_path / "run")) == 1 + SHORT["rounds"]


def test_judge_that_no_goal_asks_has_no_completion_scored_twice_where_it_is_silent(
    tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = (
        "works = [True]\ndef judge(prompts, completions, **_): return [works[0] or None for _ in prompts]"
    )
    (tmp_path / "silent.py").write_text(module)
    monkeypatch.syspath_prepend(str(tmp_path))
    works = importlib.import_module("silent").works
    model, asked = tiny_model(), [0]

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        asked[0] += len(prompts)
        return even_words(prompts, completions)

    def stop(progress: Progress) -> None:
        works[0] = progress.stage == "start and check" and not progress.finished
        if progress.stage == "round 1/4: sampling":
            raise Killed

    settings: dict[str, Any] = {"reward": reward, "judge": "silent:judge"}
    with pytest.raises(Killed):
        run(tmp_path / "run", model, listen=stop, **settings)
    first, asked[0] = asked[0], 0
    assert first > 0, "the base model's completions of development prompts"

    with pytest.raises(Killed):
        run(tmp_path / "run", model, listen=stop, resume=True, **settings)
    assert asked[0] == 0, "the base model has its rewards"


@pytest.mark.parametrize(
    "task", [toxicity.TASK, repetition.TASK, *map(sentiment.task, ("positive", "negative"))]
)
def test_property_of_a_task_is_its_rewards(task: Task) -> None:
    assert task.property == task.reward().property


# --- the goal alone ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-2.0, 0.0, math.nan])
@pytest.mark.parametrize("bound", ["judge<=0.9", "judge>=0.9"])
def test_no_bound_is_relative_to_a_judges_value_that_is_not_above_zero(bound: str, value: float) -> None:
    goal = Goal.parse(f"reward:max, {bound}")
    goal.check_base({"reward": -3.0, "judge": 0.1})
    with pytest.raises(UsageError, match=rf"{bound} is relative .* which is {value:.4g} .* must be above 0"):
        goal.check_base({"reward": -3.0, "judge": value})


def test_best_round_is_the_first_of_the_lowest_within_the_bounds() -> None:
    goal = Goal.parse(" judge : min ,perplexity<=1.10,  dist3 >= 0.9")
    assert str(goal) == "judge:min, perplexity<=1.1, dist3>=0.9"
    base = {"judge": 0.3, "perplexity": 20.0, "dist3": 0.8}

    def of(judge: float, perplexity: float, dist3: float = 0.8) -> dict[str, float]:
        return {"judge": judge, "perplexity": perplexity, "dist3": dist3}

    first, second, third = of(0.2, 21), of(0.1, 22.1), of(0.15, 20, 0.7)
    assert goal.best(base, []) is None
    assert goal.best(base, [first, second, third]) == 0, "the others are beyond a bound each"
    assert goal.best(base, [first, of(0.2, 20), of(math.nan, 20)]) == 0
    assert goal.best(base, [of(0.1, math.nan), of(0.4, 22.0)]) == 1, "a bound may be met exactly"
    assert goal.without_gain(base, [first, second, third]) == 2
    assert goal.without_gain(base, [second, third]) == 2, "without a best one, all of them"
    assert goal.without_gain(base, [third, first]) == 0
    highest = Goal.parse("dist3:max")
    assert highest.best(base, [of(1, 1, 0.5), of(1, 1, 0.9), of(1, 1, 0.7)]) == 1


def test_looser_goal_is_just_loose_enough_for_the_nearest_round() -> None:
    goal = Goal.parse("judge:min, perplexity<=1.1, dist3>=0.9")
    base = {"judge": 0.3, "perplexity": 20.0, "dist3": 0.8}
    near = {"judge": 0.2, "perplexity": 24.01, "dist3": 0.75}
    far = {"judge": 0.1, "perplexity": 40.0, "dist3": 0.8}
    looser = goal.looser(base, [far, near])
    assert str(looser) == "judge:min, perplexity<=1.21, dist3>=0.9"
    assert looser is not None and looser.best(base, [far, near]) == 1
    unbounded = goal.looser(base, [near | {"dist3": 0.0001}])
    assert unbounded is not None and "dist3" not in str(unbounded)
    assert goal.looser(base, [far | {"judge": math.nan}]) is None
    rounded, measured = {"judge": 0.3, "perplexity": 3.64825}, {"judge": 0.2, "perplexity": 11.127162574}
    once = Goal.parse("judge:min, perplexity<=1.1").looser(rounded, [measured])  # 3.05 times, and an ulp more
    assert once is not None and once.best(rounded, [measured]) == 0


def test_round_without_the_measure_of_any_bound_is_within_none_and_loosens_none() -> None:
    goal = Goal.parse("reward:max, perplexity<=1.1, judge<=0.9, dist3>=0.9")
    base = {"reward": -20.0, "perplexity": 20.0, "judge": 0.3, "dist3": 0.8}
    known = {"reward": 0.0, "perplexity": 60.0, "judge": 0.3, "dist3": 0.8}
    for bound in goal.bounds:  # wherever it stands: max(2, NaN) is 2, max(NaN, 2) NaN
        unknown = known | {"reward": 1.0, "perplexity": 40.0, bound.measure: math.nan}
        assert bound in goal.beyond(unknown, base) and goal.best(base, [unknown]) is None
        assert goal.looser(base, [unknown]) is None
        assert str(goal.looser(base, [unknown, known])) == "reward:max, perplexity<=3, judge<=1, dist3>=0.9"
