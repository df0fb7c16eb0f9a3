"""Spans: which bytes of guest memory lie where in a file."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ..address import PAGE_MASK

ZEROS = -1
"""Instead of an offset: the memory is zeros, and the file has no bytes of it."""
LOST = -2
"""Instead of an offset: the file should have the memory, and does not."""

SALVAGE = "salvage=True (--salvage on the command line) opens the intact part"
"""What to do about a file that is not complete."""

Warn = Callable[[str], object]
"""Takes a sentence about a part of a file that cannot be used."""


class Span(NamedTuple):
    """Bytes of guest memory that follow each other in a file. Immutable.

    Attributes:
        first, end: guest-physical addresses, to any byte; half-open.
        offset: of the first byte in the file, :data:`ZEROS` or :data:`LOST`.
    """

    first: int
    end: int
    offset: int


def cut(span: Span, size: int) -> list[Span]:
    """Return a span of which the file may have only the beginning.

    The page in which the file ends is lost with all that follows: it is not intact.

    Args:
        span: with an offset.
        size: of the file, in bytes.
    """
    end = max(span.first, min(span.end, span.first + size - span.offset))
    if end == span.end:
        return [span]
    end = max(span.first, end & ~PAGE_MASK)
    intact = [Span(span.first, end, span.offset)] if end > span.first else []
    return [*intact, Span(end, span.end, LOST)]
