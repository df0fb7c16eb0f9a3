"""A pytest plugin: notes for the runner what was run, and what failed, in a file of JSON lines.

A line is written before a test starts: of one that crashes or hangs nothing else is left.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--witness", metavar="FILE", help="where to note what happens")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--witness")
    if path is not None:
        config.pluginmanager.register(_Witness(Path(path), config.rootpath))


class _Witness:
    def __init__(self, path: Path, root: Path) -> None:
        self._path = path
        self._root = root

    def _note(self, **facts: object) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(facts) + "\n")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._note(started=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self._note(passed=report.nodeid)
        self._note(ran=report.nodeid, seconds=report.duration)
        if report.failed:
            self._note(failed=report.nodeid)

    def pytest_sessionfinish(self) -> None:
        """Note modules that do not come from the copy: what they do proves nothing."""
        for name, module in list(sys.modules.items()):
            file = getattr(module, "__file__", None)
            ours = name.partition(".")[0] in ("xenmapcache", "pytest_xenmapcache", "tests")
            if ours and file and not Path(file).is_relative_to(self._root):
                self._note(foreign=file)
