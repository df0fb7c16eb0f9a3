"""A server that is closed while foreign code still runs: it happens once, and the log says so."""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Iterator

import pytest

from tests.kit import in_thread, link_of
from xenmapcache import MockDomain, XenCallError
from xenmapcache.devicemodel import IoreqServer, ending
from xenmapcache.devicemodel.connection import Connection


def test_giving_up_happens_once(guest: MockDomain, server: IoreqServer) -> None:
    """A second call does nothing; and nothing is given up that is closed."""
    server.open()
    server._runtime.give_up()
    server._runtime.give_up()
    connection = Connection.__new__(Connection)
    server._runtime.ending.give_up(connection)
    assert guest.ioreq_servers == {}


def test_errors_while_giving_up_are_in_the_log(
    guest: MockDomain,
    server: IoreqServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Xen's refusal stops no other step."""
    server.open()

    def fail() -> None:
        raise XenCallError("disable", 1, errno.EPERM)

    monkeypatch.setattr(link_of(server), "disable", fail)
    server._runtime.give_up()
    assert guest.ioreq_servers == {}
    assert "disable failed" in caplog.text


class Waiting(logging.Handler):
    """A log handler that does not return before it may."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = threading.Event()
        self.leave = threading.Event()
        self.written: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.entered.set()
        assert self.leave.wait(20)
        self.written.append(record.getMessage())


@pytest.fixture
def waiting() -> Iterator[Waiting]:
    handler = Waiting()
    logging.getLogger("xenmapcache.devicemodel").addHandler(handler)
    yield handler
    handler.leave.set()
    logging.getLogger("xenmapcache.devicemodel").removeHandler(handler)


def test_a_close_returns_when_the_log_has_the_line(
    server: IoreqServer, waiting: Waiting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread that gives up may still be writing it, and the program may be about to end."""
    server.open()
    thread, _ = in_thread(server._runtime.give_up)
    assert waiting.entered.wait(20)
    monkeypatch.setattr(time, "sleep", lambda _: waiting.leave.set())
    server.close()
    assert len(waiting.written) == 1
    thread.join()


def test_a_log_handler_that_hangs_does_not_hang_a_close(
    server: IoreqServer, waiting: Waiting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line is waited for, for a second."""
    monkeypatch.setattr(ending, "_REPORT_S", 0.01)
    server.open()
    thread, _ = in_thread(server._runtime.give_up)
    assert waiting.entered.wait(20)
    server.close()
    assert waiting.written == []
    waiting.leave.set()
    thread.join()


def test_a_child_waits_for_no_line_of_its_parent(
    server: IoreqServer, waiting: Waiting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that writes it is not there."""
    server.open()
    thread, _ = in_thread(server._runtime.give_up)
    assert waiting.entered.wait(20)
    monkeypatch.setattr(time, "sleep", pytest.fail)
    monkeypatch.setattr(server._runtime.ending, "_pid", 0)
    server._runtime.ending.wait_for_report()
    waiting.leave.set()
    thread.join()
