"""The live view of ``xenmapcache top``: the loop of screens, keys and questions on a terminal."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from typing import TYPE_CHECKING

from .ending import Ending
from .keys import END, SUSPENDED, Keys
from .screen import KEYS, screen

if TYPE_CHECKING:
    from ..observe.watch import Watch
    from .output import Display


def show_live(watch: Watch, display: Display, options: argparse.Namespace) -> bool:
    """Show screens on a terminal, and obey keys. Return whether the process has ended."""
    keys = Keys(sys.stdin.fileno())

    def begin() -> None:
        keys.begin()
        display.begin()

    def end() -> None:
        display.end()
        keys.end()

    view = View(watch, display, keys, options)
    with Ending() as ending:
        while ending.run_between(begin, view.run, end) == SUSPENDED:
            os.kill(os.getpid(), signal.SIGSTOP)
    return view.has_ended


class View:
    """A live view. It outlives that the command is suspended."""

    def __init__(
        self, watch: Watch, display: Display, keys: Keys, options: argparse.Namespace
    ) -> None:
        self._watch = watch
        self._display = display
        self._keys = keys
        self._order = options.sort
        self._interval = options.interval
        self._remaining = options.count
        self._next = time.monotonic() + self._interval
        self.has_ended = False

    def run(self) -> str:
        """Show screens until there is a reason to stop. Return it: a key, or END or SUSPENDED."""
        while True:
            self._show()
            key = self._keys.wait(self._next - time.monotonic())
            if key in ("q", END, SUSPENDED):
                return key
            if key in KEYS:
                self._order = KEYS[key]
            elif key in ("", " ") and not self._ask():
                return END

    def _show(self) -> None:
        watch, height = self._watch, self._display.height
        self._display.show(
            screen(
                watch.previous,
                watch.current,
                self._order,
                height=height,
                problem=watch.problem,
                keys=True,
            )
        )

    def _ask(self) -> bool:
        """Ask the process. Return whether to continue."""
        self.has_ended = not self._watch.ask()
        self._next = time.monotonic() + self._interval
        if self._remaining is not None:
            self._remaining -= 1
        return not self.has_ended and self._remaining != 0
