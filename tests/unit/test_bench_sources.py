"""The side-by-side benchmark of files works, and compares bytes before it times anything."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks import peers, sources
from tests.benchmarks.peers import BARE, OURS, Candidate, Mmap, Unable
from xenmapcache.address import MiB

pytest.importorskip("elftools")

ROOT = Path(__file__).parents[2]
SIZE = 4 * MiB


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return sources.make_images(tmp_path_factory.mktemp("images"), SIZE)


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


def test_it_runs_and_has_a_figure_for_each() -> None:
    """On a small image, without peers: all our backends, mmap and pread are measured."""
    command = [sys.executable, "-m", "tests.benchmarks.sources", "--json"]
    options = ["--size", "4M", "--rounds", "2", "--without-peers"]
    done = subprocess.run(
        [*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    measured = [(row["candidate"], row["format"]) for row in report["rows"]]
    formats = ["raw", "coredump", "elfcore", "save"]
    assert measured == [("xenmapcache", name) for name in formats] + [
        ("mmap", "raw"),
        ("os.pread", "raw"),
    ]
    for row in report["rows"]:
        assert row["reason"] == ""
        assert all(row[name]["median"] > 0 for name in sources.NAMES)
    assert all(promise["figure"] > 0 for promise in report["promises"])


@pytest.mark.parametrize("candidate", [*OURS, *BARE], ids=lambda each: f"{each.name}-{each.format}")
def test_ours_return_the_bytes(candidate: Candidate, images: dict[str, Path]) -> None:
    """Each candidate that needs no peer returns what is in the image, and finds the text."""
    reader = candidate.open(images[candidate.format])
    sources.compare(candidate, reader, images["raw"].read_bytes())
    reader.close()


@pytest.mark.parametrize("kind", [Wrong, Blind])
def test_wrong_bytes_are_seen(
    kind: type[Mmap], images: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A candidate with a wrong byte, or a search that finds nothing, ends it before any timing."""
    monkeypatch.setattr(sources, "seconds", lambda work: pytest.fail("it was timed"))
    liar = Candidate("liar", "", "raw", kind)
    with pytest.raises(sources.WrongBytesError, match="liar, raw"):
        sources.measure([*BARE, liar], images, 2)


def test_who_cannot_has_a_row(images: dict[str, Path]) -> None:
    """A candidate that is not installed, or cannot read the file, is there with its reason."""

    def unable(path: Path) -> peers.Reader:
        raise Unable("has no driver for files")

    def missing(path: Path) -> peers.Reader:
        peers.module("a_module_that_nobody_has", "a-package")
        raise AssertionError

    def failing(path: Path) -> peers.Reader:
        raise LookupError("no segment")

    candidates = [
        Candidate("one", "", "raw", unable),
        Candidate("two", "", "save", missing),
        Candidate("three", "", "save", failing),
    ]
    rows = sources.measure([*BARE, *candidates], images, 2)
    report = sources.Report(SIZE, 2, rows, [])
    one, two, three = report.left_out()
    assert one == ("one", "raw", "has no driver for files")
    assert two[:2] == ("two", "save")
    assert "a_module_that_nobody_has" in two[2]
    assert three == ("three", "save", "LookupError: no segment")
    assert "| one | raw | has no driver for files |" in report.markdown()


def test_pips_reason_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why a peer could not be built is taken from what pip said."""
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    log = "  build.c:1:10: fatal error: some.h: No such file or directory\nERROR: Failed building\n"
    (tmp_path / "a-package.log").write_text(log)
    with pytest.raises(Unable, match=r"is not installed: some\.h: No such file"):
        peers.module("a_module_that_nobody_has", "a-package")


def test_only_what_is_between_the_markers_is_rewritten(tmp_path: Path) -> None:
    """The page keeps the rest; twice is as once; a page without markers is refused."""
    page = tmp_path / "page.md"
    page.write_text(f"before\n{sources.BEGIN}\nold\n{sources.END}\nafter\n")
    for _ in range(2):
        sources.rewrite(page, "new\n")
        assert page.read_text() == f"before\n{sources.BEGIN}\nnew\n{sources.END}\nafter\n"
    page.write_text("nothing\n")
    with pytest.raises(SystemExit, match="are not there"):
        sources.rewrite(page, "new\n")
