"""Xen's complaints on their way to logging: without the library, without memory, in masses."""

from __future__ import annotations

import errno
import logging
import os
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from tests.descriptors import open_files
from tests.fake_xen import DOMID, Behaviour, FakeXen
from xenmapcache.binding import libc, toollog
from xenmapcache.binding.declarations import TOOL_LOG, Library
from xenmapcache.binding.foreignmemory import ForeignMemory
from xenmapcache.binding.interface import Function
from xenmapcache.errors import XenCallError


class StandIn:
    """A loader that finds a libxentoollog on any machine, or none."""

    name = "stand-in"

    def __init__(self, *, installed: bool = True) -> None:
        self.installed = installed
        self.destroyed: list[int] = []

    def open(self, library: Library, path: str) -> dict[str, Function]:
        assert (library, path) == (TOOL_LOG, TOOL_LOG.soname)
        if not self.installed:
            raise OSError("no such file")
        functions: dict[str, Any] = {
            "xtl_createlogger_stdiostream": lambda *_, result_out: result_out.append(1),
            "xtl_logger_destroy": SimpleNamespace(for_each=partial(map, self.destroyed.append)),
        }
        return functions


def test_without_the_library(
    fake: FakeXen, binding: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Xen is handed no logger, so it writes to stderr; calls and their errors are the same."""
    caplog.set_level(logging.DEBUG, "xenmapcache.xen")
    monkeypatch.setattr(toollog, "TOOL_LOG", TOOL_LOG._replace(soname="libnowhere.so.1"))
    with ForeignMemory(binding=binding, library=fake.library) as memory:
        assert fake.calls[0].arguments[0] == 0
        fake.plan("xenforeignmemory_restrict", Behaviour.FAIL, errno.EBUSY)
        with pytest.raises(XenCallError, match="EBUSY"):
            memory.restrict(DOMID)
    assert "Xen will write to stderr" in caplog.text


def test_no_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where C can make no stream the error says so, and its file is closed."""
    functions = {**libc.functions(), "fdopen": lambda *_, **__: (0, errno.ENOMEM)}
    monkeypatch.setattr(toollog, "libc_functions", lambda: functions)
    before = open_files()
    with pytest.raises(OSError, match="fdopen") as caught:
        toollog.ToolLog(StandIn())
    assert caught.value.errno == errno.ENOMEM
    assert open_files() <= before


def test_no_file_for_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is the kernel's, also if there is no file yet that could be closed."""

    def refuse(*_: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "memfd_create", refuse)
    with pytest.raises(OSError, match="Too many open files"):
        toollog.ToolLog(StandIn())


def test_a_flood_of_complaints(caplog: pytest.LogCaptureFixture) -> None:
    """What Xen says is brought once, in order; its file does not grow for ever."""
    caplog.set_level(logging.DEBUG, "xenmapcache.xen")
    before = open_files()
    loader = StandIn()
    log = toollog.ToolLog(loader)
    for number in range(5):
        os.write(log._fd, f"complaint {number}\n".encode() + b"x" * 30_000 + b"\n")
        assert log.drain().startswith(f"complaint {number}; xxx")
        assert os.fstat(log._fd).st_size < 100_000
    assert [record.message for record in caplog.records][::2] == [
        f"complaint {number}" for number in range(5)
    ]
    log.close()
    log.close()
    assert (open_files(), loader.destroyed) == (before, [1])


def test_what_xen_says_last(caplog: pytest.LogCaptureFixture) -> None:
    """Complaints that no failed call has brought are logged when the handle is closed."""
    caplog.set_level(logging.DEBUG, "xenmapcache.xen")
    log = toollog.ToolLog(StandIn())
    os.write(log._fd, b"goodbye\n")
    log.close()
    assert [record.message for record in caplog.records] == ["goodbye"]
