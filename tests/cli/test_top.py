"""``xenmapcache top``: in a pseudo terminal, in a pipe, and as JSON. A thread plays the process."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import pytest

from tests.cli.process import MODULE, environment
from tests.observe.monitor_kit import SNAPSHOT, S
from xenmapcache.cli import main, top, view
from xenmapcache.cli.keys import END, ESCAPE, RESIZED, SUSPENDED, Keys
from xenmapcache.cli.output import Display
from xenmapcache.observe import watch as watching
from xenmapcache.observe.asking import Answer, Answers
from xenmapcache.observe.rates import ORDERS
from xenmapcache.observe.snapshot import Snapshot
from xenmapcache.observe.sockets import VARIABLE, SocketFolder
from xenmapcache.observe.watch import Watch

ESCAPES = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")
LAST_WORD = b"t stale"
"""The end of a screen."""


def answer(number: int, pid: int) -> Snapshot:
    """Return the answer to a question. A second passes, and 4 mappings are made, each time."""
    caches = tuple(
        replace(cache, stats=None if cache.stats is None else cache.stats._replace(maps=4 * number))
        for cache in SNAPSHOT.caches[:1]
    )
    return replace(SNAPSHOT, pid=pid, now_ns=SNAPSHOT.now_ns + number * S, caches=caches)


class Process:
    """A monitor that answers as if it were another process. Also a context manager.

    Args:
        folder: of the sockets.
        pid: whose number its socket has.
        answers: makes the answer to each question; what it raises ends the connection.
    """

    def __init__(
        self, folder: Path, pid: int, answers: Callable[[int, int], Snapshot] = answer
    ) -> None:
        self.pid = pid
        self.asked = 0
        self._answers = answers
        with SocketFolder(folder, create=True) as opened:
            self._listener = opened.listen(pid)
        self._listener.setblocking(True)
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """End, as a process that is killed: its socket stays, and refuses connections."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                assert connection.recv(100) == b"state\n"
                line = self._answers(self.asked, self.pid).to_json()
                self.asked += 1
                connection.sendall(f"{line}\n".encode())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of sockets, for this process and those that it starts."""
    path = tmp_path / "sockets"
    monkeypatch.setenv(VARIABLE, str(path))
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.delenv("LINES", raising=False)
    return path


@pytest.fixture
def process(folder: Path) -> Iterator[Process]:
    """A process that can be asked. Its number is that of the tests."""
    with Process(folder, os.getpid()) as made:
        yield made


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the command would have waited."""
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    return waited


# --- without a terminal -------------------------------------------------------------------


def test_json_is_a_line_for_each_interval(
    process: Process, no_waiting: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    """It has the rates since the line before; the first one is since the command began."""
    status = main(["top", "--json", "--count", "3", "--interval", "2.5"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (status, no_waiting) == (0, [2.5] * 3)
    assert [line["snapshot"]["now_ns"] - SNAPSHOT.now_ns for line in lines] == [S, 2 * S, 3 * S]
    rates = {"seconds": 1.0, "maps": 4.0, "evictions": 0.0, "invalidations": 0.0, "requests": 0.0}
    for line in lines:
        assert (line["pid"], line["problem"], line["rates"]) == (os.getpid(), None, rates)
    found = Snapshot.from_json(json.dumps(lines[2]["snapshot"]))
    assert found == answer(3, os.getpid())


def test_each_line_is_handed_over_at_once(
    process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that reads them needs not wait until a buffer is full."""
    written = io.BytesIO()
    lines: list[int] = []
    monkeypatch.setattr("time.sleep", lambda _: lines.append(written.getvalue().count(b"\n")))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert main(["top", "--json", "--count", "3"]) == 0
    assert lines == [0, 1, 2]


def test_json_needs_no_rich(
    process: Process, no_waiting: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The screens do."""
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert main(["top", "--json", "--count", "1"]) == 0
    with pytest.raises(SystemExit) as caught:
        main(["top", "--count", "1"])
    assert caught.value.code == 2


def test_json_without_an_answer(
    folder: Path, no_waiting: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    """The line says why; so does the next one that the clock allows no rate."""

    def answers(number: int, pid: int) -> Snapshot:
        found = answer(0 if number > 1 else number, pid)
        return replace(found, argv="x" * 2000) if number == 1 else found

    with Process(folder, os.getpid(), answers):
        assert main(["top", "--json", "--count", "2"]) == 0
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (first["rates"], first["snapshot"]) == (None, None)
    assert "argv" in first["problem"]
    assert (second["rates"], second["problem"]) == (None, None)
    assert second["snapshot"]["pid"] == os.getpid()


def test_a_pipe_gets_one_screen_after_the_other(
    process: Process, no_waiting: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    """Without keys, and with nothing that is cut."""
    pytest.importorskip("rich", reason="rich is not installed")
    assert main(["top", str(process.pid), "--count", "2", "--sort", "owner"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines.count("") == 3  # one between the screens, and one in each
    assert [line for line in lines if line.startswith("maps/s ")] == [
        "maps/s 4.0  evictions/s 0.0  invalidations/s 0.0  requests/s 0.0"
    ] * 2
    assert owners(lines) == ["disk0", "net", "vga"] * 2
    assert "sort by" not in "".join(lines)


@pytest.mark.parametrize("arguments", [["--json"], []])
def test_the_process_ends(
    arguments: list[str],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """That is said on stderr, and the status is 1."""
    pytest.importorskip("rich", reason="rich is not installed")
    with subprocess.Popen([sys.executable, "-S", "-c", ""]) as ended:
        pass
    with Process(folder, ended.pid) as process:
        monkeypatch.setattr("time.sleep", lambda _: process.end())
        assert main(["top", *arguments]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == f"xenmapcache: note: process {ended.pid} has ended\n"


def test_no_process(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The remedy is named. The number of a process that cannot be asked is an error."""
    assert main(["top", "--json"]) == 1
    assert "XENMAPCACHE_MONITOR=1" in capsys.readouterr().out
    assert main(["top", "--json", "1"]) == 2
    assert "process 1 has no monitor" in capsys.readouterr().err


def test_several_processes(
    process: Process, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One has to be named; the message has the numbers."""
    with Process(folder, 1):
        assert main(["top", "--json", "--count", "1"]) == 2
    text = f"processes 1, {os.getpid()} can be asked; name one: xenmapcache top PID"
    assert capsys.readouterr().err == f"xenmapcache: error: {text}\n"


def test_one_process_that_does_not_answer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It cannot be watched."""
    with Process(folder, os.getpid(), lambda *_: replace(SNAPSHOT, argv="x" * 2000)):
        assert main(["top", "--json"]) == 1
    printed = capsys.readouterr()
    assert "No process of this user has a monitor. To open one" in printed.out
    assert "argv" in printed.err


@pytest.mark.parametrize("value", ["0", "0.05", "86401", "nan", "x"])
def test_intervals(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Others than 0.1 s to a day are refused."""
    with pytest.raises(SystemExit) as caught:
        main(["top", "--interval", value])
    assert caught.value.code == 2
    assert "must be a number of seconds from 0.1 to 86400" in capsys.readouterr().err


def test_the_orders_are_those_of_the_screen() -> None:
    """The parser has a list of its own, because it imports little."""
    assert tuple(ORDERS) == top.ORDERS


# --- the parts --------------------------------------------------------------------------------


class Shown:
    """A display without a terminal. It counts the screens."""

    height = 24

    def __init__(self) -> None:
        self.screens = 0

    def show(self, content: object) -> None:
        self.screens += 1


class Typed:
    """Keys that were typed beforehand. Notes how long it should have waited for each."""

    def __init__(self, *keys: str) -> None:
        self._keys = iter(keys)
        self.waits: list[float] = []

    def wait(self, seconds: float) -> str:
        self.waits.append(seconds)
        return next(self._keys)


def run_view(
    monkeypatch: pytest.MonkeyPatch, keys: Typed, count: int | None = None
) -> tuple[Any, str, int]:
    """Run a live view. The clock gains a second with each look, and each question is answered.

    Returns:
        The view, why it stopped, and how many screens it has shown.
    """
    pytest.importorskip("rich", reason="rich is not installed")
    ticks = iter(range(1000))
    monkeypatch.setattr("time.monotonic", lambda: float(next(ticks)))
    numbers = iter(range(1, 1000))

    def ask(pids: list[int]) -> Answers:
        return Answers((Answer(pids[0], "", answer(next(numbers), pids[0])),), ())

    monkeypatch.setattr(watching, "ask", ask)
    options = top_options("--interval", "10", *(["--count", str(count)] if count else []))
    display = Shown()
    made = view.View(Watch(answer(0, 1)), display, keys, options)  # type: ignore[arg-type] # the two above
    return made, made.run(), display.screens


def top_options(*arguments: str) -> Any:  # noqa: ANN401 - as argparse has it
    from xenmapcache.cli.parser import make_parser

    return make_parser().parse_args(["top", *arguments])


def test_the_process_is_asked_after_each_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key does not make it later; space does, because the process was asked then."""
    keys = Typed("o", "x", RESIZED, ESCAPE, "", "s", " ", "q")
    _, reason, screens = run_view(monkeypatch, keys)
    assert (reason, screens) == ("q", 8)
    assert keys.waits == [9.0, 8.0, 7.0, 6.0, 5.0, 9.0, 8.0, 9.0]


@pytest.mark.parametrize("reason", [END, SUSPENDED, "q"])
def test_reasons_to_stop(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    """The process has not ended for that."""
    made, found, _ = run_view(monkeypatch, Typed("", reason))
    assert (found, made.has_ended) == (reason, False)


def test_a_number_of_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    """The view ends after them, and not because the process has ended."""
    made, reason, screens = run_view(monkeypatch, Typed("", "a", "", ""), count=3)
    assert (reason, made.has_ended, screens) == (END, False, 4)


@pytest.fixture
def keys() -> Iterator[tuple[Keys, int]]:
    """The keys of a pseudo terminal, and its other end."""
    leader, follower = pty.openpty()
    made = Keys(follower)
    handlers = [signal.getsignal(number) for number in (signal.SIGWINCH, signal.SIGTSTP)]
    made.begin()
    yield made, leader
    made.end()
    made.end()
    assert handlers == [signal.getsignal(number) for number in (signal.SIGWINCH, signal.SIGTSTP)]
    for fd in (leader, follower):
        with contextlib.suppress(OSError):
            os.close(fd)


def test_keys_come_one_by_one(keys: tuple[Keys, int]) -> None:
    """However many were typed. Without one, the answer is empty."""
    found, leader = keys
    assert found.wait(0) == ""
    assert found.wait(-1) == ""
    os.write(leader, b"so\xff")
    assert [found.wait(60) for _ in range(3)] == ["s", "o", "\xff"]
    os.write(leader, b"\x1b[A")
    assert found.wait(60) == ESCAPE
    assert found.wait(0) == ""


def test_signals_wake_up(keys: tuple[Keys, int], capfd: pytest.CaptureFixture[str]) -> None:
    """SIGWINCH and SIGTSTP end the wait, in order; more than the pipe takes are the same."""
    found, _ = keys
    signal.raise_signal(signal.SIGTSTP)
    for _ in range(70_000):
        signal.raise_signal(signal.SIGWINCH)
    assert [found.wait(1), found.wait(1)] == [SUSPENDED, RESIZED]
    assert capfd.readouterr().err == ""


def test_other_signals_draw_again(keys: tuple[Keys, int]) -> None:
    """Those of a program that has handlers of its own."""
    found, _ = keys
    previous = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        signal.raise_signal(signal.SIGUSR1)
        assert found.wait(1) == RESIZED
    finally:
        signal.signal(signal.SIGUSR1, previous)


def test_the_end_of_the_terminal(keys: tuple[Keys, int]) -> None:
    """It ends the wait. Then there are no modes to put back."""
    found, leader = keys
    os.close(leader)
    assert found.wait(60) == END


def test_a_terminal_that_refuses_to_be_read(keys: tuple[Keys, int]) -> None:
    """It has ended, too. The kernel refuses, for example, if the shell has ended."""
    found, _ = keys
    leader, follower = pty.openpty()
    os.close(follower)
    found._fd, kept = leader, found._fd
    assert found.wait(60) == END
    found._fd = kept
    os.close(leader)


def test_the_display_of_a_terminal_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Giving it back raises nothing."""
    pytest.importorskip("rich", reason="rich is not installed")

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    display = Display()
    monkeypatch.setattr(display._console, "show_cursor", fail)
    display.end()


def test_a_terminal_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a terminal, beginning fails, and ending has nothing to do."""
    reading, writing = os.pipe()
    made = Keys(reading)
    with pytest.raises(termios.error):
        made.begin()
    made.end()
    for fd in (reading, writing):
        os.close(fd)


# --- in a terminal ------------------------------------------------------------------------


class Terminal:
    """The command in a pseudo terminal of 80 columns and 24 lines. Also a context manager."""

    def __init__(self, *arguments: str, **variables: str) -> None:
        self._leader, follower = pty.openpty()
        self.resize(24, 80)
        self.modes = termios.tcgetattr(self._leader)
        self.child = subprocess.Popen(
            [*MODULE, "top", "--interval", "3600", *arguments],
            stdin=follower,
            stdout=follower,
            stderr=subprocess.PIPE,
            env=environment(TERM="xterm", **variables),
        )
        os.close(follower)
        self.received = b""
        self._shown = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.child.kill()
        self.child.__exit__(None, None, None)
        os.close(self._leader)

    def resize(self, lines: int, columns: int) -> None:
        """Change the size of the terminal."""
        fcntl.ioctl(self._leader, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def read(self) -> bool:
        """Receive something. Return whether the command still has the terminal."""
        ready, _, _ = select.select([self._leader], [], [], 60)
        assert ready, self.received
        try:
            chunk = os.read(self._leader, 65536)
        except OSError:  # EIO: Linux's way to say that the other side has closed
            return False
        self.received += chunk
        self._shown += chunk
        return True

    def screen(self) -> list[str]:
        """Return the next screen, without colours."""
        while LAST_WORD not in ESCAPES.sub(b"", self._shown):
            assert self.read(), self.received
        plain = ESCAPES.sub(b"", self._shown)
        # Each line has 80 columns, and no line end follows.
        text, _, rest = plain.partition(LAST_WORD)
        self._shown = rest
        text = text.lstrip() + LAST_WORD
        return [line.rstrip() for line in re.findall(".{1,80}", text.decode().replace("\r\n", ""))]

    def press(self, keys: str) -> None:
        """Press keys."""
        os.write(self._leader, keys.encode())

    def status_without_a_word(self) -> int:
        """Return the status of the command that stops, or ends, and writes nothing before."""
        while True:
            pid, status = os.waitpid(self.child.pid, os.WUNTRACED | os.WNOHANG)
            if pid:
                return status
            ready, _, _ = select.select([self._leader], [], [], 0.1)
            assert not ready

    def close(self) -> tuple[int, str]:
        """Wait for the command's end. Return its status, and what it said on stderr."""
        while self.read():
            pass
        _, said = self.child.communicate(timeout=60)
        return self.child.returncode, said.decode()

    def is_given_back(self) -> bool:
        """Return whether the terminal is as before: modes, cursor, and what it showed."""
        on, off = (self.received.rfind(code) for code in (b"\x1b[?1049h", b"\x1b[?1049l"))
        hidden, seen = (self.received.rfind(code) for code in (b"\x1b[?25l", b"\x1b[?25h"))
        modes = termios.tcgetattr(self._leader)
        return modes == self.modes and 0 <= on < off and 0 <= hidden < seen


@pytest.fixture
def terminal(process: Process) -> Iterator[Terminal]:
    """The command, which watches the process."""
    pytest.importorskip("rich", reason="rich is not installed")
    with Terminal(str(process.pid)) as made:
        yield made


def owners(screen: list[str]) -> list[str]:
    """Return the owners of the leases that a screen shows, from above."""
    rows = [line for line in screen if "MainThread" in line or "worker" in line]
    return re.findall("vga|disk0|net", " ".join(rows))


@pytest.mark.slow
def test_keys(terminal: Terminal) -> None:
    """They sort at once, ask the process now, and quit. Others, and arrows, do nothing."""
    first = terminal.screen()
    assert first[0].startswith(f"Process {os.getpid()}, up ")
    assert first[1] == "maps/s -  evictions/s -  invalidations/s -  requests/s -"
    orders = {"o": "disk0", "s": "vga", "t": "disk0", "a": "vga"}
    for key, owner in orders.items():
        terminal.press(key)
        assert owners(terminal.screen())[0] == owner
    for key in ("x", "\x1b[A"):
        terminal.press(key)
        assert terminal.screen() == first
    terminal.press(" ")
    assert terminal.screen()[1].startswith("maps/s 4.0 ")
    terminal.press("q")
    assert terminal.close() == (0, "")
    assert terminal.is_given_back()
    assert b"\x1b[1;31m" in terminal.received  # the stale lease


@pytest.mark.slow
def test_another_size(terminal: Terminal) -> None:
    """The screen follows at once."""
    assert len(owners(terminal.screen())) == 3
    terminal.resize(10, 80)
    terminal.child.send_signal(signal.SIGWINCH)
    screen = terminal.screen()
    assert owners(screen) == []
    assert screen[-2:-1] == ["3 more leases, not shown"]


@pytest.mark.slow
def test_the_process_ends_while_it_is_watched(terminal: Terminal, process: Process) -> None:
    """The terminal is given back first, so that the message stays."""
    terminal.screen()
    process.end()
    terminal.press(" ")
    pid = os.getpid()
    message = f"xenmapcache: note: process {pid} has no monitor any longer\n"
    assert terminal.close() == (1, message)
    assert terminal.is_given_back()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGQUIT, 131)],
)
def test_signals_give_back_the_terminal(
    terminal: Terminal, number: signal.Signals, status: int
) -> None:
    """Without a traceback."""
    terminal.screen()
    terminal.child.send_signal(number)
    assert terminal.close() == (status, "")
    assert terminal.is_given_back()


@pytest.mark.slow
def test_a_suspended_command_has_given_back_the_terminal(terminal: Terminal) -> None:
    """When it continues, it takes the terminal again."""
    screen = terminal.screen()
    terminal.child.send_signal(signal.SIGTSTP)
    while b"\x1b[?1049l" not in terminal.received:
        assert terminal.read()
    assert os.WIFSTOPPED(terminal.status_without_a_word())
    assert terminal.is_given_back()
    terminal.child.send_signal(signal.SIGCONT)
    assert terminal.screen() == screen
    assert not terminal.is_given_back()
    terminal.press("q")
    assert terminal.close() == (0, "")
    assert terminal.is_given_back()


@pytest.mark.slow
@pytest.mark.parametrize("variables", [{"TERM": "dumb"}, {}])
def test_a_terminal_that_cannot_be_drawn_on(process: Process, variables: dict[str, str]) -> None:
    """Screens follow each other there, and if keys cannot be read."""
    pytest.importorskip("rich", reason="rich is not installed")
    leader, follower = pty.openpty()
    with open(os.devnull) as null:
        done = subprocess.run(
            [*MODULE, "top", "--interval", "0.1", "--count", "1"],
            stdin=follower if variables else null,
            stdout=follower,
            env=environment(**{"TERM": "xterm"} | variables),
            timeout=60,
            check=False,
        )
    os.close(follower)
    shown = os.read(leader, 65536)
    os.close(leader)
    assert done.returncode == 0
    assert b"maps/s 4.0" in shown
    assert b"\x1b[?1049h" not in shown
