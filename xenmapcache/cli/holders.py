"""``xenmapcache holders``: print which processes hold guests' memory, and dying domains."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .arguments import describe
from .output import print_json, print_line, size

if TYPE_CHECKING:
    from ..doctor.holders import Dying, Holders

_COLUMNS = "{:>7} {:>6}  {:<13} {:>8} {:>10} {:>5}  {}"


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Give the command's parser its help and its arguments."""
    describe(
        parser,
        "Show which processes of this domain map guests' memory (privcmd) and grants (gntdev),\n"
        "QEMU and all others, and which of them may keep a dying domain, which xl list calls\n"
        "(null). Run it in Dom0, as root. The kernel does not say whose pages a process maps:\n"
        "DOMAIN is what QEMU's command line says.",
        "  xenmapcache holders\n"
        "  xenmapcache holders --json | jq '.dying[] | {domid, pids}'\n"
        "exit status: 0 if a process holds something, 1 if none does",
    )


def run(options: argparse.Namespace) -> int:
    """Print the processes and the dying domains. Returns 0 if there is a process, else 1."""
    from ..doctor.holders import find_dying, find_holders

    found = find_holders()
    dying, problem = find_dying(found)
    if options.json:
        print_json(
            {
                "processes": [
                    each._asdict() | {"holds": [hold._asdict() for hold in each.holds]}
                    for each in found.holders
                ],
                "unreadable": found.unreadable,
                "dying": [each._asdict() for each in dying],
                "xl_problem": problem or None,
            }
        )
    else:
        _print(found, dying, problem)
    return 0 if found.holders else 1


def _print(found: Holders, dying: tuple[Dying, ...], problem: str) -> None:
    if found.holders:
        print_line(_COLUMNS.format("PID", "DOMAIN", "DEVICE", "MAPPINGS", "SIZE", "OPEN", "NAME"))
    for holder in found.holders:
        domain = "?" if holder.domid is None else holder.domid
        for hold in holder.holds:
            opened = "?" if hold.descriptors is None else hold.descriptors
            print_line(
                _COLUMNS.format(
                    holder.pid,
                    domain,
                    hold.device,
                    hold.mappings,
                    size(hold.bytes),
                    opened,
                    holder.name,
                )
            )
    if not found.holders:
        print_line("No process that this user can see holds guests' memory.")
    if found.unreadable:
        print_line(
            f"Processes that this user cannot look at: {found.unreadable}. That takes "
            "CAP_SYS_PTRACE: run it as root, outside of a container."
        )
    for each in dying:
        pids = ", ".join(map(str, each.pids))
        keeps = f"may be kept by {pids}" if pids else "no process here is seen to keep it"
        print_line(f"Domain {each.domid}, {each.name}, is dying: {keeps}.")
    if problem:
        print_line(f"Dying domains: {problem}.")
