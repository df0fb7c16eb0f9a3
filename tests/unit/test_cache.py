"""MapCache: plain access, holes, eviction, invalidation, close."""

from __future__ import annotations

import array
import errno
import gc
import logging
import pickle
import threading
import tracemalloc
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext

import pytest

from tests.conftest import HOLE
from xenmapcache import (
    Backend,
    CacheFullError,
    ClosedError,
    DmaDirection,
    FaultError,
    Lease,
    LeaseError,
    MapCache,
    Mapping,
    MockDomain,
    MockHypervisor,
    XenCallError,
    open_backend,
)
from xenmapcache.buckets import _Claim, _Pending

BUCKET = 1 << 16


def maps(domain: MockDomain) -> int:
    return sum(call.name == "map" for call in domain.calls)


def heat(cache: MapCache, address: int) -> None:
    """Have a bucket without holes found without a look at anything else, from now on."""
    cache.read(address, 1)  # maps it
    cache.read(address, 1)  # lets it in
    assert address >> 16 in cache._readable


# --- plain access ---


@pytest.mark.parametrize(
    ("address", "length"),
    [
        (0, 1),
        (0x1FFD, 8),  # 1 in 10 guest installs crashed: an access that straddles a page,
        (BUCKET - 4, 8),  # and then a bucket
        (BUCKET - 1, BUCKET),
        (BUCKET // 2, 3 * BUCKET),
        (0x3000, 0),
    ],
)
def test_read_is_what_the_guest_sees(
    domain: MockDomain, cache: MapCache, address: int, length: int
) -> None:
    """Reads return the guest's bytes, inside pages and over their edges, cold and hot."""
    domain.write(address, bytes(range(1, 256)) * (length // 255) + b"\xff" * (length % 255))
    expected = domain.read(address, length)
    for _ in range(3):
        assert cache.read(address, length) == expected
    buffer = bytearray(length)
    cache.read_into(address, buffer)
    assert buffer == expected


@pytest.mark.parametrize("address", [0x2000, 0x2FFC, BUCKET - 3, 2 * BUCKET - BUCKET // 2])
@pytest.mark.parametrize("length", [1, 8, 5000, 2 * BUCKET])
def test_the_guest_sees_what_is_written(
    domain: MockDomain, cache: MapCache, address: int, length: int
) -> None:
    """Writes arrive, cold and hot, and neighbours keep their bytes."""
    for fill in (b"\x11", b"\x22", b"\x33"):
        cache.write(address, fill * length)
        assert domain.read(address - 1, length + 2) == b"\0" + fill * length + b"\0"


@pytest.mark.parametrize(
    "data",
    [
        bytearray(b"12345678"),
        memoryview(b"12345678"),
        array.array("Q", [0x3837363534333231]),
        memoryview(bytearray(b"12345678")).cast("H"),
        memoryview(bytearray(b"12345678")).cast("B", (2, 4)),
        memoryview(b"1.2.3.4.5.6.7.8.")[::2],
        memoryview(array.array("H", b"12xx34xx56xx78xx"))[::2],
    ],
    ids=["bytearray", "memoryview", "array", "shorts", "matrix", "strided", "strided-shorts"],
)
def test_any_buffer_is_written_by_its_bytes(
    domain: MockDomain, cache: MapCache, data: bytes
) -> None:
    """A buffer's items do not matter, its bytes do, on the cold and on the hot path."""
    cache.write(0x2000, data)
    heat(cache, 0x2000)
    cache.write(0x2008, data)
    assert domain.read(0x2000, 17) == b"12345678" * 2 + b"\0"


@pytest.mark.parametrize("hot", [False, True])
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda c: c.read(-1, 8), ValueError, "address -0x1 is negative"),
        (lambda c: c.read(0x2000, -8), ValueError, "length -0x8"),
        (lambda c: c.read(0x2003, -5), ValueError, "length -0x5"),
        (lambda c: c.read(1 << 52, 8), ValueError, "ends beyond"),
        (lambda c: c.read(0x2000, 1 << 64), ValueError, "ends beyond"),
        (lambda c: c.read("0x2000", 8), TypeError, "address must be an int, not str"),
        (lambda c: c.read(0x2000, 8.0), TypeError, "length must be an int, not float"),
        (lambda c: c.write(-8, b"x"), ValueError, "address -0x8 is negative"),
        (lambda c: c.write(0x2000, "text"), TypeError, "data must be bytes or another buffer"),
        (lambda c: c.write(0x2000, None), TypeError, "data must be bytes or another buffer"),
        (lambda c: c.write(0x2000, [1, 2]), TypeError, "data must be bytes or another buffer"),
        (lambda c: c.write(None, b"x"), TypeError, "address must be an int, not NoneType"),
        (lambda c: c.read_into(0x2000, bytes(8)), TypeError, "read-only"),
        (lambda c: c.read_into(0x2000, 8), TypeError, "buffer must be bytes or another"),
        (
            lambda c: c.read_into(0x2000, memoryview(bytearray(8))[::2]),
            ValueError,
            "scattered",
        ),
        (lambda c: c.map_dma(0x2000, 0, owner="t"), ValueError, "length at address 0x2000 is 0"),
        (lambda c: c.map_dma(-1, 8, owner="t"), ValueError, "address -0x1"),
        (lambda c: c.map_dma(0x2000, -1, owner="t"), ValueError, "length -0x1"),
        (lambda c: c.map_dma(0x2000, 1 << 60, owner="t"), ValueError, "ends beyond"),
        (lambda c: c.map_dma("a", 8, owner="t"), TypeError, "address must be an int"),
        (lambda c: c.map_dma(0x2000, 8, owner=None), TypeError, "owner must be a str"),
        (
            lambda c: c.map_dma(0x2000, 8, owner="t", direction="to-device"),
            TypeError,
            "direction must be a DmaDirection",
        ),
        (lambda c: c.map_device(0x2000, 0, owner="t"), ValueError, "is 0"),
        (lambda c: c.map_device(0x2000, 8, owner=3), TypeError, "owner must be a str"),
        (lambda c: c.resolve("x"), TypeError, "host_address must be an int"),
        (lambda c: c.replace(0x1000, 0x2001, 8), ValueError, "different offsets"),
        (lambda c: list(c.present(-1, 8)), ValueError, "address -0x1"),
    ],
)
def test_bad_arguments_are_named_and_change_nothing(
    domain: MockDomain,
    cache: MapCache,
    call: Callable[[MapCache], object],
    error: type[Exception],
    message: str,
    hot: bool,
) -> None:
    """Each wrong argument gets its own exact error, whether the bucket is resident or not."""
    if hot:
        heat(cache, 0x2000)
    with pytest.raises(error, match=message):
        call(cache)
    assert cache.leases() == ()
    assert domain.read(0x2000, 8) == bytes(8)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bucket_shift": 11}, ValueError, "bucket_shift 11 is not in 12..30"),
        ({"bucket_shift": 31}, ValueError, "bucket_shift 31 is not in 12..30"),
        ({"bucket_shift": 16.0}, TypeError, "bucket_shift must be an int"),
        ({"max_resident": 4096}, ValueError, "max_resident 0x1000 is less than one bucket"),
        ({"max_resident": "lots"}, ValueError, "'lots' is not a size"),
        ({"on_stale": "ignore"}, ValueError, "on_stale 'ignore' is none of"),
    ],
)
def test_bad_options_are_named(
    backend: Backend, options: dict[str, object], error: type[Exception], message: str
) -> None:
    """A cache with wrong options is not made."""
    with pytest.raises(error, match=message):
        MapCache(backend, **options)  # type: ignore[arg-type] # some wrong on purpose


def test_a_cache_needs_a_backend() -> None:
    """Anything else is a TypeError that says where backends come from."""
    with pytest.raises(TypeError, match=r"backend must be a Backend, as open_backend\(\) returns"):
        MapCache("mock")  # type: ignore[arg-type] # wrong on purpose


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("qemu", {}, ValueError, "backend 'qemu' is unknown: there are 'coredump', 'elf"),
        ("mock", {}, TypeError, "either domain= or memory="),
        ("mock", {"domain": 3}, TypeError, "domain must be a MockDomain, not int"),
        ("mock", {"memory": "1k"}, ValueError, "memory 0x400 is not a number of whole pages"),
        ("mock", {"memory": 0}, ValueError, "whole pages"),
        ("mock", {"memory": "9999999T"}, ValueError, "whole pages"),
        ([], {}, ValueError, r"backend \[\] is unknown"),
        ("mock", {"colour": 1}, TypeError, "colour"),
        ("xen", {"domid": -1}, ValueError, "domid -1 is not in"),
        ("xen", {"domid": "guest"}, TypeError, "domid must be an int, not str"),
        ("xen", {}, TypeError, "domid"),
        ("xenctrl", {"domid": 0x7FF0}, ValueError, "domid 32752 is not in"),
    ],
)
def test_backends_are_opened_by_their_right_name_and_options(
    name: str, options: dict[str, object], error: type[Exception], message: str
) -> None:
    """An unknown name or a wrong option says what there is."""
    with pytest.raises(error, match=message):
        open_backend(name, **options)


# --- holes ---


@pytest.mark.parametrize(
    ("address", "length"),
    [
        (HOLE[0], 8),  # at the start
        (HOLE[0] + HOLE[1] - 8, 16),
        (HOLE[0] - 8, HOLE[1] + 16),  # in the middle
        (HOLE[0] - 0x8000, 0x8000 + 1),  # at the end
        (16 << 20, 1),  # past the end of memory
        ((16 << 20) - 8, 16),
    ],
)
def test_an_access_to_a_hole_names_the_first_bad_address(
    domain: MockDomain, cache: MapCache, address: int, length: int
) -> None:
    """Read, read_into, write and leases over a hole fail, all or nothing, with the same facts."""
    bad = max(address, HOLE[0]) if address < HOLE[0] + HOLE[1] else max(address, 16 << 20)
    before = domain.read(0x90000, 0x10000)
    buffer = bytearray(b"\xee" * length)
    calls: list[Callable[[], object]] = [
        lambda: cache.read(address, length),
        lambda: cache.read_into(address, buffer),
        lambda: cache.write(address, b"\x55" * length),
        lambda: cache.map_dma(address, length, owner="t"),
        lambda: cache.map_device(address, length, owner="t"),
    ]
    for call in calls:
        with pytest.raises(FaultError, match=f"no page at {bad:#x} ") as caught:
            call()
        fault = caught.value
        assert (fault.address, fault.length) == (bad, address + length - bad)
        assert fault.errno == errno.EINVAL
    assert buffer == b"\xee" * length
    assert domain.read(0x90000, 0x10000) == before
    assert cache.leases() == ()


def test_the_neighbours_of_a_hole_read(domain: MockDomain, cache: MapCache) -> None:
    """An absent page does not take its bucket's other pages with it."""
    domain.write(HOLE[0] - 4, b"left")
    domain.write(HOLE[0] + HOLE[1], b"right")
    assert cache.read(HOLE[0] - 4, 4) == b"left"
    assert cache.read(HOLE[0] + HOLE[1], 5) == b"right"


def test_a_valid_page_stays_readable_after_a_fault_in_its_bucket(
    domain: MockDomain, backend: Backend
) -> None:
    """A valid read, a fault in the same bucket, and the read again: alive (a crash of 2008)."""
    cache = MapCache(backend)
    domain.write(0x9F000, b"alive")
    assert cache.read(0x9F000, 5) == b"alive"
    with pytest.raises(FaultError):
        cache.read(0xA0000, 1)
    assert cache.read(0x9F000, 5) == b"alive"


def test_a_hole_is_tried_again(domain: MockDomain, cache: MapCache) -> None:
    """A page that was ballooned in is found at the next access, and kept; attempts are counted."""
    for _ in range(2):
        with pytest.raises(FaultError):
            cache.read(HOLE[0], 1)
    domain.balloon_in(HOLE[0], 0x1000)
    domain.write(HOLE[0], b"new")
    for _ in range(2):
        assert cache.read(HOLE[0], 3) == b"new"
    assert cache.stats().holes == 2
    assert maps(domain) == 3


def test_a_hole_is_tried_again_where_one_bucket_has_room(
    domain: MockDomain, backend: Backend
) -> None:
    """A bucket with a hole makes room for the one that replaces it; the model test found that."""
    cache = MapCache(backend, bucket_shift=16, max_resident=1 << 16)
    beside = HOLE[0] + HOLE[1] - 0x1000
    domain.balloon_in(HOLE[0], HOLE[1] - 0x1000)
    for access in (
        lambda: cache.read(beside, 1),
        lambda: cache.map_dma(beside, 1, owner="t"),
    ):
        cache.read(beside - 0x1000, 1)
        with pytest.raises(FaultError):
            access()
    domain.balloon_in(beside, 0x1000)
    assert cache.read(beside, 1) == b"\0"


def test_present_lists_what_is_there(domain: MockDomain, cache: MapCache) -> None:
    """Ranges are half-open, exact to the byte at their ends, joined over buckets."""
    end = 16 << 20
    hole_end = HOLE[0] + HOLE[1]
    assert list(cache.present(0, end + 0x5000)) == [(0, HOLE[0]), (hole_end, end - hole_end)]
    assert list(cache.present(0x9FFF0, 0x20020)) == [(0x9FFF0, 0x10), (hole_end, 0x10)]
    assert list(cache.present(HOLE[0], 0x1000)) == []
    assert list(cache.present(0x123, 0)) == []


# --- a hit costs no call ---


def test_a_resident_bucket_is_never_mapped_again(domain: MockDomain, cache: MapCache) -> None:
    """However often it is read, written and leased, a bucket is one call and one mapping."""
    for _ in range(100):
        cache.read(0x2000, 8)
        cache.write(0x2008, b"12345678")
        cache.map_dma(0x2000, 64, owner="t").release()
    assert maps(domain) == 1
    assert cache.stats().maps == 1


def test_reads_leave_no_leases(cache: MapCache) -> None:
    """Plain accesses lock nothing (QEMU leaked a lock with every read, in 2017)."""
    for _ in range(1000):
        cache.read(0x2000, 8)
    assert cache.leases() == ()
    assert cache.stats().resident_bytes == BUCKET


# --- invalidation ---


def test_no_access_after_an_invalidation_is_stale(domain: MockDomain, cache: MapCache) -> None:
    """Pages that the guest got anew are read and written anew."""
    heat(cache, 0x20000)
    cache.write(0x20000, b"old")
    domain.on_invalidate(cache.invalidate)
    domain.balloon_out(0x20000, 0x1000)
    with pytest.raises(FaultError):
        cache.read(0x20000, 3)
    domain.balloon_in(0x20000, 0x1000)
    domain.write(0x20000, b"new")
    assert cache.read(0x20000, 3) == b"new"
    cache.write(0x20000, b"ours")
    assert domain.read(0x20000, 4) == b"ours"


def test_an_invalidation_counts_what_it_dropped(cache: MapCache) -> None:
    """Buckets and bytes are exact, and everything is unmapped when it returns."""
    for index in range(5):
        cache.read(index * BUCKET, 1)
    report = cache.invalidate()
    assert report == (1, 5, 5 * BUCKET, (), ())
    stats = cache.stats()
    assert (stats.unmaps, stats.resident_bytes, stats.resident_buckets) == (5, 0, 0)


def test_a_bucket_mapped_across_an_invalidation_is_not_kept(
    domain: MockDomain, backend: Backend, cache: MapCache
) -> None:
    """A mapping that was under way when the guest invalidated serves no later access."""
    original = backend.map

    def map_and_balloon(gfn: int, count: int, *, writable: bool) -> object:
        mapping = original(gfn, count, writable=writable)
        backend.map = original  # type: ignore[method-assign] # for this test alone
        domain.balloon_out(0x20000, 0x1000)
        cache.invalidate()
        domain.balloon_in(0x20000, 0x1000)
        domain.write(0x20000, b"fresh")
        return mapping

    backend.map = map_and_balloon  # type: ignore[method-assign,assignment] # for this test alone
    cache.read(0x20000, 5)
    assert cache.read(0x20000, 5) == b"fresh"
    backend.map = map_and_balloon  # type: ignore[method-assign,assignment] # for this test alone
    cache.invalidate()
    with cache.map_dma(0x20000, 5, owner="t") as lease:
        assert not lease.stale
        lease.view[:] = b"write"
        assert domain.read(0x20000, 5) == b"write"


def test_a_lease_of_its_own_mapped_across_an_invalidation_is_mapped_again(
    domain: MockDomain, backend: Backend, cache: MapCache
) -> None:
    """So it is for DMA over a bucket's edge: never stale without saying so."""
    original = backend.map

    def map_and_invalidate(gfn: int, count: int, *, writable: bool) -> object:
        mapping = original(gfn, count, writable=writable)
        backend.map = original  # type: ignore[method-assign] # for this test alone
        domain.balloon_out(0x20000, 0x1000)
        domain.balloon_in(0x20000, 0x1000)
        cache.invalidate()
        return mapping

    backend.map = map_and_invalidate  # type: ignore[method-assign,assignment] # for this test alone
    with cache.map_dma(0x1FF00, 0x200, owner="t") as lease:
        assert not lease.stale
        lease.view[0x100:] = b"\x77" * 0x100
        assert domain.read(0x20000, 0x100) == b"\x77" * 0x100


# --- eviction ---


def test_resident_memory_stays_under_max_resident(backend: Backend) -> None:
    """However much is touched, no more is mapped than allowed, and what was hot is still right."""
    cache = MapCache(backend, bucket_shift=16, max_resident=4 * BUCKET)
    for address in range(0x100000, 16 << 20, BUCKET):
        heat(cache, address)
        cache.write(address, b"hot")
        assert cache.stats().resident_bytes <= 4 * BUCKET
    stats = cache.stats()
    assert stats.evictions == stats.misses - 4
    assert stats.unmaps == stats.evictions


@pytest.mark.parametrize("holes", [False, True])
def test_what_is_used_is_evicted_last(domain: MockDomain, backend: Backend, holes: bool) -> None:
    """A bucket that is read between misses survives a scan of others, with holes and without."""
    if holes:
        domain.balloon_out(0x101000, 0x1000)
    cache = MapCache(backend, bucket_shift=16, max_resident=4 * BUCKET)
    cache.read(0x100000, 1)
    for address in range(0x200000, 0x300000, BUCKET):
        cache.read(address, 1)
        cache.read(0x100000, 1)
    mapped = [call.gfn for call in domain.calls if call.name == "map"]
    assert mapped.count(0x100) == 1


def test_what_is_leased_now_and_then_is_evicted_last(domain: MockDomain, backend: Backend) -> None:
    """A bucket that only transfers use, one after the other, survives a scan of others, too."""
    cache = MapCache(backend, bucket_shift=16, max_resident=4 * BUCKET)
    direction = DmaDirection.TO_DEVICE
    for address in range(0x200000, 0x300000, BUCKET):
        cache.map_dma(0x100000, 1, owner="t", direction=direction).release()
        cache.read(address, 1)
    mapped = [call.gfn for call in domain.calls if call.name == "map"]
    assert mapped.count(0x100) == 1


def test_memory_on_its_way_is_waited_for(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """A miss waits a moment for what was evicted and is still being read in another thread."""
    cache = MapCache(backend, bucket_shift=16, max_resident=BUCKET)
    with cache.map_dma(0x100000, 1, owner="t") as lease:
        view = lease.view
    monkeypatch.setattr("xenmapcache.buckets.time.sleep", lambda _: view.release())
    assert cache.read(0x200000, 1) == b"\0"


def test_leased_buckets_are_not_evicted(domain: MockDomain, backend: Backend) -> None:
    """A lease pins its bucket, its last release makes it evictable again, 70,000 holds or one."""
    cache = MapCache(backend, bucket_shift=16, max_resident=2 * BUCKET)
    direction = DmaDirection.TO_DEVICE  # or the log would hold nothing but dirty pages
    leases = [cache.map_dma(0x100000, 64, owner="t", direction=direction) for _ in range(70_000)]
    for address in range(0x200000, 0x280000, BUCKET):
        cache.read(address, 1)
    cache.read(0x100000, 1)
    assert [call.gfn for call in domain.calls if call.name == "map"].count(0x100) == 1
    for lease in leases:
        lease.release()
    for address in range(0x200000, 0x280000, BUCKET):
        cache.read(address, 1)
    cache.read(0x100000, 1)
    assert [call.gfn for call in domain.calls if call.name == "map"].count(0x100) == 2


def test_a_full_cache_says_so(domain: MockDomain, backend: Backend) -> None:
    """When all that is resident is leased or viewed, a miss raises, and a release helps."""
    cache = MapCache(backend, bucket_shift=16, max_resident=2 * BUCKET)
    lease = cache.map_dma(0x100000, 64, owner="t")
    other = cache.map_device(0x200000, BUCKET, owner="vram")
    for call in (
        lambda: cache.read(0x300000, 1),
        lambda: cache.map_device(0x300000, 1, owner="t"),
        lambda: cache.map_dma(0x30FFFF, 2, owner="t"),
    ):
        with pytest.raises(CacheFullError, match="no room for 0x[0-9a-f]+ bytes at 0x30"):
            call()
    view = other.view
    other.release()
    with pytest.raises(CacheFullError, match="in views that are kept"):
        cache.read(0x300000, 1)
    view.release()
    assert cache.read(0x300000, 1) == b"\0"
    lease.release()


def test_garbage_in_a_full_cache(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GIL what is dropped may live on until it is collected, and is before giving up."""
    cache = MapCache(backend, bucket_shift=16, max_resident=BUCKET)
    gc.disable()  # until the end: nothing else is to collect it
    try:
        for free_threaded in (False, True):
            monkeypatch.setattr("xenmapcache.buckets.FREE_THREADED", free_threaded)
            garbage: list[object] = [cache.map_dma(0x100000, 64, owner="t")]
            lease = garbage[0]
            assert isinstance(lease, Lease)
            garbage += [lease.view, garbage]
            lease.release()
            del garbage, lease
            with nullcontext() if free_threaded else pytest.raises(CacheFullError):
                cache.read(0x300000, 1)
    finally:
        gc.enable()


def test_a_claim_whose_making_was_interrupted() -> None:
    """It is of nothing, and gives nothing back."""
    freed: deque[int] = deque()
    claim = _Claim.__new__(_Claim)
    claim.freed = freed
    del claim
    assert not freed


def test_a_read_of_any_length_needs_one_bucket(domain: MockDomain, backend: Backend) -> None:
    """A plain read holds one bucket at a time, so that the least max_resident is enough."""
    cache = MapCache(backend, bucket_shift=16, max_resident=BUCKET)
    domain.write(0x300000 - 2, b"over")
    assert cache.read(0x300000 - 2, 4) == b"over"
    assert cache.read(0x200000, 1 << 20)[-2:] == b"ov"


@pytest.mark.parametrize("operation", ["write", "read_into", "map_device"])
def test_what_cannot_be_held_at_once_is_refused(backend: Backend, operation: str) -> None:
    """All-or-nothing needs the whole range resident; a plain read goes through any length."""
    cache = MapCache(backend, bucket_shift=16, max_resident=2 * BUCKET)
    length = 3 * BUCKET
    calls: dict[str, Callable[[], object]] = {
        "write": lambda: cache.write(0x100000, bytes(length)),
        "read_into": lambda: cache.read_into(0x100000, bytearray(length)),
        "map_device": lambda: cache.map_device(0x100000, length, owner="t"),
    }
    with pytest.raises(CacheFullError, match="0x30000 bytes at 0x100000 are more than"):
        calls[operation]()
    assert cache.read(0x100000, length) == bytes(length)


# --- failures of the call as a whole ---


@pytest.mark.parametrize(
    "call",
    [
        lambda c: c.read(0x300000, 8),
        lambda c: c.read_into(0x300000, bytearray(8)),
        lambda c: c.write(0x300000, b"x"),
        lambda c: c.read(0x2FFFFC, 8),
        lambda c: c.map_dma(0x300000, 8, owner="t"),
        lambda c: c.map_dma(0x2FFFFC, 8, owner="t"),
        lambda c: c.map_device(0x300000, 8, owner="t"),
        lambda c: list(c.present(0x300000, 8)),
        lambda c: c.read(HOLE[0], 1),
    ],
    ids=[
        "read",
        "read_into",
        "write",
        "read-crossing",
        "map_dma",
        "map_dma-crossing",
        "map_device",
        "present",
        "hole",
    ],
)
def test_a_failed_map_call_leaves_what_was_there(
    domain: MockDomain, cache: MapCache, call: Callable[[MapCache], object]
) -> None:
    """Each call site reports the errno, keeps books and resident buckets, and works next time."""
    with pytest.raises(FaultError):
        cache.read(HOLE[0], 1)  # leaves a bucket with holes, whose retry will fail
    cache.write(0x400000, b"kept")
    before = cache.stats()
    domain.arm("map", errno=errno.EIO, repeat=True)
    with pytest.raises(XenCallError, match=r"mock_map failed for domain 1 with EIO") as caught:
        call(cache)
    assert caught.value.errno == errno.EIO
    after = cache.stats()
    assert (after.resident_bytes, after.maps) == (before.resident_bytes, before.maps)
    assert cache.read(0x400000, 4) == b"kept"
    assert cache.leases() == ()
    domain.disarm()
    try:
        result = call(cache)
    except FaultError as fault:
        assert fault.address == HOLE[0]
    else:
        assert result is not XenCallError
    cache.read(0x300000, 8)


def test_one_bad_page_of_a_call_is_a_hole(domain: MockDomain, cache: MapCache) -> None:
    """A page's own errno reaches the FaultError; its neighbours read; it is tried again."""
    domain.arm("map", gfn=0x201, errno=errno.EPERM)
    assert cache.read(0x200000, 8) == bytes(8)
    domain.arm("map", gfn=0x201, errno=errno.EPERM)
    with pytest.raises(FaultError) as caught:
        cache.read(0x200FFC, 8)
    assert (caught.value.address, caught.value.errno) == (0x201000, errno.EPERM)
    assert cache.read(0x200FFC, 8) == bytes(8)


def test_enomem_gives_back_and_tries_again(domain: MockDomain, cache: MapCache) -> None:
    """When the kernel's limit is lower than ours, unleased buckets go, and the call repeats."""
    for index in range(4):
        cache.read(0x100000 + index * BUCKET, 1)
    domain.arm("map", errno=errno.ENOMEM)
    assert cache.read(0x300000, 1) == b"\0"
    assert cache.stats().evictions == 4
    assert cache.stats().resident_buckets == 1
    domain.arm("map", errno=errno.ENOMEM, repeat=True)
    with pytest.raises(XenCallError, match="ENOMEM"):
        cache.read(0x400000, 1)


# --- threads ---


def test_threads_that_miss_the_same_bucket_map_it_once(domain: MockDomain, cache: MapCache) -> None:
    """One thread maps, the others wait for it: never two mappings of one bucket."""
    domain.arm("map", delay=0.05)
    barrier = threading.Barrier(8)
    results = []

    def read() -> None:
        barrier.wait()
        results.append(cache.read(0x200000, 8))

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [bytes(8)] * 8
    assert maps(domain) == 1


def test_a_thread_that_failed_leaves_the_bucket_to_the_next(
    domain: MockDomain, cache: MapCache
) -> None:
    """A failed map wakes who waits; each tries for itself."""
    domain.arm("map", errno=errno.EIO, delay=0.05)
    barrier = threading.Barrier(4)
    outcomes = []

    def read() -> None:
        barrier.wait()
        try:
            outcomes.append(cache.read(0x200000, 1))
        except XenCallError:
            outcomes.append(b"failed")

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == [b"\0", b"\0", b"\0", b"failed"]


# --- close ---


@pytest.mark.parametrize(
    "call",
    [
        lambda c: c.read(0x2000, 8),
        lambda c: c.read(0x2000, 0),
        lambda c: c.read_into(0x2000, bytearray(8)),
        lambda c: c.write(0x2000, b"x"),
        lambda c: c.map_dma(0x2000, 8, owner="t"),
        lambda c: c.map_device(0x2000, 8, owner="t"),
        lambda c: c.invalidate(),
        lambda c: c.replace(0x1000, 0x2000, 8),
        lambda c: list(c.present(0, 8)),
    ],
)
def test_a_closed_cache_refuses(
    domain: MockDomain, cache: MapCache, call: Callable[[MapCache], object]
) -> None:
    """Every access after close raises ClosedError, resident or not; statistics still answer."""
    heat(cache, 0x2000)
    cache.close()
    cache.close()
    with pytest.raises(ClosedError, match="this map cache is closed"):
        call(cache)
    assert cache.stats().resident_bytes == 0
    assert cache.leases() == ()


def test_close_names_the_leases_that_are_held(cache: MapCache) -> None:
    """Close with leases raises and changes nothing; by force it drops them, views stay safe."""
    lease = cache.map_dma(0x2000, 8, owner="disk0", direction=DmaDirection.FROM_DEVICE)
    with pytest.raises(
        LeaseError, match=r"leases are held \(1\): DMA lease of 'disk0': address 0x2000"
    ):
        cache.close()
    view = lease.view
    view[:] = b"12345678"
    assert cache.read(0x2000, 8) == b"12345678"
    cache.close(force=True)
    assert bytes(view) == b"12345678"
    assert lease.released


def test_close_names_ten_leases(cache: MapCache) -> None:
    """Of more it says how many."""
    for more in ("Release them", "and 1 more. Release them"):
        cache.map_dma(0x2000, 8, owner="t")
        for _ in range(9):
            if len(cache.leases()) < 10:
                cache.map_dma(0x2000, 8, owner="t")
        with pytest.raises(LeaseError, match=rf"age [0-9.]+ s[.;] {more}"):
            cache.close()


def test_forced_close_warns_of_each_lease(
    cache: MapCache, caplog: pytest.LogCaptureFixture
) -> None:
    """What is dropped by force is named in a WARNING."""
    cache.map_dma(0x2000, 8, owner="disk0")
    with caplog.at_level(logging.WARNING, "xenmapcache"):
        cache.close(force=True)
    assert [record.getMessage() for record in caplog.records if "'disk0'" in record.getMessage()]


def test_an_exception_is_not_hidden_by_its_leases(backend: Backend) -> None:
    """Leaving the with block by an exception drops the leases and lets it through."""
    with pytest.raises(KeyError), MapCache(backend) as cache:
        cache.map_dma(0x2000, 8, owner="t")
        raise KeyError("the caller's own")
    with pytest.raises(ClosedError):
        cache.read(0, 1)


def test_a_closed_backend_refuses_to_map(backend: Backend, cache: MapCache) -> None:
    """What is resident stays readable, what is not raises ClosedError."""
    cache.read(0x2000, 1)
    backend.close()
    assert cache.read(0x2000, 1) == b"\0"
    with pytest.raises(ClosedError, match="mock backend is closed"):
        cache.read(0x200000, 1)


# --- errors as data ---


@pytest.mark.parametrize(
    "error",
    [
        FaultError(0xA0000, 8, errno.EINVAL),
        XenCallError("xenforeignmemory_map2", 3, errno.ESRCH, "no such domain"),
    ],
)
def test_errors_survive_pickling(error: Exception) -> None:
    """Errors cross process borders with their facts."""
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))


def test_dirty_pages_are_told(domain: MockDomain, cache: MapCache) -> None:
    """A write over several pages dirties all of them and no other; nothing for an empty one."""
    cache.write(0x20FFF, bytes(0x1002))
    cache.write(0x20FFF, b"")
    assert domain.dirty == {0x20, 0x21, 0x22}
    domain.dirty.clear()
    heat(cache, 0x20000)
    cache.write(0x23010, b"hot")
    assert domain.dirty == {0x23}


def test_small_buckets_work(domain: MockDomain) -> None:
    """One page a bucket is the least, and right."""
    hypervisor = MockHypervisor()
    guest = hypervisor.create_domain(memory="64k")
    with open_backend("mock", domain=guest) as backend, MapCache(backend, bucket_shift=12) as cache:
        guest.write(0xFFC, b"12345678")
        assert cache.read(0xFFC, 8) == b"12345678"
        assert cache.stats().maps == 2


def test_an_exception_that_is_kept_keeps_no_memory(domain: MockDomain, cache: MapCache) -> None:
    """Tracebacks hold frames; no frame of ours holds the mapping that the fault was found in."""
    gc.disable()
    try:
        kept = []
        for call in (
            lambda: cache.read(HOLE[0], 1),
            lambda: cache.map_dma(HOLE[0] - 8, 16, owner="t"),
            lambda: cache.map_device(HOLE[0], 1, owner="t"),
        ):
            with pytest.raises(FaultError) as caught:
                call()
            kept.append(caught.value)
        cache.invalidate()
        assert cache.stats().resident_bytes == 0
        assert len(kept) == 3
    finally:
        gc.enable()


def test_a_hit_takes_no_lock(cache: MapCache) -> None:
    """Reads and writes of a resident bucket go on while another thread holds the cache's lock."""
    heat(cache, 0x2000)
    done = []

    def hit() -> None:
        cache.write(0x2000, b"12345678")
        done.append(cache.read(0x2000, 8))

    with cache._lock:
        thread = threading.Thread(target=hit)
        thread.start()
        thread.join(10)
        assert done == [b"12345678"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
def test_whatever_a_backend_raises_the_books_are_right(
    backend: Backend, cache: MapCache, error: type[BaseException]
) -> None:
    """An interrupt or a bug in the middle of a map leaves no claim and no note behind."""

    def broken(gfn: int, count: int, *, writable: bool) -> object:
        raise error

    original, backend.map = backend.map, broken  # type: ignore[method-assign,assignment] # for this test alone
    for call in (
        lambda: cache.read(0x2000, 1),
        lambda: cache.map_device(0x2000, 1, owner="t"),
    ):
        with pytest.raises(error):
            call()
    backend.map = original  # type: ignore[method-assign] # for this test alone
    assert cache.stats().resident_bytes == 0
    assert cache._pending == {}
    assert cache.read(0x2000, 1) == b"\0"
    assert cache.stats().resident_bytes == BUCKET


def test_a_failed_retry_of_a_hole_keeps_the_bucket(domain: MockDomain, cache: MapCache) -> None:
    """What is resident beside a hole stays resident when the hole is still one."""
    cache.read(0x9F000, 1)
    kept = cache._buckets[0x9]
    for _ in range(2):
        with pytest.raises(FaultError):
            cache.map_dma(0x9FFF0, 0x20, owner="t")
    cache.read(0xB0000 - 0x11000, 1)
    assert cache._buckets[0x9] is kept
    with pytest.raises(FaultError):
        cache.read(0xA0000, 1)
    hole = cache._buckets[0xA]
    with pytest.raises(FaultError):
        cache.read(0xA0000, 1)
    assert cache._buckets[0xA] is hole


def test_an_edge_is_crossed_with_room_for_one_bucket(domain: MockDomain, backend: Backend) -> None:
    """The least max_resident is enough for writes and read_into over an edge, all or nothing."""
    cache = MapCache(backend, bucket_shift=16, max_resident=BUCKET)
    cache.write(0x300000 - 4, b"12345678")
    assert domain.read(0x300000 - 4, 8) == b"12345678"
    buffer = bytearray(8)
    cache.read_into(0x300000 - 4, buffer)
    assert buffer == b"12345678"
    with pytest.raises(FaultError, match=f"no page at {HOLE[0]:#x} "):
        cache.write(HOLE[0] - 4, b"12345678")
    assert domain.read(HOLE[0] - 4, 4) == bytes(4)


def test_a_huge_read_copies_nothing_in_vain(backend: Backend) -> None:
    """A length far beyond the end is a fault at the end, before a byte is copied."""
    tracemalloc.start()
    cache = MapCache(backend)
    with pytest.raises(FaultError, match="no page at 0x1000000 "):
        cache.read(HOLE[0] + HOLE[1], 1 << 51)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_a_huge_read_is_all_there(domain: MockDomain) -> None:
    """A read over the size at which it looks first gives every byte, from its edges too."""
    guest = MockHypervisor().create_domain(memory="66M")
    guest.write(0, b"first")
    guest.write(guest.memory_end - 4, b"last")
    with open_backend("mock", domain=guest) as backend, MapCache(backend) as cache:
        data = cache.read(0, guest.memory_end)
    assert (len(data), data[:5], data[-4:]) == (66 << 20, b"first", b"last")


def test_nothing_is_written(domain: MockDomain, cache: MapCache) -> None:
    """No bytes, written where a bucket can be hit, make no page dirty."""
    for _ in range(3):
        cache.read(0x2000, 1)
    cache.write(0x2000, b"")
    assert domain.dirty == set()


def test_a_miss_in_the_middle_of_the_same_miss(
    domain: MockDomain, cache: MapCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal handler that reads the bucket which its thread is mapping waits for nobody."""
    domain.write(0x2000, b"here")
    original, nested = cache.backend.map, []

    def interrupted(gfn: int, count: int, *, writable: bool) -> Mapping:
        monkeypatch.setattr(cache.backend, "map", original)
        nested.append(cache.read(0x2000, 4))
        return original(gfn, count, writable=writable)

    monkeypatch.setattr(cache.backend, "map", interrupted)
    assert [cache.read(0x2000, 4), *nested] == [b"here"] * 2
    assert maps(domain) == 2
    assert cache._pending == {}
    assert cache.stats().resident_bytes == BUCKET


@pytest.mark.parametrize("hot", [False, True])
def test_pages_are_told_when_they_are_written(
    domain: MockDomain, backend: Backend, monkeypatch: pytest.MonkeyPatch, hot: bool
) -> None:
    """A migration that takes the pages between report and write would miss what is written."""
    seen: list[bytes] = []
    monkeypatch.setattr(backend, "mark_dirty", lambda *_: seen.append(domain.read(0x2000, 3)))
    cache = MapCache(backend, bucket_shift=16)
    for _ in range(2 * hot):
        cache.read(0x2000, 1)
    assert (0 in cache._writable) == hot
    cache.write(0x2000, b"new")
    assert seen == [b"new"]


CALLS: dict[str, Callable[[MapCache], object]] = {
    "read": lambda cache: cache.read(0x200000, 1),
    "map_dma": lambda cache: cache.map_dma(0x200000, 1, owner="t"),
    "map_dma-crossing": lambda cache: cache.map_dma(0x200000 - 4, 8, owner="t"),
    "map_device": lambda cache: cache.map_device(0x200000, 1, owner="t"),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_cache_that_is_closed_while_it_maps(
    backend: Backend, cache: MapCache, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """What another thread's close() overtakes is refused, and nothing stays mapped or leased."""
    original = backend.map

    def map_and_close(gfn: int, count: int, *, writable: bool) -> Mapping:
        mapping = original(gfn, count, writable=writable)
        cache.close()
        return mapping

    monkeypatch.setattr(backend, "map", map_and_close)
    with pytest.raises(ClosedError, match="this map cache is closed"):
        CALLS[call](cache)
    gc.collect()
    assert (cache.stats().resident_bytes, cache.leases()) == (0, ())


def test_what_is_counted_of_leases(cache: MapCache) -> None:
    """A lease of what had to be mapped is a miss, one of what was there a hit, and only one."""
    for expected in [(0, 1), (1, 1), (2, 1)]:
        cache.map_dma(0x2000, 8, owner="t")
        stats = cache.stats()
        assert (stats.hits, stats.misses) == expected


def test_an_access_to_all_that_fits_is_resident(domain: MockDomain, backend: Backend) -> None:
    """A range of just max_resident goes into buckets, which the next access finds."""
    cache = MapCache(backend, bucket_shift=16, max_resident=2 * BUCKET)
    for _ in range(3):
        cache.write(0x200000, bytes(2 * BUCKET))
    assert maps(domain) == 2


def test_a_fault_of_too_much_for_buckets_keeps_no_memory(backend: Backend) -> None:
    """Nor does the traceback of an access that is mapped for this once hold its mapping."""
    cache = MapCache(backend, bucket_shift=16, max_resident=BUCKET)
    gc.disable()
    try:
        with pytest.raises(FaultError) as caught:
            cache.write(HOLE[0] - 4, b"12345678")
        assert cache.stats().resident_bytes == 0
        assert caught.value.address == HOLE[0]
    finally:
        gc.enable()


def test_a_note_that_an_interrupt_left_behind(cache: MapCache) -> None:
    """Who was interrupted between its two last steps has nobody wait for it, for ever."""
    note = cache._pending[0] = _Pending()
    note.thread = 0
    note.done.release()
    done: list[bytes] = []
    thread = threading.Thread(target=lambda: done.append(cache.read(0x2000, 1)), daemon=True)
    thread.start()
    thread.join(10)
    cache._pending.pop(0, None)
    assert done == [b"\0"]


def test_a_lease_may_count_twice_and_its_bucket_once(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two leases of one bucket are no reason not to wait for what is on its way."""
    cache = MapCache(backend, bucket_shift=16, max_resident=2 * BUCKET)
    for _ in range(2):
        cache.map_dma(0x300000, 8, owner="t")
    with cache.map_dma(0x100000, 1, owner="t") as lease:
        view = lease.view
    monkeypatch.setattr("xenmapcache.buckets.time.sleep", lambda _: view.release())
    assert cache.read(0x400000, 1) == b"\0"


def test_room_among_hot_buckets_is_made_at_once(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When all buckets were used just now the oldest goes, without a wait and in a handler too."""
    cache = MapCache(backend, bucket_shift=16, max_resident=2 * BUCKET)
    for address in (0x100000, 0x100000, 0x200000, 0x200000):
        cache.read(address, 1)

    def sleep(_: float) -> None:
        raise AssertionError("there was nothing to wait for")

    monkeypatch.setattr("xenmapcache.buckets.time.sleep", sleep)
    with cache._lock:  # as a signal handler that comes amid an access
        assert cache.read(0x300000, 1) == b"\0"
    assert list(cache._buckets) == [0x20, 0x30]


def test_no_more_is_evicted_than_has_to_be(backend: Backend) -> None:
    """A bucket makes room for a bucket: the cache stays as full as it may be."""
    cache = MapCache(backend, bucket_shift=16, max_resident=4 * BUCKET)
    for address in range(0x800000, 0x1000000, BUCKET):
        cache.read(address, 1)
        assert cache.stats().resident_buckets == min(4, (address - 0x800000) // BUCKET + 1)


def test_a_handler_that_finds_the_cache_full_does_not_wait(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the lock nothing can come free, as who would free it may wait for that lock."""
    cache = MapCache(backend, bucket_shift=16, max_resident=2 * BUCKET)
    with cache.map_dma(0x200000, 1, owner="t") as lease:
        view = lease.view
    slept: list[float] = []
    monkeypatch.setattr("xenmapcache.buckets.time.sleep", slept.append)
    cache.map_dma(0x300000, 1, owner="t")
    with cache._lock, pytest.raises(CacheFullError):
        cache.read(0x400000, 1)
    assert slept == []
    view.release()


def test_a_block_that_ends_well_does_not_hide_its_leases(backend: Backend) -> None:
    """Leaving the with block with a lease held is the error that close() would raise."""
    with pytest.raises(LeaseError, match=r"leases are held \(1\): DMA lease of 'disk0'"):
        with MapCache(backend) as cache:
            lease = cache.map_dma(0x2000, 8, owner="disk0")
    assert not lease.released
    lease.release()
    cache.close()


def test_present_of_a_source_that_knows(
    backend: Backend, cache: MapCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a source lists in pages is cut to the bytes of the range, at both of its ends."""
    monkeypatch.setattr(backend, "present", lambda *_: iter([(0x200, 2), (0x203, 2)]))
    assert list(cache.present(0x200010, 0x3FF0)) == [(0x200010, 0x1FF0), (0x203000, 0x1000)]


def test_present_ends_in_a_hole(domain: MockDomain, cache: MapCache) -> None:
    """A range that ends amid a page which is not there does not have that page's first bytes."""
    domain.balloon_out(0x200000 + 0x1000, 0x1000)
    assert list(cache.present(0x200000, 0x1010)) == [(0x200000, 0x1000)]


def test_a_closed_cache_lists_nothing(
    backend: Backend, cache: MapCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when its source could tell without being read."""
    monkeypatch.setattr(backend, "present", lambda *_: iter([(0x200, 2)]))
    cache.close()
    with pytest.raises(ClosedError, match="this map cache is closed"):
        list(cache.present(0x200000, 0x1000))
