"""Saving a guest while a device works: transfers end before, and wait until it is over."""

from __future__ import annotations

import threading

import pytest

from tests.kit import in_thread
from xenmapcache import ClosedError, MapCache, MockDomain
from xenmapcache.devicemodel import IoreqServer
from xenmapcache.devicemodel.gate import Gate

PORT = 0x510


def test_transfers_wait_while_the_guest_is_saved(
    guest: MockDomain, cache: MapCache, live: IoreqServer
) -> None:
    """Nothing is written between suspend and resume; requests are answered all the same."""
    quiesced: list[int] = []
    live.on_quiesce(lambda: quiesced.append(1))
    begun = threading.Event()

    def transfer() -> None:
        begun.set()
        with live.transfer():
            cache.write(0x5000, b"new")

    live.suspend()
    assert quiesced == [1]
    thread, _ = in_thread(transfer)
    assert begun.wait(20)
    assert guest.port_in(PORT) == 0
    guest.suspend()
    saved = guest.read(0x5000, 3)
    guest.resume()
    assert saved == bytes(3)
    assert guest.read(0x5000, 3) == bytes(3)
    live.resume()
    thread.join()
    assert guest.read(0x5000, 3) == b"new"


def test_suspend_waits_for_a_transfer(cache: MapCache, live: IoreqServer) -> None:
    """A transfer that has begun is let end."""
    inside, leave = threading.Event(), threading.Event()

    def transfer() -> None:
        with live.transfer():
            inside.set()
            assert leave.wait(20)
            cache.write(0x5000, b"new")

    thread, _ = in_thread(transfer)
    assert inside.wait(20)
    suspending, _ = in_thread(live.suspend)
    while not live._gate.is_shut:
        pass
    leave.set()
    suspending.join()
    assert cache.read(0x5000, 3) == b"new"
    thread.join()
    live.resume()


def test_a_transfer_that_does_not_end(guest: MockDomain, cache: MapCache) -> None:
    """Suspend says so after the quiesce timeout; then resume, or suspend again."""
    server = IoreqServer(guest, cache, quiesce_timeout=0.01)
    with server, server.transfer():
        with pytest.raises(TimeoutError, match="1 transfers are still under way after 0.01 s"):
            server.suspend()
        server.resume()
        with server.transfer():
            """The gate is open again."""


def test_transfers_are_held_back_between_two_rounds(
    monkeypatch: pytest.MonkeyPatch, live: IoreqServer
) -> None:
    """An INVALIDATE asks once whether the server is suspended, and waits for transfers or not."""
    gate, lock, held = live._gate, live._runtime.lock, []

    def shut(timeout: float) -> int:
        held.append((gate.is_shut, lock._is_owned()))  # type: ignore[attr-defined] # Condition uses it
        return Gate.shut(gate, timeout)

    def reopen() -> None:
        held.append((gate.is_shut, lock._is_owned()))  # type: ignore[attr-defined] # Condition uses it
        Gate.open(gate)

    monkeypatch.setattr(gate, "shut", shut)
    monkeypatch.setattr(gate, "open", reopen)
    states = [live.suspended]
    live.suspend()
    states.append(live.suspended)
    live.resume()
    states.append(live.suspended)
    assert states == [False, True, False]
    assert held == [(False, True), (True, False), (True, True)]


def test_suspended_after_close(live: IoreqServer) -> None:
    """A callback that close calls still knows that transfers are held back."""
    seen: list[bool] = []
    live.on_quiesce(lambda: seen.append(live.suspended))
    live.suspend()
    live.close()
    assert seen == [False, True]
    assert live.suspended


def test_suspend_of_a_server_that_is_not_open(server: IoreqServer) -> None:
    """There is nothing to suspend."""
    with pytest.raises(ClosedError):
        server.suspend()


def test_close_ends_a_transfer_that_waits_for_resume(
    guest: MockDomain, cache: MapCache, server: IoreqServer
) -> None:
    """Otherwise a callback that waits for the transfer would keep the server from closing."""
    refused: list[BaseException] = []
    waiting, ended = threading.Event(), threading.Event()

    def transfer() -> None:
        waiting.set()
        try:
            with server.transfer():
                cache.write(0x5000, b"new")
        except ClosedError as error:
            refused.append(error)
        ended.set()

    server.open()
    server.suspend()
    server.on_quiesce(lambda: ended.wait(60))
    thread, _ = in_thread(transfer)
    assert waiting.wait(20)
    server.close()
    thread.join()
    assert [str(error).partition(":")[0] for error in refused] == [
        "the transfer waits for resume(), but its ioreq server is closed"
    ]
    assert cache.read(0x5000, 3) == bytes(3)
