"""``xenmapcache qemu-log``: reports, JSON, compressed and damaged logs, and --follow."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.observe import qemu_logs as logs
from xenmapcache.cli import main
from xenmapcache.files.logfile import LogFile

GOOD = logs.text(
    "VNC server running",
    *logs.miss(0),
    *logs.hit(0x5001),
    *logs.miss(0),
    logs.ioreq(0, 0x70),
    logs.INVALIDATE,
    "xen_invalidate_map_cache Locked DMA mapping while invalidating mapcache 0x0 -> "
    "0x7f0000002000 is present",
    "xen_map_cache want 0xzz\x1b[31m",
    prefix=logs.PREFIXES["pid"],
)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "qemu-dm-web.log"
    path.write_bytes(GOOD)
    return path


def test_the_report(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each part is there, and text of the log is escaped."""
    assert main(["qemu-log", str(log)]) == 0
    shown = capsys.readouterr().out
    for part in ("0x2000", "0x0..0x100000", "INVALIDATE: 1 in 1 bursts", "33.33 %", "clock",
                 "9.0 to 10.0", r"223@1795888038.000012:xen_map_cache want 0xzz\x1b[31m",
                 "map calls of xenmapcache", "mapped again"):  # fmt: skip
        assert part in shown, part


def test_json(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One object with a report for each file."""
    assert main(["qemu-log", "--json", str(log), str(log)]) == 0
    first, second = json.loads(capsys.readouterr().out)["files"]
    assert first == second
    assert first["dma_held"]["entries"][0]["address"] == 0x2000


@pytest.mark.parametrize(
    ("form", "shown", "hidden"),
    [
        ("pid", ["2 in 1 bursts", "They cost 1 map calls, 0.5 for each INVALIDATE, in 0.000 s",
                 "last map", "after 0.000 s"], ["have no times"]),
        ("plain", ["2 in 1 bursts", "They cost 1 map calls, 0.5 for each INVALIDATE.\n",
                   "have no times"], ["after 0"]),
    ],
)  # fmt: skip
def test_cost_of_bursts(
    form: str, shown: list[str], hidden: list[str], log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Map calls always; times where the log has them."""
    lines = [*logs.miss(0), *[logs.INVALIDATE] * 2, *logs.miss(0)]
    log.write_bytes(logs.text(*lines, prefix=logs.PREFIXES[form]))
    assert main(["qemu-log", str(log)]) == 0
    text = capsys.readouterr().out
    assert [part for part in shown if part not in text] == []
    assert [part for part in hidden if part in text] == []


def test_unknown_cost_of_bursts(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The report says which event is missing, and claims no burst."""
    log.write_bytes(logs.text(*[logs.INVALIDATE] * 2))
    assert main(["qemu-log", str(log)]) == 0
    text = capsys.readouterr().out
    for part in ("INVALIDATE: 2\n", "cost is unknown, because xen_remap_bucket", "burst ends"):
        assert part in text, part
    log.write_bytes(logs.text(logs.INVALIDATE, *logs.hit(0), logs.INVALIDATE))
    assert main(["qemu-log", str(log)]) == 0
    assert "2 in 2 bursts" in capsys.readouterr().out


def test_compressed_logs(
    log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several members, in small chunks; a truncated or damaged one is read as far as it goes."""
    packed = gzip.compress(GOOD) + gzip.compress(GOOD * 50)
    path = tmp_path / "packed"
    path.write_bytes(packed)
    monkeypatch.setattr("xenmapcache.files.logfile._CHUNK_BYTES", 5)
    with LogFile(str(path)) as file:
        assert b"".join(file.chunks()) == GOOD * 51
        assert (file.damage, file.offset) == ("", len(packed))
    for data, damage in (
        (packed[:-30], "truncated"),
        (packed + b"junk" * 9, "damaged at"),
    ):
        path.write_bytes(data)
        assert main(["qemu-log", str(path)]) == 0
        assert damage in capsys.readouterr().out


@pytest.mark.parametrize("data", [b"", b"short\n", logs.HELD.encode() + b"\n"])
def test_small_logs(data: bytes, log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A log that is shorter than a header of the binary form is text."""
    log.write_bytes(data)
    assert main(["qemu-log", str(log)]) == 0
    shown = capsys.readouterr().out
    assert ("unknown" in shown) == (len(data) > 50)


def test_long_tables(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The binary form; what is beyond the tables is counted."""
    held = [("xen_invalidate_map_cache", 1, (5, host)) for host in range(1, 5000)]
    ioreqs = [("handle_ioreq", 1, (1, 0, 0, 0, 0, port, 0, 1, 1)) for port in range(30)]
    log.write_bytes(logs.trace(*held, *ioreqs) + logs.record(0xFFFFFFFFFFFFFFFE, 9, 4))
    assert main(["qemu-log", str(log)]) == 0
    shown = capsys.readouterr().out
    for part in ("and 4076 more DMA mappings", "and 903 lines of further mappings", "4 events",
                 "and 10 ioreqs of 10 others"):  # fmt: skip
        assert part in shown, part


def test_errors(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are one line, with a remedy."""
    log.write_bytes(logs.header(3) + bytes(99))
    packed = tmp_path / "packed"
    packed.write_bytes(gzip.compress(GOOD))
    for arguments, text in (
        ([str(log)], "version is 3; only 4"),
        ([str(tmp_path)], "not a regular file"),
        ([str(tmp_path / "absent")], "No such file"),
        (["--follow", str(log), str(log)], "--follow reads one log"),
        (["--follow", str(packed)], "is compressed"),
        (["--follow", str(tmp_path / "absent")], "No such file"),
    ):
        assert main(["qemu-log", *arguments]) == 2
        assert text in capsys.readouterr().err


def follow(monkeypatch: pytest.MonkeyPatch, *steps: Callable[[], object]) -> None:
    """Have each wait for more do the next step, and the last one be Ctrl-C."""
    waiting = iter(steps)

    def wait(_: float) -> None:
        step = next(waiting, None)
        if step is None:
            raise KeyboardInterrupt
        step()

    monkeypatch.setattr("xenmapcache.cli._discard", lambda _: None)
    monkeypatch.setattr("xenmapcache.cli.qemu_log.time.sleep", wait)


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def test_follow(
    log: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is appended is printed; across a rotation and a truncation; the report comes last."""
    more = logs.text(
        *[logs.INVALIDATE] * 30, "xen_map_cache want 0x7000", "xen_map_cache_return (nil)",
        "xen_map_cache_init nr_buckets = 0x8000 size 0x180000",
    )  # fmt: skip
    follow(
        monkeypatch,
        lambda: append(log, more),
        lambda: log.rename(log.with_suffix(".1")),
        lambda: log.write_bytes(logs.text(*logs.miss(0x500000))),
        lambda: log.write_bytes(b""),
        lambda: append(log, logs.text(*logs.miss(0x900000))),
    )
    assert main(["qemu-log", "--follow", str(log)]) == 130
    shown = capsys.readouterr().out
    for part in ("DMA held across INVALIDATE 1: bucket 0x0", "and 10 more: invalidated",
                 "no memory at 0x7000", "map cache of 32768 buckets", "mapped 0x500000, 1 MiB",
                 "mapped 0x900000", "What this log cannot tell"):  # fmt: skip
        assert part in shown, part


def test_follow_in_json(
    log: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One object for each line."""
    follow(monkeypatch, lambda: append(log, logs.text(*[logs.INVALIDATE] * 30)))
    assert main(["qemu-log", "--follow", "--json", str(log)]) == 130
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    names = [event["event"] for event in events]
    assert names.count("invalidated") == 21
    assert events[names.index("left_out")]["count"] == 10
    assert names[-1] == "report"
    assert events[-1]["invalidations"]["count"] == 31
