"""Everything that is saved of a run and restored by a resumed one.

A checkpoint is safetensors and JSON, nothing pickled, and does not depend on the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quark_fast.data.split import digest
from quark_fast.errors import UsageError, other_weights
from quark_fast.model.lora import has_adapters
from quark_fast.runtime import zero
from quark_fast.runtime.checkpoint_files import (
    StateAndTensors,
    cut_back,
    keep_state,
    load_checkpoint,
    save_checkpoint,
)
from quark_fast.runtime.distributed import LossModule, Processes, without_data
from quark_fast.runtime.journal import Journal
from quark_fast.runtime.memory import is_lack_of_memory
from quark_fast.runtime.run_folder import RunFolder
from quark_fast.training.from_run import first_checkpoint
from quark_fast.training.optimizer import load_state, state_tensors, trained_parameters
from quark_fast.training.scored import scored_digest
from quark_fast.training.setup import Setup
from quark_fast.training.stability import BadSteps
from quark_fast.training.state import MeasuredRound, State, first_micro_batch

Tensors = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Checkpoint:
    """Writes and reads the checkpoints of a run: weights, optimizer and ``State``."""

    setup: Setup
    wrapped: LossModule
    optimizer: Any
    journal: Journal

    @property
    def identity(self) -> dict[str, Any]:
        """What all samples follow from, before the first checkpoint, too: a resumed run needs the same."""
        scored = scored_digest(self.setup.prompts.scored)
        return {**self._made_of, "reward": self.setup.reward.identity, "scored": scored}

    @property
    def _made_of(self) -> dict[str, Any]:
        prompts = self.setup.prompts
        return {"prompts": digest(prompts.train), "columns": prompts.columns, "base": self.setup.base}

    @property
    def _scorers(self) -> dict[str, Any]:
        judges = [one.identity for one in self.setup.judges]
        return {"reward": self.setup.reward.identity, "judges": judges}

    def save(self, state: State) -> None:
        """Add a checkpoint to the run folder."""
        setup = self.setup
        saved, tensors = self._contents(state)
        tensors["model"] = setup.processes.gather(trained_weights(setup.policy.model).items())
        tensors["optimizer"] = setup.processes.gather(self._optimizer_tensors())
        setup.processes.on_rank_0(lambda: save_checkpoint(setup.folder, saved, tensors))

    def keep(self, state: State) -> None:
        """Write ``state/``, which stays: the pool and the reward tokens, and adapters where they are trained.

        Weights that were trained whole are in the export.
        """
        setup = self.setup
        saved, tensors = self._contents(state)
        model = setup.policy.model
        rows, adapted = model.get_input_embeddings().rows, has_adapters(model)
        kept = {name: p for name, p in trained_weights(model).items() if adapted or p is rows}
        tensors["model"] = setup.processes.gather(kept.items())
        setup.processes.on_rank_0(lambda: keep_state(setup.folder, saved, tensors))

    def _contents(self, state: State) -> tuple[dict[str, Any], Tensors]:
        """All of a checkpoint but weights and the optimizer's state."""
        setup = self.setup
        arrays, plain = _to_tensors(state.pool.state_dict())
        scaler = setup.accelerator.scaler
        saved = {
            "begun": [state.earlier_rounds, state.earlier_steps],
            "round": state.round,
            "sampled": state.sampled,
            "step": state.step,
            "seconds": state.seconds,
            "bad_steps": state.bad_steps.state_dict(),
            "kl_coef": state.kl.coef,
            "micro_batch": [setup.config.micro_batch, state.micro_batch, setup.processes.count],
            "device": setup.device.type,
            "scaler": None if scaler is None else scaler.state_dict(),
            **self._made_of,
            **self._scorers,
            "left_out": state.left_out,
            "trained": sorted(state.trained),
            "measured": [vars(one) for one in state.measured],
            "pool": plain,
        }
        return saved, {
            "pool": arrays,
            "draws": {
                "counts": torch.from_numpy(state.draws),
                "prompt_of": torch.tensor(state.prompt_of),
            },
        }

    def restore(self, state: State, check: Callable[[list[MeasuredRound]], None]) -> None:
        """Set weights, optimizer and ``state`` to the last checkpoint, if there is one.

        Before the first one, a run that goes on from another has what that one kept.

        Args:
            check: called on rank 0 with the rounds that were measured, before anything is changed.
        Raises:
            UsageError: it is another run's, or another reward scored its samples.
        """
        with self.setup.folder.disk_errors():
            try:
                self._restore(state, check)
            except UsageError:
                raise
            except (LookupError, TypeError, ValueError, OverflowError, RuntimeError) as error:
                if is_lack_of_memory(error):
                    raise
                raise UsageError(
                    f"the checkpoint in {self.setup.folder.path} is not one of this run"
                    f" ({type(error).__name__}: {error}); start anew in another --output"
                ) from error

    def _restore(self, state: State, check: Callable[[list[MeasuredRound]], None]) -> None:
        processes, folder, config = self.setup.processes, self.setup.folder, self.setup.config
        loaded: StateAndTensors | None = None
        source, cut = folder, None
        if config.resume:  # else the folder is not this run's yet, but may be another's by now
            loaded = processes.on_rank_0(lambda: load_checkpoint(folder), _without_large_data)
            cut = None if loaded is None else loaded[0]
            identity = None if loaded else processes.on_rank_0(lambda: self.journal.identity)
            if identity is not None:
                processes.all_gather(lambda: self._check_identity(identity))
        if loaded is None and config.from_run:
            source = earlier = RunFolder(config.from_run)
            loaded = processes.on_rank_0(
                lambda: first_checkpoint(config, self.setup.policy, earlier), _without_large_data
            )
        if loaded is not None:
            processes.all_gather(lambda: self._check(*loaded, source))
            processes.on_rank_0(lambda: check(_measured(loaded[0])))
        if config.resume:
            processes.on_rank_0(lambda: cut_back(folder, cut))
        if loaded is None:
            return
        saved, tensors = loaded
        set_weights(processes, self.setup.policy.model, tensors["model"])
        self._load_optimizer(tensors["optimizer"])
        processes.all_gather(lambda: self._load_state(state, saved, tensors))

    def _check_identity(self, before: Mapping[str, Any]) -> None:
        """Refuse what is kept of a first round with other prompts, completions or rewards."""
        self._check_made_of(before, self.setup.folder)
        if before["scored"] != self.identity["scored"]:
            raise UsageError(
                f"the scored completions of {self.setup.config.scored} are not those that the run in"
                f" {self.setup.folder.path} began with: the file has changed; put it back, or begin anew in"
                " another --output"
            )
        self._check_reward(before["reward"], self.setup.folder)

    def _check(self, saved: dict[str, Any], tensors: Tensors, folder: RunFolder) -> None:
        """Refuse the checkpoint of another model, or of other prompts."""
        own = trained_weights(self.setup.policy.model)
        if own.keys() != tensors["model"].keys() or any(
            own[k].shape != v.shape for k, v in tensors["model"].items()
        ):
            raise UsageError(
                f"the checkpoint in {folder.path} holds other weights than"
                f" {self.setup.config.model or 'the embedded model'} has; resume it with its own model"
            )
        self._check_made_of(saved, folder)
        self._check_reward(saved["reward"], folder)
        # Two rewards on purpose (_check_reward) are so for the rounds, too.
        if saved["measured"] and saved["judges"] != self._scorers["judges"]:
            raise UsageError(
                f"the rounds of {folder.path} were measured by another judge, and --keep-best cannot compare"
                " them with later ones; put it back, or begin anew in another --output"
            )

    def _check_made_of(self, before: Mapping[str, Any], folder: RunFolder) -> None:
        """Refuse another base model, other prompts or other columns; runs of before have no note of some."""
        now, config = self._made_of, self.setup.config
        changed = {name for name in now if before.get(name, now[name]) != now[name]}
        if "base" in changed:
            raise other_weights(config.model, f"the run in {folder.path}", "begin anew in")
        if "prompts" in changed:
            raise UsageError(
                f"the training prompts are not those that the run in {folder.path} began with;"
                " give it the same"
            )
        if "columns" in changed and not config.accept_changed_reward:
            raise UsageError(
                "the columns beside the training prompts, which a reward may read, are not those that the run"
                f" in {folder.path} began with; put them back, begin anew in another --output, or go on with"
                " both on purpose by --accept-changed-reward"
            )

    def _check_reward(self, before: Sequence[str], folder: RunFolder) -> None:
        """Refuse to rank one pool by two rewards, unless that is wanted."""
        identity = self.setup.reward.identity
        if before == identity or self.setup.config.accept_changed_reward:
            return
        then, now = (" ".join(one)[:200] for one in (before, identity))
        raise UsageError(
            f"the reward is not the one that scored the samples in {folder.path}: its code,"
            f" weights or settings were {then}, and are {now}; put it back, begin anew in another"
            " --output, or go on with both on purpose by --accept-changed-reward"
        )

    def _load_state(self, state: State, saved: dict[str, Any], tensors: Tensors) -> None:
        """What every process has of a checkpoint: all but weights and the optimizer's state."""
        config = self.setup.config
        if self.setup.accelerator.scaler is not None and saved["scaler"] is not None:
            self.setup.accelerator.scaler.load_state_dict(saved["scaler"])
        state.pool.load_state_dict(_from_tensors(tensors["pool"], saved["pool"]))
        state.draws = tensors["draws"]["counts"].numpy()
        state.prompt_of = tensors["draws"]["prompt_of"].tolist()
        state.round, state.sampled, state.step = saved["round"], saved["sampled"], saved["step"]
        state.earlier_rounds, state.earlier_steps = map(int, saved["begun"])
        state.left_out = int(saved["left_out"])
        state.trained = set(saved["trained"])
        state.seconds = float(saved["seconds"])
        state.measured = _measured(saved)
        state.bad_steps = BadSteps(**saved["bad_steps"])
        state.kl.coef = float(saved["kl_coef"])
        asked, found, processes = saved["micro_batch"]
        before = first_micro_batch(config, max(1, processes), self.setup.device)
        same_device = saved.get("device", self.setup.device.type) == self.setup.device.type
        # Else the memory sufficed, it was another one, or the user knows better by now.
        if found < before and same_device and asked == config.micro_batch:
            state.micro_batch = max(1, min(state.micro_batch, int(found)))
        done = state.step - state.first_step(config)
        prompts = range(len(self.setup.prompts.train_ids))
        if not (
            0 <= state.left_out <= state.round - state.earlier_rounds <= config.rounds
            and 0 <= done <= config.steps
            and len(state.prompt_of) == len(state.pool) == len(state.draws)
            and all(i in prompts for i in state.prompt_of)
        ):
            raise ValueError(f"round {state.round}, step {state.step}, {len(state.pool)} samples do not fit")

    def _optimizer_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(index of the parameter and name of the moment, tensor)."""
        if self.setup.processes.zero:
            return zero.optimizer_tensors(self.optimizer, trained_parameters(self.setup.policy.model))
        return state_tensors(self.optimizer)

    def _load_optimizer(self, tensors: dict[str, Tensor]) -> None:
        processes, parameters = self.setup.processes, trained_parameters(self.setup.policy.model)

        def distributed() -> Iterator[tuple[str, Tensor]]:
            for key, value in tensors.items():
                like: Tensor = parameters[int(key.partition(".")[0])]
                if value.shape != like.shape:  # a count of steps, or a block's scales: never sharded
                    like = torch.empty(0, device=like.device)
                yield key, processes.distribute(value, like)

        if processes.zero:
            zero.set_weights(parameters)
            if tensors:
                for group in self.optimizer.param_groups:
                    group["lr"] = 0.0
                # A step with a zero loss at rate 0, in which DeepSpeed creates the state that is set next.
                processes.average_gradients(self.setup.accelerator, self.wrapped, finite=True)
                zero.set_optimizer(self.optimizer, parameters, distributed())
            return
        load_state(self.optimizer, distributed())


def _measured(saved: dict[str, Any]) -> list[MeasuredRound]:
    """The measured rounds of a checkpoint."""
    return list(map(MeasuredRound.from_json, saved["measured"]))


def trained_weights(model: Any) -> dict[str, Tensor]:
    """The parameters that training changes: all of them, or adapters and reward rows."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def set_weights(processes: Processes, model: Any, weights: Mapping[str, Tensor]) -> None:
    """Set the parameters that ``weights`` names; the data are rank 0's, and every process has to ask."""
    own = dict(model.named_parameters())
    for name, value in weights.items():
        own[name].copy_(processes.distribute(value, own[name]))


def _without_large_data(loaded: StateAndTensors | None) -> StateAndTensors | None:
    """A checkpoint without the data of weights and optimizer, which ``Processes.distribute`` sends."""
    if loaded is None:
        return None
    state, tensors = loaded
    large = {name: without_data(tensors[name]) for name in ("model", "optimizer")}
    return state, {**tensors, **large}


def _to_tensors(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A pool's state as flat tensors and JSON."""
    arrays = {k: torch.from_numpy(v.copy()) for k, v in state.items() if isinstance(v, np.ndarray)}
    return arrays, {k: v for k, v in state.items() if not isinstance(v, np.ndarray)}


def _from_tensors(arrays: dict[str, Tensor], plain: dict[str, Any]) -> dict[str, Any]:
    return {**plain, **{k: v.numpy() for k, v in arrays.items()}}
