"""LiME files: ranges of physical memory, each after a header of its own.

Writers differ. AVML's headers say one byte less than LiME's, so that each range lacks its last
byte; an empty range has its last address before its first one. A file that was written with
direct I/O ends with zeros.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from ..address import ADDRESS_LIMIT, MiB
from ..errors import CorruptImageError
from .content import Content
from .spans import SALVAGE, Span, Warn, cut

HEADER = struct.Struct("<IIQQQ")
"""magic, version, first address, last address, reserved."""
MAGIC, VERSION = 0x4C694D45, 1
START = MAGIC.to_bytes(4, "little")
"""How a file begins."""

_MAX_RANGES = 1 << 16
_MAX_HEADERS = 1 << 17
"""Empty ranges included."""
_LAST = (1 << 64) - 1
_MAX_ZEROS = 16 * MiB
"""How far zeros at the end are looked at. Direct I/O leaves less than a MiB of them."""


def ranges(
    content: Content, *, salvage: bool = False, warn: Warn = lambda _text: None
) -> list[Span]:
    """Return the ranges of a file, in ascending order of address.

    Args:
        content: the file's bytes.
        salvage: take what comes before the place at which the file is damaged or ends. The
            rest of the range that is cut off there is lost.
        warn: called for each part of the file that is not used.

    Raises:
        CorruptImageError: a header is wrong, or two ranges overlap; the message names the
            place.
    """
    found: list[Span] = []
    try:
        for span in _spans(content, warn):
            if span.offset + span.end - span.first > content.size:
                place = span.offset - HEADER.size
                missing = span.offset + span.end - span.first - content.size
                if not salvage:
                    raise CorruptImageError(
                        f"{content.path}: LiME header {len(found)} at {place:#x}: its range has "
                        f"{span.end - span.first:#x} bytes, but the file ends at "
                        f"{content.size:#x}; {missing:#x} bytes are missing; {SALVAGE}"
                    )
                found += cut(span, content.size)
                break
            found.append(span)
    except _DamageError as damage:
        if not found:
            raise CorruptImageError(f"{content.path}: {damage}") from None
        if not salvage:
            raise CorruptImageError(f"{content.path}: {damage}; {SALVAGE}") from None
        warn(f"{damage}; what follows there is missing, and how much that is is unknown")
    found.sort()
    end = 0
    for each in found:
        if each.first < end:
            raise CorruptImageError(
                f"{content.path}: LiME range {each.first:#x}..{each.end:#x} at "
                f"{each.offset:#x} overlaps another range, which ends at {end:#x}"
            )
        end = each.end
    return found


class _DamageError(Exception):
    """A header is wrong; the message names the place."""


def _spans(content: Content, warn: Warn) -> Iterator[Span]:
    """Yield the ranges that headers announce, in the file's order; the last one may be cut off.

    Raises:
        _DamageError: a header is wrong or truncated.
    """
    offset = number = count = 0
    while offset < content.size:
        place = f"LiME header {number} at {offset:#x}"
        if count == _MAX_RANGES or number == _MAX_HEADERS:
            raise _DamageError(f"{place}: at most {_MAX_RANGES} ranges are read")
        header = content.read(offset, min(HEADER.size, content.size - offset))
        if not header.startswith(START[: len(header)]) and number and _is_zeros(content, offset):
            if content.size - offset > _MAX_ZEROS:
                warn(
                    f"zeros follow the last range, at {offset:#x}: {_MAX_ZEROS:#x} of "
                    f"{content.size - offset:#x} bytes were looked at, and the rest is ignored"
                )
            return
        if len(header) < HEADER.size:
            raise _DamageError(f"{place} is truncated: the file ends at {content.size:#x}")
        magic, version, first, last, _ = HEADER.unpack(header)
        if magic != MAGIC or version != VERSION:
            raise _DamageError(
                f"{place} has magic {magic:#x} and version {version}; expected {MAGIC:#x} and "
                f"{VERSION}"
            )
        offset += HEADER.size
        number += 1
        if (last + 1 - first) & _LAST == 0:
            continue
        if not first <= last < ADDRESS_LIMIT:
            raise _DamageError(
                f"{place}: range {first:#x}..{last:#x} must ascend and lie below 2**52"
            )
        yield Span(first, last + 1, offset)
        count += 1
        offset += last + 1 - first


def _is_zeros(content: Content, offset: int) -> bool:
    """Tell whether a file ends with zeros from an offset on; of very many, the first are read."""
    end = min(content.size, offset + _MAX_ZEROS)
    while offset < end:
        length = min(MiB, end - offset)
        if content.read(offset, length).count(0) != length:
            return False
        offset += length
    return True
