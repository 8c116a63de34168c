"""When a request of an asynchronous reward may go out: so many at once, so many a minute, not too early."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import time
from collections import deque
from dataclasses import dataclass

MINUTE = 60.0  # seconds


@dataclass
class Request:
    """One that went out: when, by ``time.monotonic``, and its tokens, a guess until it is answered."""

    at: float
    tokens: float


class Turns:
    """The requests of one reward function in this process, whatever batch they are for.

    In any 60 s at most so many begin, a repeated one counted again. What tokens a request will use is known
    afterwards, so one that goes out is taken for the mean of those that were answered. A request of more
    tokens than the limit goes out when there was none for a minute.

    Args:
        at_once: requests under way at once.
        requests, tokens: the limits a minute; 0: none.
        processes: how many share the limits; each has its part of them.
    """

    def __init__(self, at_once: int, requests: int = 0, tokens: int = 0, processes: int = 1) -> None:
        self.free = asyncio.Semaphore(at_once)
        self.requests, self.tokens = (max(1, requests // processes) if requests else 0), tokens / processes
        # Where there are more processes than requests a minute, each has one in several minutes.
        self._window = MINUTE * (max(1.0, processes / requests) if requests else 1.0)
        self._first = asyncio.Lock()  # held by the request that is next
        self._sent: deque[Request] = deque()  # in the last minute
        self._answers, self._answered_tokens = 0, 0.0
        self._not_before = self._wakes = 0.0
        self.unanswered = 0  # completions

    async def next(self) -> Request:
        """Wait until one more request may go out."""
        async with self._first:
            while (seconds := self._too_early()) > 0:
                self._wakes = time.monotonic() + seconds
                await asyncio.sleep(seconds)
            request = Request(time.monotonic(), self._expected())
            if self.requests or self.tokens:
                self._sent.append(request)
            return request

    def answered(self, request: Request, tokens: float) -> None:
        """The request used so many tokens."""
        request.tokens = tokens
        self._answers, self._answered_tokens = self._answers + 1, self._answered_tokens + tokens

    def pause(self, seconds: float) -> None:
        """Let no request go out for so long, as the server asks."""
        self._not_before = max(self._not_before, time.monotonic() + seconds)

    def waiting(self) -> dict[str, float]:
        """What is waited for, as numbers of the progress; called by any thread."""
        limit = self._wakes - time.monotonic()
        numbers: dict[str, float] = {"waiting for the reward": self.unanswered} if self.unanswered else {}
        return numbers | ({"rate limit, s": round(limit)} if numbers and limit > 0.5 else {})

    def _expected(self) -> float:
        return self._answered_tokens / self._answers if self._answers else 0.0

    def _too_early(self) -> float:
        """Seconds until it is worth asking again; 0 or less: a request may go out."""
        now = time.monotonic()
        while self._sent and self._sent[0].at + self._window <= now:
            self._sent.popleft()
        used = sum(request.tokens for request in self._sent) if self.tokens else 0.0
        full = self.requests and len(self._sent) >= self.requests
        spent = self.tokens and self._sent and used + self._expected() > self.tokens
        oldest_ends = self._sent[0].at + self._window if full or spent else 0.0
        return max(self._not_before, oldest_ends) - now


def retry_after(error: BaseException) -> float:
    """Seconds that the server asks to wait, by the ``Retry-After`` of an answer such as 429; 0: it does not.

    The answer's headers are where httpx and the clients built on it (openai, anthropic) and requests have
    them, ``error.response.headers``, or aiohttp and urllib, ``error.headers``.
    """
    for holder in (getattr(error, "response", None), error):
        headers = getattr(holder, "headers", None)
        if headers is None or not hasattr(headers, "get"):
            continue
        value = headers.get("Retry-After") or headers.get("retry-after")
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            return _seconds(str(value)) if value is not None else 0.0
    return 0.0


def _seconds(value: str) -> float:
    """Of a number of them, or of a date; ValueError for anything else."""
    if value.strip().replace(".", "", 1).isdecimal():
        return float(value)
    return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
