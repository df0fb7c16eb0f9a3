"""InterruptPin: the level-triggered interrupt of a PCI function, INTA to INTD."""

from __future__ import annotations

import contextlib
import threading

from ...address import as_int
from ...cache.locked import locked
from ...errors import ClosedError
from ..server import IoreqServer

_PINS = 4


class InterruptPin:
    """A PCI function's pin: what the device wants, and what the guest allows.

    Args:
        server: of an HVM guest.
        bdf: of the function.
        number: 1 (INTA) to 4, as in configuration space; 0 for none.

    Attributes:
        number: as given.
        level: what the device wants.

    Synchronization: any thread. The lock is held during the call to Xen, because two levels must
    reach Xen in the order in which they were decided; it is one hypercall that does not wait.
    """

    def __init__(self, server: IoreqServer, bdf: str, number: int) -> None:
        if not 0 <= as_int("interrupt_pin", number) <= _PINS:
            raise ValueError(f"interrupt_pin must be 0 (none) to {_PINS}, not {number}")
        self.number = number
        self.level = False
        self._server = server
        self._bdf = bdf
        self._lock = threading.RLock()
        self._disabled = False
        self._asserted: bool | None = False  # what Xen has; None if another process has set it

    def set(self, level: bool) -> None:
        """Have the device's level.

        Raises:
            ValueError: the function has no pin.
            UnsupportedOperationError, XenCallError, ClosedError: as
                :meth:`IoreqServer.set_pci_intx`.
        """
        if not self.number:
            raise ValueError(f"PCI function {self._bdf} has no interrupt pin (interrupt_pin=0)")
        self.level = level
        locked(self._lock, self._apply)

    def disable(self, disabled: bool) -> None:
        """Have the guest's choice; raises as :meth:`set`."""
        self._disabled = disabled
        locked(self._lock, self._apply)

    def restore(self, disabled: bool) -> None:
        """Have the guest's choice as another process knew it. The next :meth:`set` tells Xen."""
        self._disabled = disabled
        self._asserted = None

    def reset(self) -> None:
        """Lower the line, and forget the guest's choice; raises as :meth:`set`."""
        self.level = self._disabled = False
        with contextlib.suppress(ClosedError):  # a closed server has no lines
            locked(self._lock, self._apply)

    def _apply(self) -> None:
        """Set the line. Whichever thread does it last sees what all of them have stored."""
        wanted = self.level and not self._disabled
        if wanted != self._asserted:
            self._server.set_pci_intx(self._bdf, self.number - 1, wanted)
            self._asserted = wanted
