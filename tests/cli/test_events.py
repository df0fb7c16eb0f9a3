"""``xenmapcache events``: lines, filters, JSON and traces of recordings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.observe import qemu_logs as logs
from tests.observe.recordings import EVENTS, START, released, taken
from tests.observe.trace_events import check, phases
from xenmapcache.cli import events as module
from xenmapcache.cli import main
from xenmapcache.events import Event, Invalidated, RequestHandled
from xenmapcache.observe.eventlines import NAMES, encode, name_of
from xenmapcache.observe.recording import read, write_recording


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "run.jsonl"
    with write_recording(path, "a program") as recording:
        recording.write(EVENTS)
    return path


def write(path: Path, *events: Event) -> None:
    with write_recording(path, "a program") as recording:
        recording.write(events)


def shown(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> list[str]:
    """Run the command; return the lines that it prints."""
    status = main(["events", *map(str, arguments)])
    lines = capsys.readouterr().out.splitlines()
    assert status == (0 if lines else 1)
    return lines


def names(lines: list[str]) -> list[str]:
    """Return the names of the events of lines of JSON."""
    return [json.loads(line)["event"] for line in lines]


def test_each_event_is_a_line(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It has at most 80 columns, and what files and guests have chosen is escaped."""
    lines = shown(capsys, path)
    assert len(lines) == len(EVENTS)
    assert [line for line in lines if len(line) > 80 or not line.isprintable()] == []
    assert lines[0].startswith(
        "    0.000000 cache opened    xen domain 3 (web), up to 32768 buckets"
    )
    for part in (
        "0x100000+0x100000 in 30 us, 8 KiB of holes",
        r'7 disk "1"\n\x1b[...',
        "to-device 0x5000+0x2000",
        "1, 5 buckets dropped, DMA held: 2 in 2 us",
        "0.003 ms STALE copied 1 LOST 2",
        "buffer write MMIO 0xfee00000 FAILED: KeyError:...",
        "vCPU 0 read port 0x3f8 in 1 us",
        "server opened   domain 3 IoreqServer of domain 3",
        "server closed",
        "0x300000+0x100000 host 0x7f1234567000 in 2",
        "0x300000 by 0x500000",
        "7 in 2 places",
        "6 in 2 places",
    ):
        assert any(part in line for line in lines), (part, lines)


def test_times_of_day(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In UTC; an event without a time has none."""
    lines = shown(capsys, path, "--absolute")
    assert lines[0].startswith("05:26:40.000000 cache opened")
    assert lines[-2].startswith("                events lost     12")


def test_long_texts_are_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A release of an unknown lease, and an INVALIDATE that says little, are shown as well."""
    path = tmp_path / "x"
    write(
        path, taken(3, "x" * 99), released(4), Invalidated(None, 2), taken(5)._replace(stale=True)
    )
    lines = shown(capsys, path)
    assert f"3 {'x' * 15}... to-device" in lines[0]
    assert lines[1].endswith("lease released  4")
    assert lines[2] == "             invalidated     2"
    assert lines[3].endswith("0x5000+0x2000 STALE")


def test_json_is_what_was_recorded(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Line by line, without the header."""
    assert shown(capsys, path, "--json") == [
        line for event in EVENTS for line in encode(event).decode().splitlines()
    ]


def test_filters(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By kind, owner, address and time. A release has the owner and range of its lease."""
    for arguments, expected in (
        (["--event", "hole_fault", "--event", "map_failed"], ["hole_fault", "map_failed"]),
        (["--owner", "disk*"], ["lease_taken", "lease_released"]),
        (["--owner", "net"], []),
        (["--start", "0x6fff", "--length", "1"], ["lease_taken", "lease_released"]),
        (["--start", "0x7000", "--length", "0x2001"], ["hole_fault"]),
        (["--start", "0xfee00000"], ["request_handled"]),
        (["--to", "0.0000019"], ["cache_opened", "bucket_mapped", "lease_taken"]),
        (["--from", "1"], ["cache_closed"]),
        (["--from", "9", "--to", "9"], []),
    ):
        assert names(shown(capsys, path, "--json", *arguments)) == expected, arguments


@pytest.mark.parametrize("arguments", [["--from", "soon"], ["--to", "nan"], ["--event", "comet"]])
def test_wrong_arguments(path: Path, arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["events", str(path), *arguments])


def test_leases_are_kept_in_bounded_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the oldest one, the release does not show the owner any longer."""
    monkeypatch.setattr(module, "_MAX_LEASES", 2)
    path = tmp_path / "x"
    write(path, *map(taken, range(3)), *map(released, range(3)))
    lines = shown(capsys, path, "--event", "lease_released")
    assert [("disk" in line) for line in lines] == [False, True, True]


def test_several_files_and_streams(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each file has its name above it; a further stream has its number."""
    other = tmp_path / "other"
    with write_recording(other, "") as recording:
        recording.write([taken()], stream=2)
    lines = shown(capsys, path, other)
    assert (lines[0], lines[-2]) == (f"{path}:", f"{other}:")
    assert " [2] lease taken " in lines[-1]
    assert len(shown(capsys, path, other, "--json")) == len(EVENTS) + 1


def test_what_was_left_out_is_said(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On stderr, so that it is not taken for an event."""
    held = encode(Invalidated(START, 1, 1, tuple(range(2100))))
    with path.open("ab") as file:
        file.write(b'{"event":"comet"}\nju\x1bnk\n' + held)
    data = path.read_bytes().replace(b'"number":0', b'"number":5').replace(b"null", b"9999999", 1)
    path.write_bytes(data)
    assert main(["events", str(path)]) == 0
    notes = capsys.readouterr().err
    for part in ("1 events of unknown", "1 damaged lines", "has left out 100", r"ju\x1bnk",
                 "were overwritten"):  # fmt: skip
        assert part in notes, notes


def test_other_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line says what a recording is."""
    path = tmp_path / "x"
    path.write_text("guest")
    assert main(["events", str(path)]) == 2
    assert "is not a recording" in capsys.readouterr().err
    assert main(["events", str(tmp_path)]) == 2
    assert "not a regular file" in capsys.readouterr().err


def test_a_trace(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all files, in the published format; what has no time is counted."""
    monkeypatch.setattr(module, "_BUFFER", 100)
    out = tmp_path / "trace.json"
    assert main(["events", str(path), str(path), "--perfetto", str(out)]) == 0
    assert phases(check(out.read_text()))["b"] == 2
    assert "6 events are not in the trace" in capsys.readouterr().err
    write(path, taken(), released())
    assert main(["events", str(path), "--perfetto", str(out)]) == 0
    assert capsys.readouterr().err == ""


def test_each_name_can_be_chosen() -> None:
    assert set(NAMES) == {name_of(type(event)) for event in EVENTS}


def test_qemu_logs_are_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``qemu-log --record`` writes its events, and prints its report as before."""
    log, out = tmp_path / "qemu.log", tmp_path / "out.jsonl"
    log.write_bytes(logs.text(*logs.miss(0), logs.INVALIDATE, prefix=logs.PREFIXES["pid"]))
    assert main(["qemu-log", "--json", str(log)]) == 0
    report = capsys.readouterr().out
    assert main(["qemu-log", "--json", str(log), "--record", str(out)]) == 0
    assert capsys.readouterr().out == report
    recording = read(out)
    assert {name_of(type(event)) for event in recording} >= {"bucket_mapped", "invalidated"}
    assert recording.headers[0].source == str(log)
    for arguments in (["--follow", str(log)], [str(log), str(log)]):
        assert main(["qemu-log", *arguments, "--record", str(out)]) == 2
        assert "--record" in capsys.readouterr().err


def test_a_release_without_a_clock(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """How long the lease was held is not made up."""
    write(path, taken(3)._replace(time=None), released(3)._replace(time=None))
    (line,) = shown(capsys, path, "--event", "lease_released")
    assert " ms" not in line
    assert taken(3).owner in line


def test_a_trace_does_not_replace_a_recording(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor by another name of it; nothing is written."""
    before = path.read_bytes()
    link = tmp_path / "link"
    link.symlink_to(path)
    for out in (path, link):
        assert main(["events", str(path), "--perfetto", str(out)]) == 2
        assert f"{out} is the file that is read" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_an_invalidate_is_named(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A request without an address says what it is."""
    write(path, RequestHandled(START, 0, 8, False, 0, 8, 9000, None, None))
    assert " ".join(shown(capsys, path)[0].split()).endswith("vCPU 0 INVALIDATE in 9 us")
