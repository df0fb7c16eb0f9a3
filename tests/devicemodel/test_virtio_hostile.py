"""A driver that writes anything anywhere: each notification returns, and a reset makes it good."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.devicemodel.virtio_kit import ALL_FEATURES, Line, Ring
from tests.effort import examples
from xenmapcache import MapCache, MockDomain, MockHypervisor, open_backend
from xenmapcache.devicemodel import IoreqServer
from xenmapcache.devicemodel.virtio import VirtioBlock, VirtioMmio, Virtqueue

BASE, RING, TABLE, DATA, SIZE = 0xFE00_0000, 0x10000, 0x20000, 0x30000, 8
STATUS, READY, NOTIFY = 0x70, 0x44, 0x50
SECTORS = 64

ADDRESSES = st.one_of(
    st.sampled_from([0, RING, RING + 128, TABLE, TABLE + 8, DATA, DATA + 1, 0xFFFFF, 0x100000]),
    st.sampled_from([2**32 - 1, 2**40, 2**52, 2**63, 2**64 - 16, 2**64 - 1]),
    st.integers(0, 2**64 - 1),
)
LENGTHS = st.one_of(
    st.sampled_from([0, 1, 15, 16, 17, 32, 128, 144, 512, 1024, 4096]),
    st.sampled_from([2**20, 2**27, 2**27 + 1, 2**31, 2**32 - 1]),
)
NEXTS = st.one_of(st.integers(0, SIZE), st.sampled_from([0xFFFF, 0x8000]))
FLAGS = st.one_of(st.integers(0, 7), st.integers(0, 0xFFFF))
DESCRIPTORS = st.lists(st.tuples(ADDRESSES, LENGTHS, FLAGS, NEXTS), max_size=SIZE)
HEADS = st.lists(NEXTS, max_size=SIZE)
IDX = st.one_of(st.integers(0, 9), st.integers(0, 0xFFFF))
HEADER = st.tuples(
    st.sampled_from([0, 1, 4, 8, 11, 13, 2, 2**32 - 1]),
    st.sampled_from([0, 1, SECTORS - 1, SECTORS, 2**55, 2**64 - 1]),
)


class Step(NamedTuple):
    """What a driver writes before a notification."""

    direct: list[tuple[int, int, int, int]]
    table: list[tuple[int, int, int, int]]
    heads: list[int]
    idx: int
    header: tuple[int, int]
    queue: int


STEPS = st.lists(
    st.builds(Step, DESCRIPTORS, DESCRIPTORS, HEADS, IDX, HEADER, st.integers(0, 2)),
    min_size=1,
    max_size=4,
)


class Disk:
    """A disk and its driver's memory, without vCPUs: the handlers are called right here."""

    def __init__(self, guest: MockDomain, server: IoreqServer, disk: VirtioBlock) -> None:
        self.guest, self.disk, self.line = guest, disk, Line()
        self.mmio = VirtioMmio(server, BASE, disk, interrupt=self.line)
        self.ring = Ring(guest, RING, SIZE)

    def write(self, register: int, value: int) -> None:
        self.mmio.write(register, 4, value)

    def start(self, features: int, **addresses: int) -> None:
        """Reset the device, and set it up."""
        for value in (0, 1, 3):
            self.write(STATUS, value)
        for half in (0, 1):
            self.write(0x24, half)
            self.write(0x20, features >> 32 * half & 0xFFFFFFFF)
        self.write(STATUS, 11)
        self.write(0x38, SIZE)
        areas = self.ring.at(**addresses)
        registers = {0x80: areas["descriptors"], 0x90: areas["driver"], 0xA0: areas["device"]}
        for register, address in registers.items():
            self.write(register, address & 0xFFFFFFFF)
            self.write(register + 4, address >> 32)
        self.write(READY, 1)
        self.write(STATUS, 15)

    def check(self) -> None:
        """Nothing is under way, and the status is one that a driver may see."""
        self.disk._engine.drain()
        assert self.disk._engine.transfers == ()
        assert self.disk._server.cache.leases() == ()
        assert self.mmio.read(STATUS, 4) in (15, 15 | 0x40)

    def check_a_good_driver(self) -> None:
        """After a reset, a request of a good driver is answered."""
        self.start(1 << 32 | 1 << 28)
        ring = self.ring = Ring(self.guest, RING, SIZE)
        self.guest.write(DATA, struct.pack("<IIQ", 0, 0, SECTORS - 1) + b"\xff" * 513)
        head = ring.chain([(DATA, 16)], [(DATA + 16, 512), (DATA + 528, 1)], TABLE)
        ring.offer(head)
        self.write(NOTIFY, 0)
        self.check()
        assert ring.used() == [(head, 513)]
        assert self.guest.read(DATA + 16, 513) == b"z" * 512 + b"\0"


@contextmanager
def a_disk() -> Iterator[Disk]:
    guest = MockHypervisor().create_domain(memory="1M")
    with (
        tempfile.TemporaryFile() as file,
        open_backend("mock", domain=guest) as backend,
        MapCache(backend) as cache,
    ):
        file.write(b"z" * SECTORS * 512)
        file.flush()
        server = IoreqServer(guest, cache)
        with VirtioBlock(server, file, limit=4) as disk, server:
            yield Disk(guest, server, disk)
        file.seek(0)
        assert len(file.read()) == SECTORS * 512


def packed(descriptors: list[tuple[int, int, int, int]]) -> bytes:
    return b"".join(struct.pack("<QIHH", *each) for each in descriptors)


@settings(max_examples=examples(150), deadline=None)
@given(steps=STEPS, features=st.sampled_from([0, 1 << 28, 1 << 29, 3 << 28]))
def test_rings_with_anything(steps: list[Step], features: int) -> None:
    """Each notification ends after a bounded number of reads of the ring."""
    reads = 0
    real = Virtqueue._read

    def counted(queue: Virtqueue, address: int, length: int) -> bytes:
        nonlocal reads
        reads += 1
        assert length <= 16 * SIZE
        return real(queue, address, length)

    with a_disk() as disk, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Virtqueue, "_read", counted)
        disk.start(1 << 32 | features)
        for step in steps:
            disk.guest.write(DATA, struct.pack("<IIQ", step.header[0], 0, step.header[1]))
            disk.guest.write(RING, packed(step.direct))
            disk.guest.write(TABLE, packed(step.table))
            for number, head in enumerate(step.heads):
                disk.ring.put_u16(disk.ring.driver + 4 + 2 * number, head)
            disk.ring.put_u16(disk.ring.driver + 2, step.idx)
            reads = 0
            disk.write(NOTIFY, step.queue)
            disk.check()
            # Each popped request begins at most one further round, which finds the ring empty.
            assert reads <= 2 * SIZE * (SIZE + 6)
        disk.check_a_good_driver()


@settings(max_examples=examples(100), deadline=None)
@given(areas=st.tuples(ADDRESSES, ADDRESSES, ADDRESSES), idx=IDX)
def test_rings_anywhere(areas: tuple[int, int, int], idx: int) -> None:
    """The areas may overlap each other, the data, or nothing that exists."""
    with a_disk() as disk:
        places = dict(zip(("descriptors", "driver", "device"), areas, strict=True))
        disk.guest.write(RING, packed([(DATA, 16, 1, 1), (DATA, 1, 2, 0)]))
        disk.ring.put_u16(disk.ring.driver + 2, idx)
        disk.start(ALL_FEATURES, **places)
        disk.write(NOTIFY, 0)
        disk.check()
        disk.check_a_good_driver()


@settings(max_examples=examples(100), deadline=None)
@given(content=st.lists(st.binary(min_size=1, max_size=64), min_size=1, max_size=8))
def test_a_page_of_noise(content: list[bytes]) -> None:
    """Rings, tables and headers that are any bytes."""
    with a_disk() as disk:
        disk.start(ALL_FEATURES)
        for part in content:
            disk.guest.write(RING, (part * 4096)[:0x1000])
            disk.write(NOTIFY, 0)
            disk.check()
        disk.check_a_good_driver()


def test_a_driver_that_changes_the_ring_amid_each_access() -> None:
    """Numbers that were checked are not read again, so nothing gets past the checks."""
    steps = 0
    real = Virtqueue._read

    with a_disk() as disk, pytest.MonkeyPatch.context() as patch:

        def scribbled(queue: Virtqueue, address: int, length: int) -> bytes:
            nonlocal steps
            data = real(queue, address, length)
            steps += 1
            disk.ring.put_u16(disk.ring.driver + 2, steps // 16)
            disk.ring.put(steps % SIZE, DATA, 16, steps % 8, steps % (SIZE + 1))
            disk.ring.put(steps * 3 % SIZE, DATA + steps, 512, 3 - steps % 2, steps % SIZE)
            disk.ring.put_u16(disk.ring.driver + 4 + 2 * (steps % SIZE), steps % SIZE)
            return data

        patch.setattr(Virtqueue, "_read", scribbled)
        broken = 0
        for _ in range(100):
            disk.start(ALL_FEATURES)
            for _ in range(10):
                disk.write(NOTIFY, 0)
            disk.check()
            broken += disk.mmio.read(STATUS, 4) != 15
        patch.undo()
        assert broken > 10
        disk.check_a_good_driver()


def test_resets_amid_requests() -> None:
    """However often a driver resets amid its requests, no more than the limit is under way."""
    with a_disk() as disk:
        for _ in range(50):
            disk.start(ALL_FEATURES & ~(1 << 29))
            ring = disk.ring = Ring(disk.guest, RING, SIZE)
            disk.guest.write(DATA, struct.pack("<IIQ", 0, 0, 0))
            ring.put(0, DATA, 16, 1, 1)
            for number in range(1, SIZE):
                ring.put(number, DATA + 512 * number, 512, 2)
            ring.offer(0)
            disk.write(NOTIFY, 0)
            assert len(disk.disk._engine.transfers) <= 4
        disk.check_a_good_driver()
