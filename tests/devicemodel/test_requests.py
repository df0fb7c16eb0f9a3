"""Requests of a mock guest: what a device sees of them, and what the guest gets back."""

from __future__ import annotations

import select

import pytest

from tests.kit import (
    Memory,
    in_thread,
    wait_for_requests,
)
from xenmapcache import (
    MockDomain,
)
from xenmapcache.devicemodel import IoreqServer
from xenmapcache.ioreq import BufferedRing, Request, RequestKind

PORT, MMIO, VGA, PCI = 0x510, 0xF000_0000, 0xA0000, "0000:00:05.0"


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ports(guest: MockDomain, live: IoreqServer, device: Memory, size: int) -> None:
    """What is written to a port is what the device gets, and the other way round."""
    value = 0x44332211 & (1 << 8 * size) - 1
    guest.port_out(PORT + 4, value, size)
    assert device.bytes[4 : 4 + size] == value.to_bytes(size, "little")
    assert guest.port_in(PORT + 4, size) == value
    assert device.accesses == [("write", 4, size), ("read", 4, size)]
    assert (live.requests, live.failures) == (2, 0)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_mmio(guest: MockDomain, live: IoreqServer, device: Memory, size: int) -> None:
    """Loads and stores of each size."""
    value = 0x8877665544332211 & (1 << 8 * size) - 1
    guest.mmio_write(MMIO + 16, value, size)
    assert guest.mmio_read(MMIO + 16, size) == value
    assert device.accesses == [("write", 16, size), ("read", 16, size)]


def test_memory_is_not_mmio(guest: MockDomain, live: IoreqServer) -> None:
    """A load from RAM never reaches a device model."""
    guest.mmio_write(0x3000, 0x1234)
    assert guest.read(0x3000, 4) == b"\x34\x12\0\0"
    assert guest.mmio_read(0x3000) == 0x1234
    assert live.requests == 0


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("backward", [False, True])
def test_port_strings(
    guest: MockDomain, live: IoreqServer, device: Memory, size: int, backward: bool
) -> None:
    """Rep outs and ins touch one port and walk through memory, up or down, across pages."""
    count = 5
    low = 0x3000 - 2 * size
    start = low + (count - 1) * size if backward else low
    items = [bytes([16 * number + byte for byte in range(size)]) for number in range(count)]
    guest.write(low, b"".join(items))
    written: list[int] = []
    region = live.claim_ports(0x600, 4)
    region.write(lambda offset, size, value: written.append(value))
    order = items[::-1] if backward else items
    guest.port_out_string(0x600, start, count, size, backward=backward)
    assert written == [int.from_bytes(item, "little") for item in order]
    source = iter(written)
    region.read(lambda offset, size: next(source))
    target = start + 0x2000
    guest.port_in_string(0x600, target, count, size, backward=backward)
    assert guest.read(low + 0x2000, count * size) == b"".join(items)
    assert guest.dirty_gfns == {0x4, 0x5}
    assert live.requests == 2


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("backward", [False, True])
def test_mmio_strings(
    guest: MockDomain, live: IoreqServer, device: Memory, size: int, backward: bool
) -> None:
    """Rep movs walks through both; rep stos writes one value to each place."""
    count = 4
    back = (count - 1) * size if backward else 0
    guest.write(0x1000, bytes(range(count * size)))
    guest.mmio_write_string(MMIO + back, 0x1000 + back, count, size, backward=backward)
    assert device.bytes[: count * size] == bytes(range(count * size))
    guest.mmio_read_string(MMIO + back, 0x2000 + back, count, size, backward=backward)
    assert guest.read(0x2000, count * size) == bytes(range(count * size))
    guest.mmio_fill(MMIO + 64 + back, 0xA5, count, size, backward=backward)
    assert device.bytes[64 : 64 + count * size] == (0xA5).to_bytes(size, "little") * count
    expected = list(range(0, count * size, size))
    places = [offset for what, offset, _ in device.accesses[:count]]
    assert places == (expected[::-1] if backward else expected)
    assert live.requests == 3


def test_pci(guest: MockDomain, live: IoreqServer, device: Memory) -> None:
    """Configuration space is reached by function; another function is not there."""
    guest.pci_write(PCI, 4, 0x1234, 2)
    assert guest.pci_read("00:05.0", 4, 2) == 0x1234
    assert device.accesses == [("write", 4, 2), ("read", 4, 2)]
    assert guest.pci_read("0000:00:05.1", 0) == 0xFFFFFFFF


def test_buffered_writes_come_first(guest: MockDomain, live: IoreqServer, device: Memory) -> None:
    """Nobody waits for a buffered write, but what the vCPU does next comes after it."""
    for number in range(200):
        guest.mmio_write(VGA, number, 1 << number % 4, buffered=True)
        assert guest.mmio_read(VGA, 1) == number
    guest.mmio_write(VGA + 8, 0x8877665544332211, 8, buffered=True)
    assert guest.mmio_read(VGA + 8, 8) == 0x8877665544332211
    assert (live.requests, live.buffered_requests) == (402, 201)


def test_buffered_writes_are_served_alone(
    guest: MockDomain, server: IoreqServer, device: Memory
) -> None:
    """More than fit the ring, with no other request in between, all arrive in order."""
    with server:
        for number in range(600):
            if number % 500 == 0:
                server.process_pending()
            guest.mmio_write(VGA + number, number & 0xFF, 1, buffered=True)
        while server.process_pending():
            pass
    assert device.accesses == [("write", number, 1) for number in range(600)]


def test_every_vcpu_is_served(guest: MockDomain, live: IoreqServer, device: Memory) -> None:
    """Four vCPUs at once get each their own answers."""

    def work(vcpu: int) -> bool:
        for number in range(50):
            guest.mmio_write(MMIO + 8 * vcpu, number, 8, vcpu=vcpu)
            if guest.mmio_read(MMIO + 8 * vcpu, 8, vcpu=vcpu) != number:
                return False
        return True

    threads = [in_thread(lambda vcpu=vcpu: work(vcpu)) for vcpu in range(4)]  # type: ignore[misc] # mypy cannot infer it
    for thread, _ in threads:
        thread.join()
    assert [seen for _, seen in threads] == [[True]] * 4
    assert live.requests == 400


def test_spurious_events_are_passed_over(server: IoreqServer) -> None:
    """Binding raises an event on every channel at once: none of them is a request."""
    with server:
        assert select.select([server], [], [], 20)[0]
        assert server.process_pending() == 0
        assert not select.select([server], [], [], 0)[0]
    assert server.requests == 0


def test_the_clock_is_taken_note_of(guest: MockDomain, live: IoreqServer) -> None:
    """TIMEOFFSET is answered and not counted as a failure; an unknown kind is counted."""
    mock = guest.ioreq_servers[live.id]
    for kind, failures in ((RequestKind.TIMEOFFSET, 0), (99, 1)):
        mock.send(1, Request(1, kind, False, 0, 5, 8))
        assert mock.wait(1, 20) == 5
        assert live.failures == failures


def test_buffered_writes_before_a_request_without_their_event(
    guest: MockDomain, server: IoreqServer, device: Memory
) -> None:
    """The ring is drained for a vCPU's request, though its own event has not come yet."""
    with server:
        server.process_pending()
        mock = guest.ioreq_servers[server.id]
        assert mock.ring is not None
        assert BufferedRing(mock.ring).append(Request(None, RequestKind.MMIO, False, VGA, 7, 1))
        thread, seen = in_thread(lambda: guest.mmio_read(VGA, 1))
        wait_for_requests(server)
        while not seen:
            server.process_pending()
        thread.join()
    assert seen == [7]


@pytest.mark.parametrize("size", [0, 3, 9, 0xFFFFFFFF])
def test_a_size_that_is_none(guest: MockDomain, live: IoreqServer, size: int) -> None:
    """It is answered, and logged."""
    mock = guest.ioreq_servers[live.id]
    mock.send(0, Request(0, RequestKind.PORT, True, PORT, 0, size))
    assert mock.wait(0, 20) == (1 << 8 * min(size, 8)) - 1
    assert live.failures == 1


def test_a_value_is_cut_to_its_size(guest: MockDomain, live: IoreqServer, device: Memory) -> None:
    """Xen leaves what it likes in the upper bytes."""
    mock = guest.ioreq_servers[live.id]
    mock.send(0, Request(0, RequestKind.PORT, False, PORT, 0x11223344, 1))
    assert mock.wait(0, 20) == 0x11223344
    assert device.bytes[:4] == b"\x44\0\0\0"


def test_a_string_keeps_its_address(guest: MockDomain, live: IoreqServer) -> None:
    """The answer to a request by pointer is the pointer, though its handler fails."""
    live.claim_ports(0x600, 4).read(lambda offset, size: 1 // 0)
    mock = guest.ioreq_servers[live.id]
    mock.send(0, Request(0, RequestKind.PORT, True, 0x600, 0x5000, 4, 2, True))
    assert mock.wait(0, 20) == 0x5000
