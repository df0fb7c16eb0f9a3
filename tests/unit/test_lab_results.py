"""The lab's results: a failure names the machine, and a table says what was seen where."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests.xen.lab import seen
from tests.xen.lab.report import decode, failed, on_machine

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[2]

JUNIT = """<testsuites><testsuite>
<testcase classname="tests.xen.test_dump" name="test_a"><properties>
<property name="measured" value="much"/>
<property name="machine" value="4.17"/></properties></testcase>
<testcase classname="tests.xen.test_dump" name="test_b"><properties>
<property name="machine" value="4.17"/></properties><failure message="x"/></testcase>
<testcase classname="tests.xen.test_dump" name="test_b"><properties>
<property name="machine" value="4.20-pvh-dom0"/></properties><skipped message="x"/></testcase>
<testcase classname="tests.qemu.test_defects_2008_2014" name="test_c"><properties>
<property name="machine" value="4.17"/></properties></testcase>
<testcase classname="tests.xen.test_new.TestClass" name="test_d"><properties>
<property name="machine" value="4.17"/></properties><error message="x"/></testcase>
<testcase classname="tests.unit.test_cache" name="test_not_in_the_lab"/>
</testsuite></testsuites>"""

TABLE = """\
|  | 4.17 | 4.20-pvh-dom0 |
| --- | --- | --- |
| Xen | 4.17 | 4.20 |
| architecture | amd64 | amd64 |
| Dom0 | PV | PVH |
| guest | PVH | PVH |
| no defect of QEMU's map cache | 1 passed | not run |
| dumps of a paused guest | 1 passed, 1 failed | 1 skipped |
| tests.xen.test_new | 1 failed | not run |
"""


def test_a_failure_names_the_machine(request: pytest.FixtureRequest) -> None:
    """In its text and in pytest's short summary; JUnit files have it of every test."""
    reports = failed(request.node, "assert 1 == 2\nmore", "assert 1 == 2")
    for report in reports:
        on_machine(report, "4.20-hvm")
        assert ("machine", "4.20-hvm") in report.user_properties
    call, teardown = reports
    assert call.longreprtext == "On Xen 4.20-hvm:\nassert 1 == 2\nmore"
    assert call.longrepr.reprcrash.message == "on Xen 4.20-hvm: assert 1 == 2"  # type: ignore[union-attr] # a Failure's
    assert teardown.longrepr is None


def test_a_skip_keeps_its_reason(request: pytest.FixtureRequest) -> None:
    """What pytest counts skips by is not changed."""
    skip = ["tests/x.py", 3, "Skipped: no guest"]
    event = {
        "when": "setup",
        "outcome": "skipped",
        "duration": 0.0,
        "sections": [],
        "properties": [["measured", "1"]],
        "skip": skip,
    }
    report = decode(event, request.node)
    on_machine(report, "4.17")
    assert report.longrepr == ("tests/x.py", 3, "Skipped: no guest")
    assert report.user_properties == [("measured", "1"), ("machine", "4.17")]


def test_pytest_writes_the_machine_into_junit_files(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a property of each test, which the table is made from."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # no install brings the tests
    pytester.makeconftest(
        """
        import pytest
        @pytest.hookimpl(tryfirst=True)
        def pytest_runtest_logreport(report):
            from tests.xen.lab.report import on_machine
            on_machine(report, "4.17")
        """
    )
    pytester.makepyfile(test_it="def test_it(): pass")
    pytester.runpytest_subprocess("--junitxml=junit.xml", "-p", "no:cacheprovider")
    case = next(ElementTree.parse(pytester.path / "junit.xml").iter("testcase"))
    assert [each.get("value") for each in case.iter("property")] == ["4.17"]


def test_the_table_of_what_was_seen_where(tmp_path: Path) -> None:
    """A column for each machine, with what it is, and a row for each feature."""
    path = tmp_path / "junit.xml"
    path.write_text(JUNIT)
    assert seen.table(seen.read([path])) == TABLE


def test_results_of_several_files_are_added(tmp_path: Path) -> None:
    """A machine may have run its tests in parts."""
    paths = [tmp_path / name for name in ("a.xml", "b.xml")]
    for path in paths:
        path.write_text(JUNIT)
    assert "| dumps of a paused guest | 2 passed, 2 failed | 2 skipped |" in seen.table(
        seen.read(paths)
    )


def test_the_table_goes_between_the_marks_of_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rest of the page stays; one without marks is refused."""
    path, page = tmp_path / "junit.xml", tmp_path / "page.md"
    path.write_text(JUNIT)
    page.write_text(f"before\n{seen.BEGIN}\nold\n{seen.END}\nafter\n")
    monkeypatch.setattr("sys.argv", ["seen", str(path), "--write", str(page)])
    assert seen.main() == 0
    assert page.read_text() == f"before\n{seen.BEGIN}\n{TABLE}{seen.END}\nafter\n"
    monkeypatch.setattr("sys.argv", ["seen", str(path)])
    assert seen.main() == 0
    assert capsys.readouterr().out == TABLE
    with pytest.raises(ValueError, match="has no <!-- seen: begin"):
        seen.written("nothing", TABLE)
