"""Pages that a real Linux guest has granted, by its module xen_gntalloc."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.devicemodel.virtio_kit import ALL_FEATURES, EVENT_IDX, Line, MmioDriver, Ring
from tests.xen import stock_guest as stock
from tests.xen.conftest import wait_for
from tests.xen.lab.platform import Platform
from tests.xen.stock_guest import stock_guest
from xenmapcache import FaultError, GrantError, GuestMemory, MapCache, open_backend
from xenmapcache.address import PAGE_SIZE
from xenmapcache.devicemodel import IoreqServer
from xenmapcache.devicemodel.virtio import VirtioBlock, VirtioMmio
from xenmapcache.devicemodel.virtio.queue import ACCESS_PLATFORM
from xenmapcache.grants import GrantSource, grant_address

pytestmark = [pytest.mark.xen, pytest.mark.slow]

WRITABLE, READ_ONLY = 8, 4
WORD, TAKE_BACK = 1, 2
"""What the guest does; see tests/xen/guest/granter.c."""


@dataclass
class Granted:
    """A guest that has granted pages: a mailbox, writable ones, and ones that are read-only."""

    domid: int
    cache: MapCache
    grants: GrantSource
    mailbox: int
    writable: int
    read_only: int

    def order(self, what: int, kind: int = 0, argument: int = 0) -> int:
        """Have the guest do something, and return what it says."""
        self.cache.write(self.mailbox + 4, struct.pack("<II", kind, argument))
        self.cache.write(self.mailbox, struct.pack("<I", what))
        wait_for(lambda: self.cache.read(self.mailbox, 4) == bytes(4), f"order {what} done", 20)
        return int.from_bytes(self.cache.read(self.mailbox + 12, 4), "little")


def content(kind: int, count: int) -> bytes:
    """What the guest has put into its pages."""
    words = (kind << 24 | page << 16 | word for page in range(count) for word in range(1024))
    return struct.pack(f"<{count * 1024}I", *words)


@pytest.fixture(scope="module")
def guest(
    guest_console: Callable[[str], str], machine: Platform
) -> Iterator[tuple[int, list[int]]]:
    """The domain, and its first reference of each kind."""
    if reason := stock.missing():
        pytest.skip(reason)
    script = f"granter {WRITABLE} {READ_ONLY} || echo STOCK refused\n"
    with stock_guest(script, guest_console, "granter", guest_type=machine.guest) as made:
        made.unpause()
        yield made.domid, [int(ref) for ref in made.wait("refs").split()]


@contextmanager
def opened(guest: tuple[int, list[int]], binding: str) -> Iterator[Granted]:
    """A cache over the guest and what it has granted."""
    domid, refs = guest
    with (
        open_backend("xen", domid=domid, binding=binding) as backend,
        backend.open_grants() as grants,
        MapCache(backend, grants=grants) as cache,
    ):
        yield Granted(domid, cache, grants, *map(grant_address, refs))
        assert (grants.mapped, cache.leases()) == (0, ())


@pytest.fixture(params=["cffi", "ctypes"])
def granted(guest: tuple[int, list[int]], request: pytest.FixtureRequest) -> Iterator[Granted]:
    """That, through either binding."""
    with opened(guest, request.param) as made:
        yield made


def test_a_lease_is_the_guests_memory(granted: Granted) -> None:
    """All pages of it, in both directions; after the release a view shows zeros."""
    cache = granted.cache
    with cache.map_dma(granted.writable, WRITABLE * PAGE_SIZE, owner="disk0") as lease:
        view = lease.view
        assert view[8:] == content(0, WRITABLE)[8:]
        assert granted.grants.mapped == WRITABLE
        view[:4] = b"\x78\x56\x34\x12"
        assert granted.order(WORD, 0, 0) == 0x12345678
        view[:4] = bytes(4)
    assert view == bytes(WRITABLE * PAGE_SIZE)
    assert granted.order(WORD, 0, 5) == 5


def test_a_read_only_grant(granted: Granted) -> None:
    """It is leased to be read, and not to be written."""
    cache = granted.cache
    length = READ_ONLY * PAGE_SIZE
    with cache.map_dma(granted.read_only, length, owner="disk0", direction="to-device") as lease:
        assert lease.view == content(1, READ_ONLY)
    with pytest.raises(GrantError):
        cache.map_dma(granted.read_only, length, owner="disk0", direction="from-device")
    with pytest.raises(GrantError):
        cache.write(granted.read_only, b"no")


def test_copies(granted: Granted) -> None:
    """Reads and writes map nothing, go over pages, and meet what is mapped at the time."""
    cache = granted.cache
    expected = content(0, WRITABLE)
    assert cache.read(granted.writable + 4000, 200) == expected[4000:4200]
    cache.write(granted.writable + 2 * PAGE_SIZE - 2, b"four")
    assert GuestMemory(cache).read_u32(granted.writable + 2 * PAGE_SIZE - 2) == 0x72756F66
    cache.write(granted.writable + 2 * PAGE_SIZE - 2, expected[2 * PAGE_SIZE - 2 :][:4])
    assert granted.grants.mapped == 0


def test_what_is_not_granted(granted: Granted) -> None:
    """All of it or nothing, and what is granted can be mapped afterwards."""
    cache = granted.cache
    after = granted.read_only + READ_ONLY * PAGE_SIZE
    with pytest.raises(GrantError, match="0x"):
        cache.map_dma(after - PAGE_SIZE, 2 * PAGE_SIZE, owner="disk0", direction="to-device")
    with pytest.raises(FaultError):
        cache.read(grant_address(0x7FFF0000), 4)
    with cache.map_dma(after - PAGE_SIZE, 1, owner="disk0", direction="to-device"):
        assert granted.grants.mapped == 1


def test_a_forked_child(granted: Granted) -> None:
    """It sees zeros, its end ends nothing, and the parent goes on."""
    with granted.cache.map_dma(granted.writable, PAGE_SIZE, owner="disk0") as lease:
        view = lease.view
        child = os.fork()
        if not child:
            os._exit(int(bytes(view) != bytes(PAGE_SIZE)))
        assert os.waitpid(child, 0)[1] == 0
        assert view[8:] == content(0, 1)[8:]


@dataclass
class GrantingMachine:
    """What a driver has of the guest when Dom0 plays it: granted pages, and a device's registers.

    Args:
        memory: through which the granted pages are read and written.
        device: whose handlers are called.
    """

    memory: MapCache
    device: VirtioMmio

    def read(self, address: int, length: int) -> bytes:
        """Read a granted page."""
        return self.memory.read(address, length)

    def write(self, address: int, data: bytes) -> None:
        """Write one."""
        self.memory.write(address, data)

    def mmio_read(self, address: int, size: int) -> int:
        """Read a register."""
        return self.device.read(address, size)

    def mmio_write(self, address: int, value: int, size: int) -> None:
        """Write a register."""
        self.device.write(address, size, value)


def test_a_virtio_disk(granted: Granted, tmp_path: Path) -> None:
    """Ring and buffers are granted pages, and none is mapped when its request is answered.

    Dom0 plays the driver: Debian's kernels have none that gives grants.
    """
    on_disk = os.urandom(4 * PAGE_SIZE)
    path = tmp_path / "disk.img"
    path.write_bytes(on_disk)
    cache, line = granted.cache, Line()
    header, data = granted.writable + PAGE_SIZE, granted.writable + 2 * PAGE_SIZE
    server = IoreqServer(granted.domid, cache)
    with path.open("r+b") as file, VirtioBlock(server, file) as disk:
        mmio = VirtioMmio(server, 0xFE00_0000, disk, interrupt=line)
        driver = MmioDriver(GrantingMachine(cache, mmio), 0, line)

        def ask(address: int, length: int) -> int:
            cache.write(header, struct.pack("<IIQ", 0, 0, 8) + b"\xff")
            head = ring.chain([(header, 16)], [(address, length), (header + 16, 1)])
            driver.send(ring, head)
            ((answered, _),) = driver.collect(ring, 1)
            assert (answered, granted.grants.mapped, cache.leases()) == (head, 0, ())
            return cache.read(header + 16, 1)[0]

        with server:
            ring = Ring(driver.guest, granted.writable, 8)
            assert driver.begin(ALL_FEATURES & ~EVENT_IDX | ACCESS_PLATFORM)
            driver.set_up(0, ring.size, **ring.addresses)
            driver.write(0x70, 15)
            assert ask(data, 3 * PAGE_SIZE) == 0
            for word in (2048, 3000, 5119):  # as the guest itself sees it
                seen = granted.order(WORD, 0, word).to_bytes(4, "little")
                assert seen == on_disk[4 * word - PAGE_SIZE :][:4]
            assert ask(granted.read_only + READ_ONLY * PAGE_SIZE, 512) == 1  # not granted: IOERR
            assert ask(granted.read_only, 512) == 1  # granted to be read, and not to be written
            assert ask(data, 512) == 0
            driver.write(0x70, 0)
    cache.write(granted.writable, content(0, WRITABLE))


def test_the_guest_takes_them_back(guest: tuple[int, list[int]]) -> None:
    """What is leased stays until the release; from then on the reference means nothing."""
    with opened(guest, "cffi") as granted:
        cache = granted.cache
        with cache.map_dma(granted.writable, PAGE_SIZE, owner="disk0") as lease:
            assert granted.order(TAKE_BACK, 0) == 0
            assert lease.view[8:16] == content(0, 1)[8:16]

        def is_gone() -> bool:
            try:
                cache.read(granted.writable, 4)
            except GrantError:
                return True
            return False

        wait_for(is_gone, "the guest's kernel has ended the grant", 30)
        with pytest.raises(GrantError):
            cache.map_dma(granted.writable, PAGE_SIZE, owner="disk0")
