"""New files: complete under their name, or absent."""

from __future__ import annotations

import errno
import gc
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fake_xen.child import in_child
from xenmapcache import XenCallError
from xenmapcache.files.atomic import new_file


@pytest.mark.parametrize("letter", ["a", "€", "\udcff"])
def test_longest_names_are_accepted(tmp_path: Path, letter: str) -> None:
    """Whatever name the file system takes, of 255 bytes at most, a file gets it."""
    name = letter * (255 // len(os.fsencode(letter)))
    with new_file(tmp_path / name) as fd:
        os.write(fd, b"memory")
    assert (tmp_path / name).read_bytes() == b"memory"
    assert os.listdir(tmp_path) == [name]


def test_too_long_name_fails_before_writing(tmp_path: Path) -> None:
    """What the file system does not take is said at once, and not after an hour of copying."""
    with (
        pytest.raises(OSError, match="File name too long") as error,
        new_file(tmp_path / ("a" * 256)),
    ):
        pytest.fail("the work has begun")
    assert error.value.filename == str(tmp_path / ("a" * 256))


def test_irregular_file_is_left_alone(tmp_path: Path) -> None:
    """Root could replace /dev/null: pipes, devices and what links to them stay what they are."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "link").symlink_to(pipe)
    for path in (pipe, tmp_path / "link"):
        with (
            pytest.raises(FileExistsError, match=f"not a regular file.*{pipe}"),
            new_file(path),
        ):
            pytest.fail("the work has begun")
    assert pipe.is_fifo()


def test_folder_is_refused_as_one(tmp_path: Path) -> None:
    """A program that was given a folder by mistake can tell that from another's file."""
    with pytest.raises(IsADirectoryError) as error, new_file(tmp_path):
        pytest.fail("the work has begun")
    assert error.value.filename == str(tmp_path)


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
def test_interrupt_after_a_call_leaves_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, left: list[str]
) -> None:
    """Ctrl-C between a call and what follows leaves no part of a file, and reaches the caller."""
    call: Callable[..., None] = getattr(os, name)

    def interrupted(*arguments: object, **options: object) -> None:
        call(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, name, interrupted)
    with pytest.raises(KeyboardInterrupt), new_file(tmp_path / "file"):
        pass
    assert os.listdir(tmp_path) == left


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL])
def test_file_system_without_nameless_files_gets_a_named_draft(
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


def write(path: Path, content: bytes, replaceable: Callable[[int], bool] | None = None) -> None:
    with new_file(path, replaceable=replaceable) as fd:
        os.write(fd, content)


def test_link_is_followed_by_default(tmp_path: Path) -> None:
    """The file at a link's end is replaced, whether it exists or not; the link stays."""
    link, file = tmp_path / "link", tmp_path / "file"
    link.symlink_to("file")
    for content in (b"first", b"second"):
        write(link, content)
        assert file.read_bytes() == content
        assert link.is_symlink()


def test_relative_path_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative name means the folder at the beginning, whatever the block changes to."""
    (tmp_path / "one").mkdir()
    monkeypatch.chdir(tmp_path / "one")
    with new_file("../one/file") as fd:
        os.write(fd, b"memory")
        os.chdir("/")
    assert (tmp_path / "one" / "file").read_bytes() == b"memory"


def test_kernel_decides_whether_a_link_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel refuses another user's link in a folder like /tmp (fs.protected_symlinks)."""
    (tmp_path / "link").symlink_to("victim")
    (tmp_path / "victim").write_bytes(b"precious")
    real = os.open

    def protected(path: str, flags: int, mode: int = 0o777) -> int:
        if path == str(tmp_path / "link") and not flags & os.O_NOFOLLOW:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", protected)
    with pytest.raises(PermissionError):
        write(tmp_path / "link", b"memory")
    assert (tmp_path / "victim").read_bytes() == b"precious"


def test_only_a_replaceable_file_is_replaced(tmp_path: Path) -> None:
    """With a condition, the file that has the name stays unless the condition holds for it."""
    path = tmp_path / "file"
    write(path, b"ours 1", lambda fd: pytest.fail("no file exists yet"))
    write(path, b"ours 2", lambda fd: os.pread(fd, 4, 0) == b"ours")
    with pytest.raises(FileExistsError, match="not written by this program") as error:
        write(path, b"ours 3", lambda fd: False)
    assert error.value.filename == str(path)
    assert path.read_bytes() == b"ours 2"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("end", ["file", "missing"])
def test_with_a_condition_no_link_is_followed_or_replaced(tmp_path: Path, end: str) -> None:
    """A link next to an image may be a trap: neither the link nor its target changes."""
    (tmp_path / "file").write_bytes(b"precious")
    (tmp_path / "link").symlink_to(end)
    with pytest.raises(FileExistsError, match="not a regular file"):
        write(tmp_path / "link", b"memory", lambda fd: True)
    assert (tmp_path / "file").read_bytes() == b"precious"
    assert os.readlink(tmp_path / "link") == end
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]


def test_file_created_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    """The condition holds at the end, too: another program may have created a file."""
    path = tmp_path / "file"
    with (
        pytest.raises(FileExistsError, match="not written by this program"),
        new_file(path, replaceable=lambda fd: False),
    ):
        path.write_bytes(b"precious")
    assert path.read_bytes() == b"precious"
    assert os.listdir(tmp_path) == ["file"]


def test_file_turned_into_fifo_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A FIFO that takes the file's name between two looks is refused, without waiting for it."""
    path = tmp_path / "file"
    path.write_bytes(b"ours")
    look = os.lstat

    def turned(name: str) -> os.stat_result:
        state = look(name)
        if name == str(path):
            path.unlink()
            os.mkfifo(path)
        return state

    monkeypatch.setattr(os, "lstat", turned)
    with pytest.raises(FileExistsError, match="not a regular file"):
        new_file(path, replaceable=lambda fd: True)


def test_failed_link_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the complete file cannot get a name, the error says so and nothing is left."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "link", full)
    with pytest.raises(OSError, match="No space left") as error:
        write(tmp_path / "file", b"memory")
    assert error.value.filename == str(tmp_path / "file")
    assert os.listdir(tmp_path) == []


def named_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the file system refuse files without a name."""
    real = os.open

    def refusing(path: str, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), path)
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", refusing)


def test_dropped_draft_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft whose block was left before __exit__ could begin goes with its object."""
    named_drafts(monkeypatch)
    file = new_file(tmp_path / "file")
    fd = file.__enter__()
    assert len(os.listdir(tmp_path)) == 1
    del file
    gc.collect()
    assert os.listdir(tmp_path) == []
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_forked_child_keeps_the_parents_draft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child that leaves the block does not remove the draft that its parent still writes."""
    named_drafts(monkeypatch)
    file = new_file(tmp_path / "file")

    def leave() -> bool:
        file.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
        return True

    with file as fd:
        assert in_child(leave) == 0
        assert len(os.listdir(tmp_path)) == 1
        os.write(fd, b"memory")
    assert (tmp_path / "file").read_bytes() == b"memory"


def test_interrupt_when_opened_leaves_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C right after the draft was created removes it, though no block has begun."""
    named_drafts(monkeypatch)
    refusing = os.open

    def interrupted(path: str, flags: int, mode: int = 0o777) -> int:
        fd = refusing(path, flags, mode)
        os.close(fd)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "open", interrupted)
    with pytest.raises(KeyboardInterrupt), new_file(tmp_path / "file"):
        pytest.fail("the block has begun")
    assert os.listdir(tmp_path) == []


def test_sigint_at_any_moment_leaves_the_old_file_or_the_new(tmp_path: Path) -> None:
    """A process that is interrupted while it writes leaves one complete file, and no draft."""
    path = tmp_path / "file"
    code = (
        "import os, signal, sys\nfrom xenmapcache.files.atomic import new_file\n"
        "signal.signal(signal.SIGALRM, signal.default_int_handler)\n"
        "with new_file(sys.argv[1]) as fd:\n"
        "    os.write(fd, b'complete')\n"
        "try:\n"
        # A second signal, as CPython loses what a handler raises while a finalizer runs.
        "    signal.setitimer(signal.ITIMER_REAL, float(sys.argv[2]), 0.5)\n"
        "    while True:\n"
        "        with new_file(sys.argv[1]) as fd:\n"
        "            os.write(fd, b'complete')\n"
        "except KeyboardInterrupt:\n    signal.setitimer(signal.ITIMER_REAL, 0)\n"
    )
    for delay in ("0.01", "0.013", "0.0171"):
        subprocess.run([sys.executable, "-c", code, path, delay], check=True, timeout=60)
        assert path.read_bytes() == b"complete"
        assert os.listdir(tmp_path) == ["file"]


def test_folder_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    """The system's error is raised before the block begins."""
    with pytest.raises(FileNotFoundError), new_file(tmp_path / "none" / "file"):
        pytest.fail("the work has begun")


def test_without_proc_a_draft_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file without a name could not be given one there."""
    monkeypatch.setattr(os.path, "exists", lambda _: False)
    with new_file(tmp_path / "file") as fd:
        assert len(os.listdir(tmp_path)) == 1
        os.write(fd, b"memory")
    assert (tmp_path / "file").read_bytes() == b"memory"
