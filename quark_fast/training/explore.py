"""Explore: sample completions of the training prompts, score them, add them to the pool."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from quark_fast.rewards.weighted_sum import batches_ahead, waiting_for
from quark_fast.rollout.sampling import (
    Conditioning,
    Draw,
    DrawnBatch,
    Rollout,
    SampleRequest,
    Sampling,
    kept_or_drawn,
)
from quark_fast.runtime.distributed import in_batch_order
from quark_fast.runtime.overlap import Begun, in_order
from quark_fast.runtime.seeds import seed_for
from quark_fast.training.progress import Progress, Texts
from quark_fast.training.scored import Scored
from quark_fast.training.setup import Setup
from quark_fast.training.shared_work import SharedWork
from quark_fast.training.state import State


class Explorer:
    """Samples a round: from the base model first, then guided towards the best token."""

    def __init__(
        self, setup: Setup, rollout: Rollout, work: SharedWork, listen: Callable[[Progress], None]
    ) -> None:
        self.config, self.policy = setup.config, setup.policy
        self.prompts, self.reward = setup.prompts, setup.reward
        self.rollout, self.work, self.listen = rollout, work, listen
        self._drawn_tokens = 0  # of the round, by this process: what was kept before took no time now

    def explore(self, state: State, sampling: Sampling) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Add the round's samples to the pool.

        Returns:
            (rows for completions.jsonl, the round's row for metrics.jsonl).
        """
        started = time.monotonic()
        before, pool = len(state.pool), state.pool
        samples = self.config.explore_samples if state.round else self.config.initial_samples
        found: list[Scored] = []
        for batch in self._found(state, sampling, samples):
            prompts, scores = [one.prompt for one in batch], np.array([one.reward for one in batch])
            pool.add(
                [self.prompts.train_ids[i] for i in prompts],
                [one.ids for one in batch],
                scores,
                round=state.round,
            )
            state.prompt_of += [i for i, s in zip(prompts, scores, strict=True) if not np.isnan(s)]
            found += batch
        state.draws = np.pad(state.draws, (0, len(pool) - before))
        quantiles = iter(pool.labels()[before:].tolist())
        rows = [
            {
                "round": state.round,
                "step": state.step,
                "prompt": self.prompts.train[one.prompt]["prompt"],
                "completion": one.text,
                "reward": None if math.isnan(one.reward) else float(one.reward),
                "quantile": None if math.isnan(one.reward) else next(quantiles),
                "ended": bool(one.ids) and one.ids[-1] in self.policy.stop_ids,
            }
            for one in found
        ]
        return rows, self._metrics(state, rows, started)

    def _found(self, state: State, sampling: Sampling, samples: int) -> Iterator[list[Scored]]:
        """The round's batches, the same on every process: what was brought along, then what is sampled."""
        if state.round == 0 and self.prompts.scored:
            yield self.work.processes.on_rank_0(self.work.stoppable(lambda: self._brought_along(state)))
        if samples:
            with self.rollout.synchronised(from_base=state.step == 0) as draw:
                shares = self.work.all_gather(lambda: list(self._scored(draw, state, sampling, samples)))
            for _, batch in in_batch_order(shares):
                yield batch

    def _brought_along(self, state: State) -> list[Scored]:
        """The completions that were there before, with rewards where they came without."""
        brought = self.prompts.scored
        if not all(math.isnan(one.reward) for one in brought):
            return brought
        size = self.config.sample_batch
        kept = self.work.journal.stage(
            sampling_stage(state), ["brought along", size], Scored.to_json, Scored.from_json
        )

        def begin(start: int) -> tuple[int, Begun[list[Scored]]]:
            if start in kept:
                return start, Begun(lambda: kept[start])
            part = brought[start : start + size]
            rows = [one.row or self.prompts.train[one.prompt] for one in part]
            texts = [one.text for one in part]
            return start, self.reward.begin(rows, texts).then(functools.partial(_with_rewards, part))

        def show(done: int) -> None:
            waiting = waiting_for([self.reward])
            self.listen(Progress("scoring what was brought along", done, len(brought), waiting))

        made: list[Scored] = []
        batches = map(begin, range(0, len(brought), size))
        for start, part in in_order(batches, batches_ahead([self.reward], size), show):
            if start not in kept:
                kept.keep(start, part)
            made += part
            show(len(made))
        return made

    def _scored(
        self, draw: Draw, state: State, sampling: Sampling, samples: int
    ) -> Iterator[tuple[int, list[Scored]]]:
        """This process's batches of the round's completions, with their rewards: (conditioning, batch)."""
        started, done, rewards, scored = time.monotonic(), 0, 0.0, 0
        self._drawn_tokens = 0
        total = samples * len(self.prompts.train_ids)
        processes, before = self.work.processes.count, self._first_samples(state)

        def show(texts: Texts | None = None) -> None:
            numbers = {
                "reward": rewards / scored if scored else float("nan"),
                "tokens/s": self._drawn_tokens * processes / (time.monotonic() - started),
            }
            self.listen(
                Progress(
                    f"round {state.round + 1}/{state.all_rounds(self.config)}: sampling",
                    min(total, done * processes),
                    total,
                    numbers | waiting_for([self.reward]),
                    texts=texts,
                )
            )

        def wait(_: int) -> None:
            if done * processes < total:
                show()

        ahead = batches_ahead([self.reward], sampling.rows)
        for number, batch in in_order(self._batches(draw, state, sampling, samples), ahead, wait):
            yield number, batch
            scores = np.array([one.reward for one in batch])
            done += len(batch)
            scored, rewards = scored + int((~np.isnan(scores)).sum()), rewards + float(np.nansum(scores))
            show(self._texts(state, batch, before))

    def _first_samples(self, state: State) -> dict[int, tuple[float, int]]:
        """(reward, index in the pool) of the base model's first completion of each prompt, where known."""
        if self.prompts.scored or state.step == 0:  # not the base model's, or not there yet
            return {}
        rewards, base = state.pool.rewards, (state.pool.rounds == 0).nonzero()[0].tolist()
        return {state.prompt_of[i]: (float(rewards[i]), i) for i in reversed(base)}

    def _texts(self, state: State, batch: list[Scored], before: dict[int, tuple[float, int]]) -> Texts | None:
        """Texts to look at: of the batch's prompts, the one whose base model's text has the lowest reward."""
        prompts = self.prompts
        if state.step == 0:
            return Texts(str(prompts.train[batch[0].prompt]["prompt"]), batch[0].text)
        known = [one for one in batch if one.prompt in before]
        if not known:
            return None
        one = min(known, key=lambda one: before[one.prompt][0])
        (completion,) = state.pool[[before[one.prompt][1]]].completions
        text = self.policy.decode(completion.tolist(), prompts.train_ids[one.prompt])
        return Texts(str(prompts.train[one.prompt]["prompt"]), text, one.text)

    def _batches(
        self, draw: Draw, state: State, sampling: Sampling, samples: int
    ) -> Iterator[tuple[int, Begun[list[Scored]]]]:
        """(number of the conditioning, batch): as it was kept, or as it is sampled now, being scored."""
        for number, (conditioning, indices) in enumerate(self._conditionings(state)):
            for batch in kept_or_drawn(
                draw,
                SampleRequest(
                    [self.prompts.train_ids[i] for i in indices],
                    conditioning,
                    sampling,
                    samples,
                    seed_for(self.config.seed, "round", state.round, number),
                    self.work.processes.shard,
                ),
                self.work.journal.stage(sampling_stage(state), number, Scored.to_json, Scored.from_json),
                functools.partial(self._score, indices),
            ):
                yield number, batch

    def _conditionings(self, state: State) -> list[tuple[Conditioning, list[int]]]:
        """What stands before which training prompts in this round."""
        config, quantiles = self.config, self.policy.quantiles
        every = list(range(len(self.prompts.train_ids)))
        if state.step == 0:  # nothing was learned yet
            return [(Conditioning(), every)]
        if config.explore_token == "best":
            return [(Conditioning(quantiles - 1, 0, config.guidance), every)]
        seed = seed_for(config.seed, "tokens to explore by", state.round)
        tokens = np.random.default_rng(seed).integers(quantiles, size=len(every))
        return [
            (Conditioning(k, 0, config.guidance), np.flatnonzero(tokens == k).tolist())
            for k in range(quantiles)
        ]

    def _score(self, prompts: list[int], drawn: DrawnBatch) -> Begun[list[Scored]]:
        """The completions with their rewards; ``prompts``: where the request's stand among all."""
        flat = [(prompts[i], ids) for i, ids in drawn.each()]
        self._drawn_tokens += sum(len(ids) for _, ids in flat)
        texts = [self.policy.decode(completion, self.prompts.train_ids[i]) for i, completion in flat]
        unscored = [Scored(i, ids, text, math.nan) for (i, ids), text in zip(flat, texts, strict=True)]
        rewards = self.reward.begin([self.prompts.train[i] for i, _ in flat], texts)
        return rewards.then(functools.partial(_with_rewards, unscored))

    def _metrics(self, state: State, rows: list[dict[str, Any]], started: float) -> dict[str, Any]:
        pool = state.pool
        labels, every = pool.labels(), pool.rewards
        by_quantile = [every[labels == k] for k in range(pool.quantiles)]
        rewards = [row["reward"] for row in rows if row["reward"] is not None]
        return {
            "kind": "round",
            "round": state.round,
            "step": state.step,
            "samples": len(rows),
            "unscored": len(rows) - len(rewards),
            "pool": len(pool),
            "reward_mean": float(np.mean(rewards)) if rewards else None,
            "reward_by_quantile": [float(r.mean()) if len(r) else None for r in by_quantile],
            "thresholds": [float(t) for t in pool.thresholds],
            "guidance": self.config.guidance if state.step else 1.0,
            "seconds": time.monotonic() - started,
        }


def _with_rewards(completions: list[Scored], rewards: Iterable[float]) -> list[Scored]:
    return [replace(one, reward=float(r)) for one, r in zip(completions, rewards, strict=True)]


def sampling_stage(state: State) -> str:
    """What the round's samples are kept under."""
    return f"round-{state.round + 1}"
