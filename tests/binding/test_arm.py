"""An ioreq server of an Arm host over Xen's libraries: its fence, its interrupts, its refusals."""

from __future__ import annotations

import errno
import platform
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial

import pytest

from tests.fake_xen import DOMID, Behaviour, FakeXen
from tests.fake_xen.fixtures import MakeFake
from tests.kit import link_of
from xenmapcache import MapCache, UnsupportedOperationError, XenCallError, open_backend
from xenmapcache.arch import Architecture
from xenmapcache.devicemodel import IoreqServer, xen
from xenmapcache.ioreq import Request, RequestKind, RequestSlot, State

MMIO = 0x0200_0500
CREATE = "xendevicemodel_create_ioreq_server"
INFO = "xendevicemodel_get_ioreq_server_info"
SET_IRQ, NR_VCPUS = "xendevicemodel_set_irq_level", "xendevicemodel_nr_vcpus"


class Fence:
    """A fence that counts, and looks at a page."""

    def __init__(self) -> None:
        self.architectures: list[str] = []
        self.look: Callable[[], object] = lambda: None
        self.seen: list[object] = []

    def find(self, architecture: Architecture) -> Callable[[], None]:
        self.architectures.append(architecture.name)
        return self.act

    def act(self) -> None:
        self.seen.append(self.look())


@pytest.fixture
def fence(monkeypatch: pytest.MonkeyPatch) -> Fence:
    """A fence that every processor can execute."""
    fence = Fence()
    monkeypatch.setattr(xen, "find_fence", fence.find)
    return fence


@pytest.fixture
def fake(make_fake: MakeFake) -> FakeXen:
    return make_fake(vcpus=2)


def use(fake: FakeXen, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the stand-in loaded instead of each of Xen's libraries."""
    for name in ("Control", "DeviceModel", "EventChannels", "ForeignMemory"):
        kind = getattr(xen, name)
        kind = kind.func if isinstance(kind, partial) else kind
        monkeypatch.setattr(xen, name, partial(kind, library=fake.library))


@pytest.fixture(autouse=True)
def host(fake: FakeXen, fence: Fence, monkeypatch: pytest.MonkeyPatch) -> None:
    """An Arm host, whose toolstack says what it says of each Arm guest."""
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(xen, "guest_type", lambda _: "pvh")
    use(fake, monkeypatch)


@pytest.fixture
def cache(fake: FakeXen, binding: str) -> Iterator[MapCache]:
    with open_backend("xen", domid=DOMID, binding=binding, library=fake.library) as backend:
        yield MapCache(backend)
    assert fake.misuses == 0


@pytest.fixture
def server(cache: MapCache, binding: str) -> Iterator[IoreqServer]:
    server = IoreqServer(DOMID, cache, binding=binding, answer_timeout=0.05)
    yield server
    server.close()


def read(size: int = 4) -> Request:
    return Request(0, RequestKind.MMIO, True, MMIO, 0, size)


def test_a_request(fake: FakeXen, server: IoreqServer, fence: Fence) -> None:
    """The host's fence stands around it: after READY is seen, and before the answer's state."""
    server.claim_mmio(MMIO, 16).read(lambda offset, size: 7)
    with server:
        assert fence.architectures == ["arm64"]
        with closing(fake.ioreq_page(server.id)) as page, memoryview(page) as view:
            RequestSlot(view, 0).send(read())
        fake.send(64 * server.id + 1)
        slot = RequestSlot(link_of(server).page, 0)
        fence.look = lambda: (slot.state, slot.request().data)
        while not server.process_pending():
            pass
        fence.look = lambda: None
        assert fence.seen.index((State.READY, 0)) < fence.seen.index((State.INPROCESS, 7))
        with closing(fake.ioreq_page(server.id)) as page, memoryview(page) as view:
            assert RequestSlot(view, 0).take() == 7


def test_recovery(fake: FakeXen, cache: MapCache, fence: Fence, binding: str) -> None:
    """What a dead process has left is answered with the fence, too."""
    dead = xen.XenLink(DOMID, buffered=False, recover=False, binding=binding)
    dead.enable()
    slot = RequestSlot(dead.page, 0)
    slot.send(read(2))
    for handle in (dead._model, dead._memory, dead._channels):
        handle.close()
    fence.seen.clear()
    fence.look = lambda: (slot.state, slot.request().data)
    with IoreqServer(DOMID, cache, binding=binding, recover=True, answer_timeout=0.05) as server:
        server.process_pending()
        fence.look = lambda: None
    assert fence.seen.index((State.READY, 0)) < fence.seen.index((State.INPROCESS, 0xFFFF))


def test_no_fence(cache: MapCache, monkeypatch: pytest.MonkeyPatch, fake: FakeXen) -> None:
    """Without one nothing is created."""

    def refuse(_: Architecture) -> None:
        raise UnsupportedOperationError("no memory fence")

    monkeypatch.setattr(xen, "find_fence", refuse)
    with pytest.raises(UnsupportedOperationError, match="no memory fence"):
        IoreqServer(DOMID, cache).open()
    assert fake.count(CREATE) == 0


def test_a_xen_without_ioreq_servers(fake: FakeXen, server: IoreqServer) -> None:
    """The error says so, and what to do; other errors are Xen's."""
    fake.plan(CREATE, Behaviour.FAIL, errno.ENOSYS)
    message = (
        rf"domain {DOMID}: this Xen has no ioreq servers \(ENOSYS\).*CONFIG_IOREQ_SERVER=y.*"
        "device-models-live.md"
    )
    with pytest.raises(UnsupportedOperationError, match=message):
        server.open()
    fake.plan(CREATE, Behaviour.FAIL, errno.ENOSPC)
    with pytest.raises(XenCallError, match="ENOSPC"):
        server.open()


def test_interrupts(fake: FakeXen, server: IoreqServer) -> None:
    """An SPI reaches the library; what an Arm guest lacks does not."""
    with server:
        server.set_irq_level(40, True)
        for call in (
            partial(server.inject_msi, 0xFEE00000, 0x41),
            partial(server.set_isa_irq, 5, True),
            partial(server.set_pci_intx, "00:05.0", 1, False),
        ):
            with pytest.raises(UnsupportedOperationError, match="use set_irq_level"):
                call()
    calls = [call for call in fake.calls if "irq_" in call.name or "_intx" in call.name]
    assert [(call.name, call.arguments[1:]) for call in calls] == [(SET_IRQ, (DOMID, 40, 1))]
    assert fake.count("xendevicemodel_inject_msi") == 0


def test_the_vcpus(fake: FakeXen, server: IoreqServer) -> None:
    """Xen says how many there can be."""
    with server:
        assert server.nr_vcpus == 2
        fake.plan(NR_VCPUS, Behaviour.FAIL, errno.ESRCH)
        with pytest.raises(XenCallError, match=f"{NR_VCPUS} failed"):
            _ = server.nr_vcpus


def test_ports_and_the_ring(cache: MapCache, server: IoreqServer) -> None:
    """Both are refused before Xen is asked."""
    with pytest.raises(UnsupportedOperationError, match="ports cannot be claimed for an arm64"):
        server.claim_ports(0x510, 4)
    with pytest.raises(UnsupportedOperationError, match="no buffered requests of an arm64 guest"):
        IoreqServer(DOMID, cache, buffered=True)


def test_another_host(cache: MapCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused when the server is described."""
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(UnsupportedOperationError, match="serving needs x86-64 or arm64, not riscv"):
        IoreqServer(DOMID, cache)


@pytest.mark.parametrize("error", [errno.ENOENT, errno.ESRCH])
def test_the_end_of_the_guest(fake: FakeXen, server: IoreqServer, error: int) -> None:
    """Xen has destroyed the server, or the domain is gone; another error says nothing."""
    with server:
        link = link_of(server)
        assert not link.has_ended()
        fake.plan(INFO, Behaviour.FAIL, error)
        assert link.has_ended()
        fake.plan(INFO, Behaviour.FAIL, errno.EPERM)
        with pytest.raises(XenCallError, match="EPERM"):
            link.has_ended()
