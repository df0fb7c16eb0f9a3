"""Which pages spans of bytes give: joined, cut into pages, put together from parts."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from tests.effort import calls_at_most
from xenmapcache.address import PAGE_SIZE
from xenmapcache.files import runs
from xenmapcache.files.runs import Fragment, Layout, PartialPage, Run, clip
from xenmapcache.formats.spans import LOST, ZEROS, Span, cut

P = PAGE_SIZE
UNKNOWN = -3


def bytes_of(layout: Layout, page: int) -> list[int]:
    """Return where in the file each byte of the memory is, by address; ZEROS for filled ones."""
    found: dict[int, int] = {}
    for run in layout.runs:
        base = run.gfn * page
        for byte in range(run.pages * page):
            found[base + byte] = ZEROS if run.fragments is not None else run.offset + byte
        for start, length, offset in run.fragments or ():
            assert run.pages == 1
            found.update((base + start + byte, offset + byte) for byte in range(length))
    return [found.get(address, UNKNOWN) for address in range(max(found, default=-1) + 1)]


def expected(spans: list[Span], page: int) -> list[int]:
    """Return the same from the definition: byte by byte, in order of precedence."""
    places: dict[int, int] = {}
    for kind in (0, ZEROS):
        for first, end, offset in spans:
            if min(offset, 0) == kind:
                for byte in range(end - first):
                    places.setdefault(first + byte, offset + byte if kind == 0 else ZEROS)
    for address in list(places):
        for byte in range(address // page * page, (address // page + 1) * page):
            places.setdefault(byte, ZEROS)
    return [places.get(address, UNKNOWN) for address in range(max(places, default=-1) + 1)]


def test_any_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """However spans overlap and adjoin, each byte comes from where it should, in few runs."""
    page = 8
    for name, value in (("PAGE_SIZE", page), ("PAGE_MASK", page - 1), ("PAGE_SHIFT", 3)):
        monkeypatch.setattr(runs, name, value)
    rng = random.Random(1)
    for _ in range(1500):
        spans = []
        for _ in range(rng.randrange(1, 9)):
            first = rng.randrange(90)
            offset = rng.choice([rng.randrange(1 << 20), ZEROS, LOST])
            step = rng.choice([1, page])
            first = first // step * step
            spans.append(
                Span(first, first + rng.randrange(1, 5) * rng.choice([1, 3, page]), offset)
            )
        if rng.random() < 0.5:  # some that continue where others end, in the file too
            spans += [
                Span(end, end + 11, offset + end - first if offset >= 0 else offset)
                for first, end, offset in spans
            ]
            rng.shuffle(spans)
        layout = Layout(spans)
        assert bytes_of(layout, page) == expected(spans, page)
        for before, after in pairwise(layout.runs):
            end = before.gfn + before.pages
            assert end <= after.gfn
            continues = before.offset + before.pages * page == after.offset
            if before.fragments is after.fragments is None and end == after.gfn:
                assert not continues
        held = {
            byte for first, end, offset in spans if offset != LOST for byte in range(first, end)
        }
        lost = {
            byte for first, end, offset in spans if offset == LOST for byte in range(first, end)
        }
        assert layout.lost_bytes == len(lost - held)
        assert layout.lost_pages == len({byte // page for byte in lost - held})
        pages = {byte // page for byte in held}
        assert layout.partial == [
            PartialPage(gfn, missing)
            for gfn in sorted(pages)
            if (missing := page - sum(gfn * page + byte in held for byte in range(page)))
        ]


def test_pages_in_parts_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond it they are holes, and counted; complete pages are not concerned."""
    monkeypatch.setattr(runs, "MAX_FRAGMENTS", 4)
    spans = [Span(gfn * P, gfn * P + 100, gfn) for gfn in range(5)]
    layout = Layout([*spans, Span(9 * P, 12 * P, 0)])
    assert [run.gfn for run in layout.runs] == [0, 1, 9]
    assert layout.partial == [(0, P - 100), (1, P - 100)]
    assert layout.dropped == 3


def test_the_same_range_many_times_is_little_work() -> None:
    """As in a dump of QEMU's with -p, in which espfix has a page 65,536 times."""
    spans = [Span(0, 1 << 30, 1 << 20)]
    spans += [Span(P * (number & 7), P * (number & 7) + P, 1 << 20) for number in range(65_536)]
    with calls_at_most(4 * 65_536):
        assert Layout(spans).runs == [Run(0, 1 << 18, 1 << 20)]


def test_nothing() -> None:
    """No spans give no pages."""
    layout = Layout([])
    assert (layout.runs, layout.partial, layout.lost_bytes) == ([], [], 0)


def test_parts_of_runs() -> None:
    """A run of zeros is clipped as others are; a page in parts stays as it is."""
    parts = (Fragment(0, 5, 100),)
    found = [Run(0, 9, 0, ()), Run(9, 1, 0, parts), Run(10, 4, 5)]
    assert [run[:2] for run in clip(found, 3, 9)] == [(3, 6), (9, 1), (10, 2)]
    assert [run.fragments for run in clip(found, 3, 9)] == [(), parts, None]


@pytest.mark.parametrize(
    ("span", "intact"),
    [
        (Span(0, 3 * P, 100), [Span(0, 2 * P, 100), Span(2 * P, 3 * P, LOST)]),
        (Span(8, 3 * P, 100), [Span(8, 2 * P, 100), Span(2 * P, 3 * P, LOST)]),
        (Span(0, 2 * P, 100), [Span(0, 2 * P, 100)]),
        (Span(8, 3 * P, 2 * P + 50), [Span(8, 3 * P, LOST)]),
        (Span(8, 3 * P, 1 << 60), [Span(8, 3 * P, LOST)]),
    ],
)
def test_a_file_that_ends_early(span: Span, intact: list[Span]) -> None:
    """The page in which it ends is lost with those after it."""
    assert cut(span, 2 * P + 100) == intact
