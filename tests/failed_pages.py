"""Everything that a cache offers, over a guest some of whose pages are not there.

Xen's libraries return a mapping also if pages of it have failed. Such a page must never be touched.
On x86 that is SIGBUS, and EFAULT from a system call; on Arm it is SIGKILL, and an oops of Dom0's
kernel from a system call. So each test calls `exercise` in a process of its own and looks how that
ends. A system call that met such a page on x86 moves too few bytes, or raises.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from tests.fake_xen.child import in_child
from xenmapcache import (
    Backend,
    Capability,
    ClosedError,
    FaultError,
    GuestMemory,
    MapCache,
    UnsupportedOperationError,
)
from xenmapcache.address import PAGE_SIZE, MiB

PAGES = 3 * MiB // PAGE_SIZE
HOLES = ((0x01, 2), (0x40, 1), (0xFE, 4), (0x180, 0x60), (0x2FF, 1))
"""First page and number: in the middle of buckets of 1 MiB, and at each edge."""


def runs() -> Iterator[tuple[int, int]]:
    """Yield ``(offset, length)`` of what exists between the holes, in bytes."""
    first = 0
    for page, count in (*HOLES, (PAGES, 0)):
        if page > first:
            yield first * PAGE_SIZE, (page - first) * PAGE_SIZE
        first = page + count


def exercise(reopen: Callable[[], Backend], gfn: int, folder: Path) -> bool:
    """Use all of a cache, on what exists and what does not; the guest keeps its content.

    Args:
        reopen: opens the guest.
        gfn: where the range begins, with a bucket; :data:`HOLES` are not there.
        folder: for a file.
    """
    start = gfn * PAGE_SIZE
    present = [(start + offset, length) for offset, length in runs()]
    absent = [(gfn + page) * PAGE_SIZE for page, _ in HOLES]
    with reopen() as backend, MapCache(backend, max_resident="8MiB") as cache:
        assert list(cache.present(start, PAGES * PAGE_SIZE)) == present
        _plain(cache, start, present, absent)
        _leases(cache, present, absent, folder / "file")
        _windows(cache, start, present)
    # With less room than buckets, each round evicts ones that have holes.
    with reopen() as backend, MapCache(backend, max_resident="2MiB") as cache:
        for _ in range(2):
            _plain(cache, start, present, absent)
        _fork(cache, present)
    return True


def _plain(cache: MapCache, start: int, present: list[tuple[int, int]], absent: list[int]) -> None:
    whole = cache.read(start, PAGES * PAGE_SIZE, fill=0xA5)
    writes = Capability.WRITE in cache.backend.capabilities
    for _ in range(3):  # cold, in the table, and hot where that can be
        for address, length in present:
            data = cache.read(address, length)
            assert data == whole[address - start : address - start + length]
            buffer = bytearray(length)
            cache.read_into(address, buffer)
            assert buffer == data
            if writes:
                cache.write(address, data)
            assert b"".join(map(bytes, cache.views(address, length))) == data
    for address in absent:
        assert cache.read(address, PAGE_SIZE, fill=7) == b"\7" * PAGE_SIZE
        for access in (cache.read, lambda where, count: cache.write(where, bytes(count))):
            try:
                access(address, 8)
            except FaultError as error:
                assert error.address == address
            else:
                raise AssertionError(f"{address:#x} is there")
    everything = GuestMemory(cache).find(b"\xa5\x5a no guest has this", start, PAGES * PAGE_SIZE)
    assert list(everything) == []
    assert list(GuestMemory(cache).strings(start, PAGES * PAGE_SIZE, min_length=4000)) is not None


def _leases(cache: MapCache, present: list[tuple[int, int]], absent: list[int], path: Path) -> None:
    memory = GuestMemory(cache)
    contents = [cache.read(*each) for each in present]
    total = sum(map(len, contents))
    with path.open("w+b") as file, memory.segments(present, owner="disk") as segments:
        assert segments.write_to(file.fileno(), 0) == total
        assert segments.read_from(file.fileno(), 0) == total
        assert os.pwritev(file.fileno(), segments.views, 0) == total
        assert os.preadv(file.fileno(), segments.views, 0) == total
        cache.invalidate()  # the views stay, over mappings with holes
        assert os.preadv(file.fileno(), segments.views, 0) == total
        assert segments.tobytes() == b"".join(contents)
    path.unlink()
    for address in absent:
        for where, length in ((address, 1), (address - 8, 16), (address - 8, 3 * MiB)):
            for lease in (cache.map_dma, cache.map_device):
                with suppress(FaultError):
                    lease(where, length, owner="disk").release()
                    raise AssertionError(f"a lease of {where:#x} has a page that is not there")
    device = cache.map_device(present[0][0], PAGE_SIZE, owner="vga")
    with suppress(FaultError, UnsupportedOperationError):
        cache.replace(present[0][0], absent[0], PAGE_SIZE)
        raise AssertionError("a device lease shows a page that is not there")
    assert device.view == contents[0][:PAGE_SIZE]
    device.release()


def _windows(cache: MapCache, start: int, present: list[tuple[int, int]]) -> None:
    with cache.window(start, PAGES * PAGE_SIZE) as window:
        view = window.view
        assert bytes(view) == cache.read(start, PAGES * PAGE_SIZE, fill=0)
        read_end, write_end = os.pipe()
        for page in range(PAGES):  # each one by a system call
            assert os.write(write_end, view[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]) == PAGE_SIZE
            assert len(os.read(read_end, PAGE_SIZE)) == PAGE_SIZE
        os.close(read_end)
        os.close(write_end)
    with suppress(FaultError):
        cache.window(start, PAGES * PAGE_SIZE, holes="raise").release()
        raise AssertionError("a window without holes has some")
    assert present


def _fork(cache: MapCache, present: list[tuple[int, int]]) -> None:
    address, length = present[0]
    with cache.map_dma(address, length, owner="disk") as lease:
        view = lease.view

        def child() -> bool:
            assert bytes(view) == bytes(length)
            try:
                cache.read(address, 8)
            except ClosedError:
                return True
            return False

        assert in_child(child) == 0
        assert len(bytes(view)) == length
