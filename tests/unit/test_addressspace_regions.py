"""AddressSpace.regions: what is mapped, with which rights, and what hostile tables cost."""

from __future__ import annotations

from itertools import islice, pairwise

import pytest

from tests.conftest import HOLE
from tests.effort import calls_at_most
from tests.page_tables import PageTables
from xenmapcache import AddressSpace, MapCache, MockDomain, TranslationError
from xenmapcache.address import GiB, MiB
from xenmapcache.formats.pagetables import Rights

AT = 0x200000
UPPER = 0xFFFF_8880_0000_0000
RW, RX, R = Rights(True, False, True), Rights(False, True, True), Rights(False, False, True)
NX = 1 << 63


@pytest.fixture
def tables(domain: MockDomain) -> PageTables:
    return PageTables(domain)


@pytest.fixture
def space(tables: PageTables, cache: MapCache) -> AddressSpace:
    return AddressSpace(cache, tables.root)


def test_pages_are_merged(tables: PageTables, space: AddressSpace) -> None:
    """If they follow each other in both memories and allow the same; across tables, too."""
    assert list(space.regions()) == []
    tables.map(0x1FF000, AT - 0x1000)
    tables.map(0x200000, AT, 2 * MiB)
    tables.map(0x400000, AT + 2 * MiB)
    tables.map(0x401000, AT + 2 * MiB + 0x1000, bits=5)
    tables.map(0x402000, AT)
    tables.map(0x404000, AT + 0x1000, bits=NX | 7)
    tables.map(UPPER, AT + 0x2000, bits=NX | 5)
    both = Rights(True, True, True)
    assert list(space.regions()) == [
        (0x1FF000, 2 * MiB + 0x2000, AT - 0x1000, both),
        (0x401000, 0x1000, AT + 2 * MiB + 0x1000, RX),
        (0x402000, 0x1000, AT, both),
        (0x404000, 0x1000, AT + 0x1000, RW),
        (UPPER, 0x1000, AT + 0x2000, R),
    ]


def test_a_range_of_them(tables: PageTables, space: AddressSpace) -> None:
    """Pages are clipped at both ends, to the byte."""
    tables.map(0x200000, AT, 2 * MiB)
    tables.map(0x400000, 0x800000)
    tables.map(UPPER, 0, GiB)
    found = [region[:3] for region in space.regions(0x200010, 0x400001)]
    assert found == [(0x200010, 0x1FFFF0, AT + 0x10), (0x400000, 1, 0x800000)]
    assert [region[:3] for region in space.regions(UPPER + 5, UPPER + 9)] == [(UPPER + 5, 4, 5)]
    assert list(space.regions(0x300000, 0x300000)) == []
    assert list(space.regions(0x8000_0000_0000, 0x9000_0000_0000)) == []


@pytest.mark.parametrize("bit", ["table", "page"])
def test_rights_of_x86(
    domain: MockDomain, cache: MapCache, tables: PageTables, space: AddressSpace, bit: str
) -> None:
    """A right needs all entries of the way."""
    place = tables.map(0, AT)
    if bit == "table":
        place = tables.places(0)[1]
    before = tables.get(place)
    for change, rights in (
        (0, (True, True, True)),
        (2, (False, True, True)),
        (4, (True, True, False)),
        (NX, (True, False, True)),
    ):
        tables.set(place, before ^ change)
        assert next(space.regions()).rights == rights


UXN, PXN, DBM, AP1, AP2 = 1 << 54, 1 << 53, 1 << 51, 1 << 6, 1 << 7


@pytest.mark.parametrize(
    ("table", "page", "rights"),
    [
        (0, AP1, (True, True, True)),
        (0, AP1 | UXN, (True, False, True)),
        (0, AP1 | PXN, (True, True, True)),  # the kernel cannot execute it, the user can
        (0, UXN, (True, True, False)),
        (0, PXN, (True, False, False)),
        (0, AP2, (False, True, False)),
        (0, AP2 | DBM, (True, True, False)),
        (1 << 59, AP1, (True, True, True)),
        (1 << 59, 0, (True, False, False)),
        (1 << 60, AP1, (True, False, True)),
        (1 << 60, 0, (True, True, False)),
        (1 << 61, AP1, (True, True, False)),
        (1 << 62, AP1, (False, True, True)),
    ],
)
def test_rights_of_arm(
    domain: MockDomain, cache: MapCache, table: int, page: int, rights: tuple[bool, bool, bool]
) -> None:
    """Tables of each level may take rights away; a page has its own for kernel and user."""
    tables = PageTables(domain, "arm64")
    space = AddressSpace(cache, tables.root, machine="arm64", half="lower")
    tables.map(0, AT, bits=page | 3)
    place = tables.places(0)[1]
    tables.set(place, tables.get(place) | table)
    assert next(space.regions()).rights == rights
    page_found = list(space.walk(0))[-1].page
    assert page_found is not None
    assert page_found.rights == rights


def fill(tables: PageTables, table: int, entry: int) -> None:
    """Have all entries of a table be the same."""
    tables.domain.write(table, entry.to_bytes(8, "little") * 512)


def test_tables_that_lead_to_themselves(tables: PageTables, space: AddressSpace) -> None:
    """A recursive entry is left out: its table is on the way already. The rest is found."""
    tables.map(0x1000, AT)
    tables.set(tables.root + 511 * 8, tables.root | 0x67)
    tables.set(tables.places(0x1000)[2] + 8, tables.places(0x1000)[1] & -4096 | 0x67)
    assert [region[:3] for region in space.regions()] == [(0x1000, 0x1000, AT)]
    # Translated it is, as the processor does: Windows reads its page tables in this way.
    assert space.translate(0xFFFF_FFFF_FFFF_FFF8) == tables.root + 0xFF8


def test_a_table_that_is_all_of_itself(tables: PageTables, space: AddressSpace) -> None:
    """512 entries to itself: nothing is found, at once. A translation takes the levels' steps."""
    fill(tables, tables.root, tables.root | 0x67)
    with calls_at_most(5000):
        assert list(space.regions()) == []
    assert space.translate(0x1000) == tables.root
    assert len(list(space.walk(0))) == 4


@pytest.mark.parametrize("leaf", [0, HOLE[0] | 0x67])
def test_four_tables_that_could_be_2_to_the_27(
    tables: PageTables, space: AddressSpace, leaf: int
) -> None:
    """Tables that led to nothing are not read again, so each is read once for its level."""
    chain = [tables.root, *(tables.table() for _ in range(3))]
    for table, below in pairwise(chain):
        fill(tables, table, below | 0x67)
    if leaf:
        fill(tables, chain[2], leaf)
    with calls_at_most(12000):
        assert list(space.regions(max_tables=12)) == []


def test_a_page_that_is_mapped_everywhere(tables: PageTables, space: AddressSpace) -> None:
    """There are 2**36 regions: they come one by one, each after a few steps."""
    chain = [tables.root, *(tables.table() for _ in range(3))]
    for table, below in zip(chain, [*chain[1:], AT], strict=True):
        fill(tables, table, below | 0x67)
    regions = space.regions()
    next(regions)
    with calls_at_most(40000):
        found = [region.address for region in islice(regions, 1000)]
    assert found == [number * 4096 for number in range(1, 1001)]


def test_it_gives_up(tables: PageTables, space: AddressSpace) -> None:
    """After as many tables as were allowed, the error says where to continue."""
    for number in range(3):
        tables.map(UPPER + number * 2 * MiB, AT)
    assert len(list(space.regions(max_tables=7))) == 3  # the root is read for each half
    regions = space.regions(max_tables=6)
    assert next(regions).address == UPPER
    with pytest.raises(TranslationError, match="6 page tables were read") as caught:
        list(regions)
    assert caught.value.address == UPPER + 4 * MiB
    assert len(list(space.regions(caught.value.address, max_tables=4))) == 1
    with pytest.raises(TranslationError, match="0 page tables were read"):
        list(space.regions(max_tables=0))
