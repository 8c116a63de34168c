"""Fit the embedded judges to published scores, and measure how well they and the scorers agree with them.

    python benchmarks/fit_judge.py toxicity prompts.jsonl
    python benchmarks/fit_judge.py sentiment vaderSentiment-3.3.2.tar.gz

toxicity: RealToxicityPrompts (Gehman et al. 2020) as published, or records of the fields prompt,
prompt_toxicity, continuation and continuation_toxicity: what Perspective's API scored. sentiment: the source
distribution of vaderSentiment, which holds the ratings that VADER was made and tested by (Hutto and Gilbert
2014): sentences of tweets, film and product reviews and newspaper editorials, each rated by 20 people from -4
to 4.

A judge is ridge regression on the log odds of the score, over the mean hidden state of a text. Its agreement
is that of five folds, each judged by weights fitted to the other four; the weights kept are those of all. It
writes quark_fast/rewards/judges/NAME.safetensors and docs/results/judge-NAME.json.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import tarfile
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file

from quark_fast.files.atomic import sha256
from quark_fast.metrics import rank_correlation
from quark_fast.rewards.judge import FOLDER, Embedder
from quark_fast.tasks.by_name import find_task

Array = npt.NDArray[np.float64]

# More agree better, up to 9 (rank correlation .797 for .788) and 12; but a run's evaluation waits for them.
LAYERS = {"toxicity": 6, "sentiment": 12}
RIDGE = 3000.0  # for features of unit variance
FOLDS = 5
# Named without a judgement: what a scorer makes of the word alone.
TERMS = (
    "tall",
    "a teacher",
    "a woman",
    "a man",
    "white",
    "black",
    "gay",
    "Christian",
    "Muslim",
    "Jewish",
    "blind",
)


class Published(NamedTuple):
    """A text with its published score in [0, 1]; ``group`` is what it must share its fold with."""

    text: str
    score: float
    group: str
    kind: str


def toxicity_scores(path: Path) -> list[Published]:
    """Prompts and continuations; both of one record are a group. A score that is missing is left out."""
    opened = gzip.open if path.suffix == ".gz" else open
    found = []
    with opened(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file):
            record = json.loads(line)
            for name in ("continuation", "prompt"):
                part = record[name]
                text, score = (
                    (part["text"], part["toxicity"])
                    if isinstance(part, dict)
                    else (part, record[f"{name}_toxicity"])
                )
                if score is not None:
                    found.append(Published(text, score, str(number), f"{name}s"))
    return found


def sentiment_scores(path: Path) -> list[Published]:
    """Sentences, their ratings put on [0, 1]; those of one review are a group."""
    found = []
    with tarfile.open(path) as outer:
        inner = outer.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
        assert inner is not None
        with tarfile.open(fileobj=BytesIO(inner.read())) as files:
            for name in ("movieReview", "amazonReview", "nytEditorial", "tweets"):
                stem = name if name == "tweets" else f"{name}Snippets"
                member = files.extractfile(f"hutto_ICWSM_2014/{stem}_GroundTruth.txt")
                assert member is not None
                for line in member.read().decode("utf-8", "replace").splitlines():
                    number, rating, text = line.split("\t", 2)
                    group = f"{name} {number.partition('_')[0]}"
                    found.append(Published(text, (float(rating) + 4) / 8, group, name))
    return found


READERS: dict[str, Callable[[Path], list[Published]]] = {
    "toxicity": toxicity_scores,
    "sentiment": sentiment_scores,
}


def log_odds(scores: Array) -> Array:
    kept = np.clip(scores, 0.01, 0.99)
    return np.log(kept / (1 - kept))


def ridge(features: Array, target: Array) -> tuple[Array, float]:
    """(weights, bias) of features as they are; the penalty is on those of unit variance."""
    mean, scale = features.mean(0), features.std(0) + 1e-6
    unit, middle = (features - mean) / scale, target.mean()
    gram = unit.T @ unit + RIDGE * np.eye(unit.shape[1])
    weights = np.linalg.solve(gram, unit.T @ (target - middle)) / scale
    return weights, float(middle - mean @ weights)


def folds(texts: Sequence[Published]) -> npt.NDArray[np.int64]:
    names = sorted({one.group for one in texts})
    fold = dict(zip(names, np.random.default_rng(0).permutation(len(names)) % FOLDS, strict=True))
    return np.array([fold[one.group] for one in texts])


def area(scores: Array, positive: npt.NDArray[np.bool_]) -> float:
    """Under the receiver's curve: how often a positive text scores above a negative one, ties by half."""
    order = np.sort(scores[~positive])
    below = np.searchsorted(order, scores[positive], "left") + np.searchsorted(
        order, scores[positive], "right"
    )
    return float(below.mean() / 2 / len(order))


def agreement(found: Array, published: Array) -> dict[str, float]:
    known = np.isfinite(found)
    found, published = found[known], published[known]
    return {
        "texts": len(found),
        "rank correlation": round(rank_correlation(found, published).value, 3),
        "AUROC at .5": round(area(found, published >= 0.5), 3),
        "mean": round(float(found.mean()), 3),
        "mean published": round(float(published.mean()), 3),
    }


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("judge", choices=READERS)
    asked.add_argument("scores", type=Path)
    given = asked.parse_args()
    name, layers = given.judge, LAYERS[given.judge]
    published = READERS[name](given.scores)
    embed, target = Embedder(layers), log_odds(np.array([one.score for one in published]))
    features = embed([one.text for one in published]).double().numpy()
    fold = folds(published)
    judged = np.zeros(len(published))
    for number in range(FOLDS):
        weights, bias = ridge(features[fold != number], target[fold != number])
        judged[fold == number] = features[fold == number] @ weights + bias
    judged = 1 / (1 + np.exp(-judged))
    weights, bias = ridge(features, target)
    FOLDER.mkdir(exist_ok=True)
    save_file(
        {
            "weights": torch.tensor(weights, dtype=torch.float32),
            "bias": torch.tensor(bias, dtype=torch.float32),
        },
        FOLDER / f"{name}.safetensors",
        {"layers": str(layers)},
    )
    record = about(name, published, judged)
    record |= {"source": given.scores.name, "source sha256": sha256(given.scores), "layers": layers}
    record["weights sha256"] = sha256(FOLDER / f"{name}.safetensors")
    Path("docs/results", f"judge-{name}.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


def about(name: str, published: Sequence[Published], judged: Array) -> dict[str, Any]:
    """How judge and scorer agree with the published scores and each other; what each makes of terms."""
    from quark_fast.rewards.judge import judge

    scorer = find_task(name).reward()
    # Of the property that the published scores measure: toxicity, or positive sentiment.
    rising = name == "sentiment"

    def scored(reward: Any, some: Sequence[str]) -> Array:
        values = reward([{"prompt": ""}] * len(some), list(some))
        return np.asarray(values if rising else 1 - values)

    scores = np.array([one.score for one in published])
    own = scored(scorer, [one.text for one in published])
    kinds = np.array([one.kind for one in published])
    tenths = np.minimum((10 * scores).astype(int), 9)

    def by_kind(found: Array) -> dict[str, dict[str, float]]:
        every = sorted(set(kinds.tolist()))
        return {kind: agreement(found[kinds == kind], scores[kinds == kind]) for kind in every}

    sentences = [f"My neighbour is {term}." for term in TERMS]
    final = judge(name, "", complement=rising)
    return {
        "judge": by_kind(judged),
        "scorer": by_kind(own),
        "mean by tenth of the published score": {
            f"{tenth / 10:g}": {
                "texts": int((tenths == tenth).sum()),
                "judge": round(float(judged[tenths == tenth].mean()), 3),
                "scorer": round(float(np.nanmean(own[tenths == tenth])), 3),
            }
            for tenth in sorted(set(tenths.tolist()))
        },
        "scorer name": scorer.name,
        "rank correlation of judge and scorer": round(
            rank_correlation(judged[np.isfinite(own)], own[np.isfinite(own)]).value, 3
        ),
        "terms": {
            re.sub(r"^My neighbour is |\.$", "", sentence): {"judge": round(a, 3), "scorer": round(b, 3)}
            for sentence, a, b in zip(
                sentences, scored(final, sentences).tolist(), scored(scorer, sentences).tolist(), strict=True
            )
        },
    }


if __name__ == "__main__":
    main()
