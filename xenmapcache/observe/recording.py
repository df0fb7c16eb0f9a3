"""Recordings: files of events that a recorder, or the reader of a log, has written."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from ..binding.descriptor import Descriptor
from ..errors import WrongFormatError
from ..events import Event
from ..files.atomic import new_file
from ..files.regular import open_regular
from .eventlines import (
    HEADER_START,
    MAX_LINE,
    VERSION,
    Decoded,
    Header,
    LineError,
    UnknownEventError,
    decode,
    encode,
    encode_header,
)

_CHUNK_BYTES: Final = 1 << 20
_BUFFER_BYTES: Final = 1 << 20
_MAX_EXAMPLES: Final = 5
_EXAMPLE_BYTES: Final = 100


class Entry(NamedTuple):
    """An event of a recording. Immutable.

    Attributes:
        stream: the number of the cache or server, from 0 on; a process may have several.
        event: what happened.
    """

    stream: int
    event: Event


class Recording:
    """The events of a file. Each iteration reads the file from its start, in bounded memory.

    Lines that are damaged, or that this version does not know, are skipped and counted. The
    attributes say how it was with the last iteration, as far as it went.

    Attributes:
        path: of the file.
        headers: the first lines of the file, or of its halves; the earlier one first.
        lines: how many lines were read.
        damaged: how many lines were not read, because they are damaged or too long.
        examples: the first of these, with the reason.
        unknown: how many events were skipped, because this version does not know them.
        left_out: how many things the recorder has left out for want of room.
        overwritten: whether earlier events were overwritten, because of the recorder's limit.

    Synchronization: for one thread.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path
        self._begin()

    def _begin(self) -> None:
        self.headers: list[Header] = []
        self.lines = self.damaged = self.unknown = self.left_out = 0
        self.examples: list[str] = []
        self.overwritten = False

    def __iter__(self) -> Iterator[Event]:
        for entry in self.entries():
            yield entry.event

    def entries(self) -> Iterator[Entry]:
        """Yield the events in the order of the file, each with the number of its stream.

        The events of one stream are in order. Those of several may be slightly out of order.

        Raises:
            OSError: the file cannot be read.
            IrregularFileError: it is not a regular file.
            WrongFormatError: it is not a recording, or of a version that is not read.
        """
        self._begin()
        file = open_regular(self.path)
        try:
            for start, end in self._halves(file):
                yield from self._half(_lines(file, start, end))
        finally:
            file.close()

    def _halves(self, file: Descriptor) -> list[tuple[int, int | None]]:
        """Return the ranges of the file to read, in this order."""
        size = os.fstat(file.fileno()).st_size
        first = self._header_at(file, 0)
        half = first.half if first else size // 2
        if half is None:
            return [(0, None)]
        second = self._header_at(file, half) if half < size else None
        if first is None and second is None:
            raise WrongFormatError(
                f"{os.fsdecode(self.path)} is not a recording: its first line must begin with "
                f"{HEADER_START.decode()}; write one with xenmapcache.record or XENMAPCACHE_RECORD"
            )
        found = [
            (header.number, start, end)
            for header, start, end in ((first, 0, half), (second, half, 2 * half))
            if header
        ]
        found.sort()
        self.overwritten = found[0][0] > 0
        return [(start, end) for _, start, end in found]

    def _header_at(self, file: Descriptor, offset: int) -> Header | None:
        line = os.pread(file.fileno(), MAX_LINE, offset).partition(b"\n")[0]
        if not line.startswith(HEADER_START):
            return None
        try:
            header = decode(line).event
        except LineError:
            return None
        assert isinstance(header, Header)  # noqa: S101 - the line begins so
        if header.version != VERSION:
            raise WrongFormatError(
                f"{os.fsdecode(self.path)}: recordings of version {header.version} are not read, "
                f"only {VERSION}; use the xenmapcache that has written it"
            )
        return header if header.half is None or header.half > 0 else None

    def _half(self, lines: Iterator[bytes | None]) -> Iterator[Entry]:
        restated = 0
        since: int | None = None  # after damage: older events are of the half's last turn
        known = bool(self.headers) and not self.damaged
        for line in lines:
            self.lines += 1
            is_restated, restated = restated > 0, max(0, restated - 1)
            damaged = self.damaged
            found = self._decode(line)
            if self.damaged > damaged:
                since = self.headers[-1].time if self.headers and self.headers[-1].half else None
            if found is None:
                continue
            event = found.event
            if isinstance(event, Header):
                known = known and event.number == self.headers[-1].number + 1
                restated = event.restated
                self.left_out += event.left_out
                self.headers.append(event)
                continue
            self.left_out += found.left_out
            if is_restated and known:
                continue
            if since is not None and (getattr(event, "time", None) or since) < since:
                continue
            yield Entry(found.stream, event)

    def _decode(self, line: bytes | None) -> Decoded | None:
        """Return what a line says; None if it is skipped."""
        if line is None:
            self._note_damage(b"", f"longer than {MAX_LINE} bytes")
            return None
        try:
            return decode(line)
        except UnknownEventError:
            self.unknown += 1
        except LineError as error:
            self._note_damage(line, str(error))
        return None

    def _note_damage(self, line: bytes, reason: str) -> None:
        self.damaged += 1
        if len(self.examples) < _MAX_EXAMPLES:
            start = line[:_EXAMPLE_BYTES].decode("utf-8", "backslashreplace")
            self.examples.append(f"line {self.lines}: {reason}: {start}")


def read(path: str | os.PathLike[str]) -> Recording:
    """Return the recording in a file, to iterate over; see :class:`Recording`."""
    return Recording(path)


def _lines(file: Descriptor, start: int, end: int | None) -> Iterator[bytes | None]:
    """Yield the lines of a range; None for one that is too long.

    Args:
        file: to read.
        start: of the range, in bytes.
        end: of a half, which ends at a NUL before that; None of a file that only grows.
    """
    rest = b""
    too_long = ended = False
    while not ended:
        length = _CHUNK_BYTES if end is None else min(_CHUNK_BYTES, end - start)
        chunk = os.pread(file.fileno(), length, start)
        start += len(chunk)
        ended = not chunk
        if end is not None:
            chunk, nul, _ = chunk.partition(b"\0")
            ended = ended or bool(nul)
        lines = chunk.split(b"\n")
        lines[0] = rest + lines[0]
        rest = lines.pop()
        for line in lines:
            yield None if too_long or len(line) > MAX_LINE else line
            too_long = False
        if len(rest) > MAX_LINE:
            rest, too_long = b"", True
    if rest or too_long:
        yield None if too_long else rest


class RecordingWriter:
    """Writes events to a plain file; see :func:`write_recording`.

    Synchronization: for one thread.
    """

    def __init__(self, fd: int, source: str) -> None:
        self._fd = fd
        header = Header(VERSION, 0, None, None, source, None, time.time_ns())
        self._buffer = bytearray(encode_header(header))

    def write(self, events: Iterable[Event], stream: int = 0) -> None:
        """Append events of a stream.

        Raises:
            OSError: the file cannot be written.
        """
        for event in events:
            self._buffer += encode(event, stream)
            if len(self._buffer) > _BUFFER_BYTES:
                self.flush()

    def flush(self) -> None:
        """Write what is buffered.

        Raises:
            OSError: the file cannot be written.
        """
        while self._buffer:
            del self._buffer[: os.write(self._fd, self._buffer)]


@contextlib.contextmanager
def write_recording(path: str | os.PathLike[str], source: str) -> Iterator[RecordingWriter]:
    """Write events to a new file, which takes its name when the block ends without an exception.

    The file has no limit. Only its owner can read it (mode 0600).

    Args:
        path: of the file. A recording of that name is replaced, another file is not.
        source: what the events are of, for people.

    Raises:
        OSError: the file cannot be written, or the name is another file's.
    """
    with new_file(path, replaceable=is_recording) as fd:
        writer = RecordingWriter(fd, source)
        yield writer
        writer.flush()


def is_recording(fd: int) -> bool:
    """Return whether a file is a recording, or empty: it may be replaced by another one."""
    start = os.pread(fd, len(HEADER_START), 0)
    return start == HEADER_START or not start
