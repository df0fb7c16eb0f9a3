"""What docs/observing.md shows is what the commands print, of a program that runs."""

from __future__ import annotations

import contextlib
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from tests.cli.process import environment
from tests.cli.test_page import MARK, install_command
from tests.docs.test_docs import DOCS, README, blocks, python_blocks
from tests.observe import qemu_logs as logs
from xenmapcache.events import Invalidated, LeaseReleased, LeaseTaken
from xenmapcache.observe.recording import read

PAGE = DOCS / "observing.md"
PID = "4321"
"""The process's number on the page."""
BEFORE, AFTER = "<!-- disk.py, until Enter -->", "<!-- disk.py, after Enter -->"
RING, BUFFER = 0x7F00_0000_0000, 0x7F00_0100_0000

NOISE = (
    (re.compile(r"\S*disk\.py"), "disk.py"),
    (re.compile(r"^ *\d+\.\d{6} "), ""),
    (re.compile(r"\d+\.\d+ s\b|\d+m\d\ds\b|[\d,]+\.\d{3} ms|in [\d,]+ us"), "TIME"),
    (re.compile(r" +"), " "),
)
"""Times, and the folder, differ from run to run."""

pytestmark = [
    pytest.mark.skipif(not PAGE.is_file(), reason=f"no file {PAGE}"),
    pytest.mark.slow,
]


def qemu_log() -> str:
    """Return a log of a ring that is held all the time, and of a transfer across INVALIDATE 2."""

    def at(seconds: float, *lines: str) -> list[str]:
        return [f"223@{1795888040 + seconds:.6f}:{line}\n" for line in lines]

    def held(bucket: int, host: int) -> str:
        text = "Locked DMA mapping while invalidating mapcache"
        return f"xen_invalidate_map_cache {text} {bucket:#x} -> {host:#x} is present"

    ring, buffer = held(0x3F, RING + 0x12000), held(0x5A, BUFFER + 0x12000)
    lines = (
        *at(0.0, *logs.miss(0x3F12000, RING - 0x3F00000)),
        *at(0.1, *logs.miss(0x40000, RING + 0x500000)),
        *at(1.0, logs.INVALIDATE, ring),
        *at(1.2, *logs.miss(0x40000, RING + 0x500000)),
        *at(1.9, *logs.miss(0x5A12000, BUFFER - 0x5A00000)),
        *at(2.0, logs.INVALIDATE, ring, buffer),
        *at(2.3, *logs.miss(0x40000, RING + 0x500000)),
    )
    return "".join(lines)


def plain(text: str, pid: str = PID) -> list[str]:
    """Return lines without what differs from run to run."""
    lines = []
    for line in text.splitlines():
        known = re.sub(rf"\b{pid}\b", PID, line)
        for pattern, replacement in NOISE:
            known = pattern.sub(replacement, known)
        lines.append(known.strip())
    return lines


def until(stream: IO[str], text: str) -> Iterator[str]:
    """Yield lines, up to one that has a text."""
    for line in stream:
        yield line
        if text in line:
            return


@contextlib.contextmanager
def disk(folder: Path, variables: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """Run disk.py as the page says. Its standard output and error are one stream."""
    (code,) = (block.code for block in python_blocks(PAGE.read_text(encoding="utf-8")))
    (folder / "disk.py").write_text(code, encoding="utf-8")
    settings = {"XENMAPCACHE_MONITOR": "1", "XENMAPCACHE_RECORD": "disk"}
    with subprocess.Popen(
        ["python", "disk.py"],
        executable=sys.executable,
        cwd=folder,
        env=variables | settings,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_the_page_shows_what_is_printed(tmp_path: Path) -> None:
    """Each block is run in order, while disk.py runs, and then after it has ended."""
    for package in ("rich", "plotly"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    install_command(tmp_path, "-W error")
    (tmp_path / "qemu-dm-web.log").write_text(qemu_log(), encoding="utf-8")
    path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    variables = environment(XENMAPCACHE_RUNTIME_DIR=str(tmp_path / "run"), PATH=path)
    (tmp_path / "run").mkdir(mode=0o700)
    done = []
    with disk(tmp_path, variables) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        pid = str(process.pid)
        for block in blocks(PAGE.read_text(encoding="utf-8")):
            mark = MARK.fullmatch(block.before)
            if block.before == BEFORE:
                printed = "".join(until(process.stdout, "press Enter"))
                assert plain(printed, pid) == plain(block.code)[1:]
            elif block.before == AFTER:
                process.stdin.write("\n")
                process.stdin.close()
                assert plain(process.stdout.read(), pid) == plain(block.code)
                assert process.wait(60) == 0
            elif mark is not None:
                printed = run(block.code.replace(PID, pid), tmp_path, variables)
                expected = plain(block.code)
                found = plain(printed, pid)
                assert set(expected) <= set(found) if mark["part"] else found == expected
                done += [line.split()[2] for line in block.code.splitlines() if line[0:1] == "$"]
    commands = ["ps", "leases", "top", "events", "events", "timeline"]
    assert done == [*commands, "qemu-log", "qemu-log", "events", "timeline"]
    assert (tmp_path / "disk.html").stat().st_size
    assert (tmp_path / "web.html").stat().st_size


def run(code: str, folder: Path, variables: dict[str, str]) -> str:
    """Run the commands of a block; return them with what they print."""
    printed = ""
    for line in code.splitlines():
        if line.startswith("$ "):
            finished = subprocess.run(
                ["bash", "-c", f"exec 2>&1; {line[2:]}"],
                cwd=folder,
                capture_output=True,
                text=True,
                env=variables,
                timeout=120,
                check=False,
            )
            assert finished.returncode == 0, finished.stdout
            printed += f"{line}\n{finished.stdout}"
    return printed


def test_people_who_have_a_problem_find_the_page() -> None:
    """From the front page, and from the page of errors."""
    assert "](docs/observing.md)" in README.read_text(encoding="utf-8")
    assert "](observing.md" in (DOCS / "troubleshooting.md").read_text(encoding="utf-8")


def test_the_pictures_are_those_of_the_script() -> None:
    """They exist, and can be taken again."""
    shown = re.findall(r"!\[[^]]+\]\(_static/([^)]+)\)", PAGE.read_text(encoding="utf-8"))
    taken = re.findall(r'"(.*\.png)": ', (DOCS / "screenshots.py").read_text(encoding="utf-8"))
    assert sorted(shown) == sorted(taken)
    for name in shown:
        assert (DOCS / "_static" / name).read_bytes().startswith(b"\x89PNG")


def test_the_pictures_run_has_something_to_show(tmp_path: Path) -> None:
    """A lease that is stale, of a guest that balloons while its devices work."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    namespace = runpy.run_path(str(DOCS / "screenshots.py"))
    namespace["run"](tmp_path / "run.jsonl")
    events = list(read(tmp_path / "run.jsonl"))
    stale = {each.lease for each in events if isinstance(each, LeaseReleased) and each.stale}
    owners = {each.owner for each in events if isinstance(each, LeaseTaken) and each.lease in stale}
    assert "net ring" in owners
    assert len([each for each in events if isinstance(each, Invalidated)]) > 2
    assert {"disk0", "net", "vga"} <= {
        each.owner for each in events if isinstance(each, LeaseTaken)
    }
