"""What this machine must have to run the lab, and getting it through apt where that is allowed."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

RUNNING: Final = {"setpriv": "util-linux"}
BUILDING: Final = {
    "mmdebstrap": "mmdebstrap",
    "mke2fs": "e2fsprogs",
    "zstd": "zstd",
    "/usr/share/keyrings/debian-archive-keyring.gpg": "debian-archive-keyring",
}
GIB: Final = 1 << 30
MEMORY: Final = 3 * GIB
DISK: Final = 4 * GIB


class LabUnavailableError(Exception):
    """This machine cannot run the lab; the text says exactly why and what could be done."""


def require(folder: Path, architecture: Mapping[str, str], *, build: bool) -> None:
    """Check, and install where possible, what booting and building an image needs.

    Args:
        architecture: what its emulation needs, each with Debian's package of it.
        folder: where images are kept.
        build: the image has to be built, which needs more.

    Raises:
        LabUnavailableError: something is missing that cannot be had from here.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        here = f"{sys.platform} on {platform.machine()}"
        raise LabUnavailableError(f"the lab needs Linux on x86-64, this is {here}")
    available = _available_memory()
    if available < MEMORY:
        raise LabUnavailableError(f"{_gib(MEMORY)} of memory needed, {_gib(available)} free")
    if build:
        if os.geteuid() != 0:
            raise LabUnavailableError(f"no image in {folder}, and only root can build one")
        free = shutil.disk_usage(_existing(folder)).free
        if free < DISK:
            raise LabUnavailableError(f"{_gib(DISK)} of disk needed in {folder}, {_gib(free)} free")
    install_missing({**RUNNING, **architecture, **(BUILDING if build else {})})


def install_missing(wanted: Mapping[str, str]) -> None:
    """Install what this machine lacks of programs or files, each with Debian's package of it.

    Raises:
        LabUnavailableError: something is missing, and cannot be installed from here.
    """
    missing = _missing(wanted)
    if missing:
        _install(missing)


def tool(name: str) -> str:
    """Full path of a program; a user's PATH may lack the folder (mke2fs is in sbin)."""
    found = shutil.which(name, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")
    if found is None:
        raise LabUnavailableError(f"{name} is not installed")
    return found


def _install(packages: list[str]) -> None:
    command = f"apt-get install --no-install-recommends {' '.join(packages)}"
    if os.geteuid() != 0:
        raise LabUnavailableError(f"not root and packages are missing; as root: {command}")
    apt = shutil.which("apt-get")
    if apt is None:
        raise LabUnavailableError(f"no apt-get, and missing (Debian's names): {packages}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for arguments in (["update", "-q"], ["install", "-qy", "--no-install-recommends", *packages]):
        done = subprocess.run(
            [apt, *arguments],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        # If a source cannot be updated, the installation may still succeed.
        if done.returncode != 0 and arguments[0] == "install":
            tail = " ".join(done.stdout.splitlines()[-3:])
            raise LabUnavailableError(f"{command} failed: {tail}")


def _missing(wanted: Mapping[str, str]) -> list[str]:
    def there(name: str) -> bool:
        if name.startswith("/"):
            return Path(name).exists()
        try:
            tool(name)
        except LabUnavailableError:
            return False
        return True

    return sorted(package for name, package in wanted.items() if not there(name))


def _available_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
