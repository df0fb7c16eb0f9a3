"""The machines that the lab can boot: a Xen release, an architecture, a kind of Dom0 and of guest.

What differs between them is data here, so that the tests have no `if` for a machine's name.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

SCREENS: Final = {"hvm": 16}
"""MiB that libxl counts as a guest's memory and that are not RAM; see ``videoram`` in hvm.cfg."""


@dataclass(frozen=True)
class Release:
    """One Xen, and what comes with it in the same Debian.

    Args:
        xen: its release.
        suite: of Debian.
        kernel: of Dom0.
        python: of Dom0.
        any_virtio: whether libxl announces virtio devices other than disks.
    """

    xen: str
    suite: str
    kernel: str
    python: str
    any_virtio: bool = field(repr=False)  # no part of the image, which is named after the repr


@dataclass(frozen=True)
class Architecture:
    """What an emulated processor needs.

    Args:
        name: as Debian calls it.
        machine: as ``uname`` calls it.
        host: what the lab's machine must have, each with Debian's package of it.
        ram: guest address at which a guest's memory begins.
        guests: the kinds of guests, each with a configuration in ``baked``.
        ports: whether there are I/O ports.
        saves: whether libxl can save a guest.
        sizes: of the guests, in MiB.
        set_memory: the command that sets a guest's memory.
        programs: those of ``tests/xen/guest`` that can be built for it.
        compiler: for these.
        variant: mmdebstrap's way to make Dom0. "extract" runs no program of the foreign machine.
        toolstack: packages for Dom0 besides those of every machine.
    """

    name: str
    machine: str
    host: Mapping[str, str]
    ram: int
    guests: tuple[str, ...]
    ports: bool
    saves: bool
    sizes: Mapping[str, int]
    set_memory: tuple[str, ...]
    programs: tuple[str, ...]
    compiler: str
    variant: str
    toolstack: tuple[str, ...] = ()

    @property
    def emulator(self) -> str:
        """The program of QEMU."""
        return f"qemu-system-{self.machine}"

    @property
    def wheel(self) -> str:
        """The platform tag of PyPI's binary wheels."""
        return f"manylinux2014_{self.machine}"


@dataclass(frozen=True)
class HypervisorSource:
    """A hypervisor to build.

    Args:
        version: of Debian's source package xen.
        options: what Xen's configuration is to have besides its defaults.
    """

    version: str
    options: tuple[str, ...]


@dataclass(frozen=True)
class Platform:
    """A machine of the lab.

    Args:
        name: what ``--xen`` takes.
        release: of Xen and Debian.
        architecture: of the emulated processor.
        dom0: "pv" or "pvh"; "arm", of which there is one kind.
        guest: "pvh" or "hvm".
        ioreq_servers: whether Xen has them.
        source: of the hypervisor, if Debian's own does not do.
    """

    name: str
    release: Release
    architecture: Architecture
    dom0: str
    guest: str
    ioreq_servers: bool = True
    source: HypervisorSource | None = None

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

    @property
    def memory(self) -> tuple[int, int]:
        """Start and length of the memory of the guest that tests may look at."""
        return self.architecture.ram, self.architecture.sizes["guest"] << 20

    def set_memory(self, name: str, mib: int) -> list[str]:
        """The command that has a guest balloon to a size in MiB, without its screen's memory."""
        mib += SCREENS.get(self.guest, 0)
        values = {"name": name, "mib": mib, "kib": mib << 10}
        return [part.format(**values) for part in self.architecture.set_memory]


X86: Final = Architecture(
    name="amd64",
    machine="x86_64",
    host={
        "qemu-system-x86_64": "qemu-system-x86",
        "gcc": "gcc",
        "/usr/lib/x86_64-linux-gnu/libc.a": "libc6-dev",
    },
    ram=0,
    guests=("pvh", "hvm"),
    ports=True,
    saves=True,
    sizes={"guest": 128, "victim": 96},  # 80 is too little for Debian's kernel
    set_memory=("xl", "mem-set", "{name}", "{mib}"),
    programs=("agent", "granter"),
    compiler="gcc",
    variant="minbase",
    toolstack=("qemu-system-xen",),  # of HVM guests
)
ARM: Final = Architecture(
    name="arm64",
    machine="aarch64",
    host={
        "qemu-system-aarch64": "qemu-system-arm",
        "depmod": "kmod",
        "aarch64-linux-gnu-gcc": "gcc-aarch64-linux-gnu",
        "/usr/aarch64-linux-gnu/lib/libc.a": "libc6-dev-arm64-cross",
    },
    ram=0x40000000,
    guests=("pvh",),  # so libxl calls the one kind of guest that Arm has
    ports=False,
    saves=False,
    sizes={"guest": 128, "victim": 96},
    # `xl mem-set` fails an assertion of libxl there.
    set_memory=(
        "sh",
        "-c",
        "xenstore-write /local/domain/$(xl domid {name})/memory/target {kib}",
    ),
    programs=("granter",),  # the agent is of x86's port instructions
    compiler="aarch64-linux-gnu-gcc",
    variant="extract",
    toolstack=(  # of these, "extract" takes none by itself
        "base-files",
        "base-passwd",
        "bash",
        "coreutils",
        "dash",
        "findutils",
        "gawk",
        "grep",
        "gzip",
        "hostname",
        "iproute2",
        "kmod",
        "libc-bin",
        "mount",
        "sed",
        "tar",
        "util-linux",
    ),
)
RELEASES: Final = (
    Release(xen="4.17", suite="bookworm", kernel="6.1", python="3.11", any_virtio=False),
    Release(xen="4.20", suite="trixie", kernel="6.12", python="3.13", any_virtio=True),
)
PLATFORMS: Final = {
    platform.name: platform
    for release in RELEASES
    for platform in (
        Platform(release.xen, release, X86, dom0="pv", guest="pvh"),
        Platform(f"{release.xen}-hvm", release, X86, dom0="pv", guest="hvm"),
        Platform(f"{release.xen}-pvh-dom0", release, X86, dom0="pvh", guest="pvh"),
        Platform(f"{release.xen}-arm64", release, ARM, "arm", "pvh", ioreq_servers=False),
    )
}
# The only version whose source Debian's mirror had; its binaries are of a newer one.
IOREQ: Final = HypervisorSource(
    version="4.17.5+72-g01140da4e8-1", options=("EXPERT", "UNSUPPORTED", "IOREQ_SERVER")
)
_ARM64: Final = PLATFORMS["4.17-arm64"]
PLATFORMS["4.17-arm64-ioreq"] = replace(
    _ARM64, name="4.17-arm64-ioreq", ioreq_servers=True, source=IOREQ
)
DEFAULT: Final = "4.17"


def native() -> Platform:
    """The first platform of this machine's architecture: for a Dom0 that is not the lab's."""
    here = platform.machine()
    return next(each for each in PLATFORMS.values() if each.architecture.machine == here)
