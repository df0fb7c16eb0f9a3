"""The files of a mounted guest, without FUSE: their content, bounds, and a guest that ends."""

from __future__ import annotations

import errno
import logging
import os
import signal
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.images import linux_guest
from tests.images.writers import Load, elf_core, memory, note
from xenmapcache import (
    Backend,
    BackendUnavailableError,
    ClosedError,
    FaultError,
    MapCache,
    MockDomain,
    MockHypervisor,
    UnsupportedOperationError,
    open_backend,
    open_source,
    write_lime,
    write_vmcore,
)
from xenmapcache.adapters import mount
from xenmapcache.adapters.mount import Operations, Watch, serve
from xenmapcache.adapters.virtual_files import Ranges, VirtualFile, virtual_files
from xenmapcache.address import PAGE_SIZE
from xenmapcache.formats.elf import PN_XNUM
from xenmapcache.writers.vmcore_head import Head

GONE = 0x500000


@pytest.fixture
def guest() -> MockDomain:
    return linux_guest.create()


@pytest.fixture
def backend(guest: MockDomain) -> Iterator[Backend]:
    with open_backend("mock", domain=guest) as backend:
        yield backend


@pytest.fixture
def cache(backend: Backend) -> Iterator[MapCache]:
    with MapCache(backend, bucket_shift=16) as cache:
        yield cache


@pytest.fixture
def files(cache: MapCache) -> dict[str, VirtualFile]:
    return {file.name: file for file in virtual_files(cache)}


def content(file: VirtualFile, step: int = 0x12345) -> bytes:
    """Return all of a file, in reads that begin and end anywhere."""
    return b"".join(file.read(offset, step) for offset in range(0, file.size, step))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_the_files_are_those_of_the_writers(
    backend: Backend, files: dict[str, VirtualFile], tmp_path: Path
) -> None:
    """Byte for byte; VMCOREINFO is found in memory."""
    assert list(files) == ["memory.raw", "memory.elf", "memory.lime"]
    for name, write in (("memory.elf", write_vmcore), ("memory.lime", write_lime)):
        write(backend, tmp_path / name)
        written = (tmp_path / name).read_bytes()
        assert files[name].size == len(written)
        assert content(files[name]) == written
        assert content(files[name], PAGE_SIZE) == written
    with open_source(tmp_path / "memory.elf") as core:
        assert core.describe()["vmcoreinfo"] == linux_guest.info()


def test_an_address_is_an_offset_and_holes_are_zeros(
    cache: MapCache, files: dict[str, VirtualFile]
) -> None:
    """In memory.raw."""
    raw = files["memory.raw"]
    assert raw.size == cache.memory_end
    assert content(raw) == cache.read(0, raw.size, fill=0)
    start, size = linux_guest.HOLES[0]
    assert raw.read(start, size) == bytes(size)


def test_notes_of_the_source(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They are kept, and VMCOREINFO among them is not looked for again."""
    path = tmp_path / "guest.core"
    notes = note(b"CORE", 1, bytes(336)) + note(b"VMCOREINFO", 0, b"OSRELEASE=1\n")
    path.write_bytes(elf_core([Load(0, memory(0, 4))], notes=notes))
    with open_source(path) as source, MapCache(source) as cache:
        write_vmcore(source, tmp_path / "again")
        _, elf, _ = virtual_files(cache)
        assert content(elf) == (tmp_path / "again").read_bytes()
    assert not warnings(caplog)


def test_a_guest_without_vmcoreinfo(caplog: pytest.LogCaptureFixture) -> None:
    """A warning says what does not work."""
    guest = linux_guest.create(with_info=False)
    with open_backend("mock", domain=guest) as backend, MapCache(backend) as cache:
        assert len(virtual_files(cache)) == 3
    assert "no VMCOREINFO was found" in warnings(caplog)[0]


@pytest.mark.parametrize("length", [0, 1, PAGE_SIZE, 0x123456])
def test_a_length(cache: MapCache, backend: Backend, tmp_path: Path, length: int) -> None:
    """It ends with the page that has the last byte, as the files that are written."""
    raw, elf, lime = virtual_files(cache, length)
    assert raw.size == -(-length // PAGE_SIZE) * PAGE_SIZE
    write_vmcore(backend, tmp_path / "core", length=length)
    assert content(elf) == (tmp_path / "core").read_bytes()
    write_lime(backend, tmp_path / "lime", length=length)
    assert content(lime) == (tmp_path / "lime").read_bytes()


def test_a_source_that_shows_its_pages_only_when_they_are_mapped(
    guest: MockDomain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Xen: then all of it is mapped once, to find its pages. Runs that touch are one."""
    # Some edges are in holes, others are not.
    monkeypatch.setattr("xenmapcache.adapters.virtual_files._WINDOW_BYTES", 0x90000)
    guest.inject_fault("map", gfn=1 << 40, errno=errno.EINVAL)
    with open_backend("mock", domain=guest) as backend, MapCache(backend) as cache:
        assert backend.present(0, 1) is None
        _, _, lime = virtual_files(cache)
        write_lime(backend, tmp_path / "lime")
        assert content(lime) == (tmp_path / "lime").read_bytes()
        assert virtual_files(cache, 0x1234)[2].size == 32 + 0x2000


def test_a_source_without_an_end(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """It needs a length."""
    monkeypatch.setattr(type(backend), "memory_end", None)
    with MapCache(backend) as cache:
        with pytest.raises(ValueError, match="give a length"):
            virtual_files(cache)
        assert len(virtual_files(cache, "1MiB")) == 3


def test_many_ranges(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """LeechCore reads 144 of an ELF core: a warning names the file that it reads."""
    for ranges, warned in ((144, False), (145, True)):
        caplog.clear()
        holes = [(number * 2 * PAGE_SIZE, PAGE_SIZE) for number in range(ranges)]
        guest = MockHypervisor().create_domain(memory=ranges * 2 * PAGE_SIZE, holes=holes)
        with open_backend("mock", domain=guest) as backend, MapCache(backend) as cache:
            _, elf, lime = virtual_files(cache)
            write_vmcore(backend, tmp_path / "core")
            assert content(elf) == (tmp_path / "core").read_bytes()
            assert lime.size == ranges * (32 + PAGE_SIZE)
        told = f"memory.elf has {ranges} ranges, and MemProcFS reads at most 144"
        assert any(text.startswith(told) for text in warnings(caplog)) is warned


def test_more_ranges_than_an_elf_header_counts() -> None:
    """Then the first section header has their number; no page is read for that."""
    found = Ranges((number * 2, 1) for number in range(PN_XNUM))
    head = Head("x86-64", [], len(found))
    assert len(b"".join(head.chunks(found.segments))) == head.size(PN_XNUM) <= head.start
    assert found.find((PN_XNUM - 1) * PAGE_SIZE + 5) == (5, (PN_XNUM - 1) << 13, 0x1FFFD001 - 1)


def test_too_many_ranges(monkeypatch: pytest.MonkeyPatch, cache: MapCache) -> None:
    """A hostile guest can have a hole at each second page: what is kept of that is bounded."""
    monkeypatch.setattr("xenmapcache.adapters.virtual_files.MAX_RANGES", 2)
    with pytest.raises(ValueError, match=r"the memory below 0x708000 is in 2 ranges"):
        virtual_files(cache)
    assert len(virtual_files(cache, 0x700000)) == 3


def test_a_machine_without_elf_cores(
    cache: MapCache, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other files are there."""
    monkeypatch.setattr(backend, "machine", "s390\x1b", raising=False)
    assert [file.name for file in virtual_files(cache)] == ["memory.raw", "memory.lime"]


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, -1), (0, (16 << 20) + 1)])
def test_reads_are_bounded(files: dict[str, VirtualFile], offset: int, length: int) -> None:
    """A number that the kernel does not send is an error, whatever the file."""
    for file in files.values():
        with pytest.raises(ValueError, match="must"):
            file.read(offset, length)


def test_reads_at_and_beyond_the_end(files: dict[str, VirtualFile]) -> None:
    """They give what the file has, as of other files."""
    for file in files.values():
        last = file.read(file.size - 3, 3)
        assert len(last) == 3
        assert file.read(file.size - 3, 4096) == last
        assert file.read(file.size, 1) == file.read(1 << 62, 5) == file.read(0, 0) == b""
        assert len(file.read(0, 16 << 20)) == min(file.size, 16 << 20)


@pytest.fixture
def operations(files: dict[str, VirtualFile]) -> Operations:
    return Operations(list(files.values()), live=True, mounted=lambda: None)


def place_of(files: dict[str, VirtualFile], name: str, address: int) -> int:
    """Return where a page of the guest is in a file."""
    return content(files[name]).index(files["memory.raw"].read(address, PAGE_SIZE))


def test_a_page_that_goes_away(
    guest: MockDomain,
    cache: MapCache,
    files: dict[str, VirtualFile],
    operations: Operations,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """EIO and a line in the log; zeros in memory.raw. Pages around it are read as before."""
    address = linux_guest.PAGE_TABLES
    elf, lime = (place_of(files, name, address) for name in ("memory.elf", "memory.lime"))
    guest.balloon_out(address, PAGE_SIZE)
    Watch(cache, lambda: None).look()
    for name, place in (("memory.elf", elf), ("memory.lime", lime)):
        with pytest.raises(FaultError):
            files[name].read(place, 1)
        with pytest.raises(OSError, match="Input/output error") as caught:
            operations.read(f"/{name}", PAGE_SIZE, place, None)
        assert caught.value.errno == errno.EIO
        assert len(operations.read(f"/{name}", PAGE_SIZE, place + PAGE_SIZE, None)) == PAGE_SIZE
    assert operations.read("/memory.raw", PAGE_SIZE, address, None) == bytes(PAGE_SIZE)
    lines = warnings(caplog)
    assert len(lines) == 2
    assert f"memory.elf at {elf:#x} cannot be read: no page at {address:#x}" in lines[0]


def test_lines_about_failures_are_bounded(
    cache: MapCache, operations: Operations, caplog: pytest.LogCaptureFixture
) -> None:
    """A tool may try each page."""
    cache.close()
    for _ in range(300):
        with pytest.raises(OSError, match="Input/output error"):
            operations.read("/memory.raw", 1, 0, None)
    assert len(warnings(caplog)) == 101
    assert warnings(caplog)[-1] == "reads that fail are no longer logged, after 100 of them"


def test_no_memory_is_an_error_of_the_read(
    cache: MapCache, files: dict[str, VirtualFile], caplog: pytest.LogCaptureFixture
) -> None:
    """The mount lives on."""

    class Broken(VirtualFile):
        name = "broken"
        size = 1

        def _part(self, offset: int, length: int) -> bytes:
            raise MemoryError

    operations = Operations([Broken(cache)], live=False, mounted=lambda: None)
    with pytest.raises(OSError, match="Input/output error"):
        operations.read("/broken", 1, 0, None)
    assert warnings(caplog) == ["broken at 0x0 cannot be read: out of memory"]


def test_the_folder(operations: Operations, files: dict[str, VirtualFile]) -> None:
    """Only its owner may read, and nobody may write."""
    assert operations.readdir("/", None) == [".", "..", *files]
    folder = operations.getattr("/")
    assert stat.filemode(folder["st_mode"]) == "dr-x------"
    for name, file in files.items():
        found = operations.getattr(f"/{name}")
        assert stat.filemode(found["st_mode"]) == "-r--------"
        assert found["st_size"] == file.size
        assert (found["st_uid"], found["st_gid"]) == (os.getuid(), os.getgid())
    for call in (operations.getattr, lambda path: operations.open(path, None)):
        with pytest.raises(OSError, match="No such file") as caught:
            call("/memory.bin")
        assert caught.value.errno == errno.ENOENT


@pytest.mark.parametrize("live", [True, False])
def test_the_kernel_keeps_what_does_not_change(cache: MapCache, live: bool) -> None:
    """Reads of a live guest's files bypass its page cache."""
    operations = Operations(virtual_files(cache), live=live, mounted=lambda: None)
    info = SimpleNamespace(direct_io=0, keep_cache=0)
    assert operations.open("/memory.raw", info) == 0
    assert (info.direct_io, info.keep_cache) == (live, not live)


def test_threads(files: dict[str, VirtualFile], operations: Operations) -> None:
    """All files may be read by several threads at once."""
    expected = {name: content(file) for name, file in files.items()}
    wrong: list[str] = []

    def read(name: str) -> None:
        found = b"".join(
            operations.read(f"/{name}", 0x21000, offset, None)
            for offset in range(0, files[name].size, 0x21000)
        )
        if found != expected[name]:
            wrong.append(name)

    threads = [threading.Thread(target=read, args=(name,)) for name in [*files] * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_watch_sees_the_guest_end(
    guest: MockDomain,
    cache: MapCache,
    files: dict[str, VirtualFile],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is dying while its memory is mapped. Each look drops what is mapped."""
    ended = threading.Event()
    watch = Watch(cache, ended.set, seconds=0.001)
    files["memory.raw"].read(0, 1)
    assert watch.look() is False
    assert guest.mapped_pieces == 0
    files["memory.raw"].read(0, 1)
    guest.destroy()
    assert guest.state == "dying"
    with watch:
        assert ended.wait(60)
    assert guest.state == "gone"
    assert warnings(caplog) == ["the guest has ended: its memory is unmounted"]


def test_a_watch_looks_until_the_guest_ends(
    cache: MapCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Again and again, and not after that."""
    ended = threading.Event()
    watch = Watch(cache, ended.set, seconds=0.001)
    answers = [False, False, True]
    monkeypatch.setattr(watch, "look", lambda: answers.pop(0))
    with watch:
        assert ended.wait(60)
    assert answers == []


def test_a_watch_ends_with_its_block(cache: MapCache) -> None:
    """However long it would wait."""
    with Watch(cache, lambda: None, seconds=10_000):
        pass
    assert not [thread for thread in threading.enumerate() if "xenmapcache-mount" in thread.name]


def test_a_watch_that_cannot_tell(
    cache: MapCache,
    backend: Backend,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It says so once, and does not ask again."""
    asked: list[int] = []

    def has_ended() -> bool:
        asked.append(1)
        raise UnsupportedOperationError("no such function")

    monkeypatch.setattr(backend, "has_ended", has_ended)
    watch = Watch(cache, lambda: None)
    assert [watch.look() for _ in range(3)] == [False] * 3
    assert len(asked) == len(warnings(caplog)) == 1
    assert "cannot be told: no such function" in warnings(caplog)[0]


def test_a_watch_of_a_closed_cache(cache: MapCache) -> None:
    """It raises, as all uses of it."""
    cache.close()
    with pytest.raises(ClosedError):
        Watch(cache, lambda: None).look()


class Fuse:
    """mfusepy, as far as we use it; its loop is a function of the test."""

    fuse_version_major, fuse_version_minor = 3, 14

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}
        self.folder = ""
        self.loop: Any = lambda operations: operations.init("/")

    def FUSE(self, operations: Operations, folder: str, **options: object) -> None:  # noqa: N802 - as mfusepy names it
        self.options, self.folder = options, folder
        self.loop(operations)


@pytest.fixture
def fuse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fuse:
    """A machine on which FUSE works."""
    fuse = Fuse()
    monkeypatch.setattr(mount, "require", lambda *_: fuse)
    monkeypatch.setattr(mount, "_DEVICE", tmp_path / "fuse")
    monkeypatch.setattr(mount, "_LOOK_S", 0.001)
    (tmp_path / "fuse").touch()
    (tmp_path / "folder").mkdir()
    return fuse


@pytest.mark.parametrize("version", [(2, 9), (3, 10), (3, 14)])
def test_serve(fuse: Fuse, cache: MapCache, tmp_path: Path, version: tuple[int, int]) -> None:
    """Read-only, in the foreground; it returns when the folder is unmounted."""
    fuse.fuse_version_major, fuse.fuse_version_minor = version
    mounted: list[bool] = []
    folder = tmp_path / "folder"
    serve(cache, virtual_files(cache), folder, mounted=lambda: mounted.append(True))
    assert mounted == [True]
    assert fuse.folder == str(folder)
    assert fuse.options["ro"] is fuse.options["foreground"] is fuse.options["raw_fi"] is True
    assert ("max_idle_threads" in fuse.options) is (version == (3, 14))
    assert fuse.options["max_idle_threads"] == 8 if version == (3, 14) else True


@pytest.mark.slow
def test_serve_ends_with_the_guest(
    fuse: Fuse, guest: MockDomain, cache: MapCache, tmp_path: Path
) -> None:
    """By a signal to the main thread, as another program would send one."""
    arrived = threading.Event()
    previous = signal.signal(signal.SIGTERM, lambda *_: arrived.set())

    def loop(operations: Operations) -> None:
        operations.init("/")
        guest.destroy()
        assert arrived.wait(60)
        raise RuntimeError(8)  # which is how mfusepy reports that a signal has ended it

    fuse.loop = loop
    try:
        serve(cache, virtual_files(cache), tmp_path / "folder")
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert arrived.is_set()


def test_serve_of_a_file_has_no_watch(fuse: Fuse, tmp_path: Path) -> None:
    """A file does not end, and its pages may stay mapped."""
    (tmp_path / "raw").write_bytes(memory(0, 4))
    threads: list[int] = []
    fuse.loop = lambda _: threads.append(threading.active_count())
    before = threading.active_count()
    with open_source(f"raw:{tmp_path / 'raw'}") as backend, MapCache(backend) as cache:
        serve(cache, virtual_files(cache), tmp_path / "folder")
    assert threads == [before]


def test_a_mount_that_fails(fuse: Fuse, cache: MapCache, tmp_path: Path) -> None:
    """The library says why, and we what it may be."""

    def loop(_: Operations) -> None:
        raise RuntimeError(4)

    fuse.loop = loop
    with pytest.raises(
        BackendUnavailableError, match=r"folder cannot be mounted: .* status 4.*root"
    ):
        serve(cache, virtual_files(cache), tmp_path / "folder")


def test_what_is_missing(fuse: Fuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each error says what to install or do."""
    folder = tmp_path / "folder"

    def expect(text: str, error: type[Exception] = BackendUnavailableError) -> None:
        with pytest.raises(error, match=text):
            mount.check_fuse(folder)

    mount.check_fuse(folder)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("PATH", "/nowhere")
    expect("fusermount3 is missing.*apt install fuse3")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    mount.check_fuse(folder)

    def raise_(error: Exception) -> Any:  # noqa: ANN401 - it never returns
        raise error

    real = os.open
    refused = PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(os, "open", lambda *_: raise_(refused))
    expect("fuse cannot be opened: Permission denied; run this as root")
    monkeypatch.setattr(os, "open", real)
    monkeypatch.setattr(mount, "_DEVICE", tmp_path / "none")
    expect("none is missing: modprobe fuse")
    monkeypatch.setattr(mount, "require", lambda *_: raise_(OSError("Unable to find libfuse")))
    expect(r"libfuse that it can use \(Unable to find libfuse\): apt install fuse3")
    monkeypatch.undo()
    monkeypatch.setattr(
        "xenmapcache.extras.import_module", lambda _: raise_(ImportError("no mfusepy"))
    )
    expect(r"pip install mfusepy, or 'xenmapcache\[mount\]'")
    (folder / "file").touch()
    expect("is not empty; give an empty folder", OSError)
    monkeypatch.setattr(os, "listdir", lambda _: raise_(OSError(errno.ENOTCONN, "gone")))
    expect("still mounted by a process that was killed: umount it")
    monkeypatch.undo()
    folder = tmp_path / "fuse"
    expect("Not a directory", NotADirectoryError)
