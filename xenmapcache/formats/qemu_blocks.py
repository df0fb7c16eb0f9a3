"""Blocks of a log of QEMU's: the frequent lines of a chunk, found by two regular expressions.

A block has one form of prefix. A line of another form, or one that is damaged, is left to the
parser of single lines in :mod:`.qemu_log`. What is found here is a part of what that parser reads,
and means the same: a test compares both.

Repetitions are possessive (``{1,10}+``) wherever what follows cannot match them. Such a repetition
remembers no way back, and takes less than half of the time.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from itertools import repeat
from typing import Final, NamedTuple

from .qemu_runs import Times

STAMP: Final = rb"[0-9]{1,10}+@[0-9]{1,11}+\.[0-9]{6}+:"
"""The prefix of QEMU 2.6 to 10.0."""
ISO: Final = rb"[0-9]{4}+-[0-9]{2}+-[0-9]{2}+T[0-9:]{8}+(?:\.[0-9]{1,6}+)?Z"
"""The time of QEMU 10.1 and later, without the blank after it."""
ACCESS_GROUPS: Final = 5
"""Of :attr:`Form.accesses`."""
NOTICE_GROUPS: Final = 5
"""Of :attr:`Form.notices`."""

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
_SECONDS_LENGTH: Final = len("2025-07-21T18:43:28")
_SAMPLES: Final = 4
_SAMPLE_BYTES: Final = 1 << 14
_HEX: Final = rb"0x[0-9a-f]{1,16}+"
_OLD_HEX: Final = rb"(?:0x[0-9a-f]{1,16}+|0)"


class Form(NamedTuple):
    """A form of prefix. Immutable.

    Attributes:
        name: as :attr:`.LogParser.forms` has it.
        accesses: matches a hit or a miss. Groups: the time of the first line, the address,
            the index of the bucket, the time of the last line, and the host address. A hit lacks
            the last three.
        ioreqs: matches ``handle_ioreq``, but no INVALIDATE. Its group is what is counted: all that
            :func:`.decode_ioreq` needs, and of MMIO only the page.
        notices: matches an INVALIDATE, or DMA that was held across one. Groups: the time, which the
            message of QEMU 2.10 to 8.2 lacks; the bucket and the host address of an event; and
            these of a message. An INVALIDATE lacks the last four. The last line may lack its
            end.
        times: returns the times of texts, in ns.
    """

    name: str
    accesses: re.Pattern[bytes]
    ioreqs: re.Pattern[bytes]
    notices: re.Pattern[bytes]
    times: Callable[[Sequence[bytes]], Times]


def iso_time(text: bytes) -> int | None:
    """Return a time in ns since the epoch; None if the calendar lacks it."""
    try:
        moment = datetime.fromisoformat(text.decode())
    except ValueError:
        return None
    return (moment - _EPOCH) // _MICROSECOND * 1000


def _stamp_times(texts: Sequence[bytes]) -> Times:
    # One pass in C over all of them: join them with what turns microseconds into nanoseconds.
    numbers = (b"000 ".join(texts) + b"000").replace(b".", b"")
    return list(map(int, numbers.split()[: len(texts)]))


def _iso_times(texts: Sequence[bytes]) -> Times:
    seconds = {text[:_SECONDS_LENGTH] for text in texts}
    starts = {text: iso_time(text + b"Z") for text in seconds}
    if None in starts.values():
        return list(map(iso_time, texts))
    return [
        (starts[text[:_SECONDS_LENGTH]] or 0) + int(text[_SECONDS_LENGTH + 1 : -1]) * 1000
        for text in texts
    ]


def _no_times(texts: Sequence[bytes]) -> Times:
    return [None] * len(texts)


def _form(name: str, prefix: bytes, time: bytes, times: Callable[[Sequence[bytes]], Times]) -> Form:
    """Return a form of a prefix, which is given without and with a group for its time."""
    return Form(
        name,
        re.compile(
            rb"\n%bxen_map_cache want (%b)\n%bxen_(?:map_cache_return 0x[1-9a-f][0-9a-f]{0,15}+|"
            rb"remap_bucket index (%b)\n%bxen_map_cache_return (0x[1-9a-f][0-9a-f]{0,15}+))(?=\n)"
            % (time, _HEX, prefix, _HEX, time)
        ),
        # What may follow the group is one expression, so the group looks ahead at its own.
        re.compile(
            rb"\n%bhandle_ioreq I/O=%b "
            rb"(type=(?:"
            rb"0 dir=[01] df=[01] ptr=[01] port=%b(?= data=)|"
            rb"1 dir=[01] df=[01] ptr=[01] port=0x[0-9a-f]{0,13}(?=[0-9a-f]{3} data=)|"
            rb"2 dir=[01] df=[01] ptr=[01] port=%b data=%b(?= count=)))"
            rb"[0-9a-f]{0,3}(?: data=%b)? count=[0-9]{1,10}+ size=[0-9]{1,10}+(?=\n)"
            % (prefix, _HEX, _OLD_HEX, _OLD_HEX, _OLD_HEX, _OLD_HEX)
        ),
        re.compile(
            rb"\n(?:%b(?:"
            rb"handle_ioreq I/O=%b type=8 dir=[0-9] df=[0-9] ptr=[0-9] port=%b data=%b "
            rb"count=[0-9]{1,10}+ size=[0-9]{1,10}+|"
            rb"xen_invalidate_map_cache Locked DMA mapping while invalidating mapcache (%b) -> (%b)"
            rb" is present)|"
            rb"Locked DMA mapping while invalidating mapcache! ([0-9a-f]{16}+) -> (%b) is present)"
            rb"(?=\n|\Z)" % (time, _HEX, _OLD_HEX, _OLD_HEX, _HEX, _HEX, _HEX)
        ),
        times,
    )


_ISO_TIME: Final = rb"[0-9]{4}+-[0-9]{2}+-[0-9]{2}+T[0-9:]{8}+\.[0-9]{6}+Z"
FORMS: Final = {
    form.name: form
    for form in (
        _form("pid", STAMP, rb"[0-9]{1,10}+@([0-9]{1,11}+\.[0-9]{6}+):", _stamp_times),
        _form("iso", rb"%b " % _ISO_TIME, rb"(%b) " % _ISO_TIME, _iso_times),
        _form("plain", b"", b"()", _no_times),
    )
}
"""Each form, by its name."""
_ANY: Final = re.compile(
    rb"\n(?:(?P<pid>%b)|(?P<iso>%b )|(?P<plain>))(?:xen_(?:map|invalidate_map)_cache|handle_ioreq) "
    % (STAMP, _ISO_TIME)
)


def form_of(text: bytes) -> Form:
    """Return the most frequent form in a few samples of a text; without events the plain one."""
    starts = [len(text) * number // _SAMPLES for number in range(_SAMPLES)]
    samples = [_ANY.search(text, start, start + _SAMPLE_BYTES) for start in starts]
    found = Counter(match.lastgroup for match in samples if match)
    return FORMS[max(found, key=found.__getitem__, default=None) or "plain"]


class Misses(NamedTuple):
    """Misses that follow each other, apart from hits, in columns of equal length. Immutable.

    Attributes:
        times: of ``xen_map_cache``, in ns.
        addresses: that were wanted.
        buckets: the indexes of the buckets.
        ends: the times of ``xen_map_cache_return``, in ns.
        hosts: the host addresses; never 0.
    """

    times: Times
    addresses: Sequence[int]
    buckets: Sequence[int]
    ends: Times
    hosts: Sequence[int]

    def part(self, start: int, end: int) -> Misses:
        """Return some of them, from one place to another."""
        times, addresses, buckets, ends, hosts = self
        return Misses(
            times[start:end],
            addresses[start:end],
            buckets[start:end],
            ends[start:end],
            hosts[start:end],
        )


def decode_misses(form: Form, groups: Sequence[Sequence[bytes]]) -> Misses:
    """Return misses of the columns of :attr:`Form.accesses`."""
    times, addresses, buckets, ends, hosts = groups
    both = form.times([*times, *ends])
    return Misses(
        both[: len(times)],
        decode_numbers(addresses),
        decode_numbers(buckets),
        both[len(times) :],
        decode_numbers(hosts),
    )


def decode_numbers(texts: Sequence[bytes]) -> list[int]:
    """Return hexadecimal numbers. Most come again and again, and each is converted once."""
    distinct = set(texts)
    numbers = dict(zip(distinct, map(int, distinct, repeat(16)), strict=True))
    return list(map(numbers.__getitem__, texts))
