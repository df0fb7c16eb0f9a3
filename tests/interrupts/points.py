"""Runs an operation with its handlers at many points, in a process of its own."""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import mmap
import os
import re
import struct
import sys
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final, TextIO

from xenmapcache.binding.declarations import LIBRARIES, prototypes

from .injector import DEPTHS, Injector, Outcome, quiet
from .world import (
    ChildLeaves,
    HangError,
    Operation,
    Resources,
    World,
    is_expected,
    module_state,
    settled,
)

POINT_LIMIT: Final = 12.0
"""Seconds for one point: what takes longer hangs."""
IMPORTED_ONCE: Final = (
    "xenmapcache.backends.mock",
    "xenmapcache.backends.raw",
    "xenmapcache.backends.xen",
    "xenmapcache.binding.cffi_loader",
    "xenmapcache.binding.ctypes_loader",
    "xenmapcache.devicemodel",
)
"""What each child would import again."""
_PLACE: Final = struct.Struct("QQ")
"""The number of a handler, and a point of it: where a child is."""
_MOST_FINDINGS: Final = 60
_MOST_DEATHS: Final = 4
_OURS: Final = ("Injected", "ChildLeaves", "MemoryError", "RecursionError")
"""What a finalizer may raise: CPython prints it, and nothing may be lost by it."""


@dataclass(frozen=True)
class Finding:
    """Something that was wrong after one point."""

    operation: str
    handler: str
    point: int
    where: str
    problem: str

    def __str__(self) -> str:
        return (
            f"{self.where}: {self.operation}, {self.handler}: {self.problem}\n"
            f"    python -m tests.interrupts {self.operation} {self.handler} {self.point}"
        )


@dataclass
class Report:
    """What became of an operation with a handler.

    Attributes:
        total: how many points there are, about.
        tried: how many were run.
        findings: what was wrong.
    """

    operation: str
    handler: str
    total: int = 0
    tried: int = 0
    findings: list[Finding] = field(default_factory=list)


def chosen(points: list[int], samples: int, seed: int, name: str) -> list[int]:
    """Return points at even distances, which begin somewhere else for each seed and name."""
    step = max(1, len(points) // samples)
    return points[zlib.crc32(f"{seed} {name}".encode()) % step :: step]


class _Child:
    """Runs points in this process, one after the other, and writes what it finds as JSON."""

    def __init__(
        self,
        injector: Injector,
        operation: Operation,
        handler: str,
        folder: Path,
        out: TextIO,
        until: str | None,
    ) -> None:
        self.injector = injector
        self.operation = operation
        self.handler = handler
        self.folder = folder
        self.out = out
        self.pid = os.getpid()
        self.until = until
        self.findings = 0
        self.enough = False
        self.resources: Resources | None = None

    def say(self, **what: object) -> None:
        """Write a line of JSON."""
        print(json.dumps(what | {"handler": self.handler}), file=self.out, flush=True)

    def report(self, point: int, where: str, problem: str) -> None:
        """Write a finding, and see whether there are enough of them."""
        self.findings += 1
        finding = Finding(self.operation.name, self.handler, point, where, problem)
        looked_for = self.until is not None and re.search(self.until, str(finding))
        self.enough = self.enough or bool(looked_for) or self.findings > _MOST_FINDINGS
        self.say(point=point, where=where, problem=problem)

    def points(self) -> list[int]:
        """Run it once to warm up, once to find its points, and return them.

        Where a signal can be handled does not depend on what its handler does.
        """
        found: list[int] = []
        for _ in range(2):
            world = self.world()
            if self.handler == "depth":
                self.attempt(world)
                found = list(range(DEPTHS))
            elif self.handler == "allocation":
                found = list(range(self.injector.count_allocations(partial(self.attempt, world))))
            else:
                found = self.injector.points(partial(self.attempt, world))
            world.check(Outcome(False, "", None))
            world.end()
        return found

    def attempt(self, world: World) -> None:
        """Act, and ignore the exceptions that the operation may raise."""
        with contextlib.suppress(*self.operation.raises):
            self.operation.act(world)

    def world(self) -> World:
        world = self.operation.world(self.folder)
        if self.operation.prepare is not None:
            self.operation.prepare(world)
        return world

    def inject(self, world: World, point: int) -> Outcome:
        def act() -> None:
            self.operation.act(world)

        if self.handler == "allocation":
            return self.injector.allocation(act, point)
        if self.handler == "depth":
            return self.injector.depth(act, point)
        return self.injector.signal(act, lambda: world.handle(self.handler), point)

    def run(self, point: int) -> bool:
        """Run a point and report what is wrong; return whether it was reached."""
        faulthandler.dump_traceback_later(POINT_LIMIT, exit=True)
        self.injector.unraisable.clear()
        before = self.resources or Resources.now(self.folder)
        world = self.world()
        outcome = self.inject(world, point)
        if os.getpid() != self.pid:
            left = self.left(outcome.error)
            if not left:
                self.report(point, outcome.where, f"child: {outcome.error!r:.200}")
            os._exit(0 if left else 1)
        where, fired = outcome.where, outcome.fired
        problems = world.problems
        hangs = False
        try:
            self.look(world, outcome)
            del outcome  # with the traceback that keeps the operation's frames
            self.end(world)
        except HangError:
            hangs = True
        del world
        self.resources = None if hangs else settled(self.folder, before)
        if self.resources is not None:
            problems += self.resources.more_than(before)
        problems += [
            f"a finalizer raised {text}"
            for text in self.injector.unraisable
            if not any(name in text for name in _OURS)
        ]
        for problem in dict.fromkeys(problems):
            self.report(point, where, problem)
        return fired

    def left(self, error: BaseException | None) -> bool:
        """Tell whether a forked child has left the operation; a finalizer may have printed why."""
        return isinstance(error, ChildLeaves) or "ChildLeaves" in str(self.injector.unraisable)

    def look(self, world: World, outcome: Outcome) -> None:
        """Check a world after its point, while what was raised is kept, as a debugger does."""
        error, operation = outcome.error, self.operation
        swallowed = self.handler in ("interrupt", "error") and world.fired and error is None
        if swallowed and not self.injector.unraisable and world.may_not_swallow(self.handler):
            world.problem("what the handler raised was swallowed")
        if error is not None and not is_expected(error, operation, self.handler, world):
            world.problem(f"raised {error!r:.200}")
        world.wait_for_children()
        world.check(outcome)

    def end(self, world: World) -> None:
        """Do the second call, close everything, and look again."""
        operation = self.operation
        if operation.again is not None:
            with world.noting(
                "the second call", *world.permitted.get(self.handler, ()), *operation.raises
            ):
                operation.again(world)
        if operation.check is not None:
            operation.check(world)
        world.check_locks(*module_state())
        world.end()


class Runner:
    """Runs operations, each in forked children.

    Args:
        injector: the built module.
        folder: for files that operations need.
        samples: how many points of a combination are run; None for all.
        seed: which ones.
        until: a regular expression; the first finding that has it, as it is printed, ends
            the run.
    """

    def __init__(
        self,
        injector: Injector,
        folder: Path,
        samples: int | None,
        seed: int,
        until: str | None = None,
    ) -> None:
        self.injector = injector
        self.until = until
        self.folder = folder
        self.samples = samples
        self.seed = seed
        for name in IMPORTED_ONCE:
            importlib.import_module(name)
        for library in LIBRARIES:
            prototypes(library)  # which remembers them
        module_state()  # which remembers what to look at
        quiet()  # here, so that no child has to look through what was there before it

    def run(
        self, operation: Operation, handlers: Sequence[str], point: int | None = None
    ) -> list[Report]:
        """Run an operation with some handlers, or one point of each.

        A process continues with the next handler as long as it has found nothing.
        """
        reports = {handler: Report(operation.name, handler) for handler in handlers}
        errors = self.folder / "stderr"
        deaths: Counter[str] = Counter()
        with mmap.mmap(-1, mmap.PAGESIZE) as place:
            while _PLACE.unpack_from(place)[0] < len(handlers):
                status = self._fork(operation, handlers, point, place, errors, reports)
                number, reached = _PLACE.unpack_from(place)
                report = reports[handlers[number]]
                at = (number + 1, 0)
                if status and len(report.findings) < _MOST_FINDINGS:
                    text = errors.read_text(encoding="utf-8", errors="replace")[-3000:]
                    how = f"died of signal {-status}" if status < 0 else f"ended with {status}"
                    problem = f"the process {how}:\n{text}"
                    report.findings.append(
                        Finding(operation.name, report.handler, reached, "?", problem)
                    )
                    deaths[report.handler] += 1
                    if point is None and deaths[report.handler] <= _MOST_DEATHS:
                        at = (number, reached + 1)
                _PLACE.pack_into(place, 0, *at)
        return list(reports.values())

    def _fork(
        self,
        operation: Operation,
        handlers: Sequence[str],
        point: int | None,
        place: mmap.mmap,
        errors: Path,
        reports: dict[str, Report],
    ) -> int:
        """Run what is left in one child, read what it says, and return its status."""
        reading, writing = os.pipe()
        sys.stdout.flush()
        pid = os.fork()
        if not pid:
            status = 1
            try:
                os.close(reading)
                with errors.open("wb") as file:
                    os.dup2(file.fileno(), 2)
                faulthandler.enable()
                with os.fdopen(writing, "w") as out:
                    quiet()
                    self._in_child(operation, handlers, point, place, out)
                status = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                os._exit(status)
        os.close(writing)
        with os.fdopen(reading) as out_of_child:
            for line in out_of_child:
                said = json.loads(line)
                report = reports[said.pop("handler")]
                if "total" in said:
                    report.total = said["total"]
                elif "tried" in said:
                    report.tried += 1
                else:
                    report.findings.append(Finding(operation.name, report.handler, **said))
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def _in_child(
        self,
        operation: Operation,
        handlers: Sequence[str],
        point: int | None,
        place: mmap.mmap,
        out: TextIO,
    ) -> None:
        begin, first = _PLACE.unpack_from(place)
        found: dict[str, list[int]] = {}
        for number, handler in enumerate(handlers[begin:], begin):
            _PLACE.pack_into(place, 0, number, first)
            child = _Child(self.injector, operation, handler, self.folder, out, self.until)
            kind = handler if handler in ("allocation", "depth") else "signal"
            if kind not in found:
                faulthandler.dump_traceback_later(POINT_LIMIT, exit=True)
                found[kind] = child.points()
            points = found[kind]
            child.say(total=len(points))
            if point is not None:
                points = [point]
            elif self.samples is not None:
                points = chosen(points, self.samples, self.seed, f"{operation.name} {handler}")
            for each in points:
                if each >= first and not child.enough:
                    _PLACE.pack_into(place, 0, number, each)
                    if child.run(each):
                        child.say(tried=each)
            if child.findings:
                return
            first = 0
