"""Limits of work hold where they should: the tests' own yardstick."""

from __future__ import annotations

import gc
import sys
import threading

import pytest

from tests.effort import calls_at_most


def test_too_much_work_fails() -> None:
    """A block over its limit fails; what it changed for the measurement is as it was."""
    with pytest.raises(AssertionError, match="10[0-9] calls, and no more than 90"):
        with calls_at_most(90):
            for _ in range(100):
                len("")
    assert sys.getprofile() is None
    assert gc.isenabled()


def test_enough_is_allowed() -> None:
    """What stays within the limit is left alone, and an error of the block comes out as it is."""
    with calls_at_most(30):
        assert sum(map(len, ["ab"] * 1000)) == 2000
    with pytest.raises(KeyError), calls_at_most(30):
        raise KeyError


def test_other_peoples_garbage_does_not_count() -> None:
    """Finalizers that happen to run do not count as work of the block."""

    class Node:
        def __init__(self) -> None:
            self.own = self  # a cycle, for the collector to find

        def __del__(self) -> None:
            for _ in range(100):
                len("")

    for _ in range(20):
        Node()
    kept: list[list[int]] = []
    with calls_at_most(2000):
        for _ in range(1000):
            kept.append([])  # noqa: PERF401 - what the collector counts


def test_other_threads_do_not_count() -> None:
    """They get more time on a busy machine, and the limit would depend on it."""
    begun, end = threading.Event(), threading.Event()
    calls = 0

    def work() -> None:
        nonlocal calls
        while not end.is_set():
            calls += 1
            if calls == 5000:
                begun.set()

    with calls_at_most(100):
        thread = threading.Thread(target=work)
        thread.start()
        begun.wait(60)
        end.set()
        thread.join()
    assert calls >= 5000
