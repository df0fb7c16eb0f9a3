"""Long use leaves nothing behind: memory, objects, descriptors, mappings.

``XENMAPCACHE_LEAKS=1000000`` makes the use that long.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.effort import LEAKS
from tests.fake_xen import build, need

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


class Grown(NamedTuple):
    """What a process holds more of after N operations, and what it holds at all."""

    grew: dict[str, int]
    held: dict[str, int]


def use(source: str, operations: int, *options: str) -> list[Grown]:
    """Use a cache in a process of its own."""
    command = [sys.executable, "-m", "tests.lifetime.leaks", source, str(operations), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(all(each["counts"].values()) for each in reports), reports  # it did what it is for
    return [Grown(each["grew"], each["held"]) for each in reports]


def leaks(grew: dict[str, int], operations: int, once: int = 0) -> list[str]:
    """Return what grew by more than one for some hundreds of operations, or at all.

    Args:
        grew: what grew, and by how much.
        operations: how many there were.
        once: blocks that may be there or not, however many operations there are.
    """
    most = dict.fromkeys(grew, 0) | {
        "resident_kib": 1024,
        "blocks": operations // 400 + once,
        "objects": operations // 10_000,
    }
    return [name for name, number in grew.items() if number > most[name]]


@pytest.mark.timeout(600)
def test_many_operations_leave_nothing() -> None:
    """Neither do those that fail, nor views that are kept over evictions and invalidations.

    One object that is kept for each hundred operations is found.
    """
    clean, leaking = use("mock", LEAKS, "--leak")
    assert leaks(clean.grew, LEAKS) == [], clean
    assert not any(clean.held.values()), clean
    assert "blocks" in leaks(leaking.grew, LEAKS), leaking


@pytest.mark.timeout(300)
@pytest.mark.parametrize("binding", ["cffi", "ctypes"])
def test_so_do_the_bindings(binding: str, tmp_path: Path) -> None:
    """They are the code for live domains, over the stand-in."""
    need("_cffi_backend")
    library = str(build(tmp_path))
    operations = max(LEAKS // 10, 40_000)
    (grown,) = use(binding, operations, "--library", library, "--folder", str(tmp_path / "copies"))
    # A search opens a library, some 130 objects in cycles, and the last ones may not be freed yet.
    assert leaks(grown.grew, operations, once=200) == [], grown
    assert not any(grown.held.values()), grown
