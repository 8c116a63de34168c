"""Several models on the same prompts, side by side: runs, plain models, and tables made before."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from quark_fast.config import Config
from quark_fast.data.row import Prompt, Row, is_chat
from quark_fast.errors import UsageError
from quark_fast.evaluation.held_out import (
    EvaluationSetup,
    control_texts,
    evaluate,
    evaluation_sampling,
    first_completions,
)
from quark_fast.evaluation.open_models import Models, OpenModel, open_plain
from quark_fast.evaluation.perplexity import Nll, id_nll, text_nll
from quark_fast.evaluation.prompt_classes import classify_prompts
from quark_fast.evaluation.protocol import (
    PromptSet,
    chats_as_written,
    check_chats,
    choose_protocol,
    load_prompt_sets,
)
from quark_fast.evaluation.saved_tables import (
    SavedTable,
    check_saved,
    described_tables,
    judges_of_tables,
    with_other_texts,
    with_those_beside,
)
from quark_fast.evaluation.subjects import (
    Model,
    Named,
    Plain,
    Run,
    find_subjects,
    how_trained,
    measuring_model,
    model_name,
)
from quark_fast.evaluation.summary import (
    MeasuredRow,
    classes_sha256,
    describe_evaluation,
    summarise,
    what_was_cut,
    without_texts,
)
from quark_fast.evaluation.table_rows import TableRow
from quark_fast.metrics import Sample
from quark_fast.model.policy import Policy
from quark_fast.model.structure import LONGEST_PROMPT
from quark_fast.report.columns import counted
from quark_fast.report.tables import as_text, markdown_page
from quark_fast.tasks.by_name import GivenReward

Listen = Callable[[str, int, int], None]
T = TypeVar("T")


@dataclass(frozen=True, repr=False)
class Evaluated:
    """A table, that of the out-of-domain prompts under ``out_of_domain`` in it, and the samples behind both.

    A sample is the fields of ``Sample`` and the name of its row, under ``row``; those of the second table are
    marked by ``out_of_domain``. Shown, it is its headline and its tables, as a run is.
    """

    table: dict[str, Any]
    samples: list[dict[str, Any]]

    def __repr__(self) -> str:
        return as_text(self.table)

    def markdown(self) -> str:
        """Its tables with every metric in Markdown, as ``--markdown`` writes them."""
        return markdown_page(self.table)


def _check_rows(models: Sequence[Model], rows: str | None, guidance: str | None) -> list[str]:
    """``rows`` and ``guidance`` choose among the reward tokens of runs; a model as it is has one row.

    Returns:
        A remark on each run that has fewer rows than others, or whose reward is not known.
    """
    if rows == "best" and guidance:
        raise UsageError(
            f"guidance = {guidance!r} asks for rows that rows = 'best' leaves out; give one of the two"
        )
    runs = [model for model in models if isinstance(model, Run)]
    for name, value in (("rows", rows), ("guidance", guidance)):
        if value and not runs:
            raise UsageError(
                f"{name} = {value!r} is of a run's reward tokens, but no run is named; give a run's folder,"
                f" not its model/, or leave {name} out"
            )
    alone = [run.given for run in runs if run.config.one_token]
    if guidance and alone and len(alone) == len(runs):
        raise UsageError(
            f"guidance = {guidance!r} moves away from the worst reward token, but {alone[0]} trained one"
            " token alone; leave guidance out"
        )
    remarks = [f"{run.unknown_reward}, so a judge may have rewarded it" for run in runs if not run.scorers()]
    if rows != "best":
        fewer = "trained one reward token alone: no row of the worst, nor a guided one"
        remarks += [f"{run} {fewer}" for run in alone]
    return remarks


def _said_of_repeated(repeated: Mapping[str, Mapping[str, str]]) -> list[str]:
    """What is said of the rows of each table that another has, too."""
    return [
        f"{given}: {counted(len(same), 'row')} left out, the same to the last sample as"
        f" {'one' if len(same) == 1 else 'those'} of {' and '.join(dict.fromkeys(same.values()))}"
        for given, same in repeated.items()
        if same
    ]


def _refuse_for_tables(asked: Sequence[Any], judge: str | None, score_batch: int | None) -> None:
    """Saved tables alone are shown as they are: nothing can be asked of them, but by a judge."""
    if any(one is not None for one in asked) or (judge is None and score_batch is not None):
        raise UsageError(
            "only tables are named, which are shown as they are: leave out what to measure and how to"
            " sample, or name a run or a model, too"
        )


class Evaluator:
    """Any number of models on the same prompts, with one scorer, sampling, seed and perplexity model.

    Rows come in the order of the subjects; the first row is the one that the others' changes are against,
    paired by prompt. A run brings several, any other model one row. What stands before a prompt is, for a
    run's rows and for its base model, the run's own prefix (with the row's reward token after it); any
    other plain model gets what its tokenizer or chat template puts there. Runs of one model share its row.

    Args:
        subjects: run folders, transformers folders, hub names, tables (FILE.json); one of them, or several.
        task: what to measure, by that task's own scorer and on its own held-out prompts unless others are
            named; default: that of the runs, by their own reward and the first one's held-out prompts. Plain
            models need none where both ``reward`` and ``prompts`` are given.
        target: sentiment of that task.
        prompts: a file or data set (``prompts.load_prompts``), or a list in any form of training.
        prompt_column: where its prompts stand.
        out_of_domain: a second one, for a second table.
        out_of_domain_column: where its prompts stand; default: ``prompt_column``.
        reward: in any form of training, a callable, or a list of them, which are added up.
        judge: scorers beside it, as ``judge`` of training; default: the first run's own; without one, or for
            another task than its own, the task's. Of tables alone, their samples are judged as they are.
        scorer_label: label that a classifier of ``reward`` rewards.
        samples, temperature, top_p, max_new_tokens, min_new_tokens: the sampling; default likewise.
        rows: which rows a run brings, "ends", "all" or "best" as ``eval_rows`` of training; default: each
            run's own, but "ends" in place of "best" where ``guidance`` is given.
        guidance: values of w for the runs' guided rows, comma-separated; default: each run's own.
        seed: of the sampling.
        ppl_model: a causal model for the perplexity, by its own tokenizer on the completions' text; default:
            the first subject's base model, on the sampled tokens where all subjects share its tokenizer,
            else on the text.
        sample_at_once, read_batch, score_batch: as of training; default: the first run's own; without
            one, or for another task than its own, 0.
        trust_remote_code: run the Python code that the models bring along.
        listen: called with (stage, done, total) now and then.
    Raises:
        UsageError: anything that is wrong with these, before anything is sampled.
    """

    def __init__(
        self,
        subjects: Named | Sequence[Named],
        *,
        task: str | None = None,
        target: str | None = None,
        prompts: Named | Sequence[Prompt] | None = None,
        prompt_column: str | None = None,
        out_of_domain: Named | Sequence[Prompt] | None = None,
        out_of_domain_column: str | None = None,
        reward: str | GivenReward | None = None,
        judge: str | None = None,
        scorer_label: str | None = None,
        samples: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        max_new_tokens: int | None = None,
        min_new_tokens: int | None = None,
        rows: str | None = None,
        guidance: str | None = None,
        seed: int = 0,
        ppl_model: str | None = None,
        sample_at_once: int | None = None,
        read_batch: int | None = None,
        score_batch: int | None = None,
        trust_remote_code: bool = False,
        listen: Listen = lambda *_: None,
    ) -> None:
        Config(seed=seed).check()
        self.subjects = find_subjects(subjects)
        self.live = {label: s for label, s in self.subjects.items() if not isinstance(s, SavedTable)}
        self.saved = [subject for subject in self.subjects.values() if isinstance(subject, SavedTable)]
        self.listen, self.seed = listen, seed
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.remarks: list[str] = []
        self.domains: list[PromptSet] = []
        modes = {"eval_rows": rows, "eval_guidance": guidance}
        asked: dict[str, Any] = {
            **modes,
            "task": task,
            "target": target,
            "scorer_label": scorer_label,
            "eval_samples": samples,
            "eval_temperature": temperature,
            "eval_top_p": top_p,
            "max_new_tokens": max_new_tokens,
            "min_new_tokens": min_new_tokens,
            "sample_at_once": sample_at_once,
            "read_batch": read_batch,
        }
        own, other = (prompts, prompt_column), (out_of_domain, out_of_domain_column or prompt_column)
        if not self.live:
            _refuse_for_tables([*asked.values(), *own, *other, reward, ppl_model], judge, score_batch)
            self._take_tables(judge, score_batch or 0)
            return
        models = list(self.live.values())
        self.remarks += _check_rows(models, rows, guidance)
        asked |= {"judge": judge, "score_batch": score_batch}
        self.protocol = choose_protocol(models, asked, reward, self.device, trust_remote_code)
        self.config, self.reward = self.protocol.config, self.protocol.reward
        self.domains = load_prompt_sets(models, self.protocol, own, other, self.remarks.append)
        self.models = Models(self.live, self.protocol, modes, self.domains)
        self._open_all()
        self._choose_perplexity(ppl_model)
        self.tables = {domain.key: self._describe(domain) for domain in self.domains}
        check_saved("this evaluation", self.tables, self.saved, self.protocol.task.prompt_classes)
        self.other_texts = with_other_texts(self.tables, self.saved, self.remarks.append)
        self._check_reward()

    # ---------------------------------------------------------------- checks

    def _take_tables(self, judge: str | None, score_batch: int) -> None:
        """Saved tables alone: there is nothing to load and to sample, but perhaps a judge to ask."""
        self.tables = described_tables(self.saved, self.remarks.append)
        if judge is not None:  # it judges all of them anew, whoever did before
            self.tables = {key: {**table, "judges": []} for key, table in self.tables.items()}
        check_saved(self.saved[0].given, self.tables, self.saved)
        self.other_texts = with_other_texts({}, self.saved, self.remarks.append)
        if judge is not None:
            judges = judges_of_tables(judge, self.tables, self.device, score_batch)
            judged = (one.judged(judges) for one in self.saved)
            self.subjects = dict(zip(self.subjects, judged, strict=True))

    def _open_all(self) -> None:
        """Load every model once and let it go again, so that what cannot be loaded shows now.

        The first one stays: its base model sorts prompts into classes and measures the perplexity.
        """
        self.lead = next(iter(self.live))
        self.dtypes: set[torch.dtype] = set()
        self.vocabularies: dict[str, dict[str, int]] = {}  # without reward tokens, by label
        chats: dict[str, list[str] | None] = {}
        for label in _counted("loading the models", list(reversed(self.live)), self.listen):
            opened = self.models.open(label)
            if opened.samples_base or label == self.lead:
                opened.reference()
            policy = opened.policy
            self.dtypes.add(policy.model.dtype)
            said: list[str] = []
            for domain in self.domains:
                domain.encode(label, policy, self.config, said.append)
            rows = [row for domain in self.domains for row in domain.rows]
            chats[label] = chats_as_written(rows, label, policy.tokenizer)
            # Each model has its own tokens and positions, so prompts are cut, or left out, by each.
            self.remarks += said if len(self.live) == 1 else [f"{label}: {one}" for one in said]
            words = policy.tokenizer.get_vocab().items()
            self.vocabularies[label] = {token: i for token, i in words if i < policy.vocabulary}
        self.opened = opened
        check_chats({label: chats[label] for label in self.live})
        for domain in self.domains if not self.config.prefix_tokens else ():
            domain.keep_what_fits_all(self.remarks.append)

    def _choose_perplexity(self, ppl_model: str | None) -> None:
        """Who measures the perplexity: nll[key] for each set of prompts."""
        others = [label for label, v in self.vocabularies.items() if v != self.vocabularies[self.lead]]
        self.one_tokenizer = not others
        task = self.protocol.task.name
        if others and self.config.prefix_tokens:
            raise UsageError(
                f"{self.lead} and {others[0]} have different tokenizers, but {task} counts tokens"
                f" (prefix_tokens = {self.config.prefix_tokens}): compare models of one tokenizer"
            )
        if others and any(is_chat(row) for domain in self.domains for row in domain.rows):
            raise UsageError(
                f"{self.lead} and {others[0]} have different tokenizers, which write messages differently:"
                " give prompts that are texts"
            )
        by_text = ppl_model is not None or bool(others)
        tokens = "re-tokenised" if by_text else "sampled"
        self.perplexity = measuring_model(ppl_model or self.live[self.lead].base, tokens)
        policy, model = self.opened.policy, self.opened.reference()
        if ppl_model is not None:
            policy = open_plain(ppl_model, self.protocol)
            model = policy.model
        self.nll: dict[str, Nll] = {}
        for domain in self.domains:
            held_out = domain.held_out[self.lead]
            if by_text:
                given = (domain.source, held_out.rows, self.config)
                self.nll[domain.key], cut = _nll_of_texts(policy, model, *given)
                self.remarks += [cut] if cut else []
            else:
                self.nll[domain.key] = id_nll(policy, model, held_out.ids, self.config.read_batch)

    def _describe(self, domain: PromptSet) -> dict[str, Any]:
        """A table without its rows."""
        setup = self._setup(self.lead, self.opened, domain)
        runs = {label: model for label, model in self.live.items() if isinstance(model, Run)}
        w = [w for run in runs.values() for w in self.models.settings_of(run).guidances()]
        target, task = self.config.target, self.protocol.task
        about = describe_evaluation(setup, task, target, domain.split, w, self.perplexity, self.dtypes)
        about |= {"source": domain.source, "cut": what_was_cut(domain.held_out)}
        return about | how_trained(runs, setup.held_out.rows)

    def _check_reward(self) -> None:
        """The first model's completions of a few prompts are scored before the long work."""
        how, policy = evaluation_sampling(self.config), self.opened.policy
        each = list(itertools.product(self.domains, (self.reward, *self.protocol.judges)))
        for domain, scorer in _counted("trying out what scores", each, self.listen):
            held_out = domain.held_out[self.lead]
            scorer.check(first_completions(policy, policy.model, held_out, how, self.seed))

    # ---------------------------------------------------------------- the work

    def evaluate(self) -> Evaluated:
        """Sample, score and measure what is not there yet; one table for each set of prompts."""
        if self.live and self.protocol.task.prompt_classes and not self.protocol.reward.is_none:
            self._classify()
        measured: dict[tuple[str, str], list[MeasuredRow]] = {}
        for label in self.live:
            opened = self.opened if label == self.lead else self.models.open(label)
            for domain in self.domains:
                measured[label, domain.key] = self._measure(label, opened, domain)
            del opened  # before the next one is loaded
        table: dict[str, Any] = {}
        samples: list[dict[str, Any]] = []
        repeated: dict[str, dict[str, str]] = {}  # table -> its row that is left out -> whose it is, too
        for key, about in self.tables.items():
            rows, owners, beside = list[MeasuredRow](), list[str](), dict[str, SavedTable]()
            for label, subject in self.subjects.items():
                if isinstance(subject, SavedTable):
                    own, same = subject.rows(key, "" if len(self.subjects) == 1 else f"{label}: ", rows)
                    repeated.setdefault(subject.given, {}).update({n: owners[i] for n, i in same.items()})
                    beside |= {label: subject} if own else {}
                else:
                    own = measured[label, key]
                rows += own
                owners += [subject.given] * len(own)
            about = with_those_beside(about, key, beside, live=bool(self.live))
            if key in self.other_texts:
                rows, about = [without_texts(row) for row in rows], about | {"text_tokens_sha256": None}
            made = summarise(rows, about)
            table = table | {key: made} if key else made
            mark = {key: True} if key else {}
            samples += [{"row": row.name, **mark, **vars(one)} for row in rows for one in row.samples]
        self.remarks += _said_of_repeated(repeated)
        return Evaluated(table, samples)

    def _setup(self, label: str, opened: OpenModel, domain: PromptSet) -> EvaluationSetup:
        reference = opened.reference() if opened.samples_base or label == self.lead else None
        held_out, sampling = domain.held_out[label], evaluation_sampling(self.config)
        return EvaluationSetup(
            opened.policy,
            reference,
            self.reward,
            held_out,
            sampling,
            self.seed,
            judges=self.protocol.judges,
            # Accuracies of a next token compare between models of one tokenizer.
            controls=control_texts(opened.policy, self.protocol.texts) if self.one_tokenizer else [],
            prompt_fit=self.protocol.task.shows("prompt_fit"),
            read_rows=self.config.read_batch,
            own_nll=self.perplexity["tokens"] == "sampled",
        )

    def _classify(self) -> None:
        """Give every prompt the class that the first model's base model puts it in."""
        for domain in self.domains:
            setup = self._setup(self.lead, self.opened, domain)
            rows = [dict(row) for row in setup.held_out.rows]
            if not all(row.get("prompt_class") for row in rows):
                # The run's own seed: the classes are the same whatever seed the samples are drawn with.
                setup = dataclasses.replace(setup, seed=self.config.seed)
                found, stage = classify_prompts(setup, self.config.target), "classes of the prompts"
                self.listen(domain.stage(stage), 0, len(rows))
                for done, (i, name) in enumerate(found, start=1):
                    rows[i]["prompt_class"] = rows[i].get("prompt_class") or name
                    self.listen(domain.stage(stage), done, len(rows))
                domain.set_classes(rows)
            self.tables[domain.key]["classes_sha256"] = classes_sha256(self.protocol.task, rows)
        check_saved("this evaluation", self.tables, self.saved, self.protocol.task.prompt_classes)

    def _measure(self, label: str, opened: OpenModel, domain: PromptSet) -> list[MeasuredRow]:
        """The rows of one model."""
        setup = self._setup(label, opened, domain)
        total = len(setup.held_out.rows) * setup.held_out.samples
        names = {row.name: self._row_name(label, row) for row in opened.rows}
        samples: dict[str, list[Sample]] = {row.name: [] for row in opened.rows}
        # The lead's is what ``evaluate`` takes by default, without a second reading of its own text.
        default = label == self.lead and self.perplexity["tokens"] == "sampled"
        measures, nll = self.protocol.task.measures, None if default else self.nll[domain.key]
        stages = {name: domain.stage(own) for name, own in names.items()}
        parts = evaluate(setup, opened.policy.model, opened.rows, measures, nll)
        for name, part in _reported(parts, stages, total, self.listen):
            samples[name] += part
        prefix = opened.policy.tokenizer.decode(opened.policy.prefix)
        rows = []
        for row in opened.rows:
            model = model_name(self.live[label].base) if row.base else self.live[label].given
            about = {**row.on_curves, "model": model, "prefix": prefix}
            rows.append(MeasuredRow(names[row.name], about, samples[row.name]))
        return rows

    def _row_name(self, label: str, row: TableRow) -> str:
        """The base model's row has the name of the plain model that it is, if that is compared, too."""
        same = self.models.same_base(label) if row.base else [label]
        for other in same if row.base else ():
            if isinstance(self.live[other], Plain):
                return other
        return row.name if len(same) == len(self.subjects) else f"{label}: {row.name}"


def _nll_of_texts(
    policy: Policy, model: Any, source: str, rows: Sequence[Row], config: Config
) -> tuple[Nll, str]:
    """(who reads texts after these prompts, cut to what it has room for; a remark, where any was cut)."""
    longest = config.max_prompt_tokens or LONGEST_PROMPT
    texts = [row["prompt"] for row in rows]
    room = policy.room(config.max_new_tokens, longest)
    every = [policy.encode(text, chat=is_chat(row)) for text, row in zip(texts, rows, strict=True)]
    policy.check_fits([ids[-room:] for ids in every], config.max_new_tokens)
    long = sum(len(ids) > room for ids in every)
    cut = f"{long:,} texts of {source} cut to their last {room:,} tokens for the perplexity" if long else ""
    return text_nll(policy, model, texts, longest, config.read_batch), cut


def _counted(stage: str, items: Sequence[T], listen: Listen) -> Iterator[T]:
    """The items; ``listen`` hears how many are done before each of them.

    Not at the end, of which a log would keep a line: where something is refused, it has the reason alone.
    """
    for done, item in enumerate(items):
        listen(stage, done, len(items))
        yield item


def _reported(
    parts: Iterable[tuple[str, list[Sample]]], stages: Mapping[str, str], total: int, listen: Listen
) -> Iterator[tuple[str, list[Sample]]]:
    """The parts of a table's rows; ``listen`` hears of each row when it begins, and of each part.

    Args:
        stages: what each row is called, in their order. total: samples of a row.
    """
    done, ahead = Counter[str](), iter(stages.values())
    for stage in itertools.islice(ahead, 1):
        listen(stage, 0, total)
    for name, part in parts:
        yield name, part
        done[name] += len(part)
        listen(stages[name], done[name], total)
        if done[name] == total:
            for stage in itertools.islice(ahead, 1):
                listen(stage, 0, total)
