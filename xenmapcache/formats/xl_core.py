"""Files that ``xl dump-core`` writes: sections and notes of an ELF core of Xen's own.

``.note.Xen`` describes the guest. ``.xen_pages`` has its pages. ``.xen_pfn`` (HVM and PVH) or
``.xen_p2m`` (PV) has the frame number of each page, in ascending order.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator
from typing import NamedTuple

from ..address import ADDRESS_LIMIT, PAGE_SHIFT, PAGE_SIZE
from ..errors import CorruptImageError
from .content import Content, reason
from .control_registers import ControlRegisters
from .control_registers import of_xen_context as control_registers_of
from .elf import ET_CORE, MACHINES, SHT_NOTE, SHT_PROGBITS, SHT_STRTAB, Elf, Section
from .elf_notes import Note
from .order import is_ascending
from .prstatus import CONTEXT_SIZE, NOTE_NAME, NT_PRSTATUS, of_xen_context
from .spans import SALVAGE, Warn

NOTE_NONE, NOTE_HEADER, NOTE_XEN_VERSION, NOTE_FORMAT_VERSION = range(0x2000000, 0x2000004)
HEADER = struct.Struct("<QQQQ")
"""magic, vCPUs, pages, page size."""
XEN_VERSION = struct.Struct("<QQ16s")
"""major, minor, extra. Who compiled it, when and how follows."""
MAGIC_PV, MAGIC_HVM = 0xF00FEBED, 0xF00FEBEE
PADDING = (1 << 64) - 1

_GUEST_TYPES = {MAGIC_PV: "pv", MAGIC_HVM: "hvm"}
_ENTRY = {".xen_pfn": 8, ".xen_p2m": 16}
_SECTIONS = {
    (SHT_NOTE, 0): ".note.Xen",
    (SHT_PROGBITS, PAGE_SIZE): ".xen_pages",
    (SHT_PROGBITS, 8): ".xen_pfn",
    (SHT_PROGBITS, 16): ".xen_p2m",
    (SHT_PROGBITS, CONTEXT_SIZE): ".xen_prstatus",
}
"""By sh_type and sh_entsize: the names lie at the end of the file, and are cut off first."""
_MAX_VCPUS = 8192
"""The most that a domain of Xen can have."""
_GFN_LIMIT = ADDRESS_LIMIT >> PAGE_SHIFT
_CHUNK_ENTRIES = 1 << 16
"""Entries that are read and checked at once, so that a corrupt table is refused before all of
it is in memory."""


class XlCore(NamedTuple):
    """What the headers and notes of a file say. Immutable.

    Attributes:
        guest_type: ``"pv"`` or ``"hvm"``.
        machine: ``"x86-64"``, ``"x86-32"`` or ``"arm"``.
        vcpus: how many the guest had.
        entries: how many pages the file has, padding included.
        page_size: in bytes, always 4096.
        xen_version: for example ``"4.17.7"``; empty if the file does not say it.
        format_version: ``(major, minor)``.
        table, pages: the sections of the frame numbers and of the pages.
        contexts: the section of the vCPUs' registers, if the file has one.
    """

    guest_type: str
    machine: str
    vcpus: int
    entries: int
    page_size: int
    xen_version: str
    format_version: tuple[int, int]
    table: Section
    pages: Section
    contexts: Section | None = None


def parse(content: Content, *, salvage: bool = False, warn: Warn = lambda _text: None) -> XlCore:
    """Return what the headers and notes say.

    Args:
        content: the file's bytes.
        salvage: take what is intact of a file that was cut off. Its table of frame numbers comes
            after the pages, so only pages whose numbers the file has can be salvaged.
        warn: called with what is missing.

    Raises:
        CorruptImageError: the file contradicts the format; the message names the place.
    """
    elf = Elf(content)
    if elf.e_type != ET_CORE or elf.bits != 64 or elf.machine not in MACHINES:
        raise elf.corrupt(
            f"is an ELF file of type {elf.e_type}, {elf.bits} bits, machine {elf.machine}; "
            "xl dump-core writes cores (4) of 64 bits, of x86 (62, 3) or Arm (40, 183)"
        )
    sections = _find_sections(elf, salvage, warn)
    present = [name for name in _ENTRY if name in sections]
    for name in (".note.Xen", ".xen_pages", *(present or [" or ".join(_ENTRY)])):
        if name not in sections:
            raise elf.corrupt(f"has no section {name}: not a file of xl dump-core")
    if len(present) > 1:
        raise elf.corrupt("has both .xen_p2m (of PV guests) and .xen_pfn (of HVM guests)")
    table, pages = sections[present[0]], sections[".xen_pages"]
    _check_apart(elf, [table, pages, sections[".note.Xen"]])
    core = _read_notes(elf, sections[".note.Xen"])._replace(
        machine=MACHINES[elf.machine],
        table=table,
        pages=pages,
        contexts=sections.get(".xen_prstatus"),
    )
    for section, size in ((table, _ENTRY[table.name]), (pages, PAGE_SIZE)):
        if section.size != size * core.entries:
            raise elf.corrupt(
                f"section {section.name} has {section.size:#x} bytes, which contradicts the "
                f"{core.entries:#x} pages of the header note"
            )
    return _intact(core, content.size, warn)


def _find_sections(elf: Elf, salvage: bool, warn: Warn) -> dict[str, Section]:
    """Return the sections by name; by their shape if the file was cut off."""
    try:
        return elf.sections({SHT_PROGBITS, SHT_STRTAB, SHT_NOTE})
    except CorruptImageError as error:
        end = elf.content.size
        every = elf.unnamed_sections()
        found = {
            name: section._replace(name=name)
            for section in every
            if (name := _SECTIONS.get((section.sh_type, section.entry_size)))
        }
        tables = [section for name, section in found.items() if name in _ENTRY]
        if not tables or all(section.offset + section.size <= end for section in every):
            raise
        why = reason(elf.content, error)
        table = tables[0]
        if table.offset + table.entry_size > end:
            raise elf.corrupt(
                f"{why}. The table of frame numbers should be at {table.offset:#x}, and without "
                "it no page has an address: dump the guest again"
            ) from None
        if not salvage:
            raise elf.corrupt(f"{why}; {SALVAGE}") from None
        warn(why)
        return found


def _intact(core: XlCore, size: int, warn: Warn) -> XlCore:
    """Return a file's description with those entries only that the file has completely."""
    entries = core.entries
    for section, length in ((core.table, _ENTRY[core.table.name]), (core.pages, PAGE_SIZE)):
        entries = min(entries, max(0, size - section.offset) // length)
    if entries == core.entries:
        return core
    warn(
        f"is truncated: {core.entries - entries} of its {core.entries} pages are missing, and "
        "are holes"
    )
    return core._replace(entries=entries)


def frames(content: Content, core: XlCore) -> Iterator[tuple[array[int], int]]:
    """Yield ``(gfns, offset)``: frame numbers, and where in the file their pages begin.

    The numbers ascend, within an array and from one to the next. The pages of one array lie
    one after the other. Padding separates arrays.

    Raises:
        CorruptImageError: numbers do not ascend, or one is beyond 52 bits of address.
    """
    table, start = core.table, core.pages.offset
    words = _ENTRY[table.name] // 8
    last = -1
    for first in range(0, core.entries, _CHUNK_ENTRIES):
        count = min(_CHUNK_ENTRIES, core.entries - first)
        chunk = array("Q", bytes(8 * words * count))
        content.read_into(table.offset + 8 * words * first, memoryview(chunk).cast("B"))
        chunk = chunk[::words] if words > 1 else chunk
        ordered = is_ascending(chunk) and chunk[0] > last
        if ordered and chunk[-1] < _GFN_LIMIT:
            yield chunk, start + (first << PAGE_SHIFT)
            last = chunk[-1]
            continue
        # Padding, or an error.
        gfns = array("Q")
        for entry, gfn in enumerate(chunk, first):
            if gfn != PADDING:
                if gfn >= _GFN_LIMIT or gfn <= last:
                    raise _bad_entry(content, core, entry, gfn, last)
                gfns.append(gfn)
                last = gfn
            elif gfns:
                yield gfns, start + (entry - len(gfns) << PAGE_SHIFT)
                gfns = array("Q")
        if gfns:
            yield gfns, start + (first + count - len(gfns) << PAGE_SHIFT)


def contexts(content: Content, core: XlCore) -> Iterator[tuple[int, bytes]]:
    """Yield ``(vcpu, context)`` of an x86-64 guest whose registers are in the file.

    A context is Xen's ``vcpu_guest_context_t``.
    """
    section = core.contexts
    if section is None or core.machine != "x86-64" or section.entry_size != CONTEXT_SIZE:
        return
    size = min(section.size, max(0, content.size - section.offset))  # of a truncated file
    for vcpu in range(min(core.vcpus, size // CONTEXT_SIZE, _MAX_VCPUS)):
        yield vcpu, content.read(section.offset + vcpu * CONTEXT_SIZE, CONTEXT_SIZE)


def registers(content: Content, core: XlCore) -> Iterator[Note]:
    """Yield a PRSTATUS note for each vCPU of an x86-64 guest whose registers are in the file."""
    for vcpu, context in contexts(content, core):
        data = of_xen_context(context, vcpu)
        if data is not None:
            yield Note(NOTE_NAME, NT_PRSTATUS, data)


def control_registers(content: Content, core: XlCore) -> Iterator[ControlRegisters]:
    """Yield the control registers of each vCPU of an x86-64 guest that are in the file.

    Those of a PV guest are left out: its page tables have addresses of the host.
    """
    if core.guest_type == "hvm":
        for _, context in contexts(content, core):
            yield control_registers_of(context)


def _bad_entry(
    content: Content, core: XlCore, entry: int, gfn: int, last: int
) -> CorruptImageError:
    table = core.table
    place = f"{content.path}: entry {entry} of {table.name}, at "
    place += f"{table.offset + entry * _ENTRY[table.name]:#x}, is pfn {gfn:#x}"
    if gfn >= _GFN_LIMIT:
        return CorruptImageError(f"{place}, beyond 52 bits of address")
    previous = "again" if gfn == last else f"after {last:#x}"
    return CorruptImageError(f"{place} {previous}: pfns must ascend")


def _read_notes(elf: Elf, section: Section) -> XlCore:
    """Return what the notes say; the other fields are to be filled in."""
    header = None
    xen_version, format_version = "", (0, 0)
    for name, note_type, data in elf.section_notes(section):
        if name != "Xen":
            continue
        if note_type == NOTE_HEADER and len(data) >= HEADER.size:
            header = HEADER.unpack_from(data)
        elif note_type == NOTE_XEN_VERSION and len(data) >= XEN_VERSION.size:
            major, minor, extra = XEN_VERSION.unpack_from(data)
            text = extra.partition(b"\0")[0].decode("ascii", "replace")
            xen_version = f"{major}.{minor}{text}"
        elif note_type == NOTE_FORMAT_VERSION and len(data) >= 8:
            version = int.from_bytes(data[:8], "little")
            format_version = (version >> 32, version & 0xFFFFFFFF)
    if header is None:
        raise elf.corrupt(f"has no header note in .note.Xen at {section.offset:#x}")
    magic, vcpus, entries, page_size = header
    if magic not in _GUEST_TYPES:
        raise elf.corrupt(
            f"the header note has magic {magic:#x}; expected {MAGIC_PV:#x} or {MAGIC_HVM:#x}"
        )
    if page_size != PAGE_SIZE:
        raise elf.corrupt(
            f"the header note has pages of {page_size:#x} bytes; expected {PAGE_SIZE:#x}"
        )
    if format_version[0]:
        raise elf.corrupt(
            f"format version {format_version[0]}.{format_version[1]} is unknown; expected 0.x"
        )
    return XlCore(
        _GUEST_TYPES[magic], "", vcpus, entries, page_size, xen_version, format_version,
        section, section,
    )  # fmt: skip


def _check_apart(elf: Elf, sections: list[Section]) -> None:
    end, previous = 64, "the header"
    for section in sorted(sections, key=lambda section: section.offset):
        if section.size and section.offset < end:
            raise elf.corrupt(
                f"section {section.name} at {section.offset:#x} overlaps {previous}, "
                f"which ends at {end:#x}"
            )
        if section.size:
            end, previous = section.offset + section.size, section.name
