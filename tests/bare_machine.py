"""Runs the README's two commands on a bare Debian: ``python -m tests.bare_machine [TARGET...]``.

The machine is a root file system with Python, python3-venv, git and make, and nothing else: no
compiler, no header and none of Xen's files. mmdebstrap builds it once; it is kept in
``~/.cache/xenmapcache-bare`` (``$XDG_CACHE_HOME``). ``XENMAPCACHE_BARE_SUITE`` names another Debian
than 13: that of its Python is tested then. A copy gets the checkout and runs
``make demo`` and ``make test``, or the targets that are named. It needs root.

Exit status: make's; 77 where no such root can be had, after the reason.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from tests.free_threaded import ROOT, UNAVAILABLE, UnavailableError, run

SUITE: Final = os.environ.get("XENMAPCACHE_BARE_SUITE", "trixie")
PACKAGES: Final = ("ca-certificates", "git", "make", "python3", "python3-venv")
ABSENT: Final = ("/usr/bin/gcc", "/usr/bin/cc", "/usr/include/stdio.h", "/usr/include/xen")
"""What the root must not have, or the run would prove nothing."""
LEFT_OUT: Final = (
    ".venv",
    ".venv-peers",
    ".venv-tools",
    ".git",
    "build",
    "dist",
    "_build",
    "__pycache__",
    ".*_cache",
)
SETTINGS: Final = (
    "/etc/hosts",
    "/etc/pip.conf",
    "/etc/resolv.conf",
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/xdg/pip/pip.conf",
    "/etc/xdg/pip/constraints.txt",
)
CERTIFICATES: Final = ("PIP_CERT", "SSL_CERT_FILE")
TARGETS: Final = ("demo", "test")
NAMESPACES: Final = (
    "unshare",
    "--mount",
    "--pid",
    "--fork",
    "--kill-child",
    "--propagation=private",
)
KEPT: Final = (
    "PIP_",
    "SSL_",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "http_",
    "https_",
    "no_proxy",
)
"""Beginnings of the variables by which this machine reaches its package index."""


def archive() -> Path:
    """Return the root's archive, which is built if it is not there."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    kept = base / "xenmapcache-bare" / f"{SUITE}-{'-'.join(PACKAGES)}.tar"
    if kept.is_file():
        return kept
    if os.geteuid() or not shutil.which("apt-get"):
        raise UnavailableError("building a bare Debian needs root on Debian")
    if not shutil.which("mmdebstrap"):
        install = ("apt-get", "install", "--yes", "--no-install-recommends", "mmdebstrap")
        run("apt-get", "update", "--quiet")
        run("env", "DEBIAN_FRONTEND=noninteractive", *install)
    kept.parent.mkdir(parents=True, exist_ok=True)
    mirror = [url] if (url := os.environ.get("XENMAPCACHE_LAB_MIRROR")) else []
    print(f"building a bare {SUITE}, once, into {kept.parent}", flush=True)  # noqa: T201 - what it is for
    part = kept.with_suffix(f".{os.getpid()}.tar")
    options = [f"--include={','.join(PACKAGES)}"]
    if SUITE == "sid":  # of which a slow mirror has only an expired index
        options.append('--aptopt=Acquire::Check-Valid-Until "false"')
    try:
        run(*NAMESPACES, "mmdebstrap", "--variant=minbase", *options, SUITE, part, *mirror)
        part.rename(kept)
    finally:
        part.unlink(missing_ok=True)
    return kept


def furnish(root: Path) -> None:
    """Put the checkout into a root, and this machine's way to its package index."""
    ignored = shutil.ignore_patterns(*LEFT_OUT)
    shutil.copytree(ROOT, root / "checkout", ignore=ignored, symlinks=True)
    named = [os.environ.get(name, "") for name in CERTIFICATES]
    for name in filter(os.path.isfile, (*SETTINGS, *named)):
        there = root / name[1:]
        there.parent.mkdir(parents=True, exist_ok=True)
        there.unlink(missing_ok=True)
        shutil.copy(name, there)


def make(root: Path, target: str) -> int:
    """Run a target in a root, in namespaces of its own; return its status."""
    kept = {name: value for name, value in os.environ.items() if name.startswith(KEPT)}
    settings = [f"{name}={value}" for name, value in kept.items()]
    script = (
        'set -e; root=$1; target=$2; shift 2; mount --rbind /dev "$root/dev"; '
        'mount -t proc proc "$root/proc"; mount -t tmpfs tmpfs "$root/tmp"; exec chroot "$root" '
        'env -i HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 "$@" '
        'make -C /checkout "$target"'
    )
    command = [*NAMESPACES, "sh", "-c", script, "sh", str(root), target, *settings]
    return subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode


def main(targets: list[str]) -> int:
    """Run the targets, until one fails."""
    with tempfile.TemporaryDirectory() as work:
        root = Path(work, "root")
        root.mkdir()
        try:
            run("tar", "--extract", f"--file={archive()}", f"--directory={root}")
        except UnavailableError as error:
            print(f"no bare Debian can be had here: {error}")  # noqa: T201 - what it is for
            return UNAVAILABLE
        if there := [name for name in ABSENT if Path(root, name[1:]).exists()]:
            raise SystemExit(f"the root is not bare: it has {', '.join(there)}")
        furnish(root)
        for target in targets or TARGETS:
            if status := make(root, target):
                return status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
