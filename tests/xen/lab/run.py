"""One run of tests in the lab, seen from the host: boots when first asked for a result."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from .boot import LabError, Machine
from .hypervisor import SourceGoneError
from .image import image
from .payload import optional_wheels, payload, programs, wheel
from .platform import Platform
from .prerequisites import LabUnavailableError
from .report import NOT_RUN, Event, decode, failed, skipped

MACHINES: Final = 3
"""How many are booted for one list of tests, if one after the other stands still."""


@dataclass(frozen=True)
class Plan:
    """What to run and how.

    Args:
        project: root of the project under test.
        platform: the machine to run on.
        options: arguments for Dom0's pytest.
        built: a wheel to test instead of one built now.
        timeout: seconds for one test.
        deadline: seconds for the machine.
        required: a lab that cannot run is a failure, no skip.
        console: file to keep Dom0's console in.
    """

    project: Path
    platform: Platform
    options: Sequence[str]
    built: Path | None
    timeout: float
    deadline: float
    required: bool
    console: Path | None


class Run:
    """The lab's verdict on a list of tests.

    If a machine stands still or dies, the test that was running has failed, and another machine
    runs those after it.

    `reports(item)` is to be asked once for every item, in the list's order.

    Synchronization: none, pytest has one thread.
    """

    def __init__(
        self, plan: Plan, items: Sequence[pytest.Item], progress: Callable[[str], None]
    ) -> None:
        self._plan = plan
        self._items = list(items)
        self._boots = 0
        self._has_run = False
        self._progress = progress
        self._started = time.monotonic()
        self._folder = tempfile.TemporaryDirectory(prefix="xenmapcache-lab-")
        self._console: int | None = None
        self._machine: Machine | None = None
        self._lines: Iterator[str] = iter(())
        self._early: defaultdict[str, deque[Event]] = defaultdict(deque)
        self._verdict: Callable[[pytest.Item], list[pytest.TestReport]] | None = None

    def reports(self, item: pytest.Item) -> Iterator[pytest.TestReport]:
        """Yield the item's reports as they come; every item gets some."""
        if self._machine is None and self._verdict is None:
            self._start()
        self._items.remove(item)
        while True:
            event = self._next(item.nodeid)
            if event is None:
                if self._verdict is None:
                    raise AssertionError("the lab ended without a verdict")
                yield from self._verdict(item)
                self._go_on()
                return
            match event["event"]:
                case "report":
                    yield decode(event, item)
                case "crash":
                    yield from failed(item, event["text"], event["summary"])
                    return
                case "finish":
                    return

    def close(self) -> None:
        """Stop the machine and remove what was made for it. May be called again."""
        if self._machine is not None:
            self._machine.close()
        if self._console is not None:
            os.close(self._console)
            self._console = None
        self._folder.cleanup()

    def _start(self) -> None:
        self._boots += 1
        self._has_run = False
        plan, folder = self._plan, Path(self._folder.name) / str(self._boots)
        order = {
            "nodeids": [item.nodeid for item in self._items],
            "platform": plan.platform.name,
            "guest": plan.platform.guest,
            "options": list(plan.options),
            "timeout": plan.timeout,
        }
        try:
            self._phase("image")
            files = image(plan.platform)
            (folder / "optional").mkdir(parents=True)
            built = plan.built or wheel(plan.project, folder)
            nodeids = [item.nodeid for item in self._items]
            others = optional_wheels(plan.platform, nodeids, folder / "optional")
            wheels = [built, *others]
            built_programs = programs(plan.platform, folder)
            disk = payload(plan.project, wheels, built_programs, order, folder / "payload.tar")
            if plan.console is not None and self._console is None:
                self._console = os.open(plan.console, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            self._phase("boot")
            self._machine = Machine(files, disk, echo=self._console)
            # A test may be silent for as long as one may take: Dom0 would have noticed before us.
            left = plan.deadline - (time.monotonic() - self._started)
            self._lines = self._machine.lines(deadline=left, idle=plan.timeout + 60)
        except LabUnavailableError as error:
            gone = isinstance(error, SourceGoneError)  # a skip also where the lab is required
            self._unavailable(f"Xen lab: {error}", required=plan.required and not gone)

    def _unavailable(self, reason: str, *, required: bool) -> None:
        if required:
            self._verdict = lambda item: failed(item, reason, reason.partition("\n")[0])
        else:
            self._verdict = lambda item: skipped(item, reason)

    def _next(self, nodeid: str) -> Event | None:
        """The next event about `nodeid`; None when none will come."""
        if self._early[nodeid]:
            return self._early[nodeid].popleft()
        if self._verdict is not None:
            return None
        try:
            for line in self._lines:
                event = _parse(line)
                self._has_run = self._has_run or "nodeid" in event
                if event.get("nodeid") == nodeid:
                    return event
                if event["event"] == "phase":
                    self._phase(event["name"])
                elif "nodeid" in event:
                    self._early[event["nodeid"]].append(event)
            if self._machine is not None:
                raise self._machine.error("Dom0 ended before this test had a result")
        except LabError as error:
            self._lost(str(error))
        return None

    def _lost(self, text: str) -> None:
        # The console is told once, to the test that was running: it is long.
        texts = iter([text])
        brief = text.partition("; the console")[0]

        def verdict(item: pytest.Item) -> list[pytest.TestReport]:
            return failed(item, next(texts, f"{NOT_RUN}{brief}"), brief)

        self._verdict = verdict

    def _go_on(self) -> None:
        """Have another machine run the tests that are left, if the last one has run any at all."""
        in_time = time.monotonic() - self._started < self._plan.deadline
        if self._items and self._has_run and self._boots < MACHINES and in_time:
            self._phase("another machine runs the tests that are left")
            self._machine = self._verdict = None
            self._early.clear()  # of tests that the new machine runs, too

    def _phase(self, name: str) -> None:
        elapsed = time.monotonic() - self._started
        self._progress(f"Xen {self._plan.platform.name} lab: {elapsed:3.0f} s {name}")


def _parse(line: str) -> Event:
    try:
        event = json.loads(line)
    except ValueError:
        # A dying Dom0 may cut a line.
        return {"event": "garbled", "line": line}
    if not isinstance(event, dict) or "event" not in event:
        return {"event": "garbled", "line": line}
    return event
