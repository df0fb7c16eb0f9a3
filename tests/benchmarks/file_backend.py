"""A backend over a plain file: the least that a source of guest memory can cost."""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar

from xenmapcache import Backend, Capability, Mapping
from xenmapcache.address import PAGE_SHIFT
from xenmapcache.binding import libc


class FileBackend(Backend):
    """Guest memory that lies in a file, page for page."""

    name: ClassVar[str] = "file"
    capabilities = Capability.WRITE

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self.memory_end = os.fstat(self._fd).st_size

    def map(self, gfn: int, count: int, *, writable: bool) -> Mapping:
        address = libc.map_file(self._fd, gfn << PAGE_SHIFT, count << PAGE_SHIFT, writable=writable)
        return Mapping(address, gfn, count, writable=writable, errors=None, unmap=libc.unmap)

    def close(self) -> None:
        os.close(self._fd)
