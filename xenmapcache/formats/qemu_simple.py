"""QEMU's binary trace file, of its trace backend "simple", file version 4 (QEMU 2.8 and later).

The file is a header and records, in the byte order of the machine that wrote it, without
padding. A mapping record names an event's number; QEMU writes one for each event of the build
before the first event. An event record has a number, a time in ns, its own length, a process
number and its arguments. QEMU may drop events if it writes slower than they come; it then says
how many.
"""

from __future__ import annotations

import struct
from typing import Final, Literal

from ..errors import UnsupportedOperationError
from ..escape import printable
from .qemu_events import EVENTS, Assembler
from .qemu_runs import Found

_BEGIN: Final = 0xFFFF_FFFF_FFFF_FFFF
_MAGIC: Final = 0xF2B1_77CB_0AA4_29B4
_VERSION: Final = 4
_DROPPED: Final = 0xFFFF_FFFF_FFFF_FFFE
_MAPPING, _EVENT = 0, 1
_HEADER_BYTES: Final = 24
_TYPE_BYTES: Final = 8
_MAPPING_BYTES: Final = 20
_RECORD_BYTES: Final = 32
_LENGTH_BYTES: Final = 24
"""Of an event record, without its type and its arguments, which its length counts."""
_MAX_NAME: Final = 512
_MAX_LENGTH: Final = 1 << 13
_MAX_EVENTS: Final = 1 << 16
_SHOWN_PLACES: Final = 5

ByteOrder = Literal["little", "big"]


def byte_order(start: bytes) -> ByteOrder | None:
    """Return the byte order of a trace file that begins with these bytes; None if it is another."""
    for order in ("little", "big"):
        if start[:16] == _BEGIN.to_bytes(8, order) + _MAGIC.to_bytes(8, order):
            return order
    return None


class SimpleParser:
    """Parses a trace file, chunk by chunk, in bounded memory.

    After a damaged record, parsing continues at the next bytes that can be an event.

    Args:
        start: the first 24 bytes of the file.
        path: of the file, for messages.

    Attributes:
        assembler: what makes events of records.
        lines: how many event records were read.
        others: records of events that are not looked into.
        damaged: how often bytes outside of any record were skipped.
        damaged_bytes: how many bytes that were.
        dropped: events that QEMU has dropped, by its own count.
        examples: where the first damaged records are.
        forms: always ``{"simple"}``.

    Raises:
        UnsupportedOperationError: the file has another version.

    Synchronization: for one thread.
    """

    format = "simple"

    def __init__(self, start: bytes, path: str) -> None:
        order = byte_order(start) or "little"
        version = int.from_bytes(start[16:_HEADER_BYTES], order)
        if version != _VERSION:
            raise UnsupportedOperationError(
                f"{printable(path)}: trace file version is {version}; only {_VERSION} is read, "
                "which QEMU 2.8 and later write: trace to the log instead"
            )
        mark = "<" if order == "little" else ">"
        self._mapping = struct.Struct(f"{mark}QQL")
        self._record = struct.Struct(f"{mark}QQQII")
        self._numbers = {count: struct.Struct(f"{mark}{count}Q") for count in {*EVENTS.values(), 1}}
        self._event_type = _EVENT.to_bytes(_TYPE_BYTES, order)
        self._names: dict[int, str | None] = {_DROPPED: None}
        self.assembler = Assembler()
        self.lines = self.others = self.damaged = self.damaged_bytes = self.dropped = 0
        self.examples: list[str] = []
        self.forms = {"simple"}
        self._rest = b""
        self._offset = 0  # of the rest in the file
        self._skips = False

    def feed(self, data: bytes) -> list[Found]:
        """Return the events of the records that are complete now."""
        data = self._rest + data
        place = 0
        if not self._offset:
            if len(data) < _HEADER_BYTES:
                self._rest = data
                return []
            place = _HEADER_BYTES
        place = self._parse(data, place)
        self._rest = data[place:]
        self._offset += place
        return self.assembler.take()

    def finish(self) -> list[Found]:
        """End: a record that is cut off is damaged."""
        if self._rest:
            self._note_damaged(self._offset, len(self._rest))
            self._rest = b""
        self.assembler.end()
        return self.assembler.take()

    def _parse(self, data: bytes, place: int) -> int:
        """Parse records from a place on; return where the first incomplete one begins."""
        while place + _TYPE_BYTES <= len(data):
            record_type = data[place : place + _TYPE_BYTES]
            if record_type == self._event_type:
                length = self._parse_event(data, place)
            elif any(record_type) or self._skips:
                length = None
            else:
                length = self._parse_mapping(data, place)
            if length == 0:
                break
            if length is None:
                found = self._next_event(data, place + 1)
                self._note_damaged(self._offset + place, found - place)
                self._skips = True
                if found + _RECORD_BYTES > len(data):
                    return found
                place = found
            else:
                self._skips = False
                place += length
        return place

    def _next_event(self, data: bytes, place: int) -> int:
        """Return where an event can begin; near the end, its record may be incomplete."""
        while True:
            place = data.find(self._event_type, place)
            if place < 0:
                return len(data) - _TYPE_BYTES + 1
            if place + _RECORD_BYTES > len(data) or self._is_event(data, place):
                return place
            place += 1

    def _is_event(self, data: bytes, place: int) -> bool:
        _, number, _, length, _ = self._record.unpack_from(data, place)
        if number not in self._names or not _LENGTH_BYTES <= length <= _MAX_LENGTH:
            return False
        count = 1 if number == _DROPPED else EVENTS.get(self._names[number] or "")
        return count is None or length == _LENGTH_BYTES + count * 8

    def _parse_event(self, data: bytes, place: int) -> int | None:
        """Return a record's length, with its type; 0 if it is incomplete, None if damaged."""
        if place + _RECORD_BYTES > len(data):
            return 0
        if not self._is_event(data, place):
            return None
        _, number, time, length, _ = self._record.unpack_from(data, place)
        if place + _TYPE_BYTES + length > len(data):
            return 0
        self.lines += 1
        self.assembler.note_time(time)
        name = self._names[number]
        if name is not None:
            numbers = self._numbers[EVENTS[name]].unpack_from(data, place + _RECORD_BYTES)
            self.assembler.add(name, time, numbers)
        elif number == _DROPPED:
            self.dropped += self._numbers[1].unpack_from(data, place + _RECORD_BYTES)[0]
        else:
            self.others += 1
        return _TYPE_BYTES + int(length)

    def _parse_mapping(self, data: bytes, place: int) -> int | None:
        """Return a record's length; 0 if it is incomplete, None if it is damaged."""
        if place + _MAPPING_BYTES > len(data):
            return 0
        _, number, length = self._mapping.unpack_from(data, place)
        if not 0 < length <= _MAX_NAME or len(self._names) >= _MAX_EVENTS or number == _DROPPED:
            return None
        end = place + _MAPPING_BYTES + length
        if end > len(data):
            return 0
        name = data[end - length : end].decode("ascii", "replace")
        self._names[number] = name if name in EVENTS else None
        return int(_MAPPING_BYTES + length)

    def _note_damaged(self, offset: int, count: int) -> None:
        self.damaged_bytes += count
        if not self._skips:
            self.damaged += 1
            if len(self.examples) < _SHOWN_PLACES:
                self.examples.append(f"at {offset:#x}")
