"""Unfinished KDUMP files, and flattened ones: refused, or opened as far as they are intact."""

from __future__ import annotations

import json
import logging
import os
import struct
from pathlib import Path

import pytest

from tests.effort import calls_at_most
from tests.images import kdump_files as files
from tests.images.test_hostile import memory_at_most
from tests.images.test_kdump import PAGES, PRESENT, Put, pages_in, put, refusal
from tests.images.writers import elf_core_of, memory
from xenmapcache import CorruptImageError
from xenmapcache.address import PAGE_SIZE, MiB
from xenmapcache.backends.kdump import KdumpBackend
from xenmapcache.cli import main
from xenmapcache.formats.content import InMemory
from xenmapcache.formats.flattened import Flattened
from xenmapcache.formats.kdump import DESCRIPTOR, INCOMPLETE, ZLIB

__all__ = ["put"]  # a fixture

REMEDY = "salvage=True (--salvage on the command line) opens the intact part"
DATA = files.kdump(PAGES)
AT = files.descriptors_at(DATA)


def salvaged(path: Path, caplog: pytest.LogCaptureFixture) -> tuple[dict[int, bytes], int]:
    """Return the pages of an unfinished dump, and how many the warning counts as lost."""
    caplog.clear()
    with caplog.at_level(logging.WARNING), KdumpBackend(path=path, salvage=True) as backend:
        found = pages_in(backend)
        known = backend.describe()
        assert known["pages"] == len(found) == backend.pages - backend.lost
        assert known.get("lost_pages", 0) == backend.lost
        whole = backend.map(0, 0x500, writable=False)
        assert whole.holes == 0x500 - len(found)
    if backend.lost:
        text = f"{backend.lost} of its {backend.pages} pages are missing, and are holes because"
        assert text in caplog.text
        assert text in backend.warnings[0]
    return found, backend.lost


def test_dump_that_says_so_is_refused(put: Put, caplog: pytest.LogCaptureFixture) -> None:
    """Makedumpfile sets a flag if the disk is full, and leaves descriptors empty."""
    data = files.changed(DATA, files.STATUS, "I", ZLIB | INCOMPLETE)
    data = data[: AT + 200 * 24] + bytes((len(PAGES) - 200) * 24) + data[AT + len(PAGES) * 24 :]
    path = put(data)
    assert f"is an unfinished dump: its header says so; {REMEDY}" in refusal(path)
    found, lost = salvaged(path, caplog)
    assert found == {gfn: PAGES[gfn] for gfn in sorted(PAGES)[:200]}
    assert lost == len(PAGES) - 200


def test_commands_salvage(
    put: Put, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message names the option, which opens the rest; pages left out become zeros with it."""
    data = files.kdump(files.pages_of([(0, 4)]), left_out=[5])
    path = str(put(files.changed(data, files.descriptors_at(data) + 48, "Q", 0)))
    assert main(["info", "--json", path]) == 2
    assert "salvage=True (--salvage on the command line)" in capsys.readouterr().err
    assert main(["info", "--json", "--salvage", "--zeros", path]) == 0
    ranges = json.loads(capsys.readouterr().out)["ranges"]
    assert [(each["address"], each["length"]) for each in ranges] == [
        (0, 0x2000),
        (0x3000, 0x1000),
        (0x5000, 0x1000),
    ]
    assert "1 of its 4 pages are missing" in caplog.text


def test_truncated_data_are_holes(put: Put, caplog: pytest.LogCaptureFixture) -> None:
    """Pages whose data lie beyond the end are lost, and those in front are not."""
    path = put(DATA[:-300])
    assert "its last page lies at 0x" in refusal(path)
    assert REMEDY in refusal(path)
    found, lost = salvaged(path, caplog)
    assert 0 < lost < 20
    assert found.items() <= PAGES.items()
    assert len(found) == len(PAGES) - lost


def test_truncated_descriptors_are_holes(put: Put, caplog: pytest.LogCaptureFixture) -> None:
    """The file may end inside its table of descriptors, whose pages have no data then."""
    pages = dict.fromkeys(range(90), memory(0, 1))
    data = files.kdump(pages)
    at = files.descriptors_at(data)
    stored = data[at + 90 * 24 :]
    # The first page's data lie in the table's own place, as in no real file.
    data = files.changed(data, at, "QII", at + 24, len(stored), ZLIB)
    data = data[: at + 24] + stored
    path = put(data)
    assert f"its page descriptors are {at:#x}..{at + 90 * 24:#x}, but the file" in refusal(path)
    assert salvaged(path, caplog) == ({0: memory(0, 1)}, 89)
    path = put(data[: at + 20])
    assert "no page of it is intact" in refusal(path, salvage=True)


def test_lost_pages_in_the_middle_are_holes(put: Put, caplog: pytest.LogCaptureFixture) -> None:
    """present() and map() agree, page by page, and across blocks of descriptors."""
    pages = files.pages_of([(0, 1100)])
    data = files.kdump(pages)
    at = files.descriptors_at(data)
    for gfn in (0, 5, 6, 1023, 1024, 1099):
        data = files.changed(data, at + gfn * 24, "QII", 0, 0, 0)
    path = put(data)
    assert "its last page was never written" in refusal(path)
    with KdumpBackend(path=path, salvage=True) as backend:
        runs = [(1, 4), (7, 1016), (1025, 74)]
        assert list(backend.present(0, 2000)) == runs
        assert list(backend.present(6, 2)) == [(7, 1)]
        mapping = backend.map(4, 4, writable=False)
        assert mapping.errors is not None
        assert [bool(each) for each in mapping.errors] == [False, True, True, False]
        assert bytes(mapping.view(3 * PAGE_SIZE, PAGE_SIZE)) == memory(7, 1)


def test_lost_pages_are_no_zeros(put: Put) -> None:
    """Pages left out are zeros with that option; what is lost stays a hole."""
    data = files.kdump(files.pages_of([(0, 4)]), left_out=[5])
    at = files.descriptors_at(data)
    path = put(files.changed(data, at + 48, "Q", 0))
    with KdumpBackend(path=path, salvage=True, zeros=True) as backend:
        assert list(backend.present(0, 9)) == [(0, 2), (3, 1), (5, 1)]


def test_complete_dump_is_salvaged_without_warning(
    put: Put, caplog: pytest.LogCaptureFixture
) -> None:
    """The option harms nothing."""
    assert salvaged(put(DATA), caplog) == (PAGES, 0)
    assert not caplog.records


def test_zeros_at_the_end_do_not_hide_the_end(put: Put) -> None:
    """All pages of zeros have one place, so the last page of another content is looked for."""
    pages = files.pages_of([(0, 3)]) | dict.fromkeys(range(3, 4000), bytes(PAGE_SIZE))
    data = bytearray(files.kdump(pages))
    at = files.descriptors_at(bytes(data))
    zeros = data[at + 3 * 24 : at + 4 * 24]
    first = DESCRIPTOR.unpack_from(data, at)
    data[at : at + 24] = zeros  # the shared page is in front, as in real files
    struct.pack_into("<Q", data, at + 48, len(data) - 1)
    assert "page 2 of the 4000 in it lies at" in refusal(put(bytes(data)))
    struct.pack_into("<Q", data, at + 48, first[0])
    with KdumpBackend(path=put(bytes(data))) as backend:
        assert backend.pages == 4000
    with KdumpBackend(path=put(files.kdump(dict.fromkeys(range(3000), bytes(4096))))) as backend:
        assert backend.pages == 3000


def test_flattened_dump_without_its_end_is_refused(
    put: Put, caplog: pytest.LogCaptureFixture
) -> None:
    """The last piece is missing, or a piece is shorter than it says."""
    flat = files.FLAT_HEADER + files.piece(0, DATA)
    path = put(flat)
    assert "unfinished dump: the stream ends at" in refusal(path)
    assert salvaged(path, caplog) == (PAGES, 0)
    path = put(flat[:-400])
    assert "piece 0 at 0x1010 has" in refusal(path)
    found, lost = salvaged(path, caplog)
    assert 0 < lost == len(PAGES) - len(found)
    path = put(flat + files.piece(0, b"")[:8] + struct.pack(">q", 9))  # nothing of a last piece
    assert "has 0x9 bytes, but the stream ends at" in refusal(path)
    assert salvaged(path, caplog) == (PAGES, 0)


def test_later_pieces_count_and_gaps_are_zeros() -> None:
    """Makedumpfile writes the header again at the end; what no piece has is zeros."""
    pieces = [(0, b"aaaaaaaa"), (100, b"cc"), (4, b"bb"), (2, b"B" * 4), (50, b""), (104, b"d")]
    flat = Flattened(
        InMemory(files.FLAT_HEADER + b"".join(files.piece(*each) for each in pieces) + files.END)
    )
    assert flat.size == 105
    assert flat.read(0, 10) == b"aaBBBBaa\0\0"
    assert flat.read(98, 7) == b"\0\0cc\0\0d"
    assert flat.read(20, 3) == bytes(3)
    two = [memoryview(bytearray(b"xxx")), memoryview(bytearray(b"xxxx"))]
    flat.read_into(6, *two)
    assert [bytes(each) for each in two] == [b"aa\0", bytes(4)]
    for offset, length in ((-1, 1), (105, 1), (0, -1)):
        with pytest.raises(CorruptImageError, match="the unflattened file ends at 0x69"):
            flat.read(offset, length)


def test_flattened_other_files_are_refused(put: Put) -> None:
    """Makedumpfile can flatten an ELF core too; the message says how to get it back."""
    elf = files.flattened(elf_core_of([(0, 2)]))
    assert "is an ELF file, flattened: put it together with makedumpfile -R" in refusal(put(elf))
    other = files.FLAT_HEADER + files.piece(0, b"12345678") + files.END
    assert "is a file of 3132333435363738, flattened" in refusal(put(other))
    assert "is a file of nothing, flattened" in refusal(put(files.FLAT_HEADER + files.END))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (files.FLAT_HEADER[:20], "ends at 0x14, inside its header"),
        (files.FLAT_HEADER[:200], "ends at 0xc8, inside its header"),
        (files.changed(files.FLAT_HEADER, 16, "Q", 1), "has type 72057594037927936 and version 1"),
        (files.FLAT_HEADER + struct.pack(">qq", -2, 1), "piece 0 at 0x1010 has offset -0x2"),
        (files.FLAT_HEADER + struct.pack(">qq", 1, -1), "has offset 0x1 and size -0x1"),
        (files.FLAT_HEADER + struct.pack(">qq", 1 << 62, 1), "has offset 0x4000000000000000"),
        (
            files.FLAT_HEADER + b"".join(files.piece(900 - n, b"x") for n in range(70)),
            "goes back to 0x344, as too many others do: put it together",
        ),
        (
            files.FLAT_HEADER + b"".join(files.piece(n, b"1") for n in range(4200)),
            "its 4097 pieces up to 0x",
        ),
    ],
)
def test_flattened_streams_that_cannot_be_are_refused(
    put: Put, content: bytes, message: str
) -> None:
    """Offsets, sizes and the number of pieces are bounded."""
    assert message in refusal(put(content), salvage=True)


def test_pieces_have_a_limit_in_number(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each costs 24 bytes of memory."""
    monkeypatch.setattr("xenmapcache.formats.flattened._MAX_PIECES", 3)
    flat = files.FLAT_HEADER + files.piece(0, bytes(900)) * 4
    assert "has more than 3 pieces: put it together" in refusal(put(flat))


def sparse(path: Path, data: bytes, size: int) -> Path:
    path.write_bytes(data)
    os.truncate(path, size)
    os.utime(path, (1, 1))
    return path


def test_sparse_file_of_a_large_bitmap_takes_little(tmp_path: Path) -> None:
    """A bitmap of gigabytes of zeros takes few calls and no memory for its pages."""
    blocks = 1 << 15
    data = files.changed(DATA[: 2 * PAGE_SIZE], files.BITMAP_BLOCKS, "I", 2 * blocks)
    data = files.changed(data, files.field("max_mapnr_64"), "Q", blocks * 8 * PAGE_SIZE)
    path = sparse(tmp_path / "dump", data, (3 + 2 * blocks) * PAGE_SIZE)
    with calls_at_most(10_000), memory_at_most(8 * MiB):
        assert "has no pages" in refusal(path)


def test_sparse_file_of_many_pages_takes_little(tmp_path: Path) -> None:
    """A bitmap of ones names millions of pages, whose descriptors are a hole in the file."""
    data = files.changed(DATA[: 2 * PAGE_SIZE], files.BITMAP_BLOCKS, "I", 64)
    data = files.changed(data, files.field("max_mapnr_64"), "Q", 32 * 8 * PAGE_SIZE)
    data += bytes(32 * PAGE_SIZE) + b"\xff" * (32 * PAGE_SIZE)
    pages = 32 * 8 * PAGE_SIZE
    path = sparse(tmp_path / "dump", data, len(data) + (pages + 5000) * 24)
    with calls_at_most(2000), memory_at_most(8 * MiB):
        assert "its last page was never written" in refusal(path)
    with calls_at_most(20_000), memory_at_most(8 * MiB):
        assert "no page of it is intact" in refusal(path, salvage=True)


def test_pieces_and_runs_are_of_present_pages(put: Put) -> None:
    """A flattened file's pages are the same, though its pieces go back and forth."""
    with KdumpBackend(path=put(files.flattened(DATA, 700))) as backend:
        assert list(backend.present(0, 0x1000)) == PRESENT
        assert pages_in(backend) == PAGES
