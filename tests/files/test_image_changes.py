"""A file that changes while it is open: what is seen of it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.files.changes import CHANGES, HARMLESS, PAGES
from tests.images.writers import memory
from xenmapcache import CorruptImageError, MapCache
from xenmapcache.address import PAGE_SIZE
from xenmapcache.backend import Backend


def elsewhere(change: Callable[[Path], object], path: Path) -> None:
    """Carry a change out in another process."""
    name = next(name for name, same in {**CHANGES, **HARMLESS}.items() if same is change)
    subprocess.run(
        [sys.executable, "-S", "-m", "tests.files.changes", name, path], check=True, timeout=60
    )


def here(change: Callable[[Path], object], path: Path) -> None:
    change(path)


WHO = pytest.mark.parametrize("who", [here, elsewhere], ids=["here", "elsewhere"])


@WHO
@pytest.mark.parametrize("change", CHANGES)
def test_changed_file_shows_old_content_or_raises(
    backend: Backend, path: Path, who: Callable[[object, Path], None], change: str
) -> None:
    """What was seen stays as it was, all of it; what comes later raises and names the file."""
    with MapCache(backend, bucket_shift=16) as cache:
        view = backend.map(3, 20, writable=False).view(0, 20 * PAGE_SIZE)
        rom = cache.map_device(0x8000, 0x3000, owner="rom", writable=False)
        before = cache.read(0x100, 0x40)
        who(CHANGES[change], path)
        assert view == memory(3, 20)
        assert rom.view == memory(8, 3)
        assert cache.read(0x100, 0x40) == before == memory(0, 1)[0x100:0x140]
        assert cache.read(0xF000, 0x1000) == memory(15, 1)
        for _ in range(2):
            with pytest.raises(CorruptImageError, match="guest.raw"):
                cache.read(0x20000, 8)
            with pytest.raises(CorruptImageError, match="guest.raw"):
                cache.map_device(0x3000, 0x1000, owner="rom", writable=False)
        rom.release()


@WHO
@pytest.mark.parametrize("change", HARMLESS)
def test_unchanged_file_continues(
    backend: Backend, path: Path, who: Callable[[object, Path], None], change: str
) -> None:
    """A file whose contents stay goes on, whatever becomes of its name."""
    with MapCache(backend, bucket_shift=16) as cache:
        view = backend.map(3, 20, writable=False).view(0, 20 * PAGE_SIZE)
        cache.read(0x100, 0x40)
        who(HARMLESS[change], path)
        assert view == memory(3, 20)
        assert cache.read(0, PAGES * PAGE_SIZE) == memory(0, PAGES)
