"""Where a live guest may have pages: which windows are found, and after how many looks."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xenmapcache import Backend, ClosedError, open_backend
from xenmapcache.backends import survey
from xenmapcache.backends.survey import (
    MAX_FRAMES,
    WINDOW_PAGES,
    add_others,
    by_count,
    by_ends,
    page_runs,
    runs,
    windows_of,
)
from xenmapcache.mock import MockHypervisor

GIB = 1 << 18  # in pages


class Guest:
    """Pages that there are; counts the frames that were looked at."""

    def __init__(self, *parts: range) -> None:
        self.pages = {gfn for part in parts for gfn in part}
        self.looked: list[int] = []

    def look(self, gfns: array[int]) -> bytes:
        assert 0 < len(gfns) <= MAX_FRAMES
        self.looked += gfns
        return bytes([gfn in self.pages for gfn in gfns])

    @property
    def windows(self) -> list[int]:
        return sorted({gfn // WINDOW_PAGES for gfn in self.pages})


PVH = (range(128 * 256), range(0xFC000, 0xFC003), range(0xFEFF8, 0xFF000))
"""A PVH guest of 128 MiB: its RAM, ACPI's tables, and special pages below 4 GiB."""


def test_it_ends_when_all_counted_pages_are_found() -> None:
    """Two pages of each MiB are looked at, and all of those that have pages: no others."""
    guest = Guest(*PVH)
    windows = windows_of(0, 0xFF000)
    assert list(by_count(guest.look, windows, len(guest.pages))) == guest.windows
    assert len(guest.looked) == 2 * len(windows) + 130 * WINDOW_PAGES


def test_single_pages_in_what_a_guest_has_ballooned_out() -> None:
    """An HVM guest of 4.17: short gaps are looked at, and not all 4 GiB."""
    ram = (range(0xA0), range(0xC0, 0x61C4), range(0x6FF2, 0x6FF3), range(0x7001, 0x7002))
    high = (range(0xF1000, 0xF2000), range(0xFC000, 0xFC00B), range(0xFC100, 0xFC101))
    guest = Guest(
        *ram, range(0x71C6, 0x8000), range(0x9000, 0x9010), *high, range(0xFEFF0, 0xFF000)
    )
    windows = windows_of(0, 0xFF000)
    assert list(by_count(guest.look, windows, len(guest.pages))) == guest.windows
    gaps = 0x71 - 0x62 + 0x90 - 0x80 + 0xFEF - 0xFC2  # the third is above ACPI's tables
    assert len(guest.looked) == 2 * len(windows) + (len(guest.windows) + gaps) * WINDOW_PAGES


@pytest.mark.parametrize("offset", [0, 255, 64, 16, 1, 100, 254])
def test_a_page_that_lies_alone_is_found(offset: int) -> None:
    """Pages of the remaining windows are looked at until as many are found as Xen counts."""
    guest = Guest(range(512), range(40 * WINDOW_PAGES + offset, 40 * WINDOW_PAGES + offset + 1))
    found = by_count(guest.look, range(100), len(guest.pages))
    assert list(found) == [0, 1, 40]
    assert list(page_runs(found, 0, 1 << 20)) == [(0, 512), (40 * WINDOW_PAGES + offset, 1)]


@settings(deadline=None)  # the machine may be busy
@given(st.sets(st.integers(0, 12 * WINDOW_PAGES - 1), max_size=40), st.integers(-1, 5))
def test_no_window_with_a_page_is_missed(pages: set[int], more: int) -> None:
    """Also if Xen counts pages that have no frame number, which a guest has given up, say."""
    guest = Guest(pages)  # type: ignore[arg-type] # a set will do
    counted = len(pages) + max(0, more)
    found = by_count(guest.look, range(12), counted)
    assert list(found) == guest.windows
    assert pages == {
        gfn for first, count in page_runs(found, 0, 1 << 20) for gfn in range(first, first + count)
    }


def test_by_mapping_ram_that_begins_at_1_gib() -> None:
    """The GiB of holes below is skipped after two looks at each MiB."""
    guest = Guest(range(0x39000, 0x39004), range(GIB, GIB + 128 * 256))
    windows = windows_of(0, GIB + 128 * 256)
    assert by_ends(guest.look, windows, len(guest.pages)) == guest.windows
    assert len(guest.looked) == 2 * len(windows)


@pytest.mark.parametrize(("second", "filled"), [(64, True), (65, False)])
def test_by_mapping_a_short_gap_is_not_passed_over(second: int, filled: bool) -> None:
    """It may be what a guest has ballooned out, with pages left in it."""
    guest = Guest(range(8), range(second * WINDOW_PAGES, second * WINDOW_PAGES + 8))
    found = by_ends(guest.look, range(100), 16)
    assert found == (list(range(second + 1)) if filled else [0, second])


def test_by_mapping_nothing_is_passed_over_if_pages_are_missing() -> None:
    """Windows that show a page must have room for as many pages as Xen counts."""
    guest = Guest(range(8), range(90 * WINDOW_PAGES, 90 * WINDOW_PAGES + 8))
    assert by_ends(guest.look, range(100), 2 * WINDOW_PAGES) == [0, 90]
    assert by_ends(guest.look, range(100), 2 * WINDOW_PAGES + 1) == list(range(100))


def test_frames_that_xen_does_not_count_are_looked_at() -> None:
    """In the windows that have pages, and nowhere else: some can be mapped."""
    guest = Guest(range(300), range(700, 800))
    found = by_count(guest.look, range(4), 400)
    more = Guest(range(310, 320), range(800, 801))
    add_others(more.look, found)
    assert more.looked == [*range(300, 512), *range(512, 700), *range(800, 1024)]
    assert list(page_runs(found, 0, 1024)) == [(0, 300), (310, 10), (700, 101)]
    assert list(page_runs(found, 299, 403)) == [(299, 1), (310, 10), (700, 2)]
    assert list(page_runs(found, 320, 300)) == []


@pytest.mark.parametrize(
    ("windows", "gfn", "count", "expected"),
    [
        ([], 0, 512, []),
        ([0, 1], 0, 512, [(0, 512)]),
        ([0, 2], 0, 768, [(0, 256), (512, 256)]),
        ([1, 2], 300, 100, [(300, 100)]),
        ([1, 3], 300, 500, [(300, 212), (768, 32)]),
        ([2], 0, 1024, [(512, 256)]),
        ([1], 256, 0, []),
    ],
)
def test_runs_are_cut_to_the_range(
    windows: Iterable[int], gfn: int, count: int, expected: list[tuple[int, int]]
) -> None:
    """Windows that follow each other are one run, which ends where the range does."""
    assert list(runs(windows, gfn, count)) == expected


def test_windows_of_a_range() -> None:
    """Each window that the range touches, and none for no pages."""
    assert windows_of(255, 2) == range(2)
    assert windows_of(256, 256) == range(1, 2)
    assert not windows_of(256, 0)


@pytest.mark.parametrize("kind", ["pvh", "pv"])
def test_a_mock_guest_tells_where_pages_are(kind: str) -> None:
    """Also while a fault is injected, when only mapping shows which pages exist."""
    guest = MockHypervisor().create_domain(memory="4M", holes=[(0x100000, 0x200000)], type=kind)
    with open_backend("mock", domain=guest) as backend:
        guest.inject_fault("map", errno=12)
        assert backend.present(0, 1024) is None
        whole = [(0, 1024)]
        assert list(backend.extents(0, 1024)) == (
            [(0, 256), (768, 256)] if kind == "pvh" else whole
        )
        guest.destroy()
        assert list(backend.extents(0, 1024)) == whole
    with pytest.raises(ClosedError):
        backend.extents(0, 1)


def test_by_default_pages_may_be_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or where the source knows that they are."""
    with open_backend("mock", memory="2M") as backend:
        monkeypatch.setattr(type(backend), "extents", Backend.extents)
        assert list(backend.extents(100, 1000)) == [(100, 412)]
        assert list(backend.survey(100, 1000) or ()) == [(100, 412)]
        monkeypatch.setattr(type(backend), "present", lambda *_: None)
        assert list(backend.extents(100, 1000)) == [(100, 1000)]


def test_a_window_is_a_bucket() -> None:
    """A window is what a cache maps at once by default, so a survey makes it map nothing more."""
    assert survey.WINDOW_PAGES << 12 == 1 << 20
