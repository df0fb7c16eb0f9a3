"""A new file that appears under its name when it is complete; nothing is left of a failed one."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Callable
from functools import partial
from types import TracebackType

from ..binding.descriptor import Descriptor, own
from ..errors import XenMapCacheError
from .regular import IrregularFileError, open_regular

_OF_WRITING = frozenset({errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC})


def new_file(
    path: str | os.PathLike[str], *, replaceable: Callable[[int], bool] | None = None
) -> NewFile:
    """Return a context manager that gives a descriptor to write to.

    The file takes its name when the block ends without an exception. A file of that name is
    replaced. The new file is its owner's alone (mode 0600), because it holds a guest's memory.
    Where the file system can, the file has no name until it is complete, so that not even a
    killed process leaves anything.

    Args:
        path: the name. If it is a symbolic link, the file at the link's end is replaced, and the
            kernel decides whether the link may be followed (``fs.protected_symlinks``).
        replaceable: called with a descriptor of the file that has the name now; only if it
            returns True is that file replaced. A symbolic link is then never followed or
            replaced. By default every regular file is replaced.

    Raises:
        OSError: the file cannot be created or written, or the name belongs to something that is
            not replaced.
    """
    return NewFile(path, replaceable)


class NewFile:
    """A file that is being written; see :func:`new_file`."""

    _named = False

    def __init__(
        self, path: str | os.PathLike[str], replaceable: Callable[[int], bool] | None
    ) -> None:
        self._pid = os.getpid()
        self._replaceable = replaceable
        self._file: Descriptor | None = None
        folder, name = os.path.split(os.fsdecode(path))
        target = os.path.join(os.path.realpath(folder), name)  # noqa: PTH118 - all in str
        self._target = target if replaceable else _end_of_link(target)
        self._check_target()
        self._folder, name = os.path.split(self._target)
        start = os.fsdecode(os.fsencode(name)[:200])  # names are limited in bytes
        self._draft = os.path.join(self._folder, f".{start}.{secrets.token_hex(4)}.part")  # noqa: PTH118 - all in str

    def __enter__(self) -> int:
        try:
            self._file = self._open()
            return self._file.fileno()
        except BaseException:
            self._discard()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._publish()
        except OSError as failure:
            self._name_file(failure)
            raise
        finally:
            self._discard()
        if isinstance(error, OSError):
            self._name_file(error)

    def __del__(self) -> None:
        # An interrupt can come right at the beginning of __exit__.
        self._discard()

    def _check_target(self) -> None:
        """Raise OSError if the name belongs to something that must not be replaced."""
        try:
            mode = os.lstat(self._target).st_mode
        except FileNotFoundError:
            return
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), self._target)
        if not stat.S_ISREG(mode):
            raise FileExistsError(
                errno.EEXIST, "That is not a regular file, and is left alone", self._target
            )
        if self._replaceable is not None:
            with contextlib.closing(_open_target(self._target)) as file:
                replaceable = self._replaceable(file.fileno())
            if not replaceable:
                raise FileExistsError(
                    errno.EEXIST, "That file was not written by this program", self._target
                )

    def _open(self) -> Descriptor:
        """Return a new file that is empty; without a name if the file system can do that."""
        flags = os.O_RDWR | os.O_CLOEXEC
        try:
            file = own(partial(os.open, self._folder, flags | os.O_TMPFILE, 0o600))
        except OSError as error:
            # EISDIR: a kernel that does not know the flag.
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                raise
        else:
            if os.path.exists(f"/proc/self/fd/{file.fileno()}"):  # noqa: PTH110 - all in str
                return file
        self._named = True  # before the file has a name: an interrupt may come after the call
        return own(partial(os.open, self._draft, flags | os.O_CREAT | os.O_EXCL, 0o600))

    def _publish(self) -> None:
        """Give the complete file its name."""
        assert self._file is not None  # noqa: S101 - the block has begun
        if not self._named:
            self._named = True
            # The descriptor's own folder entry is followed only by linkat, hence src_dir_fd.
            fd = self._file.fileno()
            os.link(f"/proc/self/fd/{fd}", self._draft, src_dir_fd=fd, follow_symlinks=True)
        if self._replaceable is not None:
            self._check_target()  # another program may have created a file
        os.replace(self._draft, self._target)  # noqa: PTH105 - all in str

    def _discard(self) -> None:
        """Close the file, and remove its draft. Idempotent."""
        self._file = None
        if self._named and self._pid == os.getpid():  # a forked child's parent is still writing
            with contextlib.suppress(FileNotFoundError):  # it has its name
                os.unlink(self._draft)  # noqa: PTH108 - all in str
            self._named = False

    def _name_file(self, error: OSError) -> None:
        """Put the file's name into an error of writing: os.pwrite knows no name."""
        if (
            error.filename is None
            and error.errno in _OF_WRITING
            and not isinstance(error, XenMapCacheError)
        ):
            error.filename = self._target


def _open_target(path: str) -> Descriptor:
    try:
        return open_regular(path, follow_links=False)
    except IrregularFileError as error:
        raise FileExistsError(errno.EEXIST, str(error), path) from None


def _end_of_link(path: str) -> str:
    """Return what a name stands for: the end of a symbolic link, or the name itself.

    The kernel follows the link, not we: in a folder like /tmp it refuses links that another
    user has put there.
    """
    if not os.path.islink(path):  # noqa: PTH114 - all in str
        return path
    try:
        end = own(partial(os.open, path, os.O_PATH | os.O_CLOEXEC))
    except FileNotFoundError:  # a link to a file that does not exist yet
        return os.path.realpath(path)
    return os.readlink(f"/proc/self/fd/{end.fileno()}")  # noqa: PTH115 - all in str
