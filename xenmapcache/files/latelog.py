"""LateLog: log lines of a thread that may not wait, written by other threads."""

from __future__ import annotations

import contextlib
import logging
import threading
from _thread import start_new_thread
from collections import deque

logger = logging.getLogger("xenmapcache")


class LateLog:
    """Lines for the log, each of which a thread of its own writes.

    Args:
        name: of those threads.

    Attributes:
        pending: the lines that nobody has written yet: level, text and arguments.

    Synchronization: all methods may be called in any threads at once.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.pending: deque[tuple[int, str, tuple[object, ...]]] = deque()

    def report(self, level: int, text: str, *arguments: object) -> None:
        """Let another thread write a line; if none can be started, together with the next one."""
        self.pending.append((level, text, arguments))
        # Not by threading.Thread, whose start takes a lock that a user's frame can hold.
        with contextlib.suppress(RuntimeError):  # no thread can be started
            for _ in range(len(self.pending)):
                start_new_thread(self.start_writer, ())

    def start_writer(self) -> None:
        """Start the thread that writes a line."""
        # Logging asks threading for the current thread, which must therefore be one of threading's.
        threading.Thread(target=self.write, name=self.name, daemon=True).start()

    def write(self) -> None:
        """Write the oldest line, if there is one."""
        try:
            level, text, arguments = self.pending.popleft()
        except IndexError:  # another thread has written it
            return
        logger.log(level, text, *arguments)
