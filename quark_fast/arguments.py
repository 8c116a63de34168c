"""Flags and YAML files, from which a run's settings come."""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers.hf_argparser import HfArgumentParser, string_to_bool

from quark_fast import __version__
from quark_fast.config import Config, defaults_of
from quark_fast.errors import EXIT_STATUS, UsageError
from quark_fast.files.safe_read import TooLarge, read_bytes
from quark_fast.near_names import nearest, unknown_setting

HELP = ("-h", "--help")
_KINDS: dict[Any, str] = {int: "a whole number", float: "a number", string_to_bool: "true or false"}


# What --help shows; --help all shows every setting.
FIRST = {
    *("help", "version", "quiet", "config", "task", "preset", "model", "prompts", "held_out", "reward"),
    *("judge", "output", "resume", "push_to_hub", "initial_samples", "max_new_tokens", "rounds", "steps"),
    *("batch_size", "learning_rate", "lora_rank", "kl_coef", "contrast_coef", "contrast_margin"),
    *("keep_best", "seed", "report_to"),
}


class _Quiet(argparse.Action):
    """``--quiet`` belongs to no setting: ``terminal.command`` has read it before."""

    def __call__(self, *_: Any) -> None: ...


class Parser(argparse.ArgumentParser):
    """Complains in one line, as everything else here does, not by a page of usage.

    A flag is written out: the beginning of one is a typing error.
    """

    full_help = "--help"

    def __init__(self, *arguments: Any, **options: Any) -> None:
        own: dict[str, Any] = {"allow_abbrev": False, "epilog": EXIT_STATUS}
        super().__init__(*arguments, **(own | options))
        # A value, not a flag: a weight below 0 of a reward, or of the guidance.
        self._negative_number_matcher = re.compile(r"-\.?\d")
        about = "show the version and end"
        self.add_argument("--version", action="version", version=f"quark_fast {__version__}", help=about)
        self.add_argument(
            "--quiet",
            action=_Quiet,
            nargs=0,
            dest="quiet",
            default=argparse.SUPPRESS,
            help="no progress and no notices, which go to standard error; results, on standard output, stay",
        )

    def _hints(self, unknown: Sequence[str]) -> str:
        """What a flag that is not known may have meant: another trainer's name of one of ours, or a slip."""
        flags = (flag for flag in self._option_string_actions if flag.startswith("--"))
        known = {flag[2:].replace("-", "_") for flag in flags}
        meant = {}
        for flag in (given.partition("=")[0] for given in unknown if given.startswith("--")):
            if near := nearest(flag[2:], known):
                meant[flag] = "--" + near.replace("_", "-")
        if not meant:
            return ""
        return "; did you mean " + ", ".join(f"{ours} for {flag}" for flag, ours in meant.items()) + "?"

    def error(self, message: str) -> NoReturn:
        _, unknown, given = message.partition("unrecognized arguments: ")
        hints = self._hints(given.split()) if unknown else ""
        raise UsageError(f"{message}{hints}; {self.full_help} shows every option")


class _Help(argparse.HelpFormatter):
    """Flags with dashes, and every default but None and "", whose meaning the help text itself gives."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        # HfArgumentParser makes each flag twice, and an optional value of every switch.
        flags = ", ".join(flag for flag in action.option_strings if "_" not in flag)
        if action.nargs == 0 or action.type is string_to_bool:
            return flags
        letters: dict[Any, str] = {int: "N", float: "X"}
        value = letters.get(action.type, str(action.metavar or action.dest.upper()))
        return f"{flags} {self._format_args(action, value)}"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        known = action.default not in (None, "", argparse.SUPPRESS)
        return f"{action.help} (default: %(default)s)" if known else action.help


class _HelpWithSettings(argparse.Action):
    """``--help`` shows the settings that people use first, ``--help all`` every one."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if values != "all":
            for action in parser._actions:
                action.help = action.help if action.dest in FIRST else argparse.SUPPRESS
        parser.print_help()
        parser.exit()


def _without_help(arguments: Sequence[str]) -> list[str]:
    """The arguments but ``--help`` and ``--help all``."""
    asks = [argument in HELP or argument.startswith("--help=") for argument in arguments]
    kept = []
    for after_it, asks_itself, argument in zip([False, *asks], asks, arguments, strict=False):
        if not asks_itself and not (after_it and argument == "all"):
            kept.append(argument)
    return kept


class _ConfigParser(Parser, HfArgumentParser):
    """One flag for each field of ``Config``, whose type is that of its value in a YAML file, too."""

    full_help = "--help all"

    def __init__(self, program: str) -> None:
        super().__init__(
            Config.__bases__[::-1],
            prog=program,
            usage="%(prog)s [--task TASK] [--preset PRESET] [--SETTING VALUE ...]",
            description="Unlearn a property (Quark).",
            formatter_class=_Help,
            add_help=False,
        )
        self.add_argument(
            *HELP,
            action=_HelpWithSettings,
            nargs="?",
            choices=["all"],
            default=argparse.SUPPRESS,
            metavar="all",
            help="show the settings that people use first, with all every one",
        )
        self._optionals.title = "help, settings from a file"
        self.add_argument("--config", metavar="FILE", help="YAML file of these settings; flags win")
        add_scorer(next(group for group in self._action_groups if group.title == "reward"))

    @staticmethod
    def _parse_dataclass_field(parser: argparse.ArgumentParser, field: dataclasses.Field[Any]) -> None:
        flag = copy.copy(field)  # argparse is given all metadata
        aliases = [field.metadata["alias"]] if field.metadata["alias"] else []
        flag.metadata = {"help": field.metadata["help"], "aliases": aliases}  # type: ignore[assignment]
        HfArgumentParser._parse_dataclass_field(parser, flag)

    def typed(self, name: str, value: Any) -> Any:
        """A YAML value in the setting's type, from what is written there.

        Raises:
            ValueError: it is of no such type.
        """
        flag = self._option_string_actions[f"--{name}"]
        if value is None and flag.default is None:
            return None
        if value is None and flag.type is str:
            raise ValueError(f"{name} is null; give a text, or leave it out")
        if flag.type is int and re.fullmatch(r"[-+]?\d+\.0*", str(value)):
            value = str(value).partition(".")[0]
        try:
            if flag.type is string_to_bool and str(value).lower() not in ("true", "false"):
                raise argparse.ArgumentError(flag, "as a flag it might be yes or 1, too")
            typed = self._get_value(flag, str(value))
            self._check_value(flag, typed)
        except argparse.ArgumentError:
            choices = ", ".join(map(repr, flag.choices or ()))
            wanted = f"choose from {choices}" if choices else f"give {_KINDS[flag.type]}"
            raise ValueError(f"{name} = {value!r:.80}; {wanted}") from None
        return typed


def settings_parser(program: str) -> Parser:
    """A parser of every setting, as ``parse`` has it."""
    return _ConfigParser(program)


class _Classifier(argparse.Action):
    """``--scorer NAME`` is ``--reward hf:NAME``."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, f"hf:{str(values).removeprefix('hf:')}")


def add_scorer(parser: argparse._ActionsContainer) -> None:
    """The short form of a reward that is a classifier, for a parser with ``--reward``, in place of that."""
    either = parser.add_mutually_exclusive_group()
    either._group_actions.append(parser._option_string_actions["--reward"])
    either.add_argument(
        "--scorer",
        action=_Classifier,
        dest="reward",
        default=argparse.SUPPRESS,
        metavar="NAME",
        help="--reward hf:NAME in short: a sequence-classification model, a folder or a hub name",
    )


def add_number(parser: argparse._ActionsContainer, name: str, default: str) -> None:
    """A flag for the setting of that name, a whole number, with its help; None unless it is given.

    Args:
        default: what is taken in place of None, in words.
    """
    (field,) = (field for field in dataclasses.fields(Config) if field.name == name)
    text = f"{field.metadata['help']} (default: {default})"
    parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=text)


def parse(arguments: Sequence[str], program: str, defaults: Mapping[str, Any] | None = None) -> Config:
    """Settings from flags, over those of ``--config FILE`` (YAML), over the defaults; checked.

    Args:
        defaults: the program's own, under those of the task and the preset.
    """
    parser = _ConfigParser(program)
    # Help waits for the last pass, which knows the task and the preset and so their defaults.
    flags = _without_help(arguments)
    first, _ = parser.parse_known_args(flags)
    file = _read_yaml(parser, Path(first.config), "--config ") if first.config else {}
    from_run = first.from_run or file.get("from_run")
    record = _record_below(parser, **(vars(first) | {"from_run": from_run}))
    parser.set_defaults(**{k: v for k, v in (record | file).items() if k in ("task", "preset")})
    known, _ = parser.parse_known_args(flags)
    named = defaults_of(known.task, known.preset)
    task, preset = record.get("task", known.task), record.get("preset", known.preset)
    if (known.task, known.preset) != (task, preset) and not first.resume:
        # A run goes on by another task or preset: what it has by its own goes, and that is above the rest.
        own = defaults_of(task, preset)
        below = {k: v for k, v in record.items() if k not in own or v != own[k]} | named
    else:
        below = named | record
    parser.set_defaults(**(dict(defaults or {}) | below | file))
    given = vars(parser.parse_args(list(arguments)))
    del given["config"]
    config = Config(**given)
    config.check()
    if config.unevaluated_guidance and any(re.match("--eval[-_]guidance", flag) for flag in flags):
        fix = "leave it out" if config.one_token else "give --eval-rows ends, too"
        raise UsageError(f"{config.unevaluated_guidance}; {fix}")
    return config


def _record_below(parser: _ConfigParser, config: str | None, **flags: Any) -> dict[str, Any]:
    """The settings of the run to resume, unless --config has them, or to go on from; {}: of neither."""
    # A run goes on with its own settings. Not its folder, which may have moved, nor the consent to run code,
    # or to mix two rewards.
    asked_again = {"output", "resume", "trust_remote_code", "accept_changed_reward"}
    own: dict[str, Any] = {}
    if flags["resume"]:
        if not config and (saved := Config(**flags).output_folder / "config.yaml").exists():
            own = _read_yaml(parser, saved)
    elif flags["from_run"] and (saved := Path(flags["from_run"]) / "config.yaml").exists():
        own = _read_yaml(parser, saved)
        asked_again |= {"from_run", "push_to_hub", "hub_private_repo"}
    return {name: value for name, value in own.items() if name not in asked_again}


def load_config(path: Path) -> Config:
    """The settings of a YAML file, as ``Config.save`` writes them; checked."""
    config = Config(**_read_yaml(_ConfigParser(""), path))
    config.check()
    return config


def settings_in(path: Path) -> dict[str, Any]:
    """What a run's YAML file says, also where another version wrote it; not checked.

    In its type where this version has the setting and can read its value, else as it is written there.
    """
    parser, known = _ConfigParser(""), {field.name for field in dataclasses.fields(Config)}
    found: dict[str, Any] = dict(_read_mapping(path))
    for name in found.keys() & known:
        with contextlib.suppress(ValueError):
            found[name] = parser.typed(name, found[name])
    return found


def _read_yaml(parser: _ConfigParser, path: Path, flag: str = "") -> dict[str, Any]:
    """The settings of a file in their types; ``flag``: by which it was given, for errors."""
    known = {field.name for field in dataclasses.fields(Config)}
    settings: dict[str, Any] = dict(_read_mapping(path, flag))
    try:
        for name, value in settings.items():
            if name not in known:
                raise ValueError(unknown_setting(name, known))
            settings[name] = parser.typed(name, value)
    except ValueError as error:
        raise _unreadable(path, flag, error) from error
    return settings


def _read_mapping(path: Path, flag: str = "") -> dict[str, str | None]:
    try:
        return _flat_mapping(read_bytes(path, limit=1 << 20).decode("utf-8"))
    # Bytes that are no text, and whatever else is wrong: ValueErrors all.
    except (OSError, EOFError, zlib.error, ValueError, TooLarge, yaml.YAMLError) as error:
        raise _unreadable(path, flag, error) from error


def _unreadable(path: Path, flag: str, error: Exception) -> UsageError:
    return UsageError(f"{flag}{path}: {' '.join(str(error).split())}")


_NULLS = {"", "~", "null", "Null", "NULL"}


def _flat_mapping(text: str) -> dict[str, str | None]:
    """The mapping of single values that a YAML text holds, as they are written there; None: null.

    Each setting knows its own type: to YAML ``off`` is False, ``1:30`` ninety and ``010`` eight.

    Nothing else is built: lists within lists nest without end, aliases of aliases multiply without end, and
    a tag's value may be one that the tag's constructor never expected.
    """
    settings: dict[str, str | None] = {}
    depth, documents, name = 0, 0, None
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        documents += isinstance(event, yaml.DocumentStartEvent)
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("aliases (*name) are not read; write the value again")
        if getattr(event, "tag", None) is not None:
            raise ValueError(f"tags ({event.tag}) are not read; write the value alone")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > 1:
                raise ValueError(f"{name} = a list or a mapping; give a single value")
            if not isinstance(event, yaml.MappingStartEvent):
                raise ValueError("needs 'setting: value' lines")
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if not isinstance(event, yaml.ScalarEvent) or depth == 0:
            continue
        if name is not None:
            settings[name] = None if event.style is None and event.value in _NULLS else event.value
            name = None
        elif event.value in settings:
            raise ValueError(f"{event.value} stands there twice; leave one out")
        else:
            name = event.value
    if documents != 1 or not settings:
        raise ValueError("needs 'setting: value' lines")
    return settings
