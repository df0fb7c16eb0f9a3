"""A tiny DMA disk over a file, served to a guest through ports.

The guest writes a sector, a guest address and a count to ports, then a command, and
polls the status port until the transfer is done. A DmaEngine moves the data straight
between the file and the guest's memory, without a copy, and takes care of INVALIDATE.

Without arguments it serves a mock guest, whose driver is in this file too. In Dom0:
``python block_device.py --domid 3 --disk disk.img`` serves a real one until SIGTERM.
SIGUSR1 holds transfers back, so that ``xl save`` can be run. What the image does not hold, the
disk's own state, goes to the next process in the file that ``--state`` names.
"""

import argparse
import json
import os
import signal
import tempfile
import zlib
from pathlib import Path
from types import TracebackType
from typing import Self, TypedDict

from xenmapcache import DmaDirection, MapCache, MockDomain, MockHypervisor, open_backend
from xenmapcache.devicemodel import DmaEngine, DmaTransfer, IoreqServer
from xenmapcache.guest import Segments

PORT = 0x510
SECTOR, ADDRESS_LOW, ADDRESS_HIGH, COUNT, COMMAND, STATUS, CAPACITY = range(0, 28, 4)
REGISTERS = (SECTOR, ADDRESS_LOW, ADDRESS_HIGH, COUNT)
READ, WRITE = 1, 2
DONE, BUSY, ERROR = 0, 1, 2
SECTOR_SIZE = 512


class State(TypedDict):
    """What the next process needs, to go on with a guest that was saved; for JSON."""

    registers: list[int]
    pending: list[int] | None  # a command that was not carried out, and its registers
    failed: bool


class BlockDevice:
    """The device model: seven ports of 4 bytes, and one transfer at a time."""

    def __init__(
        self,
        server: IoreqServer,
        cache: MapCache,
        path: str | os.PathLike[str],
        port: int = PORT,
        *,
        state: State | None = None,
    ) -> None:
        state = state or {"registers": [0] * 4, "pending": None, "failed": False}
        self._registers = dict(zip(REGISTERS, state["registers"], strict=True))
        self._pending, self._failed = state["pending"], state["failed"]
        self._left = self._pending is not None  # by another process
        self._disk = os.open(path, os.O_RDWR)
        self._capacity = os.fstat(self._disk).st_size // SECTOR_SIZE
        self._dma = DmaEngine(server, name="disk0")
        self.transfers = 0
        server.claim_ports(port, 28, self)

    def read(self, offset: int, size: int) -> int:
        """Answer the guest's ``in``."""
        self._carry_on()
        if size != 4:
            return (1 << 8 * size) - 1
        if offset == CAPACITY:
            return self._capacity
        if offset == STATUS:
            return self._status()
        return self._registers.get(offset, 0)

    def write(self, offset: int, size: int, value: int) -> None:
        """Take the guest's ``out``."""
        self._carry_on()
        if offset in self._registers and size == 4:
            self._registers[offset] = value
        elif offset == COMMAND and self._pending is None:
            # What the guest writes from now on is for the next one.
            self._pending = [value, *self._registers.values()]
            self._start(*self._pending)

    def state(self) -> State:
        """Return what is not in the guest's image. The guest is suspended, or the server closed."""
        registers = list(self._registers.values())
        return {"registers": registers, "pending": self._pending, "failed": self._failed}

    def _carry_on(self) -> None:
        """Start what another process has left. Here, because the server is open now."""
        if self._left and self._pending is not None:
            self._left = False
            self._start(*self._pending)

    def _status(self) -> int:
        if self._pending is not None:
            return BUSY
        return ERROR if self._failed else DONE

    def _start(self, command: int, sector: int, low: int, high: int, count: int) -> None:
        self.transfers += 1
        if command not in (READ, WRITE) or not 0 < count <= self._capacity - sector:
            self._failed, self._pending = True, None
            return

        def move(memory: Segments) -> int:
            way = memory.read_from if command == READ else memory.write_to
            return way(self._disk, sector * SECTOR_SIZE)

        def end(transfer: DmaTransfer) -> None:
            # If the server is closed while the guest is saved, nobody calls this, and the command
            # stays pending: it is part of the state.
            self._failed, self._pending = transfer.result != count * SECTOR_SIZE, None

        direction = DmaDirection.FROM_DEVICE if command == READ else DmaDirection.TO_DEVICE
        self._dma.submit([(high << 32 | low, count * SECTOR_SIZE)], direction, move, on_end=end)

    def close(self) -> None:
        """Finish the transfer that is under way, and close the file. The server is closed."""
        self._dma.close()
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

    def start(self, command: int, sector: int, address: int, count: int) -> None:
        """Give a command."""
        registers = {SECTOR: sector, ADDRESS_LOW: address & 0xFFFFFFFF, ADDRESS_HIGH: address >> 32}
        for register, value in (registers | {COUNT: count, COMMAND: command}).items():
            self._guest.port_out(self._port + register, value)

    def finish(self) -> bool:
        """Wait for its end; whether it went well."""
        while (status := self._guest.port_in(self._port + STATUS)) == BUSY:
            pass
        return status == DONE

    def transfer(self, command: int, sector: int, address: int, count: int) -> bool:
        """Do one transfer; whether it went well."""
        self.start(command, sector, address, count)
        return self.finish()


def demonstrate(path: str) -> None:
    """Serve a mock guest that uses the disk, balloons, and is saved and restored."""
    guest = MockHypervisor().create_domain(memory="64M")
    source, target = 0x100_0000, 0x200_0200  # not even page-aligned
    with open_backend("mock", domain=guest) as backend, MapCache(backend) as cache:
        server = IoreqServer(guest, cache)
        with BlockDevice(server, cache, path) as disk, server, server.serving():
            driver = Driver(guest)
            print(f"the guest sees a disk of {driver.capacity} sectors at port {PORT:#x}")
            use(guest, driver, source, target)
            total = driver.capacity * SECTOR_SIZE
            same = guest.read(source, total) == guest.read(target, total)
            print(f"{total >> 20} MiB written and read back in {disk.transfers} transfers")
            print(f"what came back is {'the same' if same else 'DIFFERENT'}")
            print(f"calls to map memory: {cache.stats().maps}")

            guest.balloon_out(0x300_0000, 0x80_0000)
            print(f"ballooned 8 MiB out: {server.invalidations} times all mappings had to go,")
            print(f"  DMA held across one: {cache.stats().stale_dma_released}")

            print(f"a transfer after that: {driver.transfer(READ, 0, target, 8)}")
            nowhere = driver.transfer(READ, 0, 0x300_0000, 8)
            print(f"a transfer to an address without memory: {nowhere}")

            server.suspend()
            driver.start(READ, 8, target, 8)  # the guest runs until it has suspended itself
            image = guest.suspend()
            image.send()  # xl save
            state = json.dumps(disk.state())
            print(f"saved; still to be done: {json.loads(state)['pending']}")

    guest = MockHypervisor().restore(image)
    with open_backend("mock", domain=guest) as backend, MapCache(backend) as cache:
        server = IoreqServer(guest, cache)
        disk = BlockDevice(server, cache, path, state=json.loads(state))
        with disk, server, server.serving():
            print(f"restored; the end of that: {Driver(guest).finish()}")
            same = guest.read(source + 4096, 4096) == guest.read(target, 4096)
            print(f"what was read is {'the same' if same else 'DIFFERENT'}")


def use(guest: MockDomain, driver: Driver, source: int, target: int) -> None:
    """Fill the disk from one place, and read it back to the other, at mixed sizes."""
    for offset in range(0, driver.capacity * SECTOR_SIZE, 4096):
        word = zlib.crc32(b"%d" % offset).to_bytes(4, "little")
        guest.write(source + offset, word * 1024)
    for command, start in ((WRITE, source), (READ, target)):
        sector, count = 0, 1
        while sector < driver.capacity:
            count = min(count, driver.capacity - sector)
            if not driver.transfer(command, sector, start + sector * SECTOR_SIZE, count):
                raise SystemExit(f"{count} sectors at {sector} were not moved")
            sector, count = sector + count, count * 3 % 127 + 1


def serve(domid: int, path: str, kept: Path | None = None) -> None:
    """Serve a real guest until SIGINT or SIGTERM.

    SIGUSR1 prepares for ``xl save``, and SIGUSR2 takes that back. The disk's state is written
    to ``kept`` at the end, and taken from there at the start.
    """
    state = json.loads(kept.read_text()) if kept and kept.exists() else None
    with open_backend("xen", domid=domid) as backend, MapCache(backend) as cache:
        # After a kill, the next one clears away what the last one left.
        server = IoreqServer(domid, cache, recover=True)
        with BlockDevice(server, cache, path, state=state) as disk:
            with server:
                signal.signal(signal.SIGUSR1, lambda *_: suspend(server))
                signal.signal(signal.SIGUSR2, lambda *_: server.resume())
                # To the end, because it may come after that of the guest, while the state is kept.
                signal.signal(signal.SIGTERM, lambda *_: server.stop())
                if kept:
                    kept.unlink(missing_ok=True)  # old from now on
                print(f"serving domain {domid}, ports {PORT:#x}..{PORT + 28:#x}", flush=True)
                server.serve_forever()
            if kept:
                kept.write_text(json.dumps(disk.state()))
        print(f"{server.requests} requests, {server.invalidations} times all mappings had to go")


def suspend(server: IoreqServer) -> None:
    """Hold transfers back, and say when no transfer is under way."""
    server.suspend()
    print("suspended: save the guest now", flush=True)


def main() -> None:
    """Serve the guest that was asked for."""
    parser = argparse.ArgumentParser(description="A tiny DMA disk over a file.")
    parser.add_argument("--domid", type=int, help="a real guest; without it a mock one")
    parser.add_argument("--disk", help="the file")
    parser.add_argument("--state", type=Path, help="a file for the disk's state")
    arguments = parser.parse_args()
    if arguments.domid is not None:
        if arguments.disk is None:
            parser.error("--domid wants --disk")
        serve(arguments.domid, arguments.disk, arguments.state)
        return
    with tempfile.NamedTemporaryFile() as disk:
        disk.truncate(8 << 20)
        demonstrate(disk.name)


if __name__ == "__main__":
    main()
