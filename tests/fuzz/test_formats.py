"""Parsers of formats over bytes in memory: any content gives a result or CorruptImageError.

``XENMAPCACHE_FUZZ`` says how many. Nothing is opened and nothing is mapped, so that many more
contents can be tried than through the backends.
"""

from __future__ import annotations

import struct
import tracemalloc
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.effort import FUZZ, calls_at_most
from tests.images import writers, xl_files
from xenmapcache import CorruptImageError
from xenmapcache.address import PAGE_SIZE, MiB
from xenmapcache.files.runs import Layout
from xenmapcache.formats import elf_core, lime, xl_core
from xenmapcache.formats.content import InMemory
from xenmapcache.formats.elf import Elf
from xenmapcache.formats.intervals import first_wins
from xenmapcache.formats.signatures import LONGEST, SIGNATURES, Signature, identify
from xenmapcache.formats.spans import LOST
from xenmapcache.formats.xl_save import SaveStream

bounded = settings(max_examples=FUZZ, deadline=None)
RANGES = [(1, 2), (0x10, 1), (0, 3)]
SMALL = xl_files.libxc(xl_files.pages(0, 3), xl_files.record(xl_files.END))
SEEDS = [
    writers.elf_core_of(RANGES),
    writers.elf_core_of(RANGES, bits=32),
    xl_files.dump_core([0, 1, xl_files.PADDING, 7]),
    xl_files.dump_core_pv([0, 1, 5]),
    xl_files.save(xl_files.pages(0, 1, (2, xl_files.XTAB)), xl_files.pages(1, copy=1)),
    writers.lime(RANGES),
    xl_files.libvirt(xl_files.libxl(SMALL, xl_files.record(xl_files.END))),
    xl_files.suspend_image(xl_files.section(0xF0, SMALL, 0), xl_files.section(0xF00, b"QEVM")),
]
NUMBERS = st.sampled_from(
    [0, 1, 2, 4, 7, 0xFF, 0x1000, 2**16 - 1, 2**24, 2**31, 2**32 - 1, 2**52 - 1, 2**63, 2**64 - 1]
)


def start_with(signature: Signature) -> bytes:
    """Return the shortest start of a file of some format, and zeros up to where tables look."""
    start = bytearray(LONGEST)
    for offset, data in ((signature.offset, signature.magic), *signature.also):
        start[offset : offset + len(data)] = data
    return bytes(start)


def parse_everything(data: bytes) -> None:
    """Give content to every parser. What they return lies inside of the content."""
    content = InMemory(data, "fuzzed")
    try:
        elf = Elf(content)
        assert all(load.offset + load.file_size <= len(data) for load in elf.loads())
        warnings: list[str] = []
        assert sum(len(note.data) for note in elf.segment_notes(warnings.append)) <= len(data)
        assert len(warnings) <= 1
        sections = elf.sections({*range(20)})
        assert all(s.offset + s.size <= len(data) for s in sections.values() if s.sh_type != 8)
        core = xl_core.parse(content)
        last = -1
        for gfns, offset in xl_core.frames(content, core):
            assert list(gfns) == sorted(set(gfns))
            assert gfns[0] > last
            last = gfns[-1]
            assert 0 < offset <= len(data) - len(gfns) * PAGE_SIZE
    except CorruptImageError as error:
        assert str(error).startswith("fuzzed")
    for salvage in (False, True):
        parse_spans(content, salvage=salvage)
    stream = SaveStream(content)
    try:
        for gfns, offset in stream.pages():
            assert list(gfns) == sorted(set(gfns))
            assert offset + len(gfns) * PAGE_SIZE * bool(offset) <= len(data)
        assert stream.header is not None
    except CorruptImageError as error:
        assert str(error).startswith("fuzzed")


def parse_spans(content: InMemory, *, salvage: bool) -> None:
    """Give content to the parsers that give spans."""
    warnings: list[str] = []
    try:
        end = 0
        for each in lime.ranges(content, salvage=salvage, warn=warnings.append):
            assert end <= each.first < each.end
            end = each.end
            assert each.offset == LOST or each.offset + each.end - each.first <= content.size
            assert each.offset >= 0 or salvage
    except CorruptImageError as error:
        assert str(error).startswith("fuzzed")
    try:
        core = elf_core.parse(content, salvage=salvage, zeros=salvage, warn=warnings.append)
        assert all(0 <= each.first < each.end <= 1 << 52 for each in core.spans)
        assert all(
            each.offset + each.end - each.first <= content.size
            for each in core.spans
            if each.offset >= 0
        )
        assert salvage or all(each.offset >= 0 for each in core.spans)
        Layout(core.spans)
    except CorruptImageError as error:
        assert str(error).startswith("fuzzed")
    assert len(warnings) < 10


def check(data: bytes) -> None:
    """Parse content within limits of work and memory that follow from its size."""
    tracemalloc.start()
    try:
        with calls_at_most(5000 + len(data)):
            parse_everything(data)
        assert tracemalloc.get_traced_memory()[1] < 2 * MiB + 8 * len(data)
    finally:
        tracemalloc.stop()


@pytest.mark.slow
@bounded
@given(data=st.binary(max_size=300))
@example(data=b"")
@example(data=b"\x7fELF")
@example(data=b"\x7fELF\x01\x01" + bytes(46))
def test_any_bytes(data: bytes) -> None:
    """What begins like no format, or like one."""
    for signature in (b"", *(each.magic for each in SIGNATURES)):
        check(signature + data)


@bounded
@given(
    seed=st.sampled_from(SEEDS),
    changes=st.lists(
        st.tuples(st.integers(0, 1 << 16), st.sampled_from("BHIQ"), NUMBERS), max_size=5
    ),
    cut=st.one_of(st.none(), st.integers(0, 1 << 16)),
)
def test_changed_contents(
    seed: bytes, changes: list[tuple[int, str, int]], cut: int | None
) -> None:
    """Numbers in the first KiB are changed, and the end is cut off."""
    data = bytearray(seed[:cut])
    for place, form, number in changes:
        size = struct.calcsize(form)
        place %= min(len(data), 1024) or 1
        if place + size <= len(data):
            struct.pack_into(f"<{form}", data, place, number & (1 << 8 * size) - 1)
    check(bytes(data))


@bounded
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12)), max_size=12))
def test_first_of_overlapping_intervals_wins(spans: list[tuple[int, int]]) -> None:
    """Each number belongs to the first interval that has it; parts ascend and are maximal."""
    intervals = [(start, start + length) for start, length in spans]
    expected = {}
    for number, (start, end) in reversed([*enumerate(intervals)]):
        expected.update(dict.fromkeys(range(start, end), number))
    parts = first_wins(intervals)
    assert parts == sorted(parts)
    found = {place: part.number for part in parts for place in range(part.start, part.end)}
    assert found == expected
    for one, other in pairwise(parts):
        assert one.end < other.start or (one.end == other.start and one.number != other.number)


def test_signatures() -> None:
    """Each is found by its magic, and says either who reads it or what to do."""
    for signature in SIGNATURES:
        assert identify(start_with(signature), signature.section) == signature
        assert signature.backend or signature.remedy
    assert identify(b"PK\2\3") is None


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, 4), (3, 1), (2, -1), (1 << 64, 1)])
def test_content_in_memory_ends_where_it_ends(offset: int, length: int) -> None:
    """A range outside of it is an error, as of a file."""
    content = InMemory(b"abc")
    assert content.read(1, 2) == b"bc"
    with pytest.raises(CorruptImageError, match="<bytes>: range .* which ends at 0x3"):
        content.read(offset, length)
