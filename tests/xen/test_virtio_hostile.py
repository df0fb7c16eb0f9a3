"""A virtio driver that breaks the rules, in a real guest: its device stops, and nothing else does.

The agent plays the driver of two disks: of one that it treats badly, and of one that it does not.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from tests.devicemodel.virtio_kit import INDIRECT, NEXT, WRITE, Ring
from tests.devicemodel.virtio_pci_kit import BAR, VirtioPciDriver
from tests.xen.agent import Agent
from tests.xen.conftest import Served, wait_for
from xenmapcache.address import MiB
from xenmapcache.devicemodel import PciBus
from xenmapcache.devicemodel.virtio import VirtioBlock, VirtioPci

pytestmark = pytest.mark.xen

SECTOR, SECTORS, SIZE = 512, 64, 8
IN, IOERR = 0, 1
RUNNING, NEEDS_RESET = 15, 0x40
NOWHERE: Final = 1 << 40
"""An address above the end of the guest's memory."""
SPACE: Final = 64 << 10
"""Of the guest's memory, for one driver: its ring, and the data after it."""


class AgentMachine:
    """A real guest's memory and buses, as drivers for tests use them: each access is the agent's.

    Args:
        agent: of the guest.

    Attributes:
        base: where its first MiB begins, which is in one piece.
    """

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self.base = agent.address(0)
        assert agent.address(MiB - 1) == self.base + MiB - 1

    def read(self, address: int, length: int) -> bytes:
        """Read memory; the agent reads whole words."""
        start = address - self.base
        first = start & ~3
        data = self._agent.peek(first, (start + length - first + 3) & ~3)
        return data[start - first :][:length]

    def write(self, address: int, data: bytes) -> None:
        """Write memory. The rest of the first and last word is written as it was."""
        start = address - self.base
        first, end = start & ~3, (start + len(data) + 3) & ~3
        if end - first != len(data):
            whole = bytearray(self._agent.peek(first, end - first))
            whole[start - first : start - first + len(data)] = data
            data = bytes(whole)
        self._agent.poke(first, data)

    def mmio_read(self, address: int, size: int) -> int:
        """Read device memory."""
        return self._agent.load(address, size)

    def mmio_write(self, address: int, value: int, size: int) -> None:
        """Write device memory."""
        self._agent.store(address, value, size)

    def pci_read(self, bdf: str, offset: int, size: int) -> int:
        """Read configuration space through ports 0xcf8 and 0xcfc."""
        return self._agent.port_in(self._select(bdf, offset), size)

    def pci_write(self, bdf: str, offset: int, value: int, size: int) -> None:
        """Write configuration space through them."""
        self._agent.port_out(self._select(bdf, offset), value, size)

    def _select(self, bdf: str, offset: int) -> int:
        device, function = (int(part, 16) for part in bdf.rpartition(":")[2].split("."))
        self._agent.port_out(0xCF8, 1 << 31 | device << 11 | function << 8 | offset & 0xFC)
        return 0xCFC + (offset & 3)


class Player:
    """The driver of one disk, which looks for answers and takes no interrupts.

    Args:
        machine: the guest.
        number: of the disk, from 0.
    """

    def __init__(self, machine: AgentMachine, number: int) -> None:
        self._machine = machine
        self._ring_at = machine.base + number * SPACE
        self.data = self._ring_at + SPACE // 2
        self.driver = VirtioPciDriver(machine, bdf_of(number), BAR + number * MiB)
        self.driver.find(msix=False)
        self.start()

    def start(self, **places: int) -> None:
        """Reset the disk and set it up; some areas of the ring may be elsewhere."""
        self.ring = Ring(self._machine, self._ring_at, SIZE)
        self.ring.descriptors = places.get("descriptors", self.ring.descriptors)
        self.ring.driver = places.get("driver", self.ring.driver)
        self.ring.device = places.get("device", self.ring.device)
        self.driver.start(self.ring)

    def send(self, *heads: int) -> None:
        """Make chains available, and notify the disk."""
        self.ring.offer(*heads)
        self.driver.kick()

    def read_request(self, sector: int, address: int, length: int) -> int:
        """Ask for sectors; return the status."""
        self._machine.write(self.data, struct.pack("<IIQ", IN, 0, sector) + b"\xff")
        status = self.data + 16
        head = self.ring.chain([(self.data, 16)], [(address, length), (status, 1)])
        self.send(head)
        used = self.ring.device + 2
        wait_for(lambda: self.ring.u16(used) != self.ring.seen, "the request's end")
        assert [each[0] for each in self.ring.used()] == [head]
        return self._machine.read(status, 1)[0]

    def check_a_sector(self, sector: int) -> None:
        """A request of a good driver is answered."""
        address = self.data + 1024
        assert self.read_request(sector, address, SECTOR) == 0
        assert self._machine.read(address, SECTOR) == content(sector)
        assert self.driver.status == RUNNING


def bdf_of(number: int) -> str:
    """Where a disk is on the bus."""
    return f"0000:00:{5 + number:02x}.0"


def content(sector: int) -> bytes:
    """What both disks have there."""
    return bytes([sector + 1]) * SECTOR


@dataclass
class Players:
    """The drivers of both disks."""

    bad: Player
    good: Player


@pytest.fixture
def players(served: Served, tmp_path: Path) -> Iterator[Players]:
    """Both disks, and a driver of each."""
    with ExitStack() as stack:
        if served.machine.guest == "pvh":
            bus = PciBus(served.server)
            bus.plug()
            stack.callback(bus.unplug)
        for number in (0, 1):
            path = tmp_path / f"{number}.img"
            path.write_bytes(b"".join(map(content, range(SECTORS))))
            file = stack.enter_context(path.open("r+b"))
            block = VirtioBlock(served.server, file, name=f"disk{number}")
            stack.enter_context(block)
            pci = VirtioPci(served.server, bdf_of(number), block)
            pci.plug()
            stack.callback(pci.unplug)
        machine = AgentMachine(served.agent.on(0))
        yield Players(Player(machine, 0), Player(machine, 1))


def loop(bad: Player) -> None:
    """A chain whose second descriptor names the first."""
    bad.ring.put(0, bad.data, 16, NEXT, 1)
    bad.ring.put(1, bad.data, SECTOR, NEXT, 0)
    bad.send(0)


def too_long(bad: Player) -> None:
    """A request of 4 GiB, in a guest that has less."""
    bad.ring.put(0, bad.data, 16, NEXT, 1)
    bad.ring.put(1, bad.data, 0xFFFFFFFF, WRITE)
    bad.send(0)


def jumping_index(bad: Player) -> None:
    """More requests than the ring has entries."""
    bad.ring.put_u16(bad.ring.driver + 2, 0x8000)
    bad.driver.kick()


def unknown_head(bad: Player) -> None:
    """A descriptor that does not exist."""
    bad.send(0xFFFF)


def readable_last(bad: Player) -> None:
    """What the device may read stands after what it writes."""
    bad.ring.put(0, bad.data, SECTOR, NEXT | WRITE, 1)
    bad.ring.put(1, bad.data, 16)
    bad.send(0)


def table_nowhere(bad: Player) -> None:
    """A table of descriptors above the end of memory."""
    bad.ring.put(0, NOWHERE, 32, INDIRECT)
    bad.send(0)


def header_nowhere(bad: Player) -> None:
    """What the request is, above the end of memory."""
    bad.ring.put(0, NOWHERE, 16, NEXT, 1)
    bad.ring.put(1, bad.data, SECTOR, WRITE)
    bad.send(0)


def descriptors_nowhere(bad: Player) -> None:
    """A ring whose descriptors are above the end of memory."""
    bad.start(descriptors=NOWHERE)
    bad.send(0)


MISDEEDS: tuple[Callable[[Player], None], ...] = (
    loop,
    too_long,
    jumping_index,
    unknown_head,
    readable_last,
    table_nowhere,
    header_nowhere,
    descriptors_nowhere,
)


def test_broken_rules(served: Served, players: Players, caplog: pytest.LogCaptureFixture) -> None:
    """The disk asks for a reset; the other disk serves the other vCPU; a reset makes it good."""
    caplog.set_level("INFO", "xenmapcache.devicemodel")
    bad, good = players.bad, players.good
    bad.check_a_sector(1)
    for number, misdeed in enumerate(MISDEEDS):
        misdeed(bad)
        assert bad.driver.status == RUNNING | NEEDS_RESET, misdeed.__name__
        served.agent.on(1)
        good.check_a_sector(number)
        served.agent.on(0)
        bad.driver.kick()  # of no effect before the reset
        assert bad.driver.status == RUNNING | NEEDS_RESET
        bad.start()
        bad.check_a_sector(SECTORS - 1 - number)
    assert "'disk0' needs a reset by its driver" in caplog.text
    assert all(record.levelname == "INFO" for record in caplog.records)
    assert served.server.failures == 0
    assert served.cache.leases() == ()


def test_data_without_memory(served: Served, players: Players) -> None:
    """Such a request fails, and those after it do not."""
    bad = players.bad
    for address, length in ((NOWHERE, SECTOR), ((1 << 52) - SECTOR, SECTOR), (NOWHERE, 8 * SECTOR)):
        assert bad.read_request(3, address, length) == IOERR
        bad.check_a_sector(4)
    assert served.cache.leases() == ()
