"""``xenmapcache leases``: print the leases that processes hold, oldest first."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..escape import printable
from .arguments import describe
from .output import place, print_json, print_line
from .processes import NONE, add_pid, age, ask_processes, cut

if TYPE_CHECKING:
    from ..observe.asking import Answer
    from ..observe.snapshot import CacheState, LeaseState, Snapshot

_COLUMNS = "{:<18} {:<6} {:>15} {:>10} {:<13} {:>7} {}"
_OWNER_WIDTH, _THREAD_WIDTH, _LINE_WIDTH = 18, 24, 80


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Give the command's parser its help and its arguments."""
    describe(
        parser,
        "Show the leases that processes hold, oldest first: owner, kind, guest addresses,\n"
        "direction, age, and the thread that took each. A stale one was held across an\n"
        "INVALIDATE: what a device writes there is lost. The line of code is shown if the\n"
        "cache has record_origin=True. The processes need a monitor: see xenmapcache ps.",
        "  xenmapcache leases\n"
        "  xenmapcache leases 4321\n"
        "  xenmapcache leases --json | jq '.processes[].caches[].leases[] | select(.stale)'\n"
        "exit status: 0 if a lease is held, 1 if none is",
    )
    add_pid(parser)


def run(options: argparse.Namespace) -> int:
    """Print the leases. Returns 0 if there is one, else 1."""
    answers = ask_processes(options.pid)
    if options.json:
        print_json({"processes": [*map(_values, answers)]})
    else:
        for answer in answers:
            if answer.snapshot is not None:
                _print(answer.snapshot)
    held = [
        len(cache.leases) + cache.leases_omitted
        for answer in answers
        if answer.snapshot is not None
        for cache in answer.snapshot.caches
    ]
    if not any(held) and not options.json:
        print_line("No process with a monitor holds a lease." if answers else NONE)
    return 0 if any(held) else 1


def _values(answer: Answer) -> dict[str, object]:
    """Return a process as JSON has it."""
    found = answer.snapshot
    values: dict[str, object] = {"pid": answer.pid, "problem": answer.problem or None}
    if found is not None:
        values["command"] = found.argv
        values["omitted"] = found.omitted
        values["caches"] = [
            {
                "name": cache.name,
                "domid": cache.domid,
                "incomplete": cache.incomplete,
                "leases": [_lease(lease, found.now_ns) for lease in cache.leases],
                "leases_omitted": cache.leases_omitted,
            }
            for cache in found.caches
        ]
    return values


def _lease(lease: LeaseState, now_ns: int) -> dict[str, object]:
    return {
        "id": lease.id,
        "owner": lease.owner,
        "kind": lease.kind,
        **place(lease.start),
        "length": lease.end - lease.start,
        "direction": lease.direction,
        "age_ns": now_ns - lease.taken_ns,
        "stale": lease.stale,
        "thread": lease.thread,
        "origin": lease.origin,
    }


def _print(found: Snapshot) -> None:
    """Print the leases of a process."""
    for cache in found.caches:
        if cache.leases or cache.leases_omitted or cache.incomplete:
            domain = "" if cache.domid is None else f"domain {cache.domid}, "
            print_line(_fit(f"process {found.pid}, {domain}{found.argv}"))
            _print_cache(cache, found.now_ns)
    if found.omitted:
        print_line(f"process {found.pid}: {found.omitted} more caches and servers are not shown")


def _print_cache(cache: CacheState, now_ns: int) -> None:
    if cache.leases:
        print_line(
            _COLUMNS.format("OWNER", "KIND", "ADDRESS", "LENGTH", "DIRECTION", "AGE", "STALE")
        )
    for lease in cache.leases:
        line = _COLUMNS.format(
            cut(printable(lease.owner), _OWNER_WIDTH),
            lease.kind,
            f"{lease.start:#x}",
            f"{lease.end - lease.start:#x}",
            lease.direction or "-",
            age(now_ns - lease.taken_ns),
            "STALE" if lease.stale else "-",
        )
        print_line(line)
        print_line(_taken(lease))
    if cache.leases_omitted:
        print_line(f"{cache.leases_omitted} more leases are not shown")
    if cache.incomplete:
        print_line("This list is incomplete: other threads changed it all the time. Ask again.")


def _taken(lease: LeaseState) -> str:
    """Return the thread that took a lease, and the end of the line of code, if that is known."""
    text = f"    thread {cut(printable(lease.thread), _THREAD_WIDTH)}"
    if not lease.origin:
        return text
    text += ", taken at "
    origin, limit = printable(lease.origin[-1]), _LINE_WIDTH - len(text)
    return text + (origin if len(origin) <= limit else f"...{origin[3 - limit :]}")


def _fit(text: str) -> str:
    """Return a text that fits a line of a narrow terminal."""
    return cut(printable(text), _LINE_WIDTH)
