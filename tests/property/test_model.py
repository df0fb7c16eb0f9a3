"""Cache, leases and ballooning against a plain model of what each must show."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from xenmapcache import (
    CacheFullError,
    DmaDirection,
    FaultError,
    Lease,
    LeaseKind,
    MapCache,
    MockHypervisor,
    open_backend,
)
from xenmapcache import buckets as buckets_module

PAGE = 0x1000
PAGES = 12
SIZE = PAGES * PAGE

pages = st.integers(0, PAGES - 1)
addresses = st.builds(
    lambda page, offset: page * PAGE + offset, pages, st.sampled_from([0, 1, 0x7FF, 0xFFC, 0xFFF])
)
lengths = st.sampled_from([1, 8, 0xFFF, PAGE, PAGE + 2, 3 * PAGE])


class Guest(RuleBasedStateMachine):
    """The model: each gfn has a frame, each frame its bytes; a lease shows the frames it took."""

    @initialize(on_stale=st.sampled_from(["warn", "copy"]), buckets=st.integers(3, 6))
    def start(self, on_stale: str, buckets: int) -> None:
        self.domain = MockHypervisor().create_domain(memory=SIZE)
        self.backend = open_backend("mock", domain=self.domain)
        self.cache = MapCache(
            self.backend,
            bucket_shift=13,
            max_resident=buckets * 2 * PAGE,
            on_stale=on_stale,  # type: ignore[arg-type] # drawn from those
        )
        self.limit = buckets * 2 * PAGE
        self.copies = on_stale == "copy"
        self.frames: list[bytearray | None] = [bytearray(PAGE) for _ in range(PAGES)]
        self.leases: list[tuple[Lease, list[bytearray], bool]] = []
        self.domain.on_invalidate(self.invalidate)
        self.dirty: set[int] = set()

    # --- the model ---

    def span(self, address: int, length: int) -> range:
        return range(address // PAGE, (address + length - 1) // PAGE + 1)

    def first_bad(self, address: int, length: int) -> int | None:
        for gfn in self.span(address, length):
            if gfn >= PAGES or self.frames[gfn] is None:
                return max(address, gfn * PAGE)
        return None

    def shown(self, frames: list[bytearray], address: int, length: int) -> bytes:
        return b"".join(frames)[address % PAGE : address % PAGE + length]

    def put(self, frames: list[bytearray], address: int, data: bytes) -> None:
        for position, byte in enumerate(data, address % PAGE):
            frames[position // PAGE][position % PAGE] = byte

    def present(self, address: int, length: int) -> list[bytearray]:
        return [frame for gfn in self.span(address, length) if (frame := self.frames[gfn])]

    # --- what is done ---

    @rule(address=addresses, length=lengths)
    def read(self, address: int, length: int) -> None:
        bad = self.first_bad(address, length)
        if bad is None:
            expected = self.shown(self.present(address, length), address, length)
            try:
                assert self.cache.read(address, length) == expected
            except CacheFullError:
                assert self.leases
        else:
            try:
                self.cache.read(address, length)
            except FaultError as fault:
                assert fault.address == bad
            except CacheFullError:
                assert self.leases
            else:
                raise AssertionError(f"{bad:#x} was read")

    @rule(address=addresses, length=lengths, fill=st.integers(0, 255))
    def write(self, address: int, length: int, fill: int) -> None:
        try:
            self.cache.write(address, bytes([fill]) * length)
        except FaultError as fault:
            assert fault.address == self.first_bad(address, length)
        except CacheFullError:
            assert self.leases or length > self.limit - 2 * PAGE
        else:
            assert self.first_bad(address, length) is None
            self.put(self.present(address, length), address, bytes([fill]) * length)
            self.dirty |= set(self.span(address, length))

    @rule(address=addresses, length=lengths, device=st.booleans())
    def lease(self, address: int, length: int, device: bool) -> None:
        try:
            if device:
                lease = self.cache.map_device(address, length, owner="model")
            else:
                direction = DmaDirection.FROM_DEVICE
                lease = self.cache.map_dma(address, length, owner="model", direction=direction)
        except FaultError as fault:
            assert fault.address == self.first_bad(address, length)
        except CacheFullError:
            assert self.leases or length > self.limit - 2 * PAGE
        else:
            assert self.first_bad(address, length) is None
            self.leases.append((lease, self.present(address, length), False))

    @precondition(lambda self: self.leases)
    @rule(which=st.integers(0), fill=st.integers(0, 255))
    def write_through_a_lease(self, which: int, fill: int) -> None:
        lease, frames, _ = self.leases[which % len(self.leases)]
        lease.view[:] = bytes([fill]) * lease.length
        self.put(frames, lease.address, bytes([fill]) * lease.length)

    @precondition(lambda self: self.leases)
    @rule(which=st.integers(0))
    def release(self, which: int) -> None:
        lease, frames, stale = self.leases.pop(which % len(self.leases))
        data = self.shown(frames, lease.address, lease.length)
        gone = self.first_bad(lease.address, lease.length)
        if stale and self.copies:
            if gone is None:
                lease.release()
            else:
                try:
                    lease.release()
                except FaultError as fault:
                    assert fault.address == gone
                else:
                    raise AssertionError(f"{gone:#x} was copied to")
            for number, gfn in enumerate(self.span(lease.address, lease.length)):
                frame = self.frames[gfn]
                if frame is None:
                    continue
                start = max(lease.address, gfn * PAGE)
                end = min(lease.address + lease.length, (gfn + 1) * PAGE)
                part = data[start - lease.address : end - lease.address]
                if frame is not frames[number]:
                    self.put([frame], start, part)
        else:
            lease.release()
        self.dirty |= set(self.span(lease.address, lease.length))

    @rule(gfn=pages, count=st.integers(1, 3))
    def balloon_out(self, gfn: int, count: int) -> None:
        count = min(count, PAGES - gfn)
        for page in range(gfn, gfn + count):
            self.frames[page] = None
        self.domain.balloon_out(gfn * PAGE, count * PAGE)

    @rule(gfn=pages, count=st.integers(1, 3))
    def balloon_in(self, gfn: int, count: int) -> None:
        count = min(count, PAGES - gfn)
        for page in range(gfn, gfn + count):
            if self.frames[page] is None:
                self.frames[page] = bytearray(PAGE)
        self.domain.balloon_in(gfn * PAGE, count * PAGE)

    @rule()
    def invalidate(self) -> None:
        report = self.cache.invalidate()
        held = [lease for lease, _, _ in self.leases]
        assert {info.id for info in report.device + report.dma} == {lease.id for lease in held}
        self.leases = [
            (lease, frames, stale or lease.kind is LeaseKind.DMA)
            for lease, frames, stale in self.leases
        ]

    # --- what must always be so ---

    @invariant()
    def leases_show_what_they_took(self) -> None:
        for lease, frames, stale in getattr(self, "leases", []):
            assert lease.stale == stale
            assert bytes(lease.view) == self.shown(frames, lease.address, lease.length)
            assert self.cache.resolve(lease.host_address) == lease.address

    @invariant()
    def books_balance(self) -> None:
        if not hasattr(self, "leases"):
            return
        stats = self.cache.stats()
        assert stats.resident_bytes <= self.limit
        assert stats.device_leases + stats.dma_leases == len(self.leases)
        assert stats.maps - stats.unmaps >= stats.resident_buckets
        assert {info.id for info in self.cache.leases()} == {
            lease.id for lease, _, _ in self.leases
        }
        assert self.domain.dirty == self.dirty

    def teardown(self) -> None:
        if hasattr(self, "leases"):
            for lease, _, _ in self.leases:
                try:
                    lease.release()
                except FaultError:
                    assert self.copies
            self.cache.close()
            assert self.cache.stats().resident_bytes == 0


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """There is one thread only, so memory in others' hands is not worth waiting for."""
    monkeypatch.setattr(buckets_module, "_PATIENCE", 0)
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


TestGuest = Guest.TestCase
TestGuest.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
