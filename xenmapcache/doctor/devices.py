"""The device nodes that Xen's libraries open."""

from __future__ import annotations

import grp
import os
import pwd
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from ..binding.hints import permission_remedy
from .finding import Finding

DEV_XEN, PROC_XEN = Path("/dev/xen"), Path("/proc/xen")


def check_devices() -> Iterator[Finding]:
    """Look at the device nodes, by opening them."""
    new, old = DEV_XEN / "privcmd", PROC_XEN / "privcmd"
    # Xen's libraries take the old one only where there is no new one.
    takes_old = old.exists() and not new.exists()
    yield _node(new, "note" if takes_old else "problem", "modprobe xen-privcmd, in Dom0")
    remedy = "not needed if there is the one above; or mount -t xenfs xenfs /proc/xen"
    yield _node(old, "problem" if takes_old else "note", remedy)
    yield _node(DEV_XEN / "evtchn", "note", "needed for device models: modprobe xen-evtchn")
    yield _node(DEV_XEN / "gntdev", "note", "needed for grants only: modprobe xen-gntdev")


def _node(path: Path, lacking: Literal["problem", "note"], remedy: str) -> Finding:
    try:
        status = path.stat()
    except OSError as error:
        text = "missing" if isinstance(error, FileNotFoundError) else str(error.strerror)
        return Finding("Devices", str(path), lacking, text, remedy, {"exists": False})
    owner = _name(pwd.getpwuid, status.st_uid)
    text = f"{stat.filemode(status.st_mode)} {owner}:{_name(grp.getgrgid, status.st_gid)}"
    details: dict[str, object] = {"exists": True, "mode": f"{stat.S_IMODE(status.st_mode):04o}"}
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        text += f", cannot be opened by {_name(pwd.getpwuid, os.geteuid())}: {error.strerror}"
        if isinstance(error, PermissionError):
            remedy = permission_remedy(path, error.errno or 0)
        return Finding("Devices", str(path), lacking, text, remedy, details | {"opens": False})
    return Finding("Devices", str(path), "ok", f"{text}, opens", "", details | {"opens": True})


def _name(look_up: Callable[[int], tuple[object, ...]], number: int) -> str:
    try:
        return str(look_up(number)[0])
    except KeyError:
        return str(number)
