"""The calls of libc: what they refuse is an exception that says what, and why."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from xenmapcache.address import PAGE_SIZE
from xenmapcache.binding import libc
from xenmapcache.errors import XenCallError

FAILING: dict[str, tuple[Callable[[], object], str, int, str]] = {
    "no file": (
        lambda: libc.map_file(-1, 0, PAGE_SIZE, writable=False),
        "mmap",
        errno.EBADF,
        "",
    ),
    "no room": (lambda: libc.allocate(1 << 60), "mmap", errno.ENOMEM, "lower max_resident"),
    "odd": (lambda: libc.unmap(1, PAGE_SIZE), "munmap", errno.EINVAL, "0x1000 bytes at 0x1"),
    "not mapped": (lambda: libc.dont_fork(0, PAGE_SIZE), "madvise", errno.ENOMEM, ""),
}


@pytest.mark.parametrize("name", FAILING)
def test_what_fails_raises(name: str) -> None:
    """Each call that fails raises with its own name and errno, and what is known of the cause."""
    call, function, number, hint = FAILING[name]
    with pytest.raises(XenCallError) as caught:
        call()
    assert (caught.value.call, caught.value.errno) == (function, number)
    assert hint in caught.value.hint


def test_what_was_not_mapped_is_not_for_the_caller_to_unmap() -> None:
    """The address that a failed mmap returns is not left in the caller's list."""
    mapped: list[int] = []
    with pytest.raises(XenCallError):
        libc.map_file(-1, 0, PAGE_SIZE, writable=False, result_out=mapped)
    assert mapped == []


def test_no_file_where_nothing_is_mapped() -> None:
    """Of an address that nothing is mapped at, no file is told."""
    assert libc.file_at(0) is None
