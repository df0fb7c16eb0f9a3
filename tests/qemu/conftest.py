"""Guests whose pages all differ, a cache over each, and how much work a call is."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING

import pytest

from tests.conformance.guests import Guest, open_guest
from tests.fake_xen.fixtures import make_fake
from xenmapcache import Backend, MapCache, MockDomain
from xenmapcache.address import PAGE_MASK, PAGE_SIZE, page_span

if TYPE_CHECKING:
    from _typeshed import TraceFunction

__all__ = ["make_fake"]

HERE = ("mock", "fake-xen-cffi")
LIVE = pytest.param("xen-cffi", marks=pytest.mark.xen)

made_here = pytest.mark.parametrize("guest", HERE, indirect=True)
# Where the stand-in for Xen's libraries would only run the same code again.
mock_and_live = pytest.mark.parametrize("guest", ["mock", LIVE], indirect=True)


@pytest.fixture(params=[*HERE, LIVE])
def guest(request: pytest.FixtureRequest) -> Iterator[Guest]:
    """A guest of which no two pages are the same, so that a wrong address shows."""
    for guest in open_guest(request.param, request):
        if guest.write is not None:
            for page in range(guest.pages):
                guest.write(guest.address + page * PAGE_SIZE, content(page))
        yield guest


@pytest.fixture
def cache(guest: Guest) -> Iterator[MapCache]:
    """A cache over the guest, with buckets of 1 MiB, as QEMU's on 64-bit hosts."""
    cache = MapCache(guest.backend)
    yield cache
    cache.close(force=True)


@pytest.fixture
def connected(domain: MockDomain, backend: Backend) -> Iterator[MapCache]:
    """Such a cache over the mock's `domain`, which is asked when that guest balloons."""
    cache = MapCache(backend)
    domain.on_invalidate(cache.invalidate)
    yield cache
    cache.close(force=True)


def content(page: int) -> bytes:
    """What a page of a guest made here holds."""
    return (page + 1).to_bytes(8, "little") * (PAGE_SIZE // 8)


def fresh(guest: Guest, address: int, length: int) -> bytes:
    """What a guest has somewhere, seen through a mapping that is made for the purpose."""
    mapping = guest.backend.map(*page_span(address, length), writable=False)
    return bytes(mapping.view(address & PAGE_MASK, length))


def lines_of(work: Callable[[], object]) -> int:
    """How many lines of Python something runs: what it costs, without a clock."""
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> TraceFunction:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    gc.disable()  # a collection is followed by a sweep, whose lines are not the work's
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
        gc.enable()
    return count
