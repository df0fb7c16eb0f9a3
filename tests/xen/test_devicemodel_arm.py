"""A device model of an Arm guest: device memory, INVALIDATE, a lease, and interrupts."""

from __future__ import annotations

import logging
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from tests.xen import stock_guest as stock
from tests.xen.conftest import Recorder, set_memory, wait_for, warnings_of
from tests.xen.lab.platform import Platform
from tests.xen.stock_guest import StockGuest, stock_guest
from xenmapcache import DmaDirection, MapCache, UnsupportedOperationError, open_backend
from xenmapcache.address import MiB
from xenmapcache.devicemodel import IoreqServer

pytestmark = pytest.mark.xen

MMIO = 0x02100000
WIDTHS = (1, 2, 4, 8)
VALUE = 0x8877665544332211

Console = Callable[[str], str]


@pytest.fixture(autouse=True)
def _lab(machine: Platform) -> None:
    if machine.architecture.ports:
        pytest.skip("tests/xen/test_devicemodel.py has this for a machine with ports")
    if reason := stock.missing():
        pytest.skip(reason)


@dataclass
class Served:
    """A guest that runs, and what serves it."""

    guest: StockGuest
    cache: MapCache
    server: IoreqServer
    device: Recorder


@contextmanager
def served(machine: Platform, script: str, console: Console) -> Iterator[Served]:
    """Run a guest that has a device at MMIO from its first instruction on."""
    if not machine.ioreq_servers:
        pytest.skip("Debian's Xen for Arm has no ioreq servers")
    with (
        stock_guest(script, console) as guest,
        open_backend("xen", domid=guest.domid) as backend,
        MapCache(backend) as cache,
    ):
        server, device = IoreqServer(guest.domid, cache), Recorder()
        server.claim_mmio(MMIO, 0x1000, device)
        with server, server.serving():
            guest.unpause()
            yield Served(guest, cache, server, device)


def test_a_xen_without_ioreq_servers(machine: Platform, live_domid: int) -> None:
    """Debian's own for Arm: the error says so, and nothing is left open."""
    if machine.ioreq_servers:
        pytest.skip("this Xen has ioreq servers")
    with open_backend("xen", domid=live_domid) as backend, MapCache(backend) as cache:
        server = IoreqServer(live_domid, cache)
        with pytest.raises(UnsupportedOperationError, match="no ioreq servers .*CONFIG_IOREQ_SERV"):
            server.open()


def test_mmio(machine: Platform, guest_console: Console) -> None:
    """Loads and stores of every size reach the device, on either CPU, and its answers the guest."""
    lines = []
    for cpu in (0, 1):
        for size in WIDTHS:
            value = VALUE & (1 << 8 * size) - 1
            run = f"taskset {1 << cpu:x} devmem"
            lines.append(f'echo "STOCK read $({run} {MMIO + 16 * size} {8 * size})"')
            lines.append(f"{run} {MMIO + 0x100 + 16 * size} {8 * size} {value:#x}")
    with served(machine, "\n".join(lines), guest_console) as its:
        its.guest.wait("end")
        assert its.server.nr_vcpus == 2
        assert its.server.fence is not None
    reads = [int(line.split()[1], 16) for line in its.guest.said() if line.startswith("read")]
    assert reads == [value for _, _, value in its.device.reads]
    assert [item[:2] for item in its.device.reads] == [(16 * size, size) for size in WIDTHS] * 2
    assert (
        its.device.writes
        == [(0x100 + 16 * size, size, VALUE & (1 << 8 * size) - 1) for size in WIDTHS] * 2
    )
    assert (its.server.failures, its.server.lost_answers) == (0, 0)


def test_invalidate(
    machine: Platform, guest_console: Console, caplog: pytest.LogCaptureFixture
) -> None:
    """A guest that balloons sends INVALIDATE; a lease held across it is stale, and is named."""
    script = f"""
while [ "$(devmem {MMIO} 32)" != 0x00000000 ]; do sleep 0.1; done
"""
    with served(machine, script, guest_console) as its, caplog.at_level(logging.WARNING):
        device, cache, server = its.device, its.cache, its.server
        wait_for(lambda: len(device.reads) > 2, "the guest reads")
        address = machine.memory[0] + 16 * MiB
        lease = cache.map_dma(address, 4096, owner="disk0", direction=DmaDirection.FROM_DEVICE)
        set_memory(machine, stock.NAME, stock.MEMORY - 32)
        wait_for(lambda: server.invalidations >= 32, "INVALIDATEs")
        lease.release()
        assert cache.stats().stale_dma_released == 1
        assert any("disk0" in text for text in warnings_of(caplog))
        asked = len(device.reads)
        wait_for(lambda: len(device.reads) > asked + 2, "the guest reads on")
        assert cache.read(address, 4096)
    assert (server.failures, server.lost_answers) == (0, 0)


def test_the_end_of_the_guest(machine: Platform, guest_console: Console) -> None:
    """A guest that is destroyed ends its server."""
    ended = threading.Event()
    with served(machine, f"devmem {MMIO} 32", guest_console) as its:
        its.guest.wait("end")
        its.server.stop()
        thread = threading.Thread(target=its.server.serve_forever, kwargs={"on_end": ended.set})
        thread.start()
        subprocess.run(["xl", "destroy", stock.NAME], check=True, timeout=280)
        assert ended.wait(60)
        thread.join(60)
