"""Bars and bursts at levels of detail; lanes; columns and cells over time."""

from __future__ import annotations

from operator import add

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xenmapcache.address import MiB
from xenmapcache.observe.timeline import columns, lanes
from xenmapcache.observe.timeline.bars import (
    BIDIRECTIONAL,
    DEVICE,
    FROM_DEVICE,
    STALE,
    TO_DEVICE,
    Bar,
    Burst,
    levels_of_bars,
    levels_of_bursts,
    merge_bars,
)
from xenmapcache.observe.timeline.columns import ABSENT, COLD, COLUMNS, MAX_ROWS, Heat, Series, fold
from xenmapcache.observe.timeline.lanes import MAX_LANES, LaneBook, shorten


def bar(start: int, end: int, lane: int = 0, style: int = TO_DEVICE, low: int = 0x5000) -> Bar:
    """Return a bar of a page, in row 0."""
    return Bar(start, end, lane, 0, style, 0, 7, low, low + 0x1000)


def test_short_neighbours_are_merged() -> None:
    """Bars below the width, and nearer than the gap, become one; it knows how many they were."""
    short = [bar(0, 10, low=0x9000), bar(15, 20, low=0x5000)]
    assert merge_bars(short, 100, 100) == [Bar(0, 20, 0, 0, TO_DEVICE, 0, 7, 0x5000, 0xA000, 2)]
    assert merge_bars(short, 100, 5) == short, "the gap can be seen"
    assert merge_bars(short, 5, 100) == short, "both are long enough to be seen"
    assert len(merge_bars([bar(0, 1000), bar(1001, 1002)], 5, 5)) == 1


def test_different_things_are_not_merged() -> None:
    """A stale bar stays red, and lanes, rows, and device memory stay apart."""
    apart = [
        bar(0, 1),
        bar(1, 2, style=STALE),
        bar(2, 3, style=DEVICE),
        bar(3, 4, lane=1),
        bar(5, 6)._replace(row=1),
    ]
    assert merge_bars(apart, 100, 100) == apart


def test_directions_are_merged_as_both() -> None:
    """Bars of one row do not cover each other; DMA of several directions has the middle shade."""
    (merged,) = merge_bars([bar(0, 1), bar(1, 2, style=FROM_DEVICE)], 100, 100)
    assert merged.style == BIDIRECTIONAL
    (merged,) = merge_bars([bar(0, 1, style=STALE), bar(1, 2, style=STALE)], 100, 100)
    assert merged.style == STALE


def test_few_bars_have_one_level() -> None:
    """What can be shown as it is, is."""
    few = [bar(10, 20), bar(0, 5)]
    (level,) = levels_of_bars(few, 20, 2)
    assert (level.width, level.items) == (0, sorted(few))


BARS = st.lists(
    st.builds(
        lambda start, length, lane, style: bar(start, start + length, lane, style),
        st.integers(0, 10_000),
        st.integers(0, 500) | st.integers(0, 10_000),
        st.integers(0, 2),
        st.sampled_from((TO_DEVICE, FROM_DEVICE, STALE)),
    ),
    max_size=120,
)


@given(BARS)
def test_levels_lose_nothing(bars: list[Bar]) -> None:
    """Each level has all leases, covers all their times, and is coarser than the one before."""
    span = max((each.end for each in bars), default=1)
    levels = levels_of_bars(bars, span, 6)
    assert len(levels[-1].items) <= 6, "3 lanes, each with a red bar and another one"
    assert [level.width for level in levels] == sorted({level.width for level in levels})
    for level in levels:
        assert sum(each.total for each in level.items) == len(bars)
        assert list(level.items) == sorted(level.items)
        for each in bars:
            stale = each.style == STALE
            assert any(
                other.lane == each.lane
                and (other.style == STALE) == stale
                and other.start <= each.start
                and each.end <= other.end
                for other in level.items
            )


def test_gaps_are_kept_as_long_as_possible() -> None:
    """Long bars without visible gaps are merged before a visible gap is closed."""
    starts = (0, 20_001, 60_001, 80_002)
    level = levels_of_bars([bar(start, start + 20_000) for start in starts], 100_002, 2)[-1]
    assert [(each.start, each.end) for each in level.items] == [(0, 40_001), (60_001, 100_002)]


def test_a_budget_that_cannot_be_kept() -> None:
    """Each lane keeps a bar at least."""
    apart = [bar(0, 10, lane) for lane in range(5)]
    (level,) = levels_of_bars(apart, 10, 1)
    assert level.items == apart


def test_bursts_are_folded_with_a_count() -> None:
    """The coarsest level has few lines; the finest one has each invalidation."""
    bursts = [
        Burst(start + number, start + number, 1, 2, number, 5)
        for start in (1000, 500_000)
        for number in range(13)
    ]
    levels = levels_of_bursts(bursts, 1_000_000, 40)
    assert levels[0].items == bursts
    assert levels[-1].width == 25_000
    assert levels[-1].items == [
        Burst(1000, 1012, 13, 26, 12, 65),
        Burst(500_000, 500_012, 13, 26, 12, 65),
    ]
    assert [level.width for level in levels] == sorted(level.width for level in levels)
    assert levels_of_bursts(bursts[:1], 1, 40)[-1].items == bursts[:1], "nothing to fold"


def test_leases_at_the_same_time_have_rows() -> None:
    """Rows are used again; when all are in use, leases share the emptiest."""
    lane = LaneBook().lane(0, "dma", "disk")
    assert [lane.occupy() for _ in range(lanes.MAX_ROWS + 1)] == [*range(lanes.MAX_ROWS), 0]
    assert lane.rows == lanes.MAX_ROWS
    lane.vacate(3)
    assert lane.occupy() == 3


def test_lanes_are_ordered_and_bounded() -> None:
    """Stale lanes are first, then busy ones; DMA before device memory; the others share a lane."""
    book = LaneBook()
    bars = []
    for number in range(MAX_LANES + 5):
        lane = book.lane(0, "dma", f"disk{number:02}")
        bars += [bar(0, 1, lane.number)] * (number + 1)
    bars.append(bar(0, 1, book.lane(0, "dma", "disk00").number, STALE))
    bars.append(bar(0, 1, book.lane(1, "device", "vga").number, DEVICE))
    book.lane(0, "dma", "disk01").occupy()
    book.lane(0, "dma", "disk01").occupy()
    found, moved = book.arrange(bars)
    assert [lane.name for lane in found[:2]] == ["disk00", "disk44"]
    assert [lane.name for lane in found[-2:]] == ["others (5)", "vga [1]"]
    assert found[-2].rows == 2
    assert len(found) == MAX_LANES + 2
    assert moved[-1].lane == len(found) - 1
    assert sum(each.lane == MAX_LANES for each in moved) == 2 + 3 + 4 + 5 + 6


def test_owners_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recording with endless owners needs bounded memory; the count says that it is one."""
    monkeypatch.setattr(lanes, "_MAX_TRACKED", 4)
    monkeypatch.setattr(lanes, "_MAX_OTHERS", 3)
    monkeypatch.setattr(lanes, "_MAX_OWNERS", 2)
    book = LaneBook()
    numbers = {book.lane(0, "dma", f"disk{number}").number for number in range(50)}
    assert len(numbers) == 5
    found, _ = book.arrange([])
    assert [lane.name for lane in found][-1] == "others (more than 3)"
    assert [book.owner(name) for name in ("a", "b", "c", "d", "a")] == [0, 1, 2, 2, 0]
    assert book.owners == ["a", "b", "others"]


def test_names_are_escaped_and_cut() -> None:
    """A name is one line that a person can read."""
    assert shorten("disk\n\x1b[31m") == r"disk\n\x1b[31m"
    assert shorten("x" * 61) == "x" * 57 + "..."


def test_series_fold_their_columns() -> None:
    """Whatever the times are, sums stay, and the number of columns is bounded."""
    series, longest = Series(), Series(max)
    for time in (0, 1, 5_000_000, 5_000_001, 1 << 52):
        series.put(time, 3)
        longest.put(time, 3)
    assert sum(series.values) == 15
    assert len(series.values) <= COLUMNS
    assert (1 << 52) // series.width == len(series.values) - 1
    assert max(longest.values) == 3
    assert longest.width == series.width
    assert fold([1, 2, 3], add) == [3, 3]


def test_heat_of_a_range() -> None:
    """A range is absent, cold while it is mapped, and hotter the more it is used."""
    heat = Heat()
    heat.present(2 * MiB, MiB, 1024, 5 * 1024)
    heat.touch(2 * MiB + 5, 8, 2 * 1024, 4)
    heat.touch(5 * MiB, 1, 7 * 1024)
    assert heat.rows() == [2 * MiB, 5 * MiB]
    first, second = heat.cells(7 * 1024)
    assert first == [ABSENT, COLD, 3, COLD, COLD, COLD, ABSENT, ABSENT]
    assert second == [ABSENT] * 7 + [1]
    assert heat.cells(7 * 1024, 4) == [[3, COLD], [ABSENT, 1]]


def test_heat_is_bounded_in_time() -> None:
    """Columns are folded; what was mapped or used stays so."""
    heat = Heat()
    heat.present(0, 1, 0, 3 * 1024)
    heat.touch(0, 1, 1024)
    heat.touch(0, 1, 3 * 1024 * COLUMNS)
    (row,) = heat.cells(3 * 1024 * COLUMNS)
    assert len(row) <= COLUMNS
    assert heat.width == 4096
    assert row[0] == 1
    assert row[1] == ABSENT


def test_heat_is_bounded_in_addresses() -> None:
    """Rows become coarser: a guest of any size, and a range that a hostile recording claims."""
    heat = Heat()
    for number in range(3 * MAX_ROWS):
        heat.touch(number * MiB, MiB, 0)
    assert (len(heat.rows()), heat.row_bytes) == (3 * MAX_ROWS // 4, 4 * MiB)
    assert heat.cells(0)[0] == [3]
    heat.present(0, 1 << 64, 0, 0)
    assert len(heat.rows()) <= MAX_ROWS
    heat.touch(columns.MAX_ADDRESS + 5, -3, 0)
    heat.touch(-5, 3, 0)
    assert heat.rows()[0] == 0
