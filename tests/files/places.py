"""Where files lie that a test needs mapped: on a file system whose file leases are trusted."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from xenmapcache.files.filesystem import why_not_mapped

MEMORY = Path("/dev/shm")


def why_not_in(folder: Path) -> str:
    """Return why files in a folder are read instead of mapped; empty if they are mapped."""
    try:
        with TemporaryDirectory(dir=folder) as name:
            path = Path(name, "file")
            path.write_bytes(b"memory")
            with path.open("rb") as file:
                reason = why_not_mapped(file.fileno())
                if not reason:
                    fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK)
                    fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
                return reason
    except OSError as error:
        return str(error)


def folder_for_mapping(folder: Path) -> Iterator[Path]:
    """Yield a folder whose files can be mapped: the given one if possible, or one in memory.

    A test that needs a mapped file says so by this function, and is skipped on a machine that
    has no such folder.
    """
    reason = why_not_in(folder)
    if not reason:
        yield folder
        return
    in_memory = why_not_in(MEMORY)
    if in_memory:
        pytest.skip(f"no file can be mapped: {folder}: {reason}; {MEMORY}: {in_memory}")
    with TemporaryDirectory(dir=MEMORY) as name:
        yield Path(name)
