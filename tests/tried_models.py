"""What became of each architecture: python tests/tried_models.py writes docs/models.md."""

from __future__ import annotations

import functools
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from architectures import ARCHITECTURES, Architecture

from quark_fast.config import Config
from quark_fast.errors import UsageError
from quark_fast.evaluation.held_out import generation_settings
from quark_fast.model.check_model import check_model
from quark_fast.model.check_reading import gap_of, logits_alone, tolerance_of
from quark_fast.model.loading import load_reference
from quark_fast.model.lora import Lora, adapted_layers, add_adapters, merge_adapters
from quark_fast.model.policy import Policy
from quark_fast.rollout.sampling import Sampling
from quark_fast.runtime.machine import quiet_libraries
from quark_fast.training.objective import Objective

DOCS = Path(__file__).parents[1] / "docs" / "models.md"


@dataclass(frozen=True)
class Tried:
    """One line of the table."""

    name: str
    model: str
    tokenizer: str
    outcome: str

    def __str__(self) -> str:
        return f"| {' | '.join(text.replace('|', '/') for text in vars(self).values())} |"


def try_out(one: Architecture, folder: Path) -> tuple[Tried, Policy | None]:
    """Load a tiny model as training does, and check it; the policy where it is not refused."""
    one.save(folder)
    try:
        policy = Policy.create(folder, quantiles=3)
    except UsageError as error:
        return Tried(one.name, "", "", f"refused: {_without_numbers(error)}"), None
    policy.model.eval()
    policy.model.set_attn_implementation("eager")  # as for short texts on the CPU
    reference = load_reference(folder, torch.bfloat16, torch.device("cpu"))
    kinds = type(policy.model).__name__, type(policy.tokenizer).__name__
    how = generation_settings(Sampling())
    low = functools.partial(torch.autocast, "cpu", torch.bfloat16)
    objective = functools.partial(Objective, Config(), policy, reference, torch.device("cpu"), low)
    try:
        checked = check_model(policy, reference, folder.parent, how, untie=True, objective=objective)
    except UsageError as error:
        text = _without_numbers(error).removeprefix(f"{kinds[0]} ").split("; give ")[0]
        return Tried(one.name, *kinds, f"refused: it {re.sub(r'^[(][^)]*[)] ', '', text)}"), None
    said = [line.split(", since ")[0].replace(kinds[0], "it") for line in checked.lines[1:]]
    if (without := _try_adapters(policy)) is not None:
        said.append(f"adapters are refused: {without}")
    return Tried(one.name, *kinds, "; ".join(["right", *said])), policy


def _try_adapters(policy: Policy) -> str | None:
    """Put the adapters of default settings into the policy, and merge them; the words of a refusal.

    After a large step they must be the same model merged.
    """
    model: Any = policy.model
    try:
        add_adapters(model, Lora(2, 4.0), seed=0)
    except UsageError as error:
        return str(error).removeprefix("lora_targets = 'all-linear': ").split(", to which ")[0]
    ids = policy.conditioned(policy.encode("The man said that"), 2)
    zeros = [layer.lora_B["default"].weight for _, layer in adapted_layers(model)]
    torch.manual_seed(0)
    before = logits_alone(policy, model, ids)
    (before * torch.randn(before.shape)).sum().backward(inputs=zeros)
    # Others are never trained: of layers for images, or whose weight is read past the adapter.
    heard = [weight for weight in zeros if weight.grad is not None and weight.grad.any()]
    with torch.no_grad():
        for weight in heard:
            weight.add_(weight.grad, alpha=0.1 / float(weight.grad.abs().max()))
        trained = logits_alone(policy, model, ids)
        merge_adapters(model, lambda _, weights: weights)
        merged = logits_alone(policy, model, ids)
    assert gap_of(model, trained, before.detach()) > 0.01, "such a step shows"
    assert gap_of(model, merged, trained) < tolerance_of(model), "merged they are the same model"
    return None


def _without_numbers(text: object) -> str:
    """Shares are other ones on other machines, and sets have another order in every process."""
    return re.sub(r"\{[^}]*\}", "{…}", re.sub(r"[\d.]+%", "…%", str(text)))


HEAD = """# Models that were tried

Every model is checked when it is loaded (the embedded one once for the same versions). Greedy decoding
by our loop (cache, padding on the left, several samples a prompt, of which one ends early and is
dropped) and the padded logits of training must be the model's own for each text alone; reward tokens
must not be looked up in a table that is not theirs; an export must give plain transformers the same ids
and logits. What does not hold is repaired by a general means (texts of one length together, no cache,
another tokenizer class), or the model is refused in one line before anything long. A training step in
the run's precision is tried out, too, and here the adapters of default settings: merged as in an export
they must be the model that was trained; where they are refused, what is right is so with `--lora-rank
0`. The longest text has the length of the run's longest prompt, but on a CPU 128 tokens at most, and
here 14: what takes effect after more, such as a window, is not tried. Models that are read without
padding (rows of one length together) cannot be trained with FSDP2 or DeepSpeed; DDP trains them
([what else is not supported](scale.md#what-to-launch)).

The table has {count} tiny random models of {kinds} model types of transformers {version}: {right} right, of
which {repaired} are read in an unusual way, and {refused} refused. `python tests/tried_models.py` writes it,
and `tests/model/test_models.py` tries them all again and compares their greedy texts with bare
forward passes. Real weights of these architectures were not tried: the machine that wrote this has no hub.

| model type | model class | tokenizer class | outcome |
| --- | --- | --- | --- |
"""


def main() -> None:
    quiet_libraries()
    torch.set_num_threads(1)
    rows = []
    for name, one in ARCHITECTURES.items():
        with tempfile.TemporaryDirectory() as scratch:
            rows.append(try_out(one, Path(scratch) / "model")[0])
        print(f"{name}: {rows[-1].outcome}", file=sys.stderr)
    right = [row for row in rows if row.outcome.startswith("right")]
    text = HEAD.format(
        count=len(rows),
        kinds=len({row.name.split(",")[0] for row in rows}),
        version=transformers.__version__,
        right=len(right),
        repaired=sum("it is read as" in row.outcome or "looks tokens up" in row.outcome for row in right),
        refused=len(rows) - len(right),
    )
    DOCS.write_text(text + "\n".join(map(str, rows)) + "\n")


if __name__ == "__main__":
    main()
