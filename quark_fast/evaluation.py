"""Before and after: held-out prompts, the same prefix, scorer and sampling on both sides."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from quark_fast.batch import completion_logits, make_batch
from quark_fast.config import Config, UsageError
from quark_fast.journal import Kept
from quark_fast.machine import by_parts
from quark_fast.metrics import (
    RankCorrelation,
    Sample,
    as_json,
    compare,
    evaluate_samples,
    rank_correlation,
)
from quark_fast.ops.loss import quark_loss
from quark_fast.policy import Policy
from quark_fast.prompts import Row
from quark_fast.reward import Reward
from quark_fast.rollout import Conditioning, Sampler, Sampling, kept_or_drawn, sample
from quark_fast.seeds import seed_for
from quark_fast.tasks import Task, no_measures

Nll = Callable[[Sequence[int], Sequence[list[int]], Sequence[str]], list[tuple[float, int]]]
"""(index of each completion's prompt, completions as ids, as texts) -> (-log p in nats, tokens) of each."""


@dataclass(frozen=True)
class Mode:
    """One row of the table: a name, whose logits, and what stands before the prompt."""

    name: str
    conditioning: Conditioning
    untouched: bool = False

    @property
    def guidance(self) -> float | None:
        """Place on the curve over w: the worst token is 0, the best 1; None is off the curve."""
        if self.conditioning.quantile is None:
            return None
        if self.conditioning.against is not None:
            return self.conditioning.guidance
        return {"worst token": 0.0, "best token": 1.0}.get(self.name)

    @property
    def quantile(self) -> int | None:
        """Place on the curve over quantiles; None where two tokens are mixed, or none is there."""
        return self.conditioning.quantile if self.conditioning.against is None else None

    @property
    def places(self) -> dict[str, float | None]:
        """Both, by name."""
        return {"guidance": self.guidance, "quantile": self.quantile}


def modes(quantiles: int, guidance: Sequence[float], every_quantile: bool = True) -> list[Mode]:
    """Untouched, best, guided by each w, the quantiles between, worst, no token.

    A single quantile's token is the best one.

    Args:
        every_quantile: False leaves out those between the best and the worst.
    """
    best = quantiles - 1
    guided = [Mode(f"guided w={w:g}", Conditioning(best, 0, w)) for w in guidance if w != 1.0]
    between = [Mode(f"quantile {k}", Conditioning(k)) for k in range(best - 1, 0, -1) if every_quantile]
    against = [*guided, *between, Mode("worst token", Conditioning(0))] if best else []
    return [
        Mode("untouched", Conditioning(), untouched=True),
        Mode("best token", Conditioning(best)),
        *against,
        Mode("no token", Conditioning()),
    ]


@dataclass(frozen=True)
class HeldOut:
    """Prompts to evaluate on: rows (for the reward), token ids, and completions wanted of each.

    ``texts``, where there are any, are the ids of each prompt's held-out text, the prompt its beginning.
    """

    rows: Sequence[Row]
    ids: Sequence[Sequence[int]]
    samples: int
    texts: Sequence[Sequence[int]] = ()


def evaluation_sampling(config: Config) -> Sampling:
    """How completions are drawn in an evaluation."""
    return Sampling(
        config.max_new_tokens,
        config.min_new_tokens,
        config.eval_temperature,
        config.eval_top_p,
        config.sample_batch,
    )


def generation_settings(sampling: Sampling) -> dict[str, Any]:
    """How completions were drawn, as transformers' generation config spells it."""
    if sampling.temperature == 0:
        return {"do_sample": False, "min_new_tokens": sampling.min_new_tokens or None}
    return {
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": 0,  # off; left out it is 50
        "min_new_tokens": sampling.min_new_tokens or None,
    }


def evaluate(
    policy: Policy,
    model: Any,
    reference: Any,
    reward: Reward,
    held_out: HeldOut,
    table: Sequence[Mode],
    sampling: Sampling,
    seed: int,
    measures: Callable[[Row, Sequence[int], float], dict[str, float]] = no_measures,
    sampler: Sampler = sample,
    nll: Nll | None = None,
    share: tuple[int, int] = (0, 1),
    kept: Callable[[Mode], Kept[list[Sample]]] = lambda _: Kept(),
) -> Iterator[tuple[str, list[Sample]]]:
    """Sample, score and measure every mode, a batch of prompts at a time.

    All modes share one seed: the same luck on both sides of every comparison.

    Args:
        model: the policy's frozen copy.
        reference: the untouched model, which samples for the mode "untouched".
        measures: the task's own, as ``Task.measures``.
        sampler: samples the untouched model, as ``rollout.sample`` does.
        nll: what the perplexity is computed from; default: ``id_nll`` under the reference.
        share: which of the batches, as of ``sample``.
        kept: the batches of a mode that were made before, and where more are kept.
    Yields:
        (name of the mode, its samples on the next few prompts).
    """
    nll = nll or id_nll(policy, reference, held_out.ids)
    for mode in table:
        source = reference if mode.untouched else model

        def measured(
            indices: list[int], drawn: list[list[list[int]]], mode: Mode = mode, source: Any = source
        ) -> list[Sample]:
            flat = [(i, completion) for i, group in zip(indices, drawn, strict=True) for completion in group]
            part = _measure(policy, reward, held_out, flat, measures, nll)
            if held_out.texts:
                fits = text_fit(policy, source, [held_out.texts[i] for i in indices], mode.conditioning)
                of_prompt = dict(zip(indices, fits, strict=True))
                part = [_with_fit(one, *of_prompt[one.prompt_id]) for one in part]
            return part

        for part in kept_or_drawn(
            functools.partial(sampler if mode.untouched else sample, policy, source),
            held_out.ids,
            mode.conditioning,
            sampling,
            held_out.samples,
            seed_for(seed, "evaluation"),
            share,
            kept(mode),
            measured,
        ):
            yield mode.name, part


def first_completions(
    policy: Policy, model: Any, prompts: HeldOut, sampling: Sampling, seed: int
) -> Iterator[tuple[list[Row], list[str]]]:
    """What a reward is tried out on: (rows of prompts, a completion of each), of 4 and then of 60 prompts."""
    for number, some in enumerate((slice(0, 4), slice(4, 64))):
        rows, own_seed = prompts.rows[some], seed_for(seed, "check of the reward", number)
        some_ids = prompts.ids[some]
        for indices, drawn in sample(policy, model, some_ids, Conditioning(), sampling, 1, own_seed):
            yield (
                [rows[i] for i in indices],
                [policy.decode(one, some_ids[i]) for i, (one,) in zip(indices, drawn, strict=True)],
            )


def _measure(
    policy: Policy,
    reward: Reward,
    held_out: HeldOut,
    completions: Sequence[tuple[int, list[int]]],
    measures: Callable[[Row, Sequence[int], float], dict[str, float]],
    nll: Nll,
) -> list[Sample]:
    """Score and perplexity of completions, each with the index of its prompt."""
    texts = [policy.decode(completion, held_out.ids[i]) for i, completion in completions]
    rewards = reward([held_out.rows[i] for i, _ in completions], texts)
    fluency = nll([i for i, _ in completions], [completion for _, completion in completions], texts)
    return [
        Sample(
            prompt_id=i,
            prompt=held_out.rows[i]["prompt"],
            completion=text,
            score=None if np.isnan(value) else score(reward, float(value)),
            nll=total,
            tokens=tokens,
            measures={} if np.isnan(value) else measures(held_out.rows[i], completion, float(value)),
        )
        for (i, completion), text, value, (total, tokens) in zip(
            completions, texts, rewards, fluency, strict=True
        )
    ]


def score(reward: Reward, value: float) -> float:
    """What the tables show: the property (1 - reward) where the reward measures one, else the reward."""
    return value if reward.property is None else 1.0 - value


def id_nll(policy: Policy, model: Any, prompts: Sequence[Sequence[int]]) -> Nll:
    """Of the sampled ids under ``model``, which has the policy's vocabulary; prefix and prompt in front."""

    def measure(
        indices: Sequence[int], completions: Sequence[list[int]], texts: Sequence[str]
    ) -> list[tuple[float, int]]:
        nll = completion_nll(policy, model, [prompts[i] for i in indices], completions)
        return [(total, len(ids)) for total, ids in zip(nll, completions, strict=True)]

    return measure


def text_nll(policy: Policy, model: Any, prompts: Sequence[str], max_tokens: int) -> Nll:
    """Of the text under ``model``, by the policy's tokenizer, whoever wrote it.

    Prompt and completion are tokenised together, since what a tokenizer makes of a word depends on what
    stands before it. A token that holds any of the completion counts to it; in front are the prefix and the
    last ``max_tokens`` tokens of the prompt, fewer where the model has no more positions.

    Raises (what is returned):
        UsageError: a completion is longer than the model has positions.
    """
    limit = policy.positions

    def split(prompt: str, text: str) -> tuple[list[int], list[int]]:
        made = policy.text_tokenizer(prompt + text, add_special_tokens=False, return_offsets_mapping=True)
        ids, ends = made.input_ids, [end for _, end in made.offset_mapping]
        first = next((place for place, end in enumerate(ends) if end > len(prompt)), len(ids))
        if not policy.prefix:
            first = max(first, 1)  # something must stand in front of the first token that counts
        completion = ids[first:]
        room = max_tokens if limit is None else min(max_tokens, limit - len(policy.prefix) - len(completion))
        if room < (0 if policy.prefix else 1):
            raise UsageError(
                f"a completion of {len(completion)} tokens is longer than the {limit} positions of the model"
                " that measures the perplexity; lower max_new_tokens, or name another by --ppl-model"
            )
        return ids[max(0, first - room) : first], completion

    def measure(
        indices: Sequence[int], completions: Sequence[list[int]], texts: Sequence[str]
    ) -> list[tuple[float, int]]:
        pairs = [split(prompts[i], text) for i, text in zip(indices, texts, strict=True)]
        kept = [pair for pair in pairs if pair[1]]  # a completion may be nothing but its end
        nll = iter(completion_nll(policy, model, [front for front, _ in kept], [ids for _, ids in kept]))
        return [(next(nll), len(ids)) if ids else (0.0, 0) for _, ids in pairs]

    return measure


@torch.inference_mode()
def completion_nll(
    policy: Policy,
    model: Any,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    quantile: int | None = None,
) -> list[float]:
    """-log p of each completion under ``model``, nats, given the quantile's token (None: no token)."""
    if not completions:
        return []
    rows = max(1, 1280 // max(map(len, completions)))  # the logits of so many tokens are held at once

    def nll(part: slice) -> list[float]:
        quantiles = [quantile] * len(prompts[part])
        batch = make_batch(policy, prompts[part], completions[part], quantiles, model.device)
        out = quark_loss(
            completion_logits(model, batch),
            None,
            batch.labels,
            batch.mask,
            kl_coef=0.0,
            entropy_coef=0.0,
            vocab_size=policy.vocabulary,
        )
        return out.nll.sum(-1).tolist()

    return [total for part in by_parts(len(prompts), rows, nll) for total in part]


@torch.inference_mode()
def completion_kl(
    policy: Policy,
    model: Any,
    reference: Any,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    quantile: int,
) -> float:
    """KL(model given the quantile's token || reference without), nats, mean over all completions' tokens.

    Exact over the base vocabulary at every token. NaN without completions.
    """
    rows = max(1, 640 // max(map(len, completions), default=1))  # two models' logits are held at once

    def kl(part: slice) -> tuple[float, int]:
        conditioned, plain = (
            make_batch(policy, prompts[part], completions[part], [k] * len(prompts[part]), model.device)
            for k in (quantile, None)
        )
        out = quark_loss(
            completion_logits(model, conditioned),
            completion_logits(reference, plain),
            conditioned.labels,
            conditioned.mask,
            kl_coef=1.0,
            entropy_coef=0.0,
            vocab_size=policy.vocabulary,
        )
        return float(out.kl.sum()), int(conditioned.mask.sum())

    every = list(by_parts(len(prompts), rows, kl))
    tokens = sum(count for _, count in every)
    return sum(total for total, _ in every) / tokens if tokens else float("nan")


def _with_fit(one: Sample, nll: float, correct: int, tokens: int) -> Sample:
    return dataclasses.replace(one, text_nll=nll, text_correct=correct, text_tokens=tokens)


@torch.inference_mode()
def text_fit(
    policy: Policy, model: Any, texts: Sequence[Sequence[int]], conditioning: Conditioning, rows: int = 8
) -> list[tuple[float, int, int]]:
    """How ``model`` predicts texts: (nll in nats, tokens predicted right, tokens) of each.

    Every token but the first, which some models have nothing to predict from, given the conditioning and all
    tokens before it; guided conditioning mixes its two streams as sampling does.
    """

    def fit(rows: slice) -> list[tuple[float, int, int]]:
        part = texts[rows]
        first, rest = [text[:1] for text in part], [text[1:] for text in part]
        logp: torch.Tensor | None = None
        for quantile, weight in conditioning.streams():
            batch = make_batch(policy, first, rest, [quantile] * len(part), model.device)
            stream = completion_logits(model, batch)[..., : policy.vocabulary].float().log_softmax(-1)
            logp = stream * weight if logp is None else logp + stream * weight
        assert logp is not None  # there is always a stream
        logp = logp.log_softmax(-1)
        nll = -logp.gather(-1, batch.labels.unsqueeze(-1)).squeeze(-1).masked_fill(~batch.mask, 0).sum(-1)
        correct = ((logp.argmax(-1) == batch.labels) & batch.mask).sum(-1)
        return list(zip(nll.tolist(), correct.tolist(), batch.mask.sum(-1).tolist(), strict=True))

    return [one for part in by_parts(len(texts), rows, fit) for one in part]


CLASS_SAMPLES = 25


def prompt_class(positive: float) -> str:
    """The class of a prompt by its share of positive completions: negative, neutral or positive."""
    # The paper's 0, 12 or 13, and 25 of 25 fall into the middle of these. VADER's shares lie closer together.
    return "negative" if positive <= 0.4 else "positive" if positive >= 0.6 else "neutral"


def classify_prompts(
    policy: Policy,
    reference: Any,
    reward: Reward,
    held_out: HeldOut,
    sampling: Sampling,
    seed: int,
    target: str,
    sampler: Sampler = sample,
    share: tuple[int, int] = (0, 1),
    kept: Kept[list[tuple[int, str]]] | None = None,
) -> Iterator[tuple[int, str]]:
    """Sort prompts as the paper does, by how many of 25 completions of the untouched model are positive.

    The paper keeps the prompts with 0, 12 or 13, and 25 of them (Liu et al., "DExperts", 2021); here each
    prompt has a class, see ``prompt_class``, and a completion that the reward puts at exactly 0.5 counts
    half. The samples are not those of the evaluation, whose untouched row would else owe its numbers to the
    choice. A row with a ``num_positive``, DExperts' own count, is believed.

    Args:
        sampling: as in the evaluation; if that is greedy, at temperature 1.
        target: "positive" or "negative", the sentiment whose reward it is.
        share: which of the batches, as of ``sample``.
    Yields:
        (index of the prompt, its class), by ``num_positive`` first.
    """
    sampling = dataclasses.replace(sampling, temperature=sampling.temperature or 1.0)
    counted = {i: float(row["num_positive"]) for i, row in enumerate(held_out.rows) if "num_positive" in row}
    for i, number in counted.items():
        yield i, prompt_class(number / CLASS_SAMPLES)
    open_ids = [i for i in range(len(held_out.ids)) if i not in counted]
    prompts = [held_out.ids[i] for i in open_ids]

    def classes(places: list[int], drawn: list[list[list[int]]]) -> list[tuple[int, str]]:
        found = []
        for place, completions in zip(places, drawn, strict=True):
            row = held_out.rows[open_ids[place]]
            texts = [policy.decode(one, prompts[place]) for one in completions]
            rewards = reward([row] * len(completions), texts)
            having = np.where(rewards == 0.5, 0.5, rewards > 0.5)[~np.isnan(rewards)]
            positive = float(having.mean()) if len(having) else 0.5
            found.append((open_ids[place], prompt_class(positive if target == "positive" else 1 - positive)))
        return found

    for batch in kept_or_drawn(
        functools.partial(sampler, policy, reference),
        prompts,
        Conditioning(),
        sampling,
        CLASS_SAMPLES,
        seed_for(seed, "prompt classes"),
        share,
        kept or Kept(),
        classes,
    ):
        yield from batch


# (prompt, completion, reward) of each completion of a batch.
Drawn = list[tuple[Sequence[int], Sequence[int], float]]


PROBE_TOKENS = 8192  # a look after each round, not a second evaluation


@dataclass(frozen=True)
class Probe:
    """What the policy has learned, without sampling it.

    The rank correlation, over scored completions of held-out prompts by the untouched model, between the
    reward and log p(y | best token) - log p(y | worst token). 0: the tokens mean nothing yet.
    """

    prompts: Sequence[Sequence[int]]
    completions: Sequence[Sequence[int]]
    rewards: Sequence[float]

    @staticmethod
    def draw(
        policy: Policy,
        reference: Any,
        reward: Reward,
        held_out: HeldOut,
        sampling: Sampling,
        seed: int,
        sampler: Sampler = sample,
        share: tuple[int, int] = (0, 1),
        kept: Kept[Drawn] | None = None,
    ) -> list[tuple[str, Drawn]]:
        """("probe", batch) for one completion of each of the first held-out prompts that is scored.

        So many prompts that their completions hold ``PROBE_TOKENS`` tokens at most, but 32 at least.

        Args:
            share: which of the batches, as of ``sample``.
        """
        ids = held_out.ids[: max(32, PROBE_TOKENS // sampling.max_new_tokens)]

        def scored(indices: list[int], drawn: list[list[list[int]]]) -> Drawn:
            texts = [policy.decode(one, held_out.ids[i]) for i, (one,) in zip(indices, drawn, strict=True)]
            rewards = reward([held_out.rows[i] for i in indices], texts)
            return [
                (list(held_out.ids[i]), completion, float(value))
                for i, (completion,), value in zip(indices, drawn, rewards, strict=True)
                if not np.isnan(value)
            ]

        draw = functools.partial(sampler, policy, reference)
        own_seed = seed_for(seed, "probe")
        every = kept_or_drawn(draw, ids, Conditioning(), sampling, 1, own_seed, share, kept or Kept(), scored)
        return [("probe", batch) for batch in every]

    @classmethod
    def of(cls, drawn: Iterable[Drawn]) -> Probe:
        """A probe of what was drawn."""
        every = [one for batch in drawn for one in batch]
        return cls([p for p, _, _ in every], [c for _, c, _ in every], [r for _, _, r in every])

    def measure(self, policy: Policy, model: Any) -> RankCorrelation:
        """The rank correlation under the policy's frozen copy ``model``."""
        best, worst = (
            completion_nll(policy, model, self.prompts, self.completions, quantile)
            for quantile in (policy.quantiles - 1, 0)
        )
        return rank_correlation(np.subtract(worst, best), self.rewards)

    def kl(self, policy: Policy, model: Any, reference: Any) -> float:
        """Exact KL(policy under the best token || reference), nats, mean over the completions' tokens.

        The contexts are the untouched model's texts, the same for every policy: two of them compare without
        the luck of what each happens to write.
        """
        best = policy.quantiles - 1
        return completion_kl(policy, model, reference, self.prompts, self.completions, best)


def describe_evaluation(
    task: Task,
    target: str,
    reward: Reward,
    policy: Policy,
    sampling: Sampling,
    held_out: HeldOut,
    seed: int,
    guidance: Sequence[float],
    perplexity: Mapping[str, str],
    dtypes: Iterable[torch.dtype],
) -> dict[str, Any]:
    """What makes two tables comparable: task, scorer, prompts, sampling; and which metrics its tables show.

    Args:
        guidance: values of w for the guided rows; the first is the one that the table is about.
        perplexity: the model that measures it, and whether on the sampled tokens or on re-tokenised text.
        dtypes: what the models compute in; told, not compared.
    """
    return {
        "task": task.name,
        "target": target,
        "headline": task.headline,
        "columns": list(task.columns),
        "more_columns": list(task.more_columns),
        "property": reward.property or "reward",
        "scorer": {"name": reward.name, "version": reward.version, "sha256": reward.sha256},
        "perplexity": dict(perplexity),
        "prompts": len(held_out.rows),
        "prompts_sha256": _sha256([[row["prompt"] for row in held_out.rows], held_out.texts]),
        "classes_sha256": classes_sha256(task, held_out.rows),
        "samples_per_prompt": held_out.samples,
        "sampling": {
            "top_p": sampling.top_p,
            "temperature": sampling.temperature,
            "max_new_tokens": sampling.max_new_tokens,
            "min_new_tokens": sampling.min_new_tokens,
            "prefix": policy.tokenizer.decode(policy.prefix),
            "seed": seed,
            "guidance": next(iter(guidance), None),
            "dtype": " and ".join(sorted({str(dtype).removeprefix("torch.") for dtype in dtypes})),
        },
    }


def classes_sha256(task: Task, rows: Sequence[Row]) -> str | None:
    """Of the prompts' classes; None where the task has none, or a row none yet."""
    classes = [row.get("prompt_class") for row in rows]
    return _sha256(classes) if task.prompt_classes and None not in classes else None


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def summarise(
    samples: dict[str, list[Sample]], table: Sequence[Mode], about: dict[str, Any]
) -> dict[str, Any]:
    """``evaluation.json``: per mode its metrics, and the change against the first mode."""
    before = samples[table[0].name]
    rows = [summary(mode.name, samples[mode.name], before, mode.places) for mode in table]
    return {**about, "rows": rows}


def summary(name: str, after: list[Sample], before: list[Sample], more: Mapping[str, Any]) -> dict[str, Any]:
    """One row of a table: its metrics, and the change against ``before``; none where that is the row."""
    change = None if after is before else compare(before, after)
    return {
        "name": name,
        **more,
        "metrics": {k: as_json(v) for k, v in evaluate_samples(after).items()},
        "change": None if change is None else {k: as_json(v) for k, v in change.items()},
    }
