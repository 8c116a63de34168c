"""A reward behind a slow server: one after the other / scored beside the sampling.

python benchmarks/slow_reward.py --json benchmarks/results/slow-reward.json

A server on loopback answers each request in 2 s, and every tenth with 429 and Retry-After: 1. The built-in
model samples batches of 128 completions of RealToxicityPrompts, 20 tokens each, on one thread; four calls of
16 completions each are under way at once. The clock runs
for the sampling alone, for the scoring alone, and for both, without and with the overlap. The rewards of all
three have to be the same, and no completion may be answered twice.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from quark_fast.data import assets
from quark_fast.model.loading import load_reference
from quark_fast.model.policy import Policy
from quark_fast.rewards.asynchronous import Calls
from quark_fast.rewards.reward import describe
from quark_fast.rewards.weighted_sum import batches_ahead
from quark_fast.rollout.sampling import Conditioning, SampleRequest, Sampling
from quark_fast.rollout.transformers import sample
from quark_fast.runtime.machine import quiet_libraries, set_threads, versions
from quark_fast.runtime.memory import keep_freed_memory
from quark_fast.runtime.overlap import Begun, in_order
from quark_fast.tasks.by_name import find_task

ROWS, SAMPLES = 128, 4  # completions of a batch, and of a prompt
ANSWER_S, REFUSE_EVERY, RETRY_AFTER_S = 2.0, 10, 1
CALLS = Calls(batch=16, concurrency=4, backoff=0.1)


class Refused(Exception):
    """429, as clients raise it."""

    def __init__(self, headers: dict[str, str]) -> None:
        super().__init__("429")
        self.headers = headers


class Server:
    """Scores texts by their length, as JSON lines over a socket; counts what it answered and refused."""

    def __init__(self) -> None:
        self.requests, self.refused = itertools.count(1), 0
        self.answered: Counter[tuple[str, str]] = Counter()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pairs = json.loads(await reader.readline())
        if next(self.requests) % REFUSE_EVERY == 0:
            self.refused += 1
            answer: dict[str, Any] = {"retry-after": str(RETRY_AFTER_S)}
        else:
            await asyncio.sleep(ANSWER_S)
            self.answered.update((prompt, text) for prompt, text in pairs)
            answer = {"scores": [len(text) for _, text in pairs]}
        writer.write(json.dumps(answer).encode() + b"\n")
        await writer.drain()
        writer.close()


def reward_of(server: Server) -> Callable[..., Any]:
    port: list[int] = []

    async def score(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        if not port:  # the first call; the others see it at once, as nothing is awaited before
            port.append(0)
            listening = await asyncio.start_server(server.answer, "127.0.0.1", 0, limit=2**24)
            port[0] = listening.sockets[0].getsockname()[1]
        while not port[0]:
            await asyncio.sleep(0.001)
        reader, writer = await asyncio.open_connection("127.0.0.1", port[0], limit=2**24)
        writer.write(json.dumps(list(zip(prompts, completions, strict=True))).encode() + b"\n")
        answer = json.loads(await reader.readline())
        writer.close()
        if "retry-after" in answer:
            raise Refused({"Retry-After": answer["retry-after"]})
        return [float(score) for score in answer["scores"]]

    return score


def measure(batches: int) -> dict[str, Any]:
    source = assets.default_model()
    policy = Policy.create(source, quantiles=1)
    model = load_reference(source, torch.bfloat16, torch.device("cpu"))
    rows = find_task("toxicity").prompts()[0][: batches * ROWS // SAMPLES]
    ids = [policy.encode(row["prompt"]) for row in rows]
    request = SampleRequest(ids, Conditioning(), Sampling(rows=ROWS), SAMPLES, 0)
    list(sample(policy, model, SampleRequest(ids[:8], Conditioning(), Sampling(rows=8), 1, 0)))  # warm

    def sampled() -> Iterator[tuple[list[Any], list[str]]]:
        for indices, drawn, *_ in sample(policy, model, request):
            texts = [policy.decode(one, ids[i]) for i, own in zip(indices, drawn, strict=True) for one in own]
            yield [rows[i] for i in indices for _ in range(SAMPLES)], texts

    begun = time.monotonic()
    kept = list(sampled())
    seconds = {"sampling alone": time.monotonic() - begun}
    expected = [float(len(text)) for _, texts in kept for text in texts]
    requests = {}

    def clocked(name: str, source: Iterator[tuple[list[Any], list[str]]], ahead: int | None) -> None:
        server = Server()
        reward = describe(reward_of(server), name, CALLS)
        begin: Callable[..., tuple[None, Begun[Any]]] = lambda batch: (None, reward.begin(*batch))  # noqa: E731
        ahead = batches_ahead([reward], ROWS) if ahead is None else ahead
        begun = time.monotonic()
        found = [value for _, part in in_order(map(begin, source), ahead) for value in part.tolist()]
        seconds[name] = time.monotonic() - begun
        every = Counter(
            (row["prompt"], text) for part, texts in kept for row, text in zip(part, texts, strict=True)
        )
        assert found == expected, name
        assert server.answered == every, f"{name}: answered twice, or not at all"
        requests[name] = {"answered": math.ceil(len(found) / CALLS.batch), "refused": server.refused}

    clocked("scoring alone", iter(kept), None)
    clocked("one after the other", sampled(), 0)
    clocked("beside each other", sampled(), None)
    larger = max(seconds["sampling alone"], seconds["scoring alone"])
    return {
        "completions": len(expected),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "beside each other / the larger alone": round(seconds["beside each other"] / larger, 3),
        "requests": requests,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, default=8, help="of 128 completions each")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    quiet_libraries()
    keep_freed_memory()
    set_threads(1)
    about = versions(torch.device("cpu")) | {"command": shlex.join(["python", *sys.argv])}
    found = measure(options.batches) | {"versions": about}
    print(json.dumps(found, indent=1))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
