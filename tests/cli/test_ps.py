"""``xenmapcache ps``: processes that can be asked, and those that do not answer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.observe.monitor_kit import SNAPSHOT, STATS, STUCK, Program, S, processes
from xenmapcache.cli import main
from xenmapcache.cli.processes import age
from xenmapcache.observe import asking
from xenmapcache.observe.snapshot import CacheState
from xenmapcache.observe.sockets import VARIABLE, SocketFolder

PAGE = Path(__file__).parents[2] / "docs" / "commands.md"
OTHER = replace(
    SNAPSHOT,
    pid=977,
    argv="/usr/bin/xenmapcache-nvme --domain web",
    started_ns=SNAPSHOT.now_ns - 90_000 * S,
    caches=(
        CacheState(
            "MapCache of <xen backend>", 5, False, STATS._replace(stale_dma_held=0), (), 0, False
        ),
    ),
    servers=(),
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "run"))
    monkeypatch.setattr(asking, "TIMEOUT_S", 20.0)  # this machine may be busy
    return tmp_path / "run"


def report(capsys: pytest.CaptureFixture[str], status: int = 0) -> list[dict[str, Any]]:
    assert main(["ps", "--json"]) == status
    found: dict[str, list[dict[str, Any]]] = json.loads(capsys.readouterr().out)
    return found["processes"]


def test_what_processes_hold(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Added up over their caches, as numbers."""
    with processes(folder, SNAPSHOT, OTHER):
        first, second = report(capsys)
    assert first["pid"] == 977
    assert second == {
        "pid": 4321,
        "socket": str(folder / "4321.sock"),
        "problem": None,
        "command": "python3 device.py --disk0",
        "uptime_ns": 3700 * S,
        "caches": 2,
        "servers": 1,
        "omitted": 0,
        "domids": [3],
        "leases": 5,
        "stale_dma": 2,
        "resident_bytes": 0x600000,
    }


@pytest.mark.skipif(not PAGE.is_file(), reason=f"no file {PAGE}")
def test_the_page_shows_these_processes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """docs/commands.md has the table, as it is printed."""
    with processes(folder, SNAPSHOT, OTHER):
        assert main(["ps"]) == 0
    shown = f"```console\n# xenmapcache ps\n{capsys.readouterr().out}```\n"
    assert shown in PAGE.read_text(encoding="utf-8")


def test_the_table_fits_80_columns(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever the command line is; many domains become their number."""
    caches = tuple(replace(SNAPSHOT.caches[0], domid=domid) for domid in (3, 5, 12345))
    servers = (replace(SNAPSHOT.servers[0], domid=7),)
    long = replace(SNAPSHOT, argv="\x1b[2J" + "x" * 500, caches=caches, servers=servers)
    files = replace(SNAPSHOT, pid=8, caches=(replace(caches[0], domid=None),), servers=())
    with processes(folder, long, files):
        assert main(["ps"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [each["domids"] for each in report(capsys)] == [[], [3, 5, 7, 12345]]
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == [
        "PID", "DOMAIN", "UPTIME", "LEASES", "STALE", "MAPPED", "COMMAND"
    ]  # fmt: skip
    assert lines[1].split()[:7] == ["8", "-", "1h01m", "3", "1", "3", "MiB"]
    assert lines[2].split()[:2] == ["4321", "(4)"]
    assert lines[2].endswith(r"MiB  \x1b[2J" + "x" * 19 + "...")


def test_what_could_not_be_read_is_not_told_as_0(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sum that lacks a part is left out."""
    unread = replace(SNAPSHOT.caches[0], leases=(), stats=None, incomplete=True)
    found = replace(SNAPSHOT, caches=(SNAPSHOT.caches[0], unread))
    with processes(folder, found):
        (process,) = report(capsys)
        assert main(["ps"]) == 0
    assert process["leases"] is process["stale_dma"] is process["resident_bytes"] is None
    line = capsys.readouterr().out.splitlines()[1]
    assert line.split()[:6] == ["4321", "3", "1h01m", "?", "?", "?"]


def test_a_process_that_does_not_answer(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is shown as such; a note has the reason and the socket."""
    monkeypatch.setattr(asking, "TIMEOUT_S", 0.01)
    with SocketFolder(folder, create=True) as opened, opened.listen(77):
        assert main(["ps"]) == 0
        printed = capsys.readouterr()
        (process,) = report(capsys)
    assert printed.out.splitlines()[1].split() == ["77", *"?????", "(does", "not", "answer)"]
    problem = "has not answered within 0.01 s"
    assert printed.err == f"xenmapcache: note: process 77 {problem} ({folder}/77.sock)\n"
    assert process == {"pid": 77, "socket": f"{folder}/77.sock", "problem": problem}


def test_nothing_is_found(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """That is said, with how to be found; an unsafe folder is told."""
    assert main(["ps"]) == 1
    assert capsys.readouterr().out == (
        "No process of this user has a monitor. To open one in a process, set "
        "XENMAPCACHE_MONITOR=1 for it, or call xenmapcache.observe.monitor.serve().\n"
    )
    folder.write_text("")
    assert report(capsys, 1) == []
    assert main(["ps"]) == 1
    assert f"sockets are not looked for in {folder}: it is a link or a file" in (
        capsys.readouterr().err
    )


@pytest.mark.slow
def test_a_real_process_that_is_stuck(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It answers although a thread of it holds the cache's lock for ever."""
    with Program(STUCK, folder, "1") as program:
        (process,) = report(capsys)
        assert program.said == "stuck"
    assert (process["pid"], process["problem"]) == (program.pid, None)
    assert (process["leases"], process["stale_dma"], process["domids"]) == (2, 1, [1])
    assert process["resident_bytes"] == 0x20000
    assert process["uptime_ns"] > 0
    assert report(capsys, 1) == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0.000 s"),
        (0.5124, "0.512 s"),
        (9.9999, "10.000 s"),
        (10, "10.0 s"),
        (59.94, "59.9 s"),
        (60, "1m00s"),
        (3599, "59m59s"),
        (3600, "1h00m"),
        (86399, "23h59m"),
        (86400, "1d00h"),
        (41 * 86400 + 7200, "41d02h"),
    ],
)
def test_ages(seconds: float, text: str) -> None:
    """They have at most 8 characters for 27 years."""
    assert age(int(seconds * S)) == text
    assert len(text) <= 8
