"""Resources of C: released by their last user, once, after all finalizers, whatever interrupts."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import inspect
import os
import signal
import sys
import threading
import warnings
import weakref
from collections.abc import Iterable, Iterator
from functools import partial

import pytest

from tests.descriptors import open_files
from tests.fake_xen import DOMID, Behaviour, FakeXen
from tests.fake_xen.child import in_child
from xenmapcache.binding import resource
from xenmapcache.binding.foreignmemory import ForeignMemory
from xenmapcache.binding.resource import Resource, sweep
from xenmapcache.errors import ClosedError

CLOSE = "xenforeignmemory_close"


def released_into(released: list[int], needs: object = None) -> Resource:
    """Return a resource whose release appends the pointer to a list."""
    return Resource(partial(map, released.append), needs)


def test_a_resource_is_released_by_its_last_user() -> None:
    """Once; what it needs is dropped afterwards."""
    released: list[int] = []
    needed = released_into(released)
    needed.pointers.append(1)
    made = released_into(released, needed)
    made.pointers.append(2)
    del needed
    user = [made]
    del made
    assert (released, user[0].pointer) == ([], 2)
    user.clear()
    sweep()
    assert released == [2, 1]


@pytest.mark.parametrize("result", [[], [0], [None]])
def test_what_c_has_not_given_out_is_not_released(result: list[int]) -> None:
    """Neither before the call, nor if it has returned NULL."""
    released: list[int] = []
    made = released_into(released)
    made.pointers.extend(result)
    assert made.pointer is None
    del made
    assert released == []
    assert not [record for record in resource._live if record() is None]


def test_the_collector_does_not_know_resources() -> None:
    """Otherwise it would release before finalizers of the cycle have run."""
    assert not gc.is_tracked(released_into([]))


def test_a_release_that_fails_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the weak reference's callback had no memory, say."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    released: list[int] = []
    failing = [True]

    def release(pointers: Iterable[int]) -> Iterator[object]:
        if failing:
            raise MemoryError(failing.pop())
        return map(released.append, pointers)

    made = Resource(release)
    made.pointers.append(5)
    del made
    assert released == []
    sweep()
    assert released == [5]


def test_a_release_that_cannot_begin_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The record is put back."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    released: list[int] = []

    def fail_first(pointers: Iterator[int]) -> Iterator[object]:
        if not failed:
            failed.append(True)
            raise MemoryError
        yield from map(released.append, pointers)

    failed: list[bool] = []
    made = Resource(fail_first)  # type: ignore[arg-type] # given an iterator
    made.pointers.append(5)
    del made
    assert (released, failed) == ([], [True])
    gc.collect()
    assert released == [5]


def test_a_resource_that_another_thread_releases_is_left_alone() -> None:
    """Exactly one party takes the record out of the table."""
    released: list[int] = []
    made = released_into(released)
    made.pointers.append(5)
    (record,) = (each for each in resource._live if each() is made)

    def as_another_thread(pointers: Iterable[int]) -> Iterator[object]:
        resource._live.pop(record)
        return map(released.append, pointers)

    record.release = as_another_thread
    del made
    assert (released, record in resource._live) == ([], False)


def test_no_stack_depth_loses_a_resource(monkeypatch: pytest.MonkeyPatch) -> None:
    """Near the recursion limit the hint may be lost; the table is swept."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    released: list[int] = []

    def drop_at(depth: int) -> None:
        if depth:
            drop_at(depth - 1)
        else:
            held.pop()

    held: list[Resource] = []
    limit = sys.getrecursionlimit() - len(inspect.stack())
    depths = range(limit - 60, limit + 2)
    for depth in depths:
        held.append(released_into(released))
        held[0].pointers.append(depth)
        with contextlib.suppress(RecursionError):
            drop_at(depth)
        held.clear()
    sweep()
    assert sorted(released) == list(depths)


def test_a_child_that_c_code_forked_releases_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python was not told of the fork."""
    released: list[int] = []
    made = released_into(released)
    made.pointers.append(5)
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 1)
        del made
    assert released == []
    sweep()
    assert released == [5]


def test_a_forked_child_releases_nothing() -> None:
    """It is the parent's."""
    released: list[int] = []
    held = [released_into(released)]
    held[0].pointers.append(5)

    def drop() -> bool:
        held.clear()
        gc.collect()
        return not released

    assert in_child(drop) == 0
    held.clear()
    assert released == [5]


# --- handles ------------------------------------------------------------------------


class User:
    """Is collected in a cycle, and uses the handle in its finalizer."""

    def __init__(self, memory: ForeignMemory, seen: list[int]) -> None:
        self.memory = memory
        self.seen = seen
        self.itself = self

    def __del__(self) -> None:
        self.seen.append(self.memory.resource_size(DOMID, 1, 2))


def test_a_finalizer_of_a_cycle_can_use_the_handle(fake: FakeXen, binding: str) -> None:
    """The collector finalizes in any order; C's handle is closed after all."""
    seen: list[int] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        for _ in range(4):
            User(ForeignMemory(binding=binding, library=fake.library), seen)
        gc.collect()
    assert (len(seen), fake.count(CLOSE), fake.misuses) == (4, 4, 0)


def test_a_kept_traceback_does_not_keep_the_handle_open(fake: FakeXen, binding: str) -> None:
    """Not even that of an exception that came out of the call."""
    memory = ForeignMemory(binding=binding, library=fake.library)
    with pytest.raises(OverflowError) as kept:
        memory.restrict(-1)
    memory.close()
    assert (kept.type, fake.count(CLOSE)) == (OverflowError, 1)


def test_the_logger_is_freed_after_the_handle(fake: FakeXen, binding: str) -> None:
    """C's handle writes to it until it is closed."""
    memory = ForeignMemory(binding=binding, library=fake.library)
    opened = memory._opened
    assert opened is not None
    if memory._log.logger is None:
        memory.close()
        pytest.skip("libxentoollog is not installed (Debian: libxentoollog1)")
    logger = weakref.ref(memory._log.logger)
    memory.close()
    kept = logger() is not None
    del opened
    assert (kept, logger(), fake.count(CLOSE)) == (True, None, 1)


@pytest.mark.timeout(60)
def test_ctrl_c_while_the_library_opens(fake: FakeXen, binding: str) -> None:
    """What it has opened is closed."""
    ForeignMemory(binding=binding, library=fake.library).close()
    before, handles = open_files(), fake.handles

    def press() -> None:
        fake.wait_until_blocked()
        os.kill(os.getpid(), signal.SIGINT)
        fake.unblock()

    fake.plan("xenforeignmemory_open", Behaviour.BLOCK)
    thread = threading.Thread(target=press)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        ForeignMemory(binding=binding, library=fake.library)
    thread.join()
    gc.collect()  # the traceback may have kept the handle
    assert (open_files(), fake.handles) == (before, handles)


def test_a_closed_handle_is_an_error(fake: FakeXen, binding: str) -> None:
    """Also in a finalizer."""
    memory = ForeignMemory(binding=binding, library=fake.library)
    memory.close()
    with pytest.raises(ClosedError, match="is closed"):
        memory.restrict(DOMID)


def test_an_error_of_a_handler_is_not_that_of_another_thread() -> None:
    """A KeyError that a signal handler raises after the release comes out of it."""

    def handle(*_: object) -> None:
        raise KeyError("the handler's")

    previous = signal.signal(signal.SIGUSR1, handle)
    try:
        # The release sends the signal from C; the handler runs when C returns.
        made = Resource(partial(map, getattr(ctypes.CDLL(None), "raise")))
        made.pointers.append(int(signal.SIGUSR1))
        record = list(resource._live)[-1]
        with pytest.raises(KeyError, match="the handler's"):
            resource._release(record)
        assert record not in resource._live
    finally:
        signal.signal(signal.SIGUSR1, previous)
