"""Which file system a file lies in, and whether the kernel keeps its read leases."""

from __future__ import annotations

import os
import re
from functools import partial

from ..binding.descriptor import own

TRUSTED = frozenset({
    "bcachefs", "btrfs", "erofs", "exfat", "ext2", "ext3", "ext4", "f2fs", "iso9660", "ntfs3",
    "squashfs", "tmpfs", "vfat", "xfs", "zfs",
})  # fmt: skip
"""File systems whose files change only through the inode that we have open, in this kernel.

Other file systems grant leases, too, but a file can change without a break of its lease. On network
and FUSE file systems another machine or the server changes the file. On ``overlay`` a program
changes the file in the lower or in the upper layer: the lease is on the overlay's own inode, and
the kernel does not break it.
"""
# A hole of such a file takes memory when it is touched. If no memory is left, the kernel sends
# SIGBUS.
_FILLED_WHEN_TOUCHED = frozenset({"tmpfs"})


def why_not_mapped(fd: int) -> str:
    """Return why an open file must be read instead of mapped; empty if it can be mapped."""
    fs_type = file_system(fd)
    if fs_type not in TRUSTED:
        return f"file leases of the file system {fs_type!r} are not trusted"
    state = os.fstat(fd)
    if fs_type in _FILLED_WHEN_TOUCHED and state.st_blocks * 512 < state.st_size:
        return f"the file is sparse, on {fs_type}"
    return ""


def file_system(fd: int) -> str:
    """Return the type of the file system that a file lies in; empty if it is unknown."""
    try:
        info = _content(f"/proc/self/fdinfo/{fd}")
        mounts = _content("/proc/self/mountinfo")
    except OSError as error:
        if error.errno is None:
            raise  # a signal handler's, such as TimeoutError
        return ""
    found = re.search(rb"^mnt_id:\s*(\d+)$", info, re.MULTILINE)
    for mount in mounts.splitlines():
        number, _, rest = mount.partition(b" ")
        if found and number == found[1]:
            return os.fsdecode(b"".join(rest.rpartition(b" - ")[2].split()[:1]))
    return ""


def _content(path: str) -> bytes:
    file = own(partial(os.open, path, os.O_RDONLY | os.O_CLOEXEC))
    content = bytearray()
    try:
        while chunk := os.read(file.fileno(), 1 << 16):
            content += chunk
    finally:
        del file  # or the traceback of an error would keep it
    return bytes(content)
