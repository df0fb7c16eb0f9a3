"""Long use leaves nothing behind: memory, objects, descriptors, mappings.

``XENMAPCACHE_LEAKS=1000000`` makes the use that long.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.effort import LEAKS
from tests.fake_xen import build, need

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def use(source: str, operations: int, *options: str) -> tuple[dict[str, int], dict[str, int]]:
    """Use a cache in a process of its own; return what it holds more of, and what at all."""
    command = [sys.executable, "-m", "tests.lifetime.leaks", source, str(operations), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    said = json.loads(done.stdout)
    assert all(said["counts"].values()), said  # it has done what it is for
    return said["grew"], said["held"]


def leaks(grew: dict[str, int], operations: int) -> list[str]:
    """Return what grew by more than one for some hundreds of operations, or at all."""
    most = dict.fromkeys(grew, 0) | {
        "resident_kib": 1024,
        "blocks": operations // 400,
        "objects": operations // 10_000,
    }
    return [name for name, number in grew.items() if number > most[name]]


@pytest.mark.timeout(300)
def test_many_operations_leave_nothing() -> None:
    """Neither do those that fail, nor views that are kept over evictions and invalidations."""
    grew, held = use("mock", LEAKS)
    assert leaks(grew, LEAKS) == [], grew
    assert not any(held.values()), held


@pytest.mark.timeout(300)
@pytest.mark.parametrize("binding", ["cffi", "ctypes"])
def test_so_do_the_bindings(binding: str, tmp_path: Path) -> None:
    """They are the code for live domains, over the stand-in."""
    need("_cffi_backend")
    library = str(build(tmp_path))
    operations = max(LEAKS // 10, 10_000)
    grew, held = use(
        binding, operations, "--library", library, "--folder", str(tmp_path / "copies")
    )
    assert leaks(grew, operations) == [], grew
    assert not any(held.values()), held


@pytest.mark.timeout(300)
def test_a_leak_is_seen() -> None:
    """One object that is kept for each hundred operations is found."""
    grew, _ = use("mock", 20_000, "--leak")
    assert leaks(grew, 20_000) == ["blocks"], grew
