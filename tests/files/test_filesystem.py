"""Which file systems keep the kernel's read leases."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.images.writers import memory
from xenmapcache.address import PAGE_SIZE
from xenmapcache.files import filesystem as module
from xenmapcache.files.filesystem import file_system, why_not_mapped
from xenmapcache.files.image import ImageFile


def test_file_system_is_what_findmnt_says(tmp_path: Path) -> None:
    """The type is the mount's, and empty for a descriptor that is not open."""
    if shutil.which("findmnt") is None:
        pytest.skip("needs findmnt")
    for folder in (Path("/proc"), tmp_path):
        fd = os.open(folder, os.O_RDONLY)
        named = subprocess.run(
            ["findmnt", "-n", "-o", "FSTYPE", "-T", folder], capture_output=True, text=True
        )
        assert file_system(fd) == named.stdout.split()[0]
        os.close(fd)
    assert file_system(1 << 20) == ""


def test_unknown_mount_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the kernel's lists do not have the file's mount, the file is read."""
    content = module._content

    def listing(name: str) -> bytes:
        return b"" if name == "/proc/self/mountinfo" else content(name)

    monkeypatch.setattr(module, "_content", listing)
    path = tmp_path / "file"
    path.write_bytes(b"memory")
    with path.open() as file:
        assert file_system(file.fileno()) == ""
        assert "''" in why_not_mapped(file.fileno())


@pytest.mark.parametrize("name", ["fdinfo", "mountinfo"])
def test_exception_of_a_signal_handler_reaches_the_caller(
    path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A handler may raise TimeoutError, which is an OSError, while the file system is looked up."""
    content = module._content

    def interrupted(listing: str) -> bytes:
        if name in listing:
            raise TimeoutError("the handler's")
        return content(listing)

    monkeypatch.setattr(module, "_content", interrupted)
    file = ImageFile(path)
    with pytest.raises(TimeoutError, match="the handler's"):
        file.map(0, 0, 1)
    monkeypatch.undo()
    assert file.map(0, 0, 1) is not None
    file.close()


@pytest.mark.parametrize("fs_type", ["overlay", "fuse.sshfs", "nfs4", "cifs", "9p", ""])
def test_file_on_untrusted_file_system_is_read(
    path: Path, monkeypatch: pytest.MonkeyPatch, fs_type: str
) -> None:
    """Where a file can change without a break of its lease, it is read."""
    monkeypatch.setattr(module, "file_system", lambda fd: fs_type)
    file = ImageFile(path)
    assert file.map(0, 0, 1) is None
    assert file.read(0, PAGE_SIZE) == memory(0, 1)
    file.close()


def test_sparse_file_in_memory_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tmpfs, touching a mapped hole takes memory, and is a SIGBUS if there is none."""
    os.truncate(path, 1 << 30)
    monkeypatch.setattr(module, "file_system", lambda fd: "tmpfs")
    file = ImageFile(path)
    assert file.map(1 << 20, 0, 1) is None
    file.close()


def test_file_of_a_changed_layer_is_safe(mappable: Path) -> None:
    """On an overlay, who truncates the layer's own file breaks no lease: reads raise, no SIGBUS."""
    if os.geteuid() or shutil.which("unshare") is None:
        pytest.skip("needs root and unshare, to mount an overlay")
    for name in ("lower", "upper", "work", "merged"):
        (mappable / name).mkdir()
    for layer in ("lower", "upper"):
        (mappable / layer / f"{layer}.raw").write_bytes(memory(0, 16))
    mount = "mount -t overlay overlay -o lowerdir=lower,upperdir=upper,workdir=work merged"
    able = subprocess.run(
        ["unshare", "-m", "sh", "-c", mount], cwd=mappable, capture_output=True, check=False
    )
    if able.returncode:
        pytest.skip(f"an overlay cannot be mounted here: {able.stderr!r}")
    code = (
        "import os, sys\n"
        "from xenmapcache import CorruptImageError, MapCache, open_backend\n"
        "for layer in ('lower', 'upper'):\n"
        "    with open_backend('raw', path=f'merged/{layer}.raw') as backend:\n"
        "        cache = MapCache(backend, bucket_shift=12)\n"
        "        before = cache.read(0, 4096)\n"
        "        os.truncate(f'{layer}/{layer}.raw', 0)\n"
        "        assert cache.read(0, 4096) == before\n"
        "        try:\n"
        "            cache.read(0x3000, 8)\n"
        "        except CorruptImageError:\n"
        "            print(layer)\n"
        "        cache.close()\n"
    )
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh", sys.executable, "-c", code],
        cwd=mappable, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "lower\nupper\n", "")
