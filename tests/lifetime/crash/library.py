"""A library that misbehaves, and what the cache makes of it."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from tests.fake_xen import Behaviour
from xenmapcache import MapCache

from .holds import SIZE, named
from .world import BUCKET, PLACE, UNDER_WAY, FakeWorld, content

_PLANS = {
    "NULL, an errno": (Behaviour.FAIL, errno.EPERM),
    "NULL, errno 0": (Behaviour.FAIL, 0),
    "err[] of the other sign": (Behaviour.SIGN, 0),
    "a pointer, all pages failed": (Behaviour.ALL_PAGES, errno.EINVAL),
    "a pointer, all pages refused": (Behaviour.ALL_PAGES, errno.EPERM),
    "a pointer, all pages ESRCH": (Behaviour.ALL_PAGES, errno.ESRCH),
    "err[] half written": (Behaviour.PARTIAL, 0),
    "a pointer to no page's begin": (Behaviour.ASKEW, 0),
    "blocks": (Behaviour.BLOCK, 0),
    "blocks, Ctrl-C": (Behaviour.BLOCK, 0),
}
ADDRESS = UNDER_WAY + BUCKET - 2 * SIZE
"""In the last page of a bucket, that of which a half-written err[] says nothing."""


def _views(cache: MapCache) -> bytes:
    return b"".join(bytes(view) for view in cache.views(ADDRESS, SIZE))


def _read_into(cache: MapCache) -> bytes:
    buffer = bytearray(SIZE)
    cache.read_into(ADDRESS, buffer)
    return bytes(buffer)


def _write(cache: MapCache) -> bytes:
    cache.write(ADDRESS, content(ADDRESS, SIZE))
    return cache.read(ADDRESS, SIZE)


def _map_dma(cache: MapCache) -> bytes:
    with cache.map_dma(ADDRESS, SIZE, owner="t") as lease:
        return bytes(lease.view)


def _map_device(cache: MapCache) -> bytes:
    with cache.map_device(ADDRESS, SIZE, owner="t") as lease:
        return bytes(lease.view)


def _prepare_copy(cache: MapCache) -> Callable[[], bytes]:
    lease = cache.map_dma(ADDRESS, SIZE, owner="t")
    cache.invalidate()

    def release() -> bytes:
        lease.release()
        return content(ADDRESS, SIZE)

    return release


_WORK: dict[str, Callable[[MapCache], bytes]] = {
    "read": lambda cache: cache.read(ADDRESS, SIZE),
    "read_into": _read_into,
    "write": _write,
    "views": _views,
    "map_dma": _map_dma,
    "map_device": _map_device,
}


def _prepared(world: FakeWorld, operation: str) -> Callable[[], bytes]:
    if operation == "release with copy":
        return _prepare_copy(world.cache)
    return lambda: _WORK[operation](world.cache)


def misbehave(world: FakeWorld, operation: str, behaviour: str) -> str:
    """Let the library misbehave in an operation, and then behave; return what came of it."""
    cache = world.cache
    work = _prepared(world, operation)
    other: Any = None
    if behaviour.startswith("blocks"):
        cache.read(PLACE, 1)
        other = threading.Thread(target=_meanwhile, args=(world, "Ctrl-C" in behaviour))
        other.start()
    if behaviour == "err[] of the other sign":
        world.fake.set_error(errno.EINVAL, ADDRESS >> 12)
    world.fake.plan("xenforeignmemory_map2", *_PLANS[behaviour])
    try:
        said = named(work(), ADDRESS)
    except (Exception, KeyboardInterrupt) as error:
        said = type(error).__name__
    if other is not None:
        other.join()
    world.fake.set_error(0, ADDRESS >> 12)
    assert cache.read(ADDRESS, SIZE) == content(ADDRESS, SIZE)
    cache.close(force=True)
    return said


def _meanwhile(world: FakeWorld, interrupt: bool) -> None:
    """While the library blocks, use the cache in another thread; then let it continue."""
    world.fake.wait_until_blocked()
    assert world.cache.read(PLACE, SIZE) == content(PLACE, SIZE)
    world.cache.map_dma(PLACE, SIZE, owner="other").release()
    if interrupt:
        os.kill(os.getpid(), signal.SIGINT)
    world.fake.unblock()
