"""Long completions: one number for each, higher is better.

python -m quark_fast.train --reward examples.length_reward:score --output runs/long
"""

from __future__ import annotations

from typing import Any


def score(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    """The number of words; None leaves an empty completion out."""
    return [len(text.split()) or None for text in completions]
