"""The monitor: a socket at which others ask what a process's caches and servers hold."""

from __future__ import annotations

import gc
import json
import logging
import os
import socket
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.observe.monitor_kit import STUCK, Program
from xenmapcache import Backend, MapCache, MockDomain
from xenmapcache.devicemodel import IoreqServer
from xenmapcache.observe import monitor as module
from xenmapcache.observe.answering import Responder
from xenmapcache.observe.asking import ask
from xenmapcache.observe.monitor import ProcessMonitor, serve
from xenmapcache.observe.snapshot import Snapshot
from xenmapcache.observe.sockets import VARIABLE, SocketFolder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the sockets; no monitor is left open in it."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "run"))
    yield tmp_path / "run"
    left = [*module._process.monitors]
    module._process.close_all()
    assert not left


def connect(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(20)
    folder, name = os.path.split(path)
    fd = os.open(folder, os.O_PATH)
    try:
        connection.connect(f"/proc/self/fd/{fd}/{name}")  # however long the path is
    finally:
        os.close(fd)
    return connection


def command(path: str, line: bytes) -> dict[str, Any]:
    """Send a line to a socket, and return the answer."""
    with connect(path) as connection, connection.makefile("rb") as answers:
        connection.sendall(line + b"\n")
        found: dict[str, Any] = json.loads(answers.readline())
        return found


def ask_here() -> Snapshot:
    """Return what this process answers."""
    (answer,) = ask([os.getpid()], 20).answers
    assert answer.snapshot is not None, answer.problem
    return answer.snapshot


def test_state_is_a_line_of_json(cache: MapCache, folder: Path) -> None:
    """It has the process, its caches and their leases. The socket is the user's alone."""
    lease = cache.map_dma(0x1010, 0x20, owner="disk0", direction="from-device")
    device = cache.map_device(0, 0x1000, owner="rom")
    cache.invalidate()
    with serve(cache) as monitor:
        assert repr(monitor) == f"<monitor at '{folder}/{os.getpid()}.sock'>"
        assert Path(monitor.path).stat().st_mode & 0o777 == 0o600
        assert folder.stat().st_mode & 0o777 == 0o700
        found = command(monitor.path, b"state\r")
        assert Snapshot.from_json(json.dumps(found)) != ask_here()  # for the time has passed
    assert found["version"] == 1
    assert found["pid"] == os.getpid()
    assert found["started_ns"] <= found["now_ns"]
    (state,) = found["caches"]
    assert state["name"] == f"MapCache of {cache.backend!r}"
    assert (state["domid"], state["closed"], state["incomplete"]) == (1, False, False)
    assert state["stats"] == cache.stats()._asdict()
    disk, rom = state["leases"]
    assert disk["taken_ns"] <= rom["taken_ns"] <= found["now_ns"]
    assert (disk["start"], disk["end"], disk["stale"]) == (0x1010, 0x1030, True)
    assert (disk["kind"], disk["direction"]) == ("dma", "from-device")
    assert (rom["id"], rom["kind"], rom["direction"], rom["stale"]) == (
        device.id, "device", None, False,
    )  # fmt: skip
    assert disk["thread"] == threading.current_thread().name
    lease.release()
    device.release()


@pytest.mark.parametrize("line", [b"", b"stats", b"\xff" * 1000, b"state state"])
def test_unknown_commands(cache: MapCache, folder: Path, line: bytes) -> None:
    """They get an error that says what to send, and the client may go on."""
    del folder
    with serve(cache) as monitor:
        found = command(monitor.path, line)
        assert found["version"] == 1
        assert found["error"].startswith("unknown command b'")
        assert found["error"].endswith("': send 'state'")
        assert command(monitor.path, b"state")["pid"] == os.getpid()


def test_what_cannot_be_watched(cache: MapCache, folder: Path) -> None:
    """It is refused before a socket is made."""
    with pytest.raises(TypeError, match="needs at least one MapCache or IoreqServer"):
        serve()
    with pytest.raises(TypeError, match="'x' must be a MapCache or an IoreqServer"):
        serve(cache, "x")  # type: ignore[arg-type] # on purpose
    assert not folder.exists()


def test_several_monitors_share_a_socket(cache: MapCache, backend: Backend, folder: Path) -> None:
    """What two of them watch is shown once. The last one that is closed removes the socket."""
    other = MapCache(backend)
    first, second = serve(cache), serve(other, cache)
    assert first.path == second.path
    assert [each.closed for each in ask_here().caches] == [False, False]
    first.close()
    assert first.closed
    assert repr(first).startswith("<closed monitor")
    first.close()
    assert len(ask_here().caches) == 2
    other.close()
    assert [each.closed for each in ask_here().caches] == [True, False]
    second.close()
    second.close()
    assert [*folder.iterdir()] == []
    with serve(cache):
        assert len(ask_here().caches) == 1


def test_a_monitor_keeps_no_cache_alive(backend: Backend, folder: Path) -> None:
    """Those that have died are forgotten."""
    del folder
    cache = MapCache(backend)
    with serve(cache) as monitor:
        del cache
        gc.collect()
        assert ask_here().caches == ()
        assert not monitor.watched


def test_a_cache_that_dies_while_it_is_read(cache: MapCache, folder: Path) -> None:
    """It is left out."""
    del folder
    with serve(cache) as monitor:
        (watched,) = monitor.watched.values()
        watched.get = lambda: None  # type: ignore[assignment] # as a dead reference
        assert ask_here().caches == ()


def test_a_process_that_cannot_be_read(
    cache: MapCache, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client gets the reason, and the monitor goes on."""
    del folder

    def fail(*_: object) -> Snapshot:
        raise KeyError("a fault")

    with serve(cache) as monitor, monkeypatch.context() as patch:
        patch.setattr(module, "read_process", fail)
        error = command(monitor.path, b"state")["error"]
        assert error == "this process cannot be read: KeyError('a fault')"
        (answer,) = ask(timeout=20).answers
        assert answer.problem == f"the monitor reports: {error}"
        patch.undo()
        assert ask_here().pid == os.getpid()


def test_a_stuck_program_answers(cache: MapCache, domain: MockDomain, folder: Path) -> None:
    """Although another thread holds the locks of the cache and of the server for ever."""
    del folder
    server = IoreqServer(domain, cache)
    held, finish = threading.Event(), threading.Event()

    def hold() -> None:
        with cache._budget.lock, server._runtime.lock:
            held.set()
            finish.wait()

    thread = threading.Thread(target=hold)
    with serve(cache, server):
        thread.start()
        held.wait()
        try:
            found = ask_here()
        finally:
            finish.set()
            thread.join()
    assert [each.incomplete for each in found.caches] == [False]
    assert [each.name for each in found.servers] == ["<IoreqServer of domain 1, not open>"]


def test_the_thread_sleeps_while_nobody_asks(cache: MapCache, folder: Path) -> None:
    """It waits for an event, without a time."""
    del folder
    with serve(cache):
        responder = module._process._responder
        assert responder is not None
        assert responder._timeout() is None


def test_the_exit_of_the_process_closes_all(cache: MapCache, folder: Path) -> None:
    monitors = [serve(cache), serve(cache)]
    module._process.close_all()
    assert [each.closed for each in monitors] == [True, True]
    assert [*folder.iterdir()] == []


def test_a_socket_that_cannot_be_removed(
    cache: MapCache, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As when the process has given up root since. The log says so; closing is complete."""
    caplog.set_level(logging.INFO, "xenmapcache")
    monitor = serve(cache)
    folder.chmod(0o755)
    monitor.close()
    assert "the monitor's socket is not removed" in caplog.text
    assert module._process._responder is None
    folder.chmod(0o700)
    assert ask(timeout=20).answers == ()
    assert [*folder.iterdir()] == []


def test_no_thread_can_be_started(
    cache: MapCache, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is left, and the next attempt succeeds."""

    def fail(_: Responder) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(Responder, "start", fail)
        with pytest.raises(RuntimeError, match="can't start"):
            serve(cache)
    assert [*folder.iterdir()] == []
    with serve(cache):
        assert ask_here().pid == os.getpid()


def test_the_number_is_taken_by_another_pid_namespace(cache: MapCache, folder: Path) -> None:
    """Its socket is left alone."""
    with SocketFolder(folder, create=True) as opened, opened.listen(os.getpid()):
        with pytest.raises(FileExistsError, match="another PID namespace"):
            serve(cache)
        assert opened.pids() == [os.getpid()]


# --- other processes ------------------------------------------------------------------


def in_child(work: Callable[[], object]) -> int:
    """Fork, do some work in the child, and return its status."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that there are threads is the point
        child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def test_a_forked_child_answers_for_itself(cache: MapCache, backend: Backend, folder: Path) -> None:
    """Its parent's monitor is closed there, and the parent goes on answering."""
    with serve(cache) as monitor:

        def work() -> None:
            assert monitor.closed
            monitor.close()
            own_cache = MapCache(backend)
            with serve(own_cache) as own:
                assert own.path == f"{folder}/{os.getpid()}.sock"
                assert len(ask_here().caches) == 1

        assert in_child(work) == 0
        assert [each.pid for each in ask(timeout=20).answers] == [os.getpid()]
        assert ask_here().pid == os.getpid()


def test_forgetting(cache: MapCache, folder: Path) -> None:
    """As the child of a fork does it, but here: all sockets are closed, and the file stays."""
    monitor = serve(cache)
    responder = module._process._responder
    assert responder is not None
    module._process.forget()
    assert monitor.closed
    assert responder._listener.fileno() == -1
    assert [each.name for each in folder.iterdir()] == [f"{os.getpid()}.sock"]
    responder.stop()
    module._process.forget()
    assert ask(timeout=20).answers == ()


PROGRAM = """
import os, sys
from xenmapcache import open_cache
cache = open_cache("mock:16M")
print("ready", flush=True)
sys.stdin.readline()
"""
FORKED = """
import os, sys
from xenmapcache import open_cache
cache = open_cache("mock:16M")
if not os.fork():
    print("the child is ready", flush=True)
    os.read(0, 1)
    os._exit(0)
os.wait()
"""


@pytest.mark.slow
def test_any_program_can_be_asked(folder: Path) -> None:
    """Without changing it: the variable sets a hook, which caches and servers call."""
    with Program(PROGRAM, folder, "1") as program, Program(PROGRAM, folder, "0") as other:
        assert program.said == other.said == "ready"
        (answer,) = ask(timeout=20).answers
        assert answer.pid == program.pid
        assert answer.snapshot is not None
        assert len(answer.snapshot.caches) == 1
        assert answer.snapshot.argv.endswith(r"sys.stdin.readline()\n")
        assert program.end() == 0
        assert [*folder.iterdir()] == []


@pytest.mark.slow
def test_a_stuck_process_answers(folder: Path) -> None:
    """Whose thread holds the cache's lock for ever."""
    with Program(STUCK, folder, "1"):
        (answer,) = ask(timeout=20).answers
        assert answer.snapshot is not None
        (cache,) = answer.snapshot.caches
        assert [lease.owner for lease in cache.leases] == ["disk0", "vga\x1b[31m"]
        assert [lease.stale for lease in cache.leases] == [True, False]
        assert cache.leases[0].thread == "worker-1"
        assert cache.leases[0].origin == ("<string>:6 in <module>",)


@pytest.mark.slow
def test_what_a_killed_process_leaves_is_removed(folder: Path) -> None:
    """By the next one that asks, although a child that it has forked still lives."""
    with Program(FORKED, folder, "1") as program:
        program.kill()
        assert [each.name for each in folder.iterdir()] == [f"{program.pid}.sock"]
        assert ask(timeout=20).answers == ()
        assert [*folder.iterdir()] == []


# --- XENMAPCACHE_MONITOR --------------------------------------------------------------


def test_every_cache_and_server_is_shown(
    backend: Backend, domain: MockDomain, folder: Path
) -> None:
    """The hook is called with their methods; the first one opens the socket."""
    hook = ProcessMonitor()
    cache = MapCache(backend)
    hook(cache.observe)
    server = IoreqServer(domain, cache)
    hook(server.observe)
    found = ask_here()
    assert (len(found.caches), len(found.servers)) == (1, 1)
    module._process.close_all()
    hook(cache.observe)  # as in a forked child, whose parent's monitor is closed
    assert len(ask_here().caches) == 1
    module._process.close_all()
    assert [*folder.iterdir()] == []


def test_a_program_without_a_socket_runs(
    cache: MapCache, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One WARNING says why."""
    folder.symlink_to(folder.parent)
    hook = ProcessMonitor()
    hook(cache.observe)
    hook(cache.observe)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "XENMAPCACHE_MONITOR: there is no monitor" in caplog.text
    assert "link" in caplog.text
