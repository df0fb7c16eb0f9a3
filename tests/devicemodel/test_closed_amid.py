"""Signal handlers amid a claim, a round, a close or the start of the watcher.

The folder tests/interrupts tries every point. Here each mechanism has its own case.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from operator import is_
from time import monotonic
from types import SimpleNamespace

import pytest

from tests.kit import connection_of, link_of
from xenmapcache import ClosedError, MapCache, MockDomain
from xenmapcache.devicemodel import IoreqServer, watch
from xenmapcache.devicemodel.dispatch import Dispatcher, Job, checked
from xenmapcache.devicemodel.recovery import Inheritance
from xenmapcache.devicemodel.regions import RegionTable
from xenmapcache.devicemodel.signals import CaughtSignals
from xenmapcache.devicemodel.watch import Watcher
from xenmapcache.ioreq import Request, RequestKind
from xenmapcache.mock.ioreq_server import MockIoreqServer

PORTS = 0x300
raise_in_c = partial(getattr(ctypes.CDLL(None), "raise"), int(signal.SIGUSR1))
"""Sends the signal; its handler runs once the interpreter is back from C."""


class AmidError(RuntimeError, ValueError, TypeError):
    """What a handler raises that the package could take for its own."""


@pytest.fixture
def handler() -> Iterator[None]:
    """SIGUSR1 raises AmidError."""

    def handle(*_: object) -> None:
        raise AmidError

    previous = signal.signal(signal.SIGUSR1, handle)
    yield
    signal.signal(signal.SIGUSR1, previous)


def raise_amid() -> None:
    raise AmidError


def patch(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    *,
    before: Callable[[], object] = int,
    after: Callable[[], object] = int,
) -> None:
    """Have something done at the next call of a method of the mock's server."""
    original = getattr(MockIoreqServer, name)

    def method(self: MockIoreqServer, *arguments: object) -> object:
        monkeypatch.setattr(MockIoreqServer, name, original)
        before()
        result = original(self, *arguments)
        after()
        return result

    monkeypatch.setattr(MockIoreqServer, name, method)


# --- claims ---


def test_an_interrupted_claim_is_undone_on_both_sides(
    server: IoreqServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether Xen has claimed the range already or not."""
    with server:
        for when in ("before", "after"):
            patch(monkeypatch, "claim", **{when: raise_amid})
            with pytest.raises(AmidError):
                server.claim_ports(PORTS, 4)
            server.claim_ports(PORTS, 4).release()


def test_an_interrupted_release_is_completed_on_both_sides(
    server: IoreqServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether Xen has released the range already or not."""
    with server:
        for when in ("before", "after"):
            region = server.claim_ports(PORTS, 4)
            patch(monkeypatch, "unclaim", **{when: raise_amid})
            with pytest.raises(AmidError):
                region.release()
            with pytest.raises(ValueError, match="was given back before"):
                region.release()
        server.claim_ports(PORTS, 4)


def test_a_release_that_is_interrupted_at_once_has_done_nothing(
    server: IoreqServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The region is still claimed, on both sides."""
    with server:
        region = server.claim_ports(PORTS, 4)
        with monkeypatch.context() as context:
            context.setattr(RegionTable, "remove", lambda *_: raise_amid())
            with pytest.raises(AmidError):
                region.release()
        region.release()


def test_a_claim_before_open_is_undone(
    server: IoreqServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no Xen to tell."""
    add = RegionTable.add

    def interrupted(*arguments: object) -> None:
        add(*arguments)  # type: ignore[arg-type] # as it was called
        raise AmidError

    with monkeypatch.context() as context:
        context.setattr(RegionTable, "add", interrupted)
        with pytest.raises(AmidError):
            server.claim_ports(PORTS, 4)
    server.claim_ports(PORTS, 4)


def test_a_forked_child_undoes_no_claim(
    server: IoreqServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The range is its parent's."""
    with server:
        patch(monkeypatch, "claim", after=raise_amid)
        unclaimed: list[object] = []
        with monkeypatch.context() as context:
            context.setattr(MockIoreqServer, "unclaim", lambda *range_: unclaimed.append(range_))
            context.setattr(server._runtime, "_pid", os.getpid() + 1)
            with pytest.raises(AmidError):
                server.claim_ports(PORTS, 4)
        assert unclaimed == []


# --- closed in the middle ---


def test_closed_amid_a_claim_or_a_release(
    guest: MockDomain, cache: MapCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ClosedError says so, also of a region that the close has forgotten."""
    for name in ("claim", "unclaim"):
        server = IoreqServer(guest, cache)
        with server:
            region = server.claim_ports(PORTS, 4)
            patch(monkeypatch, name, before=server.close)
            with pytest.raises(ClosedError):
                region.release() if name == "unclaim" else server.claim_ports(PORTS + 4, 4)
            with pytest.raises(ClosedError):
                region.release()


def test_closed_amid_a_round(server: IoreqServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """ClosedError, whatever fails because of it."""
    with server:
        patch(monkeypatch, "pending", before=server.close)
        with pytest.raises(ClosedError, match="in the middle of a round"):
            server.process_pending()


def test_closed_amid_a_close(server: IoreqServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails because of it is not raised as it is; the server is closed."""
    server.open()

    def close_and_raise() -> None:
        server.close()
        raise AmidError

    patch(monkeypatch, "disable", after=close_and_raise)
    with pytest.raises(ClosedError, match="while it closed") as caught:
        server.close()
    assert isinstance(caught.value.__cause__, AmidError)
    server.close()


# --- the rest ---


@pytest.mark.usefixtures("handler")
def test_an_error_of_a_handler_is_not_that_of_a_thread_that_cannot_start(
    server: IoreqServer,
) -> None:
    """It is raised, and the token stays with the thread that has started."""
    watcher = Watcher(1, server.cache, lambda: None, lambda: None)
    returned: list[None] = []
    idle = SimpleNamespace(pop=raise_in_c, append=returned.append)
    with pytest.MonkeyPatch.context() as context:
        context.setattr(watcher, "_idle", idle)
        context.setattr("_thread.start_new_thread", is_)
        with pytest.raises(AmidError):
            watcher.begin()
    assert returned == []


def test_watching_in_this_thread(server: IoreqServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job is named, then given up at the deadline; or the watcher is woken, and stopped."""
    monkeypatch.setattr(watch, "_FIRST_S", 0.0)
    job, given_up = Job(None), list[int]()
    watcher = Watcher(1, server.cache, lambda: job, lambda: given_up.append(1))
    watcher.give_up_at(None)
    assert watcher._look.empty()
    watcher.give_up_at(monotonic() + 0.02)
    watcher._run()
    assert given_up == [1]
    watcher.give_up_at(None)
    watcher._look.put(False)
    watcher.stop()
    watcher._run()
    assert watcher._look.empty()
    assert given_up == [1]


def test_the_token_is_taken_once(server: IoreqServer) -> None:
    """A signal handler takes it between the look at it and the taking: no second thread."""
    watcher = Watcher(1, server.cache, lambda: None, lambda: None)
    started: list[object] = []
    with pytest.MonkeyPatch.context() as context:
        context.setattr(watcher, "_idle", SimpleNamespace(pop=[].pop))
        context.setattr("_thread.start_new_thread", lambda *_: started.append(1))
        watcher.begin()
    assert started == []


@pytest.mark.usefixtures("handler")
def test_an_error_of_a_handler_is_not_that_of_a_wrong_value() -> None:
    """The value that the device's handler has returned is a number."""

    class Value:
        __index__ = staticmethod(raise_in_c)

    with pytest.raises(AmidError):
        checked(Value(), 4)


def test_an_interrupted_catch_leaves_no_signal_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program's own are back, although the block was not entered."""
    before = signal.getsignal(signal.SIGINT)
    original = signal.signal

    def interrupted(number: signal.Signals, to: signal.Handlers) -> None:
        original(number, to)
        monkeypatch.setattr(signal, "signal", original)
        raise AmidError

    monkeypatch.setattr(signal, "signal", interrupted)
    with pytest.raises(AmidError), CaughtSignals(lambda: None):
        pytest.fail("not reached")
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupted_exit_puts_both_signal_handlers_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The interrupt comes out."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    original = signal.signal

    def interrupted(number: signal.Signals, to: signal.Handlers) -> None:
        original(number, to)
        monkeypatch.setattr(signal, "signal", original)
        raise AmidError

    with pytest.raises(AmidError), CaughtSignals(lambda: None):
        monkeypatch.setattr(signal, "signal", interrupted)
    after = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert after == before


def test_a_close_whose_exit_is_interrupted_at_once_puts_signal_handlers_back(
    server: IoreqServer,
) -> None:
    """Otherwise they would keep the closed server."""
    before = signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as context:
        context.setattr(CaughtSignals, "__exit__", lambda *_: raise_amid())
        with pytest.raises(AmidError):
            server.close()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_forked_child_drops_no_mappings(cache: MapCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """What forked leaves by its own exception, and not by an error of a cache that it has not."""
    dispatcher = Dispatcher(RegionTable(), cache)
    calls: list[object] = []
    monkeypatch.setattr(cache, "invalidate", lambda: calls.append(1))
    job = Job(Request(0, RequestKind.INVALIDATE, False, 0, 0, 4))
    monkeypatch.setattr(dispatcher, "_pid", os.getpid() + 1)
    dispatcher.perform(job)
    assert (calls, job.invalidated) == ([], False)


def test_a_stopped_watcher_keeps_no_closed_server(server: IoreqServer) -> None:
    """An interrupted end of close() has stopped it before: the server is closed."""
    server.open()
    connection = connection_of(server)
    link = link_of(server)
    with pytest.MonkeyPatch.context() as context:
        context.setattr(server._runtime, "wake", raise_amid)
        with pytest.raises(AmidError):
            server.close()
    assert connection.calls.watcher._look.get_nowait() in (True, False)
    assert link is connection.link
    server.close()


def test_closed_while_it_opens(
    guest: MockDomain, server: IoreqServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal handler closes it in the middle of open: ClosedError, and nothing is left."""
    real = MockIoreqServer.enable

    def enable(self: MockIoreqServer) -> None:
        real(self)
        server.close()

    monkeypatch.setattr(MockIoreqServer, "enable", enable)
    server.claim_ports(PORTS, 4)
    with pytest.raises(ClosedError, match="it was closed while it opened"):
        server.open()
    assert guest.ioreq_servers == {}


def test_closed_before_there_is_a_link(
    guest: MockDomain, server: IoreqServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal handler that closes it while Xen makes the server is not overtaken by open."""
    make = guest.open_ioreq_server

    def closed_amid(*, buffered: bool, recover: bool) -> MockIoreqServer:
        server.close()
        return make(buffered=buffered, recover=recover)

    monkeypatch.setattr(guest, "open_ioreq_server", closed_amid)
    server.claim_ports(PORTS, 4)
    events: list[object] = []
    server.observe(events.append)
    with pytest.raises(ClosedError, match="it was closed while it opened"):
        server.open()
    assert guest.ioreq_servers == {}
    assert [type(event).__name__ for event in events] == ["ServerOpened", "ServerClosed"]


def test_closed_before_it_is_to_be_closed_at_exit(
    guest: MockDomain, cache: MapCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that a handler closed in the middle of open is freed, and not kept for the exit."""
    servers = [IoreqServer(guest, cache)]
    monkeypatch.setattr(Inheritance, "report", lambda *_: servers[0].close())
    with pytest.raises(ClosedError, match="it was closed while it opened"):
        servers[0].open()
    freed = weakref.ref(servers.pop()._runtime)
    end = monotonic() + 5
    while freed() is not None and monotonic() < end:  # the watcher's thread is just ending
        gc.collect()
    assert freed() is None


def test_closed_at_the_end_of_open(
    guest: MockDomain, server: IoreqServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last step of open may have been the close."""
    server._restrict = True
    monkeypatch.setattr(MockIoreqServer, "restrict", lambda _: server.close())
    with pytest.raises(ClosedError, match="it was closed while it opened"):
        server.open()
