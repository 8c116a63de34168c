"""The grid of ablations on a tiny model: its points, sharing, kills, refusals, and what it writes."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import PROMPTS, even_words, rows, small, timeless

from quark_fast import ablate
from quark_fast.ablation import axes, grid, plot, summary
from quark_fast.arguments import parse
from quark_fast.config import Config
from quark_fast.errors import Diverged, UsageError
from quark_fast.metrics import Sample
from quark_fast.report.files import read_run
from quark_fast.rollout.sampling import Conditioning
from quark_fast.runtime.console import Terminal
from quark_fast.training.learn import Learner
from quark_fast.training.progress import Progress
from quark_fast.training.state import State
from quark_fast.training.trainer import Trainer

GIVEN: dict[str, Any] = {"reward": even_words, "prompts": PROMPTS, "held_out": PROMPTS[:8]}


def base(folder: Path, model: Path, **settings: Any) -> Config:
    few = {"rounds": 2, "steps": 4, "initial_samples": 4, "explore_samples": 2, "eval_samples": 2}
    few |= {"guidance": 1.5}  # so that the axis tokens has all its points
    return small(folder, model, **(few | {"checkpoint_every": 2, "eval_rows": "best"} | settings))


def started(folder: Path) -> list[str]:
    return sorted(f"{path.parent.name}" for path in folder.glob("seed-0/*/config.yaml"))


def test_each_axis_varies_one_thing_and_points_of_two_axes_are_one_run() -> None:
    config = Config()
    found = axes.points_of(config, [axis for axis in axes.AXES if axis != "unlikelihood"])
    assert [*axes.left_out(config)] == ["unlikelihood"]
    assert {p.value: p.settings for p in found if p.axis == "kl"} == {
        "beta 0": {"kl_coef": 0.0},
        "beta 0.25": {"kl_coef": 0.25},
        "beta 1": {},
        "beta 4": {"kl_coef": 4.0},
        "ref_policy": {"kl": "ref_policy"},
        "sampled": {"kl": "sampled"},
    }
    for point in found:
        if point.axis == "exploration":
            settings = {"rounds": config.rounds, "steps": config.steps, **point.settings}
            assert settings["rounds"] * settings["steps"] == config.rounds * config.steps
    assert [p.settings for p in found].count({}) == 6, "the base stands on each axis"
    unique = axes.distinct_settings(found)
    assert unique[0] == {} and unique.count({}) == 1
    assert len(unique) == len(found) - 5


def test_selection_is_compared_within_the_papers_loss() -> None:
    found = {p.value: p for p in axes.points_of(Config(), ["selection"])}
    best = found["best, no contrast"]
    assert best.against == found["equal, no contrast"].settings
    assert Config(**best.settings).quantile_shares() == [0, 0, 0, 0, 1]
    assert found["equal"].against == {}, "the base's own loss: against the base"


@pytest.mark.parametrize("weights", ["extremes", "equal", "3,3"])
def test_points_that_train_alike_are_one_and_compared_with_that(weights: str) -> None:
    """Of two quantiles the extremes are all."""
    config = Config(quantiles=2, quantile_weights=weights)
    found = {p.value: p for p in axes.points_of(config, ["selection", "contrast"]) if p.axis == "selection"}
    assert list(found) == ["extremes", "extremes, no contrast", "best, no contrast"]
    assert found["extremes"].settings == {}
    plain = found["extremes, no contrast"]
    assert plain.against == plain.settings == found["best, no contrast"].against
    first, second = axes.copies(config, ["contrast", "selection"])
    assert first == "selection, point 'equal', which trains as 'extremes' does"
    assert "'equal, no contrast', which trains as 'extremes, no contrast' does" in second
    assert axes.copies(Config(), [axis for axis in axes.AXES if axis != "unlikelihood"]) == []


def test_extremes_in_numbers_are_the_base_of_the_selection() -> None:
    found = {p.value: p for p in axes.points_of(Config(quantiles=3, quantile_weights="1,0,1"), ["selection"])}
    assert found["extremes"].settings == {} and len(found) == 5
    assert found["equal"].settings == {"quantile_weights": "equal"}
    assert found["best, no contrast"].against == found["equal, no contrast"].settings


def test_one_token_has_no_axis_that_chooses_among_tokens() -> None:
    config = Config(quantiles=1, contrast_coef=0.0, guidance=1.5)
    without = axes.left_out(config)
    for axis in ("tokens", "selection"):
        assert without[axis] == f"all points of the axis {axis} train alike with quantiles = 1"


def test_contrast_is_compared_with_its_parts_and_with_none() -> None:
    found = {p.value: p.settings for p in axes.points_of(Config(), ["contrast"])}
    assert found.pop("both") == {} and found.pop("none") == {"contrast_coef": 0.0}
    assert found == {
        "mirror": {"contrast_with": "mirror"},
        "base": {"contrast_with": "base"},
        "margin 1": {"contrast_margin": 1.0},
        "margin 10": {"contrast_margin": 10.0},
    }
    assert "contrast" in axes.left_out(Config(contrast_coef=0.0))


def test_unlikelihood_is_taken_from_quark_and_quark_from_it() -> None:
    config = Config(task="repetition")
    assert "unlikelihood" not in axes.left_out(config)
    both, quark, unlikelihood = axes.points_of(config, ["unlikelihood"])
    assert both.settings == {}
    assert quark.settings == {"unlikelihood_coef": 0.0}
    assert unlikelihood.settings["quantiles"] == 1 and unlikelihood.settings["contrast_coef"] == 0
    assert "unlikelihood_coef" not in unlikelihood.settings


@pytest.mark.parametrize(
    ("settings", "axis", "message"),
    [
        ({}, "unlikelihood", "unlikelihood_coef = 0 with quantiles = 5"),
        ({}, "k", "grid = 'k'"),
        ({}, "", "grid = ''"),
        ({"kl_coef": 0.0}, "kl", "kl_coef"),
        ({"contrast_coef": 0.0}, "contrast", "contrast_coef = 0"),
        ({"rounds": 3, "steps": 5}, "exploration", "15 steps into 2"),
        ({"rounds": 1}, "tokens", "rounds = 1"),
        ({"quantile_weights": "1,0,0,0,1"}, "quantiles", "point K 2: quantile_weights"),
    ],
)
def test_axis_that_the_base_cannot_have_is_refused(settings: dict[str, Any], axis: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        axes.points_of(Config(**settings), [axis])


@pytest.fixture(scope="module")
def model(tiny_models: Callable[..., tuple[Path, Any]]) -> Path:
    return tiny_models("llama", 0)[0]


@pytest.fixture(scope="module")
def three_points(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A finished grid of one seed."""
    folder = tmp_path_factory.mktemp("three") / "grid"
    grid.run_grid(base(folder, model), ["tokens"], [0], **GIVEN)
    return folder


@pytest.fixture(scope="module")
def two_seeds(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A finished grid of two points, whose base is not guided."""
    folder = tmp_path_factory.mktemp("two") / "grid"
    grid.run_grid(base(folder, model, guidance=1.0), ["tokens"], [0, 1], **GIVEN)
    return folder


def test_run_with_shared_samples_is_the_run_without(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    config = base(tmp_path / "grid", tiny_model())
    grid.run_grid(config, ["quantiles"], [0], **GIVEN)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "grid" / "base-model").iterdir()}
    assert len(kept) == 3, "the pool, the probe, the evaluation: each sampled once for all points"
    # Not the first point, which sampled them.
    Trainer(base(tmp_path / "alone", Path(str(config.model)), quantiles=8), **GIVEN).train()
    for file in ("metrics.jsonl", "completions.jsonl", "evaluation.jsonl"):
        ours = tmp_path / "grid" / "seed-0" / "quantiles=8" / file
        assert timeless(ours) == timeless(tmp_path / "alone" / file), file


def test_grid_does_not_go_on_with_another_base_model(
    tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = base(tmp_path / "grid", tiny_model())
    grid.run_grid(config, ["quantiles"], [0], **GIVEN)
    (weights,) = Path(str(config.model)).glob("*.safetensors")
    save_file({name: 2 * one for name, one in load_file(weights).items()}, weights, {"format": "pt"})
    monkeypatch.setattr(Trainer, "train", lambda self: pytest.fail("it trains"))
    with pytest.raises(UsageError, match=r"has other weights than when the grid in .* began"):
        grid.run_grid(config, ["quantiles", "kl"], [0], **GIVEN)


def test_killed_grid_goes_on_between_points_and_within_one(
    tmp_path: Path, model: Path, three_points: Path
) -> None:
    names = ["tokens"]
    config = base(tmp_path / "killed", model)
    lines: list[str] = []

    def between(line: str) -> None:
        lines.append(line)
        if len(lines) == 2:
            raise SystemError("killed")

    with pytest.raises(SystemError):
        grid.run_grid(config, names, [0], note=between, **GIVEN)
    assert started(tmp_path / "killed") == ["base"]

    def within(progress: Progress) -> None:
        if progress.stage == "round 2/2: learning" and progress.done == 3:
            raise SystemError("killed")

    with pytest.raises(SystemError):
        grid.run_grid(config, names, [0], listen=within, **GIVEN)
    assert len(started(tmp_path / "killed")) == 2
    lines.clear()
    grid.run_grid(config, names, [0], note=lines.append, **GIVEN)
    assert [line.endswith(": finished") for line in lines] == [True, False, False]
    folders = three_points, tmp_path / "killed"
    for name in started(three_points):
        for file in ("metrics.jsonl", "completions.jsonl", "evaluation.jsonl"):
            paths = [folder / "seed-0" / name / file for folder in folders]
            assert timeless(paths[0]) == timeless(paths[1]), (name, file)
    results = [json.loads((folder / "ablations.json").read_text()) for folder in folders]
    for one in results:
        one.pop("versions")
        for point in one["points"]:
            point["mean"].pop("minutes"), point["deviation"].pop("minutes")
            for seed in point["seeds"]:
                seed.pop("minutes")
    assert results[0] == results[1]


def test_grid_goes_on_without_a_point_that_diverged_and_says_so_in_the_end(
    tmp_path: Path, model: Path
) -> None:
    config = base(tmp_path / "grid", model, guidance=1.0)
    lines: list[str] = []
    learn = Learner.step

    def step(self: Learner, *given: Any) -> dict[str, Any]:
        if self.config.explore_token == "random":
            raise Diverged("the KL is 5")
        return learn(self, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "step", step)
        with pytest.raises(UsageError, match=r"1 of 2 runs ended without a result.*random: the KL is 5"):
            grid.run_grid(config, ["tokens"], [0], note=lines.append, **GIVEN)
    assert any(line.endswith("explore_token=random: no result: the KL is 5") for line in lines)
    finished = [path.parent.name for path in (tmp_path / "grid").glob("seed-0/*/finished.json")]
    assert finished == ["base"]
    grid.run_grid(config, ["tokens"], [0], **GIVEN)
    assert (tmp_path / "grid" / "ablations.md").exists()


def test_grid_whose_rounds_all_miss_a_bound_goes_on_with_another_and_never_with_two(
    tmp_path: Path, model: Path
) -> None:
    def run(bound: str, **more: Any) -> Path:
        keep_best = f"reward:max, perplexity<={bound}" if bound else ""
        config = base(tmp_path / "grid", model, guidance=1.0, keep_best=keep_best)
        return grid.run_grid(config, ["tokens"], [0], **GIVEN, **more)

    with pytest.raises(UsageError, match=r"2 of 2 runs .*, give this whole grid another one, with which it"):
        run("0.01")
    alone = tmp_path / "grid" / "seed-0" / "base"
    steps = len(rows(alone / "metrics.jsonl", kind="step"))
    looser = {"keep_best": "reward:max, perplexity<=1000", "guidance": 1.0, "resume": True}
    Trainer(base(alone, model, **looser), **GIVEN).train()
    with pytest.raises(
        UsageError, match=r"seed-0/base is finished with keep_best = '.*<=1000', .*'.*<=0.01'"
    ):
        run("0.01")
    for other in ("2", ""):
        with pytest.raises(UsageError, match=r"keep_best = .*, but the grid in .* was made with '.*<=0.01'"):
            run(other)
    lines: list[str] = []
    folder = run("1000", note=lines.append)
    assert [line.endswith(": finished") for line in lines] == [True, False]
    random = folder / "seed-0" / "explore_token=random"
    assert [len(rows(path / "metrics.jsonl", kind="step")) for path in (alone, random)] == [steps] * 2
    assert json.loads((folder / "ablations.json").read_text())["base"]["keep_best"].endswith("<=1000")
    with pytest.raises(UsageError, match=r"was made with '.*<=1000'"):
        run("0.01")
    settings = (random / "config.yaml").read_text()
    (random / "config.yaml").write_text(settings.replace("kl_coef: 1.0", "kl_coef: 2.0"))
    with pytest.raises(UsageError, match=r"token=random is finished with kl_coef = 2.0, .* it has 1.0"):
        run("1000")


def test_grid_of_other_settings_is_refused_and_threads_are_free(
    tmp_path: Path, model: Path, two_seeds: Path
) -> None:
    shutil.copytree(two_seeds, tmp_path / "grid")
    before = (tmp_path / "grid" / "seed-0" / "base" / "evaluation.json").read_text()
    with pytest.raises(UsageError, match=r"kl_coef = 0\.5, but the grid in .* was made with 1\.0"):
        grid.run_grid(base(tmp_path / "grid", model, guidance=1.0, kl_coef=0.5), ["tokens"], [0], **GIVEN)
    grid.run_grid(base(tmp_path / "grid", model, guidance=1.0, show_offensive=True), ["tokens"], [0], **GIVEN)
    assert (tmp_path / "grid" / "seed-0" / "base" / "evaluation.json").read_text() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="is no grid"):
        grid.run_grid(base(tmp_path / "mine", model), ["tokens"], [0], **GIVEN)


def test_table_is_what_the_runs_wrote_averaged_over_seeds(two_seeds: Path) -> None:
    folder = two_seeds
    results = json.loads((folder / "ablations.json").read_text())
    point = next(p for p in results["points"] if p["run"] == "explore_token=random")
    means, probes, samples = [], [], {}
    for name in ("base", "explore_token=random"):
        samples[name] = []
        for seed in (0, 1):
            run = folder / f"seed-{seed}" / name
            found = {
                r["name"]: r["metrics"] for r in json.loads((run / "evaluation.json").read_text())["rows"]
            }
            assert list(found) == ["base model", "best token"]
            samples[name] += rows(run / "evaluation.jsonl", row="best token")
            if name == "explore_token=random":
                means.append(found["best token"]["mean"]["value"])
                probes.append(rows(run / "metrics.jsonl", kind="probe")[-1])
    assert point["mean"]["headline"] == pytest.approx(sum(means) / 2)
    assert point["deviation"]["headline"] == pytest.approx(abs(means[0] - means[1]) / 2**0.5)
    assert point["mean"]["kl"] == pytest.approx((probes[0]["kl"] + probes[1]["kl"]) / 2)
    assert all(probe["kl"] > 0 for probe in probes)
    difference = sum(s["score"] for s in samples["explore_token=random"]) - sum(
        s["score"] for s in samples["base"]
    )
    assert point["difference"]["difference"] == pytest.approx(difference / len(samples["base"]))
    assert point["difference"]["low"] < point["difference"]["difference"] < point["difference"]["high"]
    assert next(p for p in results["points"] if p["run"] == "base")["difference"] is None
    pools = [rows(folder / f"seed-{seed}" / "base" / "completions.jsonl", round=0) for seed in (0, 1)]
    assert pools[0] != pools[1], "shared within a seed, not between"
    written = (folder / "ablations.md").read_text()
    assert f"| {point['mean']['headline']:.3f} ± {point['deviation']['headline']:.3f} |" in written
    assert "8 prompts: a 95% interval of so few holds the true value in some 90 of 100 cases." in written
    svg = (folder / "ablations.svg").read_text()
    assert svg.count(">random<") == 2, "each value labelled in both plots"


@pytest.mark.parametrize("scored", [0, 1])
def test_grid_whose_held_out_prompts_have_hardly_a_score_ends_in_its_table(
    tmp_path: Path, model: Path, scored: int
) -> None:
    without = PROMPTS[scored:8]

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        return [None if p in without else float(len(t)) for p, t in zip(prompts, completions, strict=True)]

    given = {"reward": reward, "prompts": PROMPTS[8:], "held_out": PROMPTS[:8]}
    folder = grid.run_grid(base(tmp_path / "grid", model), ["tokens"], [0], **given)
    results = json.loads((folder / "ablations.json").read_text())
    point = next(p for p in results["points"] if p["difference"] is not None)
    assert (
        (point["mean"]["headline"] is not None) == (point["difference"]["difference"] is not None) == scored
    )
    assert point["difference"]["low"] is None and point["perplexity_change"]["low"] is not None
    written = next(
        line for line in (folder / "ablations.md").read_text().splitlines() if f"| {point['value']} |" in line
    )
    cells = [cell.strip() for cell in written.split("|")[1:-1]]
    shown = (
        [f"{point['mean']['headline']:.3f}", f"{point['difference']['difference']:+.3f}"]
        if scored
        else ["", ""]
    )
    assert [cells[2], cells[5]] == shown and "None" not in written and "[" not in cells[5]
    assert "%)" in cells[6], "the perplexity needs no score"
    svg = (folder / "ablations.svg").read_text()
    assert svg.count(f">{point['value']}<") == svg.count(">base model<") == 2 * scored


def test_headline_that_no_completion_has_is_empty_and_no_error() -> None:
    # The share of a sentiment is a measure that unscored completions have not.
    after = [Sample(i, f"p{i}", "a", None, 3.0, 2) for i in range(8)]
    before = [replace(one, score=0.5, measures={"target": 0.5}) for one in after]
    own = {"seed": 0, **dict.fromkeys(summary.AVERAGED)}
    finished = {"base": [summary._Finished(Path(), {}, own, before, after)]}
    metrics = {"headline": "target", "perplexity": "perplexity"}
    found = summary._summary_of(axes.Point("kl", "beta 1", {}), finished, metrics)
    assert set(found["change"].values()) == {None} and found["perplexity_change"]["difference"] == 0


def test_numbers_are_written_before_anything_is_drawn(
    tmp_path: Path, two_seeds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(results: dict[str, Any]) -> str:
        raise RuntimeError("no picture")

    monkeypatch.setattr(grid, "plot", broken)
    results = json.loads((two_seeds / "ablations.json").read_text())
    with pytest.raises(RuntimeError, match="no picture"):
        grid._write(tmp_path, results)
    assert json.loads((tmp_path / "ablations.json").read_text()) == results
    assert (tmp_path / "ablations.md").read_text() == (two_seeds / "ablations.md").read_text()


def test_terminal_of_80_columns_cuts_nothing(tmp_path: Path, two_seeds: Path) -> None:
    results = json.loads((two_seeds / "ablations.json").read_text())
    second = results["points"][1]
    long = {"axis": "unlikelihood", "value": "Quark + unlikelihood", "against": second["run"], "run": "x=1"}
    results["points"].append({**second, **long})
    (tmp_path / "ablations.json").write_text(json.dumps(results))
    file = io.StringIO()
    ablate._show(tmp_path, Terminal(file=file, width=80), Terminal(file=io.StringIO()))
    text = file.getvalue()
    assert "8 prompts: a 95% interval of so few" in text
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    whole = text.replace("\n", " ").split()
    for number in (
        f"{second['mean']['headline']:.3f}",
        f"{second['difference']['difference']:+.3f}",
        f"[{second['difference']['low']:+.3f},",
        f"{second['difference']['high']:+.3f}]",
        f"{second['mean']['perplexity']:.1f}",
        "unlikelihood",
        "from",
    ):
        assert number in whole, number


def test_runs_of_two_scorers_are_refused_in_one_table(
    tmp_path: Path, model: Path, three_points: Path
) -> None:
    folder = Path(shutil.copytree(three_points, tmp_path / "grid"))
    config = base(folder, model)
    other = folder / "seed-0" / "guidance=1.0" / "evaluation.json"
    evaluation = json.loads(other.read_text())
    assert f"Scorer: {evaluation['scorer']['name']}" in (folder / "ablations.md").read_text()
    evaluation["scorer"]["sha256"] = "another"
    other.write_text(json.dumps(evaluation))
    with pytest.raises(
        UsageError, match=r"guidance=1.0 and .*/base do not compare: scorer .*another.*remove one"
    ):
        grid.run_grid(config, ["tokens"], [0], **GIVEN)


def test_labels_that_would_touch_are_moved_apart_about_their_middle_and_no_others() -> None:
    assert plot.spread([0.5, 0.1, 0.9], 0.2) == [0.5, 0.1, 0.9]
    assert plot.spread([0.5, 0.5, 0.5], 0.2) == pytest.approx([0.3, 0.5, 0.7])
    assert plot.spread([0.32, 0.3, 0.9], 0.1) == pytest.approx([0.36, 0.26, 0.9])
    # The first two, moved apart, come to touch the third.
    assert plot.spread([0.0, 0.05, 0.13], 0.1) == pytest.approx([-0.04, 0.06, 0.16])
    for seed in range(50):
        heights = np.random.default_rng(seed).random(12)
        placed = np.array(plot.spread(heights.tolist(), 0.05))
        assert (np.argsort(placed) == np.argsort(heights)).all()
        assert (np.diff(np.sort(placed)) > 0.05 - 1e-9).all()
        assert placed.mean() == pytest.approx(heights.mean())


def test_tokens_that_nothing_was_drawn_for_lie_between_the_others_when_they_explore(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    config = base(tmp_path / "run", tiny_model(), explore_token="random", quantiles=5, eval=False)
    trainer, seen = Trainer(config, **GIVEN), []
    own = trainer.explorer._conditionings

    def conditionings(state: State) -> list[tuple[Conditioning, list[int]]]:
        if state.step:
            rows = trainer.setup.copied.get().get_input_embeddings().rows
            seen.append((sorted(state.trained), rows.clone()))
        return own(state)

    trainer.explorer._conditionings = conditionings
    trainer.train()
    ((trained, embedded),) = seen
    assert trained == [0, 4]
    for k in (1, 2, 3):
        torch.testing.assert_close(embedded[k], torch.lerp(embedded[0], embedded[4], k / 4))


def test_numbers_of_a_kept_round_are_all_of_that_round(three_points: Path) -> None:
    run = read_run(three_points / "seed-0" / "base")
    (early, late) = run.probes
    assert run.probe_of_model == late
    compared = [{"round": n, "step": probe["step"]} for n, probe in enumerate(({"step": 0}, early, late))]
    evaluation = {**run.evaluation, "kept_round": {"round": 1}}
    assert replace(run, compared=compared, evaluation=evaluation).probe_of_model == early
    evaluation["kept_round"] = {"round": 9}
    assert replace(run, compared=compared, evaluation=evaluation).probe_of_model == {}


def test_random_token_explores_every_prompt_once_with_tokens_of_all_quantiles(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    trainer = Trainer(base(tmp_path / "run", tiny_model(), explore_token="random"), **GIVEN)
    assert [(c.quantile, len(i)) for c, i in trainer.explorer._conditionings(trainer.state)] == [
        (None, len(PROMPTS))
    ]
    trainer.train()
    seen = []
    for trainer.state.round in (1, 2):
        explored = trainer.explorer._conditionings(trainer.state)
        assert [(c.quantile, c.against, c.guidance) for c, _ in explored] == [(k, 0, 1.5) for k in range(3)]
        assert sorted(i for _, indices in explored for i in indices) == list(range(len(PROMPTS)))
        assert all(indices for _, indices in explored)
        seen.append([indices for _, indices in explored])
    assert seen[0] != seen[1], "drawn anew in each round"
    written = rows(tmp_path / "run" / "completions.jsonl", round=1)
    assert sorted(row["prompt"] for row in written) == sorted(PROMPTS * trainer.config.explore_samples)


def test_command_runs_a_grid_prints_its_table_and_finds_it_finished(
    tmp_path: Path,
    tiny_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "grid_rewards.py").write_text(
        "def evens(prompts, completions, **_):\n"
        "    return [sum(w.isdigit() and int(w) % 2 for w in c.split('w')) / 9 for c in completions]\n"
    )
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    given = {
        **{"--model": str(tiny_model()), "--prompts": "prompts.txt", "--reward": "grid_rewards:evens"},
        **{"--quantiles": "3", "--rounds": "2", "--steps": "2", "--batch-size": "8", "--micro-batch": "8"},
        **{"--initial-samples": "2", "--explore-samples": "1", "--eval-samples": "2", "--guidance": "1.5"},
        **{"--max-new-tokens": "4", "--precision": "fp32", "--threads": "1", "--output": "grid"},
    }
    command = ["--grid", "tokens", *(part for pair in given.items() for part in pair)]
    monkeypatch.setenv("COLUMNS", "80")
    assert ablate.main(command) == 0
    heard = capsys.readouterr()
    first = heard.out
    results = json.loads((tmp_path / "grid" / "ablations.json").read_text())
    assert [point["value"] for point in results["points"]] == ["best, w 1.5", "best, w 1", "random, w 1.5"]
    for point in results["points"]:
        assert point["value"] in first and f"{point['mean']['headline']:.3f}" in first
    assert (
        "run 1/3: seed 0, base" in heard.err and results["scorer"]["name"] in first.partition("Scorer: ")[2]
    )
    for kind in ("md", "svg", "json"):
        assert f"grid/ablations.{kind}" in heard.err and (tmp_path / "grid" / f"ablations.{kind}").exists()
    assert ablate.main(command) == 0
    again = capsys.readouterr()
    assert again.err.count(": finished") == 3 and again.out.count("axis") == 1
    assert json.loads((tmp_path / "grid" / "ablations.json").read_text()) == results


def test_command_lists_the_points_and_refuses_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ablate.main(["--grid", "kl,quantiles", "--seeds", "0,1", "--dry-run", "--kl-coef", "2"]) == 0
    shown = capsys.readouterr().out
    assert "beta 0.5 " in shown and "--quantiles 8" in shown
    assert "8 runs a seed (shared points run once), 16 in all" in shown
    assert ablate.main(["--help", "--grid", "tokens"]) == 0
    shown = capsys.readouterr().out
    assert "--explore-token random" in shown and "--seeds" in shown
    assert ablate.main(["--task", "repetition", "--grid", "unlikelihood", "--dry-run"]) == 0
    assert "--eval-guidance ''\n" in capsys.readouterr().out, "flags that a shell takes"
    assert ablate.main(["--task", "repetition", "--grid", "selection", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "3 runs a seed" in shown and "left out: selection, point 'equal', which trains as" in shown
    for arguments, message in (
        (["--grid", "beta"], "choose from kl"),
        (["--seeds", "x"], "whole numbers"),
        (["--seed", "3"], "--seeds 3"),
        (["--resume"], "leave out --resume"),
        (["--kl-cof", "1"], "--kl-cof"),
    ):
        assert ablate.main([*arguments, "--output", str(tmp_path / "grid")]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (tmp_path / "grid").exists()


def test_grid_that_names_no_axis_has_those_that_the_base_can_have(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ablate.main(["--task", "repetition", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "left out: tokens, since the axis tokens is about exploring, but rounds = 1 never does" in shown
    assert "\nunlikelihood:\n" in shown and "\ntokens:\n" not in shown
    assert ablate.main(["--task", "repetition", "--grid", "tokens", "--dry-run"]) == 2
    assert "rounds = 1 never does" in capsys.readouterr().err


def test_values_of_w_that_no_row_would_show_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert ablate.main(["--eval-guidance", "2,3", "--dry-run"]) == 2
    assert "eval_guidance = '2,3' asks for rows that eval_rows = 'best' leaves out" in capsys.readouterr().err
    assert ablate.main(["--eval-guidance", "2,3", "--eval-rows", "ends", "--dry-run"]) == 0
    with pytest.raises(UsageError, match="give --eval-rows ends, too"):
        parse(["--eval_guidance=3", "--eval-rows", "best"], "train")
    assert parse(["--task", "repetition", "--eval-rows", "best"], "train").remarks() == []
    assert Config(eval_rows="best", eval_guidance="3").remarks() != []


@pytest.mark.parametrize("flags", [["--no-eval"], ["--from", "runs/x"], ["--push-to-hub", "me/x"]])
def test_grid_refuses_what_is_for_one_run(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert ablate.main([*flags, "--dry-run"]) == 2
    assert f"leave out {flags[0]}" in capsys.readouterr().err
