"""How probable reward tokens are in an exported model to an engine that does not suppress them.

python benchmarks/reward_mass.py RUN [--samples 200] [--json FILE]

Reads the held-out completions that the best token wrote, and prints the probability of all tokens beyond the
base vocabulary together at their positions: by the head that the export has, and by one tied to its
embeddings, as the base model's may be.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quark_fast.runtime.machine import versions


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(given.run / "model")
    model = AutoModelForCausalLM.from_pretrained(given.run / "model", dtype=torch.float32).eval()
    head, table = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    vocabulary = min(model.generation_config.suppress_tokens)
    lines = (given.run / "evaluation.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["row"] == "best token"][: given.samples]
    masses: dict[str, list[torch.Tensor]] = {"the export's head": [], "a head tied to its embeddings": []}
    for row in rows:
        ids = tokenizer(row["prompt"] + row["completion"]).input_ids
        first = len(tokenizer(row["prompt"]).input_ids) - 1
        hidden = model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0, first:]
        for parts, weight in zip(masses.values(), (head, table), strict=True):
            parts.append((hidden @ weight.T).softmax(-1)[:, vocabulary:].sum(-1))
    found = {}
    for name, parts in masses.items():
        mass = torch.cat(parts)
        found[name] = {"positions": len(mass), "mean": mass.mean().item(), "highest": mass.max().item()}
        print(f"{name}: {len(mass):,} positions, mean {mass.mean():.2g}, highest {mass.max():.2g}")
    if given.json:
        command = f"python benchmarks/reward_mass.py RUN --samples {given.samples}"
        made_with = versions(head.device) | {"command": command}
        record = {"reward_tokens": "all together, a position", **found, "versions": made_with}
        given.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
