"""Descriptors that live as long as their users."""

from __future__ import annotations

import gc
import os
import weakref
from functools import partial
from pathlib import Path

import pytest

from xenmapcache.binding.descriptor import Descriptor, own


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    return path


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


class User:
    """Is collected in a cycle, and uses the descriptor in its finalizer."""

    def __init__(self, owner: Descriptor, seen: list[bytes]) -> None:
        self.owner = owner
        self.seen = seen
        self.itself = self

    def __del__(self) -> None:
        self.seen.append(os.pread(self.owner.fileno(), 7, 0))


def test_a_finalizer_of_a_cycle_can_use_it(file: Path) -> None:
    """The collector finalizes in any order; the owner goes by its reference count, after all."""
    seen: list[bytes] = []
    before = open_files()
    for _ in range(10):
        User(own(partial(os.open, file, os.O_RDONLY)), seen)
    gc.collect()
    assert seen == [b"content"] * 10
    assert open_files() <= before  # threads of earlier tests may just have ended


def test_descriptor_closes_with_its_last_user(tmp_path: Path) -> None:
    """While a reference to the owner exists, the descriptor is open; then it is closed."""
    file = own(partial(os.open, tmp_path, os.O_RDONLY))
    fd, user = file.fileno(), file
    del file
    assert is_open(fd)
    del user
    assert not is_open(fd)


def test_closed_descriptor_has_no_number(tmp_path: Path) -> None:
    """After close a use is an error, and never another file."""
    file = own(partial(os.open, tmp_path, os.O_RDONLY))
    fd = file.fileno()
    file.close()
    file.close()
    assert file.closed
    assert not is_open(fd)
    with pytest.raises(ValueError, match="closed"):
        file.fileno()


def test_failed_open_raises_its_own_error(tmp_path: Path) -> None:
    """The error is the system's, with the file's name."""
    with pytest.raises(FileNotFoundError, match="none"):
        own(partial(os.open, tmp_path / "none", os.O_RDONLY))


def test_owner_is_not_seen_by_the_collector(tmp_path: Path) -> None:
    """The collector cannot clear what it does not track, so no finalizer finds it closed."""
    import gc

    file = own(partial(os.open, tmp_path, os.O_RDONLY))
    assert not gc.is_tracked(file)
    with pytest.raises(TypeError):
        weakref.ref(file)


def test_failed_owner_leaves_no_descriptor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If there is no memory for an owner, the descriptor is closed."""
    made: list[int] = []

    def make() -> int:
        made.append(os.open(tmp_path, os.O_RDONLY))
        return made[-1]

    class Epoll:
        @staticmethod
        def fromfd(number: int) -> None:
            raise MemoryError

    monkeypatch.setattr("xenmapcache.binding.descriptor.select.epoll", Epoll)
    with pytest.raises(MemoryError):
        own(make)
    assert not is_open(made[0])
