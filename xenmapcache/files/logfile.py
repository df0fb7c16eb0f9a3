"""Logs that another program writes: read in chunks, unpacked, and followed across rotation."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from typing import Self

from .regular import open_regular

_CHUNK_BYTES = 1 << 17
_GZIP = b"\x1f\x8b"
_GZIP_WBITS = 31


class LogFile:
    """A log on a disk, which may be compressed by gzip, as logrotate does.

    Args:
        path: of the log.

    Attributes:
        path: of the log.
        offset: how much of the file was read, in bytes.
        damage: why unpacking ended early; otherwise empty.

    Raises:
        OSError: it cannot be opened.
        IrregularFileError: it is not a regular file.

    Synchronization: for one thread.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.offset = 0
        self.damage = ""
        self._file = open_regular(path)
        self.is_compressed = os.pread(self._file.fileno(), 2, 0) == _GZIP

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Idempotent."""
        self._file.close()

    @property
    def size(self) -> int:
        """The present size of the file, in bytes."""
        return os.fstat(self._file.fileno()).st_size

    def chunks(self) -> Iterator[bytes]:
        """Yield what follows the place that was reached, up to the present end of the file."""
        if self.is_compressed:
            yield from self._unpacked()
            return
        while data := os.pread(self._file.fileno(), _CHUNK_BYTES, self.offset):
            self.offset += len(data)
            yield data

    def _unpacked(self) -> Iterator[bytes]:
        unpacker = zlib.decompressobj(_GZIP_WBITS)
        data = b""
        while True:
            data = data or os.pread(self._file.fileno(), _CHUNK_BYTES, self.offset)
            if not data:
                if rest := unpacker.flush():  # output for which no input is left
                    yield rest
                self.damage = "" if unpacker.eof else "its compressed data is truncated"
                return
            if unpacker.eof:  # another member follows
                unpacker = zlib.decompressobj(_GZIP_WBITS)
            before = len(data)
            try:
                text = unpacker.decompress(data, _CHUNK_BYTES)
            except zlib.error as error:
                self.damage = f"its compressed data is damaged at {self.offset:#x}: {error}"
                return
            data = unpacker.unconsumed_tail or unpacker.unused_data
            self.offset += before - len(data)
            if text:
                yield text

    def was_replaced(self) -> bool:
        """Return whether the name stands for another file now, or the file was truncated."""
        mine = os.fstat(self._file.fileno())
        try:
            named = os.stat(self.path)  # noqa: PTH116 - as open_regular does
        except FileNotFoundError:
            return False  # between two steps of a rotation
        return (mine.st_dev, mine.st_ino) != (named.st_dev, named.st_ino) or (
            mine.st_size < self.offset
        )
