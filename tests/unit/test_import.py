"""What ``import xenmapcache`` brings, and what it leaves for later."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import xenmapcache

ROOT = Path(xenmapcache.__file__).parents[1]
LATER = ["pathlib", "xenmapcache.mock", "xenmapcache.writers.coredump", "xenmapcache.cli"]


@pytest.mark.parametrize("module", LATER)
def test_what_few_programs_need_is_not_imported(module: str) -> None:
    """In a bare interpreter, without site-packages, the import leaves out what it can."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import xenmapcache; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True
    )
    assert module not in done.stdout.split()


@pytest.mark.parametrize("name", xenmapcache.__all__)
def test_each_public_name_is_there(name: str) -> None:
    """Names that are imported when they are used are, and stay the same object."""
    assert getattr(xenmapcache, name) is getattr(xenmapcache, name)


def test_other_names_are_not() -> None:
    """A wrong name is the usual AttributeError, and nothing of the package's insides."""
    with pytest.raises(AttributeError, match="'xenmapcache' has no attribute 'mock_domain'"):
        _ = xenmapcache.mock_domain
