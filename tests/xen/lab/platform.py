"""The hypervisor releases the lab can boot, each with the Debian release that packages it."""

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

    @property
    def packages(self) -> tuple[str, ...]:
        """What Dom0 holds: the toolstack, and what the tests import."""
        return (
            f"xen-hypervisor-{self.xen}-amd64",
            f"xen-utils-{self.xen}",
            "xenstore-utils",
            "linux-image-amd64",
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


RELEASES: Final = {
    "4.17": Release(xen="4.17", suite="bookworm", kernel="6.1", python="3.11"),
    "4.20": Release(xen="4.20", suite="trixie", kernel="6.12", python="3.13"),
}
DEFAULT: Final = "4.17"
