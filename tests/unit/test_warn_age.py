"""MapCache(warn_age=): a DMA lease that is held for too long is named, once, while it is held."""

from __future__ import annotations

import _thread
import gc
import logging
import math
import queue
import threading
import weakref
from collections.abc import Callable, Iterator

import pytest

from xenmapcache import Backend, MapCache
from xenmapcache.cache import starting
from xenmapcache.cache.ages import AgeWatch

AT = 0x200000
AGE = 5.0
PATIENCE_S = 60


class Clock:
    """A clock that a test sets forward."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("xenmapcache.cache.record._monotonic", clock)
    return clock


@pytest.fixture
def watch(cache: MapCache, clock: Clock) -> AgeWatch:
    """The watch of a cache, which a test asks itself."""
    return AgeWatch(cache._registry, AGE, clock)


@pytest.fixture
def told() -> Iterator[queue.SimpleQueue[str]]:
    """What is logged, for a test to wait for."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.put(record.getMessage())

    handler = Handler(logging.WARNING)
    logging.getLogger("xenmapcache").addHandler(handler)
    yield lines
    logging.getLogger("xenmapcache").removeHandler(handler)


def test_each_lease_is_named_once(
    cache: MapCache, clock: Clock, watch: AgeWatch, told: queue.SimpleQueue[str]
) -> None:
    """One WARNING when it becomes too old; device leases may be held for long."""
    assert watch.look() is None
    cache.map_device(AT, 8, owner="vga")
    assert watch.look() is None
    cache.map_dma(AT, 8, owner="disk0")
    clock.now = 2
    second = cache.map_dma(AT + 8, 8, owner="disk1")
    assert watch.look() == AGE - 2
    clock.now = 5
    assert watch.look() == 2
    text = told.get_nowait()
    assert text.startswith("held for longer than warn_age, 5 s: DMA lease of 'disk0': address ")
    assert "thread 'MainThread'" in text
    second.release()
    clock.now = 100
    assert watch.look() is None
    assert told.empty()


def test_a_lease_that_ends_meanwhile_is_not_named(
    cache: MapCache, clock: Clock, watch: AgeWatch, told: queue.SimpleQueue[str]
) -> None:
    """It is on the list that the thread has taken, and is released before its turn."""
    cache.map_dma(AT, 8, owner="t")
    (record,) = cache._registry.held()
    clock.now = AGE
    record.view = None
    assert watch.look() is None
    assert told.empty()


def test_a_forked_child_has_nothing_to_look_at(
    cache: MapCache, clock: Clock, watch: AgeWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The leases are its parent's."""
    cache.map_dma(AT, 8, owner="t")
    clock.now = AGE
    monkeypatch.setattr(type(cache._table), "forked", True)
    assert watch.look() is None


@pytest.mark.parametrize(
    ("age", "error"),
    [
        (0, ValueError),
        (-1.0, ValueError),
        (math.nan, ValueError),
        (math.inf, ValueError),
        ("5", TypeError),
        (True, TypeError),
    ],
)
def test_ages_that_are_none(backend: Backend, age: float, error: type[Exception]) -> None:
    """An age is a number of seconds above 0."""
    with pytest.raises(error, match="warn_age must be"):
        MapCache(backend, warn_age=age)


# --- the thread ---------------------------------------------------------------------------


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """What would run in threads; a test runs it itself."""
    threads: list[Callable[[], None]] = []

    def start(function: Callable[[], None], _: tuple[()]) -> int:
        threads.append(function)
        return len(threads)

    monkeypatch.setattr(_thread, "start_new_thread", start)
    return threads


def waits(watch: AgeWatch, monkeypatch: pytest.MonkeyPatch, *steps: Callable[[], object]) -> None:
    """Let the thread's waiting be the steps, one after the other."""
    left = list(steps)

    def ended(_: float) -> bool:
        return bool(left.pop(0)())

    monkeypatch.setattr(watch, "_ended", ended)


def test_a_cache_without_dma_has_no_thread(
    backend: Backend, started: list[Callable[[], None]]
) -> None:
    """Without the option there is none at all; with it, the first DMA lease starts one."""
    with MapCache(backend) as cache:
        cache.map_dma(AT, 8, owner="t").release()
    with MapCache(backend, warn_age=AGE) as cache:
        cache.map_device(AT, 8, owner="t").release()
        assert not started
        for _ in range(3):
            cache.map_dma(AT, 8, owner="t").release()
        assert len(started) == 1


def test_the_thread_ends_when_no_lease_can_become_too_old(
    cache: MapCache,
    clock: Clock,
    watch: AgeWatch,
    started: list[Callable[[], None]],
    told: queue.SimpleQueue[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It waits an age, then for what is left, and ends; the next lease starts another one."""
    pauses = []

    def ended(seconds: float) -> bool:
        pauses.append(seconds)
        clock.now += seconds
        return False

    monkeypatch.setattr(watch, "_ended", ended)
    clock.now = 1
    cache.map_dma(AT, 8, owner="t")
    watch.begin()
    clock.now = 0.9
    started.pop()()
    assert pauses == [AGE, AGE / 10]  # not the tenth of a second that was left
    assert "held for longer" in told.get_nowait()
    assert not started
    watch.begin()
    assert len(started) == 1


def test_a_lease_that_comes_while_the_thread_ends_gets_another_one(
    cache: MapCache,
    watch: AgeWatch,
    started: list[Callable[[], None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The lease has found no token; the thread looks again after it has put it back."""
    waits(watch, monkeypatch, lambda: False)
    watch.begin()
    look = watch.look

    def late() -> float | None:
        due = look()
        cache.map_dma(AT, 8, owner="late")
        watch.begin()
        return due

    monkeypatch.setattr(watch, "look", late)
    started.pop()()
    assert len(started) == 1


def test_a_thread_that_cannot_start_costs_no_lease(
    cache: MapCache, watch: AgeWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next lease tries again."""

    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_thread, "start_new_thread", refuse)
    watch.begin()
    watch.begin()
    assert watch._idle == [None]


def test_a_handler_that_raises_after_the_start_comes_out(
    watch: AgeWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread has started: its token is not put back by anyone else."""

    def steps(*_: object) -> Iterator[object]:
        yield watch._idle.pop()
        yield 1  # as the start of a thread returns
        raise RuntimeError("a handler's")

    monkeypatch.setattr(starting, "map", steps, raising=False)
    with pytest.raises(RuntimeError, match="a handler's"):
        watch.begin()
    assert not watch._idle


def test_the_end_of_the_registry_wakes_the_thread(backend: Backend) -> None:
    """Then there is nothing to look at, and it ends."""
    cache = MapCache(backend)
    watch = AgeWatch(cache._registry, AGE)
    assert not watch._ended(0.001)
    del cache
    gc.collect()
    assert watch.look() is None
    watch._idle.clear()
    watch._run()
    assert watch._idle == [None]


def test_the_real_thread_warns_and_keeps_no_cache(
    backend: Backend, told: queue.SimpleQueue[str]
) -> None:
    """It wakes by itself; and when the registry dies, it ends, however long it would wait."""
    cache = MapCache(backend, warn_age=0.01, record_origin=True)
    lease = cache.map_dma(AT, 8, owner="disk0")
    text = told.get(timeout=PATIENCE_S)
    assert "DMA lease of 'disk0'" in text
    assert text.endswith("in test_the_real_thread_warns_and_keeps_no_cache")
    lease.release()
    cache.close()
    ended = threading.Event()
    cache = MapCache(backend, warn_age=1e6)
    watch = cache._parts.leasing.ages
    assert watch is not None
    run = watch._run

    def run_and_tell() -> None:
        run()
        ended.set()

    watch._idle.clear()
    _thread.start_new_thread(run_and_tell, ())
    registry = weakref.ref(cache._registry)
    del cache, lease
    gc.collect()
    assert registry() is None
    assert ended.wait(PATIENCE_S)


def test_a_log_filter_that_raises_costs_one_line(
    cache: MapCache,
    clock: Clock,
    watch: AgeWatch,
    told: queue.SimpleQueue[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The other leases get their WARNINGs, and the thread goes on."""

    def once(record: logging.LogRecord) -> bool:
        logger.removeFilter(once)
        raise RuntimeError("the filter is broken")

    logger = logging.getLogger("xenmapcache")
    cache.map_dma(AT, 8, owner="disk0")
    cache.map_dma(AT, 8, owner="disk1")
    clock.now = AGE
    logger.addFilter(once)
    assert watch.look() is None
    assert "'disk1'" in told.get(timeout=PATIENCE_S)
    assert told.empty()
    assert "the filter is broken" in capsys.readouterr().err
