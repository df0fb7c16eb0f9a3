"""Who holds guests' memory in this domain: processes with mappings of Xen's device nodes.

The kernel says in ``/proc/PID/maps`` which node a mapping came from and how large it is, but not
of which domain. QEMU's command line names the domain; of other programs it is not known.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from .xl import xl_list

PROC = Path("/proc")

_NODES = {
    f"{folder}/{name}".encode(): name
    for folder in ("/dev/xen", "/proc/xen")
    for name in ("privcmd", "gntdev", "foreignmemory")
}
"""Mappings of these show other domains' pages. What privcmd-buf and gntalloc map is this one's."""
_HINT = b"/xen/"
_DELETED = b" (deleted)"
_FIELDS_BEFORE_PATH = 5
_MAX_ARGUMENTS = 1 << 16
"""How much of a command line is read, in bytes."""
_DOMID_DIGITS = 5


class Hold(NamedTuple):
    """What a process holds through one node.

    Attributes:
        device: ``privcmd`` (foreign memory), ``gntdev`` (grants) or ``foreignmemory``.
        mappings: how many the kernel lists.
        bytes: their size; of pages that were never there, too.
        descriptors: how many are open; None if that cannot be read.
    """

    device: str
    mappings: int
    bytes: int
    descriptors: int | None


class Holder(NamedTuple):
    """A process that has mapped or opened one of the nodes.

    Attributes:
        pid: of the process.
        name: as the kernel has it, at most 15 bytes; the process chooses it.
        domid: the domain that QEMU's command line names, or None.
        holds: one for each node.
    """

    pid: int
    name: str
    domid: int | None
    holds: tuple[Hold, ...]

    @property
    def keeps(self) -> bool:
        """Whether it has a mapping, and so keeps pages of a domain."""
        return any(hold.mappings for hold in self.holds)


class Holders(NamedTuple):
    """All processes with foreign memory that this user can see.

    Attributes:
        holders: by their numbers.
        unreadable: how many processes this user may not look at.
    """

    holders: tuple[Holder, ...]
    unreadable: int


class Dying(NamedTuple):
    """A domain that was destroyed, and lives until its last page is unmapped.

    Attributes:
        domid: of the domain.
        name: as xl has it, mostly ``(null)``.
        pids: processes that may keep it: those with mappings whose domain is this one or unknown.
    """

    domid: int
    name: str
    pids: tuple[int, ...]


def find_holders(proc: Path | None = None) -> Holders:
    """Look at all processes. Those that end before they are read are left out.

    Args:
        proc: the folder of processes; by default ``/proc``.

    Raises:
        OSError: the folder cannot be read.
    """
    proc = PROC if proc is None else proc
    found, unreadable = [], 0
    names = [each.name for each in proc.iterdir()]
    pids = sorted(int(name) for name in names if name.isascii() and name.isdecimal())
    for pid in pids:
        try:
            holder = _look(pid, proc / str(pid))
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
        except OSError:
            unreadable += 1
            continue
        if holder is not None:
            found.append(holder)
    return Holders(tuple(found), unreadable)


def find_dying(holders: Holders) -> tuple[tuple[Dying, ...], str]:
    """Return the dying domains and who may keep them; and why xl says nothing, if so."""
    rows, problem = xl_list()
    dying = []
    for name, domid, state in rows:
        if "d" in state and domid > 0:
            keep = [
                each.pid for each in holders.holders if each.keeps and each.domid in (None, domid)
            ]
            dying.append(Dying(domid, name, tuple(keep)))
    return tuple(dying), problem


def _look(pid: int, folder: Path) -> Holder | None:
    """Return what a process holds, or None."""
    mapped: dict[str, tuple[int, int]] = {}
    with (folder / "maps").open("rb") as maps:
        for line in maps:  # one by one: a process may have millions
            for device, length in _mapping(line):
                count, total = mapped.get(device, (0, 0))
                mapped[device] = count + 1, total + length
    opened = _descriptors(folder)
    devices = sorted(mapped.keys() | (opened or {}).keys())
    if not devices:
        return None
    holds = [
        Hold(
            device,
            *mapped.get(device, (0, 0)),
            None if opened is None else opened.get(device, 0),
        )
        for device in devices
    ]
    name = os.fsdecode((folder / "comm").read_bytes().rstrip(b"\n"))
    return Holder(pid, name, _domid(folder), tuple(holds))


def _mapping(line: bytes) -> Iterator[tuple[str, int]]:
    """Yield ``(device, bytes)`` if a line of ``maps`` is a mapping of a node."""
    if _HINT not in line:  # nearly all lines
        return
    fields = line.split(maxsplit=_FIELDS_BEFORE_PATH)
    device = _device(fields[-1].rstrip(b"\n"))
    if device is not None:
        first, _, end = fields[0].partition(b"-")
        with suppress(ValueError):  # the kernel writes other lines
            yield device, int(end, 16) - int(first, 16)


def _device(path: bytes) -> str | None:
    return _NODES.get(path.removesuffix(_DELETED))


def _descriptors(folder: Path) -> dict[str, int] | None:
    """Return how many descriptors of each node a process has; None if this user may not look."""
    count: dict[str, int] = {}
    try:
        for entry in (folder / "fd").iterdir():
            with suppress(FileNotFoundError):  # it has been closed
                device = _device(os.fsencode(entry.readlink()))
                if device is not None:
                    count[device] = count.get(device, 0) + 1
    except PermissionError:
        return None
    return count


def _domid(folder: Path) -> int | None:
    """Return the domain that QEMU's command line names (``-xen-domid N``), or None."""
    try:
        with (folder / "cmdline").open("rb") as file:
            words = file.read(_MAX_ARGUMENTS).split(b"\0")
    except PermissionError:
        return None
    for option, value in pairwise(words):
        if option == b"-xen-domid" and value.isdigit() and len(value) <= _DOMID_DIGITS:
            return int(value)
    return None
