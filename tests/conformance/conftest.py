"""One fixture: every source of guest memory that there is, one after the other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fake_xen.fixtures import make_fake
from xenmapcache import Capability, MapCache

from .guests import IMAGES, Guest, open_guest

__all__ = ["make_fake"]

HERE = (
    "mock",
    "fake-xen-cffi",
    "fake-xen-ctypes",
    "fake-xenctrl-cffi",
    "fake-xenctrl-ctypes",
    *IMAGES,
)
QUICK = ("mock", "fake-xen-cffi", "coredump-pv", "raw", "elfcore-unaligned", "kdump")
"""Enough for ``make test-quick``: one of each way to map or read, and of each shape of an index."""
LIVE = ("xen-cffi", "xen-ctypes", "xenctrl-cffi", "xenctrl-ctypes")


def _param(name: str) -> object:
    if name in LIVE:
        return pytest.param(name, marks=pytest.mark.xen)
    return name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)


@pytest.fixture(params=map(_param, (*HERE, *LIVE)))
def guest(request: pytest.FixtureRequest) -> Iterator[Guest]:
    """An open guest."""
    yield from open_guest(request.param, request)


@pytest.fixture
def scratch(guest: Guest) -> Guest:
    """A guest whose memory may be changed, and is seen from its own side."""
    if not guest.scratch:
        pytest.skip("a live guest's memory is not ours to change")
    return guest


@pytest.fixture
def writable(guest: Guest) -> Guest:
    """A guest that can be written."""
    if Capability.WRITE not in guest.backend.capabilities:
        pytest.skip(f"the backend {guest.backend.name!r} is read-only")
    return guest


@pytest.fixture
def cache(guest: Guest) -> Iterator[MapCache]:
    """A cache over the guest, with buckets of 1 MiB."""
    cache = MapCache(guest.backend)
    yield cache
    cache.close(force=True)
