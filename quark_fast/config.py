"""One run's settings: a dataclass whose fields are the command line, the YAML file and the run record."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, Self, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

import yaml
from transformers.hf_argparser import HfArgumentParser

from quark_fast.errors import UsageError
from quark_fast.files.atomic import replacing
from quark_fast.files.safe_read import TooLarge, read_bytes


class Parser(argparse.ArgumentParser):
    """Complains in one line, as everything else here does, not by a page of usage.

    A flag is written out: the beginning of one is a typing error.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **({"allow_abbrev": False} | options))

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; --help shows every option")


class _Help(argparse.HelpFormatter):
    """Flags with dashes, and every default but None and "", whose meaning the help text itself gives."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        # HfArgumentParser makes each flag twice, and an optional value of every switch.
        flags = ", ".join(flag for flag in action.option_strings if "_" not in flag)
        if action.nargs in (0, "?"):
            return flags
        letters: dict[Any, str] = {int: "N", float: "X"}
        value = letters.get(action.type, action.dest.upper())
        return f"{flags} {self._format_args(action, value)}"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        known = action.default not in (None, "", argparse.SUPPRESS)
        return f"{action.help} (default: %(default)s)" if known else action.help


class _ConfigParser(Parser, HfArgumentParser):
    """One flag for each field of a dataclass; its help has a heading for each of ``SECTIONS``."""

    def format_help(self) -> str:
        made = self._get_formatter()
        made.add_usage("%(prog)s [--task TASK] [--SETTING VALUE ...]", [], [])
        made.add_text(self.description)
        sections: dict[str, list[argparse.Action]] = {}
        title = ""
        for action in self._actions:
            title = SECTIONS.get(action.dest, title)
            sections.setdefault(title, []).append(action)
        for title, actions in sections.items():
            made.start_section(title)
            made.add_arguments(actions)
            made.end_section()
        return made.format_help()


class _Classifier(argparse.Action):
    """``--scorer NAME`` is ``--reward hf:NAME``."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, f"hf:{values}")


def add_scorer(parser: argparse.ArgumentParser) -> None:
    """The short form of a reward that is a classifier, for a parser with ``--reward``."""
    parser.add_argument(
        "--scorer",
        action=_Classifier,
        dest="reward",
        default=argparse.SUPPRESS,
        metavar="NAME",
        help="--reward hf:NAME in short: a sequence-classification model, a folder or a hub name",
    )


def setting(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


# The headings of --help, each with the first setting under it: the fields stand in this order.
SECTIONS = {
    "help": "help, settings from a file",
    "config": "help, settings from a file",
    "task": "what to unlearn, in what",
    "prompts": "prompts",
    "reward": "reward",
    "output": "run folder",
    "quantiles": "pool",
    "initial_samples": "sampling",
    "rounds": "learning",
    "kl_coef": "loss",
    "eval_samples": "evaluation",
    "precision": "machine",
}


# Settings that may change when a run is resumed: they leave its samples and its weights as they would be.
FREE_ON_RESUME = {
    "output",
    "resume",
    "trust_remote_code",
    "threads",
    "micro_batch",
    "gradient_checkpointing",
    "report_to",
    "checkpoint_every",
    "held_out",
    "eval_samples",
    "eval_temperature",
    "eval_top_p",
    "eval_guidance",
    "eval_quantiles",
    "eval_modes",
    "export_head",
    "show_offensive",
    "max_bad_steps",
    "kl_stop",
    "reward_cache",
    "reward_batch",
    "reward_concurrency",
    "reward_timeout",
    "reward_retries",
    "reward_backoff",
    "accept_changed_reward",
    "sample_batch",
    "vllm_server",
    "vllm_timeout",
    "vllm_retries",
    "vllm_memory",
}


# Where a task's defaults differ from the fields' own; what the user sets wins over both.
TASK_DEFAULTS: dict[str, dict[str, Any]] = {
    "toxicity": {},
    "sentiment": {"initial_samples": 5, "explore_samples": 2, "steps": 32},
    "repetition": {
        "prefix_tokens": 32,
        "max_prompt_tokens": 128,
        # A sample loops or does not; and each half has samples enough that none is drawn often.
        "quantiles": 2,
        "initial_samples": 1,
        "explore_samples": 1,
        "guidance": 1.0,
        "temperature": 0.7,
        "max_new_tokens": 128,
        "min_new_tokens": 128,
        # The untouched model's samples are full of loops to learn from; those of the best token are not.
        "rounds": 1,
        "steps": 24,
        "batch_size": 8,
        "micro_batch": 4,  # 8 of 160 tokens, under two reward tokens each, take 8 GB
        # Steps of 2e-4 leave the loops by a way of their own: short sentences, over and over.
        "learning_rate": 6e-5,
        "warmup_steps": 2,
        # The contrast sums over a completion's tokens, and here are six times as many.
        "contrast_coef": 0.03,
        # This direction keeps the whole distribution, and with it the perplexity of text; the other lets the
        # model sharpen.
        "kl": "ref_policy",
        # A loop's token is 0.9 likely to the reference, so that small ones leave it the likeliest.
        "unlikelihood_coef": 15.0,
        "eval_samples": 1,
        "eval_temperature": 0.0,
        "eval_guidance": "1.5",
        "eval_quantiles": "ends",
    },
}


@dataclass(kw_only=True)
class Config:
    """Settings of one run; each field's help holds its unit. Symbols in brackets are the paper's.

    A field that is not given takes the default of ``task``, which is its own unless ``TASK_DEFAULTS`` has
    another: ``Config(task="repetition").max_new_tokens`` is 128.
    """

    # what to unlearn, in what
    task: str = setting(
        "toxicity",
        "what to unlearn: toxicity, sentiment or repetition; --task NAME --help shows that task's defaults",
    )
    target: Literal["positive", "negative"] = setting(
        "positive", "sentiment that the task of that name steers to"
    )
    model: str | None = setting(
        None, "causal LM, a folder or a hub name; default: the embedded SmolLM2-135M-Instruct"
    )
    trust_remote_code: bool = setting(
        False,
        "run the Python code that --model, or a classifier of --reward, brings along; else it is refused",
    )

    # prompts
    prompts: str | None = setting(
        None,
        "training prompts: .jsonl, .json, .csv, .tsv, .txt (one a line; each also .gz), .parquet, or hf:NAME,"
        " hf:NAME:SPLIT, hf:NAME:CONFIG:SPLIT of the datasets library; default: the task's",
    )
    prompt_column: str | None = setting(
        None,
        "column of the prompts, with dots into nested fields; the others go to the reward; default: prompt,"
        " else messages",
    )
    min_prompt_characters: int = setting(1, "shorter prompts of files are left out, characters")
    max_prompt_characters: int = setting(0, "longer prompts of files are left out, characters; 0: none is")
    prompt_limit: int = setting(0, "train on so many of the prompts, chosen by --split-seed; 0: on all")
    held_out: str | None = setting(
        None,
        "evaluation prompts in the same formats, or how many of --prompts to hold out; default: the task's,"
        " or a tenth of --prompts, 200 at most",
    )
    split_seed: int = setting(0, "which prompts are held out: another number, others")
    prefix_tokens: int = setting(
        0,
        "length of a prompt, tokens: the first ones of each text, whose others are held-out text; shorter"
        " texts are left out; 0: the whole text is the prompt",
    )
    prefix: str = setting(
        "auto",
        "text before the reward token; auto: what the tokenizer puts first, else <|endoftext|>",
    )

    # reward
    reward: str | None = setting(
        None,
        "package.module:function, called as reward(prompts, completions, **columns) -> list[float |"
        " None], higher is better (this imports and runs its code; async def is awaited); a task's name;"
        " hf:NAME, a sequence-classification model; a sum of these, '0.7*toxicity +"
        " 0.3*package.module:function'; or '1 - NAME', to lower what NAME measures; default: the task's",
    )
    scorer_label: str | None = setting(
        None,
        "label, by name or number, whose probability the classifier hf:NAME rewards; one for each of several,"
        " with commas between; default: the only one",
    )
    scorer_reads: Literal["completion", "prompt+completion"] = setting(
        "completion", "what a classifier is shown"
    )
    reward_cache: Literal["auto", "on", "off"] = setting(
        "auto",
        "keep rewards in rewards.sqlite of the run folder; auto: those of rewards that are asynchronous or"
        " called for one completion at a time",
    )
    reward_batch: int = setting(16, "completions in one call of an asynchronous reward")
    reward_concurrency: int = setting(16, "calls of an asynchronous reward under way at once")
    reward_timeout: float = setting(60.0, "limit for one call of an asynchronous reward, seconds; 0: none")
    reward_retries: int = setting(4, "further attempts after a failed call of an asynchronous reward")
    reward_backoff: float = setting(
        1.0, "wait before the second attempt, seconds; doubled before each further one, 60 at most"
    )
    accept_changed_reward: bool = setting(
        False,
        "go on with --resume although the reward's code, weights or settings are others than before: what was"
        " scored keeps its rewards, and one pool ranks both",
    )

    # run folder
    output: str | None = setting(
        None, "run folder to make; default: runs/<task>, with a --reward of your own runs/<its name>"
    )
    resume: bool = setting(False, "go on with the run in --output from its last checkpoint")

    # pool
    quantiles: int = setting(5, "reward quantiles, one reward token each [K]; 1: no conditioning")
    ties: Literal["same", "arrival", "random"] = setting(
        "same",
        "equal rewards share a quantile, the one in which their middle lies (the lowest reward is in the"
        " worst and the highest in the best), or are split by arrival or at random",
    )
    quantile_weights: str = setting(
        "extremes",
        "shares of the training draws: extremes (worst and best alone), equal (the paper), best (that one"
        " alone), or numbers from worst to best as '2,1,0,1,2'",
    )

    # sampling
    initial_samples: int = setting(12, "completions a training prompt from the untouched model")
    explore_samples: int = setting(4, "completions a training prompt in each later round")
    guidance: float = setting(
        1.5,
        "w in log p = log p(worst) + w (log p(best) - log p(worst)) when exploring; 1 is the paper",
    )
    explore_token: Literal["best", "random"] = setting(
        "best", "reward token that explores; random: drawn for each prompt anew, in place of the best one"
    )
    max_new_tokens: int = setting(20, "length of a completion, tokens")
    min_new_tokens: int = setting(3, "end of text is blocked before this many tokens")
    temperature: float = setting(1.0, "sampling temperature of what is trained on; 0: greedy")
    explore_temperature: float | None = setting(
        None, "the same in each later round; default: as in the first, --temperature"
    )
    top_p: float = setting(0.9, "nucleus of the same sampling, share of the probability mass")
    max_prompt_tokens: int = setting(
        0,
        "longest prompt, tokens; longer ones are left out and counted; 0: what the model's positions leave"
        " beside the new tokens, 1024 at most; with --prefix-tokens texts are cut behind so many",
    )
    long_prompts: Literal["leave_out", "cut"] = setting(
        "leave_out",
        "prompts that are too long: left out, or cut to their last tokens; a chat, which would lose its"
        " opening, is left out either way",
    )
    sample_batch: int = setting(
        128,
        "completions sampled side by side; halved where the memory does not suffice; a resumed run may have"
        " fewer, which changes what is drawn from there on",
    )
    rollout: Literal["transformers", "vllm"] = setting(
        "transformers",
        "engine that samples what is trained on; vllm takes a GPU and cannot guide (--guidance 1)",
    )
    vllm_server: str | None = setting(
        None,
        "`vllm serve` to sample by, http://host:port; the run shows how to start it; default: vLLM in this"
        " process",
    )
    vllm_timeout: float = setting(
        600.0, "limit for one request to that server, and for waiting until it is up, seconds"
    )
    vllm_retries: int = setting(5, "further attempts after a failed request to that server")
    vllm_memory: float = setting(0.3, "share of the GPU's memory that vLLM in this process may use")

    # learning
    rounds: int = setting(2, "rounds of sampling and learning; the first samples the untouched model")
    steps: int = setting(64, "optimizer steps a round")
    batch_size: int = setting(16, "samples a step")
    micro_batch: int = setting(16, "samples a forward pass; smaller takes less memory, same result")
    learning_rate: float = setting(2e-4, "AdamW step size for the model")
    reward_token_lr: float = setting(1e-2, "AdamW step size for the reward-token rows")
    lora_rank: int = setting(
        0, "train LoRA adapters of this rank beside the frozen weights (needs peft); 0: train all weights"
    )
    lora_alpha: float = setting(
        0.0, "scale of the adapters: their update is times alpha / rank; 0: twice the rank"
    )
    lora_targets: str = setting(
        "all-linear",
        "layers with an adapter: all-linear, which is each but the head, or names as 'q_proj,v_proj'",
    )
    warmup_steps: int = setting(10, "steps of linear warm-up; linear decay to 0 after them")
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm")
    max_bad_steps: int = setting(
        5, "stop after so many steps in a row without finite loss and gradient, all skipped; 0: never"
    )

    # loss
    kl_coef: float = setting(
        1.0, "weight of the token-level KL to the untouched model [beta]; the paper: 0.05, without contrast"
    )
    kl: Literal["policy_ref", "ref_policy", "sampled"] = setting(
        "policy_ref",
        "KL(policy || reference), as the authors' code, the reverse, as printed, or its estimate from the"
        " sampled token alone",
    )
    kl_stop: float = setting(0.0, "stop when the KL of a step is above this, nats per token; 0: never")
    kl_target: float = setting(
        0.0,
        "adapt kl_coef after each step so that the KL stays near this, nats per token (Ziegler et al. 2019);"
        " 0: kl_coef stays as it is",
    )
    kl_horizon: int = setting(10_000, "how slowly kl_target adapts kl_coef, samples")
    entropy_coef: float = setting(0.0, "weight of the entropy bonus [gamma]")
    contrast_coef: float = setting(
        1.0, "weight of -log p(own reward token | completion), which makes few samples enough; 0: the paper"
    )
    unlikelihood_coef: float = setting(
        0.0, "weight of -log(1 - p) of every token that repeats an n-gram of its completion (Welleck et al.)"
    )
    unlikelihood_ngram: int = setting(
        4, "length of the n-grams whose repetition unlikelihood punishes, tokens"
    )
    impl: Literal["auto", "eager", "cpp", "triton"] = setting(
        "auto", "implementation of the loss; auto: C++ on the CPU, Triton on a GPU"
    )

    # evaluation
    eval_samples: int = setting(5, "completions a held-out prompt and sampling mode")
    eval_temperature: float = setting(1.0, "sampling temperature in the evaluation; 0: greedy")
    eval_top_p: float = setting(0.9, "nucleus in the evaluation")
    eval_guidance: str = setting("1.5,2", "values of w to evaluate, comma-separated; w = 1 always is")
    eval_quantiles: Literal["all", "ends"] = setting(
        "all", "quantiles whose token is evaluated alone; ends: the worst and the best"
    )
    eval_modes: Literal["all", "best"] = setting(
        "all",
        "rows of the table; best: the untouched model and the best token alone, in a fraction of the time",
    )

    # machine
    precision: Literal["auto", "bf16", "fp16", "fp32"] = setting(
        "auto",
        "mixed precision; auto: bf16 where the machine is faster in it (tried out at the start), else fp32",
    )
    threads: int = setting(0, "CPU threads; 0: one for each core that this process may use")
    gradient_checkpointing: bool = setting(
        False, "compute each layer again in the backward pass: less memory, a third more time, same result"
    )
    seed: int = setting(0, "seed of everything random")
    checkpoint_every: int = setting(32, "steps between checkpoints")
    report_to: str = setting(
        "", "trackers beside metrics.jsonl: tensorboard, trackio, several with commas between; default: none"
    )
    export_head: Literal["own", "tied"] = setting(
        "own",
        "head of the exported model where the base model ties it to the embeddings: own, a second table in"
        " which no reward token wins, or tied, which is smaller and what vLLM wants of Gemma: engines but"
        " transformers are then to be told suppress_tokens of its generation config",
    )
    show_offensive: bool = setting(False, "do not mask the worst words in the terminal")

    # The generated __init__ cannot tell a default from a value that equals it: what was given is noted here.
    def __new__(cls, **given: Any) -> Self:
        self = super().__new__(cls)
        self.__dict__["given"] = given
        return self

    def __post_init__(self) -> None:
        given = self.__dict__.pop("given")
        for name, value in TASK_DEFAULTS.get(self.task, {}).items():
            if name not in given:
                setattr(self, name, value)

    @property
    def output_folder(self) -> Path:
        return _output_folder(self)

    def weights(self) -> list[float]:
        """Share of the training draws for each quantile, worst first; sums to 1."""
        if self.quantile_weights == "equal" or self.quantiles == 1:
            return [1 / self.quantiles] * self.quantiles
        if self.quantile_weights == "extremes":
            return [0.5, *[0.0] * (self.quantiles - 2), 0.5]
        if self.quantile_weights == "best":
            return [*[0.0] * (self.quantiles - 1), 1.0]
        values = numbers("quantile_weights", self.quantile_weights)
        if len(values) != self.quantiles or min(values) < 0 or not sum(values) > 0:
            raise UsageError(
                f"quantile_weights = {self.quantile_weights!r}; give extremes, equal, best, or"
                f" {self.quantiles} numbers >= 0, worst quantile first, not all 0"
            )
        return [value / sum(values) for value in values]

    def held_out_count(self) -> int | None:
        """How many prompts to hold out, where ``held_out`` says that; None: it does not."""
        if self.held_out is None or not self.held_out.isdecimal():
            return None
        count = int(self.held_out) if len(self.held_out) <= 10 else MOST + 1
        if not 1 <= count <= MOST:
            raise UsageError(f"held_out = {self.held_out}; give at least 1, at most {MOST}, or a file")
        return count

    def guidances(self) -> list[float]:
        """The values of w to evaluate."""
        return numbers("eval_guidance", self.eval_guidance)

    def temperature_of(self, round: int) -> float:
        """Sampling temperature in a round (from 0)."""
        value: float = getattr(self, self._exploring_by if round else "temperature")
        return value

    @property
    def _exploring_by(self) -> str:
        """Name of the setting that holds the temperature of later rounds."""
        return "temperature" if self.explore_temperature is None else "explore_temperature"

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
        at_least = {
            "quantiles": 1,
            "initial_samples": 1,
            "explore_samples": 1,
            "max_new_tokens": 1,
            "min_new_tokens": 0,
            "max_prompt_tokens": 0,
            "prefix_tokens": 0,
            "min_prompt_characters": 1,
            "max_prompt_characters": 0,
            "prompt_limit": 0,
            "split_seed": 0,
            "reward_batch": 1,
            "reward_concurrency": 1,
            "reward_timeout": 0.0,
            "reward_retries": 0,
            "reward_backoff": 0.0,
            "sample_batch": 1,
            "vllm_timeout": 1.0,
            "vllm_retries": 0,
            "rounds": 1,
            "steps": 1,
            "batch_size": 1,
            "micro_batch": 1,
            "warmup_steps": 0,
            "eval_samples": 1,
            "threads": 0,
            "seed": 0,
            "checkpoint_every": 1,
            "learning_rate": 0.0,
            "reward_token_lr": 0.0,
            "kl_coef": 0.0,
            "kl_stop": 0.0,
            "kl_target": 0.0,
            "kl_horizon": 1,
            "max_bad_steps": 0,
            "contrast_coef": 0.0,
            "entropy_coef": 0.0,
            "unlikelihood_coef": 0.0,
            "unlikelihood_ngram": 1,
            "lora_rank": 0,
            "lora_alpha": 0.0,
            "temperature": 0.0,
            "eval_temperature": 0.0,
        }
        at_most = {"quantiles": 1000, "seed": 2**63 - 1, "split_seed": 2**63 - 1}
        if self.explore_temperature is not None:
            at_least["explore_temperature"] = 0.0
        for name, low in at_least.items():
            value = getattr(self, name)
            if not value >= low or value == math.inf:
                raise UsageError(f"{name} = {_shown(value)}; give at least {low}")
            high = at_most.get(name, MOST)
            if isinstance(value, int) and value > high:
                raise UsageError(f"{name} = {_shown(value)}; give at most {high}")
        if not (math.isfinite(self.max_grad_norm) and self.max_grad_norm > 0):
            raise UsageError(f"max_grad_norm = {self.max_grad_norm}; give a number above 0")
        for name in ("top_p", "eval_top_p"):
            if not 0 < getattr(self, name) <= 1:
                raise UsageError(f"{name} = {getattr(self, name)}; give a share in (0, 1]")
        if not math.isfinite(self.guidance):
            raise UsageError(f"guidance = {self.guidance}; give a number, 1 for plain conditioning")
        if self.min_new_tokens > self.max_new_tokens:
            raise UsageError(
                f"min_new_tokens = {self.min_new_tokens} is above max_new_tokens = {self.max_new_tokens}"
            )
        if self.prefix_tokens and 0 < self.max_prompt_tokens <= self.prefix_tokens:
            raise UsageError(
                f"prefix_tokens = {self.prefix_tokens} leaves no held-out text within max_prompt_tokens ="
                f" {self.max_prompt_tokens}"
            )
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
        for name in ("kl_stop", "kl_target"):
            if getattr(self, name) and not self.kl_coef:
                raise UsageError(
                    f"{name} = {getattr(self, name):g} needs the KL, but kl_coef = 0 leaves it out; give one"
                )
        if self.kl_target and self.kl_horizon < self.batch_size:
            raise UsageError(
                f"kl_horizon = {self.kl_horizon} is below batch_size = {self.batch_size}; give at least that"
            )
        if not self.lora_targets.replace(",", "").strip():
            raise UsageError(
                f"lora_targets = {self.lora_targets!r}; give all-linear, or layers' names with commas between"
            )
        if self.quantiles == 1 and self.contrast_coef:
            raise UsageError(
                f"contrast_coef = {self.contrast_coef} needs at least 2 quantiles to tell apart; give 0"
            )
        self._check_rollout()
        self.weights()
        self.guidances()
        self.held_out_count()

    def _check_rollout(self) -> None:
        if not 0 < self.vllm_memory <= 1:
            raise UsageError(f"vllm_memory = {self.vllm_memory}; give a share in (0, 1]")
        if self.rollout == "transformers":
            if self.vllm_server is not None:
                raise UsageError(f"vllm_server = {self.vllm_server!r} is for rollout = vllm; give that, too")
            return
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

    def check_resumes(self, saved: Config) -> None:
        """Raise UsageError unless a run with the settings ``saved`` can go on with these."""
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(saved, field.name)
            if mine != theirs and field.name not in FREE_ON_RESUME:
                raise UsageError(
                    f"{field.name} = {mine!r}, but the run to resume has {theirs!r}; resume it with its own"
                )

    def save(self, path: Path) -> None:
        """Write the settings as YAML, which ``--config`` reads back."""
        with replacing(path) as scratch:
            scratch.write_text(yaml.safe_dump(dataclasses.asdict(self), sort_keys=False))


MOST = 2**31 - 1  # of anything that is counted


def _shown(value: Any) -> str:
    """The value for an error: a number of thousands of digits has no text at all."""
    try:
        return f"{value}"
    except ValueError:
        return "a number of thousands of digits"


def _output_folder(settings: Any) -> Path:
    """The folder given, else one by the name of the user's own reward, else by the task's."""
    if settings.output:
        return Path(settings.output)
    own = settings.reward if settings.reward not in (None, *TASK_DEFAULTS) else None
    return Path("runs", settings.task if own is None else _short_name(own))


def _short_name(reward: str) -> str:
    """What a folder is called after a reward: "score" for my_pkg.my_module:score, "name" for hf:org/name."""
    bare = re.sub(r"hf:([^\s+*]*/)?|[\w.]+:", "", reward)
    return re.sub(r"[^A-Za-z0-9._]+", "-", bare).strip("-.")[:60] or "reward"


def numbers(name: str, text: str) -> list[float]:
    """The finite numbers of a text such as "1, 3"; ``name`` is what an error calls them."""
    try:
        values = [float(part) for part in str(text).split(",") if part.strip()]
    except ValueError:
        raise UsageError(f"{name} = {text!r}; give numbers with commas between") from None
    if not all(math.isfinite(value) for value in values):
        raise UsageError(f"{name} = {text!r}; give finite numbers")
    return values


def parse(arguments: Sequence[str], program: str, defaults: Mapping[str, Any] | None = None) -> Config:
    """Settings from flags, over those of ``--config FILE`` (YAML), over the defaults; checked.

    Args:
        defaults: the program's own, under the task's.
    """
    about = "Unlearn a property (Quark)."
    parser = _ConfigParser(Config, prog=program, description=about, formatter_class=_Help)
    parser.add_argument("--config", metavar="FILE", help="YAML file of these settings; flags win")
    add_scorer(parser)
    known = {f.name for f in dataclasses.fields(Config)}
    # Help waits for the second pass, which knows the task and so its defaults.
    first, _ = parser.parse_known_args([flag for flag in arguments if flag not in ("-h", "--help")])
    file: dict[str, Any] = {}
    if first.config:
        file = _read_yaml(Path(first.config), known)
    elif first.resume and (saved := _output_folder(first) / "config.yaml").exists():
        own = _read_run(saved, known)  # a run goes on as it began; only where it lies now is asked again
        # Nor does a folder consent to its own code.
        asked_again = ("output", "resume", "trust_remote_code")
        file = {name: value for name, value in own.items() if name not in asked_again}
    parser.set_defaults(**file)
    task = parser.parse_known_args([flag for flag in arguments if flag not in ("-h", "--help")])[0].task
    parser.set_defaults(**(dict(defaults or {}) | TASK_DEFAULTS.get(task, {}) | file))
    given = vars(parser.parse_args(list(arguments)))
    given.pop("config")
    config = Config(**given)
    config.check()
    return config


def load_config(path: Path) -> Config:
    """The settings of a YAML file, as ``Config.save`` writes them; checked."""
    config = Config(**_read_run(path, {f.name for f in dataclasses.fields(Config)}))
    config.check()
    return config


def _read_run(path: Path, known: set[str]) -> dict[str, Any]:
    """The settings of a run's own config.yaml, which may be of an earlier version."""
    settings = _read_yaml(path, known)
    if {"resume", "max_prompt_tokens"} <= settings.keys():  # a whole record, as ``Config.save`` writes it
        settings.setdefault("long_prompts", "cut")  # what every run did before it was a setting
    return settings


def _read_yaml(path: Path, known: set[str]) -> dict[str, Any]:
    try:
        settings = _flat_mapping(read_bytes(path, limit=1 << 20).decode("utf-8"))
    # A date without its day, a number of thousands of digits, bytes that are no text: ValueErrors all.
    except (OSError, EOFError, zlib.error, ValueError, TooLarge, yaml.YAMLError) as error:
        raise UsageError(f"--config {path}: {' '.join(str(error).split())}") from error
    types = get_type_hints(Config)  # not the fields' own: HfArgumentParser rewrites those
    for name, value in settings.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UsageError(f"--config {path}: unknown setting {name!r}{hint}")
        settings[name] = _as_type(path, name, value, types[name])
    return settings


def _flat_mapping(text: str) -> dict[Any, Any]:
    """The mapping of single values that a YAML text holds.

    Nothing else is built: lists within lists nest without end, aliases of aliases multiply without end, and
    a tag's value may be one that the tag's constructor never expected.
    """
    depth, name = 0, ""
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
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
        name = getattr(event, "value", name)
        depth -= isinstance(event, yaml.CollectionEndEvent)
    settings = yaml.safe_load(text)
    if not isinstance(settings, dict):
        raise ValueError("needs 'setting: value' lines")
    return settings


def _as_type(path: Path, name: str, value: Any, wanted: Any) -> Any:
    """The YAML value in the field's type; YAML reads 1e-3 as a text and 1 as an integer."""
    if type(None) in get_args(wanted) and value is not None:
        (wanted,) = (kind for kind in get_args(wanted) if kind is not type(None))
    try:
        if wanted in (int, float) and isinstance(value, bool):
            raise ValueError
        if wanted is float:
            return float(value)
        if wanted is int:
            if isinstance(value, float) and value != int(value):
                raise ValueError
            return int(value)
    except (TypeError, ValueError, OverflowError):  # the last is an infinity where an int belongs
        kind = "a whole number" if wanted is int else "a number"
        raise UsageError(f"--config {path}: {name} = {value!r}; give {kind}") from None
    if wanted is bool and not isinstance(value, bool):
        raise UsageError(f"--config {path}: {name} = {value!r}; give true or false")
    if get_origin(wanted) is Literal:
        if value not in get_args(wanted):
            choices = ", ".join(map(repr, get_args(wanted)))
            raise UsageError(f"--config {path}: {name} = {value!r}; choose from {choices}")
    elif wanted is str and value is None:
        raise UsageError(f"--config {path}: {name} is null; give a text, or leave it out")
    elif wanted is not bool and value is not None:
        return str(value)
    return value
