"""Files of xl dump-core that a machine has spoilt: they are read, or are CorruptImageErrors.

``XENMAPCACHE_FUZZ=100000`` says how many of them, else ``tests/effort.py``.
"""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.effort import calls_at_most
from tests.fuzz.bounded import bounded, write
from tests.images.xl_files import PADDING, PV_SECTIONS, PVH_SECTIONS, Core, dump_core, dump_core_pv
from xenmapcache import CorruptImageError
from xenmapcache.address import PAGE_SIZE
from xenmapcache.backends.coredump import CoredumpBackend

pytestmark = pytest.mark.slow

PFNS = [0, 1, 2, 5, 6, 0x100]
SEEDS = [dump_core(PFNS), dump_core_pv(PFNS, shift=8), dump_core([0, PADDING, 1, PADDING])]
HEADERS = 64 + 64 * 6 + 200
"""The end of the headers and of the notes that count: bytes after it are seldom changed."""

NUMBERS = st.sampled_from(
    [0, 1, 7, 0xFF, 4096, 2**16 - 1, 2**31, 2**32 - 1, 2**52, 2**63, 2**64 - 1]
)
PLACES = st.one_of(
    st.integers(0, HEADERS),
    st.integers(-80 - 16 * 8, -1),  # the index, or the names
    st.integers(0, len(SEEDS[0])),
)


@calls_at_most(100_000)
def check(path: Path, content: bytes) -> None:
    """Open it and read every present page."""
    write(path, content)
    try:
        with CoredumpBackend(path=path) as backend:
            assert len(backend._index.gfns) == backend.pages <= len(content) // PAGE_SIZE
            end = 0
            for gfn, count in backend.present(0, 1 << 40):
                assert end <= gfn
                end = gfn + count
                mapping = backend.map(gfn, count, writable=False)
                assert mapping.errors is None
                assert len(bytes(mapping.view(0, mapping.length))) == count * PAGE_SIZE
            assert end * PAGE_SIZE == backend.memory_end
    except CorruptImageError as error:
        assert str(path) in str(error)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "guest.core"


@bounded
@given(
    seed=st.sampled_from(SEEDS),
    changes=st.lists(st.tuples(PLACES, st.sampled_from("BHIQ"), NUMBERS), min_size=1, max_size=4),
)
@example(seed=SEEDS[0], changes=[(60, "H", 2**16 - 1)])  # 65,535 sections
@example(seed=SEEDS[0], changes=[(56, "H", 2**16 - 1)])  # segments, counted elsewhere
@example(seed=SEEDS[0], changes=[(40, "Q", 2**64 - 1)])  # their table beyond everything
@example(seed=SEEDS[0], changes=[(64 + 64 * 4 + 4, "I", 5)])  # a hash table, in pages
@example(seed=SEEDS[0], changes=[(64 + 64 + 4, "I", 2**32 - 1)])
def test_changed_numbers(file: Path, seed: bytes, changes: list[tuple[int, str, int]]) -> None:
    """Numbers that are put anywhere, most of all into headers, notes and the index."""
    content = bytearray(seed)
    for place, form, number in changes:
        size = struct.calcsize(form)
        place = min(place % len(content), len(content) - size)
        struct.pack_into(f"<{form}", content, place, number & (1 << 8 * size) - 1)
    check(file, bytes(content))


@bounded
@given(seed=st.sampled_from(SEEDS), cut=st.integers(0, len(SEEDS[0])), junk=st.binary(max_size=80))
def test_cut_off_and_continued(file: Path, seed: bytes, cut: int, junk: bytes) -> None:
    """A part of a file, with any bytes after it."""
    check(file, seed[:cut] + junk)


FIELD = st.sampled_from(["name", "type", "offset", "size", "link", "entry"])


@bounded
@given(
    pfns=st.lists(st.one_of(st.integers(0, 9), NUMBERS), max_size=8),
    order=st.lists(st.sampled_from([*PVH_SECTIONS, ".xen_p2m"]), max_size=8),
    changes=st.dictionaries(
        st.sampled_from([*PVH_SECTIONS, *PV_SECTIONS]),
        st.dictionaries(FIELD, NUMBERS.map(lambda number: number & 2**32 - 1), max_size=2),
        max_size=2,
    ),
    pages=st.one_of(st.none(), NUMBERS),
)
@example(pfns=[0, 1, 1], order=list(PVH_SECTIONS), changes={}, pages=None)
@example(pfns=[0, 5, 3], order=list(PVH_SECTIONS), changes={}, pages=None)
@example(pfns=[0], order=[*PVH_SECTIONS, ".xen_pages"], changes={}, pages=None)
@example(pfns=[PADDING, 2**52], order=list(PVH_SECTIONS), changes={}, pages=None)
@example(pfns=[], order=list(PVH_SECTIONS), changes={".xen_pages": {"type": 8}}, pages=2**40)
def test_made_up(
    file: Path,
    pfns: list[int],
    order: list[str],
    changes: dict[str, dict[str, int]],
    pages: int | None,
) -> None:
    """Files of the right form that say what cannot be."""
    check(file, Core(pfns, order=order, changes=changes, pages=pages).build())
