"""Naming a source: what each name opens, how files are recognised, what refusals say."""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path

import pytest

from tests.descriptors import open_files
from tests.images import xl_files
from xenmapcache import BackendUnavailableError, MapCache, MockHypervisor, open_source, source
from xenmapcache.source import find_domain, parse_source, recognise


def lime(path: Path, ranges: dict[int, bytes]) -> Path:
    """Write a LiME file of ranges by their addresses."""
    header = struct.Struct("<IIQQQ")
    path.write_bytes(
        b"".join(
            header.pack(0x4C694D45, 1, address, address + len(data) - 1, 0) + data
            for address, data in ranges.items()
        )
    )
    return path


def elf(kind: int, names: bytes = b"", *, bits: int = 64, little: bool = True) -> bytes:
    """Return an ELF file's header, a section header, and the names of its sections."""
    ident = b"\x7fELF" + bytes([1 + (bits == 64), 2 - little, 1]).ljust(12, b"\0")
    order = "<" if little else ">"
    if bits == 32:
        return ident + struct.pack(f"{order}HHIIIIIHHHHHH", kind, 3, 1, *[0] * 10)
    header = struct.pack(f"{order}HHIQQQIHHHHHH", kind, 62, 1, 0, 0, 64, 0, 64, 0, 0, 64, 1, 0)
    section = struct.pack(f"{order}IIQQQQIIQQ", 0, 3, 0, 0, 128, len(names), 0, 0, 0, 0)
    return ident + header + section + names


PLACED = [
    ("raw:/f@0", {"path": "/f", "address": 0}),
    ("raw:f@0x100000", {"path": "f", "address": 0x100000}),
    ("raw:f@1GiB", {"path": "f", "address": 1 << 30}),
    ("raw:a@0@4k", {"path": "a@0", "address": 0x1000}),
    ("raw:f@0x0+0x2000", {"path": "f", "ranges": [(0, 0x2000)]}),
    ("raw:f@0+640k,1M+0X1000", {"path": "f", "ranges": [(0, 640 << 10), (1 << 20, 0x1000)]}),
    ("raw:vm@2024-01-01", {"path": "vm@2024-01-01"}),
    ("raw:vm@1st", {"path": "vm@1st"}),
    ("raw:me@host", {"path": "me@host"}),
    ("raw:f@", {"path": "f@"}),
    ("raw:@0", {"path": "@0"}),
    ("raw:f@0+", {"path": "f@0+"}),
    ("raw:f@0,4k", {"path": "f@0,4k"}),
    ("raw:f@-0x1000", {"path": "f@-0x1000"}),
    ("raw:a\nb@0", {"path": "a\nb", "address": 0}),
    ("save:f@0", {"path": "f@0"}),
]
"""Flat images by name, and what is after the @."""


@pytest.fixture
def xl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An ``xl`` that knows of a domain ``web``."""
    script = tmp_path / "xl"
    script.write_text(
        "#!/bin/sh\n"
        'case "$1 $2" in\n'
        '"domid web") echo 7;;\n'
        '"list "*) echo "Name   ID   Mem VCPUs      State   Time(s)"\n'
        '  echo "Domain-0   0  512  1  r-----  9.5"\n'
        '  echo "two words   8  512  1  -b----  9.5";;\n'
        "*) echo \"'$2' is an invalid domain identifier (rc=-6)\" >&2; exit 1;;\n"
        "esac\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(source, "XL_PATH", str(tmp_path))
    return script


@pytest.mark.parametrize(
    ("spec", "backend", "options"),
    [
        ("xen:3", "xen", {"domid": 3}),
        ("xenctrl:3", "xenctrl", {"domid": 3}),
        ("xen:web", "xen", {"domid": 7}),
        ("mock:16M", "mock", {"memory": "16M"}),
        ("coredump:a:b", "coredump", {"path": "a:b"}),
        ("elfcore:f", "elfcore", {"path": "f"}),
        ("kdump:f", "kdump", {"path": "f"}),
        ("raw:/f", "raw", {"path": "/f"}),
        ("save:f", "save", {"path": "f"}),
    ],
)
@pytest.mark.usefixtures("xl")
def test_names(spec: str, backend: str, options: dict[str, object]) -> None:
    """Each kind of name stands for a backend and its option; domains go by number or by name."""
    assert parse_source(spec) == (backend, options)


@pytest.mark.parametrize(("spec", "options"), PLACED)
def test_a_flat_image_may_have_a_place(spec: str, options: dict[str, object]) -> None:
    """An address, or ranges, after the last @ of a name; all else belongs to the file's name."""
    assert parse_source(spec).options == options


@pytest.mark.parametrize(("place", "number"), [("5", "0x5"), ("0+5", "0x5"), ("4k+4k,1+4k", "0x1")])
def test_a_place_is_one_of_whole_pages(place: str, number: str) -> None:
    """Otherwise the message says what to write for a file whose name ends so."""
    message = f"raw:f@{place}: {number} must be a multiple of 0x1000. If .* write raw:f@{place}@0"
    with pytest.raises(ValueError, match=message.replace("+", r"\+")):
        parse_source(f"raw:f@{place}")


def test_placed_images_read_their_bytes(tmp_path: Path) -> None:
    """The place of the name is that of open_backend's options."""
    path = tmp_path / "flat@1"
    path.write_bytes(b"".join(bytes([number]) * 4096 for number in range(3)))
    with open_source(f"raw:{path}@0x5000+8k,0x9000+4k") as raw, MapCache(raw) as cache:
        assert list(cache.present(0, 1 << 20)) == [(0x5000, 0x2000), (0x9000, 0x1000)]
        assert (cache.read(0x6FFF, 1), cache.read(0x9000, 2)) == (b"\1", b"\2\2")
    with open_source(f"raw:{path}@2M") as raw, MapCache(raw) as cache:
        assert cache.read(0x202000, 1) == b"\2"
        assert cache.memory_end == 0x203000
    with pytest.raises(ValueError, match="must not begin before"):
        open_source(f"raw:{path}@0x5000+4k,0+4k")
    with pytest.raises(TypeError, match="address"):
        open_source(f"raw:{path}@0", address=0)


def test_a_name_opens_its_backend(tmp_path: Path) -> None:
    """open_source() opens what is named, takes paths, and hands options on."""
    with open_source("mock:4M") as mock:
        assert (mock.name, mock.memory_end) == ("mock", 4 << 20)
    with open_source(lime(tmp_path / "f", {0x1000: bytes(4096)})) as dump:
        assert (dump.name, dump.memory_end) == ("raw", 0x2000)
    flat = tmp_path / "flat"
    flat.write_bytes(bytes(4096))
    with open_source(f"raw:{flat}", address=0x4000) as raw:
        assert raw.memory_end == 0x5000
    with pytest.raises(TypeError, match="colour"):
        open_source("mock:4M", colour=1)
    domain = MockHypervisor().create_domain(memory="4M")
    with pytest.raises(TypeError, match="either domain= or memory="):
        open_source("mock:4M", domain=domain)


@pytest.mark.parametrize(
    ("content", "backend"),
    [
        (b"Xen saved domain, xl format\n \0 \r".ljust(64, b"\0"), "save"),
        (b"LinuxGuestRecord".ljust(64, b"\0"), "save"),
        (b"KDUMP   ".ljust(64, b"\0"), "kdump"),
        (b"DISKDUMP".ljust(64, b"\0"), "kdump"),
        (b"makedumpfile".ljust(64, b"\0"), "kdump"),
        (struct.pack("<II", 0x4C694D45, 1), "raw"),
        (elf(4, b"\0.shstrtab\0.xen_pages\0"), "coredump"),
        (elf(4, b"\0.shstrtab\0.xen_pages_not\0"), "elfcore"),
        (elf(4), "elfcore"),
        (elf(4)[:64], "elfcore"),
        (elf(4, bits=32), "elfcore"),
        (elf(4, b"\0.xen_pages\0", little=False), "elfcore"),
    ],
)
def test_files_are_recognised_by_content(tmp_path: Path, content: bytes, backend: str) -> None:
    """Each format has its magic; an ELF core with Xen's pages is one of xl dump-core."""
    path = tmp_path / "file"
    path.write_bytes(content)
    assert recognise(str(path)) == backend


@pytest.mark.parametrize("content", [b"\x7fELG", bytes(8192), b"#!/bin/sh\n"])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    """A flat image has no format to go by: the message says what to write."""
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"unrecognised format; .* Write raw:{path} only for"):
        open_source(path)


@pytest.mark.parametrize("place", [1 << 63, (1 << 64) - 1])
@pytest.mark.parametrize("field", [0x28, 64 + 0x18, 64 + 0x20])
def test_an_elf_file_that_lies_is_still_one(tmp_path: Path, field: int, place: int) -> None:
    """Places beyond the file's end do not fail here: the backend reports the error."""
    content = bytearray(elf(4, b"\0.xen_pages\0"))
    content[field : field + 8] = place.to_bytes(8, "little")
    path = tmp_path / "file"
    path.write_bytes(content)
    assert recognise(str(path)) in ("elfcore", "coredump")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    """A folder, a pipe that nobody writes to, nothing: at once."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(ValueError, match="is not a regular file"):
        open_source(fifo)
    with pytest.raises(IsADirectoryError):
        open_source(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_source(tmp_path / "absent")
    with pytest.raises(ValueError, match="'disk:0' is neither a source nor a file; write xen"):
        open_source("disk:0")
    with pytest.raises(ValueError, match="is incomplete; write coredump:FILE"):
        open_source("coredump:")
    with pytest.raises(ValueError, match="'mock:' is incomplete; write mock:SIZE"):
        open_source("mock:")
    with pytest.raises(ValueError, match="'xen:' names no domain; write xen:DOMID or xen:NAME"):
        open_source("xen:")


@pytest.mark.usefixtures("xl")
def test_an_unknown_domain_says_which_there_are() -> None:
    """The message has the names that xl lists."""
    with pytest.raises(ValueError, match="no domain is named 'wbe'; xl lists Domain-0, two words"):
        find_domain("wbe")


def test_names_without_xl(xl: Path) -> None:
    """Off Dom0 a name cannot be looked up, and a number can be given instead."""
    xl.write_text("#!/bin/sh\necho 'no permission\n  at all' >&2\nexit 1\n")
    with pytest.raises(BackendUnavailableError, match=r"status 1 \(no permission at all\): run it"):
        find_domain("web")
    xl.unlink()
    with pytest.raises(BackendUnavailableError, match="not installed.*give the domain's number"):
        find_domain("web")


def test_an_xl_that_does_not_start(xl: Path) -> None:
    """A file that the system cannot run says which command failed, and why."""
    xl.write_bytes(b"\x7fELF")
    with pytest.raises(BackendUnavailableError, match="xl domid web failed: .*Exec format error"):
        find_domain("web")


def test_recognising_leaves_nothing_open(tmp_path: Path) -> None:
    """A file is closed when it has been looked at, whatever it is."""
    known, unknown = tmp_path / "known", tmp_path / "unknown"
    known.write_bytes(xl_files.dump_core([0]))
    unknown.write_bytes(b"what?")
    files = open_files()
    assert source.recognise(str(known)) == "coredump"
    with pytest.raises(ValueError, match="unrecognised format"):
        source.recognise(str(unknown))
    assert open_files() <= files


def test_an_xl_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A toolstack that does not answer is an error after a while, not a wait without end."""
    script = tmp_path / "xl"
    script.write_text("#!/bin/sh\nexec sleep 5\n")
    script.chmod(0o755)
    monkeypatch.setattr(source, "XL_PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(source, "_XL_TIMEOUT_S", 0.1)
    with pytest.raises(BackendUnavailableError, match="xl domid web failed: .*timed out"):
        source.find_domain("web")


def test_xl_is_found_where_root_has_it() -> None:
    """Under cron and sudo the search path lacks the folders that xl is installed in."""
    assert source.XL_PATH.split(":")[-3:] == ["/usr/local/sbin", "/usr/sbin", "/sbin"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"AVML" + bytes(60), "is compressed by AVML: convert it to LiME with avml-convert"),
        (b"\x1f\x8b" + bytes(60), "is compressed by gzip: unpack it first"),
    ],
)
def test_formats_that_no_backend_reads_are_named(
    tmp_path: Path, content: bytes, message: str
) -> None:
    """The message says what to do about the file, not that it may be a flat image."""
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path / "file")


@pytest.mark.parametrize("place", ["zz", "0x0+4k,0x1000", "-0x1000"])
def test_a_place_that_cannot_be_read(place: str, tmp_path: Path) -> None:
    """If the file before the @ exists, the place is wrong; if the complete name does, it is one."""
    path = tmp_path / "flat"
    path.write_bytes(bytes(0x1000))
    with pytest.raises(ValueError, match=rf"@{re.escape(place)}: {re.escape(place)} must be ADD"):
        parse_source(f"raw:{path}@{place}")
    (tmp_path / f"flat@{place}").write_bytes(bytes(0x1000))
    assert parse_source(f"raw:{path}@{place}").options == {"path": f"{path}@{place}"}
