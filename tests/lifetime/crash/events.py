"""The columns of the matrix: what happens while something is kept or under way."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xenmapcache import Lease, LeaseError, MapCache, Mapping, MappingLostError, XenCallError

from .holds import SIZE, Hold
from .world import BUCKET, ELSEWHERE, LARGE, MOVED, PLACE, RESIDENT, World, content

_FRAMES = 80
"""How far from the recursion limit every operation still succeeds."""
_DEEPEST = sys.getrecursionlimit()
_ALLOCATIONS = 200
"""More than dropping and releasing need."""


def eviction(world: World, hold: Hold) -> None:
    """Everything that was resident has to go."""
    del hold
    before = world.cache.stats().evictions
    for address in range(ELSEWHERE, ELSEWHERE + 3 * RESIDENT, BUCKET):
        world.cache.read(address, 1)
    assert world.cache.stats().evictions >= before + RESIDENT // BUCKET


def close(world: World, hold: Hold) -> None:
    """LeaseError comes out where a lease is held, and then nothing has changed."""
    if hold.moves or world.cache.leases():
        try:
            world.cache.close()
        except LeaseError:
            if getattr(hold, "lease", None) is not None and hold.use() == "bytes":
                raise
            raise AssertionError("something has changed") from None
        raise AssertionError("closed over a lease")
    world.cache.close()


def _movable(world: World, hold: Hold) -> Lease | None:
    """Return the lease that moves if what is kept does not."""
    return None if hold.moves else world.cache.map_device(PLACE, SIZE, owner="moves")


def replace(world: World, hold: Hold) -> None:
    """A device lease shows another range from now on."""
    other = _movable(world, hold)
    world.cache.replace(PLACE, MOVED, SIZE)
    if other is not None:
        assert bytes(other.view) == content(MOVED, SIZE)
        other.release()


def replace_that_loses(world: World, hold: Hold) -> None:
    """MappingLostError comes out where it is what is kept that is lost."""
    other = _movable(world, hold)
    world.lose()
    try:
        world.cache.replace(PLACE, MOVED, SIZE)
    except MappingLostError:
        assert [lease.stale for lease in world.cache.leases() if not lease.direction] == [True]
        if other is None:
            raise
        other.release()
        return
    raise AssertionError("replace() has not failed")


def _interrupted(call: Callable[[], object]) -> None:
    try:
        call()
    except KeyboardInterrupt:
        return
    raise AssertionError("nobody was interrupted")


def interrupt_in_map(world: World, hold: Hold) -> None:
    """Ctrl-C comes when the backend has mapped and the cache has not got it yet."""
    del hold
    original = world.backend.map

    def mapped(gfn: int, count: int, *, writable: bool) -> Mapping:
        mapping = original(gfn, count, writable=writable)
        signal.raise_signal(signal.SIGINT)
        return mapping

    before = world.cache.stats().maps
    world.backend.map = mapped  # type: ignore[method-assign] # until it is deleted
    _interrupted(lambda: world.cache.read(ELSEWHERE, 1))
    del world.backend.map
    assert world.cache.stats().maps == before
    assert world.cache.read(ELSEWHERE, SIZE) == content(ELSEWHERE, SIZE)


def interrupt_in_release(world: World, hold: Hold) -> None:
    """Ctrl-C comes while written pages are reported: the lease is held still."""
    del hold
    lease = world.cache.map_dma(ELSEWHERE, SIZE, owner="interrupted")

    def report(gfn: int, count: int) -> None:
        signal.raise_signal(signal.SIGINT)

    world.backend.mark_dirty = report  # type: ignore[method-assign] # until it is deleted
    _interrupted(lease.release)
    del world.backend.mark_dirty
    assert not lease.released
    lease.release()


def limit_memory(world: World, hold: Hold) -> None:
    """Use up the address space: buckets are evicted, or the call fails with ENOMEM.

    What is mapped is larger than the room, and the room larger than what Python itself may need.
    A cache of its own has the budget for that.
    """
    del hold
    other = MapCache(world.backend)
    world.cache.invalidate()
    used = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * 4096
    hard = resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_AS, (used + LARGE // 2, hard))
    try:
        other.map_device(ELSEWHERE, LARGE, owner="too much")
    except XenCallError as error:
        assert error.errno == errno.ENOMEM
    else:
        raise AssertionError("it did fit")
    other.close()
    resource.setrlimit(resource.RLIMIT_AS, (used + LARGE, hard))
    eviction(world, Hold(world))
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def limit_files(world: World, hold: Hold) -> None:
    """No descriptor can be had: nothing of an open cache needs one."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))  # which all are in use
    world.cache.invalidate()
    with world.cache.map_dma(ELSEWHERE, SIZE, owner="t") as lease:
        assert bytes(lease.view) == content(ELSEWHERE, SIZE)
    eviction(world, hold)
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def fork(world: World, hold: Hold) -> str:
    """A child uses it, and ends as a Python does; for the parent nothing has changed."""
    source, target = os.pipe()
    pid = os.fork()
    if not pid:
        signal.alarm(30)
        try:
            said = hold.in_child()
        except Exception as error:
            said = type(error).__name__
        os.write(target, said.encode())
        raise SystemExit
    os.close(target)
    with os.fdopen(source) as file:
        said = file.read()
    assert os.waitpid(pid, 0)[1] == 0
    seen = hold.use()
    assert seen == "bytes", f"the parent sees {seen}"
    return said


def _use_and_drop(world: World) -> None:
    """Map, look, lease, release and drop."""
    view = next(world.cache.views(ELSEWHERE, SIZE))
    world.cache.map_dma(ELSEWHERE + BUCKET, SIZE, owner="t").release()
    del view
    world.cache.invalidate()


def _at_depth(depth: int, work: Callable[[], object]) -> None:
    if depth:
        _at_depth(depth - 1, work)
    else:
        work()


def near_the_recursion_limit(world: World, hold: Hold) -> None:
    """At every depth near the limit, memory is mapped, dropped and unmapped, or not."""
    del hold
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None  # finalizers meet the limit, too

    def deeper() -> None:
        for depth in range(_FRAMES):
            with contextlib.suppress(RecursionError):
                _at_depth(depth, lambda: _use_and_drop(world))

    _at_depth(_DEEPEST - _FRAMES, deeper)
    sys.unraisablehook = hook
    reached = False
    with contextlib.suppress(RecursionError):
        _at_depth(_DEEPEST, lambda: None)
        reached = True
    assert not reached


def failing_allocations(world: World, hold: Hold) -> None:
    """Python has no memory for the n-th object that dropping and releasing need."""
    del hold
    capi: Any = importlib.import_module("_testcapi")

    failed = 0
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None  # finalizers have no memory, too
    for number in range(_ALLOCATIONS):
        view = next(world.cache.views(ELSEWHERE, SIZE))
        lease = world.cache.map_dma(ELSEWHERE + BUCKET, SIZE, owner="t")
        capi.set_nomemory(number, number + 1)
        try:
            del view
            lease.release()
            world.cache.invalidate()
        except MemoryError:
            failed += 1
        finally:
            capi.remove_mem_hooks()
        if not lease.released:
            lease.release()
        del lease
    sys.unraisablehook = hook
    assert failed


EVENTS: dict[str, Callable[[World, Hold], object]] = {
    "eviction": eviction,
    "invalidate()": lambda world, _: world.cache.invalidate(),
    "close()": close,
    "close(force=True)": lambda world, _: world.cache.close(force=True),
    "backend close": lambda world, _: world.backend.close(),
    "domain end": lambda world, _: world.end(),
    "replace()": replace,
    "replace() that loses": replace_that_loses,
    "Ctrl-C in a map": interrupt_in_map,
    "Ctrl-C in a release": interrupt_in_release,
    "RLIMIT_AS": limit_memory,
    "RLIMIT_NOFILE": limit_files,
    "close to the recursion limit": near_the_recursion_limit,
    "the n-th allocation fails": failing_allocations,
    "a crash": lambda *_: ctypes.string_at(0),
}
