"""Windows over the mock: bounds, room, invalidations, failures, forks."""

from __future__ import annotations

import errno
import gc
import hashlib
import logging
import re
import struct
import threading
from collections.abc import Callable
from typing import Any

import pytest

from tests.fake_xen.child import in_child
from tests.files.test_max_copies import FIRST_COPY, Mixed
from xenmapcache import (
    Backend,
    CacheFullError,
    ClosedError,
    FaultError,
    LeaseError,
    LeaseKind,
    MapCache,
    MockDomain,
    XenCallError,
)
from xenmapcache.address import PAGE_SIZE, MiB
from xenmapcache.cache.budget import Budget
from xenmapcache.errors import EmptyRangeError
from xenmapcache.mapping import PageErrors, live_mappings

from ..conftest import HOLE

BUCKET = 1 << 16
AT = 0x200000


@pytest.fixture(autouse=True)
def _collected() -> None:
    """Nothing that earlier tests have left goes while a test counts mappings."""
    gc.collect()


def test_whatever_takes_a_buffer_takes_a_window(domain: MockDomain, cache: MapCache) -> None:
    """Without a copy of ours: hashing, searching, unpacking."""
    domain.write(AT, struct.pack("<4Q", 1, 2, 3, 4))
    with cache.window(AT, 4096) as window:
        assert list(struct.iter_unpack("<Q", window.view[:32])) == [(1,), (2,), (3,), (4,)]
        assert [match.start() for match in re.finditer(rb"[\x02\x03]", window.view)] == [8, 16]
        assert hashlib.sha1(window.view).digest() == hashlib.sha1(domain.read(AT, 4096)).digest()
        domain.write(AT, b"now")
        assert bytes(window.view[:3]) == b"now"  # it is the guest's memory


def test_a_whole_guest_is_one_view(domain: MockDomain, cache: MapCache) -> None:
    """By default from 0 to the end of memory; the hole is zeros."""
    domain.write(0, b"first")
    domain.write(16 * MiB - 4, b"last")
    with cache.window() as window:
        assert (window.kind, window.address, window.length) == (LeaseKind.WINDOW, 0, 16 * MiB)
        assert (bytes(window.view[:5]), bytes(window.view[-4:])) == (b"first", b"last")
        assert window.view[HOLE[0] : sum(HOLE)] == bytes(HOLE[1])
        assert cache.resolve(window.host_address + AT) == AT
        assert str(cache.leases()[0]).startswith("WINDOW lease of 'MapCache.window': address 0x0")
        stats = cache.stats()
        assert (stats.windows, stats.device_leases, stats.dma_leases) == (1, 0, 0)
        assert (stats.maps, stats.resident_bytes) == (1, 16 * MiB)
        assert domain.mapped_pieces == 1
    assert domain.mapped_pieces == 0
    assert cache.stats().unmaps == 1


# --- arguments ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options", "error", "text"),
    [
        ((-1, 1), {}, ValueError, "address -0x1 is negative"),
        ((0, -1), {}, ValueError, "length -0x1 at address 0x0 is negative"),
        ((-1,), {}, ValueError, "address -0x1 is negative"),
        (("0", 1), {}, TypeError, "address"),
        ((0, "1"), {}, TypeError, "length"),
        ((0, 1), {"owner": 3}, TypeError, "owner must be a str, not int"),
        ((0, 1), {"holes": "skip"}, ValueError, "holes must be one of .*, not 'skip'"),
        ((0, 0), {}, EmptyRangeError, "0x0"),
        ((16 * MiB,), {}, EmptyRangeError, "0x1000000"),
        ((1 << 64,), {}, EmptyRangeError, "0x10000000000000000"),
        ((1 << 51, 1 << 64), {}, FaultError, "0x10000000000000"),
        ((0, 1 << 51), {}, CacheFullError, "0x8000000000000 bytes .* max_resident 0x800000000"),
    ],
)
def test_wrong_ranges_are_errors(
    cache: MapCache,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    error: type[Exception],
    text: str,
) -> None:
    """Before anything is mapped or counted; what a guest may choose is a XenMapCacheError."""
    before = live_mappings()
    with pytest.raises(error, match=text):
        cache.window(*arguments, **options)
    assert (cache.leases(), cache.stats().maps, live_mappings()) == ((), 0, before)


def test_a_source_without_an_end_needs_a_length(domain: MockDomain) -> None:
    """The error says so."""
    source = Mixed(domain)
    source.memory_end = None
    with MapCache(source) as cache:
        with pytest.raises(ValueError, match="'mixed' does not know where its memory ends: give"):
            cache.window(AT)
        cache.window(AT, 1).release()


def test_max_lease_bounds_windows(backend: Backend) -> None:
    """The error names it, and says what to do."""
    with MapCache(backend, max_lease="1MiB") as cache:
        cache.window(AT, MiB).release()
        with pytest.raises(CacheFullError, match="more than max_lease 0x100000; .* raise max_le"):
            cache.window(AT, MiB + 1)


def test_the_stack_is_recorded_where_leases_record_it(backend: Backend) -> None:
    """As of other leases."""
    with MapCache(backend, record_origin=True) as cache, cache.window(AT, 1):
        origin = cache.leases()[0].origin
        assert origin is not None
        assert "test_window.py" in origin[-1]


# --- room -----------------------------------------------------------------------------


def test_buckets_make_room(backend: Backend) -> None:
    """A window counts, holes included, and evicts what is in its way; leases are not evicted."""
    with MapCache(backend, bucket_shift=16, max_resident=4 * BUCKET) as cache:
        for bucket in range(32, 36):
            cache.read(bucket * BUCKET, 1)
        window = cache.window(AT - 3 * BUCKET, 3 * BUCKET)
        assert cache.stats().resident_bytes == 4 * BUCKET
        with pytest.raises(CacheFullError, match="0x30000 of max_resident 0x40000 bytes are lea"):
            cache.window(AT, 2 * BUCKET)
        with pytest.raises(CacheFullError, match="max_resident 0x40000"):
            cache.map_device(AT, 2 * BUCKET, owner="x")
        cache.read(AT, 1)
        window.release()
        cache.window(AT, 4 * BUCKET).release()


def test_a_source_that_cannot_map_in_place_copies(domain: MockDomain) -> None:
    """Pages are copied from what it maps; holes stay zeros; all of it counts as copies."""
    domain.write(HOLE[0] - 4, b"edge")
    domain.write(sum(HOLE), b"edge")
    with MapCache(Mixed(domain), max_copies=8 * MiB) as cache:
        with cache.window(HOLE[0] - 8, HOLE[1] + 16) as window:
            assert window.view == b"\0\0\0\0edge" + bytes(HOLE[1]) + b"edge\0\0\0\0"
            assert cache.stats().copied_bytes == HOLE[1] + 2 * PAGE_SIZE
        with pytest.raises(FaultError) as caught:
            cache.window(HOLE[0] - 8, HOLE[1] + 16, holes="raise")
        assert caught.value.address == HOLE[0]
        with pytest.raises(CacheFullError, match="are more than max_copies 0x800000"):
            cache.window()
        assert cache.stats().copied_bytes == 0


def test_a_source_that_knows_its_pages_counts_them() -> None:
    """Only those that exist are copied."""

    class Few(Mixed):
        def present(self, gfn: int, count: int) -> Any:  # noqa: ANN401 - of the base
            return iter([(gfn, 2)])

    few = Few.__new__(Few)
    assert few.copied_pages(5, 100) == 2


class HalfCopied(Mixed):
    """Maps in place below 2 MiB, and copies the rest."""

    def copied_pages(self, gfn: int, count: int) -> int:
        return max(0, gfn + count - max(gfn, FIRST_COPY // PAGE_SIZE))

    def map_into(self, mapping: Any, gfn: int, count: int) -> PageErrors | None:  # noqa: ANN401 - of the base
        mapped = count - self.copied_pages(gfn, count)
        if mapped:
            self.domain.map_into(mapping, gfn, mapped)
        return super().map_into(mapping, gfn + mapped, count - mapped)


def test_both_bounds_hold_for_one_window(domain: MockDomain) -> None:
    """What is mapped counts under max_resident, what is copied under max_copies."""
    room = 4 * BUCKET
    start = FIRST_COPY - 2 * BUCKET
    source = HalfCopied(domain)
    with MapCache(source, bucket_shift=16, max_resident=room, max_copies=2 * BUCKET) as cache:
        window = cache.window(start, room)
        stats = cache.stats()
        assert (stats.resident_bytes, stats.copied_bytes) == (room, 2 * BUCKET)
        assert (stats.maps, stats.unmaps) == (2, 0)  # it is counted under each bound
        cache.read(0, 1)
        cache.read(BUCKET, 1)
        with pytest.raises(CacheFullError, match="0x20000 of max_copies 0x20000 bytes are leased"):
            cache.read(FIRST_COPY + 3 * BUCKET, 1)
        with pytest.raises(CacheFullError, match="max_resident"):
            cache.map_device(0, 3 * BUCKET, owner="x", writable=False)
        window.release()
        del window
        assert cache.stats().copied_bytes == 0


def test_windows_of_threads_wait_for_each_other(backend: Backend) -> None:
    """Threads that share room for one window get it in turn."""
    cache = MapCache(backend, bucket_shift=16, max_resident=4 * BUCKET)
    wrong: list[object] = []

    def work() -> None:
        try:
            for _ in range(20):
                lengths = sum(map(len, cache.views(AT, 4 * BUCKET)))
                assert lengths == 4 * BUCKET
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        cache.window(AT, 3 * BUCKET).release()
    for thread in threads:
        thread.join(60)
    assert wrong == []


def test_unmapped_memory_that_a_handler_has_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal handler that takes the last hint leaves nothing to settle."""

    class Emptied(list[Any]):
        def popleft(self) -> object:
            raise IndexError

    budget = Budget(BUCKET)
    budget.freed = Emptied([1])  # type: ignore[assignment] # as a handler leaves it
    budget.settle()


# --- invalidations --------------------------------------------------------------------


def test_an_invalidation_makes_a_window_stale(
    domain: MockDomain, cache: MapCache, caplog: pytest.LogCaptureFixture
) -> None:
    """It shows the pages that it had, is reported, and nothing is warned of or refused."""
    domain.on_invalidate(cache.invalidate)
    domain.write(AT, b"old")
    caplog.set_level(logging.INFO, "xenmapcache")
    with cache.window(AT, 0x2000) as window:
        domain.balloon_out(AT, 0x1000)
        domain.balloon_in(AT, 0x1000)
        domain.write(AT, b"new")
        domain.write(AT + 0x1000, b"same")
        assert window.stale
        assert (bytes(window.view[:3]), bytes(window.view[0x1000:0x1004])) == (b"old", b"same")
        report = cache.invalidate()
        assert [info.owner for info in report.windows] == ["MapCache.window"]
        assert (report.device, report.dma) == ((), ())
        with cache.window(AT, 0x2000) as fresh:
            assert not fresh.stale
            assert bytes(fresh.view[:3]) == b"new"
    assert caplog.messages == []
    assert cache.stats().stale_dma_released == 0


def test_an_invalidation_amid_a_window_makes_it_stale(
    domain: MockDomain, cache: MapCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the start: parts of it may show pages of before."""
    map_into = domain.map_into

    def overtaken(*arguments: Any) -> bytes | None:  # noqa: ANN401 - passed on
        cache.invalidate()
        return map_into(*arguments)

    monkeypatch.setattr(domain, "map_into", overtaken)
    assert cache.window(AT, 1).stale


# --- failures -------------------------------------------------------------------------


def test_a_refused_page_is_no_hole(domain: MockDomain, cache: MapCache) -> None:
    """The error names its address; with holes="zero" a page that is not there is none."""
    domain.inject_fault("map", errno=errno.EPERM, gfn=(AT + 0x3000) >> 12, repeat=True)
    with pytest.raises(XenCallError, match="mock_map failed for domain 1 at 0x203000 with EPERM"):
        cache.window(0, 4 * MiB)
    assert cache.stats().resident_bytes == 0
    cache.window(AT, 0x3000).release()


@pytest.mark.parametrize("page", [None, AT >> 12])
def test_enomem_evicts_and_tries_again(
    domain: MockDomain, cache: MapCache, page: int | None
) -> None:
    """Whether the call fails, or a page of it; without anything to evict it is an error."""
    domain.inject_fault("map", errno=errno.ENOMEM, nth=2, gfn=page)
    cache.read(AT + MiB, 1)
    if page is not None:
        cache.read(AT, 1)  # the first call about it
    with cache.window(AT, BUCKET) as window:
        assert window.view == domain.read(AT, BUCKET)
    assert cache.stats().evictions > 0
    cache.invalidate()
    domain.inject_fault("map", errno=errno.ENOMEM, gfn=page, repeat=True)
    with pytest.raises(XenCallError, match="ENOMEM"):
        cache.window(AT, BUCKET)
    assert cache.stats().resident_bytes == 0


def test_a_source_that_changes_its_mind_is_asked_again(domain: MockDomain) -> None:
    """EAGAIN means that it copies more than it said; three times in a row is an error."""

    class Changing(Mixed):
        said: list[int] = []  # noqa: RUF012 - of this test alone
        patience = 3

        def copied_pages(self, gfn: int, count: int) -> int:
            self.said.append(count)
            return count

        def map_into(self, mapping: Any, gfn: int, count: int) -> PageErrors | None:  # noqa: ANN401 - of the base
            if len(self.said) < self.patience:
                raise XenCallError("mmap", None, errno.EAGAIN, "said the file")
            return super().map_into(mapping, gfn, count)

    before = live_mappings()
    with MapCache(Changing(domain)) as cache:
        cache.window(AT, 0x2000).release()
        assert Changing.said == [2, 2, 2]
        Changing.patience = 7
        with pytest.raises(XenCallError, match="EAGAIN.*said the file"):
            cache.window(AT, 0x2000)
        assert cache.stats().resident_bytes == 0
    assert live_mappings() == before


@pytest.mark.parametrize("holes", ["zero", "raise"])
def test_an_error_that_is_kept_keeps_no_memory(cache: MapCache, holes: Any) -> None:  # noqa: ANN401 - a Literal
    """Nor does its traceback."""
    before = live_mappings()
    kept: list[Exception] = []
    try:
        cache.window(HOLE[0] - PAGE_SIZE, 2 * PAGE_SIZE, holes=holes).release()
    except FaultError as error:
        kept.append(error)
    assert len(kept) == (holes == "raise")
    assert live_mappings() == before


def test_a_window_of_a_closed_cache_or_source(
    domain: MockDomain, backend: Backend, cache: MapCache
) -> None:
    """Is refused, also where the cache is closed in the middle."""
    domain.inject_fault("map", delay=1e-9)
    close: Callable[[], None] = cache.close
    copied_pages = backend.copied_pages

    def closing(gfn: int, count: int) -> int:
        close()
        return copied_pages(gfn, count)

    backend.copied_pages = closing  # type: ignore[method-assign] # for this test alone
    with pytest.raises(ClosedError, match="this map cache is closed"):
        cache.window(AT, 1)
    with pytest.raises(ClosedError, match="this map cache is closed"):
        cache.window(AT, 1)
    assert cache.leases() == ()
    with MapCache(backend) as other:
        backend.close()
        with pytest.raises(ClosedError, match="mock backend is closed"):
            other.window(AT, 1)


def test_close_names_a_window_that_is_held(backend: Backend) -> None:
    """And by force it ends it; the view stays safe."""
    cache = MapCache(backend)
    window = cache.window(AT, 4096, owner="yara")
    view = window.view
    with pytest.raises(LeaseError, match=r"leases are held \(1\): WINDOW lease of 'yara'"):
        cache.close()
    cache.close(force=True)
    assert window.released
    assert view == bytes(4096)


def test_a_replace_does_not_move_a_window(cache: MapCache) -> None:
    """Only device leases move."""
    with cache.window(AT, 4096), pytest.raises(LeaseError, match="no device lease covers exactly"):
        cache.replace(AT, AT + 0x1000, 4096)


def test_a_forked_child_sees_zeros_and_takes_none(domain: MockDomain, cache: MapCache) -> None:
    """The parent's window is the parent's; its view shows zeros in the child."""
    domain.write(AT, b"parent")
    window = cache.window(AT, 4 * PAGE_SIZE)
    view = window.view

    def look() -> bool:
        with pytest.raises(ClosedError):
            cache.window(AT, 1)
        with pytest.raises(ClosedError):
            assert window.view
        return bytes(view) == bytes(4 * PAGE_SIZE)

    assert in_child(look) == 0
    assert bytes(view[:6]) == b"parent"
    window.release()


def test_an_array_keeps_the_memory(domain: MockDomain, cache: MapCache) -> None:
    """NumPy's arrays over a window are read-only, and stay valid after its release."""
    numpy = pytest.importorskip("numpy")
    domain.write(AT, struct.pack("<4Q", 1, 2, 3, 4))
    before = live_mappings()
    with cache.window(AT, 4096) as window:
        array = numpy.frombuffer(window.view, "<u8")
    cache.close()
    assert array[:5].tolist() == [1, 2, 3, 4, 0]
    assert not array.flags.writeable
    assert live_mappings() == before + 1
    del array, window
    assert live_mappings() == before
