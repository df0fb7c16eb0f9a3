"""What may become of a file that is open: ``python -m tests.files.changes CHANGE PATH`` does it.

It imports nothing of the package, because many tests start it.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Callable
from pathlib import Path

PAGES = 64
"""How many pages the file has."""
PAGE_SIZE = 4096


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"\xff" * PAGES * PAGE_SIZE)


def overwrite_mapped(path: Path) -> None:
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        memory[:] = b"\xff" * len(memory)


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def write_again(path: Path) -> None:
    path.write_bytes(b"another, shorter")


CHANGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: os.truncate(path, 0),
    "shortened": lambda path: os.truncate(path, 5 * PAGE_SIZE + 7),
    "grown": lambda path: os.truncate(path, 2 * PAGES * PAGE_SIZE),
    "written again": write_again,
    "overwritten": overwrite,
    "overwritten through mmap": overwrite_mapped,
    "appended to": append,
}
HARMLESS: dict[str, Callable[[Path], object]] = {
    "opened for writing": lambda path: path.open("r+b").close(),
    "deleted": lambda path: path.unlink(),
    "moved": lambda path: path.rename(path.with_suffix(".moved")),
    "replaced": lambda path: (
        path.with_suffix(".new").write_bytes(b"new"),
        path.with_suffix(".new").replace(path),
    ),
    "linked": lambda path: os.link(path, path.with_suffix(".link")),
    "made read-only": lambda path: path.chmod(0o400),
}

if __name__ == "__main__":
    {**CHANGES, **HARMLESS}[sys.argv[1]](Path(sys.argv[2]))
