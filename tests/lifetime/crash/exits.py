"""The columns of the matrix in which the interpreter ends."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
from collections.abc import Callable

from .holds import Hold, UnderWay
from .world import World


def look(hold: Hold) -> None:
    """Use what is kept at a moment at which much may be gone; an exception is as good as bytes."""
    with contextlib.suppress(Exception):
        if isinstance(hold, UnderWay):
            hold.nudge()
        else:
            hold.use()


def end_in_thread() -> None:
    """Only the thread ends by it; then the program does."""
    thread = threading.Thread(target=sys.exit)
    thread.start()
    thread.join()


def use_by_daemon(hold: Hold) -> None:
    """A daemon thread uses it without an end, also while the interpreter falls apart."""
    begun = threading.Event()

    def work() -> None:
        while True:
            look(hold)
            begun.set()

    threading.Thread(target=work, daemon=True).start()
    begun.wait()


class Cycle:
    """Garbage that uses what is kept when it is collected, at the very end."""

    def __init__(self, hold: Hold) -> None:
        self.hold = hold
        self.self = self

    def __del__(self, look: Callable[[Hold], None] = look) -> None:
        look(self.hold)


def leave(world: World, hold: Hold, column: str) -> None:
    """End this process as the column says, with everything kept in a module."""
    sys.modules["kept"] = (world, hold)  # type: ignore[assignment] # the last things to go
    if column == "sys.exit()":
        sys.exit(0)
    if column == "os._exit()":
        os._exit(0)
    if column == "sys.exit() in a thread":
        end_in_thread()
    elif column == "at exit: used by atexit":
        atexit.register(look, hold)
    elif column == "at exit: used by a daemon thread":
        use_by_daemon(hold)
    elif column == "at exit: in a cycle, in __del__":
        sys.modules["cycle"] = Cycle(hold)  # type: ignore[assignment] # the test knows
