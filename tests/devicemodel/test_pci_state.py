"""What another process needs of a PCI function: its state, saved and restored."""

from __future__ import annotations

import errno

import pytest

from tests.devicemodel.pcidriver import (
    BDF,
    COMMAND,
    INTX_DISABLE,
    MEMORY,
    PciDriver,
    claims_of,
    new,
    raised,
)
from tests.kit import Memory
from xenmapcache import MapCache, MockDomain, XenCallError
from xenmapcache.devicemodel import IoreqServer, PciFunction
from xenmapcache.ioreq import RequestKind, bdf_number

MMIO, LOW = RequestKind.MMIO, 0x1000_0000
HERE = (RequestKind.PCI_CONFIG, bdf_number(BDF), bdf_number(BDF))


def described(server: IoreqServer) -> PciFunction:
    """Return a function that two processes describe in the same way."""
    function = new(server, interrupt_pin=1)
    function.add_bar(0, 4096, Memory())
    function.add_msix(1, 9)
    function.add_msi(2)
    return function


def test_the_next_process_goes_on(guest: MockDomain, cache: MapCache) -> None:
    """It claims the BARs where the guest decodes them, and has masks and pending vectors."""
    with IoreqServer(guest, cache) as server, server.serving():
        first = described(server)
        first.plug()
        driver = PciDriver(guest)
        driver.place_bar(0, LOW)
        driver.place_bar(1, LOW + 0x1000)
        driver.command(MEMORY | INTX_DISABLE)
        guest.mmio_write(LOW + 0x1080, 0xFEE0_0000, 8)
        guest.mmio_write(LOW + 0x1088, 0x1_0000_0041, 8)
        driver.write(driver.capability(0x11) + 2, 0x8000, 2)
        driver.write(driver.capability(0x05) + 4, 0xFEE0_1000)
        for messages in first._messages:
            messages.notify(messages.vectors - 1)
        state = first.save()
        config = [driver.read(offset) for offset in range(0, 0x100, 4)]
    with IoreqServer(guest, cache) as server, server.serving():
        second = described(server)
        second.restore(state)
        second.plug()
        assert second.save() == state
        assert [driver.read(offset) for offset in range(0, 0x100, 4)] == config
        assert guest.mmio_read(LOW + 0x1090, 8) == 1 << 8
        second.set_interrupt(True)
        assert raised(guest) == [(0, False)]  # the guest has disabled the pin; it may be high
        guest.mmio_write(LOW + 0x108C, 0)
        assert raised(guest)[1:] == [(0xFEE0_0000, 0x41)]
        assert len(claims_of(guest)) == 3


@pytest.mark.parametrize("change", [b"", b"x"])
def test_a_state_of_another_function(server: IoreqServer, change: bytes) -> None:
    """Its length is checked; that of this function fits, whatever its bytes are."""
    function = described(server)
    state = function.save()
    function.restore(b"\xff" * len(state))
    assert function.config.read(0, 4) == 0x1041_1AF4
    with pytest.raises(ValueError, match="a state of .* bytes must have"):
        function.restore(state[:-1] if not change else state + change)
    function.plug()
    with pytest.raises(ValueError, match="it is plugged"):
        function.restore(state)


def test_a_restored_bar_that_cannot_be_claimed(
    guest: MockDomain, served: IoreqServer, caplog: pytest.LogCaptureFixture
) -> None:
    """The guest may have put it there: the function is plugged without it, and the log says so."""
    function = described(served)
    function.config.write(0x10, 4, LOW)
    function.config.write(0x14, 4, LOW)
    function.config.write(COMMAND, 2, MEMORY)
    state = function.save()
    function.unplug()
    function.restore(state)
    function.plug()
    assert claims_of(guest) == {HERE, (MMIO, LOW, LOW + 0xFFF)}
    assert "BAR 1 at 0x10000000..0x10001000 is not claimed: <MMIO region" in caplog.text


def test_a_plug_that_fails_leaves_no_bar(guest: MockDomain, served: IoreqServer) -> None:
    """What it had claimed by then is released."""
    function = described(served)
    function.config.write(0x10, 4, LOW)
    function.config.write(COMMAND, 2, MEMORY)
    guest.inject_fault("claim", errno=errno.ENOSPC, nth=2)
    with pytest.raises(XenCallError):
        function.plug()
    assert claims_of(guest) == set()


def test_the_program_hears_of_each_write(guest: MockDomain, served: IoreqServer) -> None:
    """Of configuration space and of the MSI-X table, before the guest continues."""
    function = described(served)
    states: list[bytes] = []
    function.on_write = lambda: states.append(function.save())
    function.plug()
    driver = PciDriver(guest)
    driver.place_bar(1, LOW)
    driver.command(MEMORY)
    assert len(states) == 2
    guest.mmio_write(LOW, 0x1234)
    guest.mmio_read(LOW)
    assert len(states) == 3
    assert states[-1] == function.save() != states[1]
