"""Fixtures for tests over the mock: a guest of 16 MiB with a hole, its backend, and a cache."""

from __future__ import annotations

import gc
import signal
from collections.abc import Iterator

import pytest

from xenmapcache import Backend, MapCache, MockDomain, MockHypervisor, open_backend

pytest_plugins = ["tests.xen.plugin", "tests.images.lab.plugin"]

# A shell starts what it puts into the background with Ctrl-C and Ctrl-\ ignored, nohup with SIGHUP,
# and so would be all that the tests start: then nothing could be interrupted.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
for ignored in (signal.SIGQUIT, signal.SIGHUP):
    if signal.getsignal(ignored) is signal.SIG_IGN:
        signal.signal(ignored, signal.SIG_DFL)


def _freeze() -> None:
    """Let a collection, of which tests do many, not look at what lives to the end."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(hookwrapper=True)  # Dom0's pytest is older than wrapper=True
def pytest_collection() -> Iterator[None]:
    """Without the collector: what modules make as they are imported lives to the end."""
    gc.disable()
    yield
    gc.enable()


def pytest_collection_finish() -> None:
    _freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """After each file, because its tests import what no other needs."""
    if nextitem is not None and nextitem.path != item.path:
        _freeze()


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
