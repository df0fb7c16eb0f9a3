"""Interrupts that device models raise in a mock guest: a record, line levels, and waiting."""

from __future__ import annotations

import time
from itertools import count
from typing import Literal, NamedTuple, Protocol

from ..errors import UnsupportedOperationError
from ..ioreq import bdf_number, bdf_text
from .waiting import Bell


class MsiInterrupt(NamedTuple):
    """A message-signalled interrupt.

    Attributes:
        kind: ``"msi"``.
        address: 64 bits, as the guest has programmed it.
        data: 32 bits.
    """

    kind: Literal["msi"]
    address: int
    data: int


class IsaInterrupt(NamedTuple):
    """A level that an ISA interrupt line was set to.

    Attributes:
        kind: ``"isa"``.
        irq: the line, 0 to 15.
        level: True is high.
    """

    kind: Literal["isa"]
    irq: int
    level: bool


class IntxInterrupt(NamedTuple):
    """A level that the interrupt pin of a PCI function was set to.

    Attributes:
        kind: ``"intx"``.
        bdf: the function, as ``"0000:00:05.0"``.
        pin: 0 (INTA) to 3.
        level: True is high.
    """

    kind: Literal["intx"]
    bdf: str
    pin: int
    level: bool


class SpiInterrupt(NamedTuple):
    """A level that an interrupt line of an Arm guest was set to.

    Attributes:
        kind: ``"spi"``.
        irq: the shared peripheral interrupt, 32 to 1019.
        level: True is high.
    """

    kind: Literal["spi"]
    irq: int
    level: bool


Interrupt = MsiInterrupt | IsaInterrupt | IntxInterrupt | SpiInterrupt


class InterruptedGuest(Protocol):
    """A guest in which device models raise interrupts."""

    domid: int
    type: str
    machine: str

    def raise_interrupt(self, interrupt: Interrupt) -> None:
        """Record an interrupt, and wake who waits for one."""


class RecordsInterrupts:
    """What a device model raises in a mock guest.

    Synchronization: any thread.
    """

    def __init__(self, guest: InterruptedGuest) -> None:
        self._guest = guest

    def inject_msi(self, address: int, data: int) -> None:
        """Note a message-signalled interrupt in ``domain.interrupts``."""
        if self._guest.machine != "x86-64":
            raise self._has_no("local APIC, which takes MSIs; use set_irq_level")
        self._guest.raise_interrupt(MsiInterrupt("msi", address, data))

    def set_isa_irq(self, irq: int, level: bool) -> None:
        """Note the level of an interrupt line in ``domain.interrupts``."""
        if self._guest.type != "hvm":
            raise self._has_no("ISA interrupt lines; use inject_msi")
        self._guest.raise_interrupt(IsaInterrupt("isa", irq, level))

    def set_pci_intx(self, function: tuple[int, int, int, int], pin: int, level: bool) -> None:
        """Note the level of a PCI function's pin in ``domain.interrupts``."""
        if self._guest.type != "hvm":
            raise self._has_no("INTx interrupt lines; use inject_msi")
        segment, bus, device, number = function
        bdf = bdf_text(segment << 16 | bus << 8 | device << 3 | number)
        self._guest.raise_interrupt(IntxInterrupt("intx", bdf, pin, level))

    def set_irq_level(self, irq: int, level: bool) -> None:
        """Note the level of an SPI in ``domain.interrupts``."""
        if self._guest.machine != "arm64":
            raise self._has_no("SPIs; use inject_msi")
        self._guest.raise_interrupt(SpiInterrupt("spi", irq, level))

    def _has_no(self, what: str) -> UnsupportedOperationError:
        guest = self._guest
        return UnsupportedOperationError(
            f"domain {guest.domid} is an {guest.machine} {guest.type.upper()} guest, which has no "
            f"{what}"
        )


class HasInterrupts:
    """What a mock guest sees of interrupts.

    Attributes:
        domid: the domain's number.
        interrupts: what device models raised, in order; see :data:`Interrupt`. An interrupt
            equals the tuple of its fields, as ``("msi", 0xFEE00000, 0x21)``.

    Synchronization: any threads and signal handlers. An interrupt wakes one waiter.
    """

    domid: int

    def __init__(self) -> None:
        super().__init__()
        self.interrupts: list[Interrupt] = []
        self._levels: dict[tuple[object, ...], bool] = {}
        self._untaken: dict[int, Interrupt] = {}
        self._numbers = count()
        self._waiters: dict[Bell, None] = {}

    def raise_interrupt(self, interrupt: Interrupt) -> None:
        """Record an interrupt, and wake who waits for one; this is the hypervisor's side."""
        if not isinstance(interrupt, MsiInterrupt):
            self._levels[interrupt[:-1]] = interrupt.level
        self.interrupts.append(interrupt)
        self._untaken[next(self._numbers)] = interrupt
        for bell in list(self._waiters):
            bell.ring()

    def line_level(self, kind: Literal["isa", "intx", "spi"], *line: int | str) -> bool:
        """Return the level of an interrupt line; one that was never set is low.

        Args:
            kind: ``"isa"``, ``"intx"`` or ``"spi"``.
            line: the IRQ; or the PCI function, as ``"0000:00:05.0"``, and its pin.

        Raises:
            ValueError: there is no such kind of line, or it is named by other values.
        """
        return self._levels.get(_line(kind, *line), False)

    def wait_for_line(
        self, kind: Literal["isa", "intx", "spi"], *line: int | str, timeout: float = 10.0
    ) -> None:
        """Wait until an interrupt line is high; return at once if it is.

        Args:
            kind: as of :meth:`line_level`.
            line: as of :meth:`line_level`.
            timeout: in seconds.

        Raises:
            TimeoutError: it was not raised in time.
            ValueError: as of :meth:`line_level`.
        """
        end = time.monotonic() + timeout
        fields = _line(kind, *line)
        # It may have been lowered since: then the wait goes on.
        while not self._levels.get(fields, False):
            self.wait_for_interrupt(*fields, True, timeout=end - time.monotonic())

    def wait_for_interrupt(self, *fields: object, timeout: float = 10.0) -> Interrupt:
        """Wait for an interrupt, and return it.

        Each interrupt is returned once. One that was raised before the call counts, unless an
        earlier call has returned it; of several, the oldest is returned.

        Args:
            fields: the first fields of the interrupt: none for any, ``"msi"`` for a message,
                ``"isa", 5, True`` for a line that was raised.
            timeout: in seconds.

        Raises:
            TimeoutError: no such interrupt was raised in time.
        """
        end = time.monotonic() + timeout
        bell = Bell()
        try:
            # Listed before the interrupts are looked at: none is missed.
            self._waiters[bell] = None
            while True:
                for number, interrupt in list(self._untaken.items()):
                    if interrupt[: len(fields)] != fields:
                        continue
                    # Two threads may see the same one; `pop` gives it to one of them.
                    taken = self._untaken.pop(number, None)
                    if taken is not None:
                        return taken
                if not bell.wait(end - time.monotonic()):
                    raise TimeoutError(
                        f"mock domain {self.domid}: no interrupt {fields!r} was raised in "
                        f"{timeout} s; raised and not waited for are "
                        f"{list(self._untaken.values())[-8:]}"
                    )
        finally:
            self._waiters.pop(bell, None)


def _line(*line: int | str) -> tuple[object, ...]:
    """Return the fields of a line's interrupts, without the level."""
    match line:
        case ("isa" | "spi") as kind, int(irq):
            return kind, irq
        case "intx", str(bdf), int(pin):
            return "intx", bdf_text(bdf_number(bdf)), pin
    raise ValueError(f"{line!r} must name a line, as ('isa', 5) or ('intx', '0000:00:05.0', 0)")
