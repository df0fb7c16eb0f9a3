"""What a request does: find the region, call the handler, move string data.

This module has no thread, no lock and no page that is shared with Xen: a request goes in, and
data comes out. So it is tested without a guest.

A guest chooses every number in a request. Nothing here takes memory or time in proportion to
such a number before the number was checked.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Awaitable, Callable, Iterator
from operator import call, index
from time import monotonic
from typing import cast

from ..address import ADDRESS_LIMIT
from ..cache import MapCache
from ..errors import XenMapCacheError
from ..events import Quiesced
from ..ioreq import Request, RequestKind
from ..stream import EventStream, now
from .regions import Handler, Region, RegionTable

Callback = Callable[[], object]

MAX_COUNT = 4096
"""Items of one string instruction: Xen puts no larger number into one request."""

_HANDLED = (RequestKind.PORT, RequestKind.MMIO, RequestKind.PCI_CONFIG)
_CODE_ENTRY = frozenset({"RESUME", "COPY_FREE_VARS", "MAKE_CELL", "RETURN_GENERATOR"})


class RequestError(Exception):
    """A request cannot be carried out, and no handler's code is to blame."""


class GuestError(RequestError):
    """The guest asked for what does not exist: one line in the log, without a traceback."""


class Job:
    """A request that is being carried out, and the evidence that an interrupt leaves.

    A signal handler can raise between any two steps. What was done then follows from these
    attributes alone: a handler has begun if ``calls`` is above 0, and has returned if
    ``values`` holds as many results as there were calls.

    Attributes:
        request: None for the callbacks that :meth:`IoreqServer.close` calls.
        outer: the job whose handler serves this one, or None.
        calls: how many handlers or callbacks were begun.
        values: what those that returned have returned, in order.
        calling: what was called last.
        since: when the job was begun, as :func:`time.monotonic` counts.
        region: the region that answers, as soon as it is known.
        told: observers know that it was carried out.
        stored: the guest's memory has what a string instruction read.
        invalidated: the cache has dropped its mappings.
        attempts: how often the job was begun.
        counted: it is one of the server's ``requests``.
        answerer: who answers the vCPU, decided once by ``setdefault``.
        position: of a buffered request: the ring's read pointer.
        error: why it failed, or None.
        half_done: a process that died has begun it, and nobody knows how far it came.
    """

    __slots__ = (
        "answerer",
        "attempts",
        "calling",
        "calls",
        "counted",
        "error",
        "half_done",
        "invalidated",
        "outer",
        "position",
        "region",
        "request",
        "since",
        "stored",
        "told",
        "values",
    )

    def __init__(
        self, request: Request | None, position: int = -1, *, half_done: bool = False
    ) -> None:
        self.request = request
        self.half_done = half_done
        self.outer: Job | None = None
        self.calls = 0
        self.values: list[object] = []
        self.calling: object = None
        self.since = monotonic()
        self.region: Region | None = None
        self.stored = self.told = False
        self.invalidated = False
        self.attempts = 0
        self.counted = False
        self.answerer: dict[str, str] = {}
        self.position = position
        self.error: Exception | None = None

    @property
    def running(self) -> bool:
        """Whether a handler or callback has begun and has not returned."""
        return len(self.values) < self.calls

    def has_begun(self) -> bool:
        """Return whether a handler or callback was called, so that it must not be called again."""
        return self.calls > 0

    def callers(self) -> Iterator[object]:
        """Yield the handlers and callbacks that run, from the one that serves this job."""
        each = self.outer
        while each is not None:
            if each.running:
                yield each.calling
            each = each.outer

    def call(self, function: Handler | Callback, *arguments: int) -> None:
        """Call foreign code, and keep what it returns, in one step that no signal divides."""
        steps = map(function, *zip(arguments)) if arguments else map(call, (function,))
        keep = self.values.extend
        self.calling = function
        self.calls += 1
        try:
            keep(steps)
        except BaseException as error:
            if _is_at_entry(error, function):
                self.calls -= 1  # not one line of it ran: it can be called again
            raise
        if self.running:  # which `extend` takes for the end of what it reads
            raise RuntimeError(f"{function!r} raised StopIteration")


def _is_at_entry(error: BaseException, function: object) -> bool:
    """Return whether a signal handler raised before the first line of a function ran."""
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code is not code:
        trace = trace.tb_next
    if trace is None or code is None:
        return False
    import dis  # only after an interrupt

    return all(
        each.opname in _CODE_ENTRY
        for each in dis.get_instructions(code)
        if each.offset <= trace.tb_lasti and each.opname != "CACHE"
    )


class Dispatcher:
    """The devices of a server, and what requests do to them.

    Args:
        regions: which device answers where; changed by the server.
        cache: the guest's memory.

    Attributes:
        callbacks: what :meth:`IoreqServer.on_quiesce` has registered.
        invalidations: how many INVALIDATE requests were carried out.
        stream: what the server's observers are told.

    Synchronization: one thread at a time.
    """

    def __init__(self, regions: RegionTable, cache: MapCache) -> None:
        self.regions = regions
        self.callbacks: list[Callback] = []
        self.invalidations = 0
        self.stream = EventStream()
        self._cache = cache
        self._pid = os.getpid()

    def perform(self, job: Job) -> None:
        """Carry out a request.

        Results, none of which is lost if a signal handler raises in between:

        1. :meth:`result` returns the data of the answer.
        2. RequestError: the request was refused, or the cache failed.
        3. Another exception while ``job.running``: what the handler raised.

        Raises:
            RequestError: see above; GuestError if the guest is to blame.
        """
        request = cast(Request, job.request)
        kind = request.kind
        if kind == RequestKind.INVALIDATE:
            self._invalidate(job)
            return
        if kind == RequestKind.TIMEOFFSET:
            return
        if kind not in _HANDLED:
            raise GuestError("this package does not know that kind of request")
        if request.size not in (1, 2, 4, 8):
            raise GuestError(f"size {request.size} must be 1, 2, 4 or 8")
        if request.count > MAX_COUNT:
            raise GuestError(f"count {request.count} must be at most {MAX_COUNT}")
        if request.data_is_ptr:
            self._move(job, request)
            return
        data = request.data & request.all_ones
        for number in range(request.count):
            self._access(job, request, number, data)

    def _access(self, job: Job, request: Request, number: int, data: int) -> None:
        """Do one item of a request: read it into ``job.values``, or write ``data``."""
        size, address = request.size, request.address
        if number and request.kind == RequestKind.MMIO:  # a port stays where it is
            address += -number * size if request.df else number * size
        region = self.regions.find(request.kind, address, size)
        if region is None:
            raise GuestError(f"no region of this server holds {size} bytes at {address:#x}")
        job.region = region
        offset = address - region.start
        if not request.is_read:
            if job.half_done and not region.repeatable:
                raise GuestError(
                    "a process that died had begun it; it counts as done, because writes to "
                    f"{region!r} are not repeatable"
                )
            if region.write_handler is not None:
                job.call(region.write_handler, offset, size, data)
            return
        if region.read_handler is None:
            job.calls += 1
            job.values.append(request.all_ones)
            return
        job.call(region.read_handler, offset, size)
        if job.values[-1] is None:
            raise BadValueError(
                f"read handler {region.read_handler!r} returned None; it must return the number "
                "that the guest reads"
            )
        checked(job.values[-1], size)

    def _move(self, job: Job, request: Request) -> None:
        """Move data between a device and guest memory, through the cache."""
        size, length = request.size, request.size * request.count
        low = _lowest(request)
        if low < 0 or low + length > ADDRESS_LIMIT:
            raise GuestError(f"no guest memory at {low:#x}..{low + length:#x}")
        if not length:
            return
        try:
            # Also before a device is read: its data must have a place to go.
            block = self._cache.read(low, length)
        except (XenMapCacheError, ValueError) as error:
            raise GuestError(str(error)) from error
        if request.is_read:
            try:
                for number in range(request.count):
                    self._access(job, request, number, 0)
            finally:
                self._store(job, request)
            return
        places = range(0, length, size)
        for number, place in enumerate(places[::-1] if request.df else places):
            value = int.from_bytes(block[place : place + size], "little")
            self._access(job, request, number, value)

    def _store(self, job: Job, request: Request) -> None:
        """Write what a string instruction has read; what it has not read is all ones."""
        size = request.size
        items = [
            _or_ones(value, size).to_bytes(size, "little") for value in job.values[: request.count]
        ]
        items += [b"\xff" * size] * (request.count - len(items))
        if request.df:
            items.reverse()
        try:
            self._cache.write(_lowest(request), b"".join(items))
        except (XenMapCacheError, ValueError) as error:
            raise GuestError(str(error)) from error
        job.stored = True

    def _invalidate(self, job: Job) -> None:
        if job.attempts <= 1:
            self.invalidations += 1
        try:
            self.quiesce(job)
        finally:
            if os.getpid() == self._pid:  # a child that a signal handler has forked has no cache
                self._drop_mappings(job)

    def _drop_mappings(self, job: Job) -> None:
        try:
            self._cache.invalidate()
        except XenMapCacheError as error:
            job.invalidated = True  # as far as it can be
            raise RequestError(f"the cache cannot be invalidated: {error}") from error
        job.invalidated = True

    def quiesce(self, job: Job) -> None:
        """Call every callback, whatever the others do; the first exception is raised.

        Raises:
            QuiesceError: some of them failed.
        """
        failures: list[tuple[object, Exception]] = []
        running = list(job.callers())
        began = now()
        for callback in tuple(self.callbacks):  # one may register another
            if is_async(callback) or callback in running:  # one may close the server
                continue
            before = job.calls
            try:
                job.call(callback)
                refuse_awaitable(callback, job.values[-1])
            except Exception as error:
                if job.calls == before:
                    raise  # a signal handler's, before the callback began
                job.values[job.calls - 1 :] = [error]
                failures.append((callback, error))
        self._tell_quiesced(began, len(failures))
        if failures:
            raise QuiesceError(failures)

    def _tell_quiesced(self, began: int, failures: int) -> None:
        if self.stream.observations:
            self.stream.put(Quiesced(began, now() - began, failures))

    async def quiesce_async(self, job: Job) -> None:
        """Call every callback, and await those that are ``async def``."""
        failures: list[tuple[object, Exception]] = []
        began = now()
        for callback in tuple(self.callbacks):
            job.calling = callback
            job.since = monotonic()
            job.calls += 1
            try:
                result = callback()
                if inspect.isawaitable(result):
                    await cast(Awaitable[object], result)
            except Exception as error:
                failures.append((callback, error))
            finally:
                job.values.append(None)
        self._tell_quiesced(began, len(failures))
        if failures:
            raise QuiesceError(failures)

    def finish(self, job: Job) -> None:
        """Do what must precede the answer to a job that was interrupted or has failed.

        Raises:
            XenMapCacheError: the cache cannot do it.
        """
        request = cast(Request, job.request)
        if request.kind == RequestKind.INVALIDATE:
            if not job.invalidated:
                self._drop_mappings(job)
        elif job.calls and request.data_is_ptr and request.is_read and not job.stored:
            self._store(job, request)

    @staticmethod
    def result(job: Job) -> int:
        """Return the data of the answer, as far as the handlers have come."""
        request = cast(Request, job.request)
        if not request.is_read or request.data_is_ptr:
            return request.data
        if not request.count or len(job.values) != request.count:
            return default_answer(request)
        return _or_ones(job.values[-1], request.size)


class QuiesceError(RequestError):
    """Callbacks of on_quiesce failed.

    Attributes:
        failures: each one, and what it raised.
    """

    def __init__(self, failures: list[tuple[object, Exception]]) -> None:
        super().__init__(failures)
        self.failures = failures


def is_async(callback: object) -> bool:
    """Return whether a callback has to be awaited."""
    return inspect.iscoroutinefunction(callback) or inspect.iscoroutinefunction(
        getattr(type(callback), "__call__", None)  # noqa: B004 - it is the method that is async
    )


def refuse_awaitable(callback: object, result: object) -> None:
    """Refuse what a callback returned if nobody is going to await it.

    Raises:
        TypeError: it is a coroutine.
    """
    if inspect.iscoroutine(result):
        result.close()
        raise TypeError(f"{callback!r} returned a coroutine; register it with `async def`")


def default_answer(request: Request) -> int:
    """Return the data of an answer for which no handler has returned."""
    return request.all_ones if request.is_read and not request.data_is_ptr else request.data


def checked(value: object, size: int) -> int:
    """Return what a read handler returned as a number.

    Raises:
        BadValueError: the value must be an int that fits ``size`` bytes.
    """
    numbers: list[int] = []
    step = map(index, (cast(int, value),))
    try:
        numbers.extend(step)
    except TypeError as error:
        if numbers:
            raise  # a signal handler's: the value is a number
        raise BadValueError(str(error)) from error
    number = numbers[0]
    if number >> 8 * size:  # -1 of a negative number
        raise BadValueError(f"the handler returned {number:#x}, which does not fit {size} bytes")
    return number


class BadValueError(RequestError):
    """A read handler returned something other than a number of the right size."""


def _or_ones(value: object, size: int) -> int:
    try:
        return checked(value, size)
    except BadValueError:
        return (1 << 8 * size) - 1


def _lowest(request: Request) -> int:
    """Return the lowest address of the memory that a string instruction uses."""
    back = request.size * (request.count - 1) if request.df and request.count else 0
    return request.data - back
