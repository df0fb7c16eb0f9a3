"""Asking monitors: which processes have one, and what their caches and servers hold."""

from __future__ import annotations

import os
import selectors
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from time import monotonic

from .snapshot import MAX_BYTES, Snapshot, SnapshotError
from .sockets import SocketFolder, UnsafeFolderError, folders, socket_name

TIMEOUT_S = 2.0
"""How long a process has to answer."""

_CHUNK = 1 << 16


@dataclass(frozen=True, slots=True)
class Answer:
    """What a process has answered.

    Attributes:
        pid: of the process.
        path: of its socket.
        snapshot: the answer, or None.
        problem: why there is none.
    """

    pid: int
    path: str
    snapshot: Snapshot | None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Answers:
    """What all processes have answered.

    Attributes:
        answers: by the numbers of the processes.
        problems: folders that were not looked at, and why.
    """

    answers: tuple[Answer, ...]
    problems: tuple[str, ...]


def ask(pids: Iterable[int] | None = None, timeout: float | None = None) -> Answers:
    """Ask this user's processes what their caches and servers hold, all at the same time.

    Sockets of processes that have ended are removed.

    Args:
        pids: which processes; by default all that can be asked. Those without a socket have no
            answer.
        timeout: how long to wait, in seconds; by default :data:`TIMEOUT_S`.
    """
    timeout = TIMEOUT_S if timeout is None else timeout
    wanted = None if pids is None else frozenset(pids)
    questions: dict[int, _Question] = {}
    problems = []
    with selectors.DefaultSelector() as selector:
        try:
            for path in folders():
                try:
                    with SocketFolder(path) as folder:
                        for pid in folder.pids():
                            if pid not in questions and (wanted is None or pid in wanted):
                                question = _Question(folder, pid)
                                if not question.has_ended:
                                    questions[pid] = question
                                    question.register(selector)
                except FileNotFoundError:
                    pass
                except UnsafeFolderError as error:
                    problems.append(f"{error.filename}: {error.strerror}")
            _wait(selector, monotonic() + timeout)
        finally:
            for question in questions.values():
                question.close()
    answers = [questions[pid].answer(timeout) for pid in sorted(questions)]
    return Answers(tuple(answers), tuple(problems))


def _wait(selector: selectors.BaseSelector, deadline: float) -> None:
    """Receive answers until all are complete, or it takes too long."""
    while selector.get_map():
        remaining = deadline - monotonic()
        if remaining <= 0:
            return
        for key, _ in selector.select(remaining):
            key.data.receive(selector)


class _Question:
    """A process that is asked."""

    def __init__(self, folder: SocketFolder, pid: int) -> None:
        self._pid = pid
        self._path = os.fspath(folder.path / socket_name(pid))
        self._received = bytearray()
        self._problem = ""
        self._ended = False
        self._connection: socket.socket | None = None
        self.has_ended = False
        try:
            self._connection = folder.connect(pid)
            self.has_ended = self._connection is None
            if self._connection is not None:
                self._connection.send(b"state\n")
        except BlockingIOError:
            self._problem = "does not answer, and other clients wait for it already"
        except OSError as error:
            self._problem = f"cannot be asked: {error.strerror}"

    def register(self, selector: selectors.BaseSelector) -> None:
        """Have its answer received."""
        if self._connection is not None and not self._problem:
            selector.register(self._connection, selectors.EVENT_READ, self)

    def receive(self, selector: selectors.BaseSelector) -> None:
        """Receive a part of the answer."""
        assert self._connection is not None  # noqa: S101 - for mypy; it is registered
        try:
            data = self._connection.recv(_CHUNK)
        except OSError as error:
            data = b""
            self._problem = f"cannot be asked: {error.strerror}"
        self._received += data
        self._ended = not data
        if not data or b"\n" in data or len(self._received) > MAX_BYTES:
            selector.unregister(self._connection)

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()

    def answer(self, timeout: float) -> Answer:
        """Return what was received."""
        line, end, _ = self._received.partition(b"\n")
        snapshot = None
        problem = self._problem
        if not problem and not end and len(line) <= MAX_BYTES:
            problem = f"has not answered within {timeout:g} s"
            if self._ended:
                problem = "has closed the connection without an answer"
        if not problem:
            try:
                snapshot = Snapshot.from_json(bytes(line))
            except SnapshotError as error:
                problem = str(error)
        return Answer(self._pid, self._path, snapshot, problem)
