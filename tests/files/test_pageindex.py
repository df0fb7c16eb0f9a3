"""Index files that are kept next to an image: what is loaded, and what is replaced."""

from __future__ import annotations

import os
import resource
import struct
import threading
from array import array
from pathlib import Path

import pytest

from xenmapcache.address import PAGE_SIZE
from xenmapcache.files.pageindex import PageIndex, load_index, store_index

SIZE = 64 * PAGE_SIZE
NOTES = bytes(16)


def index_of(*gfns: int) -> PageIndex:
    return PageIndex(array("Q", gfns), array("Q", [PAGE_SIZE * gfn for gfn in gfns]))


def store(path: Path, *gfns: int) -> None:
    store_index(str(path), SIZE, 1, index_of(*gfns), NOTES)


def load(path: Path) -> list[int] | None:
    loaded = load_index(str(path), SIZE, 1)
    return None if loaded is None else list(loaded[0].gfns)


def test_stored_index_is_loaded(tmp_path: Path) -> None:
    """What was stored comes back, also after it was stored again."""
    path = tmp_path / "index"
    for gfns in ([], [3], [0, 1, 5, 9]):
        store(path, *gfns)
        assert load(path) == gfns
    assert os.listdir(tmp_path) == ["index"]


def test_large_index_is_loaded_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index of several parts is complete, and must ascend where two parts meet, too."""
    monkeypatch.setattr("xenmapcache.files.pageindex._CHUNK_BYTES", 16)
    path = tmp_path / "index"
    store(path, 0, 1, 5, 9, 12)
    assert load(path) == [0, 1, 5, 9, 12]
    store(path, 0, 1, 1, 9, 12)
    assert load(path) is None


def test_link_is_neither_loaded_nor_followed_nor_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A symbolic link may lead to a file of the user's, which must not change."""
    path, victim = tmp_path / "index", tmp_path / "victim"
    store(victim, 1, 2)
    good = victim.read_bytes()
    path.symlink_to("victim")
    assert load(path) is None
    store(path, 3)
    assert victim.read_bytes() == good
    assert path.is_symlink()
    assert "index cannot be written, so the index is not kept" in caplog.text


@pytest.mark.parametrize("content", [b"my notes\n", b"", b"xmcind", b"\0" * 100])
def test_foreign_file_is_not_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    """Only a file that begins as an index does is replaced."""
    path = tmp_path / "index"
    path.write_bytes(content)
    store(path, 3)
    assert path.read_bytes() == content
    assert "index is not kept" in caplog.text


def test_index_of_another_version_is_replaced(tmp_path: Path) -> None:
    """The last letter of the magic is the version of the format."""
    path = tmp_path / "index"
    path.write_bytes(b"xmcindx0 of an older release")
    assert load(path) is None
    store(path, 3)
    assert load(path) == [3]


def test_fifo_is_not_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A FIFO without a writer is neither read nor replaced, and nobody waits."""
    path = tmp_path / "index"
    os.mkfifo(path)

    def work() -> None:
        assert load(path) is None
        store(path, 3)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert path.is_fifo()
    assert "index is not kept" in caplog.text


def test_sparse_index_takes_no_memory(tmp_path: Path) -> None:
    """A file of 1 TiB that has only a head on the disk is refused after its first part."""
    path = tmp_path / "index"
    pages = 1 << 36
    head = struct.pack("<8sQQQ16s", b"xmcindx1", pages * PAGE_SIZE, 1, pages, NOTES) + bytes(4)
    path.write_bytes(head)
    os.truncate(path, len(head) + 16 * pages)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert load_index(str(path), pages * PAGE_SIZE, 1) is None
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10


def test_index_of_more_pages_than_the_image_is_refused(tmp_path: Path) -> None:
    """The pages of an image do not overlap, so its size bounds their number."""
    path = tmp_path / "index"
    gfns = range(65)
    store_index(str(path), SIZE, 1, PageIndex(array("Q", gfns), array("Q", [0] * 65)), NOTES)
    assert load(path) is None


@pytest.mark.parametrize(
    ("gfn", "offset"), [(1 << 40, 0), ((1 << 64) - 1, 0), (0, SIZE - PAGE_SIZE + 1)]
)
def test_impossible_numbers_are_refused(tmp_path: Path, gfn: int, offset: int) -> None:
    """A page beyond the largest guest, or beyond the end of the file, is not served."""
    path = tmp_path / "index"
    store_index(str(path), SIZE, 1, PageIndex(array("Q", [gfn]), array("Q", [offset])), NOTES)
    assert load(path) is None


def test_file_that_shrinks_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An index that loses its end under our hands is refused."""
    path = tmp_path / "index"
    store(path, 3, 4)
    read = os.pread

    def short(fd: int, length: int, offset: int) -> bytes:
        return read(fd, length, offset)[:8] if offset else read(fd, length, offset)

    monkeypatch.setattr(os, "pread", short)
    assert load(path) is None


def test_exception_of_a_signal_handler_reaches_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handler's TimeoutError is not taken for an index that cannot be used or written."""
    path = tmp_path / "index"
    store(path, 3)

    def interrupted(*_: object, **__: object) -> None:
        raise TimeoutError("the handler's")

    monkeypatch.setattr("xenmapcache.files.pageindex.open_regular", interrupted)
    with pytest.raises(TimeoutError):
        load(path)
    monkeypatch.setattr("xenmapcache.files.pageindex.new_file", interrupted)
    with pytest.raises(TimeoutError):
        store(path, 3)
