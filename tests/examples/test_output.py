"""Each example is run as a user runs it, and its output compared with what is kept.

If a change of the output is meant, write the kept output again:
``XENMAPCACHE_REGENERATE=1 pytest tests/examples``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
KEPT = EXAMPLES / "output"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))
AGE = re.compile(r"\bage \d+\.\d{3} s")

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", NAMES)
def test_example_prints_what_is_kept(name: str) -> None:
    """An example without options ends well and prints the kept text; only ages may differ."""
    run = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / f"{name}.py"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=120,
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, "")
    printed = AGE.sub("age 0.000 s", run.stdout)
    kept = KEPT / f"{name}.txt"
    if os.environ.get("XENMAPCACHE_REGENERATE"):
        kept.write_text(printed)
    assert printed == kept.read_text()


def test_each_kept_output_has_its_example() -> None:
    """No output is kept of an example that has gone or was renamed."""
    assert sorted(path.stem for path in KEPT.iterdir()) == NAMES
