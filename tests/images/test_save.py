"""Files of xl save, written by xl_files.py."""

from __future__ import annotations

import gc
import gzip
import json
import lzma
import os
import random
import struct
import tracemalloc
import zlib
from pathlib import Path

import pytest

from tests.descriptors import open_files
from tests.effort import calls_at_most
from tests.images import xl_files
from xenmapcache import CorruptImageError, MapCache, open_backend
from xenmapcache.address import PAGE_SIZE
from xenmapcache.backends.save import SaveBackend
from xenmapcache.files.image import ImageFile

from .xl_files import (
    BROKEN,
    CHECKPOINT,
    END,
    PAGE,
    VERIFY,
    XALLOC,
    XL_MAGIC,
    XTAB,
    libxc,
    libxl,
    page,
    pages,
    record,
    save,
    xl,
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "guest.save"


def opened(path: Path, content: bytes, **options: object) -> SaveBackend:
    path.write_bytes(content)
    os.utime(path, (1, 1))  # a file of just now is looked at a second time, which takes a while
    return SaveBackend(path=path, **options)  # type: ignore[arg-type] # its own


def content_of(backend: SaveBackend) -> dict[int, bytes]:
    """Return each present page."""
    return {
        gfn: bytes(backend.map(gfn, 1, writable=False).view(0, PAGE))
        for first, count in backend.present(0, 1 << 40)
        for gfn in range(first, first + count)
    }


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize(("kind", "name"), [(1, "pv"), (2, "hvm")])
def test_a_saved_guest(file: Path, version: int, kind: int, name: str) -> None:
    """Versions 2 and 3, PV and HVM: what the headers say, and each page at its address."""
    content = save(pages(0, 1, 2), pages(9, 0xFFFFF), version=version, kind=kind)
    with opened(file, content) as backend:
        assert (backend.guest_type, backend.xen_version, backend.stream_version) == (
            name,
            "4.17",
            version,
        )
        assert (backend.pages, backend.page_size, backend.memory_end) == (5, PAGE, 0x100000 * PAGE)
        described = backend.describe()
        assert all(getattr(backend, key) == value for key, value in described.items())
        assert len(json.dumps(described)) > 80
        assert content_of(backend) == {gfn: page(gfn) for gfn in (0, 1, 2, 9, 0xFFFFF)}
        mapping = backend.map(1, 3, writable=False)
        assert (mapping.errors is None, mapping.holes) == (False, 1)


def test_streams_without_their_wrapping(file: Path) -> None:
    """A stream of libxl's and one of libxc's are read without what is around them."""
    inner = libxc(pages(0, 7), record(END))
    for content in (inner, libxl(inner, record(END)), xl(libxl(inner, record(END)), config=b"")):
        with opened(file, content) as backend:
            assert content_of(backend) == {0: page(0), 7: page(7)}


def test_page_types(file: Path) -> None:
    """Page tables, pinned or not, are pages; broken, allocated and invalid ones have no bytes."""
    tables = [(gfn, kind) for gfn, kind in enumerate((1, 2, 3, 4, 9, 10, 11, 12))]
    mixed = pages(*tables[:4], (20, XTAB), (21, BROKEN), *tables[4:], (22, XALLOC), 23)
    with opened(file, save(mixed, pages((30, XTAB)), kind=1)) as backend:
        assert content_of(backend) == {gfn: page(gfn) for gfn in (*range(8), 23)}


def test_bits_that_are_reserved(file: Path) -> None:
    """Bits 52 to 59 of a page's number are for later formats, and ignored as libxc does."""
    odd = pages(3, 4).replace(struct.pack("<Q", 4), struct.pack("<Q", 4 | 0xFF << 52), 1)
    with opened(file, save(odd)) as backend:
        assert content_of(backend) == {3: page(3), 4: page(4)}


def test_the_last_copy_wins(file: Path) -> None:
    """A page that was sent again, in the same record or later, has its last content."""
    content = save(
        pages(*range(100)),
        pages(5, 50, copy=1),
        pages(3, 200, 3, copy=2),
        pages(50, 1, copy=3),
        pages(150, 120, copy=4),
    )
    with opened(file, content) as backend:
        last = {gfn: page(gfn) for gfn in range(100)}
        last |= {5: page(5, 1), 3: page(3, 2), 200: page(200, 2), 150: page(150, 4)}
        last |= {50: page(50, 3), 1: page(1, 3), 120: page(120, 4)}
        assert content_of(backend) == last


@pytest.mark.parametrize("kind", [XTAB, BROKEN, XALLOC])
def test_a_page_that_went(file: Path, kind: int) -> None:
    """A page that was sent and then vanished is a hole; one that came back is a page again."""
    content = save(pages(0, 1, 2, 3), pages((1, kind), (3, kind)), pages(3, copy=1))
    with opened(file, content) as backend:
        assert content_of(backend) == {0: page(0), 2: page(2), 3: page(3, 1)}
        assert backend.memory_end == 4 * PAGE
    with opened(
        file, save(pages(0, 1, 2), pages((2, kind)), pages(9), pages((9, kind)))
    ) as backend:
        assert content_of(backend) == {0: page(0), 1: page(1)}
        assert backend.memory_end == 2 * PAGE


def test_any_order_of_pages(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the order, the number of copies and of merges, the index is as a dict's."""
    rng = random.Random(7)
    monkeypatch.setattr("xenmapcache.backends.save._MAX_LATE", 16)
    monkeypatch.setattr("xenmapcache.formats.xl_save._CHUNK_PAGES", 16)
    for _ in range(20):
        expected: dict[int, bytes] = {}
        records = []
        for copy in range(rng.randrange(1, 12)):
            gfns = [rng.randrange(80) for _ in range(rng.randrange(1, 40))]
            if rng.random() < 0.5:
                gfns = sorted(set(gfns))
            kinds = [XTAB if rng.random() < 0.2 else 0 for _ in gfns]
            records.append(pages(*zip(gfns, kinds, strict=True), copy=copy))
            for gfn, kind in zip(gfns, kinds, strict=True):
                if kind:
                    expected.pop(gfn, None)
                else:
                    expected[gfn] = page(gfn, copy)
        with opened(file, save(*records)) as backend:
            assert content_of(backend) == expected
            assert backend.pages == len(expected)


def test_checkpoints(file: Path) -> None:
    """Records between a checkpoint and the next pages are skipped, and pages continue."""
    middle = [record(CHECKPOINT), record(3, b"emulator"), record(4)]
    with opened(file, save(pages(0, 1), *middle, pages(1, copy=1))) as backend:
        assert content_of(backend) == {0: page(0), 1: page(1, 1)}


def test_pages_to_verify_count_not(file: Path) -> None:
    """Pages after VERIFY are for a comparison, and a receiver keeps what it has."""
    again = pages((0, 0), (1, XTAB), copy=1)
    with opened(file, save(pages(0, 1), record(VERIFY), again, pages(1, 2, copy=2))) as backend:
        assert content_of(backend) == {0: page(0), 1: page(1)}


def test_runs_follow_the_file(file: Path) -> None:
    """Pages that are consecutive in the guest and in the file are read in one piece."""
    with opened(file, save(pages(*range(300)), pages(300, 301), pages(100, copy=1))) as backend:
        assert [(run.gfn, run.pages) for run in backend.runs(0, 400)] == [
            (0, 100),
            (100, 1),
            (101, 199),
            (300, 2),
        ]
        with MapCache(backend) as cache:
            assert cache.read(99 * PAGE, 3 * PAGE) == page(99) + page(100, 1) + page(101)


def test_progress(file: Path) -> None:
    """It goes up to the file's size, in some hundred steps at most."""
    calls: list[tuple[int, int]] = []
    content = save(*(pages(gfn) for gfn in range(2000)))
    with opened(file, content, progress=lambda done, total: calls.append((done, total))):
        assert calls == sorted(calls)
        assert 100 < len(calls) < 300
        assert {total for _, total in calls} == {len(content)}
        assert calls[-1] == (len(content), len(content))


# --- the index that is kept ---------------------------------------------------------------


def kept(file: Path) -> Path:
    return file.with_name("guest.save.index")


def test_nothing_is_kept_unasked(file: Path) -> None:
    """Without keep_index no file is written, and an existing one is neither used nor changed."""
    opened(file, save(pages(0, 1))).close()
    assert os.listdir(file.parent) == ["guest.save"]
    kept(file).write_bytes(b"something else")
    opened(file, save(pages(0, 1))).close()
    assert kept(file).read_bytes() == b"something else"


def test_the_index_is_used_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time the stream is not read: notes and pages come from the index."""
    opened(file, save(pages(0, 1, 5), pages(1, copy=1), kind=1), keep_index=True).close()
    monkeypatch.setattr("xenmapcache.backends.save.SaveStream", None)
    with open_backend("save", path=file, keep_index=True) as backend:
        assert isinstance(backend, SaveBackend)
        assert (backend.guest_type, backend.xen_version, backend.stream_version) == (
            "pv",
            "4.17",
            3,
        )
        assert content_of(backend) == {0: page(0), 1: page(1, 1), 5: page(5)}
    assert sorted(os.listdir(file.parent)) == ["guest.save", "guest.save.index"]


def test_a_stale_index_is_made_anew(file: Path) -> None:
    """When the file has changed, in size or in time, its index is not believed, and replaced."""
    opened(file, save(pages(0, 1)), keep_index=True).close()
    before = kept(file).read_bytes()
    for gfns, seconds in ((range(3), 1), ((7, 8, 9), 6)):
        file.write_bytes(save(pages(*gfns)))
        os.utime(file, (seconds, seconds))
        with SaveBackend(path=file, keep_index=True) as backend:
            assert content_of(backend) == {gfn: page(gfn) for gfn in gfns}
        assert kept(file).read_bytes() != before
        before = kept(file).read_bytes()


def test_a_corrupt_index_is_made_anew(file: Path) -> None:
    """Whatever byte of it changes, or is lost, the pages are right, and so is the new index.

    A file that does not begin as an index may be the user's, and is left alone.
    """
    opened(file, save(pages(0, 1, 5)), keep_index=True).close()
    good = kept(file).read_bytes()
    bad = [good[:length] for length in range(0, len(good), 5)] + [good + b"\0"]
    bad += [good[:i] + bytes([good[i] ^ 0x40]) + good[i + 1 :] for i in range(len(good))]
    for content in bad:
        kept(file).write_bytes(content)
        with SaveBackend(path=file, keep_index=True) as backend:
            assert content_of(backend) == {gfn: page(gfn) for gfn in (0, 1, 5)}
        is_index = content.startswith(b"xmcindx")
        assert kept(file).read_bytes() == (good if is_index else content)


@pytest.mark.parametrize(
    "arrays", [(0, 1, 1 << 40, 1 << 41), (1, 0, 64, 128), (0, 1 << 50, 64, 128)]
)
def test_an_index_that_lies(file: Path, arrays: tuple[int, ...]) -> None:
    """Even one with a right checksum leads neither out of the file nor astray."""
    opened(file, save(pages(0, 1)), keep_index=True).close()
    good = kept(file).read_bytes()
    head, checksum, truth = good[:-36], good[-36:-32], good[-32:]
    assert zlib.crc32(head + truth) == int.from_bytes(checksum, "little")
    lie = struct.pack("<QQQQ", *arrays)
    kept(file).write_bytes(head + zlib.crc32(head + lie).to_bytes(4, "little") + lie)
    with SaveBackend(path=file, keep_index=True) as backend:
        assert content_of(backend) == {0: page(0), 1: page(1)}
    assert kept(file).read_bytes() == good


def test_an_index_of_no_guest(file: Path) -> None:
    """Notes that no stream has are not believed either, though the checksum is right."""
    opened(file, save(pages(0, 1)), keep_index=True).close()
    good = kept(file).read_bytes()
    head, rest = good[:-36], good[-32:]
    head = head[:-16] + struct.pack("<IIII", 9, 3, 4, 17)
    kept(file).write_bytes(head + zlib.crc32(head + rest).to_bytes(4, "little") + rest)
    with SaveBackend(path=file, keep_index=True) as backend:
        assert backend.guest_type == "hvm"
    assert kept(file).read_bytes() == good


@pytest.mark.parametrize("seconds", [-5, 10**10])
def test_an_index_of_any_time(file: Path, seconds: int) -> None:
    """A file may be of before 1970, or of after 2262, where ns take more than 63 bits."""
    file.write_bytes(save(pages(0, 1)))
    os.utime(file, (seconds, seconds))
    for _ in range(2):
        with SaveBackend(path=file, keep_index=True) as backend:
            assert content_of(backend) == {0: page(0), 1: page(1)}


def test_an_index_is_of_the_file_that_was_opened(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If another takes the file's name, the index is not used for that one."""
    other = file.with_name("other")
    for path, gfns in ((file, (0, 1)), (other, (0, 2))):
        path.write_bytes(save(pages(*gfns)))
        os.utime(path, gfns)

    def replaced(path: Path) -> ImageFile:
        image = ImageFile(path)
        other.replace(file)
        return image

    with monkeypatch.context() as patch:
        patch.setattr("xenmapcache.backends.save.ImageFile", replaced)
        with SaveBackend(path=file, keep_index=True) as backend:
            assert content_of(backend) == {0: page(0), 1: page(1)}
    with SaveBackend(path=file, keep_index=True) as backend:
        assert content_of(backend) == {0: page(0), 2: page(2)}


def test_an_index_that_cannot_be_kept(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is told, and the guest is read all the same."""
    kept(file).mkdir()
    with opened(file, save(pages(0, 1)), keep_index=True) as backend:
        assert content_of(backend) == {0: page(0), 1: page(1)}
    assert "the index is not kept" in caplog.text


# --- what is wrong ---------------------------------------------------------------------

INNER = libxc(pages(0), record(END))
WHOLE = save(pages(0, 1), pages((2, XTAB), 3))
BAD: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "begins with b''"),
    "other": (b"\x7fELF" + bytes(99), "not a file of xl save"),
    "gzip": (gzip.compress(WHOLE), "compressed by gzip: unpack it first"),
    "xz": (lzma.compress(WHOLE), "compressed by xz"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(99), "compressed by zstd"),
    "legacy xm": (b"LinuxGuestRecord" + bytes(99), "of the legacy format of Xen 4.5"),
    "legacy xl": (xl(bytes(200), flags=1), "of the legacy format of Xen 4.5"),
    "byte order": (xl(INNER, order=0x04030201), "byte order 0x04030201"),
    "flags": (xl(INNER, flags=7), "mandatory flags 0x7"),
    "config": (XL_MAGIC + struct.pack("<IIII", 0x01020304, 3, 0, 2**32 - 1), "xl's configuration"),
    "no libxl": (xl(INNER), r"where libxl's stream should begin \(offset 0x4c\)"),
    "libxl version": (libxl(INNER, version=1), "libxl stream of version 1"),
    "libxl order": (libxl(INNER, options=1), "options 0x1"),
    "libxl record": (libxl(INNER, record(5)), "libxl record of unknown type 0x5"),
    "no libxc": (libxl(INNER)[:16] + record(END), "ends without libxc's stream"),
    "two libxc": (libxl(INNER, record(1), INNER, record(END)), "a second stream of libxc"),
    "libxc magic": (libxl(b"\xff" * 7 + b"\0" + INNER[8:]), "may be of the legacy format"),
    "libxc version": (libxc(record(END), version=4), "libxc stream of version 4"),
    "libxc version 1": (libxc(record(END), version=1), "libxc stream of version 1"),
    "libxc order": (libxc(record(END), options=1), "options 0x1"),
    "domain": (libxc(record(END), kind=4), "domain of type 4 with"),
    "shift": (libxc(record(END), shift=14), r"pages of 2\*\*14 bytes"),
    "mandatory": (save(pages(0), record(0x13)), r"libxc record of unknown type 0x13 \(offset 0x"),
    "v3 in v2": (save(record(0x10), version=2), "libxc record of unknown type 0x10"),
    "dirty list": (save(record(0xF, bytes(8))), "libxc record of unknown type 0xf"),
    "length": (libxc(record(9, length=2**32 - 1)), "record 0x9 of 0xffffffff bytes is implausible"),
    "long": (libxc(record(9, length=1 << 20)), "is truncated"),
    "pages long": (libxc(record(1, bytes(16), length=1 << 20)), "inside of pages"),
    "pages short": (libxc(record(1, b"abcd"), record(END)), "a record of pages has 4 bytes"),
    "no pages": (libxc(record(1, bytes(8)), record(END)), "a record of 0x0 pages"),
    "count": (libxc(pages(0, count=1 << 31), record(END)), "a record of 0x80000000 pages"),
    "count, less": (
        libxc(pages(0, 1, count=1), record(END)),
        "has 0x1008 bytes too many",
    ),
    "count, more": (libxc(pages(0, 1, count=3), record(END)), "more pages in a record than"),
    "few bytes": (libxc(record(1, struct.pack("<IIQ", 1, 0, 9) + bytes(9))), "more pages in a"),
    "page type": (save(pages(0, (1, 5))), r"page 0x1 has the unknown type 0x5 \(offset 0x"),
    "pfn": (save(pages(1 << 41)), "pfn 0x20000000000 is beyond 52 bits"),
    "no end": (libxc(pages(0)), "inside of libxc record's header"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_named(file: Path, name: str) -> None:
    """A file that contradicts the format is refused, naming what and where, and is closed."""
    content, message = BAD[name]
    files = open_files()
    tracemalloc.start()
    with calls_at_most(10_000), pytest.raises(CorruptImageError, match=message) as caught:
        opened(file, content, keep_index=True)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()
    assert str(file) in str(caught.value)
    assert open_files() <= files
    assert not kept(file).exists()


def test_cut_off_anywhere(file: Path) -> None:
    """However much of its end a file has lost, it is refused."""
    ends = {*range(400), *range(400, len(WHOLE), 97), *range(len(WHOLE) - 400, len(WHOLE))}
    for length in ends:
        with pytest.raises(CorruptImageError, match="guest.save"):
            opened(file, WHOLE[:length])


def test_a_flood_of_records(file: Path) -> None:
    """Records without end and without pages are not followed for long."""
    file.write_bytes(libxc(record(0x80000000) * 2000000))
    with calls_at_most(12 * 32_768):
        with pytest.raises(CorruptImageError, match="more than 32768 records"):
            SaveBackend(path=file)


@pytest.mark.slow
def test_the_index_is_small(file: Path) -> None:
    """An index takes 16 bytes a page; while it is made, half as much again."""
    gfns = list(range(8000))
    for order in (gfns, gfns[::2] + gfns[1::2]):
        batches = [pages(*order[i : i + 1000]) for i in range(0, 8000, 1000)]
        file.write_bytes(save(*batches))
        del batches
        SaveBackend(path=file).close()
        tracemalloc.start()
        backend = SaveBackend(path=file)
        gc.collect()
        size, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        backend.close()
        assert size < 16 * 8000 + 16000


def test_records_of_pages_are_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large guest there are many more records than a stream has otherwise."""
    monkeypatch.setattr("xenmapcache.formats.xl_save._MAX_OTHER_RECORDS", 60)
    path = tmp_path / "guest.save"
    path.write_bytes(xl_files.save(*(xl_files.pages(gfn) for gfn in range(100))))
    with open_backend("save", path=path) as backend:
        assert list(backend.present(0, 200) or ()) == [(0, 100)]


def test_the_largest_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record may be as long as libxc allows, and not longer."""
    length = 8 + 3 * (8 + PAGE_SIZE)
    path = tmp_path / "guest.save"
    path.write_bytes(xl_files.save(xl_files.pages(0, 1, 2)))
    monkeypatch.setattr("xenmapcache.formats.xl_save._MAX_RECORD_BYTES", length)
    with open_backend("save", path=path) as backend:
        assert list(backend.present(0, 9) or ()) == [(0, 3)]
    monkeypatch.setattr("xenmapcache.formats.xl_save._MAX_RECORD_BYTES", length - 1)
    with pytest.raises(CorruptImageError, match="implausible"):
        open_backend("save", path=path)


def test_an_index_that_leads_over_the_end(tmp_path: Path) -> None:
    """A page that the file has only a part of is not believed of an index either."""
    path, index = tmp_path / "guest.save", tmp_path / "guest.save.index"
    path.write_bytes(xl_files.save(xl_files.pages(0, 1)))
    os.utime(path, (1, 1))
    open_backend("save", path=path, keep_index=True).close()
    good = index.read_bytes()
    lie = struct.pack("<QQQQ", 0, 1, 64, path.stat().st_size - PAGE_SIZE + 1)
    checksum = zlib.crc32(good[:-36] + lie).to_bytes(4, "little")
    index.write_bytes(good[:-36] + checksum + lie)
    with open_backend("save", path=path, keep_index=True) as backend:
        assert backend.map(1, 1, writable=False).view(0, PAGE_SIZE) == xl_files.page(1)
    assert index.read_bytes() == good


def test_a_record_that_begins_with_the_last_page(tmp_path: Path) -> None:
    """A page that ends one record and begins the next has its later copy, and is there once."""
    path = tmp_path / "guest.save"
    path.write_bytes(xl_files.save(xl_files.pages(0, 1, 2), xl_files.pages(2, 3, copy=1)))
    with open_backend("save", path=path) as backend:
        assert list(backend.present(0, 9) or ()) == [(0, 4)]
        view = backend.map(2, 2, writable=False).view(0, 2 * PAGE_SIZE)
        assert view == xl_files.page(2, 1) + xl_files.page(3, 1)
