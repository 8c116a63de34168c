"""Work that goes on while this thread does something else: one batch is scored while the next is sampled."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U")
L = TypeVar("L")

POLL = 0.5  # seconds; a thread that waits wakes so often, since another one may have received a signal


@dataclass(frozen=True)
class Begun(Generic[T]):
    """Work that has begun.

    Attributes:
        finish: gives the result; called once, when ``wait`` says that everything has ended.
        futures: what is waited for; none where the work is done already.
    """

    finish: Callable[[], T]
    futures: Sequence[Future[Any]] = ()

    def wait(self, seconds: float = POLL) -> bool:
        """Whether everything has ended by so many seconds from now; raises what any part of it raised."""
        ended = wait(self.futures, seconds, FIRST_EXCEPTION)
        for future in ended.done:
            future.result()
        return not ended.not_done

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        for future in self.futures:
            future.cancel()

    def result(self) -> T:
        """Wait for it. Whatever ends the waiting, Ctrl-C too, cancels it."""
        try:
            while not self.wait():
                pass
        except BaseException:
            self.cancel()
            raise
        return self.finish()

    def then(self, make: Callable[[T], U]) -> Begun[U]:
        """What ``make``, called in this thread at the end, makes of the result."""
        return Begun(lambda: make(self.finish()), self.futures)


def together(every: Iterable[Begun[T]]) -> Begun[list[T]]:
    """All of them; where one cannot begin, those before it are cancelled."""
    begun: list[Begun[T]] = []
    try:
        begun.extend(every)
    except BaseException:
        for one in begun:
            one.cancel()
        raise
    return Begun(lambda: [one.finish() for one in begun], [f for one in begun for f in one.futures])


def in_order(
    batches: Iterable[tuple[L, Begun[T]]], ahead: int, waiting: Callable[[L], None] = lambda _: None
) -> Iterator[tuple[L, T]]:
    """(label, result) of each batch, in the order in which they begin.

    The next batch is taken from ``batches`` (which samples it, say) while at most ``ahead`` before it are
    under way. With 0 each is finished before the next one is taken.

    Args:
        waiting: called now and then with the label of the batch that is waited for.
    Raises:
        Whatever a batch raised, after all batches before it were yielded; those after it are cancelled.
    """
    under_way: deque[tuple[L, Begun[T]]] = deque()

    def finish_oldest() -> tuple[L, T]:
        label, oldest = under_way[0]
        while not oldest.wait():
            waiting(label)
        result = oldest.finish()
        under_way.popleft()
        return label, result

    try:
        for batch in batches:
            under_way.append(batch)
            while under_way and (len(under_way) > ahead or under_way[0][1].wait(0)):
                yield finish_oldest()
        while under_way:
            yield finish_oldest()
    finally:
        for _, one in under_way:
            one.cancel()
