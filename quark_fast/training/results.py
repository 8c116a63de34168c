"""What a run shows for its work: the probe between rounds, the evaluation, the exported model, the report."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from quark_fast.data.row import to_file
from quark_fast.errors import NotUploaded
from quark_fast.evaluation.held_out import (
    EvaluationSetup,
    evaluate,
    evaluation_sampling,
    generation_settings,
)
from quark_fast.evaluation.perplexity import TEXT_PROMPT, ReferenceLogits
from quark_fast.evaluation.probe import PROBE_ROWS, Probe, noise_note
from quark_fast.evaluation.prompt_classes import classify_prompts
from quark_fast.evaluation.subjects import measuring_model
from quark_fast.evaluation.summary import (
    MeasuredRow,
    describe_evaluation,
    scorer_in_words,
    summarise,
)
from quark_fast.evaluation.table_rows import TableRow, table_rows
from quark_fast.files.atomic import replacing_folder
from quark_fast.metrics import Sample
from quark_fast.model.adapter import write_adapter
from quark_fast.model.copies import exported_copy, whole_copy
from quark_fast.model.export import write_export
from quark_fast.report.columns import fill, find_column
from quark_fast.report.files import NOT_EVALUATED, read_run
from quark_fast.report.model_card import EMBEDDED_MODEL, find_base, write_card
from quark_fast.report.page import write_report
from quark_fast.rewards.weighted_sum import waiting_for
from quark_fast.rollout.sampling import Sampling
from quark_fast.runtime import hub, trackers
from quark_fast.runtime.distributed import in_batch_order
from quark_fast.runtime.journal import Kept
from quark_fast.runtime.memory import give_back_freed_memory, most_memory
from quark_fast.runtime.run_folder import HELD_OUT
from quark_fast.training.progress import Progress
from quark_fast.training.setup import Setup, in_batches
from quark_fast.training.shared_work import SharedWork
from quark_fast.training.state import State


def note_what_is_spent(work: SharedWork, device: torch.device, state: State) -> float:
    """Have the journal note the run's seconds and memory with every batch, those of earlier starts included.

    Returns:
        when the run would have begun, had it run in one go; ``time.monotonic()``, seconds.
    """
    before = work.processes.on_rank_0(lambda: work.journal.spent_before)
    state.seconds = max(state.seconds, before.get("seconds", 0.0))
    started = time.monotonic() - state.seconds

    def spent() -> dict[str, float]:
        memory = max(before.get("memory_gb", 0.0), most_memory(device) / 1e9)
        return {"seconds": time.monotonic() - started, "memory_gb": memory}

    work.journal.spent = spent
    return started


class Results:
    """Measures a run on its held-out prompts, and writes what is left of it in the end."""

    def __init__(self, setup: Setup, work: SharedWork, listen: Callable[[Progress], None]) -> None:
        self.setup, self.work, self.listen = setup, work, listen
        self.held_out = setup.prompts.held_out
        self.total = len(self.held_out.rows) * self.held_out.samples  # completions of a row of the table
        # The probe's completions and what the reference makes of them, made when they are first asked for.
        self.drawn: tuple[Probe, ReferenceLogits] | None = None

    # ---------------------------------------------------------------- between rounds

    def probe(self, step: int) -> dict[str, Any]:
        """How well the reward tokens tell held-out completions apart by now, as a row of metrics.jsonl."""
        setup = self.setup
        self.listen(Progress("probing", 0, 1))
        model = setup.copied.get()
        probe, reference = self.drawn = self.drawn or self._draw_probe()
        found, kl = setup.processes.on_rank_0(
            self.work.stoppable(
                lambda: probe.measure(setup.policy, model, reference, setup.config.read_batch)
            )
        )
        numbers = {"rank correlation": found.value}
        self.listen(Progress("probing", 1, 1, numbers, note=noise_note(found, kl)))
        return {
            "kind": "probe",
            "step": step,
            "rank_correlation": found.value,
            "standard_error": found.standard_error,
            "kl": kl,
        }

    def _draw_probe(self) -> tuple[Probe, ReferenceLogits]:
        setup = self.setup
        # One sample a prompt is mostly prefill: on a CPU fewer rows side by side.
        rows = PROBE_ROWS if setup.device.type == "cpu" else setup.batch_rows
        sampling = in_batches(setup.held_out_sampling(), rows, setup.config)
        shares = self.work.all_gather(
            lambda: Probe.draw(
                self._measured(sampling), self.work.journal.stage("probe", self._what_is_measured(sampling))
            )
        )
        probe = Probe.of(batch for _, batch in in_batch_order(shares))
        # The same after every round.
        return probe, ReferenceLogits(setup.policy, setup.reference, probe.prompts, probe.completions)

    def _measured(self, sampling: Sampling) -> EvaluationSetup:
        return self.setup.measured_on(self.held_out, sampling, self.work.sampler)

    def _what_is_measured(self, sampling: Sampling) -> list[Any]:
        """As JSON, what decides the samples of the held-out prompts and may change at a resume."""
        held_out = self.held_out
        texts = held_out.texts or self.setup.controls
        drawn = [sampling.what_is_drawn(), held_out.samples, held_out.rows, held_out.ids]
        return [*drawn, texts, TEXT_PROMPT, self.setup.reward.identity]

    # ---------------------------------------------------------------- the evaluation

    def evaluate(self, step: int, kept: dict[str, Any] | None) -> None:
        """``evaluation.json``: held-out prompts in every row of the table, of the model as it is exported.

        None with ``--no-eval``, not even one of an earlier start.

        Args:
            kept: which round's weights it has, and why, if rounds were compared.
        """
        setup, config = self.setup, self.setup.config
        if not config.eval:
            setup.processes.on_rank_0(lambda: setup.folder.remove("evaluation.json", "evaluation.jsonl"))
            return
        give_back_freed_memory()
        if setup.task.prompt_classes and not setup.reward.is_none:
            self._classify()
        one, quantiles = config.one_token, setup.policy.quantiles
        table = table_rows(quantiles, config.guidances(), config.eval_rows, one_token=one)
        model = exported_copy(setup.policy, setup.sampling_dtype)
        weights = None if kept is None else kept["round"]
        shares = self.work.all_gather(lambda: list(self._evaluated(table, model, weights)))
        samples: dict[str, list[Sample]] = {row.name: [] for row in table}
        for name, part in in_batch_order(shares):
            samples[name] += part
        about = {} if kept is None else {"kept_round": kept}
        setup.processes.on_rank_0(lambda: self._write_evaluation(table, samples, step, about))

    def _classify(self) -> None:
        """Give every held-out prompt its class, also in the run folder, where ``evaluate`` reads it.

        Not where a prompt is the beginning of a text: the folder has the whole texts.
        """
        setup = self.setup
        rows = [dict(row) for row in self.held_out.rows]
        if not all(row.get("prompt_class") for row in rows):
            for share in self.work.all_gather(lambda: dict(self._classified())):
                for i, name in share.items():
                    rows[i]["prompt_class"] = rows[i].get("prompt_class") or name
            self.held_out = self.held_out.with_classes(rows)
        if not setup.config.prefix_tokens:
            setup.processes.on_rank_0(lambda: setup.folder.write_rows(HELD_OUT, map(to_file, rows)))

    def _classified(self) -> Iterator[tuple[int, str]]:
        """(index, class) of this process's part of the held-out prompts."""
        setup, sampling = self.setup, self.setup.held_out_sampling()
        found = classify_prompts(
            self._measured(sampling),
            setup.config.target,
            self.work.journal.stage(
                "classes",
                self._what_is_measured(sampling),
                decode=lambda batch: [(int(i), str(name)) for i, name in batch],
            ),
        )
        total = len(self.held_out.rows)
        for done, one in enumerate(found, start=1):
            yield one
            done = min(total, done * setup.processes.count)
            self.listen(Progress("classifying the held-out prompts", done, total))

    def _evaluated(
        self, table: list[TableRow], model: Any, weights: int | None
    ) -> Iterator[tuple[str, list[Sample]]]:
        """This process's batches of every row; ``weights``: of which round, if one was chosen."""
        setup, sampling = self.setup, self.setup.held_out_sampling()
        measured = [
            weights,
            *(judge.identity for judge in setup.judges),
            setup.task.shows("prompt_fit"),
            *self._what_is_measured(sampling),
        ]

        def kept(row: TableRow) -> Kept[list[Sample]]:
            how = row.conditioning
            return self.work.journal.stage(
                "evaluation",
                [row.name, dataclasses.asdict(how), how.nucleus_of(), *measured],
                Sample.to_json,
                Sample.from_json,
            )

        found: dict[str, list[Sample]] = {row.name: [] for row in table}

        def waiting(name: str) -> None:
            if len(found[name]) * setup.processes.count < self.total:
                self._show(name, found[name])

        for name, part in evaluate(
            self._measured(sampling), model, table, setup.task.measures, kept=kept, waiting=waiting
        ):
            found[name] += part
            self._show(name, found[name])
            yield name, part

    def _show(self, name: str, samples: list[Sample]) -> None:
        """How far the evaluation of a row is, and its headline so far."""
        task, done = self.setup.task, min(self.total, len(samples) * self.setup.processes.count)
        scores = [s.score for s in samples if s.score is not None]
        mean = sum(scores) / len(scores) if scores else float("nan")
        numbers = {} if self.setup.reward.is_none else {self.setup.reward.property or "reward": mean}
        if task.headline != "mean" and numbers:
            shown = [s.measures[task.headline] for s in samples if task.headline in s.measures]
            title = fill(find_column(task.headline).title, {"target": self.setup.config.target})
            numbers[title] = sum(shown) / len(shown) if shown else float("nan")
        numbers |= waiting_for((self.setup.reward, *self.setup.judges))
        self.listen(Progress(f"evaluating: {name}", done, self.total, numbers))

    def _write_evaluation(
        self, table: list[TableRow], samples: dict[str, list[Sample]], step: int, about: dict[str, Any]
    ) -> None:
        setup, config = self.setup, self.setup.config
        rows = [{"row": name, **vars(sample)} for name, part in samples.items() for sample in part]
        setup.folder.write_rows("evaluation.jsonl", rows)
        about |= describe_evaluation(
            self._measured(setup.held_out_sampling()),
            setup.task,
            config.target,
            config.evaluate_on,
            config.guidances(),
            measuring_model(config.model, "sampled"),
            [setup.sampling_dtype],
        )
        summary = summarise([MeasuredRow(row.name, row.on_curves, samples[row.name]) for row in table], about)
        setup.folder.write_json("evaluation.json", summary)
        for row in summary["rows"]:
            numbers = {f"{row['name']}/{name}": value["value"] for name, value in row["metrics"].items()}
            trackers.track(setup.accelerator, {"kind": "evaluation", "step": step, **numbers})

    # ---------------------------------------------------------------- the end

    def export(self, kept: dict[str, Any] | None) -> None:
        """Write the model and the report; from here on the run is a finished one.

        Args:
            kept: which round's weights it has, and why, if rounds were compared.
        """
        setup = self.setup
        self.listen(Progress("writing the model and the report", 0, 1))
        exported = whole_copy(setup.policy, setup.policy.stored_dtype)

        def write() -> None:
            with replacing_folder(setup.folder / "model") as scratch:
                how = generation_settings(evaluation_sampling(setup.config))
                write_export(setup.policy, scratch, exported, how, untie=setup.checked.untie)
                if setup.config.export_adapter:
                    # The very weights: an export's own card names the base that it was made from.
                    write_adapter(setup.policy, scratch, self._base_for_others())
            setup.folder.add_end(self._end(kept))
            run = read_run(setup.folder.at)
            write_report(setup.folder.at, run)
            write_card(setup.folder / "model", run, setup.config)
            setup.folder.finish()

        setup.processes.on_rank_0(write)
        self.listen(Progress("writing the model and the report", 1, 1))

    def _base_for_others(self) -> str:
        """What the adapter calls its base model: as the run does, but on the hub no folder of a machine."""
        model = self.setup.config.model or EMBEDDED_MODEL
        if self.setup.config.push_to_hub is None or not Path(model).is_dir():
            return model
        return find_base(model).hub_name or Path(model).resolve().name

    def _end(self, kept: dict[str, Any] | None) -> dict[str, Any]:
        """What the record of a finished run says of its end."""
        assert self.work.journal.spent is not None
        spent = self.work.journal.spent()
        minutes = round(spent["seconds"] / 60, 1 if spent["seconds"] > 600 else 2)
        found: dict[str, Any] = {"minutes": minutes, "memory_gb": round(spent["memory_gb"], 2)}
        if self.setup.config.eval:
            return found
        # What an evaluation would say; ``quark_fast.evaluate`` asks the record for the scorer.
        left_out = {"evaluation": NOT_EVALUATED, "scorer": scorer_in_words(self.setup.reward)}
        return found | left_out | ({} if kept is None else {"kept_round": kept})

    def upload(self) -> None:
        """The finished model to the hub, if asked to.

        Raises:
            NotUploaded: it failed; the run is finished all the same. On rank 0 alone: an error of the others
                would have their launcher end it before it has shown the results.
        """
        setup, config = self.setup, self.setup.config
        if not config.push_to_hub:
            return
        repo, stage = config.push_to_hub, f"uploading the model to {config.push_to_hub}"
        self.listen(Progress(stage, 0, 1))

        def upload() -> str | NotUploaded:
            try:
                return hub.upload(setup.folder / "model", repo, config.hub_private_repo)
            except NotUploaded as error:
                return error

        found = setup.processes.on_rank_0(upload)
        if not isinstance(found, NotUploaded):
            self.listen(Progress(stage, 1, 1, note=f"model: {found}"))
        elif setup.processes.main:
            raise found
