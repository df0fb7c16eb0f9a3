"""The command ``xenmapcache``: parse, call, print."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

from ..errors import XenMapCacheError
from .parser import ERROR, CommandError, make_parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: the command line without the program's name; by default this process's.

    Returns:
        The exit status: what the command says; 2 for an error, which is one line on stderr;
        130 when it was interrupted, 141 when who reads the output has gone.

    Raises:
        SystemExit: after ``--help`` and ``--version``; with status 2 for wrong usage, or
            where rich is needed and missing.
    """
    parser = make_parser()
    options = parser.parse_args(arguments)
    module, _, function = options.run.partition(":")
    if options.tables and not options.json:
        try:
            import_module("rich")
        except ImportError:
            parser.exit(
                ERROR,
                "xenmapcache: error: tables need rich: pip install xenmapcache[cli], "
                "or use --json\n",
            )
    if sys.stdout is None:  # who started this has closed it
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", closefd=False)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status: int = getattr(import_module(f".{module}", __name__), function)(options)
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_output()
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        _discard_output()
        return 128 + signal.SIGINT
    except (XenMapCacheError, CommandError, OSError, MemoryError) as error:
        print(f"xenmapcache: error: {_one_line(error)}", file=sys.stderr)
        _discard_output()
        return ERROR
    return status


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and not isinstance(error, XenMapCacheError) and error.strerror:
        place = "" if error.filename is None else f"{error.filename}: "
        return f"{place}{error.strerror}"
    return " ".join(str(error).split("\n")) or "out of memory"


def _discard_output() -> None:
    """Let what is still buffered go nowhere, or the interpreter complains of it at exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
