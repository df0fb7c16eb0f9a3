"""Page tables of chance: all ways of translating agree, and nothing takes long."""

from __future__ import annotations

import contextlib
import random
from array import array
from itertools import islice, pairwise

import pytest

from tests.conftest import HOLE
from tests.effort import calls_at_most
from tests.page_tables import LARGE, PAGE, SHAPES, TABLE
from xenmapcache import AddressSpace, MapCache, MockDomain, TranslationError
from xenmapcache.formats.pagetables import TABLE as LAYOUT
from xenmapcache.guest import tablewalk
from xenmapcache.guest.addressspace import NOT_MAPPED, Region, Step

ROOT, TABLES = 0x400000, 6
"""Few tables, so that most chains lead back to a table that they came through."""


def entry(rng: random.Random, machine: str) -> int:
    kind = rng.random()
    if kind < 0.4:
        return ROOT + rng.randrange(TABLES) * 4096 | TABLE[machine] | rng.getrandbits(1) << 63
    if kind < 0.7:
        bits = rng.choice((PAGE, LARGE))[machine]
        return rng.randrange(0x1000) * 4096 | bits | rng.getrandbits(12) << 52
    return rng.choice((0, HOLE[0] | 0x67, rng.getrandbits(64), (1 << 64) - 1))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("machine", "levels"), SHAPES)
def test_all_ways_agree(
    domain: MockDomain, cache: MapCache, machine: str, levels: int, seed: int
) -> None:
    """One by one, step by step, many at once with and without NumPy, and by regions."""
    rng = random.Random(f"{machine} {levels} {seed}")
    for table in range(TABLES):
        entries = LAYOUT.pack(*(entry(rng, machine) for _ in range(512)))
        domain.write(ROOT + table * 4096, entries)
    space = AddressSpace(cache, ROOT, levels=levels, machine=machine)
    addresses = [
        high - 1 - rng.getrandbits(12 + 9 * levels) % (high - low)
        for low, high in space._halves
        for _ in range(100)
    ]
    expected = []
    for address in addresses:
        steps: list[Step] = []
        try:
            for step in space.walk(address):
                steps.append(step)  # noqa: PERF402 - those before an error count
        except TranslationError as error:
            with pytest.raises(TranslationError) as caught:
                space.translate(address)
            assert caught.value.args == error.args
            expected.append(NOT_MAPPED)
            assert all(step.page is None for step in steps)
        else:
            page = steps[-1].page
            assert page is not None
            assert space.translate(address) == page.physical
            expected.append(page.physical)
        assert len(steps) <= levels
    assert set(expected) != {NOT_MAPPED}
    assert list(space.translate_many(addresses)) == expected
    plain = tablewalk._one_by_one(
        array("Q", addresses),
        *(space.root, space._shape, space._halves, space._table),
    )
    assert list(plain) == expected
    with calls_at_most(1_000_000):
        regions: list[Region] = []
        with contextlib.suppress(TranslationError):
            regions.extend(islice(space.regions(max_tables=500), 2000))
    for region in regions[:50]:
        assert space.translate(region.address) == region.physical
        last = region.length - 1
        assert space.translate(region.address + last) == region.physical + last
        page = list(space.walk(region.address))[-1].page
        assert page is not None
        assert page.rights == region.rights
    for before, after in pairwise(regions):
        assert before.address + before.length <= after.address
