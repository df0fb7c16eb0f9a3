"""A lock that neither an interrupt nor a failed allocation can leave locked."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ParamSpec, TypeVar

if TYPE_CHECKING:
    from threading import RLock

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def locked(
    lock: RLock,
    function: Callable[Arguments, Result],
    *arguments: Arguments.args,
    **options: Arguments.kwargs,
) -> Result:
    """Call a function while this thread holds a reentrant lock.

    A ``with`` block has two gaps. Leaving it makes a tuple of three arguments, and if that
    allocation fails, the lock stays locked. A call of ``acquire`` before a ``try`` can be
    interrupted in between. Here the lock is taken inside of the ``try``, and ``release`` is one
    call into C that allocates nothing.
    """
    try:
        lock.acquire()
        return function(*arguments, **options)
    finally:
        try:  # noqa: SIM105 - one call into C, which nothing interrupts
            lock.release()
        except RuntimeError:  # interrupted while it waited, so it does not hold the lock
            pass
