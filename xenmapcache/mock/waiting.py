"""Waiting as a vCPU does, in a thread whose signal handlers may do what it waits for.

``threading.Event`` and ``Condition`` take a lock in Python code. A signal handler that runs while
its own thread has that lock would wait for itself. Here each step is one call into C.
"""

from __future__ import annotations

import contextlib
import threading
import time


def _seconds(timeout: float) -> float:
    return min(max(0.0, timeout), threading.TIMEOUT_MAX)


class Bell:
    """Wakes one waiter; rung before, the next wait returns at once. Several rings count as one."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def ring(self) -> None:
        """Wake the waiter."""
        with contextlib.suppress(RuntimeError):  # it was rung before
            self._lock.release()

    def wait(self, timeout: float) -> bool:
        """Wait until the bell is rung, and return whether that happened in time."""
        return self._lock.acquire(timeout=_seconds(timeout))


class Gate:
    """Open, or closed for one or more reasons. While it is closed, :meth:`wait` blocks."""

    def __init__(self) -> None:
        self._reasons: dict[str, None] = {}
        self._bells: dict[Bell, None] = {}

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the gate is closed, oldest reason first."""
        return tuple(self._reasons)

    def close(self, reason: str) -> None:
        """Close the gate. Idempotent for each reason."""
        self._reasons[reason] = None

    def open(self, reason: str) -> None:
        """Take a reason away. The gate opens when no reason is left."""
        self._reasons.pop(reason, None)
        for bell in list(self._bells):
            bell.ring()

    def wait(self, timeout: float) -> bool:
        """Wait until the gate is open, and return whether that happened in time."""
        if not self._reasons:
            return True
        end = time.monotonic() + timeout
        bell = Bell()
        try:
            # Listed before the reasons are looked at: no opening is missed.
            self._bells[bell] = None
            while self._reasons:
                if not bell.wait(end - time.monotonic()):
                    return not self._reasons
            return True
        finally:
            self._bells.pop(bell, None)
