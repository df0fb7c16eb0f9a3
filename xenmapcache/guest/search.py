"""Search of guest memory for byte patterns, regular expressions and strings. Holes are skipped."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterator
from functools import partial

from ..address import PAGE_MASK, PAGE_SHIFT, MiB, as_int, check_range, page_span
from ..binding import libc
from ..cache import MapCache
from ..errors import FaultError
from .printable import (
    CHARACTER_BYTES,
    LONGEST_STRING,
    Encoding,
    Printable,
    Runs,
    printable_runs,
)

_Search = Callable[[bytearray, int, int], Iterator[tuple[int, int]]]
"""Finds matches between two positions of a text: where each begins and where it ends."""

_CHUNK_BYTES = MiB


def find(
    cache: MapCache,
    pattern: bytes | re.Pattern[bytes],
    address: int,
    length: int | None,
    max_match: int,
) -> Iterator[tuple[int, bytes]]:
    """Return an iterator of ``(address, match)``; see :meth:`GuestMemory.find`."""
    if as_int("max_match", max_match) < 1:
        raise ValueError(f"max_match must be at least 1, not {max_match}")
    if isinstance(pattern, re.Pattern):
        if not isinstance(pattern.pattern, bytes):
            raise TypeError("pattern must be compiled from bytes, not from str")
        empty = pattern.match(b"") is not None
    elif isinstance(pattern, bytes | bytearray):
        empty = not pattern
        max_match = len(pattern)
    else:
        raise TypeError(f"pattern must be bytes or a compiled pattern, not {pattern!r}")
    if empty:
        text = pattern.pattern if isinstance(pattern, re.Pattern) else pattern
        raise ValueError(
            f"pattern {text!r} matches the empty string, so it would match at every address"
        )
    address, end = checked_range(cache, address, length)
    return _search(cache, _searcher(pattern, end - address), address, end, max_match)


def _searcher(pattern: bytes | bytearray | re.Pattern[bytes], size: int) -> _Search:
    """Return the quickest search for a pattern in `size` bytes."""
    if isinstance(pattern, re.Pattern):
        from . import automaton  # only expressions need it, and it takes long to import

        return automaton.searcher(pattern, size) or partial(_spans, pattern)
    if len(pattern) == 2:  # for which memmem has no shortcut, and the engine has
        return partial(_spans, re.compile(re.escape(bytes(pattern))))
    return partial(_spans_of_bytes, bytes(pattern))


def strings(
    cache: MapCache, address: int, length: int | None, min_length: int, encoding: Encoding
) -> Iterator[Runs]:
    """Return an iterator of some strings at a time; see :meth:`GuestMemory.strings`."""
    if as_int("min_length", min_length) < 1:
        raise ValueError(f"min_length must be at least 1, not {min_length}")
    if encoding not in CHARACTER_BYTES:
        raise ValueError(f"encoding must be one of {', '.join(CHARACTER_BYTES)}, not {encoding!r}")
    longest = LONGEST_STRING // CHARACTER_BYTES[encoding]
    if min_length > longest:
        raise ValueError(
            f"min_length must be at most {longest}, not {min_length}: longer strings may be "
            "reported in parts"
        )
    address, end = checked_range(cache, address, length)
    return _strings(cache, printable_runs(encoding, min_length, end - address), address, end)


def _strings(cache: MapCache, printable: Printable, address: int, end: int) -> Iterator[Runs]:
    after = address  # where the last string ended
    for base, text, size, limit in texts(cache, address, end, LONGEST_STRING):
        firsts, stops = printable.find(text, min(size, max(0, after - base)), size)
        count = bisect_left(firsts, limit)  # the next text contains the others completely
        if count:
            after = base + int(stops[count - 1])
            width, lines_of = printable.character_bytes, printable.lines_of
            yield Runs(base, text, firsts[:count], stops[:count], width, lines_of)


def checked_range(cache: MapCache, address: int, length: int | None) -> tuple[int, int]:
    """Return the first address of a range and its end; the end of memory by default."""
    if length is None:
        end = cache.memory_end
        if end is None:
            raise ValueError("this source does not know where its memory ends: give a length")
        length = max(0, end - address)
    address, length = check_range(address, length, empty=True)
    return address, address + length


def _search(
    cache: MapCache, search: _Search, address: int, end: int, overlap: int
) -> Iterator[tuple[int, bytes]]:
    after = address  # where the last match ended
    for base, text, size, limit in texts(cache, address, end, overlap):
        for first, stop in search(text, max(0, after - base), size):
            if first >= limit:
                break  # the next text contains it completely
            yield base + first, bytes(text[first:stop])
            after = base + stop


def texts(
    cache: MapCache, address: int, end: int, overlap: int
) -> Iterator[tuple[int, bytearray, int, int]]:
    """Yield the memory of a range in parts that overlap, without holes.

    Yields:
        The address of a part; a text that begins with it; its length; and below which position
        in it a match has to begin, because later ones are in the next part.
    """
    overlap = overlap + PAGE_MASK & ~PAGE_MASK  # whole pages may be read without being mapped
    # One for all parts: allocating and freeing so much memory costs more than the search.
    text = bytearray(_CHUNK_BYTES + overlap)
    for chunk, edge, stop in _chunks(cache, address, end):
        for start, size in cache.present(chunk, min(edge + overlap, stop) - chunk):
            if start >= edge:
                break
            try:
                _fill(cache, text, start, size)
            except FaultError:
                continue  # ballooned out just now: a hole like others
            yield start, text, size, edge - start


def _chunks(cache: MapCache, address: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield where each chunk of a range begins and ends, without those known to be holes.

    The third number is where the chunk's text ends at the latest: a hole begins there, or the range
    ends.
    """
    for gfn, pages in cache.backend.extents(*page_span(address, end - address)):
        address = max(address, gfn << PAGE_SHIFT)
        stop = min(end, gfn + pages << PAGE_SHIFT)
        while address < stop:
            edge = min((address | _CHUNK_BYTES - 1) + 1, end)
            yield address, edge, stop if stop >= edge else end
            address = edge


def _fill(cache: MapCache, text: bytearray, address: int, length: int) -> None:
    if not (address | length) & PAGE_MASK:
        with memoryview(text) as everything, everything[:length] as part:
            if cache.backend.read_pages(address >> PAGE_SHIFT, part):
                return
    position = 0
    for view in cache.views(address, length):
        end = position + len(view)
        text[position:end] = view
        position = end
        del view  # or there may be no room for the next one


def _spans(
    expression: re.Pattern[bytes], text: bytearray, start: int, end: int
) -> Iterator[tuple[int, int]]:
    return (match.span() for match in expression.finditer(text, start, end))


def _spans_of_bytes(
    pattern: bytes, text: bytearray, start: int, end: int
) -> Iterator[tuple[int, int]]:
    size = len(pattern)
    return ((found, found + size) for found in libc.find_all(text, pattern, start, end))
