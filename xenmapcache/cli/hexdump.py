"""Memory for people, as ``hexdump -C`` shows it."""

from __future__ import annotations

from collections.abc import Iterator

_LINE = 16
_BLOCK_BYTES = 1 << 14
"""Up to this many bytes are made text in one step."""
_SHOWN = bytes(byte if 32 <= byte < 127 else ord(".") for byte in range(256))


class Hexdump:
    """Makes lines of memory that comes in chunks, one after the other.

    Args:
        address: of the first byte.
        squeeze: whether lines that repeat become one ``*``.
    """

    def __init__(self, address: int, *, squeeze: bool = True) -> None:
        self._address = address
        self._squeeze = squeeze
        self._rest = b""
        self._previous = b""
        self._squeezed = False

    def blocks(self, chunk: bytes | memoryview) -> Iterator[list[str]]:
        """Yield the lines that are complete with this chunk, some at a time."""
        data = self._rest + chunk if self._rest else bytes(chunk)
        complete = len(data) - len(data) % _LINE
        for position in range(0, complete, _BLOCK_BYTES):
            yield self._lines(data[position : min(position + _BLOCK_BYTES, complete)])
        self._rest = data[complete:]

    def end(self) -> list[str]:
        """Return the last line, and the address after it."""
        lines = self._lines(self._rest) if self._rest else []
        return [*lines, f"{self._address:08x}"]

    def _lines(self, data: bytes) -> list[str]:
        """Return the lines of some memory; all but the last one of a dump are complete."""
        # One step each for all lines: a call for each line would take most of the time.
        hexadecimal = data.hex(" ")
        text = data.translate(_SHOWN).decode("ascii")
        base = self._address
        self._address += len(data)
        return [
            "*"
            if position < 0
            else (
                f"{base + position:08x}  {hexadecimal[3 * position : 3 * position + 23]:<23}  "
                f"{hexadecimal[3 * position + 24 : 3 * position + 47]:<23}  "
                f"|{text[position : position + _LINE]}|"
            )
            for position in (self._unlike(data) if self._squeeze else range(0, len(data), _LINE))
        ]

    def _unlike(self, data: bytes) -> Iterator[int]:
        """Yield where lines are that differ from the line before, and -1 for those that repeat."""
        if len(data) >= _LINE and self._previous + data[:-_LINE] == data:
            if not self._squeezed:
                yield -1
            self._squeezed = True
            return
        for position in range(0, len(data), _LINE):
            line = data[position : position + _LINE]
            if line != self._previous:
                self._squeezed = False
                self._previous = line
                yield position
            elif not self._squeezed:
                self._squeezed = True
                yield -1
