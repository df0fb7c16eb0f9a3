"""The backend of files that ``xl dump-core`` writes."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from typing import ClassVar

from ..address import PAGE_SIZE
from ..files.image import ImageFile
from ..files.pageindex import PageIndex
from ..files.runs import Run
from ..formats import xl_core
from ..formats.control_registers import ControlRegisters
from ..formats.elf_notes import Note
from ..formats.signatures import refuse_others
from .image import ImageBackend


class CoredumpBackend(ImageBackend):
    """The backend ``"coredump"``: a file that ``xl dump-core`` wrote.

    For PV guests the addresses are pseudo-physical. Pages are mapped from the file.

    Args:
        path: the file.
        salvage: open the intact part of a file that was cut off: pages whose frame numbers it
            has. They come last in the file, so little can be missing.

    Attributes:
        guest_type: ``"pv"`` or ``"hvm"``; PVH and Arm guests are ``"hvm"``, too.
        machine: ``"x86-64"``, ``"x86-32"`` or ``"arm"``.
        vcpus: how many the guest had.
        pages: how many are in the file.
        page_size: in bytes, always 4096.
        xen_version: for example ``"4.17.7"``; empty if the file does not say it.
        format_version: ``(major, minor)``.

    Raises:
        CorruptImageError: the file contradicts the format; the message names the place.
        WrongFormatError: it is of another known format; the message says which.
        ValueError: the path is not a regular file.
        OSError: the file cannot be opened.
    """

    name: ClassVar[str] = "coredump"

    def __init__(self, *, path: str | os.PathLike[str], salvage: bool = False) -> None:
        super().__init__(ImageFile(path))
        try:
            refuse_others(self._file, self.name, "a file of xl dump-core")
            found: list[str] = []
            core = xl_core.parse(self._file, salvage=salvage, warn=found.append)
            self._index = _index(self._file, core)
            self.warn(*found)
            self._core = core
        except BaseException:
            self.close()
            raise
        self.guest_type = core.guest_type
        self.machine = core.machine
        self.vcpus = core.vcpus
        self.page_size = core.page_size
        self.xen_version = core.xen_version
        self.format_version = core.format_version
        self.pages = len(self._index)
        self.memory_end = self._index.memory_end

    @property
    def notes(self) -> tuple[Note, ...]:
        """The vCPUs' registers as PRSTATUS notes, of x86-64 guests; read from the file each time.

        A vCPU whose registers are all zeros has none.
        """
        return tuple(xl_core.registers(self._file, self._core))

    def contexts(self) -> Iterator[tuple[int, bytes]]:
        """Return an iterator of ``(vcpu, context)``, one for each vCPU of an x86-64 guest.

        A context is Xen's ``vcpu_guest_context_t``, which has control registers, too.
        """
        return xl_core.contexts(self._file, self._core)

    def control_registers(self) -> tuple[ControlRegisters, ...]:
        """Return the vCPUs' control registers, of x86-64 guests but PV; read from the file."""
        return tuple(xl_core.control_registers(self._file, self._core))

    def runs(self, gfn: int, count: int) -> Iterator[Run]:
        """Yield the runs of a range of pages; see :meth:`ImageBackend.runs`."""
        return self._index.runs(gfn, count)

    def describe(self) -> dict[str, object]:
        """Return the notes; see :meth:`Backend.describe`."""
        return {
            "guest_type": self.guest_type,
            "machine": self.machine,
            "vcpus": self.vcpus,
            "pages": self.pages,
            "page_size": self.page_size,
            "xen_version": self.xen_version,
            "format_version": "{}.{}".format(*self.format_version),
        }


def _index(file: ImageFile, core: xl_core.XlCore) -> PageIndex:
    """Return where each page is. Offsets are kept only if padding separates pages."""
    gfns, start = array("Q"), core.pages.offset
    offsets: array[int] | None = None
    for some, offset in xl_core.frames(file, core):
        if offsets is None and offset != start + len(gfns) * PAGE_SIZE:
            offsets = array("Q", range(start, start + len(gfns) * PAGE_SIZE, PAGE_SIZE))
        if offsets is not None:
            offsets.extend(range(offset, offset + len(some) * PAGE_SIZE, PAGE_SIZE))
        gfns.extend(some)  # a sum would copy all of it for each chunk
    return PageIndex(gfns, offsets, start)
