"""Descriptors with an owner, and files that are opened without waiting."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from xenmapcache.files import regular as module
from xenmapcache.files.regular import IrregularFileError, is_foreign, open_regular


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


@pytest.mark.parametrize("name", [str, os.fsencode, Path])
def test_regular_file_is_opened(tmp_path: Path, name: type) -> None:
    """Every kind of path names a file."""
    path = tmp_path / "file"
    path.write_bytes(b"memory")
    assert os.pread(open_regular(name(str(path))).fileno(), 6, 0) == b"memory"


def test_link_is_followed_if_allowed(tmp_path: Path) -> None:
    """A link to a regular file is opened, unless links are excluded."""
    (tmp_path / "file").write_bytes(b"memory")
    (tmp_path / "link").symlink_to("file")
    assert os.pread(open_regular(tmp_path / "link").fileno(), 6, 0) == b"memory"
    with pytest.raises(ValueError, match="link is not a regular file"):
        open_regular(tmp_path / "link", follow_links=False)


def test_link_that_appears_meanwhile_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel does not follow a link that took the name after it was looked at."""
    path = tmp_path / "file"
    path.write_bytes(b"memory")
    (tmp_path / "other").write_bytes(b"precious")
    monkeypatch.setattr(module, "_check_regular", lambda path, state: turn())

    def turn() -> None:
        path.unlink(missing_ok=True)
        path.symlink_to("other")

    with pytest.raises(OSError, match="symbolic links"):
        open_regular(path, follow_links=False)


def test_fifo_that_appears_meanwhile_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A FIFO that took the name after it was looked at is refused, without waiting for a writer."""
    path = tmp_path / "file"
    path.write_bytes(b"memory")
    real = os.open
    found: list[str] = []

    def turned(name: Path, flags: int) -> int:
        path.unlink()
        os.mkfifo(path)
        return real(name, flags)

    def work() -> None:
        with pytest.raises(ValueError, match="file is not a regular file") as error:
            open_regular(path)
        found.append(str(error.value))

    monkeypatch.setattr(os, "open", turned)
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(10)
    assert len(found) == 1


def test_write_lease_of_another_program_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel signals the holder of a write lease; the file opens when the lease has ended."""
    path = tmp_path / "file"
    path.write_bytes(b"memory")
    real = os.open
    tries: list[Path] = []

    def leased(name: Path, flags: int) -> int:
        tries.append(name)
        if len(tries) < 3:
            raise BlockingIOError
        return real(name, flags)

    monkeypatch.setattr(os, "open", leased)
    assert os.pread(open_regular(path).fileno(), 6, 0) == b"memory"
    assert len(tries) == 3


def test_write_lease_that_never_ends_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the time that the kernel grants a holder, the error is raised."""
    path = tmp_path / "file"
    path.write_bytes(b"memory")
    monkeypatch.setattr(module, "_BREAK_TIME_S", -1)

    def leased(name: Path, flags: int) -> int:
        raise BlockingIOError

    monkeypatch.setattr(os, "open", leased)
    with pytest.raises(BlockingIOError):
        open_regular(path)


def test_failure_keeps_no_descriptor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is refused after it was opened is closed, though the error is kept."""
    made: list[int] = []
    real = os.open

    def noted(name: Path, flags: int) -> int:
        made.append(real("/dev/null", flags))
        return made[-1]

    monkeypatch.setattr(os, "open", noted)
    path = tmp_path / "file"
    path.write_bytes(b"memory")
    with pytest.raises(ValueError, match="is not a regular file") as error:
        open_regular(path)
    assert not is_open(made[0])
    assert error.value.args


def test_error_of_a_signal_handler_is_told_from_one_of_ours() -> None:
    """A handler's TimeoutError has no errno, and its errors of opening name a file."""
    assert is_foreign(TimeoutError("the handler's"))
    assert is_foreign(FileNotFoundError(2, "No such file", "name"))
    assert not is_foreign(OSError(5, "Input/output error"))
    assert issubclass(IrregularFileError, ValueError)
