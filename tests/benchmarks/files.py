"""What is promised of guests at rest: opening and reading files, and what an index takes."""

from __future__ import annotations

import array
import functools
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.benchmarks.candidates import Ours
from tests.benchmarks.comparison import Works
from tests.benchmarks.promises import Promise
from tests.benchmarks.timing import ratio, seconds
from xenmapcache import open_backend
from xenmapcache.address import MiB


def promises(paths: dict[str, Path], rounds: int) -> Iterator[Promise]:
    """Yield what is promised of opening and reading files: the best of the rounds each."""
    path = paths["coredump"]
    offset, length = index_of(path)
    ours = functools.partial(open_and_close, "coredump", path)
    bare = functools.partial(read_index, path, offset, length)
    through_elftools = functools.partial(index_of, path, read=True)
    taken = [(seconds(ours), seconds(bare), seconds(through_elftools)) for _ in range(3 * rounds)]
    mine, least, elftools = map(min, zip(*taken, strict=True))
    mebibytes = paths["raw"].stat().st_size // MiB
    yield Promise(f"opening a dump of {mebibytes} MiB", "coredump", mine * 1e3, "ms", 12)
    yield Promise("the same / a bare read of its index", "coredump", mine / least, "x", math.inf)
    work = "the same / pyelftools finding its index, and that read"
    yield Promise(work, "coredump", mine / elftools, "x", math.inf)
    for name in ("coredump", "save"):
        yield Promise("its index, for each page", name, index_bytes(name, paths[name]), "B", 16)
    addresses = Works(paths["raw"].stat().st_size).random
    raw, *others = (Ours(name, path=paths[name]) for name in ("raw", "coredump", "elfcore", "save"))
    bare_reads = functools.partial(raw.loop, addresses, 8)
    for reader in others:
        figure = ratio(functools.partial(reader.loop, addresses, 8), bare_reads, 3 * rounds)
        yield Promise("random 8-byte reads / raw", reader.backend.name, figure, "x", 1.3)
    for reader in (raw, *others):
        reader.close()


def open_and_close(name: str, path: Path) -> None:
    open_backend(name, path=path).close()


def index_of(path: Path, *, read: bool = False) -> tuple[int, int]:
    """Return where a dump's index is, and its length; read it through pyelftools, too."""
    from elftools.elf.elffile import ELFFile

    with path.open("rb") as file:
        section: Any = ELFFile(file).get_section_by_name(".xen_pfn")
        if read:
            array.array("Q").frombytes(section.data())
        return section["sh_offset"], section["sh_size"]


def read_index(path: Path, offset: int, length: int) -> None:
    """Read a dump's index, and nothing else."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    array.array("Q").frombytes(os.pread(fd, length, offset))
    os.close(fd)


def index_bytes(name: str, path: Path) -> float:
    """Return what an open file's index takes, for each of its pages."""
    with open_backend(name, path=path) as backend:
        index = backend._index  # type: ignore[attr-defined] # of each kind
        arrays = [numbers for numbers in (index.gfns, index.offsets) if numbers is not None]
        empty = sys.getsizeof(array.array("Q"))
        return sum(sys.getsizeof(numbers) - empty for numbers in arrays) / len(index)
