"""The stand-in for Xen's libraries: built by gcc, and loaded before theirs."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

DOMID = 3
GUEST = "guest"
IMAGE = "XENMAPCACHE_BENCH_IMAGE"
"""The variable with the file that is the guest's memory."""
FOLDER = "XENMAPCACHE_BENCH_STUB"
"""The variable with the folder that the stand-in was built into; empty if it was not."""

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared")
LIBRARIES = ("libxenforeignmemory.so", "libxenctrl.so", "libxenevtchn.so", "libxenstore.so")


def build(folder: Path) -> dict[str, str]:
    """Build it and return the variables of a process that is to have it.

    If a library of the same name is loaded, the dynamic linker uses that one, so what is
    preloaded is what a driver for Xen gets when it loads its libraries.
    """
    gcc = shutil.which("gcc")
    if gcc is None:
        return {FOLDER: ""}
    for name in LIBRARIES:
        named = ["-fvisibility=hidden", f"-Wl,-soname,{name}", "-o", str(folder / name)]
        subprocess.run([gcc, *FLAGS, *named, str(SOURCE)], check=True)
    return {FOLDER: str(folder), "LD_PRELOAD": ":".join(str(folder / name) for name in LIBRARIES)}


def library() -> str:
    """Return what was built as libxenforeignmemory; nothing if it was not."""
    folder = os.environ.get(FOLDER)
    return str(Path(folder) / LIBRARIES[0]) if folder else ""


def loaded() -> bool:
    """Return whether drivers that look for Xen's libraries find it."""
    return LIBRARIES[0] in os.environ.get("LD_PRELOAD", "")
