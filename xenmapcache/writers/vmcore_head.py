"""What comes before the pages of an ELF core: the ELF header, the segments' headers, the notes."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain

from ..address import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE
from ..formats import vmcoreinfo
from ..formats.elf import EM_386, EM_AARCH64, EM_X86_64, ET_CORE, PN_XNUM, PT_LOAD, PT_NOTE
from ..formats.elf_notes import Note

MACHINES = {"x86-64": EM_X86_64, "x86-32": EM_386, "arm": EM_AARCH64}
"""The ELF machine of each machine of which a core can be written."""

Segments = Iterable[tuple[int, int, int]]
"""Of each segment of memory ``(gfn, pages, number)``; the number is that of its first page in the
file, where the pages lie one after the other."""

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_IDENT = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
_PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")
_SECTION_HEADER = struct.Struct("<IIQQQQIIQQ")
_NOTE = struct.Struct("<III")
_READABLE = 4
"""PF_R."""
_NO_ALIGNMENT = 0
"""p_align of segments of memory. With another one, crash treats the file as a netdump's."""
_CHUNK_RUNS = 4096


class Head:
    """What comes before the pages of an ELF core.

    The headers come first, because makedumpfile looks for them only after the ELF header, and
    crash for notes only before the first page.

    Args:
        machine: one of :data:`MACHINES`.
        notes: of the source.
        runs: for how many segments of memory there is to be room.

    Attributes:
        start: where the pages begin in the file, in bytes; a multiple of a page's size.
        described: whether there is a VMCOREINFO note.
    """

    def __init__(self, machine: str, notes: Sequence[Note], runs: int) -> None:
        self._machine = MACHINES[machine]
        self._notes = b"".join(map(_packed, notes))
        self.described = any(note.name == vmcoreinfo.NOTE_NAME for note in notes)
        room = 0 if self.described else len(_vmcoreinfo_note("")) + PAGE_SIZE
        self.start = self.size(runs) + room + PAGE_MASK & ~PAGE_MASK

    def describe(self, info: vmcoreinfo.VmcoreInfo) -> None:
        """Add a VMCOREINFO note. Without one, there is room for it."""
        self._notes += _vmcoreinfo_note(info.text)
        self.described = True

    def size(self, runs: int) -> int:
        """Return how many bytes come before the pages with `runs` segments of memory."""
        size = _HEADER.size + (runs + 1) * _PROGRAM_HEADER.size
        if runs + 1 >= PN_XNUM:
            size += _SECTION_HEADER.size
        return size + len(self._notes)

    def chunks(self, segments: Callable[[], Segments]) -> Iterator[bytes]:
        """Yield headers and notes, some at a time.

        Args:
            segments: returns the segments of memory; called twice.
        """
        count = 1 + sum(1 for _ in segments())
        many = count >= PN_XNUM  # then the first section header has the number
        notes = _HEADER.size + count * _PROGRAM_HEADER.size
        section = b""
        if many:
            section = _SECTION_HEADER.pack(0, 0, 0, 0, 0, 0, 0, count, 0, 0)
        head = _HEADER.pack(
            _IDENT, ET_CORE, self._machine, 1, 0, _HEADER.size, notes if many else 0, 0,
            _HEADER.size, _PROGRAM_HEADER.size, PN_XNUM if many else count,
            len(section), int(many), 0,
        )  # fmt: skip
        size = len(self._notes)
        head += _PROGRAM_HEADER.pack(PT_NOTE, 0, notes + len(section), 0, 0, size, size, 4)
        return chain([head], self._headers(segments()), [section + self._notes])

    def _headers(self, segments: Segments) -> Iterator[bytes]:
        """Yield the headers of all segments of memory, some at a time."""
        chunk = bytearray()
        for gfn, count, number in segments:
            address, size = gfn << PAGE_SHIFT, count << PAGE_SHIFT
            offset = self.start + (number << PAGE_SHIFT)
            chunk += _PROGRAM_HEADER.pack(
                PT_LOAD, _READABLE, offset, address, address, size, size, _NO_ALIGNMENT
            )
            if len(chunk) >= _CHUNK_RUNS * _PROGRAM_HEADER.size:
                yield bytes(chunk)
                chunk.clear()
        yield bytes(chunk)


def _vmcoreinfo_note(text: str) -> bytes:
    return _packed(Note(vmcoreinfo.NOTE_NAME, 0, text.encode()))


def _packed(note: Note) -> bytes:
    """Return a note's bytes, with name and data padded to 4 bytes."""
    name = note.name.encode() + b"\0"
    header = _NOTE.pack(len(name), len(note.data), note.note_type)
    return header + name + bytes(-len(name) & 3) + note.data + bytes(-len(note.data) & 3)
