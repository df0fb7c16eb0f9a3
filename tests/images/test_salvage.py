"""Dumps of Xen's tools that were cut off: refused with the option that opens what is intact."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.images import xl_files
from tests.images.xl_files import END, PAGE, XTAB, libxc, libxl, page, pages, record, save, xl
from xenmapcache import CorruptImageError, open_backend, open_source
from xenmapcache.backends.image import ImageBackend
from xenmapcache.backends.save import SaveBackend


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    os.utime(path, (1, 1))
    return path


def content_of(backend: ImageBackend) -> dict[int, bytes]:
    """Return each present page."""
    return {
        gfn: bytes(backend.map(gfn, 1, writable=False).view(0, PAGE))
        for first, count in backend.present(0, 1 << 40)
        for gfn in range(first, first + count)
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "guest.file"


WHOLE = save(pages(3, 4, 5), pages(4, (5, XTAB), 9, copy=1), pages(20, 21))


def test_a_stream_that_was_cut_off_anywhere(file: Path) -> None:
    """Each page whose data is complete is there, with its latest copy; the others are holes."""
    starts = [WHOLE.index(page(3)), WHOLE.index(page(4, 1)), WHOLE.index(page(20))]
    seen = set()
    for length in (
        *(start + PAGE * number + more for start in starts for number in range(4)
          for more in (-40, -1, 0, 1, 30)),
        len(WHOLE) - 1,
    ):  # fmt: skip
        if length >= len(WHOLE):
            continue
        write(file, WHOLE[:length])
        with pytest.raises(CorruptImageError, match="is truncated: .*; salvage=True .--salvage"):
            SaveBackend(path=file)
        if length < starts[0] + PAGE:
            with pytest.raises(CorruptImageError, match="it has no intact page"):
                SaveBackend(path=file, salvage=True)
            continue
        expected = {}
        for number in range(3):
            if length >= starts[0] + PAGE * (number + 1):
                expected[3 + number] = page(3 + number)
        if length >= starts[1] + PAGE:
            expected[4] = page(4, 1)
            del expected[5]
        if length >= starts[1] + 2 * PAGE:
            expected[9] = page(9, 1)
        for number in range(2):
            if length >= starts[2] + PAGE * (number + 1):
                expected[20 + number] = page(20 + number)
        with SaveBackend(path=file, salvage=True) as backend:
            assert content_of(backend) == expected, length
            assert len(backend.warnings) == 1
            seen.update(re.findall(r"\): (.*)", backend.warnings[0]))
    assert seen == {
        "all of its pages come before that place",
        "the pages after that place are missing, and nothing says how many",
        *(f"{n} pages of that record are missing, and all later ones" for n in (1, 2, 3)),
    }


def test_a_stream_that_is_damaged(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The pages before the damage can be opened."""
    content = libxc(pages(0, 1), record(0x13), pages(2), record(END))
    write(file, content)
    with pytest.raises(CorruptImageError, match="unknown type 0x13 .offset 0x.*; salvage=True"):
        SaveBackend(path=file)
    assert not caplog.records
    with open_backend("save", path=file, salvage=True) as backend:
        assert list(backend.present(0, 99) or ()) == [(0, 2)]
    assert "guest.file: libxc record of unknown type 0x13" in caplog.text


def test_a_stream_without_pages_before_the_damage(file: Path) -> None:
    """If there is no stream of libxc yet, nothing can be salvaged, and no option is named."""
    write(file, xl(libxl(libxc(pages(0))))[:60])
    with pytest.raises(CorruptImageError, match="is truncated") as error:
        SaveBackend(path=file, salvage=True)
    assert "salvage" not in str(error.value)


def test_pages_that_are_repeated_for_a_check(file: Path) -> None:
    """If the file ends in the pages after VERIFY, none is missing."""
    content = libxc(pages(0, 1), record(xl_files.VERIFY), pages(0, 1))[:-9]
    with SaveBackend(path=write(file, content), salvage=True) as backend:
        assert content_of(backend) == {0: page(0), 1: page(1)}
        assert "all of its pages come before that place" in backend.warnings[0]


def test_the_index_of_what_was_salvaged_is_not_kept(file: Path) -> None:
    """Or the file would be opened by it the next time, as if it were complete."""
    write(file, WHOLE[:-1])
    with SaveBackend(path=file, salvage=True, keep_index=True):
        assert not file.with_name("guest.file.index").exists()
    with pytest.raises(CorruptImageError, match="is truncated"):
        SaveBackend(path=file, keep_index=True)
    write(file, WHOLE)
    with SaveBackend(path=file, salvage=True, keep_index=True) as backend:
        assert backend.warnings == ()
        assert file.with_name("guest.file.index").exists()


ENTRIES = {".xen_pages": {"entry": PAGE}, ".xen_pfn": {"entry": 8}, ".xen_p2m": {"entry": 16}}
PVH = (".note.Xen", ".xen_prstatus", ".xen_pages", ".xen_pfn", ".shstrtab")
PV = (".note.Xen", ".xen_prstatus", ".xen_pages", ".xen_p2m", ".shstrtab")


@pytest.mark.parametrize(("order", "entry"), [(PVH, 8), (PV, 16)])
def test_a_core_that_was_cut_off(
    file: Path, order: tuple[str, ...], entry: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Frame numbers come after the pages: those pages are there whose numbers are left."""
    magic = xl_files.HVM if entry == 8 else xl_files.PV
    pfns = [0, 1, 5, xl_files.PADDING, 9]
    core = xl_files.Core(pfns, order=order, magic=magic, changes=ENTRIES)
    content = core.build()
    names = len(core.contents()[".shstrtab"])
    table = len(content) - names - entry * len(pfns)
    for entries in range(1, 6):
        for more in (0, 3) if entries < 5 else (0, names - 1):
            write(file, content[: table + entry * entries + more])
            with pytest.raises(CorruptImageError, match="is truncated or corrupt: .*; salvage=Tr"):
                open_backend("coredump", path=file)
            assert not caplog.records
            with open_backend("coredump", path=file, salvage=True) as backend:
                assert isinstance(backend, ImageBackend)
                expected = [pfn for pfn in pfns[:entries] if pfn != xl_files.PADDING]
                assert content_of(backend) == {pfn: page(pfn) for pfn in expected}
                assert len(backend.warnings) == 1 + (entries < 5)
            if entries < 5:
                assert f"{5 - entries} of its 5 pages are missing, and are holes" in caplog.text
            caplog.clear()


def test_a_core_that_was_cut_off_by_its_path(file: Path) -> None:
    """Its names of sections are missing, so it is taken for another core, which tells the name."""
    core = xl_files.Core([0, 1, 5], order=PVH, changes=ENTRIES)
    write(file, core.build()[: -len(core.contents()[".shstrtab"])])
    with pytest.raises(CorruptImageError, match=r"coredump:FILE.*truncated"):
        open_source(file)
    with open_source(f"coredump:{file}", salvage=True) as backend:
        assert list(backend.present(0, 9) or ()) == [(0, 2), (5, 1)]


@pytest.mark.parametrize("missing", [0, 1, 4000, 5 * PAGE])
def test_a_core_without_its_frame_numbers(file: Path, missing: int) -> None:
    """No page has an address then; the message says so, and names no option."""
    core = xl_files.Core([0, 1, 5, 7, 9], order=PVH, changes=ENTRIES)
    content = core.build()
    table = len(content) - len(core.contents()[".shstrtab"]) - 8 * 5
    write(file, content[: table + 7 - missing])
    for salvage in (False, True):
        with pytest.raises(CorruptImageError, match="without it no page has an add") as error:
            open_backend("coredump", path=file, salvage=salvage)
        assert "salvage" not in str(error.value)


def test_a_core_that_is_complete_and_wrong(file: Path) -> None:
    """Salvage is for files that were cut off."""
    changes = {**ENTRIES, ".xen_pfn": {"entry": 8, "name": 1 << 20}}
    write(file, xl_files.Core([0, 1], changes=changes).build())
    with pytest.raises(CorruptImageError) as error:
        open_backend("coredump", path=file, salvage=True)
    assert "salvage" not in str(error.value)


def test_a_core_whose_section_headers_are_cut_off(file: Path) -> None:
    """Nothing says where its pages are."""
    write(file, xl_files.Core([0, 1]).build()[:200])
    with pytest.raises(CorruptImageError, match="table of section headers"):
        open_backend("coredump", path=file, salvage=True)
