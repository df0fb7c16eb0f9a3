"""Each script runs in a process of its own, must end with status 0 and say nothing on stderr."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from tests.effort import RACES

pytestmark = pytest.mark.slow

PRELUDE = """
import gc, os, signal, sys, threading, errno, warnings
from pathlib import Path
from xenmapcache import *
domain = MockHypervisor().create_domain(memory="16M")
backend = open_backend("mock", domain=domain)
cache = MapCache(backend, bucket_shift=16)

def in_child(work):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
        pid = os.fork()
    if not pid:
        try:
            work()
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0

def refused(error, call):
    try:
        call()
    except error as caught:
        return str(caught)
    raise AssertionError(f"{call} did not raise {error}")

def mappings():
    return Path("/proc/self/maps").read_text().count("xenmapcache-mock")
"""


def run(script: str) -> None:
    code = f"RACES = {RACES}\n" + PRELUDE + textwrap.dedent(script)
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-X", "faulthandler", "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


def test_the_harness_sees_failures() -> None:
    """A script that fails, or crashes, fails its test."""
    for script in ("assert False", "import ctypes; ctypes.string_at(0)"):
        with pytest.raises(AssertionError):
            run(script)


def test_a_forked_child_is_kept_out() -> None:
    """In a child the cache, its leases and its backend refuse; kept views are private zeros."""
    run("""
        lease = cache.map_dma(0x2000, 8, owner="disk0")
        wide = cache.map_device(0x20000, 0x40000, owner="vram")
        view = lease.view
        view[:] = b"guest's!"
        def child():
            for call in (lambda: cache.read(0x2000, 8), lambda: cache.write(0x2000, b"x"),
                         lambda: cache.map_dma(0, 8, owner="t"), cache.invalidate,
                         lambda: lease.view):
                assert "forked this one" in refused(ClosedError, call)
            assert bytes(view) == bytes(8)
            view[:] = b"child's!"
            wide_view = None
            lease.release()
            cache.close()
            gc.collect()
            assert {call.name for call in domain.calls} == {"map"}  # nothing marked, nor unmapped
        in_child(child)
        assert cache.read(0x2000, 8) == b"guest's!"
        assert bytes(wide.view[:8]) == bytes(8)
        assert not lease.released
        lease.release(); wide.release(); cache.close()
        assert mappings() == 1, mappings()  # the view that is kept
    """)


def test_a_child_of_a_busy_parent_is_not_stuck() -> None:
    """A lock that another thread held at the fork does not block the child's refusal."""
    run("""
        domain.inject_fault("map", delay=0.2)
        thread = threading.Thread(target=lambda: cache.read(0x2000, 1))
        locked = threading.Event()
        done = threading.Event()
        def hold():
            with cache._budget.lock:
                locked.set()
                done.wait()
        holder = threading.Thread(target=hold)
        holder.start(); locked.wait()
        for call in (lambda: cache.read(0x2000, 1), cache.invalidate,
                     lambda: cache.replace(0x1000, 0x2000, 8)):
            in_child(lambda: refused(ClosedError, call))
        in_child(cache.stats)
        done.set(); holder.join()
    """)


def test_a_lease_that_moves_under_a_reader() -> None:
    """While replace() goes over to scattered pages there is memory at the address, all the time."""
    run("""
        for page in range(64, 128, 2):
            domain.balloon_out(page << 12, 4096); domain.balloon_in(page << 12, 4096)
        view = cache.map_device(0x10000, 0x10000, owner="vram").view
        done = threading.Event()
        def look():
            while not done.is_set():
                bytes(view)
        thread = threading.Thread(target=look)
        thread.start()
        here, there = 0x10000, 0x40000
        for _ in range(350 * RACES):
            cache.replace(here, there, 0x10000)
            here, there = there, here
        done.set(); thread.join()
    """)


def test_a_limit_on_address_space_is_an_error() -> None:
    """RLIMIT_AS: resident buckets are given back, then XenCallError with ENOMEM says what to do."""
    run("""
        import resource
        used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
        resource.setrlimit(resource.RLIMIT_AS, (used + (8 << 20), resource.RLIM_INFINITY))
        for address in range(0, 16 << 20, 0x10000):
            cache.read(address, 1)
        assert cache.stats().evictions > 0
        lease = cache.map_device(0, 4 << 20, owner="t")
        message = refused(XenCallError, lambda: cache.map_device(0, 12 << 20, owner="t"))
        assert "ENOMEM" in message and "ulimit -v" in message, message
        assert len(cache.leases()) == 1
        lease.view[:4] = b"safe"
        assert domain.read(0, 4) == b"safe"
        lease.release(); cache.close()
    """)


def test_the_kernels_limit_on_mappings_is_an_error() -> None:
    """vm.max_map_count: the cache gives back and goes on; what is leased cannot, and it says so."""
    run("""
        import ctypes, logging, mmap
        limit = int(Path("/proc/sys/vm/max_map_count").read_text())
        if limit > 10_000_000:
            sys.exit()  # too many to reach in a test; RLIMIT_AS is the same path
        left = 2000
        guest = MockHypervisor().create_domain(memory=(left + 1000) << 12)
        source = open_backend("mock", domain=guest)
        # Every second page is protected, so that each is a mapping of its own: in less time than
        # the cache needs for as many.
        striped = mmap.mmap(-1, limit << 12)
        address = ctypes.addressof(ctypes.c_char.from_buffer(striped))
        libc = ctypes.CDLL(None)
        libc.mprotect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        for page in range(0, limit - left, 2):
            assert libc.mprotect(address + (page << 12), 4096, mmap.PROT_READ) == 0
        pages = MapCache(source, bucket_shift=12)
        for gfn in range(left + 500):
            pages.read(gfn << 12, 1)
        assert pages.stats().evictions > 0
        pages.close()
        held = MapCache(source, bucket_shift=12)
        try:
            for gfn in range(left + 500):
                held.map_dma(gfn << 12, 1, owner="t")
        except XenCallError as error:
            assert error.errno == errno.ENOMEM and "max_map_count" in str(error)
        else:
            raise AssertionError("no limit was reached")
        logging.disable()
        held.close(force=True)
        libc.mprotect(address, limit << 12, mmap.PROT_READ | mmap.PROT_WRITE)
    """)


def test_a_signal_handler_may_use_the_cache() -> None:
    """A handler that runs in the middle of a miss reads, leases and invalidates: no deadlock."""
    run("""
        seen = []
        def handler(*_):
            seen.append(cache.read(0x300000, 1))
            cache.map_dma(0x300000, 8, owner="signal").release()
            cache.invalidate()
        signal.signal(signal.SIGALRM, handler)
        original = backend.map
        def interrupted(*arguments, **options):
            backend.map = original
            signal.raise_signal(signal.SIGALRM)
            return original(*arguments, **options)
        backend.map = interrupted
        assert cache.read(0x300000, 1) == b"\\0"
        assert seen == [b"\\0"]
        with cache._budget.lock:
            signal.raise_signal(signal.SIGALRM)
        assert len(seen) == 2
    """)


def test_a_signal_handler_does_not_wait_for_a_thread_that_waits_for_it() -> None:
    """A handler that runs under the lock maps for itself what another thread is mapping."""
    run("""
        import faulthandler
        faulthandler.dump_traceback_later(60, exit=True)
        entered, go = threading.Event(), threading.Event()
        original = backend.map
        def slow(*arguments, **options):
            backend.map = original
            entered.set(); go.wait()
            return original(*arguments, **options)
        backend.map = slow
        thread = threading.Thread(target=lambda: cache.read(0x300000, 1))
        thread.start(); entered.wait()
        seen = []
        signal.signal(signal.SIGALRM, lambda *_: seen.append(cache.read(0x300000, 1)))
        with cache._budget.lock:
            go.set()
            signal.raise_signal(signal.SIGALRM)
        thread.join()
        assert seen == [b"\\0"]
        faulthandler.cancel_dump_traceback_later()
    """)


def test_a_child_that_python_did_not_make_unmaps_nothing() -> None:
    """Forked from C no hook runs; a mapping that dies there is still its parent's to unmap."""
    run("""
        import ctypes
        mapping = backend.map(0x10, 1, writable=True)
        pid = ctypes.PyDLL(None).fork()
        if not pid:
            del mapping
            os._exit([call.name for call in domain.calls].count("unmap"))
        assert os.waitpid(pid, 0)[1] == 0
        del mapping
        assert [call.name for call in domain.calls].count("unmap") == 1
    """)
