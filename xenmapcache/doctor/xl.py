"""What Xen's tool ``xl`` says, if there is one."""

from __future__ import annotations

import shutil
import subprocess

from ..source import XL_PATH

_XL_TIMEOUT_S = 20


def xl_list() -> tuple[list[tuple[str, int, str]], str]:
    """Return ``(name, domid, state)`` of each domain that xl knows, and a problem, if any."""
    listed, problem = xl("list")
    rows = []
    for line in listed.splitlines():
        fields = line.rsplit(maxsplit=5)  # the name comes first and may have spaces
        if len(fields) == 6 and fields[1].isdecimal():
            rows.append((fields[0].strip(), int(fields[1]), fields[4]))
    return rows, f"none known: {problem}" if problem else ""


def xl(command: str) -> tuple[str, str]:
    """Return what a command of xl prints, and a problem, if any."""
    program = shutil.which("xl", path=XL_PATH)
    if program is None:
        return "", "xl is not installed"
    try:
        done = subprocess.run(  # noqa: S603 - it is xl, without words of anyone
            [program, command], capture_output=True, timeout=_XL_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", f"xl {command} failed: {error}"
    if done.returncode:
        complaint = " ".join(done.stderr.decode(errors="replace").split())
        return "", f"xl {command} failed with status {done.returncode}: {complaint}"
    return done.stdout.decode(errors="replace"), ""
