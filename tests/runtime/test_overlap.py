"""Batches that are finished in order while later ones begin."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from quark_fast.runtime.overlap import Begun, in_order, together


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits looks often whether it is over."""
    monkeypatch.setattr(Begun.wait, "__defaults__", (0.01,))


def begun(*futures: Future[int]) -> Iterator[tuple[int, Begun[int]]]:
    for label, future in enumerate(futures):
        yield label, Begun(future.result, [future])


def futures(count: int) -> list[Future[int]]:
    every: list[Future[int]] = [Future() for _ in range(count)]
    for future in every:
        future.set_running_or_notify_cancel()
    return every


def test_next_batch_begins_while_the_one_before_is_waited_for() -> None:
    every = futures(4)

    def batches() -> Iterator[tuple[int, Begun[int]]]:
        for label, batch in begun(*every):
            if label:  # without the overlap nobody would come here, and nothing would end
                every[label - 1].set_result(10 * (label - 1))
            yield label, batch
        every[3].set_result(30)

    assert list(in_order(batches(), 1)) == [(0, 0), (1, 10), (2, 20), (3, 30)]


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_no_more_than_asked_for_are_under_way_beside_the_next(ahead: int) -> None:
    every, taken = futures(6), 0

    def batches() -> Iterator[tuple[int, Begun[int]]]:
        nonlocal taken
        for one in begun(*every):
            taken += 1
            yield one

    def answer(label: int) -> None:
        assert taken == min(6, label + ahead + 1)
        every[label].set_result(label)

    assert [label for label, _ in in_order(batches(), ahead, answer)] == list(range(6))


def test_batches_that_end_out_of_order_come_in_order() -> None:
    every = futures(3)
    for i in (2, 1):
        every[i].set_result(i)
    found = in_order(begun(*every), 3, lambda label: every[label].set_result(label))
    assert list(found) == [(0, 0), (1, 1), (2, 2)]


def test_failure_comes_after_the_batches_before_it_and_cancels_those_behind() -> None:
    every: list[Future[int]] = [Future() for _ in range(3)]
    every[1].set_exception(ValueError("down"))
    found = in_order(begun(*every), 3, lambda label: every[label].set_result(label))
    assert next(found) == (0, 0)
    with pytest.raises(ValueError, match="down"):
        next(found)
    assert every[2].cancelled()


def test_whoever_stops_in_the_middle_cancels_what_is_under_way() -> None:
    every: list[Future[int]] = [Future() for _ in range(3)]
    every[0].set_result(0)
    found = in_order(begun(*every), 1, lambda label: every[label].set_result(label))
    assert [next(found), next(found)] == [(0, 0), (1, 1)]
    found.close()
    assert every[2].cancelled()


def test_interrupt_while_one_is_waited_for_cancels_what_is_under_way() -> None:
    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    every: list[Future[int]] = [Future() for _ in range(3)]
    with pytest.raises(KeyboardInterrupt):
        next(in_order(begun(*every), 1, interrupted))
    assert every[0].cancelled() and every[1].cancelled() and not every[2].cancelled()


def test_one_that_cannot_begin_cancels_those_that_did() -> None:
    first: Future[int] = Future()

    def parts() -> Iterator[Begun[int]]:
        yield Begun(first.result, [first])
        raise ValueError("down")

    with pytest.raises(ValueError, match="down"):
        together(parts())
    assert first.cancelled()


def test_failure_of_one_part_does_not_wait_for_the_others() -> None:
    hanging, failed = futures(2)
    failed.set_exception(ValueError("down"))
    with pytest.raises(ValueError, match="down"):
        together(one for _, one in begun(hanging, failed)).result()
