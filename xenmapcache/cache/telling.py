"""Telling: what a map cache puts into its stream of events."""

from __future__ import annotations

import time as clock
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any, Protocol, cast

from ..address import PAGE_MASK, PAGE_SHIFT
from ..errors import FaultError, XenMapCacheError
from ..events import (
    WALL_CLOCK_OFFSET_NS,
    BucketDropped,
    BucketMapped,
    BucketReplaced,
    CacheClosed,
    CacheOpened,
    Event,
    HoleFault,
    Invalidated,
    LeaseReleased,
    LeaseTaken,
    MapFailed,
)
from ..mapping import Mapping
from ..stream import EventStream, now
from .info import LeaseKind
from .record import LeaseRecord

_S = 1_000_000_000
_is_told = attrgetter("told")
_DEVICE = LeaseKind.DEVICE  # CPython 3.11 takes long to find it in the class
_monotonic_ns = clock.monotonic_ns

# As their classes make them, in a third of the time; leases come often.
_make_taken = cast(Callable[[tuple[object, ...]], LeaseTaken], partial(tuple.__new__, LeaseTaken))
_make_released = cast(
    Callable[[tuple[object, ...]], LeaseReleased], partial(tuple.__new__, LeaseReleased)
)


def _values(record: LeaseRecord, time: int, sequence: int) -> tuple[Any, ...]:
    """Return the values of LeaseTaken."""
    direction, kind = record.direction, record.kind
    return (
        time,
        record.id,
        kind._value_,
        record.address,
        record.length,
        record.owner,
        None if direction is None else direction._value_,
        record.thread._name,  # type: ignore[attr-defined] # noqa: SLF001 - name() is slow
        record.lost or (kind is not _DEVICE and record.sequence < sequence),
        record.origin,
    )


def taken(stream: EventStream, record: LeaseRecord, sequence: int) -> None:
    """Tell of a lease that was taken; called without the lock."""
    direction, kind = record.direction, record.kind
    values = (  # as _values(), in less time
        _monotonic_ns() + WALL_CLOCK_OFFSET_NS,
        record.id,
        kind._value_,
        record.address,
        record.length,
        record.owner,
        None if direction is None else direction._value_,
        record.thread._name,  # type: ignore[attr-defined] # noqa: SLF001 - name() is slow
        record.lost or (kind is not _DEVICE and record.sequence < sequence),
        record.origin,
    )
    shortcut = stream.shortcut
    if shortcut is not None:
        store = shortcut.taken
        if store(record, values):
            return
    stream.put(_make_taken(values), record)
    stream.deliver()


def ended(stream: EventStream, record: LeaseRecord) -> None:
    """Tell that a lease has ended, if it has, and observers know it; called without the lock."""
    if record.told:
        sequence = record.released_at
        if sequence is not None:
            stale = record.lost or (record.kind is not _DEVICE and record.sequence < sequence)
            time = _monotonic_ns() + WALL_CLOCK_OFFSET_NS
            values = time, record.id, stale, record.copied_pages, record.lost_pages
            shortcut = stream.shortcut
            if shortcut is not None:
                store = shortcut.released
                if store(record, values):
                    return
            stream.put(_make_released(values), record, False)
            stream.deliver()


def moved(stream: EventStream, old: int, new: int) -> None:
    """Tell that a lease shows another address; called without the lock."""
    stream.put(BucketReplaced(now(), old, new))


# What observers know of buckets is in `Generation.known`, and is changed together with the queues.
# A step that is interrupted between its change and its event leaves the two different:
# `reconcile` tells what is missing. The end of a generation is told before anything of the next.


class KnownBucket:
    """A bucket that observers know, or are about to.

    Attributes:
        told: whether they do.
        start, length: in bytes.
        host: where it begins in the process.
    """

    __slots__ = ("host", "length", "start", "told")

    def __init__(self, mapping: Mapping, *, told: bool = False) -> None:
        self.told: bool | None = told
        self.start = mapping.gfn << PAGE_SHIFT
        self.length = mapping.length
        self.host = mapping.address


class Generation(Protocol):
    """What is asked of :class:`.buckets.Generation`."""

    sequence: int
    known: dict[int, KnownBucket]
    told: bool | None
    buckets: dict[int, Mapping]


class Table(Protocol):
    """What is asked of :class:`.buckets.BucketTable`, which knows this module."""

    stream: EventStream
    shift: int
    untold: dict[Any, None]
    held_dma: Callable[[int], tuple[int, ...]]

    @property
    def generation(self) -> Generation:
        """The current one."""


def mapped(table: Table, index: int, mapping: Mapping, began: int | None, former: bool) -> None:
    """Tell that a bucket was mapped; called under the lock.

    Args:
        table: of the cache.
        index: of the bucket.
        mapping: of the bucket.
        began: when its map call began, in ns.
        former: whether it takes the place of another mapping.
    """
    settle(table)
    time = now()
    if former:
        _gone(table, index, time, "replaced")
    duration = None if began is None else time - began
    _come(table, index, mapping, time if began is None else began, duration)


def _come(table: Table, index: int, mapping: Mapping, time: int, duration: int | None) -> None:
    generation = table.generation
    _gone(table, index, time, "evicted")  # one whose end was not told
    known = KnownBucket(mapping)
    if table.generation is generation:  # otherwise a signal handler has just dropped it
        generation.known[index] = known
        table.stream.put(_bucket(mapping, time, duration), known, True)


def _gone(table: Table, index: int, time: int, reason: str) -> None:
    table_of_known = table.generation.known
    known = table_of_known.get(index)
    if known is not None:
        table.stream.put(BucketDropped(time, known.start, known.length, reason), known, False)
        # No call from here on: a signal handler may have mapped another one in its place.
        if index in table_of_known and table_of_known[index] is known:
            del table_of_known[index]


def _bucket(mapping: Mapping, time: int, duration: int | None) -> BucketMapped:
    errors = mapping.errors
    holes = 0 if errors is None else (len(errors) - errors.count(0)) << PAGE_SHIFT
    start = mapping.gfn << PAGE_SHIFT
    return BucketMapped(time, start, mapping.length, duration, mapping.address, holes)


def dropped(table: Table, victims: list[Mapping]) -> None:
    """Tell that buckets were evicted; called under the lock."""
    settle(table)
    time = now()
    for mapping in victims:
        index = mapping.gfn << PAGE_SHIFT >> table.shift
        known = table.generation.known.get(index)
        if known is not None and known.host == mapping.address:
            _gone(table, index, time, "evicted")


def reconcile(table: Table) -> None:
    """Tell what an interrupted step has not told; called under the lock."""
    settle(table)
    time = now()
    generation = table.generation
    for index, known in [*generation.known.items()]:
        mapping = generation.buckets.get(index)
        if mapping is None or mapping.address != known.host:
            _gone(table, index, time, "evicted")
    for index, mapping in [*generation.buckets.items()]:
        known_now = generation.known.get(index)
        if known_now is None or not known_now.told:
            _come(table, index, mapping, time, None)


def missed(stream: EventStream, error: XenMapCacheError, address: int) -> None:
    """Tell of an access that came to a missing page, or to one that was refused."""
    if isinstance(error, FaultError):
        stream.put(HoleFault(now(), error.address & ~PAGE_MASK))
    else:
        stream.put(MapFailed(now(), address))


def settle(table: Table, began: int | None = None) -> None:
    """Tell of invalidations that are not told yet: nothing that comes after is told before.

    Args:
        table: of the cache.
        began: when the last one began, in ns.
    """
    for generation in [*table.untold]:
        closed = generation.sequence == table.generation.sequence
        number = generation.sequence + 1
        held = table.held_dma(number)
        # Not a comprehension: CPython 3.11 loses references if it cannot make its function.
        count = [*map(_is_told, [*generation.known.values()])].count(True)
        time = now()
        start, duration = (time, None) if began is None else (began, time - began)
        event = Invalidated(start, number, count, held, duration)
        if not closed:  # that is told when the leases have ended
            table.stream.put(event, generation, False)
        for known in [*generation.known.values()]:
            known.told = None  # also for a call that was interrupted, and tells of it later
        table.untold.pop(generation, None)


def invalidated(table: Table, began: int) -> None:
    """Tell of an invalidation; called without the lock."""
    settle(table, began)
    table.stream.deliver()


def closed(table: Table) -> None:
    """Tell that a cache was closed, once; called without the lock."""
    settle(table)
    table.stream.put(CacheClosed(now()), table.generation, False)
    table.stream.deliver()


def snapshot(opened: CacheOpened, records: list[LeaseRecord], table: Table) -> list[Event]:
    """Return what an observer is to know first."""
    generation = table.generation
    sequence = generation.sequence
    alone = len(table.stream.observations) == 1
    if alone:  # until now nothing was told
        generation.known.clear()
    events: list[Event] = [opened]
    time = now()
    for index, mapping in generation.buckets.copy().items():
        known = KnownBucket(mapping, told=True)
        # No call up to the store. Of one that a signal handler has evicted, the end was told, or
        # nobody is to hear of it.
        if index not in generation.known and index in generation.buckets:
            generation.known[index] = known
        elif alone:
            continue
        events.append(_bucket(mapping, time, None))
    for record in records:
        since = int(record.since * _S) + WALL_CLOCK_OFFSET_NS
        record.told = True
        # From here on its end is told. If it ended before, and that was not told, nor is this.
        if record.released_at is None or not record.told:
            events.append(_make_taken(_values(record, since, sequence)))
        else:
            record.told = False
    return events
