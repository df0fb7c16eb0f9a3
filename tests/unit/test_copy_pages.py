"""copy_pages(): the mapping of a backend that copies pages and has holes."""

from __future__ import annotations

import errno
import gc
import zlib
from typing import ClassVar

import pytest

from xenmapcache import (
    Backend,
    FaultError,
    GuestMemory,
    MapCache,
    Mapping,
    UnsupportedOperationError,
    copy_pages,
)
from xenmapcache.binding import libc
from xenmapcache.mapping import live_mappings


class Compressed(Backend):
    """Pages 1 and 3 of a guest, compressed."""

    name = "compressed"
    memory_end = 0x4000
    pages: ClassVar = {gfn: zlib.compress(bytes([gfn]) * 4096) for gfn in (1, 3)}

    def map(self, gfn: int, count: int, *, writable: bool) -> Mapping:
        found = (self.pages.get(number) for number in range(gfn, gfn + count))
        return copy_pages(gfn, [page and zlib.decompress(page) for page in found])

    def close(self) -> None:
        pass


def test_a_source_that_copies_pages_and_has_holes() -> None:
    """Reads, searches and leases see the pages; holes are faults; nothing can be written."""
    with MapCache(Compressed(), bucket_shift=14) as cache:
        assert cache.read(0x1FFE, 2) == b"\1\1"
        assert list(cache.present(0, 0x4000)) == [(0x1000, 0x1000), (0x3000, 0x1000)]
        assert [at for at, _ in GuestMemory(cache).find(b"\3" * 4096)] == [0x3000]
        with cache.map_dma(0x3000, 8, owner="t", direction="to-device") as lease:
            assert bytes(lease.view) == b"\3" * 8
        with pytest.raises(FaultError) as caught:
            cache.read(0x1FFF, 2)
        assert (caught.value.address, caught.value.errno) == (0x2000, errno.EINVAL)
        with pytest.raises(UnsupportedOperationError):
            cache.write(0x1000, b"x")
        assert repr(cache.backend) == "<Compressed of compressed>"


def test_pages_without_holes_have_no_errors() -> None:
    """So their bucket can become hot; any buffer is a page."""
    mapping = copy_pages(7, [bytes(4096), memoryview(bytearray(b"x" * 4096)).cast("I")])
    assert (mapping.gfn, mapping.count, mapping.errors) == (7, 2, None)
    assert bytes(mapping.view(4094, 4)) == b"\0\0xx"


@pytest.mark.parametrize(
    ("pages", "message"),
    [
        ([], "pages must be at least one page"),
        ([None, b"short"], "page 0x8 must be 4096 bytes long, not 5"),
    ],
)
def test_what_is_no_list_of_pages_is_refused(pages: list[bytes | None], message: str) -> None:
    """Before memory is allocated."""
    gc.collect()  # what other tests left
    before = live_mappings()
    with pytest.raises(ValueError, match=message):
        copy_pages(7, pages)
    assert live_mappings() == before


def test_an_interrupt_while_memory_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was allocated is unmapped."""
    freed: list[int] = []

    def allocate(length: int, *, at_once: bool, result_out: list[int]) -> int:
        result_out.append(0x1000)
        raise KeyboardInterrupt

    monkeypatch.setattr(libc, "allocate", allocate)
    monkeypatch.setattr(libc, "munmap", lambda address, length: freed.append(address))
    with pytest.raises(KeyboardInterrupt):
        copy_pages(7, [None])
    assert freed == [0x1000]


def test_a_source_at_rest_has_no_guest_that_runs() -> None:
    """It cannot be paused, and does not end."""
    with Compressed() as backend:
        with pytest.raises(UnsupportedOperationError, match="'compressed' has no running guest"):
            backend.pause()
        backend.unpause()
        assert not backend.has_ended()
