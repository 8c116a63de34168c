"""The trained adapters by themselves, as peft loads them onto the base model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from quark_fast.model.lora import adapted_layers
from quark_fast.model.policy import Policy

TOKENIZER_FILES = (
    "*token*.json",
    "*.model",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*",
)


def write_adapter(policy: Policy, export: Path, base: str) -> None:
    """Write the adapters unmerged, in float32, with the reward tokens' rows as peft's trainable tokens.

    They go to ``adapter`` in the folder of the export, whose tokenizer they get, too: by it
    ``AutoPeftModelForCausalLM.from_pretrained(folder)`` finds how many rows the base model needs.

    ``PeftModel.from_pretrained(model, folder)`` has the logits of the export in float32 on the base
    vocabulary, once ``model`` is the base model in float32 with as many rows as the export has. Logits of
    reward tokens may differ: where the head is tied they are those of their rows, which the export's are not.

    Args:
        base: what the configuration calls the base model.
    """
    from peft import LoraConfig  # slow to import

    folder = export / "adapter"
    model: Any = policy.model
    layers, embedding = dict(adapted_layers(model)), model.get_input_embeddings()
    table = next(name for name, module in model.named_modules() if module is embedding)
    trained: LoraConfig = model.peft_config["default"]
    LoraConfig(
        r=trained.r,
        lora_alpha=trained.lora_alpha,
        target_modules=list(layers),
        fan_in_fan_out=trained.fan_in_fan_out,
        trainable_token_indices={table: policy.reward_ids},
        base_model_name_or_path=base,
        task_type="CAUSAL_LM",
        inference_mode=True,
    ).save_pretrained(str(folder))
    tensors: dict[str, Tensor] = {f"{table}.token_adapter.trainable_tokens_delta": embedding.rows}
    for name, layer in layers.items():
        for part in "AB":
            if layer.lora_embedding_A:  # of a table, such as learned positions
                tensors[f"{name}.lora_embedding_{part}"] = getattr(layer, f"lora_embedding_{part}")["default"]
            else:
                tensors[f"{name}.lora_{part}.weight"] = getattr(layer, f"lora_{part}")["default"].weight
    save_file(
        {f"base_model.model.{name}": t.detach().float().cpu().contiguous() for name, t in tensors.items()},
        folder / "adapter_model.safetensors",
        {"format": "pt"},
    )
    for pattern in TOKENIZER_FILES:
        for file in export.glob(pattern):
            copy = folder / file.relative_to(export)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
