"""``dump``: what is in the file, and that nothing is left of one that was not completed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path

import pytest

from tests.cli.process import MODULE, environment, on_terminal
from tests.images.writers import memory
from tests.unit.test_source import lime
from xenmapcache import FaultError, MapCache, MockDomain, MockHypervisor, XenCallError, open_source
from xenmapcache.address import PAGE_SIZE, MiB
from xenmapcache.backends.image import ImageBackend
from xenmapcache.backends.mock import MockBackend
from xenmapcache.cli import main

FAR = 8 * MiB


@pytest.fixture
def guest(tmp_path: Path) -> str:
    """Two ranges with a large hole between them."""
    low = bytes(range(256)) * 48
    return str(lime(tmp_path / "guest.lime", {0: low, FAR: b"end!" * 1024}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder for nothing but the output."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def dump(source: str, path: Path, *options: str, status: int = 0) -> None:
    assert main(["dump", source, "-o", str(path), *options]) == status


def test_raw_is_sparse(guest: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Addresses are offsets, holes are holes in the file, and it is its owner's alone."""
    path = folder / "guest.raw"
    dump(guest, path)
    assert capsys.readouterr() == ("", "")
    data = path.read_bytes()
    assert len(data) == FAR + PAGE_SIZE
    assert data[: 3 * PAGE_SIZE] == bytes(range(256)) * 48
    assert not any(data[3 * PAGE_SIZE : FAR])
    assert data[FAR:] == b"end!" * 1024
    state = path.stat()
    assert state.st_blocks * 512 < MiB
    assert stat.S_IMODE(state.st_mode) == 0o600
    assert os.listdir(folder) == ["guest.raw"]


def test_a_terminal_is_told(
    guest: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terminal shows how much it was, and how fast."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    dump(guest, folder / "guest.raw")
    line = capsys.readouterr().out
    assert re.fullmatch(r".*guest\.raw: 4 pages, 16 KiB in \d+\.\d s, [\d.]+ [KMGT]?i?B/s\n", line)


def test_a_part(guest: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With --start and --length just that is in the file; --json tells what was written."""
    path = folder / "part"
    dump(guest, path, "--start", "0x1001", "--length", "0x1000", "--json")
    assert path.read_bytes() == (bytes(range(256)) * 48)[0x1001:0x2001]
    facts = json.loads(capsys.readouterr().out)
    assert facts.pop("seconds") >= 0
    assert facts == {"file": str(path), "format": "raw", "pages": 1}


def test_a_coredump_has_the_same_memory(guest: str, folder: Path) -> None:
    """Written and read again it is equal, holes included, and is recognised."""
    pytest.importorskip("elftools", reason="pyelftools is not installed")
    path = folder / "guest.core"
    dump(guest, path, "--format", "coredump")
    assert main(["diff", guest, str(path)]) == 0
    assert main(["diff", f"coredump:{path}", "mock:1M", "--quiet"]) == 1
    assert os.listdir(folder) == ["guest.core"]


@pytest.mark.parametrize("form", ["vmcore", "lime"])
def test_other_formats_have_the_same_memory(
    guest: str, folder: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Written and read again they are equal, holes included, and are recognised."""
    path = folder / f"guest.{form}"
    dump(guest, path, "--format", form, "--json")
    facts = json.loads(capsys.readouterr().out)
    assert facts.pop("seconds") >= 0
    assert facts == {"file": str(path), "format": form, "pages": 4}
    assert main(["diff", guest, str(path)]) == 0
    assert os.listdir(folder) == [f"guest.{form}"]


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the mock's guest is told, in order."""
    told: list[str] = []
    for name in ("pause", "unpause"):
        method = getattr(MockDomain, name)

        def call(self: MockDomain, name: str, method: Callable[[MockDomain], None]) -> None:
            told.append(name)
            method(self)

        monkeypatch.setattr(MockDomain, name, partialmethod(call, name, method))
    return told


@pytest.mark.parametrize("form", ["raw", "coredump", "vmcore", "lime"])
def test_a_paused_guest(
    folder: Path, form: str, pauses: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """It is paused before the copy and unpaused after it; without --pause it is left alone."""
    path = folder / "guest"
    dump("mock:4M", path, "--format", form, "--json")
    assert (json.loads(capsys.readouterr().out)["paused"], pauses) == (False, [])
    dump("mock:4M", path, "--format", form, "--json", "--pause")
    assert (json.loads(capsys.readouterr().out)["paused"], pauses) == (True, ["pause", "unpause"])
    with open_source("mock:4M") as source:
        assert path.stat().st_size >= (source.memory_end or 0)


def test_a_guest_that_was_paused_before(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """It stays paused."""
    guest = MockHypervisor().create_domain(memory="4M")
    monkeypatch.setattr(MockHypervisor, "create_domain", lambda *_, **__: guest)
    guest.pause()
    dump("mock:4M", folder / "f", "--pause")
    assert guest.paused
    guest.unpause()
    dump("mock:4M", folder / "f", "--pause")
    assert not guest.paused


def test_a_terminal_is_told_that_the_guest_ran(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terminal shows for how long pages may be apart, unless the guest was paused."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    dump("mock:4M", folder / "f")
    _, line = capsys.readouterr().out.splitlines()
    assert re.match(r"the guest ran during these \d+\.\d s, so pages are of different mom", line)
    dump("mock:4M", folder / "f", "--pause")
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_an_error_unpauses(
    folder: Path,
    pauses: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A dump that fails unpauses the guest; its error is reported."""

    def full(*_: object) -> int:
        assert pauses == ["pause"]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    dump("mock:4M", folder / "f", "--pause", status=2)
    assert pauses == ["pause", "unpause"]
    assert "No space left on device" in capsys.readouterr().err


def test_a_guest_that_cannot_be_unpaused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error says what to do."""

    def refuse(_: object) -> None:
        raise XenCallError("xc_domain_unpause", 1, 1)

    monkeypatch.setattr(MockBackend, "unpause", refuse)
    dump("mock:4M", folder / "f", "--pause", status=2)
    complaint = capsys.readouterr().err
    assert "the guest is still paused: xc_domain_unpause" in complaint
    assert complaint.endswith("; run xl unpause 1\n")


def test_a_signal_that_got_lost(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the exception of a signal was swallowed, the next report of progress ends the copy."""
    pwrite = os.pwrite

    def swallow(fd: int, data: memoryview, at: int) -> int:
        with contextlib.suppress(SystemExit):
            signal.raise_signal(signal.SIGTERM)
        return pwrite(fd, data, at)

    monkeypatch.setattr(os, "pwrite", swallow)
    with pytest.raises(SystemExit) as caught:
        main(["dump", "mock:4M", "-o", str(folder / "f"), "--pause"])
    assert caught.value.code == 143
    assert os.listdir(folder) == []


def test_a_page_that_goes_meanwhile_is_a_hole(
    guest: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What balloons out between the look and the copy is left out, and the rest is copied."""
    views = MapCache.views

    def balloon(self: MapCache, address: int, length: int) -> object:
        if address <= PAGE_SIZE < address + length:
            yield from views(self, address, PAGE_SIZE - address)
            raise FaultError(PAGE_SIZE, length, 22)
        yield from views(self, address, length)

    monkeypatch.setattr(MapCache, "views", balloon)
    # As of a live guest, whose pages have to be mapped.
    monkeypatch.setattr(ImageBackend, "read_pages", lambda *_: False)
    path = folder / "guest.raw"
    dump(guest, path)
    low = bytes(range(256)) * 16
    assert path.read_bytes()[: 3 * PAGE_SIZE] == low + bytes(PAGE_SIZE) + low


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["-o", "{folder}"], "is not a regular file"),
        (["-o", "/dev/null"], "/dev/null is not a regular file"),
        (["-o", "{folder}/absent/file"], "No such file or directory"),
        (["-o", "{folder}/f", "--format", "coredump", "--start", "1M"], "--format raw"),
        (["-o", "{folder}/f", "--format", "vmcore", "--start", "1M"], "a vmcore file begins at"),
        (["-o", "{folder}/f", "--format", "vmcore", "--length", "16777216T"], "52-bit"),
        (["-o", "{folder}/f", "--pause"], "is not a live guest; leave out --pause"),
        (["-o", "{folder}/f", "--length", "16777216T"], "52-bit"),
        (["-o", "{folder}/f", "--start", "16777216T"], "52-bit"),
    ],
)
def test_what_cannot_be_written(
    guest: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    complaint: str,
) -> None:
    """Each is one line that says why, and nothing is made."""
    assert main(["dump", guest, *(each.format(folder=folder) for each in arguments)]) == 2
    printed = capsys.readouterr()
    assert complaint in printed.err
    assert printed.err.count("\n") == 1
    assert os.listdir(folder) == []


@pytest.mark.slow
@pytest.mark.parametrize("form", ["raw", "coredump", "vmcore", "lime"])
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_an_interrupt_leaves_nothing(
    folder: Path, form: str, number: signal.Signals, status: int
) -> None:
    """Ctrl-C, and a signal that asks to end, leave the file that was there, and no other.

    A guest that was paused runs again.
    """
    path = folder / "guest.raw"
    path.write_bytes(b"before")
    code = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's & has it ignored
        "from xenmapcache import MockDomain\n"
        "from xenmapcache.cli import main\n"
        "MockDomain.pause = lambda _: print('paused', flush=True)\n"
        "MockDomain.unpause = lambda _: print('unpaused', flush=True)\n"
        "def begun(*_):\n"
        f"    signal.raise_signal({int(number)})\n"
        "os.pwrite = os.pwritev = begun\n"
        f"sys.exit(main(['dump', 'mock:4M', '-o', {str(path)!r}, '--format', {form!r}, '--pause']))"
    )
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        env=environment(),
        timeout=60,
        check=False,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (status, b"paused\nunpaused\n", b"")
    assert os.listdir(folder) == ["guest.raw"]
    assert path.read_bytes() == b"before"


def test_a_full_disk_leaves_nothing(
    guest: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An error of the file system is one line, and the file is not there."""

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    dump(guest, folder / "f", status=2)
    complaint = f"xenmapcache: error: {folder / 'f'}: No space left on device\n"
    assert capsys.readouterr().err == complaint
    assert os.listdir(folder) == []


def test_progress_on_a_terminal_only(folder: Path) -> None:
    """A terminal on stderr sees a bar with rate and time; stdout stays for the result."""
    arguments = ("dump", "mock:64M", "-o", str(folder / "f"))
    variables = environment(TERM="xterm-256color", COLUMNS="120", NO_COLOR="")
    shown, stdout = on_terminal(*arguments, environment=variables, streams=("stderr",))
    assert stdout == b""
    assert b"dumping mock:64M" in shown
    assert b"MiB" in shown
    command = [*MODULE, *arguments]
    quiet = subprocess.run(command, capture_output=True, env=environment(), check=True, timeout=60)
    assert (quiet.stdout, quiet.stderr) == (b"", b"")


def test_a_raw_dump_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that is cut short goes on where it was."""
    source, out = tmp_path / "guest", tmp_path / "out"
    source.write_bytes(memory(0, 3))
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:1000], at))
    assert main(["dump", f"raw:{source}", "-o", str(out)]) == 0
    assert out.read_bytes() == memory(0, 3)


@pytest.mark.parametrize("name", ["guest.lime", "link", "other"])
@pytest.mark.parametrize("form", ["raw", "lime"])
def test_a_dump_does_not_replace_its_source(
    guest: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, form: str
) -> None:
    """By no name of it: a raw dump would lose the source's holes and headers."""
    before = Path(guest).read_bytes()
    (tmp_path / "link").symlink_to(guest)
    (tmp_path / "other").hardlink_to(guest)
    dump(guest, tmp_path / name, "--format", form, status=2)
    assert f"{tmp_path / name} is the file that is read; write to another file" in (
        capsys.readouterr().err
    )
    assert Path(guest).read_bytes() == before


def test_a_dump_to_stdout(
    guest: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused, and no file of the name - appears."""
    monkeypatch.chdir(folder)
    dump(guest, Path("-"), status=2)
    assert "a dump cannot go to stdout; for a file of the name -, write ./-" in (
        capsys.readouterr().err
    )
    assert os.listdir(folder) == []
    assert main(["dump", guest, "-o", "./-"]) == 0
    assert os.listdir(folder) == ["-"]
