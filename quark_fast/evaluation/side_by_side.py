"""Several models on the same prompts, side by side: runs, plain models, and tables made before."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from quark_fast.config import Config, numbers
from quark_fast.data.chat import chat_template
from quark_fast.data.prompts import load_prompts
from quark_fast.data.row import Row, given
from quark_fast.data.tokenizer import export_prefix
from quark_fast.errors import UsageError
from quark_fast.evaluation.held_out import evaluate, first_completions
from quark_fast.evaluation.modes import HeldOut, Mode, evaluation_sampling, modes
from quark_fast.evaluation.perplexity import Nll, id_nll, text_nll
from quark_fast.evaluation.prompt_classes import classify_prompts
from quark_fast.evaluation.subjects import (
    OUT_OF_DOMAIN,
    UNTOUCHED,
    Plain,
    Run,
    Saved,
    agree,
    check_comparable,
    field_of,
    find_subject,
    labels,
    model_name,
)
from quark_fast.evaluation.summary import classes_sha256, describe_evaluation, summary
from quark_fast.evaluation.trained_run import open_run
from quark_fast.metrics import Sample
from quark_fast.model.checks import check_reading
from quark_fast.model.loading import load_tokenizer
from quark_fast.model.policy import Policy
from quark_fast.model.structure import LONGEST_PROMPT
from quark_fast.report.tables import markdown_page
from quark_fast.rewards.reward import Function, Reward
from quark_fast.rollout.sampling import Conditioning
from quark_fast.runtime.machine import sampling_dtype
from quark_fast.runtime.run_folder import COMPLETIONS, HELD_OUT, REWARDS
from quark_fast.tasks.by_name import cached, choose_reward, find_task, refuse_code_of

# --------------------------------------------------------------------- evaluation


@dataclass
class _Domain:
    """One set of prompts, and each live subject's ids of it."""

    key: str  # "" or OUT_OF_DOMAIN
    source: str
    rows: list[Row]
    held_out: dict[str, HeldOut] = field(default_factory=dict)  # by label


@dataclass(frozen=True)
class _Open:
    """A subject that is loaded: who samples, and how."""

    policy: Policy
    model: Any
    reference: Callable[[], Any]
    modes: list[Mode]


@dataclass(frozen=True)
class _Line:
    """A row before its numbers: about holds what is told of it beside them."""

    name: str
    about: Mapping[str, Any]
    samples: list[Sample]


@dataclass(frozen=True)
class Evaluated:
    """A table, that of the out-of-domain prompts under ``out_of_domain`` in it, and the samples behind both.

    A sample is the fields of ``Sample`` and the name of its row, under ``row``; those of the second table are
    marked by ``out_of_domain``. Printed, it is its tables in Markdown.
    """

    table: dict[str, Any]
    samples: list[dict[str, Any]]

    def __str__(self) -> str:
        return markdown_page(self.table)


class Evaluator:
    """Any number of models on the same prompts, with one scorer, sampling, seed and perplexity model.

    Rows come in the order of the subjects; the first row is the one that the others' changes are against,
    paired by prompt. A run brings its modes, any other model one row. What stands before a prompt is, for a
    run's rows and for its untouched model, the run's own prefix (with the mode's reward token behind it); any
    other plain model gets what its own tokenizer puts before a text. Two runs of one model share its row.

    Args:
        subjects: run folders, transformers folders, hub names, and tables of earlier evaluations (FILE.json).
        task: what to measure, by that task's own scorer and on its own held-out prompts unless others are
            named; default: that of the runs, by their own reward and the first one's held-out prompts.
        target: sentiment of that task.
        prompts: a file or data set (``prompts.load_prompts``).
        prompt_column: where its prompts stand.
        out_of_domain: a second one, for a second table.
        out_of_domain_column: where its prompts stand; default: ``prompt_column``.
        reward: in any form of training, or a callable.
        scorer_label: label that a classifier of ``reward`` rewards.
        samples, temperature, top_p, max_new_tokens, min_new_tokens: the sampling; default: the first run's
            own, without a run the task's.
        guidance: values of w for the runs' guided rows, comma-separated; default: each run's own.
        seed: of the sampling.
        ppl_model: a causal model for the perplexity, by its own tokenizer on the completions' text; default:
            the first subject's untouched model, on the sampled tokens where all subjects share its tokenizer,
            else on the text.
        trust_remote_code: run the Python code that the models bring along.
        listen: called with (stage, done, total) now and then.
    Raises:
        UsageError: anything that is wrong with these, before anything is sampled.
    """

    def __init__(
        self,
        subjects: Sequence[str | Path],
        *,
        task: str | None = None,
        target: str | None = None,
        prompts: str | None = None,
        prompt_column: str | None = None,
        out_of_domain: str | None = None,
        out_of_domain_column: str | None = None,
        reward: str | Function | Reward | None = None,
        scorer_label: str | None = None,
        samples: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        max_new_tokens: int | None = None,
        min_new_tokens: int | None = None,
        guidance: str | None = None,
        seed: int = 0,
        ppl_model: str | None = None,
        trust_remote_code: bool = False,
        listen: Callable[[str, int, int], None] = lambda *_: None,
    ) -> None:
        if not subjects:
            raise UsageError("nothing to evaluate: name a run folder or a model")
        found = [find_subject(one) for one in subjects]
        self.subjects = dict(zip(labels(found), found, strict=True))
        self.live = {k: s for k, s in self.subjects.items() if not isinstance(s, Saved)}
        self.saved = {k: s for k, s in self.subjects.items() if isinstance(s, Saved)}
        self.listen, self.seed, self.trust = listen, seed, trust_remote_code
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.vocabularies: dict[str, dict[str, int]] = {}  # without reward tokens, by label
        self.guidance = None if guidance is None else numbers("guidance", guidance)
        self.remarks: list[str] = []
        self.domains: list[_Domain] = []
        self.tables: dict[str, dict[str, Any]] = {}
        sampling = {
            "eval_samples": samples,
            "eval_temperature": temperature,
            "eval_top_p": top_p,
            "max_new_tokens": max_new_tokens,
            "min_new_tokens": min_new_tokens,
        }
        if self.live:
            self._settle(task, target, reward, scorer_label, sampling)
            self._load_prompts(prompts, prompt_column, out_of_domain, out_of_domain_column or prompt_column)
            self._open_all()
            self._choose_perplexity(ppl_model)
            self._describe()
        else:
            others = (task, target, prompts, out_of_domain, reward, guidance, ppl_model, *sampling.values())
            if any(one is not None for one in others):
                raise UsageError(
                    "only tables are named, which are shown as they are: leave out what to measure and how to"
                    " sample, or name a run or a model, too"
                )
            self._describe_saved()
        for saved in self.saved.values():
            self._check_saved(saved)
        if self.live:
            self._check_reward()

    # ---------------------------------------------------------------- checks

    @property
    def _runs(self) -> dict[str, Run]:
        return {label: s for label, s in self.live.items() if isinstance(s, Run)}

    def _settle(
        self,
        task: str | None,
        target: str | None,
        reward: str | Function | Reward | None,
        scorer_label: str | None,
        sampling: Mapping[str, Any],
    ) -> None:
        """The task, its settings and the scorer."""
        runs = self._runs
        configs = {s.given: s.config for s in runs.values()}
        first = next(iter(configs.values()), None)
        if task is None and first is None:
            models = ", ".join(subject.given for subject in self.live.values())
            raise UsageError(f"{models}: no run folder here, so a model; name what to measure by --task")
        if task is None:
            agree(configs, "unlearned", _task_name, "name what to measure by --task")
        own_reward = reward is None and task is None and target is None
        wanted = {"task": task or getattr(first, "task", None), "target": target, **sampling}
        given = {name: value for name, value in wanted.items() if value is not None}
        self.own_task = first is not None and all(
            name not in given or given[name] == getattr(first, name) for name in ("task", "target")
        )
        if reward is None and scorer_label is not None:
            raise UsageError("--scorer-label names a label of --reward hf:NAME; give both")
        if own_reward:
            agree(
                configs,
                "was rewarded by",
                lambda c: f"{c.reward or 'its task'}{f' ({c.scorer_label})' if c.scorer_label else ''}",
                "name one scorer for all by --reward or --task",
            )
            for run in runs.values():
                refuse_code_of(run.folder, run.config.reward)
        else:
            given |= {"reward": reward if isinstance(reward, str) else None, "scorer_label": scorer_label}
        if first is not None and self.own_task:
            config = dataclasses.replace(first, **given)
        else:
            config = Config(**given)
            config.precision = config.precision if first is None else first.precision
        config.trust_remote_code = self.trust
        config.check()
        self.config, self.task = config, find_task(config.task, config.target)
        self.dtype = sampling_dtype(config.precision, self.device)
        self.reward = choose_reward(
            config, self.task, self.device, None if isinstance(reward, str) else reward
        )
        for run in runs.values() if own_reward else ():
            trained_on = _own_scorer(run)
            if trained_on != self.reward.name:
                raise UsageError(
                    f"the run's reward was {trained_on}, a function of its program: hand it over as reward=,"
                    " or name one by --reward"
                )

    def _load_prompts(
        self,
        prompts: str | None,
        column: str | None,
        out_of_domain: str | None,
        other_column: str | None,
    ) -> None:
        """Rows of both sets of prompts; the first live subject's chat template renders messages."""
        lead = next(iter(self.live.values()))
        chat = chat_template(lead.given, lambda: load_tokenizer(lead.tokenizer_at, self.trust))
        run = next(iter(self._runs.values()), None)
        if prompts:
            if column is None and run is not None and self.own_task:
                column = run.config.prompt_column
            loaded = load_prompts(prompts, column=column, chat=chat)
            self.remarks.append(f"{prompts}: {loaded.counts}")
            source, rows = prompts, loaded.rows
        elif run is not None and self.own_task:
            source = str(run.folder / HELD_OUT)
            rows = load_prompts(source).rows
        else:
            source, rows = f"the task's own ({self.task.name})", self.task.prompts()[1]
        self.domains.append(_Domain("", source, rows))
        if out_of_domain:
            loaded = load_prompts(out_of_domain, column=other_column, chat=chat)
            self.remarks.append(f"{out_of_domain}: {loaded.counts}")
            self.domains.append(_Domain(OUT_OF_DOMAIN, out_of_domain, loaded.rows))
        if run is not None:
            self.reward = cached(self.reward, self.config.reward_cache, run.folder / REWARDS)

    def _open_all(self) -> None:
        """Load every subject once and let it go again, so that what cannot be loaded shows now.

        The first one stays: its untouched model sorts prompts into classes and measures the perplexity.
        """
        self.lead = next(iter(self.live))
        # A plain model that a run started from gets that run's prefix: it is the run's untouched row.
        self.prefixes: dict[str, list[int]] = {}
        for run in self._runs.values():
            self.prefixes.setdefault(run.source, self._prefix_of(run))
        self.dtypes: set[torch.dtype] = set()
        self.untouched_by: dict[str, str] = {}  # which subject samples the untouched model of each kind
        for label in self.live:
            self.untouched_by.setdefault(self._untouched(label), label)
        for label in reversed(self.live):
            opened = self._open(label)
            if any(mode.untouched for mode in opened.modes) or label == self.lead:
                opened.reference()
            policy = opened.policy
            self.dtypes.add(opened.model.dtype)
            for domain in self.domains:
                rows, ids, texts = policy.encode_rows(
                    domain.rows,
                    policy.room_of(self.config),
                    self.config.prefix_tokens,
                    cut=self.config.long_prompts == "cut",
                    what=f"texts of {domain.source}",
                    # Of the others that other model's tokens are counted.
                    tell=self.remarks.append if label == self.lead else lambda _: None,
                )
                policy.check_fits(ids, self.config.max_new_tokens)
                domain.held_out[label] = HeldOut(rows, ids, self.config.eval_samples, texts)
            words = {token: i for token, i in policy.tokenizer.get_vocab().items() if i < policy.vocabulary}
            self.vocabularies[label] = words
        self.opened = opened
        for domain in self.domains if not self.config.prefix_tokens else ():
            self._keep_what_fits_all(domain)

    def _keep_what_fits_all(self, domain: _Domain) -> None:
        """Every row of a table is of the same prompts: none that is too long for one of the models."""
        fitting = [{given(row) for row in held.rows} for held in domain.held_out.values()]
        common = set.intersection(*fitting)
        if any(len(one) > len(common) for one in fitting):
            count = max(map(len, fitting)) - len(common)
            self.remarks.append(
                f"{count:,} texts of {domain.source} left out: too long for one of the models"
            )
        for label, held in domain.held_out.items():
            kept = [i for i, row in enumerate(held.rows) if given(row) in common]
            if not kept:
                raise UsageError(f"no text of {domain.source} is short enough for all of the models")
            rows, ids = [held.rows[i] for i in kept], [held.ids[i] for i in kept]
            domain.held_out[label] = dataclasses.replace(held, rows=rows, ids=ids)

    def _check_reward(self) -> None:
        """The first subject's completions of a few prompts are scored before the long work."""
        for domain in self.domains:
            held_out, how = domain.held_out[self.lead], evaluation_sampling(self.config)
            some = first_completions(self.opened.policy, self.opened.model, held_out, how, self.seed)
            self.reward.check(some)

    def _prefix_of(self, run: Run) -> list[int]:
        return export_prefix(load_tokenizer(run.tokenizer_at, self.trust))

    def _untouched(self, label: str) -> str:
        """One text for one untouched model with one prefix."""
        subject = self.live[label]
        prefix = self._prefix_of(subject) if isinstance(subject, Run) else self.prefixes.get(subject.source)
        return json.dumps([subject.source, prefix])

    def _open(self, label: str) -> _Open:
        """Load a subject, with the modes that it is to sample."""
        subject = self.live[label]
        samples_untouched = self.untouched_by[self._untouched(label)] == label
        if isinstance(subject, Plain):
            policy = Policy.plain(subject.given, self.dtype, self.prefixes.get(subject.source), self.trust)
            model = policy.freeze(self.device)
            check_reading(policy, model, [None] * 3)
            only = [Mode(UNTOUCHED, Conditioning(), untouched=True)] if samples_untouched else []
            return _Open(policy, model, lambda: model, only)
        finished = open_run(subject.folder, self.trust)
        guidance = subject.config.guidances() if self.guidance is None else self.guidance
        table = [
            mode
            for mode in modes(finished.policy.quantiles, guidance, subject.config.eval_quantiles == "all")
            if samples_untouched or not mode.untouched
        ]
        return _Open(finished.policy, finished.policy.model, lambda: finished.reference, table)

    def _choose_perplexity(self, ppl_model: str | None) -> None:
        """Who measures the perplexity: nll[key] for each set of prompts."""
        others = [label for label, v in self.vocabularies.items() if v != self.vocabularies[self.lead]]
        if others and self.config.prefix_tokens:
            raise UsageError(
                f"{self.lead} and {others[0]} have different tokenizers, but {self.task.name} counts tokens"
                f" (prefix_tokens = {self.config.prefix_tokens}): compare models of one tokenizer"
            )
        if others and any("messages" in row for domain in self.domains for row in domain.rows):
            raise UsageError(
                f"{self.lead} and {others[0]} have different tokenizers, which write messages differently:"
                " give prompts that are texts"
            )
        by_text = ppl_model is not None or bool(others)
        subject = self.live[self.lead]
        name = ppl_model or (subject.config.model if isinstance(subject, Run) else subject.given)
        self.perplexity = {"model": model_name(name), "tokens": "re-tokenised" if by_text else "sampled"}
        policy, model = self.opened.policy, self.opened.reference()
        if ppl_model is not None:
            policy = Policy.plain(ppl_model, self.dtype, trust_remote_code=self.trust)
            model = policy.freeze(self.device)
            check_reading(policy, model, [None] * 3)
        longest = self.config.max_prompt_tokens or LONGEST_PROMPT
        self.nll: dict[str, Nll] = {}
        for domain in self.domains:
            held_out = domain.held_out[self.lead]
            if not by_text:
                self.nll[domain.key] = id_nll(policy, model, held_out.ids)
                continue
            texts = [row["prompt"] for row in held_out.rows]
            room = policy.room(self.config.max_new_tokens, longest)
            every = [policy.encode(text) for text in texts]
            policy.check_fits([ids[-room:] for ids in every], self.config.max_new_tokens)
            if long := sum(len(ids) > room for ids in every):
                cut = f"{long:,} texts of {domain.source} cut to their last {room:,} tokens"
                self.remarks.append(f"{cut} for the perplexity")
            self.nll[domain.key] = text_nll(policy, model, texts, longest)

    def _describe(self) -> None:
        """The tables without their rows."""
        first = next(iter(self._runs.values()), None)
        own = [] if first is None else first.config.guidances()
        w = own if self.guidance is None else self.guidance
        for domain in self.domains:
            held_out = domain.held_out[self.lead]
            about = describe_evaluation(
                self.task,
                self.config.target,
                self.reward,
                self.opened.policy,
                evaluation_sampling(self.config),
                held_out,
                self.seed,
                w,
                self.perplexity,
                self.dtypes,
            )
            about["source"] = domain.source
            about["trained_on"] = {
                label: seen for label, run in self._runs.items() if (seen := _trained_on(run, held_out.rows))
            }
            self.tables[domain.key] = about

    def _describe_saved(self) -> None:
        """The tables of the first subject without their rows; nothing is to be sampled."""
        first, *others = self.saved.values()
        for key, table in first.tables.items():
            if without := [other.given for other in others if key not in other.tables]:
                self.remarks.append(f"{without[0]} has no table of out-of-domain prompts, so none is shown")
                continue
            self.task = find_task(str(table.get("task")), str(table.get("target")))
            shown = {"headline": self.task.headline, "columns": list(self.task.columns)}
            about = {name: value for name, value in table.items() if name not in ("rows", OUT_OF_DOMAIN)}
            self.tables[key] = about | shown | {"more_columns": list(self.task.more_columns)}

    def _check_saved(self, saved: Saved) -> None:
        name = "this evaluation" if self.live else next(iter(self.saved.values())).given
        for key, about in self.tables.items():
            if key not in saved.tables:
                raise UsageError(
                    f"{saved.given} has no table of out-of-domain prompts to stand beside the others; leave"
                    " --out-of-domain out, or make the table anew with it"
                )
            # What the classes of prompts are is only known once the untouched model was sampled.
            known = not (self.live and self.task.prompt_classes and about["classes_sha256"] is None)
            check_comparable(name, about, saved.given, saved.tables[key], classes=known)

    # ---------------------------------------------------------------- the work

    def evaluate(self) -> Evaluated:
        """Sample, score and measure what is not there yet; one table for each set of prompts."""
        if self.live and self.task.prompt_classes:
            self._classify()
        measured: dict[tuple[str, str], list[_Line]] = {}
        for label in self.live:
            opened = self.opened if label == self.lead else self._open(label)
            for domain in self.domains:
                measured[label, domain.key] = self._measure(label, opened, domain)
            del opened  # before the next one is loaded
        table: dict[str, Any] = {}
        samples: list[dict[str, Any]] = []
        for key, about in self.tables.items():
            lines: list[_Line] = []
            for label, subject in self.subjects.items():
                if isinstance(subject, Saved):
                    lines += self._saved_lines(label, subject, key, lines)
                else:
                    lines += measured[label, key]
            rows = [summary(line.name, line.samples, lines[0].samples, line.about) for line in lines]
            made = {**about, "rows": rows}
            table = table | {key: made} if key else made
            mark = {key: True} if key else {}
            samples += [{"row": line.name, **mark, **vars(one)} for line in lines for one in line.samples]
        return Evaluated(table, samples)

    def _classify(self) -> None:
        """Give every prompt the class that the first subject's untouched model puts it in."""
        for domain in self.domains:
            held_out = domain.held_out[self.lead]
            rows = [dict(row) for row in held_out.rows]
            if not all("prompt_class" in row for row in rows):
                found = classify_prompts(
                    self.opened.policy,
                    self.opened.reference(),
                    self.reward,
                    held_out,
                    evaluation_sampling(self.config),
                    self.config.seed,
                    self.config.target,
                )
                for done, (i, name) in enumerate(found, start=1):
                    rows[i]["prompt_class"] = name
                    self.listen("classes of the prompts" + _suffix(domain.key), done, len(rows))
            domain.held_out = {
                label: dataclasses.replace(one, rows=rows) for label, one in domain.held_out.items()
            }
            self.tables[domain.key]["classes_sha256"] = classes_sha256(self.task, rows)
        for saved in self.saved.values():
            self._check_saved(saved)

    def _measure(self, label: str, opened: _Open, domain: _Domain) -> list[_Line]:
        held_out = domain.held_out[label]
        names = {mode.name: self._row_name(label, mode) for mode in opened.modes}
        samples: dict[str, list[Sample]] = {mode.name: [] for mode in opened.modes}
        for name, part in evaluate(
            opened.policy,
            opened.model,
            opened.reference() if any(mode.untouched for mode in opened.modes) else None,
            self.reward,
            held_out,
            opened.modes,
            evaluation_sampling(self.config),
            self.seed,
            self.task.measures,
            nll=self.nll[domain.key],
        ):
            samples[name] += part
            total = len(held_out.rows) * held_out.samples
            self.listen(names[name] + _suffix(domain.key), len(samples[name]), total)
        subject = self.live[label]
        untouched = subject.config.model if isinstance(subject, Run) else subject.given
        front = opened.policy.tokenizer.decode(opened.policy.prefix)
        return [
            _Line(
                names[mode.name],
                {
                    **mode.places,
                    "model": model_name(untouched) if mode.untouched else subject.given,
                    "prefix": front,
                },
                samples[mode.name],
            )
            for mode in opened.modes
        ]

    def _row_name(self, label: str, mode: Mode) -> str:
        if not mode.untouched:
            return mode.name if len(self.subjects) == 1 else f"{label}: {mode.name}"
        kind = self._untouched(label)
        for other, subject in self.live.items():
            if isinstance(subject, Plain) and self._untouched(other) == kind:
                return other
        only_one = len(set(self.untouched_by)) == 1 and not self.saved
        return mode.name if only_one else f"{label}: {mode.name}"

    def _saved_lines(self, label: str, saved: Saved, key: str, before: Sequence[_Line]) -> list[_Line]:
        """The rows of a saved table; what stands there already, to the last sample, is not repeated."""
        table, lines = saved.tables[key], []
        for row in table["rows"]:
            samples = saved.samples[key][row["name"]]
            about = {n: row[n] for n in ("guidance", "quantile", "model", "prefix") if n in row}
            if row["name"] == UNTOUCHED:  # a run's own table says it once for all rows
                about = {"model": field_of(table, "perplexity", "model")} | about
            about = {"model": saved.given, "prefix": field_of(table, "sampling", "prefix")} | about
            if any(
                samples == one.samples and all(one.about[n] == about[n] for n in ("model", "prefix"))
                for one in before
            ):
                continue
            name = row["name"] if len(self.subjects) == 1 else f"{label}: {row['name']}"
            lines.append(_Line(name, about, samples))
        return lines


def _suffix(key: str) -> str:
    return ", out of domain" if key else ""


def _task_name(config: Config) -> str:
    return f"{config.task} to {config.target}" if config.task == "sentiment" else config.task


def _own_scorer(run: Run) -> str:
    """The scorer of the run's own evaluation."""
    path = run.folder / "evaluation.json"
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["scorer"]["name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} does not say what the run's scorer was; name one by --reward") from error


def _trained_on(run: Run, rows: Sequence[Row]) -> int:
    """How many of the prompts the run was trained on: its first round sampled each of its own."""
    asked = {row["prompt"] for row in rows}
    seen: set[str] = set()
    with (run.folder / COMPLETIONS).open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            if row["round"] != 0:
                break
            seen.add(row["prompt"])
    return len(asked & seen)
