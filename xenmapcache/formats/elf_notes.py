"""Notes of ELF files: who wrote the file, what its CPUs held, what its kernel says of itself.

A note may be damaged, and segments of notes may overlap on purpose. So all notes of a file together
have a limit, in bytes and in number.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from .content import Content
from .spans import Warn

_NOTE = struct.Struct("<III")
_MAX_NOTE_BYTES = 1 << 24  # each processor has some, and there are machines with thousands
_MAX_NOTES = 1 << 16


class Note(NamedTuple):
    """A note of an ELF file. Immutable.

    Attributes:
        name: who defined it: ``"CORE"``, ``"QEMU"``, ``"VMCOREINFO"``.
        note_type: a number whose meaning depends on the name.
        data: the bytes of its description.
    """

    name: str
    note_type: int
    data: bytes


class NoteError(Exception):
    """A note cannot be read; the message names the place."""


class Damage:
    """What is wrong with a kind of parts of a file: the first case, and how many there are."""

    def __init__(self) -> None:
        self.count = 0
        self._first = ""

    def add(self, text: str) -> None:
        """Note a case."""
        self.count += 1
        self._first = self._first or text

    def __str__(self) -> str:
        return self._first + (f" (and {self.count - 1} more)" if self.count > 1 else "")

    def report(self, warn: Warn) -> None:
        """Warn of all cases at once, if there are any."""
        if self.count:
            warn(str(self))


def notes_in(content: Content, place: str, offset: int, size: int) -> Iterator[Note | None]:
    """Yield the notes of a range of a file; None for a note that is all zeros.

    Args:
        content: the file's bytes.
        place: what the range is called in messages.
        offset: of the range, in bytes.
        size: of the range, in bytes; it lies inside the file.

    Raises:
        NoteError: a note ends beyond the range.
    """
    data = content.read(offset, size) if size else b""
    position = 0
    while position + _NOTE.size <= len(data):
        name_size, size, note_type = _NOTE.unpack_from(data, position)
        name = position + _NOTE.size
        start = name + (name_size + 3 & ~3)
        if start + size > len(data):
            raise NoteError(
                f"the note at {offset + position:#x} ends beyond {place}, "
                f"at {offset + len(data):#x}"
            )
        if name_size or size or note_type:
            text = data[name : name + name_size].rstrip(b"\0").decode("ascii", "replace")
            yield Note(text, note_type, data[start : start + size])
        else:
            yield None
        position = start + (size + 3 & ~3)


def segment_notes(
    content: Content, headers: Iterable[tuple[int, int, int, int, int, int]], warn: Warn
) -> Iterator[Note]:
    """Yield the notes of segments, in their order.

    Each segment ends at a note that is all zeros: a kernel reserves more room than it uses.
    A damaged note costs the rest of its segment. All segments together give at most 16 MiB
    and 65,536 notes, and not more bytes than the file has.

    Args:
        content: the file's bytes.
        headers: of the segments, as :meth:`.Elf.headers` yields them.
        warn: called once if notes are damaged or left out.
    """
    damage = Damage()
    room = most = min(_MAX_NOTE_BYTES, content.size)
    notes = _MAX_NOTES
    for number, offset, _, _, size, _ in headers:
        usable = max(0, min(size, content.size - offset, room))
        room -= usable
        if usable < size:
            damage.add(
                f"notes are missing: those of segment {number} are "
                f"{offset:#x}..{offset + size:#x}; the file ends at {content.size:#x}, "
                f"and of all notes together at most {most:#x} bytes are read"
            )
        try:
            for note in notes_in(content, f"segment {number}", offset, usable):
                if note is None:
                    break
                if not notes:
                    damage.add(f"notes are missing: at most {_MAX_NOTES} are read")
                    damage.report(warn)
                    return
                notes -= 1
                yield note
        except NoteError as error:
            if usable == size:
                damage.add(f"{error}: it is missing, and what follows it there")
    damage.report(warn)
