"""Transfers that run in threads of their own, and the gate that holds them back."""

from __future__ import annotations

import threading
from time import monotonic
from types import TracebackType

from ..errors import ClosedError


class Gate:
    """Lets transfers through, or holds them back while the guest is saved.

    Synchronization: any thread.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._shut = False
        self._ended = False
        self._inside: set[object] = set()

    @property
    def is_shut(self) -> bool:
        """Whether transfers have to wait."""
        return self._shut

    def shut(self, timeout: float) -> int:
        """Hold new transfers back, and wait for those under way.

        Returns:
            How many are still under way after ``timeout`` seconds.
        """
        end = monotonic() + timeout
        with self._changed:
            self._shut = True
            while self._inside and (left := end - monotonic()) > 0:
                self._changed.wait(left)
            return len(self._inside)

    def open(self) -> None:
        """Let transfers through again."""
        with self._changed:
            self._shut = False
            self._changed.notify_all()

    def end(self) -> None:
        """Refuse transfers that wait, now and later: nobody will open the gate."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def enter(self, transfer: object) -> None:
        """Wait until the gate is open, and go through.

        Raises:
            ClosedError: the server is closed while the gate is shut.
        """
        with self._changed:
            while self._shut:
                if self._ended:
                    raise ClosedError(
                        "the transfer waits for resume(), but its ioreq server is closed: drop it, "
                        "or start it again after the restore"
                    )
                self._changed.wait()
            self._inside.add(transfer)

    def is_inside(self, transfer: object) -> bool:
        """Return whether a transfer has gone through and has not ended.

        It takes no lock. Once the gate is seen shut, who has gone through is seen, too.
        """
        return transfer in self._inside

    def leave(self, transfer: object) -> None:
        """Say that a transfer has ended. Can be repeated."""
        with self._changed:
            self._inside.discard(transfer)
            self._changed.notify_all()


class Transfer:
    """A transfer in a thread of its own; see :meth:`IoreqServer.transfer`."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    @property
    def inside(self) -> bool:
        """Whether it has begun and has not ended."""
        return self._gate.is_inside(self)

    def __enter__(self) -> None:
        self._gate.enter(self)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._gate.leave(self)
