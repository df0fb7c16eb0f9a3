"""GuestMemory: typed access, strings, structures, scatter-gather, search."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import HOLE
from tests.unit.test_source import lime
from xenmapcache import (
    Backend,
    DmaDirection,
    FaultError,
    GuestMemory,
    LeaseError,
    MapCache,
    MockDomain,
    MockHypervisor,
    UnsupportedOperationError,
    open_backend,
    open_cache,
    open_source,
)
from xenmapcache.guest import search

AT = 0x200000
BUCKET = 1 << 16


@pytest.fixture
def memory(cache: MapCache) -> GuestMemory:
    return GuestMemory(cache)


def test_a_backend_is_not_a_cache(backend: Backend) -> None:
    """The message says what to write."""
    with pytest.raises(TypeError, match=r"write GuestMemory\(MapCache\(backend\)\)"):
        GuestMemory(backend)  # type: ignore[arg-type] # the error


@pytest.mark.parametrize("bits", [8, 16, 32, 64])
@pytest.mark.parametrize("address", [AT, AT + 3, AT + BUCKET - 1])
def test_numbers_go_both_ways_little_endian(
    domain: MockDomain, memory: GuestMemory, bits: int, address: int
) -> None:
    """Each width reads and writes the guest's bytes, little end first, over any edge."""
    value = 0xF1E2D3C4B5A69788 & ((1 << bits) - 1)
    raw = value.to_bytes(bits // 8, "little")
    getattr(memory, f"write_u{bits}")(address, value)
    assert domain.read(address, len(raw)) == raw
    assert getattr(memory, f"read_u{bits}")(address) == value
    for wrong in (-1, 1 << bits):
        with pytest.raises(ValueError, match=f"does not fit a u{bits}"):
            getattr(memory, f"write_u{bits}")(address, wrong)
    with pytest.raises(TypeError, match="value must be an int"):
        getattr(memory, f"write_u{bits}")(address, "1")


def test_strings_end_at_their_zero(domain: MockDomain, memory: GuestMemory) -> None:
    """A string may end right before a hole, or be empty, or cross pages; an endless one raises."""
    domain.write(HOLE[0] - 4, b"end\0")
    assert memory.read_cstring(HOLE[0] - 4) == b"end"
    domain.write(AT, b"x" * 5000 + b"\0")
    assert memory.read_cstring(AT, 5000) == b"x" * 5000
    assert memory.read_cstring(AT + 5000) == b""
    with pytest.raises(ValueError, match="no zero byte in 5000 bytes at 0x200000"):
        memory.read_cstring(AT, 4999)
    domain.write(HOLE[0] - 4, b"open")
    with pytest.raises(FaultError, match=f"no page at {HOLE[0]:#x}"):
        memory.read_cstring(HOLE[0] - 4)


class Descriptor(ctypes.LittleEndianStructure):
    _pack_ = 1
    _layout_ = "ms"  # CPython 3.14 wants it said
    _fields_ = [
        ("address", ctypes.c_uint64),
        ("length", ctypes.c_uint32),
        ("flags", ctypes.c_uint16),
    ]


def test_structures_lie_over_guest_memory(
    domain: MockDomain, memory: GuestMemory, cache: MapCache
) -> None:
    """Fields are the guest's bytes, without a copy, for as long as the block; safe after it."""
    domain.write(AT, bytes(range(14)))
    with memory.structure(AT, Descriptor, owner="ring") as descriptor:
        assert [info.owner for info in cache.leases()] == ["ring"]
        assert descriptor.address == 0x0706050403020100
        descriptor.flags = 0xBEEF
        assert domain.read(AT + 12, 2) == b"\xef\xbe"
        domain.write(AT + 8, b"\1\0\0\0")
        assert descriptor.length == 1
    assert cache.leases() == ()
    assert descriptor.length == 1
    direction = DmaDirection.TO_DEVICE
    with memory.structure(AT, Descriptor, direction=direction) as copy:
        copy.flags = 0
    assert domain.read(AT + 12, 2) == b"\xef\xbe"
    with pytest.raises(TypeError, match=r"layout must be a ctypes\.Structure class"):
        with memory.structure(AT, int):  # type: ignore[type-var] # wrong on purpose
            pass


def test_a_structure_over_a_read_only_source_is_a_private_copy(tmp_path: Path) -> None:
    """By default; an image can be changed by nobody, and a direction that writes is refused."""
    path = tmp_path / "guest.raw"
    path.write_bytes(bytes(range(14)) + bytes(4082))
    with open_cache(f"raw:{path}") as cache:
        memory = GuestMemory(cache)
        with memory.structure(0, Descriptor) as descriptor:
            assert cache.leases()[0].direction is DmaDirection.TO_DEVICE
            assert descriptor.address == 0x0706050403020100
            descriptor.address = 1
        assert cache.read(0, 8) == bytes(range(8))
        with pytest.raises(UnsupportedOperationError, match="is read-only"):
            with memory.structure(0, Descriptor, direction="bidirectional"):
                pass


def test_a_structure_larger_than_its_view_is_refused(cache: MapCache) -> None:
    """A view that is too small is refused by ctypes itself."""
    with cache.map_dma(AT, 13, owner="t") as lease:
        with pytest.raises(ValueError, match="Buffer size too small"):
            Descriptor.from_buffer(lease.view)


def test_segments_move_data_without_a_copy(
    domain: MockDomain, memory: GuestMemory, tmp_path: Path
) -> None:
    """A scatter-gather list goes straight into preadv and pwritev."""
    ranges = [(AT + BUCKET - 2, 4), (AT, 1), (AT + 0x5000, 5)]
    source = tmp_path / "disk"
    source.write_bytes(b"0123456789")
    fd = os.open(source, os.O_RDWR)
    try:
        with memory.segments(ranges) as segments:
            assert os.preadv(fd, segments.views, 0) == 10
        assert [domain.read(*each) for each in ranges] == [b"0123", b"4", b"56789"]
        with memory.segments(ranges, direction=DmaDirection.TO_DEVICE) as segments:
            assert os.pwritev(fd, segments.views, 10) == 10
    finally:
        os.close(fd)
    assert source.read_bytes() == b"0123456789" * 2


def test_segments_are_all_or_nothing(memory: GuestMemory, cache: MapCache) -> None:
    """A hole in one range leaves no lease of the others."""
    with pytest.raises(FaultError), memory.segments([(AT, 8), (HOLE[0], 8)]):
        pass
    assert cache.leases() == ()


@pytest.mark.parametrize("pattern", [b"NEEDLE", re.compile(rb"NEE[A-Z]LE")])
def test_find_gives_every_match_once(
    domain: MockDomain, memory: GuestMemory, pattern: bytes | re.Pattern[bytes]
) -> None:
    """Across the edges of pages, buckets and chunks, next to holes, at both ends of memory."""
    end = 16 << 20
    places = [
        0,
        0x1FFE,
        BUCKET - 3,
        HOLE[0] - 6,
        HOLE[0] + HOLE[1],
        HOLE[0] + HOLE[1] + (1 << 20) - 3,
        0x300000 - 3,
        0x300003,
        end - 6,
    ]
    for place in places:
        domain.write(place, b"NEEDLE")
    domain.write(HOLE[0] - 20, b"NEED")  # no match that a hole cuts off
    assert [address for address, _ in memory.find(pattern)] == places
    assert list(memory.find(pattern, 0x1FFF, BUCKET - 0x1FFF + 2)) == []
    assert next(memory.find(pattern, 1))[0] == 0x1FFE


def test_find_knows_what_cannot_be_found(memory: GuestMemory, backend: Backend) -> None:
    """Patterns of the wrong kind, empty ones, and an unknown end of memory are refused at once."""
    with pytest.raises(TypeError, match="compiled from bytes"):
        memory.find(re.compile("text"))  # type: ignore[arg-type] # wrong on purpose
    with pytest.raises(TypeError, match="must be bytes or a compiled pattern"):
        memory.find("text")  # type: ignore[arg-type] # wrong on purpose
    for empty in (b"", re.compile(rb"x*")):
        with pytest.raises(ValueError, match="matches the empty string"):
            memory.find(empty)
    type(backend).memory_end = property(lambda _: None)  # type: ignore[assignment] # for this test alone
    try:
        with pytest.raises(ValueError, match="give a length"):
            memory.find(b"x")
        assert list(memory.find(b"x", 0, 0x1000)) == []
    finally:
        type(backend).memory_end = property(lambda self: self.domain.memory_end)  # type: ignore[assignment] # for this test alone


def test_a_block_that_raises_ends_its_leases(memory: GuestMemory, cache: MapCache) -> None:
    """structure() and segments() release when the body raises."""
    with pytest.raises(LeaseError), memory.structure(AT, Descriptor):
        raise LeaseError("the body's own")
    with pytest.raises(LeaseError), memory.segments([(AT, 8)]):
        raise LeaseError("the body's own")
    assert cache.leases() == ()


class Named(ctypes.LittleEndianStructure):
    _fields_ = [("length", ctypes.c_uint64), ("name", ctypes.c_char_p)]


class Ring(ctypes.LittleEndianStructure):
    _fields_ = [("entries", Named * 2)]


class Listed(ctypes.LittleEndianStructure):
    _fields_ = [("next", ctypes.POINTER(ctypes.c_uint32))]


class Derived(Listed):
    _fields_ = [("more", ctypes.c_uint8)]


class Either(ctypes.Union):
    _fields_ = [("callback", ctypes.CFUNCTYPE(None)), ("number", ctypes.c_uint64)]


class Nested(ctypes.LittleEndianStructure):
    _fields_ = [("either", Either)]


@pytest.mark.parametrize("layout", [Named, Ring, Listed, Derived, Nested])
def test_structures_with_pointers_are_refused(
    memory: GuestMemory, cache: MapCache, layout: type[ctypes.Structure]
) -> None:
    """The guest would choose which of this process's memory is read, or crash it."""
    with pytest.raises(TypeError, match=f"{layout.__name__} has pointers"):
        with memory.structure(AT, layout):
            pass
    assert cache.leases() == ()


def test_find_does_not_repeat_or_lose_at_the_edge_of_a_piece(
    domain: MockDomain, memory: GuestMemory
) -> None:
    """A match that crosses the edge is not found again after it; max_match is checked."""
    domain.write(0x300000 - 8, b"x" * 16)
    pattern = re.compile(rb"x+")
    assert list(memory.find(pattern, 0x200000)) == [(0x300000 - 8, b"x" * 16)]
    domain.write(0x300000 - 8, bytes(12) + b"x" * 8)  # begins after it, and is seen in part
    assert list(memory.find(pattern, 0x200000, max_match=8)) == [(0x300000 + 4, b"x" * 8)]
    for wrong in (0, -4096):
        with pytest.raises(ValueError, match="max_match must be at least 1, not"):
            memory.find(pattern, max_match=wrong)


def test_find_maps_as_it_goes(domain: MockDomain, backend: Backend) -> None:
    """The first match costs the first buckets only; pages that balloon out later are skipped."""
    cache = MapCache(backend)
    memory = GuestMemory(cache)
    domain.write(0x10, b"needle")
    domain.write(0x900000, b"needle")
    found = memory.find(b"needle")
    assert next(found)[0] == 0x10
    assert cache.stats().maps <= 2
    domain.on_invalidate(cache.invalidate)
    domain.balloon_out(0x500000, 0x1000)
    assert [address for address, _ in found] == [0x900000]


def test_find_passes_over_what_is_known_to_be_a_hole(tmp_path: Path) -> None:
    """A file that says it has a page at the end of all addresses takes no longer for it."""
    path = lime(tmp_path / "far", {0x1000: b"needle".ljust(4096), (1 << 52) - 4096: b"x" * 4096})
    with open_source(path) as backend, MapCache(backend) as cache:
        memory = GuestMemory(cache)
        assert list(memory.find(b"needle")) == [(0x1000, b"needle")]
        assert [address for address, _ in memory.strings()] == [0x1000, (1 << 52) - 4096]


def test_a_long_match_right_after_an_edge_is_whole(domain: MockDomain, memory: GuestMemory) -> None:
    """A part of it was read together with what lies before the edge, and does not count."""
    domain.write(0x30000A, b"x" * 6000)
    assert list(memory.find(re.compile(b"x+"), 0x200000)) == [(0x30000A, b"x" * 6000)]


@pytest.mark.parametrize("pattern", [b"a", b"ab", b"aba", b"abcabcab" * 700])
def test_plain_bytes_are_found_as_python_finds_them(
    domain: MockDomain, memory: GuestMemory, pattern: bytes
) -> None:
    """Dense and far apart, adjacent and overlapping, shorter and longer than a page."""
    text = bytearray(b"ab" * 10 + b"aba" * 30 + b"." * 5000 + b"abcabcab" * 2000 + b"." * 9000)
    text += b"ab.aba" + bytes(4096 - 3) + b"abaaba"
    start = 0x300000 - 7000  # so that the edge of a piece is amid
    domain.write(start, bytes(text))
    expected = []
    found = text.find(pattern)
    while found >= 0:
        expected.append((start + found, pattern))
        found = text.find(pattern, found + len(pattern))
    assert expected
    assert list(memory.find(pattern)) == expected


def test_find_needs_no_more_than_one_bucket(domain: MockDomain, backend: Backend) -> None:
    """Pieces are gone through bucket by bucket, so the least max_resident is enough."""
    domain.write(0x300000 - 3, b"needle")
    with MapCache(backend, bucket_shift=12, max_resident=4096) as cache:
        memory = GuestMemory(cache)
        assert list(memory.find(b"needle", 0x200000)) == [(0x300000 - 3, b"needle")]
        assert list(memory.strings(0x200000)) == [(0x300000 - 3, "needle")]
        seen = bytearray()
        for view in cache.views(0x300000 - 3, 6):
            assert view.readonly
            seen += view
            del view
        assert seen == b"needle"


def test_strings_are_runs_of_printable_characters(domain: MockDomain, memory: GuestMemory) -> None:
    """In one byte a character or in two, over the edges of pieces, ended by holes."""
    domain.write(0x10, b'abc\0\x7fwith\ttab \x80~!"#')
    domain.write(HOLE[0] - 3, b"end")
    domain.write(sum(HOLE), b"begin")
    domain.write(0x300000 - 3, b"over the edge")
    domain.write(0x400001, "wide \u00e9 text".encode("utf-16le"))
    assert list(memory.strings()) == [
        (0x15, "with\ttab "),
        (0x1F, '~!"#'),
        (sum(HOLE), "begin"),
        (0x300000 - 3, "over the edge"),
    ]
    assert (HOLE[0] - 3, "end") in memory.strings(min_length=3)
    assert list(memory.strings(0x300000, 10)) == [(0x300000, "r the edge")]
    wide = [(0x400001, "wide "), (0x400001 + 12, " text")]
    assert [each for each in memory.strings(encoding="utf-16le") if each[0] > 0x400000] == wide
    with pytest.raises(ValueError, match="min_length must be at least 1, not 0"):
        memory.strings(min_length=0)
    list(memory.strings(min_length=65536))
    with pytest.raises(ValueError, match="min_length must be at most 65536, not 65537"):
        memory.strings(min_length=65537)
    with pytest.raises(ValueError, match="min_length must be at most 32768, not 32769"):
        memory.strings(min_length=32769, encoding="utf-16le")
    with pytest.raises(ValueError, match="encoding must be one of ascii, utf-16le, not 'utf-8'"):
        memory.strings(encoding="utf-8")  # type: ignore[arg-type] # wrong on purpose


def test_a_long_string_comes_whole(domain: MockDomain, memory: GuestMemory) -> None:
    """Up to 64 KiB, wherever it lies."""
    domain.write(0x300000 - 10, b"x" * 65536)
    assert list(memory.strings(0x200000)) == [(0x300000 - 10, "x" * 65536)]


def test_a_page_that_goes_during_a_search(
    domain: MockDomain, cache: MapCache, memory: GuestMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was there when it was looked at, and is ballooned out by then, is a hole as others."""
    for address in (AT, HOLE[0] - 0x100):
        domain.write(address, b"needle")
    present = cache.present

    def going(address: int, length: int) -> Iterator[tuple[int, int]]:
        for found in present(address, length):
            if found[0] <= AT < sum(found):
                domain.balloon_out(AT, 0x1000)
                cache.invalidate()
            yield found

    monkeypatch.setattr(cache, "present", going)
    assert [address for address, _ in memory.find(b"needle")] == [HOLE[0] - 0x100]


def test_a_long_pattern_over_the_edge_of_a_piece(domain: MockDomain, cache: MapCache) -> None:
    """Plain bytes longer than max_match are found wherever they lie."""
    pattern = bytes(range(1, 256)) * 40
    domain.write(0x300000 - 20, pattern)
    assert list(GuestMemory(cache).find(pattern)) == [(0x300000 - 20, pattern)]


def test_a_search_goes_on_behind_what_went_meanwhile(
    domain: MockDomain, cache: MapCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page that goes takes its run with it, and not the other runs of its MiB."""
    domain.write(sum(HOLE), b"needle")
    present = cache.present

    def going(address: int, length: int) -> Iterator[tuple[int, int]]:
        for found in present(address, length):
            if found[0] == 0:
                domain.balloon_out(0x1000, 0x1000)
                cache.invalidate()
            yield found

    monkeypatch.setattr(cache, "present", going)
    assert [address for address, _ in GuestMemory(cache).find(b"needle")] == [sum(HOLE)]


def test_memory_behind_a_hole_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a hole ends with a chunk of the search, what follows is left to the next chunk."""
    guest = MockHypervisor().create_domain(memory="4M", holes=[(0xF0000, 0x10000)])
    guest.write(0x100000, b"needle")
    filled: list[int] = []
    fill = search._fill

    def noted(cache: MapCache, text: bytearray, address: int, length: int) -> None:
        filled.append(address)
        fill(cache, text, address, length)

    monkeypatch.setattr(search, "_fill", noted)
    with open_backend("mock", domain=guest) as backend, MapCache(backend) as cache:
        assert list(GuestMemory(cache).find(b"needle")) == [(0x100000, b"needle")]
    assert filled == [0, 0x100000, 0x200000, 0x300000]


def test_a_search_ends_with_its_last_byte(domain: MockDomain, cache: MapCache) -> None:
    """Also when that is the first of a piece, and the search began with the last of another."""
    domain.write(0x200000 - 1, b"ab")
    memory = GuestMemory(cache)
    assert list(memory.find(b"b", 0x200000 - 1, 2)) == [(0x200000, b"b")]
    assert list(memory.find(b"b", 0x200000 - 1, 1)) == []


def test_a_search_behind_the_end_of_memory(cache: MapCache) -> None:
    """Nothing can be found there, and no error is raised."""
    assert list(GuestMemory(cache).find(b"x", 17 << 20)) == []
    assert list(GuestMemory(cache).strings(17 << 20)) == []


def test_directions_reach_the_leases(cache: MapCache) -> None:
    """Of structures and of lists: a migration is told of writes, and a report says which way."""
    memory, way = GuestMemory(cache), DmaDirection.TO_DEVICE

    class Header(ctypes.LittleEndianStructure):
        _fields_ = (("magic", ctypes.c_uint32),)

    with memory.structure(AT, Header, owner="s", direction=way):
        with memory.segments([(AT, 8)], owner="l", direction=way) as segments:
            assert [view.readonly for view in segments.views] == [True]
            assert [(info.owner, info.direction) for info in cache.leases()] == [
                ("s", way),
                ("l", way),
            ]
