"""The command ``xenmapcache``: parse, call, print."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import TextIO

from ..errors import XenMapCacheError
from .arguments import ERROR, CommandError
from .output import print_error
from .parser import COMMANDS, make_parser, module_of


def import_command(arguments: Sequence[str]) -> None:
    """Import the module of the command that is the first argument, if it is one."""
    for name in COMMANDS.keys() & arguments[:1]:
        module_of(name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: the command line without the program's name; by default this process's.

    Returns:
        The exit status: what the command returns; 2 for an error, which is one line on
        stderr; 130 if it was interrupted; 141 if the reader closed the pipe.

    Raises:
        SystemExit: after ``--help`` and ``--version``; with status 2 for wrong usage, or if
            rich is needed and missing.
    """
    try:
        _open_closed_streams()
        parser = make_parser(whole=False)
        options = parser.parse_args(arguments)
        if options.tables and not options.json:
            try:
                import_module("rich")
            except ImportError:
                parser.exit(
                    ERROR,
                    "xenmapcache: error: tables need rich: pip install xenmapcache[cli], "
                    "or use --json\n",
                )
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")
        status: int = module_of(options.command).run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        _discard(sys.stdout)
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        _discard(sys.stdout)
        return 128 + signal.SIGINT
    except (XenMapCacheError, CommandError, OSError, MemoryError) as error:
        try:
            print_error(_one_line(error))
        except OSError:
            _discard(sys.stderr)
        _discard(sys.stdout)
        return ERROR
    return status


def _open_closed_streams() -> None:
    """Open standard streams that are closed; otherwise a file could take their numbers."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_WRONLY)
            setattr(sys, name, os.fdopen(null, "w", encoding="utf-8", closefd=False))


def _one_line(error: Exception) -> str:
    text = str(error)
    if isinstance(error, OSError) and not isinstance(error, XenMapCacheError) and error.strerror:
        place = "" if error.filename is None else f"{error.filename}: "
        text = f"{place}{error.strerror}"
    return text.replace("\n", " ") or "out of memory"


def _discard(stream: TextIO) -> None:
    """Discard what is still buffered, because the interpreter would report it at exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        stream.flush()
    with contextlib.suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
