"""The reward that a text names: a function, a classifier, a task's own, or a sum of them."""

from __future__ import annotations

import importlib
import itertools
import math
import os
import re
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from quark_fast.config import Config
from quark_fast.errors import UsageError
from quark_fast.rewards.asynchronous import Calls
from quark_fast.rewards.failure import told
from quark_fast.rewards.reward import Reward, describe
from quark_fast.rewards.weighted_sum import weighted_sum

FORMS = (
    "a task's name, package.module:function, hf:NAME or hf:NAME:LABEL for a classifier, a sum such as"
    " 0.7*toxicity + 0.3*package.module:function, or 1 - NAME for what the reward is to lower"
)


def described(
    given: Any, config: Config, name: str | None = None, module: types.ModuleType | None = None
) -> Reward:
    """``describe`` by the settings: how an asynchronous one is called, and whether it is cached."""
    if isinstance(given, Reward):
        return given
    calls = Calls(
        config.reward_batch,
        config.reward_concurrency,
        config.reward_timeout,
        config.reward_retries,
        config.reward_backoff,
        config.reward_per_minute,
        config.reward_tokens_per_minute,
    )
    return describe(given, name, calls, config.reward_cache, module)


def reward_by_name(
    spec: str, config: Config, device: torch.device | str, of_task: Callable[[str], Reward]
) -> Reward:
    """The reward that a text names. One of a module runs the module's code.

        spec := "1 - " name | term (" + " term)*
        term := [weight "*"] name
        name := task | package.module:function | hf:FOLDER_OR_HUB_NAME[:LABEL]

    A sum is of the plain values, each times its weight (1 unless given, may be negative); a sample that any
    part leaves out is left out. ``1 - name`` makes what ``name`` measures the property of the tables, and is
    refused of a reward that is 1 - its property itself.

    Args:
        config: its ``scorer_*`` and ``reward_*`` settings.
        device: where a classifier runs.
        of_task: gives a task's own reward by the task's name.
    """
    offset, terms = _parse(spec)
    labels = _labels(spec, [name for _, name in terms], config.scorer_label)
    parts: list[tuple[float, Reward]] = []
    for (weight, name), label in zip(terms, labels, strict=True):
        if name.startswith("hf:"):
            part = _classifier(name, config, device, label)
        elif ":" in name:
            part = _function(name, config)
        else:
            try:
                part = of_task(name)
            except UsageError as error:
                raise UsageError(f"reward {spec!r}: {error}; or give {FORMS}") from error
        parts.append((weight, part))
    lowered = parts[0][1].property if offset else None
    if lowered is not None:
        name = terms[0][1]
        raise UsageError(
            f"reward {spec!r} would raise {lowered}, as {name} is 1 - {lowered} already; give {name}, or"
            f" -1*{name} to raise it on purpose"
        )
    plain = offset == 0 and len(parts) == 1 and parts[0][0] == 1
    return parts[0][1] if plain else weighted_sum(parts, offset)


def refuse_code_of(folder: Path, spec: str | None) -> None:
    """Refuse a reward whose module lies in the run folder that names it.

    A run folder may be anyone's, and its settings name the reward to go on with, or to evaluate by. They may
    name what is installed here, or lies beside the folder, but bring no code along to be run.
    """
    for _, name in _parse(spec)[1] if spec is not None else []:
        module = name.partition(":")[0]
        if ":" in name and not name.startswith("hf:"):
            paths = [Path(entry, *module.split(".")).resolve() for entry in sys.path if _has(entry, module)]
            if any(path.is_relative_to(folder.resolve()) for path in paths):
                raise UsageError(
                    f"reward {name!r} is code in {folder}, the run folder that names it, and is not run; if"
                    " you trust it, move it out of there and name it by --reward package.module:function"
                )


def _has(entry: str, module: str) -> bool:
    """Whether a folder of ``sys.path`` has anything that may be imported as the module's first part."""
    first = module.partition(".")[0]
    return Path(entry, first).is_dir() or any(Path(entry).glob(f"{first}.*"))


def _parse(spec: str) -> tuple[float, list[tuple[float, str]]]:
    """(offset, (weight, name) of each term); 1 - NAME is the offset 1 and NAME with the weight -1."""
    if complement := re.fullmatch(r"1\s*-\s+(\S.*)", spec):
        return 1.0, [(-1.0, complement[1].strip())]
    return 0.0, [_term(spec, text.strip()) for text in re.split(r"\s\+\s", spec)]


def _term(spec: str, text: str) -> tuple[float, str]:
    """(weight, name) of one term."""
    before, star, after = text.partition("*")
    name = (after if star else before).strip()
    try:
        weight = float(before) if star else 1.0
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight) or not name:
        raise UsageError(f"reward {spec!r}: {text!r} is no weight*name; give {FORMS}")
    return weight, name


def _source_and_label(name: str) -> tuple[str, str | None]:
    """(folder or hub name, label) of hf:NAME:LABEL; None: it names no label. A folder may have a colon."""
    source = os.path.expanduser(name.removeprefix("hf:"))
    bare, colon, label = source.rpartition(":")
    return (bare, label) if colon and not Path(source).exists() else (source, None)


def _labels(spec: str, names: Sequence[str], given: str | None) -> list[str | None]:
    """The label of each classifier that names none itself: the one given for all, or the next of several."""
    if given is None:
        return [None] * len(names)
    wanting = [name.startswith("hf:") and _source_and_label(name)[1] is None for name in names]
    labels, count = [label.strip() for label in given.split(",")], sum(wanting)
    if not count or len(labels) not in (1, count):
        raise UsageError(
            f"scorer_label = {given!r} names {len(labels)} labels, but reward {spec!r} has {count}"
            " classifiers without one (hf:NAME); give one label for all or one for each, with commas between"
        )
    left = itertools.cycle(labels)
    return [next(left) if wants else None for wants in wanting]


def labels_of(specs: Sequence[str], given: str | None) -> list[str | None]:
    """The ``scorer_label`` of each of several rewards, of the one that is given for all of them."""
    names = [[name for _, name in _parse(spec)[1]] for spec in specs]
    labels = iter(_labels(", ".join(specs), list(itertools.chain(*names)), given))
    own = [[label for label in itertools.islice(labels, len(some)) if label is not None] for some in names]
    return [",".join(some) if some else None for some in own]


def _classifier(name: str, config: Config, device: torch.device | str, label: str | None) -> Reward:
    from quark_fast.rewards.classifier import SequenceClassifier

    source, own_label = _source_and_label(name)
    model = SequenceClassifier(
        source,
        own_label or label,
        config.scorer_reads,
        device,
        config.score_batch,
        trust_remote_code=config.trust_remote_code,
    )
    return Reward(model, name, f"label {model.label}, reads {model.reads}", model.sha256)


def _function(name: str, config: Config) -> Reward:
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise UsageError(f"reward {name!r}: write it as package.module:function")
    if "+" in name or "*" in name:
        raise UsageError(f"reward {name!r} is no package.module:function; a sum has blanks around each +")
    if "/" in module_name or module_name.endswith(".py"):
        raise UsageError(
            f"reward {name!r} names a file; give its module: mine:score for mine.py in this folder,"
            " rewards.mine:score for rewards/mine.py"
        )
    threads = torch.get_num_threads()
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a script without a main guard may exit
        raise UsageError(f"reward {name!r}: importing {module_name} failed, {told(error)}") from error
    finally:
        torch.set_num_threads(threads)  # the run's, which a module may have changed for its scorer
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UsageError(f"reward {name!r}: {module_name} has no function {attribute!r}")
    return described(function, config, name, module)
