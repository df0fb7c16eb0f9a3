"""The guest that is measured: the same memory, as a file of each format."""

from __future__ import annotations

import array
import os
import random
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

from tests.images import xl_files
from xenmapcache import open_backend, write_coredump
from xenmapcache.address import PAGE_SIZE, MiB

FORMATS = ("raw", "live", "coredump", "elfcore", "save")
NEEDLE = b"Linux version 6.1.0-18-amd64 (debian-kernel@lists.debian.org)"


def make_images(folder: Path, size: int) -> dict[str, Path]:
    """Write the same memory in each format; return the files by format.

    The live guest's memory is a raw file of its own, which the stand-in for Xen's libraries maps:
    it opens it for writing, and a source in a file that another process may write to is not mapped.
    """
    paths = {name: folder / f"guest.{name}" for name in FORMATS}
    with paths["raw"].open("wb") as file:
        for piece in memory(size):
            file.write(piece)
    shutil.copyfile(paths["raw"], paths["live"])
    with open_backend("raw", path=paths["raw"]) as source:
        write_coredump(source, paths["coredump"], xen_version="4.17.7")
    write_elf_core(paths["raw"], paths["elfcore"])
    write_save(paths["raw"], paths["save"])
    for path in paths.values():
        with path.open("rb") as file:  # so that nothing is written, and all is warm, later
            os.fsync(file.fileno())
            while file.read(MiB):
                pass
    return paths


def memory(size: int) -> Iterator[bytes]:
    """Yield a guest's memory by MiB: noise, and pages that are mostly zeros; none is all zeros."""
    noise = random.Random(1)
    needles = {size // MiB // 2, size // MiB - 1}
    for number in range(size // MiB):
        if number % 4:
            data = bytearray(noise.randbytes(MiB))
        else:
            data = bytearray(MiB)
            for start in range(0, MiB, PAGE_SIZE):
                struct.pack_into("<QQ", data, start, number * MiB + start, ~start & 0xFFFFFFFF)
        if number in needles:
            data[70_001 : 70_001 + len(NEEDLE)] = NEEDLE
        yield bytes(data)


def needles(size: int) -> list[int]:
    """Return where the text is that is searched for."""
    return [number * MiB + 70_001 for number in sorted({size // MiB // 2, size // MiB - 1})]


def write_elf_core(raw: Path, path: Path) -> None:
    """Write an ELF core with one segment, page-aligned as kdump's are."""
    size = raw.stat().st_size
    ident = b"\x7fELF\2\1\1".ljust(16, b"\0")
    head = struct.pack("<16sHHIQQQIHHHHHH", ident, 4, 62, 1, 0, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    head += struct.pack("<IIQQQQQQ", 1, 7, PAGE_SIZE, 0, 0, size, size, PAGE_SIZE)
    with raw.open("rb") as source, path.open("wb") as file:
        file.write(head.ljust(PAGE_SIZE, b"\0"))
        while piece := source.read(MiB):
            file.write(piece)


def write_save(raw: Path, path: Path) -> None:
    """Write what xl save writes: records of 1,024 pages, in order."""
    pages = 1024
    marker = b"here are the pages"
    before, _, after = xl_files.save(marker).partition(marker)
    with raw.open("rb") as source, path.open("wb") as file:
        file.write(before)
        first = 0
        while piece := source.read(pages * PAGE_SIZE):
            count = len(piece) // PAGE_SIZE
            gfns = array.array("Q", range(first, first + count))
            body = struct.pack("<II", count, 0) + gfns.tobytes() + piece
            file.write(xl_files.record(xl_files.PAGE_DATA, body))
            first += count
        file.write(after)
