"""An Arm guest of the mock: device memory only, and interrupt lines of its own kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest

from tests.kit import Memory
from xenmapcache import (
    ClosedError,
    MapCache,
    MockDomain,
    MockHypervisor,
    UnsupportedOperationError,
    open_backend,
)
from xenmapcache.devicemodel import IoreqServer
from xenmapcache.devicemodel.virtio import VirtioMmio, VirtioRng
from xenmapcache.mock import VirtioDriver
from xenmapcache.mock.ioreq_server import MockIoreqServer

MMIO, IRQ = 0xF000_0000, 40


@pytest.fixture
def arm() -> MockDomain:
    return MockHypervisor().create_domain(memory="1M", vcpus=2, machine="arm64")


@pytest.fixture
def arm_cache(arm: MockDomain) -> Iterator[MapCache]:
    with open_backend("mock", domain=arm) as backend, MapCache(backend) as cache:
        yield cache


@pytest.fixture
def arm_server(arm: MockDomain, arm_cache: MapCache) -> Iterator[IoreqServer]:
    server = IoreqServer(arm, arm_cache)
    yield server
    server.close()


def test_device_memory_is_served(arm: MockDomain, arm_server: IoreqServer) -> None:
    """With an interrupt line that stays high until the device lowers it."""
    device = Memory()
    device.bytes[0] = 7
    arm_server.claim_mmio(MMIO, 16, device)
    with arm_server, arm_server.serving():
        assert arm.mmio_read(MMIO, 1) == 7
        arm_server.set_irq_level(IRQ, True)
        arm.wait_for_line("spi", IRQ)
        arm_server.set_irq_level(IRQ, False)
        assert not arm.line_level("spi", IRQ)
        assert arm_server.nr_vcpus == 2
    assert arm.interrupts == [("spi", IRQ, True), ("spi", IRQ, False)]
    assert (arm.type, arm.machine) == ("pvh", "arm64")


def test_virtio_over_mmio(arm: MockDomain, arm_server: IoreqServer) -> None:
    """A driver uses a device that has an SPI."""
    with VirtioRng(arm_server) as rng:
        VirtioMmio(arm_server, MMIO, rng, interrupt=partial(arm_server.set_irq_level, IRQ))
        with arm_server, arm_server.serving():
            driver = VirtioDriver.over_mmio(arm, MMIO, IRQ)
            driver.start()
            chain = driver.queues[0].add([], [16])
            driver.queues[0].kick()
            assert len(driver.queues[0].wait(chain).data) == 16
    assert ("spi", IRQ, True) in arm.interrupts


@pytest.mark.parametrize("irq", [-1, 31, 1020])
def test_other_numbers_are_no_spis(arm_server: IoreqServer, irq: int) -> None:
    """A CPU's own interrupts cannot be raised by a device, and a GIC ends there."""
    with arm_server, pytest.raises(ValueError, match=rf"irq {irq} is not in 32\.\.1019"):
        arm_server.set_irq_level(irq, True)


@pytest.mark.parametrize("irq", [32, 1019])
def test_the_first_and_the_last_spi(arm: MockDomain, arm_server: IoreqServer, irq: int) -> None:
    """Both are lines."""
    with arm_server:
        arm_server.set_irq_level(irq, True)
    assert arm.interrupts == [("spi", irq, True)]


def test_x86_interrupts_are_refused(arm: MockDomain, arm_server: IoreqServer) -> None:
    """The error names the method that works."""
    calls: dict[str, Callable[[], None]] = {
        "inject_msi": lambda: arm_server.inject_msi(0xFEE00000, 0x30),
        "set_isa_irq": lambda: arm_server.set_isa_irq(5, True),
        "set_pci_intx": lambda: arm_server.set_pci_intx("00:05.0", 0, True),
    }
    with arm_server:
        for name, call in calls.items():
            message = f"domain 1: {name} is for x86 guests, .*Arm guest; use set_irq_level"
            with pytest.raises(UnsupportedOperationError, match=message):
                call()
    assert arm.interrupts == []


@pytest.mark.parametrize("type", ["hvm", "pvh"])
def test_an_x86_guest_has_no_spis(type: str) -> None:  # noqa: A002 - as create_domain
    """The error names what it has, whatever its type."""
    guest = MockHypervisor().create_domain(memory="1M", type=type)
    with open_backend("mock", domain=guest) as backend, MapCache(backend) as cache:
        with IoreqServer(guest, cache) as server:
            message = "set_irq_level is for Arm guests, .*use inject_msi"
            with pytest.raises(UnsupportedOperationError, match=message):
                server.set_irq_level(IRQ, True)
            assert server.nr_vcpus == 1
        with pytest.raises(ClosedError):
            server.set_irq_level(IRQ, True)
        with pytest.raises(ClosedError):
            _ = server.nr_vcpus


def test_claims_of_other_kinds_are_refused(arm_server: IoreqServer) -> None:
    """Xen would take them, and never send a request."""
    claims: dict[str, Callable[[], object]] = {
        "ports": lambda: arm_server.claim_ports(0x510, 4),
        "PCI configuration space": lambda: arm_server.claim_pci("00:05.0"),
    }
    for what, claim in claims.items():
        message = f"domain 1: {what} cannot be claimed for an arm64 guest: .*; use claim_mmio"
        with pytest.raises(UnsupportedOperationError, match=message):
            claim()


def test_buffered_requests_are_refused(arm: MockDomain, arm_cache: MapCache) -> None:
    """Before a server is made."""
    with pytest.raises(UnsupportedOperationError, match=r"buffered=True\): .* arm64 guest"):
        IoreqServer(arm, arm_cache, buffered=True)
    assert arm.ioreq_servers == {}


def test_a_vcpu_has_no_ports(arm: MockDomain) -> None:
    """No instruction of its reaches one, nor a PCI bus."""
    for access in (partial(arm.port_in, 0x510), partial(arm.pci_read, "00:05.0", 0)):
        with pytest.raises(ValueError, match=r"an arm64 guest, .*; use mmio_read and mmio_write"):
            access()


@pytest.mark.parametrize(
    ("machine", "type", "message"),
    [
        ("mips", None, r"machine must be one of \('x86-64', 'arm64'\), not 'mips'"),
        ("arm64", "hvm", r"type must be one of \('pvh',\) for arm64, not 'hvm'"),
    ],
)
def test_no_such_guest(machine: str, type: str | None, message: str) -> None:  # noqa: A002 - as create_domain
    """Refused by name."""
    with pytest.raises(ValueError, match=message):
        MockHypervisor().create_domain(machine=machine, type=type)


def test_a_link_refuses_what_the_guest_lacks(arm: MockDomain, guest: MockDomain) -> None:
    """The mock records no interrupt that its guest cannot get."""
    link = MockIoreqServer(arm, 0, buffered=False)
    with pytest.raises(UnsupportedOperationError, match=r"an arm64 PVH guest, .*use set_irq_level"):
        link.inject_msi(0xFEE00000, 0x30)
    link = MockIoreqServer(guest, 0, buffered=False)
    with pytest.raises(UnsupportedOperationError, match=r"an x86-64 HVM guest, .*use inject_msi"):
        link.set_irq_level(IRQ, True)
    assert arm.interrupts == guest.interrupts == []


def test_a_saved_guest_keeps_its_machine(arm: MockDomain) -> None:
    """And its type, and its vCPUs."""
    image = arm.suspend()
    image.send()
    restored = MockHypervisor().restore(image)
    assert (restored.machine, restored.type, restored.vcpus) == ("arm64", "pvh", 2)
