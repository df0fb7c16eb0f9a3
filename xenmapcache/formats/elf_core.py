"""ELF cores whose segments have physical addresses: which memory they have, and where.

A part that is damaged or unusual costs only that part. `parse` leaves it out, and says so:

    section headers     needed only to count more than 65,534 segments; without them the
                        segments are counted up to where the first one's memory begins
    a note              the rest of its segment
    a segment           what is beyond 52 bits, and what p_memsz has less than p_filesz

Memory beyond the end of the file is refused, unless the caller wants what is intact.
"""

from __future__ import annotations

from typing import NamedTuple

from ..address import ADDRESS_LIMIT
from ..errors import CorruptImageError
from .content import Content, reason
from .elf import ET_CORE, PT_LOAD, Elf
from .elf_notes import Damage, Note
from .spans import SALVAGE, ZEROS, Span, Warn, cut


class ElfCore(NamedTuple):
    """What a core has. Immutable.

    Attributes:
        elf: its header.
        spans: its memory, in the file's order.
        notes: in the file's order.
        left_out: bytes that segments have in memory and not in the file.
    """

    elf: Elf
    spans: list[Span]
    notes: tuple[Note, ...]
    left_out: int


def parse(content: Content, *, salvage: bool, zeros: bool, warn: Warn) -> ElfCore:
    """Return what a core has.

    Args:
        content: the file's bytes.
        salvage: take what is intact of a core that was cut off.
        zeros: add a span of zeros where a segment has more memory than bytes in the file.
        warn: called for each kind of parts that cannot be used.

    Raises:
        CorruptImageError: the file is not such a core, or is cut off and must be salvaged.
    """
    elf = Elf(content)
    if elf.e_type != ET_CORE:
        raise elf.corrupt(f"e_type is {elf.e_type}; expected {ET_CORE}, a core")
    count = _count(elf, salvage, warn)
    spans, left_out = _spans(elf, count, salvage, zeros, warn)
    return ElfCore(elf, spans, tuple(elf.segment_notes(warn, count)), left_out)


def _count(elf: Elf, salvage: bool, warn: Warn) -> int:
    """Return how many program headers are read."""
    try:
        elf.check_sections()
    except CorruptImageError as error:
        why = reason(elf.content, error)
        warn(f"its section headers, which hold no memory, are missing: {why}")
    count = elf.declared_segments
    if count is None:
        count = elf.guess_segments()
        warn(
            "the section header that counts its segments (PN_XNUM) is missing: the "
            f"{count} program headers before the memory of the first segment are read"
        )
        return count
    inside = elf.segments_inside(count)
    if inside == count:
        return elf.segment_count
    if not salvage:
        raise elf.corrupt(
            f"is truncated: its table of program headers should have {count} entries, and "
            f"{count - inside} of them are missing; {SALVAGE}"
        )
    warn(f"{count - inside} of its {count} program headers are missing, with their memory")
    return inside


def _spans(elf: Elf, count: int, salvage: bool, zeros: bool, warn: Warn) -> tuple[list[Span], int]:
    """Return the memory of a core, and how many bytes of it the file was not meant to have."""
    size, nowhere = elf.content.size, (1 << elf.bits) - 1  # the latter of vmalloc, in /proc/kcore
    spans: list[Span] = []
    odd, beyond, missing = Damage(), Damage(), Damage()
    segments = physical = left_out = missing_bytes = 0
    for number, offset, _, first, file_size, memory_size in elf.headers(PT_LOAD, count):
        if first == nowhere or not file_size | memory_size:
            continue
        segments += 1
        physical |= first
        if file_size > memory_size:
            odd.add(
                f"segment {number}: p_filesz {file_size:#x} exceeds p_memsz {memory_size:#x}; "
                "the rest of its bytes is left out"
            )
            file_size = memory_size
        stop = first + memory_size
        if stop > ADDRESS_LIMIT:
            beyond.add(
                f"segment {number}: {first:#x}..{stop:#x} is beyond 52 bits of physical address, "
                "and that part is left out"
            )
            if first >= ADDRESS_LIMIT:
                continue
            stop = ADDRESS_LIMIT
        end = min(stop, first + file_size)
        if end < stop:
            left_out += stop - end
            if zeros:
                spans.append(Span(end, stop, ZEROS))
        if end == first:
            continue
        if offset + end - first > size:
            missing.add(
                f"its segment {number} is {offset:#x}..{offset + end - first:#x}, but the file "
                f"ends at {size:#x}"
            )
            missing_bytes += min(end - first, offset + end - first - size)
            spans += cut(Span(first, end, offset), size)
        else:
            spans.append(Span(first, end, offset))
    if not segments:
        raise elf.corrupt(
            "has no segment of memory; if xl dump-core wrote it, open it with the backend "
            "'coredump' (coredump:FILE), because a truncated file of xl dump-core is not recognised"
        )
    if segments > 1 and not physical:
        raise elf.corrupt("has no physical addresses: it is the core of a process")
    if missing.count and not salvage:
        raise elf.corrupt(
            f"is truncated or corrupt: {missing}; {missing_bytes:#x} bytes of memory are missing; "
            f"{SALVAGE}"
        )
    odd.report(warn)
    beyond.report(warn)
    return spans, left_out
