"""Four threads, and a guest that balloons under them: a script of its own, without pytest.

``python -m tests.lifetime.hammer --seconds 60 --operations 1000000`` goes on for longer. It prints
what was done and ends with status 0, or with a traceback and status 1.

All memory is cells of eight bytes. A cell's value says who wrote it, how many writes of his came
before, and has a check sum over both and the cell's address: bytes that were never written there,
or of two values, are recognised. On pages that stay, each thread has cells of its own besides, in
which it must find what it wrote last.
"""

from __future__ import annotations

import argparse
import gc
import logging
import random
import struct
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable

from xenmapcache import (
    CacheFullError,
    DmaDirection,
    FaultError,
    GuestMemory,
    LeaseInfo,
    MapCache,
    MockHypervisor,
    open_backend,
)
from xenmapcache.mapping import live_mappings

THREADS = 4
PAGE = 0x1000
BUCKET = 4 * PAGE
PAGES = 64
RESIDENT = 10 * BUCKET
"""Of 16 buckets. Each thread holds a lease and maps one more bucket at most, and keeps no view."""
BALLOON = range(40, 56)
"""Pages that the guest gives up and gets back."""
CELL = 8
CELLS = PAGE // CELL
VALUE = struct.Struct("<IHH")
WHOLE, LOW = 0xFFFFFFFF, 0xFFFF


def check_sum(address: int, count: int, writer: int) -> int:
    return zlib.crc32(struct.pack("<QIH", address, count, writer)) & LOW or 1


class Values:
    """What may stand in cells, and who has written how often."""

    def __init__(self) -> None:
        self.written = [1] * (THREADS + 1)  # the last one is the guest itself, at the beginning

    def make(self, address: int, length: int, writer: int) -> bytes:
        """Return new values for all cells of a range."""
        data = bytearray()
        for cell in range(address, address + length, CELL):
            count = self.written[writer]
            self.written[writer] = count + 1  # before another thread can find it
            data += VALUE.pack(count & WHOLE, writer, check_sum(cell, count, writer))
        return bytes(data)

    def check(self, address: int, data: bytes) -> None:
        """Raise AssertionError where bytes were never written so."""
        assert len(data) % CELL == 0
        for position in range(0, len(data), CELL):
            cell = address + position
            count, writer, check = VALUE.unpack_from(data, position)
            if not any(data[position : position + CELL]):
                assert cell // PAGE in BALLOON, f"zeros at {cell:#x}"
                continue
            assert writer <= THREADS, f"{data[position : position + CELL]!r} at {cell:#x}"
            assert count < self.written[writer], f"a value to come at {cell:#x}"
            assert check == check_sum(cell, count, writer), f"torn or foreign at {cell:#x}"


class Hammer:
    """The guest, its cache, and the threads."""

    def __init__(self, seed: int, seconds: float, operations: int) -> None:
        self.seed = seed
        self.deadline = time.monotonic() + seconds
        self.operations = operations
        self.values = Values()
        self.domain = MockHypervisor().create_domain(memory=PAGES * PAGE)
        for page in range(PAGES):
            self.domain.write(page * PAGE, self.values.make(page * PAGE, PAGE, THREADS))
        self.backend = open_backend("mock", domain=self.domain)
        self.cache = MapCache(
            self.backend,
            bucket_shift=BUCKET.bit_length() - 1,
            max_resident=RESIDENT,
            on_stale="copy",
        )
        self.domain.on_invalidate(self.cache.invalidate)
        self.stop = threading.Event()
        self.errors: list[BaseException] = []
        self.done: Counter[str] = Counter()
        self.warned: Counter[int] = Counter()

    def run(self) -> None:
        """Let them work, then check the accounting."""
        handler = logging.Handler()
        handler.emit = self.note_warning  # type: ignore[method-assign] # counted
        logger = logging.getLogger("xenmapcache")
        logger.addHandler(handler)
        logger.propagate = False
        workers = [threading.Thread(target=self.work, args=[number]) for number in range(THREADS)]
        balloonist = threading.Thread(target=self.guarded, args=[self.balloon])
        for thread in (*workers, balloonist):
            thread.start()
        for thread in workers:
            thread.join()
        self.stop.set()
        balloonist.join()
        if self.errors:
            raise self.errors[0]
        self.look_at_the_books()

    def note_warning(self, record: logging.LogRecord) -> None:
        assert isinstance(record.args, tuple)
        if record.msg.startswith("invalidation"):
            self.warned.update(item.id for item in record.args if isinstance(item, LeaseInfo))

    def guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self.errors.append(error)
            self.stop.set()

    def balloon(self) -> None:
        """Give pages up and get them back, with an invalidation every two milliseconds."""
        rng = random.Random(self.seed)
        while not self.stop.wait(0.002):
            page = rng.choice(BALLOON[:-3]) * PAGE
            self.domain.balloon_out(page, 3 * PAGE)
            self.done["invalidations"] += 1
            if rng.random() < 0.5:
                self.cache.invalidate()
            self.domain.balloon_in(page, 3 * PAGE)

    def work(self, number: int) -> None:
        """Do operations until there were enough, time is up, or another thread has failed."""
        worker = Worker(self, number)
        self.guarded(worker.loop)
        self.done.update(worker.done)  # joined one after the other: nobody else is here

    def look_at_the_books(self) -> None:
        cache = self.cache
        assert cache.leases() == ()
        stats = cache.stats()
        assert (stats.device_leases, stats.dma_leases) == (0, 0)
        assert stats.resident_bytes <= RESIDENT
        gc.collect()
        now = cache._table.generation
        assert not any(pin.lease_ids for pin in now.clock.pins.values())
        assert all(now.buckets[index].memory is now.readable[index] for index in now.readable)
        assert set(now.writable) == set(now.readable)
        # If the last lease of a bucket ended last of all, nobody has put it back on the clock.
        now.clock.put_back(cache._table.returned)
        assert sorted(now.clock.order) == sorted(now.buckets)
        assert not now.notes
        assert not cache._budget.operations
        assert not cache._budget.waiting
        assert max(self.warned.values(), default=0) <= 1
        cache.close()
        gc.collect()
        stats = cache.stats()
        assert (stats.resident_bytes, stats.maps - stats.unmaps) == (0, 0), stats
        assert live_mappings() == 0


class Worker:
    """One thread's operations."""

    def __init__(self, hammer: Hammer, number: int) -> None:
        self.hammer, self.number = hammer, number
        self.cache, self.values = hammer.cache, hammer.values
        self.memory = GuestMemory(hammer.cache)
        self.rng = random.Random(hammer.seed * THREADS + number)
        self.done: Counter[str] = Counter()
        self.own: dict[int, bytes] = {}

    def loop(self) -> None:
        hammer = self.hammer
        works = (
            *[self.read, self.write, self.transfer, self.keep_own] * 4,
            *[self.read_into, self.views, self.device, self.scatter, self.ask] * 2,
            self.invalidate,
        )
        while not hammer.stop.is_set() and time.monotonic() < hammer.deadline:
            work = self.rng.choice(works)
            try:
                work()
            except FaultError as fault:
                assert fault.address // PAGE in BALLOON, fault
                self.done["faults"] += 1
            except CacheFullError:
                self.done["no room"] += 1
            self.done[work.__name__] += 1
            if sum(self.done.values()) >= hammer.operations:
                break

    def range(self) -> tuple[int, int]:
        """Return a few cells anywhere but where threads have their own, over all edges."""
        length = self.rng.choice([1, 1, 2, 8]) * CELL
        cell = self.rng.randrange(THREADS, PAGES * CELLS - 8)
        if cell % CELLS < THREADS or (cell % CELLS) > CELLS - 9:
            # The first cells of a page are the threads' own: begin after them, or cross an edge
            # of pages that balloon, where nobody has any.
            cell = self.rng.choice(BALLOON[1:]) * CELLS - 2
        return cell * CELL, length

    def fresh(self, address: int, length: int) -> bytes:
        return self.values.make(address, length, self.number)

    # --- operations ---

    def read(self) -> None:
        address, length = self.range()
        self.values.check(address, self.cache.read(address, length))

    def read_into(self) -> None:
        address, length = self.range()
        buffer = bytearray(length)
        self.cache.read_into(address, buffer)
        self.values.check(address, bytes(buffer))

    def views(self) -> None:
        address, length = self.range()
        self.values.check(address, b"".join(map(bytes, self.cache.views(address, length))))

    def write(self) -> None:
        address, length = self.range()
        self.cache.write(address, self.fresh(address, length))

    def keep_own(self) -> None:
        """A cell that nobody else writes, on a page that stays, has what was last written there."""
        page = self.rng.randrange(BALLOON.start)
        cell = page * PAGE + self.number * CELL
        found = self.cache.read(cell, CELL)
        self.values.check(cell, found)
        if cell in self.own:
            assert found == self.own[cell], f"{cell:#x} is as it was before"
        value = self.fresh(cell, CELL)
        if self.rng.random() < 0.5:
            self.cache.write(cell, value)
        else:
            with self.cache.map_dma(cell, CELL, owner="own") as lease:
                lease.view[:] = value
        self.own[cell] = value

    def transfer(self) -> None:
        address, length = self.range()
        direction = self.rng.choice(list(DmaDirection))
        with self.cache.map_dma(address, length, owner="dma", direction=direction) as lease:
            self.values.check(address, bytes(lease.view))
            if direction is not DmaDirection.TO_DEVICE:
                lease.view[:] = self.fresh(address, length)
            assert self.cache.resolve(lease.host_address) == address
            self.values.check(address, bytes(lease.view))

    def device(self) -> None:
        """Device memory, of a thread's own length, moved to another page and back."""
        length = (THREADS + self.number) * CELL  # which tells its lease from others'
        old, new = (page * PAGE + 64 * CELL for page in self.rng.sample(range(BALLOON.start), 2))
        with self.cache.map_device(old, length, owner=f"device{self.number}") as lease:
            host = lease.host_address
            self.values.check(old, bytes(lease.view))
            self.cache.replace(old, new, length)
            assert (lease.host_address, lease.address, lease.stale) == (host, new, False)
            self.values.check(new, bytes(lease.view))
            lease.view[:] = self.fresh(new, length)
            self.values.check(new, self.cache.read(new, length))

    def scatter(self) -> None:
        ranges = [self.range(), self.range()]
        with self.memory.segments(ranges) as segments:
            for (address, length), view in zip(ranges, segments.views, strict=True):
                self.values.check(address, bytes(view))
                view[:] = self.fresh(address, length)

    def ask(self) -> None:
        stats = self.cache.stats()
        assert 0 <= stats.resident_bytes <= RESIDENT
        assert stats.maps >= stats.unmaps
        for info in self.cache.leases():
            assert info.owner
        for start, length in self.cache.present(0, BUCKET):
            assert (start, length) == (0, BUCKET)

    def invalidate(self) -> None:
        report = self.cache.invalidate()
        assert all(info.stale for info in report.dma)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="at most (%(default)s)")
    parser.add_argument("--operations", type=int, default=5000, help="of each thread, at most")
    parser.add_argument("--seed", type=int, default=None, help="of what is done")
    options = parser.parse_args()
    seed = random.randrange(1 << 32) if options.seed is None else options.seed
    gil = getattr(sys, "_is_gil_enabled", lambda: True)()
    print(f"python {sys.version.split()[0]}, GIL {'on' if gil else 'off'}, seed {seed}")  # noqa: T201 - a script
    hammer = Hammer(seed, options.seconds, options.operations)
    hammer.run()
    stats = hammer.cache.stats()
    print(  # noqa: T201 - a script's
        ", ".join(f"{name} {count}" for name, count in sorted(hammer.done.items())),
        f"\nmaps {stats.maps}, evictions {stats.evictions}, stale DMA {stats.stale_dma_released}, "
        f"warned of {len(hammer.warned)} leases",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
