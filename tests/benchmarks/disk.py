"""A 4 KiB request of a virtio disk on the mock, and of a loop written by hand: ``make bench-disk``.

Both sides do the same requests of the same ring, in one process and one run, and take turns. The
loop is what a device author writes first: it believes the driver, and checks no number. It reads
where it stands, and hands each write to a thread, because a write may wait for the disk, and the
guest's vCPU with it. The times are of the processor, so that threads count. The driver's side is
not timed.
"""

from __future__ import annotations

import argparse
import os
import queue
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from tests.benchmarks.report import PAGE, Table, markdown, rewrite, show
from tests.benchmarks.timing import Figure, machine, pin
from xenmapcache import DmaDirection, MapCache, MockDomain, MockHypervisor, open_backend
from xenmapcache.devicemodel import IoreqServer
from xenmapcache.devicemodel.virtio import VirtioBlock
from xenmapcache.devicemodel.virtio.block import FLUSH, IN, OUT
from xenmapcache.devicemodel.virtio.queue import VERSION_1

COMMAND = "make bench-disk"
SIZE = 128
RING, DRIVER, DEVICE, HEADERS, STATUS, DATA = 0x10000, 0x11000, 0x12000, 0x20000, 0x30000, 0x100000
BLOCK = 4096
FILE_BLOCKS = 1024
ROUNDS = 15
BATCHES = 40
_FEATURES = VERSION_1 | FLUSH


class Ring:
    """The driver's side of a queue whose requests are all alike, and each is used once a batch."""

    def __init__(self, guest: MockDomain, kind: int, depth: int) -> None:
        self.guest = guest
        self.kind = kind
        self.depth = depth
        self.idx = 0
        for number in range(depth):
            sector = (number * 37 % FILE_BLOCKS) * (BLOCK // 512)
            header = HEADERS + 16 * number
            guest.write(header, struct.pack("<IIQ", kind, 0, sector))
            parts = [
                (header, 16, 1, 3 * number + 1),
                (DATA + BLOCK * number, BLOCK, 1 | (2 if kind == IN else 0), 3 * number + 2),
                (STATUS + number, 1, 2, 0),
            ]
            for place, part in enumerate(parts):
                guest.write(RING + 16 * (3 * number + place), struct.pack("<QIHH", *part))

    def offer(self) -> None:
        """Make all requests available."""
        for number in range(self.depth):
            place = DRIVER + 4 + 2 * ((self.idx + number) % SIZE)
            self.guest.write(place, (3 * number).to_bytes(2, "little"))
        self.idx = self.idx + self.depth & 0xFFFF
        self.guest.write(DRIVER + 2, self.idx.to_bytes(2, "little"))

    def is_answered(self) -> bool:
        """Return whether the device has answered all."""
        return int.from_bytes(self.guest.read(DEVICE + 2, 2), "little") == self.idx

    def check(self) -> None:
        """See that all were answered well."""
        assert self.is_answered()
        assert self.guest.read(STATUS, self.depth) == bytes(self.depth)
        self.guest.write(STATUS, b"\xff" * self.depth)


class ByHand:
    """The loop."""

    def __init__(self, cache: MapCache, fd: int, interrupt: Callable[[], object]) -> None:
        self.cache = cache
        self.fd = fd
        self.interrupt = interrupt
        self.idx = self.used = 0
        self.lock = threading.Lock()
        self.worker = ThreadPoolExecutor(1)

    def serve(self) -> None:
        """Answer what the driver has made available."""
        cache, idx, kind = self.cache, self.idx, IN
        end = int.from_bytes(cache.read(DRIVER + 2, 2), "little")
        while idx != end:
            head = int.from_bytes(cache.read(DRIVER + 4 + 2 * (idx % SIZE), 2), "little")
            chain, index = [], head
            while True:
                descriptor = cache.read(RING + 16 * index, 16)
                address, length, flags, following = struct.unpack("<QIHH", descriptor)
                chain.append((address, length))
                if not flags & 1:
                    break
                index = following
            kind, _, sector = struct.unpack("<IIQ", cache.read(chain[0][0], 16))
            if kind == IN:
                self.do(kind, head, chain, sector)
            else:
                self.worker.submit(self.do, kind, head, chain, sector)
            idx = idx + 1 & 0xFFFF
        self.idx = idx
        if kind == IN and not int.from_bytes(cache.read(DRIVER, 2), "little") & 1:
            self.interrupt()

    def do(self, kind: int, head: int, chain: list[tuple[int, int]], sector: int) -> None:
        """Carry out a request, and answer it."""
        cache, written = self.cache, 1
        way = DmaDirection.FROM_DEVICE if kind == IN else DmaDirection.TO_DEVICE
        for address, length in chain[1:-1]:
            with cache.map_dma(address, length, owner="disk", direction=way) as lease:
                if kind == IN:
                    written += os.preadv(self.fd, [lease.view], 512 * sector)
                else:
                    os.pwritev(self.fd, [lease.view], 512 * sector)
        cache.write(chain[-1][0], b"\0")
        with self.lock:
            entry = DEVICE + 4 + 8 * (self.used % SIZE)
            cache.write(entry, struct.pack("<II", head, written))
            self.used = self.used + 1 & 0xFFFF
            cache.write(DEVICE + 2, self.used.to_bytes(2, "little"))
        if kind == OUT and not int.from_bytes(cache.read(DRIVER, 2), "little") & 1:
            self.interrupt()


class Interrupts:
    """A transport that tells of interrupts."""

    is_running = True

    def __init__(self) -> None:
        self.raised: queue.SimpleQueue[None] = queue.SimpleQueue()

    def interrupt_queue(self, index: int = 0) -> None:
        self.raised.put(None)

    def interrupt_config(self) -> None: ...
    def needs_reset(self) -> None:
        raise AssertionError("the device is broken")

    def set_line(self) -> None: ...


class Kit:
    """The kit's disk, without the registers of a transport."""

    def __init__(self, server: IoreqServer, fd: int) -> None:
        self.disk = VirtioBlock(server, fd, workers=1, limit=SIZE)
        self.disk.transport = self.transport = Interrupts()
        assert self.disk.negotiate(_FEATURES)
        self.disk.start_queue(0, size=SIZE, descriptors=RING, driver=DRIVER, device=DEVICE)

    def serve(self) -> None:
        """Answer what the driver has made available."""
        self.disk.notify_queue(0)


class Case(NamedTuple):
    """Requests of one kind, and how many come at a time."""

    kind: int
    depth: int

    @property
    def name(self) -> str:
        return f"{'read' if self.kind == IN else 'write'}, {self.depth} at a time"


CASES = (Case(IN, 1), Case(IN, 32), Case(OUT, 1), Case(OUT, 32))


def times_of(
    serve: Callable[[], object], interrupts: Interrupts, ring: Ring, batches: int
) -> float:
    """Return the processor's seconds for a request."""
    total = 0.0
    for _ in range(batches):
        ring.offer()
        start = time.process_time()
        serve()
        # Where a file system has no reads that do not wait, a thread reads, and is heard of later.
        while not ring.is_answered():
            interrupts.raised.get(timeout=60)
        total += time.process_time() - start
        ring.check()
    return total / batches / ring.depth


class Result(NamedTuple):
    """Seconds of each round."""

    kit: list[float]
    by_hand: list[float]

    @property
    def ratio(self) -> Figure:
        """The kit's time by the loop's, round by round."""
        return Figure.of([a / b for a, b in zip(self.kit, self.by_hand, strict=True)])


def measure(case: Case, rounds: int = ROUNDS, batches: int = BATCHES) -> Result:
    """Have both sides do the requests in turns, with a guest and a ring for each."""
    batches = max(1, batches * 32 // case.depth // 8)
    kit: list[float] = []
    by_hand: list[float] = []
    with tempfile.TemporaryFile() as file:
        file.truncate(FILE_BLOCKS * BLOCK)
        guests = [MockHypervisor().create_domain(memory="16M") for _ in range(2)]
        rings = [Ring(guest, case.kind, case.depth) for guest in guests]
        backends = [open_backend("mock", domain=guest) for guest in guests]
        caches = [MapCache(backend) for backend in backends]
        told = Interrupts()
        loop = ByHand(caches[1], file.fileno(), told.interrupt_queue)
        server = IoreqServer(guests[0], caches[0])
        server.open()
        ours = Kit(server, file.fileno())
        for _ in range(rounds + 1):
            kit.append(times_of(ours.serve, ours.transport, rings[0], batches))
            by_hand.append(times_of(loop.serve, told, rings[1], batches))
        server.close()
        ours.disk.close()
        loop.worker.shutdown()
        for cache, backend in zip(caches, backends, strict=True):
            cache.close()
            backend.close()
    return Result(kit[1:], by_hand[1:])


def table(results: dict[Case, Result]) -> Table:
    """Tell how much longer the kit takes."""
    rows: list[tuple[str, ...]] = []
    for case, result in results.items():
        figures = [Figure.of(each, 1e6) for each in result]
        rows.append((case.name, *map(str, figures), f"{result.ratio} x"))
    return ("4 KiB", "the kit, µs", "by hand, µs", "ratio"), rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.disk", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"rewrite {PAGE.name}")
    options = parser.parse_args()
    pin()
    headings, rows = table({case: measure(case) for case in CASES})
    print(machine())
    show({"requests": (headings, rows)}, 100)
    if options.write:
        rewrite(PAGE, "machine", f"{machine()}\n", COMMAND)
        rewrite(PAGE, "requests", markdown(headings, rows), COMMAND)


if __name__ == "__main__":
    main()
