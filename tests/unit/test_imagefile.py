"""A file of guest memory: what is seen of it while somebody changes it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import logging
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fake_xen.child import in_child
from tests.images.writers import memory
from xenmapcache import (
    ClosedError,
    CorruptImageError,
    MapCache,
    Mapping,
    UnsupportedOperationError,
    XenCallError,
    open_backend,
)
from xenmapcache import imagefile as module
from xenmapcache.address import PAGE_SIZE
from xenmapcache.backend import Backend
from xenmapcache.binding import libc
from xenmapcache.imagefile import ImageFile
from xenmapcache.mapping import live_mappings

PAGES = 64


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "guest.raw"
    path.write_bytes(memory(0, PAGES))
    return path


@pytest.fixture
def image(path: Path) -> Iterator[ImageFile]:
    """An open file of which pieces can be mapped."""
    file = ImageFile(path)
    address = file.map(0, PAGE_SIZE)
    if address is None:
        file.close()
        pytest.skip("there are no leases here: other tests show that files are read then")
    file.unmap(address, PAGE_SIZE)
    yield file
    file.close()


@pytest.fixture(params=["mapped", "read"])
def backend(
    request: pytest.FixtureRequest, path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Backend]:
    """A flat image that is mapped, and one that is read, as where there are no leases."""
    if request.param == "read":
        monkeypatch.setattr(module._guard, "take_lease", lambda *_: False)
    else:
        request.getfixturevalue("image").close()
    with open_backend("raw", path=path) as backend:
        yield backend


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"\xff" * PAGES * PAGE_SIZE)


def overwrite_mapped(path: Path) -> None:
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        memory[:] = b"\xff" * len(memory)


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def open_anew(path: Path) -> None:
    path.write_bytes(b"another, shorter")


CHANGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: os.truncate(path, 0),
    "shortened": lambda path: os.truncate(path, 5 * PAGE_SIZE + 7),
    "grown": lambda path: os.truncate(path, 2 * PAGES * PAGE_SIZE),
    "written anew": open_anew,
    "overwritten": overwrite,
    "overwritten through mmap": overwrite_mapped,
    "appended to": append,
}
HARMLESS: dict[str, Callable[[Path], object]] = {
    "opened for writing": lambda path: path.open("r+b").close(),
    "deleted": lambda path: path.unlink(),
    "moved": lambda path: path.rename(path.with_suffix(".moved")),
    "replaced": lambda path: (
        path.with_suffix(".new").write_bytes(b"new"),
        path.with_suffix(".new").replace(path),
    ),
    "linked": lambda path: os.link(path, path.with_suffix(".link")),
    "made read-only": lambda path: path.chmod(0o400),
}


def elsewhere(change: Callable[[Path], object], path: Path) -> None:
    """Carry a change out in another process."""
    name = next(name for name, same in {**CHANGES, **HARMLESS}.items() if same is change)
    code = (
        "import sys; from pathlib import Path; from tests.unit.test_imagefile import *; "
        "{**CHANGES, **HARMLESS}[sys.argv[1]](Path(sys.argv[2]))"
    )
    subprocess.run([sys.executable, "-c", code, name, path], check=True, timeout=60)


def here(change: Callable[[Path], object], path: Path) -> None:
    change(path)


WHO = pytest.mark.parametrize("who", [here, elsewhere], ids=["here", "elsewhere"])


@WHO
@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes(
    backend: Backend, path: Path, who: Callable[[object, Path], None], change: str
) -> None:
    """What was seen stays as it was, all of it; what comes later raises and names the file."""
    with MapCache(backend, bucket_shift=16) as cache:
        view = backend.map(3, 20, writable=False).view(0, 20 * PAGE_SIZE)
        rom = cache.map_device(0x8000, 0x3000, owner="rom", writable=False)
        before = cache.read(0x100, 0x40)
        who(CHANGES[change], path)
        assert view == memory(3, 20)
        assert rom.view == memory(8, 3)
        assert cache.read(0x100, 0x40) == before == memory(0, 1)[0x100:0x140]
        assert cache.read(0xF000, 0x1000) == memory(15, 1)
        for _ in range(2):
            with pytest.raises(CorruptImageError, match="guest.raw"):
                cache.read(0x20000, 8)
            with pytest.raises(CorruptImageError, match="guest.raw"):
                cache.map_device(0x3000, 0x1000, owner="rom", writable=False)
        rom.release()


@WHO
@pytest.mark.parametrize("change", HARMLESS)
def test_a_file_that_does_not_change(
    backend: Backend, path: Path, who: Callable[[object, Path], None], change: str
) -> None:
    """A file whose contents stay goes on, whatever becomes of its name."""
    with MapCache(backend, bucket_shift=16) as cache:
        view = backend.map(3, 20, writable=False).view(0, 20 * PAGE_SIZE)
        cache.read(0x100, 0x40)
        who(HARMLESS[change], path)
        assert view == memory(3, 20)
        assert cache.read(0, PAGES * PAGE_SIZE) == memory(0, PAGES)


def wait_for(condition: Callable[[], object]) -> None:
    """Wait for what the guard does after it has let a writer go on."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def is_closed(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return True
    return False


def test_truncate_that_does_not_wait(image: ImageFile, path: Path) -> None:
    """Opened with O_NONBLOCK for writing, a mapped file is refused once, and then let go."""
    address = image.map(0, PAGES * PAGE_SIZE)
    assert address is not None
    mapping = Mapping(address, 0, PAGES, writable=False, errors=None, unmap=image.unmap)
    with pytest.raises(BlockingIOError):
        os.open(path, os.O_WRONLY | os.O_NONBLOCK)

    def truncated() -> bool:
        try:
            fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_TRUNC)
        except BlockingIOError:
            return False
        os.close(fd)
        return True

    wait_for(truncated)
    assert mapping.view(0, mapping.length) == memory(0, PAGES)


def test_a_writer_waits_until_it_is_copied(image: ImageFile, path: Path) -> None:
    """Who opens the file for writing is let in when, and only when, copies are in place."""
    address = image.map(0, PAGES * PAGE_SIZE)
    assert address is not None
    mapping = Mapping(address, 0, PAGES, writable=False, errors=None, unmap=image.unmap)
    opened = threading.Event()

    def write() -> None:
        overwrite(path)
        opened.set()

    thread = threading.Thread(target=write)
    with image._lock:  # the guard cannot begin
        thread.start()
        assert not opened.wait(0.2)
    assert opened.wait(5)
    thread.join()
    assert mapping.view(0, mapping.length) == memory(0, PAGES)


def test_a_lease_is_taken_where_there_is_one(path: Path) -> None:
    """Where the kernel grants a lease a piece is mapped: other tests are skipped where not."""
    with path.open("rb") as file:
        if module._file_system(file.fileno()) not in module._LOCAL:
            pytest.skip("leases of this file system are not relied on")
        try:
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK)
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        except OSError as error:
            pytest.skip(f"the kernel grants no lease here: {error}")
    image = ImageFile(path)
    address = image.map(0, PAGE_SIZE)
    assert address is not None
    image.unmap(address, PAGE_SIZE)
    image.close()


def test_a_lease_that_is_broken_is_not_mapped_under(image: ImageFile, path: Path) -> None:
    """While somebody waits to write, nothing more is mapped."""
    with image._lock:
        with pytest.raises(BlockingIOError):
            os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        assert image.map(0, PAGE_SIZE) is None


@pytest.mark.parametrize("function", ["memfd_create", "sendfile", "no sendfile"])
def test_what_cannot_be_copied_shows_zeros(
    image: ImageFile,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    function: str,
) -> None:
    """Where there is no room for a copy, the view shows zeros, and the log says so: no crash."""
    address = image.map(0, PAGES * PAGE_SIZE)
    assert address is not None
    mapping = Mapping(address, 0, PAGES, writable=False, errors=None, unmap=image.unmap)

    def full(*_: object) -> int:
        if function.startswith("no "):
            return 0  # as where the file ends before
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, function.removeprefix("no "), full)
    overwrite(path)
    assert mapping.view(0, mapping.length) == bytes(mapping.length)
    wait_for(lambda: "guest.raw: 1 of 1 pieces could not be saved" in caplog.text)
    assert [record.levelno for record in caplog.records] == [logging.CRITICAL]


def test_what_could_not_be_copied_is_read(path: Path) -> None:
    """Where files are limited (ulimit -f), a copy's is too: what is larger is not mapped at all."""
    code = (
        "import os, resource, sys, xenmapcache as x\n"
        "limits = resource.getrlimit(resource.RLIMIT_FSIZE)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0x2000, limits[1]))\n"
        "with x.open_backend('raw', path=sys.argv[1]) as backend:\n"
        "    views = [backend.map(0, count, writable=False).view(0, 8) for count in (2, 3)]\n"
        "    before = [bytes(view) for view in views]\n"
        "    os.close(os.open(sys.argv[1], os.O_WRONLY))\n"
        "    print([bytes(view) for view in views] == before)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, limits)\n"  # coverage writes a file at exit
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_a_copy_of_what_was_changed_is_not_kept(image: ImageFile, path: Path) -> None:
    """Should the kernel lose its patience, copies of what was written meanwhile are not shown."""
    address = image.map(0, PAGES * PAGE_SIZE)
    assert address is not None
    mapping = Mapping(address, 0, PAGES, writable=False, errors=None, unmap=image.unmap)
    image.changed = 0  # as if it had been written to
    overwrite(path)
    assert mapping.view(0, mapping.length) == bytes(mapping.length)


def test_a_file_that_is_open_for_writing(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """There is no lease of it: it is read, which gives the same, and the log warns."""
    with path.open("r+b"):
        file = ImageFile(path)
        assert file.map(0, PAGE_SIZE) is None
        assert file.read(PAGE_SIZE, PAGE_SIZE) == memory(1, 1)
        assert "guest.raw is open for writing" in caplog.text
        with open_backend("raw", path=path) as backend, MapCache(backend) as cache:
            assert cache.read(0, PAGES * PAGE_SIZE) == memory(0, PAGES)
    file.close()


@pytest.mark.parametrize("kind", ["fuse.sshfs", "nfs4", "cifs", "9p", ""])
def test_leases_that_are_not_relied_on(
    path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """On a file system that changes behind the kernel's back, or an unknown one, files are read."""
    monkeypatch.setattr(module, "_file_system", lambda fd: kind)
    file = ImageFile(path)
    assert file.map(0, PAGE_SIZE) is None
    assert file.read(0, PAGE_SIZE) == memory(0, 1)
    file.close()


def test_the_file_system_is_found(tmp_path: Path) -> None:
    """It is what ``stat -f`` calls it, and nothing for a descriptor that is not open."""
    for folder in (Path("/proc"), tmp_path):
        fd = os.open(folder, os.O_RDONLY)
        named = subprocess.run(
            ["findmnt", "-n", "-o", "FSTYPE", "-T", folder], capture_output=True, text=True
        )
        assert module._file_system(fd) == named.stdout.split()[0]
        os.close(fd)
    assert module._file_system(1 << 20) == ""


def test_a_sparse_file_in_memory_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tmpfs, touching a mapped hole takes memory, and is a SIGBUS if there is none."""
    os.truncate(path, 1 << 30)
    monkeypatch.setattr(module, "_file_system", lambda fd: "tmpfs")
    file = ImageFile(path)
    assert file.map(1 << 20, PAGE_SIZE) is None
    file.close()


def test_a_kernel_that_refuses(
    image: ImageFile, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the lease's errno is, and where no thread can be started, the file is read."""
    original = fcntl.fcntl

    def refuse(fd: int, command: int, *rest: object) -> object:
        if command == fcntl.F_SETLEASE and rest == (fcntl.F_RDLCK,):
            raise OSError(errno.EACCES, "Permission denied")
        return original(fd, command, *rest)  # type: ignore[call-overload] # whatever fcntl takes

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    file = ImageFile(path)
    assert file.map(0, PAGE_SIZE) is None
    file.close()
    monkeypatch.undo()

    def no_thread(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(module._guard, "_thread", 0)
    monkeypatch.setattr(module._guard, "_start", no_thread)
    file = ImageFile(path)
    assert file.map(0, PAGE_SIZE) is None
    assert file.read(0, 8) == memory(0, 1)[:8]
    file.close()


def test_the_last_page_may_be_a_part_of_one(path: Path) -> None:
    """Mapped, copied or read, what is behind the file's end reads as zeros."""
    os.truncate(path, 40 * PAGE_SIZE - 100)
    expected = memory(0, 40)[:-100] + bytes(100)
    file = ImageFile(path)
    address = file.map(0, 40 * PAGE_SIZE)
    if address is not None:
        mapping = Mapping(address, 0, 40, writable=False, errors=None, unmap=file.unmap)
        assert mapping.view(0, mapping.length) == expected
        overwrite(path)
        assert mapping.view(0, mapping.length) == expected
        os.truncate(path, 0)
    file.close()
    path.write_bytes(expected[:-100])
    with path.open("r+b"), open_backend("raw", path=path) as backend:
        assert backend.map(0, 40, writable=False).view(0, 40 * PAGE_SIZE) == expected


def test_what_lies_behind_the_end(image: ImageFile) -> None:
    """Neither read nor mapped nor allocated: the error names the file, the place, and its end."""
    end = PAGES * PAGE_SIZE
    for call in (
        lambda: image.read(end - 8, 1 << 60),
        lambda: image.read(-1, 1),
        lambda: image.read(0, -1),
        lambda: image.read_into(end - 8, memoryview(bytearray(9))),
        lambda: image.map(end, PAGE_SIZE),
        lambda: image.map(0, end + PAGE_SIZE),
    ):
        with pytest.raises(CorruptImageError, match=r"guest\.raw: .* the file ends at 0x40000"):
            call()
    assert image.read(end, 0) == b""


def test_read_into_several(image: ImageFile) -> None:
    """Views are filled one after the other, of whatever sizes, more of them than a call takes."""
    buffers = [bytearray(1 + number % 3) for number in range(3000)]
    image.read_into(PAGE_SIZE - 5, *[memoryview(buffer) for buffer in buffers])
    joined = b"".join(buffers)
    assert joined == memory(0, 3)[PAGE_SIZE - 5 :][: len(joined)]


@pytest.mark.parametrize("name", ["pread", "preadv"])
def test_short_reads_go_on(image: ImageFile, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A read that comes back short goes on where it ended."""
    read = os.pread

    def short(fd: int, wanted: int | list[memoryview], offset: int) -> bytes | int:
        if isinstance(wanted, int):
            return read(fd, min(wanted, 7), offset)
        view = wanted[0]
        data = read(fd, min(len(view), 7), offset)
        view[: len(data)] = data
        return len(data)

    monkeypatch.setattr(os, name, short)
    assert image.read(3, 100) == memory(0, 1)[3:103]
    one, two = bytearray(10), bytearray(33)
    image.read_into(5, memoryview(one), memoryview(two))
    assert one + two == memory(0, 1)[5:48]


def test_a_disk_that_fails(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be read raises an OSError that says where, and keeps no memory."""

    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    with path.open("r+b"), open_backend("raw", path=path) as backend:
        monkeypatch.setattr(os, "preadv", fail)
        monkeypatch.setattr(os, "pread", fail)
        gc.collect()  # what other tests left
        before = live_mappings()
        with pytest.raises(XenCallError, match=r"0x2000 bytes at 0x1000 of .*guest\.raw") as caught:
            backend.map(1, 2, writable=False)
        assert caught.value.errno == errno.EIO
        assert live_mappings() == before


def test_no_memory(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel has no memory left, that is said, and nothing is left behind."""

    def full(*_: object, **__: object) -> int:
        raise XenCallError("mmap", None, errno.ENOMEM)

    gc.collect()  # what other tests left
    before = live_mappings()
    monkeypatch.setattr(libc, "allocate", full)
    monkeypatch.setattr(libc, "map_file", full)
    with pytest.raises(XenCallError) as caught:
        backend.map(0, 4, writable=False)
    assert caught.value.errno == errno.ENOMEM
    assert live_mappings() == before


def test_a_piece_that_cannot_be_kept_from_children(
    image: ImageFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a later step fails, the piece is unmapped again, and the file can be closed."""

    def fail(address: int, length: int) -> None:
        raise XenCallError("madvise", None, errno.ENOMEM)

    monkeypatch.setattr(libc, "dont_fork", fail)
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").count("guest.raw")
    with pytest.raises(XenCallError, match="madvise"):
        image.map(0, PAGE_SIZE)
    assert Path("/proc/self/maps").read_text(encoding="utf-8").count("guest.raw") == lines == 0
    image.close()
    assert image._fd == -1


def test_closed_by_a_signal_in_the_middle(
    image: ImageFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handler that closes the file while a piece is being mapped leaves nothing mapped."""
    monkeypatch.setattr(libc, "dont_fork", lambda *_: image.close())
    assert image.map(0, PAGE_SIZE) is None
    assert "guest.raw" not in Path("/proc/self/maps").read_text(encoding="utf-8")
    assert image._pieces == {}


def test_what_is_no_file(tmp_path: Path) -> None:
    """A folder, a device and a pipe are refused, a pipe without waiting for its other end."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, Path("/dev/zero"), tmp_path / "pipe"):
        with pytest.raises(ValueError, match="is no regular file"):
            ImageFile(path)
    with pytest.raises(FileNotFoundError):
        ImageFile(tmp_path / "none")


def test_a_name_in_bytes(path: Path) -> None:
    """Whatever kind of path it was, errors show it as text."""
    file = ImageFile(os.fsencode(path))  # type: ignore[arg-type] # bytes work, as in open()
    assert file.path == str(path)
    file.close()


def test_a_file_that_was_just_written(path: Path) -> None:
    """It is opened when its time is old enough for the next change to give it another."""
    now = time.time_ns()
    os.utime(path, ns=(now, now))
    file = ImageFile(path)
    assert time.time_ns() - now >= 10_000_000
    file.close()


def test_closed(image: ImageFile) -> None:
    """After close nothing is read or mapped, twice is once, and the descriptor is gone."""
    fd = image._fd
    image.close()
    image.close()
    for call in (lambda: image.read(0, 1), lambda: image.map(0, PAGE_SIZE), image.check):
        with pytest.raises(ClosedError, match="guest.raw is closed"):
            call()
    assert is_closed(fd)


def test_closed_with_views(image: ImageFile, path: Path) -> None:
    """Views keep the file, and the lease that makes them safe, until the last one goes."""
    address = image.map(0, PAGES * PAGE_SIZE)
    assert address is not None
    mapping: Mapping | None = Mapping(
        address, 0, PAGES, writable=False, errors=None, unmap=image.unmap
    )
    assert mapping is not None
    fd = image._fd
    image.close()
    assert os.fstat(fd)
    with pytest.raises(ClosedError):
        image.read(0, 1)
    os.truncate(path, 0)
    assert mapping.view(0, mapping.length) == memory(0, PAGES)
    wait_for(lambda: is_closed(fd))  # nothing needs it any more
    mapping = None


def test_the_last_view_closes(image: ImageFile, path: Path) -> None:
    """With the last view of a closed file its descriptor and its lease go."""
    address = image.map(0, PAGE_SIZE)
    assert address is not None
    fd = image._fd
    image.close()
    image.unmap(address, PAGE_SIZE)
    assert is_closed(fd)
    os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))


def test_a_forgotten_file(path: Path) -> None:
    """One that was not closed is closed when it dies, with a warning."""
    file = ImageFile(path)
    fd, dead = file._fd, weakref.ref(file)
    with pytest.warns(ResourceWarning, match="unclosed image .*guest.raw"):
        del file
    assert dead() is None
    assert is_closed(fd)


def test_closed_while_it_is_read(image: ImageFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """The descriptor of a read that is under way is not given to another file."""
    read = os.pread
    under_way, go_on = threading.Event(), threading.Event()
    found: list[bytes] = []

    def slow(fd: int, length: int, offset: int) -> bytes:
        under_way.set()
        go_on.wait(30)
        return read(fd, length, offset)

    monkeypatch.setattr(os, "pread", slow)
    thread = threading.Thread(target=lambda: found.append(image.read(0, 8)))
    thread.start()
    under_way.wait(30)
    fd = image._fd
    image.close()
    assert os.fstat(fd)
    go_on.set()
    thread.join()
    assert found == [memory(0, 1)[:8]]
    assert is_closed(fd)


def test_a_finalizer_waits_for_nobody(image: ImageFile) -> None:
    """A view that dies while another thread, or its own, is at work is unmapped after that."""
    first, second = image.map(0, PAGE_SIZE), image.map(PAGE_SIZE, PAGE_SIZE)
    assert first is not None
    assert second is not None
    held, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        with image._exclusive():
            image.unmap(first, PAGE_SIZE)
            assert first in image._pieces
            held.set()
            go_on.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(30)
    image.unmap(second, PAGE_SIZE)
    assert set(image._pieces) == {first, second}
    go_on.set()
    thread.join()
    assert image._pieces == {}
    assert "guest.raw" not in Path("/proc/self/maps").read_text(encoding="utf-8")


def test_read_only(backend: Backend) -> None:
    """A file is not mapped for writing, and the error names it."""
    with pytest.raises(
        UnsupportedOperationError, match="guest.raw: the backend 'raw' is read-only"
    ):
        backend.map(0, 1, writable=True)


def test_many_times(path: Path) -> None:
    """Descriptors, threads and mappings are where they were after a thousand files."""

    def state() -> tuple[int, int, int, int]:
        gc.collect()
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
        files = len(os.listdir("/proc/self/fd"))
        return files, threading.active_count(), maps.count("guest.raw"), live_mappings()

    def once() -> None:
        with open_backend("raw", path=path) as backend, MapCache(backend) as cache:
            view = backend.map(0, 3, writable=False).view(0, 8)
            assert cache.read(8, 8) == memory(0, 1)[8:16]
        assert view == memory(0, 1)[:8]

    once()
    before, guarded = state(), dict(module._guard.files)
    for _ in range(1000):
        once()
    assert state() == before
    names = [thread.name for thread in threading.enumerate()]
    assert names.count("xenmapcache image guard") <= 1
    assert module._guard.files == guarded


def test_present_is_the_same_as_mapping(backend: Backend) -> None:
    """What is there is told without mapping anything, over edges of pages and of memory."""
    with MapCache(backend, bucket_shift=16) as cache:
        end = PAGES * PAGE_SIZE
        assert list(cache.present(0x123, end)) == [(0x123, end - 0x123)]
        assert list(cache.present(end - 1, 2)) == [(end - 1, 1)]
        assert list(cache.present(end, 1 << 40)) == []
        assert list(cache.present(7, 0)) == []
        assert cache.stats().maps == 0


def test_the_guard_starts_when_it_is_needed(path: Path) -> None:
    """The guard starts with the first piece that is mapped, not with the import or the opening."""
    code = (
        "import sys, threading\nfrom xenmapcache import open_backend\n"
        "backend = open_backend('raw', path=sys.argv[1])\n"
        "assert threading.active_count() == 1\n"
        "backend.map(0, 1, writable=False)\n"
        "assert threading.active_count() <= 2\nbackend.close()\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code, path], check=True, timeout=60)


def test_errors_keep_no_memory(backend: Backend, path: Path) -> None:
    """An exception that somebody keeps does not keep the memory of what was being read."""
    os.truncate(path, 10 * PAGE_SIZE)
    gc.collect()  # what other tests left
    before = live_mappings()
    kept: list[BaseException] = []
    for gfn in (0, 50):
        with pytest.raises(CorruptImageError) as caught:
            backend.map(gfn, 5, writable=False)
        kept.append(caught.value)
    assert live_mappings() == before
    assert len(kept) == 2


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (OSError(errno.EIO, "Input/output error"), "0x40 bytes at 0x100 of .*guest.raw"),
        (None, "guest.raw ends at 0x100 now: it has changed .* 0x40 more bytes are wanted"),
    ],
)
def test_a_read_that_fails(
    image: ImageFile, monkeypatch: pytest.MonkeyPatch, fault: OSError | None, message: str
) -> None:
    """A disk that fails, and a file whose end has come nearer, are told apart, with the place."""

    def pread(*_: object) -> bytes:
        if fault is not None:
            raise fault
        return b""

    monkeypatch.setattr(os, "pread", pread)
    with pytest.raises(CorruptImageError if fault is None else XenCallError, match=message):
        image.read(0x100, 0x40)


def test_a_closed_file_that_dies_with_a_piece(image: ImageFile, path: Path) -> None:
    """Nobody is told of an unclosed file that was closed, and what is mapped stays."""
    file: ImageFile | None = ImageFile(path)
    assert file is not None
    address, fd = file.map(0, PAGE_SIZE), file._fd
    assert address is not None
    file.close()
    key = id(file)
    file = None  # a warning would be an error
    assert libc.file_at(address) is not None
    libc.unmap(address, PAGE_SIZE)
    os.close(fd)
    del module._guard.files[key]


@pytest.fixture
def dying(path: Path) -> Iterator[None]:
    """A file that dies in another thread at this moment, and is still in the guard's list."""
    file = ImageFile(path)
    file.close()
    module._guard.files[-1] = weakref.ref(file)
    del file
    yield
    module._guard.files.pop(-1, None)


@pytest.mark.usefixtures("dying")
def test_a_file_that_dies_meanwhile(image: ImageFile, path: Path) -> None:
    """Neither the guard nor a child at a fork stumbles over it."""
    assert in_child(lambda: module._guard.files == {}) == 0
    address = image.map(0, PAGE_SIZE)
    assert address is not None
    module._guard._answer_all()
    assert image._leased  # nobody has asked for it
    overwrite(path)  # returns when the guard has looked through its list
    image.unmap(address, PAGE_SIZE)


def test_an_answer_that_fails_is_told(
    image: ImageFile, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What goes wrong in the guard's thread is in the log, and the thread goes on."""
    monkeypatch.setattr(image, "_is_asked_for", lambda: 1 / 0)
    module._guard._answer_all()
    assert "guest.raw: cannot be saved from being changed" in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_no_file_system_can_be_told(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """Where the kernel's lists do not have the file's mount, nothing is relied on."""

    def listing(name: str) -> Path:
        return Path(os.devnull if name == "/proc/self/mountinfo" else name)

    monkeypatch.setattr(module, "Path", listing)
    with path.open() as file:
        assert module._file_system(file.fileno()) == ""


def test_a_system_without_the_signal(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no signal to spare, the file is read."""
    monkeypatch.delattr(signal, "SIGSTKFLT")
    with contextlib.closing(ImageFile(path)) as file:
        assert file.map(0, PAGE_SIZE) is None
        assert file.read(0, 8) == memory(0, 1)[:8]


def test_a_child_unmaps_nothing_that_its_parent_has_dropped(tmp_path: Path) -> None:
    """What waits to be unmapped when a process forks is not unmapped in the child."""
    path = tmp_path / "guest.raw"
    path.write_bytes(memory(0, 4))
    file = ImageFile(path)
    address = file.map(0, PAGE_SIZE)
    if address is None:
        file.close()
        pytest.skip("there are no leases here")

    def work() -> bool:
        assert libc.cover(
            address, PAGE_SIZE
        )  # the child's own memory, at an address that is free there
        with pytest.raises(ClosedError):
            file.check()
        return libc.file_at(address) is not None

    with file._lock:  # as if another thread were in the middle of a call
        file.unmap(address, PAGE_SIZE)
        assert in_child(work) == 0
    file.close()
