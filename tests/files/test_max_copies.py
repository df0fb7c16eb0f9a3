"""Copies of a file's pages: their bound, and what counts under it."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.images import kdump_files, writers, xl_files
from xenmapcache import (
    Backend,
    CacheFullError,
    ClosedError,
    DmaDirection,
    FaultError,
    GuestMemory,
    MapCache,
    Mapping,
    MockDomain,
    copy_pages,
    open_backend,
    open_cache,
    write_coredump,
)
from xenmapcache.address import PAGE_SIZE, GiB, MiB
from xenmapcache.cache import access as access_module
from xenmapcache.cache.budget import Budget

BUCKET = 1 << 16
FIRST_COPY = 0x200000
"""Below this address a Mixed backend maps, from there on it copies."""


class Mixed(Backend):
    """The mock's guest, of which the first 2 MiB are mapped, and the rest is copied."""

    name = "mixed"

    def __init__(self, domain: MockDomain) -> None:
        self.domain = domain
        self.memory_end = domain.memory_end
        self.copied = 0

    def copies(self, gfn: int, count: int) -> bool:
        return gfn + count > FIRST_COPY // PAGE_SIZE

    def map(self, gfn: int, count: int, *, writable: bool) -> Mapping:
        if not self.copies(gfn, count):
            return self.domain.map(gfn, count, writable)
        self.copied += 1
        return copy_pages(
            gfn, [self.domain.read(page * PAGE_SIZE, PAGE_SIZE) for page in range(gfn, gfn + count)]
        )

    def close(self) -> None:
        """Nothing is open."""


@pytest.fixture
def mixed(domain: MockDomain) -> Mixed:
    for address in range(FIRST_COPY - 8 * BUCKET, FIRST_COPY + 32 * BUCKET, BUCKET):
        domain.write(address, address.to_bytes(8, "little"))
    return Mixed(domain)


def read(cache: MapCache, address: int, count: int) -> None:
    """Read the beginning of each of some buckets."""
    for start in range(address, address + count * BUCKET, BUCKET):
        assert cache.read(start, 8) == start.to_bytes(8, "little")


# --- the bound ------------------------------------------------------------------------


def test_copies_stay_under_their_own_bound(mixed: Mixed) -> None:
    """However much is read, copies take max_copies at most, apart from what is mapped."""
    with MapCache(mixed, bucket_shift=16, max_copies=4 * BUCKET) as cache:
        read(cache, FIRST_COPY - 8 * BUCKET, 8)
        for number in range(32):
            read(cache, FIRST_COPY + number * BUCKET, 1)
            assert cache.stats().copied_bytes <= 4 * BUCKET
        stats = cache.stats()
        assert stats.copied_bytes == 4 * BUCKET
        assert stats.resident_bytes == 12 * BUCKET
        assert (stats.maps, stats.unmaps, stats.evictions) == (40, 28, 28)


def test_each_bound_evicts_its_own(mixed: Mixed, domain: MockDomain) -> None:
    """Room for a copy is made by copies, and room for a mapping by mappings."""
    room = 2 * BUCKET
    with MapCache(mixed, bucket_shift=16, max_resident=room, max_copies=room) as cache:
        below = FIRST_COPY - 2 * BUCKET
        read(cache, below, 4)
        calls = len(domain.calls)
        read(cache, FIRST_COPY + 2 * BUCKET, 8)
        read(cache, below, 2)
        assert len(domain.calls) == calls  # what is mapped has stayed
        copied = mixed.copied
        read(cache, FIRST_COPY - 8 * BUCKET, 6)
        read(cache, FIRST_COPY + 8 * BUCKET, 2)
        assert mixed.copied == copied  # and so have the copies
        assert cache.stats().resident_bytes == 4 * BUCKET


def test_threads_that_copy_are_never_refused(mixed: Mixed) -> None:
    """Threads share room for one copy: each read waits its turn and succeeds."""
    cache = MapCache(mixed, bucket_shift=16, max_copies=BUCKET)
    wrong: list[object] = []

    def work(seed: int) -> None:
        try:
            for step in range(40):
                read(cache, FIRST_COPY + (seed * 5 + step * 7) % 32 * BUCKET, 1)
                read(cache, FIRST_COPY - (1 + (seed + step) % 8) * BUCKET, 1)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []
    assert cache.stats().copied_bytes == BUCKET
    assert not cache._copies.waiting


def test_what_is_read_bucket_by_bucket_needs_one_copy(mixed: Mixed, tmp_path: Path) -> None:
    """Long reads, views, searches and dumps stay under the smallest bound."""
    with MapCache(mixed, bucket_shift=16, max_copies=BUCKET) as cache:
        length = 16 * BUCKET
        assert len(cache.read(FIRST_COPY, length)) == length
        assert sum(map(len, cache.views(FIRST_COPY, length))) == length
        last = FIRST_COPY + 31 * BUCKET
        pattern = last.to_bytes(8, "little")
        assert [at for at, _ in GuestMemory(cache).find(pattern, FIRST_COPY, 2 * MiB)] == [last]
        write_coredump(cache, tmp_path / "core")


ACCESSES: dict[str, Callable[[MapCache], object]] = {
    "lease": lambda cache: cache.map_dma(
        FIRST_COPY, 3 * BUCKET, owner="x", direction=DmaDirection.TO_DEVICE
    ),
    "device lease": lambda cache: cache.map_device(
        FIRST_COPY, 3 * BUCKET, owner="x", writable=False
    ),
    "read_into": lambda cache: cache.read_into(FIRST_COPY, bytearray(3 * BUCKET)),
    "map_pages": lambda cache: cache.map_pages(FIRST_COPY // PAGE_SIZE, 3 * BUCKET // PAGE_SIZE),
    "read_into, above both": lambda cache: cache.read_into(FIRST_COPY, bytearray(9 * BUCKET)),
}


@pytest.mark.parametrize("access", ACCESSES)
def test_a_bound_that_is_too_small_is_named(mixed: Mixed, access: str) -> None:
    """The error names the option to raise, and nothing stays copied beyond the bound."""
    room = 2 * BUCKET
    with MapCache(mixed, bucket_shift=16, max_resident=4 * room, max_copies=room) as cache:
        with pytest.raises(CacheFullError, match=r"max_copies 0x20000.*") as caught:
            ACCESSES[access](cache)
        assert "max_resident" not in str(caught.value)
        assert cache.stats().copied_bytes <= 2 * BUCKET
        assert cache.leases() == ()


def test_a_bound_that_max_resident_decides_is_named_so(mixed: Mixed) -> None:
    """Where max_copies is not given, and max_resident is below its default."""
    with MapCache(mixed, bucket_shift=16, max_resident=BUCKET) as cache:
        assert cache.max_copies == BUCKET
        with pytest.raises(CacheFullError, match="are more than max_resident 0x10000"):
            cache.read_into(FIRST_COPY, bytearray(2 * BUCKET))


def test_leased_copies_leave_no_room(mixed: Mixed) -> None:
    """If leases hold all of max_copies, a further copy is refused, and a mapping is not."""
    with MapCache(mixed, bucket_shift=16, max_copies=BUCKET) as cache:
        lease = cache.map_dma(FIRST_COPY, 8, owner="x", direction=DmaDirection.TO_DEVICE)
        with pytest.raises(CacheFullError, match="0x10000 of max_copies 0x10000 bytes are leased"):
            cache.read(FIRST_COPY + BUCKET, 1)
        read(cache, FIRST_COPY - BUCKET, 1)
        lease.release()
        read(cache, FIRST_COPY + BUCKET, 1)


def test_parts_that_are_mapped_need_no_room_for_copies(mixed: Mixed) -> None:
    """Of a range that would be a copy as a whole, only the buckets that are copies count."""
    with MapCache(mixed, bucket_shift=16, max_copies=BUCKET) as cache:
        buffer = bytearray(5 * BUCKET)
        cache.read_into(FIRST_COPY - 4 * BUCKET, buffer)
        assert int.from_bytes(buffer[-BUCKET:][:8], "little") == FIRST_COPY
        assert cache.stats().copied_bytes == BUCKET


def test_pages_alone_are_copied_where_buckets_are_too_much(mixed: Mixed) -> None:
    """A range that fits, while the buckets around it do not, is copied by itself."""
    with MapCache(mixed, bucket_shift=16, max_copies=BUCKET) as cache:
        buffer = bytearray(PAGE_SIZE)
        cache.read_into(FIRST_COPY + BUCKET - 8, buffer)
        assert int.from_bytes(buffer[8:16], "little") == FIRST_COPY + BUCKET


def test_a_long_read_copies_once(mixed: Mixed, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source that knows its pages is not read a first time to see whether they are there."""
    monkeypatch.setattr(access_module, "_LOOK_FIRST_BYTES", BUCKET)
    span = FIRST_COPY // PAGE_SIZE, 4 * BUCKET // PAGE_SIZE
    for known, passes in ((None, 2), ([span], 1), ([(span[0], 16), (span[0] + 17, 47)], 2)):
        monkeypatch.setattr(mixed, "present", lambda *_, known=known: known and iter(known))
        with MapCache(mixed, bucket_shift=16, max_copies=BUCKET) as cache:
            mixed.copied = 0
            cache.read(FIRST_COPY, 4 * BUCKET)
            assert mixed.copied == 4 * passes + 2  # two for a look at the first and last page


# --- the option -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 256 * MiB),
        ({"max_resident": "16MiB"}, 16 * MiB),
        ({"bucket_shift": 30}, GiB),
        ({"max_copies": "3MiB"}, 3 * MiB),
        ({"max_resident": "2MiB", "max_copies": "3MiB"}, 3 * MiB),
    ],
    ids=str,
)
def test_the_default_is_256_mib(mixed: Mixed, options: dict[str, object], expected: int) -> None:
    """Or max_resident or a bucket, where that decides."""
    with MapCache(mixed, **options) as cache:  # type: ignore[arg-type] # the test knows
        assert cache.max_copies == expected


def test_a_bound_below_a_bucket_is_refused(mixed: Mixed) -> None:
    """No bucket could ever be read."""
    with pytest.raises(ValueError, match="max_copies must be at least one bucket of 0x100000"):
        MapCache(mixed, max_copies=4096)


def test_a_forked_child_has_a_lock_of_its_own() -> None:
    """For both budgets, as the parent's thread that holds it is not there."""
    budget = Budget(BUCKET)
    copies = Budget(BUCKET, "max_copies", mapped=budget)
    before = budget.lock
    budget.forget_parent()
    assert before is not budget.lock is copies.lock
    copies.forget_parent()
    assert copies.lock is not budget.lock


# --- what a file is -------------------------------------------------------------------


def test_a_file_tells_what_it_copies(mappable: Path) -> None:
    """Aligned ranges are mapped; a bucket with a hole, or with odd offsets, is copied."""
    path = mappable / "flat.raw"
    path.write_bytes(writers.memory(0, 32))
    ranges = [(0, 16 * PAGE_SIZE), (32 * PAGE_SIZE, 16 * PAGE_SIZE)]
    with open_backend("raw", path=path, ranges=ranges) as image:
        told = [image.copies(gfn, 16) for gfn in (0, 8, 16, 32, 40)]
        assert told == [False, True, True, False, True]
        with MapCache(image, bucket_shift=16) as cache:
            assert cache.read(0, 4) == writers.memory(0, 1)[:4]
            assert cache.stats().copied_bytes == 0
    assert not image.copies(0, 16)  # map() says that it is closed
    with pytest.raises(ClosedError):
        image.map(0, 16, writable=False)
    odd = mappable / "odd.lime"
    odd.write_bytes(writers.lime([(0, 16)]))
    with open_cache(odd, bucket_shift=16, max_copies=BUCKET) as cache:
        assert cache.backend.copies(0, 16)
        assert cache.read(0, 4) == writers.memory_at(0, 4)
        assert cache.stats().copied_bytes == BUCKET


def test_a_save_stream_is_copied(tmp_path: Path) -> None:
    """Each bucket of it is read, within the bound."""
    path = tmp_path / "guest.save"
    path.write_bytes(xl_files.save(xl_files.pages(*range(64))))
    with open_cache(path, bucket_shift=16, max_copies=BUCKET) as cache:
        for gfn in range(64):
            assert cache.read(gfn * PAGE_SIZE, PAGE_SIZE) == xl_files.page(gfn)
        assert cache.stats().copied_bytes == BUCKET
        with pytest.raises(FaultError) as caught:
            cache.read(64 * PAGE_SIZE, 1)
        assert caught.value.errno == errno.EINVAL


def test_what_is_unpacked_is_copied(mappable: Path) -> None:
    """Pages of KDUMP are compressed, so a bucket is a copy even if the file could be mapped."""
    path = mappable / "guest.kdump"
    path.write_bytes(kdump_files.kdump(kdump_files.pages_of([(0, 64)])))
    with open_cache(f"kdump:{path}", bucket_shift=16, max_copies=BUCKET) as cache:
        for gfn in range(0, 64, 16):
            assert cache.read(gfn * PAGE_SIZE, PAGE_SIZE) == writers.memory(gfn, 1)
        assert cache.stats().copied_bytes == BUCKET


def test_copies_that_a_writer_forces_do_not_count(mappable: Path) -> None:
    """They take the place of mappings; what is read afterwards is bounded."""
    path = mappable / "flat.raw"
    path.write_bytes(writers.memory(0, 64))
    with open_cache(f"raw:{path}", bucket_shift=16, max_copies=BUCKET) as cache:
        for gfn in (0, 16, 32):
            cache.read(gfn * PAGE_SIZE, 1)
        path.open("r+b").close()  # it returns when the copies are made
        stats = cache.stats()
        assert (stats.resident_bytes, stats.copied_bytes) == (3 * BUCKET, 0)
        assert cache.read(0, PAGE_SIZE) == writers.memory(0, 1)
        assert cache.read(48 * PAGE_SIZE, PAGE_SIZE) == writers.memory(48, 1)
        stats = cache.stats()
        assert (stats.resident_bytes, stats.copied_bytes) == (4 * BUCKET, BUCKET)
