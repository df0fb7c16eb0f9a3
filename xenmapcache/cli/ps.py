"""``xenmapcache ps``: print which processes can be asked, and what their caches hold."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, NamedTuple

from ..escape import printable
from .arguments import describe
from .output import print_json, print_line, size
from .processes import NONE, age, ask_processes, cut

if TYPE_CHECKING:
    from ..observe.asking import Answer
    from ..observe.snapshot import Snapshot

_COLUMNS = "{:>7} {:>6} {:>8} {:>7} {:>6} {:>10}  {}"
_DOMAIN_WIDTH, _COMMAND_WIDTH = 6, 29


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Give the command's parser its help and its arguments."""
    describe(
        parser,
        "Show this user's processes that have a monitor, and what their caches hold: leases,\n"
        "DMA leases that an INVALIDATE has made stale, and mapped memory. A process has a\n"
        "monitor if it was started with XENMAPCACHE_MONITOR=1, or calls\n"
        "xenmapcache.observe.monitor.serve(cache). A stuck process answers, too.",
        "  XENMAPCACHE_MONITOR=1 ./my-device-model &\n"
        "  xenmapcache ps\n"
        "  xenmapcache ps --json | jq '.processes[] | select(.stale_dma > 0) | .pid'\n"
        "exit status: 0 if a process can be asked, 1 if none can",
    )


class _Sum(NamedTuple):
    """What all caches of a process hold; None if a part could not be read."""

    domids: list[int]
    leases: int | None
    stale_dma: int | None
    resident_bytes: int | None


def run(options: argparse.Namespace) -> int:
    """Print the processes. Returns 0 if there is one, else 1."""
    answers = ask_processes()
    if options.json:
        print_json({"processes": [*map(_values, answers)]})
    else:
        _print(answers)
    return 0 if answers else 1


def _values(answer: Answer) -> dict[str, object]:
    """Return a process as JSON has it."""
    values: dict[str, object] = {
        "pid": answer.pid,
        "socket": answer.path,
        "problem": answer.problem or None,
    }
    found = answer.snapshot
    if found is not None:
        values["command"] = found.argv
        values["uptime_ns"] = found.now_ns - found.started_ns
        values["caches"] = len(found.caches)
        values["servers"] = len(found.servers)
        values["omitted"] = found.omitted
        values |= _add_up(found)._asdict()
    return values


def _add_up(found: Snapshot) -> _Sum:
    domids = {each.domid for each in found.caches if each.domid is not None}
    domids |= {each.domid for each in found.servers}
    stats = [each.stats for each in found.caches if each.stats is not None]
    leases: int | None = sum(len(each.leases) + each.leases_omitted for each in found.caches)
    stale: int | None = sum(each.stale_dma_held for each in stats)
    resident: int | None = sum(each.resident_bytes for each in stats)
    if any(each.incomplete for each in found.caches):
        leases = None
    if len(stats) < len(found.caches):
        stale = resident = None
    return _Sum(sorted(domids), leases, stale, resident)


def _print(answers: tuple[Answer, ...]) -> None:
    if not answers:
        print_line(NONE)
        return
    print_line(_COLUMNS.format("PID", "DOMAIN", "UPTIME", "LEASES", "STALE", "MAPPED", "COMMAND"))
    for answer in answers:
        found = answer.snapshot
        if found is None:
            print_line(_COLUMNS.format(answer.pid, *"?????", "(does not answer)"))
            continue
        held = _add_up(found)
        print_line(
            _COLUMNS.format(
                answer.pid,
                _domains(held.domids),
                age(found.now_ns - found.started_ns),
                _count(held.leases),
                _count(held.stale_dma),
                "?" if held.resident_bytes is None else size(held.resident_bytes),
                cut(printable(found.argv), _COMMAND_WIDTH),
            )
        )


def _count(number: int | None) -> str:
    return "?" if number is None else str(number)


def _domains(domids: list[int]) -> str:
    """Return the domains of a process; ``-`` if it has none, and their number if they are many."""
    text = ",".join(map(str, domids)) or "-"
    return text if len(text) <= _DOMAIN_WIDTH else f"({len(domids)})"
