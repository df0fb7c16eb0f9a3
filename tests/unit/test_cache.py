"""MapCache: plain access, holes, eviction, invalidation, close."""

from __future__ import annotations

import array
import errno
import pickle
from collections.abc import Callable

import pytest

from tests.conftest import HOLE
from tests.kit import BUCKET, heat, maps
from xenmapcache import (
    Backend,
    FaultError,
    MapCache,
    MockDomain,
    XenCallError,
    open_backend,
)


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
        (lambda c: c.read(1 << 52, 8), FaultError, "no page at 0x10000000000000"),
        (lambda c: c.read(0x2000, 1 << 64), FaultError, "no page at 0xa0000:"),
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
        (lambda c: c.map_dma(0x2000, 1 << 60, owner="t"), FaultError, "no page at 0xa0000:"),
        (lambda c: c.map_dma("a", 8, owner="t"), TypeError, "address must be an int"),
        (lambda c: c.map_dma(0x2000, 8, owner=None), TypeError, "owner must be a str"),
        (
            lambda c: c.map_dma(0x2000, 8, owner="t", direction=1),
            TypeError,
            "direction must be a DmaDirection or its text, not int",
        ),
        (
            lambda c: c.map_dma(0x2000, 8, owner="t", direction="sideways"),
            ValueError,
            "direction must be one of 'to-device', 'from-device', 'bidirectional', not 'sideways'",
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
        ({"bucket_shift": 11}, ValueError, "bucket_shift must be 12 to 30 .*, not 11"),
        ({"bucket_shift": 31}, ValueError, "bucket_shift must be 12 to 30 .*, not 31"),
        ({"bucket_shift": 16.0}, TypeError, "bucket_shift must be an int"),
        (
            {"max_resident": 4096},
            ValueError,
            "max_resident must be at least one bucket of 0x100000 bytes, not 0x1000",
        ),
        ({"max_resident": "lots"}, ValueError, "'lots' is not a size"),
        ({"max_lease": 0}, ValueError, "max_lease must be at least 1 byte, not 0"),
        ({"on_stale": "ignore"}, ValueError, "on_stale must be one of .*, not 'ignore'"),
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
        ("qemu", {}, ValueError, "backend 'qemu' is unknown; known are 'coredump', 'elf"),
        ("mock", {}, TypeError, "either domain= or memory="),
        ("mock", {"domain": 3}, TypeError, "domain must be a MockDomain, not int"),
        ("mock", {"memory": "1k"}, ValueError, "memory must be 0x1000 .*, not 0x400"),
        ("mock", {"memory": 0}, ValueError, "must be 0x1000 to 0x1000000000 bytes"),
        ("mock", {"memory": "9999999T"}, ValueError, "must be 0x1000 to 0x1000000000 bytes"),
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
        with pytest.raises(FaultError, match=f"no page at {bad:#x}: ") as caught:
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
    assert cache.stats().hole_faults == 2
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


def test_no_access_after_an_invalidation_is_stale(domain: MockDomain, cache: MapCache) -> None:
    """Pages that the guest got again are mapped again."""
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
    assert report == (1, 5, 5 * BUCKET, (), (), ())
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
