"""Debian's own virtio_pci and virtio_blk on a disk of ours: a PVH guest without QEMU, or HVM."""

from __future__ import annotations

import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from tests.xen import stock_guest as stock
from tests.xen.conftest import wait_for, xl
from tests.xen.lab.platform import Platform
from tests.xen.stock_guest import (
    ALL_ROUNDS,
    MEMORY,
    WAITING,
    WORK,
    StockGuest,
    stock_guest,
    sum_of,
)
from xenmapcache import MapCache, open_backend
from xenmapcache.address import MiB
from xenmapcache.devicemodel import IoreqServer, PciBus
from xenmapcache.devicemodel.guest_type import guest_type as toolstack_type
from xenmapcache.devicemodel.pci.messages import is_pirq
from xenmapcache.devicemodel.virtio import VirtioBlock, VirtioMmio, VirtioPci

pytestmark = pytest.mark.xen

BDF = "0000:00:05.0"
LENGTH = 64 * MiB

Run = Callable[..., AbstractContextManager[StockGuest]]


@pytest.fixture
def run(guest_console: Callable[[str], str], machine: Platform) -> Run:
    """Makes a guest that runs a script."""
    if not machine.architecture.ports:
        pytest.skip("a guest looks for PCI devices by I/O ports, and this machine has none")
    if reason := stock.missing():
        pytest.skip(reason)

    def run(script: str, **options: str) -> AbstractContextManager[StockGuest]:
        return stock_guest(script, guest_console, guest_type=machine.guest, **options)

    return run


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The disk's file, of zeros."""
    path = tmp_path / "disk.img"
    with path.open("wb") as created:
        created.truncate(LENGTH)
    return path


@dataclass
class Disk:
    """A guest that runs, and what serves it."""

    guest: StockGuest
    cache: MapCache
    server: IoreqServer
    pci: VirtioPci

    def check(self) -> None:
        """Nothing failed, was lost, or was held across an INVALIDATE."""
        stats = self.cache.stats()
        assert (self.server.failures, self.server.lost_answers) == (0, 0)
        assert (stats.stale_dma_released, stats.stale_dma_held) == (0, 0)


@contextmanager
def served(script: str, file: Path, run: Run, *, pin: int = 0, **options: str) -> Iterator[Disk]:
    """Run a guest that has the disk from its first instruction on."""
    with (
        run(script, **options) as guest,
        open_backend("xen", domid=guest.domid) as backend,
        MapCache(backend) as cache,
        file.open("r+b") as opened,
    ):
        server = IoreqServer(guest.domid, cache)
        with VirtioBlock(server, opened, serial="lab") as block:
            if toolstack_type(guest.domid) == "pvh":
                PciBus(server).plug()
            pci = VirtioPci(server, BDF, block, interrupt_pin=pin)
            pci.plug()
            with server, server.serving():
                guest.unpause()
                yield Disk(guest, cache, server, pci)


@pytest.mark.slow
def test_a_stock_driver_reads_and_writes(file: Path, run: Run) -> None:
    """64 MiB come back as they were written, through both vCPUs, and are what the file holds."""
    script = f"""{WAITING}
echo "STOCK sectors $(cat /sys/block/vda/size) serial $(cat /sys/block/vda/serial)"
dd if=/dev/urandom of=/tmp/r bs=1M count=64 2>/dev/null
echo "STOCK made $(md5sum < /tmp/r | cut -c1-32)"
taskset 1 dd if=/tmp/r of=/dev/vda bs=1M count=32 oflag=direct 2>/dev/null &
taskset 2 dd if=/tmp/r of=/dev/vda bs=1M count=32 skip=32 seek=32 oflag=direct 2>/dev/null
wait
rm /tmp/r
echo "STOCK read $(dd if=/dev/vda bs=1M count=64 iflag=direct 2>/dev/null | md5sum | cut -c1-32)"
sync
"""
    with served(script, file, run) as disk:
        assert disk.guest.wait("sectors") == f"{LENGTH // 512} serial lab"
        made = disk.guest.wait("made")
        assert disk.guest.wait("read") == made
        disk.guest.wait("end")
        disk.check()
    assert sum_of(file) == made


@pytest.mark.slow
def test_the_guest_balloons_meanwhile(file: Path, run: Run) -> None:
    """20 changes of the guest's memory: no stale lease, no failure, no lost byte."""
    with served(WORK, file, run) as disk:
        disk.guest.wait("round 1")
        target = f"/local/domain/{disk.guest.domid}/memory/target"
        for number in range(20):
            before = disk.server.invalidations
            kib = (MEMORY - (40 if number % 2 == 0 else 20)) << 10
            subprocess.run(["xenstore-write", target, str(kib)], check=True)
            if number % 2 == 0:
                wait_for(lambda: disk.server.invalidations > before, "an INVALIDATE")  # noqa: B023 - called at once
        disk.guest.wait("end", 300)
        assert disk.guest.rounds() == ALL_ROUNDS
        assert disk.server.invalidations >= 10
        disk.check()


def test_reset_unplug_and_rescan(
    file: Path, run: Run, record_property: Callable[[str, object], None]
) -> None:
    """The driver is unbound and bound; the device is taken out, and a rescan finds it again."""
    device = f"/sys/bus/pci/devices/{BDF}"
    script = f"""{WAITING}
pattern() {{ dd if=/dev/vda bs=4k count=16 iflag=direct 2>/dev/null | md5sum | cut -c1-32; }}
dd if=/dev/urandom of=/dev/vda bs=4k count=16 oflag=direct 2>/dev/null
echo "STOCK first $(pattern)"
echo "STOCK interrupts $(grep virtio0 /proc/interrupts | tr -s ' \\n' ' ')"
echo {BDF} > /sys/bus/pci/drivers/virtio-pci/unbind
echo {BDF} > /sys/bus/pci/drivers/virtio-pci/bind
{WAITING}
echo "STOCK again $(pattern)"
echo 1 > {device}/remove
echo "STOCK removed"
until [ -b /dev/vda ]; do sleep 0.5; echo 1 > /sys/bus/pci/rescan; done
echo "STOCK found $(pattern)"
"""
    with served(script, file, run) as disk:
        first = disk.guest.wait("first")
        assert disk.guest.wait("again") == first
        assert "msi" in disk.guest.wait("interrupts").lower()
        record_property("measured", disk.guest.wait("interrupts"))
        disk.guest.wait("removed")
        disk.pci.unplug()
        disk.pci.plug()
        assert disk.guest.wait("found") == first
        disk.check()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [("", "none 2"), ("pci=noacpi", "vda 2"), ("acpi=noirq", "vda 2"), ("acpi=off", "vda 1")],
)
def test_arguments_of_the_kernel(
    file: Path, run: Run, machine: Platform, arguments: str, expected: str
) -> None:
    """Which of them let a PVH guest's kernel find the disk, and use both vCPUs."""
    if machine.guest != "pvh":
        pytest.skip("an HVM guest's ACPI tables describe its bus")
    script = """
tries=0
until [ -b /dev/vda ] || [ $tries -ge 20 ]; do tries=$((tries + 1)); sleep 0.1; done
echo "STOCK found $([ -b /dev/vda ] && echo vda || echo none) $(nproc)"
"""
    with served(script, file, run, arguments=arguments) as disk:
        assert disk.guest.wait("found") == expected
        assert disk.server.requests < 1000
        disk.check()


@pytest.fixture
def hvm(machine: Platform) -> None:
    """For what only HVM guests have."""
    if machine.guest != "hvm":
        pytest.skip("only HVM guests have INTx, pirqs and interrupt lines")


INTERRUPTED = f"""{WAITING}
dd if=/dev/urandom of=/tmp/r bs=256k count=1 2>/dev/null
echo "STOCK made $(md5sum < /tmp/r | cut -c1-32)"
dd if=/tmp/r of=/dev/vda bs=4k oflag=direct 2>/dev/null
echo "STOCK read $(dd if=/dev/vda bs=4k count=64 iflag=direct 2>/dev/null | md5sum | cut -c1-32)"
echo "STOCK interrupts $(grep virtio0 /proc/interrupts | tr -s ' \\n' ' ')"
"""
"""128 requests, each of which waits for an interrupt; the guest says what it calls them."""


def interrupts_of(guest: StockGuest, record_property: Callable[[str, object], None]) -> str:
    """What the guest calls the interrupts that it has had, when the data has come back."""
    assert guest.wait("read") == guest.wait("made")
    line = guest.wait("interrupts")
    assert sum(int(word) for word in line.split() if word.isdecimal()) >= 128
    record_property("measured", line)
    return line


def assert_is_line(interrupts: str) -> None:
    """They came over a line of the guest's I/O APIC, which Linux 6.1 makes a pirq."""
    assert "io-apic" in interrupts.lower().replace("ioapic", "io-apic"), interrupts


@pytest.mark.usefixtures("hvm")
def test_interrupts(file: Path, run: Run, record_property: Callable[[str, object], None]) -> None:
    """Without MSI-X the driver takes INTx, and what it writes comes back."""
    with served(INTERRUPTED, file, run, pin=1, arguments="pci=nomsi") as disk:
        assert_is_line(interrupts_of(disk.guest, record_property))
        disk.check()


@pytest.mark.usefixtures("hvm")
def test_messages_as_pirqs(
    file: Path, run: Run, record_property: Callable[[str, object], None]
) -> None:
    """Xen raises an event channel for a message of vector 0, whose mask bit Linux never clears."""
    pirqs = "hvm_pirq = 1\n"  # an option since 4.19; before, always so
    with served(INTERRUPTED, file, run, configuration=pirqs) as disk:
        assert "xen-pirq -msi-x" in interrupts_of(disk.guest, record_property)
        table = disk.pci._msix
        queue = 1  # the vector after that of the configuration
        data, control = (table.read(16 * queue + place, 4) for place in (8, 12))
        assert (is_pirq(data), control & 1) == (True, 1), (hex(data), control)
        disk.check()


ADDRESS, LINE = 0xFE800000, 7


def acpi_table() -> bytes:
    """An SSDT with a virtio-mmio device, as the ACPI specification 6.5 encodes it (chapter 20)."""

    def package(content: bytes) -> bytes:
        length = len(content) + 1
        if length < 64:
            return bytes([length]) + content
        return bytes([1 << 6 | length + 1 & 0xF, length + 1 >> 4]) + content

    def name(word: bytes, value: bytes) -> bytes:
        return b"\x08" + word + value

    memory = struct.pack("<BHBII", 0x86, 9, 1, ADDRESS, 0x1000)  # Memory32Fixed, ReadWrite
    line = struct.pack("<BHBBI", 0x89, 6, 1, 1, LINE)  # Interrupt: consumer, level, active high
    resources = memory + line + b"\x79\0"
    device = b"VM00" + name(b"_HID", b"\x0dLNRO0005\0") + name(b"_UID", b"\0")
    buffer = b"\x0a" + bytes([len(resources)]) + resources
    device += name(b"_CRS", b"\x11" + package(buffer))
    body = b"\x10" + package(b"\\_SB_" + b"\x5b\x82" + package(device))
    head = b"SSDT" + struct.pack("<I", 36 + len(body)) + b"\x02\0"
    head += b"XMCACH" + b"VIRTMMIO" + struct.pack("<III", 1, 0, 0)
    table = bytearray(head + body)
    table[9] = -sum(table) & 0xFF
    return bytes(table)


@pytest.mark.usefixtures("hvm")
def test_over_mmio_by_acpi(
    file: Path, tmp_path: Path, run: Run, record_property: Callable[[str, object], None]
) -> None:
    """A table that the configuration adds names the device; its interrupts are an ISA line."""
    table = tmp_path / "virtio-mmio.aml"
    table.write_bytes(acpi_table())
    with (
        run(INTERRUPTED, configuration=f'acpi_firmware = "{table}"\n') as guest,
        open_backend("xen", domid=guest.domid) as backend,
        MapCache(backend) as cache,
        file.open("r+b") as opened,
    ):
        server = IoreqServer(guest.domid, cache)
        with VirtioBlock(server, opened, serial="lab") as block:
            VirtioMmio(server, ADDRESS, block, interrupt=partial(server.set_isa_irq, LINE))
            with server, server.serving():
                guest.unpause()
                assert_is_line(interrupts_of(guest, record_property))
        assert (server.failures, server.lost_answers) == (0, 0)


@contextmanager
def command(file: Path, record: Path) -> Iterator[subprocess.Popen[str]]:
    """Run ``xenmapcache disk`` until it serves; it is killed at the end if it still runs."""
    line = [sys.executable, "-m", "xenmapcache", "disk", stock.NAME, str(file)]
    line += ["--record", str(record)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            printed = process.stdout.readline()
            while not printed.startswith("now run"):
                assert printed, "the command has ended"
                printed = process.stdout.readline()
            yield process
        finally:
            process.kill()


KILLS = 5


@pytest.mark.slow
def test_the_command_is_killed_under_load(file: Path, tmp_path: Path, run: Run) -> None:
    """The guest goes on after each kill and restart; no write that was answered is lost."""
    record = tmp_path / "record"
    with run(WORK) as guest:
        for kill in range(KILLS):
            with command(file, record) as process:
                if not kill:
                    guest.unpause()
                guest.wait(f"round {2 * kill + 1}")
                process.kill()
                assert process.wait(60) == -signal.SIGKILL
        with command(file, record) as process:
            guest.wait("end", 300)
            assert guest.rounds() == ALL_ROUNDS
            xl("destroy", stock.NAME)
            assert process.wait(60) == 0  # it sees the guest's end
