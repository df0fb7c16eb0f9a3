"""The kernel's file lease: when it is taken, and what is mapped under it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import os
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest

from tests.fake_xen.child import in_child
from tests.files.changes import PAGES
from tests.files.conftest import is_closed, mapped_lines, number_of, wait_for
from tests.images.writers import memory
from xenmapcache import ClosedError, CorruptImageError, MapCache, open_backend
from xenmapcache.address import PAGE_SIZE
from xenmapcache.binding import libc
from xenmapcache.files import filelease as module
from xenmapcache.files.filelease import FileLease
from xenmapcache.files.guard import image_guard
from xenmapcache.files.image import ImageFile
from xenmapcache.mapping import live_mappings


def test_file_is_mapped_under_a_file_lease(path: Path) -> None:
    """The first map takes the file lease, and the memory is the file's own."""
    file = ImageFile(path)
    fd = number_of(file)
    assert fcntl.fcntl(fd, fcntl.F_GETLEASE) == fcntl.F_UNLCK
    mapping = file.map(0, 0, PAGES)
    assert mapping is not None
    assert mapped_lines() == 1
    assert mapping.view(0, mapping.length) == memory(0, PAGES)
    assert fcntl.fcntl(fd, fcntl.F_GETLEASE) == fcntl.F_RDLCK
    file.close()


def test_broken_file_lease_is_not_mapped_under(
    image: ImageFile, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a writer waits and the guard has not answered, nothing more is mapped."""
    monkeypatch.setattr(image_guard, "answer_all", lambda: True)
    with pytest.raises(BlockingIOError):
        os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    assert image.map(0, 0, 1) is None
    assert mapped_lines() == 0
    monkeypatch.undo()
    assert image_guard.answer_all()


def test_file_lease_broken_while_mapping_is_noticed(
    image: ImageFile, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that comes between mmap and the look at the lease gets in, and nothing is mapped."""
    mmap = libc.map_file

    def broken(*arguments: int, **options: object) -> int:
        monkeypatch.undo()
        address = mmap(*arguments, **options)  # type: ignore[arg-type] # handed on as they came
        os.truncate(path, 0)
        return address

    monkeypatch.setattr(libc, "map_file", broken)
    assert image.map(0, 0, 1) is None
    assert mapped_lines() == 0


def test_handler_that_truncates_waits_for_nobody(
    image: ImageFile, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal handler may truncate the file while its own thread is inside map()."""
    step, kept = libc.dont_fork, image.map(0, 0, 4)
    assert kept is not None

    def handler(address: int, length: int) -> None:
        monkeypatch.undo()
        signal.alarm(20)  # less than the kernel's patience
        os.truncate(path, 0)
        signal.alarm(0)
        step(address, length)

    monkeypatch.setattr(libc, "dont_fork", handler)
    assert image.map(0, 0, 1) is None
    assert kept.view(0, kept.length) == memory(0, 4)


def test_second_take_after_an_interrupt_succeeds(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while the file lease is taken leaves a file that the next call maps."""
    with contextlib.closing(ImageFile(path)) as file:
        real = fcntl.fcntl
        for command in (module._F_SETOWN_EX, fcntl.F_SETSIG, fcntl.F_SETLEASE):

            def interrupted(fd: int, number: int, *rest: object, stop: int = command) -> object:
                result = real(fd, number, *rest)  # type: ignore[call-overload] # as fcntl takes
                if number == stop:
                    raise KeyboardInterrupt
                return result

            monkeypatch.setattr(fcntl, "fcntl", interrupted)
            with pytest.raises(KeyboardInterrupt):
                file.map(0, 0, 1)
            monkeypatch.undo()
        assert file.map(0, 0, 1) is not None


def test_range_larger_than_a_copy_may_be_is_read(path: Path) -> None:
    """If the size of files is limited (ulimit -f), a range that cannot be copied is read."""
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


def test_file_open_for_writing_is_read_with_a_warning(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The kernel grants no file lease then; reading gives the same, and the log warns."""
    with path.open("r+b"):
        file = ImageFile(path)
        for _ in range(2):
            assert file.map(0, 0, 1) is None
        assert file.read(PAGE_SIZE, PAGE_SIZE) == memory(1, 1)
        assert caplog.text.count("guest.raw is open for writing") == 1
        with open_backend("raw", path=path) as backend, MapCache(backend) as cache:
            assert cache.read(0, PAGES * PAGE_SIZE) == memory(0, PAGES)
    file.close()


def lets_in(path: Path) -> bool:
    """Return whether a writer need not wait."""
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
    except BlockingIOError:
        return False
    return True


def test_break_is_answered_although_another_thread_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thread is granted the file lease, a writer comes, a second thread is refused for that."""
    with contextlib.closing(ImageFile(path)) as file:
        lease, ask = file._lease, FileLease._ask
        assert lease is not None

        def refused(_: FileLease) -> str:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

        def overtaken(lease: FileLease) -> str:
            assert ask(lease) == ""
            monkeypatch.setattr(FileLease, "_ask", refused)
            assert not lease.take()  # as the second thread does before the first notes anything
            return ""

        monkeypatch.setattr(FileLease, "_ask", overtaken)
        monkeypatch.setattr(FileLease, "held", property(lambda _: False, lambda *_: None))
        assert lease.take()
        with pytest.raises(BlockingIOError):
            os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        wait_for(lambda: lets_in(path))
        assert file.map(0, 0, 1) is None


@pytest.mark.parametrize("number", [errno.EACCES, errno.EINVAL, errno.ENOLCK])
def test_refused_file_lease_means_reading(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Whatever errno the kernel refuses with, the file is read."""
    original = fcntl.fcntl

    def refuse(fd: int, command: int, *rest: object) -> object:
        if command == fcntl.F_SETLEASE and rest == (fcntl.F_RDLCK,):
            raise OSError(number, os.strerror(number))
        return original(fd, command, *rest)  # type: ignore[call-overload] # whatever fcntl takes

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    with contextlib.closing(ImageFile(path)) as file:
        assert file.map(0, 0, 1) is None


def test_system_without_the_signal_reads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If no signal is free, the file is read."""
    monkeypatch.setattr(module, "SIGNAL", None)
    with contextlib.closing(ImageFile(path)) as file:
        assert file.map(0, 0, 1) is None
        assert file.read(0, 8) == memory(0, 1)[:8]


def test_range_that_cannot_be_kept_from_children_is_not_mapped(
    image: ImageFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a later step fails, the range is unmapped again, and the file can be closed."""

    def fail(address: int, length: int) -> None:
        raise OSError(errno.ENOMEM, "madvise")

    fd = number_of(image)
    monkeypatch.setattr(libc, "dont_fork", fail)
    with pytest.raises(OSError, match="madvise"):
        image.map(0, 0, 1)
    assert mapped_lines() == 0
    image.close()
    assert is_closed(fd)


def test_closed_file_lives_as_long_as_its_views(image: ImageFile, path: Path) -> None:
    """Views keep the descriptor, and the file lease that makes them safe, until they are copies."""
    mapping = image.map(0, 0, PAGES)
    assert mapping is not None
    fd = number_of(image)
    image.close()
    assert os.fstat(fd)
    with pytest.raises(ClosedError):
        image.read(0, 1)
    os.truncate(path, 0)
    assert mapping.view(0, mapping.length) == memory(0, PAGES)
    wait_for(lambda: is_closed(fd))  # the copies need no file


def test_last_view_of_a_closed_file_ends_the_file_lease(image: ImageFile, path: Path) -> None:
    """With the last view its descriptor goes, and writers do not wait."""
    mapping = image.map(0, 0, 1)
    assert mapping is not None
    view = mapping.view(0, 8)
    fd = number_of(image)
    image.close()
    del mapping
    assert os.fstat(fd)
    del view
    assert is_closed(fd)
    os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))


def test_closed_file_is_forgotten_by_the_guard(path: Path) -> None:
    """The guard keeps weak references, and they go with the files."""
    before = len(image_guard.leases)
    file = ImageFile(path)
    assert len(image_guard.leases) == before + 1
    file.close()
    assert len(image_guard.leases) == before


def test_collector_does_not_hide_a_file_from_the_guard(image: ImageFile, path: Path) -> None:
    """A finalizer of a garbage cycle that maps a range is protected: the guard knows the file."""
    copies: list[bytes] = []

    class Owner:
        def __init__(self) -> None:
            self.itself = self
            self.file = ImageFile(path)
            self.reference = weakref.ref(self.file)

        def __del__(self) -> None:
            mapping = self.file.map(0, 0, 2)
            assert mapping is not None
            os.truncate(path, 0)
            copies.append(bytes(mapping.view(0, mapping.length)))
            self.file.close()

    Owner()
    gc.collect()
    assert copies == [memory(0, 2)]


def test_forked_child_closes_the_file_and_keeps_the_parents_lease(
    image: ImageFile, path: Path
) -> None:
    """The child has no descriptor and an empty guard; the parent's file lease stays."""
    mapping = image.map(0, 0, 2)
    assert mapping is not None
    fd, lease = number_of(image), image._lease
    assert lease is not None

    def work() -> bool:
        with pytest.raises(ClosedError):
            image.check()
        with pytest.raises(ClosedError):
            image.map(0, 0, 1)
        lease.end()  # as the object's end does
        return is_closed(fd) and not image_guard.leases and lease.file.closed

    assert in_child(work) == 0
    assert lease.is_intact()
    os.truncate(path, 0)
    assert mapping.view(0, mapping.length) == memory(0, 2)


def test_child_of_c_code_keeps_the_parents_lease(
    image: ImageFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C code that forks tells no Python code: the child's end of a file ends no file lease."""
    monkeypatch.setattr(FileLease, "forget_parent", lambda _: None)
    lease = image._lease
    assert lease is not None
    assert in_child(lambda: not lease.end()) == 0
    assert lease.is_intact()


def test_file_changed_before_its_file_lease_is_refused(path: Path) -> None:
    """A change before the first map breaks no file lease; size and time show it, and it raises."""
    before = live_mappings()
    file = ImageFile(path)
    fd = number_of(file)
    with path.open("r+b") as changed:
        changed.write(b"changed")
    with pytest.raises(CorruptImageError, match="has changed since it was opened") as kept:
        file.map(0, 0, 2)
    assert live_mappings() == before
    file.close()
    assert is_closed(fd)
    assert kept.value.__traceback__ is not None


def test_child_unmaps_nothing_of_its_parent(image: ImageFile) -> None:
    """What the parent has mapped is not unmapped in the child, where the address is free."""
    mapping = image.map(0, 0, 1)
    assert mapping is not None
    address = mapping.address

    def work() -> bool:
        nonlocal mapping
        mapping = None
        gc.collect()
        return libc.file_at(address) is not None  # zeros cover it

    assert in_child(work) == 0


def test_threads_that_map_first_share_one_file_lease(path: Path) -> None:
    """Any number of threads may ask for the file lease at once."""
    file = ImageFile(path)
    gate = threading.Barrier(6)
    mapped: list[object] = []

    def work() -> None:
        gate.wait()
        mapped.append(file.map(0, 0, 2))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert None not in mapped
    file.close()


def test_ended_file_lease_is_not_taken_again(image: ImageFile, path: Path) -> None:
    """After a lease break the file is read, though nothing was mapped and nothing has changed."""
    path.open("r+b").close()
    wait_for(lambda: image._lease is not None and image._lease.ended)
    assert image.map(0, 0, 1) is None
    assert image.read(0, 8) == memory(0, 1)[:8]
