"""Scatter-gather lists as one object: slices, files, leases, and what counts as written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from xenmapcache import (
    DmaDirection,
    FaultError,
    GuestMemory,
    LeaseError,
    MapCache,
    MockDomain,
    MockHypervisor,
    XenCallError,
    open_backend,
)
from xenmapcache.guest import Segments, scatter

FROM, TO = DmaDirection.FROM_DEVICE, DmaDirection.TO_DEVICE
RANGES = [(0x1FFE, 4), (0x5000, 0), (0x4000, 1), (0x9000, 5)]
HOLE = 0xA0000


@pytest.fixture
def guest() -> MockDomain:
    return MockHypervisor().create_domain(memory="16M", holes=[(HOLE, 0x20000)])


@pytest.fixture
def cache(guest: MockDomain) -> Iterator[MapCache]:
    with open_backend("mock", domain=guest) as backend:
        cache = MapCache(backend, bucket_shift=12)
        yield cache
        cache.close(force=True)


@pytest.fixture
def memory(cache: MapCache) -> GuestMemory:
    return GuestMemory(cache)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "disk"
    path.write_bytes(b"0123456789")
    fd = os.open(path, os.O_RDWR)
    yield fd
    os.close(fd)


def seen(guest: MockDomain) -> bytes:
    """Return what the guest sees in all ranges."""
    return b"".join(guest.read(*each) for each in RANGES if each[1])


def test_a_file_is_read_into_all_ranges(guest: MockDomain, memory: GuestMemory, disk: int) -> None:
    """A range of no bytes has a view, but takes no lease, and reading goes on after it."""
    with memory.segments(RANGES, direction=FROM) as segments:
        assert [len(view) for view in segments.views] == [4, 0, 1, 5]
        assert [lease.address for lease in segments.leases] == [0x1FFE, 0x4000, 0x9000]
        assert len(segments) == 10
        assert segments.read_from(disk, 0) == 10
        assert segments.tobytes() == b"0123456789"
    assert seen(guest) == b"0123456789"
    assert segments.leases == ()
    assert segments.views == []


def test_a_file_that_ends_early_says_how_much_came(
    guest: MockDomain, memory: GuestMemory, disk: int
) -> None:
    """The count ends inside of a range, and what comes after it is left alone."""
    with memory.segments(RANGES) as segments:
        assert segments.read_from(disk, 3) == 7
        assert segments.read_from(disk, 100) == 0
    assert seen(guest) == b"3456789\0\0\0"


def test_ranges_are_written_to_a_file(guest: MockDomain, memory: GuestMemory, disk: int) -> None:
    """The bytes go out in the order of the ranges, not of the addresses."""
    for (address, length), data in zip(RANGES, [b"abcd", b"", b"e", b"fghij"], strict=True):
        if length:
            guest.write(address, data)
    with memory.segments(RANGES, direction=TO) as segments:
        assert segments.write_to(disk, 2) == 10
        assert all(view.readonly for view in segments.views)
    assert os.pread(disk, 20, 0) == b"01abcdefghij"


def test_memory_that_the_device_only_reads_takes_no_file(memory: GuestMemory, disk: int) -> None:
    """The error says which direction to lease with."""
    with memory.segments(RANGES, direction=TO) as segments:
        with pytest.raises(TypeError, match=r"10 bytes.*TO_DEVICE; lease them with FROM_DEVICE"):
            segments.read_from(disk, 0)


def test_short_transfers_go_on_where_the_kernel_stopped(
    guest: MockDomain, memory: GuestMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that moves three bytes a call, and takes two buffers at most."""
    calls: list[tuple[list[int], int]] = []

    def preadv(_: int, views: list[memoryview], offset: int) -> int:
        calls.append(([len(view) for view in views], offset))
        left = 3
        for view in views:
            step = min(left, len(view))
            view[:step] = b"0123456789"[offset : offset + step]
            left, offset = left - step, offset + step
        return 3 - left

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(scatter, "_MAX_VIEWS", 2)
    with memory.segments(RANGES) as segments:
        assert segments.read_from(-1, 0) == 10
    assert calls == [([4, 1], 0), ([1, 1], 3), ([5], 5), ([2], 8)]
    assert seen(guest) == b"0123456789"


def test_more_ranges_than_the_kernel_takes_in_one_call(
    guest: MockDomain, memory: GuestMemory, tmp_path: Path
) -> None:
    """IOV_MAX does not limit a list."""
    count = os.sysconf("SC_IOV_MAX") + 7
    data = os.urandom(8 * count)
    path = tmp_path / "large"
    path.write_bytes(data)
    with path.open("r+b") as file:
        ranges = [(0x100000 + 0x200 * number, 8) for number in range(count)]
        with memory.segments(ranges) as segments:
            assert segments.read_from(file.fileno(), 0) == len(data)
            assert segments.write_to(file.fileno(), len(data)) == len(data)
    assert b"".join(guest.read(*each) for each in ranges) == data
    assert path.read_bytes() == data + data


def test_slices_cross_ranges(guest: MockDomain, memory: GuestMemory, disk: int) -> None:
    """They count bytes, and show the same memory; a slice of a slice does, too."""
    with memory.segments(RANGES) as segments:
        segments[:] = b"0123456789"
        for start in range(-11, 12):
            for stop in (*range(-11, 12), None):
                assert segments[start:stop].tobytes() == b"0123456789"[start:stop]
        middle = segments[2:8]
        assert [bytes(view) for view in middle.views] == [b"23", b"4", b"567"]
        assert middle[1:-1].tobytes() == b"3456"
        middle[1:4] = b"abc"
        assert middle[:4].read_from(disk, 0) == 4
        assert segments[8:8].views == []
    assert seen(guest) == b"0101236789"


def test_what_is_no_slice_of_bytes_is_refused(memory: GuestMemory) -> None:
    """Numbers, steps, and data of another length."""
    with memory.segments(RANGES) as segments:
        with pytest.raises(TypeError, match=r"must be a slice, as \[0:16\], not 3"):
            segments[3]  # type: ignore[index] # wrong on purpose
        with pytest.raises(ValueError, match="step of a slice must be 1, not 2"):
            segments[::2]
        with pytest.raises(ValueError, match="3 bytes do not fit a slice of 4 bytes"):
            segments[0:4] = b"abc"


@pytest.mark.parametrize(
    ("written", "dirty"),
    [(None, {1, 2, 4, 9}), (10, {1, 2, 4, 9}), (5, {1, 2, 4}), (4, {1, 2}), (2, {1}), (0, set())],
)
def test_only_what_was_written_is_dirty(
    guest: MockDomain, memory: GuestMemory, written: int | None, dirty: set[int]
) -> None:
    """A count of written bytes is spread over the ranges in order."""
    with memory.segments(RANGES, direction=FROM) as segments:
        segments.release(written=written)
        assert segments.leases == ()
    assert guest.dirty_gfns == dirty


def test_a_count_that_cannot_be_is_refused(cache: MapCache, memory: GuestMemory) -> None:
    """Of a list and of a lease; both are still held then."""
    with memory.segments(RANGES) as segments:
        for count in (-1, 11):
            with pytest.raises(ValueError, match=f"written must be 0 to 10.*not {count}"):
                segments.release(written=count)
        assert len(segments.leases) == 3
        segments.release(written=3)
        segments.release(written=99)  # nothing is left that it could be wrong of
    lease = cache.map_dma(0x1000, 8, owner="nic")
    for count in (-1, 9):
        with pytest.raises(ValueError, match=f"written must be 0 to 8.*'nic'.*not {count}"):
            lease.release(written=count)
    assert not lease.released
    lease.release(written=8)


def test_a_repaired_stale_lease_keeps_what_the_guest_wrote(guest: MockDomain) -> None:
    """With on_stale="copy", bytes that the device did not write are not copied over newer ones."""
    guest.write(0x3000, b"old" * 4096)
    with open_backend("mock", domain=guest) as backend, MapCache(backend, on_stale="copy") as cache:
        for written in (2, 0):
            lease = cache.map_dma(0x3000, 0x2000, owner="nic", direction=FROM)
            lease.view[:2] = b"by"
            guest.balloon_out(0x3000, 0x2000)
            guest.balloon_in(0x3000, 0x2000)
            guest.write(0x4000, b"guest")
            cache.invalidate()
            lease.release(written=written)
            assert guest.read(0x3000, 2) == b"by"[:written] + bytes(2 - written)
            assert guest.read(0x4000, 5) == b"guest"


def test_all_ranges_or_none(cache: MapCache, memory: GuestMemory) -> None:
    """A hole, or a length that cannot be, leaves no lease of the others."""
    for bad, error in (((HOLE, 8), FaultError), ((0x1000, -1), ValueError)):
        with pytest.raises(error), memory.segments([(0x1000, 8), bad, (0x2000, 8)]):
            pytest.fail("one of them cannot be leased")
        assert cache.leases() == ()
    with pytest.raises(ValueError, match="direction must be one of"):
        memory.segments(RANGES, direction="sideways")


def test_it_can_be_leased_again_but_not_twice(cache: MapCache, memory: GuestMemory) -> None:
    """After a release the same list takes new leases."""
    segments = memory.segments(RANGES)
    with segments:
        with pytest.raises(LeaseError, match=r"is leased already: .*; release it first"):
            segments.__enter__()
        assert len(cache.leases()) == 3
    with segments:
        assert len(segments.leases) == 3
    assert cache.leases() == ()


def test_a_release_that_fails_can_be_repeated(
    guest: MockDomain, cache: MapCache, memory: GuestMemory
) -> None:
    """The others end all the same, and a second release ends what was left, as it was to end."""
    segments = memory.segments(RANGES)
    segments.__enter__()
    guest.inject_fault("mark_dirty", errno=5)
    with pytest.raises(XenCallError):
        segments.release(written=5)  # of the last range no byte was written
    assert [lease.address for lease in segments.leases] == [0x4000]
    assert len(cache.leases()) == 1
    segments.release(written=5)
    segments.release()
    assert cache.leases() == ()
    assert guest.dirty_gfns == {1, 2, 4}


def test_an_error_in_the_block_does_not_mind_views_in_use(
    guest: MockDomain, memory: GuestMemory
) -> None:
    """With strict views; its frames may use them rightly. Without an error it is a mistake."""
    with open_backend("mock", domain=guest) as backend:
        strict = MapCache(backend, strict_views=True)
        kept: list[object] = []
        segments = Segments(strict, RANGES, "nic", FROM)
        with pytest.raises(ZeroDivisionError), segments:
            kept += segments.views
            raise ZeroDivisionError
        assert strict.leases() == ()
        with pytest.raises(LeaseError, match="views of it are in use"), segments:
            kept += segments[0:5].views
        assert len(segments.leases) == 2
        kept.clear()
        segments.release()
        assert strict.leases() == ()
        strict.close()
