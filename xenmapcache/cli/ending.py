"""Signals that end a command which must put things in order first."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn, Self, TypeVar

Result = TypeVar("Result")

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class Ending:
    """Turns Ctrl-C, SIGTERM, SIGHUP and SIGQUIT into one exception, in a ``with`` block.

    It is KeyboardInterrupt for Ctrl-C, SystemExit with the shell's status for others. It is
    raised once: a second signal must not interrupt the cleanup that the first one began. A
    signal that the caller ignores, as ``nohup`` has it, stays ignored.

    Synchronization: for the main thread.
    """

    def __init__(self) -> None:
        self._caught: list[int] = []
        self._interrupts = True
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if handler != signal.SIG_IGN:
                self._previous[number] = handler
                signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type] # what getsignal returned

    def check(self) -> None:
        """Raise what a signal has raised, if that got lost, as in a finalizer."""
        if self._caught:
            self._raise()

    def run_between(
        self, begin: Callable[[], None], work: Callable[[], Result], end: Callable[[], None]
    ) -> Result:
        """Run three functions, of which the third one runs whatever happens.

        No signal interrupts the first or the last one. One that comes during the first raises
        after it, without the second; one that comes during the last, after that.

        Returns:
            What the second one returned.
        """
        self._interrupts = False
        try:
            begin()
            try:
                self._interrupts = True
                self.check()
                result = work()
            finally:
                self._interrupts = False
        finally:
            end()
        self._interrupts = True
        self.check()
        return result

    def _handle(self, number: int, _: FrameType | None) -> None:
        self._caught.append(number)
        if self._interrupts and len(self._caught) == 1:
            self._raise()

    def _raise(self) -> NoReturn:
        if self._caught[0] == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + self._caught[0])
