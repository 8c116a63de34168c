"""Held-out prompts: every row of a table answers the same ones, with the same scorer, sampling and seed."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from quark_fast.config import Config
from quark_fast.data.row import Row
from quark_fast.evaluation.judging import begin_judging
from quark_fast.evaluation.perplexity import TEXT_PROMPT, Nll, id_nll, text_fit
from quark_fast.evaluation.table_rows import TableRow
from quark_fast.metrics import Sample
from quark_fast.model.encode import encode_rows
from quark_fast.model.policy import Policy
from quark_fast.rewards.reward import Reward
from quark_fast.rewards.weighted_sum import batches_ahead
from quark_fast.rollout.sampling import (
    Conditioning,
    DrawnBatch,
    Sampler,
    SampleRequest,
    Sampling,
    kept_or_drawn,
)
from quark_fast.rollout.transformers import sample
from quark_fast.runtime.journal import Kept
from quark_fast.runtime.memory import give_back_freed_memory
from quark_fast.runtime.overlap import Begun, in_order, together
from quark_fast.runtime.seeds import Purpose, seed_for
from quark_fast.tasks.task import no_measures

T = TypeVar("T")
L = TypeVar("L")
Unscored = tuple[int, list[int], str]
Completion = tuple[int, list[int], str, float]
"""(index of its prompt, token ids, text, reward; NaN where the scorer gave none)."""


@dataclass(frozen=True)
class EncodedPrompts:
    """Rows of prompts with their token ids, and how many completions each gets.

    Attributes:
        rows: for the reward. ids: what the model reads.
        samples: completions of each prompt, where it is evaluated on.
        texts: where there are any, the ids of each prompt's held-out text, which begins with the prompt.
        classified: the rows' ``prompt_class`` is ours, no column of the user's: a reward need not take it.
        cut: prompts of which the model reads the last tokens alone.
    """

    rows: Sequence[Row]
    ids: Sequence[Sequence[int]]
    samples: int
    texts: Sequence[Sequence[int]] = ()
    classified: bool = False
    cut: int = 0

    def for_reward(self, index: int) -> Row:
        """A prompt's row with the columns that the user gave."""
        row = self.rows[index]
        return {k: v for k, v in row.items() if k != "prompt_class"} if self.classified else row

    def with_classes(self, rows: Sequence[Row]) -> EncodedPrompts:
        """The same with rows that have classes; a column of the user's that lacked some stays the user's."""
        ours = self.classified or "prompt_class" not in self.rows[0]
        return dataclasses.replace(self, rows=rows, classified=ours)

    @classmethod
    def encoded(cls, policy: Policy, rows: Sequence[Row], config: Config, **options: Any) -> EncodedPrompts:
        """Rows as the policy's token ids; ``options`` are those of ``encode_rows``."""
        most, cut = policy.room_of(config), config.long_prompts == "cut"
        found = encode_rows(policy, rows, most, config.prefix_tokens, cut=cut, **options)
        return cls(found.rows, found.ids, config.eval_samples, found.texts, cut=found.cut)


@dataclass(frozen=True)
class EvaluationSetup:
    """Whose completions of which prompts are sampled, and what scores them.

    Attributes:
        reference: the base model; None where nothing samples it.
        judges: further scorers, which take no part in training.
        controls: ordinary texts as ids, one for each of the first prompts, if these have none of their own.
        prompt_fit: also measure how completions fit their prompts.
        sampler: samples the base model, as ``rollout.transformers.sample`` does.
        shard: which of the batches this process makes, as of ``SampleRequest``.
        read_rows: texts whose probabilities are read side by side; 0: see ``perplexity.completion_nll``.
        own_nll: also measure how likely each completion was to be drawn, which splits the perplexity of the
            drawn tokens in two; False where the perplexity is of other tokens.
    """

    policy: Policy
    reference: Any
    reward: Reward
    held_out: EncodedPrompts
    sampling: Sampling
    seed: int
    sampler: Sampler = sample
    shard: tuple[int, int] = (0, 1)
    judges: Sequence[Reward] = ()
    controls: Sequence[Sequence[int]] = ()
    prompt_fit: bool = False
    read_rows: int = 0
    own_nll: bool = True

    def draw(
        self,
        purpose: Purpose,
        model: Any,
        conditioning: Conditioning,
        make: Callable[[DrawnBatch], Begun[T]],
        kept: Kept[T] | None = None,
        own_nll: bool = False,
        model_nll: bool = False,
    ) -> Iterator[Begun[T]]:
        """What ``make`` begins of each batch.

        Args:
            purpose: each has a seed of its own.
            kept: the batches that were made before, and where more are kept.
            own_nll, model_nll: as of ``SampleRequest``.
        """
        return kept_or_drawn(
            functools.partial(self.sampler if model is self.reference else sample, self.policy, model),
            SampleRequest(
                self.held_out.ids,
                conditioning,
                self.sampling,
                self.held_out.samples,
                seed_for(self.seed, purpose),
                self.shard,
                own_nll,
                model_nll,
            ),
            kept or Kept(),
            make,
        )

    def in_order(
        self, batches: Iterable[tuple[L, Begun[T]]], waiting: Callable[[L], None] = lambda _: None
    ) -> Iterator[tuple[L, T]]:
        """(label, what became of it) of each batch that ``draw`` began; slow scorers answer meanwhile."""
        scorers = (self.reward, *self.judges)
        return in_order(batches, batches_ahead(scorers, self.sampling.rows), waiting)

    def text_fits(
        self, model: Any, indices: Sequence[int], conditioning: Conditioning
    ) -> dict[int, tuple[float, int, int]]:
        """``text_fit`` of the text that stands beside each of these prompts; zeros where none does."""
        texts = self.held_out.texts or self.controls
        own = [i for i in indices if i < len(texts)]
        found = (
            text_fit(self.policy, model, [texts[i] for i in own], conditioning, self.read_rows) if own else []
        )
        return dict.fromkeys(indices, (0.0, 0, 0)) | dict(zip(own, found, strict=True))

    def with_texts(self, drawn: DrawnBatch) -> list[Unscored]:
        """Every completion of a batch with its text."""
        return [(i, ids, self.policy.decode(ids, self.held_out.ids[i])) for i, ids in drawn.each()]

    def scored(self, completions: Sequence[Unscored]) -> Begun[list[Completion]]:
        """The completions with their rewards."""
        rows, texts = self._for_reward(completions)
        return self.reward.begin(rows, texts).then(
            lambda rewards: [(*one, float(value)) for one, value in zip(completions, rewards, strict=True)]
        )

    def judged(self, completions: Sequence[Unscored]) -> Begun[list[dict[str, float]]]:
        """What the judges make of each."""
        return begin_judging(self.judges, *self._for_reward(completions))

    def _for_reward(self, completions: Sequence[Unscored]) -> tuple[list[Row], list[str]]:
        return [self.held_out.for_reward(i) for i, _, _ in completions], [text for _, _, text in completions]


CONTROLS = 128  # texts; those of the embedded novels have 53 tokens on average
CONTROL_TOKENS = 64  # of each, that count


def control_texts(policy: Policy, texts: Sequence[str]) -> list[list[int]]:
    """The first tokens of the first texts, as ids; as many as the model has positions for after a token."""
    most = TEXT_PROMPT + CONTROL_TOKENS
    room = most if policy.positions is None else policy.positions - len(policy.prefix) - 1
    every = (policy.text_tokenizer(text, add_special_tokens=False).input_ids for text in texts[:CONTROLS])
    return [list(ids[: min(most, room)]) for ids in every if len(ids) > 1 and room > 1]


def evaluation_sampling(config: Config) -> Sampling:
    """How completions are drawn in an evaluation."""
    return Sampling(
        config.max_new_tokens,
        config.min_new_tokens,
        config.eval_temperature,
        config.eval_top_p,
        config.sample_batch,
        min(config.sample_at_once, config.sample_batch),
    )


def generation_settings(sampling: Sampling) -> dict[str, Any]:
    """How completions were drawn, as transformers' generation config spells it."""
    # top_k 0 is off; left out it is 50.
    drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    how = {"do_sample": True, **drawn} if sampling.temperature else {"do_sample": False}
    return how | {"min_new_tokens": sampling.min_new_tokens or None}


def evaluate(
    setup: EvaluationSetup,
    model: Any,
    table: Sequence[TableRow],
    measures: Callable[[Row, Sequence[int], float], dict[str, float]] = no_measures,
    nll: Nll | None = None,
    kept: Callable[[TableRow], Kept[list[Sample]]] = lambda _: Kept(),
    waiting: Callable[[str], None] = lambda _: None,
) -> Iterator[tuple[str, list[Sample]]]:
    """Sample, score and measure every row of the table, a batch of prompts at a time.

    All rows share one seed: the same luck on both sides of every comparison.

    Args:
        model: the policy's frozen copy.
        measures: the task's own, as ``Task.measures``.
        nll: what the perplexity is computed from; default: ``id_nll`` under the reference, of whose own
            completions the logits that drew them tell it, where the sampler does.
        kept: the batches of a row that were made before, and where more are kept.
        waiting: called now and then with the name of the row whose rewards are waited for.
    Yields:
        (name of the row, its samples on the next few prompts).
    """
    under_reference = nll is None
    nll = nll or id_nll(setup.policy, setup.reference, setup.held_out.ids, setup.read_rows)
    measuring = _Measuring(setup, measures, nll)

    def begun() -> Iterator[tuple[str, Begun[list[Sample]]]]:
        for row in table:
            source = setup.reference if row.base else model
            make = functools.partial(measuring.begin, row, source)
            tell = setup.own_nll, under_reference and row.base
            for part in setup.draw("evaluation", source, row.conditioning, make, kept(row), *tell):
                yield row.name, part

    yield from setup.in_order(begun(), waiting)


@dataclass(frozen=True)
class _Measuring:
    """Scores and measures batches of completions; the attributes are the arguments of ``evaluate``."""

    setup: EvaluationSetup
    measures: Callable[[Row, Sequence[int], float], dict[str, float]]
    nll: Nll

    def begin(self, row: TableRow, source: Any, drawn: DrawnBatch) -> Begun[list[Sample]]:
        """Have a batch of a row, which the model ``source`` drew, scored and judged, then measure it."""
        texts = self.setup.with_texts(drawn)
        scorers: tuple[Callable[..., Begun[Any]], ...] = (self.setup.scored, self.setup.judged)
        found = together(begin(texts) for begin in scorers)
        return found.then(lambda found: self._samples(row, source, drawn, *found))

    def _samples(
        self,
        row: TableRow,
        source: Any,
        drawn: DrawnBatch,
        completions: list[Completion],
        judged: list[dict[str, float]],
    ) -> list[Sample]:
        setup = self.setup
        give_back_freed_memory()  # sampling leaves a cache in pieces, which reading cannot use
        nlls = self._nlls(drawn, completions)
        prompts = [row["prompt"] for row in setup.held_out.rows]
        prompt_fits = fit_to_prompts(self.nll, prompts, completions, nlls) if setup.prompt_fit else {}
        fits = setup.text_fits(source, drawn.indices, row.conditioning)
        own_nll = [None] * len(completions) if drawn.own_nll is None else itertools.chain(*drawn.own_nll)
        samples = []
        for place, (one, nll, own, numbers) in enumerate(
            zip(completions, nlls, own_nll, judged, strict=True)
        ):
            i, completion, text, value = one
            if place in prompt_fits:
                numbers = {**numbers, "prompt_fit": prompt_fits[place]}
            prompt = setup.held_out.rows[i]
            score = None
            if not np.isnan(value):
                score = value if setup.reward.property is None else 1.0 - value
            numbers = self.measures(prompt, completion, value) | numbers
            total, tokens = nll
            samples.append(Sample(i, prompt["prompt"], text, score, total, tokens, numbers, *fits[i], own))
        give_back_freed_memory()
        return samples

    def _nlls(self, drawn: DrawnBatch, completions: Sequence[Completion]) -> list[tuple[float, int]]:
        """(-log p, tokens) of each completion under the model that the perplexity is of."""
        prompts, ids, texts, _ = zip(*completions, strict=True)
        if drawn.model_nll is None:
            return self.nll(prompts, ids, texts)
        return list(zip(itertools.chain(*drawn.model_nll), map(len, ids), strict=True))


def fit_to_prompts(
    nll: Nll, prompts: Sequence[str], completions: Sequence[Completion], own: Sequence[tuple[float, int]]
) -> dict[int, float]:
    """How much likelier the first completion of each prompt is after it than after another prompt.

    (log p(completion | its prompt) - log p(completion | another prompt)) / its tokens, nats. The other prompt
    is the one half of all prompts further on, or the next whose text differs, the same in every row of a
    table. A model that answers every prompt alike has 0.

    Args:
        prompts: the text of each; where all are alike there is no other.
        own: (-log p after its own prompt, tokens) of each completion.
    Returns:
        Of each place in ``completions`` where there is one.
    """
    first: dict[int, int] = {}
    for place, (i, *_) in enumerate(completions):
        first.setdefault(i, place)
    places = [place for place in first.values() if own[place][1]] if len(set(prompts)) > 1 else []
    others, ids, texts = [], [], []
    for place in places:
        i, completion, text, _ = completions[place]
        further = ((i + len(prompts) // 2 + k) % len(prompts) for k in range(len(prompts)))
        others.append(next(j for j in further if prompts[j] != prompts[i]))
        ids.append(completion)
        texts.append(text)
    found = nll(others, ids, texts) if places else []
    return {
        place: (total - own[place][0]) / own[place][1]
        for place, (total, _) in zip(places, found, strict=True)
    }


def first_completions(
    policy: Policy, model: Any, prompts: EncodedPrompts, sampling: Sampling, seed: int
) -> Iterator[tuple[list[Row], list[str]]]:
    """What a reward is tried out on: (rows of prompts, a completion of each), of 4 and then of 60 prompts."""
    for number, some in enumerate((slice(0, 4), slice(4, 64))):
        some_ids, own_seed = prompts.ids[some], seed_for(seed, "check of the reward", number)
        request = SampleRequest(some_ids, Conditioning(), sampling, 1, own_seed)
        for drawn in sample(policy, model, request):
            yield (
                [prompts.for_reward((some.start or 0) + i) for i in drawn.indices],
                [policy.decode(ids, some_ids[i]) for i, ids in drawn.each()],
            )
