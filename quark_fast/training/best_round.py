"""The best round, not the last: every round measured on development prompts, the best one's weights kept.

A round's weights lie in ``rounds/`` of the run folder as long as it may be chosen: all of them while none is
within the bounds of ``--keep-best``, so that looser ones can still choose, and from then on the best one's.
Those that a better round has beaten go a round later, when both checkpoints know of it.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from quark_fast.errors import UsageError
from quark_fast.evaluation.held_out import evaluate
from quark_fast.evaluation.round_measures import measure_names, round_measures
from quark_fast.evaluation.table_rows import TableRow, table_rows
from quark_fast.files.atomic import flush, replacing, sha256
from quark_fast.metrics import Sample
from quark_fast.report.columns import counted
from quark_fast.runtime.distributed import in_batch_order, without_data
from quark_fast.runtime.run_folder import ROUNDS
from quark_fast.training.checkpoint import set_weights, trained_weights
from quark_fast.training.progress import Progress
from quark_fast.training.setup import Setup
from quark_fast.training.shared_work import SharedWork
from quark_fast.training.state import MeasuredRound, State


class BestRound:
    """Measures rounds, and gives the policy the weights of the best one; nothing where none is asked for."""

    def __init__(self, setup: Setup, work: SharedWork, listen: Callable[[Progress], None]) -> None:
        self.setup, self.work, self.listen = setup, work, listen
        self.goal = setup.config.goal()
        prompts = setup.prompts.development
        self.rounds = setup.config.rounds  # those that there are in the end
        self.total = len(prompts.rows) * prompts.samples if prompts else 0  # completions of a round

    # ---------------------------------------------------------------- after a round

    def measure(self, state: State) -> dict[str, Any] | None:
        """Measure the policy as it is after a round; before the first one, the base model.

        Returns:
            The row for metrics.jsonl; None: rounds are not compared.
        Raises:
            UsageError: a bound is relative to a value of the base model that is not above 0.
        """
        if self.goal is None:
            return None
        started, setup = time.monotonic(), self.setup
        self.rounds = state.all_rounds(setup.config)
        number = state.round + 1 if state.measured else 0
        self._show(number, 0)
        base, best, *_ = table_rows(setup.policy.quantiles, (), "best")
        row, model = (best, setup.copied.get()) if number else (base, setup.reference)
        names = measure_names(setup.task, setup.reward, setup.judges)
        found = round_measures(self._samples(number, row, model), names, setup.reward)
        measures = {name: one.value for name, one in found.items()}
        measured = MeasuredRound(number, measures, tuple(sorted(state.trained)))
        if number:
            measured = self._keep(state, measured)
        else:
            self._check_base(measures)
        state.measured.append(measured)
        self._show(number, self.total, self._numbers(measured, state), self._judged(state))
        return {
            "kind": "development",
            "round": number,
            "step": state.step,
            "measures": measures,
            "intervals": {name: [one.low, one.high] for name, one in found.items()},
            "seconds": time.monotonic() - started,
        }

    def _check_base(self, measures: Mapping[str, float]) -> None:
        """Raise UsageError where the goal has no value to begin with; a resumed run scores anew."""
        assert self.goal is not None
        setup = self.setup
        with setup.processes.same_error():
            try:
                self.goal.check_base(measures)
            except UsageError:
                if any(map(math.isnan, measures.values())):
                    scorers = [setup.reward, *setup.judges]
                    setup.processes.on_rank_0(lambda: self.work.ask_again(comparison_stage(0), scorers))
                raise

    def _samples(self, number: int, row: TableRow, model: Any) -> list[Sample]:
        """Completions of the development prompts, the same on every process."""
        setup, prompts, sampling = self.setup, self.setup.prompts.development, self.setup.held_out_sampling()
        assert prompts is not None  # there is a goal
        usual = setup.measured_on(prompts, sampling, self.work.sampler)
        how = dataclasses.replace(usual, controls=(), prompt_fit=True)
        drawn = sampling.what_is_drawn()
        scorers = [one.identity for one in (setup.reward, *setup.judges)]
        kept = self.work.journal.stage(
            comparison_stage(number),
            [drawn, prompts.samples, prompts.rows, prompts.ids, scorers],
            Sample.to_json,
            Sample.from_json,
        )

        def parts() -> Iterator[tuple[str, list[Sample]]]:
            done = 0
            for name, part in evaluate(how, model, [row], setup.task.measures, kept=lambda _: kept):
                yield name, part
                done += len(part) * setup.processes.count
                if done < self.total:  # the end has the numbers
                    self._show(number, done)

        shares = self.work.all_gather(lambda: list(parts()))
        return [one for _, part in in_batch_order(shares) for one in part]

    def _keep(self, state: State, measured: MeasuredRound) -> MeasuredRound:
        """Write the round's weights if it may be chosen, and drop those of rounds that were beaten before."""
        processes, path = self.setup.processes, self._path(measured.round)
        before, best = self._best(state.measured), self._best([*state.measured, measured])
        if before is not None:
            processes.on_rank_0(lambda: self._drop_all_but(self._path(before.round)))
        if best is not None and best is not measured:
            return measured
        weights = processes.gather(trained_weights(self.setup.policy.model).items())

        def write() -> str:
            path.parent.mkdir(exist_ok=True)
            with replacing(path) as scratch:
                save_file(weights, scratch)
            flush(self.setup.folder.at)
            return sha256(path)

        return dataclasses.replace(measured, sha256=processes.on_rank_0(write))

    def _drop_all_but(self, kept: Path) -> None:
        for path in kept.parent.iterdir():
            if path != kept:
                path.unlink()

    def _path(self, number: int) -> Path:
        return self.setup.folder / ROUNDS / f"round-{number}.safetensors"

    def _show(self, number: int, done: int, numbers: dict[str, float] | None = None, note: str = "") -> None:
        what = f"round {number}/{self.rounds}" if number else "base model"
        stage = f"{what}: measuring on development prompts"
        self.listen(Progress(stage, done, self.total, numbers or {}, note))

    def _numbers(self, measured: MeasuredRound, state: State) -> dict[str, float]:
        """What ``--keep-best`` looks at; bounds as they are kept, relative to the base model."""
        assert self.goal is not None
        base, own = state.measured[0].measures, measured.measures
        bounds = self.goal.bounds if measured.round else ()
        ratios = {f"{bound.measure} / base": bound.ratio(own, base) for bound in bounds}
        return {self.goal.measure: own[self.goal.measure], **ratios}

    def _judged(self, state: State) -> str:
        """What becomes of the last round, in words."""
        assert self.goal is not None
        base, *rounds = state.measured
        if not rounds:
            return ""
        last, best = rounds[-1], self._best(state.measured)
        if last is best:
            return f"round {last.round} is the best so far"
        beyond = ", ".join(map(str, self.goal.beyond(last.measures, base.measures)))
        kept = f"round {best.round} stays the best" if best else "none is within the bounds yet"
        return f"round {last.round} is {f'not within {beyond}' if beyond else 'no gain'}: {kept}"

    # ---------------------------------------------------------------- the choice

    def _best(self, measured: list[MeasuredRound]) -> MeasuredRound | None:
        """The best of the rounds after the base model; None: none is within the bounds."""
        assert self.goal is not None
        base, *rounds = measured
        index = self.goal.best(base.measures, [one.measures for one in rounds])
        return None if index is None else rounds[index]

    def stops(self, state: State) -> bool:
        """Whether ``--stop-after`` ends the run here."""
        most = self.setup.config.stop_after
        if self.goal is None or not most or len(state.measured) < 2:
            return False
        base, *rounds = (one.measures for one in state.measured)
        return self.goal.without_gain(base, rounds) >= most

    def check_kept(self, measured: list[MeasuredRound]) -> None:
        """Raise UsageError if the best of a resumed run's rounds, by its goal now, is not there any more."""
        if self.goal is None or not measured:
            return
        self.goal.check_base(measured[0].measures)
        best = self._best(measured)
        if best is not None:
            self._kept(best)

    def take(self, state: State) -> dict[str, Any] | None:
        """Give the policy the best round's weights, and ``state`` its trained quantiles, for the evaluation.

        Returns:
            For evaluation.json: which round it is, and why; None: rounds were not compared.
        Raises:
            UsageError: no round is within the bounds, or the weights of the best one are not there any more.
        """
        if self.goal is None:
            return None
        setup = self.setup
        with setup.processes.same_error():
            best = self._best(state.measured)
            if best is None:
                raise UsageError(self._none_within(state))
        weights = setup.processes.on_rank_0(lambda: load_file(self._kept(best)), without_data)
        set_weights(setup.processes, setup.policy.model, weights)
        state.trained = set(best.trained)
        return {
            "round": best.round,
            "rounds": state.measured[-1].round,
            "keep_best": str(self.goal),
            "why": self._why(state, best),
        }

    def _kept(self, chosen: MeasuredRound) -> Path:
        """Where the weights are that were written after a round."""
        path = self._path(chosen.round)
        if path.exists() and sha256(path) == chosen.sha256:
            return path
        found = "are damaged" if path.exists() else "are gone, as it was not the best by the earlier one"
        raise UsageError(
            f"keep_best = {str(self.goal)!r} chooses round {chosen.round}, whose weights ({path}) {found};"
            " go on with --resume and a --keep-best that chooses another round"
        )

    def _none_within(self, state: State) -> str:
        """How far each round is from the bounds, and what to type."""
        assert self.goal is not None
        base, rounds = state.measured[0].measures, state.measured[1:]
        each = (f"round {one.round} has {self.goal.shown(one.measures, base)}" for one in rounds)
        kept = [one for one in rounds if self._path(one.round).exists()]
        looser = self.goal.looser(base, [one.measures for one in kept])
        how = f", such as {self.setup.folder.resumed_by} --keep-best '{looser}'" if looser else ""
        return (
            f"no round meets keep_best = {str(self.goal)!r}: {'; '.join(each)}. The weights of"
            f" {counted(len(kept), 'round')} are kept: choose one by --resume and another --keep-best{how}"
        )

    def _why(self, state: State, best: MeasuredRound) -> str:
        assert self.goal is not None and self.setup.prompts.development is not None
        goal, last = self.goal, state.measured[-1]
        base, prompts = state.measured[0].measures, len(self.setup.prompts.development.rows)
        extreme = "lowest" if goal.direction == "min" else "highest"
        among = f", of the rounds with {' and '.join(bound.in_words for bound in goal.bounds)}"
        why = (
            f"Round {best.round} of {last.round} was kept: {extreme} {goal.measure} on {prompts:,}"
            f" development prompts, {best.measures[goal.measure]:.3g} (base model {base[goal.measure]:.3g})"
            f"{among if goal.bounds else ''}."
        )
        if last is not best:
            why += f" The last round has {goal.shown(last.measures, base)}."
        most = state.all_rounds(self.setup.config)
        if last.round < most:
            idle = counted(goal.without_gain(base, [one.measures for one in state.measured[1:]]), "round")
            why += f" The run stopped after round {last.round} of {most}, {idle} without gain."
        return why


def comparison_stage(number: int) -> str:
    """What the completions of a round, or of the base model as round 0, are kept under."""
    return f"development-{number}"
