"""Reads with ``fill=``: a byte takes the place of missing pages, and of nothing else."""

from __future__ import annotations

import errno
import os
import random
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.effort import calls_at_most
from tests.images.writers import lime, lime_range, memory
from xenmapcache import (
    Backend,
    CacheFullError,
    ClosedError,
    FaultError,
    GuestMemory,
    MapCache,
    MockHypervisor,
    XenCallError,
    open_backend,
)
from xenmapcache.address import PAGE_SIZE, MiB

P = PAGE_SIZE
RANGES = [(1, 3), (6, 1), (9, 7), (0x40, 3)]
END = 0x43 * P


def expected(address: int, length: int, fill: int) -> bytes:
    """Return what a read gives of a guest that has RANGES."""
    data = bytearray([fill]) * (max(END, address + length) + P)
    for gfn, pages in RANGES:
        data[gfn * P : (gfn + pages) * P] = memory(gfn, pages)
    return bytes(data[address : address + length])


class Unindexed(Backend):
    """A source that does not know which pages exist, nor where they end; as a live guest."""

    name = "unindexed"

    def __init__(self, inner: Backend) -> None:
        self._inner = inner
        self.mapped = 0

    def map(self, gfn: int, count: int, *, writable: bool) -> object:  # type: ignore[override] # counts the calls
        self.mapped += count
        return self._inner.map(gfn, count, writable=writable)

    def close(self) -> None:
        self._inner.close()


@pytest.fixture(params=["indexed", "not indexed"])
def source(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Backend]:
    path = tmp_path / "guest.lime"
    path.write_bytes(lime(RANGES))
    os.utime(path, (1, 1))
    with open_backend("raw", path=path) as backend:
        yield backend if request.param == "indexed" else Unindexed(backend)


@pytest.mark.parametrize("shift", [12, 14, 20])
def test_any_range(source: Backend, shift: int) -> None:
    """Each byte is the guest's, or the given one; the same into a buffer."""
    rng = random.Random(1)
    with MapCache(source, bucket_shift=shift) as cache:
        guest = GuestMemory(cache)
        for _ in range(200):
            address = rng.randrange(END + 4 * P)
            length = rng.choice([0, 1, 8, P, rng.randrange(20 * P)])
            fill = rng.choice([0, 1, 0xFF])
            data = cache.read(address, length, fill=fill)
            assert data == expected(address, length, fill)
            buffer = bytearray(b"?" * length)
            guest.read_into(address, buffer, fill=fill)
            assert buffer == data
        assert guest.read(P - 1, 2, fill=7) == b"\7" + memory(1, 1)[:1]
        with pytest.raises(FaultError):
            guest.read(P - 1, 2)
        with pytest.raises(FaultError):
            guest.read_into(P - 1, bytearray(2))


def test_a_page_in_parts(tmp_path: Path) -> None:
    """The bytes of a page that the file lacks are zeros: the page is not missing."""
    path = tmp_path / "guest.lime"
    path.write_bytes(lime_range(P + 8, b"x" * 8))
    with open_backend("raw", path=path) as backend, MapCache(backend) as cache:
        assert cache.read(P, 32, fill=0xFF) == bytes(8) + b"x" * 8 + bytes(16)


def test_far_beyond_the_end(source: Backend) -> None:
    """Addresses that no guest can have are missing as others are."""
    with MapCache(source) as cache:
        for address in ((1 << 52) - 2, 1 << 52, (1 << 64) - 1):
            assert cache.read(address, 4, fill=9) == b"\t" * 4
        with pytest.raises(FaultError):
            cache.read(1 << 52, 4)


@pytest.mark.parametrize(
    ("address", "length", "fill", "error", "message"),
    [
        (0, 8, 256, ValueError, "fill must be a byte, 0 to 255, not 256"),
        (0, 8, -1, ValueError, "not -1"),
        (0, 8, b"\0", TypeError, "fill must be an int, not bytes"),
        (-1, 8, 0, ValueError, "address -0x1 is negative"),
        (0, -1, 0, ValueError, "length -0x1"),
        ("0", 1, 0, TypeError, "address must be an int"),
    ],
)
def test_wrong_arguments(
    source: Backend,
    address: int,
    length: int,
    fill: int,
    error: type[Exception],
    message: str,
) -> None:
    """They are named, as without a byte to fill in."""
    with MapCache(source) as cache:
        with pytest.raises(error, match=message):
            cache.read(address, length, fill=fill)


def test_a_length_that_a_guest_chose(source: Backend) -> None:
    """What is made up has a limit, so that no length takes all memory or all time."""
    with MapCache(source, max_resident=4 * MiB) as cache:
        cache.read(P, 1)
        tracemalloc.start()
        with calls_at_most(10_000):
            for length in (8 * MiB, 1 << 40, 1 << 60):
                with pytest.raises(CacheFullError, match="are missing, and `fill` gives at most"):
                    cache.read(0, length, fill=0)
        assert tracemalloc.get_traced_memory()[1] < 12 * MiB
        tracemalloc.stop()
        assert cache.read(0, 4 * MiB, fill=0) == expected(0, 4 * MiB, 0)
    if isinstance(source, Unindexed):
        assert source.mapped * P < 32 * MiB


def test_parts_of_the_filling_are_shared() -> None:
    """A gap takes memory once, in the result."""
    with open_backend("mock", memory="1M") as backend, MapCache(backend) as cache:
        tracemalloc.start()
        assert len(cache.read(1 << 40, 64 * MiB + 5, fill=3)) == 64 * MiB + 5
        assert tracemalloc.get_traced_memory()[1] < 67 * MiB
        tracemalloc.stop()


def test_a_page_that_was_refused_is_not_filled() -> None:
    """A refusal is not a hole: nothing is made up for it."""
    guest = MockHypervisor().create_domain(memory="1M")
    with open_backend("mock", domain=guest) as backend, MapCache(backend) as cache:
        guest.inject_fault("map", errno=errno.EACCES, gfn=3)
        with pytest.raises(XenCallError) as refused:
            cache.read(0, 8 * P, fill=0)
        assert refused.value.errno == errno.EACCES


def test_a_closed_cache(source: Backend) -> None:
    """It is closed for reads of missing pages, too."""
    cache = MapCache(source)
    cache.close()
    with pytest.raises(ClosedError):
        cache.read(0, 1, fill=0)
