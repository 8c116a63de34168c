"""The HTTP side of vLLM: requests, retries, answers in order."""

from __future__ import annotations

import http.client
import itertools
import json
import os
import queue
import shlex
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import torch

from quark_fast.data.tokenizer import reward_token
from quark_fast.errors import UsageError
from quark_fast.model.policy import Policy

Item = TypeVar("Item")
Result = TypeVar("Result")
Completions = list[list[int]]

MOST_REQUESTS = 256  # under way at once, each a thread here
LONGEST_WAIT = 30.0
# What a server says while it is overloaded, starts or breaks down; everything else is about the request.
TRANSIENT = {408, 429, 500, 502, 503, 504}


@dataclass(frozen=True)
class Request:
    """Completions wanted of one prompt: its ids, prefix and reward token included, and vLLM's parameters.

    ``salt`` names the weights: what a prefix cache computed from others is not taken for theirs.
    """

    prompt: list[int]
    salt: str
    parameters: dict[str, Any]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_answer(policy: Policy, wanted: Mapping[str, Any], completions: Sequence[Sequence[int]]) -> None:
    """Raise UsageError for completions that the parameters rule out: by a server with settings of its own."""
    if len(completions) != wanted["n"]:
        raise UsageError(f"vLLM answered {len(completions)} completions for n = {wanted['n']}")
    for ids in completions:
        if any(not 0 <= i < policy.vocabulary for i in ids):
            raise UsageError(
                f"vLLM generated token {max(ids)}, beyond the base vocabulary of {policy.vocabulary}: it"
                " does not suppress the reward tokens; use a plain `vllm serve`, 0.16 or newer"
            )
        stops = [place for place, i in enumerate(ids) if i in policy.stop_ids]
        whole = len(ids) == wanted["max_tokens"] or bool(stops)
        if not whole or any(place != len(ids) - 1 or place < wanted["min_tokens"] for place in stops):
            raise UsageError(
                f"vLLM answered a completion of {len(ids)} tokens with a stop at {stops or 'none'}, where"
                f" {wanted['min_tokens']} to {wanted['max_tokens']} tokens were to end at the first stop;"
                " start it without settings of its own, with --generation-config vllm"
            )


# ---------------------------------------------------------------- a server


class Failed(RuntimeError):
    """No use of this attempt; the next one may do."""


class Server:
    """A ``vllm serve`` that somebody started.

    Started anew at any time, it holds the weights that its launch folder leads to, which are those that are
    asked for, and so a request that broke off is simply made again.

    Args:
        url: such as http://localhost:8000.
        launch: the folder that it is to be started from.
        positions: that the longest prompt takes, completion included.
        timeout: limit for one request, for loading weights, and for waiting until the server is up, seconds.
        retries: further attempts after a failed request.
        say: told what a user should know meanwhile.
    """

    first_wait = 1.0  # before the second attempt, seconds; doubled before each further one

    def __init__(
        self,
        policy: Policy,
        url: str,
        launch: Path,
        dtype: torch.dtype,
        positions: int,
        *,
        timeout: float,
        retries: int,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.policy, self.url, self.launch, self.dtype = policy, url.rstrip("/"), launch, dtype
        self.positions, self.timeout, self.retries, self.say = positions, timeout, retries, say
        # A server is next door: no proxy of the environment's.
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    @property
    def command(self) -> str:
        """How to start the server."""
        address = urlsplit(self.url)
        return (
            f"VLLM_SERVER_DEV_MODE=1 vllm serve {shlex.quote(str(self.launch))}"
            f" --dtype {dtype_name(self.dtype)}"
            f" --max-model-len {self.positions} --generation-config vllm --host {address.hostname}"
            f" --port {address.port or 80}"
        )

    def load(self, weights: Path) -> None:
        self._wait_until_up(self.say)
        self._check_model()
        path = str(weights.resolve())
        self._ask("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": path}})

    def _wait_until_up(self, say: Callable[[str], None] = lambda _: None) -> None:
        deadline, told = time.monotonic() + self.timeout, False
        while True:
            try:
                self._send("/health", None, limit=min(10.0, self.timeout))
                return
            except Failed as error:
                if time.monotonic() > deadline:
                    raise UsageError(
                        f"no vLLM server at {self.url} in {self.timeout:g} s: {error}; start it by"
                        f" `{self.command}`, then go on with --resume"
                    ) from error
            if not told:
                say(f"waiting for the vLLM server at {self.url}; start it by `{self.command}`")
                told = True
            time.sleep(min(1.0, self.first_wait))

    def _check_model(self) -> None:
        """Refuse a server of another folder, and one whose tokenizer knows the reward tokens by other ids."""
        cards = self._ask("/v1/models", None).get("data")
        served = (
            [card.get("id") for card in cards if isinstance(card, dict)] if isinstance(cards, list) else []
        )
        if str(self.launch) not in served:
            raise UsageError(
                f"the vLLM server at {self.url} serves {', '.join(map(str, served)) or 'nothing'}, not the"
                f" model of this run; start it by `{self.command}`"
            )
        text = "".join(reward_token(k) for k in range(self.policy.quantiles))
        body = {"model": str(self.launch), "prompt": text, "add_special_tokens": False}
        ids = self._ask("/tokenize", body).get("tokens")
        if ids != self.policy.reward_ids:
            raise UsageError(
                f"the vLLM server at {self.url} reads the reward tokens as {str(ids)[:80]}, not as ids"
                f" {self.policy.reward_ids[0]} to {self.policy.reward_ids[-1]}; start it anew by"
                f" `{self.command}`"
            )

    def answers(self, requests: Sequence[Request], side_by_side: int) -> Generator[Completions, None, None]:
        yield from in_order(self._complete, requests, min(side_by_side, MOST_REQUESTS))

    def _complete(self, request: Request) -> Completions:
        body = {
            "model": str(self.launch),
            "prompt": request.prompt,
            "return_token_ids": True,
            "cache_salt": request.salt,
            **request.parameters,
        }
        answer = self._ask("/v1/completions", body, check=lambda found: _check_finished(request, found))
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        return [list(choice["token_ids"]) for choice in choices]

    def rest(self) -> None:
        """The server's memory is its own."""

    def close(self) -> None:
        """The server goes on, for others."""

    # ------------------------------------------------------------- HTTP

    def _ask(
        self,
        path: str,
        body: Mapping[str, Any] | None,
        check: Callable[[dict[str, Any]], None] = lambda _: None,
    ) -> dict[str, Any]:
        """One request's answer, asked for again while the server is busy, breaks down or starts.

        Raises:
            UsageError: the server refuses the request, failed at every attempt, or does not come up again.
        """
        for attempt in itertools.count():
            try:
                answer = self._send(path, body, self.timeout)
                check(answer)
                return answer
            except Failed as error:
                if attempt >= self.retries:
                    seen = " whether it sees the run folder," if path == "/collective_rpc" else ""
                    raise UsageError(
                        f"the vLLM server at {self.url} failed at {attempt + 1} attempts of {path}, at last"
                        f" with: {error}; look at its log,{seen} then go on with --resume"
                    ) from error
            time.sleep(min(LONGEST_WAIT, self.first_wait * 2.0**attempt))
            self._wait_until_up()
        raise AssertionError("unreachable")

    def _send(self, path: str, body: Mapping[str, Any] | None, limit: float) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("VLLM_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with self.opener.open(request, timeout=limit) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            said = _message(error)
            if error.code in TRANSIENT:
                raise Failed(f"HTTP {error.code}: {said}") from error
            if error.code == 404 and path == "/collective_rpc":
                said = f"it takes no weights; start it with VLLM_SERVER_DEV_MODE=1: `{self.command}`"
            raise UsageError(
                f"the vLLM server at {self.url} refused {path}, HTTP {error.code}: {said}"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            why = getattr(error, "reason", error)
            if isinstance(why, TimeoutError):
                raise Failed(f"no answer in {limit:g} s") from error
            raise Failed(str(why) or type(why).__name__) from error
        if not text and path in ("/health", "/collective_rpc"):
            return {}
        try:
            found = json.loads(text)
        except ValueError as error:
            raise Failed(f"an answer that is not JSON: {text[:80]!r}") from error
        if not isinstance(found, dict):
            raise UsageError(f"{self.url} is no vLLM server: it answers {path} with {text[:80]!r}")
        return found


def _message(error: urllib.error.HTTPError) -> str:
    """What the server says of a failure: vLLM's own field, else the beginning of the body."""
    try:
        text = error.read().decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return str(error.reason)
    try:
        found = json.loads(text)
        for key in ("error", "detail"):
            found = found.get(key, found)
        text = str(found.get("message", found) if isinstance(found, dict) else found)
    except (ValueError, AttributeError):
        pass
    return text[:400] or str(error.reason)


def _check_finished(request: Request, answer: Mapping[str, Any]) -> None:
    """Raise Failed for completions that were broken off, UsageError for what no other attempt mends."""
    choices = answer.get("choices")
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise Failed("an answer without choices")
    if sorted(str(choice.get("index")) for choice in choices) != sorted(map(str, range(len(choices)))):
        raise Failed("completions without their places among the samples")
    for choice in choices:
        if choice.get("finish_reason") not in ("stop", "length"):
            raise Failed(f"a completion that ended by {choice.get('finish_reason')!r}")
        ids = choice.get("token_ids")
        if not isinstance(ids, list) or not all(type(i) is int for i in ids):
            raise UsageError("the vLLM server returns no token ids; it takes 0.16 or newer")
        if choice.get("prompt_token_ids") != request.prompt:
            raise UsageError("the vLLM server did not read the prompt as it was sent, but cut or extended it")


def in_order(work: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Iterator[Result]:
    """``work`` of each item, in order, ``workers`` side by side; some are done ahead of who takes them.

    Daemon threads: a process that ends does not wait for answers that nobody wants any more.
    """
    waiting: queue.SimpleQueue[tuple[Future[Result], Item] | None] = queue.SimpleQueue()
    stopped = threading.Event()

    def run() -> None:
        while (task := waiting.get()) is not None and not stopped.is_set():
            future, item = task
            try:
                future.set_result(work(item))
            except Exception as error:  # result() raises it
                future.set_exception(error)

    threads = min(workers, len(items))
    for _ in range(threads):
        threading.Thread(target=run, name="quark_fast rollout", daemon=True).start()
    left, ahead = iter(items), deque[Future[Result]]()
    try:
        while True:
            for item in itertools.islice(left, 4 * threads - len(ahead)):
                ahead.append(Future())
                waiting.put((ahead[-1], item))
            if not ahead:
                return
            # Woken now and then: a signal that another thread received is handled by this one.
            while not wait([ahead[0]], timeout=0.5).done:
                pass
            yield ahead.popleft().result()
    finally:
        stopped.set()
        for _ in range(threads):
            waiting.put(None)
