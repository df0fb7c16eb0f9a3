"""KDUMP files of QEMU and makedumpfile, page by page against ELF core and flat image."""

from __future__ import annotations

import logging
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.images.lab import FORMS, Images
from xenmapcache import Backend, CorruptImageError, UnsupportedOperationError, open_source
from xenmapcache.address import PAGE_SIZE
from xenmapcache.backends.elfcore import ElfCoreBackend
from xenmapcache.backends.kdump import KdumpBackend

pytestmark = pytest.mark.images

FILES = [form for form in FORMS if form.file.endswith(".kdump") and "split" not in form.file]
_CHUNK_PAGES = 256


def common(one: Backend, other: Backend) -> list[tuple[int, int]]:
    """Return the runs of pages that two sources have both."""
    end = 1 << 21
    first, second = one.present(0, end), other.present(0, end)
    assert first is not None
    assert second is not None
    found = []
    seconds = list(second)
    for gfn, count in first:
        for start, length in seconds:
            low, high = max(gfn, start), min(gfn + count, start + length)
            if low < high:
                found.append((low, high - low))
    return found


def differing(one: Backend, other: Backend) -> tuple[int, list[int]]:
    """Return how many pages two sources have both, and the gfns of those that differ."""
    total, wrong = 0, []
    for first, pages in common(one, other):
        total += pages
        for gfn in range(first, first + pages, _CHUNK_PAGES):
            count = min(_CHUNK_PAGES, first + pages - gfn)
            maps = [each.map(gfn, count, writable=False) for each in (one, other)]
            left, right = (each.view(0, count * PAGE_SIZE) for each in maps)
            if left != right:
                for page in range(count):
                    part = slice(page * PAGE_SIZE, (page + 1) * PAGE_SIZE)
                    if left[part] != right[part]:
                        wrong.append(gfn + page)
            del maps, left, right
    return total, wrong


def file_of(lab_images: Images, name: str) -> Path:
    """Return a form's path; skip the test where this machine cannot write or unpack it."""
    if not lab_images.has(name):
        pytest.skip(f"QEMU or makedumpfile cannot write {name} on this machine")
    if "lzo" in name and find_spec("lzo") is None:
        pytest.skip("python-lzo is not installed")
    return lab_images.path(name)


@pytest.mark.parametrize("file", [form.file for form in FILES])
def test_same_pages_as_the_elf_core(lab_images: Images, file: str) -> None:
    """All pages of both are equal: the 128 MiB of RAM at least, and QEMU's video memory and ROM."""
    path = file_of(lab_images, file)
    with (
        ElfCoreBackend(path=lab_images.path("plain.elf")) as elf,
        open_source(path) as dump,
        open_source(f"raw:{lab_images.path('guest.raw')}") as flat,
    ):
        assert isinstance(dump, KdumpBackend)
        total, wrong = differing(elf, dump)
        assert (total, wrong) == (dump.pages, [])
        total, wrong = differing(flat, dump)
        assert wrong == []
        ram = (128 << 20 >> 12) - 32  # but for the hole of the PC
        assert total < ram if "excluded" in file else total == ram


@pytest.mark.parametrize("file", [form.file for form in FILES])
def test_same_notes_as_the_elf_core(lab_images: Images, file: str) -> None:
    """Registers and VMCOREINFO, byte by byte."""
    path = file_of(lab_images, file)
    with ElfCoreBackend(path=lab_images.path("plain.elf")) as elf, KdumpBackend(path=path) as dump:
        assert dump.notes == elf.notes
        ours, theirs = dump.describe(), elf.describe()
        assert ours["vmcoreinfo"] == theirs["vmcoreinfo"]
        assert (ours["bits"], ours["machine"]) == (theirs["bits"], theirs["machine"])
        assert "OSRELEASE=" in str(ours["vmcoreinfo"])


@pytest.mark.parametrize("file", ["split-1.kdump", "split-2.kdump"])
def test_split_dumps_are_refused(lab_images: Images, file: str) -> None:
    """Each part names its page frames, and the command that joins the parts."""
    with pytest.raises(UnsupportedOperationError, match="page frames 0x.*makedumpfile --reassem"):
        open_source(lab_images.path(file))


@pytest.mark.parametrize("file", ["compressed.kdump", "makedumpfile-flat.kdump"])
def test_truncated_dumps_are_salvaged(
    lab_images: Images, file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a copy that lacks its second half, the pages in the first half are right."""
    path = tmp_path / file
    shutil.copyfile(lab_images.path(file), path)
    path.chmod(0o600)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(CorruptImageError, match="unfinished dump.*salvage=True"):
        open_source(path)
    with (
        caplog.at_level(logging.WARNING),
        open_source(path, salvage=True) as dump,
        ElfCoreBackend(path=lab_images.path("plain.elf")) as elf,
    ):
        assert isinstance(dump, KdumpBackend)
        total, wrong = differing(elf, dump)
        assert wrong == []
        assert 0 < total == dump.pages - dump.lost < dump.pages
    assert f"{dump.lost} of its {dump.pages} pages are missing" in caplog.text
