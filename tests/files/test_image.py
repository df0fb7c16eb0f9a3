"""An open file: reading it, closing it, and what is refused."""

from __future__ import annotations

import errno
import gc
import os
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest

from tests.files.changes import PAGES
from tests.files.conftest import is_closed, mapped_lines, number_of, wait_for
from tests.images.writers import memory
from xenmapcache import (
    ClosedError,
    CorruptImageError,
    MapCache,
    UnsupportedOperationError,
    XenCallError,
    open_backend,
)
from xenmapcache.address import PAGE_SIZE
from xenmapcache.backend import Backend
from xenmapcache.backends import image as image_backend
from xenmapcache.binding import libc
from xenmapcache.files import image as module
from xenmapcache.files.filelease import FileLease
from xenmapcache.files.guard import image_guard
from xenmapcache.files.image import ImageFile
from xenmapcache.mapping import live_mappings


def test_last_page_may_be_partial(path: Path) -> None:
    """Mapped, copied or read, what is beyond the file's end reads as zeros."""
    os.truncate(path, 40 * PAGE_SIZE - 100)
    expected = memory(0, 40)[:-100] + bytes(100)
    file = ImageFile(path)
    mapping = file.map(0, 0, 40)
    assert mapping is not None
    assert mapping.view(0, mapping.length) == expected
    with path.open("r+b") as changed:
        changed.write(b"\xff" * 40 * PAGE_SIZE)
    assert mapping.view(0, mapping.length) == expected
    os.truncate(path, 0)
    file.close()
    path.write_bytes(expected[:-100])
    with path.open("r+b"), open_backend("raw", path=path) as backend:
        assert backend.map(0, 40, writable=False).view(0, 40 * PAGE_SIZE) == expected


def test_range_beyond_the_end_is_refused(image: ImageFile) -> None:
    """Neither read nor mapped nor allocated: the error names the file, the place, and its end."""
    end = PAGES * PAGE_SIZE
    for call in (
        lambda: image.read(end - 8, 1 << 60),
        lambda: image.read(-1, 1),
        lambda: image.read(0, -1),
        lambda: image.read_into(end - 8, memoryview(bytearray(9))),
        lambda: image.map(end, 0, 1),
        lambda: image.map(0, 0, PAGES + 1),
    ):
        with pytest.raises(CorruptImageError, match=r"guest\.raw: .* the file ends at 0x40000"):
            call()
    assert image.read(end, 0) == b""


def test_read_into_fills_many_views(image: ImageFile) -> None:
    """Views are filled one after the other, of whatever sizes, more of them than a call takes."""
    buffers = [bytearray(1 + number % 3) for number in range(3000)]
    image.read_into(PAGE_SIZE - 5, *[memoryview(buffer) for buffer in buffers])
    joined = b"".join(buffers)
    assert joined == memory(0, 3)[PAGE_SIZE - 5 :][: len(joined)]


@pytest.mark.parametrize("name", ["pread", "preadv"])
def test_short_read_continues(image: ImageFile, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
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


def test_failing_disk_raises_with_place(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_full_memory_raises_and_keeps_nothing(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_irregular_file_is_refused(tmp_path: Path) -> None:
    """A folder, a device and a pipe are refused, a pipe without waiting for its other end."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, Path("/dev/zero"), tmp_path / "pipe"):
        with pytest.raises(ValueError, match="is not a regular file"):
            ImageFile(path)
    with pytest.raises(FileNotFoundError):
        ImageFile(tmp_path / "none")


def test_path_of_bytes_is_shown_as_text(path: Path) -> None:
    """Whatever kind of path it was, errors show it as text."""
    file = ImageFile(os.fsencode(path))  # type: ignore[arg-type] # bytes work, as in open()
    assert file.path == str(path)
    file.close()


def test_fresh_file_is_opened_when_its_time_is_old_enough(path: Path) -> None:
    """It is opened when its time is old enough for the next change to give it another."""
    now = time.time_ns()
    os.utime(path, ns=(now, now))
    file = ImageFile(path)
    assert time.time_ns() - now >= 10_000_000
    file.close()


def test_closed_file_refuses_everything(image: ImageFile) -> None:
    """After close nothing is read or mapped, twice is once, and the descriptor is gone."""
    fd = number_of(image)
    image.close()
    image.close()
    for call in (lambda: image.read(0, 1), lambda: image.map(0, 0, 1), image.check):
        with pytest.raises(ClosedError, match="guest.raw is closed"):
            call()
    assert is_closed(fd)


def test_map_for_writing_is_refused(backend: Backend) -> None:
    """A file is not mapped for writing, and the error names it."""
    with pytest.raises(
        UnsupportedOperationError, match="guest.raw: the backend 'raw' is read-only"
    ):
        backend.map(0, 1, writable=True)


def test_thousand_files_leave_nothing(path: Path) -> None:
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
    before, guarded = state(), set(image_guard.leases)
    for _ in range(1000):
        once()
    assert state() == before
    names = [thread.name for thread in threading.enumerate()]
    assert names.count("xenmapcache image guard") <= 1
    assert image_guard.leases == guarded


def test_present_maps_nothing(backend: Backend) -> None:
    """Present pages are found without mapping, also across edges of pages and of memory."""
    with MapCache(backend, bucket_shift=16) as cache:
        end = PAGES * PAGE_SIZE
        assert list(cache.present(0x123, end)) == [(0x123, end - 0x123)]
        assert list(cache.present(end - 1, 2)) == [(end - 1, 1)]
        assert list(cache.present(end, 1 << 40)) == []
        assert list(cache.present(7, 0)) == []
        assert cache.stats().maps == 0


def test_kept_error_keeps_no_memory(backend: Backend, path: Path) -> None:
    """An exception that a caller keeps does not keep the memory of what was being read."""
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
def test_failing_read_names_the_place(
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


def test_forgotten_file_is_closed_with_a_warning(path: Path) -> None:
    """One that was not closed is closed when it dies, with a warning."""
    file = ImageFile(path)
    fd, dead = number_of(file), weakref.ref(file)
    with pytest.warns(ResourceWarning, match="unclosed image .*guest.raw"):
        del file
    assert dead() is None
    assert is_closed(fd)


def test_close_leaves_the_descriptor_to_a_reader(
    image: ImageFile, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    fd = number_of(image)
    image.close()
    assert os.fstat(fd)
    go_on.set()
    thread.join()
    assert found == [memory(0, 1)[:8]]
    assert is_closed(fd)


def test_kept_error_keeps_no_descriptor(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After close nothing keeps the descriptor: not even the traceback of an error or Ctrl-C."""
    file = ImageFile(path)
    fd = number_of(file)
    kept: list[BaseException] = []

    def collect() -> None:
        for work in (
            lambda: file.read(0, 8),
            lambda: file.read_into(0, memoryview(bytearray(8))),
            file.check,
            lambda: file.map(0, 0, 1),
        ):
            try:
                work()
            except BaseException as failure:  # Ctrl-C is one
                kept.append(failure)

    for error in (OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()):

        def fail(*_: object, error: BaseException = error) -> int:
            raise error

        for call in ("pread", "preadv"):
            monkeypatch.setattr(os, call, fail)
        collect()
        monkeypatch.undo()
    os.truncate(path, 0)
    collect()
    file.close()
    assert len(kept) == 7
    wait_for(lambda: is_closed(fd))


def test_file_closed_while_it_is_mapped_keeps_what_is_mapped(
    image: ImageFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal handler may close the file between two steps of map(): the range is still right."""
    step = libc.dont_fork

    def close(address: int, length: int) -> None:
        image.close()
        step(address, length)

    fd = number_of(image)
    monkeypatch.setattr(libc, "dont_fork", close)
    mapping = image.map(0, 0, 2)
    assert mapping is not None
    assert mapping.view(0, mapping.length) == memory(0, 2)
    assert os.fstat(fd)
    del mapping
    assert is_closed(fd)


@pytest.mark.parametrize("step", ["map_file", "dont_fork", "Mapping", "change", "is_intact"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_interrupted_map_leaves_nothing(
    image: ImageFile, monkeypatch: pytest.MonkeyPatch, step: str, when: str
) -> None:
    """Ctrl-C before or after each step of map() leaves no mapping and no descriptor."""
    owner: object = FileLease if step in ("change", "is_intact") else libc
    owner = module if step == "Mapping" else owner
    real = getattr(owner, step)

    def interrupted(*arguments: object, **options: object) -> object:
        if when == "after":
            real(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, step, interrupted)
    fd = number_of(image)
    try:
        image.map(0, 0, 4)
    except KeyboardInterrupt:
        assert mapped_lines() == 0
    else:
        pytest.fail("the step was not taken")
    monkeypatch.undo()
    mapping = image.map(0, 0, 4)
    assert mapping is not None
    del mapping
    image.close()
    assert is_closed(fd)


@pytest.mark.parametrize("step", ["allocate", "Mapping", "dont_fork"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_interrupted_read_of_a_bucket_leaves_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch, step: str, when: str
) -> None:
    """Ctrl-C before or after each step of reading pages leaves no memory behind."""
    owner: object = image_backend if step == "Mapping" else libc
    real = getattr(owner, step)
    results: list[object] = []

    def interrupted(*arguments: object, **options: object) -> object:
        if when == "after":
            results.append(real(*arguments, **options))
        raise KeyboardInterrupt

    monkeypatch.setattr(FileLease, "take", lambda _: False)
    gc.collect()  # what other tests left
    before = live_mappings()
    with open_backend("raw", path=path) as backend:
        monkeypatch.setattr(owner, step, interrupted)
        with pytest.raises(KeyboardInterrupt):
            backend.map(0, 4, writable=False)
        monkeypatch.undo()
    if step == "allocate" and when == "after":
        address = results[0]
        assert isinstance(address, int)
        assert libc.file_at(address) is None
    results.clear()
    assert live_mappings() == before


def test_file_of_a_garbage_cycle_can_be_read_in_its_finalizer(path: Path) -> None:
    """The collector closes nothing that a __del__ of the same garbage still uses."""
    seen: list[bytes] = []

    class Owner:
        def __init__(self) -> None:
            self.itself = self
            self.file = ImageFile(path)
            self.mapping = self.file.map(0, 0, 1)

        def __del__(self) -> None:
            assert self.mapping is not None
            seen.append(self.file.read(PAGE_SIZE, 8))
            seen.append(bytes(self.mapping.view(0, 8)))
            self.file.close()

    owner: Owner | None = Owner()
    assert owner is not None
    fd = number_of(owner.file)
    owner = None
    gc.collect()
    assert seen == [memory(1, 1)[:8], memory(0, 1)[:8]]
    assert is_closed(fd)


def test_exception_of_a_signal_handler_is_not_the_files(
    image: ImageFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handler's TimeoutError reaches the caller as it is, though it is an OSError."""

    def interrupted(*_: object) -> int:
        raise TimeoutError("the handler's")

    for call in ("pread", "preadv"):
        monkeypatch.setattr(os, call, interrupted)
    with pytest.raises(TimeoutError, match="the handler's"):
        image.read(0, 8)
    with pytest.raises(TimeoutError, match="the handler's"):
        image.read_into(0, memoryview(bytearray(8)))


def test_close_unmaps_what_an_interrupted_finalizer_left(
    image: ImageFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C at the beginning of a finalizer is printed and forgotten; close frees the file."""
    fd = number_of(image)
    mapping = image.map(0, 0, 2)
    assert mapping is not None

    def interrupted() -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "unraisablehook", lambda *_: None)
    monkeypatch.setattr("xenmapcache.mapping.os.getpid", interrupted)
    del mapping
    monkeypatch.undo()
    assert mapped_lines() == 1
    image.close()
    assert mapped_lines() == 0
    assert is_closed(fd)


def test_backend_of_another_process_or_closed_maps_nothing(backend: Backend) -> None:
    """A forked child and a program that has closed the backend get an error that says so."""
    backend._pid -= 1  # type: ignore[attr-defined] # it is an image's
    with pytest.raises(ClosedError, match=r"guest.raw belongs to process \d+, which forked"):
        backend.map(0, 1, writable=False)
    backend.close()
    with pytest.raises(ClosedError, match="guest.raw is closed"):
        backend.map(0, 1, writable=False)
