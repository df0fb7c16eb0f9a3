"""Measure searching and comparing a file of 256 MiB against grep -c on the same warm file.

Each row is a ratio: our time over grep's, taken in turn, the best of several rounds each.
Exits with 1 if a limit is exceeded. Rows without a limit are there to be known. On a real guest's
memory, and with other programs, tests/benchmarks/sources.py measures.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.benchmarks.promises import HEADINGS, SIZE, Promise
from tests.benchmarks.report import show
from tests.benchmarks.timing import Work, ratio, seconds
from xenmapcache import GuestMemory, MapCache, open_source
from xenmapcache.address import MiB
from xenmapcache.cli import diff
from xenmapcache.cli.sources import MAX_RESIDENT

TEXT = b"Linux version 6.1.0-18-amd64 (debian-kernel@lists.debian.org)"
ROUNDS = 7


def make_images(folder: Path) -> Iterator[tuple[str, Path]]:
    """Write what guests' memory is made of: noise, programs and text, and mostly nothing."""
    pieces: dict[str, Callable[[], bytes]] = {
        "noise": lambda: os.urandom(MiB),
        "programs": programs().__next__,
        "zeros": lambda: bytes(MiB),
    }
    for name, piece in pieces.items():
        path = folder / f"{name}.img"
        with path.open("wb") as file:
            for number in range(SIZE // MiB):
                data = bytearray(piece())
                if number == SIZE // MiB // 2:
                    data[1000 : 1000 + len(TEXT)] = TEXT
                file.write(data)
        yield name, path


def programs() -> Iterator[bytes]:
    """Yield MiBs of this machine's programs and of Python's library, again and again."""
    while True:
        rest = b""
        library = Path(os.__file__).parent.glob("*.py")
        for path in [*sorted(Path("/usr/bin").iterdir()), *sorted(library)]:
            if path.is_file():
                rest += path.read_bytes()
            while len(rest) >= MiB:
                yield rest[:MiB]
                rest = rest[MiB:]


def grep(path: Path, *pattern: str) -> Work:
    command = ["grep", "-c", *pattern, str(path)]
    environment = os.environ | {"LC_ALL": "C"}
    # Into a pipe: grep stops at the first match where nobody sees how many there are.
    return lambda: subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=False)


def command(*arguments: str) -> Work:
    words = [sys.executable, "-m", "xenmapcache", *arguments]
    return lambda: subprocess.run(words, stdout=subprocess.DEVNULL, check=False)


def searching(path: Path, pattern: bytes | re.Pattern[bytes]) -> Work:
    def work() -> None:
        with open_source(f"raw:{path}") as backend:
            with MapCache(backend, max_resident=MAX_RESIDENT) as cache:
                for _ in GuestMemory(cache).find(pattern):
                    pass
                assert cache.stats().resident_bytes <= MAX_RESIDENT

    return work


def strings(path: Path) -> None:
    with open_source(f"raw:{path}") as backend:
        with MapCache(backend, max_resident=MAX_RESIDENT) as cache:
            for _ in GuestMemory(cache).strings():
                pass


def comparing(path: Path) -> Work:
    def work() -> None:
        with open_source(f"raw:{path}") as one, open_source(f"raw:{path}") as other:
            with MapCache(one, max_resident=MAX_RESIDENT) as first:
                with MapCache(other, max_resident=MAX_RESIDENT) as second:
                    differences = diff.differences(first, second, 0, SIZE, by_bytes=False)
                    assert next(differences, None) is None

    return work


def rows(name: str, path: Path) -> Iterator[Promise]:
    for text in (TEXT[:13], b"NEEDLE", b"root:", b"ab"):
        theirs = grep(path, text.decode())
        figure = ratio(searching(path, text), theirs, ROUNDS)
        yield Promise(f"find {text.decode()!r} / grep -c", name, figure, "x", 2)
    pattern = "NEE[A-Z]LE"
    figure = ratio(searching(path, re.compile(pattern.encode())), grep(path, pattern), ROUNDS)
    yield Promise(f"find {pattern!r}, regex / grep -c", name, figure, "x", math.inf)
    theirs = grep(path, TEXT[:13].decode())
    figure = ratio(command("find", f"raw:{path}", TEXT[:13].decode()), theirs, ROUNDS)
    yield Promise("the command find / grep -c", name, figure, "x", math.inf)
    figure = ratio(comparing(path), theirs, ROUNDS)
    yield Promise("diff with itself / grep -c of one", name, figure, "x", 2)
    figure = seconds(lambda: strings(path)) / seconds(grep(path, "-a", r"[[:print:]]\{4,\}"))
    yield Promise("strings / grep -c '[[:print:]]{4,}'", name, figure, "x", math.inf)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.scan", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measured = [row for image in make_images(Path(folder)) for row in rows(*image)]
    if options.json:
        print(json.dumps([row.to_json() for row in measured], indent=2))
    else:
        print(f"Python {sys.version.split()[0]}")
        show({"": (HEADINGS, [row.cells() for row in measured])}, 110)
    return 0 if all(row.kept for row in measured) else 1


if __name__ == "__main__":
    sys.exit(main())
