"""A scorer behind a web server: it takes {"text": ...} and answers {"score": 0.7}.

SCORER_URL=http://localhost:8000/score \
    python -m quark_fast.train --reward examples.http_reward:score --reward-concurrency 8 --output runs/http

With a parameter named `completion` the function is called for one at a time, and `async def` lets many calls
wait side by side. An error or a time-out is tried again (--reward-retries, --reward-backoff, ...-timeout);
what was answered stays in the run folder, so a resumed run does not ask again. A server with a limit wants
--reward-per-minute; its 429 raises HTTPStatusError here, whose Retry-After is waited for.
"""

from __future__ import annotations

import os
from typing import Any

import httpx

URL = os.environ.get("SCORER_URL", "http://localhost:8000/score")

# One client keeps its connections from call to call. It has no limits of its own (by default 5 seconds, 100
# connections): --reward-timeout and --reward-concurrency are these.
CLIENT = httpx.AsyncClient(timeout=None, limits=httpx.Limits(max_connections=None))


async def score(prompt: str, completion: str, **columns: Any) -> float | None:
    """The server's score; a blank completion is left out."""
    if not completion.strip():
        return None
    answer = await CLIENT.post(URL, json={"text": completion})
    answer.raise_for_status()
    return float(answer.json()["score"])
