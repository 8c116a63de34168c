"""``--from RUN``: what a run goes on from is what a finished one kept in its ``state/``."""

from __future__ import annotations

import shlex
from typing import Any

import torch
from torch import Tensor

from quark_fast.arguments import load_config
from quark_fast.config import Config
from quark_fast.errors import UsageError
from quark_fast.model.loading import load_pretrained
from quark_fast.model.lora import has_adapters
from quark_fast.model.policy import Policy
from quark_fast.runtime.checkpoint_files import StateAndTensors, kept_state
from quark_fast.runtime.run_folder import STATE, RunFolder
from quark_fast.training.stability import BadSteps

# Settings that must be the earlier run's, and why. With other ones its weights and pool would mean something
# else; or, beside the prompts, they decide which of these are trained on and which are held out.
NEEDED, SPLIT = ", which its weights and pool need", ": prompts that it was trained on could be held out"
SAME = {
    **dict.fromkeys(("model", "quantiles", "prefix", "lora_rank", "lora_alpha", "lora_targets"), NEEDED),
    **dict.fromkeys(("scored", "ties", "seed", "target"), NEEDED),
    **dict.fromkeys(("evaluate_on", "split_seed", "prompt_limit"), SPLIT),
}


def check_from_run(config: Config, earlier: RunFolder) -> None:
    """Refuse, before anything is loaded, what a run of these settings cannot go on from."""
    path = earlier.path
    if not (earlier / "config.yaml").exists():
        raise UsageError(
            f"--from {path}: no run folder (no config.yaml); give the --output of a finished run"
        )
    if not earlier.finished:
        raise UsageError(f"--from {path}: that run is not finished; go on with it by {earlier.resumed_by}")
    if not (earlier / STATE).exists():
        raise UsageError(
            f"--from {path}: it has no {STATE}/ to go on from, which was deleted; begin anew"
            f" with its samples by --scored {shlex.quote(str(earlier / 'completions.jsonl'))}"
        )
    saved = load_config(earlier / "config.yaml")
    for name, why in SAME.items():
        mine, theirs = getattr(config, name), getattr(saved, name)
        if mine != theirs:
            raise UsageError(
                f"{name} = {mine!r}, but the run in {path} has {theirs!r}{why};"
                " give that, or train anew without --from"
            )
    config.check_compares_rounds_as(saved, f"the run in {path}")


def first_checkpoint(config: Config, policy: Policy, earlier: RunFolder) -> StateAndTensors:
    """A checkpoint for the beginning of a run: the earlier run's weights and pool, and a new optimizer.

    Exact where adapters were trained. Where all weights were, they are those of the export, which was
    rounded to the dtype that the base model is stored in.
    """
    saved, tensors = kept_state(earlier)
    if not has_adapters(policy.model):
        tensors["model"] |= _exported_weights(policy, earlier / "model")
    fresh: dict[str, Any] = {
        "begun": [saved["round"], saved["step"]],
        "sampled": False,
        "left_out": 0,
        "measured": [],
        "seconds": 0.0,
        "bad_steps": BadSteps().state_dict(),
        "micro_batch": [None, 1, 1],  # of another run: as many as this one begins with
        "kl_coef": saved["kl_coef"] if _goes_on_with_kl(config, earlier) else config.kl_coef,
    }
    return saved | fresh, {**tensors, "optimizer": {}}


def _goes_on_with_kl(config: Config, earlier: RunFolder) -> bool:
    """Whether the KL's weight is the one that the earlier run's controller came to: another was not given."""
    before = load_config(earlier / "config.yaml")
    return bool(config.kl_target and before.kl_target) and config.kl_coef == before.kl_coef


def _exported_weights(policy: Policy, folder: Any) -> dict[str, Tensor]:
    """The weights of an export by the policy's names, without the rows that the export has beyond them."""
    model, _ = load_pretrained(folder, torch.float32, trust_remote_code=policy.trust_remote_code)
    found, embedding = dict(model.named_parameters()), policy.model.get_input_embeddings()
    table = next(name for name, module in policy.model.named_modules() if module is embedding)
    weights = {}
    for name, own in policy.model.named_parameters():
        if own is not embedding.rows:
            exported = found[name.replace(f"{table}.base.", f"{table}.")].detach()
            weights[name] = exported[: own.shape[0]].clone() if own.ndim else exported
    return weights
