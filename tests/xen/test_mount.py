"""`xenmapcache mount` on a live guest, in Dom0: what it shows, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.xen.control import held_still
from tests.xen.lab.platform import Platform
from xenmapcache import BackendUnavailableError, MapCache, open_backend
from xenmapcache.adapters.mount import check_fuse
from xenmapcache.adapters.virtual_files import virtual_files
from xenmapcache.address import PAGE_SIZE, MiB

pytestmark = pytest.mark.xen

FILES = ["memory.elf", "memory.lime", "memory.raw"]


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


@pytest.fixture
def length(machine: Platform) -> int:
    """How far the files reach: to some memory."""
    ram, _ = machine.memory
    return ram + 16 * MiB


@contextmanager
def mounted(domid: int, folder: Path, length: int) -> Iterator[subprocess.Popen[str]]:
    """Run the command until the folder is mounted."""
    command = [sys.executable, "-m", "xenmapcache", "mount", f"xen:{domid}", str(folder)]
    with subprocess.Popen(
        [*command, "--length", str(length)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            if not process.stdout.readline():
                assert process.stderr is not None
                pytest.fail(process.stderr.read())
            yield process
        finally:
            process.kill()
            process.wait()
            subprocess.run(["umount", "-l", folder], check=False, capture_output=True)


def assert_ended(process: subprocess.Popen[str], folder: Path) -> str:
    """Wait until the command has ended well, and the folder is empty; return its stderr."""
    _, complaint = process.communicate(timeout=240)
    assert process.returncode == 0, complaint
    assert os.listdir(folder) == []
    return complaint


def test_the_files_show_the_guest(live_domid: int, folder: Path, length: int) -> None:
    """While it is held still, they have what mapping shows; SIGTERM unmounts them."""
    with held_still(live_domid), mounted(live_domid, folder, length) as process:
        assert sorted(os.listdir(folder)) == FILES
        with open_backend("xen", domid=live_domid) as live, MapCache(live) as cache:
            for file in virtual_files(cache, length):
                with open(folder / file.name, "rb") as shown:
                    assert os.fstat(shown.fileno()).st_size == file.size
                    for offset in range(0, file.size, MiB):
                        assert shown.read(MiB) == file.read(offset, MiB)
        process.send_signal(signal.SIGTERM)
        assert_ended(process, folder)


def test_it_ends_with_the_guest(victim: int, folder: Path, length: int) -> None:
    """A guest that is destroyed is gone a little later, although its memory was mapped."""
    with mounted(victim, folder, length) as process:
        with open(folder / "memory.raw", "rb", buffering=0) as file:
            assert len(os.pread(file.fileno(), PAGE_SIZE, length - PAGE_SIZE)) == PAGE_SIZE
        subprocess.run(["xl", "destroy", str(victim)], check=True, timeout=120)
        assert "the guest has ended" in assert_ended(process, folder)
    listed = subprocess.run(
        ["xl", "list", str(victim)], capture_output=True, check=False, timeout=120
    )
    assert listed.returncode != 0
