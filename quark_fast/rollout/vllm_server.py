"""The HTTP side of vLLM: requests, retries, answers in order."""

from __future__ import annotations

import itertools
import os
import shlex
import ssl
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.pool import AsyncResult, ThreadPool
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

import httpx
import tenacity
import torch

from quark_fast.data.tokenizer import reward_token
from quark_fast.errors import UsageError
from quark_fast.model.policy import Policy

Item = TypeVar("Item")
Result = TypeVar("Result")
Completions = list[list[int]]

MOST_REQUESTS = 256  # under way at once, each a thread here
LONGEST_WAIT = 30.0
# What a server answers while it is overloaded, starts or breaks down; everything else is about the request.
TRANSIENT = {408, 429, 500, 502, 503, 504}


@dataclass(frozen=True)
class CompletionRequest:
    """Completions wanted of one prompt: its ids, prefix and reward token included, and vLLM's parameters.

    ``salt`` names the weights: what a prefix cache computed from others is not taken for theirs.
    """

    prompt: list[int]
    salt: str
    parameters: dict[str, Any]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_answer(policy: Policy, wanted: Mapping[str, Any], completions: Completions) -> Completions:
    """The completions; UsageError for what the parameters rule out: by a server with settings of its own."""
    if len(completions) != wanted["n"]:
        raise UsageError(f"vLLM answered {len(completions)} completions for n = {wanted['n']}")
    for ids in completions:
        if any(not 0 <= i < policy.vocabulary for i in ids):
            raise UsageError(
                f"vLLM generated token {max(ids)}, beyond the base vocabulary of {policy.vocabulary}: it"
                " does not suppress the reward tokens; use a plain `vllm serve` that knows bad_words (0.26 or"
                " newer)"
            )
        stops = [index for index, i in enumerate(ids) if i in policy.stop_ids]
        whole = len(ids) == wanted["max_tokens"] or bool(stops)
        if not whole or any(index != len(ids) - 1 or index < wanted["min_tokens"] for index in stops):
            raise UsageError(
                f"vLLM answered a completion of {len(ids)} tokens with a stop at {stops or 'none'}, where"
                f" {wanted['min_tokens']} to {wanted['max_tokens']} tokens were to end at the first stop;"
                " start it without settings of its own, with --generation-config vllm"
            )
    return completions


# ---------------------------------------------------------------- a server


class Failed(RuntimeError):
    """This attempt failed; the next one may succeed, after ``wait`` seconds if the server asked for them."""

    def __init__(self, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.wait = wait


class Server:
    """A ``vllm serve`` that the user started.

    Started anew at any time, it holds the weights that its launch folder leads to, which are those that are
    asked for, and so a request that broke off is simply made again.

    Args:
        url: such as http://localhost:8000.
        launch: the folder that it is to be started from.
        positions: that the longest prompt takes, completion included.
        timeout: limit for one request, for loading weights, and for waiting until the server is up, seconds.
        retries: further attempts after a failed request.
        log: called with what a user should know meanwhile.
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
        log: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.policy, self.url, self.launch, self.dtype = policy, url.rstrip("/"), launch, dtype
        self.positions, self.timeout, self.retries, self.log = positions, timeout, retries, log
        self.http = httpx.Client(
            base_url=self.url,
            trust_env=False,  # a server is next door: no proxy of the environment's
            verify=ssl.create_default_context(),  # the machine's own certificates
            follow_redirects=True,
            # A connection for each request: the server may be started anew between two.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        )

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
        self._wait_until_up(self.log)
        self._check_model()
        path = str(weights.resolve())
        self._ask("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": path}})

    def _wait_until_up(self, log: Callable[[str], None] = lambda _: None) -> None:
        def first_failure(state: tenacity.RetryCallState) -> None:
            if state.attempt_number == 1:
                log(f"waiting for the vLLM server at {self.url}; start it by `{self.command}`")

        waiting = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Failed),
            stop=tenacity.stop_after_delay(self.timeout),
            wait=tenacity.wait_fixed(min(1.0, self.first_wait)),
            before_sleep=first_failure,
            reraise=True,
        )
        try:
            waiting(self._send, "/health", None, min(10.0, self.timeout))
        except Failed as error:
            raise UsageError(
                f"no vLLM server at {self.url} in {self.timeout:g} s: {error}; start it by"
                f" `{self.command}`, then go on with --resume"
            ) from error

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

    def answers(
        self, requests: Sequence[CompletionRequest], side_by_side: int
    ) -> Generator[Completions, None, None]:
        yield from in_order(self._complete, requests, min(side_by_side, MOST_REQUESTS))

    def _complete(self, request: CompletionRequest) -> Completions:
        body = {
            "model": str(self.launch),
            "prompt": request.prompt,
            "return_token_ids": True,
            "cache_salt": request.salt,
            # Before its pull request 46793 (July 2026) vLLM ignores bad_words here. -100, the least that it
            # takes, bans a reward token unless its logit is that far above the others; check_answer sees it.
            "logit_bias": {str(i): -100.0 for i in self.policy.reward_ids},
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
        backoff = tenacity.wait_exponential(self.first_wait, max=LONGEST_WAIT)
        asked_for = tenacity.wait_exception(lambda error: getattr(error, "wait", 0.0))
        attempts = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Failed),
            stop=tenacity.stop_after_attempt(1 + self.retries),
            wait=lambda state: max(backoff(state), asked_for(state)),
            reraise=True,
        )
        try:
            for attempt in attempts:
                with attempt:
                    if attempt.retry_state.attempt_number > 1:
                        self._wait_until_up()
                    answer = self._send(path, body, self.timeout)
                    check(answer)
            return answer
        except Failed as error:
            seen = " whether it sees the run folder," if path == "/collective_rpc" else ""
            raise UsageError(
                f"the vLLM server at {self.url} failed at {1 + self.retries} attempts of {path}, at last"
                f" with: {error}; look at its log,{seen} then go on with --resume"
            ) from error

    def _send(self, path: str, body: Mapping[str, Any] | None, limit: float) -> dict[str, Any]:
        """One attempt; Failed where another may succeed, UsageError where none will."""
        key = os.environ.get("VLLM_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        method = "GET" if body is None else "POST"
        try:
            answer = self.http.request(method, path, json=body, headers=headers, timeout=limit)
        except httpx.TimeoutException as error:
            raise Failed(f"no answer in {limit:g} s") from error
        except httpx.RequestError as error:
            raise Failed(str(error) or type(error).__name__) from error
        if not answer.is_success:
            self._raise_for(path, answer)
        if not answer.content and path in ("/health", "/collective_rpc"):
            return {}
        try:
            found = answer.json()
        except ValueError as error:
            raise Failed(f"an answer that is not JSON: {answer.content[:80]!r}") from error
        if not isinstance(found, dict):
            raise UsageError(f"{self.url} is no vLLM server: it answers {path} with {answer.content[:80]!r}")
        return found

    def _raise_for(self, path: str, answer: httpx.Response) -> NoReturn:
        """Raise the error that an HTTP status stands for."""
        code, message = answer.status_code, _message(answer)
        if code in TRANSIENT:
            seconds = answer.headers.get("Retry-After", "")  # or a date, which is left to the backoff
            wait = min(float(seconds), self.timeout) if seconds.isdecimal() else 0.0
            raise Failed(f"HTTP {code}: {message}", wait)
        if code == 404 and path == "/collective_rpc":
            message = f"it takes no weights; start it with VLLM_SERVER_DEV_MODE=1: `{self.command}`"
        raise UsageError(f"the vLLM server at {self.url} refused {path}, HTTP {code}: {message}")


def _message(answer: httpx.Response) -> str:
    """The server's message about a failure: vLLM's own field, else the beginning of the body."""
    text = answer.text
    try:
        found = answer.json()
        for key in ("error", "detail"):
            found = found.get(key, found)
        text = str(found.get("message", found) if isinstance(found, dict) else found)
    except (ValueError, AttributeError):
        pass
    return text[:400] or answer.reason_phrase


def _check_finished(request: CompletionRequest, answer: Mapping[str, Any]) -> None:
    """Raise Failed for completions that were broken off, UsageError for what no other attempt fixes."""
    choices = answer.get("choices")
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise Failed("an answer without choices")
    if sorted(str(choice.get("index")) for choice in choices) != sorted(map(str, range(len(choices)))):
        raise Failed("completions without their indices among the samples")
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

    The threads of a ThreadPool, unlike those of concurrent.futures, are daemons: a process that ends does not
    wait for answers that are not wanted any more.
    """
    threads = max(1, min(workers, len(items)))
    left, ahead = iter(items), deque[AsyncResult[Result]]()
    with ThreadPool(threads) as pool:
        while True:
            for item in itertools.islice(left, 4 * threads - len(ahead)):
                ahead.append(pool.apply_async(work, (item,)))
            if not ahead:
                return
            # Woken now and then: a signal that another thread received is handled by this one.
            while not ahead[0].ready():
                ahead[0].wait(0.5)
            yield ahead.popleft().get()
