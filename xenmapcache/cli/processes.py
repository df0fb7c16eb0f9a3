"""What the commands share that ask other processes: whom to ask, and times for people."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .arguments import CommandError, positive
from .output import print_note

if TYPE_CHECKING:
    from ..observe.asking import Answer

HOW = "set XENMAPCACHE_MONITOR=1 for it, or call xenmapcache.observe.monitor.serve()"
"""How a process can be asked."""
NONE = f"No process of this user has a monitor. To open one in a process, {HOW}."
"""There is none that can be asked."""
_S = 1_000_000_000
_MINUTE, _HOUR, _DAY = 60, 3600, 86400


def add_pid(parser: argparse.ArgumentParser) -> None:
    """Add the argument that selects a process."""
    parser.add_argument(
        "pid",
        nargs="?",
        type=positive,
        metavar="PID",
        help="only this process; by default all that can be asked (see xenmapcache ps)",
    )


def ask_processes(pid: int | None = None) -> tuple[Answer, ...]:
    """Ask one process, or all of this user's. Notes on stderr name those that do not answer.

    Raises:
        CommandError: that one process cannot be asked, or does not answer.
    """
    from ..observe.asking import ask

    found = ask(None if pid is None else (pid,))
    for problem in found.problems:
        print_note(f"sockets are not looked for in {problem}")
    if pid is not None and not found.answers:
        raise CommandError(f"process {pid} has no monitor, or is another user's; {HOW}")
    for each in found.answers:
        if each.snapshot is None:
            text = f"process {each.pid} {each.problem} ({each.path})"
            if pid is not None:
                raise CommandError(text)
            print_note(text)
    return found.answers


def age(nanoseconds: int) -> str:
    """Return a duration for people: ``0.512 s``, ``59.1 s``, ``12m05s``, ``3h07m``, ``41d02h``."""
    seconds = max(0, nanoseconds) // _S
    if seconds < 10:
        return f"{max(0, nanoseconds) / _S:.3f} s"
    if seconds < _MINUTE:
        return f"{max(0, nanoseconds) / _S:.1f} s"
    if seconds < _HOUR:
        return f"{seconds // _MINUTE}m{seconds % _MINUTE:02}s"
    if seconds < _DAY:
        return f"{seconds // _HOUR}h{seconds % _HOUR // _MINUTE:02}m"
    return f"{seconds // _DAY}d{seconds % _DAY // _HOUR:02}h"


def cut(text: str, limit: int) -> str:
    """Return a text that was escaped, or its beginning if it is too long."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
