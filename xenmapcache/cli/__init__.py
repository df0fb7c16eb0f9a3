"""The command ``xenmapcache``: parse, call, print."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

from .. import __version__
from ..errors import XenMapCacheError

USAGE_ERROR = 2


def _domid(text: str) -> int:
    from ..backends.domain import check_domid

    try:
        return check_domid(int(text, 0))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="xenmapcache",
        description="A map cache over Xen guests' memory that tells device from DMA mappings.",
        epilog="examples:\n"
        "  xenmapcache demo              what ballooning does to DMA, on a mock guest\n"
        "  xenmapcache doctor            what works here, and what to do about the rest\n"
        "  xenmapcache doctor --domid 3  the same, mapping domain 3",
        formatter_class=raw,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    demo = commands.add_parser(
        "demo",
        help="show what ballooning does to DMA, without Xen",
        description="Play the story this package is about on a mock guest: a guest balloons\n"
        "while DMA is under way. Needs neither Xen nor root.",
        epilog="examples:\n"
        "  xenmapcache demo\n"
        "  xenmapcache demo --json | jq .outcomes.warn\n"
        "exit status: 0",
        formatter_class=raw,
    )
    doctor = commands.add_parser(
        "doctor",
        help="check libraries, devices, Xen and a live guest",
        description="Check what mapping a live guest needs, and map one page of one.",
        epilog="examples:\n"
        "  xenmapcache doctor\n"
        "  xenmapcache doctor --domid $(xl domid NAME)\n"
        "  xenmapcache doctor --json | jq '.findings[] | select(.state == \"problem\")'\n"
        "exit status: 0 if a live guest was mapped, else 1",
        formatter_class=raw,
    )
    doctor.add_argument(
        "--domid", type=_domid, metavar="N", help="map this guest (default: the first in xl list)"
    )
    for name, command in (("demo", demo), ("doctor", doctor)):
        command.add_argument("--json", action="store_true", help="print one JSON object")
        command.set_defaults(command=name)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: the command line without the program's name; by default this process's.

    Returns:
        The exit status: 0, 1 for an error, which is one line on stderr, 141 when who
        reads the output has gone.

    Raises:
        SystemExit: after ``--help`` and ``--version``; with status 2 for wrong usage, or
            where rich is needed and missing.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if not options.json:
        try:
            import_module("rich")
        except ImportError:
            parser.exit(
                USAGE_ERROR,
                "xenmapcache: tables need rich: pip install xenmapcache[cli], or use --json\n",
            )
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status: int = import_module(f".{options.command}", __name__).run(options)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        _discard_output()
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (XenMapCacheError, OSError) as error:
        print(f"xenmapcache: {error}", file=sys.stderr)
        _discard_output()
        return 1
    return status


def _discard_output() -> None:
    """Let what is still buffered go nowhere, or the interpreter complains of it at exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
