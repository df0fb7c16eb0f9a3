"""A process that is asked again and again."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from tests.observe.monitor_kit import SNAPSHOT, S
from xenmapcache.observe import watch as module
from xenmapcache.observe.asking import Answer, Answers
from xenmapcache.observe.snapshot import Snapshot
from xenmapcache.observe.watch import Watch

LATER = replace(SNAPSHOT, now_ns=SNAPSHOT.now_ns + S)


def asked(
    monkeypatch: pytest.MonkeyPatch, watch: Watch, snapshot: Snapshot | None, problem: str = ""
) -> bool:
    """Ask, and let the process give an answer."""
    pid = watch.current.pid

    def ask(pids: list[int]) -> Answers:
        assert pids == [pid]
        return Answers((Answer(pid, "/run/1.sock", snapshot, problem),), ())

    monkeypatch.setattr(module, "ask", ask)
    return watch.ask()


def test_the_last_two_answers_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """So there are no rates before the second one."""
    watch = Watch(SNAPSHOT)
    assert (watch.previous, watch.current, watch.problem) == (None, SNAPSHOT, "")
    assert asked(monkeypatch, watch, LATER)
    assert (watch.previous, watch.current) == (SNAPSHOT, LATER)


def test_a_question_without_an_answer_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The problem is named until the next answer."""
    watch = Watch(SNAPSHOT)
    assert asked(monkeypatch, watch, None, "has not answered within 2 s")
    assert watch.problem == "process 4321 has not answered within 2 s; this is its last answer"
    assert (watch.previous, watch.current) == (None, SNAPSHOT)
    assert asked(monkeypatch, watch, LATER)
    assert (watch.previous, watch.current, watch.problem) == (SNAPSHOT, LATER, "")


@pytest.mark.parametrize(("change", "same"), [(S // 2, True), (-S // 2, True), (2 * S, False)])
def test_another_process_with_its_number(
    monkeypatch: pytest.MonkeyPatch, change: int, same: bool
) -> None:
    """It was started at another time. Its answer is not shown as if it were the first one's."""
    watch = Watch(SNAPSHOT)
    other = replace(LATER, started_ns=SNAPSHOT.started_ns + change)
    assert asked(monkeypatch, watch, other) == same
    assert (watch.current is other) == same
    expected = "" if same else "process 4321 has ended, and another one has its number"
    assert watch.problem == expected


def test_the_end_of_the_process_and_of_its_monitor(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are told apart; a process of another user is there, too."""
    monkeypatch.setattr(module, "ask", lambda _: Answers((), ()))
    with subprocess.Popen([sys.executable, "-S", "-c", ""]) as ended:
        pass
    watch = Watch(replace(SNAPSHOT, pid=ended.pid))
    assert not watch.ask()
    assert watch.problem == f"process {ended.pid} has ended"
    watch = Watch(replace(SNAPSHOT, pid=os.getpid()))
    assert not watch.ask()
    assert watch.problem == f"process {os.getpid()} has no monitor any longer"

    def kill(*_: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", kill)
    assert not watch.ask()
    assert watch.problem == f"process {os.getpid()} has no monitor any longer"
