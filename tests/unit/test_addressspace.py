"""AddressSpace: every machine, number of levels and size of page, and what goes wrong at each."""

from __future__ import annotations

import pickle
import sys
from array import array
from collections.abc import Iterable
from typing import Literal

import pytest

from tests.conftest import HOLE
from tests.effort import calls_at_most
from tests.page_tables import NAMES, SHAPES, SHIFTS, PageTables
from xenmapcache import (
    AddressSpace,
    Backend,
    CacheFullError,
    ClosedError,
    FaultError,
    MapCache,
    MockDomain,
    TranslationError,
)
from xenmapcache.address import GiB, MiB
from xenmapcache.guest.addressspace import NOT_MAPPED, Step

END = 1 << 64
AT = 0x200000
"""Where tests put what is mapped."""
UPPER = {
    ("x86-64", 5): 0xFF11_0000_0000_0000,
    ("x86-64", 4): 0xFFFF_8880_0000_0000,
    ("arm64", 4): 0xFFFF_0000_4000_0000,
    ("arm64", 3): 0xFFFF_FFC0_4000_0000,
}
"""Kernel addresses that are a multiple of 1 GiB."""


def make(
    domain: MockDomain, cache: MapCache, machine: str = "x86-64", levels: int = 4
) -> tuple[PageTables, AddressSpace]:
    tables = PageTables(domain, machine, levels)
    return tables, AddressSpace(cache, tables.root, levels=levels, machine=machine)


@pytest.mark.parametrize("size", [4096, 2 * MiB, GiB])
@pytest.mark.parametrize(("machine", "levels"), SHAPES)
def test_a_page_of_each_size(
    domain: MockDomain, cache: MapCache, machine: str, levels: int, size: int
) -> None:
    """The offset in the page is kept, and the walk has an entry of each level down to the page."""
    tables, space = make(domain, cache, machine, levels)
    virtual = UPPER[machine, levels]
    place = tables.map(virtual, 0x4000_0000 if size == GiB else AT, size)
    physical = 0x4000_0000 if size == GiB else AT
    for offset in (0, 8, size - 1):
        assert space.translate(virtual + offset) == physical + offset
    steps = list(space.walk(virtual + 8))
    depth = SHIFTS[levels].index(size.bit_length() - 1)
    assert [step.level for step in steps] == list(NAMES[machine, levels][: depth + 1])
    assert steps[-1].entry_address == place
    assert steps[-1].entry == tables.get(place)
    assert [step.page for step in steps[:-1]] == [None] * depth
    page = steps[-1].page
    assert page is not None
    assert page[:2] == (physical + 8, size)
    assert page.rights == (True, True, True)
    (region,) = space.regions()
    assert region == (virtual, size, physical, (True, True, True))


@pytest.mark.parametrize("size", [4096, 2 * MiB])
@pytest.mark.parametrize(("machine", "levels"), SHAPES)
def test_each_level_can_fail(
    domain: MockDomain, cache: MapCache, machine: str, levels: int, size: int
) -> None:
    """The error has the level's name, the entry's place and its value."""
    tables, space = make(domain, cache, machine, levels)
    virtual = UPPER[machine, levels] + 0x1000
    tables.map(virtual & -size, AT, size)
    depth = SHIFTS[levels].index(size.bit_length() - 1)
    for level, place in enumerate(tables.places(virtual)[: depth + 1]):
        before = tables.get(place)
        tables.set(place, 0x5550)
        with pytest.raises(TranslationError, match="not present, so nothing is mapped") as caught:
            space.translate(virtual)
        error = caught.value
        assert (error.address, error.entry, error.entry_address) == (virtual, 0x5550, place)
        assert error.level == NAMES[machine, levels][level]
        assert str(error).startswith(
            f"virtual address {virtual:#x}: level {error.level}, entry 0x5550 at guest-physical "
            f"{place:#x}: "
        )
        steps: list[Step] = []
        with pytest.raises(TranslationError) as again:
            steps.extend(space.walk(virtual))
        assert again.value.args == error.args
        assert list(space.translate_many([virtual])) == [NOT_MAPPED]
        tables.set(place, before)
    assert space.translate(virtual) == AT + (virtual & size - 1)


@pytest.mark.parametrize(("machine", "levels"), SHAPES)
def test_a_table_that_is_missing(
    domain: MockDomain, cache: MapCache, machine: str, levels: int
) -> None:
    """The error has the level whose entry cannot be read, and the cause."""
    tables, space = make(domain, cache, machine, levels)
    virtual = UPPER[machine, levels]
    tables.map(virtual, AT)
    for level, place in enumerate(tables.places(virtual)[:-1]):
        before = tables.get(place)
        for missing in (HOLE[0], 0x7000_0000):
            tables.set(place, missing | before & 0xFFF)
            with pytest.raises(TranslationError, match="has no page there to read") as caught:
                space.translate(virtual)
            assert caught.value.level == NAMES[machine, levels][level + 1]
            assert caught.value.entry is None
            assert caught.value.entry_address is not None
            assert caught.value.entry_address & -4096 == missing
            assert isinstance(caught.value.__cause__, FaultError)
            assert list(space.translate_many([virtual])) == [NOT_MAPPED]
            assert list(space.regions()) == []
        tables.set(place, before)


@pytest.mark.parametrize(
    ("machine", "levels", "depth", "entry"),
    [
        ("x86-64", 5, 0, 0xE7),  # no pages of 256 TiB
        ("x86-64", 4, 0, 0xE7),  # nor of 512 GiB
        ("arm64", 4, 0, 0x741),
        ("arm64", 4, 3, 0x741),  # a block at the last level
    ],
)
def test_reserved_entries(
    domain: MockDomain, cache: MapCache, machine: str, levels: int, depth: int, entry: int
) -> None:
    """A large page where there can be none is an error, and no page."""
    tables, space = make(domain, cache, machine, levels)
    virtual = UPPER[machine, levels]
    tables.map(virtual, AT)
    tables.set(tables.places(virtual)[depth], AT | entry)
    with pytest.raises(TranslationError, match="reserved at this level") as caught:
        space.translate(virtual)
    assert caught.value.level == NAMES[machine, levels][depth]
    assert list(space.translate_many([virtual])) == [NOT_MAPPED]
    assert list(space.regions()) == []


def test_bits_that_are_not_of_the_address(domain: MockDomain, cache: MapCache) -> None:
    """PAT in the last level is not a large page; NX, keys and PCID are not addresses."""
    tables, space = make(domain, cache)
    virtual = UPPER["x86-64", 4]
    tables.map(virtual, AT, bits=0x87 | 0xFFF << 52)
    tables.map(virtual + 2 * MiB, AT, 2 * MiB, bits=0x1087)  # PAT of a large page
    assert space.translate(virtual + 1) == AT + 1
    assert space.translate(virtual + 2 * MiB + 1) == AT + 1
    same = AddressSpace(cache, tables.root | 0xFFF | 1 << 63)
    assert same.root == tables.root
    assert same.translate(virtual) == AT


@pytest.mark.parametrize(
    ("machine", "levels", "half", "inside", "outside"),
    [
        ("x86-64", 4, "upper", [0, 0x7FFF_FFFF_FFFF, 0xFFFF_8000_0000_0000, END - 1],
         [0x8000_0000_0000, 0xFFFF_7FFF_FFFF_FFFF]),
        ("x86-64", 5, "upper", [0, 0xFF_FFFF_FFFF_FFFF, 0xFF00_0000_0000_0000, END - 1],
         [0x100_0000_0000_0000, 0xFEFF_FFFF_FFFF_FFFF]),
        ("arm64", 4, "upper", [0xFFFF_0000_0000_0000, END - 1], [0, 0xFFFE_FFFF_FFFF_FFFF]),
        ("arm64", 4, "lower", [0, 0xFFFF_FFFF_FFFF], [0x1_0000_0000_0000, END - 1]),
        ("arm64", 3, "upper", [0xFFFF_FF80_0000_0000], [0xFFFF_FF7F_FFFF_FFFF]),
        ("arm64", 3, "lower", [0x7F_FFFF_FFFF], [0x80_0000_0000]),
    ],
)  # fmt: skip
def test_addresses_that_have_a_place(
    domain: MockDomain,
    cache: MapCache,
    machine: str,
    levels: int,
    half: Literal["upper", "lower"],
    inside: list[int],
    outside: list[int],
) -> None:
    """Both ends of each range; what is outside is an error that names the ranges."""
    tables = PageTables(domain, machine, levels)
    space = AddressSpace(cache, tables.root, levels=levels, machine=machine, half=half)
    for address in inside:
        tables.map(address & -4096, AT)
    for address in inside:
        assert space.translate(address) == AT + (address & 0xFFF)
    assert [(region.address, region.length) for region in space.regions()] == [
        (address & -4096, 4096) for address in inside
    ]
    for address in [*outside, END, 1 << 80]:
        with pytest.raises(TranslationError, match=rf"{machine} tables of {levels} levels have 0x"):
            space.translate(address)
    with pytest.raises(TranslationError) as caught:
        next(space.walk(outside[0]))
    assert (caught.value.level, caught.value.entry) == ("", None)
    many = list(space.translate_many([*outside, *inside]))
    assert many == [NOT_MAPPED] * len(outside) + [AT + (each & 0xFFF) for each in inside]


def test_wrong_arguments(domain: MockDomain, cache: MapCache, backend: Backend) -> None:
    """They are ValueErrors and TypeErrors, which say what to write."""
    _, space = make(domain, cache)
    with pytest.raises(TypeError, match=r"write AddressSpace\(MapCache\(backend\), root\)"):
        AddressSpace(backend, 0)  # type: ignore[arg-type] # the error
    with pytest.raises(TypeError, match="root must be an int"):
        AddressSpace(cache, "0")  # type: ignore[arg-type] # the error
    for root in (-1, END):
        with pytest.raises(ValueError, match="root must be an address"):
            AddressSpace(cache, root)
    with pytest.raises(ValueError, match="levels must be 4 or 5 for x86-64, not 3"):
        AddressSpace(cache, 0, levels=3)
    with pytest.raises(ValueError, match="levels must be 3 or 4 for arm64, not 5"):
        AddressSpace(cache, 0, levels=5, machine="arm64")
    with pytest.raises(ValueError, match="machine must be one of x86-64, arm64, not 'mips'"):
        AddressSpace(cache, 0, machine="mips")
    with pytest.raises(ValueError, match="half must be 'upper' or 'lower', not 'both'"):
        AddressSpace(cache, 0, half="both")  # type: ignore[arg-type] # the error
    with pytest.raises(ValueError, match="virtual address -0x1 is negative"):
        space.translate(-1)
    with pytest.raises(TypeError, match="address must be an int, not float"):
        space.translate(1.0)  # type: ignore[arg-type] # the error
    with pytest.raises(ValueError, match="-0x1 is negative"):
        space.read(-1, 1)
    with pytest.raises(ValueError, match="length -0x1 at virtual address 0x5 is negative"):
        space.read(5, -1)
    with pytest.raises(ValueError, match="max_length must be at least 0"):
        space.read_cstring(0, -1)
    for start, end in ((-1, 5), (5, 4), (0, END + 1)):
        with pytest.raises(ValueError, match="start and end must be 0 <= start <= end"):
            space.regions(start, end)
    with pytest.raises(TypeError, match="length must be an int"):
        space.read(0, None)  # type: ignore[arg-type] # the error


def test_reads_cross_pages(domain: MockDomain, cache: MapCache) -> None:
    """Scattered pages are put together; those that follow each other are one range."""
    tables, space = make(domain, cache)
    virtual = UPPER["x86-64", 4]
    for number, physical in enumerate((AT + 0x1000, AT + 0x2000, AT)):
        tables.map(virtual + number * 4096, physical)
    domain.write(AT, b"third" + bytes(4091) + b"f" * 4096 + b"s" * 4096)
    assert space.read(virtual, 3 * 4096) == b"f" * 4096 + b"s" * 4096 + b"third" + bytes(4091)
    assert space.read(virtual + 4094, 4) == b"ffss"
    assert space.read(virtual, 0) == b""
    assert list(space.physical_ranges(virtual + 1, 8195)) == [(AT + 0x1001, 8191), (AT, 4)]
    ranges = space.physical_ranges(virtual + 4096, 1 << 60)
    assert [next(ranges), next(ranges)] == [(AT + 0x2000, 4096), (AT, 4096)]
    with pytest.raises(TranslationError) as caught:
        next(ranges)
    assert caught.value.address == virtual + 3 * 4096
    with pytest.raises(TranslationError):
        next(space.physical_ranges(virtual - 1, 2))
    with pytest.raises(TranslationError):
        space.read(virtual, 3 * 4096 + 1)


def test_a_page_that_the_source_lacks(domain: MockDomain, cache: MapCache) -> None:
    """Tables may lead to a device's page: translated it is, but not read."""
    tables, space = make(domain, cache)
    virtual = UPPER["x86-64", 4]
    tables.map(virtual, HOLE[0] - 4096)
    tables.map(virtual + 4096, HOLE[0])
    assert space.translate(virtual + 4096 + 5) == HOLE[0] + 5
    with pytest.raises(TranslationError, match="it may be a device's") as caught:
        space.read(virtual + 16, 8192)
    error = caught.value
    assert (error.level, error.address, error.entry) == ("page", virtual + 4096, None)
    assert error.entry_address == HOLE[0]
    assert f"level page, at guest-physical {HOLE[0]:#x}" in str(error)
    assert isinstance(error.__cause__, FaultError)
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), copy.args, str(copy)) == (TranslationError, error.args, str(error))


def test_a_length_that_a_guest_chose(domain: MockDomain, cache: MapCache) -> None:
    """One page that is mapped everywhere does not fill this machine's memory."""
    tables, space = make(domain, cache)
    virtual = UPPER["x86-64", 4]
    for number in range(2):
        tables.map(virtual + number * GiB, 0, GiB)
    for length in (16 * MiB + 1, 1 << 60):
        with pytest.raises(CacheFullError, match="limited to 0x1000000 bytes"):
            space.read(virtual, length)


def test_strings(domain: MockDomain, cache: MapCache) -> None:
    """One may cross pages, or end right before a page that is not mapped."""
    tables, space = make(domain, cache)
    virtual = UPPER["x86-64", 4]
    tables.map(virtual, AT + 0x3000)
    tables.map(virtual + 4096, AT)
    domain.write(AT + 0x3FFD, b"one")
    domain.write(AT, b" two\0" + b"x" * 4091)
    assert space.read_cstring(virtual + 4093) == b"one two"
    assert space.read_cstring(virtual + 4093, 7) == b"one two"
    with pytest.raises(ValueError, match="no zero byte in 7 bytes at virtual address 0xffff"):
        space.read_cstring(virtual + 4093, 6)
    with pytest.raises(TranslationError) as caught:
        space.read_cstring(virtual + 8000)
    assert caught.value.address == virtual + 8192


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize(("machine", "levels"), SHAPES)
def test_many_at_once(
    domain: MockDomain,
    cache: MapCache,
    machine: str,
    levels: int,
    quick: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In any order, mapped or not, it is what translate() gives, with NumPy and without."""
    if quick:
        pytest.importorskip("numpy", reason="NumPy is not installed (pip: the extra fast)")
        from xenmapcache.guest import tablearrays

        monkeypatch.setattr(tablearrays, "_CHUNK", 7)
    else:
        monkeypatch.delitem(sys.modules, "xenmapcache.guest.tablearrays", raising=False)
        monkeypatch.delattr("xenmapcache.guest.tablearrays", raising=False)
        monkeypatch.setitem(sys.modules, "numpy", None)
    tables, space = make(domain, cache, machine, levels)
    virtual = UPPER[machine, levels]
    tables.map(virtual, AT)
    tables.map(virtual + 4096, 0)
    tables.map(virtual + 4 * MiB, 4 * MiB, 2 * MiB)
    tables.map(virtual + GiB, 1 << 30, GiB)
    tables.set(
        tables.place(virtual + 2 * GiB, 2 * MiB), HOLE[0] | (tables.get(tables.root) | 3) & 7
    )
    offsets = [GiB + 5, 1, 4096, 8192, 4 * MiB + 0x1FFFFF, 6 * MiB, 2 * GiB, 3 * GiB, 4097, 1, 0]
    addresses = [*(virtual + offset for offset in offsets), 1 << 60, virtual + 4097]

    def one(address: int) -> int:
        try:
            return space.translate(address)
        except TranslationError:
            return NOT_MAPPED

    expected = list(map(one, addresses))
    assert expected[:3] == [(1 << 30) + 5, AT + 1, 0]
    assert expected.count(NOT_MAPPED) == 5
    found = space.translate_many(addresses)
    assert isinstance(found, array)
    assert found.typecode == "Q"
    assert list(found) == expected
    assert list(space.translate_many([])) == []
    assert list(space.translate_many([virtual + 3 * GiB])) == [NOT_MAPPED]


@pytest.mark.parametrize(
    "given",
    [
        array("Q", [5, 6]), [5, 6], iter([5, 6]), range(5, 7), bytes([5, 6]), array("i", [5, 6]),
        memoryview(array("Q", [5, 9, 6]))[::2],
    ],
)  # fmt: skip
def test_addresses_of_many_kinds(domain: MockDomain, cache: MapCache, given: Iterable[int]) -> None:
    """Whatever yields integers."""
    tables, space = make(domain, cache)
    tables.map(0, AT)
    assert list(space.translate_many(given)) == [AT + 5, AT + 6]


def test_arrays_of_numpy(domain: MockDomain, cache: MapCache) -> None:
    """They need no loop over their elements, and frombuffer takes the result."""
    numpy = pytest.importorskip("numpy", reason="NumPy is not installed (pip: the extra fast)")
    tables, space = make(domain, cache)
    tables.map(0, AT)
    given = numpy.arange(4096, dtype=numpy.uint64)
    space.translate_many(given[:1])
    with calls_at_most(600):
        found = numpy.frombuffer(space.translate_many(given), numpy.uint64)
    assert (found == given + AT).all()
    assert space.translate(given[7]) == AT + 7


def test_few_addresses_import_no_numpy(
    domain: MockDomain, cache: MapCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The import takes longer than some thousand translations."""
    tables, space = make(domain, cache)
    tables.map(0, AT)
    for name in [name for name in sys.modules if name.partition(".")[0] == "numpy"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "xenmapcache.guest.tablearrays", raising=False)
    assert list(space.translate_many([5])) == [AT + 5]
    assert "numpy" not in sys.modules


@pytest.mark.parametrize("given", [[-1], [END], array("q", [-1])])
def test_many_wrong_addresses(domain: MockDomain, cache: MapCache, given: Iterable[int]) -> None:
    """What no address can be is the program's error."""
    _, space = make(domain, cache)
    with pytest.raises(ValueError, match=r"from 0 to 2\*\*64 - 1"):
        space.translate_many(given)
    with pytest.raises(TypeError):
        space.translate_many([1.5])  # type: ignore[list-item] # the error


def test_a_translation_is_a_few_calls(domain: MockDomain, cache: MapCache) -> None:
    """Of hot tables with five levels, an entry is a look-up and one call."""
    tables, space = make(domain, cache, "x86-64", 5)
    virtual = UPPER["x86-64", 5]
    tables.map(virtual, AT)
    for _ in range(3):
        space.translate(virtual)
    with calls_at_most(11):  # four of them end the block
        space.translate(virtual)


def test_changes_are_seen(domain: MockDomain, cache: MapCache) -> None:
    """Nothing of the tables is kept between calls, and nothing works after close."""
    tables, space = make(domain, cache)
    place = tables.map(0, AT)
    for _ in range(3):
        assert space.translate(0) == AT
    tables.set(place, 0x300000 | 7)
    assert space.translate(0) == 0x300000
    cache.invalidate()
    assert space.translate(0) == 0x300000
    assert repr(space).startswith("<AddressSpace of <MockBackend")
    assert repr(space).endswith(": x86-64, 4 levels, root 0x400000>")
    cache.close()
    with pytest.raises(ClosedError):
        space.translate(0)
