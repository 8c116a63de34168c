"""A scorer behind a web server: it takes {"text": ...} and answers {"score": 0.7}.

SCORER_URL=http://localhost:8000/score \
    python -m quark_fast.train --reward examples.http_reward:score --reward-concurrency 8 --output runs/http

With a parameter named `completion` the function is called for one at a time, and `async def` lets many calls
wait side by side. An error or a time-out is tried again (--reward-retries, --reward-backoff, ...-timeout);
what was answered stays in the run folder, so a resumed run does not ask again. A server with a limit wants
--reward-per-minute; its 429 raises HTTPError here, whose Retry-After is waited for.
"""

from __future__ import annotations

import asyncio
import json
import os
import urllib.request
from typing import Any

URL = os.environ.get("SCORER_URL", "http://localhost:8000/score")


async def score(prompt: str, completion: str, **columns: Any) -> float | None:
    """The server's score; a blank completion is left out."""
    if not completion.strip():
        return None
    # The standard library's client blocks, hence the thread; one like httpx.AsyncClient is awaited by itself.
    return await asyncio.to_thread(ask, completion)


def ask(text: str) -> float:
    body = json.dumps({"text": text}).encode()
    request = urllib.request.Request(URL, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return float(json.load(answer)["score"])
