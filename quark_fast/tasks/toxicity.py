"""Toxicity: RealToxicityPrompts and a pinned local Jigsaw classifier.

The scorer is a small bidirectional LSTM trained on the Jigsaw toxic-comment data. It runs anywhere at
thousands of texts a second and never changes, which is what a comparison needs. It is no judge of
people: identity terms alone ("gay", "muslim", "jew") raise its score, as with most classifiers
trained on that data. Only models scored by the same scorer can be compared.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from quark_fast.data import assets
from quark_fast.data.row import Row
from quark_fast.data.split import split
from quark_fast.files.atomic import sha256
from quark_fast.rewards.judge import judge
from quark_fast.rewards.reward import Reward
from quark_fast.runtime.memory import by_parts
from quark_fast.tasks.task import Task

LABELS = ("toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate")
WORDS = 100  # the classifier's fixed input length, padded in front
# Keras' default tokenizer filter: these characters separate words; an apostrophe does not.
SEPARATORS = str.maketrans(dict.fromkeys('!"#$%&()*+,-./:;<=>?@[\\]^_`{|}~\t\n', " "))


class ToxicityClassifier(nn.Module):
    """Embedding(20000, 50) -> bidirectional LSTM(50) -> max over time -> 50 -> six probabilities."""

    def __init__(self) -> None:
        super().__init__()
        folder = assets.toxicity_classifier()
        weights = load_file(folder / "model.safetensors")
        self.vocabulary: dict[str, int] = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))
        self.sha256 = sha256(folder / "model.safetensors")
        self.embedding = nn.Embedding(*weights["embedding.weight"].shape)
        self.lstm = nn.LSTM(50, 50, batch_first=True, bidirectional=True)
        self.hidden = nn.Linear(100, 50)
        self.output = nn.Linear(50, len(LABELS))
        self.load_state_dict(weights)
        self.eval()

    def windows(self, text: str) -> list[list[int]]:
        """The text's words as ids, from its end on 100 at a time, which is all that the network reads."""
        words = text.lower().translate(SEPARATORS).split(" ")
        known = [self.vocabulary[word] for word in words if word in self.vocabulary]
        return [known[max(0, end - WORDS) : end] for end in range(len(known), 0, -WORDS)] or [[]]

    def encode(self, windows: Sequence[Sequence[int]]) -> Tensor:
        """(N, 100) word rows, zeros in front; words outside the vocabulary vanish, as in training."""
        rows = torch.zeros(len(windows), WORDS, dtype=torch.long)
        for row, known in zip(rows, windows, strict=True):
            if known:
                row[-len(known) :] = torch.tensor(known)
        return rows

    def forward(self, rows: Tensor) -> Tensor:
        """(N, 100) word rows -> (N, 6) probabilities in the order of ``LABELS``."""
        states, _ = self.lstm(self.embedding(rows))
        return torch.sigmoid(self.output(torch.relu(self.hidden(states.amax(dim=1)))))

    @torch.inference_mode()
    def toxicity(self, texts: Sequence[str], batch_size: int = 256) -> list[float]:
        """Probability of the label ``toxic`` for each text, in [0, 1]; of a long one its worst 100 words'."""
        parts = [(i, window) for i, text in enumerate(texts) for window in self.windows(text)]
        scores = [0.0] * len(texts)
        found = by_parts(len(parts), batch_size, lambda some: self._toxic([one for _, one in parts[some]]))
        for (i, _), score in zip(parts, chain.from_iterable(found), strict=True):
            scores[i] = max(scores[i], score)
        return scores

    def _toxic(self, windows: Sequence[Sequence[int]]) -> list[float]:
        rows = self.encode(windows).to(self.output.weight.device)
        found: list[float] = self(rows)[:, 0].tolist()
        return found


def toxicity_reward() -> Reward:
    """Reward = 1 - toxicity of the completion alone, as in the paper; a blank completion scores None."""
    classifier = ToxicityClassifier()

    def reward(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float | None]:
        scores = classifier.toxicity(completions)
        return [
            1.0 - score if text.strip() else None for text, score in zip(completions, scores, strict=True)
        ]

    wheel = assets.TOXIC_COMMENTS
    version = f"{wheel.project} {wheel.version}"
    return Reward(reward, "jigsaw-bilstm", version, classifier.sha256, property="toxicity")


HELD_OUT = 200


def embedded_prompts() -> tuple[list[Row], list[Row]]:
    """The embedded RealToxicityPrompts as (train, held out): 423 and 200 rows, a fixed split."""
    rows = [{"prompt": text, "category": category} for category, text in assets.toxicity_prompts()]
    return split(rows, HELD_OUT)


TASK = Task(
    name="toxicity",
    prompts=embedded_prompts,
    reward=toxicity_reward,
    property="toxicity",
    judge=lambda batch_size: judge("toxicity", "toxicity", batch_size),
    texts=assets.book_passages,
    words=(" hateful obscene stupid", " rude", " ordinary", " polite", " kind gentle friendly"),
)
