"""SIGINT and SIGTERM while a server serves or closes."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    import asyncio

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def is_default(number: signal.Signals) -> bool:
    """Return whether this thread may handle a signal, because the program does not."""
    return threading.current_thread() is threading.main_thread() and signal.getsignal(number) in (
        signal.SIG_DFL,
        signal.default_int_handler,
    )


class CaughtSignals:
    """Catches SIGINT and SIGTERM in a ``with`` block, if the program does not handle them.

    The first one is noted and does not interrupt. A second one raises KeyboardInterrupt.

    Args:
        on_first: is called by the signal handler. It must not raise.

    Attributes:
        caught: the number of the first one, in a list; empty if none came.
    """

    def __init__(self, on_first: Callable[[], None]) -> None:
        self.caught: list[int] = []
        self._on_first = on_first
        self._pid = os.getpid()
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        try:
            for number in _SIGNALS:
                if is_default(number):
                    # Noted first: whatever interrupts this, the exit puts it back.
                    self._previous[number] = signal.getsignal(number)
                    signal.signal(number, self._handle)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.put_back()
        except BaseException:
            self.put_back()  # an interrupt came between the two
            raise

    def put_back(self) -> None:
        """Restore the program's signal handlers. Idempotent."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type] # what getsignal returned

    def _handle(self, number: int, _: FrameType | None) -> None:
        # In a forked child of a handler nobody serves. It ends here, so coverage cannot see it.
        if os.getpid() != self._pid:  # pragma: no cover - tested in a child
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if self.caught:
            raise KeyboardInterrupt(f"{signal.Signals(number).name} came twice")
        self.caught.append(number)
        self._on_first()


_ending: dict[asyncio.AbstractEventLoop, list[Callable[[], None]]] = {}


@contextlib.contextmanager
def sigterm_in(loop: asyncio.AbstractEventLoop, end: Callable[[], None]) -> Iterator[None]:
    """Have SIGTERM end all servers of an event loop, if the program does not handle it."""
    if loop not in _ending and not is_default(signal.SIGTERM):
        yield
        return
    ends = _ending.setdefault(loop, [])

    def end_all() -> None:
        for each in list(ends):
            each()

    if not ends:
        loop.add_signal_handler(signal.SIGTERM, end_all)
    ends.append(end)
    try:
        yield
    finally:
        ends.remove(end)
        if not ends:
            del _ending[loop]
            loop.remove_signal_handler(signal.SIGTERM)
