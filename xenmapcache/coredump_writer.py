"""Writing a guest's memory as ``xl dump-core`` does."""

from __future__ import annotations

import os
import platform
import re
import struct
from array import array
from collections.abc import Callable, Iterator
from itertools import groupby

from .address import ADDRESS_LIMIT, PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, MiB, as_int, parse_size
from .atomicfile import new_file
from .backend import Backend
from .backends.coredump import (
    HEADER,
    MAGIC_HVM,
    NOTE_FORMAT_VERSION,
    NOTE_HEADER,
    NOTE_NONE,
    NOTE_XEN_VERSION,
    XEN_VERSION,
)
from .cache import MapCache
from .elf import EM_ARM, ET_CORE, MACHINES, SHT_NOTE, SHT_PROGBITS, SHT_STRTAB

Progress = Callable[[int, int], object]

_ELF_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_IDENT = b"\x7fELF\x02\x01\x01\0\x01".ljust(16, b"\0")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_PROGRAM_HEADER_SIZE = 56
_NOTE = struct.Struct("<III4s")
_XEN_VERSION_SIZE = 1280
_CONTEXT_SIZE = 5168
"""Of an x86-64 guest's vcpu_guest_context_t."""
_NAMES = ("", ".shstrtab", ".note.Xen", ".xen_prstatus", ".xen_pages", ".xen_pfn")
_STRINGS = b"".join(name.encode() + b"\0" for name in _NAMES)
_FORMAT_VERSION = 1
_PIECE = MiB
_ZEROS = bytes(PAGE_SIZE)


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

    Pages that are not there are left out; pages of zeros take no room on the disk. The file
    is there when it is complete: on an error or an interrupt nothing is left, and a file that
    was there before stays. Processors' registers are not known, and zeros in the file.

    A guest that runs meanwhile changes its memory: pause it for a dump that is consistent.

    Args:
        source: an open source of guest memory; of a cache, what its backend has now.
        path: of the file. It is readable by its owner only.
        length: how far to go, in bytes or as ``"4GiB"``; by default to the end of memory.
        vcpus: how many the guest has; by default as many as the source knows of, or 1.
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
    if isinstance(source, MapCache):
        list(source.present(0, 0))  # raises if it is closed
        source = source.backend
    if not isinstance(source, Backend):
        raise TypeError(f"source must be a Backend or a MapCache, not {type(source).__name__}")
    end = source.memory_end if length is None else parse_size(length)
    if end is None:
        raise ValueError("this source does not know where its memory ends: give a length")
    if end > ADDRESS_LIMIT:
        raise ValueError(f"length {end:#x} is beyond a 52-bit address space, {ADDRESS_LIMIT:#x}")
    vcpus = _vcpus(source) if vcpus is None else as_int("vcpus", vcpus)
    if not 0 < vcpus <= 1 << 16:
        raise ValueError(f"vcpus {vcpus} is no number of processors")
    xen = _version(xen_version or getattr(source, "xen_version", "") or "0.0")
    number = _machine(machine or getattr(source, "machine", "") or _this_machine())
    with new_file(path) as fd:
        layout = _Layout(vcpus, xen, number)
        pages = _write_pages(source, fd, layout.pages, end, progress)
        layout.write(fd, pages)
    return len(pages)


class _Layout:
    """Where things lie. All but the pages' number is known before the first page is."""

    def __init__(self, vcpus: int, xen: tuple[int, int, bytes], machine: int) -> None:
        self.vcpus = vcpus
        self.machine = machine
        self.xen = XEN_VERSION.pack(*xen).ljust(_XEN_VERSION_SIZE, b"\0")
        # Arm's contexts are of another size, and there is nothing to put into them.
        self.contexts = 0 if machine == EM_ARM else vcpus * _CONTEXT_SIZE
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
            (SHT_PROGBITS, self.status, self.contexts, 8, _CONTEXT_SIZE),
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
        _write(fd, memoryview(head + notes), 0)
        _write(fd, memoryview(gfns).cast("B"), table)
        _write(fd, memoryview(_STRINGS), strings)


def _write_pages(
    source: Backend, fd: int, offset: int, end: int, progress: Progress | None
) -> array[int]:
    """Write what is there below an address, and return its frame numbers."""
    gfns = array("Q")
    for gfn, count in _pieces(source, end + PAGE_MASK >> PAGE_SHIFT):
        if progress is not None:
            progress(min(gfn << PAGE_SHIFT, end), end)
        mapping = source.map(gfn, count, writable=False)
        errors = mapping.errors or bytes(count)
        first = 0
        for bad, group in groupby(errors, bool):
            stop = first + len(list(group))
            if not bad:
                # A copy: the guest may change a page between a look at it and the write.
                data = mapping.memory[first << PAGE_SHIFT : stop << PAGE_SHIFT]
                _write_but_zeros(fd, data, offset + (len(gfns) << PAGE_SHIFT))
                gfns.extend(range(gfn + first, gfn + stop))
            first = stop
        del mapping
    if progress is not None:
        progress(end, end)
    return gfns


def _pieces(source: Backend, end: int) -> Iterator[tuple[int, int]]:
    """Yield ``(gfn, pages)`` of pieces that are worth mapping."""
    step = _PIECE >> PAGE_SHIFT
    known = source.present(0, end) if end else ()
    for first, pages in ((0, end),) if known is None else known:
        for gfn in range(first, first + pages, step):
            yield gfn, min(step, first + pages - gfn)


def _write_but_zeros(fd: int, data: bytes, offset: int) -> None:
    """Write pages, and leave a gap in the file where they are zeros."""
    view = memoryview(data)
    start: int | None = None
    for position in range(0, len(data), PAGE_SIZE):
        if data.startswith(_ZEROS, position):
            if start is not None:
                _write(fd, view[start:position], offset + start)
                start = None
        elif start is None:
            start = position
    if start is not None:
        _write(fd, view[start:], offset + start)


def _write(fd: int, data: memoryview, offset: int) -> None:
    while len(data):
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


def _vcpus(source: Backend) -> int:
    known = getattr(source, "vcpus", None) or getattr(
        getattr(source, "domain", None), "vcpus", None
    )
    return known if isinstance(known, int) else 1


def _version(text: str) -> tuple[int, int, bytes]:
    match = re.match(r"(\d+)\.(\d+)", text)
    extra = text[match.end() :].encode() if match else b""
    if match is None or len(extra) > 15:
        raise ValueError(f"xen_version {text!r} is none such as '4.17' or '4.17.7'")
    return int(match[1]), int(match[2]), extra


def _this_machine() -> str:
    return "arm" if platform.machine() in ("aarch64", "armv7l") else "x86-64"


def _machine(name: str) -> int:
    numbers = {name: number for number, name in reversed(MACHINES.items())}
    if name not in numbers:
        raise ValueError(f"machine {name!r} is none of {', '.join(numbers)}")
    return numbers[name]
