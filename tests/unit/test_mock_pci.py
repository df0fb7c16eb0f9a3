"""PCI on the mock: ports 0xcf8 and 0xcfc as Xen translates them, and a kernel's PCI code."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kit import Memory
from xenmapcache import MapCache, MockDomain, MockHypervisor, open_backend
from xenmapcache.devicemodel import IoreqServer

CF8, CFC, PCI = 0xCF8, 0xCFC, "0000:00:05.0"
SELECT = 0x80002800
"""Register 0 of 00:05.0."""


@pytest.fixture
def guest() -> MockDomain:
    return MockHypervisor().create_domain(memory="1M", vcpus=2)


@pytest.fixture
def server(guest: MockDomain) -> Iterator[IoreqServer]:
    """An open server, which a thread serves."""
    with open_backend("mock", domain=guest) as backend, MapCache(backend) as cache:
        with (server := IoreqServer(guest, cache)), server.serving():
            yield server
        assert not server.failures


# --- ports 0xcf8 and 0xcfc ----------------------------------------------------------------


def test_the_data_port_reaches_the_selected_function(
    guest: MockDomain, server: IoreqServer
) -> None:
    """Its register, with the low bits of the port, in all sizes, read and written."""
    device = Memory()
    device.bytes[:8] = bytes(range(1, 9))
    server.claim_pci(PCI, device)
    guest.port_out(CF8, SELECT)
    assert guest.port_in(CFC) == 0x04030201
    assert guest.port_in(CFC + 2, 2) == 0x0403
    assert guest.port_in(CFC + 3, 1, vcpu=1) == 0x04  # one selection for the domain
    guest.port_out(CF8, SELECT | 0x3C)
    guest.port_out(CFC + 1, 0xAB, 1)
    assert device.accesses == [("read", 0, 4), ("read", 2, 2), ("read", 3, 1), ("write", 0x3D, 1)]
    assert guest.pci_read(PCI, 0x3C) == 0xAB00


def test_a_string_at_the_data_port_is_translated(guest: MockDomain, server: IoreqServer) -> None:
    """Each item is one access to the same register."""
    device = Memory()
    device.bytes[:4] = b"\x01\x02\x03\x04"
    server.claim_pci(PCI, device)
    guest.port_out(CF8, SELECT)
    guest.port_in_string(CFC, 0x1000, 2)
    assert guest.read(0x1000, 8) == b"\x01\x02\x03\x04" * 2
    assert device.accesses == [("read", 0, 4)] * 2


def test_a_function_that_is_not_claimed_reads_all_ones(
    guest: MockDomain, server: IoreqServer
) -> None:
    """Writes to it are dropped, and no other function sees them."""
    device = Memory()
    server.claim_pci(PCI, device)
    guest.port_out(CF8, SELECT + 0x100)
    assert [guest.port_in(CFC, size) for size in (1, 2, 4)] == [0xFF, 0xFFFF, 0xFFFFFFFF]
    guest.port_out(CFC, 5)
    assert not device.accesses


def test_without_the_enable_bit_the_data_port_is_a_port(
    guest: MockDomain, server: IoreqServer
) -> None:
    """A server that has claimed the port gets it then, and never while the bit is set."""
    function, ports = Memory(), Memory()
    server.claim_pci(PCI, function)
    server.claim_ports(CFC, 4, ports)
    guest.port_out(CF8, SELECT & 0x7FFFFFFF)
    assert guest.port_in(CFC) == 0
    guest.port_out(CF8, SELECT)
    assert guest.port_in(CFC) == 0
    guest.port_out(CF8, SELECT + 0x100)
    assert guest.port_in(CFC) == 0xFFFFFFFF
    assert (ports.accesses, function.accesses) == ([("read", 0, 4)], [("read", 0, 4)])


def test_nobody_reads_the_selection_unless_a_server_answers(
    guest: MockDomain, server: IoreqServer
) -> None:
    """Xen keeps what is written, and reads give all ones until a server has claimed the port."""
    guest.port_out(CF8, SELECT)
    assert (guest.port_in(CF8), guest.pci_cf8) == (0xFFFFFFFF, SELECT)
    bus = Memory()
    server.claim_ports(CF8, 4, bus)
    guest.port_out(CF8, SELECT | 4)
    assert (guest.port_in(CF8), guest.pci_cf8) == (SELECT | 4, SELECT | 4)
    assert bus.accesses == [("write", 0, 4), ("read", 0, 4)]


def test_only_four_bytes_at_0xcf8_select(guest: MockDomain, server: IoreqServer) -> None:
    """Smaller writes, writes next to the port, strings and reads go on to the server alone."""
    bus = Memory()
    server.claim_ports(CF8, 4, bus)
    guest.port_out(CF8, SELECT)
    guest.port_out(CF8, 1, 2)
    guest.port_out(CF8 + 3, 1, 1)
    guest.port_out_string(CF8, 0x1000, 1)
    guest.port_in(CF8)
    assert guest.pci_cf8 == SELECT
    assert [size for _, _, size in bus.accesses] == [4, 2, 1, 4, 4]
