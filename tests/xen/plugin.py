"""Runs tests marked `xen` in the lab's Dom0 and replays their reports here; in Dom0, runs them.

A test marked `xen` needs a live guest. With `--domid` it is run where pytest runs, which must be a
Dom0; else the lab is booted, once for all of them, after the tests that can be run here.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.xen.lab.platform import DEFAULT, PLATFORMS, Platform, native
from tests.xen.lab.report import Reporter, on_machine
from tests.xen.lab.run import Plan, Run

CONSOLE = Path("/var/log/xen/console")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options for the lab, for a real Dom0, and (the last two) between the lab and its Dom0."""
    group = parser.getgroup("xen", "tests on a live Xen")
    group.addoption(
        "--xen", choices=sorted(PLATFORMS), help=f"machine of the lab (default {DEFAULT})"
    )
    group.addoption(
        "--xen-required", action="store_true", help="no lab is a failure (so is CI=true)"
    )
    group.addoption("--xen-wheel", type=Path, metavar="FILE", help="test this wheel")
    group.addoption("--xen-console", type=Path, metavar="FILE", help="keep the lab's console here")
    group.addoption("--xen-timeout", type=float, default=300, metavar="S", help="for one test")
    group.addoption("--xen-deadline", type=float, default=3600, metavar="S", help="for the lab")
    group.addoption("--domid", type=int, help="this is a Dom0: run xen tests here, on this guest")
    group.addoption("--victim-config", type=Path, metavar="FILE", help="a guest tests may destroy")
    group.addoption("--xen-report", type=Path, metavar="FILE", help="write reports as JSON lines")
    group.addoption("--xen-select", type=Path, metavar="FILE", help="JSON list of node ids to run")


def pytest_configure(config: pytest.Config) -> None:
    """In Dom0, report to the host."""
    if (file := config.getoption("xen_report")) is not None:
        wanted = json.loads(config.getoption("xen_select").read_text(encoding="utf-8"))
        config.pluginmanager.register(Reporter(file, wanted))


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """Run the other tests as ever, then those of the lab."""
    config = session.config
    remote = [item for item in session.items if _remote(item)]
    if not remote or config.option.collectonly or hasattr(config, "workerinput"):
        return None
    session.items = [item for item in session.items if not _remote(item)]
    plugin = config.pluginmanager.get_plugin(__name__)
    others = config.pluginmanager.subset_hook_caller("pytest_runtestloop", [plugin])
    others(session=session)
    plan = _plan(config)
    run = Run(plan, remote, _progress(config))
    try:
        for item in remote:
            hook = item.ihook
            hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
            for report in run.reports(item):
                on_machine(report, plan.platform.name)
                hook.pytest_runtest_logreport(report=report)
            hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
            if session.shouldfail:
                raise session.Failed(session.shouldfail)
            if session.shouldstop:
                raise session.Interrupted(session.shouldstop)
    finally:
        run.close()
        session.items += remote
    return True


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Under pytest-xdist each worker would boot a lab of its own: refuse."""
    if _remote(item):
        reason = "the Xen lab is not for pytest-xdist's workers: run `pytest -m xen` without -n"
        if _required(item.config):
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show what tests measured on the live guest, which they recorded as "measured"."""
    measured = [
        (report.nodeid, value)
        for report in terminalreporter.getreports("passed")
        for name, value in report.user_properties
        if name == "measured" and report.when == "call"
    ]
    if measured:
        terminalreporter.section("measured")
        for nodeid, value in measured:
            terminalreporter.write_line(f"{nodeid.rpartition('::')[2]}: {value}")


@pytest.fixture(scope="session")
def machine(request: pytest.FixtureRequest) -> Platform:
    """What a test has to know of the machine that it runs on."""
    name = request.config.getoption("xen")
    return native() if name is None else PLATFORMS[name]


@pytest.fixture(scope="session")
def live_domid(request: pytest.FixtureRequest) -> int:
    """Domain id of the guest the tests may map, write to and balloon, but not destroy."""
    domid = request.config.getoption("domid")
    if domid is None:
        pytest.skip("no guest given with --domid")
    return int(domid)


@pytest.fixture
def victim(request: pytest.FixtureRequest) -> Iterator[int]:
    """Domain id of a guest made for one test, which may do to it what it likes.

    It is paused, its kernel loaded: unpause it to have it boot.
    """
    config: Path | None = request.config.getoption("victim_config")
    if config is None:
        pytest.skip("no guest to destroy given with --victim-config")
    found = re.search(r'^\s*name\s*=\s*["\'](.+)["\']', config.read_text(), re.MULTILINE)
    if found is None:
        raise pytest.UsageError(f"{config} names no guest")
    name = found[1]
    (CONSOLE / f"guest-{name}.log").unlink(missing_ok=True)  # an earlier victim's words
    _xl("create", "-q", "-p", str(config))
    try:
        yield int(_xl("domid", name))
    finally:
        # No check: the test may have destroyed it.
        subprocess.run(["xl", "destroy", name], capture_output=True, timeout=120, check=False)


@pytest.fixture(scope="session")
def guest_console() -> Callable[[str], str]:
    """What a guest, given by name, has printed so far."""

    def read(name: str) -> str:
        log = CONSOLE / f"guest-{name}.log"
        if not log.exists():
            pytest.skip(f"no console log {log}: xenconsoled must run with --log=guest")
        return log.read_text(encoding="utf-8", errors="replace")

    return read


def _xl(*arguments: str) -> str:
    done = subprocess.run(["xl", *arguments], capture_output=True, text=True, timeout=120)
    if done.returncode != 0:
        raise RuntimeError(f"xl {' '.join(arguments)}: status {done.returncode}\n{done.stderr}")
    return done.stdout


def _remote(item: pytest.Item) -> bool:
    return item.get_closest_marker("xen") is not None and item.config.getoption("domid") is None


def _required(config: pytest.Config) -> bool:
    return bool(config.getoption("xen_required")) or os.environ.get("CI") == "true"


def _plan(config: pytest.Config) -> Plan:
    # What shapes a failure's text must be the same on both sides.
    options = [f"--tb={config.option.tbstyle}", "--color=no"]
    options += [f"--xen-timeout={config.getoption('xen_timeout')}"]
    options += ["-v"] * config.option.verbose + ["-l"] * bool(config.option.showlocals)
    return Plan(
        project=config.rootpath,
        platform=PLATFORMS[config.getoption("xen") or DEFAULT],
        options=options,
        built=config.getoption("xen_wheel"),
        timeout=config.getoption("xen_timeout"),
        deadline=config.getoption("xen_deadline"),
        required=_required(config),
        console=config.getoption("xen_console"),
    )


def _progress(config: pytest.Config) -> Callable[[str], None]:
    terminal = config.pluginmanager.get_plugin("terminalreporter")

    def show(text: str) -> None:
        if terminal is not None and config.option.verbose >= 0:
            terminal.ensure_newline()
            terminal.write_line(text)

    return show
