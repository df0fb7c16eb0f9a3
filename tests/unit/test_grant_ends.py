"""How leases of granted pages end: views that are kept, children, closes and failures."""

from __future__ import annotations

import logging
import os

import pytest

from tests.lender import Lender, cache, grants, lender, make_fake, ref_of
from xenmapcache import (
    ClosedError,
    LeaseError,
    MapCache,
    XenCallError,
)
from xenmapcache.address import PAGE_SIZE
from xenmapcache.binding import libc
from xenmapcache.cache import leasing
from xenmapcache.grants import GrantSource, source
from xenmapcache.mapping import live_mappings

__all__ = ["cache", "grants", "lender", "make_fake"]


# --- kept views ----------------------------------------------------------------------------


def test_a_kept_view_shows_private_zeros(lender: Lender, cache: MapCache) -> None:
    """After the release a view is safe, shows zeros, and what is written there stays private."""
    address = lender.lend()
    lease = cache.map_dma(address, PAGE_SIZE, owner="disk")
    view = lease.view
    mapped = live_mappings()
    lease.release()
    assert not lender.is_mapped(ref_of(address))
    assert bytes(view[:7]) == bytes(7)
    view[:4] = b"lost"
    assert lender.read(PAGE_SIZE, 7) == b"page 01"
    assert live_mappings() == mapped
    del view, lease
    assert live_mappings() == mapped - 1


def test_the_address_is_never_free(
    lender: Lender, cache: MapCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the grants are given back, zeros are in their place already."""
    address = lender.lend()
    lease = cache.map_dma(address, PAGE_SIZE, owner="disk")
    view = lease.view
    seen: list[bytes] = []
    kind = type(cache._parts.leasing.grants)
    give_back = kind._give_back  # type: ignore[union-attr] # it is not None here

    def look(source: GrantSource, held: object) -> None:
        seen.append(bytes(view[:7]))
        give_back(source, held)  # type: ignore[arg-type] # what the class hands over

    monkeypatch.setattr(kind, "_give_back", look)
    lease.release()
    assert seen == [bytes(7)]


@pytest.mark.parametrize("released", [False, True], ids=["held", "released"])
def test_a_forked_child_sees_zeros(
    lender: Lender, cache: MapCache, grants: GrantSource, released: bool
) -> None:
    """In a child views show private zeros, releases do nothing, and the parent's go on."""
    address = lender.lend()
    lease = cache.map_dma(address, PAGE_SIZE, owner="disk")
    view = lease.view
    if released:
        lease.release()
    child = os.fork()
    if not child:
        status = 1
        try:
            assert bytes(view[:7]) == bytes(7)
            view[:4] = b"lost"
            if not released:
                lease.release()
            grants.close(force=True)
            assert bytes(view[:4]) == b"lost"
            for refused in (
                lambda: cache.map_dma(address, 16, owner="child"),
                lambda: grants.read(address, 16),
                lambda: grants.map(address, 16, writable=False, result_out=[]),
            ):
                with pytest.raises(ClosedError):
                    refused()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert lender.is_mapped(ref_of(address)) is not released
    assert lender.read(PAGE_SIZE, 7) == b"page 01"
    if not released:
        assert bytes(view[:7]) == b"page 01"
        lease.release()
    assert not lender.is_mapped(ref_of(address))


# --- ends ----------------------------------------------------------------------------------


def test_close_refuses_while_grants_are_mapped(
    lender: Lender, cache: MapCache, grants: GrantSource
) -> None:
    """The error names domain and references; after the release it closes, twice."""
    address = lender.lend(2)
    lease = cache.map_dma(address, PAGE_SIZE + 1, owner="disk")
    ref = ref_of(address)
    with pytest.raises(LeaseError) as caught:
        grants.close()
    assert f"2 grants of domain {lender.domid} are mapped: references {ref} to {ref + 1}." in str(
        caught.value
    )
    lease.release()
    for _ in range(2):
        grants.close()
    assert "closed" in repr(grants)
    for refused in (
        lambda: cache.map_dma(address, 16, owner="disk"),
        lambda: cache.read(address, 16),
        lambda: cache.write(address, b"x"),
    ):
        with pytest.raises(ClosedError, match=f"grants of domain {lender.domid} are closed"):
            refused()


def test_close_by_force_ends_the_grants(
    lender: Lender, cache: MapCache, grants: GrantSource, caplog: pytest.LogCaptureFixture
) -> None:
    """Each is named by a WARNING, views show zeros, and the lease can still be released."""
    address = lender.lend()
    lease = cache.map_dma(address, PAGE_SIZE, owner="disk")
    view = lease.view
    grants.close(force=True)
    assert caplog.messages == [
        f"domain {lender.domid}: closed by force, still mapped: reference {ref_of(address)}"
    ]
    assert not lender.is_mapped(ref_of(address))
    assert bytes(view[:7]) == bytes(7)
    assert lease.stale
    assert cache.leases()[0].stale
    lease.release()
    assert cache.leases() == ()


def test_a_log_that_raises(
    lender: Lender, cache: MapCache, grants: GrantSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A filter of the log cannot keep a close by force from ending the grants."""
    address = lender.lend()
    cache.map_dma(address, PAGE_SIZE, owner="disk")
    monkeypatch.setattr(logging, "raiseExceptions", False)

    def refuse(_: logging.LogRecord) -> bool:
        raise OSError

    logger = logging.getLogger("xenmapcache")
    logger.addFilter(refuse)
    try:
        grants.close(force=True)
    finally:
        logger.removeFilter(refuse)
    assert (grants.mapped, lender.is_mapped(ref_of(address))) == (0, False)


def test_the_block_of_a_source(lender: Lender) -> None:
    """Its end closes, and complains of what is mapped unless an exception is on its way."""
    address = lender.lend()
    with lender.backend.open_grants() as grants:
        assert grants.read(address, 7) == b"page 01"
    held: list[object] = []
    with pytest.raises(KeyError), lender.backend.open_grants() as grants:
        held.append(grants.map(address, 16, writable=False, result_out=[]))
        raise KeyError
    assert not lender.is_mapped(ref_of(address))


def test_a_cache_that_is_closed_by_force(
    lender: Lender, cache: MapCache, grants: GrantSource
) -> None:
    """It ends its leases' grants with them, and leases no others."""
    address = lender.lend()
    cache.map_dma(address, PAGE_SIZE, owner="disk")
    cache.close(force=True)
    assert grants.mapped == 0
    for refused in (
        lambda: cache.map_dma(address, 16, owner="disk"),
        lambda: cache.read(address, 16),
        lambda: cache.read_into(address, bytearray(4)),
        lambda: cache.write(address, b"x"),
    ):
        with pytest.raises(ClosedError):
            refused()


def test_memory_that_is_dropped(lender: Lender, grants: GrantSource) -> None:
    """If nobody refers to a mapping, it is unmapped, and the next call gives its grants back."""
    address = lender.lend()
    grants.map(address, 16, writable=False, result_out=[])
    assert lender.is_mapped(ref_of(address))  # munmap is not enough
    mapping = grants.map(address, 16, writable=False, result_out=[])
    assert grants.mapped == 1
    mapping.give_back()
    mapping.give_back()
    assert grants.mapped == 0


@pytest.mark.parametrize(
    "name", ["grant", "Lease", "dont_fork", "_index", "GrantMapping", "append"]
)
def test_a_lease_that_cannot_be_granted(
    lender: Lender,
    cache: MapCache,
    grants: GrantSource,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """Whatever fails once the pages are mapped, they are given back, and nobody has a lease."""
    address = lender.lend()

    class Refusing(list[object]):
        def append(self, _: object) -> None:
            raise MemoryError

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    places = {
        "dont_fork": libc,
        "_index": grants,
        "GrantMapping": source,
        "append": None,
        "Lease": leasing,
    }
    place = places.get(name, cache._parts.registry)
    with cache.observe(lambda _: None), pytest.raises(MemoryError):
        if place is None:
            grants.map(address, 16, writable=False, result_out=Refusing())  # type: ignore[arg-type] # wrong on purpose
        monkeypatch.setattr(place, name, fail)
        cache.map_dma(address, 16, owner="disk")
    monkeypatch.undo()
    assert (grants.mapped, cache.leases()) == (0, ())
    assert not lender.is_mapped(ref_of(address))


def test_memory_that_cannot_be_covered(
    lender: Lender, cache: MapCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lease is still held, and can be released again; if only a gap is left, it is filled."""
    address = lender.lend()
    lease = cache.map_dma(address, PAGE_SIZE, owner="disk")
    results = [False, False]
    with monkeypatch.context() as patch:
        patch.setattr(libc, "map_zeros_over", lambda *_, **__: results.pop(0))
        with pytest.raises(XenCallError, match="max_map_count"):
            lease.release()
        assert not lease.released
        assert bytes(lease.view[:7]) == b"page 01"
        results += [False, True]
        lease.release()
    assert not lender.is_mapped(ref_of(address))
