"""The benchmark works, and compares bytes before it times anything."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks import comparison, peers, report, xen_stub
from tests.benchmarks.candidates import BARE, LIMIT, OURS, Candidate, Mmap, Reader, Unable
from tests.benchmarks.comparison import NAMES, Row, WrongBytesError, compare, measure
from tests.benchmarks.footprint import ROOT, Footprint, footprint, import_figures
from tests.benchmarks.images import make_images
from tests.benchmarks.promises import Promise
from tests.benchmarks.report import Report, markers, rewrite
from tests.benchmarks.timing import Figure
from tests.fake_xen import compiler
from xenmapcache.address import MiB

pytestmark = pytest.mark.slow

pytest.importorskip("elftools")

SIZE = 4 * MiB


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_images(tmp_path_factory.mktemp("images"), SIZE)


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    compiler()
    return xen_stub.build(tmp_path_factory.mktemp("stub"))


class Wrong(Mmap):
    """One byte is not what it should be, in each third page."""

    def value(self, address: int, length: int) -> bytes:
        data = bytearray(super().value(address, length))
        if (address >> 12) % 3 == 0:
            data[-1] ^= 1
        return bytes(data)


class Blind(Mmap):
    """It finds nothing."""

    def find(self, needle: bytes, size: int) -> list[int]:
        return []


def candidate(name: str, format_: str, opened: object) -> Candidate:
    return Candidate(name, "", format_, opened, "os")  # type: ignore[arg-type] # anything that opens


def made_up() -> Report:
    """Return a report of two candidates, one of which could not be measured."""
    figures = {name: Figure(100.0 + number, 1.0) for number, name in enumerate(NAMES)}
    ours = {name: Figure(2 * figure.median, 1.0) for name, figure in figures.items()}
    rows = [Row(LIMIT, figures), Row(OURS[0], ours), Row(BARE[2], {}, "it is too late")]
    small = footprint_of(3 * MiB)
    imports = {"mmap": Figure(1.0, 0.5), "xenmapcache": Figure(30.0, 0.5)}
    kept = Promise("reading", "mock", 1.0, "x", 2)
    return Report(SIZE, 2, rows, [small, small], imports, [kept._replace(limit=0.5)], [kept])


def footprint_of(size: int) -> Footprint:
    return Footprint(0.01, 2 * size, size, size)


def test_it_runs_and_has_a_figure_for_each(stub: dict[str, str]) -> None:
    """On a small image, without peers: each candidate has every figure, and what it holds."""
    command = [sys.executable, "-m", "tests.benchmarks", "--json", "--size", "4M", "--rounds", "2"]
    options = ["--without-peers", "--without-promises"]
    done = subprocess.run(
        [*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    measured = [(row["candidate"], row["format"]) for row in shown["rows"]]
    assert sorted(measured) == sorted((each.name, each.format) for each in (*OURS, *BARE))
    for row in shown["rows"]:
        assert row["reason"] == ""
        assert all(row[name]["median"] > 0 for name in NAMES)
    assert len(shown["footprints"]) == len(measured)
    assert all(each["peak"] >= each["own"] > 0 for each in shown["footprints"])
    assert shown["imports"]["xenmapcache"]["median"] > 0


@pytest.mark.parametrize("each", [*OURS, *BARE], ids=lambda each: f"{each.name}-{each.format}")
def test_ours_return_the_bytes(
    each: Candidate,
    images: dict[str, Path],
    stub: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each candidate that needs no peer returns what is in the image, and finds the text."""
    monkeypatch.setenv(xen_stub.FOLDER, stub[xen_stub.FOLDER])
    monkeypatch.setenv(xen_stub.IMAGE, "")
    reader = each.open(images[each.format])
    compare(each, reader, images["raw"].read_bytes())
    reader.close()


@pytest.mark.parametrize("kind", [Wrong, Blind])
def test_wrong_bytes_are_seen(
    kind: type[Mmap], images: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A candidate with a wrong byte, or a search that finds nothing, ends it before any timing."""
    monkeypatch.setattr(comparison, "seconds", lambda work: pytest.fail("it was timed"))
    with pytest.raises(WrongBytesError, match="liar, raw"):
        measure([*BARE, candidate("liar", "raw", kind)], images, 2)


def test_who_cannot_has_a_row(images: dict[str, Path]) -> None:
    """A candidate that is not installed, or cannot read the file, is there with its reason."""

    def unable(path: Path) -> Reader:
        raise Unable("has no driver for files")

    def missing(path: Path) -> Reader:
        peers.module("a_module_that_nobody_has", "a-package")
        raise AssertionError

    def failing(path: Path) -> Reader:
        raise LookupError("no segment")

    candidates = [
        candidate("one", "raw", unable),
        candidate("two", "save", missing),
        candidate("three", "save", failing),
    ]
    rows = measure([*BARE, *candidates], images, 2)
    one, two, three = made_up()._replace(rows=rows).left_out()
    assert one == ("one", "raw", "has no driver for files")
    assert two[:2] == ("two", "save")
    assert "a_module_that_nobody_has" in two[2]
    assert three == ("three", "save", "LookupError: no segment")


def test_pips_reason_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why a peer could not be built is taken from what pip said."""
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    log = "  build.c:1:10: fatal error: some.h: No such file or directory\nERROR: Failed building\n"
    (tmp_path / "a-package.log").write_text(log)
    with pytest.raises(Unable, match=r"is not installed: some\.h: No such file"):
        peers.module("a_module_that_nobody_has", "a-package")


def test_live_guests_need_the_stand_in(
    images: dict[str, Path], stub: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without gcc no live guest is measured; nor are others, who might find a real Xen."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert xen_stub.build(images["raw"].parent) == {xen_stub.FOLDER: ""}
    monkeypatch.setenv(xen_stub.FOLDER, "")
    monkeypatch.setenv(xen_stub.IMAGE, "")
    with pytest.raises(Unable, match="needs gcc"):
        OURS[0].open(images["live"])
    monkeypatch.setenv(xen_stub.FOLDER, stub[xen_stub.FOLDER])
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    with pytest.raises(Unable, match="loaded first"):
        peers.LibvmiXen(images["live"])


def test_the_stand_in_passes_for_xens_libraries(stub: dict[str, str]) -> None:
    """Preloaded, it is what a process gets that loads Xen's libraries by their names."""
    code = "import ctypes; print(ctypes.CDLL('libxenctrl.so').xc_version(None, 0, None) >> 16)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=stub, capture_output=True, text=True, check=True)
    assert done.stdout == "4\n"


def test_a_process_is_told_from_the_next(images: dict[str, Path]) -> None:
    """What maps the file holds it, what reads it does not; both hold a MiB that they returned."""
    mapped = footprint(LIMIT, images["raw"], SIZE)
    read = footprint(BARE[2], images["raw"], SIZE)
    assert mapped.shared >= read.shared + SIZE - 2 * MiB
    assert mapped.peak >= mapped.shared
    assert 0 < read.first < 60


def test_a_process_that_fails_is_told(tmp_path: Path) -> None:
    """A candidate that cannot read the file in its process raises, with what it said."""
    with pytest.raises(RuntimeError, match="mmap, raw: .*FileNotFoundError"):
        footprint(LIMIT, tmp_path / "nothing", SIZE)


def test_what_cannot_be_imported_has_no_figure() -> None:
    """An import that fails is left out of the figures, and the others are there."""
    figures = import_figures({"json", "a_module_that_nobody_has"}, 2)
    assert list(figures) == ["json"]


def test_ratios_are_those_to_mmap() -> None:
    """Each figure of a candidate is divided by that of the plain mmap; opening is left out."""
    headings, (limit, ours) = made_up().ratios()
    assert headings[2:] == tuple(report.UNITS[name].partition(",")[0] for name in NAMES[1:])
    assert set(limit[2:]) == {"1.0"}
    assert set(ours[2:]) == {"2.0"}


def test_promises_of_the_cache_decide() -> None:
    """A limit that is exceeded is marked; the exit status follows those of the cache alone."""
    shown = made_up()
    assert shown.kept
    assert shown.files[0].cells() == ("reading", "mock", "1.00 x", "0.5", "OVER")
    assert not shown._replace(promises=shown.files).kept


def test_the_page_is_rewritten_between_its_markers(tmp_path: Path) -> None:
    """All tables go to their places, ours in bold; the rest stays; twice is as once."""
    shown = made_up()
    page = tmp_path / "page.md"
    names = ["machine", *shown.tables()]
    places = ["\n".join((f"# {name}", *markers(name))) for name in names]
    page.write_text("\n".join([*places, "the end"]))
    shown.write(page)
    first = page.read_text()
    shown.write(page)
    assert page.read_text() == first
    assert "| **xenmapcache" in first
    assert "| os.pread | raw | it is too late |" in first
    assert [f"# {name}" in first for name in names] == [True] * len(names)
    assert first.endswith("the end")


def test_a_page_without_markers_is_refused(tmp_path: Path) -> None:
    """A page that lacks a marker is not touched."""
    page = tmp_path / "page.md"
    page.write_text("nothing\n")
    with pytest.raises(SystemExit, match="are not there"):
        rewrite(page, "times", "new\n")
    assert page.read_text() == "nothing\n"


def test_the_documentation_has_all_markers() -> None:
    """The page that ``make bench ARGS=--write`` rewrites has a place for each table."""
    if not report.PAGE.is_file():
        pytest.skip(f"no file {report.PAGE}")
    text = report.PAGE.read_text(encoding="utf-8")
    for name in ("machine", *made_up().tables()):
        begin, end = markers(name)
        assert text.index(begin) < text.index(end)


def test_the_chart_has_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each measured row is in the SVG by its name, as text; one without figures is not."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip: the extra bench)")
    from tests.benchmarks import bars, chart

    monkeypatch.setattr(chart, "FOLDER", tmp_path)
    drawn = bars.draw(made_up().rows).read_text(encoding="utf-8")
    assert "mmap · raw" in drawn
    assert f"{OURS[0].name} · live" in drawn
    assert "os.pread" not in drawn
