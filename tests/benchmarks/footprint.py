"""What a candidate costs before the first read: its import, and what its process holds.

Each is measured in a process of its own: ``python -m tests.benchmarks.footprint NUMBER FILE SIZE``
opens one candidate, reads the guest once, a MiB at a time, and prints what it took. The first MiB
is left out, as not everybody reads page 0.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.benchmarks.candidates import BARE, OURS, Candidate, MiB
from tests.benchmarks.peers import PEERS
from tests.benchmarks.timing import Figure

ROOT = Path(__file__).parents[2]
ALL: Sequence[Candidate] = (*OURS, *BARE, *PEERS)


class Footprint(NamedTuple):
    """What a process held that read the guest once.

    Attributes:
        first: seconds from before the candidate's import to its first 8 bytes.
        peak: bytes that were resident at most.
        own: of what is resident at the end, bytes that are the process's alone.
        shared: of what is resident at the end, bytes of files: the guest's memory, and libraries.
    """

    first: float
    peak: int
    own: int
    shared: int


def import_times(modules: Iterable[str], rounds: int) -> dict[str, list[float]]:
    """Return by modules how many seconds Python took with their import; ``""`` is without any.

    Without :mod:`site`, which imports a good part of the standard library itself where packages
    are installed in an editable way. What cannot be imported is left out.
    """
    path = [str(ROOT), sysconfig.get_path("purelib")]
    codes = {"": "pass"} | {names: f"import {names.replace(' ', ', ')}" for names in modules}
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    times: dict[str, list[float]] = {names: [] for names in codes}
    for number in range(-1, rounds):
        for names, code in codes.items():
            command = [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {path}; {code}"]
            started = time.perf_counter()
            done = subprocess.run(command, env=environment, stderr=subprocess.DEVNULL, check=False)
            if done.returncode == 0 and number >= 0:  # the first may have compiled what it imports
                times[names].append(time.perf_counter() - started)
    return {names: taken for names, taken in times.items() if taken}


def import_figures(modules: Iterable[str], rounds: int) -> dict[str, Figure]:
    """Return by modules how many milliseconds Python takes longer with their import."""
    times = import_times(modules, rounds)
    bare = statistics.median(times.pop(""))
    return {
        names: Figure.of([each - bare for each in taken], 1e3) for names, taken in times.items()
    }


def footprint(candidate: Candidate, path: Path, size: int) -> Footprint:
    """Let a process open a candidate and read the guest.

    Raises:
        RuntimeError: it could not.
    """
    command = [sys.executable, "-m", __name__, str(ALL.index(candidate)), str(path), str(size)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        (*_, last) = ["", *done.stderr.strip().splitlines()]
        raise RuntimeError(f"{candidate.name}, {candidate.format}: {last}")
    return Footprint(**json.loads(done.stdout.splitlines()[-1]))


def read_all(candidate: Candidate, path: Path, size: int) -> Footprint:
    """Open a candidate in this process, read the guest once, and tell what it took."""
    started = time.perf_counter()
    reader = candidate.open(path)
    reader.read(MiB, 8)
    first = time.perf_counter() - started
    reader.loop(range(MiB, size, MiB), MiB)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak, own, files, shared = (
        int(status[name].split()[0]) * 1024 for name in ("VmHWM", "RssAnon", "RssFile", "RssShmem")
    )
    reader.close()
    return Footprint(first, peak, own, files + shared)


if __name__ == "__main__":
    number, file, size = sys.argv[1:]
    print(json.dumps(read_all(ALL[int(number)], Path(file), int(size))._asdict()))
