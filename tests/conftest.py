"""Fixtures for tests over the mock: a guest of 16 MiB with a hole, its backend, and a cache."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from xenmapcache import Backend, MapCache, MockDomain, MockHypervisor, open_backend

pytest_plugins = ["tests.xen.plugin"]

# A shell starts what it puts into the background with Ctrl-C ignored, and so would be all that
# the tests start: then nothing could be interrupted.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

HOLE = (0xA0000, 0x20000)
"""Address and length of the hole that the guest has, as every PC has."""


@pytest.fixture
def domain() -> MockDomain:
    return MockHypervisor().create_domain(memory="16M", holes=[HOLE])


@pytest.fixture
def backend(domain: MockDomain) -> Iterator[Backend]:
    with open_backend("mock", domain=domain) as backend:
        yield backend


@pytest.fixture
def cache(backend: Backend) -> Iterator[MapCache]:
    """A cache of 64 KiB buckets, so that edges are near."""
    cache = MapCache(backend, bucket_shift=16)
    yield cache
    cache.close(force=True)
