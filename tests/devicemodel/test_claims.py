"""Which device answers where: claims of ports, addresses and PCI functions, and interrupts."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from tests.kit import (
    Memory,
    wait_for_the_log,
)
from xenmapcache import (
    Backend,
    MapCache,
    MockDomain,
    MockHypervisor,
    UnsupportedOperationError,
    XenCallError,
    open_backend,
)
from xenmapcache.devicemodel import IoreqServer, Region

PORT, MMIO, VGA, PCI = 0x510, 0xF000_0000, 0xA0000, "0000:00:05.0"


@pytest.mark.parametrize("bdf", ["", "5", "0:5", "0:0:0:5.0", "00:20.0", "00:05.8", "-1:0.0", 5])
def test_no_pci_function(server: IoreqServer, bdf: str) -> None:
    """The error names what must be a PCI function."""
    with pytest.raises(ValueError, match="must name a PCI function"):
        server.claim_pci(bdf)


def test_nobody_answers(guest: MockDomain, live: IoreqServer) -> None:
    """Where nothing is claimed, reads are all ones and writes go nowhere: no request at all."""
    assert [guest.port_in(0x700, size) for size in (1, 2, 4)] == [0xFF, 0xFFFF, 0xFFFFFFFF]
    guest.port_out(0x700, 5)
    guest.port_in_string(0x700, 0x1000, 4, 1)
    assert guest.read(0x1000, 5) == b"\xff\xff\xff\xff\0"
    assert guest.mmio_read(MMIO + 4096, 8) == (1 << 64) - 1
    assert live.requests == 0


def test_no_handler(guest: MockDomain, live: IoreqServer) -> None:
    """A region without handlers reads all ones and ignores writes."""
    live.claim_ports(0x600, 4)
    assert guest.port_in(0x600, 2) == 0xFFFF
    guest.port_out(0x600, 1)
    assert (live.requests, live.failures) == (2, 0)


def test_claims_come_and_go(guest: MockDomain, live: IoreqServer) -> None:
    """A region that is claimed later works at once; one that was released is gone."""
    region = live.claim_ports(0x600, 4)
    region.read(lambda offset, size: 7)
    assert guest.port_in(0x600) == 7
    region.release()
    assert guest.port_in(0x600) == 0xFFFFFFFF
    with pytest.raises(ValueError, match="was given back before"):
        region.release()
    live.claim_ports(0x600, 4).read(lambda offset, size: 8)
    assert guest.port_in(0x600) == 8


def test_a_claim_that_xen_refuses(guest: MockDomain, live: IoreqServer) -> None:
    """It raises, and is not noted: it can be tried again."""
    guest.inject_fault("claim", errno=errno.ENOSPC)
    with pytest.raises(XenCallError) as caught:
        live.claim_ports(0x600, 4)
    assert caught.value.errno == errno.ENOSPC
    live.claim_ports(0x600, 4)


@pytest.mark.parametrize(
    ("first", "count"), [(PORT + 15, 1), (PORT - 1, 2), (PORT, 16), (PORT + 4, 4), (PORT - 9, 99)]
)
def test_claims_do_not_overlap(server: IoreqServer, device: Memory, first: int, count: int) -> None:
    """A range that shares a port with another of this server is refused, by name."""
    with pytest.raises(ValueError, match=r"PORT region .* overlaps <PORT region 0x510\.\.0x520>"):
        server.claim_ports(first, count)
    server.claim_ports(PORT + 16, 4)
    server.claim_ports(PORT - 4, 4)


@pytest.mark.parametrize(("first", "count"), [(-1, 2), (0xFFFF, 2)])
def test_no_ports(server: IoreqServer, first: int, count: int) -> None:
    """Numbers outside of the ports are refused."""
    with pytest.raises(ValueError, match="are not within 0..0x10000"):
        server.claim_ports(first, count)


@pytest.mark.parametrize("count", [0, -1])
def test_a_claim_has_at_least_one_port(server: IoreqServer, count: int) -> None:
    """The message names the count, not the ports."""
    with pytest.raises(ValueError, match=f"count must be at least 1 port, not {count}"):
        server.claim_ports(0x510, count)


def test_a_device_without_methods(server: IoreqServer) -> None:
    """A device must have a method to read or to write."""
    with pytest.raises(TypeError, match="has neither read"):
        server.claim_ports(PORT, 4, object())  # type: ignore[arg-type] # wrong on purpose


def test_an_access_over_two_regions(
    guest: MockDomain, live: IoreqServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Xen joins neighbours, so that an access may lie in two: it is logged, and reads all ones."""
    live.claim_ports(PORT + 16, 4).read(lambda offset, size: 0)
    assert guest.port_in(PORT + 14, 4) == 0xFFFFFFFF
    wait_for_the_log(live)
    assert "no region of this server holds 4 bytes at 0x51e" in caplog.text
    assert live.failures == 1


def test_two_servers(guest: MockDomain, cache: MapCache, live: IoreqServer) -> None:
    """Each answers for its own; both are asked to invalidate; one goes, the other goes on."""
    with open_backend("mock", domain=guest) as backend, MapCache(backend) as other_cache:
        other = IoreqServer(guest, other_cache)
        other.claim_ports(0x600, 4).read(lambda offset, size: 6)
        with other, other.serving():
            assert other.id != live.id
            assert (guest.port_in(0x600), guest.port_in(PORT)) == (6, 0)
            guest.send_invalidate(vcpu=2)
        assert guest.port_in(0x600) == 0xFFFFFFFF
        assert guest.port_in(PORT) == 0
    assert (live.invalidations, other.invalidations) == (1, 1)
    at_open = 1
    assert cache.stats().invalidations == other_cache.stats().invalidations == at_open + 1


def test_interrupts(guest: MockDomain, live: IoreqServer) -> None:
    """The mock notes what was raised."""
    live.inject_msi(0xFEE00000, 0x41)
    live.set_isa_irq(5, True)
    live.set_pci_intx(PCI, 1, False)
    assert guest.interrupts == [
        ("msi", 0xFEE00000, 0x41),
        ("isa", 5, True),
        ("intx", PCI, 1, False),
    ]


def test_misuse(guest: MockDomain, server: IoreqServer, cache: MapCache) -> None:
    """Each mistake is named where it is made."""
    for count in ("1", 1.5, None):
        with pytest.raises(TypeError, match="count must be an int"):
            server.claim_ports(PORT, count)  # type: ignore[arg-type] # wrong on purpose
    with pytest.raises(TypeError, match="callback 5 cannot be called"):
        server.on_quiesce(5)  # type: ignore[type-var] # wrong on purpose
    with pytest.raises(TypeError, match="handler None cannot be called"):
        server.claim_ports(PORT, 4).read(None)  # type: ignore[type-var] # wrong on purpose
    with pytest.raises(ValueError, match="irq 16 is not in"):
        server.set_isa_irq(16, True)
    with pytest.raises(ValueError, match="pin 4 is not in"):
        server.set_pci_intx(PCI, 4, True)
    with pytest.raises(ValueError, match="MSI data 0x100000000 does not fit 32 bits"):
        server.inject_msi(0xFEE00000, 1 << 32)
    with pytest.raises(ValueError, match="MSI address 0x10000000000000000 does not fit 64 bits"):
        server.inject_msi(1 << 64, 0)
    with pytest.raises(ValueError, match="maps another domain 1 than .* of another hypervisor"):
        IoreqServer(MockHypervisor().create_domain(memory="1M"), cache)
    with pytest.raises(ValueError, match="1 is a live domain's number.* pass that MockDomain"):
        IoreqServer(guest.domid, cache)


def test_a_class_is_not_a_device(server: IoreqServer) -> None:
    """A class has the methods too, but without an object to call them on."""
    with pytest.raises(TypeError, match="Memory'> is a class; pass an instance of it"):
        server.claim_ports(0x600, 4, Memory)  # type: ignore[arg-type] # wrong on purpose
    server.claim_ports(0x600, 4, Memory())


@pytest.mark.parametrize(("address", "length"), [(0x9F000, 0x2000), (0xBF000, 0x2000), (0, 1)])
def test_mmio_over_ram_is_refused(server: IoreqServer, address: int, length: int) -> None:
    """The guest would never reach the device; a range in a hole, up to RAM, is claimed."""
    server.claim_mmio(VGA, 0x20000)
    with pytest.raises(ValueError, match="covers RAM of the guest at 0x.*would never reach"):
        server.claim_mmio(address, length)


def test_as_many_ranges_as_xen_has(live: IoreqServer) -> None:
    """The 257th of a kind is refused."""
    for number in range(255):  # besides the device's
        live.claim_ports(0x8000 + 2 * number, 1)
    with pytest.raises(XenCallError, match="too many ranges"):
        live.claim_ports(0x9000, 1)
    live.claim_mmio(0xE0000000, 1)


def test_regions_show_themselves(server: IoreqServer, backend: Backend) -> None:
    """Messages name a region by kind and half-open range, a server by domain and state."""
    region = server.claim_mmio(MMIO, 0x1000)
    assert isinstance(region, Region)
    assert repr(region) == "<MMIO region 0xf0000000..0xf0001000>"
    assert repr(server) == "<IoreqServer of domain 1, not open>"


@pytest.mark.parametrize("kind", ["pvh"])
def test_only_hvm_guests_have_interrupt_lines(kind: str) -> None:
    """The others are refused before the hypervisor is asked; messages work for them."""
    guest = MockHypervisor().create_domain(memory="1M", type=kind)
    with open_backend("mock", domain=guest) as backend, MapCache(backend) as cache:
        with IoreqServer(guest, cache) as server:
            calls: list[Callable[[], None]] = [
                lambda: server.set_isa_irq(5, True),
                lambda: server.set_pci_intx(PCI, 1, True),
            ]
            for call in calls:
                with pytest.raises(
                    UnsupportedOperationError,
                    match=f"a {kind.upper()} guest has no interrupt lines; inject_msi works",
                ):
                    call()
            server.inject_msi(0xFEE00000, 5)
        assert guest.interrupts == [("msi", 0xFEE00000, 5)]


def test_a_type_that_contradicts_the_toolstack(guest: MockDomain, cache: MapCache) -> None:
    """Nobody can state a type that the guest does not have; no server is left."""
    server = IoreqServer(guest, cache, guest_type="pvh")
    with pytest.raises(ValueError, match="'pvh': Xen's toolstack says that domain 1 is 'hvm'"):
        server.open()
    assert guest.ioreq_servers == {}


def test_options_that_no_server_can_have(guest: MockDomain, cache: MapCache) -> None:
    """Each is named with the rule."""
    with pytest.raises(ValueError, match="guest_type 'vm' must be one of hvm, pvh, pv"):
        IoreqServer(guest, cache, guest_type="vm")
    for name in ("quiesce_timeout", "answer_timeout"):
        for value in (-1.0, float("nan")):
            with pytest.raises(ValueError, match=f"{name} {value}.* must be 0 or more seconds"):
                IoreqServer(guest, cache, **{name: value})  # type: ignore[arg-type] # by name


def test_pci_functions_show_themselves(server: IoreqServer) -> None:
    """As people write them."""
    assert repr(server.claim_pci(PCI)) == "<PCI_CONFIG region 0000:00:05.0>"
