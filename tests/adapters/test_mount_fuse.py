"""`xenmapcache mount` with the kernel's FUSE, and gdb and LeechCore on what it mounts."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cli.process import environment
from tests.images import linux_guest, tools
from xenmapcache import BackendUnavailableError, MockDomain, open_backend, write_lime, write_vmcore
from xenmapcache.adapters.mount import check_fuse
from xenmapcache.address import PAGE_SIZE, MiB

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where to mount; the test is skipped where that cannot work."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    try:
        check_fuse(folder)
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    return folder


def large_guest() -> MockDomain:
    """Return the guest with 4 MiB more."""
    guest = linux_guest.create()
    guest.balloon_in(16 * MiB, 4 * MiB)
    return guest


@pytest.fixture
def lime(tmp_path: Path) -> Path:
    """A small Linux guest in a file. LeechCore reads no file of less than 16 MiB."""
    path = tmp_path / "guest.lime"
    with open_backend("mock", domain=large_guest()) as backend:
        write_lime(backend, path)
    return path


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """Open a file; closing it may fail, because it is not mounted any more."""
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        with contextlib.suppress(OSError):
            os.close(fd)


@contextmanager
def mounted(source: str | Path, folder: Path, program: str = "") -> Iterator[subprocess.Popen[str]]:
    """Run the command, or a program that does the same, until the folder is mounted."""
    command = ["-c", program] if program else ["-m", "xenmapcache"]
    with subprocess.Popen(
        [sys.executable, *command, "mount", "--json", str(source), str(folder)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            text = process.stdout.readline()
            while text and not text.endswith("\n}\n"):
                line = process.stdout.readline()
                text = text + line if line else ""
            if not text:
                assert process.stderr is not None
                complaint = process.stderr.read()
                if "cannot be mounted" in complaint:
                    pytest.skip(complaint)
                pytest.fail(complaint)
            listed = json.loads(text)
            assert listed["folder"] == str(folder)
            assert [Path(each["file"]).name for each in listed["files"]] == [
                "memory.raw",
                "memory.elf",
                "memory.lime",
            ]
            yield process
        finally:
            process.kill()
            process.wait()
            subprocess.run(["umount", "-l", folder], check=False, capture_output=True)


def assert_ended(process: subprocess.Popen[str], folder: Path) -> str:
    """Wait until the command has ended well, and the folder is empty; return its stderr."""
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 0, complaint
    assert os.listdir(folder) == []
    return complaint


def test_the_files(lime: Path, folder: Path, tmp_path: Path) -> None:
    """They are read through the kernel as they were written by the writers, and not written."""
    with open_backend("mock", domain=large_guest()) as backend:
        write_vmcore(backend, tmp_path / "guest.elf", machine="x86-64")
    with mounted(lime, folder) as process:
        assert sorted(os.listdir(folder)) == ["memory.elf", "memory.lime", "memory.raw"]
        assert (folder / "memory.lime").read_bytes() == lime.read_bytes()
        assert (folder / "memory.elf").read_bytes() == (tmp_path / "guest.elf").read_bytes()
        assert (folder / "memory.raw").stat().st_size == 20 * MiB
        for name in ("memory.raw", "new"):
            with pytest.raises(OSError, match=".") as caught:
                (folder / name).write_bytes(b"x")
            assert caught.value.errno == errno.EROFS
        with pytest.raises(FileNotFoundError):
            (folder / "memory.bin").read_bytes()
        process.send_signal(signal.SIGTERM)
        assert assert_ended(process, folder) == ""


def test_ends_by_sigint_while_a_file_is_open(lime: Path, folder: Path) -> None:
    """The one who has it open gets an error from then on."""
    with mounted(lime, folder) as process, opened(folder / "memory.raw") as file:
        assert len(os.read(file, PAGE_SIZE)) == PAGE_SIZE
        process.send_signal(signal.SIGINT)
        assert_ended(process, folder)
        with pytest.raises(OSError, match="."):
            os.pread(file, PAGE_SIZE, 8 * MiB)


def test_ends_when_it_is_unmounted(lime: Path, folder: Path) -> None:
    """With the usual command."""
    with mounted(lime, folder) as process:
        command = ["umount"] if os.geteuid() == 0 else ["fusermount3", "-u"]
        subprocess.run([*command, str(folder)], check=True)
        assert_ended(process, folder)


def test_one_that_was_killed_leaves_a_folder_that_says_so(lime: Path, folder: Path) -> None:
    """What to do is in the error."""
    with mounted(lime, folder) as process:
        process.kill()
        process.wait()
        with pytest.raises(BackendUnavailableError, match="by a process that was killed: umount"):
            check_fuse(folder)


PROGRAM = """
import sys, threading
from tests.images import linux_guest
from xenmapcache import open_backend
from xenmapcache.adapters import mount
from xenmapcache.cli import main, sources

guest = linux_guest.create()
guest.write(0x600000, b"first")
sources.open_backend = lambda name, **options: open_backend("mock", domain=guest)

def obey():
    for line in sys.stdin:
        exec(line)
        print("done", flush=True)

threading.Thread(target=obey, daemon=True).start()
mount._LOOK_S = 0.01
sys.exit(main())
"""


def test_a_live_guest_that_changes_and_ends(folder: Path) -> None:
    """Each read shows the memory of now; a page that is gone is EIO; its end unmounts it."""
    program = PROGRAM.replace("sys.stdin", "open(sys.argv[3] + '.orders')")
    orders = folder.with_name("mounted.orders")
    os.mkfifo(orders)
    with contextlib.ExitStack() as stack:
        program = program.replace("sys.argv[3] + '.orders'", repr(str(orders)))
        process = stack.enter_context(mounted("mock:16M", folder, program))
        order = stack.enter_context(open(orders, "w", buffering=1))
        assert process.stdout is not None

        def tell(line: str) -> None:
            assert process.stdout is not None
            order.write(f"{line}\n")
            assert process.stdout.readline() == "done\n"

        raw = stack.enter_context(opened(folder / "memory.raw"))
        elf = stack.enter_context(opened(folder / "memory.elf"))
        assert os.pread(raw, 5, 0x600000) == b"first"
        tell('guest.write(0x600000, b"other")')
        assert os.pread(raw, 5, 0x600000) == b"other"
        place = 0x2000 + 0x600000 - 0x20000  # after the head and a hole
        assert os.pread(elf, 5, place) == b"other"
        tell("guest.balloon_out(0x600000, 0x1000)")
        with pytest.raises(OSError, match="Input/output error"):
            while True:  # until the next look
                os.pread(elf, 5, place)
        assert len(os.pread(elf, 5, place + PAGE_SIZE)) == 5
        assert os.pread(raw, 5, 0x600000) == bytes(5)
        tell("guest.destroy()")
        complaint = assert_ended(process, folder)
        assert "no page at 0x600000" in complaint
        assert complaint.endswith("the guest has ended: its memory is unmounted\n")


def test_gdb(lime: Path, folder: Path) -> None:
    """With gdb: physical addresses in memory.elf; it cannot read a hole."""
    gdb = tools.command("gdb")
    hole = linux_guest.HOLES[0][0]
    with mounted(lime, folder):
        out = tools.run(
            *(gdb, "-q", "-nx", "-batch", "-ex", f"core-file {folder / 'memory.elf'}"),
            *("-ex", f"x/x {hole:#x}", "-ex", f"x/s {linux_guest.BANNER_AT:#x}"),
        )
        assert linux_guest.BANNER.decode().rstrip() in out
        assert f"Cannot access memory at address {hole:#x}" in out


@pytest.mark.parametrize("name", ["memory.elf", "memory.raw"])
def test_leechcore(lime: Path, folder: Path, name: str) -> None:
    """With LeechCore, which MemProcFS is made on: a volatile file, so nothing is kept."""
    leechcore: Any = tools.module("leechcorepyc", "leechcorepyc")
    with mounted(lime, folder):
        device = leechcore.LeechCore(f"file://file={folder / name},volatile=1")
        try:
            found = device.read(linux_guest.BANNER_AT, PAGE_SIZE)
            assert found.startswith(linux_guest.BANNER)
            if name == "memory.elf":
                first = min(each["base"] for each in device.memmap)
                assert first == 0
                assert len(device.memmap) == len(linux_guest.HOLES) + 1
        finally:
            device.close()


def test_errors_of_the_command(lime: Path, folder: Path) -> None:
    """One line, before the source is looked through."""
    (folder / "file").touch()
    for target, text in (
        (folder, "is not empty; give an empty folder"),
        (lime, "Not a directory"),
        (folder / "none", "No such file or directory"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "xenmapcache", "mount", str(lime), str(target)],
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"xenmapcache: error: {target}: {text}\n"
