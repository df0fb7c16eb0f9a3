"""MapCache(strict_views=True): a release while a view is in use is an error; a dropped cache."""

from __future__ import annotations

import ctypes
import gc
import logging
import warnings
from collections.abc import Callable, Iterator

import pytest

from xenmapcache import Backend, DmaDirection, Lease, LeaseError, MapCache, MockDomain
from xenmapcache.mapping import live_mappings

AT = 0x200000


@pytest.fixture
def strict(backend: Backend) -> Iterator[MapCache]:
    cache = MapCache(backend, bucket_shift=16, strict_views=True)
    yield cache
    cache.close(force=True)


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Cycles live until the test itself has them collected."""
    gc.disable()
    yield
    gc.enable()


def numpy_array(view: memoryview) -> object:
    return pytest.importorskip("numpy").frombuffer(view, dtype="u1")


def cffi_pointer(view: memoryview) -> object:
    return pytest.importorskip("cffi").FFI().from_buffer(view)


def ctypes_array(view: memoryview) -> object:
    return (ctypes.c_char * 8).from_buffer(view)


def a_slice(view: memoryview) -> object:
    part = view[2:6]
    view.release()  # which does not tell that the slice lives
    return part


@pytest.mark.parametrize("use", [memoryview, a_slice, numpy_array, cffi_pointer, ctypes_array])
def test_a_release_while_a_view_is_in_use_names_the_lease(
    strict: MapCache, use: Callable[[memoryview], object]
) -> None:
    """The lease is still held, its memory too; once the view has gone, a release works."""
    lease = strict.map_dma(AT, 64, owner="disk0")
    used = [use(lease.view)]
    with pytest.raises(LeaseError, match=r"'disk0'.* views of it are in use \(1\).* still held"):
        lease.release()
    assert not lease.released
    assert strict.leases()[0].owner == "disk0"
    lease.view[:4] = b"more"
    used.clear()
    lease.release()
    assert lease.released


@pytest.mark.parametrize("take", [MapCache.map_dma, MapCache.map_device, MapCache.window])
def test_views_that_are_gone_are_no_error(
    strict: MapCache, domain: MockDomain, take: Callable[..., Lease]
) -> None:
    """Views show the guest's memory, in leases of each kind; each is forgotten with its use."""
    domain.write(AT, b"the guest")
    with take(strict, AT, 9, owner="t") as lease:
        for _ in range(3):
            assert bytes(lease.view) == b"the guest"
        assert lease.view.format == "B"
        kept = [lease.view, lease.view]
        with pytest.raises(LeaseError, match=r"in use \(2\)"):
            lease.release()
        kept.clear()


def test_a_view_to_be_read_is_read_only(strict: MapCache) -> None:
    """Strict views keep the rights of the lease."""
    with strict.map_dma(AT, 8, owner="t", direction=DmaDirection.TO_DEVICE) as lease:
        assert lease.view.readonly
    with strict.map_dma(AT, 8, owner="t") as lease:
        assert not lease.view.readonly


@pytest.mark.usefixtures("no_collector")
def test_a_view_in_a_garbage_cycle_is_in_use_until_it_is_freed(strict: MapCache) -> None:
    """Code of the cycle may still run, so the collector does not decide."""
    lease = strict.map_dma(AT, 8, owner="t")
    cycle: list[object] = [lease.view]
    cycle.append(cycle)
    del cycle
    with pytest.raises(LeaseError, match="in use"):
        lease.release()
    gc.collect()
    lease.release()


@pytest.mark.usefixtures("no_collector")
def test_a_finalizer_of_a_garbage_cycle_still_has_its_view(strict: MapCache) -> None:
    """The collector handles weak references first, and must not know of the exporter."""
    lease = strict.map_dma(AT, 8, owner="t")
    said = []

    class User:
        def __init__(self) -> None:
            self.own = self
            self.view = lease.view

        def __del__(self) -> None:
            try:
                lease.release()
            except LeaseError as error:
                said.append(str(error))
            self.view[:] = b"as usual"

    User()
    gc.collect()
    assert len(said) == 1
    assert "in use (1)" in said[0]
    assert bytes(lease.view) == b"as usual"
    lease.release()


def test_an_exception_on_its_way_out_is_worth_more(strict: MapCache) -> None:
    """Its frames use views; the lease is released all the same."""
    with pytest.raises(ZeroDivisionError), strict.map_dma(AT, 8, owner="t") as lease:
        view = lease.view
        view[0] = 1 // 0
    assert lease.released


def test_force_does_not_ask(backend: Backend, caplog: pytest.LogCaptureFixture) -> None:
    """It ends the lease with a WARNING; the view stays safe, and its end unmaps."""
    before = live_mappings()
    cache = MapCache(backend, strict_views=True)
    view = cache.map_device(AT, 8, owner="vga").view
    with pytest.raises(LeaseError, match="leases are held"):
        cache.close()
    with caplog.at_level(logging.WARNING):
        cache.close(force=True)
    assert "closed by force, still held: DEVICE lease of 'vga'" in caplog.text
    view[:] = b"as usual"
    assert bytes(view) == b"as usual"
    assert live_mappings() == before + 1
    del view
    assert live_mappings() == before


def test_without_the_option_a_view_is_nobodys_business(cache: MapCache) -> None:
    """A view outlives its lease, as ever."""
    lease = cache.map_dma(AT, 8, owner="t")
    view = lease.view
    lease.release()
    assert len(view) == 8


# --- a cache that is dropped --------------------------------------------------------------


@pytest.mark.usefixtures("no_collector")
def test_a_dropped_cache_names_its_leases_at_once(backend: Backend) -> None:
    """Reference counts alone do it; the lease's memory is safe, and can be released."""
    cache = MapCache(backend)
    lease = cache.map_dma(AT, 8, owner="disk0")
    with pytest.warns(ResourceWarning, match=r"dropped, and leases are held \(1\): .*'disk0'"):
        del cache
    lease.view[:] = b"as usual"
    lease.release()


def test_no_warning_without_leases(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor of a cache that was not made, is a parent's, or is left at the interpreter's end."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache = MapCache(backend)
        cache.map_dma(AT, 8, owner="t").release()
        del cache
        with pytest.raises(ValueError, match="warn_age"):
            MapCache(backend, warn_age=0)
        with pytest.raises(TypeError, match="backend must be"):
            MapCache("mock")  # type: ignore[arg-type] # on purpose
        cache = MapCache(backend)
        cache.map_dma(AT, 8, owner="t")
        monkeypatch.setattr("sys.is_finalizing", lambda: True)
        del cache


def test_the_very_end(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the globals of its module are None already, a dropped cache says nothing."""
    cache = MapCache(backend)
    cache.map_dma(AT, 8, owner="t")
    monkeypatch.setattr("xenmapcache.cache.mapcache.sys", None)
    del cache
