"""Threads: the hammer in a process of its own, and what it found, one by one.

``XENMAPCACHE_THREADS=60`` lets the hammer run for 60 seconds.
"""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.effort import RACES
from xenmapcache import Backend, MapCache, MockDomain, XenCallError

from .hammer import Values

pytestmark = pytest.mark.slow

BUCKET = 1 << 16


def test_four_threads_on_a_ballooning_guest() -> None:
    """No crash, no value torn or never written, one warning a lease, and nothing is left over."""
    seconds = os.environ.get("XENMAPCACHE_THREADS")
    limits = (
        ["--seconds", seconds, "--operations", str(10**9)]
        if seconds
        else ["--operations", str(700 * RACES), "--seconds", "60"]
    )
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-m", "tests.lifetime.hammer", *limits],
        capture_output=True,
        text=True,
        timeout=120 + 2 * float(seconds or 0),
        check=False,
    )
    print(done.stdout)  # noqa: T201 - the seed, where it fails
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


@pytest.mark.parametrize(
    "data",
    [
        lambda one, two: one[:4] + two[4:],
        lambda one, two: two[:3] + one[3:],
        lambda one, two: bytes([one[0] ^ 1]) + one[1:],
        lambda one, two: b"\xff" * 8,
        lambda one, two: bytes(8),
    ],
)
def test_the_hammer_recognises_a_wrong_value(data: Callable[[bytes, bytes], bytes]) -> None:
    """Halves of two values, a flipped bit, and zeros where no page went away."""
    values = Values()
    one = [values.make(0x1008, 8, 1) for _ in range(300)][-1]
    two = values.make(0x1008, 8, 2)
    values.check(0x1008, one)
    values.check(0x1008, two)
    with pytest.raises(AssertionError):
        values.check(0x1010, one)
    with pytest.raises(AssertionError):
        values.check(0x1008, data(one, two))


@contextmanager
def sleeping(work: Callable[[], object]) -> Iterator[None]:
    """Have something done by another thread, which then sleeps until the end of the block."""
    done, end = threading.Event(), threading.Event()

    def run() -> None:
        try:
            work()
        finally:
            done.set()
        end.wait()

    thread = threading.Thread(target=run)
    thread.start()
    done.wait()
    try:
        yield
    finally:
        end.set()
        thread.join()


def test_what_is_dropped_does_not_wait_for_who_made_the_cache(backend: Backend) -> None:
    """Without a GIL the dictionary of buckets lived on while its thread slept, and they with it."""
    caches: list[MapCache] = []
    with sleeping(lambda: caches.append(MapCache(backend, bucket_shift=16))):
        (cache,) = caches
        cache.read(0, 1)
        cache.read(0, 1)
        cache.invalidate()
        assert cache.stats().resident_bytes == 0
        cache.read(0, 1)
        cache.close()
        assert cache.stats().resident_bytes == 0


def test_what_a_sleeping_thread_mapped_makes_room(backend: Backend) -> None:
    """Without a GIL its mappings die when it wakes, unless room is needed before."""
    cache = MapCache(backend, bucket_shift=16, max_resident=4 * BUCKET)

    def read() -> None:
        for index in range(4):
            cache.read(index * BUCKET, 1)

    with sleeping(read):
        for index in range(4, 8):
            cache.read(index * BUCKET, 1)
        assert cache.stats().resident_bytes <= 4 * BUCKET
    cache.close()


class InvalidateMeanwhile(logging.Filter):
    """At the first record, lets another thread invalidate, and waits for that."""

    def __init__(self, cache: MapCache) -> None:
        super().__init__()
        self.cache: MapCache | None = cache
        self.count = 0

    def filter(self, record: logging.LogRecord) -> bool:
        self.count += record.msg.startswith("invalidation")
        cache, self.cache = self.cache, None
        if cache is not None:
            thread = threading.Thread(target=cache.invalidate)
            thread.start()
            thread.join()
        return True


def test_two_invalidations_at_once_warn_once(backend: Backend) -> None:
    """A lease that both find held is warned of by one of them."""
    cache = MapCache(backend, bucket_shift=16)
    lease = cache.map_dma(0, 8, owner="t")
    logger = logging.getLogger("xenmapcache")
    meanwhile = InvalidateMeanwhile(cache)
    logger.addFilter(meanwhile)
    try:
        cache.invalidate()
    finally:
        logger.removeFilter(meanwhile)
    assert meanwhile.count == 1
    lease.release()


def test_the_mock_counts_what_many_threads_unmap(domain: MockDomain, backend: Backend) -> None:
    """A destroyed domain is gone after the last unmap, in any thread."""
    start = threading.Barrier(4)

    def work() -> None:
        start.wait()
        for _ in range(2000):
            backend.map(1, 1, writable=False)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    domain.destroy()
    with pytest.raises(XenCallError, match="no such domain"):
        backend.map(1, 1, writable=False)
