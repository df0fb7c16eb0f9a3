"""Pages of a file that are read into a buffer instead of being mapped."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.images import kdump_files, writers, xl_files
from tests.images.lab import FORMS, Images
from tests.images.writers import memory
from xenmapcache import (
    Backend,
    ClosedError,
    CorruptImageError,
    XenMapCacheError,
    open_backend,
    open_source,
)
from xenmapcache.address import PAGE_SIZE

GFNS = [*range(200), *range(300, 310)]
RANGES = [(0, 200), (300, 10)]


def make_raw(path: Path) -> Backend:
    path.write_bytes(writers.packed(RANGES))
    ranges = [(gfn * PAGE_SIZE, pages * PAGE_SIZE) for gfn, pages in RANGES]
    return open_backend("raw", path=path, ranges=ranges)


def make_lime(path: Path) -> Backend:
    path.write_bytes(writers.lime(RANGES))
    return open_backend("raw", path=path)


def make_elf(path: Path) -> Backend:
    path.write_bytes(writers.elf_core_of(RANGES))
    return open_backend("elfcore", path=path)


def make_coredump(path: Path) -> Backend:
    path.write_bytes(xl_files.dump_core(GFNS))
    return open_backend("coredump", path=path)


def make_save(path: Path) -> Backend:
    backwards = xl_files.pages(*reversed(GFNS))
    path.write_bytes(xl_files.save(backwards))
    return open_backend("save", path=path)


def make_kdump(path: Path) -> Backend:
    path.write_bytes(kdump_files.kdump({gfn: memory(gfn, 1) for gfn in GFNS}))
    return open_backend("kdump", path=path)


MAKERS = (make_kdump, make_raw, make_lime, make_elf, make_coredump, make_save)


@pytest.mark.parametrize("make", MAKERS)
def test_what_is_read_is_what_is_mapped(make: Callable[[Path], Backend], tmp_path: Path) -> None:
    """In each format, whatever was in the buffer before; a range with a hole has to be mapped."""
    with make(tmp_path / "guest") as backend:
        for gfn, pages in ((0, 200), (3, 1), (300, 10), (130, 70)):
            buffer = bytearray(b"\xaa" * (pages * PAGE_SIZE))
            assert backend.read_pages(gfn, memoryview(buffer))
            assert buffer == backend.map(gfn, pages, writable=False).memory[:]
        for gfn, pages in ((199, 2), (250, 1), (309, 2)):
            assert not backend.read_pages(gfn, memoryview(bytearray(pages * PAGE_SIZE)))


def test_the_rest_of_the_last_page_is_zeros(tmp_path: Path) -> None:
    """Of a flat image that ends inside a page, even if the buffer had something else there."""
    path = tmp_path / "guest.raw"
    path.write_bytes(memory(0, 2)[:-100])
    with open_backend("raw", path=path) as backend:
        buffer = bytearray(b"\xaa" * (2 * PAGE_SIZE))
        assert backend.read_pages(0, memoryview(buffer))
        assert buffer == memory(0, 2)[:-100] + bytes(100)


def test_what_the_file_lacks_of_a_page_is_zeros(tmp_path: Path) -> None:
    """In the middle of a range, too; the buffer's old content does not show through."""
    path = tmp_path / "guest.elf"
    loads = [writers.Load(0, memory(0, 1)), writers.Load(PAGE_SIZE, memory(1, 1)[:-100])]
    path.write_bytes(writers.elf_core([*loads, writers.Load(2 * PAGE_SIZE, memory(2, 1))]))
    with open_backend("elfcore", path=path) as backend:
        buffer = bytearray(b"\xaa" * (3 * PAGE_SIZE))
        assert backend.read_pages(0, memoryview(buffer))
        assert buffer == memory(0, 2)[:-100] + bytes(100) + memory(2, 1)


def test_a_file_that_changed_is_not_read(tmp_path: Path) -> None:
    """As when it is mapped: half old and half new memory would be nobody's."""
    path = tmp_path / "guest.raw"
    path.write_bytes(memory(0, 2))
    with open_backend("raw", path=path) as backend:
        os.truncate(path, PAGE_SIZE)
        with pytest.raises(CorruptImageError, match="has changed since it was opened"):
            backend.read_pages(0, memoryview(bytearray(2 * PAGE_SIZE)))


def test_a_closed_backend_reads_nothing(tmp_path: Path) -> None:
    """It raises as it does for mapping."""
    backend = make_raw(tmp_path / "guest")
    backend.close()
    with pytest.raises(ClosedError, match="is closed"):
        backend.read_pages(0, memoryview(bytearray(PAGE_SIZE)))


def test_a_live_guest_has_to_be_mapped() -> None:
    """So say all backends that say nothing else."""
    with open_backend("mock", memory="1M") as backend:
        assert not backend.read_pages(0, memoryview(bytearray(PAGE_SIZE)))


@pytest.mark.images
def test_forms_of_a_real_guest(lab_images: Images) -> None:
    """In each form that is read, all pages are those that are mapped."""
    compared = 0
    for form in FORMS:
        if not (form.file.endswith((".elf", ".kdump")) and lab_images.has(form.file)):
            continue
        try:
            backend = open_source(lab_images.path(form.file))
        except (ValueError, XenMapCacheError):
            continue  # a part of a split dump, or a package is missing
        with backend:
            runs = backend.present(0, 1 << 20)
            assert runs is not None
            for first, pages in runs:
                for gfn in range(first, first + pages, 256):
                    count = min(256, first + pages - gfn)
                    buffer = bytearray(b"\xaa" * (count * PAGE_SIZE))
                    assert backend.read_pages(gfn, memoryview(buffer))
                    assert buffer == backend.map(gfn, count, writable=False).memory[:]
                    compared += count
    assert compared > 4 * (120 << 8)  # of 128 MiB, several times
