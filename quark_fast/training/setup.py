"""What a run is made of, loaded and tried out before it begins: whatever is wrong shows here."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors import SafetensorError

from quark_fast.arguments import load_config
from quark_fast.config import Config
from quark_fast.data import assets
from quark_fast.data.row import Row
from quark_fast.errors import OutOfResources, UsageError
from quark_fast.evaluation.held_out import (
    EvaluationSetup,
    HeldOut,
    control_texts,
    evaluation_sampling,
    first_completions,
    generation_settings,
)
from quark_fast.evaluation.round_measures import check_goal, check_goal_of_task
from quark_fast.files.atomic import disk_error
from quark_fast.model.check_model import Checked, check_model
from quark_fast.model.check_reading import check_fixed_steps
from quark_fast.model.copies import SharedCopy, shared_reference
from quark_fast.model.fixed_step import check_device
from quark_fast.model.loading import decode_fast, load_reference
from quark_fast.model.lora import Lora
from quark_fast.model.policy import Policy
from quark_fast.model.structure import recompute_layers
from quark_fast.ops.loss import Implementation, quark_loss
from quark_fast.rewards.by_name import refuse_code_of
from quark_fast.rewards.reward import Reward
from quark_fast.rewards.weighted_sum import asynchronous_terms, cached, terms
from quark_fast.rollout.sampling import Rollout, Sampler, Sampling
from quark_fast.rollout.transformers import TransformersRollout, sample
from quark_fast.rollout.vllm import check_vllm, vllm_rollout
from quark_fast.runtime import hub, trackers
from quark_fast.runtime.distributed import REPLICATION, Processes
from quark_fast.runtime.machine import Precision, sampling_dtype, set_threads, settled_precision
from quark_fast.runtime.run_folder import REWARDS, ROLLOUT, RunFolder
from quark_fast.tasks.by_name import GivenReward, choose_judges, choose_reward, find_task
from quark_fast.tasks.task import Task
from quark_fast.training.going_on import check_goes_on
from quark_fast.training.objective import Objective
from quark_fast.training.optimizer import check_optimizer
from quark_fast.training.progress import Progress
from quark_fast.training.run_prompts import Given, RunPrompts, encode_prompts, read_prompts
from quark_fast.training.shared_work import SharedWork


@dataclass
class Setup:
    """The parts of a run.

    Attributes:
        before: the settings of the run's start before this one; of a new run, its own.
        sampling_dtype: of frozen copies, which sample and evaluate.
        copied: the one of the policy as it is, for the probe and the next round's samples.
    """

    config: Config
    folder: RunFolder
    processes: Processes
    accelerator: Accelerator
    before: Config
    task: Task
    prompts: RunPrompts
    reward: Reward
    judges: tuple[Reward, ...]
    controls: list[list[int]]
    policy: Policy
    reference: Any
    sampling_dtype: torch.dtype
    copied: SharedCopy
    checked: Checked
    objective: Objective

    @property
    def device(self) -> torch.device:
        device: torch.device = self.accelerator.device
        return device

    @property
    def batch_rows(self) -> int:
        """Completions of a batch, each with a random generator, which a resume does not change."""
        return self.before.sample_batch

    def round_sampling(self, round: int) -> Sampling:
        """How the completions of a round are drawn."""
        config = self.config
        drawn = Sampling(
            config.max_new_tokens, config.min_new_tokens, config.temperature_of(round), config.top_p
        )
        return in_batches(drawn, self.batch_rows, config)

    def held_out_sampling(self) -> Sampling:
        """How the completions of the evaluation are drawn."""
        return in_batches(evaluation_sampling(self.config), self.batch_rows, self.config)

    def measured_on(
        self,
        prompts: HeldOut,
        sampling: Sampling,
        sampler: Sampler = sample,
        shard: tuple[int, int] = (0, 1),
    ) -> EvaluationSetup:
        """What an evaluation on these prompts samples and is scored by."""
        return EvaluationSetup(
            self.policy,
            self.reference,
            self.reward,
            prompts,
            sampling,
            self.config.seed,
            sampler,
            shard,
            self.judges,
            self.controls,
            self.task.shows("prompt_fit"),
            self.config.read_batch,
        )


def in_batches(sampling: Sampling, rows: int, config: Config) -> Sampling:
    """In batches of ``rows``, decoded and no more completions side by side as the settings say."""
    asked = config.sample_at_once
    at_once = min(asked or rows, config.sample_batch, rows)
    at_once = at_once if asked or at_once < rows else 0
    return dataclasses.replace(sampling, rows=rows, at_once=at_once, decoding=config.decoding)


def apart(
    config: Config,
    reward: str | GivenReward | None,
    prompts: str | Path | Sequence[str | Row] | None,
    held_out: str | Path | Sequence[str | Row] | None,
) -> tuple[Config, GivenReward | None, Given]:
    """A program's settings, reward and prompts; a name among these is a setting, as on the command line."""
    names: dict[str, Any] = {}
    if isinstance(reward, str):
        names["reward"], reward = reward, None
    if isinstance(prompts, str | Path):
        names["prompts"], prompts = prompts, None
    if isinstance(held_out, str | Path):
        names["held_out"], held_out = held_out, None
    return dataclasses.replace(config, **names), reward, Given(prompts, held_out)


def check_folder(config: Config, folder: RunFolder) -> tuple[Precision, Config]:
    """Refuse a folder that the run cannot have; its precision, and ``Setup.before``."""
    if not config.resume:
        folder.check_free()
        folder.check_writable()
        if config.from_run:
            check_goes_on(config, RunFolder(config.from_run))
        return settled_precision(config.precision), config
    folder.check_resumable()
    saved = load_config(folder / "config.yaml")
    if config.precision == "auto":  # whatever would be chosen today, the run goes on as it began
        config.precision = saved.precision
    config.check_resumes(saved)
    for spec in (config.reward, *config.judge.split(",")):
        refuse_code_of(folder.path, spec)
    folder.check_results()
    return config.precision, saved


def settings_to_save(config: Config, before: Config) -> Config:
    """What config.yaml says: the settings that the run has by now, with which a plain --resume goes on.

    Its batches keep the size that they began with, and to mix two rewards is agreed to for one start.
    """
    kept = {name: getattr(before, name) for name in ("sample_batch", "accept_changed_reward")}
    return dataclasses.replace(config, resume=False, **kept)


def set_up(
    config: Config,
    folder: RunFolder,
    processes: Processes,
    before: Config,
    reward: GivenReward | None,
    given: Given,
) -> Setup:
    """Load everything but the run folder, and try it out.

    Raises:
        UsageError: anything wrong with model, prompts or reward.
    """
    check_vllm(config, processes.count)
    task = find_task(config.task, config.target)
    tasks_own = reward is None and config.reward in (None, task.name)
    if tasks_own and config.judge in ("auto", "none"):
        check_goal_of_task(config, task)
    set_threads(config.threads)
    accelerator = _accelerator(config, folder, processes)
    check_optimizer(config.optimizer, accelerator.device)
    scorer = choose_reward(config, task, accelerator.device, reward)
    trained_by = [term.identity for term in terms(scorer)]
    judges = choose_judges(config, task, accelerator.device, trained_by, tasks_own)
    check_goal(config, task, scorer, judges)
    chosen = read_prompts(config, task, folder, given, tasks_own)
    _check_impl(config.impl, accelerator.device)
    check_device(config.decoding, accelerator.device)
    dtype = sampling_dtype(config.precision, accelerator.device)
    words = task.words_for(config.quantiles) if tasks_own and scorer.property is not None else None
    policy = _load_policy(config, words, dtype, accelerator.device)
    prompts = encode_prompts(config, policy, chosen)
    _choose_attention(policy, prompts, config)
    reference = _load_reference(config, policy, dtype, accelerator.device)
    autocast = processes.autocast(accelerator, config.precision)
    objective = functools.partial(Objective, config, policy, reference, accelerator.device, autocast)
    checked = _check_model(config, folder, processes, policy, reference, prompts, objective)
    if config.decoding != "eager":
        check_fixed_steps(policy, reference, config.decoding)
    processes.check_padding(accelerator, policy.reading.padding)
    setup = Setup(
        config=config,
        folder=folder,
        processes=processes,
        accelerator=accelerator,
        before=before,
        task=task,
        prompts=prompts,
        reward=scorer,
        judges=judges,
        controls=control_texts(policy, task.texts() if tasks_own else []),
        policy=policy,
        reference=reference,
        sampling_dtype=dtype,
        copied=SharedCopy(policy, dtype),
        checked=checked,
        objective=objective(),
    )
    _check_reward(setup)
    if config.push_to_hub and processes.main:  # last, since it may make a repository
        hub.check_repository(config.push_to_hub, config.hub_private_repo)
    return setup


def _check_model(
    config: Config,
    folder: RunFolder,
    processes: Processes,
    policy: Policy,
    reference: Any,
    prompts: RunPrompts,
    objective: Callable[[], Objective],
) -> Checked:
    """Try out reading, sampling, a training step and, on rank 0, which writes it, the export."""
    near = folder.nearest
    try:
        return check_model(
            policy,
            reference,
            near if processes.main else None,
            generation_settings(evaluation_sampling(config)),
            untie=config.export_head == "own",
            longest=prompts.longest(config.max_new_tokens),
            objective=objective,
            notes=assets.cache_dir() if config.model is None else None,
        )
    except (OSError, SafetensorError) as error:
        if (what := disk_error(error)) is None:
            raise
        raise OutOfResources(
            f"cannot write an export to {near}, to try it out: {what}; make room there, or choose another"
            " --output"
        ) from error


def _check_reward(setup: Setup) -> None:
    """Try the reward on a few completions, unless the run has begun; then cache it, if asked to."""
    config, processes, prompts = setup.config, setup.processes, setup.prompts
    limit = config.reward_per_minute or config.reward_tokens_per_minute
    if limit and not asynchronous_terms((setup.reward, *setup.judges)):
        raise UsageError(
            f"reward {setup.reward.name} is a plain function, whose requests nothing here can limit; write it"
            " as async def, or leave out --reward-per-minute and --reward-tokens-per-minute"
        )
    if processes.main:
        sampling = setup.round_sampling(0)
        for asked, scorer in itertools.product(_tried_on(prompts), _not_tried_yet(setup)):
            scorer.check(first_completions(setup.policy, setup.reference, asked, sampling, config.seed))
        if not config.resume:
            _check_scored(setup)
    # SQLite is for one machine: files over a network lose its locks.
    mode = "off" if config.reward_cache == "auto" and processes.machines > 1 else config.reward_cache
    setup.reward, *judges = (
        cached(scorer, mode, setup.folder / REWARDS) for scorer in (setup.reward, *setup.judges)
    )
    setup.judges = tuple(judges)


def _not_tried_yet(setup: Setup) -> list[Reward]:
    """The scorers that this run has not asked before: all, or those that are others at a resume."""
    config = setup.config
    # The task's own judge is known to work, and once tried out it would stay in memory to the end.
    named = list(setup.judges) if config.judge != "auto" else []
    if not config.resume:
        return [setup.reward, *named]
    return [setup.reward] * config.accept_changed_reward + named * (config.judge != setup.before.judge)


def _tried_on(prompts: RunPrompts) -> Iterator[HeldOut]:
    """Prompts to try a scorer on: training prompts; held-out ones, too, if columns are missing there."""
    yield HeldOut(prompts.train, prompts.train_ids, 1)
    trained, held_out = (
        {name for row in rows for name, value in row.items() if value is not None}
        for rows in (prompts.train, prompts.held_out.rows)
    )
    if trained - held_out:
        yield dataclasses.replace(prompts.held_out, samples=1)


def _check_scored(setup: Setup) -> None:
    """Refuse to rank one pool by two scales: what was brought along must have the run's own rewards."""
    config, prompts = setup.config, setup.prompts
    brought = [one for one in prompts.scored if not math.isnan(one.reward)]
    if setup.reward.is_none:
        if not brought:
            raise UsageError(
                f"reward = none, but {config.scored} brings no rewards; name what scores it by --reward"
            )
        prompts.about.append(
            "no reward: the evaluation says nothing of it; --judge names what it shows in its place"
        )
        return
    # At random: preferences come by turns.
    chosen = np.random.default_rng(config.seed).permutation(len(brought))[:32]
    some = [brought[i] for i in chosen]
    if not some or config.accept_changed_reward:
        return
    own = setup.reward([one.row or prompts.train[one.prompt] for one in some], [one.text for one in some])
    pairs = [(one, float(value)) for one, value in zip(some, own, strict=True) if not math.isnan(value)]
    others = [
        (one, value)
        for one, value in pairs
        if not math.isclose(one.reward, value, rel_tol=1e-2, abs_tol=1e-3)
    ]
    if len(others) <= len(pairs) // 4:
        return
    (one, value), name = others[0], setup.reward.name
    found = (
        f"{config.scored} has rewards that are not those of {name} ({len(others)} of {len(pairs)} looked at):"
        f" {one.reward:g} for {one.text!r:.60}, which {name} gives {value:g}"
    )
    if config.initial_samples == 0 and config.rounds == 1 and not config.from_run:
        prompts.about.append(f"{found}; only the evaluation uses {name}")
        return
    raise UsageError(
        f"{found}, and one pool cannot rank both; name their reward by --reward, leave the column out to have"
        " them scored, sample nothing by --initial-samples 0 --rounds 1, or mix them on purpose by"
        " --accept-changed-reward"
    )


def choose_rollout(
    setup: Setup, work: SharedWork, sampler: Sampler, listen: Callable[[Progress], None]
) -> Rollout:
    """The engine that samples the rounds."""
    config = setup.config
    if config.rollout == "transformers":
        return TransformersRollout(setup.copied, setup.reference, sampler)
    return vllm_rollout(
        config,
        setup.policy,
        setup.folder / ROLLOUT,
        setup.sampling_dtype,
        setup.device,
        max(map(len, setup.prompts.train_ids)),
        log=lambda text: listen(Progress("waiting for the vLLM server", 0, 1, note=text)),
        once=lambda write: setup.processes.on_rank_0(work.stoppable(write)),
    )


def _accelerator(config: Config, folder: RunFolder, processes: Processes) -> Accelerator:
    precision = "no" if config.precision == "fp32" or processes.zero else config.precision
    known = processes.count == 1 and AcceleratorState._shared_state
    if known and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()  # of an earlier run in this process, whose precision it keeps
    accelerator = Accelerator(
        mixed_precision=precision,
        log_with=trackers.trackers(config.report_to) or None,
        project_dir=folder / "tensorboard",
        kwargs_handlers=[REPLICATION],
    )
    processes.check(accelerator, config)
    if accelerator.mixed_precision == "fp16" and accelerator.scaler is None:
        # accelerate scales the loss on GPUs alone; without it most of an fp16 gradient is 0.
        accelerator.scaler = torch.amp.GradScaler(accelerator.device.type)
        accelerator.native_amp = True
    return accelerator


def _load_policy(config: Config, words: list[str] | None, dtype: torch.dtype, device: torch.device) -> Policy:
    policy = Policy.create(
        config.model or assets.default_model(),
        quantiles=config.quantiles,
        prefix=config.prefix,
        words=words,
        seed=config.seed,
        lora=Lora.of(config),
        low=dtype,
        trust_remote_code=config.trust_remote_code,
    )
    # No dropout anywhere: policy and reference are compared token by token.
    policy.model.to(device).eval()
    if config.gradient_checkpointing:
        recompute_layers(policy.model)
    return policy


def _choose_attention(policy: Policy, prompts: RunPrompts, config: Config) -> None:
    """Switch the policy to eager attention for sequences of up to 512 tokens on a CPU.

    There PyTorch's flash kernel takes 1.4 times as long for a whole step. Otherwise it stays transformers'
    own choice: sdpa, where the model can, on a GPU with a mask that nobody waits for.
    """
    model, longest = policy.model, prompts.longest(config.max_new_tokens)
    if model.device.type == "cpu":
        if longest <= 512:
            model.set_attn_implementation("eager")
    elif model.config._attn_implementation == "sdpa":
        decode_fast(model)


def _load_reference(config: Config, policy: Policy, dtype: torch.dtype, device: torch.device) -> Any:
    """The base model, frozen; under LoRA it shares the policy's weights."""
    shared = shared_reference(policy, dtype)
    if shared is not None:
        return shared.to(device)
    return load_reference(config.model or assets.default_model(), dtype, device, config.trust_remote_code)


def _check_impl(impl: Implementation, device: torch.device) -> None:
    """The loss on two logits: whether the implementation asked for runs here shows at once."""
    logits, labels = torch.zeros(1, 2, device=device), torch.zeros(1, dtype=torch.long, device=device)
    try:
        quark_loss(logits, logits, labels, kl_coef=0.0, entropy_coef=0.0, impl=impl)
    except ValueError as error:
        raise UsageError(f"impl = {impl}: {error}") from error
