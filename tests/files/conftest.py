"""A file of guest memory, open, read or mapped."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.files.changes import PAGES
from tests.files.places import folder_for_mapping
from tests.images.writers import memory
from xenmapcache import open_backend
from xenmapcache.backend import Backend
from xenmapcache.files.filelease import FileLease
from xenmapcache.files.image import ImageFile


def wait_for(condition: Callable[[], object]) -> None:
    """Wait for what the guard does after it has let a writer continue."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def is_closed(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return True
    return False


def number_of(image: ImageFile) -> int:
    """Return the descriptor's number."""
    assert image._lease is not None
    return image._lease.file.fileno()


def mapped_lines() -> int:
    """Return how many ranges this process maps from the file, copies not counted."""
    return Path("/proc/self/maps").read_text(encoding="utf-8").count("guest.raw")


@pytest.fixture
def mappable(tmp_path: Path) -> Iterator[Path]:
    """A folder whose files can be mapped."""
    yield from folder_for_mapping(tmp_path)


@pytest.fixture
def path(mappable: Path) -> Path:
    path = mappable / "guest.raw"
    path.write_bytes(memory(0, PAGES))
    return path


@pytest.fixture
def image(path: Path) -> Iterator[ImageFile]:
    """An open file of which ranges can be mapped."""
    file = ImageFile(path)
    assert file.map(0, 0, 1) is not None
    yield file
    file.close()


@pytest.fixture(params=["mapped", "read"])
def backend(
    request: pytest.FixtureRequest, path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Backend]:
    """A flat image that is mapped, and one that is read, as where there are no file leases."""
    if request.param == "read":
        monkeypatch.setattr(FileLease, "take", lambda _: False)
    with open_backend("raw", path=path) as backend:
        yield backend
