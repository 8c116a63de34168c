"""One run's settings: with its task's defaults, checked, and what follows from them."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

import yaml

from quark_fast import settings
from quark_fast.errors import UsageError
from quark_fast.files.atomic import replacing
from quark_fast.keep_best import Goal
from quark_fast.near_names import unknown_setting
from quark_fast.settings import COLDEST, MOST, STRONGEST

# Where a task's defaults differ from the fields' own; a preset's and what the user sets win over both.
TASK_DEFAULTS: dict[str, dict[str, Any]] = {
    "toxicity": {},
    # Twice as many prompts as toxicity's. At its margin, 5, the best token costs a quarter more perplexity.
    "sentiment": {"initial_samples": 2, "explore_samples": 1, "contrast_margin": 3.0},
    "repetition": {
        "prefix_tokens": 32,
        "max_prompt_tokens": 128,
        # A sample loops or does not; and each half has samples enough that none is drawn often.
        "quantiles": 2,
        "initial_samples": 1,
        "explore_samples": 1,
        "temperature": 0.7,
        "max_new_tokens": 128,
        "min_new_tokens": 128,
        # The base model's samples are full of loops to learn from; those of the best token are not.
        "rounds": 1,
        "batch_size": 8,
        "micro_batch": 4,  # a sample has 160 tokens, and is read under two reward tokens
        "steps": 32,
        "learning_rate": 2.5e-4,
        "warmup_steps": 6,
        # Adapters of the other layers, too, take a sixth more of the loops away, at twice the price.
        "lora_targets": "attention",
        # The base model is so sure of a loop's tokens that a sample holds 29 nats of them: a smaller margin
        # is filled by a change that greedy decoding does not see.
        "contrast_with": "base",
        "contrast_margin": 60.0,
        # This direction keeps the whole distribution, and with it the perplexity of text; the other lets the
        # model sharpen.
        "kl": "ref_policy",
        "kl_coef": 10.0,
        # With it, as many loops go at less of a price on other text.
        "unlikelihood_coef": 30.0,
        "eval_samples": 1,
        "eval_temperature": 0.0,
        "eval_guidance": "1.5",
        "eval_rows": "all",
    },
}

# Named defaults over a task's, under what the user sets: of every task, then of the one.
EVERY_TASK = ""
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "default": {},
    # The defaults until November 2026, which most of the measured results are of, and every row of the table.
    "long": {
        EVERY_TASK: {
            "initial_samples": 12,
            "explore_samples": 4,
            "rounds": 2,
            "steps": 64,
            "guidance": 1.5,
            "lora_rank": 0,
            "contrast_with": "mirror",
            "contrast_margin": 1.0,
            "eval_rows": "all",
        },
        "sentiment": {"initial_samples": 5, "explore_samples": 2, "steps": 32},
        "repetition": {
            "initial_samples": 1,
            "explore_samples": 1,
            "rounds": 1,
            "steps": 24,
            "guidance": 1.0,
            # Steps of 2e-4 leave the loops by a way of their own: short sentences, over and over.
            "learning_rate": 6e-5,
            "warmup_steps": 2,
            "kl_coef": 1.0,
            # The contrast sums over a completion's tokens, and here are six times as many.
            "contrast_coef": 0.03,
            # A loop's token has p = 0.9 under the reference: with a smaller weight it stays most probable.
            "unlikelihood_coef": 15.0,
        },
    },
    # The method of the paper and of its authors' code, without what is added here; in their numbers, but for
    # the samples, whose 84,000 prompts a round are no machine's work. docs/recipe.md has what is not theirs.
    "paper": {
        EVERY_TASK: {
            "prefix": "",
            "quantiles": 5,
            "quantile_weights": "equal",
            "initial_samples": 40,
            "explore_samples": 40,
            "guidance": 1.0,
            "explore_token": "best",
            "temperature": 1.0,
            "top_p": 1.0,
            "rounds": 22,
            "steps": 500,
            "batch_size": 128,
            "lora_rank": 0,
            "learning_rate": 1e-5,
            "reward_token_lr": 1e-5,
            "warmup_steps": 500,
            "kl_coef": 0.05,
            "kl": "policy_ref",
            "entropy_coef": 0.06,
            "contrast_coef": 0.0,
            "unlikelihood_coef": 0.0,
            "eval_samples": 25,
            "eval_rows": "best",
        },
        "sentiment": {"rounds": 12},
        "repetition": {"eval_samples": 1},  # greedy decoding writes one completion
    },
    # Every part in minutes (3 on one core of an AMD EPYC): a run to look at, which learns hardly anything.
    "look": {
        EVERY_TASK: {
            "prompt_limit": 128,
            "held_out": "64",
            "initial_samples": 1,
            "explore_samples": 1,
            "max_new_tokens": 12,
            "rounds": 2,
            "steps": 4,
            "warmup_steps": 1,
            "eval_samples": 1,
        },
        "sentiment": {"held_out": "32"},  # each is continued 25 times to class it
        "repetition": {
            "prompt_limit": 32,
            "held_out": "32",
            "max_new_tokens": 32,  # in which a loop shows
            "min_new_tokens": 32,
        },
    },
}


def defaults_of(task: str, preset: str) -> dict[str, Any]:
    """Where the defaults of a task and a preset differ from the fields' own; the preset's win."""
    task, preset = str(task), str(preset)  # a list, which check() refuses, is no key
    of_preset = PRESETS.get(preset, {})
    return TASK_DEFAULTS.get(task, {}) | of_preset.get(EVERY_TASK, {}) | of_preset.get(task, {})


# A dataclass begins with the fields of its last base: read upwards, this is the order of --help.
@dataclass(kw_only=True)
class Config(
    settings.MachineSettings,
    settings.EvaluationSettings,
    settings.LossSettings,
    settings.LearningSettings,
    settings.SamplingSettings,
    settings.PoolSettings,
    settings.FolderSettings,
    settings.RewardSettings,
    settings.PromptSettings,
    settings.TaskSettings,
):
    """Settings of one run: the fields are the command line, the YAML file and the run's record.

    A field that is not given takes the default of ``preset``, else of ``task``, where ``PRESETS`` or
    ``TASK_DEFAULTS`` has one, else its own: ``Config(task="repetition").max_new_tokens`` is 128.
    """

    # The generated __init__ cannot tell a default from a value that equals it: what was given is noted here.
    def __new__(cls, **given: Any) -> Self:
        known = kinds_of()
        for name in given:
            if name not in known:
                raise UsageError(unknown_setting(name, known))
        self = super().__new__(cls)
        self.__dict__["given"] = given
        return self

    def __post_init__(self) -> None:
        given = self.__dict__.pop("given")
        for name, value in defaults_of(self.task, self.preset).items():
            if name not in given:
                setattr(self, name, value)
        for name, kind in kinds_of().items():
            setattr(self, name, settings.plain(getattr(self, name), kind))

    @property
    def output_folder(self) -> Path:
        """The folder given, else one by the run to go on from, the user's own reward, or the task."""
        if self.output:
            return Path(self.output)
        if self.from_run:
            return _next_folder(Path(self.from_run))
        own = self.reward if self.reward not in (None, "none", *TASK_DEFAULTS) else None
        return Path("runs", self.task if own is None else _short_name(own))

    def quantile_shares(self) -> list[float]:
        """Share of the training draws for each quantile, worst first; sums to 1."""
        return _shares(self.quantile_weights, self.quantiles)

    def held_out_count(self) -> int | None:
        """How many prompts to hold out, where ``held_out`` says that; None: it does not."""
        return None if self.held_out is None else _count(self.held_out)

    def guidances(self) -> list[float]:
        """The values of w to evaluate, each once; none where the best token is evaluated alone."""
        text = self.eval_guidance
        if text is None:
            text = "1.5,2" if self.eval_rows == "all" else "1.5"
        values = list(dict.fromkeys(numbers("eval_guidance", text)))
        return [] if self.eval_rows == "best" or self.one_token else values

    @property
    def one_token(self) -> bool:
        """Whether one reward token alone is trained, whose row all others then have.

        Where there are several, not of a run that goes on from another, which may have trained them before.
        """
        if self.from_run is not None:
            return self.quantiles == 1
        drawn = {k for k, share in enumerate(self.quantile_shares()) if share}
        mirrors = {self.quantiles - 1 - k for k in drawn if self.contrast_coef}
        return len(drawn | mirrors) == 1

    @property
    def unevaluated_guidance(self) -> str:
        """What is wrong where values of w are asked for whose rows are left out; "" where nothing is."""
        if self.eval_guidance in (None, "", defaults_of(self.task, self.preset).get("eval_guidance")):
            return ""
        asked = f"eval_guidance = {self.eval_guidance!r} asks for rows"
        if self.one_token:
            return f"{asked} of two tokens, but one alone is trained"
        return f"{asked} that eval_rows = 'best' leaves out" if self.eval_rows == "best" else ""

    def goal(self) -> Goal | None:
        """By what the best round is kept; None: the last one is."""
        return Goal.parse(self.keep_best) if self.keep_best.strip() else None

    def samples_a_pass(self, on_cpu: bool) -> int:
        """``micro_batch``, or the usual one: a laptop's memory is short, a GPU wants many rows at a time.

        The precision must be settled: in float32 8 samples take 4.3 GB, and 4 (2.5 GB) a tenth more time.
        """
        return self.micro_batch or (16 if not on_cpu else 4 if self.precision == "fp32" else 8)

    @property
    def contrast_coefs(self) -> tuple[float, float]:
        """Weights of the comparison with the mirror token, and with the base model."""
        mirror, base = (self.contrast_with in ("both", other) for other in ("mirror", "base"))
        return self.contrast_coef * mirror, self.contrast_coef * base

    @property
    def step_size(self) -> float:
        """``learning_rate``, or the usual one: adapters move a model by less."""
        if self.learning_rate is not None:
            return self.learning_rate
        if not self.lora_rank:
            return 2e-4
        return 1e-3 if self.task == "sentiment" else 5e-4  # its margin was chosen with the larger steps

    def temperature_of(self, round: int) -> float:
        """Sampling temperature in a round (from 0)."""
        value: float = getattr(self, self._exploring_by if round else "temperature")
        return value

    @property
    def _exploring_by(self) -> str:
        """Name of the setting that holds the temperature of later rounds."""
        return "temperature" if self.explore_temperature is None else "explore_temperature"

    def remarks(self) -> list[str]:
        """What is no error, but hardly meant."""
        said, steps = [self.unevaluated_guidance], self.rounds * self.steps
        if self.one_token and self.quantiles > 1 and self.eval_rows != "best":
            said.append(
                "one reward token alone is trained, so the table has no row of another, nor a guided one"
            )
        if self.warmup_steps > steps:
            said.append(
                f"the warm-up of {self.warmup_steps:,} steps is longer than the run of {steps:,}, which"
                f" reaches {steps / self.warmup_steps:.0%} of its step size; give --warmup-steps"
                f" {max(1, steps // 10)}"
            )
        return [one for one in said if one]

    def decay(self, step: int, rounds: int | None = None) -> float:
        """Factor on the learning rates at a step (from 0): linear warm-up, then linear decay to 0.

        Args:
            rounds: how many learn; default: all.
        """
        total = (self.rounds if rounds is None else rounds) * self.steps
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return (total - step) / max(1, total - self.warmup_steps)

    def check(self) -> None:
        """Raise UsageError for a setting that cannot be, naming its value and what can."""
        kinds = kinds_of()
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), get_args(kinds[field.name])
            value = None if field.name == "eval_guidance" and value == "" else value  # no w beyond 1
            if wanted := settings.wanted_type(value, kinds[field.name]):
                raise UsageError(_of_another_kind(field.name, value, wanted))
            if get_origin(kinds[field.name]) is Literal and value not in choices:
                named = ", ".join(map(repr, choices))
                raise UsageError(f"{field.name} = {settings.text_of(value)}; choose from {named}")
            if wanted := settings.wanted_range(value, **field.metadata["bounds"]):
                raise UsageError(f"{field.name} = {settings.text_of(value)}; give {wanted}")
        _check_folder_name(self.output)
        self._check_scored()
        self._check_lengths()
        self._check_sampling()
        self._check_greedy()
        self._check_learning()
        if self.rollout == "vllm":
            self._check_vllm()
        elif self.vllm_server is not None:
            raise UsageError(f"vllm_server = {self.vllm_server!r} is for rollout = vllm; give that, too")
        self.quantile_shares()
        self.guidances()
        self.held_out_count()
        if self.goal() is None and self.stop_after:
            raise UsageError(
                f"stop_after = {self.stop_after} counts rounds without gain, which --keep-best defines;"
                " give that, too"
            )

    def _check_scored(self) -> None:
        if self.scored is None and self.initial_samples == 0:
            raise UsageError("initial_samples = 0 leaves nothing to learn from; give at least 1, or --scored")
        sampled = self.initial_samples or self.rounds > 1 or self.from_run
        if self.reward == "none" and (sampled or not self.scored):
            raise UsageError(
                "reward = none leaves nothing to score samples by; it is for --scored FILE with"
                " --initial-samples 0 --rounds 1, which samples nothing"
            )
        if self.scored is not None and self.prompts is not None:
            raise UsageError(f"scored = {self.scored!r} brings its own prompts; leave out --prompts")
        if self.scored is not None and self.prefix_tokens:
            raise UsageError(
                f"prefix_tokens = {self.prefix_tokens} cuts prompts out of texts, but those of --scored stand"
                " before their completions; give --prefix-tokens 0"
            )

    def _check_lengths(self) -> None:
        if self.min_new_tokens > self.max_new_tokens:
            raise UsageError(
                f"min_new_tokens = {self.min_new_tokens} is above max_new_tokens = {self.max_new_tokens}"
            )
        if self.prefix_tokens and 0 < self.max_prompt_tokens <= self.prefix_tokens:
            raise UsageError(
                f"prefix_tokens = {self.prefix_tokens} leaves no held-out text within max_prompt_tokens ="
                f" {self.max_prompt_tokens}"
            )

    def _check_sampling(self) -> None:
        """Beyond these numbers a token's probability is none in float32."""
        for name in ("temperature", self._exploring_by, "eval_temperature"):
            if 0 < (value := getattr(self, name)) < COLDEST:
                raise UsageError(f"{name} = {value:g}; give at least {COLDEST:g}, or 0, which is greedy")
        for name, values in (("guidance", [self.guidance]), ("eval_guidance", self.guidances())):
            if strange := [value for value in values if abs(value) > STRONGEST]:
                raise UsageError(f"{name} = {strange[0]:g}; give at most {STRONGEST:g} in size")

    def _check_greedy(self) -> None:
        for name, samples in (
            ("temperature", "initial_samples"),
            (self._exploring_by, "explore_samples"),
            ("eval_temperature", "eval_samples"),
        ):
            if getattr(self, name) == 0 and getattr(self, samples) > 1:
                raise UsageError(
                    f"{name} = 0 is greedy: all {samples} = {getattr(self, samples)} completions"
                    " of a prompt would be the same; give 1"
                )

    def _check_learning(self) -> None:
        for name in ("kl_stop", "kl_target"):
            if getattr(self, name) and not self.kl_coef:
                raise UsageError(
                    f"{name} = {getattr(self, name):g} needs the KL, but kl_coef = 0 leaves it out; give one"
                )
        if self.prompt_kl_coef and self.kl == "sampled":
            raise UsageError(
                f"prompt_kl_coef = {self.prompt_kl_coef:g} needs the exact KL, as nothing sampled a prompt;"
                " give --kl policy_ref or ref_policy"
            )
        if self.kl_target and self.kl_horizon < self.batch_size:
            raise UsageError(
                f"kl_horizon = {self.kl_horizon} is below batch_size = {self.batch_size}; give at least that"
            )
        if not self.lora_targets.replace(",", "").strip():
            raise UsageError(
                f"lora_targets = {self.lora_targets!r}; give all-linear, attention, or layers' names"
            )
        if self.export_adapter and not self.lora_rank:
            raise UsageError(
                "export_adapter needs adapters, but lora_rank = 0 trains all weights; give a rank"
            )
        if self.quantiles == 1 and self.contrast_coef:
            raise UsageError(
                f"contrast_coef = {self.contrast_coef} needs at least 2 quantiles to tell apart; give 0"
            )

    def _check_vllm(self) -> None:
        if self.vllm_server is not None:
            try:
                parts = urlsplit(self.vllm_server)
                plain = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
            except ValueError:  # a port that is no number
                plain = False
            if not plain or parts.path.strip("/") or parts.query:
                raise UsageError(f"vllm_server = {self.vllm_server!r}; give http://host:port alone")
        if self.guidance != 1.0:
            raise UsageError(
                f"guidance = {self.guidance:g} mixes two streams a token, which vLLM does not do; give"
                " --guidance 1, or --rollout transformers"
            )
        # What vLLM refuses, or changes quietly.
        for name in ("temperature", self._exploring_by):
            if getattr(self, name) > 2 or 0 < getattr(self, name) < 0.01:
                raise UsageError(f"{name} = {getattr(self, name):g}; vLLM takes 0, and 0.01 to 2")
        if self.quantiles > 128:
            raise UsageError(f"quantiles = {self.quantiles}; vLLM suppresses 128 reward tokens at most")

    def check_compares_rounds_as(self, saved: Config, run: str) -> None:
        """Raise UsageError where only one of this and ``run``, of settings ``saved``, compares its rounds."""
        if (self.goal() is None) != (saved.goal() is None):
            raise UsageError(
                f"keep_best = {self.keep_best!r}, but {run} has {saved.keep_best!r}; it may be"
                " another, not come or go, since its development prompts are not trained on"
            )

    def check_resumes(self, saved: Config) -> None:
        """Raise UsageError unless a run with the settings ``saved`` can go on with these."""
        self.check_compares_rounds_as(saved, "the run to resume")
        # How rounds were compared so far.
        kept = ("judge", "eval_temperature", "eval_top_p") if self.goal() else ()
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(saved, field.name)
            if mine != theirs and (not field.metadata["changes"] or field.name in kept):
                raise UsageError(
                    f"{field.name} = {mine!r}, but the run to resume has {theirs!r}; resume it with its own"
                )

    def save(self, path: Path) -> None:
        """Write the settings as YAML, which ``--config`` reads back."""
        with replacing(path) as scratch:
            scratch.write_text(yaml.safe_dump(dataclasses.asdict(self), sort_keys=False), encoding="utf-8")


@functools.cache
def kinds_of() -> dict[str, Any]:
    """The type of each setting."""
    kinds = get_type_hints(Config)
    return {field.name: kinds[field.name] for field in dataclasses.fields(Config)}


def _of_another_kind(name: str, value: Any, wanted: str) -> str:
    """The error for a setting that is no such thing, as from Python it may be anything."""
    if name == "model" and value != "":
        fix = "save it, and its tokenizer, by save_pretrained(FOLDER), and give that folder's name"
    elif name in ("reward", "prompts", "held_out") and value is not None:
        fix = f"give {wanted}, or Trainer(config, {name}=...)"
    elif name == "scored":
        fix = "give a file's name; data.to_json(FILE) of a Dataset writes one"
    elif isinstance(value, list | tuple):
        fix = f"give {','.join(map(str, value))!r:.80}"
    else:
        fix = f"give {wanted}"
    shown = value is None or isinstance(value, str | int | float)
    what = f"= {repr(value) if isinstance(value, str) else settings.text_of(value)}"
    return f"{name} {what if shown else f'is of type {type(value).__name__}'}; {fix}"


def _count(held_out: str) -> int | None:
    """The number that ``held_out`` is; None: it is no number."""
    if not re.fullmatch(r"-?[\d._]+%?", held_out):
        return None
    # 1_000 is 1000, as in the settings that are numbers.
    whole = re.fullmatch(r"\d+(_\d+)*", held_out) and len(held_out) <= 20
    count = int(held_out) if whole else MOST + 1
    if not 1 <= count <= MOST:
        raise UsageError(f"held_out = {held_out}; give at least 1 and at most {MOST}, or a file")
    return count


def _check_folder_name(output: str | None) -> None:
    """Refuse a name that cannot be typed again, and one that no file system takes."""
    if output is not None and not output.strip():
        raise UsageError(f"output = {output!r} is blank; give a folder's name")
    if output is not None and "\0" in output:
        raise UsageError(f"output = {output!r} holds a NUL, which no folder's name can; leave it out")


def _next_folder(run: Path) -> Path:
    """Where a run that goes on from another stands: runs/x-2 beside runs/x, then runs/x-3."""
    run = run.resolve() if run.name in ("", "..") else run
    name, _, number = run.name.rpartition("-")
    counted = name and number.isdecimal() and 2 <= int(number) < 1000
    return run.with_name(f"{name}-{int(number) + 1}" if counted else f"{run.name}-2")


def _short_name(reward: str) -> str:
    """What a folder is called after a reward: "score" for my_pkg.my_module:score, "name" for hf:org/name."""
    bare = re.sub(r"hf:([^\s+*]*/)?|[\w.]+:", "", reward)
    return re.sub(r"[^A-Za-z0-9._]+", "-", bare).strip("-.")[:60] or "reward"


def _shares(weights: str, quantiles: int) -> list[float]:
    """What ``quantile_weights`` says of so many quantiles."""
    if weights == "equal" or quantiles == 1:
        return [1 / quantiles] * quantiles
    if weights == "extremes":
        return [0.5, *[0.0] * (quantiles - 2), 0.5]
    if weights == "best":
        return [*[0.0] * (quantiles - 1), 1.0]
    values = numbers("quantile_weights", weights)
    if len(values) != quantiles or min(values) < 0 or not 0 < sum(values) < math.inf:
        raise UsageError(
            f"quantile_weights = {weights!r}; give extremes, equal, best, or {quantiles} numbers >= 0, worst"
            " quantile first, not all 0 and with a finite sum"
        )
    return [value / sum(values) for value in values]


def numbers(name: str, text: str) -> list[float]:
    """The finite numbers of a text such as "1, 3"; ``name`` is what an error calls them."""
    try:
        values = [float(part) for part in str(text).split(",") if part.strip()]
    except ValueError:
        raise UsageError(f"{name} = {text!r}; give numbers with commas between") from None
    if not all(math.isfinite(value) for value in values):
        raise UsageError(f"{name} = {text!r}; give finite numbers")
    return values
