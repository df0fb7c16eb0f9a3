"""The image guard: it answers every lease break, whatever else goes wrong."""

from __future__ import annotations

import errno
import gc
import logging
import os
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest

from tests.fake_xen.child import in_child
from tests.files.changes import PAGES
from tests.files.conftest import mapped_lines, wait_for
from tests.images.writers import memory
from xenmapcache import CorruptImageError, Mapping, XenCallError, flat, open_backend
from xenmapcache.address import PAGE_SIZE
from xenmapcache.binding import libc
from xenmapcache.files import copies, latelog
from xenmapcache.files import guard as module
from xenmapcache.files.filelease import FileLease, MappedRange
from xenmapcache.files.guard import FileLeaseThread, image_guard
from xenmapcache.files.image import ImageFile
from xenmapcache.mapping import LiveMapping, live_records

ALL = PAGES * PAGE_SIZE


@pytest.fixture
def mapping(image: ImageFile) -> Mapping:
    """All of the file, mapped."""
    mapping = image.map(0, 0, PAGES)
    assert mapping is not None
    return mapping


@pytest.fixture
def others(mappable: Path) -> tuple[list[Path], list[Mapping]]:
    """Three more files, mapped."""
    paths = [mappable / f"other{number}.raw" for number in range(3)]
    mappings = []
    for path in paths:
        path.write_bytes(memory(0, 2))
        with open_backend("raw", path=path) as backend:
            mappings.append(backend.map(0, 2, writable=False))
    return paths, mappings


def truncate(path: Path) -> None:
    """Truncate a file; fail if that takes as long as the kernel's patience."""
    started = time.monotonic()
    os.truncate(path, 0)
    assert time.monotonic() - started < 20


def show_old_content(mappings: list[Mapping]) -> bool:
    return all(mapping.view(0, 2 * PAGE_SIZE) == memory(0, 2) for mapping in mappings)


def test_nonblocking_writer_is_refused_then_let_in(mapping: Mapping, path: Path) -> None:
    """Opened with O_NONBLOCK for writing, a mapped file is refused once, and then opened."""
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
    assert mapping.view(0, ALL) == memory(0, PAGES)


def test_writer_waits_until_copies_are_in_place(
    mapping: Mapping, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that opens the file for writing is let in when, and only when, it is copied."""
    begun, proceed = threading.Event(), threading.Event()
    copy = module._copy

    def slow(*arguments: object) -> str:
        begun.set()
        proceed.wait(30)
        return copy(*arguments)  # type: ignore[arg-type] # handed on as they came

    monkeypatch.setattr(module, "_copy", slow)
    thread = threading.Thread(target=truncate, args=(path,))
    thread.start()
    assert begun.wait(30)
    assert path.stat().st_size == ALL
    assert mapped_lines() == 1
    proceed.set()
    thread.join()
    assert path.stat().st_size == 0
    assert mapping.view(0, ALL) == memory(0, PAGES)


def test_range_that_dies_while_it_is_copied_is_unmapped(
    image: ImageFile, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guard's reference keeps the range mapped until the copy is complete, and no longer."""
    copy = module._copy
    kept = [image.map(0, 0, 3)]
    addresses = [mapping.address for mapping in kept if mapping is not None]
    mapped: list[int] = []

    def dropping(*arguments: object) -> str:
        kept.clear()
        mapped.append(mapped_lines())
        return copy(*arguments)  # type: ignore[arg-type] # handed on as they came

    monkeypatch.setattr(module, "_copy", dropping)
    truncate(path)
    wait_for(lambda: libc.file_at(addresses[0]) is None)
    assert mapped == [1]
    assert mapped_lines() == 0


@pytest.mark.parametrize("function", ["memfd_create", "sendfile", "no sendfile"])
def test_range_that_cannot_be_copied_shows_zeros(
    mapping: Mapping,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    function: str,
) -> None:
    """Without room for a copy the view shows zeros, and the log says so: no SIGBUS."""

    def full(*_: object) -> int:
        if function.startswith("no "):
            return 0  # as where the file ends before
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, function.removeprefix("no "), full)
    truncate(path)
    assert mapping.view(0, ALL) == bytes(ALL)
    wait_for(lambda: "guest.raw: 1 of 1 mapped ranges could not be copied" in caplog.text)
    assert [record.levelno for record in caplog.records] == [logging.CRITICAL]


def test_range_that_nobody_has_seen_is_no_loss(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard looks at a truncated file just before a thread is granted its file lease."""
    reports: list[tuple[object, ...]] = []
    asks, granted, mapped, proceed = (threading.Event() for _ in range(4))
    ask, keep, table, errors = FileLease._ask, libc.dont_fork, live_records, list[str]()

    def slow_ask(lease: FileLease) -> str:
        asks.set()
        assert granted.wait(30)
        return ask(lease)

    def slow_keep(address: int, length: int) -> None:
        keep(address, length)
        mapped.set()
        assert proceed.wait(30)

    def map_one() -> None:
        try:
            assert file.map(0, 0, 1) is None
        except CorruptImageError as error:
            errors.append(str(error))

    def records() -> list[LiveMapping]:
        if threading.current_thread() is threading.main_thread():
            granted.set()
            assert mapped.wait(30)
        return table()

    for owner, name, step in (
        (FileLease, "_ask", slow_ask),
        (libc, "dont_fork", slow_keep),
        (module, "live_records", records),
        (image_guard.log, "report", lambda *report: reports.append(report)),
    ):
        monkeypatch.setattr(owner, name, step)
    file = ImageFile(path)
    thread = threading.Thread(target=map_one)
    thread.start()
    assert asks.wait(30)
    os.truncate(path, 2 * PAGE_SIZE)
    assert image_guard.answer_all()
    proceed.set()
    thread.join()
    file.close()
    assert (mapped_lines(), reports, errors) == (0, [], [])


@pytest.mark.parametrize("window", [False, True])
def test_range_is_handed_out_or_left_alone_by_the_guard(
    image: ImageFile, path: Path, monkeypatch: pytest.MonkeyPatch, window: bool
) -> None:
    """A lease break after the last look: the range is dropped, so it was not worth a copy."""
    copied: list[object] = []
    change, memory = FileLease.change, flat.reserve(0, 4)

    def late(lease: FileLease) -> CorruptImageError | None:
        monkeypatch.setattr(FileLease, "change", change)
        changed = change(lease)
        truncate(path)
        return changed

    gc.collect()
    monkeypatch.setattr(module, "_copy", lambda *arguments: copied.append(arguments))
    monkeypatch.setattr(FileLease, "change", late)
    mapped = image.map_over(memory, 0, 0, 1) if window else image.map(0, 0, 1)
    assert (mapped, copied) == (False if window else None, [])


def test_window_that_cannot_be_copied_is_a_loss(
    image: ImageFile, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each of its parts shows zeros, and is counted."""
    window = flat.reserve(0, 4)
    assert image.map_over(window, 0, 0, 1)
    assert image.map_over(window, 2 * PAGE_SIZE, PAGE_SIZE, 2)
    monkeypatch.setattr(os, "sendfile", lambda *_: 0)
    truncate(path)
    assert window.view(0, window.length) == bytes(window.length)
    wait_for(lambda: "2 of 2 mapped ranges could not be copied" in caplog.text)


def test_copy_of_a_changed_file_is_not_shown(
    image: ImageFile, mapping: Mapping, path: Path
) -> None:
    """Should the kernel's patience end, copies of what was written since are not shown."""
    assert image._lease is not None
    image._lease.mtime_ns = 0  # as if the file had been written to
    truncate(path)
    assert mapping.view(0, ALL) == bytes(ALL)


def test_unreadable_answer_is_tried_again(
    mapping: Mapping, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If not even zeros can take the range's place, the writer waits, and the guard tries again."""
    fails = iter([True, True, True])

    def copy(lease: FileLease, offset: int, record: object) -> str:
        if next(fails, False):
            raise XenCallError("mmap", None, errno.ENOMEM)
        return real(lease, offset, record)  # type: ignore[arg-type] # handed on as it came

    real = module._copy
    monkeypatch.setattr(module, "_copy", copy)
    truncate(path)
    assert next(fails, None) is None
    assert mapping.view(0, ALL) == memory(0, PAGES)
    wait_for(lambda: "a lease break is not answered yet" in caplog.text)
    assert caplog.text.count("not answered yet") == 1


def test_zeros_that_cannot_be_mapped_are_an_error(
    mapping: Mapping, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A range that is still mapped from the file is never taken for one that is safe."""
    monkeypatch.setattr(libc, "map_zeros_over", lambda *_, **__: False)
    with pytest.raises(XenCallError, match="no zeros for 0x40000 bytes, and the disk is gone"):
        copies._show_zeros(mapping.address, mapping.length, "the disk is gone")


def test_trouble_with_one_file_does_not_stop_the_others(
    others: tuple[list[Path], list[Mapping]],
    mapping: Mapping,
    image: ImageFile,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A file lease that cannot be asked for or answered is tried again; others are answered."""
    paths, mappings = others
    broken = image._lease
    ask, answer = FileLease.is_breaking, FileLeaseThread._answer

    def is_breaking(lease: FileLease) -> bool:
        if lease is broken and "asked" in trouble:
            raise OSError(errno.EIO, "trouble")
        return ask(lease)

    def failing(self: FileLeaseThread, lease: FileLease, ranges: module._Ranges) -> None:
        if lease is broken and "answered" in trouble:
            raise MemoryError
        answer(self, lease, ranges)

    monkeypatch.setattr(FileLease, "is_breaking", is_breaking)
    monkeypatch.setattr(FileLeaseThread, "_answer", failing)
    thread = threading.Thread(target=truncate, args=(path,))
    trouble = "answered"
    thread.start()
    truncate(paths[0])
    trouble = "asked, answered"
    truncate(paths[1])
    assert path.stat().st_size == ALL
    trouble = ""
    thread.join()
    assert show_old_content(mappings)
    assert mapping.view(0, ALL) == memory(0, PAGES)


def test_raising_log_filter_stops_nothing(
    others: tuple[list[Path], list[Mapping]],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A logging filter with a bug costs the line, and no answer."""
    paths, mappings = others
    died: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", died.append)
    logger = logging.getLogger("xenmapcache")

    class Filter(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            raise RuntimeError("a filter with a bug")

    buggy = Filter()
    with caplog.at_level(logging.INFO, logger="xenmapcache"):
        logger.addFilter(buggy)
        try:
            for path in paths:
                truncate(path)
            wait_for(lambda: len(died) == len(paths))
        finally:
            logger.removeFilter(buggy)
    assert {args.thread.name for args in died if args.thread} == {"xenmapcache file lease report"}
    assert show_old_content(mappings)
    assert image_guard.is_alive()


def test_log_handler_that_never_returns_stops_nothing(
    others: tuple[list[Path], list[Mapping]], caplog: pytest.LogCaptureFixture
) -> None:
    """While a handler hangs in one report, further writers are answered."""
    paths, mappings = others
    hangs, proceed = threading.Event(), threading.Event()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            hangs.set()
            proceed.wait(30)

    handler = Handler()
    with caplog.at_level(logging.INFO, logger="xenmapcache"):
        logging.getLogger("xenmapcache").addHandler(handler)
        try:
            truncate(paths[0])
            assert hangs.wait(30)
            truncate(paths[1])
            truncate(paths[2])
        finally:
            logging.getLogger("xenmapcache").removeHandler(handler)
            proceed.set()
    assert show_old_content(mappings)
    wait_for(lambda: not reporters())


def reporters() -> list[threading.Thread]:
    name = "xenmapcache file lease report"
    return [thread for thread in threading.enumerate() if thread.name == name]


def test_report_waits_if_no_thread_can_be_started(
    others: tuple[list[Path], list[Mapping]],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A line that cannot be written now is written with the next one."""

    def no_thread(*_: object) -> int:
        raise RuntimeError("can't start new thread")

    paths, _ = others
    with caplog.at_level(logging.INFO, logger="xenmapcache"):
        monkeypatch.setattr(latelog, "start_new_thread", no_thread)
        truncate(paths[0])
        wait_for(lambda: image_guard.log.pending)
        monkeypatch.undo()
        truncate(paths[1])
        wait_for(lambda: "other0.raw is opened" in caplog.text and "other1.raw" in caplog.text)
    assert not image_guard.log.pending


def test_guard_continues_after_any_exception(
    mapping: Mapping, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What another thread throws into the guard does not end it, and the break is answered."""
    answer = FileLeaseThread.answer_all
    thrown = iter([SystemExit("thrown in"), MemoryError(), KeyboardInterrupt()])

    def failing(self: FileLeaseThread) -> bool:
        for error in thrown:
            raise error
        return answer(self)

    monkeypatch.setattr(FileLeaseThread, "answer_all", failing)
    truncate(path)
    assert mapping.view(0, ALL) == memory(0, PAGES)
    assert image_guard.is_alive()
    wait_for(lambda: "SystemExit: thrown in" in caplog.text)


def test_failed_start_of_a_thread_means_reading(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If no thread can be started, the file is read."""

    def no_thread(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(image_guard, "_elected", None)
    monkeypatch.setattr(threading.Thread, "start", no_thread)
    file = ImageFile(path)
    assert file.map(0, 0, 1) is None
    assert file.read(0, 8) == memory(0, 1)[:8]
    file.close()


def test_handlers_runtime_error_is_not_a_missing_thread(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a signal handler raises while the guard starts reaches the caller."""

    def interrupted(*_: object) -> None:
        raise RuntimeError("the handler's")

    monkeypatch.setattr(image_guard, "_elected", None)
    monkeypatch.setattr(threading.Thread, "start", interrupted)
    file = ImageFile(path)
    with pytest.raises(RuntimeError, match="the handler's"):
        file.map(0, 0, 1)
    monkeypatch.undo()
    assert file.map(0, 0, 1) is not None
    file.close()


def run(script: str, path: Path) -> None:
    """Run a script in a process of its own, which must end well and print nothing."""
    prelude = (
        "import os, sys, threading, time\nfrom xenmapcache import open_backend\n"
        "from xenmapcache.files.guard import FileLeaseThread, image_guard\n"
        "from tests.images.writers import memory\n"
        "path = sys.argv[1]\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", prelude + script, path],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_guard_starts_with_the_first_mapped_range(path: Path) -> None:
    """Neither the import nor the opening of a file starts a thread."""
    run(
        "backend = open_backend('raw', path=path)\n"
        "assert threading.active_count() == 1\n"
        "backend.map(0, 1, writable=False)\n"
        "assert threading.active_count() == 2\nbackend.close()\n",
        path,
    )


def test_dead_guard_is_replaced_by_the_next_map(path: Path) -> None:
    """A new guard takes over the files of a dead one, and answers what was signalled since."""
    for number in range(3):
        path.with_suffix(f".{number}").write_bytes(memory(0, 2))
    run(
        "threading.excepthook = lambda args: None\n"
        "die = threading.Event()\n"
        "def end(self, *_): die.wait(); raise SystemExit\n"
        "serve, report = FileLeaseThread._serve, FileLeaseThread._report_failure\n"
        "FileLeaseThread._serve = FileLeaseThread._report_failure = end\n"
        "stem = os.path.splitext(path)[0]\n"
        "files = [open_backend('raw', path=f'{stem}.{number}') for number in range(3)]\n"
        "def view(file): return file.map(0, 2, writable=False).view(0, 2 * 4096)\n"
        "views = [view(file) for file in files[:2]]\n"
        "die.set()\n"
        "while image_guard.is_alive(): time.sleep(0.001)\n"
        "FileLeaseThread._serve, FileLeaseThread._report_failure = serve, report\n"
        "try:\n    os.open(files[0].path, os.O_WRONLY | os.O_NONBLOCK)\n"
        "except BlockingIOError:\n    pass\n"
        "views.append(view(files[2]))\n"
        "started = time.monotonic()\n"
        "for file in files: os.truncate(file.path, 0)\n"
        "assert time.monotonic() - started < 20\n"
        "assert views == [memory(0, 2)] * 3\n"
        "names = [thread.name for thread in threading.enumerate()]\n"
        "assert names.count('xenmapcache image guard') == 1\n"
        "for file in files: file.close()\n",
        path,
    )


def test_open_file_revives_a_dead_guard(path: Path) -> None:
    """A file that was mapped before starts a new guard when it is mapped again."""
    run(
        "threading.excepthook = lambda args: None\n"
        "die = threading.Event()\n"
        "def end(self, *_): die.wait(); raise SystemExit\n"
        "serve, report = FileLeaseThread._serve, FileLeaseThread._report_failure\n"
        "FileLeaseThread._serve = FileLeaseThread._report_failure = end\n"
        "backend = open_backend('raw', path=path)\n"
        "backend.map(0, 1, writable=False)\n"
        "die.set()\n"
        "while image_guard.is_alive(): time.sleep(0.001)\n"
        "FileLeaseThread._serve, FileLeaseThread._report_failure = serve, report\n"
        "view = backend.map(0, 2, writable=False).view(0, 2 * 4096)\n"
        "assert image_guard.is_alive()\n"
        "os.truncate(path, 0)\n"
        "assert view == memory(0, 2)\n"
        "backend.close()\n",
        path,
    )


def test_refused_file_stays_refused(
    others: tuple[list[Path], list[Mapping]], path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The break of another file's lease does not let a refused file be asked for again."""
    with path.open("r+b"), open_backend("raw", path=path) as backend:
        backend.map(0, 1, writable=False)
        truncate(others[0][0])
        wait_for(lambda: others[1][0].record.keeps.lease is None)  # type: ignore[attr-defined] # it is a MappedRange
        backend.map(0, 1, writable=False)
    assert caplog.text.count("guest.raw is open for writing") == 1


def test_concurrent_candidates_elect_one_guard(path: Path) -> None:
    """Threads and signal handlers may start the guard at once: one thread stays."""
    run(
        "gate = threading.Barrier(8)\n"
        "def start():\n"
        "    gate.wait()\n"
        "    image_guard._start_candidate()\n"
        "threads = [threading.Thread(target=start) for _ in range(8)]\n"
        "for thread in threads: thread.start()\n"
        "for thread in threads: thread.join()\n"
        "while threading.active_count() > 2: time.sleep(0.001)\n"
        "assert image_guard.is_alive()\n",
        path,
    )


def test_candidate_that_ends_at_once_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads are not started without end if each of them ends at once."""
    guard = FileLeaseThread()
    monkeypatch.setattr(guard, "_run", lambda ready: ready.release())
    with pytest.raises(OSError, match="ends at once"):
        guard.start()


def test_fork_while_a_candidate_starts_does_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that a signal handler forked here has no candidate to wait for."""
    guard = FileLeaseThread()
    monkeypatch.setattr(guard, "_run", lambda ready: guard.reset())
    with pytest.raises(OSError, match="handler forked while a thread started"):
        guard._start_candidate()


def test_guard_forgets_files_that_have_died(
    mapping: Mapping, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weak reference whose callback was lost, as near the recursion limit, is in nobody's way."""
    import weakref

    class Died:
        pass

    died = Died()
    lost = weakref.ref(died)
    image_guard.leases.add(lost)  # type: ignore[arg-type] # stands for a file lease's
    del died
    assert in_child(lambda: not image_guard.leases) == 0
    truncate(path)
    assert mapping.view(0, ALL) == memory(0, PAGES)
    wait_for(lambda: lost not in image_guard.leases)


def test_dead_memory_is_left_alone(
    image: ImageFile, mapping: Mapping, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What nobody can touch any more is not copied: its address may belong to another thread."""
    dead = mapping.record
    copied: list[object] = []
    copy = module._copy

    class Dead:
        keeps = MappedRange(image._lease, 0)  # type: ignore[arg-type] # it is open

        def __call__(self) -> None:
            return None

    def noted(lease: FileLease, offset: int, record: object) -> str:
        copied.append(record)
        return copy(lease, offset, record)  # type: ignore[arg-type] # handed on as it came

    monkeypatch.setattr(module, "live_records", lambda: [Dead(), dead])
    monkeypatch.setattr(module, "_copy", noted)
    truncate(path)
    assert copied == [dead]


def test_file_whose_lease_is_being_asked_for_is_not_given_up(
    others: tuple[list[Path], list[Mapping]], path: Path
) -> None:
    """The kernel says the same of a file without a lease and of a broken one; the guard asks."""
    with open_backend("raw", path=path) as backend:
        lease = backend._file._lease  # type: ignore[attr-defined] # it is a file's
        lease.asked = True  # as another thread notes just before it asks the kernel
        truncate(others[0][0])
        wait_for(lambda: others[1][0].record.keeps.lease is None)  # type: ignore[attr-defined] # it is a MappedRange
        assert image_guard.answer_all()
        assert not lease.ended
        assert backend.map(0, 1, writable=False).view(0, 8) == memory(0, 1)[:8]
        assert lease.held


def test_report_is_written_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each report is written by one thread, and a thread without a report ends."""
    image_guard.log.pending.append((logging.CRITICAL, "report %d", (1,)))
    for _ in range(2):
        image_guard.log.start_writer()
    wait_for(lambda: not reporters())
    assert caplog.text.count("report 1") == 1


def test_slow_candidate_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a slow machine the guard may take long to start."""
    guard = FileLeaseThread()
    begun = threading.Event()

    def slow(ready: threading.Lock) -> None:
        begun.set()
        time.sleep(0.25)
        ready.release()

    monkeypatch.setattr(guard, "_run", slow)
    guard._start_candidate()
    assert begun.is_set()


class Idle:
    """Stands for a file lease that nobody has asked for, or that has ended."""

    asked = held = ended = False

    def is_breaking(self) -> bool:
        raise AssertionError("the kernel is not asked about it")

    def end(self) -> bool:
        return True


def test_file_without_a_file_lease_is_left_alone() -> None:
    """The kernel wants nothing back of a file that is only read."""
    guard, idle = FileLeaseThread(), Idle()
    guard.leases.add(weakref.ref(idle))  # type: ignore[arg-type] # it stands for one
    assert guard._breaks() == ({}, True)


def test_range_that_has_gone_needs_no_copy() -> None:
    """It was handed out, and unmapped before the guard came to it."""
    guard = FileLeaseThread()
    lease: FileLease = Idle()  # type: ignore[assignment] # it stands for one
    mapped = MappedRange(lease, 0)
    assert mapped.claim()
    guard._answer(lease, [(lambda: None, mapped)])  # type: ignore[list-item] # as of a dead record
    assert mapped.lease is None
