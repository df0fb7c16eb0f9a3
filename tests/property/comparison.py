"""A cache over the mock, compared with the model: possible errors, and invariants."""

from __future__ import annotations

import errno
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant

from xenmapcache import (
    CacheFullError,
    FaultError,
    Lease,
    LeaseInfo,
    LeaseKind,
    MapCache,
    MockHypervisor,
    XenCallError,
    open_backend,
)

from .model import BUCKET, PAGE, PAGES, Model, Window, rounded
from .replay import Replay

KEPT_VIEWS = 3


class Warnings(logging.Handler):
    """Counts WARNINGs by their first words and the lease that they are about."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.seen: Counter[tuple[str, int]] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        assert isinstance(record.args, tuple)
        (lease,) = (item.id for item in record.args if isinstance(item, LeaseInfo))
        self.seen[record.msg.partition(" %d")[0].partition(":")[0], lease] += 1


class Comparison(RuleBasedStateMachine):
    """Both sides of a sequence. Rules do the same to both; after each, they are compared.

    Attributes:
        domain, backend, cache: of the mock.
        limit: ``max_resident`` of the cache.
        leases: the handles of what the model holds, by their ids.
        kept: views that nobody has to keep, with what they must show, and their cache.
        steps: how many rules were run, the one that sets up included.
    """

    steps = 0

    @initialize(on_stale=st.sampled_from(["warn", "copy", "raise"]), buckets=st.integers(1, 6))
    def start(self, on_stale: str, buckets: int) -> None:
        self.model = Model()
        self.domain = MockHypervisor().create_domain(memory=PAGES * PAGE)
        self.domain.on_invalidate(self.invalidate)
        self.backend = open_backend("mock", domain=self.domain)
        self.on_stale = on_stale
        self.limit = buckets * BUCKET
        self.kept: list[tuple[Window, memoryview, MapCache]] = []
        self.warnings = Warnings()
        logging.getLogger("xenmapcache").addHandler(self.warnings)
        self.open()

    def open(self) -> None:
        self.cache = MapCache(
            self.backend,
            bucket_shift=BUCKET.bit_length() - 1,
            max_resident=self.limit,
            on_stale=self.on_stale,  # type: ignore[arg-type] # the test knows
        )
        self.leases: dict[int, Lease] = {}
        self.replay = Replay()
        self.cache.observe(self.replay)
        self.invalidations = self.stale_returned = 0

    # --- what may happen ---

    def held(self, cache: MapCache) -> dict[int, int]:
        """Return the size of each mapping that a lease or a kept view holds."""
        views = [view for _, view, its_cache in self.kept if its_cache is cache]
        if cache is self.cache:
            views += [lease.view for lease in self.leases.values()]
        return {id(view.obj): len(view.obj) for view in views}  # type: ignore[arg-type] # the test knows

    def needs(self, address: int, length: int) -> int:
        """Return the size of what is mapped for an access to all of a range at once."""
        whole = rounded(address, length, BUCKET)
        return whole if whole <= self.limit else rounded(address, length, PAGE)

    @contextmanager
    def failing(self, call: str, reason: int) -> Iterator[None]:
        """Let the next such call fail as a whole, if there is a reason."""
        if reason:
            self.domain.inject_fault(call, errno=reason)
        try:
            yield
        finally:
            self.domain.clear_faults()
            for gfn, reason in self.model.paged.items():
                self.domain.inject_fault("map", errno=reason, gfn=gfn, repeat=True)

    @contextmanager
    def attempt(
        self, *ranges: tuple[int, int], needs: int, fails: int = 0, again: bool = False
    ) -> Iterator[None]:
        """Run a block up to where an access raises what it may; what comes after is for success."""
        faults = [self.model.faults(*part, again=again) for part in ranges]
        room = self.limit - sum(self.held(self.cache).values())
        with self.failing("map", fails):
            try:
                yield
            except FaultError as fault:
                found = (fault.address, fault.length, fault.errno)
                # Of a lease that is longer than may be, only the first and last page are looked at.
                gfn = fault.address // PAGE
                gone = gfn >= PAGES or self.model.frames[gfn] is None or gfn in self.model.paged
                assert any(found in part.possible for part in faults) or (
                    gone and needs > self.limit
                )
            except CacheFullError:
                assert needs > room
            except XenCallError as error:
                assert error.errno == fails
            else:
                assert not any(part.certain for part in faults)
                # What failed had not been asked for, or was asked for again, with room made.
                pending = self.domain.faults.pending
                unused = any((each.call, each.gfn) == ("map", None) for each in pending)
                assert unused or fails in (0, errno.ENOMEM)

    def keep(self, window: Window, view: memoryview) -> None:
        if len(self.kept) < KEPT_VIEWS:
            self.kept.append((window, view, self.cache))

    def invalidate(self) -> None:
        resident = self.cache.stats().resident_buckets
        report = self.cache.invalidate()
        self.model.invalidate()
        self.invalidations += 1
        assert report.sequence == self.invalidations
        assert (report.dropped_buckets, report.dropped_bytes) == (resident, resident * BUCKET)
        for kind, infos in (LeaseKind.DEVICE, report.device), (LeaseKind.DMA, report.dma):
            held = [held.id for held in self.model.held if held.kind is kind]
            assert [info.id for info in infos] == held

    # --- what must always be so ---

    @invariant()
    def after_each_step(self) -> None:
        if hasattr(self, "cache"):
            self.all_is_as_it_must_be()
            self.steps += 1

    def all_is_as_it_must_be(self) -> None:
        self.leases_and_views_show_their_frames()
        self.the_guest_sees_what_was_written()
        self.books_balance()
        self.events_tell_it_too()

    def events_tell_it_too(self) -> None:
        """What follows from the events is what the cache has; a late observer hears it, too."""
        if self.cache._table.generation.closed:
            return
        stats, replay = self.cache.stats(), self.replay
        late = Replay()
        self.cache.observe(late).detach()
        mappings = self.cache._table.generation.buckets.items()
        resident = {index * BUCKET: mapping.address for index, mapping in mappings}
        held = {held.id: (held.address, held.length) for held in self.model.held}
        for each in (replay, late):
            assert each.buckets == resident
            assert each.leases == held
        counted = stats.evictions, stats.misses, stats.invalidations, stats.stale_dma_released
        # A bucket that only has a page more missing is not stored, and so not told of.
        assert (replay.evictions, replay.invalidations, replay.stale_released) == (
            counted[0],
            counted[2],
            counted[3],
        )
        assert replay.maps <= counted[1]
        assert replay.dirty <= self.domain.dirty_gfns

    def leases_and_views_show_their_frames(self) -> None:
        infos = self.cache.leases()
        assert len(infos) == len(self.model.held)
        for held, info in zip(self.model.held, infos, strict=True):
            lease = self.leases[held.id]
            assert held.agrees_with(info)
            assert lease.stale == held.stale
            assert lease.view.readonly != held.writable
            assert bytes(lease.view) == held.content()
            last = held.length - 1
            assert self.cache.resolve(lease.host_address + last) == held.address + last
        for window, view, _ in self.kept:
            assert bytes(view) == window.content()

    def the_guest_sees_what_was_written(self) -> None:
        for gfn, frame in enumerate(self.model.frames):
            if frame is not None:
                assert self.domain.read(gfn * PAGE, PAGE) == frame
        assert self.domain.dirty_gfns == self.model.dirty
        assert self.warnings.seen == self.model.warnings

    def books_balance(self) -> None:
        stats = self.cache.stats()
        resident = {
            id(bucket.memory): bucket.length
            for bucket in self.cache._table.generation.buckets.values()
        }
        alive = resident | self.held(self.cache)
        assert stats.resident_bytes == sum(alive.values()) <= self.limit
        assert stats.maps - stats.unmaps == len(alive)
        assert stats.resident_buckets == len(resident)
        of_closed = {id(view.obj) for _, view, cache in self.kept if cache is not self.cache}
        assert self.domain.mapped_pieces == len(alive) + len(of_closed)
        kinds = Counter(held.kind for held in self.model.held)
        assert stats.device_leases == kinds[LeaseKind.DEVICE]
        assert stats.dma_leases == kinds[LeaseKind.DMA]
        assert stats.invalidations == self.invalidations
        assert stats.stale_dma_released == self.stale_returned
        held_stale = [held.kind is LeaseKind.DMA and held.stale for held in self.model.held]
        assert stats.stale_dma_held == sum(held_stale)
        for held in self.model.held:
            if held.kind is LeaseKind.DMA and not held.stale and not held.crosses:
                mapping = self.leases[held.id]._record.mapping
                # No bucket is evicted; one with a hole is mapped again when the hole is filled.
                if mapping is not None and mapping.errors is None:
                    assert held.address // BUCKET in self.cache._table.generation.buckets
        self.clock_is_right()

    def clock_is_right(self) -> None:
        generation = self.cache._table.generation
        leased = Counter(id(lease.view.obj) for lease in self.leases.values())
        pins = generation.clock.pins
        for index, bucket in generation.buckets.items():
            held = pins[index].lease_ids if index in pins else ()
            assert len(held) == leased[id(bucket.memory)]
        swept = [
            index for index in generation.buckets if index not in pins or not pins[index].off_clock
        ]
        assert sorted(generation.clock.order) == sorted(swept)
        assert pins.keys() <= generation.buckets.keys()

    def teardown(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.kept.clear()
        for gfn in range(PAGES):
            with self.attempt((gfn * PAGE, PAGE), needs=BUCKET):
                assert (
                    self.cache.read(gfn * PAGE, PAGE) == self.model.take(gfn * PAGE, PAGE).content()
                )
        self.books_balance()
        self.cache.close(force=True)
        self.model.close()
        self.leases.clear()
        self.all_is_as_it_must_be()
        assert not self.domain.mapped_pieces
        logging.getLogger("xenmapcache").removeHandler(self.warnings)
