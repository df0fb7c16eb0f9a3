"""The pytest plugin: fixtures for tests of device models, on the mock.

pytest finds it through the entry point ``xenmapcache``; ``-p no:xenmapcache`` leaves it out.
The plugin is a module of its own, outside the package. pytest imports the plugin in every project
of an environment, and an import from the package would import all of the package.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from xenmapcache import MapCache, MockDomain, MockHypervisor
    from xenmapcache.devicemodel import IoreqServer
    from xenmapcache.mock import PciDriver

_FAILED = pytest.StashKey[bool]()


def pytest_configure(config: pytest.Config) -> None:
    """Declare the markers, for --strict-markers and --markers."""
    config.addinivalue_line(
        "markers",
        "mock_domain(**options): how the fixture mock_domain makes its guest, for example "
        "memory='16M', holes=[(0xA0000, 0x20000)], vcpus=2, type='pvh' (xenmapcache)",
    )
    config.addinivalue_line(
        "markers",
        "map_cache(**options): how the fixture map_cache makes its cache, for example "
        "on_stale='copy', bucket_shift=16 (xenmapcache)",
    )
    config.addinivalue_line(
        "markers",
        "ioreq_server(**options): how the fixture ioreq_server makes its server, for example "
        "buffered=True (xenmapcache)",
    )


# Neither tryfirst nor trylast: pytest's own hook for unittest sets the exception first, and the
# hook that makes the report is called last.
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """Remember whether a test ended with an exception."""
    if call.when != "teardown":
        item.stash[_FAILED] = call.excinfo is not None


@pytest.fixture
def mock_hypervisor() -> MockHypervisor:
    """A mock Xen without domains."""
    from xenmapcache import MockHypervisor

    return MockHypervisor()


@pytest.fixture
def mock_domain(
    request: pytest.FixtureRequest, mock_hypervisor: MockHypervisor
) -> Iterator[MockDomain]:
    """A mock guest of 64 MiB with one vCPU.

    ``@pytest.mark.mock_domain(memory="16M", holes=[(0xA0000, 0x20000)], vcpus=2)`` changes that.
    Markers of a module, a class and a test add up; the nearest wins.
    After the test the guest's code is joined that ``mock_domain.spawn`` started. What it raised
    fails the test.
    """
    domain = mock_hypervisor.create_domain(**_options(request, "mock_domain"))
    yield domain
    domain.join()


@pytest.fixture
def map_cache(request: pytest.FixtureRequest, mock_domain: MockDomain) -> Iterator[MapCache]:
    """A map cache of ``mock_domain``. The cache is invalidated when the domain balloons.

    While the domain has an ioreq server, the server invalidates the cache, after its callbacks.
    After the test the cache is closed. If a lease is still held then, the test fails and names the
    thread and the line that took it, unless it has failed anyway.
    ``@pytest.mark.map_cache(on_stale="copy", strict_views=True)`` has options of
    :class:`xenmapcache.MapCache`.
    """
    from xenmapcache import ClosedError, MapCache, open_backend

    with open_backend("mock", domain=mock_domain) as backend:
        options = {"record_origin": True} | _options(request, "map_cache")
        cache = MapCache(backend, **options)

        def invalidate() -> None:
            if any(server.enabled for server in list(mock_domain.ioreq_servers.values())):
                return
            with suppress(ClosedError):  # a shared domain outlives the cache
                cache.invalidate()

        mock_domain.on_invalidate(invalidate)
        yield cache
        held = cache.leases()
        cache.close(force=True)
        if held and not request.node.stash.get(_FAILED, False):
            names = "\n".join(f"  {info}" for info in held)
            pytest.fail(f"leases are held at the end of the test:\n{names}", pytrace=False)


@pytest.fixture
def ioreq_server(
    request: pytest.FixtureRequest, mock_domain: MockDomain, map_cache: MapCache
) -> Iterator[IoreqServer]:
    """An ioreq server of ``mock_domain``, open, and served by a thread until the test ends.

    The test claims what its devices answer for. Code that ``mock_domain.spawn`` started is joined
    while the server still answers.
    ``@pytest.mark.ioreq_server(buffered=True)`` has options of
    :class:`xenmapcache.devicemodel.IoreqServer`.
    """
    from xenmapcache.devicemodel import IoreqServer

    server = IoreqServer(mock_domain, map_cache, **_options(request, "ioreq_server"))
    with server, server.serving():
        yield server
        mock_domain.join()


@pytest.fixture
def pci_guest(
    mock_domain: MockDomain,
    ioreq_server: IoreqServer,  # noqa: ARG001 - it serves while the guest looks for functions
) -> PciDriver:
    """The PCI code of ``mock_domain``, which finds and enables what ``ioreq_server`` has claimed.

    ``pci_guest.domain`` is ``mock_domain``.
    """
    from xenmapcache.mock import PciDriver

    return PciDriver(mock_domain)


def _options(request: pytest.FixtureRequest, name: str) -> dict[str, Any]:
    """Return the keyword arguments of a test's markers of a name, the nearest last."""
    options: dict[str, Any] = {}
    for marker in reversed(list(request.node.iter_markers(name))):
        if marker.args:
            raise TypeError(f"the marker {name} takes keyword arguments, not {marker.args!r}")
        options |= marker.kwargs
    return options
