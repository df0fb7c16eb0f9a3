"""The machines that the lab can boot: a Xen release, an architecture, a kind of Dom0 and of guest.

What differs between them is data here, so that the tests have no `if` for a machine's name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Release:
    """One Xen, and what comes with it in the same Debian."""

    xen: str
    suite: str
    kernel: str
    python: str


@dataclass(frozen=True)
class Architecture:
    """What an emulated processor needs.

    Args:
        name: as Debian calls it.
        emulator: the program of QEMU.
        ram: guest address at which a guest's memory begins.
        wheel: the platform tag of PyPI's binary wheels.
        libraries: the folder below ``/usr/lib``.
        toolstack: packages for Dom0 besides those of every machine.
    """

    name: str
    emulator: str
    ram: int
    wheel: str
    libraries: str
    toolstack: tuple[str, ...] = ()


@dataclass(frozen=True)
class Platform:
    """A machine of the lab.

    Args:
        name: what ``--xen`` takes.
        release: of Xen and Debian.
        architecture: of the emulated processor.
        dom0: "pv" or "pvh"; "arm", of which there is one kind.
        guest: "pvh" or "hvm"; "arm".
    """

    name: str
    release: Release
    architecture: Architecture
    dom0: str
    guest: str

    @property
    def packages(self) -> tuple[str, ...]:
        """What Dom0 holds: the toolstack, and what the tests import."""
        return (
            f"xen-hypervisor-{self.release.xen}-{self.architecture.name}",
            f"xen-utils-{self.release.xen}",
            f"linux-image-{self.architecture.name}",
            *self.architecture.toolstack,
            "xenstore-utils",
            "busybox-static",
            "procps",
            "fuse3",
            "python3",
            "python3-installer",
            "python3-cffi",
            "python3-pytest",
            "python3-pytest-timeout",
            "python3-hypothesis",
            "python3-pyelftools",
            "python3-rich",
        )


X86: Final = Architecture(
    name="amd64",
    emulator="qemu-system-x86_64",
    ram=0,
    wheel="manylinux2014_x86_64",
    libraries="x86_64-linux-gnu",
    toolstack=("qemu-system-xen",),  # of HVM guests
)
RELEASES: Final = (
    Release(xen="4.17", suite="bookworm", kernel="6.1", python="3.11"),
    Release(xen="4.20", suite="trixie", kernel="6.12", python="3.13"),
)
PLATFORMS: Final = {
    platform.name: platform
    for release in RELEASES
    for platform in (
        Platform(release.xen, release, X86, dom0="pv", guest="pvh"),
        Platform(f"{release.xen}-hvm", release, X86, dom0="pv", guest="hvm"),
        Platform(f"{release.xen}-pvh-dom0", release, X86, dom0="pvh", guest="pvh"),
    )
}
DEFAULT: Final = "4.17"
