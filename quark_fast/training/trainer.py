"""The Quark loop: sample, score, quantize, learn, again; then evaluate, export and report.

Every random choice derives from (seed, round or step), never from a generator that lives through the run,
so a resumed run needs no RNG state to repeat an undisturbed one.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from torch import Tensor

from quark_fast.arguments import load_config
from quark_fast.config import Config
from quark_fast.data import assets
from quark_fast.data.chat import Row, as_rendered, chat_template, from_file, is_chat, to_file
from quark_fast.data.split import choose_prompts, digest
from quark_fast.errors import Interrupted, UsageError
from quark_fast.evaluation.held_out import evaluate, first_completions
from quark_fast.evaluation.modes import HeldOut, Mode, evaluation_sampling, generation_settings, modes
from quark_fast.evaluation.probe import Probe
from quark_fast.evaluation.prompt_classes import classify_prompts
from quark_fast.evaluation.summary import describe_evaluation, summarise
from quark_fast.files.atomic import replacing_folder
from quark_fast.metrics import Sample
from quark_fast.model.checks import check_model
from quark_fast.model.loading import load_reference, load_tokenizer
from quark_fast.model.lora import Lora
from quark_fast.model.policy import Policy
from quark_fast.model.structure import recompute_layers
from quark_fast.ops.loss import Implementation, quark_loss
from quark_fast.pool.pool import RolloutPool
from quark_fast.report.page import write_report
from quark_fast.rewards.reward import Function, Reward
from quark_fast.rollout.sampling import Conditioning, Draw, Rollout, Sampler, Sampling, kept_or_drawn
from quark_fast.rollout.transformers import TransformersRollout, sample
from quark_fast.rollout.vllm import check_vllm, vllm_rollout
from quark_fast.runtime import trackers, zero
from quark_fast.runtime.distributed import REPLICATION, Processes, in_turn, whole, without_data
from quark_fast.runtime.journal import Journal, Kept
from quark_fast.runtime.machine import Precision, sampling_dtype, set_threads, settled_precision, versions
from quark_fast.runtime.memory import OutOfMemory, within_memory
from quark_fast.runtime.run_folder import (
    COMPLETIONS,
    HELD_OUT,
    METRICS,
    PENDING,
    PROMPTS,
    REWARDS,
    ROLLOUT,
    Checkpoint,
    RunFolder,
)
from quark_fast.runtime.seeds import seed_for
from quark_fast.tasks.by_name import cached, choose_reward, find_task, refuse_code_of
from quark_fast.training.draws import Draws, plan_batches
from quark_fast.training.objective import Objective
from quark_fast.training.progress import Progress
from quark_fast.training.signals import stop_signals
from quark_fast.training.stability import BadSteps, KLController

T = TypeVar("T")


@dataclass(frozen=True)
class Scored:
    """One completion of a training prompt; reward NaN: not scored."""

    prompt: int
    ids: list[int]
    text: str
    reward: float

    @staticmethod
    def to_json(batch: list[Scored]) -> list[Any]:
        return [
            [one.prompt, one.ids, one.text, None if math.isnan(one.reward) else one.reward] for one in batch
        ]

    @staticmethod
    def from_json(batch: list[Any]) -> list[Scored]:
        return [Scored(i, ids, text, math.nan if s is None else s) for i, ids, text, s in batch]


class Trainer:
    """One run, from the settings to the report.

    Args:
        config: every setting of the run.
        reward: a callable ``reward(prompts, completions, **columns) -> list[float | None]``, which may be
            ``async def``, in place of the one that ``config`` names.
        prompts: training prompts, texts or rows with a ``prompt`` (a text, or messages for the tokenizer's
            chat template), in place of those ``config`` names.
        held_out: likewise for the evaluation.
        sampler: samples the untouched model, as ``rollout.sample`` does; several runs may share one.
        listen: called with a ``Progress`` now and then; ``print`` will do.

    Raises:
        UsageError: anything wrong with model, prompts, reward or folder, before any long work starts.
    """

    def __init__(
        self,
        config: Config,
        *,
        reward: Function | Reward | None = None,
        prompts: Sequence[str | Row] | None = None,
        held_out: Sequence[str | Row] | None = None,
        sampler: Sampler = sample,
        listen: Callable[[Progress], None] = lambda _: None,
    ) -> None:
        config = dataclasses.replace(config)
        config.check()
        self.config = config
        self.listen = listen
        self.sampler = sampler
        self.folder = RunFolder(config.output_folder)
        self.processes = Processes.join()
        # What the main process finds there, or chooses, holds for all.
        config.precision, self.batch_rows = self.processes.once(self._check_folder)
        self.processes.everywhere(lambda: self._set_up(reward, prompts, held_out))
        self._start()

    # ---------------------------------------------------------------- set up

    def _check_folder(self) -> tuple[Precision, int]:
        """Refuse a folder that the run cannot have; its precision and the completions of its batches."""
        config = self.config
        rows = config.sample_batch
        if config.resume:
            self.folder.check_resumable()
            saved = load_config(self.folder / "config.yaml")
            if config.precision == "auto":  # whatever would be chosen today, the run goes on as it began
                config.precision = saved.precision
            config.check_resumes(saved)
            refuse_code_of(self.folder.path, config.reward)
            self.folder.check_results()
            rows = saved.sample_batch
        else:
            self.folder.check_free()
            config.precision = settled_precision(config.precision)
        return config.precision, rows

    def _set_up(
        self,
        reward: Function | Reward | None,
        prompts: Sequence[str | Row] | None,
        held_out: Sequence[str | Row] | None,
    ) -> None:
        """Everything but the run folder; whatever is wrong shows here."""
        config = self.config
        check_vllm(config, self.processes.count)
        self.task = find_task(config.task, config.target)
        set_threads(config.threads)
        self.accelerator = Accelerator(
            mixed_precision="no" if config.precision == "fp32" or self.processes.zero else config.precision,
            log_with=trackers.trackers(config.report_to) or None,
            project_dir=self.folder / "tensorboard",
            kwargs_handlers=[REPLICATION],
        )
        self.processes.check(self.accelerator, config)
        self.device = self.accelerator.device
        self.reward = choose_reward(config, self.task, self.device, reward)
        source = config.model or "the embedded model"
        chat = chat_template(
            source,
            lambda: load_tokenizer(config.model or assets.default_model(), config.trust_remote_code),
        )
        chosen = choose_prompts(config, self.task.prompts, chat, prompts, held_out)
        before = list(map(from_file, self.folder.rows_of(PROMPTS))) if config.resume else []
        self.train_rows, self.held_out_rows = (
            as_rendered(rows, before) for rows in (chosen.train, chosen.held_out)
        )
        # Also those that will be left out: another day's rendering might fit.
        self.chats = [row for row in [*self.train_rows, *self.held_out_rows] if is_chat(row)]
        self.about_prompts = chosen.about
        own_reward = reward is not None or config.reward not in (None, self.task.name)
        if own_reward and prompts is None and config.prompts is None:
            self.about_prompts.append(f"no --prompts, so those of the task {self.task.name}")
        if self.accelerator.mixed_precision == "fp16" and self.accelerator.scaler is None:
            # accelerate scales the loss on GPUs alone; without it most of an fp16 gradient is 0.
            self.accelerator.scaler = torch.amp.GradScaler(self.device.type)
            self.accelerator.native_amp = True
        _check_impl(config.impl, self.device)
        self._load_models()
        if not config.resume and self.processes.main:  # a run that is resumed has been through it
            given = HeldOut(self.train_rows, self.train_ids, 1)
            self.reward.check(
                first_completions(self.policy, self.reference, given, self._sampling(0), config.seed)
            )
        # SQLite is for one machine: files over a network lose its locks.
        mode = "off" if config.reward_cache == "auto" and self.processes.machines > 1 else config.reward_cache
        self.reward = cached(self.reward, mode, self.folder / REWARDS)

    def _load_models(self) -> None:
        config = self.config
        source = config.model or assets.default_model()
        self.sampling_dtype = sampling_dtype(config.precision, self.device)
        own_words = config.reward in (None, self.task.name) and self.reward.property is not None
        self.policy = Policy.create(
            source,
            quantiles=config.quantiles,
            prefix=config.prefix,
            words=self.task.words_for(config.quantiles) if own_words else None,
            seed=config.seed,
            lora=Lora.of(config),
            low=self.sampling_dtype,
            trust_remote_code=config.trust_remote_code,
        )
        model = self.policy.model.to(self.device)
        # No dropout anywhere: policy and reference are compared token by token.
        model.eval()
        if config.gradient_checkpointing:
            recompute_layers(model)
        self._encode_prompts()
        longest = max(map(len, self.train_ids)) + config.max_new_tokens
        if self.device.type == "cpu" and longest <= 512:
            # Over sequences this short, PyTorch's CPU flash kernel takes 1.4 times a whole eager step. Over
            # longer ones it is transformers' own choice: sdpa, where the model can.
            model.set_attn_implementation("eager")
        shared = self.policy.shared_reference(self.sampling_dtype)
        self.reference = (
            load_reference(source, self.sampling_dtype, self.device, config.trust_remote_code)
            if shared is None
            else shared.to(self.device)
        )
        objective = functools.partial(
            Objective,
            config,
            self.policy,
            self.reference,
            self.device,
            self.processes.autocast(self.accelerator, config.precision),
        )
        self.checked = check_model(
            self.policy,
            self.reference,
            self.folder.existing_parent,
            generation_settings(self._evaluation_sampling()),
            untie=config.export_head == "own",
            longest=max(map(len, [*self.train_ids, *self.held_out.ids])) + config.max_new_tokens,
            objective=objective,
            export=self.processes.main,  # which writes it
            notes=assets.cache_dir() if config.model is None else None,
        )
        self.processes.check_padding(self.accelerator, self.policy.reading.padding)
        self.objective = objective()
        *body, rows = _parameters(model)
        groups: list[dict[str, Any]] = [
            {"params": body, "lr": config.learning_rate},
            {"params": [rows], "lr": config.reward_token_lr},
        ]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
        self.rollout = self._choose_rollout()
        self.probe: Probe | None = None  # drawn when it is first asked for

    def _encode_prompts(self) -> None:
        """The prompts as ids; those that are too long, or too short, are left out and counted."""
        config = self.config
        self.longest_prompt = self.policy.room_of(config)
        encode = functools.partial(
            self.policy.encode_rows,
            max_tokens=self.longest_prompt,
            prefix_tokens=config.prefix_tokens,
            cut=config.long_prompts == "cut",
            tell=self.about_prompts.append,
        )
        what = "texts" if config.prefix_tokens else "prompts"
        self.train_rows, self.train_ids, _ = encode(self.train_rows, what=f"training {what}")
        rows, ids, texts = encode(self.held_out_rows, what=f"held-out {what}")
        if not config.prefix_tokens:
            self.held_out_rows = rows
        self.held_out = HeldOut(rows, ids, config.eval_samples, texts)
        self.policy.check_fits([*self.train_ids, *ids], config.max_new_tokens)

    def _choose_rollout(self) -> Rollout:
        if self.config.rollout == "transformers":
            return TransformersRollout(self.policy, self.reference, self.sampling_dtype, self.sampler)
        return vllm_rollout(
            self.config,
            self.policy,
            self.folder / ROLLOUT,
            self.sampling_dtype,
            self.device,
            max(map(len, self.train_ids)),
            say=lambda text: self.listen(Progress("waiting for the vLLM server", 0, 1, note=text)),
            once=lambda work: self.processes.once(self._stoppable(work)),
        )

    def _start(self) -> None:
        """The model on its processes; a new folder, or the state of the last checkpoint."""
        config = self.config
        self.policy.unsharded = self.reference
        self.around, self.optimizer = self.processes.prepare(
            self.accelerator, self.policy.model, self.optimizer, config
        )
        self.pool = RolloutPool(quantiles=config.quantiles, ties=config.ties, seed=config.seed)
        self.draws = Draws()
        self.prompt_of: list[int] = []
        self.round, self.sampled, self.step, self.seconds = 0, False, 0, 0.0
        self.left_out = 0  # rounds that had nothing to learn from
        self.touched: set[int] = set()  # quantiles whose token training has moved
        self.journal = Journal(self.folder / PENDING, self.processes.index)
        self.bad_steps = BadSteps()
        self.kl = KLController(config.kl_coef, config.kl_target, config.kl_horizon)
        self.micro_batch = min(config.micro_batch, config.batch_size // self.processes.count)
        if config.resume:
            with self.folder.errors_told():
                try:
                    self._resume()
                except UsageError:
                    raise
                except (LookupError, TypeError, ValueError, OverflowError, RuntimeError) as error:
                    raise UsageError(
                        f"the checkpoint in {self.folder.path} is not one of this run"
                        f" ({type(error).__name__}: {error}); start anew in another --output"
                    ) from error
        self.processes.once(self._write_start)

    def _write_start(self) -> None:
        """The run folder, if it is new; what the run is made of; trackers."""
        config = self.config
        if not config.resume:
            self.folder.create()
        with self.folder.errors_told():
            if not config.resume:
                config.save(self.folder / "config.yaml")
            self.journal.begin({"reward": self.reward.identity})
            self.folder.write_rows(HELD_OUT, map(to_file, self.held_out_rows))
            if self.chats:
                self.folder.write_rows(PROMPTS, map(to_file, self.chats))
            self.folder.add_start(self._versions() | {"step": self.step})
            settings, name = dataclasses.asdict(config), str(config.output_folder)
            trackers.start(self.accelerator, name, settings, self.step)

    def _versions(self) -> dict[str, Any]:
        found = versions(self.device) | {
            "loss": self.objective.description,
            "prompts": self.about_prompts,
            "model": self.checked.lines,
        }
        if self.processes.count > 1:
            found["processes"] = f"{self.processes.count}, {self.accelerator.distributed_type.value}"
        return found

    def _resume(self) -> None:
        loaded = self.processes.once(self.folder.load_checkpoint, _small_part)
        if loaded is None:
            about = self.processes.once(lambda: self.journal.about)
            self.processes.everywhere(lambda: self._check_reward((about or {}).get("reward")))
            self.processes.once(lambda: self.folder.cut_back(None))
            return
        state, tensors = loaded
        self.processes.everywhere(lambda: self._check_checkpoint(state, tensors))
        self.processes.once(lambda: self.folder.cut_back(state))
        own = dict(self.policy.model.named_parameters())
        with torch.no_grad():
            for name, value in tensors["model"].items():
                own[name].copy_(self.processes.lay_out(value, own[name]))
        self._load_optimizer(tensors["optimizer"])
        self.processes.everywhere(lambda: self._restore(state, tensors))

    def _check_checkpoint(self, state: dict[str, Any], tensors: dict[str, dict[str, Tensor]]) -> None:
        """Refuse the state of another model, or of other prompts."""
        model = self.policy.model
        own = _trained(model)
        if own.keys() != tensors["model"].keys() or any(
            own[k].shape != v.shape for k, v in tensors["model"].items()
        ):
            raise UsageError(
                f"the checkpoint in {self.folder.path} holds other weights than"
                f" {self.config.model or 'the embedded model'} has; resume it with its own model"
            )
        if state["prompts"] != digest(self.train_rows):
            raise UsageError(
                f"the training prompts are not those that the run in {self.folder.path} began with;"
                " give it the same"
            )
        self._check_reward(state.get("reward"))

    def _check_reward(self, before: Sequence[str] | None) -> None:
        """Refuse to rank one pool by two rewards, unless that is wanted."""
        if before in (None, self.reward.identity) or self.config.accept_changed_reward:
            return
        then, now = (" ".join(one)[:200] for one in (before or (), self.reward.identity))
        raise UsageError(
            f"the reward is not the one that scored the samples in {self.folder.path}: its code, weights or"
            f" settings were {then}, and are {now}; put it back, begin anew in another --output, or go on"
            " with both on purpose by --accept-changed-reward"
        )

    def _restore(self, state: dict[str, Any], tensors: dict[str, dict[str, Tensor]]) -> None:
        """What every process has of a checkpoint: all but weights and the optimizer's state."""
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.pool.load_state_dict(_from_tensors(tensors["pool"], state["pool"]))
        self.draws = Draws(tensors["draws"]["counts"].numpy())
        self.prompt_of = tensors["draws"]["prompt_of"].tolist()
        self.round, self.sampled, self.step = state["round"], state["sampled"], state["step"]
        self.left_out = int(state.get("left_out", 0))
        drawn = [k for k, share in enumerate(self.config.weights()) if share > 0]
        self.touched = set(state.get("touched", drawn if self.step else []))
        self.seconds = float(state["seconds"])
        self.bad_steps = BadSteps(**state["bad_steps"])
        self.kl.coef = float(state["kl_coef"])
        asked, found = state["micro_batch"]
        if asked == self.config.micro_batch:  # else the user knows better by now
            self.micro_batch = max(1, min(self.micro_batch, int(found)))
        done = self.step - self._first_step
        prompts = range(len(self.train_ids))
        if not (
            0 <= self.left_out <= self.round <= self.config.rounds
            and 0 <= done <= self.config.steps
            and len(self.prompt_of) == len(self.pool) >= len(self.draws.counts)
            and all(i in prompts for i in self.prompt_of)
        ):
            raise ValueError(f"round {self.round}, step {self.step}, {len(self.pool)} samples do not fit")

    def _optimizer_tensors(self) -> Iterator[tuple[str, Tensor]]:
        if self.processes.zero:
            yield from zero.optimizer_tensors(self.optimizer, _parameters(self.policy.model))
            return
        for index, values in self.optimizer.state_dict()["state"].items():
            for name, value in values.items():
                yield f"{index}.{name}", value

    def _load_optimizer(self, tensors: dict[str, Tensor]) -> None:
        parameters = _parameters(self.policy.model)

        def laid_out() -> Iterator[tuple[str, Tensor]]:
            for key, value in tensors.items():
                like: Tensor = parameters[int(key.partition(".")[0])]
                if value.shape != like.shape:  # a count of steps: whole everywhere
                    like = torch.empty(0, device=like.device)
                yield key, self.processes.lay_out(value, like)

        if self.processes.zero:
            zero.set_weights(parameters)
            if tensors:
                for group in self.optimizer.param_groups:
                    group["lr"] = 0.0
                # A step of nothing, for which DeepSpeed makes the state.
                self.processes.average_gradients(self.accelerator, self.around, finite=True)
                zero.set_optimizer(self.optimizer, parameters, laid_out())
            return
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in laid_out():
            index, _, name = key.partition(".")
            state.setdefault(int(index), {})[name] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _save(self) -> None:
        arrays, plain = _to_tensors(self.pool.state_dict())
        scaler = self.accelerator.scaler
        state = {
            "round": self.round,
            "sampled": self.sampled,
            "step": self.step,
            "seconds": self.seconds,
            "bad_steps": self.bad_steps.state_dict(),
            "kl_coef": self.kl.coef,
            "micro_batch": [self.config.micro_batch, self.micro_batch],
            "scaler": None if scaler is None else scaler.state_dict(),
            "prompts": digest(self.train_rows),
            "reward": self.reward.identity,
            "left_out": self.left_out,
            "touched": sorted(self.touched),
            "pool": plain,
        }
        tensors = {
            "model": self.processes.collect(_trained(self.policy.model).items()),
            "optimizer": self.processes.collect(self._optimizer_tensors()),
            "pool": arrays,
            "draws": {
                "counts": torch.from_numpy(self.draws.counts),
                "prompt_of": torch.tensor(self.prompt_of),
            },
        }
        self.processes.once(lambda: self.folder.save_checkpoint(state, tensors))

    # ---------------------------------------------------------------- the loop

    def train(self) -> Path:
        """Run to the end and return the run folder.

        Raises:
            Interrupted: Ctrl-C or SIGTERM; the run can be resumed.
        """
        started = time.monotonic() - self.seconds
        with self.folder.errors_told(), stop_signals(self.folder) as self.stop:
            while self.round < self.config.rounds:
                if not self.sampled:
                    self._sample()
                    self.sampled = True
                    self.seconds = time.monotonic() - started
                    self._save()
                    self.processes.once(lambda: self.journal.forget(self._stage))
                if self._tells_apart():
                    for step in self._learn():
                        self.seconds = time.monotonic() - started
                        ends = step == self._first_step + self.config.steps
                        if (
                            ends
                            or step % self.config.checkpoint_every == 0
                            or self.processes.any(self.stop.asked)
                        ):
                            self._save()
                        self.processes.everywhere(self._stop_if_asked)
                    self._probe()
                else:
                    self.left_out += 1
                self.round, self.sampled = self.round + 1, False
            self.processes.once(self.rollout.close)
            self.policy.place_untrained_rows([float(k in self.touched) for k in range(self.policy.quantiles)])
            self.seconds = time.monotonic() - started
            self._save()
            self._evaluate()
            self.seconds = time.monotonic() - started
        with self.folder.errors_told():
            self._finish()
        return self.folder.path

    def _stoppable(self, work: Callable[[], T]) -> Callable[[], T]:
        """Work that a resumed run does again: a signal need not wait for it."""

        def stoppable() -> T:
            with self.stop.at_once():
                return work()

        return stoppable

    def _share(self, work: Callable[[], T]) -> list[T]:
        """The stoppable work of all processes."""
        return self.processes.everywhere(self._stoppable(work))

    def _record(self, row: dict[str, Any]) -> None:
        """A row for metrics.jsonl and the trackers."""

        def write() -> None:
            self.folder.append(METRICS, [row])
            trackers.track(self.accelerator, row)

        self.processes.once(write)

    def _stop_if_asked(self) -> None:
        if self.stop.asked:
            raise Interrupted(
                f"stopped in round {self.round + 1} at step {self.step};"
                f" go on with --resume --output {self.folder.path}"
            )

    @property
    def _first_step(self) -> int:
        """Steps that were made before the round."""
        return (self.round - self.left_out) * self.config.steps

    @property
    def _stage(self) -> str:
        """What the round's samples are kept under."""
        return f"round-{self.round + 1}"

    def _tells_apart(self) -> bool:
        """Whether the pool has two rewards or more. If not, the round has nothing to learn from: it is said.

        Raises:
            UsageError: no round is left that could find a second one.
        """
        rewards = self.pool.rewards
        if self.policy.quantiles == 1 or rewards.min() < rewards.max():
            return True
        found = f"all {len(rewards):,} rewards are {rewards[0]:g}"
        if self.round + 1 == self.config.rounds:
            with self.processes.alike():
                raise UsageError(
                    f"{found}, so there is nothing to tell apart and nothing was learned; the samples are"
                    f" kept in {self.folder / COMPLETIONS}. Give a reward that differs between them, or more"
                    " --initial-samples or --rounds or a higher --temperature, and another --output"
                )
        stage = f"round {self.round + 1}/{self.config.rounds}: learning"
        note = f"{found}: nothing to tell apart yet; round {self.round + 1} is left out, the next one samples"
        self.listen(Progress(stage, 0, self.config.steps, note=note))
        return False

    def _sampling(self, round: int) -> Sampling:
        """How the completions of a round are drawn."""
        config = self.config
        return self._in_batches(
            Sampling(config.max_new_tokens, config.min_new_tokens, config.temperature_of(round), config.top_p)
        )

    def _evaluation_sampling(self) -> Sampling:
        return self._in_batches(evaluation_sampling(self.config))

    def _in_batches(self, sampling: Sampling) -> Sampling:
        """In the batches that the run began with, and no more side by side than is asked for now."""
        rows, at_once = self.batch_rows, self.config.sample_batch
        return dataclasses.replace(sampling, rows=rows, at_once=at_once if at_once < rows else 0)

    def _kept(
        self,
        stage: str,
        settings: Any = None,
        encode: Callable[[T], Any] = lambda value: value,
        decode: Callable[[Any], T] = lambda value: value,
    ) -> Kept[T]:
        """What is on disk of a stage's batches, where this process sees the run folder."""
        if self.processes.main or self.processes.machines == 1:
            return self.journal.stage(stage, settings, encode, decode)
        return Kept()

    def _sample(self) -> None:
        """Explore: sample from the reference first, then guided towards the best token; score; add."""
        config, begun = self.config, time.monotonic()
        samples = config.explore_samples if self.round else config.initial_samples
        sampling = self._sampling(self.round)
        if config.sample_batch > self.batch_rows:
            note = f"sample_batch = {config.sample_batch}: the run's batches stay those of {self.batch_rows}"
            self.listen(Progress(f"round {self.round + 1}/{config.rounds}: sampling", 0, 1, note=note))
        before = len(self.pool)
        rewards: list[float] = []
        rows: list[dict[str, Any]] = []
        with self.rollout.synchronised(untouched=self.step == 0) as draw:
            shares = self._share(lambda: list(self._scored(draw, sampling, samples)))
        for _, batch in in_turn(shares):
            texts, scores = [one.text for one in batch], np.array([one.reward for one in batch])
            prompts = [one.prompt for one in batch]
            self.pool.add(
                [self.train_ids[i] for i in prompts], [one.ids for one in batch], scores, round=self.round
            )
            self.prompt_of += [i for i, s in zip(prompts, scores, strict=True) if not np.isnan(s)]
            rewards += [float(s) for s in scores if not np.isnan(s)]
            rows += [
                {
                    "round": self.round,
                    "step": self.step,
                    "prompt": self.train_rows[i]["prompt"],
                    "completion": text,
                    "reward": None if np.isnan(s) else float(s),
                }
                for i, text, s in zip(prompts, texts, scores, strict=True)
            ]

        def write() -> None:
            labels = iter(self.pool.labels()[before:].tolist())
            for row in rows:
                row["quantile"] = None if row["reward"] is None else next(labels)
            self.folder.append(COMPLETIONS, rows)
            if not rewards:
                raise UsageError(
                    f"reward {self.reward.name} scored none of {len(rows)} completions in round"
                    f" {self.round + 1}; the first was {rows[0]['completion']!r}"
                )

        self.processes.once(write)
        self._record(self._round_metrics(rewards, len(rows), begun))

    def _scored(self, draw: Draw, sampling: Sampling, samples: int) -> Iterator[tuple[int, list[Scored]]]:
        """This process's batches of the round's completions, with their rewards: (conditioning, batch)."""
        begun, done, tokens, rewards = time.monotonic(), 0, 0, 0.0
        scored = 0
        total = samples * len(self.train_ids)
        for number, batch in self._batches(draw, sampling, samples):
            yield number, batch
            scores = np.array([one.reward for one in batch])
            done, tokens = done + len(batch), tokens + sum(len(one.ids) for one in batch)
            scored, rewards = scored + int((~np.isnan(scores)).sum()), rewards + float(np.nansum(scores))
            self.listen(
                Progress(
                    f"round {self.round + 1}/{self.config.rounds}: sampling",
                    min(total, done * self.processes.count),
                    total,
                    {
                        "reward": rewards / scored if scored else float("nan"),
                        "tokens/s": tokens * self.processes.count / (time.monotonic() - begun),
                    },
                )
            )

    def _batches(self, draw: Draw, sampling: Sampling, samples: int) -> Iterator[tuple[int, list[Scored]]]:
        """(number of the conditioning, batch): as it was kept, or as it is sampled and scored now."""
        for number, (conditioning, indices) in enumerate(self._conditionings()):
            for batch in kept_or_drawn(
                draw,
                [self.train_ids[i] for i in indices],
                conditioning,
                sampling,
                samples,
                seed_for(self.config.seed, "round", self.round, number),
                self.processes.share,
                self._kept(self._stage, number, Scored.to_json, Scored.from_json),
                functools.partial(self._score, indices),
            ):
                yield number, batch

    def _score(self, prompts: list[int], places: list[int], drawn: list[list[list[int]]]) -> list[Scored]:
        """Completions of the prompts at these places, with their rewards."""
        flat = [(prompts[place], one) for place, group in zip(places, drawn, strict=True) for one in group]
        texts = [self.policy.decode(completion, self.train_ids[i]) for i, completion in flat]
        scores = self.reward([self.train_rows[i] for i, _ in flat], texts)
        return [
            Scored(i, completion, text, float(score))
            for (i, completion), text, score in zip(flat, texts, scores, strict=True)
        ]

    def _conditionings(self) -> list[tuple[Conditioning, list[int]]]:
        """What stands before which training prompts in this round."""
        config, quantiles = self.config, self.policy.quantiles
        every = list(range(len(self.train_ids)))
        if self.step == 0:  # nothing was learned yet
            return [(Conditioning(), every)]
        if config.explore_token == "best":
            return [(Conditioning(quantiles - 1, 0, config.guidance), every)]
        seed = seed_for(config.seed, "tokens to explore by", self.round)
        tokens = np.random.default_rng(seed).integers(quantiles, size=len(every))
        return [
            (Conditioning(k, 0, config.guidance), np.flatnonzero(tokens == k).tolist())
            for k in range(quantiles)
        ]

    def _round_metrics(self, rewards: list[float], samples: int, begun: float) -> dict[str, Any]:
        labels, every = self.pool.labels(), self.pool.rewards
        by_quantile = [every[labels == k] for k in range(self.pool.quantiles)]
        return {
            "kind": "round",
            "round": self.round,
            "step": self.step,
            "samples": samples,
            "unscored": samples - len(rewards),
            "pool": len(self.pool),
            "reward_mean": float(np.mean(rewards)),
            "reward_by_quantile": [float(r.mean()) if len(r) else None for r in by_quantile],
            "thresholds": [float(t) for t in self.pool.thresholds],
            "guidance": self.config.guidance if self.step else 1.0,
            "seconds": time.monotonic() - begun,
        }

    def _learn(self) -> Iterator[int]:
        """The round's optimizer steps on samples under their current quantile's token."""
        config = self.config
        labels = self.pool.labels()
        rng = np.random.default_rng(seed_for(config.seed, "draws", self.round))
        lengths = np.array([len(self.train_ids[i]) for i in self.prompt_of])
        plan = plan_batches(
            labels, config.weights(), lengths, self.draws, config.steps, config.batch_size, rng
        )
        drawn = set(np.unique(labels[plan]).tolist())
        self.touched |= drawn
        if config.contrast_coef:  # it trains each sample's mirror token, too
            self.touched |= {config.quantiles - 1 - k for k in drawn}
        first = self._first_step
        while self.step < first + config.steps:
            try:
                numbers = self._step(plan[self.step - first], labels)
            except OutOfMemory:
                self._save()
                with self.processes.alike():
                    raise
            self.step += 1
            row = {"kind": "step", "step": self.step, "round": self.round, **numbers}
            self._record(row)
            self.listen(
                Progress(
                    f"round {self.round + 1}/{config.rounds}: learning",
                    self.step - first,
                    config.steps,
                    {
                        k: v
                        for k, v in numbers.items()
                        if k not in ("grad_norm", "lr", "seconds") and isinstance(v, int | float)
                    },
                    note=f"step {self.step}: no finite {numbers['skipped_for']}, skipped"
                    if "skipped_for" in numbers
                    else "",
                )
            )
            with self.processes.alike():
                self.bad_steps.stop(config, self.step, row)
            yield self.step
        self.draws.count(plan)

    def _probe(self) -> None:
        """How well the reward tokens tell held-out completions apart by now."""
        if self.policy.quantiles == 1:
            return  # one token tells nothing apart
        self.listen(Progress("probing", 0, 1))
        model = self.policy.frozen_copy(self.sampling_dtype)
        if self.probe is None:
            sampling = dataclasses.replace(self._evaluation_sampling(), rows=32)
            drawn = self._share(
                lambda: Probe.draw(
                    self.policy,
                    self.reference,
                    self.reward,
                    self.held_out,
                    # One sample a prompt is mostly prefill: fewer rows side by side.
                    sampling,
                    self.config.seed,
                    self.sampler,
                    self.processes.share,
                    self._kept("probe", self._what_is_measured(sampling)),
                )
            )
            self.probe = Probe.of(batch for _, batch in in_turn(drawn))
        probe = self.probe
        found, kl = self._share(
            lambda: (probe.measure(self.policy, model), probe.kl(self.policy, model, self.reference))
        )[0]
        row = {
            "kind": "probe",
            "step": self.step,
            "rank_correlation": found.value,
            "standard_error": found.standard_error,
            "kl": kl,
        }
        self._record(row)
        self.listen(Progress("probing", 1, 1, {"rank correlation": found.value}))

    def _step(self, chosen: npt.NDArray[np.int64], labels: npt.NDArray[np.int32]) -> dict[str, Any]:
        """One optimizer step; micro-batches add up to exactly the loss of the whole batch."""
        config, begun = self.config, time.monotonic()
        samples = self.pool[self.pool.ids[chosen]]
        total = sum(len(completion) for completion in samples.completions)
        # Each process takes its part over the whole batch's counts times its share of them: the mean over
        # processes, which is what DDP and FSDP2 make of gradients, is then the loss of the whole batch.
        count = self.processes.count
        own = self.processes.part(np.arange(len(chosen)))
        self.objective.kl_coef = self.kl.coef

        def gradient(micro_batch: int) -> dict[str, float]:
            self._forget_gradients()  # of an attempt that ran out of memory
            sums: dict[str, float] = {}
            for start in range(0, len(own), micro_batch):
                part = own[start : start + micro_batch]
                compute = functools.partial(
                    self.objective,
                    [samples.prompts[i].tolist() for i in part],
                    [samples.completions[i].tolist() for i in part],
                    labels[chosen[part]].tolist(),
                    total / count,
                    len(chosen) / count,
                )
                with self.processes.accumulating(self.accelerator, self.around):
                    loss, terms = self.around(compute)
                    self.accelerator.backward(loss)
                for name, value in terms.items():
                    sums[name] = sums.get(name, 0.0) + value
            return sums

        sums, self.micro_batch = within_memory(
            gradient, self.micro_batch, self._smaller, self.processes.lacked_memory
        )
        decay = config.decay(self.step, config.rounds - self.left_out)
        for group, base in zip(
            self.optimizer.param_groups, (config.learning_rate, config.reward_token_lr), strict=True
        ):
            group["lr"] = base * decay
        sums = self.processes.mean(sums)
        finite = all(map(math.isfinite, sums.values()))
        self.processes.average_gradients(self.accelerator, self.around, finite)
        # In the model's own order, by which accelerate tells that these are the parameters it has sharded.
        parameters = list(self.around.parameters())
        norm = float(whole(self.accelerator.clip_grad_norm_(parameters, config.max_grad_norm)))
        scaler = self.accelerator.scaler
        bad = self.bad_steps.judge(sums, norm, scaler and scaler.get_scale())
        if bad is None:
            self.optimizer.step()
            self.kl.update(sums["kl"], len(chosen))
        elif scaler is not None:
            scaler.update()  # it has seen this gradient, and takes no other before
        self._forget_gradients()
        seconds = time.monotonic() - begun
        numbers: dict[str, Any] = {
            **sums,
            **({"kl_coef": self.objective.kl_coef} if config.kl_target else {}),
            "grad_norm": norm,
            "lr": config.learning_rate * decay,
            "tokens_per_s": total / seconds,
            "seconds": seconds,
        }
        numbers = {k: v if math.isfinite(v) else None for k, v in numbers.items()}  # JSON has no NaN
        if self.bad_steps.skipped:
            numbers["skipped"] = self.bad_steps.skipped
        return numbers if bad is None else numbers | {"skipped_for": bad}

    def _forget_gradients(self) -> None:
        # DDP's gradients lie in buffers that it keeps: others beside them would take as much again.
        self.optimizer.zero_grad(set_to_none=not self.processes.replicated)

    def _smaller(self, micro_batch: int) -> None:
        """Note that the memory sufficed for no more samples at a time."""
        self._record({"kind": "micro_batch", "step": self.step, "micro_batch": micro_batch})
        note = f"out of memory: from step {self.step + 1} on, {micro_batch} samples at a time, as many a step"
        done = self.step - self._first_step
        stage = f"round {self.round + 1}/{self.config.rounds}: learning"
        self.listen(Progress(stage, done, self.config.steps, note=note))

    # ---------------------------------------------------------------- the end

    def _evaluate(self) -> None:
        """``evaluation.json``: held-out prompts in every mode, of the model as it is exported."""
        config = self.config
        if self.task.prompt_classes:
            self._classify()
        table = modes(self.policy.quantiles, config.guidances(), config.eval_quantiles == "all")
        if config.eval_modes == "best":
            table = [mode for mode in table if mode.name in ("untouched", "best token")]
        model = self.policy.exported_copy(self.sampling_dtype)
        shares = self._share(lambda: list(self._evaluated(table, model)))
        samples: dict[str, list[Sample]] = {mode.name: [] for mode in table}
        for name, part in in_turn(shares):
            samples[name] += part
        self.processes.once(lambda: self._write_evaluation(table, samples))

    def _evaluated(self, table: list[Mode], model: Any) -> Iterator[tuple[str, list[Sample]]]:
        """This process's batches of every mode."""
        sampling = self._evaluation_sampling()

        def kept(mode: Mode) -> Kept[list[Sample]]:
            return self._kept(
                "evaluation",
                [mode.name, dataclasses.asdict(mode.conditioning), *self._what_is_measured(sampling)],
                lambda part: [vars(one) for one in part],
                lambda part: [Sample(**one) for one in part],
            )

        heard = evaluate(
            self.policy,
            model,
            self.reference,
            self.reward,
            self.held_out,
            table,
            sampling,
            seed=self.config.seed,
            measures=self.task.measures,
            sampler=self.sampler,
            share=self.processes.share,
            kept=kept,
        )
        total = len(self.held_out.rows) * self.config.eval_samples
        found: dict[str, list[Sample]] = {mode.name: [] for mode in table}
        for name, part in heard:
            found[name] += part
            samples = found[name]
            scores = [s.score for s in samples if s.score is not None]
            mean = sum(scores) / len(scores) if scores else float("nan")
            numbers = {self.reward.property or "reward": mean}
            if self.task.headline != "mean":
                shown = [s.measures[self.task.headline] for s in samples if s.measures]
                numbers[self.task.headline] = sum(shown) / len(shown) if shown else float("nan")
            done = min(total, len(samples) * self.processes.count)
            self.listen(Progress(f"evaluating: {name}", done, total, numbers))
            yield name, part

    def _what_is_measured(self, sampling: Sampling) -> list[Any]:
        """What samples of the held-out prompts follow from that may change at a resume, as JSON."""
        # How many are side by side may change in the middle.
        how = dataclasses.asdict(dataclasses.replace(sampling, at_once=0))
        return [how, self.held_out.samples, self.held_out.rows, self.held_out.ids, self.held_out.texts]

    def _write_evaluation(self, table: list[Mode], samples: dict[str, list[Sample]]) -> None:
        config = self.config
        rows = [{"row": name, **vars(sample)} for name, part in samples.items() for sample in part]
        self.folder.write_rows("evaluation.jsonl", rows)
        about = describe_evaluation(
            self.task,
            config.target,
            self.reward,
            self.policy,
            evaluation_sampling(self.config),
            self.held_out,
            config.seed,
            config.guidances(),
            {"model": config.model or assets.DEFAULT_MODEL, "tokens": "sampled"},
            [self.sampling_dtype],
        )
        summary = summarise(samples, table, about)
        self.folder.write_json("evaluation.json", summary)
        for row in summary["rows"]:
            numbers = {f"{row['name']}/{name}": value["value"] for name, value in row["metrics"].items()}
            trackers.track(self.accelerator, {"kind": "evaluation", "step": self.step, **numbers})

    def _classify(self) -> None:
        """Give every held-out prompt its class, also in the run folder, where ``evaluate`` reads it."""
        rows = [dict(row) for row in self.held_out.rows]
        if not all("prompt_class" in row for row in rows):
            for share in self._share(lambda: dict(self._classified())):
                for i, name in share.items():
                    rows[i]["prompt_class"] = name
        self.held_out = dataclasses.replace(self.held_out, rows=rows)
        texts = [{**row, "prompt": row["text"]} if self.config.prefix_tokens else row for row in rows]
        self.processes.once(lambda: self.folder.write_rows(HELD_OUT, map(to_file, texts)))

    def _classified(self) -> Iterator[tuple[int, str]]:
        """(index, class) of this process's part of the held-out prompts."""
        sampling = self._evaluation_sampling()
        found = classify_prompts(
            self.policy,
            self.reference,
            self.reward,
            self.held_out,
            sampling,
            self.config.seed,
            self.config.target,
            self.sampler,
            self.processes.share,
            self._kept(
                "classes",
                self._what_is_measured(sampling),
                decode=lambda batch: [(int(i), str(name)) for i, name in batch],
            ),
        )
        total = len(self.held_out.rows)
        for done, one in enumerate(found, start=1):
            yield one
            done = min(total, done * self.processes.count)
            self.listen(Progress("classifying the held-out prompts", done, total))

    def _finish(self) -> None:
        self.listen(Progress("writing the model and the report", 0, 1))
        exported = self.policy.whole_copy(self.policy.stored_dtype)

        def write() -> None:
            with replacing_folder(self.folder / "model") as scratch:
                how = generation_settings(self._evaluation_sampling())
                self.policy.write_export(scratch, exported, how, untie=self.checked.untie)
            self.folder.add_minutes(round(self.seconds / 60, 1))
            write_report(self.folder.path)
            trackers.finish(self.accelerator)
            self.folder.finish()

        self.processes.once(write)
        self.listen(Progress("writing the model and the report", 1, 1))


def _check_impl(impl: Implementation, device: torch.device) -> None:
    """The loss on two logits: whether the implementation asked for runs here shows at once."""
    logits, labels = torch.zeros(1, 2, device=device), torch.zeros(1, dtype=torch.long, device=device)
    try:
        quark_loss(logits, logits, labels, kl_coef=0.0, entropy_coef=0.0, impl=impl)
    except ValueError as error:
        raise UsageError(f"impl = {impl}: {error}") from error


def _parameters(model: Any) -> list[Any]:
    """What the optimizer has, in its order: the reward tokens' rows, which have a rate of their own, last."""
    rows = model.get_input_embeddings().rows
    return [*(p for p in model.parameters() if p.requires_grad and p is not rows), rows]


def _trained(model: Any) -> dict[str, Tensor]:
    """The parameters that training changes: all of them, or adapters and reward rows."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# Optimizer and pool states as flat tensors: a checkpoint is safetensors and JSON, nothing pickled.


def _small_part(loaded: Checkpoint | None) -> Checkpoint | None:
    """A checkpoint without the data of the tensors that processes share out among themselves."""
    if loaded is None:
        return None
    state, tensors = loaded
    large = {name: without_data(tensors[name]) for name in ("model", "optimizer")}
    return state, {**tensors, **large}


def _to_tensors(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    arrays = {k: torch.from_numpy(v.copy()) for k, v in state.items() if isinstance(v, np.ndarray)}
    return arrays, {k: v for k, v in state.items() if not isinstance(v, np.ndarray)}


def _from_tensors(arrays: dict[str, Tensor], plain: dict[str, Any]) -> dict[str, Any]:
    return {**plain, **{k: v.numpy() for k, v in arrays.items()}}
