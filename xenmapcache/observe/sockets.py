"""Where monitors have their sockets: a folder that belongs to one user, and names with a PID.

A process makes its socket under another name first, and gives it the right one when it listens. So
a socket that refuses a connection belongs to a process that has ended, and can be removed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import stat
import tempfile
from pathlib import Path
from typing import Final, Self

VARIABLE: Final = "XENMAPCACHE_RUNTIME_DIR"
"""The environment's name for another folder."""
RUN = Path("/run")

_NAME: Final = "xenmapcache"
_SOCKET: Final = re.compile(r"([1-9][0-9]{0,8})\.sock", re.ASCII)
_DRAFT: Final = re.compile(r"([1-9][0-9]{0,8})\.new", re.ASCII)
_NOT_HERE: Final = frozenset({errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS})
_BACKLOG = 16


def folders() -> tuple[Path, ...]:
    """Return where this user's processes may have their sockets, the preferred one first.

    It is the folder that ``XENMAPCACHE_RUNTIME_DIR`` names. Otherwise it is ``/run/xenmapcache``
    for root, ``$XDG_RUNTIME_DIR/xenmapcache``, and one below the temporary folder.
    """
    named = os.environ.get(VARIABLE)
    if named:
        return (Path(named),)
    user = os.geteuid()
    found = [RUN / _NAME] if user == 0 else []
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR", ""))
    with contextlib.suppress(OSError):  # it is missing, or another user's as after su
        if runtime.is_absolute() and runtime.stat().st_uid == user:
            found.append(runtime / _NAME)
    return (*found, Path(tempfile.gettempdir(), f"{_NAME}-{user}"))


def socket_name(pid: int) -> str:
    """Return the name of a process's socket in its folder."""
    return f"{pid}.sock"


class UnsafeFolderError(PermissionError):
    """A folder of sockets that other users could have made or could change."""


class SocketFolder:
    """An open folder of sockets. Also a context manager, which closes it.

    Args:
        path: of the folder.
        create: make it if it is missing.

    Attributes:
        path: as given.

    Raises:
        UnsafeFolderError: it is a symbolic link, no folder, or open to other users.
        OSError: it is missing, or cannot be made.
    """

    def __init__(self, path: Path, *, create: bool = False) -> None:
        self.path = path
        if create:
            with contextlib.suppress(FileExistsError):
                path.mkdir(mode=0o700)
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                raise self._refusal("is a link or a file") from None
            raise
        found = os.fstat(self._fd)
        wrong = ""
        if found.st_uid != os.geteuid():
            wrong = f"belongs to user {found.st_uid}"
        elif found.st_mode & 0o077:
            wrong = f"has mode {stat.S_IMODE(found.st_mode):04o}"
        if wrong:
            self.close()
            raise self._refusal(wrong)

    def _refusal(self, wrong: str) -> UnsafeFolderError:
        text = (
            f"it {wrong}, and must be a folder of user {os.geteuid()} with mode 0700: "
            f"remove it, or set {VARIABLE} to another folder"
        )
        return UnsafeFolderError(errno.EPERM, text, os.fspath(self.path))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the folder. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def pids(self) -> list[int]:
        """Return the numbers of the processes that have a socket here."""
        found = [_SOCKET.fullmatch(name) for name in self._names()]
        return sorted(int(match[1]) for match in found if match)

    def _names(self) -> list[str]:
        return os.listdir(self._fd)  # noqa: PTH208 - pathlib knows no descriptors

    def _short(self, name: str) -> str:
        """Return a path that is short enough for the address of a socket, wherever it is."""
        return f"/proc/self/fd/{self._fd}/{name}"

    def connect(self, pid: int) -> socket.socket | None:
        """Connect to a process, and do not wait.

        Returns:
            The connection; None if the process has ended, and its socket is removed.

        Raises:
            BlockingIOError: too many wait already.
            OSError: it cannot be connected to.
        """
        name = socket_name(pid)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            connection.connect(self._short(name))
        except (ConnectionRefusedError, FileNotFoundError):
            connection.close()
            self.remove(name)
            return None
        except BaseException:
            connection.close()
            raise
        return connection

    def remove(self, name: str) -> None:
        """Remove a socket, if it is still there."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._fd)

    def clean(self) -> None:
        """Remove the sockets of processes that have ended."""
        for pid in self.pids():
            with contextlib.suppress(BlockingIOError):
                connection = self.connect(pid)
                if connection is not None:
                    connection.close()
        for name in self._names():
            draft = _DRAFT.fullmatch(name)
            if draft and not _exists(int(draft[1])):
                self.remove(name)

    def listen(self, pid: int) -> socket.socket:
        """Return a socket that listens under the number of this process.

        Raises:
            FileExistsError: a process of another PID namespace has that number, too.
            OSError: the socket cannot be made.
        """
        draft, name = f"{pid}.new", socket_name(pid)
        if self._is_in_use(pid):
            text = (
                "a process of another PID namespace has this number and listens there: "
                f"set {VARIABLE} to another folder"
            )
            raise FileExistsError(errno.EEXIST, text, os.fspath(self.path / name))
        self.remove(draft)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            listener.bind(self._short(draft))
            os.chmod(draft, 0o600, dir_fd=self._fd)
            listener.listen(_BACKLOG)
            os.rename(draft, name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
        except BaseException:
            listener.close()
            self.remove(draft)
            raise
        return listener

    def _is_in_use(self, pid: int) -> bool:
        try:
            other = self.connect(pid)
        except BlockingIOError:
            return True
        if other is None:
            return False
        other.close()
        return True


def make_folder() -> SocketFolder:
    """Return the first of this user's folders that exists or can be made.

    Raises:
        UnsafeFolderError: other users could have made it, or could change it.
        OSError: none can be made.
    """
    problem: OSError = FileNotFoundError()
    for path in folders():
        try:
            return SocketFolder(path, create=True)
        except UnsafeFolderError:
            raise
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise
            problem = error
    raise problem


def _exists(pid: int) -> bool:
    """Return whether there is a process of that number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
