"""The settings that there are: for each its default, its help, what it may be and when it may change."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

COLDEST, STRONGEST = 1e-6, 1e6  # temperature above 0, and w: beyond them float32 has no probabilities
THREADS = "CPU threads; 0: $OMP_NUM_THREADS, else one for each core that this process may use"
MOST = 2**31 - 1  # of anything that is counted


def setting(
    default: Any,
    help: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: int | None = None,
    changes: Literal["", "resume", "grid"] = "",
    alias: str = "",
) -> Any:
    """A field of the settings.

    Args:
        help: what it means, with its unit; --help adds the default.
        at_least: the lowest number; default: 0, unless there is ``above``.
        at_most: the highest number; default: ``MOST`` for a whole one, any finite one else.
        changes: "resume": may be another when a run is resumed, as it leaves the run's samples and weights
            as they would be; "grid": also when a grid of ablations goes on, as no number depends on it.
        alias: another flag, for a name that is no field's in Python.
    """
    if at_least is None and above is None and type(default) in (int, float):
        at_least = type(default)(0)
    bounds = {"at_least": at_least, "above": above, "at_most": at_most}
    metadata = {"help": help, "bounds": bounds, "changes": changes, "alias": alias}
    return dataclasses.field(default=default, metadata=metadata)


def wanted_range(value: Any, at_least: float | None, above: float | None, at_most: int | None) -> str:
    """What to give in place of a value out of these bounds; "" for a value within them."""
    if value is None:
        return ""
    if above is not None and not above < value <= (at_most or sys.float_info.max):
        return f"a number above {above}" if at_most is None else f"a share in ({above}, {at_most}]"
    if at_least is not None:
        if not (at_least <= value and abs(value) < math.inf):
            return "a number" if at_least == -math.inf else f"at least {at_least}"
        if isinstance(value, int) and value > (at_most or MOST):
            return f"at most {at_most or MOST}"
    return ""


_KINDS: dict[Any, str] = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}


def plain(value: Any, kind: Any) -> Any:
    """A program's value of a setting of this type as a YAML file would have it, where that is the same thing.

    A path is its text, a number may stand for a text ("64" for ``held_out=64``) and 8.0 for 8, and numbers of
    numpy and torch are Python's.
    """
    kinds = get_args(kind) or (kind,)
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    if str in kinds and type(value) in (int, float):
        return text_of(value)
    if kind == str | None and isinstance(value, str) and value.startswith("~"):
        return os.path.expanduser(value)  # in YAML, after "=" and in a program no shell does it
    if int in kinds and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def wanted_type(value: Any, kind: Any) -> str:
    """What to give in place of a value that is not of a setting's type; "" for one that is."""
    kinds = get_args(kind) or (kind,)
    if get_origin(kind) is Literal:  # which lists its values
        return ""
    if value == "" and kind == str | None:
        # Such as an unset variable of the shell: the default in its place was not asked for.
        return "a value, or leave it out"
    allowed = tuple({*kinds, int} if float in kinds else kinds)
    if isinstance(value, allowed) and (bool in kinds or not isinstance(value, bool)):
        return ""
    return next(_KINDS[one] for one in kinds if one in _KINDS)


def text_of(value: Any) -> str:
    """The value for an error: a number of thousands of digits has no text at all."""
    try:
        return f"{value}"
    except ValueError:
        return "a number of thousands of digits"


# One class for each heading of --help, which HfArgumentParser takes from _argument_group_name. Symbols in
# brackets are the paper's.


@dataclass(kw_only=True)
class TaskSettings:
    _argument_group_name = "what to unlearn, in what"
    task: str = setting(
        "toxicity",
        "what to unlearn: toxicity, sentiment or repetition; --task NAME --help all shows that task's"
        " defaults",
    )
    preset: Literal["default", "long", "paper", "look"] = setting(
        "default",
        "named defaults over the task's: long (all weights, mostly more steps, every row), paper (its method"
        " and sizes), look (every part, in minutes); --preset NAME --help all shows them",
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
        changes="resume",
    )


@dataclass(kw_only=True)
class PromptSettings:
    _argument_group_name = "prompts"
    prompts: str | None = setting(
        None,
        "training prompts: .jsonl, .json, .csv, .tsv, .txt (one a line; each also .gz), .parquet, or hf:NAME,"
        " hf:NAME:SPLIT, hf:NAME:CONFIG:SPLIT of the datasets library; default: the task's",
    )
    scored: str | None = setting(
        None,
        "completions that are scored already, in the same formats: prompt, completion and reward (without"
        " it the run's scores them) or KTO's label, or chosen and rejected; they are the pool's first"
        " samples, and their prompts are trained on; with --initial-samples 0 learning begins at once;"
        " default: none",
    )
    prompt_column: str | None = setting(
        None,
        "column of the prompts, with dots into nested fields; other columns go to the reward; default:"
        " prompt, else messages",
    )
    min_prompt_characters: int = setting(1, "shorter prompts of files are left out, characters", at_least=1)
    max_prompt_characters: int = setting(0, "longer prompts of files are left out, characters; 0: none is")
    prompt_limit: int = setting(0, "train on so many of the prompts, chosen by --split-seed; 0: all")
    held_out: str | None = setting(
        None,
        "evaluation prompts in the same formats, or how many of --prompts to hold out; default: the task's"
        " or preset's, else a tenth of --prompts, 200 at most",
        changes="resume",
    )
    evaluate_on: Literal["test", "development"] = setting(
        "test",
        "prompts to evaluate on; test: the held-out ones; development: as many training prompts, a quarter"
        " at most, which are then not trained on, to choose settings by",
    )
    split_seed: int = setting(0, "seed that chooses which prompts are held out", at_most=2**63 - 1)
    prefix_tokens: int = setting(
        0,
        "length of a prompt, tokens: the beginning of each text, whose rest is held-out text; shorter texts"
        " are left out; 0: the whole text is the prompt",
    )
    prefix: str = setting(
        "auto",
        "text before the reward token; auto: what the tokenizer puts first, else <|endoftext|> if it has"
        " that",
    )


@dataclass(kw_only=True)
class RewardSettings:
    _argument_group_name = "reward"
    reward: str | None = setting(
        None,
        "package.module:function, called as reward(prompts, completions, **columns) -> list[float |"
        " None], higher is better (this imports and runs its code; async def is awaited); a task's name;"
        " hf:NAME or hf:NAME:LABEL, a sequence-classification model; a sum of these, '0.7*toxicity +"
        " 0.3*package.module:function'; or '1 - NAME', to lower what NAME measures; none, where"
        " --scored brings all rewards and nothing is sampled; default: the task's",
    )
    judge: str = setting(
        "auto",
        "scorers that training never sees, shown beside the reward in the evaluation; in any form of"
        " --reward, with commas between; auto: the task's own judge, where the reward is the task's; none",
        changes="resume",
    )
    scorer_label: str | None = setting(
        None,
        "label, by name or number, whose probability under hf:NAME is the reward; one for each of several,"
        " with commas between; default: the only one",
    )
    scorer_reads: Literal["completion", "prompt+completion"] = setting(
        "completion", "what a classifier is shown"
    )
    reward_cache: Literal["auto", "on", "off"] = setting(
        "auto",
        "keep rewards in rewards.sqlite of the run folder; auto: those of functions that are asynchronous"
        " or called for one completion at a time",
        changes="grid",
    )
    reward_batch: int = setting(
        16, "completions in one call of an asynchronous reward", at_least=1, changes="grid"
    )
    reward_concurrency: int = setting(
        16, "calls of an asynchronous reward under way at once", at_least=1, changes="grid"
    )
    reward_timeout: float = setting(
        60.0, "limit for one call of an asynchronous reward, seconds; 0: none", changes="grid"
    )
    reward_retries: int = setting(
        4, "further attempts after a failed call of an asynchronous reward", changes="grid"
    )
    reward_backoff: float = setting(
        1.0,
        "wait before the second attempt, seconds; doubled before each further one, 60 at most",
        changes="grid",
    )
    reward_per_minute: int = setting(
        0,
        "most calls of each asynchronous reward in any 60 seconds, by all processes, repeated ones counted"
        " again; 0: no limit",
        changes="grid",
    )
    reward_tokens_per_minute: int = setting(
        0,
        "most tokens of each asynchronous reward in any 60 seconds, likewise; the function then returns"
        " (values, tokens); 0: no limit",
        changes="grid",
    )
    accept_changed_reward: bool = setting(
        False,
        "go on with --resume or --from, or mix in --scored, although the rewards are of other code, weights"
        " or settings: what was scored keeps its rewards, and one pool ranks both",
        changes="resume",
    )


@dataclass(kw_only=True)
class FolderSettings:
    _argument_group_name = "run folder"
    output: str | None = setting(
        None,
        "run folder to make; default: runs/<task>, with a --reward of your own runs/<its name>",
        changes="grid",
    )
    resume: bool = setting(False, "go on with the run in --output from its last checkpoint", changes="grid")
    from_run: str | None = setting(
        None,
        "(--from) finished run to train further, with its weights and pool, for --rounds more; its settings"
        " are the defaults, and --output is RUN-2 unless it is given; default: none",
        alias="--from",
    )
    push_to_hub: str | None = setting(
        None,
        "repository of the Hugging Face hub, USER/NAME, to upload the finished model to; made at the start"
        " if it is not there, public unless the organisation's default is private; default: none",
        changes="grid",
    )
    hub_private_repo: bool = setting(
        False, "make that repository private; one that is there stays as it is", changes="grid"
    )


@dataclass(kw_only=True)
class PoolSettings:
    _argument_group_name = "pool"
    quantiles: int = setting(
        5, "reward quantiles, one reward token each [K]; 1: no conditioning", at_least=1, at_most=1000
    )
    ties: Literal["same", "arrival", "random"] = setting(
        "same",
        "equal rewards; same: share the quantile in which their middle lies (the lowest reward is in the"
        " worst, the highest in the best); arrival, random: are split in that order",
    )
    quantile_weights: str = setting(
        "extremes",
        "shares of the training draws: extremes (worst and best alone), equal (the paper), best (that one"
        " alone), or numbers from worst to best as '2,1,0,1,2'",
    )


@dataclass(kw_only=True)
class SamplingSettings:
    _argument_group_name = "sampling"
    initial_samples: int = setting(
        4, "completions of each training prompt by the base model; 0, with --scored: none"
    )
    explore_samples: int = setting(2, "completions of each training prompt in each later round", at_least=1)
    guidance: float = setting(
        1.0,
        "w in log p = log p(worst) + w (log p(best) - log p(worst)) in later rounds; 1: the best token alone",
        at_least=-math.inf,
    )
    explore_token: Literal["best", "random"] = setting(
        "best", "reward token by which later rounds sample; random: drawn for each prompt anew"
    )
    max_new_tokens: int = setting(20, "length of a completion, tokens", at_least=1)
    min_new_tokens: int = setting(3, "end of text is blocked before this many tokens")
    temperature: float = setting(1.0, "sampling temperature of what is trained on; 0: greedy")
    explore_temperature: float | None = setting(
        None, "the same in each later round; default: as in the first, --temperature", at_least=0.0
    )
    top_p: float = setting(
        0.9, "nucleus of the same sampling, share of the probability mass", above=0, at_most=1
    )
    max_prompt_tokens: int = setting(
        0,
        "longest prompt, tokens; longer ones are left out and counted; 0: what the model's positions leave"
        " beside the new tokens, 1024 at most; with --prefix-tokens texts are cut after so many",
    )
    long_prompts: Literal["leave_out", "cut"] = setting(
        "leave_out",
        "prompts that are too long: left out, or cut to their last tokens; a chat, which would lose its"
        " opening, is left out either way",
    )
    sample_batch: int = setting(
        256,
        "completions of a batch, guided half as many; a batch has random numbers of its own, so this decides"
        " what is drawn; halved where the memory does not suffice; a resumed run may have fewer",
        at_least=1,
        changes="resume",
    )
    decoding: Literal["eager", "static", "graph"] = setting(
        "eager",
        "how the model is run for each token; static: in steps of fixed shapes, with a cache of fixed size;"
        " graph: the same, recorded once as a CUDA graph, for a GPU (not yet tried on one); only eager drops"
        " completions that have ended from a batch; where it drops none, the samples are the same but for"
        " rounding",
        changes="resume",
    )
    sample_at_once: int = setting(
        0,
        "how many of a batch's completions are sampled at the same time; 0: all, on a GPU a half, a quarter"
        " ... where free memory holds no more; fewer change what is drawn",
        changes="resume",
    )
    rollout: Literal["transformers", "vllm"] = setting(
        "transformers",
        "engine that samples what is trained on; vllm needs a GPU, here or on --vllm-server, and cannot"
        " guide: --guidance 1",
    )
    vllm_server: str | None = setting(
        None,
        "`vllm serve` to sample by, http://host:port; the run shows how to start it; default: vLLM in this"
        " process",
        changes="resume",
    )
    vllm_timeout: float = setting(
        600.0,
        "limit for one request to that server, and for waiting until it is up, seconds",
        at_least=1.0,
        changes="resume",
    )
    vllm_retries: int = setting(5, "further attempts after a failed request to that server", changes="resume")
    vllm_memory: float = setting(
        0.3,
        "share of the GPU's memory that vLLM in this process may use",
        above=0,
        at_most=1,
        changes="resume",
    )


@dataclass(kw_only=True)
class LearningSettings:
    _argument_group_name = "learning"
    rounds: int = setting(2, "rounds of sampling and learning; the first samples the base model", at_least=1)
    steps: int = setting(24, "optimizer steps a round", at_least=1)
    batch_size: int = setting(16, "samples a step", at_least=1)
    micro_batch: int = setting(
        0,
        "samples a forward pass; smaller takes less memory, same result; 0: 16, on a CPU 8, or 4 in float32",
        changes="grid",
    )
    optimizer: Literal["adamw", "adamw-8bit"] = setting(
        "adamw",
        "adamw: PyTorch's; adamw-8bit: bitsandbytes' (an extra), whose moments take 2 bytes a weight in place"
        " of 8, which matters where all weights are trained; other numbers, to their rounding",
    )
    learning_rate: float | None = setting(
        None,
        "AdamW step size for the model; default: the task's or preset's, else 5e-4 for adapters (sentiment"
        " 1e-3), 2e-4 for all weights",
        at_least=0.0,
    )
    reward_token_lr: float = setting(1e-2, "AdamW step size for the reward-token rows")
    lora_rank: int = setting(
        16, "rank of the LoRA adapters that are trained beside the frozen weights; 0: train all weights"
    )
    lora_alpha: float = setting(
        0.0, "scale of the adapters: their update is multiplied by alpha / rank; 0: twice the rank"
    )
    lora_targets: str = setting(
        "all-linear",
        "layers with an adapter; all-linear: each but the head; attention: those of it alone; or names as"
        " 'q_proj,v_proj'",
    )
    warmup_steps: int = setting(10, "steps of linear warm-up; linear decay to 0 after them")
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm", above=0)
    max_bad_steps: int = setting(
        5,
        "stop after so many steps in a row whose loss or gradient is not finite, all skipped; 0: never",
        changes="resume",
    )


@dataclass(kw_only=True)
class LossSettings:
    _argument_group_name = "loss"
    kl_coef: float = setting(
        1.0, "weight of the token-level KL to the base model [beta]; the paper: 0.05, without contrast"
    )
    kl: Literal["policy_ref", "ref_policy", "sampled"] = setting(
        "policy_ref",
        "policy_ref: KL(policy || reference), as the authors' code; ref_policy: the reverse, as printed;"
        " sampled: an estimate from the sampled token",
    )
    prompt_kl_coef: float = setting(
        0.0,
        "weight of the KL to the base model on the prompts' own tokens, under every reward token that a"
        " step reads: it keeps the model close on text that is no completion",
    )
    kl_stop: float = setting(
        0.0, "stop when the KL of a step is above this, nats per token; 0: never", changes="resume"
    )
    kl_target: float = setting(
        0.0,
        "adapt kl_coef after each step so that the KL stays near this, nats per token (Ziegler et al. 2019);"
        " 0: kl_coef stays as it is",
    )
    kl_horizon: int = setting(10_000, "how slowly kl_target adapts kl_coef, samples", at_least=1)
    entropy_coef: float = setting(0.0, "weight of the entropy bonus [gamma]")
    contrast_coef: float = setting(
        1.0,
        "weight of the contrast (--contrast-with, --contrast-margin), which makes few samples enough; 0:"
        " none, as in the paper",
    )
    contrast_with: Literal["both", "mirror", "base"] = setting(
        "both",
        "what the probability of a completion under a reward token is compared with; mirror: that under its"
        " mirror token (worst for best); base: the base model's, which good ones are to exceed",
    )
    contrast_margin: float = setting(
        5.0, "difference of log p that the contrast asks for, nats: more moves the model further", above=0
    )
    unlikelihood_coef: float = setting(
        0.0, "weight of -log(1 - p) of every token that repeats an n-gram of its completion (Welleck et al.)"
    )
    unlikelihood_ngram: int = setting(
        4, "length of the n-grams whose repetition unlikelihood punishes, tokens", at_least=1
    )
    impl: Literal["auto", "eager", "cpp", "triton"] = setting(
        "auto", "implementation of the loss; auto: C++ on the CPU, Triton on a GPU"
    )


@dataclass(kw_only=True)
class EvaluationSettings:
    _argument_group_name = "evaluation"
    eval: bool = setting(
        True,
        "evaluate the trained model at the end; without it (--no-eval) python -m quark_fast.evaluate RUN does"
        " so later",
        changes="resume",
    )
    eval_samples: int = setting(
        5, "completions of each held-out prompt in each row", at_least=1, changes="resume"
    )
    eval_temperature: float = setting(
        1.0, "sampling temperature in the evaluation; 0: greedy", changes="resume"
    )
    eval_top_p: float = setting(0.9, "nucleus in the evaluation", above=0, at_most=1, changes="resume")
    eval_rows: Literal["ends", "all", "best"] = setting(
        "ends",
        "rows of the table; ends: base model, best token, guided by each w, worst token; all: also the"
        " quantiles between and no token; best: base model and best token alone",
        changes="resume",
    )
    eval_guidance: str | None = setting(
        None,
        "values of w to evaluate, comma-separated; w = 1 always is; default: the task's or preset's, else"
        " 1.5, with --eval-rows all 1.5,2",
        changes="resume",
    )
    keep_best: str = setting(
        "",
        "measure every round on development prompts, taken out of the training prompts, and keep the best"
        " one: a measure with min or max, then bounds relative to the base model's value, as 'judge:min,"
        " perplexity<=1.10'; measures: reward or what it measures (toxicity), judge, perplexity, prompt_fit,"
        " dist3, others of the table; it costs two completions of each such prompt a round, with what scores"
        " them; default: off, the last round is kept",
        changes="resume",
    )
    stop_after: int = setting(
        0, "stop after so many rounds in a row without gain by --keep-best; 0: never", changes="resume"
    )


@dataclass(kw_only=True)
class MachineSettings:
    _argument_group_name = "machine"
    precision: Literal["auto", "bf16", "fp16", "fp32"] = setting(
        "auto",
        "mixed precision; auto: on a GPU bf16, without that fp16; on a CPU bf16 where that is faster (tried"
        " out at the start), else fp32",
    )
    read_batch: int = setting(
        0,
        "texts side by side where they are read, not sampled (perplexity, probe, passages); halved where the"
        " memory does not suffice; 0: on a GPU what free memory holds, on a CPU 1280 tokens, 4 passages",
        changes="resume",
    )
    score_batch: int = setting(
        0,
        "texts side by side in a classifier (hf:NAME) or a task's judge; halved where the memory does not"
        " suffice; 0: on a GPU what free memory holds, on a CPU 32, for a judge 64",
        changes="resume",
    )
    threads: int = setting(0, THREADS, at_most=4096, changes="grid")
    gradient_checkpointing: bool = setting(
        False,
        "compute each layer again in the backward pass: less memory, a third more time, same result",
        changes="resume",
    )
    seed: int = setting(0, "seed of everything random", at_most=2**63 - 1)
    checkpoint_every: int = setting(32, "steps between checkpoints", at_least=1, changes="grid")
    report_to: str = setting(
        "",
        "trackers beside metrics.jsonl: tensorboard, trackio, wandb or another one that accelerate knows,"
        " several with commas between; all: every one that is installed; none; default: none",
        changes="resume",
    )
    export_head: Literal["own", "tied"] = setting(
        "own",
        "head of the exported model where the base model ties it to the embeddings; own: a second table in"
        " which no reward token wins; tied: smaller, and what vLLM wants of Gemma, but engines other than"
        " transformers then need suppress_tokens of its generation config",
        changes="resume",
    )
    export_adapter: bool = setting(
        False,
        "write the LoRA adapters and the reward tokens' rows by themselves, too: model/adapter, as peft loads"
        " them onto the base model",
        changes="resume",
    )
    show_offensive: bool = setting(False, "do not mask the worst words in the terminal", changes="grid")
