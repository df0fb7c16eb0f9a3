"""Where the command ``xenmapcache`` starts.

Importing the package takes some ten milliseconds. Python turns a Ctrl-C in that time into a
traceback. So the signal ends the process, without a word, until the command itself handles it.
This module is outside of the package, because importing a part of a package imports all of it.

CPython drops what a signal handler raises inside a finalizer. The command would run on although
the user has interrupted it. So the same exception is raised again a moment later.
"""

from __future__ import annotations

import sys

# The module `signal` makes enums of these, which takes longer than all else here.
from _signal import (  # type: ignore[import-not-found] # typeshed has only `signal`
    ITIMER_REAL,
    SIG_DFL,
    SIG_IGN,
    SIGALRM,
    SIGINT,
    default_int_handler,
    getsignal,
    setitimer,
    signal,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType

_MOMENT_S = 0.01


def main() -> int:
    """Run the command, and return its exit status."""
    ignored = getsignal(SIGINT) == SIG_IGN  # as in a shell's background jobs
    previous, sys.unraisablehook = sys.unraisablehook, raise_again
    if not ignored:
        signal(SIGINT, SIG_DFL)
    status = 130
    try:
        from xenmapcache.cli import import_command
        from xenmapcache.cli import main as run

        import_command(sys.argv[1:])
        if not ignored:
            signal(SIGINT, default_int_handler)
        status = run()
    except KeyboardInterrupt:  # between the commands' own handlers
        pass
    finally:
        if not ignored:  # while Python ends, too
            signal(SIGINT, SIG_DFL)
        setitimer(ITIMER_REAL, 0)  # what it would raise again has nothing left to interrupt
        sys.unraisablehook = previous
    return status


def raise_again(dropped: sys.UnraisableHookArgs) -> None:
    """Have what a signal handler raised in a finalizer raised again, outside of it.

    Args:
        dropped: what CPython could not raise there; anything else is printed as usual.
    """
    error = dropped.exc_value
    if not isinstance(error, (KeyboardInterrupt, SystemExit)):
        sys.__unraisablehook__(dropped)
        return

    def handler(number: int, frame: FrameType | None) -> None:
        del number, frame
        raise error

    signal(SIGALRM, handler)
    setitimer(ITIMER_REAL, _MOMENT_S)
