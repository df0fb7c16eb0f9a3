"""Windows: hashing them against a plain mmap, and walking page tables: ``make bench-window``.

The same memory is written in each format. Each round takes a window of all of it, hashes it and
releases it; the plain mmap of the raw image is made, hashed and closed as often, in turn. So the
page faults are in both. Of the raw image the ratio may be 1.1 at most.

The page tables have three levels: one root, 8 tables and 4,096 tables of 512 entries, 2.1 million
in all. NumPy follows them through a window; in at most 0.2 of the time of ``read_u64``.
"""

from __future__ import annotations

import argparse
import hashlib
import mmap
import random
import struct
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.benchmarks.images import make_images
from tests.benchmarks.report import PAGE, Table, markdown, rewrite, show
from tests.benchmarks.timing import machine, pin, ratio, seconds
from xenmapcache import GuestMemory, MapCache, open_cache
from xenmapcache.address import MiB, parse_size

COMMAND = "make bench-window"
HASH_LIMIT = 1.1
WALK_LIMIT = 0.2
FORMS = ("raw", "elfcore", "coredump", "save")
ENTRIES = 512
_FRAME = 0x000F_FFFF_FFFF_F000
_SPEC = {"raw": "raw:"}


class Form(NamedTuple):
    """What a window of one form took.

    Attributes:
        name: of the format.
        copied: how much of it is a copy, in bytes.
        milliseconds: to take and release it.
        ratio: of hashing it, to hashing a plain mmap.
    """

    name: str
    copied: int
    milliseconds: float
    ratio: float


def measure_form(name: str, path: Path, raw: Path, rounds: int) -> Form:
    """Measure windows of one form; their bytes must be those of the raw image."""
    with open_cache(_SPEC.get(name, "") + str(path), max_copies="8GiB") as cache:
        with cache.window() as window:
            copied = cache.stats().copied_bytes
            if hashlib.sha256(window.view).digest() != hash_of(raw):
                raise SystemExit(f"{path}: a window shows other bytes than {raw}")
        taken = min(seconds(lambda: cache.window().release()) for _ in range(rounds))
        hashing = ratio(lambda: hash_of_window(cache), lambda: hash_of(raw), rounds)
        return Form(name, copied, taken * 1e3, hashing)


def hash_of_window(cache: MapCache) -> bytes:
    with cache.window() as window:
        return hashlib.sha256(window.view).digest()


def hash_of(path: Path) -> bytes:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as plain:
        return hashlib.sha256(plain).digest()


# --- page tables ----------------------------------------------------------------------


def page_tables(leaves: int) -> Iterator[bytes]:
    """Yield the pages of page tables: a root, its tables, and theirs; present entries have bit 0.

    Args:
        leaves: tables of the last level, a multiple of 512.
    """
    middle = leaves // ENTRIES
    yield table(range(1, 1 + middle))
    for number in range(middle):
        first = 1 + middle + number * ENTRIES
        yield table(range(first, first + ENTRIES))
    draw = random.Random(1).randrange
    for _ in range(leaves):
        yield table([draw(1 << 20) if draw(8) else None for _ in range(ENTRIES)])


def table(frames: Any) -> bytes:  # noqa: ANN401 - ints, or None for entries that are not present
    entries = [0 if frame is None else frame << 12 | 1 for frame in frames]
    return struct.pack(f"<{ENTRIES}Q", *entries, *[0] * (ENTRIES - len(entries)))


def walk_with_numpy(cache: MapCache) -> tuple[int, int]:
    """Return how many frames the last level names, and their sum."""
    import numpy

    with cache.window() as window:
        tables = numpy.frombuffer(window.view, "<u8").reshape(-1, ENTRIES)
        frames = numpy.zeros(1, "<u8")
        for _ in range(3):
            entries = tables[frames].ravel()
            frames = (entries[entries & 1 != 0] & _FRAME) >> 12
        return len(frames), int(frames.sum())


def walk_with_reads(cache: MapCache) -> tuple[int, int]:
    """Return the same by a read of each entry."""
    read_u64 = GuestMemory(cache).read_u64
    frames = [0]
    for _ in range(3):
        found = []
        for frame in frames:
            for address in range(frame << 12, frame + 1 << 12, 8):
                entry = read_u64(address)
                if entry & 1:
                    found.append((entry & _FRAME) >> 12)
        frames = found
    return len(frames), sum(frames)


def measure_walk(folder: Path, leaves: int, rounds: int) -> tuple[int, float]:
    """Return how many entries were walked, and the ratio of the two ways."""
    path = folder / "tables.raw"
    with path.open("wb") as file:
        file.writelines(page_tables(leaves))
    with open_cache(f"raw:{path}") as cache:
        if walk_with_numpy(cache) != walk_with_reads(cache):
            raise SystemExit("the two ways find different frames")
        walked = ratio(lambda: walk_with_numpy(cache), lambda: walk_with_reads(cache), rounds)
        return path.stat().st_size // 8, walked


def form_table(forms: list[Form]) -> Table:
    headings = ("form", "copied", "taking it, ms", "hashing it / plain mmap", "at most")
    rows: list[tuple[str, ...]] = [
        (
            form.name,
            f"{form.copied // MiB} MiB",
            f"{form.milliseconds:.2f}",
            f"{form.ratio:.2f} x",
            f"{HASH_LIMIT} x" if form.name == "raw" else "",
        )
        for form in forms
    ]
    return headings, rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.window", description=__doc__)
    parser.add_argument("--size", type=parse_size, default=256 * MiB, help="of memory (256M)")
    parser.add_argument("--leaves", type=int, default=4096, help="page tables (4096)")
    parser.add_argument("--rounds", type=int, default=7, help="how often each is timed (7)")
    parser.add_argument("--write", action="store_true", help=f"rewrite the tables in {PAGE.name}")
    options = parser.parse_args()
    pin()
    with tempfile.TemporaryDirectory() as name:
        paths = make_images(Path(name), options.size)
        forms = [measure_form(form, paths[form], paths["raw"], options.rounds) for form in FORMS]
        entries, walked = measure_walk(Path(name), options.leaves, max(2, options.rounds // 2))
    headings = ("walk", "NumPy through a window / read_u64", "at most")
    tables: dict[str, Table] = {
        "forms": form_table(forms),
        "walk": (headings, [(f"{entries:,} entries", f"{walked:.3f} x", f"{WALK_LIMIT} x")]),
    }
    print(machine())
    show(tables, 120)
    if options.write:
        rewrite(PAGE, "machine", f"{machine()}\n", COMMAND)
        for title, (columns, rows) in tables.items():
            rewrite(PAGE, title, markdown(columns, rows), COMMAND)
    return 0 if forms[0].ratio <= HASH_LIMIT and walked <= WALK_LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
