"""Values: what a guest can choose, integers of any type, buffers that overlap, copies."""

from __future__ import annotations

import copy
import ctypes
import errno
import pickle
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import HOLE
from xenmapcache import (
    Backend,
    CacheFullError,
    ClosedError,
    DmaDirection,
    EmptyRangeError,
    FaultError,
    GuestMemory,
    LeaseError,
    MapCache,
    MockDomain,
    XenMapCacheError,
    open_backend,
    open_cache,
    write_coredump,
)
from xenmapcache.cache import access
from xenmapcache.cache.access import may_be_guest_memory

BUCKET = 1 << 16
END = 16 << 20
TOP = (1 << 64) - 1


class Int:
    """An integer of another type, with nothing but ``__index__``."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


class Narrow(int):
    """An integer whose arithmetic wraps around at 32 bits, as NumPy's does."""

    def __and__(self, other: int) -> Narrow:
        return Narrow(int(self) & other & 0xFFFFFFFF)

    def __add__(self, other: int) -> Narrow:
        return Narrow((int(self) + other) & 0x7FFFFFFF)


# --- addresses and lengths of a guest ---

ACCESSES: dict[str, Callable[[MapCache, int, int], object]] = {
    "read": lambda c, a, n: c.read(a, n),
    "views": lambda c, a, n: [len(view) for view in c.views(a, n)],
    "map_dma": lambda c, a, n: c.map_dma(a, n, owner="nic"),
    "map_device": lambda c, a, n: c.map_device(a, n, owner="vga"),
    "segments": lambda c, a, n: GuestMemory(c).segments([(0x1000, 8), (a, n)]).__enter__(),
}
RANGES = [
    (TOP, 1),
    (TOP, TOP),
    (0, TOP),
    (1 << 52, 8),
    ((1 << 52) - 4, 8),
    (END, 1),
    (END - 4, 8),
    (END - 4, 1 << 40),
    (0x1000, 4 << 30),
    (HOLE[0], 4 << 30),
    (1 << 63, 1 << 63),
]


@pytest.mark.parametrize("access", ACCESSES)
@pytest.mark.parametrize(("address", "length"), RANGES)
@pytest.mark.parametrize("limits", [{}, {"max_resident": 4 * BUCKET}, {"max_lease": 4096}], ids=str)
def test_a_range_beyond_memory_is_a_fault_whatever_the_guest_chose(
    domain: MockDomain,
    backend: Backend,
    access: str,
    address: int,
    length: int,
    limits: dict[str, int],
) -> None:
    """FaultError, with the first address that does not exist; at most two map calls."""
    cache = MapCache(backend, bucket_shift=16, **limits)  # type: ignore[arg-type] # known options
    with pytest.raises(FaultError) as caught:
        ACCESSES[access](cache, address, length)
    fault = caught.value
    assert fault.address == max(address, HOLE[0] if address < sum(HOLE) else END)
    assert fault.address + fault.length == address + length
    assert cache.leases() == ()
    if access in ("map_dma", "map_device") and length > 1 << 20:
        assert cache.stats().maps <= 2


@pytest.mark.parametrize(
    ("end", "address", "length", "fault"),
    [
        (END, 0x1000, 4 << 30, END),
        (None, 0x1000, (4 << 30) + 5, (4 << 30) + 0x1000),
        (None, 0x1000, 1 << 60, 1 << 52),
        (END, 0x1000, 1 << 60, END),
        (END, END - 0x1000, 2 << 20, END),
        (END, HOLE[0] + 8, 4 << 30, HOLE[0] + 8),
        (END, END + 8, 4 << 30, END + 8),
    ],
)
def test_a_guest_whose_pages_only_mapping_shows(
    backend: Backend,
    monkeypatch: pytest.MonkeyPatch,
    end: int | None,
    address: int,
    length: int,
    fault: int,
) -> None:
    """As a live one: two map calls find the first page, the end of memory, or the last page."""
    monkeypatch.setattr(type(backend), "present", lambda *_: None)
    monkeypatch.setattr(type(backend), "memory_end", end)
    cache = MapCache(backend, bucket_shift=16, max_lease="1M")
    with pytest.raises(FaultError) as caught:
        cache.map_dma(address, length, owner="nic")
    assert (caught.value.address, caught.value.length) == (fault, address + length - fault)
    assert cache.stats().maps <= 2


def test_a_page_that_comes_back_while_the_error_is_made(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the page that was found missing."""
    cache = MapCache(backend, bucket_shift=16)
    monkeypatch.setattr(type(backend), "present", lambda _, gfn, count: iter([(gfn, count)]))
    with pytest.raises(FaultError, match="no page at 0x40000000:"):
        cache.map_dma(0x1000, (1 << 30) - 0xFF8, owner="nic")


@pytest.mark.parametrize("address", [TOP, 1 << 52, (1 << 52) - 1, END, END - 1])
def test_a_write_beyond_memory_is_a_fault(cache: MapCache, address: int) -> None:
    """Whatever the address, hot neighbours or not."""
    for _ in range(3):
        with pytest.raises(FaultError):
            cache.write(address, b"12")
        with pytest.raises(FaultError):
            cache.read_into(address, bytearray(2))
        cache.read(END - BUCKET, 1)


def test_a_lease_of_no_bytes_is_a_fault_and_a_value_error(cache: MapCache) -> None:
    """A guest can choose 0 as well; and a caller's own 0 is as wrong as before."""
    for take in (cache.map_dma, cache.map_device):
        with pytest.raises(EmptyRangeError, match="length at address 0x2000 is 0; a lease needs"):
            take(0x2000, 0, owner="t")
    assert issubclass(EmptyRangeError, FaultError)
    assert issubclass(EmptyRangeError, ValueError)
    error = pickle.loads(pickle.dumps(EmptyRangeError(1, 0, errno.EINVAL)))
    assert str(error) == "length at address 0x1 is 0; a lease needs at least 1 byte"
    assert cache.read(TOP, 0) == b""


def test_max_lease_is_the_longest_lease(backend: Backend) -> None:
    """One byte more is refused, inside a bucket and over its edge; reads are not leases."""
    cache = MapCache(backend, bucket_shift=16, max_lease="4KiB")
    for address in (0x200000, 0x20FFFF):
        cache.map_dma(address, 4096, owner="nic").release()
        with pytest.raises(
            CacheFullError, match="0x1001 bytes at .* are more than max_lease 0x1000"
        ):
            cache.map_dma(address, 4097, owner="nic")
    assert len(cache.read(0x200000, BUCKET)) == BUCKET


def test_segments_are_leased_together_or_not_at_all(cache: MapCache) -> None:
    """A range that faults releases those before it; an error of a release does not keep others."""
    memory = GuestMemory(cache)
    with pytest.raises(FaultError):
        with memory.segments([(0x1000, 8), (0x2000, 8), (END, 8)]):
            pytest.fail("one of them is missing")
    assert cache.leases() == ()
    strict = MapCache(cache.backend, bucket_shift=16, on_stale="raise")
    with pytest.raises(LeaseError, match="released stale"):
        with GuestMemory(strict).segments(
            [(0x1000, 8), (0x2000, 8)], direction="to-device"
        ) as segments:
            assert [view.readonly for view in segments.views] == [True, True]
            strict.invalidate()
    assert strict.leases() == ()
    with memory.segments([(0x1000, 8), (0x2000, 8)]):
        cache.close(force=True)  # their releases have nothing left to do


# --- integers of any type ---


@pytest.mark.parametrize("kind", [Int, Narrow, bool])
def test_integers_of_any_type_are_addresses(
    domain: MockDomain, cache: MapCache, kind: Callable[[int], int]
) -> None:
    """On the first access and on the hit path; the dirty pages are those that were written."""
    address = 1 if kind is bool else 0x20FFE
    domain.write(address, b"abcd")
    for _ in range(3):
        assert cache.read(kind(address), 4) == b"abcd"
        assert cache.read(address, Int(4)) == b"abcd"  # type: ignore[arg-type] # on purpose
    cache.write(kind(address), b"dcba")
    assert domain.read(address, 4) == b"dcba"
    assert domain.dirty_gfns == ({0} if kind is bool else {0x20, 0x21})
    buffer = bytearray(4)
    cache.read_into(kind(address), buffer)
    assert buffer == b"dcba"
    with cache.map_dma(kind(address), 4, owner="t") as lease:
        assert (lease.address, type(lease.address)) == (address, int)


def test_numpy_integers_are_addresses(domain: MockDomain, cache: MapCache) -> None:
    """Small ones too, whose arithmetic fails or wraps around."""
    numpy = pytest.importorskip("numpy")
    domain.write(100, b"abcd")
    for kind in (numpy.uint8, numpy.int8, numpy.uint16, numpy.int32, numpy.uint64):
        for _ in range(3):
            assert cache.read(kind(100), kind(4)) == b"abcd"
        domain.dirty_gfns.clear()
        cache.write(kind(100), numpy.frombuffer(b"abcd", "u1"))
        assert domain.dirty_gfns == {0}
    cache.write(0, numpy.zeros((0, 4), "u1"))
    cache.read_into(100, into := numpy.zeros(4, "u1"))
    assert bytes(into) == b"abcd"


def test_an_exception_of_a_signal_handler_is_not_taken_for_a_miss(cache: MapCache) -> None:
    """KeyError and its kind go through the hit path, when foreign code runs in it."""

    class Foreign(bytes):
        def __len__(self) -> int:
            raise KeyError("of a handler")

    for _ in range(3):
        cache.read(0x2000, 1)
    cache.write(0x2000, Foreign(b"ab"))  # its own length is not asked for
    assert cache.read(0x2000, 2) == b"ab"


# --- overlap ---


@pytest.mark.parametrize("shift", [12, 20])
@pytest.mark.parametrize("up", [True, False])
def test_overlapping_ranges_are_moved_as_by_memmove(backend: Backend, shift: int, up: bool) -> None:
    """The source is a view of the same guest pages at another host address."""
    cache = MapCache(backend, bucket_shift=shift)
    size = 1 << shift
    source, target = (0, size) if up else (size, 0)
    content = b"".join(bytes([65 + step]) * size for step in range(4))
    cache.write(0x100000, content)
    with cache.map_dma(0x100000 + source, 3 * size, owner="scroll") as lease:
        cache.write(0x100000 + target, lease.view)
    expected = bytearray(content)
    expected[target : target + 3 * size] = content[source : source + 3 * size]
    assert cache.read(0x100000, 4 * size) == expected
    cache.write(0x100000, content)
    with cache.map_dma(0x100000 + target, 3 * size, owner="scroll") as lease:
        cache.read_into(0x100000 + source, lease.view)
    assert cache.read(0x100000, 4 * size) == expected


def test_an_overlap_inside_a_bucket(backend: Backend) -> None:
    """One piece, read through the lease's own mapping; and through an array over that."""
    numpy = pytest.importorskip("numpy")
    cache = MapCache(backend, bucket_shift=16)
    wraps: list[Callable[[memoryview], Any]] = [
        lambda view: view,
        lambda view: numpy.frombuffer(view, "u1")[:],
    ]
    for wrap in wraps:
        cache.write(0x20F000, bytes(range(256)) * 16)
        with cache.map_dma(0x20F000, 0x2000, owner="crossing") as lease:
            cache.write(0x20F001, wrap(lease.view)[:0xFFE])
        assert cache.read(0x20F000, 0xFFF) == b"\0" + (bytes(range(256)) * 16)[:0xFFE]


def test_a_structure_over_guest_memory_is_a_source(cache: MapCache) -> None:
    """A ctypes object is copied first, as its memory may be the guest's."""
    cache.write(0x2000, b"abcdefgh")
    with cache.map_dma(0x2000, 8, owner="t") as lease:
        array = (ctypes.c_char * 7).from_buffer(lease.view)
        cache.write(0x2001, array)
        assert cache.read(0x2000, 8) == b"aabcdefg"
        del array


# --- copies, names ---


def test_copies_are_refused(cache: MapCache, backend: Backend) -> None:
    """Two caches of one budget, or two handles of one lease, would contradict each other."""
    lease = cache.map_dma(0x2000, 8, owner="t")
    for thing in (cache, backend, lease):
        for make in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="cannot be copied or pickled"):
                make(thing)


def test_a_direction_may_be_text(cache: MapCache) -> None:
    """As on_stale may."""
    for direction in DmaDirection:
        with cache.map_dma(0x2000, 8, owner="t", direction=direction.value) as lease:
            assert lease.direction is direction


def test_names_of_caches_and_backends(
    cache: MapCache, backend: Backend, domain: MockDomain, tmp_path: Path
) -> None:
    """They show what they belong to: a domain or a file, and how large it is."""
    assert repr(backend).startswith("<MockBackend of <MockDomain 1, ")
    assert Backend.__repr__(backend) == "<MockBackend of domain 1, memory end 0x1000000>"
    cache.read(0, 1)
    cache.map_dma(0, 1, owner="t")
    assert repr(cache) == (f"<MapCache of {backend!r}: 1 buckets of 0x10000 bytes, 1 leases>")
    cache.close(force=True)
    assert repr(cache).startswith("<closed MapCache of ")
    path = tmp_path / "guest.core"
    write_coredump(backend, path, length=0x2000)
    with open_backend("coredump", path=path) as source:
        assert repr(source) == f"<CoredumpBackend of {str(path)!r}, memory end 0x2000>"


def test_open_cache_owns_its_source(backend: Backend, tmp_path: Path) -> None:
    """One name, one with block; the source is closed with the cache."""
    path = tmp_path / "guest.core"
    write_coredump(backend, path, length=0x2000)
    with open_cache(path, bucket_shift=12) as cache:
        assert len(cache.read(0, 0x2000)) == 0x2000
        source = cache.backend
    with pytest.raises(ClosedError):
        source.map(0, 1, writable=False)
    with open_cache("mock:1M") as cache:
        lease = cache.map_dma(0, 8, owner="t")
        with pytest.raises(LeaseError):
            cache.close()
        assert cache.read(0x10000, 1) == b"\0"  # the source is still open
        lease.release()


def test_open_cache_leaves_nothing_open_if_the_cache_is_refused(
    tmp_path: Path, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong option of the cache closes the source that was opened for it."""
    closed: list[Backend] = []
    monkeypatch.setattr(type(backend), "close", lambda source: closed.append(source))
    with pytest.raises(ValueError, match="bucket_shift must be"):
        open_cache("mock:1M", bucket_shift=3)
    assert len(closed) == 1


def test_a_cache_that_is_given_a_backend_leaves_it_open(backend: Backend) -> None:
    """Closing it stays the caller's duty."""
    MapCache(backend).close()
    assert backend.map(0, 1, writable=False).count == 1


# --- typed access ---


def test_a_long_string_is_joined_once(cache: MapCache) -> None:
    """8 MiB take a few hundredths of a second; joined page by page they took nine seconds."""
    memory = GuestMemory(cache)
    cache.write(0x200000, b"a" * (8 << 20) + b"\0")
    began = time.process_time()
    assert len(memory.read_cstring(0x200000, 1 << 30)) == 8 << 20
    assert time.process_time() - began < 3


def test_a_string_at_an_address_that_a_guest_chose(cache: MapCache) -> None:
    """It faults where the memory ends, and nowhere before."""
    memory = GuestMemory(cache)
    cache.write(END - 4, b"abcd")
    with pytest.raises(FaultError, match=f"no page at {END:#x}"):
        memory.read_cstring(END - 4)
    for address in (TOP, 1 << 52):
        with pytest.raises(XenMapCacheError):
            memory.read_cstring(address)
    with pytest.raises(ValueError, match="max_length must be at least 0, not -2"):
        memory.read_cstring(0x2000, -2)


def test_fields_that_are_declared_later_are_looked_at(cache: MapCache) -> None:
    """A structure without fields is refused; what was found of it then is not remembered."""

    class Late(ctypes.LittleEndianStructure):
        pass

    memory = GuestMemory(cache)
    with pytest.raises(EmptyRangeError):
        with memory.structure(0x2000, Late):
            pytest.fail("it has no size")
    Late._fields_ = [("pointer", ctypes.c_char_p)]
    with pytest.raises(TypeError, match="Late has pointers"):
        with memory.structure(0x2000, Late):
            pytest.fail("ctypes would follow it")


class ndarray(bytearray):  # noqa: N801 - NumPy's name, by which it is known
    """Stands for an array of NumPy's, which need not be installed."""

    base: object = None


@pytest.mark.parametrize(
    ("base", "possible"),
    [
        (None, False),
        (b"bytes", False),
        (memoryview(b"bytes"), False),
        (ctypes.c_char * 8, True),
        (memoryview((ctypes.c_char * 8)()), True),
    ],
)
def test_the_owner_of_a_numpy_array_is_asked(base: object, possible: bool) -> None:
    """An array of its own memory is not the guest's; a view is if its base may be."""
    array = ndarray(8)
    array.base = base
    assert may_be_guest_memory(memoryview(array)) is possible


def test_present_pages_are_found_by_mapping(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the source does not know them, as on live Xen, each range ends where a hole begins."""
    monkeypatch.setattr(type(backend), "present", lambda *_: None)
    cache = MapCache(backend, bucket_shift=16)
    assert list(cache.present(0, 0x100000)) == [(0, 0xA0000), (0xC0000, 0x40000)]
    assert list(cache.present(0x9FFFF, 0x20002)) == [(0x9FFFF, 1), (0xC0000, 1)]


PARTS = [(0x20, 0x40), (0x80, 0x10), (0x90, 0x10), (0xA0, 0x10), (0xBE, 4), (0xF0, 0x10)]
"""In pages; the guest's hole has the fourth part, and the first half of the fifth."""


@pytest.mark.parametrize("address", [0, 0x1F000, 0x20000, 0x20001, 0x5FFFF, 0x60000, 0xA0000])
@pytest.mark.parametrize("end", [0xA0001, 0xBF000, 0xC0000, 0xC0001, 0xC2000, 0xF0001, 0x100000])
def test_a_long_range_is_mapped_where_pages_may_be(
    backend: Backend, address: int, end: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages elsewhere are left out; parts that touch make one run, which may begin in a page."""

    def extents(_: Backend, gfn: int, count: int) -> Iterator[tuple[int, int]]:
        for first, pages in PARTS:
            start, stop = max(first, gfn), min(first + pages, gfn + count)
            if start < stop:
                yield start, stop - start

    monkeypatch.setattr(type(backend), "present", lambda *_: None)
    monkeypatch.setattr(type(backend), "extents", extents)
    cache = MapCache(backend, bucket_shift=16)
    there = [gfn for first, pages in PARTS for gfn in range(first, first + pages)]
    pages = [(gfn << 12, (gfn + 1) << 12) for gfn in there if not 0xA0 <= gfn < 0xC0]
    expected: list[tuple[int, int]] = []
    for first, last in ((max(address, start), min(end, stop)) for start, stop in pages):
        if first >= last:
            continue
        if expected and sum(expected[-1]) == first:
            first, _ = expected.pop()
        expected.append((first, last - first))
    whole = list(cache.present(address, end - address))
    monkeypatch.setattr(access, "_MAPPED_BYTES", end - address)
    assert whole == list(cache.present(address, end - address)) == list(mapped(address, end))
    monkeypatch.setattr(access, "_MAPPED_BYTES", end - address - 1)
    assert list(cache.present(address, end - address)) == expected


def mapped(address: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield what the guest has in a range, around its hole."""
    for first, last in ((0, 0xA0000), (0xC0000, 0x100000)):
        start, stop = max(first, address), min(last, end)
        if start < stop:
            yield start, stop - start
