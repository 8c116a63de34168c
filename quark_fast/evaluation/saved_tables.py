"""Tables of earlier evaluations: read, checked, and compared with another table."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quark_fast.config import Config
from quark_fast.errors import UsageError
from quark_fast.evaluation.judging import described, judged
from quark_fast.evaluation.summary import THE_MIX, MeasuredRow, beyond_the_mix, shown_metrics
from quark_fast.files.safe_read import read_bytes
from quark_fast.metrics import LARGEST, Sample
from quark_fast.report.columns import counted
from quark_fast.report.records import cuts_of, judges_of, number_of, samples_path, scorer_terms
from quark_fast.report.results import BASE, rows_of, without_reward
from quark_fast.rewards.reward import IDENTITY, Reward
from quark_fast.tasks.by_name import choose_judges, find_task

OUT_OF_DOMAIN = "out_of_domain"  # the key of the second table, and the mark of its samples


@dataclass(frozen=True)
class SavedTable:
    """A table of an earlier evaluation, with the samples behind it."""

    given: str
    tables: Mapping[str, Mapping[str, Any]]  # "" and OUT_OF_DOMAIN -> table
    samples: Mapping[str, Mapping[str, list[Sample]]]  # the same -> row -> samples

    def judged(self, judges: Sequence[Reward]) -> SavedTable:
        """The same with these judges' measures in its samples."""
        samples = {
            key: {name: judged(judges, part) for name, part in rows.items()}
            for key, rows in self.samples.items()
        }
        return dataclasses.replace(self, samples=samples)

    def rows(
        self, key: str, front: str, before: Sequence[MeasuredRow]
    ) -> tuple[list[MeasuredRow], dict[str, int]]:
        """(the rows of a table, ``front`` before their names, without those whose samples equal a row's of
        ``before``; the names of these -> the index of the row that each equals)."""
        table, rows, repeated = self.tables[key], list[MeasuredRow](), dict[str, int]()
        for row in table["rows"]:
            samples = self.samples[key][row["name"]]
            about = {n: row[n] for n in ("guidance", "quantile", "model", "prefix") if n in row}
            if row["name"] == BASE:  # a run's own table says it once for all rows
                about = {"model": field_of(table, "perplexity", "model")} | about
            about = {"model": self.given, "prefix": field_of(table, "sampling", "prefix")} | about
            for i, one in enumerate(before):
                if samples == one.samples and all(one.about[n] == about[n] for n in ("model", "prefix")):
                    repeated[row["name"]] = i
                    break
            else:
                rows.append(MeasuredRow(front + row["name"], about, samples))
        return rows, repeated


def read_table(path: Path) -> SavedTable:
    """A table and its samples, every number of which is checked: the two files may be anyone's."""
    try:
        table = json.loads(read_bytes(path))
        lines = read_bytes(samples_path(path)).split(b"\n")
    except OSError as error:
        raise UsageError(
            f"{error.filename} cannot be read: {error.strerror}; a table is FILE.json with the samples behind"
            " it in FILE.jsonl"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no table of an evaluation: {error}") from error
    tables = {"": table}
    if isinstance(table, dict) and OUT_OF_DOMAIN in table:
        tables[OUT_OF_DOMAIN] = table[OUT_OF_DOMAIN]
    samples: dict[str, dict[str, list[Sample]]] = {
        key: {name: [] for name in _row_names(path, one)} for key, one in tables.items()
    }
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            key = OUT_OF_DOMAIN if row.pop(OUT_OF_DOMAIN, False) else ""
            samples[key][row.pop("row")].append(_sample(row))
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise UsageError(
                f"{samples_path(path)}:{number} is no sample of {path.name}: {type(error).__name__}: {error}"
            ) from error
    for key, of_row in samples.items():
        prompts, each = tables[key]["prompts"], tables[key]["samples_per_prompt"]
        for name, found in of_row.items():
            # Counted first: a table may name any numbers, and a list of so many fill the memory.
            whole = len(found) == prompts * each > 0
            if not whole or sorted(one.prompt_id for one in found) != [i // each for i in range(len(found))]:
                raise UsageError(
                    f"{samples_path(path)} has not {each} samples of each of {prompts} prompts for the row"
                    f" {name!r}, as {path.name} tells: the two do not belong together"
                )
    return SavedTable(str(path), tables, samples)


def _row_names(path: Path, table: Any) -> list[str]:
    """The names of a table's rows, once its other fields are what they must be."""
    kinds = {"rows": list, "scorer": dict, "sampling": dict, "prompts": int, "samples_per_prompt": int}
    if isinstance(table, dict):
        kinds |= {name: dict for name in ("perplexity", "trained_on", "trained_by") if name in table}
    for name, kind in kinds.items():
        if not isinstance(table, dict) or not isinstance(table.get(name), kind):
            raise UsageError(f"{path} is no table of an evaluation: no {name!r} of one in it")
    names = [row.get("name") if isinstance(row, dict) else None for row in table["rows"]]
    if not names or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise UsageError(f"{path} is no table of an evaluation: its rows need a name each")
    return [str(name) for name in names]


def _sample(fields: dict[str, Any]) -> Sample:
    """A sample of a file; TypeError or ValueError for one that cannot be."""
    made = Sample(**fields)
    optional = [0.0 if one is None else one for one in (made.score, made.own_nll)]
    numbers = [made.nll, made.text_nll, *made.measures.values(), *optional]
    counts = [made.prompt_id, made.tokens, made.text_correct, made.text_tokens]
    if not isinstance(made.prompt, str) or not isinstance(made.completion, str):
        raise TypeError("prompt and completion need to be texts")
    if not all(isinstance(n, int) and 0 <= n < 2**53 for n in counts):
        raise TypeError("prompt_id, tokens, text_correct and text_tokens need to be counts")
    if not all(abs(n) < LARGEST for n in numbers):
        raise ValueError(f"a number is not finite, or beyond {LARGEST:g}")
    return made


def described_tables(saved: Sequence[SavedTable], remark: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """The first one's tables without their rows, with the judges of all, for saved tables alone."""
    first, *others = saved
    tables = {}
    for key, table in first.tables.items():
        if without := [other.given for other in others if key not in other.tables]:
            remark(f"{without[0]} has no table of out-of-domain prompts, so none is shown")
            continue
        task = find_task(str(table.get("task")), str(table.get("target")))
        about = {name: value for name, value in table.items() if name not in ("rows", OUT_OF_DOMAIN)}
        judges = dict[str, Mapping[str, Any]]()
        for judge in (judge for one in saved for judge in judges_of(one.tables[key])):
            judges.setdefault(str(judge.get("name")), judge)
        about["judges"] = list(judges.values())
        tables[key] = about | shown_metrics(task, scored=not without_reward(table))
    return tables


def with_those_beside(
    about: Mapping[str, Any], key: str, saved: Mapping[str, SavedTable], live: bool
) -> dict[str, Any]:
    """A table without its rows, as it holds for those of saved tables, too.

    It has every seed and dtype, every run that was trained on the prompts, and what rewarded each. The round
    that a run kept is left out, as it is of its own rows alone.

    Args:
        saved: those that have rows in the table, by their short names.
        live: ``about`` is of models that are sampled, else of the first of these.
    """
    if not live and len(saved) == 1:
        return dict(about)
    every = [*([about] if live else []), *(one.tables[key] for one in saved.values())]
    sampling = dict(about["sampling"])
    trained = {name: dict(about[name] if live else {}) for name in ("trained_on", "trained_by")}
    for name in ("seed", "dtype"):
        known = [str(value) for one in every if (value := field_of(one, "sampling", name)) is not None]
        if len(set(known)) > 1:
            sampling[name] = " and ".join(dict.fromkeys(" and ".join(known).split(" and ")))
    if nucleus := next(filter(None, map(_guided_nucleus, every)), None):
        sampling["guided_nucleus"] = nucleus
    for label, one in saved.items():
        for name, of_runs in trained.items():
            own = one.tables[key].get(name, {})
            of_runs |= {f"{label}: {run}": value for run, value in own.items()}
    shared = {name: value for name, value in about.items() if name != "kept_round"}
    return shared | {"sampling": sampling} | trained


def judges_of_tables(
    judge: str, tables: Mapping[str, dict[str, Any]], device: torch.device, score_batch: int = 0
) -> tuple[Reward, ...]:
    """The judges that ``judge`` names for the samples of saved tables, put down in ``tables``."""
    about = tables[""]
    config = Config(task=str(about.get("task")), target=about.get("target") or "positive", judge=judge)
    config.score_batch = score_batch
    config.check()
    task = find_task(config.task, config.target)
    trained_by, *of_sum = (
        [str(one.get(key)) for key in IDENTITY] for one in (about["scorer"], *scorer_terms(about))
    )
    # The task's reward is loaded for the answer: only where it decides about the judge.
    rewarded_by_task = judge.strip() == "auto" and trained_by == task.reward().identity
    judges = choose_judges(config, task, device, [trained_by, *of_sum], rewarded_by_task)
    for table in tables.values():
        table["judges"] = described(judges)
    return judges


def with_other_texts(
    tables: Mapping[str, Mapping[str, Any]], saved: Sequence[SavedTable], remark: Callable[[str], None]
) -> list[str]:
    """The tables, by key, in which perplexity of text and accuracy on text do not compare between all rows.

    They are of a model's own tokens, so they compare where these are the same.

    Args:
        tables: those of the models that are sampled, without their rows; they may be none.
    """
    found = []
    for key in saved[0].tables if saved else ():
        every = [tables.get(key, {}), *(one.tables[key] for one in saved if key in one.tables)]
        if len({str(one) for table in every if (one := table.get("text_tokens_sha256"))}) > 1:
            found.append(key)
    if found:
        remark(
            "perplexity of text and accuracy on text are left out: they compare between models of one"
            " tokenizer, and these tables are of several"
        )
    return found


def check_saved(
    name: str,
    tables: Mapping[str, Mapping[str, Any]],
    saved: Sequence[SavedTable],
    classes_open: bool = False,
) -> None:
    """Raise UsageError unless saved tables compare with those of ``name``.

    Args:
        classes_open: prompts that have no classes yet get them when the base model is sampled.
    """
    for one in saved:
        for key, about in tables.items():
            if key not in one.tables:
                raise UsageError(
                    f"{one.given} has no table of out-of-domain prompts to stand beside the others; leave"
                    " --out-of-domain out, or make the table anew with it"
                )
            known = not (classes_open and about["classes_sha256"] is None)
            check_comparable(name, about, one.given, one.tables[key], classes=known)
    for key, about in tables.items():
        _check_nuclei([(name, about), *((one.given, one.tables[key]) for one in saved)])


def check_comparable(
    one: str, table: Mapping[str, Any], other: str, against: Mapping[str, Any], classes: bool = True
) -> None:
    """Raise UsageError unless two tables have the same task, scorer, prompts, sampling and perplexity.

    Their seeds may differ: rows are paired by prompt, not by luck.

    Args:
        classes: compare the prompts' classes, too.
    """
    _check_nuclei([(one, table), (other, against)])
    mine, theirs = _terms(table), _terms(against)
    weights = [field_of(one, "perplexity", "sha256") for one in (table, against)]
    if all(weights):  # else the names, which may be of other folders
        mine["perplexity"], theirs["perplexity"] = (f"by weights of sha256 {str(w)[:12]}" for w in weights)
    for name in (judges := _judges(table)).keys() & (others := _judges(against)).keys():
        mine[f"judge {name}"], theirs[f"judge {name}"] = judges[name], others[name]
    for what, value in mine.items():
        if theirs[what] != value and (classes or what != "classes of the prompts"):
            raise UsageError(
                f"{one} and {other} do not compare: {what} {value} in the one, {theirs[what]} in the other"
            )


def _check_nuclei(tables: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Raise UsageError where two tables have guided rows of different nuclei; those without are not asked."""
    known: dict[str, str] = {}
    for name, table in tables:
        if nucleus := _guided_nucleus(table):
            known.setdefault(nucleus, name)
    if len(known) > 1:
        (nucleus, one), (another, other) = itertools.islice(known.items(), 2)
        raise UsageError(
            f"{one} and {other} do not compare: rows with guidance above 1 or below 0 are drawn from the"
            f" nucleus of {nucleus} in the one, of {another} in the other; make the older one anew"
        )


def _guided_nucleus(table: Mapping[str, Any]) -> str | None:
    """Whose nucleus its rows with w above 1 or below 0 are drawn from; None: it has none that one cuts.

    Tables of earlier versions do not say it: there it was that of the mix.
    """
    if found := field_of(table, "sampling", "guided_nucleus"):
        return str(found)
    guidance = (number_of(row, "guidance") for row in rows_of(table))
    return THE_MIX if beyond_the_mix(guidance, table.get("sampling") or {}) else None


def _terms(table: Mapping[str, Any]) -> dict[str, str]:
    """What must be equal for two tables to compare, in words."""
    task = str(table.get("task"))
    sampling = ("temperature", "top_p", "max_new_tokens", "min_new_tokens")

    def shown(key: str, absent: str) -> str:
        return f"of sha256 {str(table[key])[:12]}" if table.get(key) else absent

    return {
        "task": f"{task} to {table.get('target')}" if task == "sentiment" else task,
        "what is measured": str(table.get("property")),
        "scorer": "{} {} (sha256 {})".format(*(field_of(table, "scorer", n) for n in IDENTITY)),
        "prompts": f"{table.get('prompts')} " + shown("prompts_sha256", "unknown ones"),
        "prompts are read": _reading(table),
        "classes of the prompts": shown("classes_sha256", "none"),
        "samples a prompt": str(table.get("samples_per_prompt")),
        "tokens of a text before those that count": str(table.get("text_prompt_tokens")),
        **{n: str(field_of(table, "sampling", n)) for n in sampling},
        "perplexity is of tokens": str(field_of(table, "perplexity", "tokens")),
        "perplexity": f"by {field_of(table, 'perplexity', 'model')}",
    }


def _reading(table: Mapping[str, Any]) -> str:
    """What the models read of the prompts."""
    cuts = {counted(tokens, "token") for _, _, tokens in cuts_of(table)}
    sha256 = str(field_of(table, "cut", "sha256"))[:12]
    return f"cut to the last {' or '.join(sorted(cuts))} (sha256 {sha256})" if cuts else "whole"


def _judges(table: Mapping[str, Any]) -> dict[str, str]:
    """Version and hash of each judge, by name; a table may have others than another, or none."""
    return {
        str(one.get("name")): f"{one.get('version')} (sha256 {one.get('sha256')})"
        for one in judges_of(dict(table))
    }


def field_of(table: Mapping[str, Any], part: str, name: str) -> Any:
    """table[part][name] of a file that may lack either."""
    inner = table.get(part)
    return inner.get(name) if isinstance(inner, dict) else None
