"""Reading KDUMP files: every version and compression; parts and kinds that are refused."""

from __future__ import annotations

import logging
import os
import struct
import sys
import types
import zlib
from collections.abc import Callable
from pathlib import Path

import cramjam
import pytest
import zstandard

from tests.effort import calls_at_most
from tests.images import kdump_files as files
from tests.images.writers import memory, note
from xenmapcache import (
    BackendUnavailableError,
    CorruptImageError,
    MapCache,
    UnsupportedOperationError,
    open_source,
)
from xenmapcache.address import PAGE_SIZE
from xenmapcache.backends.kdump import KdumpBackend
from xenmapcache.formats.kdump import DESCRIPTOR, DISKDUMP, LZO, SNAPPY, ZLIB, ZSTD

RANGES = [(0, 3), (7, 1), (0x300, 0x120)]
PAGES = files.pages_of(RANGES) | dict.fromkeys(range(0x420, 0x428), bytes(PAGE_SIZE))
PRESENT = [(0, 3), (7, 1), (0x300, 0x128)]
Put = Callable[[bytes], Path]


@pytest.fixture
def put(tmp_path: Path) -> Put:
    """Write a file, whose time of change is old, so that opening it need not wait."""

    def write(data: bytes) -> Path:
        path = tmp_path / "dump"
        path.write_bytes(data)
        os.utime(path, (1, 1))
        return path

    return write


def pages_in(backend: KdumpBackend) -> dict[int, bytes]:
    """Return each present page of a backend."""
    found = {}
    for gfn, count in backend.present(0, 1 << 34):
        mapping = backend.map(gfn, count, writable=False)
        for number in range(count):
            found[gfn + number] = bytes(mapping.view(number * PAGE_SIZE, PAGE_SIZE))
    return found


def refusal(path: Path, **options: bool) -> str:
    """Return why a file is refused."""
    with pytest.raises((CorruptImageError, UnsupportedOperationError)) as error:
        KdumpBackend(path=path, **options)
    assert str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("version", range(7))
@pytest.mark.parametrize("bitmaps", [1, 2])
def test_each_version_is_read(put: Put, version: int, bitmaps: int) -> None:
    """What an older version's sub header lacks is not taken from the bytes that follow."""
    info, notes = b"OSRELEASE=6.1.0-test\n", note(b"CORE", 1, bytes(336)) + bytes(100)
    data = files.kdump(PAGES, version=version, bitmaps=bitmaps, vmcoreinfo=info, notes=notes)
    with KdumpBackend(path=put(data)) as backend:
        assert pages_in(backend) == PAGES
        assert list(backend.present(0, 0x1000)) == PRESENT
        assert backend.memory_end == 0x428 * PAGE_SIZE
        known = backend.describe()
        assert ("vmcoreinfo" in known) == (version >= 3)
        assert [each.name for each in backend.notes] == (["CORE"] if version >= 4 else [])
        assert known["dump_level"] == (31 if version else 0)
        assert (backend.bits, backend.machine, backend.release) == (64, "x86-64", "6.1.0-test")
        assert (backend.header_version, backend.compression) == (version, "zlib")
        assert (known["pages"], backend.lost) == (len(PAGES), 0)


@pytest.mark.parametrize("compression", [0, ZLIB, SNAPPY, ZSTD])
@pytest.mark.parametrize("flat", [False, True])
def test_each_compression_is_read(put: Put, compression: int, flat: bool) -> None:
    """As it is, and flattened; through a cache, whose buckets have holes."""
    data = files.kdump(PAGES, compression=compression)
    path = put(files.flattened(data) if flat else data)
    for source in (str(path), f"kdump:{path}"):
        with open_source(source) as backend, MapCache(backend) as cache:
            assert backend.name == "kdump"
            assert cache.read(0x300 * PAGE_SIZE, 0x128 * PAGE_SIZE) == memory(0x300, 0x120) + bytes(
                8 * PAGE_SIZE
            )
            assert cache.read(7 * PAGE_SIZE, PAGE_SIZE) == memory(7, 1)


def test_pages_are_copies(put: Put) -> None:
    """All memory counts as copies, also where the place of a descriptor is page-aligned."""
    with KdumpBackend(path=put(files.kdump(PAGES, compression=0))) as backend:
        assert all(backend.copies(gfn, 1) for gfn in (0, 1, 7, 0x300))


def test_pages_may_differ_in_compression(put: Put) -> None:
    """The header says zlib; a page that zlib makes larger is stored as it is."""
    noise = os.urandom(PAGE_SIZE)
    pages = {0: noise, 1: memory(1, 1), 2: noise}
    with KdumpBackend(path=put(files.kdump(pages))) as backend:
        assert pages_in(backend) == pages


def test_diskdump_is_read(put: Put) -> None:
    """Files of diskdump have the same pages, and no sub header that is known."""
    data = files.kdump(PAGES, signature=DISKDUMP, vmcoreinfo=b"A=1")
    with open_source(put(data)) as backend:
        assert isinstance(backend, KdumpBackend)
        assert pages_in(backend) == PAGES
        assert "vmcoreinfo" not in backend.describe()


def test_pages_far_apart_are_found(put: Put) -> None:
    """Blocks of a bitmap with all pages, with none and with some; a last byte in part."""
    block = 8 * PAGE_SIZE
    zeros = bytes(PAGE_SIZE)
    gfns = [*range(1, 2 * block + 3), 40 * block + 5, 300 * block, 300 * block + 4]
    data = files.kdump(dict.fromkeys(gfns, zeros), max_mapnr=300 * block + 5)
    data = data.replace(b"\x11" + zeros[:4000], b"\xf1" + zeros[:4000])  # beyond max_mapnr
    with KdumpBackend(path=put(data)) as backend:
        assert backend.pages == len(gfns)
        assert backend.memory_end == (300 * block + 5) * PAGE_SIZE
        assert list(backend.present(0, 1 << 40)) == [
            (1, 2 * block + 2),
            (40 * block + 5, 1),
            (300 * block, 1),
            (300 * block + 4, 1),
        ]
        assert list(backend.present(5, 2 * block)) == [(5, 2 * block - 2)]
        assert list(backend.present(300 * block + 5, 9)) == []
        assert list(backend.present(2 * block + 3, 90)) == []


def test_pages_left_out_are_holes_or_zeros(put: Put) -> None:
    """The first bitmap has the machine's pages; the option makes zeros of those left out."""
    left_out = [*range(3, 6), *range(8, 10), 0x500, 0x501]
    path = put(files.kdump(PAGES, left_out=left_out))
    with KdumpBackend(path=path) as backend:
        assert pages_in(backend) == PAGES
        assert backend.describe()["left_out_bytes"] == 7 * PAGE_SIZE
        assert backend.memory_end == 0x428 * PAGE_SIZE
    with KdumpBackend(path=path, zeros=True) as backend:
        zeros = dict.fromkeys(left_out, bytes(PAGE_SIZE))
        assert pages_in(backend) == PAGES | zeros
        runs = [(0, 6), (7, 3), (0x300, 0x128), (0x500, 2)]
        assert list(backend.present(0, 1 << 30)) == runs
        assert list(backend.present(4, 4)) == [(4, 2), (7, 1)]
        assert backend.memory_end == 0x502 * PAGE_SIZE
        assert "left_out_bytes" not in backend.describe()
        mapping = backend.map(0, 10, writable=False)
        assert mapping.holes == 1
    with KdumpBackend(path=put(files.kdump(PAGES, bitmaps=1)), zeros=True) as backend:
        assert pages_in(backend) == PAGES


def test_split_dumps_are_refused_by_name(put: Put) -> None:
    """A part says which page frames it is about, in the width of its version."""
    data = files.changed(files.kdump(PAGES), files.field("split"), "IQQ", 1, 5, 6)
    path = put(files.changed(data, files.field("start_pfn_64"), "QQ", 0x100, 0x200))
    message = refusal(path, salvage=True)
    assert "a part of a split dump, with the page frames 0x100..0x200: join all parts" in message
    assert "makedumpfile --reassemble" in message
    assert "page frames 0x5..0x6:" in refusal(put(files.changed(data, 8, "I", 5)))


@pytest.mark.parametrize(
    ("offset", "form", "value", "message"),
    [
        (8, "I", 7, "header_version is 7; up to 6 is read"),
        (files.BLOCK_SIZE, "i", 0x10000, "it is a KDUMP file, but its block_size is 0x10000; only"),
        (files.BLOCK_SIZE, "i", -1, "block_size is -0x1; only 0x1000 is read. If the header is"),
        (files.BLOCK_SIZE, "I", 0x100000, "a machine that is big-endian"),
        (files.SUB_BLOCKS, "I", 2**32 - 1, "bitmaps are 0x100000000000..0x100000002000, but"),
        (files.BITMAP_BLOCKS, "I", 2**32 - 1, "no page of it can be read"),
        (files.BITMAP_BLOCKS, "I", 0, "bitmap_blocks is 0x0, but 0x428 pages need at least 0x1"),
        (files.field("max_mapnr_64"), "Q", 2**34 + 1, "max_mapnr is 0x400000001; expected 1 to"),
        (files.field("max_mapnr_64"), "Q", 2**34, "need at least 0x80000"),
        (0, "Q", 0, "begins with 0000000000000000: not a KDUMP file"),
    ],
)
def test_headers_that_cannot_be_are_refused(
    put: Put, offset: int, form: str, value: int, message: str
) -> None:
    """Each field is compared with the format or with the file before it is used."""
    assert message in refusal(put(files.changed(files.kdump(PAGES), offset, form, value)))


def test_dumps_of_32_bits_are_refused(put: Put) -> None:
    """Their block size is elsewhere."""
    data = files.changed(files.kdump(PAGES), files.BLOCK_SIZE, "I", 31)
    path = put(files.changed(data, 0x1A0, "I", PAGE_SIZE))
    assert "a machine that is of 32 bits: only little-endian dumps of 64 bits" in refusal(path)


def test_files_that_are_something_else_are_refused(put: Put) -> None:
    """Nothing, a beginning of a header, no frames, no pages, another format."""
    assert "begins with nothing: not a KDUMP file" in refusal(put(b""))
    assert "ends at 0x64, inside its header" in refusal(put(files.kdump(PAGES)[:100]))
    data = files.changed(files.kdump(PAGES), files.MAX_MAPNR, "I", 0)
    assert "max_mapnr is 0x0" in refusal(
        put(files.changed(data, files.field("max_mapnr_64"), "Q", 0))
    )
    empty = bytearray(files.kdump({0: memory(0, 1)}))
    empty[3 * PAGE_SIZE] = 0
    assert "has no pages" in refusal(put(bytes(empty)))
    assert "is a LiME file, not a KDUMP file" in refusal(put(b"EMiL" + bytes(5000)))


def far_fault(offset: int, size: int, flags: int) -> tuple[bytes, int]:
    """Return a file whose first page has a descriptor of such numbers, and 0 for its own data."""
    pages = files.pages_of([(0, 1100)])
    data = files.kdump(pages, compression=0)
    at = files.descriptors_at(data)
    return files.changed(data, at, "QII", offset, size, flags), at


@pytest.mark.parametrize(
    ("offset", "size", "flags", "message"),
    [
        (0, PAGE_SIZE, 0, "was never written"),
        (0x3000, PAGE_SIZE, 0, "lies at 0x3000, but pages begin after 0x4000"),
        (2**64 - 1, PAGE_SIZE, 0, "lies at 0xffffffffffffffff..0x10000000000000fff, but the file"),
        (0x10000, 2**32 - 1, ZLIB, "lies at 0x10000..0x10000ffff, but the file ends"),
        (0x10000, 4420, ZLIB, "has 0x1144 bytes, which cannot be a page with compression zlib"),
        (0x10000, 0, ZLIB, "has 0x0 bytes, which cannot be a page with compression zlib"),
        (0x10000, 4095, 0, "has 0xfff bytes, which cannot be a page with compression none"),
        (0x10000, 100, ZLIB | LZO, "has the flags 0x3, which name no known compression"),
        (0x10000, 100, 8, "has the flags 0x8, which name no known compression"),
        (0x10000, 100, ZLIB, "cannot be unpacked: Error -3"),
    ],
)
def test_page_descriptors_are_checked_before_use(
    put: Put, offset: int, size: int, flags: int, message: str
) -> None:
    """A descriptor that cannot be used fails the read of its page, and no other."""
    data, _ = far_fault(offset, size, flags)
    with KdumpBackend(path=put(data)) as backend:
        with pytest.raises(CorruptImageError) as error:
            backend.map(0, 4, writable=False)
        assert "the page of address 0x0 " in str(error.value)
        assert message in str(error.value)
        assert bytes(backend.map(1, 1, writable=False).view(0, PAGE_SIZE)) == memory(1, 1)


BOMB = bytes(1 << 20)


@pytest.mark.parametrize(
    ("compression", "stored", "message"),
    [
        (ZLIB, zlib.compress(BOMB), "it unpacks to 0x1001 bytes; expected 0x1000"),
        (ZLIB, zlib.compress(bytes(4095)), "it unpacks to 0xfff bytes; expected 0x1000"),
        (ZLIB, zlib.compress(memory(0, 1))[:-5], "its zlib stream is truncated"),
        (ZLIB, b"\xff" * 40, "Error -3 while decompressing data"),
        (SNAPPY, bytes(cramjam.snappy.compress_raw(bytes(40_000))), "output buffer (size = 4096)"),
        (SNAPPY, bytes(cramjam.snappy.compress_raw(bytes(40))), "it unpacks to 0x28 bytes"),
        (SNAPPY, b"\xff" * 40, "snappy: corrupt input"),
        (ZSTD, zstandard.compress(BOMB), "its zstd frame has 0x100000 bytes, not 0x1000"),
        (ZSTD, zstandard.compress(bytes(40)), "its zstd frame has 0x28 bytes, not 0x1000"),
        (
            ZSTD,
            zstandard.ZstdCompressor(write_content_size=False).compress(BOMB),
            "did not decompress full frame",
        ),
        (
            ZSTD,
            zstandard.ZstdCompressor(write_content_size=False).compress(bytes(40)),
            "it unpacks to 0x28 bytes",
        ),
        (ZSTD, b"\xff" * 40, "determining content size"),
    ],
)
def test_data_that_are_no_page_are_refused(
    put: Put, compression: int, stored: bytes, message: str
) -> None:
    """Never more than a page is unpacked, whatever the data say."""
    data = files.kdump({0: memory(0, 1)}, compression=compression, compress=lambda _: stored)
    with KdumpBackend(path=put(data)) as backend:
        with pytest.raises(CorruptImageError) as error:
            backend.map(0, 1, writable=False)
    assert "the page of address 0x0 at 0x" in str(error.value)
    assert message in str(error.value)


def test_zstd_without_a_size_is_read(put: Put) -> None:
    """A frame need not say how long its content is."""
    compress = zstandard.ZstdCompressor(write_content_size=False).compress
    with KdumpBackend(path=put(files.kdump(PAGES, compression=ZSTD, compress=compress))) as backend:
        assert pages_in(backend) == PAGES


@pytest.fixture
def fake_lzo(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module with the interface of python-lzo, over zlib."""
    module = types.ModuleType("lzo")

    def decompress(data: bytes, header: bool, size: int) -> bytes:
        assert (type(data), header, size) == (bytes, False, PAGE_SIZE)
        return zlib.decompress(data)

    module.decompress = decompress  # type: ignore[attr-defined] # a made-up module
    module.error = zlib.error  # type: ignore[attr-defined] # a made-up module
    monkeypatch.setitem(sys.modules, "lzo", module)
    return module


@pytest.mark.usefixtures("fake_lzo")
def test_lzo_is_unpacked_by_its_package(put: Put) -> None:
    """The package gets the limit of a page, and its error names the page."""
    with KdumpBackend(
        path=put(files.kdump(PAGES, compression=LZO, compress=zlib.compress))
    ) as backend:
        assert pages_in(backend) == PAGES
        assert backend.compression == "lzo"
    broken = files.kdump({3: memory(3, 1)}, compression=LZO, compress=lambda _: b"\xff" * 9)
    with KdumpBackend(path=put(broken)) as backend:
        with pytest.raises(CorruptImageError, match="address 0x3000 .* unpacked: lzo: Error -3"):
            backend.map(3, 1, writable=False)


def test_lzo_of_the_real_package(put: Put) -> None:
    """python-lzo unpacks what it has packed, and refuses more than a page."""
    lzo = pytest.importorskip("lzo", reason="python-lzo is not installed")

    def compress(page: bytes) -> bytes:
        return bytes(lzo.compress(page, 1, False))

    with KdumpBackend(path=put(files.kdump(PAGES, compression=LZO, compress=compress))) as backend:
        assert pages_in(backend) == PAGES
    bomb = files.kdump(
        {0: memory(0, 1)}, compression=LZO, compress=lambda _: compress(bytes(40_000))
    )
    with KdumpBackend(path=put(bomb)) as backend:
        with pytest.raises(CorruptImageError, match="unpacked: lzo: Compressed data violation"):
            backend.map(0, 1, writable=False)


@pytest.mark.parametrize(
    ("compression", "module", "remedy"),
    [
        (LZO, "lzo", "compressed with lzo need the package python-lzo: pip install python-lzo, or"),
        (SNAPPY, "cramjam", "compressed with snappy need the package cramjam: pip install cramjam"),
        (ZSTD, "zstandard", "compressed with zstd need the package zstandard: pip install"),
    ],
)
def test_missing_packages_are_named(
    put: Put, monkeypatch: pytest.MonkeyPatch, compression: int, module: str, remedy: str
) -> None:
    """When the file is opened, if its header names the compression; else at the page."""
    monkeypatch.setitem(sys.modules, module, None)
    data = files.kdump({0: memory(0, 1)}, compression=compression, compress=lambda _: b"1")
    with pytest.raises(BackendUnavailableError, match=remedy):
        KdumpBackend(path=put(data))
    with KdumpBackend(path=put(files.changed(data, files.STATUS, "I", 0))) as backend:
        assert backend.compression == "none"
        with pytest.raises(BackendUnavailableError, match=remedy):
            backend.map(0, 1, writable=False)


def test_equal_pages_are_unpacked_once(put: Put) -> None:
    """Makedumpfile keeps all pages of zeros in one place; reading them takes few calls."""
    data = files.kdump(dict.fromkeys(range(2000), bytes(PAGE_SIZE)))
    with KdumpBackend(path=put(data)) as backend, calls_at_most(12_000):
        mapping = backend.map(0, 2000, writable=False)
        assert bytes(mapping.view(0, 2000 * PAGE_SIZE)) == bytes(2000 * PAGE_SIZE)


def test_notes_that_are_damaged_cost_only_notes(put: Put, caplog: pytest.LogCaptureFixture) -> None:
    """Memory is read all the same, and a warning says which part is left out."""
    good = note(b"CORE", 1, b"12345")
    notes = good + struct.pack("<III", 5, 2**32 - 1, 7)
    data = files.kdump(PAGES, notes=notes, vmcoreinfo=b"A=1\n\0\0")
    many = files.changed(data, files.field("size_note"), "Q", 2**24 + 1)
    long = files.changed(data, files.field("size_vmcoreinfo"), "Q", 2**16 + 1)
    beyond = files.changed(data, files.field("offset_note"), "Q", 2**63)
    for content, names, message in (
        (data, ["CORE"], "the note at 0x2022 ends beyond the notes, at 0x202e"),
        (many, [], "size_note is 0x1000001; at most 0x1000000 is read"),
        (long, ["CORE"], "size_vmcoreinfo is 0x10001; at most 0x10000 is read"),
        (beyond, [], "bytes at 0x8000000000000000 are wanted"),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING), KdumpBackend(path=put(content)) as backend:
            assert len(pages_in(backend)) == len(PAGES)
            known = backend.describe()
            assert known.get("vmcoreinfo") == (None if content is long else "A=1\n")
            assert [each.name for each in backend.notes] == names
            assert known["notes"] == [{"name": name, "type": 1, "size": 5} for name in names]
        assert message in caplog.text


def test_notes_have_a_limit_in_number(put: Put, caplog: pytest.LogCaptureFixture) -> None:
    """The rest are left out, with a warning."""
    data = files.kdump(PAGES, notes=struct.pack("<III", 0, 0, 1) * 65_537)
    with caplog.at_level(logging.WARNING), KdumpBackend(path=put(data)) as backend:
        assert len(backend.notes) == 65_536
    assert "has more than 65536 notes, which is implausible" in caplog.text


def test_vmcoreinfo_of_the_notes_is_enough(put: Put) -> None:
    """A file without its own place of VMCOREINFO may have the note."""
    notes = note(b"CORE", 1, bytes(8)) + note(b"VMCOREINFO", 0, b"OSRELEASE=6\n\0")
    with KdumpBackend(path=put(files.kdump(PAGES, notes=notes))) as backend:
        assert backend.describe()["vmcoreinfo"] == "OSRELEASE=6\n"


def test_arm_is_named(put: Put) -> None:
    """As the source of ELF cores names it; machines that Xen has no guests of by uname."""
    for machine, name in ((b"aarch64", "arm"), (b"riscv64", "riscv64")):
        with KdumpBackend(path=put(files.kdump(PAGES, machine=machine))) as backend:
            assert backend.machine == name


def test_release_that_is_unknown_is_left_out(put: Put) -> None:
    """QEMU does not know the kernel's release."""
    data = files.kdump(PAGES)
    known = []
    for content in (data, data.replace(b"6.1.0-test", bytes(10))):
        with KdumpBackend(path=put(content)) as backend:
            known.append((backend.release, backend.describe().get("release")))
    assert known == [("6.1.0-test", "6.1.0-test"), ("", None)]


def test_descriptor_layout() -> None:
    """It has no padding."""
    assert DESCRIPTOR.size == 24
