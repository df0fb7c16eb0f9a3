"""An ioreq server over Xen's libraries: what it asks of them, and what it does when they fail."""

from __future__ import annotations

import errno
import logging
import select
import threading
from collections.abc import Iterator
from contextlib import closing
from functools import partial

import pytest

from tests.fake_xen import DOMID, Behaviour, FakeXen
from tests.fake_xen.fixtures import MakeFake
from tests.kit import link_of, put_state
from xenmapcache import (
    BackendUnavailableError,
    MapCache,
    UnsupportedOperationError,
    XenCallError,
    XenMapCacheError,
    open_backend,
)
from xenmapcache.address import PAGE_SIZE
from xenmapcache.binding.control import Control
from xenmapcache.devicemodel import IoreqServer, xen
from xenmapcache.ioreq import BufferedRing, Request, RequestKind, RequestSlot, State

PORT = 0x510
CREATE = "xendevicemodel_create_ioreq_server"
SET_STATE = "xendevicemodel_set_ioreq_server_state"
DESTROY = "xendevicemodel_destroy_ioreq_server"
MAP = "xenforeignmemory_map_resource"
BIND = "xenevtchn_bind_interdomain"
NOTIFY = "xenevtchn_notify"
CLAIM = "xendevicemodel_map_io_range_to_ioreq_server"
UNCLAIM = "xendevicemodel_unmap_io_range_from_ioreq_server"
RESTRICT = "xentoolcore_restrict_all"


@pytest.fixture
def fake(make_fake: MakeFake) -> FakeXen:
    return make_fake(vcpus=2)


@pytest.fixture(autouse=True)
def libraries(fake: FakeXen, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in instead of each of Xen's libraries, and no toolstack."""
    monkeypatch.setattr(xen, "guest_type", lambda _: None)
    for name in ("Control", "DeviceModel", "EventChannels", "ForeignMemory", "restrict_all"):
        monkeypatch.setattr(xen, name, partial(getattr(xen, name), library=fake.library))


@pytest.fixture
def cache(fake: FakeXen, binding: str) -> Iterator[MapCache]:
    with open_backend("xen", domid=DOMID, binding=binding, library=fake.library) as backend:
        yield MapCache(backend)
    assert fake.misuses == 0


@pytest.fixture
def server(cache: MapCache, binding: str) -> Iterator[IoreqServer]:
    server = IoreqServer(
        DOMID, cache, binding=binding, buffered=True, guest_type="hvm", answer_timeout=0.05
    )
    yield server
    server.close()


def names(fake: FakeXen, start: int) -> list[str]:
    """Calls of the libraries of device models, without those that open and close handles."""
    kinds = ("xendevicemodel_", "xenevtchn_", "xentoolcore_", MAP, "xenforeignmemory_unmap_res")
    return [
        call.name
        for call in fake.calls[start:]
        if call.name.startswith(kinds)
        and not call.name.endswith(("_open", "_close", "_fd", "_unmask", "_pending"))
    ]


def send(fake: FakeXen, server: int, vcpu: int, request: Request) -> None:
    """Play Xen: put a request into a vCPU's slot, and tell."""
    with closing(fake.ioreq_page(server)) as page, memoryview(page) as view:
        assert RequestSlot(view, vcpu).state == State.NONE
        RequestSlot(view, vcpu).send(request)
    fake.send(64 * server + vcpu + 1)


def answer_of(fake: FakeXen, server: int, vcpu: int) -> tuple[int, int]:
    """Return state and data of a vCPU's slot."""
    with closing(fake.ioreq_page(server)) as page, memoryview(page) as view:
        return RequestSlot(view, vcpu).state, RequestSlot(view, vcpu).request().data


def take(fake: FakeXen, server: int, vcpu: int) -> int:
    """Play Xen: take the answer out of a vCPU's slot."""
    with closing(fake.ioreq_page(server)) as page, memoryview(page) as view:
        return RequestSlot(view, vcpu).take()


def read(port: int, size: int = 4) -> Request:
    return Request(0, RequestKind.PORT, True, port, 0, size)


def test_from_open_to_close(fake: FakeXen, server: IoreqServer) -> None:
    """The order that Xen wants: pages, enabled, channels, ranges; and the way back."""
    server.claim_ports(PORT, 4)
    server.claim_mmio(0xF0000000, 0x1000)
    region = server.claim_pci("0001:02:1f.7")
    start = len(fake.calls)
    server.open()
    assert names(fake, start) == [
        CREATE,
        MAP,
        SET_STATE,
        BIND,
        BIND,
        "xendevicemodel_get_ioreq_server_info",
        BIND,
        CLAIM,
        CLAIM,
        "xendevicemodel_map_pcidev_to_ioreq_server",
    ]
    by_name = {call.name: call.arguments[1:] for call in fake.calls[start:]}
    assert by_name[CLAIM][:5] == (DOMID, server.id, 1, 0xF0000000, 0xF0000FFF)
    assert by_name["xendevicemodel_map_pcidev_to_ioreq_server"] == (DOMID, server.id, 1, 2, 31, 7)
    assert fake.servers == {server.id: True}
    start = len(fake.calls)
    region.release()
    server.inject_msi(0xFEE00000, 0x41)
    server.set_isa_irq(5, True)
    server.set_pci_intx("00:05.0", 2, True)
    server.close()
    assert names(fake, start) == [
        "xendevicemodel_unmap_pcidev_from_ioreq_server",
        "xendevicemodel_inject_msi",
        "xendevicemodel_set_isa_irq_level",
        "xendevicemodel_set_pci_intx_level",
        SET_STATE,
        "xenforeignmemory_unmap_resource",
        DESTROY,
    ]
    assert fake.servers == {}


def test_ports_are_given_back(fake: FakeXen, server: IoreqServer) -> None:
    """A region that is released is unclaimed with the ends that it was claimed with."""
    with server:
        server.claim_ports(PORT, 4).release()
        calls = [call for call in fake.calls if call.name in (CLAIM, UNCLAIM)]
        assert [call.name for call in calls] == [CLAIM, UNCLAIM]
        assert calls[0].arguments[1:] == calls[1].arguments[1:]


def test_requests_are_answered(fake: FakeXen, server: IoreqServer) -> None:
    """Each vCPU's request, in its slot, with its event; the buffered page too."""
    written: list[int] = []
    region = server.claim_ports(PORT, 4)
    region.read(lambda offset, size: 0x11 * (offset + 1))
    server.claim_mmio(0xA0000, 0x1000).write(lambda offset, size, value: written.append(value))
    with server:
        for vcpu, data in ((1, 0x22), (0, 0x11)):
            send(fake, server.id, vcpu, read(PORT + vcpu, 1))
            assert select.select([server], [], [], 20)[0]
            while not server.process_pending():
                pass
            assert fake.notified() == 64 * server.id + vcpu + 1
            assert take(fake, server.id, vcpu) == data
        with closing(fake.ioreq_page(server.id, buffered=True)) as page, memoryview(page) as ring:
            for value in (1, 2, 3):
                request = Request(None, RequestKind.MMIO, False, 0xA0000, value, 4)
                assert BufferedRing(ring).append(request)
        fake.send(64 * server.id + 64)
        while not server.process_pending():
            pass
    assert written == [1, 2, 3]
    assert (server.requests, server.failures) == (5, 0)


def test_a_request_that_waits_at_close(fake: FakeXen, server: IoreqServer) -> None:
    """It is carried out, and the vCPU told, before the server goes."""
    server.claim_ports(PORT, 4).read(lambda offset, size: 7)
    server.open()
    number = server.id
    send(fake, number, 1, read(PORT))
    start = len(fake.calls)
    server.close()
    assert answer_of(fake, number, 1) == (State.RESPONSE_READY, 7)
    assert names(fake, start)[:2] == [SET_STATE, NOTIFY]


@pytest.mark.parametrize(
    "call", [CREATE, MAP, SET_STATE, BIND, "xendevicemodel_get_ioreq_server_info", CLAIM, RESTRICT]
)
def test_an_open_that_fails(fake: FakeXen, cache: MapCache, binding: str, call: str) -> None:
    """Whatever fails, no server is left, and the message names the call."""
    server = IoreqServer(DOMID, cache, binding=binding, buffered=True, restrict=True)
    server.claim_ports(PORT, 4)
    fake.plan(call, Behaviour.FAIL, errno.ENOSPC)
    with pytest.raises(XenCallError, match=f"{call} failed.*ENOSPC"):
        server.open()
    assert fake.servers == {}


def test_restrict(fake: FakeXen, cache: MapCache, binding: str) -> None:
    """It comes last, and is about the one domain."""
    server = IoreqServer(DOMID, cache, binding=binding, restrict=True)
    server.claim_ports(PORT, 4)
    with server:
        called = [call for call in fake.calls if call.name == RESTRICT]
        assert [call.arguments for call in called] == [(DOMID,)]
        assert names(fake, 0)[-1] == RESTRICT


@pytest.mark.parametrize("error", [errno.ESRCH, errno.ENOENT])
@pytest.mark.parametrize("call", [SET_STATE, DESTROY])
def test_a_domain_that_has_ended(fake: FakeXen, server: IoreqServer, call: str, error: int) -> None:
    """Closing raises nothing if Xen says that the domain, or its server, is gone."""
    server.open()
    fake.plan(call, Behaviour.FAIL, error)
    server.close()


def test_a_close_that_fails(fake: FakeXen, server: IoreqServer) -> None:
    """Another error is raised; the handles are closed all the same, and it does not come twice."""
    server.open()
    fake.plan(DESTROY, Behaviour.FAIL, errno.EPERM)
    with pytest.raises(XenCallError, match=f"{DESTROY} failed"):
        server.close()
    server.close()


def abandon(
    fake: FakeXen, binding: str, requests: dict[int, Request], *, buffered: bool = False
) -> int:
    """Leave a server behind, as a process does that is killed; its vCPUs wait."""
    link = xen.XenLink(DOMID, buffered=buffered, recover=False, binding=binding)
    link.enable()
    for vcpu, request in requests.items():
        with closing(fake.ioreq_page(link.id)) as page, memoryview(page) as view:
            RequestSlot(view, vcpu).send(request)
    for handle in (link._model, link._memory, link._channels):
        handle.close()
    return link.id


def test_unmask_comes_first(fake: FakeXen, server: IoreqServer) -> None:
    """A request that comes while a slot is looked at raises a new event."""
    server.claim_ports(PORT, 4).read(lambda offset, size: 7)
    with server:
        start = len(fake.calls)
        send(fake, server.id, 0, read(PORT))
        while not server.process_pending():
            pass
        order = [call.name for call in fake.calls[start:] if call.name.startswith("xenevtchn")]
    at = order.index(NOTIFY)
    assert order[at - 2 : at] == ["xenevtchn_pending", "xenevtchn_unmask"]


def test_an_old_library(make_fake: MakeFake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Xen 4.11 the pages cannot be mapped this way: it says so, and leaves no server."""
    old = make_fake("OLD")
    for name in ("DeviceModel", "EventChannels", "ForeignMemory"):
        kind = getattr(xen, name).func
        monkeypatch.setattr(xen, name, partial(kind, library=old.library))
    with pytest.raises(XenMapCacheError) as caught:
        xen.XenLink(DOMID, buffered=False, recover=False, binding=None)
    assert isinstance(caught.value, UnsupportedOperationError)
    assert old.servers == {}


def test_no_libraries(cache: MapCache, monkeypatch: pytest.MonkeyPatch, binding: str) -> None:
    """What is missing is named, and open can be tried again."""
    kind = xen.EventChannels.func  # type: ignore[attr-defined] # cached_property's, which a class lacks for mypy
    monkeypatch.setattr(xen, "EventChannels", partial(kind, library="no-such-library.so"))
    server = IoreqServer(DOMID, cache, binding=binding)
    for _ in range(2):
        with pytest.raises(BackendUnavailableError, match="no-such-library.so cannot be loaded"):
            server.open()


def test_the_page_is_the_last(fake: FakeXen, server: IoreqServer) -> None:
    """Of two mapped pages the first is the ring's."""
    with server:
        link = link_of(server)
        assert link.ring is not None
        assert (len(link.page), len(link.ring)) == (PAGE_SIZE, PAGE_SIZE)
        with closing(fake.ioreq_page(server.id, buffered=True)) as page:
            page[100] = 77
        assert link.ring[100] == 77
        assert link.page[100] == 0


# --- what the guest is, and how it does ------------------------------------------------------


LINES = ("xendevicemodel_set_isa_irq_level", "xendevicemodel_set_pci_intx_level")


@pytest.mark.parametrize("told", ["pvh", "pv", None])
def test_interrupt_lines_are_for_hvm_guests_only(
    fake: FakeXen,
    cache: MapCache,
    binding: str,
    told: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The library's functions are never reached for another guest, or an unknown one."""
    monkeypatch.setattr(xen, "guest_type", lambda _: told)
    server = IoreqServer(DOMID, cache, binding=binding, answer_timeout=0.05)
    reason = "a PV.? guest has no interrupt lines" if told else "its type is unknown"
    with server:
        with pytest.raises(UnsupportedOperationError, match=f"{reason}.*inject_msi works"):
            server.set_isa_irq(5, True)
        with pytest.raises(UnsupportedOperationError, match=f"{reason}.*inject_msi works"):
            server.set_pci_intx("00:05.0", 1, False)
        server.inject_msi(0xFEE00000, 0x41)
    assert not [call for call in fake.calls if call.name in LINES]
    assert fake.count("xendevicemodel_inject_msi") == 1


@pytest.mark.parametrize(("told", "stated"), [("hvm", None), (None, "hvm"), ("hvm", "hvm")])
def test_interrupt_lines_of_hvm_guests(
    fake: FakeXen,
    cache: MapCache,
    binding: str,
    told: str | None,
    stated: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The toolstack says it, or the program where the toolstack says nothing."""
    monkeypatch.setattr(xen, "guest_type", lambda _: told)
    with IoreqServer(DOMID, cache, binding=binding, guest_type=stated) as server:
        server.set_isa_irq(5, True)
        server.set_pci_intx("00:05.0", 1, False)
    assert [call.name for call in fake.calls if call.name in LINES] == list(LINES)


def test_the_type_is_asked_before_rights_are_given_up(
    fake: FakeXen, cache: MapCache, binding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Afterwards the way to the toolstack may be closed."""
    asked: list[int] = []

    def ask(domid: int) -> str:
        asked.append(fake.count(RESTRICT))
        return "hvm"

    monkeypatch.setattr(xen, "guest_type", ask)
    with IoreqServer(DOMID, cache, binding=binding, restrict=True) as server:
        server.set_isa_irq(5, True)
    assert asked == [0]


@pytest.mark.parametrize(
    ("flags", "paused"), [(0, False), (1 << 3, True), (1 << 3 | 1, False), (1 << 3 | 1 << 2, False)]
)
def test_a_paused_guest(fake: FakeXen, server: IoreqServer, flags: int, paused: bool) -> None:
    """Paused, and neither dying nor shut down: then it may go on, and take its answers."""
    with server:
        fake.plan("xc_domain_getinfolist", Behaviour.FAIL, -flags if flags else 0)
        if flags:
            assert link_of(server).paused is paused
        else:
            assert link_of(server).paused is None  # the call failed
            assert link_of(server).paused is False


def test_the_state_of_no_domain(fake: FakeXen, binding: str) -> None:
    """Xen names the next domain that there is: that is not the one that was asked for."""
    with Control(binding=binding, library=fake.library) as control:
        assert control.domain_state(DOMID) == (False, False, False, 64)
        for other in (DOMID - 1, DOMID + 1):
            with pytest.raises(XenCallError) as caught:
                control.domain_state(other)
            assert caught.value.errno == errno.ESRCH


# --- servers of dead processes ---------------------------------------------------------------


def recovering(cache: MapCache, binding: str, *, buffered: bool = False) -> IoreqServer:
    server = IoreqServer(
        DOMID, cache, binding=binding, recover=True, buffered=buffered, answer_timeout=0.05
    )
    server.claim_ports(PORT, 8).read(lambda offset, size: 0x10 + offset)
    return server


def test_recover(
    fake: FakeXen, cache: MapCache, binding: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What waits at a dead server is carried out; one that is served is left alone."""
    with caplog.at_level(logging.WARNING):
        alive = xen.XenLink(DOMID, buffered=False, recover=False, binding=binding)
        alive.enable()
        for vcpu in range(2):
            alive.bind(64 * alive.id + vcpu + 1)
        dead = abandon(fake, binding, {1: read(PORT + 2, 2)})
        not_enabled = xen.XenLink(DOMID, buffered=False, recover=False, binding=binding)
        with recovering(cache, binding) as server:
            states = {alive.id: True, not_enabled.id: False, server.id: True}
            assert fake.servers == states | {dead: True}  # a request finds one or the other
            assert server.process_pending() == 1
            assert fake.servers == states | {dead: False}
            assert take(fake, dead, 1) == 0x12
            assert server.process_pending() == 0
            assert fake.servers == states
        assert names(fake, 0).count(DESTROY) == 2
    assert [record.getMessage() for record in caplog.records] == [
        f"domain {DOMID}: takes over ioreq server {dead} of a dead process; vCPUs that wait: 1"
    ]
    alive.close()
    not_enabled.close()


def test_a_server_that_is_just_being_bound_is_left_alone(
    fake: FakeXen, cache: MapCache, binding: str
) -> None:
    """One channel with another owner is enough."""
    half = xen.XenLink(DOMID, buffered=False, recover=False, binding=binding)
    half.enable()
    half.bind(64 * half.id + 2)
    RequestSlot(half.page, 0).send(read(PORT))
    with recovering(cache, binding) as server:
        server.process_pending()
        assert set(fake.servers) == {half.id, server.id}
        assert answer_of(fake, half.id, 0) == (State.READY, 0)
        assert half.bind(64 * half.id + 1)  # and nobody keeps its channels
    half.close()


def test_whatever_a_dead_process_left(fake: FakeXen, cache: MapCache, binding: str) -> None:
    """Beyond a gap: a request that was begun, one that was answered, and one that is new."""
    gap = xen.XenLink(DOMID, buffered=False, recover=False, binding=binding)
    dead = [abandon(fake, binding, {0: read(PORT), 1: read(PORT)})]
    gap.close()
    with closing(fake.ioreq_page(dead[0])) as page, memoryview(page) as view:
        put_state(view, 0, State.INPROCESS)
        view[32 + 8 : 32 + 16] = (6).to_bytes(8, "little")
        put_state(view, 1, State.RESPONSE_READY)
    dead.append(abandon(fake, binding, {0: read(PORT + 1)}))
    dead.append(abandon(fake, binding, {}))
    with recovering(cache, binding) as server:
        assert server.process_pending() == 2
        assert {*fake.servers} == {server.id, *dead} - {dead[2]}  # nobody waits there
        assert [take(fake, dead[0], vcpu) for vcpu in range(2)] == [0x10, 6]
        assert take(fake, dead[1], 0) == 0x11
    # Not the dead processes' own; so those of `gap`, of the server, and of three predecessors.
    assert fake.count("xenforeignmemory_unmap_resource") == 5


def test_the_ring_of_a_dead_process(fake: FakeXen, cache: MapCache, binding: str) -> None:
    """Its writes are carried out before what the vCPUs have asked for since, and only once."""
    order: list[int] = []
    dead = abandon(fake, binding, {0: read(PORT)}, buffered=True)
    with closing(fake.ioreq_page(dead, buffered=True)) as page, memoryview(page) as view:
        for value in (1, 2):
            BufferedRing(view).append(Request(None, RequestKind.MMIO, False, 0xA0000, value, 4))
    with recovering(cache, binding) as server:
        vga = server.claim_mmio(0xA0000, 0x1000)
        vga.write(lambda offset, size, value: order.append(value))
        for _ in range(2):
            server.process_pending()
        assert (order, server.buffered_requests) == ([1, 2], 2)
        assert take(fake, dead, 0) == 0x10


def test_close_answers_for_a_dead_process(fake: FakeXen, cache: MapCache, binding: str) -> None:
    """Although no round was done; the dead server goes as well."""
    dead = abandon(fake, binding, {0: read(PORT, 2)})
    server = recovering(cache, binding)
    server.open()
    server.close()
    assert answer_of(fake, dead, 0) == (State.RESPONSE_READY, 0x10)
    assert (fake.servers, server.lost_answers) == ({}, 1)


def test_an_open_that_fails_leaves_the_requests(
    fake: FakeXen, cache: MapCache, binding: str
) -> None:
    """The next process carries them out."""
    dead = abandon(fake, binding, {0: read(PORT, 2)})
    fake.plan(CREATE, Behaviour.FAIL, errno.EPERM)
    with pytest.raises(XenCallError):
        recovering(cache, binding, buffered=True).open()
    assert answer_of(fake, dead, 0)[0] == State.READY
    assert fake.servers == {dead: True}
    with recovering(cache, binding) as server:
        assert server.process_pending() == 1
        assert take(fake, dead, 0) == 0x10


def test_eight_dead_servers(fake: FakeXen, cache: MapCache, binding: str) -> None:
    """One at which nothing waits makes room; if all are waited for, there is none."""
    dead = [abandon(fake, binding, {0: read(PORT)}) for _ in range(7)]
    idle = abandon(fake, binding, {})
    with recovering(cache, binding) as server:
        assert server.id == idle
        assert server.process_pending() == 7
        assert {take(fake, each, 0) for each in dead} == {0x10}
    dead = [abandon(fake, binding, {0: read(PORT)}) for _ in range(8)]
    with pytest.raises(XenCallError) as caught:
        recovering(cache, binding).open()
    assert caught.value.errno == errno.ENOSPC
    assert fake.servers == dict.fromkeys(dead, True)


def test_pages_of_a_dead_process_are_kept_as_well(
    fake: FakeXen, cache: MapCache, binding: str
) -> None:
    """For a handler that has not returned when the server is given up; unmapped once."""
    abandon(fake, binding, {0: read(PORT)}, buffered=True)
    unmap = "xenforeignmemory_unmap_resource"
    before = fake.count(unmap)
    link = xen.XenLink(DOMID, buffered=True, recover=True, binding=binding)
    (predecessor,) = link.predecessors
    predecessor.disable()
    predecessor.disable()
    link.close(unmap=False)
    assert (fake.servers, fake.count(unmap), fake.count(DESTROY)) == ({}, before, 2)
    assert RequestSlot(predecessor.page, 0).state == State.READY
    for _ in range(2):
        link.unmap()
        link.close()
    assert (fake.count(unmap), fake.count(DESTROY)) == (before + 3, 2)


def test_pages_are_kept_for_a_handler_that_never_returns(
    fake: FakeXen, cache: MapCache, binding: str
) -> None:
    """They are unmapped when it returns, with the handle that mapped them, and once."""
    link = xen.XenLink(DOMID, buffered=True, recover=False, binding=binding)
    unmap = "xenforeignmemory_unmap_resource"
    link.close(unmap=False)
    assert (fake.servers, fake.count(unmap)) == ({}, 0)
    assert link.page[0] == 0
    link.unmap()
    link.unmap()
    link.close()
    assert fake.count(unmap) == 1


def test_a_handler_that_returns_after_all(fake: FakeXen, cache: MapCache, binding: str) -> None:
    """Closed while its handler hung, it touches no slot any more, and unmaps the pages."""
    entered, leave = threading.Event(), threading.Event()

    def hang(offset: int, size: int) -> int:
        entered.set()
        assert leave.wait(20)
        return 5

    server = IoreqServer(DOMID, cache, binding=binding, quiesce_timeout=0.05, answer_timeout=0.05)
    server.claim_ports(PORT, 4).read(hang)
    server.open()
    number = server.id
    send(fake, number, 0, read(PORT))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    assert entered.wait(20)
    server.close()
    assert answer_of(fake, number, 0) == (State.RESPONSE_READY, 0xFFFFFFFF)
    assert fake.count("xenforeignmemory_unmap_resource") == 0
    leave.set()
    thread.join()
    assert answer_of(fake, number, 0) == (State.RESPONSE_READY, 0xFFFFFFFF)
    assert fake.count("xenforeignmemory_unmap_resource") == 1
