"""Dispatch turns a request into data, without a guest, a page or a thread."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator

import pytest

from xenmapcache import FaultError, MapCache, MockDomain, MockHypervisor, open_backend
from xenmapcache.devicemodel import dispatch
from xenmapcache.devicemodel.dispatch import (
    BadValueError,
    Dispatcher,
    GuestError,
    Job,
    QuiesceError,
    RequestError,
)
from xenmapcache.devicemodel.regions import Region, RegionTable
from xenmapcache.ioreq import Request, RequestKind

PORT = 0x510


class Boom(BaseException):
    """What a signal handler raises."""


@pytest.fixture
def guest() -> MockDomain:
    return MockHypervisor().create_domain(memory="64K")


@pytest.fixture
def cache(guest: MockDomain) -> Iterator[MapCache]:
    with open_backend("mock", domain=guest) as backend:
        cache = MapCache(backend)
        yield cache
        cache.close(force=True)


@pytest.fixture
def region() -> Region:
    return Region(RequestKind.PORT, PORT, 4, None, lambda _: None)


@pytest.fixture
def dispatcher(cache: MapCache, region: Region) -> Dispatcher:
    table = RegionTable()
    table.add(region)
    return Dispatcher(table, cache)


def read(size: int = 4) -> Request:
    return Request(0, RequestKind.PORT, True, PORT, 0, size)


INVALIDATE = Request(0, RequestKind.INVALIDATE, False, 0, 7, 4)
STRING = Request(0, RequestKind.PORT, True, PORT, 0x1000, 2, 3, True)


def interrupted_at_entry(function: Callable[..., object]) -> Callable[[], None]:
    """Return what makes a trace function raise before a function's first line, once."""
    code = function.__code__

    def trace(frame: object, event: str, _: object) -> None:
        if event == "call" and frame.f_code is code:  # type: ignore[attr-defined] # a frame
            raise Boom

    return lambda: sys.settrace(trace)


def test_a_read(dispatcher: Dispatcher, region: Region) -> None:
    """A request goes in, and data comes out."""
    region.read(lambda offset, size: 0x12)
    job = Job(read())
    dispatcher.perform(job)
    assert (dispatcher.result(job), job.running, job.has_begun()) == (0x12, False, True)


def test_a_handler_that_was_not_entered_can_be_called_again(
    dispatcher: Dispatcher, region: Region
) -> None:
    """A signal handler that raises before the first line leaves the handler uncalled."""
    calls: list[int] = []

    def handler(offset: int, size: int) -> int:
        calls.append(offset)
        return 5

    region.read(handler)
    job = Job(read())
    arm, previous = interrupted_at_entry(handler), sys.gettrace()
    try:
        with pytest.raises(Boom):
            arm()
            dispatcher.perform(job)
    finally:
        sys.settrace(previous)  # a trace function that raises is removed
    assert (calls, job.has_begun()) == ([], False)
    dispatcher.perform(job)
    assert (calls, dispatcher.result(job)) == ([0], 5)


def test_an_interrupt_inside_of_a_handler_is_not_at_its_entry(
    dispatcher: Dispatcher, region: Region
) -> None:
    """It has begun, so it is not called again; the read gives all ones."""

    def handler(offset: int, size: int) -> int:
        raise Boom

    region.read(handler)
    job = Job(read(2))
    with pytest.raises(Boom):
        dispatcher.perform(job)
    assert (job.has_begun(), job.running, dispatcher.result(job)) == (True, True, 0xFFFF)


def test_a_handler_without_code(dispatcher: Dispatcher, region: Region) -> None:
    """One that is written in C fails like any other."""
    region.read_handler = {}.__getitem__  # type: ignore[assignment] # it takes one argument
    job = Job(read())
    with pytest.raises(TypeError):
        dispatcher.perform(job)
    assert job.running


@pytest.mark.parametrize("value", [-1, 1 << 32, None, "5"])
def test_a_value_that_does_not_fit(dispatcher: Dispatcher, region: Region, value: object) -> None:
    """It is refused, and the guest reads all ones."""
    region.read_handler = lambda offset, size: value  # type: ignore[assignment, return-value] # wrong
    job = Job(read())
    with pytest.raises(BadValueError):
        dispatcher.perform(job)
    assert dispatcher.result(job) == 0xFFFFFFFF


def test_a_string_that_was_cut_off_is_finished(
    guest: MockDomain, dispatcher: Dispatcher, region: Region
) -> None:
    """What was read is in the guest's memory, and the rest of it is all ones."""
    region.read(lambda offset, size: 0x1234)
    job = Job(STRING)
    job.call(region.read_handler, 0, 2)  # type: ignore[arg-type] # it has one
    dispatcher.finish(job)
    dispatcher.finish(job)
    assert guest.read(0x1000, 6) == b"\x34\x12\xff\xff\xff\xff"
    assert job.stored


def test_memory_that_goes_while_a_string_is_read(
    guest: MockDomain, dispatcher: Dispatcher, region: Region
) -> None:
    """The guest gave it up after the check: the device was asked, and nothing is written."""

    def handler(offset: int, size: int) -> int:
        guest.balloon_out(0x1000, 0x1000)
        dispatcher._cache.invalidate()
        return 1

    region.read(handler)
    with pytest.raises(GuestError):
        dispatcher.perform(Job(STRING))


def test_a_string_of_nothing(dispatcher: Dispatcher, region: Region) -> None:
    """No item, no call."""
    region.read(lambda offset, size: 1 // 0)
    dispatcher.perform(Job(STRING._replace(count=0)))


def test_invalidate(cache: MapCache, dispatcher: Dispatcher) -> None:
    """The callbacks, then the mappings; the answer is what stood in the request."""
    order: list[int] = []
    dispatcher.callbacks.append(lambda: order.append(cache.stats().invalidations))
    job = Job(INVALIDATE)
    dispatcher.perform(job)
    dispatcher.finish(job)
    assert (order, cache.stats().invalidations, dispatcher.result(job)) == ([0], 1, 7)


def test_invalidate_that_is_done_again_counts_once(dispatcher: Dispatcher) -> None:
    """An interrupt before the first callback: the second attempt is the same request."""
    job = Job(INVALIDATE)
    for attempt in (1, 2):
        job.attempts = attempt
        dispatcher.perform(job)
    assert dispatcher.invalidations == 1


def test_a_callback_that_was_not_entered(
    dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interrupt is raised, an Exception too; it is not reported as the callback's failure."""

    def callback() -> None:
        """Never entered."""

    dispatcher.callbacks.append(callback)

    def call(*_: object) -> None:
        raise KeyError("a signal handler's")

    monkeypatch.setattr(Job, "call", call)
    with pytest.raises(KeyError):
        dispatcher.quiesce(Job(INVALIDATE))


def test_a_closed_cache(cache: MapCache, dispatcher: Dispatcher) -> None:
    """It cannot be invalidated; the request is answered nevertheless."""
    cache.close()
    job = Job(INVALIDATE)
    with pytest.raises(RequestError, match="cannot be invalidated"):
        dispatcher.perform(job)
    dispatcher.finish(job)


def test_callbacks_that_are_awaited(dispatcher: Dispatcher) -> None:
    """Plain ones are called, coroutines are awaited, and a failure stops none of them."""
    order: list[str] = []

    async def drain() -> None:
        await asyncio.sleep(0)
        order.append("drain")

    dispatcher.callbacks += [lambda: 1 // 0, drain, lambda: order.append("plain")]
    with pytest.raises(QuiesceError) as caught:
        asyncio.run(dispatcher.quiesce_async(Job(None)))
    assert order == ["drain", "plain"]
    ((_, error),) = caught.value.failures
    assert isinstance(error, ZeroDivisionError)


def test_a_fault_of_a_handler_is_the_handlers(dispatcher: Dispatcher, region: Region) -> None:
    """It passes through as it is."""

    def handler(offset: int, size: int) -> int:
        raise FaultError(0x1000, 4, 22)

    region.read(handler)
    job = Job(read())
    with pytest.raises(FaultError):
        dispatcher.perform(job)
    assert job.running


def test_the_handlers_that_run() -> None:
    """Only those that have not returned count."""
    outer, inner = Job(None), Job(None)
    inner.outer = outer
    assert list(inner.callers()) == []
    outer.calling, outer.calls = "handler", 1
    assert list(inner.callers()) == ["handler"]


def test_an_entry_takes_the_call_back(
    dispatcher: Dispatcher, region: Region, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was interrupted at its entry was not called."""
    monkeypatch.setattr(dispatch, "_is_at_entry", lambda *_: True)
    region.read(lambda offset, size: 1 // 0)
    job = Job(read())
    with pytest.raises(ZeroDivisionError):
        dispatcher.perform(job)
    assert not job.has_begun()
