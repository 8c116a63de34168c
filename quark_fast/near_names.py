"""What a setting's name that is not known may have meant: a slip, or what another trainer calls it."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from typing import Any

# What TRL's and transformers' trainers call a setting, and what it is here, nearly.
NEIGHBOURS = {
    "output_dir": "output",
    "model_name_or_path": "model",
    "dataset_name": "prompts",
    "train_file": "prompts",
    "validation_file": "held_out",
    "test_size": "held_out",
    "reward_funcs": "reward",
    "reward_model_name_or_path": "scorer",
    "reward_model": "scorer",
    "reward_weights": "reward",
    "beta": "kl_coef",
    "init_kl_coef": "kl_coef",
    "target_kl": "kl_target",
    "max_steps": "steps",
    "num_train_epochs": "rounds",
    "per_device_train_batch_size": "micro_batch",
    "train_batch_size": "batch_size",
    "num_generations": "initial_samples",
    "max_completion_length": "max_new_tokens",
    "max_prompt_length": "max_prompt_tokens",
    "generation_batch_size": "sample_batch",
    "resume_from_checkpoint": "resume",
    "save_steps": "checkpoint_every",
    "load_best_model_at_end": "keep_best",
    "metric_for_best_model": "keep_best",
    "early_stopping_patience": "stop_after",
    "mixed_precision": "precision",
    "bf16": "precision",
    "fp16": "precision",
    "hub_model_id": "push_to_hub",
    "use_vllm": "rollout",
    "lora_r": "lora_rank",
    "lora_target_modules": "lora_targets",
    "use_peft": "lora_rank",
    "optim": "optimizer",
    "lr": "learning_rate",
    "epochs": "rounds",
    "dataset": "prompts",
    "train_dataset": "prompts",
    "eval_dataset": "held_out",
}


def nearest(name: str, known: Collection[str]) -> str | None:
    """That of the ``known`` names (with underscores) which ``name`` may stand for; None: none is near."""
    plain = name.replace("-", "_")
    ours = "reward" if plain == "scorer" else NEIGHBOURS.get(plain)  # --scorer is a flag, but no setting
    return ours if ours in known else next(iter(difflib.get_close_matches(plain, known, n=1)), None)


def unknown_setting(name: Any, known: Collection[str]) -> str:
    """The error for a setting that there is not."""
    near = nearest(str(name), known)
    return f"unknown setting {name!r}" + (f"; did you mean {near!r}?" if near else "")
