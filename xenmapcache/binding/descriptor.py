"""Descriptors that close when their last user has dropped them."""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from functools import partial
from operator import call
from typing import Any, Protocol

_call: Any = call


class Descriptor(Protocol):
    """The owner of a file descriptor. Code that uses the descriptor keeps a reference to its owner.

    The descriptor is closed by :meth:`close`, or when the owner is freed, by its reference count
    alone: an owner refers to nothing, so Python's collector never sees it. It is freed after all
    finalizers that still use it. A later use is an error, and never reaches another file that has
    the same number.

    Synchronization: all methods may be called in any threads and finalizers. Close it only when no
    other thread is in a call that uses the number.
    """

    @property
    def closed(self) -> bool:
        """Whether the descriptor has been closed."""

    def fileno(self) -> int:
        """Return the number of the descriptor.

        Raises:
            ValueError: it has been closed.
        """

    def close(self) -> None:
        """Close the descriptor. Idempotent."""


def own(make: Callable[[], int]) -> Descriptor:
    """Call a C function that returns a new descriptor, and return the descriptor's owner.

    An interrupt, or a failed allocation, leaks nothing: it finds the number in a list of ours, or
    the owner, and never neither or both, because both steps between are single calls into C.
    """
    numbers: list[int] = []
    owners: list[Descriptor] = []
    try:
        numbers.extend(map(_call, (make,)))
        # An epoll object is used for what its C code does with any descriptor: it closes the
        # descriptor when it is freed, without a warning, and without Python code that could fail.
        take_over = partial(owners.extend, map(select.epoll.fromfd, numbers))
        any(map(_call, (take_over, numbers.clear)))
        return owners[0]
    finally:
        for number in numbers:
            os.close(number)
        owners.clear()  # or the traceback of an error would keep one
