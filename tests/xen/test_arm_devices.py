"""An Arm guest served by our device models: device memory, interrupts, INVALIDATE.

Debian's own Xen for Arm has no ioreq servers, so these tests run where the lab has built one.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from tests.xen import stock_guest as stock
from tests.xen.conftest import Recorder, set_memory, wait_for
from tests.xen.lab.platform import Platform
from tests.xen.stock_guest import WAITING, StockGuest, stock_guest
from xenmapcache import DmaDirection, MapCache, UnsupportedOperationError, open_backend
from xenmapcache.address import PAGE_SIZE, MiB
from xenmapcache.devicemodel import IoreqServer
from xenmapcache.devicemodel.virtio import VirtioBlock, VirtioMmio

pytestmark = pytest.mark.xen

DEVICE = 0x2001000
"""Where libxl puts nothing."""
VIRTIO, VIRTIO_IRQ = 0x2000000, 33
"""Where libxl tells a guest of its first virtio disk."""
DISK = """
disk = ["vdev=xvda,backendtype=standalone,specification=virtio,target=/lab/guest.img"]
"""
STATES = """
folder=/local/domain/0/backend/virtio_disk
while sleep 0.1; do
    for domain in $(xenstore-list $folder 2> /dev/null); do
        state=$folder/$domain/51712/state
        case "$(xenstore-read $state 2> /dev/null)" in
            1) xenstore-write $state 2 ;;
            5) xenstore-write $state 6 ;;
        esac
    done
done
"""
"""What libxl waits for when it adds such a disk, and when it removes it."""
Console = Callable[[str], str]


@pytest.fixture(autouse=True)
def _arm(machine: Platform) -> None:
    if machine.architecture.ports:
        pytest.skip("other tests show the same on a machine with I/O ports")


@pytest.fixture
def _ioreq_servers(machine: Platform) -> None:
    if not machine.ioreq_servers:
        pytest.skip("this Xen has no ioreq servers")


@dataclass
class Served:
    """A guest, a server that is serving it, and the cache."""

    guest: StockGuest
    cache: MapCache
    server: IoreqServer


@contextmanager
def served(
    script: str,
    console: Console,
    claim: Callable[[IoreqServer, MapCache], object],
    configuration: str = "",
) -> Iterator[Served]:
    """Run a guest with devices from its first instruction on.

    Args:
        script: of the guest.
        console: returns what it has printed.
        claim: makes the devices.
        configuration: more lines of it.
    """
    with (
        stock_guest(script, console, configuration=configuration) as guest,
        open_backend("xen", domid=guest.domid) as backend,
        MapCache(backend) as cache,
    ):
        server = IoreqServer(guest.domid, cache)
        claim(server, cache)
        with server, server.serving():
            guest.unpause()
            yield Served(guest, cache, server)


@pytest.fixture
def _states() -> Iterator[None]:
    """Answers libxl as a program would that serves virtio disks."""
    with subprocess.Popen(["sh", "-c", STATES]) as process:
        yield
        process.kill()


def test_a_xen_without_ioreq_servers_is_told(live_domid: int, machine: Platform) -> None:
    """The error says that this Xen has none, and not that the caller did something wrong."""
    if machine.ioreq_servers:
        pytest.skip("this Xen has ioreq servers")
    with (
        open_backend("xen", domid=live_domid) as backend,
        MapCache(backend) as cache,
        pytest.raises(UnsupportedOperationError, match="this Xen has no ioreq servers"),
    ):
        IoreqServer(live_domid, cache).open()


@pytest.mark.usefixtures("_ioreq_servers")
def test_device_memory_while_the_guest_balloons(guest_console: Console, machine: Platform) -> None:
    """Each width of access is served; a lease that is held while INVALIDATEs come is stale."""
    script = f"""
    for width in 8 16 32 64; do
        echo "STOCK read $width $(devmem {DEVICE:#x} $width)"
        devmem {DEVICE + 8:#x} $width 0x5a
    done
    echo "STOCK begins"
    while true; do devmem {DEVICE + 16:#x} 32 > /dev/null; sleep 0.2; done
    """
    device = Recorder()

    def claim(server: IoreqServer, _cache: MapCache) -> None:
        server.claim_mmio(DEVICE, 64, device)

    with served(script, guest_console, claim) as it:
        it.guest.wait("begins")
        for width, (offset, size, value) in zip((8, 16, 32, 64), device.reads[:4], strict=True):
            assert (offset, size) == (0, width // 8)
            assert int(it.guest.wait(f"read {width}"), 16) == value
        assert device.writes[:4] == [(8, width // 8, 0x5A) for width in (8, 16, 32, 64)]
        start, _ = machine.memory
        address = start + 64 * MiB
        lease = it.cache.map_dma(address, PAGE_SIZE, owner="disk", direction=DmaDirection.TO_DEVICE)
        before = it.server.invalidations
        set_memory(machine, stock.NAME, stock.MEMORY - 48)
        wait_for(lambda: it.server.invalidations > before, "the guest gives up memory", 120)
        assert lease.stale
        assert len(bytes(lease.view)) == PAGE_SIZE
        lease.release()
        served_before = it.server.requests
        wait_for(lambda: it.server.requests > served_before + 2, "the device is served", 60)
        assert it.server.failures == 0


@pytest.mark.usefixtures("_ioreq_servers", "_states")
def test_debians_virtio_driver_on_our_disk(guest_console: Console, tmp_path: Path) -> None:
    """Its virtio_mmio and virtio_blk write and read a disk, told by interrupts of ours."""
    path = tmp_path / "disk.img"
    with path.open("wb") as created:
        created.truncate(8 * MiB)
    script = f"""{WAITING}
    dd if=/dev/urandom of=/tmp/noise bs=64k count=32 2> /dev/null
    dd if=/tmp/noise of=/dev/vda bs=64k conv=fsync 2> /dev/null
    echo 3 > /proc/sys/vm/drop_caches
    echo "STOCK wrote $(md5sum < /tmp/noise | cut -c1-32)"
    echo "STOCK read $(dd if=/dev/vda bs=64k count=32 2> /dev/null | md5sum | cut -c1-32)"
    echo "STOCK interrupts $(sed -n 's/^ *[0-9]*: *\\([0-9]*\\).*virtio.*/\\1/p' /proc/interrupts)"
    """
    with path.open("r+b") as opened:

        def claim(server: IoreqServer, cache: MapCache) -> None:
            block = VirtioBlock(server, opened, serial="lab")
            VirtioMmio(server, VIRTIO, block, interrupt=partial(server.set_irq_level, VIRTIO_IRQ))

        with served(script, guest_console, claim, DISK) as it:
            wrote = it.guest.wait("wrote")
            assert it.guest.wait("read") == wrote
            assert int(it.guest.wait("interrupts").split()[0]) > 10
            assert (it.server.failures, it.server.lost_answers) == (0, 0)
