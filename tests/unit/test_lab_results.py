"""The lab's results: a failure names the machine, and a table says what was seen where."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests.xen.lab import seen
from tests.xen.lab.report import NOT_RUN, decode, failed, on_machine

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


@pytest.mark.parametrize("order", [1, -1])
def test_a_test_that_ran_in_two_files_counts_once(tmp_path: Path, order: int) -> None:
    """With its last outcome; a run that skipped it tells nothing of the other run."""
    first, second = tmp_path / "a.xml", tmp_path / "b.xml"
    case = '<testcase classname="tests.xen.test_dump" name="{}">{}{}</testcase>'
    machine = '<properties><property name="machine" value="4.17"/></properties>'
    failure, skipped = "<failure>x</failure>", "<skipped/>"

    def write(path: Path, time: str, **cases: str) -> None:
        inside = "".join(case.format(name, machine, outcome) for name, outcome in cases.items())
        path.write_text(f'<testsuite timestamp="2026-11-{time}">{inside}</testsuite>')

    write(first, "29T23:59:59", mended=failure, broken="", was_run="", alone="")
    write(second, "30T00:00:00", mended="", broken=failure, was_run=skipped, other=skipped)
    results = seen.read([first, second][::order])
    assert results["dumps of a paused guest"]["4.17"] == {"passed": 3, "failed": 1, "skipped": 1}


def test_what_the_machine_did_not_come_to_is_not_counted(tmp_path: Path) -> None:
    """The failure of such a test says nothing of what it shows."""
    path = tmp_path / "junit.xml"
    text = f"On Xen 4.17:\n{NOT_RUN}Dom0 ended"
    path.write_text(JUNIT.replace('<failure message="x"/>', f"<failure>{text}</failure>"))
    assert "| dumps of a paused guest | 1 passed | 1 skipped |" in seen.table(seen.read([path]))


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
