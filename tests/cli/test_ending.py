"""Signals that end a command: what has to be undone is undone, at whatever moment they come."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys

import pytest

from tests.cli.process import environment
from xenmapcache.cli.ending import Ending

SIGNALS = [
    (signal.SIGINT, KeyboardInterrupt, ()),
    (signal.SIGTERM, SystemExit, (143,)),
    (signal.SIGHUP, SystemExit, (129,)),
    (signal.SIGQUIT, SystemExit, (131,)),
]


@pytest.mark.parametrize(("number", "error", "arguments"), SIGNALS)
@pytest.mark.parametrize("place", ["begin", "work", "end"])
def test_a_signal_in_each_part(
    number: signal.Signals,
    error: type[BaseException],
    arguments: tuple[object, ...],
    place: str,
) -> None:
    """The first and the last part are done completely; the second is interrupted, or left out."""
    done: list[str] = []

    def step(name: str) -> None:
        if name == place:
            signal.raise_signal(number)
        done.append(name)

    with Ending() as ending, pytest.raises(error) as caught:
        ending.run_between(lambda: step("begin"), lambda: step("work"), lambda: step("end"))
    assert done == ["begin", *(["work"] if place == "end" else []), "end"]
    assert caught.value.args == arguments


def test_the_result_and_the_handlers() -> None:
    """Without a signal the work's result is returned, and handlers are as they were."""
    before = [signal.getsignal(number) for number, *_ in SIGNALS]
    with Ending() as ending:
        ending.check()
        assert ending.run_between(lambda: None, lambda: 7, lambda: None) == 7
    assert [signal.getsignal(number) for number, *_ in SIGNALS] == before


@pytest.mark.parametrize("place", ["begin", "work"])
def test_an_error_is_not_the_end_of_it(place: str) -> None:
    """Whatever part fails, the last one is done; its own failure is raised."""
    done: list[str] = []

    def fail(name: str) -> None:
        done.append(name)
        if name == place:
            raise OSError(name)

    with Ending() as ending, pytest.raises(OSError, match=place):
        ending.run_between(lambda: fail("begin"), lambda: fail("work"), lambda: fail("end"))
    assert done == (["begin", "end"] if place == "begin" else ["begin", "work", "end"])


def test_a_second_signal_interrupts_nothing() -> None:
    """The cleanup after a first signal is finished; the first signal's status counts."""
    done: list[str] = []

    def work() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGINT)
            done.append("cleanup")

    with Ending() as ending, pytest.raises(SystemExit) as caught:
        ending.run_between(lambda: None, work, lambda: done.append("end"))
    assert done == ["cleanup", "end"]
    assert caught.value.code == 143


def test_a_signal_that_got_lost() -> None:
    """An exception in a finalizer is not raised further; the next look raises it again."""
    with Ending() as ending:
        with contextlib.suppress(KeyboardInterrupt):  # as the interpreter does in a finalizer
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            ending.check()


def test_what_is_ignored_stays_so() -> None:
    """A program that nohup started is not ended by SIGHUP."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Ending() as ending:
            signal.raise_signal(signal.SIGHUP)
            ending.check()
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)


AT_EVERY_STEP = """
import signal, sys
from functools import partial
from xenmapcache.cli import ending

def attempt(point):
    done, count = [], 0
    pause, work, unpause = (partial(done.append, each) for each in ("pause", "work", "unpause"))
    def trace(frame, event, argument):
        nonlocal count
        if frame.f_code.co_filename != ending.__file__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            count += 1
            if count == point:
                signal.raise_signal(signal.SIGTERM)
        return trace
    sys._getframe().f_trace_opcodes = True  # CPython 3.12 looks for one before it traces any
    with ending.Ending() as guard:
        sys.settrace(trace)
        try:
            guard.run_between(pause, work, unpause)
        except SystemExit as end:
            done.append(end.code)
        finally:
            sys.settrace(None)
    return done, count

done, steps = attempt(0)
assert done == ["pause", "work", "unpause"], done
seen = set()
for point in range(1, steps + 1):
    done, _ = attempt(point)
    assert done.count("pause") == done.count("unpause") or "pause" not in done, (point, done)
    assert done.count("unpause") <= 1 and done[-1] == 143, (point, done)
    seen.add(tuple(done))
print(steps, len(seen))
"""


def test_a_signal_at_every_step() -> None:
    """Wherever SIGTERM comes between two instructions, what was begun is ended, once."""
    done = subprocess.run(
        [sys.executable, "-c", AT_EVERY_STEP],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    steps, seen = map(int, done.stdout.split())
    assert steps > 30
    assert seen >= 3
