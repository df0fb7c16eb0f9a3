"""Writing a guest's memory as ``xl dump-core`` does."""

from __future__ import annotations

import os
import re
import struct
from array import array

from ..address import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, as_int
from ..backend import Backend
from ..cache import MapCache
from ..files.atomic import new_file
from ..formats.elf import EM_ARM, ET_CORE, MACHINES, SHT_NOTE, SHT_PROGBITS, SHT_STRTAB
from ..formats.prstatus import CONTEXT_SIZE
from ..formats.xl_core import (
    HEADER,
    MAGIC_HVM,
    NOTE_FORMAT_VERSION,
    NOTE_HEADER,
    NOTE_NONE,
    NOTE_XEN_VERSION,
    XEN_VERSION,
)
from .guest import Guest, Progress
from .sparse import write_all, write_but_zeros

_ELF_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_IDENT = b"\x7fELF\x02\x01\x01\0\x01".ljust(16, b"\0")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_PROGRAM_HEADER_SIZE = 56
_NOTE = struct.Struct("<III4s")
_XEN_VERSION_SIZE = 1280
_NAMES = ("", ".shstrtab", ".note.Xen", ".xen_prstatus", ".xen_pages", ".xen_pfn")
_STRINGS = b"".join(name.encode() + b"\0" for name in _NAMES)
_FORMAT_VERSION = 1


def write_coredump(
    source: Backend | MapCache,
    path: str | os.PathLike[str],
    *,
    length: int | str | None = None,
    vcpus: int | None = None,
    xen_version: str | None = None,
    machine: str | None = None,
    progress: Progress | None = None,
) -> int:
    """Write a guest's memory to a file as ``xl dump-core`` writes an HVM or PVH guest's.

    Missing pages are left out; pages of zeros take no room on the disk. The file appears
    when it is complete. On an error or an interrupt no part of it is left, and an existing file
    stays. Processors' registers are unknown, and zeros in the file.

    A guest that runs during the dump changes its memory; pause it for a consistent dump.

    Args:
        source: an open source of guest memory. Of a cache, the pages that its backend has now are
            written, and mapped within its ``max_resident``.
        path: of the file. It is readable by its owner only.
        length: how far to go, in bytes or as ``"4GiB"``; by default to the end of memory.
        vcpus: how many the guest has; by default the source's number, or 1.
        xen_version: for example ``"4.17.7"``; by default the source's, or ``"0.0"``.
        machine: ``"x86-64"`` or ``"arm"``; by default the source's, or this machine's.
        progress: called as ``progress(done, total)``, in bytes of guest addresses.

    Returns:
        How many pages are in the file.

    Raises:
        TypeError, ValueError: an argument is wrong, or the source does not know its end and
            no length is given.
        OSError: the file cannot be written.
        XenMapCacheError: as mapping the source raises.
    """
    guest = Guest(source, length)
    backend = guest.backend
    vcpus = _vcpus(backend) if vcpus is None else as_int("vcpus", vcpus)
    if not 0 < vcpus <= 1 << 16:
        raise ValueError(f"vcpus must be 1 to 65536, not {vcpus}")
    xen = _version(xen_version or getattr(backend, "xen_version", "") or "0.0")
    number = _machine(guest.machine(machine))
    with new_file(path) as fd:
        layout = _Layout(vcpus, xen, number)
        pages = _write_pages(guest, fd, layout.pages, progress)
        layout.write(fd, pages)
    return len(pages)


class _Layout:
    """Where things lie. All but the pages' number is known before the first page is."""

    def __init__(self, vcpus: int, xen: tuple[int, int, bytes], machine: int) -> None:
        self.vcpus = vcpus
        self.machine = machine
        self.xen = XEN_VERSION.pack(*xen).ljust(_XEN_VERSION_SIZE, b"\0")
        # Arm's contexts are of another size, and there is nothing to put into them.
        self.contexts = 0 if machine == EM_ARM else vcpus * CONTEXT_SIZE
        self.notes = _ELF_HEADER.size + len(_NAMES) * _SECTION.size
        self.status = self.notes + len(self._notes(0))
        self.pages = self.status + self.contexts + PAGE_MASK & ~PAGE_MASK

    def _notes(self, pages: int) -> bytes:
        header = HEADER.pack(MAGIC_HVM, self.vcpus, pages, PAGE_SIZE)
        return b"".join(
            _NOTE.pack(4, len(data), kind, b"Xen") + data
            for kind, data in (
                (NOTE_NONE, b""),
                (NOTE_HEADER, header),
                (NOTE_XEN_VERSION, self.xen),
                (NOTE_FORMAT_VERSION, _FORMAT_VERSION.to_bytes(8, "little")),
            )
        )

    def write(self, fd: int, gfns: array[int]) -> None:
        """Write all but the pages."""
        pages = len(gfns)
        table = self.pages + (pages << PAGE_SHIFT)
        strings = table + 8 * pages
        notes = self._notes(pages)
        # Volatility takes a name's place among the names for its section's number.
        parts = (
            (0, 0, 0, 0, 0),
            (SHT_STRTAB, strings, len(_STRINGS), 0, 0),
            (SHT_NOTE, self.notes, len(notes), 0, 0),
            (SHT_PROGBITS, self.status, self.contexts, 8, CONTEXT_SIZE),
            (SHT_PROGBITS, self.pages, pages << PAGE_SHIFT, PAGE_SIZE, PAGE_SIZE),
            (SHT_PROGBITS, table, 8 * pages, 8, 8),
        )
        head = _ELF_HEADER.pack(
            _IDENT, ET_CORE, self.machine, 1, 0, 0, _ELF_HEADER.size, 0, _ELF_HEADER.size,
            _PROGRAM_HEADER_SIZE, 0, _SECTION.size, len(_NAMES), _NAMES.index(".shstrtab"),
        )  # fmt: skip
        position = 0
        for name, (kind, offset, size, alignment, entry) in zip(_NAMES, parts, strict=True):
            head += _SECTION.pack(position, kind, 0, 0, offset, size, 0, 0, alignment, entry)
            position += len(name) + 1
        write_all(fd, head + notes, 0)
        write_all(fd, memoryview(gfns).cast("B"), table)
        write_all(fd, _STRINGS, strings)


def _write_pages(guest: Guest, fd: int, offset: int, progress: Progress | None) -> array[int]:
    """Write the pages that exist, and return their frame numbers."""
    gfns = array("Q")
    for gfn, data in guest.pages(progress):
        write_but_zeros(fd, data, offset + (len(gfns) << PAGE_SHIFT))
        gfns.extend(range(gfn, gfn + (len(data) >> PAGE_SHIFT)))
    return gfns


def _vcpus(source: Backend) -> int:
    known = getattr(source, "vcpus", None) or getattr(
        getattr(source, "domain", None), "vcpus", None
    )
    return known if isinstance(known, int) else 1


def _version(text: str) -> tuple[int, int, bytes]:
    match = re.match(r"(\d+)\.(\d+)", text)
    extra = text[match.end() :].encode() if match else b""
    if match is None or len(extra) > 15:
        raise ValueError(f"xen_version must look like '4.17' or '4.17.7', not {text!r}")
    return int(match[1]), int(match[2]), extra


def _machine(name: str) -> int:
    numbers = {name: number for number, name in reversed(MACHINES.items())}
    if name not in numbers:
        raise ValueError(f"machine must be one of {', '.join(numbers)}, not {name!r}")
    return numbers[name]
