"""Test reports as JSON lines: what Dom0's pytest writes and the host's pytest replays.

The two sides run different releases of pytest and Python, so neither pickles nor pytest's own
serialisation would do: only the few fields that every release has are carried.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, cast

import pytest

Event = dict[str, Any]
NOT_RUN: Final = "not run: "
"""How the text of a failure begins if the machine had ended before the test."""


class _Writer(Protocol):
    def line(self, s: str) -> None: ...


@dataclass(frozen=True)
class Crash:
    """Where a test failed; pytest's short summary prints the message."""

    path: str
    lineno: int
    message: str


@dataclass(frozen=True)
class Failure:
    """A failure's text in the form pytest expects of a report's longrepr."""

    text: str
    reprcrash: Crash

    def __str__(self) -> str:
        return self.text

    def toterminal(self, writer: _Writer) -> None:
        """Print the text as pytest prints its own."""
        for line in self.text.splitlines():
            writer.line(line)


def encode(report: pytest.TestReport) -> Event:
    """What is worth telling of one report."""
    event: Event = {
        "event": "report",
        "nodeid": report.nodeid,
        "when": report.when,
        "outcome": report.outcome,
        "duration": report.duration,
        "sections": report.sections,
        "properties": [
            pair for pair in report.user_properties if isinstance(pair[1], str | int | float)
        ],
    }
    if hasattr(report, "wasxfail"):
        event["wasxfail"] = report.wasxfail
    if isinstance(report.longrepr, tuple):
        event["skip"] = report.longrepr
    elif report.longrepr is not None:
        event["text"] = report.longreprtext
        crash = getattr(report.longrepr, "reprcrash", None)
        if crash is not None:
            event["crash"] = [crash.path, crash.lineno, crash.message]
    return event


def decode(event: Event, item: pytest.Item) -> pytest.TestReport:
    """The report that `encode` was given, as if `item` had been run here."""
    longrepr: object = None
    if "skip" in event:
        path, line, reason = event["skip"]
        longrepr = (_local(path, item), line, reason)
    elif "text" in event:
        path, line, message = event.get("crash") or (item.location[0], 0, event["text"][-200:])
        longrepr = Failure(event["text"], Crash(_local(path, item), line, message))
    made = pytest.TestReport(
        nodeid=item.nodeid,
        location=item.location,
        keywords=dict.fromkeys(item.keywords, 1),
        outcome=event["outcome"],
        longrepr=cast(Any, longrepr),
        when=event["when"],
        sections=[(title, text) for title, text in event["sections"]],
        duration=event["duration"],
        user_properties=[(name, value) for name, value in event["properties"]],
    )
    if "wasxfail" in event:
        made.wasxfail = event["wasxfail"]
    return made


def failed(item: pytest.Item, text: str, summary: str) -> list[pytest.TestReport]:
    """The reports of a test that has none of its own; teardown closes it in JUnit files."""
    blank: Event = {"duration": 0.0, "sections": [], "properties": []}
    crash = [item.location[0], item.location[1] or 0, summary]
    call = {**blank, "when": "call", "outcome": "failed", "text": text, "crash": crash}
    return [decode(call, item), decode({**blank, "when": "teardown", "outcome": "passed"}, item)]


def skipped(item: pytest.Item, reason: str) -> list[pytest.TestReport]:
    """The reports of a test that was not run for `reason`."""
    blank: Event = {"duration": 0.0, "sections": [], "properties": []}
    skip = [item.location[0], item.location[1] or 0, f"Skipped: {reason}"]
    return [
        decode({**blank, "when": "setup", "outcome": "skipped", "skip": skip}, item),
        decode({**blank, "when": "teardown", "outcome": "passed"}, item),
    ]


def on_machine(report: pytest.TestReport, machine: str) -> None:
    """Say in a report which machine it is of: a failure names it, and so do JUnit files."""
    report.user_properties = [*report.user_properties, ("machine", machine)]
    longrepr: object = report.longrepr
    if isinstance(longrepr, Failure):
        crash = longrepr.reprcrash
        named = Crash(crash.path, crash.lineno, f"on Xen {machine}: {crash.message}")
        report.longrepr = cast(Any, Failure(f"On Xen {machine}:\n{longrepr.text}", named))


class Reporter:
    """The plugin of Dom0's pytest: runs the wanted tests in the wanted order and reports each.

    Args:
        file: where the events go, one JSON object to a line.
        wanted: node ids.
    """

    def __init__(self, file: Path, wanted: list[str]) -> None:
        self._file = file.open("a", encoding="utf-8", buffering=1)
        self._wanted = wanted

    def _send(self, event: Event) -> None:
        self._file.write(json.dumps(event) + "\n")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Tell why a file's tests will be missing."""
        if report.failed:
            self._send({"event": "collect", "path": report.nodeid, "text": report.longreprtext})

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        """Keep the wanted tests, and say at once which are not there."""
        found = {item.nodeid: item for item in items}
        kept = [found.pop(nodeid) for nodeid in self._wanted if nodeid in found]
        for nodeid in set(self._wanted) - {item.nodeid for item in kept}:
            self._send({"event": "missing", "nodeid": nodeid})
        items[:] = kept
        config.hook.pytest_deselected(items=list(found.values()))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """A crash from here on is this test's."""
        self._send({"event": "start", "nodeid": nodeid})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One of setup, call and teardown."""
        self._send(encode(report))

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """The test is through."""
        self._send({"event": "finish", "nodeid": nodeid})


def _local(path: str, item: pytest.Item) -> str:
    # The payload's root in Dom0 is the project's root here.
    return re.sub("^/payload(?=/)", str(item.config.rootpath), path)
