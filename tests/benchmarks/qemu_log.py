"""Reading QEMU's logs, compared with ``wc -l`` and with ``awk`` that splits the same fields.

``python -m tests.benchmarks.qemu_log [LOG...]`` times the tools in turn, in one run. Without a log
it writes one of each kind: hits with few ioreqs, as the boot of a guest has; ioreqs; map calls,
with each prefix; a guest that balloons, with four INVALIDATEs for 30 hits and 8 map calls;
INVALIDATEs only; messages only. The time is processor time, of whole processes.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.observe import qemu_logs as logs

LIMIT = 5
LOG_BYTES = 128 << 20
ROUNDS = 2


def synthetic(folder: Path) -> Iterator[Path]:
    """Write the logs, one at a time."""
    hits = [*logs.miss(0x5000), *logs.hit(0x6001) * 30, logs.ioreq(1, 0xB8000)]
    misses = logs.miss(0x5000) + logs.miss(0x705000)
    ballooning = [*[logs.INVALIDATE] * 4, *misses * 4, *logs.hit(0x6001) * 30]
    stamped = logs.PREFIXES["pid"]
    kinds = {
        "hits": (hits, stamped),
        "ioreqs": (
            [logs.ioreq(0, 0x3C9, data=7), logs.ioreq(1, 0xB8122), logs.ioreq(0, 0xCF8)],
            stamped,
        ),
        "misses": (misses, stamped),
        "misses-without-times": (misses, logs.PREFIXES["plain"]),
        "misses-in-UTC": (misses, logs.PREFIXES["iso"]),
        "ballooning": (ballooning, stamped),
        "INVALIDATEs": ([logs.INVALIDATE], stamped),
        "DMA-held": ([logs.HELD], logs.PREFIXES["plain"]),
        "messages": (["qemu-system-i386: warning: a message of QEMU's about something else"], ""),
    }
    for name, (lines, prefix) in kinds.items():
        path = folder / f"{name}.log"
        text = logs.text(*lines, prefix=prefix)
        path.write_bytes(text * (LOG_BYTES // len(text)))
        yield path
        path.unlink()


def cpu_seconds(command: list[str]) -> float:
    """Return the processor time of a command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(path: Path, rounds: int = ROUNDS) -> tuple[float, float, float]:
    """Return the best times of ours, of wc, and of awk, in seconds."""
    commands = (
        [sys.executable, "-m", "xenmapcache", "qemu-log", "--json", str(path)],
        ["wc", "-l", str(path)],
        ["awk", "-F", "[@:. =]+", "{ fields += NF } END { print fields }", str(path)],
    )
    times = [[cpu_seconds(command) for command in commands] for _ in range(rounds)]
    ours, counting, splitting = (min(each) for each in zip(*times, strict=True))
    return ours, counting, splitting


def main(arguments: list[str]) -> int:
    """Print the times and ratios. Returns 1 if one is above the limit."""
    status = 0
    with tempfile.TemporaryDirectory() as folder:
        for path in map(Path, arguments) if arguments else synthetic(Path(folder)):
            ours, counting, splitting = measure(path)
            ratio = ours / (counting + splitting)
            status |= ratio > LIMIT
            print(
                f"{path.name}: {path.stat().st_size >> 20} MiB, xenmapcache {ours:.2f} s, "
                f"wc {counting:.2f} s, awk {splitting:.2f} s, ratio {ratio:.1f}"
            )
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
