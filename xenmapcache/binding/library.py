"""Finding a shared library, and loading it."""

from __future__ import annotations

import os
import platform
import re
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from ..errors import BackendUnavailableError
from .declarations import Library
from .hints import install_remedy
from .interface import Function, Loader


def library_folders() -> list[Path]:
    """Return the folders in which a shared library is looked for, first to last."""
    named = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    multiarch = sysconfig.get_config_var("MULTIARCH") or f"{platform.machine()}-linux-gnu"
    system = [f"/usr/lib/{multiarch}", "/usr/local/lib64", "/usr/local/lib", "/usr/lib64"]
    return [Path(each) for each in [*named, *system, "/usr/lib", "/lib64", "/lib"] if each]


def xen_version() -> str | None:
    """Return the running hypervisor's version as ``4.17``, or None if there is none."""
    try:
        major, minor = (
            Path("/sys/hypervisor/version", part).read_text().strip() for part in ("major", "minor")
        )
    except OSError:
        return None
    return f"{major}.{minor}"


def find_library(library: Library) -> str:
    """Return what to hand to the dynamic linker.

    A name that carries Xen's release is searched for: the one of the hypervisor that
    runs, or else the newest.

    Raises:
        BackendUnavailableError: none is installed.
    """
    if "*" not in library.soname:
        return library.soname
    pattern = re.compile(re.escape(library.soname).replace(r"\*", r"(\d+)\.(\d+)"))
    running = xen_version()
    found = []
    for order, folder in enumerate(library_folders()):
        for path in folder.glob(library.soname):
            match = pattern.fullmatch(path.name)
            if match:
                major, minor = int(match[1]), int(match[2])
                found.append((f"{major}.{minor}" == running, (major, minor), -order, str(path)))
    if not found:
        folders = ", ".join(map(str, library_folders()))
        raise BackendUnavailableError(
            f"{library.soname} is in none of {folders}: {install_remedy(library.package)}"
        )
    return max(found)[-1]


def load(
    declared: Library, loader: Loader, library: str | None, required: Iterable[str]
) -> tuple[str, dict[str, Function]]:
    """Load a library.

    Args:
        declared: what is called in it.
        loader: how.
        library: a SONAME or path instead of the declared one.
        required: functions that cannot be done without.

    Returns:
        What the dynamic linker was asked for, and the functions that the library exports.

    Raises:
        BackendUnavailableError: there is none, or it is another library.
    """
    path = os.fspath(library) if library else find_library(declared)
    try:
        functions = loader.open(declared, path)
    except OSError as error:
        raise BackendUnavailableError(
            f"{path} cannot be loaded ({error}): {install_remedy(declared.package)}"
        ) from error
    for name in required:
        if name not in functions:
            raise BackendUnavailableError(
                f"{path} has no function {name}: it is not {declared.name}"
            )
    return path, functions
