"""PciFunction: a PCI function's configuration space, and what the guest does to it."""

# Theory of operation
#
# The configuration space is a bank of registers. Bytes without a register read as 0. After each
# write to the command register or to a BAR, every BAR is put where the guest wants it: first all
# that have moved, or are no longer decoded, are released, and then all that are decoded are
# claimed. So a guest may exchange two addresses. A BAR that cannot be claimed is tried again at
# the next such write. Linux turns decoding off and on 6 or 7 times for each function; each time
# costs one hypercall for each BAR, and no line in the log.
#
# Threads. Handlers run under the server's lock. So does nothing else that changes the
# configuration space: `unplug` and `reset` first release the claim of the configuration space,
# which waits for a handler that runs, and after which none runs. Interrupts have locks of their
# own, because a device raises them in any thread.
#
# A guest chooses every number. It cannot cause more claims than there are BARs, and no more than
# one line of each BAR is logged until `reset`.

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import accumulate
from typing import TypeVar

from ...errors import XenCallError
from ...ioreq import bdf_number, bdf_text
from ...logs import safely
from ..dispatch import GuestError
from ..regions import Device, Region
from ..registers import RegisterBank
from ..server import IoreqServer
from .bars import BARS_END, Bar, BarKind, release
from .messages import MessageInterrupts
from .msi import MSI_ID, MsiCapability
from .msix import MSIX_ID, MSIX_WRITABLE, MsixTable
from .pin import InterruptPin

logger = logging.getLogger("xenmapcache.devicemodel")

MessagesT = TypeVar("MessagesT", bound=MessageInterrupts)

CONFIG_SIZE = 256
_FIRST_CAPABILITY = 0x40
_CAPABILITY_HEAD = 2
_BUS_MASTER, _SERR, _INTX_DISABLE = 0x4, 0x100, 0x400
_STATUS_INTERRUPT, _STATUS_CAPABILITIES = 0x8, 0x10
_BYTE = 0xFF
_OLD_VGA, _FIRST_CLASS = 0x000100, 0x010000


def _check_class(code: int) -> None:
    """Refuse a code of class 0, which has two, for devices older than PCI 2.0."""
    if 0 < code < _FIRST_CLASS and code != _OLD_VGA:
        raise ValueError(
            f"class_code {code:#x} must have the class in bits 16 to 23, as 0x010000 (storage); "
            "give 0xff0000 if no class fits"
        )


class PciFunction:
    """A PCI function: its configuration space, BARs, capabilities and interrupts.

        function = PciFunction(server, bdf, vendor=0x1AF4, device=0x10F0, class_code=0xFF0000)
        function.add_bar(0, 4096, registers)
        msix = function.add_msix(1, vectors=2)
        function.plug()

    The guest finds the function when it scans the bus. A Linux guest that already runs finds it
    after ``echo 1 > /sys/bus/pci/rescan``. While the guest decodes the BARs, they are claimed.

    A BAR is not claimed if the guest puts it at 0, beyond its address space, or over another
    claim. The guest's accesses there do not reach the device, and the log has one line for each
    BAR.

    Follows the PCI Local Bus Specification, with a configuration space of 256 bytes.

    Args:
        server: of the guest.
        bdf: as ``"0000:00:05.0"``.
        vendor, device: 16 bits each.
        class_code: 24 bits: class, subclass, programming interface; 0xff0000 for a device of no
            class that PCI defines.
        revision: 8 bits.
        subsystem: vendor and device of the subsystem, 16 bits each.
        interrupt_pin: 1 (INTA) to 4 for an HVM guest; 0 for none. A PVH guest has no such pins.
        multifunction: on function 0, whether the guest looks for functions 1 to 7.

    Attributes:
        server: as given.
        bdf: with segment and leading zeros.
        config: the registers.
        on_write: is called after each write of the guest to the configuration space or to an
            MSI-X table, so that a program can :meth:`save` the state.

    Raises:
        ValueError: a number does not fit, or ``bdf`` names no PCI function.

    Synchronization: handlers may call everything. So may another thread, but one at a time, and
    ``set_interrupt`` in any threads.
    """

    repeatable = True  # as of all configuration space: a write stores what it says

    def __init__(
        self,
        server: IoreqServer,
        bdf: str,
        *,
        vendor: int,
        device: int,
        class_code: int,
        revision: int = 0,
        subsystem: tuple[int, int] = (0, 0),
        interrupt_pin: int = 0,
        multifunction: bool = False,
    ) -> None:
        _check_class(class_code)
        self.server = server
        self.bdf = bdf_text(bdf_number(bdf))
        self._pin = InterruptPin(server, self.bdf, interrupt_pin)
        self.config = config = RegisterBank(
            f"PCI function {self.bdf}", CONFIG_SIZE, sizes=(1, 2, 4), unaligned=True, gaps=True
        )
        self.on_write: Callable[[], object] = lambda: None
        self._region: Region | None = None
        self._bars: list[Bar] = []
        self._messages: list[MessageInterrupts] = []
        self._capabilities_end = _FIRST_CAPABILITY
        config.add("vendor", 0x00, 2, value=vendor)
        config.add("device", 0x02, 2, value=device)
        self._command = config.add(
            "command",
            0x04,
            2,
            mask=_BUS_MASTER | _SERR | _INTX_DISABLE,
            write=lambda value: self._pin.disable(bool(value & _INTX_DISABLE)),
        )
        self._status = config.add("status", 0x06, 2, read=self._read_status)
        config.add("revision", 0x08, 1, value=revision)
        config.add("class", 0x09, 3, value=class_code)
        config.add("cache_line", 0x0C, 1, mask=_BYTE)
        config.add("latency", 0x0D, 1, mask=_BYTE)
        config.add("header", 0x0E, 1, value=0x80 if multifunction else 0)
        config.add("subsystem_vendor", 0x2C, 2, value=subsystem[0])
        config.add("subsystem", 0x2E, 2, value=subsystem[1])
        self._last_pointer = config.add("capabilities", 0x34, 1)
        config.add("interrupt_line", 0x3C, 1, mask=_BYTE)
        config.add("interrupt_pin", 0x3D, 1, value=interrupt_pin)

    def __repr__(self) -> str:
        state = "plugged" if self._region else "not plugged"
        return f"<PciFunction {self.bdf} of domain {self.server.domid}, {state}>"

    # --- what it has ------------------------------------------------------------------------------

    def add_bar(
        self,
        number: int,
        size: int,
        device: Device,
        *,
        kind: BarKind = "mmio32",
        prefetchable: bool = False,
    ) -> None:
        """Add a base address register, and the device that answers there.

        Args:
            number: 0 to 5; a 64-bit BAR takes the next number, too.
            size: in bytes, a power of 2: 16 or more of memory, 4 to 256 ports.
            device: as for :meth:`IoreqServer.claim_mmio`.
            kind: ``"mmio32"`` (below 4 GiB), ``"mmio64"`` or ``"io"``.
            prefetchable: whether reads have no effect, so that the guest may combine accesses.

        Raises:
            ValueError: the number or size is wrong, the number is taken, or the function is
                plugged.
            TypeError: a device without either method.
        """
        self._check_not_plugged()
        bar = Bar(self.server, self.config, number, size, device, kind, prefetchable)
        self._bars.append(bar)
        self._command.mask |= bar.command_bit

    def add_capability(self, identifier: int, body: bytes, writable: bytes = b"") -> int:
        """Add a capability, after those that were added before.

        Args:
            identifier: the capability's number, 8 bits.
            body: what follows its first two bytes.
            writable: the bits of ``body`` that the guest can change; bytes that are missing are
                read-only.

        Returns:
            The offset of its first byte in configuration space.

        Raises:
            ValueError: it does not fit, or the function is plugged.
        """
        return self._add_capability(identifier, body, writable)

    def add_msix(self, bar: int, vectors: int) -> MsixTable:
        """Add MSI-X, with the table in a 32-bit BAR of its own.

        Args:
            bar: the number of that BAR.
            vectors: 1 to 2048.

        Raises:
            ValueError: as :meth:`add_bar` and :meth:`add_capability`.
        """
        table = MsixTable(self.server, self.config.name, vectors, lambda: self.on_write())
        self.add_bar(bar, table.length, table)
        self._add_capability(MSIX_ID, table.body(bar), MSIX_WRITABLE, write=table.written)
        return self._keep(table)

    def add_msi(self, vectors: int = 1) -> MsiCapability:
        """Have plain MSI, with 64-bit addresses and masks.

        Args:
            vectors: 1, 2, 4, 8, 16 or 32.

        Raises:
            ValueError: as :meth:`add_capability`, or there is no such number of vectors.
        """
        msi = MsiCapability(self.server, self.config.name, vectors)
        self._add_capability(MSI_ID, msi.body, msi.writable, read=msi.value, write=msi.written)
        return self._keep(msi)

    def _keep(self, messages: MessagesT) -> MessagesT:
        self._messages.append(messages)
        return messages

    def _add_capability(
        self,
        identifier: int,
        body: bytes,
        writable: bytes,
        *,
        read: Callable[[], int] | None = None,
        write: Callable[[int], object] | None = None,
    ) -> int:
        self._check_not_plugged()
        offset, name = self._capabilities_end, f"capability {identifier:#x}"
        end = offset + _CAPABILITY_HEAD + len(body)
        if end > CONFIG_SIZE or not body or len(writable) > len(body):
            raise ValueError(
                f"{self.config.name}: {name}: its {len(body)} bytes must fit "
                f"{offset + _CAPABILITY_HEAD:#x}..{CONFIG_SIZE:#x}, and {len(writable)} writable "
                "ones must be among them"
            )
        self.config.add(f"{name} identifier", offset, 1, value=identifier)
        pointer = self.config.add(f"{name} next", offset + 1, 1)
        self.config.add(
            name,
            offset + _CAPABILITY_HEAD,
            len(body),
            value=int.from_bytes(body, "little"),
            mask=int.from_bytes(writable, "little"),
            read=read,
            write=write,
        )
        self._last_pointer.value = self._last_pointer.initial = offset
        self._status.value = self._status.initial = _STATUS_CAPABILITIES
        self._last_pointer = pointer
        self._capabilities_end = (end + 3) & ~3
        return offset

    # --- interrupts -------------------------------------------------------------------------------

    def set_interrupt(self, level: bool) -> None:
        """Set the level of the interrupt pin (INTx); the guest can disable it.

        Raises:
            ValueError: the function has no pin.
            UnsupportedOperationError, XenCallError, ClosedError: as
                :meth:`IoreqServer.set_pci_intx`.
        """
        self._pin.set(level)

    def _read_status(self) -> int:
        return self._status.value | (_STATUS_INTERRUPT if self._pin.level else 0)

    # --- life -------------------------------------------------------------------------------------

    def plug(self) -> None:
        """Claim the configuration space, so that the guest finds the function.

        Raises:
            ValueError: it is plugged, or the server has another function there.
            XenCallError: Xen refused.
            ClosedError: the server is closed.
        """
        self._check_not_plugged()
        try:
            problems = self._place()  # after `restore`, the guest may decode BARs already
            self._region = self.server.claim_pci(self.bdf, self)
        except BaseException:
            self._release_bars()
            raise
        if problems:
            safely(logger.warning, "domain %d: %s", self.server.domid, problems)

    def unplug(self) -> None:
        """Release all claims, so that the guest no longer finds the function. Can be repeated.

        Its state is that of a new function then, and no interrupt is raised.

        Raises:
            XenCallError: Xen refused; call it again.
        """
        if self._region is not None:
            release(self._region)
            self._region = None
        # From here on no handler changes the configuration space.
        self.config.reset()
        self._release_bars()
        # From here on no handler writes a table, either.
        for messages in self._messages:
            messages.reset()
        self._pin.reset()

    def _release_bars(self) -> None:
        for bar in self._bars:
            bar.release(0)
            bar.reset()

    def reset(self) -> None:
        """Have the state of a new function: nothing is decoded, and no interrupt is raised.

        While it runs, the guest may find the function missing for a moment. The program resets
        the devices of the BARs itself.

        Raises:
            ValueError, XenCallError, ClosedError: as :meth:`plug`; then it is not plugged.
        """
        plugged = self._region is not None
        self.unplug()
        if plugged:
            self.plug()

    def save(self) -> bytes:
        """Return what the guest has written, for :meth:`restore` in another process.

        That is the configuration space, and the tables and pending bits of messages. The program
        keeps the state of the BARs' devices, and sets the level of the pin again: if it is low,
        too, because the process before may have raised it.
        """
        return b"".join([self.config.save(), *(each.save() for each in self._messages)])

    def restore(self, state: bytes) -> None:
        """Continue with a guest that has set up an equal function; call it before :meth:`plug`.

        Args:
            state: as :meth:`save` returned it.

        Raises:
            ValueError: it is of a function with other capabilities, or this one is plugged.
        """
        self._check_not_plugged()
        lengths = [CONFIG_SIZE, *(each.state_length for each in self._messages)]
        if len(state) != sum(lengths):
            raise ValueError(
                f"{self.config.name}: a state of {len(state)} bytes must have {sum(lengths)}"
            )
        ends = [*accumulate(lengths)]
        self.config.restore(state[:CONFIG_SIZE])
        for messages, start, end in zip(self._messages, ends[:-1], ends[1:], strict=True):
            messages.restore(state[start:end])
        self._pin.restore(bool(self._command.value & _INTX_DISABLE))

    def _check_not_plugged(self) -> None:
        if self._region is not None:
            raise ValueError(f"{self!r}: it is plugged; unplug it first")

    # --- handlers ---------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """Read configuration space; a handler. From 256 on there are only ones."""
        if offset >= CONFIG_SIZE:
            return (1 << 8 * size) - 1
        return self.config.read(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Write configuration space; a handler.

        Raises:
            GuestError: a BAR is not claimed where the guest wants it; all else was done.
        """
        if offset >= CONFIG_SIZE:
            return
        problems = ""
        try:
            self.config.write(offset, size, value)
        finally:
            if offset < BARS_END:
                problems = self._place()
            self.on_write()
        if problems:
            raise GuestError(problems)

    def _place(self) -> str:
        """Have each BAR claimed where the guest decodes it, and nowhere else.

        Returns:
            The problems that were not reported before, or an empty string.
        """
        command = self._command.value
        problems: list[str] = []
        for step in (Bar.release, Bar.claim):
            for bar in self._bars:
                try:
                    step(bar, command)
                except (ValueError, XenCallError) as error:
                    problems.append(bar.report(error))
        found = "; ".join(filter(None, problems))
        return found and f"{self.config.name}: {found}"
