"""The backend of ELF cores whose segments have physical addresses: kdump's, QEMU's."""

from __future__ import annotations

import os
from typing import ClassVar

from ..files.image import ImageFile
from ..formats.elf import MACHINES
from ..formats.elf_core import parse
from ..formats.elf_notes import Note
from ..formats.signatures import refuse_others
from .image import SpanBackend

__all__ = ["ElfCoreBackend", "Note"]

_MAX_VMCOREINFO_BYTES = 1 << 16
"""The kernel's has at most a page."""


class ElfCoreBackend(SpanBackend):
    """The backend ``"elfcore"``: ELF cores with physical addresses, as kdump and QEMU write them.

    ELF64 and ELF32, little-endian. Where segments overlap, the first one in the file counts.
    A page exists if the file has a part of it; the rest of the page reads as zeros. A part of the
    file that is damaged is left out, with a WARNING.

    Args:
        path: the file.
        salvage: open the intact part of a file that was cut off.
        zeros: treat memory that a segment has and the file has not (p_filesz < p_memsz) as
            zeros. makedumpfile leaves out pages of zeros so. By default it is a hole.

    Attributes:
        bits: 64 or 32.
        machine: ``"x86-64"``, ``"x86-32"`` or ``"arm"``; others by number.
        notes: a tuple of :class:`Note`, in the file's order.

    Raises:
        CorruptImageError: the file contradicts the format, has no physical memory, or was cut off.
        WrongFormatError: it is big-endian, or of another known format.
        ValueError: the path is not a regular file.
        OSError: the file cannot be opened.
    """

    name: ClassVar[str] = "elfcore"

    def __init__(
        self, *, path: str | os.PathLike[str], salvage: bool = False, zeros: bool = False
    ) -> None:
        super().__init__(ImageFile(path))
        try:
            refuse_others(self._file, self.name, "ELF")
            found: list[str] = []
            core = parse(self._file, salvage=salvage, zeros=zeros, warn=found.append)
            self.bits = core.elf.bits
            self.machine = MACHINES.get(core.elf.machine, f"ELF machine {core.elf.machine}")
            self.notes = core.notes
            self._left_out = 0 if zeros else core.left_out
            self._take(core.spans, "no segment has memory in the file")
            self.warn(*found)
        except BaseException:
            self.close()
            raise

    def describe(self) -> dict[str, object]:
        """Return what the headers and notes say; see :meth:`Backend.describe`."""
        known: dict[str, object] = {"bits": self.bits, "machine": self.machine}
        known["notes"] = [
            {"name": note.name, "type": note.note_type, "size": len(note.data)}
            for note in self.notes
        ]
        for note in self.notes:
            if note.name == "VMCOREINFO" and len(note.data) <= _MAX_VMCOREINFO_BYTES:
                known["vmcoreinfo"] = note.data.rstrip(b"\0").decode("utf-8", "replace")
        if self._left_out:
            known["left_out_bytes"] = self._left_out
        return known | super().describe()
