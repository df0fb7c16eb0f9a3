"""Guarded: a device's lock, and what becomes of a driver or a subclass that breaks the rules."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TypeVar

from ...cache.locked import locked
from ...errors import FaultError
from ..report import FailureLog, Tally
from .buffer import BrokenDriverError
from .transport import Transport

Result = TypeVar("Result")


class Guarded:
    """The base of a virtio device that has one lock, and one way to give up its driver.

    Args:
        name: for reports.
        domid: of the guest, for reports.

    Attributes:
        transport: of the device; the transport sets it.
    """

    transport: Transport

    def __init__(self, name: str, domid: int) -> None:
        self.name = name
        self._broken = False
        self._lock = threading.RLock()
        self._log = FailureLog(domid, Tally())
        self._log_lock = threading.RLock()

    def _flush_log(self) -> None:
        locked(self._log_lock, self._log.flush)

    def _guarded(self, function: Callable[..., Result], *arguments: object) -> Result | None:
        """Call a function under the lock; None if the driver or a subclass breaks the rules."""
        try:
            return locked(self._lock, function, *arguments)
        except Exception as error:
            self._give_up(error)
            return None

    def _give_up(self, error: Exception) -> None:
        """Have the driver reset the device. Once, although several threads may find it broken."""
        if locked(self._lock, self._is_first):
            # The guest chose what it did; another cause is this machine's.
            cause = error.__cause__ or error
            chosen = isinstance(cause, BrokenDriverError | FaultError)
            level = logging.INFO if chosen else logging.ERROR
            text = f"{self.name!r} needs a reset by its driver"
            locked(self._log_lock, self._log.line, f"device {self.name!r}", text, error, level)
            self.transport.needs_reset()

    def _is_first(self) -> bool:
        before, self._broken = self._broken, True
        return not before
