"""What waits at a server whose process was killed is handed over to the next one."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.kit import connection_of, in_thread, put_state
from xenmapcache import MapCache, MockDomain, XenCallError
from xenmapcache.devicemodel import IoreqServer
from xenmapcache.ioreq import BufferedRing, Request, RequestKind, RequestSlot, State, is_idle
from xenmapcache.mock.ioreq_server import MockIoreqServer

PORT, VGA = 0x510, 0xA0000
ONES = 0xFFFFFFFF


class Register:
    """A device with one register, and a list of what was done to it."""

    def __init__(self, value: int = 0) -> None:
        self.value = value
        self.done: list[object] = []

    def read(self, offset: int, size: int) -> int:
        self.done.append("read")
        return self.value

    def write(self, offset: int, size: int, value: int) -> None:
        self.done.append(value)
        self.value = value


class RepeatableRegister(Register):
    repeatable = True


@pytest.fixture
def old(guest: MockDomain) -> MockIoreqServer:
    """The server of a process that was killed. It still gets requests."""
    link = guest.open_ioreq_server(buffered=True)
    link.enable()
    link.claim(RequestKind.PORT, PORT, PORT + 3)
    link.claim(RequestKind.MMIO, VGA, VGA + 0xFFF)
    link.kill()
    return link


Ask = Callable[..., list[object]]


@pytest.fixture
def ask(old: MockIoreqServer) -> Iterator[Ask]:
    """Have a vCPU send the dead server a request, whose slot gets a state; return what it reads."""
    threads: list[threading.Thread] = []

    def ask(
        instruction: Callable[[], object], state: State = State.READY, vcpu: int = 0
    ) -> list[object]:
        thread, seen = in_thread(instruction)
        threads.append(thread)
        while RequestSlot(old.page, vcpu).state != State.READY:
            os.sched_yield()
        put_state(old.page, vcpu, state)
        return seen

    yield ask
    for thread in threads:
        thread.join()


def successor(guest: MockDomain, cache: MapCache, device: object = None) -> IoreqServer:
    server = IoreqServer(guest, cache, buffered=True, recover=True)
    if device is not None:
        server.claim_ports(PORT, 4, device)  # type: ignore[arg-type] # a Register
    return server


def end(seen: list[object]) -> object:
    """Wait until a vCPU goes on, and return what it has read."""
    while not seen:
        os.sched_yield()
    return seen[0]


def test_a_write_is_carried_out_once(
    guest: MockDomain, cache: MapCache, old: MockIoreqServer, ask: Ask
) -> None:
    """A driver that resets its device while no process serves is not ignored."""
    device = Register(1)
    seen = ask(lambda: guest.port_out(PORT, 0))
    with successor(guest, cache, device) as server, server.serving():
        assert end(seen) is None
        assert guest.port_in(PORT) == 0
        assert guest.port_in(PORT) == 0
        assert (device.done, server.requests) == ([0, "read", "read"], 3)
        assert guest.ioreq_servers == {server.id: guest.ioreq_servers[server.id]}
    assert old.destroyed


def test_a_read_gets_what_the_new_handler_returns(
    guest: MockDomain, cache: MapCache, ask: Ask
) -> None:
    """As if its process had never died."""
    seen = ask(lambda: guest.port_in(PORT))
    with successor(guest, cache, Register(7)) as server:
        server.process_pending()
        assert (end(seen), server.failures) == (7, 0)


def test_an_access_without_a_handler_reads_all_ones(
    guest: MockDomain, cache: MapCache, ask: Ask
) -> None:
    """The new process has no such device; the vCPU goes on, and the log says why."""
    seen = ask(lambda: guest.port_in(PORT))
    with successor(guest, cache) as server:
        server.process_pending()
        assert (end(seen), server.failures) == (ONES, 1)


def test_no_write_falls_between_two_servers(
    guest: MockDomain, cache: MapCache, old: MockIoreqServer, ask: Ask
) -> None:
    """While the new server opens, a request waits at the old one or at the new one."""
    device = Register()
    server = successor(guest, cache)  # which claims nothing yet
    with server:
        seen = ask(lambda: guest.port_out(PORT, 1))
        server.claim_ports(PORT, 4, device)
        later, seen_later = in_thread(lambda: guest.port_out(PORT, 2, vcpu=1))
        enabled = [old.enabled]
        while not seen_later:
            server.process_pending()
        later.join()
        enabled.append(old.enabled)
        assert (end(seen), sorted(map(str, device.done))) == (None, ["1", "2"])
        assert enabled == [True, False]


def test_a_read_that_was_begun_is_carried_out_again(
    guest: MockDomain, cache: MapCache, ask: Ask
) -> None:
    """No vCPU has seen what the dead process would have answered."""
    device = Register(7)
    seen = ask(lambda: guest.port_in(PORT), State.INPROCESS)
    with successor(guest, cache, device) as server:
        server.process_pending()
        assert (end(seen), device.done, server.failures) == (7, ["read"], 0)


@pytest.mark.parametrize(
    ("kind", "done"), [(Register, []), (RepeatableRegister, [5])], ids=["plain", "repeatable"]
)
def test_a_write_that_was_begun(
    guest: MockDomain,
    cache: MapCache,
    ask: Ask,
    caplog: pytest.LogCaptureFixture,
    kind: type[Register],
    done: list[object],
) -> None:
    """It is carried out again only if the device says that this does no harm."""
    device = kind()
    seen = ask(lambda: guest.port_out(PORT, 5), State.INPROCESS)
    with caplog.at_level(logging.INFO), successor(guest, cache, device) as server:
        server.process_pending()
        assert end(seen) is None
        assert (device.done, server.failures) == (done, int(not done))
        guest_write = in_thread(lambda: guest.port_out(PORT, 6))
        while not guest_write[1]:
            server.process_pending()
        guest_write[0].join()
        assert device.done == [*done, 6]  # the next one is as any other
    assert ("had begun it; it counts as done" in caplog.text) == (not done)


def test_an_answer_that_was_not_notified(
    guest: MockDomain, cache: MapCache, old: MockIoreqServer, ask: Ask
) -> None:
    """The vCPU takes what the dead process has answered; no handler is called."""
    device = Register(7)
    seen = ask(lambda: guest.port_in(PORT), State.INPROCESS)
    RequestSlot(old.page, 0).answer(3)
    with successor(guest, cache, device) as server:
        server.process_pending()
        assert (end(seen), device.done) == (3, [])


@pytest.mark.parametrize("state", [State.READY, State.INPROCESS])
def test_an_invalidate(guest: MockDomain, cache: MapCache, ask: Ask, state: State) -> None:
    """It drops the new process's mappings, begun or not."""
    called: list[int] = []
    seen = ask(lambda: guest.balloon_out(0x5000, 0x1000), state)
    with successor(guest, cache) as server:
        cache.read(0x6000, 1)
        before = cache.stats().invalidations
        server.on_quiesce(lambda: called.append(1))
        server.process_pending()
        assert end(seen) is None
        assert (called, server.invalidations) == ([1], 1)
        assert cache.stats().invalidations == before + 1


def test_buffered_writes_come_first(
    guest: MockDomain, cache: MapCache, old: MockIoreqServer, ask: Ask
) -> None:
    """As they did at the dead server; what was taken out of its ring is not done again."""
    device = Register()
    for value in (1, 2, 3):
        guest.mmio_write(VGA, value, buffered=True)
    assert old.ring is not None
    seen = ask(lambda: guest.port_out(PORT, 4))
    old.ring[:4] = (1).to_bytes(4, "little")  # the dead process had taken the first one
    server = successor(guest, cache, device)
    server.claim_mmio(VGA, 0x1000, device)
    with server:
        for _ in range(2):
            server.process_pending()
        assert end(seen) is None
        assert (device.done, server.buffered_requests) == ([2, 3, 4], 2)


def test_closed_before_it_serves(
    guest: MockDomain, cache: MapCache, old: MockIoreqServer, ask: Ask
) -> None:
    """The end of the block answers what waits at the dead server, too."""
    device = Register(7)
    seen = ask(lambda: guest.port_in(PORT))
    with successor(guest, cache, device):
        pass
    assert (end(seen), device.done) == (7, ["read"])
    assert guest.ioreq_servers == {}


def test_an_open_that_fails_leaves_it_to_the_next(
    guest: MockDomain, cache: MapCache, old: MockIoreqServer, ask: Ask
) -> None:
    """Nothing is answered by a process that does not come up."""
    seen = ask(lambda: guest.port_in(PORT))
    guest.inject_fault("create_ioreq_server", errno=1)
    with pytest.raises(XenCallError):
        successor(guest, cache, Register(1)).open()
    assert RequestSlot(old.page, 0).state == State.READY
    with successor(guest, cache, Register(2)) as server:
        server.process_pending()
        assert end(seen) == 2


def test_killed_again_before_it_serves(
    guest: MockDomain, cache: MapCache, old: MockIoreqServer, ask: Ask
) -> None:
    """The third process finds both servers."""
    seen = ask(lambda: guest.port_in(PORT))
    second = successor(guest, cache, Register(1))
    second.open()
    guest.ioreq_servers[second.id].kill()
    with successor(guest, cache, Register(2)) as third:
        third.process_pending()
        assert end(seen) == 2
        third.process_pending()
        assert list(guest.ioreq_servers) == [third.id]
    second.close()


def test_an_answer_is_kept_for_a_paused_vcpu(
    guest: MockDomain, cache: MapCache, old: MockIoreqServer, ask: Ask
) -> None:
    """The dead server goes when its vCPU has taken the answer, and not before."""
    seen = ask(lambda: guest.port_in(PORT))
    guest.pause()
    with successor(guest, cache, Register(7)) as server:
        for _ in range(3):
            server.process_pending()
        assert (seen, old.destroyed) == ([], False)
        guest.unpause()
        assert end(seen) == 7
        server.process_pending()
        assert old.destroyed


def test_a_handler_that_serves_keeps_the_dead_server(
    guest: MockDomain, cache: MapCache, old: MockIoreqServer, ask: Ask
) -> None:
    """Rounds further up the stack still look at its slots."""
    seen = ask(lambda: guest.port_in(PORT))
    other = ask(lambda: guest.port_in(PORT + 1, 1, vcpu=1), vcpu=1)
    kept: list[bool] = []
    server = successor(guest, cache)

    @server.claim_ports(PORT, 4).read
    def read(offset: int, size: int) -> int:
        if not offset:
            server.process_pending()
            end(other)
            put_state(old.page, 0, State.NONE)  # as if all had been taken
            server.process_pending()
            put_state(old.page, 0, State.INPROCESS)
            kept.append(not old.destroyed)
        return offset

    with server:
        server.process_pending()
        assert (end(seen), end(other), kept) == (0, 1, [True])
        server.process_pending()
        assert old.destroyed
        assert connection_of(server).inheritance.channels == []


def test_closed_while_xen_refuses(
    guest: MockDomain,
    cache: MapCache,
    old: MockIoreqServer,
    ask: Ask,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A server that cannot be disabled does not keep the dead one from its end."""
    seen = ask(lambda: guest.port_in(PORT))
    server = successor(guest, cache, Register(7))
    server.open()

    def refuse() -> None:
        raise XenCallError("disable", guest.domid, 1)

    monkeypatch.setattr(guest.ioreq_servers[server.id], "disable", refuse)
    with pytest.raises(XenCallError):
        server.close()
    assert (end(seen), old.destroyed) == (7, True)


def test_a_server_whose_ring_holds_a_write_is_not_idle() -> None:
    """Its pages have to stay until the write is carried out."""
    page, ring = memoryview(bytearray(4096)), memoryview(bytearray(4096))
    assert is_idle(page, ring)
    assert BufferedRing(ring).append(Request(None, RequestKind.MMIO, False, VGA, 7, 1))
    assert not is_idle(page, ring)
