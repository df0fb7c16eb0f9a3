"""Files that change under a process that has them mapped: each script must end with status 0."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.effort import RACES
from tests.files.places import folder_for_mapping
from tests.images.writers import memory

pytestmark = pytest.mark.slow

PRELUDE = """
import gc, logging, os, random, signal, subprocess, sys, threading, time, warnings
from pathlib import Path
from tests.images.writers import memory
from xenmapcache import *
from xenmapcache.files.filelease import FileLease
from xenmapcache.files.guard import image_guard
from xenmapcache.files.image import ImageFile

logging.getLogger("xenmapcache").setLevel(logging.CRITICAL)  # which says that a piece was lost
path = Path(sys.argv[1])
PAGES = path.stat().st_size // 4096

def opened():
    return open_backend("raw", path=path)

def child(code):
    code = "import os, sys, time\\npath, parent = sys.argv[1], os.getppid()\\n" + code
    return subprocess.Popen([sys.executable, "-c", code, path])

def disturb():
    return child(
        "while os.getppid() == parent:\\n"
        "    os.close(os.open(path, os.O_WRONLY))\\n"
        "    time.sleep(0.0005)\\n"
    )

def no_file_is_open():
    gc.collect()
    deadline = time.monotonic() + 30
    while image_guard.leases:  # the guard may be answering
        assert time.monotonic() < deadline
        time.sleep(0.001)

def guards():
    return sum(thread.name == "xenmapcache image guard" for thread in threading.enumerate())

def in_child(work):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
        pid = os.fork()
    if not pid:
        status = 1
        try:
            signal.alarm(30)
            work()
            status = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            os._exit(status)
    return pid

def ended_well(pid):
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
"""


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """A file in a folder whose files can be mapped: without a mapping nothing is shown here."""
    for folder in folder_for_mapping(tmp_path):
        path = folder / "guest.raw"
        path.write_bytes(memory(0, 1024))
        yield path


def run(script: str, path: Path, *before: str) -> None:
    code = f"RACES = {RACES}\n" + PRELUDE + textwrap.dedent(script)
    done = subprocess.run(
        [*before, sys.executable, "-X", "dev", "-X", "faulthandler", "-c", code, path],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), (done.returncode, done.stderr)


def test_truncated_file_mapped_without_a_lease_is_a_sigbus(path: Path) -> None:
    """Without a lease the same file, mapped and truncated, ends a process with SIGBUS."""
    code = (
        "import mmap, os, sys\nwith open(sys.argv[1], 'rb') as file:\n"
        "    memory = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)\n"
        "os.truncate(sys.argv[1], 0)\nmemory[0]\n"
    )
    done = subprocess.run([sys.executable, "-c", code, path], check=False, timeout=60)
    assert done.returncode == -7


def test_threads_over_truncated_file_see_old_content_or_an_error(path: Path) -> None:
    """Threads that map, read, keep and drop views see what was there, or an error: each time."""
    run(
        """
        content = path.read_bytes()
        for round in range(10 * RACES):
            path.write_bytes(content)
            backend = opened()
            cache = MapCache(backend, bucket_shift=14, max_resident="1M")
            stop = threading.Event()
            problems, refused = [], []
            def work(seed):
                numbers = random.Random(seed)
                kept = []
                while not stop.is_set():
                    gfn, count = numbers.randrange(PAGES - 8), numbers.randrange(1, 8)
                    try:
                        view = backend.map(gfn, count, writable=False).view(0, count * 4096)
                        data = cache.read(gfn * 4096, 4096)
                    except CorruptImageError:
                        refused.append(seed)
                        if len(refused) > 50:
                            return
                        continue
                    if data != memory(gfn, 1):
                        problems.append(gfn)
                    kept.append((gfn, count, view))
                    if len(kept) > 40:
                        del kept[numbers.randrange(len(kept))]
                    for gfn, count, view in kept[-3:]:
                        if view != memory(gfn, count):
                            problems.append((gfn, count))
            threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
            for thread in threads:
                thread.start()
            time.sleep(0.02 * random.random())
            if round % 3 == 0:
                os.truncate(path, random.randrange(len(content)))
            elif round % 3 == 1:
                path.write_bytes(b"new" * 1000)
            else:
                child("with open(path, 'r+b') as file: file.write(bytes(1 << 22))").wait()
            while not refused:
                time.sleep(0.001)
            stop.set()
            for thread in threads:
                thread.join()
            cache.close()
            backend.close()
            assert not problems, problems
            assert refused
        assert guards() <= 1
        gc.collect()
        no_file_is_open()
        """,
        path,
    )


def test_close_races_with_writers(path: Path) -> None:
    """Open, map, close and drop while another process keeps opening the file for writing."""
    run(
        """
        writer = disturb()
        def work():
            for _ in range(100 * RACES):
                with opened() as backend:
                    view = backend.map(0, 64, writable=False).view(0, 64 * 4096)
                    backend.map(3, 4, writable=False)
                assert view == memory(0, 64)
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        writer.kill()
        writer.wait()
        gc.collect()
        no_file_is_open()
        """,
        path,
    )


def test_file_of_another_user_is_read() -> None:
    """Who may read a file, and may have no lease of it, reads the same, and never dies of it."""
    setpriv = shutil.which("setpriv")
    if setpriv is None or os.geteuid():
        pytest.skip("needs root and setpriv, to become another user")
    python = Path(sys.executable)
    able = subprocess.run(
        [setpriv, "--reuid=65534", "--clear-groups", python, "-c", "import xenmapcache"],
        check=False,
    )
    if able.returncode:
        pytest.skip("nobody cannot run this Python")
    script = """
        file = ImageFile(path)
        assert file.map(0, 0, 1) is None
        file.close()
        with opened() as backend, MapCache(backend, bucket_shift=16) as cache:
            view = backend.map(0, 512, writable=False).view(0, 512 * 4096)
            assert cache.read(0, 1 << 16) == memory(0, 16)
            print("ready", flush=True)
            sys.stdin.read()
            assert view == memory(0, 512)
            assert cache.read(0, 1 << 16) == memory(0, 16)
            try:
                cache.read(1 << 21, 8)
            except CorruptImageError as error:
                assert str(path) in str(error)
            else:
                raise AssertionError
        """
    with TemporaryDirectory() as folder:  # pytest's own are not for others
        Path(folder).chmod(0o755)
        path = Path(folder, "guest.raw")
        path.write_bytes(memory(0, 1024))
        process = subprocess.Popen(
            [setpriv, "--reuid=65534", "--clear-groups", "--bounding-set=-all", python, "-c",
             PRELUDE + textwrap.dedent(script), path],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        os.truncate(path, 0)
        process.communicate(timeout=60)
        assert process.returncode == 0


def test_sparse_file_on_full_tmpfs_is_read(tmp_path: Path) -> None:
    """Holes of a file in a tmpfs that is full read as zeros: touching them mapped is a SIGBUS."""
    if os.geteuid():
        pytest.skip("needs root, to mount a tmpfs")
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", tmp_path], capture_output=True
    )
    if mount.returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        path = tmp_path / "guest.raw"
        path.touch()
        os.truncate(path, 1 << 22)
        run(
            """
            with opened() as backend, MapCache(backend) as cache:
                assert cache.read(0, PAGES * 4096) == bytes(PAGES * 4096)
            """,
            path,
        )
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_forked_children_leave_the_file_lease_alone(path: Path) -> None:
    """A child that closes, drops, ends or lives on does not change what protects the parent."""
    run(
        """
        backend = opened()
        mapping = backend.map(0, 512, writable=False)
        view = mapping.view(0, 512 * 4096)
        lease = backend._file._lease
        def work():
            global mapping, view
            assert str(path) not in [os.path.realpath(f"/proc/self/fd/{fd}") for fd in range(3, 32)]
            assert bytes(view[:64]) == bytes(64)
            try:
                backend.map(0, 1, writable=False)
            except ClosedError as error:
                assert "forked this one" in str(error)
            else:
                raise AssertionError
            backend.close()
            mapping = view = None
            gc.collect()
            assert guards() == 0
            copy = path.with_suffix(".copy")
            copy.write_bytes(memory(0, 64))
            with open_backend("raw", path=copy) as own:  # with a lease and a guard of its own
                part = own.map(0, 64, writable=False).view(0, 64 * 4096)
                assert guards() == 1
                os.truncate(copy, 0)
                assert part == memory(0, 64)
        ended_well(in_child(work))
        r, w = os.pipe()
        idle = in_child(lambda: (os.close(w), os.read(r, 1)))  # has the descriptor all the time
        other = in_child(lambda: os.closerange(3, 100))
        ended_well(other)
        assert lease.is_intact()
        assert backend.map(0, 8, writable=False).view(0, 8 * 4096) == memory(0, 8)
        os.truncate(path, 0)
        assert view == memory(0, 512)
        backend.close()
        path.write_bytes(memory(0, 1024))
        with opened() as backend:
            backend.map(0, 512, writable=False)
        started = time.monotonic()
        os.truncate(path, 0)  # no lease is left, though the child may have a descriptor
        assert time.monotonic() - started < 5
        os.close(w)
        ended_well(idle)
        """,
        path,
    )


def test_descriptor_in_a_child_keeps_no_writer_waiting(path: Path) -> None:
    """A file that is closed here keeps nobody waiting because of a child that inherited it."""
    run(
        """
        backend = opened()
        backend.map(0, 8, writable=False)
        r, w = os.pipe()
        FileLease.forget_parent = lambda self: None  # as a fork by C code
        pid = in_child(lambda: (os.close(w), os.read(r, 1)))
        backend.close()
        started = time.monotonic()
        os.truncate(path, 0)
        assert time.monotonic() - started < 5
        os.close(w)
        ended_well(pid)
        """,
        path,
    )


def test_fork_while_threads_map_and_copy(path: Path) -> None:
    """Children of a process whose threads map and copy all the time are not stuck and see zeros."""
    run(
        """
        def check():
            with opened() as backend:
                assert backend.map(5, 64, writable=False).view(0, 8) == memory(5, 1)[:8]
        check()  # or a thread may be in the middle of an import at the fork
        writer = disturb()
        stop = threading.Event()
        def work():
            while not stop.is_set():
                with opened() as backend:
                    for _ in range(5):
                        assert backend.map(0, 64, writable=False).view(0, 8) == memory(0, 1)[:8]
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(30):
            ended_well(in_child(check))
        stop.set()
        for thread in threads:
            thread.join()
        writer.kill()
        writer.wait()
        """,
        path,
    )


def test_exit_with_everything_held_is_silent(path: Path) -> None:
    """At exit with views, leases and an open file, nothing is said, and nobody waits for long."""
    run(
        """
        import atexit
        def at_exit():  # views are still safe now
            os.truncate(path, 0)
            assert view == memory(0, 512)
        atexit.register(at_exit)
        backend = opened()
        cache = MapCache(backend)
        lease = cache.map_device(0, 1 << 20, owner="rom", writable=False)
        view = backend.map(0, 512, writable=False).view(0, 512 * 4096)
        sys.modules["keep"] = (backend, cache, lease, view)
        backend.close()
        """,
        path,
    )


def test_programs_own_signals_are_not_disturbed(path: Path) -> None:
    """Neither handlers of SIGIO nor those who wait for signals see anything, or miss any."""
    run(
        """
        seen = []
        for number in (signal.SIGIO, signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, lambda number, frame: seen.append(number))
        backend = opened()
        view = backend.map(0, 512, writable=False).view(0, 512 * 4096)
        for number in (signal.SIGIO, signal.SIGUSR1, signal.SIGTERM):
            for _ in range(20):
                seen.clear()
                os.kill(os.getpid(), number)
                while not seen:
                    time.sleep(0.0001)
                assert seen == [number]
        # One that is blocked in all threads of the program waits for who asks for it.
        signal.signal(signal.SIGUSR2, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2, signal.SIGIO})
        for number in (signal.SIGUSR2, signal.SIGIO):
            os.kill(os.getpid(), number)
            time.sleep(0.05)
            assert signal.sigtimedwait({number}, 10).si_signo == number
        seen.clear()
        os.truncate(path, 0)
        assert view == memory(0, 512)
        assert not seen
        assert signal.sigpending() == set()
        backend.close()
        """,
        path,
    )


def test_guard_blocks_all_signals_and_changes_no_other_mask(path: Path) -> None:
    """The thread that maps first has the signal mask that it had, and the guard blocks them all."""
    run(
        """
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        backend = opened()
        backend.map(0, 8, writable=False)
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before == {signal.SIGUSR1}
        thread, thread_id = image_guard._elected
        status = Path(f"/proc/self/task/{thread_id}/status").read_text()
        blocked = int(status.split("SigBlk:")[1].split()[0], 16)
        for number in (signal.SIGIO, signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
            assert blocked >> number - 1 & 1
        backend.close()
        """,
        path,
    )


def test_concurrent_opens_share_one_file_lease_thread(path: Path) -> None:
    """Threads that open files at once, many times, share one guard; none starts without need."""
    run(
        """
        assert guards() == 0
        backend = opened()
        assert guards() == 0
        gate = threading.Barrier(8)
        def work():
            gate.wait()
            for _ in range(20):
                with opened() as backend:
                    backend.map(0, 8, writable=False)
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert guards() <= 1
        backend.close()
        """,
        path,
    )


def test_views_may_end_anywhere(path: Path) -> None:
    """Views end in other threads, in garbage and in signal handlers, while the file is written."""
    run(
        """
        writer = disturb()
        class Node:
            pass
        def garbage(backend):
            node = Node()
            node.own, node.view = node, backend.map(0, 16, writable=False).view(0, 8)
        held = []
        def handler(number, frame):
            held.clear()
            gc.collect()
            with opened() as backend:
                assert backend.map(1, 2, writable=False).view(0, 8) == memory(1, 1)[:8]
            # From its end on: a slow machine would do nothing but handle new signals.
            signal.setitimer(signal.ITIMER_REAL, 0.01 * going_on)
        going_on = False
        handler(0, None)  # what is imported when it is needed is there from here on
        going_on = True
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        gc.set_threshold(5)
        for _ in range(200):
            with opened() as backend:
                held.extend(backend.map(n, 4, writable=False).view(0, 8) for n in range(4))
                garbage(backend)
                thread = threading.Thread(target=held.clear)
                thread.start()
                garbage(backend)
                thread.join()
        going_on = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        writer.kill()
        writer.wait()
        held.clear()
        gc.collect()
        no_file_is_open()
        assert "guest.raw" not in Path("/proc/self/maps").read_text()
        """,
        path,
    )
