"""Building a hypervisor from Debian's source, where the one that Debian builds lacks something.

It is kept next to the images, under a name with a hash of what went into it.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Final

from .platform import HypervisorSource, Platform
from .prerequisites import LabUnavailableError, install_missing, tool

NEEDED: Final = {"flex": "flex", "bison": "bison", "make": "make", "xz": "xz-utils"}
KEYRING: Final = "/usr/share/keyrings/debian-archive-keyring.gpg"
MIRROR: Final = "http://deb.debian.org/debian"


class SourceGoneError(LabUnavailableError):
    """The mirror no longer has this version's source, which nobody here can change."""


def hypervisor(platform: Platform, source: HypervisorSource, cache: Path) -> Path:
    """The hypervisor of `platform`, built now unless it is there already.

    Called under the lock of the platform's images.

    Raises:
        SourceGoneError: its source is not to be had.
        LabUnavailableError: it cannot be built here.
    """
    key = hashlib.sha256(repr(source).encode() + Path(__file__).read_bytes()).hexdigest()[:12]
    target = cache / f"xen-{source.version}-{platform.architecture.name}-{key}"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        install_missing(NEEDED)
        with tempfile.TemporaryDirectory(prefix="hypervisor-building-", dir=cache) as folder:
            built = _build(platform, source, _unpacked(platform, source, Path(folder)))
            built.rename(target)
    return target


def _unpacked(platform: Platform, source: HypervisorSource, folder: Path) -> Path:
    mirror = os.environ.get("XENMAPCACHE_LAB_MIRROR") or MIRROR
    suite = platform.release.suite
    (folder / "list").write_text(f"deb-src [signed-by={KEYRING}] {mirror} {suite} main\n")
    (folder / "lists/partial").mkdir(parents=True)
    folder.chmod(0o755)
    options = [f"Dir::Etc::sourcelist={folder}/list", "Dir::Etc::sourceparts=/dev/null"]
    options += [
        f"Dir::State::lists={folder}/lists",
        "Dir::Cache::srcpkgcache=",
        "Dir::Cache::pkgcache=",
    ]
    apt = [tool("apt-get"), "-q", *(part for option in options for part in ("-o", option))]
    for command in (["update"], ["source", "--download-only", f"xen={source.version}"]):
        done = _run(folder, *apt, *command)
        if done.returncode != 0:
            tail = " ".join(done.stdout.splitlines()[-2:])
            raise SourceGoneError(f"no source of xen {source.version} from {mirror}: {tail}")
    (archive,) = folder.glob("*.orig.tar.xz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    (makefile,) = folder.glob("*/xen/Makefile")
    return makefile.parent


def _build(platform: Platform, source: HypervisorSource, folder: Path) -> Path:
    configuration = "".join(f"CONFIG_{option}=y\n" for option in source.options)
    (folder / "arch/arm/configs/lab_defconfig").write_text(configuration)
    prefix = platform.architecture.compiler.removesuffix("gcc")
    make = [tool("make"), f"-j{os.cpu_count()}", f"CROSS_COMPILE={prefix}"]
    make.append(f"XEN_TARGET_ARCH={platform.architecture.name}")
    for target in (["lab_defconfig"], []):
        done = _run(folder, *make, *target)
        if done.returncode != 0:
            tail = "\n".join(done.stdout.splitlines()[-15:])
            raise LabUnavailableError(f"xen {source.version} cannot be built:\n{tail}")
    kept = (folder / ".config").read_text()
    for option in source.options:
        if f"CONFIG_{option}=y\n" not in kept:
            raise LabUnavailableError(f"xen {source.version} has no option {option}")
    return folder / "xen"


def _run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
