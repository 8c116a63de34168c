"""``--from``: a run that goes on from a finished one; and a run without evaluation."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import PROMPTS, SHORT, copies_at, even_words, rows, small, timeless
from torch import Tensor
from transformers import AutoModelForCausalLM

from quark_fast.arguments import parse
from quark_fast.config import Config
from quark_fast.errors import Interrupted, UsageError
from quark_fast.evaluation.side_by_side import Evaluator
from quark_fast.report.files import read_run
from quark_fast.runtime.run_folder import RunFolder
from quark_fast.training import trainer as trainer_module
from quark_fast.training.progress import Progress
from quark_fast.training.trainer import Trainer

Make = Callable[..., Path]
LORA = {"lora_rank": 4, "explore_samples": 2}


def trainer(config: Config, **given: Any) -> Trainer:
    return Trainer(config, **({"reward": even_words, "prompts": PROMPTS, "held_out": PROMPTS[:4]} | given))


def further(config: Config, folder: Path, **settings: Any) -> Config:
    """The settings of a run that goes on from another."""
    return dataclasses.replace(config, from_run=config.output, output=str(folder), **settings)


def trained(one: Trainer) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in one.policy.model.named_parameters() if p.requires_grad}


# --- what is taken along -----------------------------------------------------------------------------


@pytest.mark.parametrize("lora_rank", [4, 0])
def test_run_goes_on_with_the_weights_the_reward_tokens_and_the_pool(
    tmp_path: Path, tiny_model: Make, lora_rank: int
) -> None:
    config = small(tmp_path / "run", tiny_model(), **SHORT, eval=False, lora_rank=lora_rank)
    first = trainer(config)
    first.train()
    second = trainer(further(config, tmp_path / "more", rounds=2))
    before, after = trained(first), trained(second)
    assert before.keys() == after.keys()
    for name, value in before.items():  # the tiny models are stored in float32, so no export rounds them
        size = first.policy.vocabulary if name.endswith("base.weight") else len(value)
        torch.testing.assert_close(after[name][:size], value[:size], rtol=0, atol=0)
    pools = first.state.pool, second.state.pool
    assert pools[0].rewards.tolist() == pools[1].rewards.tolist() and len(pools[0]) == 48
    drawn = [pool[pool.ids[:48]] for pool in pools]
    for one, other in zip(drawn[0].completions, drawn[1].completions, strict=True):
        assert one.tolist() == other.tolist()
    base = second.setup.reference
    for name, own in AutoModelForCausalLM.from_pretrained(config.model).named_parameters():
        torch.testing.assert_close(base.get_parameter(name), own, rtol=0, atol=0)

    folder = second.train().folder
    rounds, steps = (rows(folder / "metrics.jsonl", kind=kind) for kind in ("round", "step"))
    assert [row["round"] for row in rounds] == [1, 2]
    assert [row["step"] for row in steps] == list(range(7, 19))
    assert [row["pool"] for row in rounds] == [48 + 8 * 24, 48 + 16 * 24]
    assert steps[0]["lr"] == pytest.approx(config.step_size / config.warmup_steps)
    assert steps[-1]["lr"] < steps[-2]["lr"]
    read = read_run(folder)
    assert read.begun is not None and "after 1 rounds and 6 steps of an earlier run" in card(folder)
    assert RunFolder(folder).finished and (folder / "state").is_dir()
    third = trainer(further(second.config, tmp_path / "third"))
    assert (third.state.earlier_rounds, third.state.earlier_steps) == (3, 18)


@pytest.mark.parametrize(
    ("before", "now", "first"),
    [
        ({}, {"kl_target": 0.05}, 1.0),
        ({}, {"kl_target": 0.05, "kl_coef": 7.0}, 7.0),
        ({"kl_target": 0.05}, {"kl_coef": 7.0}, 7.0),
        ({"kl_target": 0.05}, {}, None),  # as the earlier run's controller left it
    ],
)
def test_weight_of_the_kl_goes_on_unless_another_is_given(
    tmp_path: Path, tiny_model: Make, before: dict[str, float], now: dict[str, float], first: float | None
) -> None:
    config = small(tmp_path / "run", tiny_model(), **SHORT, **before, eval=False, kl_horizon=20)
    earlier = trainer(config)
    earlier.train()
    found = trainer(further(config, tmp_path / "more", **now)).state.kl.coef
    assert found == pytest.approx(earlier.state.kl.coef if first is None else first)
    assert first is not None or found != 1.0


def card(folder: Path) -> str:
    return (folder / "model" / "README.md").read_text()


def test_killed_run_that_goes_on_from_another_resumes_to_the_same_result(
    tmp_path: Path, tiny_model: Make
) -> None:
    config = small(tmp_path / "run", tiny_model(), **SHORT | LORA, eval=False)
    trainer(config).train()
    moments = [("round 2/3: sampling", 1), ("round 2/3: learning", 3)]
    copies = copies_at(moments, tmp_path / "whole")
    whole = trainer(further(config, tmp_path / "whole", rounds=2), listen=copies).train().folder

    for number in range(len(moments)):
        own = further(config, tmp_path / f"killed-{number}", rounds=2)
        folder = trainer(dataclasses.replace(own, resume=True)).train().folder
        assert timeless(folder / "metrics.jsonl") == timeless(whole / "metrics.jsonl")
        weights = [path / "model" / "model.safetensors" for path in (folder, whole)]
        assert weights[0].read_bytes() == weights[1].read_bytes()


def test_what_is_kept_is_small_beside_the_model(tmp_path: Path, tiny_model: Make) -> None:
    for lora_rank in (4, 0):
        config = small(tmp_path / f"run{lora_rank}", tiny_model(), **SHORT, eval=False, lora_rank=lora_rank)
        folder = trainer(config).train().folder
        assert not (folder / "checkpoint").exists()
        assert not (folder / "state" / "optimizer.safetensors").exists()
        sizes = [
            (folder / name).stat().st_size for name in ("state/model.safetensors", "model/model.safetensors")
        ]
        assert sizes[0] < sizes[1] / 2


# --- what does not fit -------------------------------------------------------------------------------


def test_what_a_run_cannot_go_on_from_is_refused_in_one_line(tmp_path: Path, tiny_model: Make) -> None:
    config = small(tmp_path / "run", tiny_model(), **SHORT | LORA, eval=False)
    trainer(config).train()

    def refused(pattern: str, given: dict[str, Any] | None = None, **settings: Any) -> None:
        with pytest.raises(UsageError, match=pattern) as error:
            trainer(dataclasses.replace(further(config, tmp_path / "more"), **settings), **(given or {}))
        assert "\n" not in str(error.value)
        assert not (tmp_path / "more").exists()

    refused(r"quantiles = 2, but the run in .*run has 3", quantiles=2)
    refused(r"lora_rank = 8, but the run in .*run has 4", lora_rank=8)
    refused(r"model = '.*', but the run in .* give that, or train anew", model=str(tiny_model("gpt2")))
    refused(r"the training prompts are not those that the run in .*run began with", {"prompts": PROMPTS[:20]})
    refused(r"evaluate_on = 'development', but the run in .*run has 'test'", evaluate_on="development")
    refused(r"target = 'negative', but the run in .*run has 'positive', which its .* pool", target="negative")
    refused(r"prompt_limit = 9, but the run in .*run has 0", prompt_limit=9)
    refused(r"keep_best = 'reward:max', but the run in .*run has ''", keep_best="reward:max")
    refused(r"--from .*nothing: no run folder", from_run=str(tmp_path / "nothing"))

    def other(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [float(len(text)) for text in completions]

    refused(r"the reward is not the one that scored the samples in .*run", {"reward": other})
    state = tmp_path / "run" / "state"
    (state / "pool.safetensors").write_bytes(b"damaged")
    refused(r"state is damaged \(pool.safetensors has another checksum")
    shutil.rmtree(state)
    refused(r"it has no state/ to go on from.*--scored .*completions\.jsonl")

    def stop(event: Progress) -> None:
        if "learning" in event.stage:
            raise Interrupted

    unfinished = dataclasses.replace(config, output=str(tmp_path / "unfinished"))
    with pytest.raises(Interrupted):
        trainer(unfinished, listen=stop).train()
    refused(r"not finished; go on with it by --resume --output", from_run=unfinished.output)


def test_folder_that_another_run_takes_meanwhile_is_left_as_it_is(
    tmp_path: Path, tiny_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(tmp_path / "run", tiny_model(), **SHORT | LORA, eval=False)
    trainer(config).train()
    taken, own = tmp_path / "more", trainer_module.set_up

    def slow(*given: Any) -> Any:  # two that were started together have one default for the folder
        found = own(*given)
        taken.mkdir()
        for name in ("config.yaml", "metrics.jsonl", "completions.jsonl"):
            (taken / name).write_text("{}\n")
        return found

    monkeypatch.setattr(trainer_module, "set_up", slow)
    with pytest.raises(UsageError, match=r"more exists: a run that is not finished"):
        trainer(further(config, taken))
    left = {path.name: path.read_text() for path in taken.iterdir()}
    assert left == dict.fromkeys(("config.yaml", "metrics.jsonl", "completions.jsonl"), "{}\n")


def test_tokens_of_the_earlier_run_have_their_rows_where_one_alone_is_trained_now(
    tmp_path: Path, tiny_model: Make
) -> None:
    config = small(tmp_path / "run", tiny_model(), **SHORT | LORA, eval_rows="ends")
    trainer(config).train()
    alone = {"contrast_coef": 0.0, "quantile_weights": "best"}
    assert dataclasses.replace(config, **alone).one_token
    folder = trainer(dataclasses.replace(further(config, tmp_path / "more"), **alone)).train().folder
    names = [row["name"] for row in json.loads((folder / "evaluation.json").read_text())["rows"]]
    assert names == ["base model", "best token", "guided w=1.5", "worst token"]
    single = Config(quantiles=1, from_run="runs/one", contrast_coef=0.0)
    assert single.one_token and single.guidances() == []


def test_flags_win_over_the_settings_of_the_run_and_its_folder_is_numbered(tmp_path: Path) -> None:
    run = tmp_path / "x"
    run.mkdir()
    saved = Config(output=str(run), rounds=3, kl_coef=0.5, push_to_hub="me/x", task="sentiment")
    saved.save(run / "config.yaml")
    found = parse(["--from", str(run), "--rounds", "1"], "train")
    assert (found.rounds, found.kl_coef, found.task, found.push_to_hub) == (1, 0.5, "sentiment", None)
    assert (found.output_folder, found.from_run) == (tmp_path / "x-2", str(run))
    # Another preset is a flag, too: what the run has by its own preset goes, what it set itself stays.
    long = parse(["--from", str(run), "--preset", "long"], "train")
    own = Config(task="sentiment", preset="long")
    assert (long.steps, long.lora_rank, long.kl_coef) == (own.steps, own.lora_rank, 0.5)
    Config(output=str(run), preset="long", batch_size=5).save(run / "config.yaml")
    usual = parse(["--from", str(run), "--preset", "default"], "train")
    assert (usual.steps, usual.lora_rank, usual.batch_size) == (Config().steps, Config().lora_rank, 5)
    assert parse(["--from", str(run)], "train").steps == Config(preset="long").steps != Config().steps
    saved.save(run / "config.yaml")
    file = tmp_path / "more.yaml"
    file.write_text("kl_coef: 0.25\n")
    found = parse(["--from", str(run), "--config", str(file)], "train")
    assert (found.rounds, found.kl_coef) == (3, 0.25)
    file.write_text(f"kl_coef: 0.25\nfrom_run: {run}\n")
    assert parse(["--config", str(file)], "train") == found
    for name, expected in (("x-2", "x-3"), ("x-9", "x-10"), ("seed-0", "seed-0-2"), ("7", "7-2")):
        assert Config(from_run=f"runs/{name}").output_folder == Path("runs", expected)


# --- no evaluation -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("reports")
def test_run_that_is_not_evaluated_has_all_but_the_table_and_is_evaluated_later(
    tmp_path: Path, tiny_model: Make
) -> None:
    config = small(tmp_path / "run", tiny_model(), **SHORT, eval=False, eval_rows="ends")
    stages: list[str] = []
    folder = trainer(config, listen=lambda event: stages.append(event.stage)).train().folder
    assert not [stage for stage in stages if "evaluating" in stage]
    assert not list(folder.glob("evaluation.json*"))
    read = read_run(folder)
    assert read.left_out and not read.missing
    page = (folder / "report.html").read_text()
    assert "This run was not evaluated" in page and "How it learned" in page
    assert "not complete" not in page
    assert "It was not evaluated" in card(folder) and "guidance=1.5" in card(folder)
    found = Evaluator([str(folder)], reward=even_words).evaluate()
    table = [row["name"] for row in found.table["rows"]]
    assert any("best token" in name for name in table)
    with pytest.raises(UsageError, match=r"the run's reward was tiny_runs:even_words, .* hand it over"):
        Evaluator([str(folder)])
    whole = trainer(dataclasses.replace(config, output=str(tmp_path / "whole"), eval=True)).train().folder
    assert timeless(whole / "metrics.jsonl") == timeless(folder / "metrics.jsonl")
