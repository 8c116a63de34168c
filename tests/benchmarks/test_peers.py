"""The comparison with other methods: which points run, which try is chosen, what the table says."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import save_tiny_model, word_tokenizer
from matplotlib.figure import Figure
from matplotlib.text import Text
from tokenizers import decoders

from quark_fast.metrics import Sample, judge_measure
from quark_fast.rewards.reward import Reward


@pytest.fixture
def peers(from_benchmarks: Callable[[str], ModuleType]) -> ModuleType:
    return from_benchmarks("peers")


def samples(score: float, nll: float, judge: float, **fit: float) -> list[Sample]:
    return [
        Sample(i, f"p{i}", f"a {i}", score, nll, 4, {judge_measure("toxicity-judge"): judge + i / 100} | fit)
        for i in range(8)
    ]


def save_point(peers: ModuleType, output: Path, point: dict[str, Any], rows: dict[str, list[Sample]]) -> None:
    folder = peers.folder_of(output, point)
    folder.mkdir(parents=True)
    lines = [json.dumps({"row": row, **vars(one)}) + "\n" for row, part in rows.items() for one in part]
    (folder / "samples.jsonl").write_text("".join(lines))
    record = {"settings": point["settings"], "minutes": 12.0, "scored": 100, "threads": 1}
    record["versions"] = {"torch": "x"}
    (folder / "result.json").write_text(json.dumps(record))


@pytest.fixture
def asked(tmp_path: Path) -> argparse.Namespace:
    return argparse.Namespace(task="toxicity", minutes=12.0, output=tmp_path)


def test_lowest_score_wins_among_the_tries_that_keep_the_perplexity(
    peers: ModuleType, asked: argparse.Namespace
) -> None:
    tries = [{"learning_rate": 1e-5}, {"learning_rate": 1e-4}, {"learning_rate": 1e-3}]
    found = [samples(0.4, 8.0, 0.4), samples(0.2, 8.2, 0.3), samples(0.1, 9.0, 0.2)]
    (base,) = peers.points(asked, "development", [0], {"base": [{}]})
    save_point(peers, asked.output, base, {"base": samples(0.5, 8.0, 0.5)})
    for point, rows in zip(peers.points(asked, "development", [0], {"GRPO": tries}), found, strict=True):
        save_point(peers, asked.output, point, {"GRPO": rows})
    # exp(8.2 / 4) / exp(8 / 4) is +5%, exp(9 / 4) / exp(8 / 4) +28%.
    measured = peers.tried(asked, "GRPO", tries)
    assert peers.choose(asked, "GRPO", tries, measured) == tries[1]
    assert peers.choose(asked, "GRPO", tries[2:], []) == tries[2], "a single try needs no choice"
    assert [one["settings"] for one in measured] == tries
    changes = [one["numbers"]["mean"]["relative"] for one in measured]
    assert changes == pytest.approx([-0.2, -0.6, -0.8])


def test_tries_alone_open_no_test_prompts(
    peers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = []

    def run_all(asked: argparse.Namespace, wanted: list[dict[str, Any]]) -> None:
        for point in wanted:
            opened.append((point["split"], point["method"]))
            better = 0.1 if point["settings"].get("beta") == 0 else 0.0
            save_point(peers, tmp_path, point, {point["method"]: samples(0.5 - better, 8.0, 0.5)})

    monkeypatch.setattr(peers, "run_all", run_all)
    given = ["--try", 'GRPO={"beta": 0.1}', "--try", 'GRPO={"beta": 0, "samples": 64}']
    file = tmp_path / "tries.json"
    command = ["peers.py", "--output", str(tmp_path), *given, "--table", str(file)]
    monkeypatch.setattr("sys.argv", command)
    peers.main()
    assert opened == [("development", "base"), ("development", "GRPO"), ("development", "GRPO")]
    held, free = capsys.readouterr().out.splitlines()
    assert held.startswith("GRPO {'beta': 0.1}, 100 scored: toxicity 0%, judge 0%")
    assert "toxicity -20%" in free
    table = json.loads(file.read_text())
    assert [one["settings"] for one in table["tries"]["GRPO"]] == [{"beta": 0.1}, {"beta": 0, "samples": 64}]
    assert table["versions"] == {"torch": "x", "threads": 1}

    monkeypatch.setattr("sys.argv", [*command, "--try", "PPO={}"])
    with pytest.raises(SystemExit, match="--try PPO: not among the methods"):
        peers.main()


def test_table_has_means_of_all_seeds_against_the_base_model_of_the_same_seed(
    peers: ModuleType, asked: argparse.Namespace, tmp_path: Path
) -> None:
    for seed, score in ((0, 0.2), (1, 0.3)):
        for method, rows in (
            ("base", {"base": samples(0.5, 8.0, 0.5, prompt_fit=2.0)}),
            ("ours", {"best token": samples(score, 8.2, 0.25), "worst token": samples(0.9, 8.0, 0.6)}),
            ("GRPO", {"GRPO": samples(0.4, 8.0, 0.4, prompt_fit=1.5)}),
        ):
            (point,) = peers.points(asked, "test", [seed], {method: [{}]})
            save_point(peers, asked.output, point, rows)
    (careful,) = peers.points(asked, "test", [0], {"GRPO": [{"learning_rate": 1e-5}]})
    for seed in (0, 1):
        row = {"GRPO": samples(0.45, 8.0, 0.45, prompt_fit=1.9)}
        save_point(peers, asked.output, careful | {"seed": seed}, row)
    chosen = {"base": [{}], "ours": [{}], "GRPO": [{}, {"learning_rate": 1e-5}]}
    table = peers.results(asked, chosen, [0, 1])
    base, ours, grpo, _ = table["rows"]
    assert peers.labels(table["rows"])[-2:] == ["GRPO", "GRPO, learning rate 1e-05"]
    assert (base["method"], ours["row"]) == ("base", "best token")
    assert ours["all seeds"]["mean"]["value"] == pytest.approx(0.25)
    assert ours["all seeds"]["mean"]["relative"] == pytest.approx(-0.5)
    assert [one["mean"]["relative"] for one in ours["seeds"]] == pytest.approx([-0.6, -0.4])
    shown = peers.markdown(table)
    assert "| ours, best token | 12.0 | 100 | 0.250, -50% [-50, -50] | 0.285, -47% " in shown
    few = {**ours["all seeds"]["mean"], "relative_low": math.nan, "relative_high": math.nan}
    assert peers.task_tables.change(few) == "-50%", "as of few prompts"
    peers.plot(table, tmp_path / "plot.svg")
    assert "ours, best token" in (tmp_path / "plot.svg").read_text()
    assert grpo["all seeds"]["prompt_fit"]["relative"] == pytest.approx(-0.25)
    assert "prompt_fit" not in ours["all seeds"], "of an earlier version"
    line = next(line for line in shown.splitlines() if "ours" in line)
    assert line.count("|") == shown.splitlines()[0].count("|")


def test_a_setting_is_named_only_where_it_differs_from_the_chosen_one(peers: ModuleType) -> None:
    chosen = {"learning_rate": 4e-5, "beta": 0.1}
    rows = [
        {"method": "DPO", "row": "DPO", "settings": settings, "by rule": settings == chosen}
        for settings in (chosen, chosen | {"beta": 0.3}, {"learning_rate": 1e-5, "beta": 0.3})
    ]
    assert peers.labels(rows) == ["DPO", "DPO, beta 0.3", "DPO, learning rate 1e-05, beta 0.3"]


def test_no_two_names_of_the_frontier_overlap(
    peers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every method, most of them at nearly the same place."""
    import peer_point

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    rows = []
    for number, method in enumerate(peer_point.METHODS):
        for row in ("best token", "guided w=1.5") if peer_point.METHODS[method].ours else (method,):
            numbers = {
                name: {"value": 18.0 + number / 100} for name in ("judge toxicity-judge", *peers.COSTS)
            }
            about = {"method": method, "row": row, "settings": {}, "by rule": True}
            rows.append(about | {"all seeds": numbers, "seeds": [numbers]})
    peers.plot({"task": "toxicity", "rows": rows}, tmp_path / "plot.svg")
    (figure,) = figures
    figure.draw_without_rendering()
    *others, last = figure.axes
    assert not any(panel.texts for panel in others) and len(last.texts) == len(rows)
    for panel in figure.axes:
        boxes = [Text.get_window_extent(name) for name in panel.texts]  # without their lines
        for i, one in enumerate(boxes):
            assert one.y0 >= 0 and one.y1 <= figure.bbox.y1 and one.x1 <= figure.bbox.x1, "cut off"
            assert not any(one.overlaps(other) for other in boxes[:i])
            assert not any(one.overlaps(other.bbox) for other in figure.axes), "over a panel"


def test_a_table_keeps_the_methods_that_a_later_call_leaves_out(
    peers: ModuleType, asked: argparse.Namespace
) -> None:
    rows = {
        "base": {"base": samples(0.5, 8.0, 0.5)},
        "RAFT": {"RAFT": samples(0.3, 8.0, 0.4)},
        "GRPO": {"GRPO": samples(0.4, 8.0, 0.4)},
        "ours": {"best token": samples(0.2, 8.2, 0.25)},
    }
    for method, found in rows.items():
        (point,) = peers.points(asked, "test", [0], {method: [{}]})
        save_point(peers, asked.output, point, found)
    earlier = peers.results(asked, {"base": [{}], "ours": [{}], "GRPO": [{}]}, [0])
    later = peers.results(asked, {"base": [{}], "GRPO": [{}], "RAFT": [{}]}, [0])
    later["rows"][1]["minutes"] = 11.0
    later["tries"] = {"GRPO": [2]}
    whole = peers.with_earlier(later, json.loads(json.dumps(earlier | {"tries": {"GRPO": [1], "DPO": [3]}})))
    assert whole["tries"] == {"GRPO": [2], "DPO": [3]}
    joined = whole["rows"]
    assert [row["method"] for row in joined] == ["base", "ours", "GRPO", "RAFT"]
    assert joined[2]["minutes"] == 11.0, "what was measured again is new"

    earlier["rows"][0]["seeds"][0]["perplexity"]["value"] += 1e-9
    with pytest.raises(SystemExit, match="the base model's perplexity is"):
        peers.with_earlier(later, earlier)
    with pytest.raises(SystemExit, match=r"the table has seeds \[0, 1\], this call \[0\]"):
        peers.with_earlier(later, earlier | {"seeds": [0, 1]})


def test_chosen_settings_have_no_tries(
    peers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = 'RAFT={"learning_rate": 4e-5}'
    command = f"peers.py --dry-run --output {tmp_path} --methods RAFT --chosen".split()
    monkeypatch.setattr("sys.argv", [*command, chosen])
    peers.main()
    assert "development" not in capsys.readouterr().out.partition("then")[0]
    monkeypatch.setattr("sys.argv", [*command[:-1]])
    peers.main()
    assert capsys.readouterr().out.count("/development/") == 4, "three tries and the base model"


def test_points_that_are_there_do_not_run_again(peers: ModuleType, asked: argparse.Namespace) -> None:
    wanted = list(peers.points(asked, "test", [0], {"base": [{}]}))
    save_point(peers, asked.output, wanted[0], {"base": samples(0.5, 8.0, 0.5)})
    asked.jobs = 1
    peers.run_all(asked, wanted)
    assert not (peers.folder_of(asked.output, wanted[0]) / "log").exists()


@pytest.fixture
def tiny(peers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model in place of the embedded one, and points of it that are small."""
    import peer_point

    tiny = save_tiny_model(tmp_path / "tiny", "llama")
    spaced = word_tokenizer()  # so that prompt and completion stay apart in the text of both
    spaced.backend_tokenizer.decoder = decoders.Sequence([decoders.Replace("w", " w"), decoders.Fuse()])
    spaced.save_pretrained(tiny)
    monkeypatch.setattr("quark_fast.data.assets.default_model", lambda: tiny)
    monkeypatch.setattr(peer_point, "completions_of", lambda config: 2)
    limits = {"judge": "none", "max_new_tokens": 4, "prompt_limit": 8, "held_out": "2", "precision": "fp32"}
    config = peer_point.Point.config
    monkeypatch.setattr(peer_point.Point, "config", lambda self, **given: config(self, **limits, **given))
    return tiny


def test_best_of_4_has_the_best_by_the_reward(
    peers: ModuleType, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import peer_point

    def letters(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return [len(set(text)) / 99 for text in completions]

    reward = Reward(letters, "letters", "1", "ab" * 32)
    monkeypatch.setattr("quark_fast.training.start.choose_reward", lambda *_: reward)
    means = {}
    for method in ("base", "best of 4"):
        folder = tmp_path / method
        folder.mkdir()
        peer_point.run(peer_point.Point("toxicity", method, 12.0, {}, 0, "development", folder, 1))
        rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        assert {row["row"] for row in rows} == {method} and len(rows) == 10
        means[method] = sum(row["score"] for row in rows) / len(rows)
    assert means["best of 4"] > means["base"]


@pytest.mark.filterwarnings("ignore")  # TRL's own
@pytest.mark.parametrize("method", ["GRPO", "GRPO with equal samples", "RLOO", "DPO", "KTO", "RAFT"])
def test_method_of_trl_trains_a_model_that_differs_from_the_base(
    peers: ModuleType, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    pytest.importorskip("trl")
    import peer_point
    import torch
    from transformers import AutoModelForCausalLM

    settings = {"learning_rate": 1e-2} if method == "RAFT" else {"learning_rate": 1e-2, "beta": 0.1}
    point = peer_point.Point("toxicity", method, 60.0, settings, 0, "development", tmp_path / "point", 1)
    point.folder.mkdir()
    common = peer_point.common
    monkeypatch.setattr(peer_point, "common", lambda *given: common(*given) | {"max_steps": 3})
    # Rewards that differ, whatever so small a model writes.
    numbers = iter(range(10**9))
    reward = Reward(lambda prompts, **_: [next(numbers) / 7 % 1 for _ in prompts], "tiny", "1", "ab" * 32)
    monkeypatch.setattr("quark_fast.training.start.choose_reward", lambda *_: reward)
    peer_point.run(point)
    record = json.loads((point.folder / "result.json").read_text())
    assert 0 <= record["minutes"] < 60 and record["scored"] > 0
    rows = [json.loads(line) for line in (point.folder / "samples.jsonl").read_text().splitlines()]
    assert {row["row"] for row in rows} == {method} and len(rows) == 10
    before = AutoModelForCausalLM.from_pretrained(tiny).state_dict()
    after = AutoModelForCausalLM.from_pretrained(point.folder / "model").state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_curves_over_minutes_have_every_length_and_method(
    peers: ModuleType, from_benchmarks: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    over_minutes = from_benchmarks("peers_minutes")
    asked = over_minutes.parser().parse_args(["--minutes", "4", "--output", str(tmp_path)])
    text = {"text_nll": 1.0, "text_tokens": 1, "text_correct": 1}
    for at, tries in over_minutes.lengths(asked):
        for point in peers.points(at, "development", [0], {"base": [{}]} | tries):
            # Smaller with the minutes, but for the smaller of the step sizes.
            small = point["settings"] == tries.get(point["method"], [{}])[0] and point["method"] != "ours"
            score = 0.5 if point["method"] == "base" or small else 0.4 / at.minutes
            name = "best token" if point["method"] == "ours" else point["method"]
            found = [replace(one, **text) for one in samples(score, 8.0, score, prompt_fit=2.0)]
            save_point(peers, tmp_path, point, {name: found})
    made = over_minutes.measured(asked)
    taken = [(row["method"], row["settings"]) for row in made["rows"] if row["chosen"]]
    larger = [(name, tries[1]) for name, tries in over_minutes.TRIES.items()]
    assert taken == [
        one for times in (0.5, 1, 2) for one in (("ours", over_minutes.ours_at("toxicity", times)), *larger)
    ]
    assert over_minutes.ours_at("toxicity", 0.5) == {"initial_samples": 2, "explore_samples": 1, "steps": 12}
    shown = over_minutes.table(made).splitlines()
    assert len(shown) == 2 + 9 and shown[2].startswith("| ours | 12.0 | 100 | -60% |")
