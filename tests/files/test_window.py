"""Windows over files: what is mapped, what is read, and a file that changes."""

from __future__ import annotations

import errno
import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.images import writers, xl_files
from xenmapcache import (
    CacheFullError,
    ClosedError,
    CorruptImageError,
    MapCache,
    XenCallError,
    open_backend,
    open_cache,
)
from xenmapcache.address import PAGE_SIZE
from xenmapcache.files import image as image_module
from xenmapcache.files.filelease import FileLease, MappedParts
from xenmapcache.files.image import ImageFile
from xenmapcache.mapping import live_mappings, live_records

from .changes import PAGES
from .conftest import mapped_lines, wait_for

LENGTH = PAGES * PAGE_SIZE


@pytest.fixture(autouse=True)
def _collected() -> None:
    """Nothing that earlier tests have left goes while a test counts mappings."""
    gc.collect()


def test_aligned_runs_are_mapped_and_others_read(mappable: Path) -> None:
    """Runs of 16 pages or more, page-aligned; what is read counts under max_copies."""
    path = mappable / "guest.raw"
    path.write_bytes(writers.memory(0, 64))
    page = PAGE_SIZE
    ranges = [(0, 20 * page), (24 * page, 2 * page), (30 * page, page), (40 * page, 30 * page)]
    with open_backend("raw", path=path, ranges=ranges) as backend:
        assert [backend.copied_pages(0, count) for count in (80, 26, 16, 15)] == [3, 2, 0, 15]
        with MapCache(backend, max_copies=1 << 20) as cache, cache.window(0, 80 * page) as window:
            assert cache.stats().copied_bytes == 3 * page
            assert mapped_lines() == 2
            content = writers.memory(0, 64)
            for address, length in ranges:
                assert window.view[address : address + length] == content[:length]
                content = content[length:]
            holes = [(20, 24), (26, 30), (31, 40), (70, 80)]
            for first, end in holes:
                assert window.view[first * page : end * page] == bytes((end - first) * page)
    gc.collect()
    assert mapped_lines() == 0


def test_what_does_not_lie_in_pages_is_read(tmp_path: Path) -> None:
    """A saved guest: all of it, in the order in which its pages belong."""
    path = tmp_path / "guest.save"
    path.write_bytes(xl_files.save(xl_files.pages(*range(20, 40)), xl_files.pages(*range(20))))
    with open_cache(path, bucket_shift=16, max_copies="256K") as cache:
        with cache.window(0, 48 * PAGE_SIZE) as window:
            for gfn in range(40):
                page = window.view[gfn * PAGE_SIZE : (gfn + 1) * PAGE_SIZE]
                assert page == xl_files.page(gfn)
            assert window.view[40 * PAGE_SIZE :] == bytes(8 * PAGE_SIZE)
            assert cache.stats().copied_bytes == 40 * PAGE_SIZE
    with open_cache(path, bucket_shift=16, max_copies="128K") as cache:
        with pytest.raises(CacheFullError, match="0x28000 bytes .* are more than max_copies"):
            cache.window()


def test_a_file_that_ends_inside_a_page(mappable: Path) -> None:
    """The rest of the page is zeros, mapped or read."""
    path = mappable / "guest.raw"
    for pages in (3, 20):
        content = writers.memory(0, pages)[:-100]
        path.write_bytes(content)
        with open_cache(f"raw:{path}") as cache, cache.window() as window:
            assert window.view == content + bytes(100)


def test_a_truncation_leaves_a_window_as_it_was(path: Path) -> None:
    """The image guard puts copies over each of its parts before the writer continues."""
    content = path.read_bytes()
    page = PAGE_SIZE
    ranges = [(0, 20 * page), (32 * page, 44 * page)]
    with open_backend("raw", path=path, ranges=ranges) as backend, MapCache(backend) as cache:
        with cache.window() as window:
            os.truncate(path, 0)
            assert mapped_lines() == 0
            assert window.view[: 20 * page] == content[: 20 * page]
            assert window.view[20 * page : 32 * page] == bytes(12 * page)
            assert window.view[32 * page :] == content[20 * page :]
        with pytest.raises(CorruptImageError, match="has changed"):
            cache.window()


Interfere = Callable[[Path], object]
INTERFERENCES: dict[str, Interfere] = {
    "opened for writing": lambda path: path.open("r+b").close(),
    "truncated": lambda path: os.truncate(path, 0),
}


@pytest.mark.parametrize("what", INTERFERENCES)
@pytest.mark.parametrize("when", ["before the mmap", "after the mmap"])
def test_a_writer_that_comes_amid_the_work(
    path: Path, monkeypatch: pytest.MonkeyPatch, what: str, when: str
) -> None:
    """The window is begun again, and read; if the file has changed, that is the error."""
    before = live_mappings()
    map_at = image_module._map_at
    left = [INTERFERENCES[what]]

    def interfere(*arguments: object) -> None:
        if left and when == "before the mmap":
            left.pop()(path)
        map_at(*arguments)  # type: ignore[arg-type] # as it was called
        if left:
            left.pop()(path)

    content = path.read_bytes()
    with open_cache(f"raw:{path}") as cache:
        monkeypatch.setattr(image_module, "_map_at", interfere)
        if what == "truncated":
            with pytest.raises(CorruptImageError):
                cache.window()
        else:
            with cache.window() as window:
                assert window.view == content
                assert cache.stats().copied_bytes == LENGTH
        assert not left
        assert mapped_lines() == 0
    gc.collect()
    wait_for(lambda: live_mappings() == before)


def test_copies_that_a_writer_forces_may_not_fit(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names max_copies, and the memory is gone."""
    map_at = image_module._map_at

    def interfere(*arguments: object) -> None:
        map_at(*arguments)  # type: ignore[arg-type] # as it was called
        path.open("r+b").close()

    with open_cache(f"raw:{path}", bucket_shift=12, max_copies=PAGE_SIZE) as cache:
        monkeypatch.setattr(image_module, "_map_at", interfere)
        with pytest.raises(CacheFullError, match="are more than max_copies 0x1000"):
            cache.window()
        assert cache.stats().resident_bytes == 0


def test_a_file_changed_without_a_lease_break(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a program that had it open before: the look after the mmap finds it."""
    with open_cache(f"raw:{path}") as cache:
        monkeypatch.setattr(FileLease, "change", lambda _: CorruptImageError("it has changed"))
        with pytest.raises(CorruptImageError, match="it has changed"):
            cache.window()
        assert mapped_lines() == 0


def test_a_lease_that_ends_before_the_call_is_noticed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then nothing is mapped, and the caller is told to ask again."""
    with open_backend("raw", path=path) as backend, MapCache(backend) as cache:
        monkeypatch.setattr(ImageFile, "largest_map", lambda _: LENGTH)
        monkeypatch.setattr(FileLease, "take", lambda _: False)
        with pytest.raises(XenCallError, match="is opened for writing by another") as caught:
            cache.window()
        assert caught.value.errno == errno.EAGAIN
        assert mapped_lines() == 0


def test_a_run_larger_than_a_copy_may_be_is_read(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the guard could not put a copy over it (ulimit -f)."""
    monkeypatch.setattr(image_module, "_largest_copy", lambda: LENGTH - 1)
    with open_cache(f"raw:{path}") as cache, cache.window() as window:
        assert cache.stats().copied_bytes == LENGTH
        assert window.view == path.read_bytes()
        with cache.window(0, LENGTH - PAGE_SIZE):
            assert cache.stats().copied_bytes == LENGTH  # this one is mapped


def test_a_closed_file_makes_no_window(path: Path) -> None:
    """What was taken before stays."""
    with open_backend("raw", path=path) as backend, MapCache(backend) as cache:
        window = cache.window()
        keeps = [record.keeps for record in live_records()]
        assert any(isinstance(each, MappedParts) for each in keeps)
        backend.close()
        assert backend.copied_pages(0, 1) == 0
        with pytest.raises(ClosedError):
            cache.window()
        assert window.view == path.read_bytes()
        window.release()
