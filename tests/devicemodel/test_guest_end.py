"""The end of a guest ends what serves it: no request tells of it, so the loops ask."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Callable
from typing import NoReturn

import pytest

from tests.devicemodel.test_signals import run
from tests.kit import Memory, link_of
from xenmapcache import MockDomain, XenCallError
from xenmapcache.devicemodel import IoreqServer, loops
from xenmapcache.mock.ioreq_server import MockIoreqServer

PORT = 0x510


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "_LOOK_S", 0.001)


class Looks:
    """How often a link was asked, and a way to wait for it."""

    def __init__(self) -> None:
        self.count = 0
        self.enough = threading.Event()

    def __call__(self, link: MockIoreqServer) -> bool:
        self.count += 1
        if self.count == 3:
            self.enough.set()
        return link.destroyed


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Looks:
    looks = Looks()
    monkeypatch.setattr(MockIoreqServer, "has_ended", lambda link: looks(link))
    return looks


def test_serve_forever(
    guest: MockDomain, server: IoreqServer, device: Memory, looks: Looks
) -> None:
    """It goes on while the guest runs; at its end it calls on_end in its thread, and returns."""
    called: list[int] = []

    def live() -> None:
        guest.port_in(PORT)
        assert looks.enough.wait(20)
        guest.port_in(PORT)
        guest.destroy()

    thread = threading.Thread(target=live)
    with server:
        thread.start()
        assert server.serve_forever(on_end=lambda: called.append(threading.get_ident())) is None
        thread.join()
    assert (called, server.requests) == ([threading.get_ident()], 2)


def test_without_on_end(guest: MockDomain, server: IoreqServer) -> None:
    """It returns as well."""
    with server:
        guest.destroy()
        assert server.serve_forever() is None


def test_serving_in_a_thread(guest: MockDomain, server: IoreqServer) -> None:
    """The thread calls on_end; the block goes on."""
    called = threading.Event()
    with server, server.serving(on_end=called.set):
        guest.destroy()
        assert called.wait(20)


def test_asyncio(guest: MockDomain, server: IoreqServer, device: Memory, looks: Looks) -> None:
    """It goes on while the guest runs, and returns at its end."""
    called: list[str] = []

    async def serve() -> None:
        serving = asyncio.create_task(server.serve_async(on_end=lambda: called.append("end")))
        await asyncio.to_thread(looks.enough.wait, 20)
        await asyncio.to_thread(guest.port_in, PORT)
        assert not called
        guest.destroy()
        assert await serving is None

    with server:
        asyncio.run(serve())
    assert (called, server.requests) == (["end"], 1)


def test_asyncio_without_on_end(guest: MockDomain, server: IoreqServer) -> None:
    """It returns as well, and stops asking."""
    with server:
        guest.destroy()
        asyncio.run(server.serve_async())


def test_a_stop_is_not_the_end(server: IoreqServer) -> None:
    """Nothing is called if the program or its close has ended the loop."""
    called: list[str] = []
    with server:
        server.stop()
        server.serve_forever(on_end=lambda: called.append("stop"))
        server.stop()
        asyncio.run(server.serve_async(on_end=lambda: called.append("async stop")))
        with server.serving(on_end=lambda: called.append("close")):
            server.close()
    assert called == []


def test_what_on_end_raises(guest: MockDomain, server: IoreqServer) -> None:
    """The caller of the loop gets it."""

    def fail() -> NoReturn:
        raise LookupError("no successor")

    with server:
        guest.destroy()
        with pytest.raises(LookupError):
            server.serve_forever(on_end=fail)
        with pytest.raises(LookupError):
            asyncio.run(server.serve_async(on_end=fail))
        serving = server.serving(on_end=fail)
        assert isinstance(serving, loops.ServingThread)
        with pytest.raises(LookupError), serving:
            serving._thread.join(20)


SERVE: dict[str, Callable[[IoreqServer], object]] = {
    "serve_forever": lambda server: server.serve_forever(),
    "serve_async": lambda server: asyncio.run(server.serve_async()),
}


@pytest.mark.parametrize("serve", SERVE.values(), ids=SERVE)
def test_an_answer_that_xen_refuses(
    server: IoreqServer, serve: Callable[[IoreqServer], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop ends with the error: it would go on for ever after the guest."""

    def refuse(_: MockIoreqServer) -> NoReturn:
        raise XenCallError("xendevicemodel_get_ioreq_server_info", 1, errno.EPERM)

    with server:
        monkeypatch.setattr(MockIoreqServer, "has_ended", refuse)
        with pytest.raises(XenCallError, match="EPERM"):
            serve(server)


def test_the_second_error_is_the_event_loops(server: IoreqServer) -> None:
    """Both callbacks may fail before the coroutine runs: it raises the first error."""

    async def fail_twice() -> None:
        turn = loops._Turn(server._runtime, asyncio.get_running_loop(), server.fileno())
        try:
            turn._fail(ValueError("first"))
            with pytest.raises(LookupError):
                turn._fail(LookupError("second"))
            with pytest.raises(ValueError, match="first"):
                await turn._turn
        finally:
            turn.cancel()

    with server:
        asyncio.run(fail_twice())


def test_a_closed_server_has_not_ended(guest: MockDomain, server: IoreqServer) -> None:
    """A close destroys the server too, and the guest goes on."""
    server.open()
    connection = server._runtime.open_connection()
    assert not server._runtime.has_guest_ended()
    connection.closed = True
    guest.destroy()
    assert link_of(server).has_ended()
    assert not server._runtime.has_guest_ended()
    connection.closed = False
    assert server._runtime.has_guest_ended()
    server.close()
    assert not server._runtime.has_guest_ended()


def test_a_signal_wins() -> None:
    """If both come, the signal's number is returned, and on_end is not called."""
    done = run("""
from xenmapcache.devicemodel import loops
loops._LOOK_S = 0.001
from xenmapcache.mock.ioreq_server import MockIoreqServer
def has_ended(link):
    os.kill(os.getpid(), signal.SIGTERM)
    return True
with server:
    MockIoreqServer.has_ended = has_ended
    print(server.serve_forever(on_end=lambda: print("end")) is signal.SIGTERM.value)
""")
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")
