"""Virtqueue: chains, indirect tables, notifications in both directions, and broken drivers."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.devicemodel.virtio_kit import INDIRECT, NEXT, WRITE, Ring
from xenmapcache import DmaDirection, MapCache, MockDomain
from xenmapcache.devicemodel.virtio import BrokenDriverError, GuestBuffer, Request, Virtqueue
from xenmapcache.devicemodel.virtio.queue import EVENT_IDX, INDIRECT_DESC, MAX_SIZE

RING, TABLE = 0x10000, 0x20000
SIZE = 8
IN_WORDS = pytest.mark.parametrize("events", [False, True], ids=["flags", "event index"])


def queue_of(cache: MapCache, ring: Ring, *, max_bytes: int = 1 << 20) -> Virtqueue:
    """Return the device's side of a ring."""
    features = INDIRECT_DESC | (EVENT_IDX if ring.events else 0)
    return Virtqueue(cache, 0, size=ring.size, **ring.at(), features=features, max_bytes=max_bytes)


def begin_at(idx: int, ring: Ring, queue: Virtqueue) -> None:
    """Have both sides be where they are after that many requests."""
    ring.idx = ring.seen = queue._used = queue._next = queue._seen = idx


def take_all(queue: Virtqueue) -> list[Request]:
    """Pop what there is."""
    found = []
    while (request := queue.pop()) is not None:
        found.append(request)
    return found


@pytest.fixture
def ring(guest: MockDomain) -> Ring:
    return Ring(guest, RING, SIZE)


@pytest.fixture
def queue(cache: MapCache, ring: Ring) -> Virtqueue:
    return queue_of(cache, ring)


# --- requests -----------------------------------------------------------------------------------


@pytest.mark.parametrize("table", [0, TABLE], ids=["direct", "indirect"])
def test_a_request_has_what_the_chain_names(ring: Ring, queue: Virtqueue, table: int) -> None:
    """Its readable and its writable ranges come in the order of the chain."""
    readable, writable = [(0x1000, 16), (0x2000, 0)], [(0x3000, 512), (0x5000, 1)]
    head = ring.chain(readable, writable, table)
    ring.offer(head)
    request = queue.pop()
    assert request is not None
    assert (request.head, request.readable.ranges) == (head, tuple(readable))
    assert request.writable.ranges == tuple(writable)
    assert request.readable.direction is DmaDirection.TO_DEVICE
    assert request.writable.direction is DmaDirection.FROM_DEVICE
    assert repr(queue) == "<queue 0 of 8 entries, 1 in flight>"
    assert repr(request) == (
        "<request 0: <GuestBuffer, to-device, 16 bytes in 2 ranges from 0x1000>, "
        "<GuestBuffer, from-device, 513 bytes in 2 ranges from 0x3000>>"
    )
    assert queue.pop() is None
    queue.push((request, 7))
    assert ring.used() == [(head, 7)]
    assert queue.in_flight == {}


def test_an_indirect_table_may_follow_direct_descriptors(ring: Ring, queue: Virtqueue) -> None:
    """The last descriptor of a chain may name a table, and its entries continue the chain."""
    ring.put(0, 0x1000, 16, NEXT, 5)
    ring.put(5, TABLE, 16, INDIRECT)
    ring.guest.write(TABLE, (0x3000).to_bytes(8, "little") + b"\x08\0\0\0\x02\0\0\0")
    ring.offer(0)
    request = queue.pop()
    assert request is not None
    assert (request.readable.ranges, request.writable.ranges) == (
        ((0x1000, 16),),
        ((0x3000, 8),),
    )


@IN_WORDS
def test_rings_wrap(guest: MockDomain, cache: MapCache, events: bool) -> None:
    """After 0xffff comes 0, and each request is used once."""
    ring = Ring(guest, RING, 4, events=events)
    queue = queue_of(cache, ring)
    begin_at(0xFFFA, ring, queue)
    head = ring.chain(writable=[(0x1000, 1)])
    for number in range(12):
        ring.offer(head)
        request = queue.pop()
        assert request is not None
        queue.push((request, number))
        assert ring.used() == [(head, number)]
    assert ring.u16(ring.device + 2) == ring.idx == 6


def test_requests_end_in_any_order(ring: Ring, queue: Virtqueue) -> None:
    """The ring says which one each was; a request that is not in flight cannot be pushed."""
    heads = [ring.chain(writable=[(0x1000, 8)]) for _ in range(3)]
    ring.offer(*heads)
    first, second, third = take_all(queue)
    queue.push((third, 3), (first, 1))
    assert ring.used() == [(third.head, 3), (first.head, 1)]
    with pytest.raises(ValueError, match=r"queue 0: <request 0: .* is not in flight"):
        queue.push((first, 1))
    queue.push((second, 2))
    assert ring.used() == [(second.head, 2)]


def test_a_full_ring(ring: Ring, queue: Virtqueue) -> None:
    """All entries may be in flight, and a chain may have as many descriptors as the ring."""
    heads = [ring.chain(writable=[(0x1000, 8)]) for _ in range(SIZE)]
    ring.offer(*heads)
    requests = take_all(queue)
    assert [request.head for request in requests] == heads
    queue.push(*((request, 0) for request in requests))
    ring.offer(ring.chain(writable=[(0x1000, 8)] * SIZE))
    request = queue.pop()
    assert request is not None
    assert len(request.writable) == 8 * SIZE


# --- notifications ------------------------------------------------------------------------------


@IN_WORDS
def test_the_device_asks_for_a_kick_only_when_the_ring_is_empty(
    guest: MockDomain, cache: MapCache, events: bool
) -> None:
    """While it has something to pop, the driver need not notify."""
    ring = Ring(guest, RING, SIZE, events=events)
    queue = queue_of(cache, ring)
    assert queue.pop() is None
    ring.offer(ring.chain(writable=[(0x1000, 8)]))
    assert ring.wants_kick()
    assert queue.pop() is not None
    ring.offer(ring.chain(writable=[(0x1000, 8)]))
    assert not ring.wants_kick()
    assert queue.pop() is not None
    assert queue.pop() is None
    ring.offer(ring.chain(writable=[(0x1000, 8)]))
    assert ring.wants_kick()


@IN_WORDS
def test_a_request_that_comes_while_the_device_asks_is_found(
    guest: MockDomain, cache: MapCache, monkeypatch: pytest.MonkeyPatch, events: bool
) -> None:
    """After it has asked for a kick, the device looks again: the driver may have seen no wish."""
    ring = Ring(guest, RING, SIZE, events=events)
    queue = queue_of(cache, ring)
    assert queue.pop() is None
    monkeypatch.setattr(queue, "_flush", lambda: ring.offer(ring.chain(writable=[(0x1000, 8)])))
    assert queue.pop() is not None


def test_interrupts_without_the_event_index(ring: Ring, queue: Virtqueue) -> None:
    """The driver's flag NO_INTERRUPT decides."""
    for flag in (0, 1, 0):
        ring.put_u16(ring.driver, flag)
        ring.offer(ring.chain(writable=[(0x1000, 8)]))
        request = queue.pop()
        assert request is not None
        assert queue.push((request, 0)) is not bool(flag)


@pytest.mark.parametrize("start", [0, 0xFFFE], ids=["", "across the wrap"])
def test_interrupts_with_the_event_index(guest: MockDomain, cache: MapCache, start: int) -> None:
    """The driver is told when idx passes its used_event, also if several are pushed at once."""
    ring = Ring(guest, RING, SIZE, events=True)
    queue = queue_of(cache, ring)
    begin_at(start, ring, queue)

    def push(count: int) -> bool:
        ring.offer(*(ring.chain(writable=[(0x1000, 8)]) for _ in range(count)))
        return queue.push(*((request, 0) for request in take_all(queue)))

    assert push(1)  # the first time, it cannot know what the driver has seen
    ring.used()
    ring.ask_for_interrupt(2)
    assert [push(1), push(1), push(1), push(1)] == [False, False, True, False]
    ring.used()
    ring.ask_for_interrupt(1)
    assert [push(3), push(1)] == [True, False]


# --- broken drivers -----------------------------------------------------------------------------


def too_long(ring: Ring) -> None:
    ring.put(0, 0x1000, 1, NEXT, 0)


def loop_of_two(ring: Ring) -> None:
    ring.put(0, 0x1000, 1, NEXT, 1)
    ring.put(1, 0x1000, 1, NEXT, 0)


def next_too_high(ring: Ring) -> None:
    ring.put(0, 0x1000, 1, NEXT, SIZE)


def readable_last(ring: Ring) -> None:
    ring.put(0, 0x1000, 1, NEXT | WRITE, 1)
    ring.put(1, 0x1000, 1)


def too_many_bytes(ring: Ring) -> None:
    ring.put(0, 0x1000, 1 << 20, NEXT, 1)
    ring.put(1, 0x1000, 1)


def table_in_a_table(ring: Ring) -> None:
    ring.chain([(0x1000, 1)], table=TABLE)
    ring.guest.write(TABLE + 12, INDIRECT.to_bytes(2, "little"))


def table_with_next(ring: Ring) -> None:
    ring.put(0, TABLE, 16, INDIRECT | NEXT, 1)


def table_index(ring: Ring) -> None:
    ring.chain([(0x1000, 1)], [(0x2000, 1)], table=TABLE)
    ring.guest.write(TABLE + 14, (2).to_bytes(2, "little"))


def table_loop(ring: Ring) -> None:
    ring.chain([(0x1000, 1)], [(0x2000, 1)], table=TABLE)
    ring.guest.write(TABLE + 14, (0).to_bytes(2, "little"))


def table_length(length: int) -> Callable[[Ring], None]:
    return lambda ring: ring.put(0, TABLE, length, INDIRECT)


def table_nowhere(ring: Ring) -> None:
    ring.put(0, 1 << 40, 16, INDIRECT)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (too_long, "queue 0: head 0: has more than 8 descriptors"),
        (loop_of_two, "queue 0: head 0: has more than 8 descriptors"),
        (next_too_high, "queue 0: descriptor 8 must be below 8"),
        (readable_last, "queue 0: head 0: a readable descriptor follows a writable one"),
        (too_many_bytes, "queue 0: head 0: has more than 1048576 bytes"),
        (table_in_a_table, "queue 0: head 0: a table of descriptors names another one"),
        (table_with_next, "queue 0: head 0: a descriptor has both INDIRECT and NEXT"),
        (table_index, "queue 0: descriptor 2 must be below 2"),
        (table_loop, "queue 0: head 0: has more than 8 descriptors"),
        (table_length(0), "queue 0: head 0: a table of 0 bytes must have 1 to 8 descriptors"),
        (table_length(17), "queue 0: head 0: a table of 17 bytes must have 1 to 8 descriptors"),
        (table_length(144), "queue 0: head 0: a table of 144 bytes must have 1 to 8 descriptors"),
        (table_nowhere, "queue 0: its memory cannot be read: no page at 0x10000000000"),
    ],
)
def test_a_chain_against_the_rules(
    ring: Ring, queue: Virtqueue, write: Callable[[Ring], None], message: str
) -> None:
    """It is found in a bounded number of steps, and the message says what is wrong."""
    write(ring)
    ring.offer(0)
    with pytest.raises(BrokenDriverError) as raised:
        queue.pop()
    assert str(raised.value).startswith(message)
    assert queue.in_flight == {}


def test_an_index_too_far_ahead(ring: Ring, queue: Virtqueue) -> None:
    """The driver cannot have made more requests available than the ring has entries."""
    ring.put_u16(ring.driver + 2, SIZE + 1)
    with pytest.raises(BrokenDriverError, match="idx 9 is 9 ahead, more than the 8 entries"):
        queue.pop()


def test_a_head_out_of_range(ring: Ring, queue: Virtqueue) -> None:
    """A head must be a descriptor."""
    ring.offer(SIZE)
    with pytest.raises(BrokenDriverError, match="descriptor 8 must be below 8"):
        queue.pop()


def test_a_head_in_flight_again(ring: Ring, queue: Virtqueue) -> None:
    """A driver that offers a request twice would get two answers for one buffer."""
    head = ring.chain(writable=[(0x1000, 8)])
    ring.offer(head, head)
    assert queue.pop() is not None
    with pytest.raises(BrokenDriverError, match="head 0 is in flight already"):
        queue.pop()


def test_a_table_that_was_not_negotiated(ring: Ring, cache: MapCache) -> None:
    """Without INDIRECT_DESC, the flag is against the rules."""
    queue = Virtqueue(cache, 3, size=SIZE, **ring.at(), features=0)
    ring.offer(ring.chain([(0x1000, 1)], table=TABLE))
    with pytest.raises(BrokenDriverError, match="queue 3: head 0: INDIRECT_DESC was not"):
        queue.pop()


@pytest.mark.parametrize("size", [0, 3, MAX_SIZE * 2])
def test_a_size_against_the_rules(cache: MapCache, ring: Ring, size: int) -> None:
    """It is a power of two, up to 32768."""
    with pytest.raises(BrokenDriverError, match=f"its size {size} must be a power of two"):
        Virtqueue(cache, 0, size=size, **ring.at(), features=0)


@pytest.mark.parametrize(
    ("area", "address"),
    [("descriptors", 8), ("driver", 1), ("device", 2), ("descriptors", 2**64 - 16)],
)
def test_an_address_against_the_rules(cache: MapCache, ring: Ring, area: str, address: int) -> None:
    """Each area is aligned, and ends within 64 bits."""
    addresses = ring.at(**{area: address})
    with pytest.raises(BrokenDriverError, match=f"at {address:#x} must be aligned to"):
        Virtqueue(cache, 0, size=SIZE, **addresses, features=0)


def test_a_ring_that_was_given_up(guest: MockDomain, ring: Ring, queue: Virtqueue) -> None:
    """A ring without memory is a broken driver, whether it is read or written."""
    ring.offer(ring.chain(writable=[(0x1000, 8)]))
    request = queue.pop()
    assert request is not None
    guest.balloon_out(RING, 0x1000)
    queue._cache.invalidate()
    with pytest.raises(BrokenDriverError, match="its memory cannot be read: no page at 0x10082"):
        queue.pop()
    with pytest.raises(BrokenDriverError, match="its memory cannot be written: no page at 0x1"):
        queue.push((request, 0))


def test_a_ring_that_moved_to_other_frames(guest: MockDomain, ring: Ring, queue: Virtqueue) -> None:
    """After an invalidation the queue sees what the guest sees."""
    assert queue.pop() is None
    content = guest.read(RING, 0x1000)
    guest.balloon_out(RING, 0x1000)
    queue._cache.invalidate()
    guest.balloon_in(RING, 0x1000)
    guest.write(RING, content)
    ring.offer(ring.chain(writable=[(0x1000, 8)]))
    request = queue.pop()
    assert request is not None
    queue.push((request, 8))
    assert ring.used() == [(0, 8)]


# --- buffers ------------------------------------------------------------------------------------


def test_a_slice_of_a_buffer(guest: MockDomain, cache: MapCache) -> None:
    """It counts bytes across the ranges, from both ends, and has the same memory."""
    buffer = GuestBuffer(cache, [(0x1000, 4), (0x2000, 0), (0x3000, 4)], DmaDirection.FROM_DEVICE)
    assert len(buffer) == 8
    assert buffer[2:6].ranges == ((0x1002, 2), (0x3000, 2))
    assert buffer[-1:].ranges == ((0x3003, 1),)
    assert buffer[:4].ranges == ((0x1000, 4),)
    assert buffer[6:2].ranges == ()
    assert repr(buffer[:0]) == "<GuestBuffer, from-device, 0 bytes in 0 ranges>"
    with pytest.raises(ValueError, match="step of a slice must be 1, not 2"):
        buffer[::2]
    assert buffer[2:].write(b"abcd") == 4
    assert guest.read(0x1000, 4) + guest.read(0x3000, 4) == b"\0\0abcd\0\0"
    assert buffer.read() == b"\0\0abcd\0\0"
    with buffer[2:6].lease("disk0") as segments:
        assert segments.tobytes() == b"abcd"


def test_a_buffer_without_memory(cache: MapCache) -> None:
    """To read or write it says which buffer it was, and why."""
    buffer = GuestBuffer(cache, [(1 << 40, 4)], DmaDirection.FROM_DEVICE)
    with pytest.raises(BrokenDriverError, match=r"0x10000000000> cannot be read: no page"):
        buffer.read()
    with pytest.raises(BrokenDriverError, match=r"0x10000000000> cannot be written: no page"):
        buffer.write(b"1234")
