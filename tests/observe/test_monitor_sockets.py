"""Where the sockets are: whose folder it is, what is refused, and what is removed."""

from __future__ import annotations

import errno
import os
import re
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from xenmapcache.observe import sockets as module
from xenmapcache.observe.sockets import (
    VARIABLE,
    SocketFolder,
    UnsafeFolderError,
    folders,
    make_folder,
)


@pytest.fixture
def user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No variable is set, and the temporary folder and /run are a test's."""
    for name in (VARIABLE, "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(module, "RUN", tmp_path / "run")
    return tmp_path


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[SocketFolder]:
    with SocketFolder(tmp_path / "sockets", create=True) as folder:
        yield folder


def test_the_folders_of_a_user(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The login session's, if it is the user's, and one in the temporary folder."""
    own = os.geteuid()
    last = user / "tmp" / f"xenmapcache-{own}"
    first = [user / "run" / "xenmapcache"] if own == 0 else []
    assert folders() == (*first, last)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(user))
    assert folders() == (*first, user / "xenmapcache", last)
    for wrong in ("relative", "", str(user / "missing")):
        monkeypatch.setenv("XDG_RUNTIME_DIR", wrong)
        assert folders() == (*first, last)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(user))
    monkeypatch.setattr(os, "geteuid", lambda: own + 1)  # as after su
    assert folders() == (user / "tmp" / f"xenmapcache-{own + 1}",)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert folders()[0] == user / "run" / "xenmapcache"
    monkeypatch.setenv(VARIABLE, "/some/where")
    assert folders() == (Path("/some/where"),)


def test_the_first_folder_that_can_be_made(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/run is missing here; an error of another kind is one."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os, "fstat", lambda fd, stat=os.stat: _of_root(stat(fd)))
    with make_folder() as found:
        assert found.path == user / "tmp" / "xenmapcache-0"
        assert found.path.stat().st_mode & 0o777 == 0o700
    (user / "run").mkdir()
    with make_folder() as found:
        assert found.path == user / "run" / "xenmapcache"
    found.path.chmod(0o755)
    with pytest.raises(UnsafeFolderError, match="has mode 0755"):
        make_folder()
    found.path.rmdir()
    (user / "run").rmdir()
    monkeypatch.setattr(tempfile, "tempdir", str(user / "missing"))
    with pytest.raises(FileNotFoundError, match="missing"):
        make_folder()
    monkeypatch.setattr(module, "RUN", Path("x" * 300))
    with pytest.raises(OSError, match="too long"):
        make_folder()


def _of_root(found: os.stat_result) -> os.stat_result:
    return os.stat_result((*found[:4], 0, *found[5:]))


@pytest.mark.parametrize("kind", ["link", "file", "mode", "owner"])
def test_unsafe_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Another user could have made them, or could change them. The error says what to do."""
    path = tmp_path / "sockets"
    match kind:
        case "link":
            (tmp_path / "other").mkdir(mode=0o700)
            path.symlink_to(tmp_path / "other")
            wrong = "is a link or a file"
        case "file":
            path.write_text("")
            wrong = "is a link or a file"
        case "mode":
            path.mkdir()
            path.chmod(0o710)
            wrong = "has mode 0710"
        case _:
            wrong = f"belongs to user {os.geteuid()}"
            path.mkdir(mode=0o700)
            user = os.geteuid() + 1
            monkeypatch.setattr(os, "geteuid", lambda: user)
    opened = len(os.listdir("/proc/self/fd"))
    for create in (True, False):
        with pytest.raises(UnsafeFolderError) as caught:
            SocketFolder(path, create=create)
        assert caught.value.filename == str(path)
        assert f"it {wrong}, and must be a folder of user " in str(caught.value)
        assert f"remove it, or set {VARIABLE} to another folder" in str(caught.value)
    assert len(os.listdir("/proc/self/fd")) == opened


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        SocketFolder(tmp_path / "sockets")


def test_closing_twice(folder: SocketFolder) -> None:
    folder.close()
    folder.close()


def test_a_long_path_is_no_limit(tmp_path: Path) -> None:
    """Although the address of a socket may have 107 bytes only."""
    path = tmp_path / ("x" * 200)
    with SocketFolder(path, create=True) as folder, folder.listen(7) as listener:
        connection = folder.connect(7)
        assert connection is not None
        connection.close()
        assert [each.name for each in path.iterdir()] == ["7.sock"]
        assert listener.getblocking() is False


def test_numbers_are_found(folder: SocketFolder) -> None:
    """Other names are ignored."""
    for name in (
        "9.sock",
        "123.sock",
        "0.sock",
        "x.sock",
        "12.new",
        "5.sock.old",
        "1" * 10 + ".sock",
    ):
        (folder.path / name).touch()
    assert folder.pids() == [9, 123]


def test_a_socket_that_refuses_is_removed(folder: SocketFolder) -> None:
    """Its process has ended. A missing one raises no error."""
    folder.listen(7).close()
    assert folder.connect(7) is None
    assert folder.pids() == []
    assert folder.connect(7) is None


def test_cleaning(folder: SocketFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sockets and drafts of processes that have ended go; those of others stay."""
    monkeypatch.setattr(module, "_BACKLOG", 0)
    folder.listen(7).close()
    (folder.path / "999999999.new").touch()
    (folder.path / f"{os.getpid()}.new").touch()
    (folder.path / "1.new").touch()
    with folder.listen(8), folder.listen(9):
        waiting = folder.connect(9)
        assert waiting is not None
        folder.clean()
        assert folder.pids() == [8, 9]
        with pytest.raises(BlockingIOError), waiting:
            folder.connect(9)
    names = {each.name for each in folder.path.iterdir()} - {"8.sock", "9.sock"}
    assert names == {f"{os.getpid()}.new", "1.new"}


def test_a_process_of_another_user_exists(
    folder: SocketFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its draft stays."""

    def refuse(*_: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    (folder.path / "5.new").touch()
    folder.clean()
    assert (folder.path / "5.new").exists()


def test_the_number_is_in_use(folder: SocketFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a socket that accepts, or that has no room for another client: both are alive."""
    monkeypatch.setattr(module, "_BACKLOG", 0)
    with folder.listen(7):
        waiting = folder.connect(7)
        assert waiting is not None
        with waiting, pytest.raises(FileExistsError, match="another PID namespace") as caught:
            folder.listen(7)
    assert caught.value.filename == str(folder.path / "7.sock")
    with folder.listen(7), pytest.raises(FileExistsError):
        folder.listen(7)


def test_nothing_is_left_of_a_failed_attempt(
    folder: SocketFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a file nor a descriptor. What an earlier one has left is replaced."""
    (folder.path / "7.new").touch()

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    opened = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail)
        with pytest.raises(OSError, match="No space left"):
            folder.listen(7)
    assert len(os.listdir("/proc/self/fd")) == opened
    assert [*folder.path.iterdir()] == []
    with folder.listen(7):
        assert folder.pids() == [7]


def test_a_socket_that_cannot_be_connected_to(
    folder: SocketFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stays, and the error is raised."""

    class Refused(socket.socket):
        def connect(self, address: object) -> None:
            assert re.fullmatch(r"/proc/self/fd/\d+/7.sock", str(address))
            raise PermissionError

    opened = len(os.listdir("/proc/self/fd"))
    with folder.listen(7):
        with monkeypatch.context() as patch:
            patch.setattr(socket, "socket", Refused)
            with pytest.raises(PermissionError):
                folder.connect(7)
        assert folder.pids() == [7]
    assert len(os.listdir("/proc/self/fd")) == opened
