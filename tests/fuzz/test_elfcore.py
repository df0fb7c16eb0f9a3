"""ELF cores that a machine has spoilt; ``XENMAPCACHE_FUZZ`` says how many."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.effort import calls_at_most
from tests.fuzz.bounded import bounded, check_pages, write
from tests.images.writers import Load, elf_core, elf_core_of, memory, note
from xenmapcache import CorruptImageError, UnsupportedOperationError
from xenmapcache.address import PAGE_SIZE
from xenmapcache.backends.elfcore import ElfCoreBackend

pytestmark = pytest.mark.slow

RANGES = [(1, 2), (0x10, 1), (0, 3)]
SEEDS = [
    elf_core_of(RANGES),
    elf_core_of(RANGES, bits=32, align=PAGE_SIZE),
    elf_core([Load(0, memory(0, 1))], notes=note(b"QEMU", 0, bytes(40)) * 3, many=True),
]
HEADERS = 64 + 56 * 4 + 64
NUMBERS = st.sampled_from(
    [0, 1, 4, 7, 0xFFF, 0x1000, 0x1FFF, 2**16 - 1, 2**31, 2**32 - 1, 2**52 - 1, 2**63, 2**64 - 1]
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "vmcore"


def check(path: Path, content: bytes) -> None:
    """Open it, whole and what is intact of it, and read all pages; or an error names the file."""
    write(path, content)
    for salvage in (False, True):
        with calls_at_most(10_000):
            try:
                with ElfCoreBackend(path=path, salvage=salvage) as backend:
                    backend.describe()
                    assert sum(len(note.data) for note in backend.notes) <= 8 * len(content)
                    check_pages(backend, content)
            except (CorruptImageError, UnsupportedOperationError) as error:
                assert str(path) in str(error)


PLACES = st.one_of(st.integers(0, HEADERS), st.integers(0, len(SEEDS[0])))


@bounded
@given(
    seed=st.sampled_from(SEEDS),
    changes=st.lists(st.tuples(PLACES, st.sampled_from("BHIQ"), NUMBERS), min_size=1, max_size=4),
)
@example(seed=SEEDS[0], changes=[(56, "H", 2**16 - 1)])  # segments that are counted nowhere
@example(seed=SEEDS[2], changes=[(64 + 56 * 2 + 44, "I", 2**32 - 1)])  # that many
@example(seed=SEEDS[0], changes=[(40, "Q", 2**64 - 1), (58, "H", 64), (60, "H", 1)])
@example(seed=SEEDS[0], changes=[(40, "Q", 64), (58, "H", 64), (60, "H", 3)])
@example(seed=SEEDS[0], changes=[(64, "I", 2)])  # PT_DYNAMIC
@example(seed=SEEDS[0], changes=[(64 + 56, "I", 3)])  # PT_INTERP
@example(seed=SEEDS[0], changes=[(64 + 56 * 2 + 24, "Q", 2**64 - 2)])
def test_changed_numbers(file: Path, seed: bytes, changes: list[tuple[int, str, int]]) -> None:
    """Numbers that are put anywhere, most of all into headers and notes."""
    content = bytearray(seed)
    for place, form, number in changes:
        size = struct.calcsize(form)
        place = min(place, len(content) - size)
        struct.pack_into(f"<{form}", content, place, number & (1 << 8 * size) - 1)
    check(file, bytes(content))


@bounded
@given(seed=st.sampled_from(SEEDS), cut=st.integers(0, len(SEEDS[0])), junk=st.binary(max_size=80))
@example(seed=SEEDS[0], cut=len(SEEDS[0]), junk=b"")
@example(seed=SEEDS[0], cut=5, junk=b"\x02" + bytes(80))
def test_cut_off_and_continued(file: Path, seed: bytes, cut: int, junk: bytes) -> None:
    """A part of a file, with any bytes after it."""
    check(file, seed[:cut] + junk)


@bounded
@given(
    loads=st.lists(
        st.tuples(NUMBERS, st.integers(0, 3 * PAGE_SIZE), st.integers(-1, 1)), max_size=6
    ),
    bits=st.sampled_from([64, 32]),
    many=st.booleans(),
    notes=st.binary(max_size=60),
)
def test_made_up(
    file: Path, loads: list[tuple[int, int, int]], bits: int, many: bool, notes: bytes
) -> None:
    """Any segments, that overlap, end anywhere, and claim more or less memory than they have."""
    segments = [
        Load(address & (1 << bits) - 1, memory(7, 3)[:size], max(0, size + more))
        for address, size, more in loads
    ]
    check(file, elf_core(segments, bits=bits, many=many, notes=notes))
