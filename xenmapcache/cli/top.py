"""``xenmapcache top``: a live view of a process's caches and servers."""

from __future__ import annotations

import argparse
import itertools
import math
import time
from typing import TYPE_CHECKING, Final

from .arguments import CommandError, describe, positive
from .output import Display, flush, print_json_line, print_line, print_note
from .processes import NONE, ask_processes

if TYPE_CHECKING:
    from ..observe.watch import Watch

ORDERS: Final = ("age", "owner", "size", "stale")
_MIN_SECONDS, _MAX_SECONDS = 0.1, 86400.0
_ENDED: Final = 1


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Give the command's parser its help and its arguments."""
    describe(
        parser,
        "Show what the caches and servers of a process do: map calls, evictions, INVALIDATEs and\n"
        "requests per second, what a server does now, and the leases, oldest first. Stale leases,\n"
        "and requests that take more than 0.1 s, are red. The process has a monitor if it runs\n"
        "with XENMAPCACHE_MONITOR=1.\n\n"
        "keys: q quits, space asks the process now, and a, o, s and t sort the leases by age,\n"
        "owner, size, or stale ones first. If the output is not a terminal, one screen follows\n"
        "the other.",
        "  xenmapcache top\n"
        "  xenmapcache top 4321 --sort stale --interval 5\n"
        "  xenmapcache top 4321 --json --count 60 | jq .rates.maps\n"
        "exit status: 0 after q or --count, 1 if the process has ended or none can be asked,\n"
        "2 for an error",
        tables=True,
        json="print one JSON object per line, one for each interval",
    )
    parser.add_argument(
        "pid", nargs="?", type=positive, metavar="PID", help="the process (default: the only one)"
    )
    parser.add_argument(
        "--interval",
        type=_interval,
        default=1.0,
        metavar="SECONDS",
        help="ask the process that often (default: 1)",
    )
    parser.add_argument(
        "--count", type=positive, metavar="N", help="end after N intervals (default: never)"
    )
    parser.add_argument(
        "--sort", choices=ORDERS, default="age", help="the order of the leases (default: age)"
    )


def _interval(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not _MIN_SECONDS <= value <= _MAX_SECONDS:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be a number of seconds from {_MIN_SECONDS} to {_MAX_SECONDS:.0f}"
        )
    return value


def run(options: argparse.Namespace) -> int:
    """Show the process until the user or the process ends it. Returns the exit status."""
    watch = _find(options.pid)
    if watch is None:
        print_line(NONE)
        return _ENDED
    display = None if options.json else Display()
    if display is not None and display.is_live:
        from .view import show_live

        ended = show_live(watch, display, options)
    else:
        ended = _print(watch, display, options)
    if ended:
        print_note(watch.problem)
    return _ENDED if ended else 0


def _find(pid: int | None) -> Watch | None:
    """Return the process to watch; None if there is none and none was named.

    Raises:
        CommandError: it cannot be asked, or there are several.
    """
    from ..observe.watch import Watch

    answers = ask_processes(pid)
    if len(answers) > 1:
        pids = ", ".join(str(answer.pid) for answer in answers)
        raise CommandError(f"processes {pids} can be asked; name one: xenmapcache top PID")
    for answer in answers:
        if answer.snapshot is not None:
            return Watch(answer.snapshot)
    return None


def _print(watch: Watch, display: Display | None, options: argparse.Namespace) -> bool:
    """Print an object or a screen for each interval. Return whether the process has ended."""
    from .screen import screen

    for number in itertools.count() if options.count is None else range(options.count):
        time.sleep(options.interval)
        if not watch.ask():
            return True
        if display is None:
            print_json_line(_values(watch))
            flush()
        else:
            if number:
                print_line("")
            problem = watch.problem
            display.show(screen(watch.previous, watch.current, options.sort, problem=problem))
    return False


def _values(watch: Watch) -> dict[str, object]:
    """Return what ``--json`` prints after an interval."""
    import json

    from ..observe.rates import rates

    values: dict[str, object] = {"pid": watch.current.pid, "problem": watch.problem or None}
    if watch.problem or watch.previous is None:
        return values | {"rates": None, "snapshot": None}
    found = rates(watch.previous, watch.current)
    return values | {
        "rates": None if found is None else found._asdict(),
        "snapshot": json.loads(watch.current.to_json()),
    }
