"""Single keys of a terminal, without Enter, and the two signals that a screen has to follow."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import termios
import tty
from types import FrameType
from typing import Any, Final

RESIZED: Final = "resized"
SUSPENDED: Final = "suspended"
END: Final = "end"
"""What :meth:`Keys.wait` returns instead of a key: SIGWINCH, Ctrl-Z, the terminal's end."""
ESCAPE: Final = "\x1b"
_MAX_TYPED: Final = 64

_NOTES: Final[dict[int, str]] = {signal.SIGWINCH: RESIZED, signal.SIGTSTP: SUSPENDED}


class Keys:
    """The keys of a terminal, from :meth:`begin` to :meth:`end`.

    Both can be called again, so that a suspended program gives back the terminal and takes it
    later.

    Args:
        fd: of the terminal.

    Synchronization: for the main thread.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._modes: list[Any] | None = None
        self._pipe: tuple[int, int] | None = None
        self._handlers: dict[int, object] = {}
        self._wakeup = -1
        self._typed = bytearray()

    def begin(self) -> None:
        """Have keys delivered one by one, without echo."""
        self._modes = termios.tcgetattr(self._fd)
        tty.setcbreak(self._fd, termios.TCSANOW)
        self._pipe = os.pipe()
        for end in self._pipe:
            os.set_blocking(end, False)
        # What C's handler writes there ends select(). One of Python may run only after it.
        self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        for number in _NOTES:
            self._handlers[number] = signal.signal(number, _ignore)

    def end(self) -> None:
        """Put the terminal and the signals back, as far as :meth:`begin` came. Idempotent."""
        while self._handlers:
            number, handler = self._handlers.popitem()
            signal.signal(number, handler)  # type: ignore[arg-type] # what signal() returned
        pipe, self._pipe = self._pipe, None
        if pipe is not None:
            signal.set_wakeup_fd(self._wakeup)
            for end in pipe:
                os.close(end)
        modes, self._modes = self._modes, None
        if modes is not None:
            # If the terminal is gone, it has no modes to put back.
            with contextlib.suppress(termios.error):
                termios.tcsetattr(self._fd, termios.TCSANOW, modes)

    def wait(self, seconds: float) -> str:
        """Return the next key, one of the constants above, or an empty text after some time.

        A key that sends several bytes, such as an arrow, is one key: ESCAPE.
        """
        if self._typed:
            return chr(self._typed.pop(0))
        assert self._pipe is not None  # noqa: S101 - for mypy
        ready, _, _ = select.select([self._fd, self._pipe[0]], [], [], max(0.0, seconds))
        if self._pipe[0] in ready:
            # Others have handlers that have raised, if that is what they do.
            return _NOTES.get(os.read(self._pipe[0], 1)[0], RESIZED)
        if not ready:
            return ""
        try:
            typed = os.read(self._fd, _MAX_TYPED)
        except OSError:  # EIO: the terminal was closed
            typed = b""
        if not typed:
            return END
        if typed.startswith(b"\x1b"):
            return ESCAPE
        self._typed += typed
        return chr(self._typed.pop(0))


def _ignore(_: int, __: FrameType | None) -> None:
    """Do nothing: a signal that has no handler of Python's would not be written to the pipe."""
