"""A disk for a guest's own driver: virtio-blk over PCI, served from a file.

Without arguments it serves a mock guest, whose driver the mock has. In Dom0 it serves a PVH guest,
which needs no QEMU for it; ``xl create -p`` has made the guest, and it has not run yet:

    xl create -p guest.cfg     with extra = "... pci=noacpi"
    python virtio_disk.py --domid 3 --disk disk.img
    xl unpause guest

The guest's Linux then has /dev/vda, if it has the modules virtio_pci and virtio_blk. With
``--record /run/disk.record`` the program may be killed: start it again in the same way, and the
guest continues.
"""

import argparse
import hashlib
import tempfile
import zlib
from pathlib import Path

from xenmapcache import MapCache, MockHypervisor, open_backend
from xenmapcache.devicemodel import IoreqServer, PciBus
from xenmapcache.devicemodel.virtio import VirtioBlock, VirtioPci
from xenmapcache.devicemodel.virtio.block import FLUSH, FLUSH_OUT, IN, OUT, SECTOR
from xenmapcache.mock.pci_driver import PciDriver
from xenmapcache.mock.virtio_driver import RING_FEATURES, VirtioDriver

BDF = "0000:00:01.0"
CHUNK = 64 * SECTOR


def plug(server: IoreqServer, disk: VirtioBlock) -> None:
    """Give the guest a PCI bus with the disk on it."""
    PciBus(server).plug()
    VirtioPci(server, BDF, disk).plug()


class Driver:
    """The guest's side: what its kernel does for a program that reads and writes /dev/vda."""

    def __init__(self, pci: PciDriver) -> None:
        self._virtio = VirtioDriver.over_pci(pci.find(BDF))
        self._virtio.start(RING_FEATURES | FLUSH)
        self._queue = self._virtio.queues[0]
        self.sectors = int.from_bytes(self._virtio.read_config(0, 8), "little")

    def request(self, kind: int, sector: int, data: bytes = b"", room: int = 0) -> bytes:
        """Do one request, and return what the disk gave."""
        header = kind.to_bytes(4, "little") + bytes(4) + sector.to_bytes(8, "little")
        readable = [header, data] if data else [header]
        chain = self._queue.add(readable, [room, 1] if room else [1], indirect=True)
        self._queue.kick()
        answer = self._queue.wait(chain).data
        if answer[-1]:
            raise SystemExit(f"request {kind} at sector {sector} failed with status {answer[-1]}")
        return answer[:-1]

    def write(self, data: bytes) -> None:
        """Write from the first sector on, and flush."""
        for offset in range(0, len(data), CHUNK):
            self.request(OUT, offset // SECTOR, data[offset : offset + CHUNK])
        self.request(FLUSH_OUT, 0)

    def read(self, length: int) -> bytes:
        """Read from the first sector on."""
        parts = [
            self.request(IN, offset // SECTOR, room=min(CHUNK, length - offset))
            for offset in range(0, length, CHUNK)
        ]
        return b"".join(parts)


def demonstrate(path: Path) -> None:
    """Serve a mock guest that writes the disk, balloons, and reads it back."""
    guest = MockHypervisor().create_domain(memory="64M", type="pvh")
    with open_backend("mock", domain=guest) as backend, MapCache(backend) as cache:
        server = IoreqServer(guest, cache)
        with path.open("r+b") as file, VirtioBlock(server, file, serial="example") as disk:
            plug(server, disk)
            with server, server.serving():
                pci = PciDriver(guest)
                print("on the guest's PCI bus:")
                for function in pci.scan():
                    print(f"  {function}")
                driver = Driver(pci)
                data = hashlib.shake_128(b"disk").digest(driver.sectors * SECTOR)
                driver.write(data)
                print(f"{len(data) >> 20} MiB written, checksum {zlib.crc32(data):#010x}")
                guest.balloon_out(0x200_0000, 0x80_0000)
                print(f"ballooned 8 MiB out: {server.invalidations} times all mappings had to go,")
                print(f"  DMA held across one: {cache.stats().stale_dma_released}")
                print(f"read back, checksum {zlib.crc32(driver.read(len(data))):#010x}")
    print(f"in the file, checksum {zlib.crc32(path.read_bytes()):#010x}")
    print(f"requests that failed: {server.failures}")


def serve(domid: int, path: Path, *, read_only: bool, record: Path | None) -> None:
    """Serve a real guest until SIGINT or SIGTERM."""
    with (
        open_backend("xen", domid=domid) as backend,
        MapCache(backend) as cache,
        path.open("rb" if read_only else "r+b") as file,
    ):
        server = IoreqServer(domid, cache, recover=True)
        with VirtioBlock(server, file, read_only=read_only, record=record) as disk:
            plug(server, disk)
            with server:
                disk.resume()
                print(f"domain {domid}: {disk.sectors} sectors at {BDF}", flush=True)
                server.serve_forever()
        print(f"{server.requests} requests, {server.invalidations} times all mappings had to go")


def main() -> None:
    """Serve the guest that was asked for."""
    parser = argparse.ArgumentParser(description="A virtio disk over a file.")
    parser.add_argument("--domid", type=int, help="a real PVH guest; without it a mock one")
    parser.add_argument("--disk", type=Path, help="the file")
    parser.add_argument("--read-only", action="store_true", help="refuse writes")
    parser.add_argument("--record", type=Path, help="a file in /run, to continue after a kill")
    arguments = parser.parse_args()
    if arguments.domid is not None:
        if arguments.disk is None:
            parser.error("--domid wants --disk")
        options = {"read_only": arguments.read_only, "record": arguments.record}
        serve(arguments.domid, arguments.disk, **options)
        return
    with tempfile.NamedTemporaryFile() as disk:
        disk.truncate(4 << 20)
        demonstrate(Path(disk.name))


if __name__ == "__main__":
    main()
