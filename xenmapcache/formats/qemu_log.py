"""QEMU's log with trace events of its map cache, as text: ``/var/log/xen/qemu-dm-*.log``.

A line is a trace event with one of four prefixes, or a message. Two messages of QEMU 2.10 to 8.2
are what later became trace events. The forms are in docs/qemu-logs.md.

Theory of operation
    Nearly all lines of a large log are accesses and ioreqs. For these there is little work in
    Python for each line. A regular expression splits a chunk of the log into its ioreqs and the
    rest, and another one splits the rest into accesses and what is between them. Ioreqs and hits
    are counted by the text that tells them apart, and each text is converted once. Misses become
    events column by column. Only lines between are parsed one by one, and they say where a run of
    accesses ends. Ioreqs are therefore not in order with the others, which nothing needs; but an
    INVALIDATE matches neither expression, and keeps its place. A third expression finds INVALIDATEs
    and held DMA in what is left.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate, compress, count, groupby
from operator import itemgetter, not_
from typing import Any, Final

from ..address import PAGE_SHIFT
from ..events import RequestKey
from .qemu_blocks import (
    ACCESS_GROUPS,
    ISO,
    NOTICE_GROUPS,
    STAMP,
    Form,
    decode_misses,
    decode_numbers,
    form_of,
    iso_time,
)
from .qemu_events import EVENTS, MIB_SHIFT, Assembler, request_key
from .qemu_runs import Found

MAX_LINE_BYTES: Final = 1 << 16
_SHOWN_LINES: Final = 5
_SHOWN_BYTES: Final = 160
_MAX_DECODED: Final = 1 << 14

_BUCKET_OF = itemgetter(slice(None, -(MIB_SHIFT // 4)))
"""Cuts off the digits of an address in its MiB."""
_REQUEST: Final = re.compile(rb"type=(\d) dir=(\d) df=\d ptr=\d port=(\w*)(?: data=(\w+))?")

_LINE: Final = re.compile(
    rb"(?:[0-9]{1,10}@([0-9]{1,11})\.([0-9]{6}):|(%b) )?([a-z][a-z0-9_]*) (.*)" % ISO, re.DOTALL
)
_TORN: Final = re.compile(rb"\b(%b) (.*)" % b"|".join(each.encode() for each in EVENTS), re.DOTALL)
_REPEATED: Final = re.compile(
    rb"\n(?:%b|%b )?(?:handle_ioreq_(?:read|write)|cpu_ioreq_(?:pio|move)) I/O=[^\n]*(?=\n)"
    % (STAMP, ISO)
)
"""Events that say again what ``handle_ioreq`` has said."""
_TIME: Final = re.compile(rb"\n(?:[0-9]{1,10}@([0-9]{1,11})\.([0-9]{6}):|(%b) )" % ISO)
_EDGE_BYTES: Final = 1 << 12
_DIGITS: Final = rb"(0x[0-9a-f]{1,16}|0|\(nil\))"
_NUMBER: Final = rb"(0x[0-9a-f]{1,16}|[0-9]{1,20})"
_HELD: Final = re.compile(
    rb"Locked DMA mapping while invalidating mapcache! ([0-9a-f]{16}) -> %b is present" % _DIGITS
)
_REPLACED: Final = re.compile(
    rb"Replacing a dummy mapcache entry for ([0-9a-f]{16}) with ([0-9a-f]{16})"
)


def _fields(*names: bytes) -> re.Pattern[bytes]:
    return re.compile(b" ".join(b"%b=%b" % (name, _NUMBER) for name in names))


_CONFIG: Final = _fields(b"I/O", b"sbdf", b"reg", b"size", b"data")
_MISSING: Final = re.compile(rb"could not find " + _DIGITS)
_PRESENT: Final = re.compile(rb" *%b -> %b is present" % (_DIGITS, _DIGITS))
_TEXTS: Final = {
    "xen_map_cache": re.compile(rb"want " + _DIGITS),
    "xen_remap_bucket": re.compile(rb"index " + _DIGITS),
    "xen_map_cache_return": re.compile(_DIGITS),
    "xen_map_cache_init": re.compile(rb"nr_buckets = %b size %b" % (_DIGITS, _DIGITS)),
    "xen_replace_cache_entry_dummy": re.compile(
        rb"Replacing a dummy mapcache entry for %b with %b" % (_DIGITS, _DIGITS)
    ),
    "xen_invalidate_map_cache_entry_unlocked_not_found": _MISSING,
    "xen_invalidate_map_cache_entry_unlocked_found": _PRESENT,
    "xen_invalidate_map_cache_entry_unlocked_miss": re.compile(
        rb"Trying to unmap address %b that is not in the mapcache" % _DIGITS
    ),
    "xen_replace_cache_entry_unlocked_could_not_update_entry": re.compile(
        rb"Unable to update a mapcache entry for " + _DIGITS
    ),
    "xen_ram_addr_from_mapcache_not_found": _MISSING,
    "xen_ram_addr_from_mapcache_found": _PRESENT,
    "xen_ram_addr_from_mapcache_not_in_cache": re.compile(
        rb"Trying to find address %b that is not in the mapcache" % _DIGITS
    ),
    "xen_replace_cache_entry_unlocked": re.compile(
        rb"Trying to update an entry for %b that is not in the mapcache" % _DIGITS
    ),
    "xen_invalidate_map_cache": re.compile(
        rb"Locked DMA mapping while invalidating mapcache %b -> %b is present" % (_DIGITS, _DIGITS)
    ),
    "handle_ioreq": _fields(
        b"I/O", b"type", b"dir", b"df", b"ptr", b"port", b"data", b"count", b"size"
    ),
    "cpu_ioreq_config_read": _CONFIG,
    "cpu_ioreq_config_write": _CONFIG,
}
"""What follows an event's name, with a group for each of its numbers."""
_WORDS: Final = (b"xen_", b"ioreq", b"mapcache")
"""A line without any of them has neither such an event nor a message that is read."""
_FORMS: Final = {name.encode(): pattern for name, pattern in _TEXTS.items()}


class _Block:
    """The accesses of a block, in the columns of :attr:`.Form.accesses`.

    All of them are decoded at once, because a run between two INVALIDATEs may have only a few.
    """

    def __init__(
        self, form: Form, columns: Sequence[Sequence[bytes]], assembler: Assembler
    ) -> None:
        _, addresses, buckets, _, _ = columns
        self._assembler = assembler
        self._places = list(accumulate(map(bool, buckets), initial=0))
        """How many misses come before each access."""
        self._hits = list(map(_BUCKET_OF, compress(addresses, map(not_, buckets))))
        if self._hits:
            columns = [list(compress(each, buckets)) for each in columns]
        self._misses = decode_misses(form, columns)
        self._run = assembler.run_of(self._misses)

    def add(self, start: int, end: int) -> None:
        """Tell the assembler of the accesses from one place to another."""
        assembler, run = self._assembler, self._run
        first, last = self._places[start], self._places[end]
        assembler.begin_run(end - start, last - first)
        for text, number in Counter(self._hits[start - first : end - last]).items():
            assembler.add_hits(int(text[2:] or b"0", 16), number)
        if first == last:
            return
        if run is None or not assembler.add_run(run.part(first, last)):
            assembler.add_misses(self._misses.part(first, last))


class LogParser:
    """Parses a log, chunk by chunk, in bounded memory.

    Attributes:
        assembler: what makes events of lines.
        lines: how many were read.
        others: lines without an event that is looked into, such as QEMU's messages.
        damaged: lines that have the name of an event, but not its form; and overlong lines.
        damaged_bytes: how long these lines are, as far as they were read.
        dropped: always 0: QEMU drops no events of this form.
        examples: the first damaged lines, each cut off.
        forms: which forms of lines were seen: ``"pid"``, ``"iso"``, ``"plain"``, and ``"message"``
            for the two messages of QEMU 2.10 to 8.2.

    Synchronization: for one thread.
    """

    format = "text"

    def __init__(self) -> None:
        self.assembler = Assembler()
        self.lines = self.others = self.damaged = self.damaged_bytes = self.dropped = 0
        self.examples: list[str] = []
        self.forms: set[str] = set()
        self._rest = b""
        self._skips = False
        self._decoded: dict[bytes, RequestKey] = {}

    def feed(self, data: bytes) -> list[Found]:
        """Return the events of the lines that are complete now."""
        data = self._rest + data
        self._rest = b""
        if self._skips:
            _, end, data = data.partition(b"\n")
            if not end:
                return []
            self._skips = False
        end_of_lines = data.rfind(b"\n") + 1
        self._rest = data[end_of_lines:]
        if end_of_lines:
            self._parse(b"\n" + data[:end_of_lines])
        if len(self._rest) > MAX_LINE_BYTES:
            self.lines += 1
            self._note_damaged(self._rest)
            self._rest, self._skips = b"", True
        return self.assembler.take()

    def finish(self) -> list[Found]:
        """Return the events of a last line that has no end."""
        events = self.feed(b"\n") if self._rest else []
        self.assembler.end()
        return events + self.assembler.take()

    def _parse(self, text: bytes) -> None:
        """Parse lines; the text begins with an end of line, too."""
        self.lines += text.count(b"\n") - 1
        self._note_times(text)
        if text.count(b"_ioreq") > text.count(b"handle_ioreq "):
            text = _REPEATED.sub(b"", text)
        place = self._first_ioreq(text)
        self._parse_block(text[:place] + b"\n")
        self._parse_block(text[place:])

    def _first_ioreq(self, text: bytes) -> int:
        """Return where the line of the log's first ``handle_ioreq`` begins; otherwise 0.

        Before it, PCI configuration events count as ioreqs, and after it they do not.
        """
        if self.assembler.names["handle_ioreq"]:
            return 0
        return max(0, text.rfind(b"\n", 0, max(0, text.find(b"handle_ioreq "))))

    def _parse_block(self, text: bytes) -> None:
        form = form_of(text)
        ioreqs = text.count(b"handle_ioreq ")
        if ioreqs and ioreqs > text.count(b" type=8 "):  # those are INVALIDATEs, and stay
            parts = form.ioreqs.split(text)
            if len(parts) > 1:
                self.forms.add(form.name)
                self._count_ioreqs(parts[1::2])
                text = b"".join(parts[::2])
        parts = form.accesses.split(text)
        between = parts[:: ACCESS_GROUPS + 1]
        columns = [parts[group :: ACCESS_GROUPS + 1] for group in range(1, ACCESS_GROUPS + 1)]
        block = _Block(form, columns, self.assembler)
        start = 0
        for number in compress(count(), between):
            if start < number:
                self.forms.add(form.name)
                block.add(start, number)
            start = number
            self._parse_rest(form, between[number])
        # The text ends with an end of line, so the last accesses were taken before it.

    def _parse_rest(self, form: Form, text: bytes) -> None:
        """Parse what is between accesses."""
        parts = form.notices.split(text)
        if parts[0]:
            self._parse_others(parts[0])
        columns = [parts[group :: NOTICE_GROUPS + 1] for group in range(1, NOTICE_GROUPS + 1)]
        others = parts[NOTICE_GROUPS + 1 :: NOTICE_GROUPS + 1]
        start = 0
        for number in compress(count(1), others):
            self._take_notices(form, [column[start:number] for column in columns])
            start = number
            self._parse_others(others[number - 1])
        if start < len(others):
            self._take_notices(form, [column[start:] for column in columns])

    def _take_notices(self, form: Form, columns: list[list[Any]]) -> None:
        """Take notices that follow each other, in the columns of :attr:`.Form.notices`."""
        _, buckets, _, messages, _ = columns
        if None not in messages or not (any(messages) or any(buckets)):
            self._take_alike(form, columns)
            return
        kinds = zip(map(bool, buckets), map(bool, messages), strict=True)
        start = 0
        for _, group in groupby(kinds):
            end = start + len(list(group))
            self._take_alike(form, [column[start:end] for column in columns])
            start = end

    def _take_alike(self, form: Form, columns: list[list[Any]]) -> None:
        """Take notices of one kind: messages, INVALIDATEs, or events of held DMA."""
        stamps, buckets, hosts, messages, message_hosts = columns
        count = len(stamps)
        if messages[0]:
            self.forms.add("message")
            self.assembler.add_held(
                [None] * count, decode_numbers(messages), decode_numbers(message_hosts)
            )
            return
        self.forms.add(form.name)
        if buckets[0]:
            self.assembler.names["xen_invalidate_map_cache"] += count
            self.assembler.add_held(
                form.times(stamps), decode_numbers(buckets), decode_numbers(hosts)
            )
        else:
            self.assembler.names["handle_ioreq"] += count
            self.assembler.add_invalidated(form.times(stamps))

    def _parse_others(self, text: bytes) -> None:
        """Parse lines that are neither accesses nor notices."""
        if any(word in text for word in _WORDS):
            self._parse_lines(text)
        else:
            self.others += sum(map(bool, text.split(b"\n")))

    def _parse_lines(self, text: bytes) -> None:
        """Parse lines one by one."""
        for line in text.split(b"\n"):
            if line:
                self._parse_line(line)

    def _count_ioreqs(self, texts: list[bytes]) -> None:
        self.assembler.names["handle_ioreq"] += len(texts)
        for text, number in Counter(texts).items():
            key = self._decoded.get(text)
            if key is None:
                if len(self._decoded) >= _MAX_DECODED:
                    self._decoded.clear()
                key = self._decoded[text] = _decode_ioreq(text)
            self.assembler.add_requests(key, number)

    def _parse_line(self, line: bytes) -> None:
        match = _LINE.match(line)
        if match is None or match[4] not in _FORMS:
            self._parse_unusual(line)
            return
        seconds, micros, iso, name, text = match.groups()
        found = _FORMS[name].fullmatch(text)
        if found is None:
            self._note_damaged(line)
            return
        time = None
        if seconds is not None:
            time = int(seconds) * 1_000_000_000 + int(micros) * 1000
            self.forms.add("pid")
        elif iso is not None:
            time = iso_time(iso)
            self.forms.add("iso")
        else:
            self.forms.add("plain")
        self.assembler.add(name.decode(), time, tuple(map(_number, found.groups())))

    def _parse_unusual(self, line: bytes) -> None:
        """Parse a message; or an event to which another thread's message was prepended."""
        held, replaced = _HELD.search(line), _REPLACED.search(line)
        torn = _TORN.search(line)
        found = torn and _FORMS[torn[1]].fullmatch(torn[2])
        if torn and found:
            self.assembler.add(torn[1].decode(), None, tuple(map(_number, found.groups())))
        elif torn:
            self._note_damaged(line)
        elif held:
            self.forms.add("message")
            self.assembler.add_held((None,), (int(held[1], 16),), (_number(held[2]),))
        elif replaced:
            self.forms.add("message")
            self.assembler.add_replaced(None, int(replaced[1], 16), int(replaced[2], 16))
        else:
            self.others += 1

    def _note_damaged(self, line: bytes) -> None:
        self.damaged += 1
        self.damaged_bytes += len(line)
        if len(self.examples) < _SHOWN_LINES:
            self.examples.append(line[:_SHOWN_BYTES].decode("utf-8", "replace"))

    def _note_times(self, text: bytes) -> None:
        """Note the times of the first and the last lines."""
        for stamps in (
            [_TIME.search(text, 0, _EDGE_BYTES)],
            list(_TIME.finditer(text, max(0, len(text) - _EDGE_BYTES)))[-1:],
        ):
            for stamp in filter(None, stamps):
                seconds, micros, iso = stamp.groups()
                if iso is not None:
                    self.assembler.note_time(iso_time(iso))
                else:
                    self.assembler.note_time(int(seconds) * 1_000_000_000 + int(micros) * 1000)


def _decode_ioreq(text: bytes) -> RequestKey:
    match = _REQUEST.fullmatch(text)
    assert match is not None  # noqa: S101 - _IOREQ has matched it
    kind, direction, address, data = match.groups()
    number = int(address, 16)
    if kind == b"1":  # the text lacks the digits inside the page
        number <<= PAGE_SHIFT
    return request_key(int(kind), direction == b"1", number, int(data or b"0", 16))


def _number(text: bytes) -> int:
    if text == b"(nil)":
        return 0
    return int(text, 16 if text.startswith(b"0x") else 10)
