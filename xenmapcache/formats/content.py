"""What a parser reads from: a file's bytes by offset, on a disk or in memory."""

from __future__ import annotations

from typing import Protocol

from ..errors import CorruptImageError


class Content(Protocol):
    """The bytes of a file.

    Attributes:
        path: the file's name, for messages.
        size: in bytes.
    """

    path: str
    size: int

    def read(self, offset: int, length: int) -> bytes:
        """Return a range of bytes.

        Raises:
            CorruptImageError: the range ends beyond the file; nothing was allocated.
        """

    def read_into(self, offset: int, *views: memoryview) -> None:
        """Fill views, one after the other, with the bytes from an offset on.

        Raises:
            CorruptImageError: the range ends beyond the file.
        """


class InMemory:
    """Content that is a bytes object. Immutable.

    Args:
        data: the bytes.
        path: a name for messages.
    """

    def __init__(self, data: bytes, path: str = "<bytes>") -> None:
        self.path = path
        self.size = len(data)
        self._data = data

    def read(self, offset: int, length: int) -> bytes:
        """Return a range of bytes; see :meth:`Content.read`."""
        if min(offset, length) < 0 or offset + length > self.size:
            raise CorruptImageError(
                f"{self.path}: range {offset:#x}..{offset + length:#x} is outside of the file, "
                f"which ends at {self.size:#x}"
            )
        return self._data[offset : offset + length]

    def read_into(self, offset: int, *views: memoryview) -> None:
        """Fill views; see :meth:`Content.read_into`."""
        for view in views:
            view[:] = self.read(offset, view.nbytes)
            offset += view.nbytes


def start_of(content: Content, length: int) -> bytes:
    """Return the first bytes, fewer if the file is shorter."""
    length = min(length, content.size)
    return content.read(0, length) if length else b""


def reason(content: Content, error: CorruptImageError) -> str:
    """Return what an error says, without the file's name at its beginning."""
    return str(error.args[0]).removeprefix(f"{content.path}: ")
