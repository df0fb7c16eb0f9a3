"""VirtioBlock: each type of request, its status, the file, and data while the guest balloons."""

from __future__ import annotations

import errno
import logging
import os
import random
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.devicemodel.virtio_kit import ALL_FEATURES, Line, MmioDriver, Ranges, Ring
from tests.kit import in_thread
from xenmapcache import MapCache, MockDomain
from xenmapcache.binding import libc
from xenmapcache.devicemodel import DmaEngine, IoreqServer
from xenmapcache.devicemodel.virtio import VirtioBlock, VirtioMmio
from xenmapcache.devicemodel.virtio.block import (
    DISCARD_OUT,
    FLUSH_OUT,
    GET_ID,
    IN,
    IOERR,
    OK,
    OUT,
    UNSUPP,
    ZEROES_OUT,
)
from xenmapcache.guest import Segments

BASE, RING, HEADERS, STATUS, TABLES, DATA = (
    0xFE00_0000,
    0x10000,
    0x20000,
    0x30000,
    0x40000,
    0x100000,
)
SECTORS = 4096
OFFERED = 1 << 1 | 1 << 2 | 1 << 6 | 1 << 9 | 1 << 13 | 1 << 14 | ALL_FEATURES


class DiskDriver(MmioDriver):
    """A driver of a disk, with a request at a time or several."""

    ring: Ring

    def start_disk(self, features: int = OFFERED & ~(1 << 29), size: int = 128) -> None:
        self.ring = Ring(self.guest, RING, size, events=bool(features & 1 << 29))
        assert self.begin(features)
        self.set_up(0, size, **self.ring.addresses)
        self.write(0x70, 15)

    def prepare(
        self,
        number: int,
        kind: int,
        sector: int,
        readable: Ranges = (),
        writable: Ranges = (),
        indirect: bool = False,
    ) -> int:
        """Write a request, and return its head."""
        self.guest.write(HEADERS + 16 * number, struct.pack("<IIQ", kind, 0, sector))
        self.guest.write(STATUS + number, b"\xff")
        return self.ring.chain(
            [(HEADERS + 16 * number, 16), *readable],
            [*writable, (STATUS + number, 1)],
            TABLES + 0x800 * number if indirect else 0,
        )

    def status(self, number: int = 0) -> int:
        return self.guest.read(STATUS + number, 1)[0]

    def do(self, kind: int, sector: int = 0, readable: Ranges = (), writable: Ranges = ()) -> int:
        """Do one request, and return its status."""
        self.send(self.ring, self.prepare(0, kind, sector, readable, writable))
        ((_, length),) = self.collect(self.ring, 1)
        status, size = self.status(), sum(size for _, size in writable)
        assert length == (size + 1 if status == OK or not size else 0)
        return status

    def clear(self, kind: int, *ranges: tuple[int, int, int]) -> int:
        """Discard or zero ranges of (sector, sectors, flags)."""
        data = b"".join(struct.pack("<QII", *each) for each in ranges)
        self.guest.write(DATA, data)
        return self.do(kind, readable=[(DATA, len(data))] if data else [])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(1).randbytes(SECTORS * 512) + b"not a whole sector")
    return path


@pytest.fixture
def serve(
    guest: MockDomain, server: IoreqServer, path: Path, line: Line
) -> Iterator[Callable[..., DiskDriver]]:
    """A function that serves the disk with options, and returns a driver of it."""
    disks: list[VirtioBlock] = []
    with path.open("r+b") as file:

        def serve(*, fd: int | None = None, **options: object) -> DiskDriver:
            target = file if fd is None else fd
            disks.append(VirtioBlock(server, target, **options))  # type: ignore[arg-type] # of several types
            VirtioMmio(server, BASE, disks[0], interrupt=line)
            server.open()
            running.__enter__()
            return DiskDriver(guest, BASE, line)

        running = server.serving()
        try:
            yield serve
        finally:
            running.__exit__(None, None, None)
            server.close()
            disks[0].close()


@pytest.fixture
def driver(serve: Callable[..., DiskDriver]) -> DiskDriver:
    driver = serve(serial="xen-0001")
    driver.start_disk()
    return driver


# --- what a driver finds --------------------------------------------------------------------------


def test_the_configuration_space(driver: DiskDriver) -> None:
    """Capacity, limits, and the size of a block are where virtio has them."""
    assert driver.features() == OFFERED
    assert driver.read(0x100, 8) == SECTORS
    assert [driver.read(0x100 + offset) for offset in (8, 12, 20)] == [1 << 20, 126, 512]
    assert [driver.read(0x100 + offset) for offset in (36, 40, 44)] == [1 << 22, 16, 8]
    assert [driver.read(0x100 + offset) for offset in (48, 52)] == [1 << 13, 16]
    assert driver.read(0x100 + 56, 1) == 1


@pytest.mark.parametrize("serial", ["x" * 21, "é"])
def test_a_serial_number_that_cannot_be(server: IoreqServer, path: Path, serial: str) -> None:
    """It is refused where the disk is made."""
    with path.open("rb") as file, pytest.raises(ValueError, match="serial must be at most 20"):
        VirtioBlock(server, file, serial=serial)


def test_a_file_without_a_size(server: IoreqServer) -> None:
    """A pipe cannot be a disk."""
    ends = os.pipe()
    with pytest.raises(OSError, match="Illegal seek"):
        VirtioBlock(server, ends[0])
    for end in ends:
        os.close(end)


def test_the_size(server: IoreqServer, path: Path) -> None:
    """It is counted in whole sectors, of a descriptor as well as of a file."""
    with path.open("rb") as file:
        assert VirtioBlock(server, file.fileno()).sectors == SECTORS
        assert VirtioBlock(server, file).sectors == SECTORS


def test_the_serial_number(guest: MockDomain, driver: DiskDriver) -> None:
    """The driver gets 20 bytes, or less if there is less room."""
    assert driver.do(GET_ID, writable=[(DATA, 20)]) == OK
    assert guest.read(DATA, 20) == b"xen-0001".ljust(20, b"\0")
    guest.write(DATA, b"#" * 24)
    assert driver.do(GET_ID, writable=[(DATA, 4)]) == OK
    assert guest.read(DATA, 8) == b"xen-####"
    driver.send(driver.ring, driver.prepare(0, GET_ID, 0, writable=[(DATA, 24)]))
    assert driver.collect(driver.ring, 1)[0][1] == 20  # and the status after 4 other bytes


# --- reads and writes -----------------------------------------------------------------------------


def test_a_read(guest: MockDomain, cache: MapCache, driver: DiskDriver, path: Path) -> None:
    """The file's bytes are in the guest's memory, in the order of the descriptors."""
    assert driver.do(IN, 3, writable=[(DATA + 0x1000, 512), (DATA, 1024)]) == OK
    data = path.read_bytes()[3 * 512 : 6 * 512]
    assert guest.read(DATA + 0x1000, 512) + guest.read(DATA, 1024) == data
    assert cache.leases() == ()


def test_a_write(guest: MockDomain, driver: DiskDriver, path: Path) -> None:
    """The guest's bytes are in the file, and nothing else changes."""
    before = path.read_bytes()
    guest.write(DATA, b"a" * 512 + b"b" * 512)
    assert driver.do(OUT, 7, readable=[(DATA + 512, 512), (DATA, 512)]) == OK
    assert path.read_bytes() == before[: 7 * 512] + b"b" * 512 + b"a" * 512 + before[9 * 512 :]


def test_any_framing(guest: MockDomain, driver: DiskDriver, path: Path) -> None:
    """The header may be in pieces, and the status may share a descriptor with the data."""
    guest.write(HEADERS, struct.pack("<IIQ", IN, 0, 1))
    head = driver.ring.chain(
        [(HEADERS, 3), (HEADERS + 3, 0), (HEADERS + 3, 13)], [(DATA, 100), (DATA + 100, 413)]
    )
    driver.send(driver.ring, head)
    assert driver.collect(driver.ring, 1) == [(head, 513)]
    assert guest.read(DATA, 513) == path.read_bytes()[512:1024] + bytes([OK])


@pytest.mark.parametrize(
    ("sector", "length"),
    [
        (SECTORS, 512),
        (SECTORS - 1, 1024),
        (2**64 - 1, 512),
        (2**55, 512),
        (2**64 - 1, 0),
        (0, 511),
        (0, 1),
    ],
)
@pytest.mark.parametrize("kind", [IN, OUT])
def test_sectors_that_do_not_exist(
    driver: DiskDriver, path: Path, kind: int, sector: int, length: int
) -> None:
    """Beyond the disk's end, and parts of a sector, are errors; the file is not touched."""
    before = path.read_bytes()
    data = [(DATA, length)] if length else []
    readable, writable = ([], data) if kind == IN else (data, [])
    assert driver.do(kind, sector, readable, writable) == IOERR
    assert path.read_bytes() == before


def test_the_last_sector(driver: DiskDriver) -> None:
    """It can be read, and so can no sector at the end."""
    assert driver.do(IN, SECTORS - 1, writable=[(DATA, 512)]) == OK
    assert driver.do(IN, SECTORS) == OK


def test_memory_that_does_not_exist(cache: MapCache, driver: DiskDriver, path: Path) -> None:
    """It is an error, in both directions; what comes next works."""
    before = path.read_bytes()
    assert driver.do(IN, 0, writable=[(DATA, 512), (1 << 40, 512)]) == IOERR
    assert driver.do(OUT, 0, readable=[(2**64 - 512, 512)]) == IOERR
    assert driver.do(IN, 0, writable=[(DATA, 512)]) == OK
    assert path.read_bytes() == before
    assert cache.leases() == ()


def test_a_file_that_was_truncated(
    driver: DiskDriver, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A read that ends early is an error, and the log says where."""
    os.truncate(path, 5 * 512 + 100)
    assert driver.do(IN, 4, writable=[(DATA, 1024)]) == IOERR
    assert "the file moved 612 of 1024 bytes at 0x800" in caplog.messages[0]


def test_only_what_was_read_is_dirty(
    guest: MockDomain, driver: DiskDriver, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read that ends early has written the first page; after an error it may be all."""
    os.truncate(path, 4096)
    guest.dirty_gfns.clear()
    assert driver.do(IN, 0, writable=[(DATA, 0x20000)]) == IOERR
    assert {DATA >> 12, (DATA >> 12) + 1} & guest.dirty_gfns == {DATA >> 12}
    monkeypatch.setattr(os, "preadv", raise_eio)
    assert driver.do(IN, 0, writable=[(DATA, 4096), (DATA + 0x1000, 4096)]) == IOERR
    assert {DATA >> 12, (DATA >> 12) + 1} <= guest.dirty_gfns


def test_a_file_that_cannot_be_written(
    serve: Callable[..., DiskDriver], path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An error of the file is the request's, and reads go on."""
    fd = os.open(path, os.O_RDONLY)
    driver = serve(fd=fd)
    driver.start_disk()
    assert driver.do(OUT, 0, readable=[(DATA, 512)]) == IOERR
    assert "Bad file descriptor" in caplog.messages[0]
    assert driver.clear(DISCARD_OUT, (0, 8, 0)) == IOERR
    assert driver.do(IN, 0, writable=[(DATA, 512)]) == OK
    os.close(fd)


def test_a_read_only_disk(serve: Callable[..., DiskDriver], path: Path) -> None:
    """The driver is told, and whatever would change the disk is refused."""
    before = path.read_bytes()
    driver = serve(read_only=True)
    assert driver.features() == (OFFERED | 1 << 5) & ~(1 << 13 | 1 << 14)
    driver.start_disk(driver.features() & ~(1 << 29))
    assert driver.do(OUT, 0, readable=[(DATA, 512)]) == IOERR
    assert driver.clear(DISCARD_OUT, (0, 8, 0)) == IOERR
    assert driver.clear(ZEROES_OUT, (0, 8, 0)) == IOERR
    assert driver.do(IN, 0, writable=[(DATA, 512)]) == OK
    assert driver.do(FLUSH_OUT) == OK
    assert path.read_bytes() == before


# --- the other types ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [2, 3, 5, 10, 16, 0x80000000, 0xFFFFFFFF])
def test_an_unknown_type(driver: DiskDriver, kind: int) -> None:
    """It is answered as such, with or without data."""
    assert driver.do(kind) == UNSUPP
    assert driver.do(kind, 5, [(DATA, 512)], [(DATA, 512)]) == UNSUPP


def test_flush(driver: DiskDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """It syncs the file's data; writes alone do not."""
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    assert driver.do(OUT, 0, readable=[(DATA, 512)]) == OK
    assert not synced
    assert driver.do(FLUSH_OUT) == OK
    assert len(synced) == 1


def test_a_flush_that_fails(driver: DiskDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver learns it."""

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "a test's")

    monkeypatch.setattr(os, "fdatasync", fail)
    assert driver.do(FLUSH_OUT) == IOERR


def test_a_driver_that_does_not_flush(
    serve: Callable[..., DiskDriver], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it has not accepted FLUSH, each write is on the disk when it is answered."""
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    driver = serve()
    driver.start_disk(1 << 32)
    assert driver.do(OUT, 0, readable=[(DATA, 512)]) == OK
    assert driver.clear(ZEROES_OUT, (0, 1, 0)) == OK
    assert len(synced) == 2
    assert driver.do(IN, 0, writable=[(DATA, 512)]) == OK
    assert len(synced) == 2


def zeroed(path: Path, *ranges: tuple[int, int]) -> bytes:
    """Return a file's bytes with some sectors zeroed."""
    data = bytearray(path.read_bytes())
    for sector, count in ranges:
        data[sector * 512 : (sector + count) * 512] = bytes(count * 512)
    return bytes(data)


def test_discard(driver: DiskDriver, path: Path) -> None:
    """The file forgets the ranges, and takes less room; they read as zeros."""
    wanted = zeroed(path, (0, 1024), (2048, 8))
    before = path.stat().st_blocks
    assert driver.clear(DISCARD_OUT, (0, 1024, 0), (2048, 8, 0), (5, 0, 0)) == OK
    assert path.read_bytes() == wanted
    assert path.stat().st_blocks < before


@pytest.mark.parametrize("flags", [0, 1])
def test_write_zeroes(driver: DiskDriver, path: Path, flags: int) -> None:
    """The ranges read as zeros; only with the flag UNMAP, the file may take less room."""
    wanted = zeroed(path, (8, 600), (1000, 1))
    before = path.stat().st_blocks
    assert driver.clear(ZEROES_OUT, (8, 600, flags), (1000, 1, flags)) == OK
    assert path.read_bytes() == wanted
    assert (path.stat().st_blocks < before) is bool(flags)


def test_a_file_system_without_holes(
    driver: DiskDriver,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A discard has no effect there, which the log says once; zeros are written."""
    caplog.set_level(logging.INFO, "xenmapcache.devicemodel")

    def refuse(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "a test's")

    monkeypatch.setattr(libc, "punch_hole", refuse)
    wanted = zeroed(path, (8, 8))
    assert driver.clear(DISCARD_OUT, (100, 8, 0)) == OK
    assert driver.clear(DISCARD_OUT, (100, 8, 0)) == OK
    assert driver.clear(ZEROES_OUT, (8, 8, 1)) == OK
    assert path.read_bytes() == wanted
    assert ["cannot punch holes" in message for message in caplog.messages] == [True]


@pytest.mark.parametrize(
    ("kind", "ranges", "status"),
    [
        (DISCARD_OUT, [(SECTORS - 1, 2, 0)], IOERR),
        (DISCARD_OUT, [(2**64 - 1, 1, 0)], IOERR),
        (DISCARD_OUT, [(0, 2**32 - 1, 0)], IOERR),
        (DISCARD_OUT, [(0, 8, 1)], UNSUPP),
        (DISCARD_OUT, [(0, 8, 0), (0, 8, 0x80000000)], UNSUPP),
        (DISCARD_OUT, [], IOERR),
        (DISCARD_OUT, [(0, 8, 0)] * 17, IOERR),
        (ZEROES_OUT, [(0, (1 << 13) + 1, 0)], IOERR),
        (ZEROES_OUT, [(SECTORS, 1, 1)], IOERR),
        (ZEROES_OUT, [(0, 8, 2)], UNSUPP),
        (ZEROES_OUT, [(0, 8, 0), (SECTORS, 8, 0)], IOERR),
    ],
)
def test_ranges_that_cannot_be_cleared(
    driver: DiskDriver, path: Path, kind: int, ranges: list[tuple[int, int, int]], status: int
) -> None:
    """Nothing is cleared if one of them is beyond the disk, too long, or has an unknown flag."""
    before = path.read_bytes()
    assert driver.clear(kind, *ranges) == status
    assert path.read_bytes() == before


def test_a_part_of_a_range(driver: DiskDriver) -> None:
    """A range has 16 bytes, so 15 are refused."""
    assert driver.do(DISCARD_OUT, readable=[(DATA, 15)]) == IOERR


def test_a_hole_that_cannot_be_punched() -> None:
    """The error has the reason and the range."""
    with tempfile.TemporaryFile() as file, pytest.raises(OSError) as raised:
        libc.punch_hole(file.fileno(), 0x1000, -1)
    assert raised.value.errno == errno.EINVAL
    assert "fallocate: Invalid argument: -0x1 bytes at 0x1000" in str(raised.value)


# --- broken drivers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("readable", "writable"),
    [
        ([(HEADERS, 15)], [(STATUS, 1)]),
        ([(HEADERS, 16)], []),
        ([(HEADERS, 16)], [(DATA, 0)]),
        ([(1 << 40, 16)], [(STATUS, 1)]),
        ([(HEADERS, 16)], [(1 << 40, 1)]),
        ([], [(STATUS, 1)]),
    ],
    ids=["short header", "no status", "empty status", "no memory for it", "nor for it", "none"],
)
def test_a_request_that_cannot_be_answered(
    cache: MapCache, driver: DiskDriver, readable: Ranges, writable: Ranges
) -> None:
    """The driver has to reset the device, which works."""
    driver.guest.write(HEADERS, bytes(16))
    driver.send(driver.ring, driver.ring.chain(readable, writable))
    assert driver.handle_interrupt() == 2
    assert (driver.read(0x70) & 0x40, driver.ring.used()) == (0x40, [])
    driver.start_disk()
    assert driver.do(IN, 0, writable=[(DATA, 512)]) == OK
    assert cache.leases() == ()


# --- load -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [OFFERED, OFFERED & ~(1 << 29)], ids=["events", "flags"])
@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
def test_data_survives_while_the_guest_balloons(
    guest: MockDomain,
    server: IoreqServer,
    cache: MapCache,
    serve: Callable[..., DiskDriver],
    path: Path,
    features: int,
    indirect: bool,
) -> None:
    """What is written through the queue, 24 at a time, is in the file and is read back."""
    driver = serve(limit=8)
    driver.start_disk(features)
    numbers = random.Random(2)
    content = numbers.randbytes(SECTORS * 512)
    balloons = [0]

    def balloon() -> None:
        for number in range(30):
            address = 0x80_0000 + 0x1000 * (number % 3)
            guest.balloon_out(address, 0x1000, vcpu=1)
            guest.balloon_in(address, 0x1000)
            balloons[0] += 1

    thread, _ = in_thread(balloon)
    for kind in (OUT, IN):
        order = [*range(0, SECTORS, 32)]
        numbers.shuffle(order)
        while order:
            batch = [order.pop() for _ in range(min(24, len(order)))]
            heads = []
            for number, sector in enumerate(batch):
                place = DATA + 0x8000 * number
                part = content[sector * 512 : (sector + 32) * 512]
                pieces = [(place, 512), (place + 0x2000, len(part) - 512)]
                if kind == OUT:
                    guest.write(place, part[:512])
                    guest.write(place + 0x2000, part[512:])
                sides = (pieces, []) if kind == OUT else ([], pieces)
                heads.append(driver.prepare(number, kind, sector, *sides, indirect=indirect))
            driver.send(driver.ring, *heads)
            used = driver.collect(driver.ring, len(batch))
            assert sorted(head for head, _ in used) == sorted(heads)
            assert [driver.status(number) for number in range(len(batch))] == [OK] * len(batch)
            for number, sector in enumerate(batch if kind == IN else []):
                place = DATA + 0x8000 * number
                data = guest.read(place, 512) + guest.read(place + 0x2000, 31 * 512)
                assert data == content[sector * 512 : (sector + 32) * 512]
    thread.join(60)
    assert balloons == [30]
    assert path.read_bytes()[: len(content)] == content
    assert (cache.stats().stale_dma_released, cache.leases()) == (0, ())
    assert (server.failures, server.invalidations) == (0, 30)


def test_requests_run_at_the_same_time(
    serve: Callable[..., DiskDriver], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With several workers, a slow request does not keep another one waiting."""
    driver = serve(workers=2)
    driver.start_disk()
    order: list[int] = []
    real = VirtioBlock._flush

    def slow_flush(disk: VirtioBlock, memory: Segments) -> int:
        while not order:
            os.sched_yield()
        order.append(FLUSH_OUT)
        return real(disk, memory)

    def identify(disk: VirtioBlock, memory: Segments) -> int:
        order.append(GET_ID)
        return len(memory)

    monkeypatch.setattr(VirtioBlock, "_flush", slow_flush)
    monkeypatch.setattr(VirtioBlock, "_identify", identify)
    driver.send(
        driver.ring,
        driver.prepare(0, FLUSH_OUT, 0),
        driver.prepare(1, GET_ID, 0, writable=[(DATA, 20)]),
    )
    assert len(driver.collect(driver.ring, 2)) == 2
    assert order == [GET_ID, FLUSH_OUT]


def raise_eio(*_: object) -> int:
    raise OSError(errno.EIO, "the disk is broken")


def test_a_small_write_needs_no_lease(
    cache: MapCache, driver: DiskDriver, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bytes are copied when it is taken; a larger one is written where it lies."""
    taken: list[int] = []
    map_dma = MapCache.map_dma

    def counted(cache: MapCache, address: int, length: int, **options: object) -> object:
        taken.append(length)
        return map_dma(cache, address, length, **options)  # type: ignore[arg-type] # as given

    monkeypatch.setattr(MapCache, "map_dma", counted)
    driver.guest.write(DATA, b"small" + bytes(8187) + b"large" + bytes(8699))
    assert driver.do(OUT, 0, readable=[(DATA, 512), (DATA + 512, 7680)]) == OK
    assert taken == []
    assert driver.do(OUT, 16, readable=[(DATA + 8192, 8704)]) == OK
    assert taken == [8704]
    data = path.read_bytes()
    assert (data[:5], data[8192:8197]) == (b"small", b"large")


def no_worker(*_: object, **__: object) -> None:
    raise AssertionError("a worker was asked")


def test_a_small_read_of_cached_data_needs_no_worker(
    guest: MockDomain, driver: DiskDriver, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is done when the notification returns; a large one is a worker's."""
    if not can_peek(path):
        pytest.skip("this file system has no reads that do not wait")
    monkeypatch.setattr(DmaEngine, "submit", no_worker)
    driver.send(driver.ring, driver.prepare(0, IN, 2, writable=[(DATA, 512)]))
    assert driver.ring.used() == [(0, 513)]
    assert guest.read(DATA, 512) == path.read_bytes()[1024:1536]
    monkeypatch.undo()
    assert driver.do(IN, 0, writable=[(DATA, (1 << 16) + 512)]) == OK
    assert guest.read(DATA, (1 << 16) + 512) == path.read_bytes()[: (1 << 16) + 512]


def can_peek(path: Path) -> bool:
    with path.open("rb") as file:
        try:
            return bool(os.preadv(file.fileno(), [bytearray(512)], 0, os.RWF_NOWAIT))
        except OSError:
            return False


@pytest.mark.parametrize(
    ("answer", "peeks"),
    [
        (OSError(errno.EAGAIN, "not cached"), 2),
        (100, 2),
        (OSError(errno.EOPNOTSUPP, "no such reads"), 1),
        (512, 2),
    ],
    ids=["not cached", "cached in part", "a file system without", "all of it"],
)
def test_data_that_is_not_cached(
    guest: MockDomain,
    driver: DiskDriver,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    answer: OSError | int,
    peeks: int,
) -> None:
    """A worker reads it, and the guest gets the same."""
    seen: list[int] = []
    real = os.preadv

    def preadv(fd: int, views: list[memoryview], offset: int, flags: int = 0) -> int:
        if not flags:
            return real(fd, views, offset)
        seen.append(flags)
        if isinstance(answer, OSError):
            raise answer
        real(fd, views, offset)
        return answer

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr("xenmapcache.guest.scatter.os.preadv", preadv)
    for _ in range(2):
        guest.write(DATA, bytes(512))
        assert driver.do(IN, 5, writable=[(DATA, 512)]) == OK
        assert guest.read(DATA, 512) == path.read_bytes()[5 * 512 : 6 * 512]
    assert seen == [os.RWF_NOWAIT] * peeks
