"""The Quark loop: explore, quantize, learn, again; then evaluate, export and report.

Every random choice derives from (seed, round or step), never from a generator that lives through the run,
so a resumed run needs no RNG state to repeat an undisturbed one.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from quark_fast.config import Config
from quark_fast.data.row import Prompt, to_file
from quark_fast.errors import Interrupted, UsageError
from quark_fast.pool.tokens import Ints
from quark_fast.rollout.sampling import Sampler
from quark_fast.rollout.transformers import sample
from quark_fast.runtime import trackers, zero
from quark_fast.runtime.distributed import Processes
from quark_fast.runtime.journal import Journal
from quark_fast.runtime.machine import versions
from quark_fast.runtime.memory import OutOfMemory, give_back_freed_memory, memory_errors
from quark_fast.runtime.run_folder import COMPLETIONS, HELD_OUT, LOG, METRICS, PENDING, PROMPTS, RunFolder
from quark_fast.tasks.by_name import GivenReward
from quark_fast.training.best_round import BestRound, comparison_stage
from quark_fast.training.checkpoint import Checkpoint
from quark_fast.training.explore import Explorer, sampling_stage
from quark_fast.training.learn import Learner
from quark_fast.training.listeners import Listen, Listeners, several, tell
from quark_fast.training.optimizer import make_optimizer, trained_parameters
from quark_fast.training.progress import Progress
from quark_fast.training.quantize import plan_round
from quark_fast.training.results import Results, note_what_is_spent
from quark_fast.training.run_log import RunLog
from quark_fast.training.shared_work import SharedWork
from quark_fast.training.signals import stop_signals
from quark_fast.training.start import (
    check_folder,
    choose_rollout,
    known_names,
    names_into_settings,
    set_up,
    settings_to_save,
)
from quark_fast.training.state import State
from quark_fast.training.trained import TrainedRun

Callback = Callable[[dict[str, Any]], None]


class Trainer:
    """One run, from the settings to the report.

    Args:
        config: every setting of the run.
        reward: a callable ``reward(prompts, completions, **columns) -> list[float | None]``, maybe ``async
            def``, the name of one, or a list of them, which are added up, in place of what ``config`` names.
        prompts: training prompts: texts, lists of messages for the tokenizer's chat template, or rows, in
            which either of these stands as in a file's; or a file's name, in place of those ``config`` names.
        held_out: likewise for the evaluation; or how many of the prompts to hold out.
        sampler: samples the base model, as ``rollout.transformers.sample`` does; several runs may share one.
        listen: called with a ``Progress`` now and then, ``print`` will do; or several such. "auto": a live
            display on a terminal and in a notebook, elsewhere nothing; None: nothing.
        callbacks: called with every row of metrics.jsonl, a dict, as it is written, on rank 0; one, or
            several. "kind" says what the row is of (step, micro_batch, round, probe, development). A resumed
            run calls again with the rows that it repeats.

    Raises:
        UsageError: anything wrong with model, prompts, reward or folder, before any long work starts.
    """

    @known_names
    def __init__(
        self,
        config: Config,
        *,
        reward: str | GivenReward | None = None,
        prompts: str | Path | Sequence[Prompt] | None = None,
        held_out: str | Path | int | Sequence[Prompt] | None = None,
        sampler: Sampler = sample,
        listen: Listen = "auto",
        callbacks: Callback | Sequence[Callback] = (),
    ) -> None:
        started = time.monotonic()
        config, given_reward, given = names_into_settings(config, reward, prompts, held_out)
        self.config = config
        self.folder = folder = RunFolder(config.output_folder)
        self.processes = processes = Processes.join()
        log = RunLog(folder / LOG) if processes.main else None
        self.listen = heard = Listeners(listen, log, mask=not config.show_offensive)
        self.callbacks = several("callbacks", callbacks)
        self.begun = False
        with folder.free_after_errors(), memory_errors(folder):
            # What rank 0 finds there, or chooses, holds for all.
            config.precision, saved = processes.on_rank_0(lambda: check_folder(config, folder))
            self.setup = processes.together(
                lambda: set_up(config, folder, processes, saved, given_reward, given)
            )
            self.policy, self.accelerator = self.setup.policy, self.setup.accelerator
            self.policy.unsharded = self.setup.reference  # from which a sharded policy is copied
            wrapped, self.optimizer = processes.prepare(
                self.accelerator, self.policy.model, make_optimizer(config, self.policy), config
            )
            self.state = State.new(config, processes.count, self.setup.device)
            self.journal = Journal(
                folder / PENDING, processes.index, here=processes.main or processes.machines == 1
            )
            self.work = SharedWork(processes, self.journal, sampler)
            self.rollout = choose_rollout(self.setup, self.work, heard)
            self.explorer = Explorer(self.setup, self.rollout, self.work, heard)
            self.learner = Learner(self.setup, wrapped, self.optimizer)
            self.results = Results(self.setup, self.work, heard)
            self.best = BestRound(self.setup, self.work, heard)
            self.checkpoint = Checkpoint(self.setup, wrapped, self.optimizer, self.journal)
            if config.resume or config.from_run:
                self.checkpoint.restore(self.state, self.best.check_kept)
            processes.on_rank_0(self._write_start)
        self.state.seconds += heard.ready(since=started)

    @property
    def about(self) -> list[str]:
        """What the run is made of, a line each: the model, the prompts, and how many of them."""
        return self.setup.in_words()

    def train(self) -> TrainedRun:
        """Run to the end; the run's folder, table and model.

        Raises:
            UsageError: called a second time, among other things.
            Interrupted: Ctrl-C or SIGTERM; the run can be resumed.
            NotUploaded: the run is finished, but its model is not on the hub.
        """
        state = self.state
        if self.begun:
            raise UsageError(
                f"train() was called before, and a Trainer is one run, that of {self.folder.path}; make"
                " another: with another output, or with resume=True to go on where this one stopped"
            )
        self.begun = True
        self.processes.take_over(self.accelerator, self.config.precision)
        self.started = note_what_is_spent(self.work, self.setup.device, state)
        where = f"goes on at step {state.step}" if self.config.resume else "begins"
        about = [f"{where}: {self._versions()['command']}", *self.about]
        with (
            self.folder.free_after_errors(),
            self.folder.disk_errors(),
            trackers.ended(self.accelerator),
            self.listen.hearing(about),
            memory_errors(self.folder),
            stop_signals(self._how_to_go_on) as self.work.stop,
        ):
            if not state.measured:
                self._compare()
            while state.round < state.all_rounds(self.config) and not self.best.stops(state):
                if not state.sampled:
                    self._explore()
                if self._rewards_differ():
                    self._learn(plan_round(self.config, state, self.setup.prompts.train_ids))
                    self._probe()
                else:
                    state.left_out += 1
                state.round, state.sampled = state.round + 1, False
            self.processes.on_rank_0(self.rollout.close)
            self.setup.copied.drop()  # a probe's that no round samples any more
            self._save()
            kept = self.best.take(state)
            self.policy.place_untrained_rows(state.trained)
            self.results.evaluate(state.step, kept)
            self.processes.all_gather(self._stop_if_asked)
            self.checkpoint.keep(state)
            self.results.export(kept)
        self.results.upload()
        return TrainedRun(self.folder.at, self.config.trust_remote_code)

    # ---------------------------------------------------------------- the phases

    def _explore(self) -> None:
        """The round's samples into the pool and completions.jsonl."""
        give_back_freed_memory()
        state, config = self.state, self.config
        if config.sample_batch > (size := self.setup.batch_rows):
            note = f"sample_batch = {config.sample_batch}: the run's batches stay those of {size}"
            stage = f"round {state.round + 1}/{state.all_rounds(config)}: sampling"
            self.listen(Progress(stage, 0, 1, note=note))
        rows, metrics = self.explorer.explore(state, self.setup.round_sampling(state.round))

        def write() -> None:
            self.folder.append(COMPLETIONS, rows)
            if metrics["reward_mean"] is None:
                self.work.ask_again(sampling_stage(state), [self.setup.reward])
                raise UsageError(
                    f"reward {self.setup.reward.name} scored none of {len(rows)} completions in round"
                    f" {state.round + 1}; the first was {rows[0]['completion']!r}. Where it was out of order,"
                    f" {self.folder.resumed_by} samples and scores the round again"
                )

        self.processes.on_rank_0(write)
        self._record(metrics)
        state.sampled = True
        self._save()
        # The checkpoint now has these samples, and the comparison of the round before them.
        over = sampling_stage(state), comparison_stage(state.round)
        self.processes.on_rank_0(lambda: self.journal.forget(*over))

    def _rewards_differ(self) -> bool:
        """Whether the pool has two rewards or more. If not, the round has nothing to learn from.

        Raises:
            UsageError: no round is left that could find a second one.
        """
        state, config, rewards = self.state, self.config, self.state.pool.rewards
        if self.policy.quantiles == 1 or rewards.min() < rewards.max():
            return True
        found = f"all {len(rewards):,} rewards are {rewards[0]:g}"
        if state.round + 1 == state.all_rounds(config):
            with self.processes.same_error():
                raise UsageError(
                    f"{found}, so there is nothing to tell apart and nothing was learned; the samples are"
                    f" kept in {self.folder.path / COMPLETIONS}. Give a reward that differs between them, or"
                    " more --initial-samples or --rounds or a higher --temperature, and another --output"
                )
        this = state.round + 1
        note = f"{found}: nothing to tell apart yet; round {this} is left out, the next one samples"
        self._show_learning(0, note=note)
        return False

    def _learn(self, plan: Ints) -> None:
        """The round's optimizer steps; checkpoints on the way and at its end."""
        give_back_freed_memory()
        state, config = self.state, self.config
        first = state.first_step(config)
        while state.step < first + config.steps:
            batch = state.pool[state.pool.ids[plan[state.step - first]]]
            try:
                numbers = self.learner.step(state, batch, self._smaller_micro_batch)
            except OutOfMemory:
                self._save()
                with self.processes.same_error():
                    raise
            state.step += 1
            row = {"kind": "step", "step": state.step, "round": state.round, **numbers}
            self._record(row)
            hidden = ("grad_norm", "lr", "seconds")
            shown = {k: v for k, v in numbers.items() if k not in hidden and isinstance(v, int | float)}
            skipped = numbers.get("skipped_for")
            note = f"step {state.step}: no finite {skipped}, skipped" if skipped else ""
            self._show_learning(state.step - first, shown, note)
            with self.processes.same_error():
                state.bad_steps.stop(config, state.step, row)
            ends = state.step == first + config.steps
            # Decided once, by all: a signal that comes from here on stops after the next step.
            stop = self.processes.any(self._stop_asked)
            if ends or state.step % config.checkpoint_every == 0 or stop:
                self._save()
            if stop:
                self.processes.all_gather(self._stop_if_asked)
        np.add.at(state.draws, plan.ravel(), 1)

    def _probe(self) -> None:
        """What the round has learned, by completions of the base model."""
        give_back_freed_memory()
        self.policy.place_untrained_rows(self.state.trained)  # which probe and exploring may ask for, too
        if self.processes.zero:
            zero.set_weights(trained_parameters(self.policy.model))
        # One token tells nothing apart, and without a reward nothing says which completions are good.
        if self.policy.quantiles > 1 and not self.setup.reward.is_none:
            self._record(self.results.probe(self.state.step))
        self._compare()
        if self.config.rollout != "transformers":  # else the next round samples this copy
            self.setup.copied.drop()

    def _compare(self) -> None:
        """What --keep-best chooses by: the base model before the first round, then each round."""
        row = self.best.measure(self.state)
        if row is not None:
            self._record(row)

    # ---------------------------------------------------------------- the run folder

    def _write_start(self) -> None:
        """The run folder, if it is new; what the run is made of; trackers."""
        config, setup = self.config, self.setup
        if not config.resume:
            self.folder.create()
        with self.folder.disk_errors():
            settings_to_save(config, setup.saved).save(self.folder / "config.yaml")
            self.journal.begin(self.checkpoint.identity)
            self.folder.write_rows(HELD_OUT, map(to_file, setup.prompts.held_out_rows))
            if setup.prompts.chats:
                self.folder.write_rows(PROMPTS, map(to_file, setup.prompts.chats))
            self.folder.add_start(self._versions() | {"step": self.state.step})
            settings, mark = dataclasses.asdict(config), self.folder.mark
            trackers.start(self.accelerator, self.folder.at, settings, self.state.step, mark)

    def _versions(self) -> dict[str, Any]:
        found = versions(self.setup.device) | {
            "loss": self.setup.objective.description,
            "prompts": self.setup.prompts.notes,
            "model": self.setup.checked.lines,
        }
        if self.processes.count > 1:
            found["processes"] = f"{self.processes.count}, {self.accelerator.distributed_type.value}"
        return found

    def _save(self) -> None:
        self.state.seconds = time.monotonic() - self.started
        self.checkpoint.save(self.state)
        self.journal.note_spent()

    def _record(self, row: dict[str, Any]) -> None:
        """A row for metrics.jsonl and the trackers."""

        def write() -> None:
            self.folder.append(METRICS, [row])
            trackers.track(self.accelerator, row)
            for callback in self.callbacks:
                tell("callback", callback, copy.deepcopy(row))  # the run's own is still read

        self.processes.on_rank_0(write)

    def _show_learning(self, done: int, numbers: dict[str, float] | None = None, note: str = "") -> None:
        stage = f"round {self.state.round + 1}/{self.state.all_rounds(self.config)}: learning"
        self.listen(Progress(stage, done, self.config.steps, numbers or {}, note))

    def _smaller_micro_batch(self, size: int) -> None:
        """Note that the memory sufficed for no more samples at a time."""
        step = self.state.step
        self._record({"kind": "micro_batch", "step": step, "micro_batch": size})
        note = f"out of memory: from step {step + 1} on, {size} samples at a time, as many a step"
        self._show_learning(step - self.state.first_step(self.config), note=note)

    # ---------------------------------------------------------------- signals

    @property
    def _stop_asked(self) -> bool:
        return self.work.stop is not None and self.work.stop.asked

    def _stop_if_asked(self) -> None:
        if self._stop_asked:
            learning = self.state.round < self.state.all_rounds(self.config)
            where = f" in round {self.state.round + 1}" if learning else ""
            how = f"go on with {self.folder.resumed_by}"
            raise Interrupted(f"stopped{where} at step {self.state.step}; {how}")

    def _how_to_go_on(self) -> str:
        known = self.folder.has_checkpoint
        how = "go on from the last checkpoint" if known else "what was sampled is kept: go on"
        return f"stopped; {how} with {self.folder.resumed_by}"
