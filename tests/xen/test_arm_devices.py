"""An Arm guest served by our device models: device memory, interrupts, INVALIDATE.

Debian's own Xen for Arm has no ioreq servers, so these tests run where the lab has built one.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from tests.xen import stock_guest as stock
from tests.xen.conftest import Recorder, set_memory, wait_for
from tests.xen.lab.platform import Platform
from tests.xen.stock_guest import ALL_ROUNDS, WAITING, WORK, StockGuest, stock_guest, sum_of
from xenmapcache import DmaDirection, GuestMemory, MapCache, UnsupportedOperationError, open_backend
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
ANY_DEVICE = """
virtio = ["type=virtio,device,transport=mmio,grant_usage=0"]
"""
STATES = """
while sleep 0.1; do
    for folder in /local/domain/0/backend/virtio_disk /local/domain/0/backend/virtio; do
        for domain in $(xenstore-list $folder 2> /dev/null); do
            for device in $(xenstore-list $folder/$domain 2> /dev/null); do
                state=$folder/$domain/$device/state
                case "$(xenstore-read $state 2> /dev/null)" in
                    1) xenstore-write $state 2 ;;
                    5) xenstore-write $state 6 ;;
                esac
            done
        done
    done
done
"""
"""What libxl waits for when it adds such a device, and when it removes it."""
DEVICE_TREE_MAGIC = bytes.fromhex("d00dfeed")
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
    claim: Callable[[IoreqServer], AbstractContextManager[object]],
    configuration: str = "",
) -> Iterator[Served]:
    """Run a guest with devices from its first instruction on.

    Args:
        script: of the guest.
        console: returns what it has printed.
        claim: makes the devices, and returns what closes them.
        configuration: more lines of it.
    """
    with (
        stock_guest(script, console, configuration=configuration) as guest,
        open_backend("xen", domid=guest.domid) as backend,
        MapCache(backend) as cache,
    ):
        server = IoreqServer(guest.domid, cache)
        with claim(server), server, server.serving():
            guest.unpause()
            yield Served(guest, cache, server)


def xenstore(path: str) -> str:
    """Return an entry of xenstore."""
    command = ["xenstore-read", path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


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

    def claim(server: IoreqServer) -> AbstractContextManager[object]:
        server.claim_mmio(DEVICE, 64, device)
        return nullcontext()

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


@pytest.mark.usefixtures("_states")
def test_libxl_announces_any_virtio_device(guest_console: Console, machine: Platform) -> None:
    """`virtio = [...]` gets the address and interrupt that a disk gets."""
    if not machine.release.any_virtio:
        pytest.skip("libxl has no `virtio = [...]` before Xen 4.18")
    with (
        stock_guest("", guest_console, configuration=ANY_DEVICE) as guest,
        open_backend("xen", domid=guest.domid) as backend,
        MapCache(backend) as cache,
    ):
        node = f"/local/domain/0/backend/virtio/{guest.domid}/0"
        assert int(xenstore(f"{node}/base"), 16) == VIRTIO
        assert int(xenstore(f"{node}/irq")) == VIRTIO_IRQ
        start, _ = machine.memory
        memory = GuestMemory(cache)
        trees = []
        for address, _ in memory.find(DEVICE_TREE_MAGIC, start, stock.MEMORY * MiB):
            if (size := int.from_bytes(memory.read(address + 4, 4), "big")) < MiB:
                trees.append(memory.read(address, size))
        announced = [f"virtio@{VIRTIO:x}\0".encode() in tree for tree in trees]
        assert announced.count(True) == 1
        assert b"virtio,mmio\0" in trees[announced.index(True)]


@contextmanager
def served_disk(script: str, console: Console, path: Path) -> Iterator[Served]:
    """Run a guest with a disk of 64 MiB, of which libxl has told it."""
    with path.open("w+b") as opened:
        opened.truncate(64 * MiB)

        def claim(server: IoreqServer) -> AbstractContextManager[object]:
            block = VirtioBlock(server, opened, serial="lab")
            VirtioMmio(server, VIRTIO, block, interrupt=partial(server.set_irq_level, VIRTIO_IRQ))
            return block

        with served(script, console, claim, DISK) as it:
            yield it


@pytest.mark.usefixtures("_ioreq_servers", "_states")
def test_debians_virtio_driver_on_our_disk(guest_console: Console, tmp_path: Path) -> None:
    """Its virtio_mmio and virtio_blk write and read a disk, told by interrupts of ours."""
    script = f"""{WAITING}
    dd if=/dev/urandom of=/tmp/noise bs=64k count=32 2> /dev/null
    dd if=/tmp/noise of=/dev/vda bs=64k conv=fsync 2> /dev/null
    echo 3 > /proc/sys/vm/drop_caches
    echo "STOCK wrote $(md5sum < /tmp/noise | cut -c1-32)"
    echo "STOCK read $(dd if=/dev/vda bs=64k count=32 2> /dev/null | md5sum | cut -c1-32)"
    echo "STOCK interrupts $(sed -n 's/^ *[0-9]*: *\\([0-9]*\\).*virtio.*/\\1/p' /proc/interrupts)"
    """
    with served_disk(script, guest_console, tmp_path / "disk.img") as it:
        wrote = it.guest.wait("wrote")
        assert it.guest.wait("read") == wrote
        assert int(it.guest.wait("interrupts").split()[0]) > 10
        assert (it.server.failures, it.server.lost_answers) == (0, 0)


@pytest.mark.slow
@pytest.mark.usefixtures("_ioreq_servers", "_states")
def test_the_guest_balloons_while_its_disk_is_busy(
    guest_console: Console, machine: Platform, tmp_path: Path
) -> None:
    """INVALIDATEs come while the driver works: no lease is stale, and no byte is lost."""
    script = f"""{WORK}
    echo "STOCK sum $(dd if=/dev/vda bs=64k iflag=direct 2> /dev/null | md5sum | cut -c1-32)"
    """
    path = tmp_path / "disk.img"
    with served_disk(script, guest_console, path) as it:
        it.guest.wait("round 1")
        changes = 0
        while (before := len(it.guest.rounds())) < len(ALL_ROUNDS):
            changes += 1
            set_memory(machine, stock.NAME, stock.MEMORY - 20 * (1 + changes % 2))
            wait_for(lambda: len(it.guest.rounds()) > before, "another round", 120)
        invalidations = it.server.invalidations
        read = it.guest.wait("sum")
        assert it.guest.rounds() == ALL_ROUNDS
        stats = it.cache.stats()
        assert changes > 5
        assert invalidations > 10
        assert (stats.stale_dma_released, stats.stale_dma_held) == (0, 0)
        assert (it.server.failures, it.server.lost_answers) == (0, 0)
        it.guest.wait("end")
    assert sum_of(path) == read
