"""The mock's grants: what a guest lends, takes back and uses again, as seen on a real Xen."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Iterator

import pytest

from xenmapcache import (
    FaultError,
    GrantError,
    MapCache,
    MockDomain,
    MockHypervisor,
    XenCallError,
    open_backend,
)
from xenmapcache.address import PAGE_SIZE
from xenmapcache.devicemodel import DmaEngine, DmaStatus, DmaTransfer, IoreqServer
from xenmapcache.grants import GRANT_BIT, GrantMapping, GrantSource, grant_address
from xenmapcache.guest import Segments
from xenmapcache.mock.grants import GrantDma


@pytest.fixture
def guest() -> MockDomain:
    """A guest of 16 pages that say which they are."""
    guest = MockHypervisor().create_domain(memory=16 * PAGE_SIZE)
    for gfn in range(16):
        guest.write(gfn * PAGE_SIZE, b"page %02d" % gfn)
    return guest


@pytest.fixture
def source(guest: MockDomain) -> Iterator[GrantSource]:
    """What a device model maps and copies."""
    with open_backend("mock", domain=guest) as backend:
        source = backend.open_grants()
        yield source
        source.close(force=True)


def mapped(source: GrantSource, ref: int, count: int = 1) -> GrantMapping:
    """Map granted pages for writing."""
    length = count * PAGE_SIZE
    return source.map(grant_address(ref), length, writable=True, result_out=[])


def test_references(guest: MockDomain) -> None:
    """Several pages get consecutive references, and those before 8 are the guest's own."""
    assert guest.grants.grant(1) == 8
    assert guest.grants.grant(2, 3) == 9
    assert guest.grants.grant(1) == 12


def test_references_come_back(guest: MockDomain, source: GrantSource) -> None:
    """The reference that was freed last is used first; several pages take free neighbours."""
    grants = guest.grants
    refs = [grants.grant(gfn) for gfn in range(4)]
    assert all(map(grants.revoke, refs))
    assert grants.grant(5, 2) == refs[0]
    assert [grants.grant(6), grants.grant(7)] == [refs[3], refs[2]]
    assert source.read(grant_address(refs[3]), 7) == b"page 06"
    assert grants.revoke(refs[0])
    assert grants.revoke(refs[2])
    assert grants.grant(1, 2) == refs[3] + 1  # two are free, which are apart
    with pytest.raises(ValueError, match="reference 99 is not granted"):
        grants.revoke(99)


def test_what_cannot_be_granted(guest: MockDomain, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that are not there, no pages, and more than a grant table has."""
    with pytest.raises(FaultError):
        guest.grants.grant(15, 2)
    for gfn, count in ((1, 0), (-1, 1), (1, -1)):
        with pytest.raises(ValueError, match="at address|is negative"):
            guest.grants.grant(gfn, count)
    monkeypatch.setattr("xenmapcache.mock.grants._MAX_GRANTS", 2)
    guest.grants.grant(1, 2)
    with pytest.raises(ValueError, match="can grant 2 pages at a time"):
        guest.grants.grant(1)


def test_taken_back_while_mapped(guest: MockDomain, source: GrantSource) -> None:
    """The grant lives until its last mapping ends: until then new maps work."""
    ref = guest.grants.grant(1, 2)
    mapping = mapped(source, ref, 2)
    assert not guest.grants.revoke(ref, 2)
    assert bytes(mapping.bytes[:7]) == b"page 01"
    other = mapped(source, ref)
    assert source.read(grant_address(ref), 7) == b"page 01"
    assert guest.grants.grant(3) == ref + 2  # they are not free yet
    mapping.give_back()
    assert guest.grants.is_mapped(ref)
    other.give_back()
    with pytest.raises(GrantError):
        mapped(source, ref)
    with pytest.raises(GrantError, match="has not granted it"):
        source.read(grant_address(ref), 7)
    assert guest.grants.grant(3) == ref


def test_the_guest_gives_a_granted_page_up(guest: MockDomain, source: GrantSource) -> None:
    """As long as one mapping is left, it and all new ones show the old page; then the new one."""
    ref = guest.grants.grant(1)
    mapping = mapped(source, ref)
    guest.balloon_out(PAGE_SIZE, PAGE_SIZE)
    guest.balloon_in(PAGE_SIZE, PAGE_SIZE)
    guest.write(PAGE_SIZE, b"renewed")
    again = mapped(source, ref)
    assert {bytes(each.bytes[:7]) for each in (mapping, again)} == {b"page 01"}
    assert source.read(grant_address(ref), 7) == b"page 01"
    mapping.give_back()
    again.give_back()
    assert source.read(grant_address(ref), 7) == b"renewed"
    guest.balloon_out(PAGE_SIZE, PAGE_SIZE)
    with pytest.raises(GrantError):
        mapped(source, ref)
    with pytest.raises(GrantError, match="there is no page"):
        source.read(grant_address(ref), 7)


def test_the_guest_is_destroyed(guest: MockDomain, source: GrantSource) -> None:
    """What is mapped lives on and keeps the domain from going; nothing new is mapped or copied."""
    ref = guest.grants.grant(1)
    mapping = mapped(source, ref)
    guest.destroy()
    assert guest.state == "dying"
    assert bytes(mapping.bytes[:7]) == b"page 01"
    with pytest.raises(GrantError):
        mapped(source, ref)
    with pytest.raises(GrantError, match="is being destroyed"):
        source.read(grant_address(ref), 7)
    mapping.give_back()
    assert guest.state == "gone"
    with pytest.raises(XenCallError, match="no such domain"):
        source.read(grant_address(ref), 7)


def test_one_page_is_mapped_64_times(guest: MockDomain, source: GrantSource) -> None:
    """Xen maps a granted page 64 times, and then refuses it."""
    ref = guest.grants.grant(1)
    mappings = [mapped(source, ref) for _ in range(64)]
    with pytest.raises(GrantError, match="mapped too often") as caught:
        mapped(source, ref)
    assert caught.value.errno == errno.EINVAL
    mappings.pop().give_back()
    mapped(source, ref).give_back()


def test_calls_are_logged(guest: MockDomain, source: GrantSource) -> None:
    """Maps and unmaps are in the log of calls, with the first reference."""
    ref = guest.grants.grant(1, 2)
    mapped(source, ref, 2).give_back()
    with pytest.raises(GrantError):
        mapped(source, 99)
    guest.grants.unmap(0)  # a second time, which changes nothing
    assert [tuple(call) for call in guest.calls] == [
        ("map_grants", ref, 2, 0),
        ("unmap_grants", ref, 2, 0),
        ("map_grants", 99, 1, errno.EINVAL),
    ]


def test_memory_that_was_dropped(guest: MockDomain, source: GrantSource) -> None:
    """A mapping whose memory was freed unreleased stays mapped for Xen until the next call."""
    ref = guest.grants.grant(1)
    mapped(source, ref)
    assert guest.grants.is_mapped(ref)
    other = guest.grants.grant(2)
    assert source.read(grant_address(other), 7) == b"page 02"
    kept = mapped(source, other)
    assert not guest.grants.is_mapped(ref)
    kept.give_back()


def test_many_threads(guest: MockDomain, source: GrantSource) -> None:
    """Leases come and go in four threads, whose views are kept: each sees its page, then zeros."""
    refs = [guest.grants.grant(gfn) for gfn in range(4)]
    problems: list[object] = []

    def work(number: int) -> None:
        for _ in range(50):
            with cache.map_dma(grant_address(refs[number]), 7, owner=f"{number}") as lease:
                view = lease.view
                seen = bytes(view)
            if (seen, bytes(view)) != (b"page %02d" % number, bytes(7)):
                problems.append((number, seen, bytes(view)))

    with open_backend("mock", domain=guest) as backend, MapCache(backend, grants=source) as cache:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert problems == []
    assert (source.mapped, guest.grants.mappings) == (0, 0)


# --- the driver's side ---------------------------------------------------------------------------


@pytest.fixture
def driver(guest: MockDomain) -> GrantDma:
    """A driver whose device gets its buffers by grants."""
    return GrantDma(guest.grants)


def test_a_request_by_grants(guest: MockDomain, source: GrantSource, driver: GrantDma) -> None:
    """The driver lends a buffer, the device fills it, and both are done."""
    with open_backend("mock", domain=guest) as backend:
        cache = MapCache(backend, grants=source)
        address = driver.map(2 * PAGE_SIZE - 4, 8)
        assert address & GRANT_BIT
        lease = cache.map_dma(address, 8, owner="disk", direction="from-device")
        lease.view[:] = b"fromdisk"
        kept = lease.view
        lease.release()
        driver.unmap(address, 8)
        assert driver.broken == ""
        assert guest.read(2 * PAGE_SIZE - 4, 8) == b"fromdisk"
        assert bytes(kept) == bytes(8)
        read_only = driver.map(PAGE_SIZE, 8, to_device=True)
        with pytest.raises(GrantError):
            cache.map_dma(read_only, 8, owner="disk", direction="from-device")
        cache.map_dma(read_only, 8, owner="disk", direction="to-device").release()
        driver.unmap(read_only, 8)
        cache.close()


def test_a_grant_that_is_mapped_at_completion(
    guest: MockDomain, source: GrantSource, driver: GrantDma, caplog: pytest.LogCaptureFixture
) -> None:
    """The driver disables the device, as Linux does, and lends it no further buffer."""
    address = driver.map(PAGE_SIZE, 2 * PAGE_SIZE)
    mapping = mapped(source, 9)
    with caplog.at_level(logging.WARNING, "xenmapcache"):
        driver.unmap(address, 2 * PAGE_SIZE)
    assert "reference 9 is still mapped" in driver.broken
    assert caplog.messages == [f"domain {guest.domid}: {driver.broken}"]
    with pytest.raises(XenCallError, match="has disabled the device"):
        driver.map(PAGE_SIZE, 1)
    mapping.give_back()


def test_buffers_that_are_none(driver: GrantDma) -> None:
    """A buffer has at least one byte, and lies in guest memory."""
    with pytest.raises(ValueError, match="is 0"):
        driver.map(PAGE_SIZE, 0)
    with pytest.raises(FaultError):
        driver.map(15 * PAGE_SIZE, 2 * PAGE_SIZE)


def test_an_engine_ends_the_grants_first(
    guest: MockDomain, source: GrantSource, driver: GrantDma, caplog: pytest.LogCaptureFixture
) -> None:
    """When a transfer's end is told, so that the guest may hear of it, no grant is mapped."""
    broken: list[str] = []

    def complete(_: DmaTransfer) -> None:
        driver.unmap(address, 16)
        broken.append(driver.broken)

    with open_backend("mock", domain=guest) as backend, MapCache(backend, grants=source) as cache:
        server = IoreqServer(guest, cache)
        with server, DmaEngine(server, name="disk") as engine:
            address = driver.map(2 * PAGE_SIZE - 8, 16)
            ranges = [(address, 16), (0x5000, 4)]
            done = engine.submit(ranges, "from-device", fill, on_end=complete)
            bad = engine.submit([(grant_address(99), 16)], "from-device", fill)
            engine.drain()
            assert (done.status, bad.status) == (DmaStatus.DONE, DmaStatus.FAILED)
    assert broken == [""]
    assert guest.read(2 * PAGE_SIZE - 8, 16) == b"x" * 16
    assert isinstance(bad.error, GrantError)
    assert not [each for each in caplog.records if each.levelno > logging.INFO]


def fill(memory: Segments) -> int:
    """Write everywhere, as a device does."""
    memory[:] = b"x" * len(memory)
    return len(memory)
