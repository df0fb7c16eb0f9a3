"""A guest with a server, its device, and a thread that serves."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator

import pytest

from tests.devicemodel.virtio_kit import Line
from tests.kit import Memory
from xenmapcache import MapCache, MockDomain, MockHypervisor, open_backend
from xenmapcache.devicemodel import DmaEngine, IoreqServer
from xenmapcache.devicemodel.watch import Watcher

PORT, MMIO, VGA, PCI = 0x510, 0xF000_0000, 0xA0000, "0000:00:05.0"


@pytest.fixture(autouse=True)
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have coverage see the watcher's thread, which is missing of the module threading."""
    run = Watcher._run

    def traced_run(watcher: Watcher) -> None:
        if threading.get_ident() != threading.main_thread().ident:
            sys.settrace(threading.gettrace())
        run(watcher)

    monkeypatch.setattr(Watcher, "_run", traced_run)


@pytest.fixture(autouse=True)
def traced_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have coverage see the workers, which the module threading does not start."""
    run = DmaEngine._run

    def traced_run(engine: DmaEngine) -> None:
        sys.settrace(threading.gettrace())
        run(engine)

    monkeypatch.setattr(DmaEngine, "_run", traced_run)


@pytest.fixture
def guest() -> MockDomain:
    guest = MockHypervisor().create_domain(memory="16M", holes=[(VGA, 0x20000)], vcpus=4)
    guest.vcpu_timeout = 20.0
    return guest


@pytest.fixture
def cache(guest: MockDomain) -> Iterator[MapCache]:
    with open_backend("mock", domain=guest) as backend:
        cache = MapCache(backend, bucket_shift=16)
        yield cache
        cache.close(force=True)


@pytest.fixture
def server(guest: MockDomain, cache: MapCache) -> IoreqServer:
    return IoreqServer(guest, cache, buffered=True)


@pytest.fixture
def device(server: IoreqServer) -> Memory:
    device = Memory()
    server.claim_ports(PORT, 16, device)
    server.claim_mmio(MMIO, 4096, device)
    server.claim_mmio(VGA, 0x1000, device)
    server.claim_pci(PCI, device)
    return device


@pytest.fixture
def live(server: IoreqServer, device: Memory) -> Iterator[IoreqServer]:
    """The server, open and served by a thread, with the device that it serves."""
    with server, server.serving():
        yield server


@pytest.fixture
def served(server: IoreqServer) -> Iterator[IoreqServer]:
    """The server, open and served by a thread, without a device."""
    with server, server.serving():
        yield server


@pytest.fixture
def line() -> Line:
    """An interrupt line of the guest."""
    return Line()
