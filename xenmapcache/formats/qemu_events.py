"""QEMU's trace events of its map cache and of ioreqs: names, numbers, and what they mean together.

QEMU reports a miss as three events: ``xen_map_cache``, ``xen_remap_bucket`` and
``xen_map_cache_return``. A hit lacks the second one. All three are emitted under the cache's lock.
:class:`Assembler` makes one event of ours from them, whatever form the log has.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from operator import rshift
from typing import Final, NamedTuple

from ..address import PAGE_MASK, PAGE_SHIFT
from ..events import (
    Accessed,
    BucketMapped,
    BucketReplaced,
    CacheOpened,
    MapFailed,
    RequestKey,
    RequestsHandled,
)
from ..ioreq import BUS_OFFSET, RequestKind
from .qemu_blocks import Misses
from .qemu_runs import Found, HeldRun, InvalidatedRun, MappedRun, Times

EVENTS: Final = {
    "xen_map_cache": 1,
    "xen_remap_bucket": 1,
    "xen_map_cache_return": 1,
    "xen_map_cache_init": 2,
    "xen_replace_cache_entry_dummy": 2,
    "xen_invalidate_map_cache_entry_unlocked_not_found": 1,
    "xen_invalidate_map_cache_entry_unlocked_found": 2,
    "xen_invalidate_map_cache_entry_unlocked_miss": 1,
    "xen_replace_cache_entry_unlocked_could_not_update_entry": 1,
    "xen_ram_addr_from_mapcache_not_found": 1,
    "xen_ram_addr_from_mapcache_found": 2,
    "xen_ram_addr_from_mapcache_not_in_cache": 1,
    "xen_replace_cache_entry_unlocked": 1,
    "xen_invalidate_map_cache": 2,
    "handle_ioreq": 9,
    "cpu_ioreq_config_read": 5,
    "cpu_ioreq_config_write": 5,
}
"""How many numbers each event has. Other events are not looked into."""

MIB_SHIFT: Final = 20
_CONFIG: Final = ("cpu_ioreq_config_read", "cpu_ioreq_config_write")
_SHIFTS: Final = (MIB_SHIFT, 16, PAGE_SHIFT)
"""Buckets of a 64-bit host; of a 32-bit host; of grants."""


class _Miss(NamedTuple):
    """An access that has begun. Immutable.

    Attributes:
        time: in ns.
        address: that is wanted.
        bucket: index of the bucket that was mapped for it; None as long as none was.
    """

    time: int | None
    address: int
    bucket: int | None


class Assembler:
    """Makes events of ours from QEMU's, in their order.

    Attributes:
        names: how many events of each name were taken.
        first_time, last_time: of the log, in ns; None if it has no times.

    Synchronization: for one thread.
    """

    def __init__(self) -> None:
        self.names = dict.fromkeys(EVENTS, 0)
        self.first_time: int | None = None
        self.last_time: int | None = None
        self._events: list[Found] = []
        self._accesses: dict[int, int] = {}
        self._requests: dict[RequestKey, int] = {}
        self._access: _Miss | None = None
        self._shift = MIB_SHIFT
        self._invalidations = 0

    def take(self) -> list[Found]:
        """Return the events since the last call."""
        self._flush()
        if self._requests:
            self._events.append(RequestsHandled(self._requests))
            self._requests = {}
        events, self._events = self._events, []
        return events

    def note_time(self, time: int | None) -> None:
        """Note the time of a place in the log, in ns."""
        if time is not None:
            if self.first_time is None:
                self.first_time = time
            self.last_time = time

    def add_hits(self, bucket: int, count: int) -> None:
        """Add accesses that were served without a map call, to a MiB of that number."""
        self._accesses[bucket] = self._accesses.get(bucket, 0) + count

    def begin_run(self, accesses: int, misses: int) -> None:
        """Begin a run of complete accesses, of which some are misses: what began before ends."""
        self.end()
        self.names["xen_map_cache"] += accesses
        self.names["xen_map_cache_return"] += accesses
        self.names["xen_remap_bucket"] += misses

    def run_of(self, misses: Misses) -> MappedRun | None:
        """Return complete misses as a run; None if a bucket has another size than the last one."""
        shift = self._shift
        times, addresses, buckets, ends, hosts = misses
        if list(map(rshift, addresses, repeat(shift))) != buckets:
            return None
        mask = (1 << shift) - 1
        is_timed = times.count(None) < len(times)
        return MappedRun(
            times,
            [bucket << shift for bucket in buckets],
            1 << shift,
            list(map(_duration, times, ends)) if is_timed else times,
            [host - (at & mask) for at, host in zip(addresses, hosts, strict=True)],
        )

    def add_run(self, run: MappedRun) -> bool:
        """Add misses that :meth:`run_of` has returned, unless the size of buckets has changed.

        Returns:
            Whether they were added.
        """
        if run.length != 1 << self._shift:
            return False
        self._events.append(run)
        return True

    def add_misses(self, misses: Misses) -> None:
        """Add complete accesses that had a bucket mapped, one by one."""
        for time, address, bucket, end, host in zip(*misses, strict=True):
            self._mapped(_Miss(time, address, bucket), end, host)

    def add_requests(self, key: RequestKey, count: int) -> None:
        """Add ioreqs that have the same key."""
        self._requests[key] = self._requests.get(key, 0) + count

    def add(self, name: str, time: int | None, numbers: tuple[int, ...]) -> None:
        """Add an event of QEMU's; :data:`EVENTS` says how many numbers it has."""
        self.names[name] += 1
        first = numbers[0]
        if name == "xen_map_cache":
            self.end()
            self._access = _Miss(time, first, None)
        elif name == "xen_remap_bucket":
            self._remap(time, first)
        elif name == "xen_map_cache_return":
            self._return(time, first)
        elif name == "xen_invalidate_map_cache":
            self.add_held((time,), (first,), (numbers[1],))
        elif name == "handle_ioreq":
            self._request(time, numbers)
        elif name == "xen_map_cache_init":
            self._flush()
            self._events.append(CacheOpened(time, first))
        elif name == "xen_replace_cache_entry_dummy":
            self.add_replaced(time, first, numbers[1])
        elif name in _CONFIG and not self.names["handle_ioreq"]:  # which has them, too
            _, bdf, offset, _, data = numbers
            address = bdf << BUS_OFFSET | offset
            self.add_requests(
                request_key(RequestKind.PCI_CONFIG, name == _CONFIG[0], address, data), 1
            )

    def add_invalidated(self, times: Times) -> None:
        """Add INVALIDATEs that follow each other."""
        self._flush()
        self._events.append(InvalidatedRun(times, self._invalidations + 1))
        self._invalidations += len(times)

    def add_held(self, times: Times, indexes: Sequence[int], hosts: Sequence[int]) -> None:
        """Add DMA that was held across an INVALIDATE, in the buckets of these indexes."""
        self._flush()
        shift = self._shift
        starts = [index << shift for index in indexes]
        self._events.append(HeldRun(times, starts, 1 << shift, hosts, self._invalidations))

    def add_replaced(self, time: int | None, old: int, new: int) -> None:
        """Add a bucket that had no memory of the guest, and has some now."""
        self._events.append(BucketReplaced(time, old, new))

    def end(self) -> None:
        """End an access whose return is not in the log."""
        access = self._access
        if access is None:
            return
        if access.bucket is not None:
            self._mapped(access, None, None)
        elif not self.names["xen_map_cache_return"]:  # not traced, so this was a hit
            self.add_hits(access.address >> MIB_SHIFT, 1)
        self._access = None

    def _flush(self) -> None:
        if self._accesses:
            self._events.append(Accessed(self._accesses))
            self._accesses = {}

    def _remap(self, time: int | None, index: int) -> None:
        access = self._access
        if access is None:
            self._mapped(_Miss(time, index << self._shift, index), None, None)
            return
        if access.bucket is not None:
            self._mapped(access, None, None)
        self._access = access._replace(bucket=index)

    def _return(self, time: int | None, host: int) -> None:
        access, self._access = self._access, None
        if access is None:  # the log begins inside an access
            return
        if not host:
            self._events.append(MapFailed(access.time, access.address))
        elif access.bucket is None:
            self.add_hits(access.address >> MIB_SHIFT, 1)
        else:
            self._mapped(access, time, host)

    def _mapped(self, access: _Miss, time: int | None, host: int | None) -> None:
        index = access.bucket or 0
        shift = self._shift
        if access.address >> shift != index:
            shift = next((each for each in _SHIFTS if access.address >> each == index), shift)
            if shift != PAGE_SHIFT:
                self._shift = shift
        length = 1 << shift
        duration = _duration(access.time, time)
        if host is not None:
            host -= access.address & length - 1
        self._events.append(BucketMapped(access.time, index << shift, length, duration, host))

    def _request(self, time: int | None, numbers: tuple[int, ...]) -> None:
        _, kind, direction, _, _, address, data, _, _ = numbers
        if kind == RequestKind.INVALIDATE:
            self.add_invalidated((time,))
            return
        self.add_requests(request_key(kind, bool(direction), address, data), 1)


def _duration(start: int | None, end: int | None) -> int | None:
    """Return the time between; None if one is unknown, or the clock was set back."""
    return end - start if start is not None and end is not None and end >= start else None


def request_key(kind: int, is_read: bool, address: int, data: int) -> RequestKey:
    """Return what an ioreq has in common with others."""
    if kind == RequestKind.MMIO:
        address &= ~PAGE_MASK
    known = data if kind == RequestKind.PCI_CONFIG and not is_read else None
    return RequestKey(kind, is_read, address, known)
