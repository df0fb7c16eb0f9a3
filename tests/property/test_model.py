"""Cache, leases, ballooning, paging and faults against a plain model of what each must show.

``XENMAPCACHE_MODEL=20000`` says how many sequences of 50 steps; a hundred without it.
"""

from __future__ import annotations

import errno
import gc
import logging
import os
from collections.abc import Callable
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule, run_state_machine_as_test

from xenmapcache import (
    CacheFullError,
    ClosedError,
    DmaDirection,
    FaultError,
    GuestMemory,
    Lease,
    LeaseError,
    LeaseKind,
    MappingLostError,
    XenCallError,
)
from xenmapcache.mapping import live_mappings

from .comparison import KEPT_VIEWS, Comparison
from .model import BUCKET, PAGE, PAGES, Held, Window, pages_of, rounded

pytestmark = pytest.mark.slow

SEQUENCES = int(os.environ.get("XENMAPCACHE_MODEL", "100"))
STEPS = 50

page_numbers = st.integers(0, PAGES - 1)
addresses = st.builds(
    lambda page, offset: page * PAGE + offset,
    st.integers(0, PAGES),  # the last one lies beyond the end
    st.sampled_from([0, 1, 0x7FF, 0xFFC, 0xFFF]),
)
lengths = st.sampled_from([1, 8, 0xFFF, PAGE, PAGE + 2, 3 * PAGE])
fills = st.integers(0, 255)
failures = st.sampled_from([0, 0, 0, 0, 0, 0, errno.ENOMEM, errno.EPERM])
"""0: the call does not fail."""
ways = st.sampled_from(list(DmaDirection))
owners = st.sampled_from(["disk0", "net0"])
choices = st.integers(0, 3)
"""Which lease: mostly one of the oldest, so that things happen to the same one."""


class Guest(Comparison):
    """What may happen: each rule does the same to the cache and to the model.

    Attributes:
        ran: how many steps each sequence had.
    """

    ran: ClassVar[list[int]] = []

    # --- plain access ---

    @rule(address=addresses, length=lengths, fails=failures, by=st.sampled_from(["bytes", "views"]))
    def read(self, address: int, length: int, fails: int, by: str) -> None:
        with self.attempt((address, length), needs=BUCKET, fails=fails):
            if by == "bytes":
                data = self.cache.read(address, length)
            else:
                data = b"".join(map(bytes, self.cache.views(address, length)))
            assert data == self.model.take(address, length).content()

    @rule(address=addresses, length=lengths, fails=failures)
    def read_into(self, address: int, length: int, fails: int) -> None:
        buffer = bytearray(b"\xa5" * length)
        wanted = bytes(buffer)
        with self.attempt((address, length), needs=self.needs(address, length), fails=fails):
            self.cache.read_into(address, buffer)
            wanted = self.model.take(address, length).content()
        assert buffer == wanted

    @precondition(lambda self: len(self.kept) < KEPT_VIEWS)
    @rule(address=addresses, length=lengths)
    def keep_a_view(self, address: int, length: int) -> None:
        length = min(length, BUCKET - address % BUCKET)
        with self.attempt((address, length), needs=BUCKET):
            (view,) = self.cache.views(address, length)
            self.kept.append((self.model.take(address, length), view, self.cache))

    @rule(address=addresses, length=lengths, fill=fills, fails=failures, marking=failures)
    def write(self, address: int, length: int, fill: int, fails: int, marking: int) -> None:
        data = bytes([fill]) * length
        fails = 0 if marking else fails
        with self.attempt((address, length), needs=self.needs(address, length), fails=fails):
            if marking:
                self.domain.inject_fault("mark_dirty", errno=marking)
                with pytest.raises(XenCallError, match="mock_mark_dirty"):
                    self.cache.write(address, data)
            else:
                self.cache.write(address, data)
                self.model.mark(address, length)
            self.model.take(address, length).put(0, data)

    @rule(again=st.booleans(), fails=failures)
    def look_what_is_present(self, again: bool, fails: int) -> None:
        if again:
            self.invalidate()
        there = [gfn for gfn in range(PAGES) if self.model.errno_of(gfn) == 0]
        may_be_there = {*there, *self.model.seen}
        size = (PAGES + 1) * PAGE
        self.model.faults(0, size)  # which no hole is: but what it sees is resident then
        with self.attempt(needs=BUCKET, fails=fails):
            found = [gfn for part in self.cache.present(0, size) for gfn in pages_of(*part)]
            assert found == sorted(set(found))
            assert may_be_there.issuperset(found)
            assert not again or found == there

    # --- leases ---

    @rule(address=addresses, length=lengths, writable=st.booleans(), owner=owners, fails=failures)
    def map_device(self, address: int, length: int, writable: bool, owner: str, fails: int) -> None:
        needs = rounded(address, length, PAGE)
        with self.attempt((address, length), needs=needs, fails=fails, again=True):
            lease = self.cache.map_device(address, length, owner=owner, writable=writable)
            self.hold(lease, self.model.take(address, length), owner, None, writable)

    @rule(address=addresses, length=lengths, direction=ways, owner=owners, fails=failures)
    def map_dma(
        self, address: int, length: int, direction: DmaDirection, owner: str, fails: int
    ) -> None:
        own = address % BUCKET + length > BUCKET
        needs = rounded(address, length, PAGE) if own else BUCKET
        writable = direction is not DmaDirection.TO_DEVICE
        with self.attempt((address, length), needs=needs, fails=fails, again=own):
            lease = self.cache.map_dma(address, length, owner=owner, direction=direction)
            self.hold(lease, self.model.take(address, length), owner, direction, writable)

    def hold(
        self, lease: Lease, taken: Window, owner: str, way: DmaDirection | None, writable: bool
    ) -> None:
        kind = LeaseKind.DMA if way else LeaseKind.DEVICE
        span = taken.address, taken.length, taken.frames
        self.model.held.append(Held(*span, lease.id, kind, owner, way, writable))
        self.leases[lease.id] = lease

    @rule(address=addresses, direction=ways)
    def map_dma_of_few_bytes(self, address: int, direction: DmaDirection) -> None:
        self.map_dma(address, 8, direction, "net1", 0)

    @rule(
        ranges=st.lists(st.tuples(addresses, lengths), min_size=1, max_size=3),
        direction=ways,
        fill=fills,
        fails=failures,
    )
    def scatter(
        self, ranges: list[tuple[int, int]], direction: DmaDirection, fill: int, fails: int
    ) -> None:
        needs = sum(max(rounded(*part, PAGE), BUCKET) for part in ranges)
        dirty = [self.model.dirty]
        if direction is not DmaDirection.TO_DEVICE:
            for part in ranges:
                dirty.append(dirty[-1].union(pages_of(*part)))
        with self.attempt(*ranges, needs=needs, fails=fails):
            with GuestMemory(self.cache).segments(ranges, direction=direction) as segments:
                for view, part in zip(segments.views, ranges, strict=True):
                    window = self.model.take(*part)
                    assert bytes(view) == window.content()
                    if not view.readonly:
                        view[:] = bytes([fill]) * len(view)
                        window.put(0, bytes(view))
            assert self.domain.dirty_gfns == dirty[-1]
        # Where one could not be had, those before it were given back, as written.
        assert self.domain.dirty_gfns in dirty
        self.model.dirty = set(self.domain.dirty_gfns)

    @precondition(lambda self: self.leases)
    @rule(which=choices, fill=fills)
    def write_through_a_lease(self, which: int, fill: int) -> None:
        held = self.model.held[which % len(self.leases)]
        view = self.leases[held.id].view
        if held.writable:
            view[-5:] = bytes([fill]) * min(5, held.length)
            held.put(max(0, held.length - 5), bytes([fill]) * min(5, held.length))
        else:
            with pytest.raises(TypeError, match="read-only"):
                view[0] = fill

    @precondition(lambda self: self.leases)
    @rule(which=choices, again=st.booleans(), keep=st.booleans(), fails=failures, marking=failures)
    def release(self, which: int, again: bool, keep: bool, fails: int, marking: int) -> None:
        held = self.model.held[which % len(self.leases)]
        lease = self.leases[held.id]
        view = lease.view
        stale = held.stale and held.kind is LeaseKind.DMA
        copied = stale and held.writable and self.on_stale == "copy"
        got: object = None
        with self.failing("map", fails), self.failing("mark_dirty", marking):
            try:
                lease.release()
            except FaultError as fault:
                got = (fault.address, fault.length, fault.errno)
            except XenCallError as error:
                got = error.errno
            except LeaseError:
                got = LeaseError
        wanted: object = None
        if copied and not held.delivered:
            # With something to evict, what failed for ENOMEM is tried again.
            if fails and lease._record.delivered != self.invalidations:
                assert got == fails
                wanted = fails
            else:
                self.model.deliver(held)
        if wanted is None and held.writable:
            if marking:
                wanted = marking
            else:
                self.model.mark(held.address, held.length)
        still_held = wanted is not None
        if not still_held and copied:
            wanted = held.undelivered
        if not still_held and stale and self.on_stale == "raise":
            wanted = LeaseError
        assert got == wanted
        assert lease.released != still_held
        if still_held:
            self.all_is_as_it_must_be()
            if again:
                self.release(which, False, keep, 0, 0)
            return
        if stale:
            self.stale_returned += 1
            if self.on_stale == "warn" or (self.on_stale, held.writable) == ("copy", False):
                self.model.warnings["released stale", held.id] += 1
        self.model.held.remove(held)
        del self.leases[held.id]
        if keep:
            self.keep(held, view)
        with pytest.raises(LeaseError, match="was released before"):
            lease.release()

    @precondition(lambda self: self.kept)
    @rule()
    def drop_the_oldest_view(self) -> None:
        del self.kept[0]

    @precondition(lambda self: any(held.kind is LeaseKind.DEVICE for held in self.model.held))
    @rule(which=choices, page=page_numbers, fails=failures, marking=failures)
    def replace(self, which: int, page: int, fails: int, marking: int) -> None:
        devices = [held for held in self.model.held if held.kind is LeaseKind.DEVICE]
        old = devices[which % len(devices)]
        # The range names the lease: of two with the same it is the older one.
        span = old.address, old.length
        held = next(held for held in devices if (held.address, held.length) == span)
        host = self.leases[held.id].host_address
        new = page * PAGE + held.address % PAGE
        pages = pages_of(new, held.length)
        gone = [gfn for gfn in pages if gfn >= PAGES or self.model.frames[gfn] is None]
        moved = False
        room = self.limit - sum(self.held(self.cache).values())
        with self.failing("remap", fails), self.failing("mark_dirty", marking):
            try:
                self.cache.replace(held.address, new, held.length)
                assert not (marking and held.writable)
                moved = True
            except FaultError as fault:
                assert fault.address == gone[0] * PAGE
            except CacheFullError:  # there is no room for the second mapping that Xen may need
                assert rounded(held.address, held.length, PAGE) > room
            except MappingLostError as error:
                assert error.errno == fails
                held.frames = [bytearray(PAGE) for _ in pages]
                held.stale = True
            except XenCallError as error:
                assert held.writable
                assert error.errno == marking
                moved = True
        if moved:
            assert not gone
            assert not fails
            if held.writable and not marking:
                self.model.mark(held.address, held.length)
            held.address, held.frames = new, self.model.take(new, held.length).frames
            held.stale = False
        assert self.leases[held.id].host_address == host

    # --- the guest ---

    @rule(gfn=page_numbers, count=st.integers(1, 3))
    def balloon_out(self, gfn: int, count: int) -> None:
        count = min(count, PAGES - gfn)
        for page in range(gfn, gfn + count):
            self.model.balloon_out(page)
        self.domain.balloon_out(gfn * PAGE, count * PAGE)

    @rule(gfn=page_numbers, count=st.integers(1, 3))
    def balloon_in(self, gfn: int, count: int) -> None:
        count = min(count, PAGES - gfn)
        for page in range(gfn, gfn + count):
            self.model.balloon_in(page)
        self.domain.balloon_in(gfn * PAGE, count * PAGE)

    @precondition(lambda self: self.leases)
    @rule(which=choices, again=st.booleans())
    def balloon_under_a_lease(self, which: int, again: bool) -> None:
        held = self.model.held[which % len(self.leases)]
        gfn = (held.address + held.length - 1) // PAGE
        self.balloon_out(gfn, 1)
        if again:
            self.balloon_in(gfn, 1)

    @rule(gfn=page_numbers, reason=st.sampled_from([errno.ENOENT, errno.EAGAIN]))
    def page_out(self, gfn: int, reason: int) -> None:
        self.model.paged[gfn] = reason
        with self.failing("map", 0):  # which arms the pages
            pass

    @precondition(lambda self: self.model.paged)
    @rule(which=choices)
    def page_in(self, which: int) -> None:
        del self.model.paged[sorted(self.model.paged)[which % len(self.model.paged)]]
        with self.failing("map", 0):
            pass

    @rule()
    def mark_leases_dirty(self) -> None:
        assert self.cache.mark_leases_dirty() == self.model.mark_held()

    # --- the cache's life ---

    @rule()
    def invalidate(self) -> None:
        super().invalidate()

    @rule(force=st.sampled_from([False, False, False, True]))
    def close(self, force: bool) -> None:
        if self.leases and not force:
            with pytest.raises(LeaseError, match="leases are held"):
                self.cache.close()
            return
        views = [(held, self.leases[held.id].view) for held in self.model.held]
        self.cache.close(force=force)
        self.model.close()
        for held, view in views:
            assert self.leases[held.id].released
            self.keep(held, view)
        with pytest.raises(ClosedError):
            self.cache.read(0, 1)
        with pytest.raises(ClosedError):
            self.cache.invalidate()
        self.open()

    def teardown(self) -> None:
        super().teardown()
        self.ran.append(self.steps - 1)  # without the one that set up


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else reads the log."""
    logger = logging.getLogger("xenmapcache")
    monkeypatch.setattr(logger, "propagate", False)
    monkeypatch.setattr(logger, "handlers", list(logger.handlers))  # a failure leaves its own


def test_the_cache_does_as_the_model(record_property: Callable[[str, object], None]) -> None:
    """After each step of each sequence of 50, everything is as the model says."""
    gc.collect()
    mappings = live_mappings()
    Guest.ran.clear()
    # Some of those that hypothesis makes are shorter, and do not count. It remembers them all:
    # a thousand at a time take little memory.
    while missing := max(0, SEQUENCES - Guest.ran.count(STEPS)):
        run_state_machine_as_test(
            Guest,
            settings=settings(
                max_examples=min(1000, missing * 3 // 2 + 10),
                stateful_step_count=STEPS + 1,
                deadline=None,
                derandomize=False,  # not even in CI: each run tries others
                database=None,
                print_blob=True,
                report_multiple_bugs=False,
                suppress_health_check=[HealthCheck.too_slow],
            ),
        )
    gc.collect()
    assert live_mappings() == mappings
    whole, steps = Guest.ran.count(STEPS), sum(Guest.ran)
    record_property("sequences", whole)
    print(f"{whole} sequences of {STEPS} steps; with shorter ones {steps} steps")  # noqa: T201 - what it is for
