"""A tiny DMA disk over a file, served to a guest through ports.

The guest writes a sector, a guest address and a count to ports, then a command, and
polls the status port until the transfer is done. The data moves straight between the
file and the guest's memory: ``preadv`` and ``pwritev`` on the lease's view, no copy.

Without arguments it serves a mock guest, whose driver is in this file too. In Dom0:
``python block_device.py --domid 3 --disk disk.img`` serves a real one until SIGTERM.
"""

import argparse
import os
import tempfile
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from xenmapcache import DmaDirection, MapCache, MockDomain, MockHypervisor, open_backend
from xenmapcache.devicemodel import IoreqServer

PORT = 0x510
SECTOR, ADDRESS_LOW, ADDRESS_HIGH, COUNT, COMMAND, STATUS, CAPACITY = range(0, 28, 4)
READ, WRITE = 1, 2
DONE, BUSY, ERROR = 0, 1, 2
SECTOR_SIZE = 512


class BlockDevice:
    """The device model: seven ports of 4 bytes, and one transfer at a time."""

    def __init__(
        self, server: IoreqServer, cache: MapCache, path: str | os.PathLike[str], port: int = PORT
    ) -> None:
        self._cache = cache
        self._disk = os.open(path, os.O_RDWR)
        self._capacity = os.fstat(self._disk).st_size // SECTOR_SIZE
        self._registers = dict.fromkeys((SECTOR, ADDRESS_LOW, ADDRESS_HIGH, COUNT), 0)
        self._worker = ThreadPoolExecutor(1, "disk0")
        self._transfer: Future[None] = self._worker.submit(lambda: None)
        self.transfers = 0
        server.claim_ports(port, 28, self)
        # Before all mappings go, the transfer that is under way is finished.
        server.on_quiesce(self.drain)

    def read(self, offset: int, size: int) -> int:
        """Answer the guest's ``in``."""
        if size != 4:
            return (1 << 8 * size) - 1
        if offset == CAPACITY:
            return self._capacity
        if offset == STATUS:
            return self._status()
        return self._registers.get(offset, 0)

    def write(self, offset: int, size: int, value: int) -> None:
        """Take the guest's ``out``."""
        if offset in self._registers and size == 4:
            self._registers[offset] = value
        elif offset == COMMAND and self._transfer.done():
            self.transfers += 1
            # What the guest writes from now on is for the next one.
            self._transfer = self._worker.submit(self._run, value, dict(self._registers))

    def drain(self) -> None:
        """Wait until no transfer is under way."""
        self._transfer.exception()

    def _status(self) -> int:
        if not self._transfer.done():
            return BUSY
        return ERROR if self._transfer.exception() else DONE

    def _run(self, command: int, registers: dict[int, int]) -> None:
        sector, count = registers[SECTOR], registers[COUNT]
        address = registers[ADDRESS_HIGH] << 32 | registers[ADDRESS_LOW]
        if command not in (READ, WRITE) or not 0 < count <= self._capacity - sector:
            raise ValueError(f"no transfer: command {command}, {count} sectors at {sector}")
        way = DmaDirection.FROM_DEVICE if command == READ else DmaDirection.TO_DEVICE
        move = os.preadv if command == READ else os.pwritev
        with self._cache.map_dma(
            address, count * SECTOR_SIZE, owner="disk0", direction=way
        ) as lease:
            view, position = lease.view, sector * SECTOR_SIZE
            while view:  # a file may give less than asked
                moved = move(self._disk, [view], position)
                if not moved:
                    raise OSError("the disk's file has become shorter")
                view, position = view[moved:], position + moved

    def close(self) -> None:
        """Finish the transfer that is under way, and close the file."""
        self._worker.shutdown()
        os.close(self._disk)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class Driver:
    """The guest's side, as its kernel would have it."""

    def __init__(self, guest: MockDomain, port: int = PORT) -> None:
        self._guest, self._port = guest, port
        self.capacity = guest.port_in(port + CAPACITY)

    def transfer(self, command: int, sector: int, address: int, count: int) -> bool:
        """Do one transfer; whether it went well."""
        registers = {SECTOR: sector, ADDRESS_LOW: address & 0xFFFFFFFF, ADDRESS_HIGH: address >> 32}
        for register, value in (registers | {COUNT: count, COMMAND: command}).items():
            self._guest.port_out(self._port + register, value)
        while (status := self._guest.port_in(self._port + STATUS)) == BUSY:
            pass
        return status == DONE


def demonstrate(path: str) -> None:
    """Serve a mock guest that fills the disk, reads it back, and balloons meanwhile."""
    guest = MockHypervisor().create_domain(memory="64M")
    with open_backend("mock", domain=guest) as backend, MapCache(backend) as cache:
        server = IoreqServer(guest, cache)
        with BlockDevice(server, cache, path) as disk, server, server.serving():
            driver = Driver(guest)
            print(f"the guest sees a disk of {driver.capacity} sectors at port {PORT:#x}")

            source, target = 0x100_0000, 0x200_0200  # not even page-aligned
            total = driver.capacity * SECTOR_SIZE
            for offset in range(0, total, 4096):
                word = zlib.crc32(b"%d" % offset).to_bytes(4, "little")
                guest.write(source + offset, word * 1024)
            for command, start in ((WRITE, source), (READ, target)):
                sector, count = 0, 1
                while sector < driver.capacity:
                    count = min(count, driver.capacity - sector)
                    if not driver.transfer(command, sector, start + sector * SECTOR_SIZE, count):
                        raise SystemExit(f"{count} sectors at {sector} were not moved")
                    sector, count = sector + count, count * 3 % 127 + 1
            same = guest.read(source, total) == guest.read(target, total)
            print(f"{total >> 20} MiB written and read back in {disk.transfers} transfers")
            print(f"what came back is {'the same' if same else 'DIFFERENT'}")
            print(f"calls to map memory: {cache.stats().maps}")

            guest.balloon_out(0x300_0000, 0x80_0000)
            print(f"ballooned 8 MiB out: {server.invalidations} times all mappings had to go,")
            print(f"  DMA still held then: {cache.stats().stale_dma}")

            print(f"a transfer after that: {driver.transfer(READ, 0, target, 8)}")
            nowhere = driver.transfer(READ, 0, 0x300_0000, 8)
            print(f"a transfer to an address without memory: {nowhere}")


def serve(domid: int, path: str) -> None:
    """Serve a real guest until SIGINT or SIGTERM."""
    with open_backend("xen", domid=domid) as backend, MapCache(backend) as cache:
        # After a kill, the next one clears away what the last one left.
        server = IoreqServer(domid, cache, recover=True)
        with BlockDevice(server, cache, path), server:
            print(f"serving domain {domid}, ports {PORT:#x}..{PORT + 28:#x}", flush=True)
            server.serve_forever()
        print(f"{server.requests} requests, {server.invalidations} times all mappings had to go")


def main() -> None:
    """Serve the guest that was asked for."""
    parser = argparse.ArgumentParser(description="A tiny DMA disk over a file.")
    parser.add_argument("--domid", type=int, help="a real guest; without it a mock one")
    parser.add_argument("--disk", help="the file")
    arguments = parser.parse_args()
    if arguments.domid is not None:
        if arguments.disk is None:
            parser.error("--domid wants --disk")
        serve(arguments.domid, arguments.disk)
        return
    with tempfile.NamedTemporaryFile() as disk:
        disk.truncate(8 << 20)
        demonstrate(disk.name)


if __name__ == "__main__":
    main()
