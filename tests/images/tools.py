"""The tools that read what this package writes: found, or the reason why a test is skipped.

With XENMAPCACHE_TOOLS=required, as in the nightly run, a tool that is missing is a failure, and
the debug package of the images' kernel is downloaded (283 MB) and kept with the images.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any, Final, NoReturn

import pytest

from tests.images.lab import cache_folder

REQUIRED: Final = os.environ.get("XENMAPCACHE_TOOLS") == "required"


def missing(what: str) -> NoReturn:
    """Skip the test, or fail it where all tools have to be present."""
    if REQUIRED:
        pytest.fail(f"{what}, but XENMAPCACHE_TOOLS=required", pytrace=False)
    pytest.skip(what)


def command(name: str) -> str:
    """Return the path of a program."""
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if path is None:
        missing(f"{name} is not installed (Debian: apt install {name})")
    return path


def module(name: str, package: str) -> Any:  # noqa: ANN401 - of packages without types
    """Import a module of an optional package."""
    try:
        return import_module(name)
    except ImportError:
        missing(f"{package} is not installed (pip install {package})")


def run(*arguments: str | Path, stdin: str | None = None) -> str:
    """Run a program that must succeed; return its output."""
    done = subprocess.run(
        list(map(str, arguments)),
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, f"{arguments}: {done.stdout[-2000:]}"
    return done.stdout


def debug_kernel(release: str, version: str) -> Path:
    """Return a kernel with debugging information; downloaded only if all tools are required.

    Args:
        release: as ``uname -r`` prints it.
        version: of the Debian package.
    """
    path = cache_folder() / f"vmlinux-{release}-{version}"
    if path.exists():
        return path
    if not REQUIRED:
        missing(f"{path.name} is not kept here; XENMAPCACHE_TOOLS=required downloads it")
    package = f"linux-image-{release}-dbg"
    with tempfile.TemporaryDirectory(prefix="xenmapcache-debug-", dir=cache_folder()) as work:
        subprocess.run(
            ["apt-get", "download", "-q", f"{package}={version}"],
            cwd=work,
            check=True,
            timeout=1800,
        )
        (archive,) = Path(work).glob("*.deb")
        with subprocess.Popen(
            ["dpkg-deb", "--fsys-tarfile", archive], stdout=subprocess.PIPE
        ) as packed:
            subprocess.run(
                ["tar", "--extract", f"./usr/lib/debug/boot/vmlinux-{release}"],
                stdin=packed.stdout,
                cwd=work,
                check=True,
                timeout=600,
            )
        (Path(work) / f"usr/lib/debug/boot/vmlinux-{release}").rename(path)
    return path
