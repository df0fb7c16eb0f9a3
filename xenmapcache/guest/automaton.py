"""Regular expressions through RE2, an automaton that takes each byte once, if it is installed.

Python's engine tries the expression at each byte, unless the expression begins with text: ten
times as long as grep. RE2 looks only for the place where the next match begins. What matches
there, Python's engine says, so that RE2's other rules of which match is the best do not count.
An expression goes to RE2 only if each of its parts means the same to both engines; see _PART.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ..address import PAGE_SIZE, MiB
from ..binding import libc

_WORTH_RE2_BYTES = 4 * MiB
"""The import takes as long as Python's engine for less than that."""
_DENSE = 1 << 12
"""With more matches in a text than that, finding each by a call takes longer than all in one."""
_SPACES = rb"\t\n\v\f\r "
"""What ``\\s`` is to Python; to RE2 it lacks the vertical tab."""
_PART = re.compile(
    rb"""
      [A-Za-z0-9 !"\#%&',/:;<=>@_`~-]      # itself
    | \\[^A-Za-z0-9\x80-\xff\n]            # a character that would mean something
    | \\[nrtfvdDwWsS] | \\x[0-9A-Fa-f]{2}
    | \.
    | \[\^?(?:[A-Za-z0-9 !"\#$%'()*+,./:;<=>?@_`{}-] | \\[^A-Za-z0-9\x80-\xff\n]
         | \\[nrtfvdws] | \\x[0-9A-Fa-f]{2})+\]
    | \((?:\?:|(?!\?)) | \) | \|
    | (?:[*+?] | \{[0-9]+(?:,[0-9]*)?\}) \?? (?![*+?{])
    """,
    re.VERBOSE,
)
_CHARACTER = re.compile(rb"[^\\.()|*+?{\[]|\\[^A-Za-z0-9]|\\x..")
"""A part that is a character itself."""
_REPEATS = (b"*", b"+", b"?", b"{")
_WORTH_BYTES = 3
"""A shorter text is nearly everywhere."""
_ZEROS = bytes(PAGE_SIZE)
_FLAGS = re.IGNORECASE | re.DOTALL

_Search = Callable[[bytearray, int, int], Iterator[tuple[int, int]]]


class Translation(NamedTuple):
    """An expression for RE2. Immutable.

    Attributes:
        source: as RE2 understands it.
        literal: text that each match has, beyond its beginning; empty if none is known.
        matches_zero: whether a zero byte can be in a match.
    """

    source: bytes
    literal: bytes
    matches_zero: bool


def translate(pattern: re.Pattern[bytes]) -> Translation | None:
    """Return an expression for RE2; None if the two engines may disagree about it."""
    source = pattern.pattern
    if pattern.flags & ~_FLAGS:
        return None
    if pattern.flags & re.IGNORECASE and rb"\x" in source:
        return None  # RE2 would fold the case of bytes beyond ASCII, as letters of Latin-1
    parts: list[bytes] = []
    position = 0
    while position < len(source):
        part = _PART.match(source, position)
        if part is None:
            return None
        parts.append(part[0])
        position = part.end()
    literal = b"" if pattern.flags & re.IGNORECASE else _literal(parts)
    matches_zero = any(map(_matches_zero, parts))
    return Translation(b"".join(map(_spaces, parts)), literal, matches_zero)


def _literal(parts: list[bytes]) -> bytes:
    """Return the longest text that all matches have, if the expression begins otherwise."""
    texts = [b""]
    depth = 0
    for part, following in zip(parts, [*parts[1:], b""], strict=True):
        depth += part.startswith(b"(") - (part == b")")
        if part == b"|" and not depth:
            return b""  # which of them matches is not known
        if _CHARACTER.fullmatch(part) and not depth and following[:1] not in _REPEATS:
            texts[-1] += bytes.fromhex(part[2:].decode()) if len(part) == 4 else part[-1:]
        else:
            texts.append(b"")
    if texts[0]:
        return b""  # RE2 looks for that itself
    longest = max(texts, key=len)
    return longest if len(longest) >= _WORTH_BYTES else b""


def _matches_zero(part: bytes) -> bool:
    return part[:1] in (b"[", b"\\", b".") and re.fullmatch(part, b"\0") is not None


def _spaces(part: bytes) -> bytes:
    if part == rb"\s":
        return b"[" + _SPACES + b"]"
    if part == rb"\S":
        return b"[^" + _SPACES + b"]"
    if part.startswith(b"["):
        return re.sub(rb"\\(.)", lambda each: _SPACES if each[1] == b"s" else each[0], part)
    return part


def searcher(pattern: re.Pattern[bytes], size: int) -> _Search | None:
    """Return what finds the matches between two positions of a text; None without RE2.

    Args:
        pattern: one that does not match the empty string.
        size: of all texts together, in bytes.
    """
    translation = translate(pattern) if size >= _WORTH_RE2_BYTES else None
    if translation is None:
        return None
    try:
        import re2
    except ImportError:
        return None
    options = re2.Options()
    options.encoding = re2.Options.Encoding.LATIN1  # each byte is a character
    options.never_capture = True
    options.log_errors = False
    options.case_sensitive = not pattern.flags & re.IGNORECASE
    options.dot_nl = bool(pattern.flags & re.DOTALL)
    try:
        automaton = re2.compile(translation.source, options)
    except re2.error:  # too large, for example
        return None
    return _Automaton(pattern, automaton, translation).spans


class _Automaton:
    """Both engines' form of an expression."""

    def __init__(
        self,
        pattern: re.Pattern[bytes],
        automaton: Any,  # noqa: ANN401 - RE2 has no types
        translation: Translation,
    ) -> None:
        self._pattern = pattern
        self._automaton = automaton
        self._literal = translation.literal
        self._matches_zero = translation.matches_zero
        self._dense = False

    def spans(self, text: bytearray, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield where matches begin and end."""
        count = 0
        for span in (
            self._few(text, start, end) if not self._dense else self._many(text, start, end)
        ):
            count += 1
            yield span
        self._dense = count > _DENSE

    def _many(self, text: bytearray, start: int, end: int) -> Iterator[tuple[int, int]]:
        return (match.span() for match in self._pattern.finditer(text, start, end))

    def _few(self, text: bytearray, start: int, end: int) -> Iterator[tuple[int, int]]:
        if self._literal and not any(True for _ in libc.find_all(text, self._literal, start, end)):
            return
        parts = [(start, end)] if self._matches_zero else _without_zeros(text, start, end)
        for low, high in parts:
            while candidate := self._automaton.search(text, low, high):
                low = candidate.start()
                match = self._pattern.match(text, low, high)
                if match is None:
                    low += 1
                else:
                    low = match.end()
                    yield match.span()


def _without_zeros(text: bytearray, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield where parts of a text begin and end that have no page of zeros; most guests have many.

    No expression that matches no zero byte can match across such a page.
    """
    low = start
    for page in range(start, end - PAGE_SIZE + 1, PAGE_SIZE):
        if text.startswith(_ZEROS, page):
            if low < page:
                yield low, page
            low = page + PAGE_SIZE
    if low < end:
        yield low, end
