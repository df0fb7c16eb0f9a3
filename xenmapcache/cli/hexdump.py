"""Memory for people to look at, as ``hexdump -C`` shows it."""

from __future__ import annotations

from collections.abc import Iterator

_LINE = 16
_SHOWN = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in range(256))


class Hexdump:
    """Makes lines of memory that comes in pieces, one after the other.

    Args:
        address: of the first byte.
        squeeze: whether lines that repeat become one ``*``.
    """

    def __init__(self, address: int, *, squeeze: bool = True) -> None:
        self._address = address
        self._squeeze = squeeze
        self._rest = b""
        self._before: bytes | None = None
        self._squeezed = False

    def lines(self, piece: bytes | memoryview) -> Iterator[str]:
        """Yield the lines that are full by now."""
        data = self._rest + piece if self._rest else bytes(piece)
        whole = len(data) - len(data) % _LINE
        for position in range(0, whole, _LINE):
            yield from self._line(data[position : position + _LINE])
        self._rest = data[whole:]

    def end(self) -> Iterator[str]:
        """Yield the last line, and the address behind it."""
        if self._rest:
            yield from self._line(self._rest)
        yield f"{self._address:08x}"

    def _line(self, data: bytes) -> Iterator[str]:
        if self._squeeze and data == self._before:
            if not self._squeezed:
                yield "*"
            self._squeezed = True
        else:
            left, right = data[:8].hex(" "), data[8:].hex(" ")
            text = data.decode("latin-1").translate(_SHOWN)
            yield f"{self._address:08x}  {left:<23}  {right:<23}  |{text}|"
            self._squeezed = False
        self._before = data
        self._address += len(data)
