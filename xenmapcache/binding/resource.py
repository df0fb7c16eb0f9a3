"""Resource: what a C function has given out, such as an open handle, and which C must get back.

A resource lives as long as its users: each call that uses it holds a reference. When the last
reference has gone, the C function that takes the resource back is called: once, and in the
process that opened it.
"""

# Theory of operation
#
# Calls under way are not counted, because an interrupt between counting and undoing would leave
# the count wrong. The reference count does that work: a call keeps the resource in a local
# variable. The collector does not know resources, so they outlive all finalizers that use them.
#
#   pending   its list is empty; C has not been asked yet, or has failed (a NULL in the list)
#   open      the C function has put its result into the list, in the step in which it returned
#   released  its record is no longer in _live
#
# Rules
#   1. A resource and its record exist before the C function is called. So an interrupt finds
#      either an empty list, or a result that the record releases.
#   2. Only the party that has taken a record out of _live releases. Taking it and the release are
#      one call into C, and no signal handler runs in between.
#   3. A weak reference's callback is a hint that may get lost. sweep() finds what it has left; it
#      runs when a handle is closed and after each full collection.
#   4. Nothing is released at exit or in a forked child: the table is emptied there.

from __future__ import annotations

import atexit
import os
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from operator import call

from .collector import sweep_after_collections, untrack

_call: Callable[[Callable[[], object]], object] = call


class Resource:
    """A pointer that a C function returned, released when the last reference has gone.

    Args:
        release: given pointers, returns an iterator that releases each, by C code alone.
        needs: an object that the resource uses; it is dropped after the release.

    Attributes:
        pointers: hand it over as ``result_out=`` of the C function that opens.
    """

    __slots__ = ("__weakref__", "pointers")

    def __init__(
        self, release: Callable[[Iterable[int]], Iterator[object]], needs: object = None
    ) -> None:
        self.pointers: list[int] = []
        untrack(self)
        record = _Record(self, _release)
        record.pointers, record.release, record.needs = self.pointers, release, needs
        _live[record] = None

    @property
    def pointer(self) -> int | None:
        """The pointer; None if the C function has returned NULL, or has not been called."""
        return self.pointers[-1] or None if self.pointers else None


class _Record(weakref.ref["Resource"]):
    """What has to be done when a resource has gone."""

    __slots__ = ("needs", "pointers", "release")

    pointers: list[int]
    release: Callable[[Iterable[int]], Iterator[object]]
    needs: object

    __eq__ = object.__eq__  # a weak reference to an object that has gone could not be looked up
    __hash__ = object.__hash__


_live: dict[_Record, None] = {}
_pid = os.getpid()


def _release(record: _Record) -> None:
    if record not in _live or os.getpid() != _pid:
        return  # its making was interrupted; or C code has forked, and has told nobody
    waiting = [0]  # emptied together with the record's taking
    steps: list[Callable[[], object]] = [
        partial(_live.pop, record),
        waiting.pop,
        partial(deque, record.release(filter(None, record.pointers)), 0),
        record.pointers.clear,
    ]
    each = map(_call, steps)
    try:
        deque(each, 0)
    except KeyError:
        if not waiting:
            raise  # a signal handler's; else another thread releases it
    finally:
        if not record.pointers:
            record.needs = None
        elif not waiting:
            _live[record] = None  # the release has not begun: the next sweep tries again


def sweep() -> None:
    """Release what has gone without a hint."""
    for record in list(_live):
        if record() is None:
            _release(record)


def _after_fork_in_child() -> None:
    global _pid
    _live.clear()
    _pid = os.getpid()


sweep_after_collections(sweep)
atexit.register(_live.clear)
os.register_at_fork(after_in_child=_after_fork_in_child)
