"""What a run begins with, loaded and tried out before any long work: whatever is wrong shows here."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import logging
from collections.abc import Callable, Sequence
from numbers import Number
from pathlib import Path
from typing import Any, ParamSpec

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors import SafetensorError

from quark_fast.arguments import load_config
from quark_fast.config import Config
from quark_fast.data import assets
from quark_fast.data.row import Prompt
from quark_fast.errors import OutOfResources, UsageError
from quark_fast.evaluation.held_out import (
    control_texts,
    evaluation_sampling,
    generation_settings,
)
from quark_fast.evaluation.round_measures import check_goal, check_goal_of_task
from quark_fast.files.atomic import disk_error
from quark_fast.model.check_model import Checked, check_model
from quark_fast.model.check_reading import check_fixed_steps
from quark_fast.model.copies import SharedCopy, shared_reference
from quark_fast.model.fixed_step import check_device
from quark_fast.model.loading import decode_fast, load_reference
from quark_fast.model.lora import Lora, has_adapters
from quark_fast.model.policy import Policy
from quark_fast.model.structure import recompute_layers
from quark_fast.near_names import nearest
from quark_fast.ops.loss import Implementation, quark_loss
from quark_fast.rewards.by_name import refuse_code_of
from quark_fast.rewards.weighted_sum import cached, terms
from quark_fast.rollout.sampling import Rollout
from quark_fast.rollout.transformers import TransformersRollout
from quark_fast.rollout.vllm import check_vllm, vllm_rollout
from quark_fast.runtime import hub, trackers
from quark_fast.runtime.distributed import REPLICATION, Processes
from quark_fast.runtime.machine import Precision, sampling_dtype, set_threads, settled_precision
from quark_fast.runtime.run_folder import REWARDS, ROLLOUT, RunFolder
from quark_fast.tasks.by_name import GivenReward, choose_judges, choose_reward, find_task
from quark_fast.training.from_run import check_from_run
from quark_fast.training.objective import Objective
from quark_fast.training.optimizer import check_optimizer
from quark_fast.training.progress import Progress
from quark_fast.training.run_prompts import Given, RunPrompts, encode_prompts, read_prompts
from quark_fast.training.setup import Setup
from quark_fast.training.shared_work import SharedWork
from quark_fast.training.try_rewards import try_rewards

_CALL = "Trainer(Config(model=..., output=...), reward=..., prompts=...)"
P = ParamSpec("P")
SAMPLED = 1000  # numbers of each tensor that tell one base model from another


def known_names(init: Callable[P, None]) -> Callable[P, None]:
    """The same, but an argument by a name that it does not have, as of another trainer, is a UsageError."""
    known = inspect.signature(init).parameters

    @functools.wraps(init)
    def checked(*given: P.args, **named: P.kwargs) -> None:
        for name in named:
            if name not in known:
                near = nearest(name, known)
                hint = f"did you mean {near!r}?" if near else f"a run is {_CALL}"
                raise UsageError(f"Trainer has no argument {name!r}; {hint}")
        init(*given, **named)

    return checked


def names_into_settings(
    config: Config,
    reward: str | GivenReward | None,
    prompts: str | Path | Sequence[Prompt] | None,
    held_out: str | Path | int | Sequence[Prompt] | None,
) -> tuple[Config, GivenReward | None, Given]:
    """What a program gave, with names moved into the settings, where the command line has them; checked."""
    if not isinstance(config, Config):
        raise UsageError(f"config is of type {type(config).__name__}; a run is {_CALL}")
    names: dict[str, Any] = {}
    if isinstance(reward, str):
        names["reward"], reward = reward, None
    if isinstance(prompts, str | Path):
        names["prompts"], prompts = prompts, None
    if isinstance(held_out, str | Path | int | Number):  # numpy's, and a share, which a setting refuses
        names["held_out"], held_out = held_out, None
    config = dataclasses.replace(config, **names)
    config.check()
    return config, reward, Given(prompts, held_out)


def check_folder(config: Config, folder: RunFolder) -> tuple[Precision, Config]:
    """Refuse a folder that the run cannot have; its precision, and ``Setup.saved``."""
    if not config.resume:
        folder.check_free()
        folder.check_writable()
        if config.from_run:
            check_from_run(config, RunFolder(config.from_run))
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


def settings_to_save(config: Config, saved: Config) -> Config:
    """What config.yaml says: the settings that the run has by now, with which a plain --resume goes on.

    Its batches keep the size that they began with, and to mix two rewards is agreed to for one start.
    """
    kept = {name: getattr(saved, name) for name in ("sample_batch", "accept_changed_reward")}
    return dataclasses.replace(config, resume=False, **kept)


def set_up(
    config: Config,
    folder: RunFolder,
    processes: Processes,
    saved: Config,
    reward: GivenReward | None,
    given: Given,
) -> Setup:
    """Load everything but the run folder, and try it out.

    Raises:
        UsageError: anything wrong with model, prompts or reward.
    """
    check_vllm(config, processes.count)
    task = find_task(config.task, config.target)
    rewarded_by_task = reward is None and config.reward in (None, task.name)
    if rewarded_by_task and config.judge in ("auto", "none"):
        check_goal_of_task(config, task)
    set_threads(config.threads)
    accelerator = _accelerator(config, folder, processes)
    check_optimizer(config.optimizer, accelerator.device)
    scorer = choose_reward(config, task, accelerator.device, reward)
    trained_by = [term.identity for term in terms(scorer)]
    judges = choose_judges(config, task, accelerator.device, trained_by, rewarded_by_task)
    check_goal(config, task, scorer, judges)
    chosen = read_prompts(config, task, folder, given, rewarded_by_task)
    _check_impl(config.impl, accelerator.device)
    check_device(config.decoding, accelerator.device)
    dtype = sampling_dtype(config.precision, accelerator.device)
    words = task.words_for(config.quantiles) if rewarded_by_task and scorer.property is not None else None
    policy = _load_policy(config, words, dtype, accelerator.device)
    base = base_digest(policy)
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
        saved=saved,
        task=task,
        prompts=prompts,
        reward=scorer,
        judges=judges,
        controls=control_texts(policy, task.texts() if rewarded_by_task else []),
        policy=policy,
        reference=reference,
        sampling_dtype=dtype,
        copied=SharedCopy(policy, dtype),
        checked=checked,
        objective=objective(),
        base=base,
    )
    try_rewards(setup)
    _keep_rewards(setup)
    if processes.main:
        _check_hub(config)  # last, since it may make a repository
    return setup


def _check_hub(config: Config) -> None:
    """Refuse a repository that the run could not be uploaded to; to one that goes on it is only said.

    There may be no network where it goes on, and what it has learned is worth more than the upload.
    """
    if not config.push_to_hub:
        return
    try:
        hub.check_repository(config.push_to_hub, config.hub_private_repo)
    except UsageError as error:
        if not config.resume:
            raise
        logging.getLogger(__name__).warning("%s; the run goes on, and tries the upload at its end", error)


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
        checked = check_model(
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
    if config.export_adapter and policy.other_tables:
        raise UsageError(
            f"export_adapter: the model also looks tokens up in {', '.join(policy.other_tables)}, whose rows"
            " for the reward tokens an adapter does not hold; leave it out: the export has them"
        )
    return checked


def _keep_rewards(setup: Setup) -> None:
    """Reward and judges as ones that remember what they answered, if asked to."""
    mode = setup.config.reward_cache
    if mode == "auto" and setup.processes.machines > 1:
        mode = "off"  # SQLite is for one machine: files over a network lose its locks
    setup.reward, *judges = (
        cached(scorer, mode, setup.folder / REWARDS) for scorer in (setup.reward, *setup.judges)
    )
    setup.judges = tuple(judges)


def choose_rollout(setup: Setup, work: SharedWork, listen: Callable[[Progress], None]) -> Rollout:
    """The engine that samples the rounds."""
    config = setup.config
    if config.rollout == "transformers":
        return TransformersRollout(setup.copied, setup.reference, work.sampler)
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
    precision = processes.mixed_precision(config.precision)
    known = processes.count == 1 and AcceleratorState._shared_state
    if known and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()  # of an earlier run in this process; see ``take_over``
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


def base_digest(policy: Policy) -> str:
    """sha256 over a sample of the base model's weights, in a policy that has learned nothing yet.

    ``SAMPLED`` numbers of each tensor, in float32, which holds those of any dtype that a model is stored in:
    the same on every machine. It sees that a model was trained further, but neither a change of a few numbers
    nor another tokenizer.
    """
    model, found = policy.model, hashlib.sha256()
    rows, adapted = model.get_input_embeddings().rows, has_adapters(model)
    for name, weights in model.named_parameters():
        if weights is not rows and not (adapted and weights.requires_grad):
            flat = weights.detach().reshape(-1)
            some = flat[:: 1 + len(flat) // SAMPLED].float().cpu()
            found.update(f"{name}{tuple(weights.shape)}".encode() + some.numpy().tobytes())
    return found.hexdigest()


def _choose_attention(policy: Policy, prompts: RunPrompts, config: Config) -> None:
    """Switch the policy to eager attention for sequences of up to 512 tokens on a CPU.

    There PyTorch's flash kernel takes 1.4 times as long for a whole step. Otherwise it stays transformers'
    own choice: sdpa, where the model can, on a GPU with a mask that is not waited for.
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
