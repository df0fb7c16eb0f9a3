"""Files that are there when they are complete."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from xenmapcache import XenCallError
from xenmapcache.atomicfile import new_file


@pytest.mark.parametrize("letter", ["a", "€", "\udcff"])
def test_the_longest_names(tmp_path: Path, letter: str) -> None:
    """Whatever name the file system takes, of 255 bytes at most, a file gets it."""
    name = letter * (255 // len(os.fsencode(letter)))
    with new_file(tmp_path / name) as fd:
        os.write(fd, b"memory")
    assert (tmp_path / name).read_bytes() == b"memory"
    assert os.listdir(tmp_path) == [name]


def test_a_name_that_cannot_be_is_refused_before_the_work(tmp_path: Path) -> None:
    """What the file system does not take is said at once, and not after an hour of copying."""
    with (
        pytest.raises(OSError, match="File name too long") as error,
        new_file(tmp_path / ("a" * 256)),
    ):
        pytest.fail("the work has begun")
    assert error.value.filename == str(tmp_path / ("a" * 256))


def test_what_is_no_regular_file_is_left_alone(tmp_path: Path) -> None:
    """Root could replace /dev/null: pipes, devices and what links to them stay what they are."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "link").symlink_to(pipe)
    for path in (pipe, tmp_path / "link"):
        with (
            pytest.raises(FileExistsError, match=f"no regular file.*{pipe}"),
            new_file(path),
        ):
            pytest.fail("the work has begun")
    assert pipe.is_fifo()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO])
def test_errors_of_writing_name_the_file(tmp_path: Path, number: int) -> None:
    """A disk that is full or broken is that of this file; errors of a source stay as they are."""
    with pytest.raises(OSError) as error, new_file(tmp_path / "file"):
        raise OSError(number, os.strerror(number))
    assert error.value.filename == str(tmp_path / "file")
    with pytest.raises(XenCallError) as other, new_file(tmp_path / "file"):
        raise XenCallError("pread", None, number)
    assert other.value.filename != str(tmp_path / "file")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("name", "left"), [("link", []), ("replace", ["file"])])
def test_an_interrupt_right_behind_a_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, left: list[str]
) -> None:
    """Ctrl-C between a call and what follows leaves no part of a file, and hides behind nothing."""
    call: Callable[..., None] = getattr(os, name)

    def interrupted(*arguments: object, **options: object) -> None:
        call(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, name, interrupted)
    with pytest.raises(KeyboardInterrupt), new_file(tmp_path / "file"):
        pass
    assert os.listdir(tmp_path) == left


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL])
def test_a_file_system_without_nameless_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """However it refuses a file without a name, one with a name is made, its owner's alone."""
    real = os.open

    def refusing(path: str, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(number, os.strerror(number), path)
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", refusing)
    with new_file(tmp_path / "file") as fd:
        assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o600
        os.write(fd, b"memory")
    assert (tmp_path / "file").read_bytes() == b"memory"
    assert os.listdir(tmp_path) == ["file"]
