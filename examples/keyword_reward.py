"""Words that each prompt asks for: a column of the prompts' file comes in as a list beside them.

keywords.jsonl:  {"prompt": "For dinner we had", "keywords": ["soup", "bread"]}

python -m quark_fast.train --prompts keywords.jsonl --reward examples.keyword_reward:score --output runs/words
"""

from __future__ import annotations

import re
from typing import Any


def score(
    prompts: list[str], completions: list[str], keywords: list[list[str] | None], **columns: Any
) -> list[float | None]:
    """The share of a prompt's keywords that its completion holds; None for a prompt without any."""
    return [share(text, words) if words else None for text, words in zip(completions, keywords, strict=True)]


def share(text: str, words: list[str]) -> float:
    # Not \b, which does not end a word such as "C++"; and a keyword may be several words.
    found = [re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) for word in words]
    return sum(one is not None for one in found) / len(words)
