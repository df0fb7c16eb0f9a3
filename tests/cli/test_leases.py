"""``xenmapcache leases``: whose they are, since when, and whether stale."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.observe.monitor_kit import LEASES, SNAPSHOT, STUCK, Program, S, processes
from xenmapcache.cli import main
from xenmapcache.observe import asking
from xenmapcache.observe.snapshot import LeaseState, Snapshot
from xenmapcache.observe.sockets import VARIABLE, SocketFolder

PAGE = Path(__file__).parents[2] / "docs" / "commands.md"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "run"))
    monkeypatch.setattr(asking, "TIMEOUT_S", 20.0)  # this machine may be busy
    return tmp_path / "run"


def holding(*leases: LeaseState, omitted: int = 0, incomplete: bool = False) -> Snapshot:
    """Return a process that holds some leases."""
    cache = replace(
        SNAPSHOT.caches[0], leases=leases, leases_omitted=omitted, incomplete=incomplete
    )
    return replace(SNAPSHOT, caches=(cache,))


def printed(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> list[str]:
    assert main(["leases", *arguments]) == status
    return capsys.readouterr().out.splitlines()


def report(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    assert main(["leases", "--json", *arguments]) == 0
    found: dict[str, list[dict[str, Any]]] = json.loads(capsys.readouterr().out)
    return found["processes"]


def test_leases_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All that is known, with addresses as numbers and in hex."""
    with processes(folder, SNAPSHOT, replace(SNAPSHOT, pid=5, caches=())):
        empty, process = report(capsys)
        assert report(capsys, "4321") == [process]
    assert (empty["pid"], empty["caches"]) == (5, [])
    assert (process["command"], process["problem"]) == (SNAPSHOT.argv, None)
    first, second = process["caches"]
    assert (first["domid"], first["incomplete"], first["leases_omitted"]) == (3, False, 0)
    assert (second["domid"], second["leases"], second["leases_omitted"]) == (None, [], 2)
    assert first["leases"][1] == {
        "id": 4,
        "owner": "disk0",
        "kind": "dma",
        "address": 0x7F000,
        "address_hex": "0x7f000",
        "length": 0x1010,
        "direction": "from-device",
        "age_ns": 61 * S,
        "stale": True,
        "thread": "worker-1",
        "origin": ["device.py:9 in serve", "device.py:77 in start_read"],
    }


@pytest.mark.skipif(not PAGE.is_file(), reason=f"no file {PAGE}")
def test_the_page_shows_these_leases(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """docs/commands.md has the list, as it is printed."""
    with processes(folder, holding(*LEASES)):
        assert main(["leases"]) == 0
    shown = f"```console\n# xenmapcache leases\n{capsys.readouterr().out}```\n"
    assert shown in PAGE.read_text(encoding="utf-8")


def test_the_list_fits_80_columns(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever names, addresses and paths are. Of a line of code the end is shown."""
    lease = replace(
        LEASES[1],
        owner="\x1b]0;title\x07 of a disk",
        start=(1 << 52) - (1 << 31),
        end=1 << 52,
        direction="bidirectional",
        thread="Thread-1234 (a very long name)",
        origin=("/a/very/long/path" * 10 + "/disk.py:77 in start_read",),
    )
    with processes(folder, replace(holding(lease), argv="x" * 900)):
        header, _, line, taken = printed(capsys)
    assert max(map(len, (header, line, taken))) <= 80
    assert header.startswith("process 4321, domain 3, xxx")
    assert header.endswith("...")
    assert line.split() == [
        r"\x1b]0;title\x0...", "dma", "0xfffff80000000", "0x80000000", "bidirectional", "1m01s",
        "STALE",
    ]  # fmt: skip
    assert taken.startswith("    thread Thread-1234 (a very l..., taken at ...")
    assert taken.endswith("/disk.py:77 in start_read")


def test_lists_that_are_not_complete(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The output says what is missing."""
    found = replace(holding(LEASES[0], omitted=7), omitted=3)
    with processes(folder, found, replace(holding(incomplete=True), pid=5)):
        lines = printed(capsys)
    assert lines[1:2] == [
        "This list is incomplete: other threads changed it all the time. Ask again."
    ]
    assert "7 more leases are not shown" in lines
    assert "process 4321: 3 more caches and servers are not shown" in lines
    assert "    thread MainThread" in lines


def test_a_cache_of_a_file_has_no_domain(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = replace(SNAPSHOT.caches[1], leases=LEASES[:1])
    with processes(folder, replace(SNAPSHOT, caches=(cache,))):
        assert printed(capsys)[0] == f"process 4321, {SNAPSHOT.argv}"


def test_no_lease_is_held(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """That is said, and the status is 1."""
    text = ["No process with a monitor holds a lease."]
    assert "No process of this user has a monitor." in printed(capsys, status=1)[0]
    with processes(folder, holding()):
        assert printed(capsys, status=1) == text
        assert printed(capsys, "--json", status=1)[0] == "{"


def test_a_process_that_cannot_be_asked(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named alone, it is an error; among others it is a note."""
    monkeypatch.setattr(asking, "TIMEOUT_S", 0.01)
    assert main(["leases", "99"]) == 2
    assert capsys.readouterr().err == (
        "xenmapcache: error: process 99 has no monitor, or is another user's; "
        "set XENMAPCACHE_MONITOR=1 for it, or call xenmapcache.observe.monitor.serve()\n"
    )
    with SocketFolder(folder, create=True) as opened, opened.listen(77):
        assert main(["leases", "77"]) == 2
        text = f"process 77 has not answered within 0.01 s ({folder}/77.sock)"
        assert capsys.readouterr().err == f"xenmapcache: error: {text}\n"
        assert main(["leases"]) == 1
        assert capsys.readouterr().err == f"xenmapcache: note: {text}\n"
        assert main(["leases", "--json"]) == 1
        assert json.loads(capsys.readouterr().out)["processes"] == [
            {"pid": 77, "problem": "has not answered within 0.01 s"}
        ]


@pytest.mark.parametrize("pid", ["0", "-1", "x"])
def test_wrong_numbers(pid: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["leases", pid])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("xenmapcache: error: ")


@pytest.mark.slow
def test_a_real_process_that_is_stuck(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its leases are shown, with the line of code; names are escaped."""
    with Program(STUCK, folder, "1") as program:
        lines = printed(capsys, str(program.pid))
    assert lines[0].startswith(f"process {program.pid}, domain 1, ")
    assert lines[2].split()[:5] == ["disk0", "dma", "0x1000", "0x2000", "from-device"]
    assert lines[2].endswith("STALE")
    assert lines[3] == "    thread worker-1, taken at <string>:6 in <module>"
    assert lines[4].split()[:5] == [r"vga\x1b[31m", "device", "0xa0000", "0x10000", "-"]
    assert lines[4].endswith("-")
