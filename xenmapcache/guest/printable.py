"""Runs of printable characters in a text: where they are, and how they are shown.

With NumPy, if it is installed, the time hardly depends on how many runs there are. Otherwise a
regular expression finds them, which takes several times as long if they are many.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, cast

from ..address import KiB, MiB

Encoding = Literal["ascii", "utf-16le"]
Spans = tuple[Sequence[int], Sequence[int]]
Finder = Callable[[bytearray, int, int], Spans]
"""Returns where runs begin and where they end, between two positions of a text."""
LinesOf = Callable[[int, bytearray, Sequence[int], Sequence[int], int], str]
"""Takes what :class:`Runs` has but for itself."""

CHARACTER_BYTES: dict[str, int] = {"ascii": 1, "utf-16le": 2}
LONGEST_STRING = 64 * KiB
"""In bytes. A longer run may be found in parts."""

_WORTH_NUMPY_BYTES = 16 * MiB
"""The import of NumPy takes as long as a regular expression for less than that."""
_CLASSES = bytes(1 if 32 <= byte < 127 or byte == 9 else 2 * (not byte) for byte in range(256))
"""Translates printable characters to 1, zeros to 2, others to 0: quicker than a regular class."""
_CHARACTERS = {1: rb"\x01", 2: rb"\x01\x02"}


class Runs(NamedTuple):
    """Runs of printable ASCII in a part of memory, in order. Use it before the next part comes.

    Attributes:
        base: the address of the text.
        text: of the part; the next part is in the same buffer.
        firsts, stops: positions in the text, at least one of each.
        character_bytes: of each character.
        lines_of: makes lines of them all in one step; None if that needs NumPy.
    """

    base: int
    text: bytearray
    firsts: Sequence[int]
    stops: Sequence[int]
    character_bytes: int
    lines_of: LinesOf | None

    def pairs(self) -> list[tuple[int, str]]:
        """Return ``(address, text)`` of each."""
        # One byte is one character here, so that each run is one slice.
        low, step = int(self.firsts[0]), self.character_bytes
        characters = self.text[low : int(self.stops[-1])].decode("latin-1")
        base = self.base
        spans = zip(map(int, self.firsts), map(int, self.stops), strict=True)
        return [
            (base + first, characters[first - low : stop - low : step]) for first, stop in spans
        ]

    def lines(self) -> str:
        """Return a line of each: its address as ``0x%08x``, two spaces, its text."""
        low, high = self.base + int(self.firsts[0]), self.base + int(self.firsts[-1])
        if self.lines_of is not None and len(f"{low:08x}") == len(f"{high:08x}"):
            return self.lines_of(*self[:-1])
        return "".join([f"{address:#010x}  {text}\n" for address, text in self.pairs()])


class Printable(NamedTuple):
    """How runs are found. Immutable."""

    find: Finder
    character_bytes: int
    lines_of: LinesOf | None = None


def printable_runs(encoding: Encoding, min_length: int, size: int) -> Printable:
    """Return what finds the runs of at least `min_length` characters.

    Args:
        encoding: of the characters.
        min_length: of a run, in characters.
        size: of all texts together, in bytes.
    """
    width = CHARACTER_BYTES[encoding]
    if size >= _WORTH_NUMPY_BYTES:
        try:
            from . import vectors
        except ImportError:  # NumPy is not installed
            pass
        else:
            # Arrays are nearly sequences: bisect and slices, which is all that is done with them.
            find_quickly = cast("Finder", vectors.finder(width, min_length))
            return Printable(find_quickly, width, cast("LinesOf", vectors.lines))
    one = _CHARACTERS[width]
    # Written out, so that the engine has a prefix to look for.
    expression = re.compile(one * min_length + b"(?:%b)*+" % one)

    def find(text: bytearray, start: int, end: int) -> Spans:
        classes = text[start:end].translate(_CLASSES)
        spans = [match.span() for match in expression.finditer(classes)]
        return [start + first for first, _ in spans], [start + stop for _, stop in spans]

    return Printable(find, width)
