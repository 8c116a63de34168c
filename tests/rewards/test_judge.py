"""The judges: what they compute, that they tell texts apart, and how their weights are fitted."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from quark_fast.config import Config
from quark_fast.data import assets
from quark_fast.files.atomic import sha256
from quark_fast.model import sizes
from quark_fast.rewards import judge
from quark_fast.runtime.memory import by_parts
from quark_fast.tasks.by_name import load_reward

TEXTS = ["What a wonderful day, thank you all.", "You stupid bitch, go to hell.", "The train leaves at noon."]


@pytest.mark.parametrize("name", ["toxicity", "sentiment"])
def test_score_is_a_linear_function_of_the_mean_hidden_state(name: str) -> None:
    found = judge.LinearJudge(name)
    folder = assets.default_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    whole = AutoModel.from_pretrained(folder, dtype=torch.float32)
    scores = []
    for text in TEXTS:
        ids = tokenizer("<|endoftext|>" + text, return_tensors="pt").input_ids
        with torch.inference_mode():
            states = whole(input_ids=ids, output_hidden_states=True).hidden_states[found.layers]
        odds = states[0, 1:].mean(0) @ found.weights + found.bias
        scores.append(1 / (1 + math.exp(-odds)))
    assert found(TEXTS) == pytest.approx(scores, abs=1e-4)
    assert found([TEXTS[2], " \n", TEXTS[0]])[::2] == pytest.approx([scores[2], scores[0]], abs=1e-4)
    assert math.isnan(found([" \n"])[0])


def test_long_text_is_read_whole_in_parts() -> None:
    found = judge.LinearJudge("toxicity")
    parts = [" The train leaves at noon." * 21 + " On it", " You stupid bitch, go to hell."]
    ids = [found.embed.tokenizer(part, add_special_tokens=False).input_ids for part in parts]
    assert len(ids[0]) == judge.TOKENS and len(ids[1]) < judge.TOKENS, "a part and a rest"
    states = found.embed(parts)
    counts = torch.tensor([len(one) for one in ids])[:, None]
    mean = (states * counts).sum(0) / counts.sum()
    torch.testing.assert_close(found.embed(["".join(parts), parts[1]]), torch.stack([mean, states[1]]))
    clean, insulted = found([parts[0], "".join(parts)])
    assert insulted > clean + 0.02


def test_texts_that_a_judge_lacks_memory_for_are_read_by_halves(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scorer = load_reward("toxicity-judge", Config(score_batch=4))
    expected = scorer([{"prompt": "w"}] * 6, TEXTS * 2)
    own, asked = judge.Embedder._sums, list[int]()

    def limited(embedder: judge.Embedder, parts: Sequence[Sequence[int]]) -> torch.Tensor:
        asked.append(len(parts))
        if len(parts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return own(embedder, parts)

    monkeypatch.setattr(judge.Embedder, "_sums", limited)
    assert scorer([{"prompt": "w"}] * 6, TEXTS * 2) == pytest.approx(expected, abs=1e-5)
    assert asked == [4, 2, 2, 2], "as --score-batch says, then half of it"
    assert "out of memory: from here on 2 texts side by side" in caplog.text


def test_judge_reads_on_a_gpu_what_free_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    embed = judge.LinearJudge("toxicity").embed
    asked: list[int] = []

    def seen(count: int, size: int, work: Any) -> Any:
        asked.append(size)
        return by_parts(count, size, work)

    monkeypatch.setattr(judge, "by_parts", seen)
    embed(TEXTS)
    shape = sizes.Shape.of(embed.model.config)
    assert shape is not None
    row = sizes.scoring_bytes(shape, 1 + judge.TOKENS, 4)  # float32, though the embeddings are stored in half
    monkeypatch.setattr(sizes, "free_memory", lambda device: int(row * 5 / sizes.SHARE) + 9)
    embed(TEXTS)
    assert asked == [64, 5]


def test_judges_tell_texts_apart_as_their_tasks_mean_it() -> None:
    rows = [{"prompt": "w"}] * len(TEXTS)
    polite, rude, neutral = load_reward("toxicity-judge")(rows, TEXTS)
    assert rude < 0.5 < min(polite, neutral)
    good, bad, _ = load_reward("sentiment-judge")(rows, TEXTS)
    assert bad < 0.5 < good
    assert load_reward("sentiment-judge").property == "negativity"


@pytest.fixture
def fit_judge(from_benchmarks: Callable[[str], ModuleType]) -> ModuleType:
    return from_benchmarks("fit_judge")


def test_ridge_finds_a_plane_whatever_the_scale_of_its_features(fit_judge: ModuleType) -> None:
    generator = np.random.default_rng(0)
    features = generator.normal(2.0, [0.1, 1.0, 30.0], (200_000, 3))
    plane = np.array([5.0, -1.0, 0.02])
    weights, bias = fit_judge.ridge(features, features @ plane + 0.7)
    shrunk = 200_000 / (200_000 + fit_judge.RIDGE)
    assert weights == pytest.approx(plane * shrunk, rel=1e-2)
    assert bias + 2.0 * weights.sum() == pytest.approx(2.0 * plane.sum() + 0.7, rel=1e-2)


def test_area_counts_pairs_and_ties_by_half(fit_judge: ModuleType) -> None:
    scores, positive = np.array([0.1, 0.4, 0.4, 0.9]), np.array([False, False, True, True])
    assert fit_judge.area(scores, positive) == (1 + 0.5 + 1 + 1) / 4


def test_what_was_published_is_read_in_both_forms_and_falls_into_folds_whole(
    fit_judge: ModuleType, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.jsonl"
    nested = {"prompt": {"text": "a", "toxicity": 0.1}, "continuation": {"text": "b", "toxicity": 0.9}}
    flat = {"prompt": "c", "prompt_toxicity": None, "continuation": "d", "continuation_toxicity": 0.3}
    file.write_text(json.dumps(nested) + "\n" + json.dumps(flat) + "\n")
    found = fit_judge.toxicity_scores(file)
    assert found[0] == ("b", 0.9, "0", "continuations") and found[1] == ("a", 0.1, "0", "prompts")
    assert found[2:] == [("d", 0.3, "1", "continuations")]
    numbers = fit_judge.folds([*found, *(found[0]._replace(group=str(i)) for i in range(2, 50))])
    assert numbers[0] == numbers[1] and set(numbers) == set(range(fit_judge.FOLDS))


@pytest.mark.parametrize("name", ["toxicity", "sentiment"])
def test_record_of_the_fit_is_of_the_weights_that_are_there(name: str) -> None:
    record = json.loads((Path(__file__).parents[2] / "docs" / "results" / f"judge-{name}.json").read_text())
    assert record["weights sha256"] == sha256(judge.FOLDER / f"{name}.safetensors")
    for kind, own in record["judge"].items():
        assert own["AUROC at .5"] > 0.75, kind
