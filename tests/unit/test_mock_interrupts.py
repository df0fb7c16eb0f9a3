"""Interrupts of the mock: recorded as named tuples, waited for once, and levels of lines."""

from __future__ import annotations

import os

import pytest

from tests.kit import in_thread
from xenmapcache import MockDomain, MockHypervisor
from xenmapcache.mock import Interrupt, IntxInterrupt, IsaInterrupt, MsiInterrupt
from xenmapcache.mock.ioreq_server import MockIoreqServer


@pytest.fixture
def guest() -> MockDomain:
    return MockHypervisor().create_domain(memory="64k")


@pytest.fixture
def link(guest: MockDomain) -> MockIoreqServer:
    return guest.open_ioreq_server(buffered=False)


def test_fields_have_names(guest: MockDomain, link: MockIoreqServer) -> None:
    """An interrupt equals the tuple of its fields, and each field has a name."""
    link.inject_msi(0xFEE00000, 0x21)
    link.set_isa_irq(5, True)
    link.set_pci_intx((0, 0, 5, 0), 1, True)
    msi, isa, intx = guest.interrupts
    assert isinstance(msi, MsiInterrupt)
    assert (msi.kind, msi.address, msi.data) == ("msi", 0xFEE00000, 0x21) == msi
    assert isinstance(isa, IsaInterrupt)
    assert (isa.kind, isa.irq, isa.level) == ("isa", 5, True) == isa
    assert isinstance(intx, IntxInterrupt)
    assert (intx.kind, intx.bdf, intx.pin, intx.level) == ("intx", "0000:00:05.0", 1, True) == intx


def test_levels_of_lines_are_kept_apart(guest: MockDomain, link: MockIoreqServer) -> None:
    """A line has the level that it was set to last; one that was never set is low."""
    link.set_isa_irq(5, True)
    link.set_pci_intx((0, 0, 5, 0), 0, True)
    assert (guest.line_level("isa", 5), guest.line_level("isa", 0)) == (True, False)
    assert guest.line_level("intx", "00:05.0", 0)
    assert not guest.line_level("intx", "00:05.0", 1)
    link.set_isa_irq(5, False)
    assert not guest.line_level("isa", 5)
    assert guest.line_level("intx", "0000:00:05.0", 0)


@pytest.mark.parametrize("line", [("isa",), ("isa", "5"), ("intx", 5, 0), ("msi", 5)])
def test_a_line_that_does_not_exist_is_refused(guest: MockDomain, line: tuple[object, ...]) -> None:
    """The error shows what was asked for, and how a line is named."""
    with pytest.raises(ValueError, match=r"must name a line, as \('isa', 5\)"):
        guest.line_level(*line)  # type: ignore[arg-type] # wrong on purpose


def test_each_interrupt_is_waited_for_once(guest: MockDomain, link: MockIoreqServer) -> None:
    """One that was raised before counts, the oldest first; the record keeps all of them."""
    for data in (0x21, 0x22, 0x21):
        link.inject_msi(0xFEE00000, data)
    seen = [guest.wait_for_interrupt(*fields) for fields in ((), ("msi", 0xFEE00000, 0x21), ())]
    assert seen == [("msi", 0xFEE00000, data) for data in (0x21, 0x21, 0x22)]
    with pytest.raises(TimeoutError, match=r"no interrupt \(\) was raised in 0 s"):
        guest.wait_for_interrupt(timeout=0)
    assert len(guest.interrupts) == 3


def test_a_waiter_is_woken_by_its_interrupt_alone(guest: MockDomain, link: MockIoreqServer) -> None:
    """Other interrupts do not end the wait, and stay for others."""
    thread, seen = in_thread(lambda: guest.wait_for_interrupt("isa", 5, True, timeout=20))
    while not guest._waiters:
        os.sched_yield()
    link.inject_msi(0xFEE00000, 0x21)
    link.set_isa_irq(5, False)
    link.set_isa_irq(5, True)
    thread.join()
    assert seen == [("isa", 5, True)]
    assert not guest._waiters
    with pytest.raises(TimeoutError, match=r"not waited for are \[MsiInterrupt.*IsaInterrupt"):
        guest.wait_for_interrupt("isa", 5, True, timeout=0.001)


def test_two_waiters_share_an_interrupt_fairly(guest: MockDomain, link: MockIoreqServer) -> None:
    """Each of two interrupts goes to one of two waiters."""
    waits = [in_thread(lambda: guest.wait_for_interrupt("msi", timeout=20)) for _ in range(2)]
    for data in (1, 2):
        link.inject_msi(0xFEE00000, data)
    for thread, _ in waits:
        thread.join()
    assert sorted(str(seen) for _, seen in waits) == [
        f"[MsiInterrupt(kind='msi', address=4276092928, data={data})]" for data in (1, 2)
    ]


def test_an_interrupt_that_another_waiter_took_is_passed_by(
    guest: MockDomain, link: MockIoreqServer
) -> None:
    """If two waiters see the same interrupt, the one that comes second takes the next one."""

    class Contested(dict[int, Interrupt]):
        """Another thread takes the first interrupt just before it is taken here."""

        def pop(self, number: int, default: object = None) -> object:  # type: ignore[override] # of one form
            return default if super().pop(number).data == 1 else link  # type: ignore[union-attr] # an MSI

    for data in (1, 2):
        link.inject_msi(0xFEE00000, data)
    guest._untaken = Contested(guest._untaken)
    assert guest.wait_for_interrupt(timeout=0) is link  # type: ignore[comparison-overlap] # see above
