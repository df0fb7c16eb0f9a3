"""The backend of KDUMP files, the compressed format of makedumpfile and QEMU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import ClassVar, Final, NamedTuple

from ..address import PAGE_SHIFT
from ..errors import CorruptImageError, UnsupportedOperationError
from ..files.image import ImageFile
from ..files.runs import Run
from ..formats import flattened, kdump
from ..formats.content import Content, reason, start_of
from ..formats.elf_notes import Note
from ..formats.pagebitmap import PageBitmap
from ..formats.signatures import refuse_others
from ..formats.spans import SALVAGE
from ..formats.unpacking import PageError, Unpack, unpacker
from .image import ImageBackend

_MACHINES: Final = {"x86_64": "x86-64", "aarch64": "arm"}
_BATCH_PAGES: Final = 256
"""Pages that are unpacked at once; those of 1 MiB."""
_SCAN_PAGES: Final = 1 << 10
"""Pages whose descriptors are looked at together, without their data."""
_MAX_GAP_BYTES: Final = 1 << 14
_ZEROS: Final = -1
"""The offset of a run of which the file has nothing."""


class _Stored(NamedTuple):
    """A page as it is in the file. Immutable."""

    offset: int
    size: int
    flags: int


class KdumpBackend(ImageBackend):
    """The backend ``"kdump"``: a dump in makedumpfile's compressed format, or a flattened one.

    makedumpfile and QEMU write it: versions 1 to 6, of machines with 64 bits, little-endian.
    Pages are unpacked when they are mapped, into memory of this process. zlib needs nothing
    else; the other compressions need a package: snappy ``cramjam``, zstd ``zstandard`` (both
    come with the extra ``kdump``) and lzo ``python-lzo`` (the extra ``lzo``). A page that
    makedumpfile has left out does not exist.

    Args:
        path: the file.
        salvage: open an unfinished dump too. The pages that it lacks do not exist, and a
            warning counts them.
        zeros: treat pages that the machine had, and that makedumpfile has left out, as zeros. By
            default they are holes: the file does not say what they had.

    Attributes:
        bits: always 64.
        machine: ``"x86-64"`` or ``"arm"``; others as ``uname -m`` prints them.
        release: of the kernel, as ``uname -r`` prints it; empty if QEMU wrote the file.
        header_version: of the format, 1 to 6.
        compression: ``"zlib"``, ``"lzo"``, ``"snappy"``, ``"zstd"`` or ``"none"``.
        dump_level: which pages makedumpfile left out: its option ``-d``.
        pages: how many are in the file.
        lost: how many of them an unfinished dump lacks.
        notes: a tuple of :class:`.Note`, in the file's order.

    Raises:
        CorruptImageError: the file contradicts the format, or is unfinished.
        UnsupportedOperationError: it is a part of a split dump, of 32 bits, big-endian, of
            pages that are not 4096 bytes, or flattened and no KDUMP.
        BackendUnavailableError: the package for its compression is not installed.
        ValueError: the path is not a regular file.
        OSError: the file cannot be opened.
    """

    name: ClassVar[str] = "kdump"
    _maps_file: ClassVar[bool] = False

    def __init__(
        self, *, path: str | os.PathLike[str], salvage: bool = False, zeros: bool = False
    ) -> None:
        super().__init__(ImageFile(path))
        try:
            self._open(salvage)
            self._find_left_out(zeros)
        except BaseException:
            self.close()
            raise

    def _open(self, salvage: bool) -> None:
        content: Content = self._file
        unfinished = ""
        if start_of(content, len(flattened.MAGIC)) == flattened.MAGIC:
            content = flattened.Flattened(self._file)
            unfinished = content.unfinished
            _refuse_other_flattened(content)
        else:
            refuse_others(self._file, self.name, "a KDUMP file")
        self._content = content
        self._header = header = kdump.read_header(content)
        self._bitmap = PageBitmap(content, header.bitmap, header.pages)
        self.bits = 64
        self.machine = _MACHINES.get(header.machine, header.machine)
        self.release = header.release
        self.header_version = header.version
        self.dump_level = header.dump_level
        self.pages = len(self._bitmap)
        self.memory_end = self._bitmap.end << PAGE_SHIFT
        if not self.pages:
            raise CorruptImageError(f"{self.path} has no pages")
        used = [flag for flag in kdump.COMPRESSIONS if flag & header.status]
        self.compression = ", ".join(kdump.COMPRESSIONS[flag] for flag in used) or "none"
        for flag in used:
            unpacker(flag, self.path)  # rather now than at the first page
        self.lost = 0
        if salvage:
            self._count_lost()
        else:
            if not unfinished and header.status & kdump.INCOMPLETE:
                unfinished = "its header says so"
            self._refuse_unfinished(unfinished)
        self._read_notes()

    def _find_left_out(self, zeros: bool) -> None:
        """Find out which pages makedumpfile has left out."""
        header = self._header
        self._machine: PageBitmap | None = None
        self._left_out = 0
        if header.machine_bitmap == header.bitmap:
            return
        machine = PageBitmap(self._content, header.machine_bitmap, header.pages)
        if zeros:
            self._machine = machine
            self.memory_end = max(self._bitmap.end, machine.end) << PAGE_SHIFT
        else:
            self._left_out = max(0, len(machine) - self.pages) << PAGE_SHIFT

    def _refuse_unfinished(self, reason: str) -> None:
        """Raise an error if the dump is unfinished, as far as its end shows that."""
        end = self._header.descriptors + self.pages * kdump.DESCRIPTOR.size
        if not reason and end > self._content.size:
            reason = (
                f"its page descriptors are {self._header.descriptors:#x}..{end:#x}, but the file "
                f"ends at {self._content.size:#x}"
            )
        if not reason:
            reason = self._fault_at_end()
        if reason:
            raise CorruptImageError(f"{self.path} is an unfinished dump: {reason}; {SALVAGE}")

    def _fault_at_end(self) -> str:
        """Return what is wrong with the last pages in the file; empty if nothing is.

        Pages of zeros share one place in the file. So this looks back to the last page that has
        one of its own: it is the last one that was written.
        """
        rank = self.pages
        last = self._read_descriptors(rank - 1, 1)
        fault = self._fault_of(next(_stored(last)))
        if fault:
            return f"its last page {fault}"
        while rank:
            first = max(0, rank - _SCAN_PAGES)
            data = self._read_descriptors(first, rank - first)
            if data != last * (rank - first):
                for number, stored in enumerate(_stored(data), first):
                    fault = self._fault_of(stored)
                    if fault:
                        return f"page {number} of the {self.pages} in it {fault}"
                break
            rank = first
        return ""

    def _count_lost(self) -> None:
        intact = 0
        for first in range(0, self.pages, _SCAN_PAGES):
            count = min(_SCAN_PAGES, self.pages - first)
            intact += sum(pages for _, pages in self._intact(first, count))
        self.lost = self.pages - intact
        if not intact:
            raise CorruptImageError(f"{self.path} is an unfinished dump: no page of it is intact")
        if self.lost:
            self.warn(
                f"is an unfinished dump: {self.lost} of its {self.pages} pages are missing, and "
                "are holes because of that"
            )

    def _read_notes(self) -> None:
        """Read notes and VMCOREINFO. Damage costs only these, as memory is what people want."""
        notes: list[Note] = []
        vmcoreinfo = None
        try:
            for note in kdump.notes(self._content, self._header):
                notes.append(note)  # noqa: PERF402 - those in front of a damaged one are kept
        except CorruptImageError as error:
            self.warn(f"notes are left out: {reason(self._content, error)}")
        self.notes = tuple(notes)
        try:
            vmcoreinfo = kdump.read_vmcoreinfo(self._content, self._header)
        except CorruptImageError as error:
            self.warn(f"VMCOREINFO is left out: {reason(self._content, error)}")
        self._vmcoreinfo = self._vmcoreinfo_of_notes() if vmcoreinfo is None else vmcoreinfo

    def describe(self) -> dict[str, object]:
        """Return what the headers and notes say; see :meth:`Backend.describe`."""
        known: dict[str, object] = {
            "bits": self.bits,
            "machine": self.machine,
            "header_version": self.header_version,
            "compression": self.compression,
            "dump_level": self.dump_level,
            "pages": self.pages - self.lost,
        }
        if self.release:
            known["release"] = self.release
        if self.lost:
            known["lost_pages"] = self.lost
        if self._left_out:
            known["left_out_bytes"] = self._left_out
        known["notes"] = [
            {"name": note.name, "type": note.note_type, "size": len(note.data)}
            for note in self.notes
        ]
        if self._vmcoreinfo is not None:
            known["vmcoreinfo"] = self._vmcoreinfo
        return known

    def _vmcoreinfo_of_notes(self) -> str | None:
        for note in self.notes:
            if note.name == "VMCOREINFO" and len(note.data) <= kdump.MAX_VMCOREINFO_BYTES:
                return kdump.text_of(note.data)
        return None

    def runs(self, gfn: int, count: int) -> Iterator[Run]:
        """Yield the runs of a range of pages; see :meth:`ImageBackend.runs`.

        A run's offset is that of its first descriptor, or `_ZEROS`.
        """
        end = gfn + count
        for first, pages, rank in self._bitmap.runs(gfn, count):
            yield from self._left_out_runs(gfn, first)
            if not self.lost:
                yield Run(first, pages, self._place_of(rank))
            else:
                yield from self._intact_runs(first, pages, rank)
            gfn = first + pages
        yield from self._left_out_runs(gfn, end)

    def _left_out_runs(self, gfn: int, end: int) -> Iterator[Run]:
        """Yield the runs of zeros in a range of which the file has no page."""
        if self._machine is not None and gfn < end:
            for first, pages, _ in self._machine.runs(gfn, end - gfn):
                yield Run(first, pages, _ZEROS)

    def _intact_runs(self, gfn: int, pages: int, rank: int) -> Iterator[Run]:
        for start in range(rank, rank + pages, _SCAN_PAGES):
            for place, size in self._intact(start, min(_SCAN_PAGES, rank + pages - start)):
                yield Run(gfn + place - rank, size, self._place_of(place))

    def _place_of(self, rank: int) -> int:
        return self._header.descriptors + rank * kdump.DESCRIPTOR.size

    def _intact(self, rank: int, count: int) -> Iterator[tuple[int, int]]:
        """Yield ``(rank, pages)`` of those descriptors of a range that can be used."""
        room = (self._content.size - self._place_of(rank)) // kdump.DESCRIPTOR.size
        if room <= 0:
            return
        data = self._read_descriptors(rank, min(count, room))
        if not data.strip(b"\0"):  # as in a sparse file, of which much costs nothing
            return
        first = rank
        for stored in _stored(data):
            if self._fault_of(stored):
                if rank > first:
                    yield first, rank - first
                first = rank + 1
            rank += 1
        if rank > first:
            yield first, rank - first

    def _fault_of(self, stored: _Stored) -> str | None:
        return kdump.fault_of_descriptor(self._header, self._content.size, *stored)

    def _read_descriptors(self, rank: int, count: int) -> bytes:
        return self._content.read(self._place_of(rank), count * kdump.DESCRIPTOR.size)

    def _fill(self, gfn: int, memory: memoryview, runs: list[Run]) -> None:
        unpackers: dict[int, Unpack] = {}
        for run in runs:
            if run.offset == _ZEROS:
                continue  # as the memory is
            for first in range(0, run.pages, _BATCH_PAGES):
                start = run.gfn + first
                count = min(_BATCH_PAGES, run.pages - first)
                place = start - gfn << PAGE_SHIFT
                self._fill_batch(
                    memory[place : place + (count << PAGE_SHIFT)],
                    start,
                    run.offset + first * kdump.DESCRIPTOR.size,
                    unpackers,
                )
        self._file.check()  # or what was read may be half old and half new

    def _fill_batch(
        self, memory: memoryview, gfn: int, place: int, unpackers: dict[int, Unpack]
    ) -> None:
        """Fill the memory of some pages.

        Args:
            memory: of zeros.
            gfn: the first page.
            place: of its descriptor in the file.
            unpackers: those of earlier batches, by compression.
        """
        count = len(memory) >> PAGE_SHIFT
        wanted: dict[_Stored, list[int]] = {}
        data = self._content.read(place, count * kdump.DESCRIPTOR.size)
        for number, stored in enumerate(_stored(data)):
            wanted.setdefault(stored, []).append(number)
        for stored, numbers in wanted.items():
            fault = self._fault_of(stored)
            if fault:
                raise self._damaged(gfn + numbers[0], fault, SALVAGE)
            if stored.flags not in unpackers and stored.flags:
                unpackers[stored.flags] = unpacker(stored.flags, self.path)
        for stored, raw in self._read_stored(sorted(wanted)):
            numbers = wanted[stored]
            try:
                page = unpackers[stored.flags](raw) if stored.flags else raw
            except PageError as error:
                fault = f"at {stored.offset:#x} cannot be unpacked: {error}"
                raise self._damaged(gfn + numbers[0], fault, "other pages can be read") from None
            for number in numbers:
                memory[number << PAGE_SHIFT : number + 1 << PAGE_SHIFT] = page

    def _read_stored(self, pages: list[_Stored]) -> Iterator[tuple[_Stored, bytes]]:
        """Yield the data of pages, in order of offset, in few reads."""
        first = 0
        while first < len(pages):
            offset = pages[first].offset
            end, last = offset, first
            while last < len(pages) and pages[last].offset <= end + _MAX_GAP_BYTES:
                end = max(end, pages[last].offset + pages[last].size)
                last += 1
            data = self._content.read(offset, end - offset)
            for stored in pages[first:last]:
                start = stored.offset - offset
                yield stored, data[start : start + stored.size]
            first = last

    def _damaged(self, gfn: int, fault: str, remedy: str) -> CorruptImageError:
        return CorruptImageError(
            f"{self.path}: the page of address {gfn << PAGE_SHIFT:#x} {fault}; {remedy}"
        )


def _stored(descriptors: bytes) -> Iterator[_Stored]:
    for offset, size, flags, _ in kdump.DESCRIPTOR.iter_unpack(descriptors):
        yield _Stored(offset, size, flags)


def _refuse_other_flattened(content: flattened.Flattened) -> None:
    start = start_of(content, len(kdump.KDUMP))
    if start not in (kdump.KDUMP, kdump.DISKDUMP):
        what = (
            "an ELF file"
            if start.startswith(b"\x7fELF")
            else f"a file of {start.hex() or 'nothing'}"
        )
        raise UnsupportedOperationError(f"{content.path} is {what}, flattened: {flattened.REMEDY}")
