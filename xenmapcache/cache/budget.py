"""The budget: how much guest memory is mapped, how much may be, and who waits for room."""

from __future__ import annotations

import gc
import queue
import threading
from collections import deque
from collections.abc import Callable

from .. import mapping as mappings
from ..errors import CacheFullError
from ..mapping import FREE_THREADED, LiveMapping, Mapping
from ..stream import EventStream
from .locked import locked

# Theory of operation
#
# `accounts` is the truth: one entry for each reservation and for each mapping that counts.
#
#   reservation --map succeeded--> record of the mapping --unmapped--> no entry
#        `--map failed or was interrupted--> no entry
#
# `used` is the sum of the entries. Both change only under the lock, in statements that neither
# call a function nor allocate memory. So neither another thread nor a signal handler sees one
# without the other, and a `recount` of either cannot come between them. An interrupt may still
# leave `used` too high, never too low. When room is short, `recount` repairs it: it asks
# `mapping.sweep()` for what the hints in `freed` missed, drops the entries of what has ended, and
# adds the rest up again.
#
# Who waits. An operation that needs room and finds none waits while another thread's operation
# is under way, because that one may hold memory which it is about to drop. If none is under way,
# the rest is leased or in views that users keep, and waiting is of no use: CacheFullError.
#
#   1. Operations wait in the order in which they came. A later one does not overtake them.
#   2. A waiting operation holds no memory, and does not count as under way. So two that wait
#      do not wait for each other.
#   3. The exception is an *exclusive* operation: a write or read over several buckets, which
#      holds the first ones while it maps the others. There is one at a time; it goes first.
#   4. A nested operation (of a signal handler or a finalizer, inside of another operation of
#      its own thread) never waits.
#
# A cache has two budgets: of mappings (`max_resident`), and of copies of a file's pages
# (`max_copies`). They share the lock and the operations, because an operation of either may
# drop memory of both. Each has its own accounts, and its own line of operations that wait.

_WAIT_S = 0.01
_ROOM_TRIES = 3  # without another operation under way
_GRACE_TRIES = 30  # of 10 ms, without a GIL, for threads that sleep to drop what they made
_ident = threading.get_ident


class Operation:
    """One access that may need room, from its beginning to its end.

    Attributes:
        thread: the one that carries it out.
        exclusive: whether it may hold several buckets while it waits.
        idle: whether it waits now, without memory that others could wait for.
        gate: what it sleeps at; made when it first has to.
    """

    __slots__ = ("exclusive", "gate", "idle", "thread")

    def __init__(self, *, exclusive: bool = False) -> None:
        self.thread = _ident()
        self.exclusive = exclusive
        self.idle = False
        self.gate: queue.SimpleQueue[None] | None = None


class Reservation:
    """Room for one mapping that is about to be made.

    Attributes:
        length: bytes.
        ended: whether the map call is over. Its caller sets it in the first statement of a
            ``finally``, where no interrupt comes before it, and calls :meth:`Budget.end` then.
    """

    __slots__ = ("ended", "length")

    def __init__(self, length: int) -> None:
        self.length = length
        self.ended = False


class Budget:
    """How much guest memory is mapped, or copied from a file, and how much may be.

    Args:
        limit: in bytes.
        option: the name of the limit, for errors: ``max_resident`` or ``max_copies``.
        mapped: of a budget of copies, the budget of mappings in the same cache.

    Attributes:
        limit, option: as given.
        copied: whether it is the budget of copies.
        copies: the budget of copies in the same cache; None if this is one, or there is none.
        lock: the cache's. Reentrant: a signal handler or finalizer may use the cache while
            its own thread holds it.
        operations: those under way or waiting. A caller of the cache's slow path adds its own
            inside of the ``try`` whose ``finally`` removes it.
        stream: what observers are told; the cache sets it.
        closed: whether the cache was closed or dropped, and will map nothing.
        freed: records of mappings that were unmapped; a hint, from any thread, without the lock.
    """

    __slots__ = (
        "__weakref__",
        "_hints",
        "accounts",
        "closed",
        "copied",
        "copies",
        "freed",
        "limit",
        "lock",
        "maps",
        "operations",
        "option",
        "stream",
        "used",
        "waiting",
    )

    def __init__(
        self, limit: int, option: str = "max_resident", *, mapped: Budget | None = None
    ) -> None:
        self.limit = limit
        self.option = option
        self.copied = mapped is not None
        self.copies: Budget | None = None
        self.lock = threading.RLock()
        self.operations: dict[Operation, None] = {}
        self.waiting: dict[Operation, None] = {}
        self.freed: deque[LiveMapping] = deque()
        self._hints = (self.freed,)
        self.accounts: dict[LiveMapping | Reservation, int] = {}
        self.used = 0
        self.closed = False
        self.maps = 0
        self.stream: EventStream | None = None
        if mapped is not None:
            self.lock, self.operations, mapped.copies = mapped.lock, mapped.operations, self

    @property
    def may_map(self) -> int:
        """How many bytes may still be mapped."""
        return 0 if self.closed else max(0, self.limit - self.used)

    def is_inside(self) -> bool:
        """Tell whether this thread holds the lock, or is inside of an operation."""
        if self.operations:
            thread = _ident()
            for other in [*self.operations]:
                if other.thread == thread:
                    return True
        return bool(self.lock._is_owned())  # type: ignore[attr-defined] # noqa: SLF001 - as below

    def is_nested(self, operation: Operation) -> bool:
        """Tell whether an operation belongs to a signal handler or finalizer inside of another.

        Such an operation waits for no other thread: that thread may wait for the outer one.
        """
        if self.lock._is_owned():  # type: ignore[attr-defined] # noqa: SLF001 - no other name tells
            return True
        thread = operation.thread
        # Loops, not generators: CPython 3.11 loses references if it cannot allocate one.
        for other in [*self.operations]:
            if other.thread == thread and other is not operation:
                return True
        return False

    def reserve(
        self,
        reservation: Reservation,
        operation: Operation,
        evict: Callable[[int, bool], bool],
        leased: Callable[[bool], int],
        address: int,
    ) -> None:
        """Take room for a mapping, evicting what is in its way.

        Called without the lock, inside of the ``try`` whose ``finally`` ends the reservation.

        Args:
            reservation: where the room is noted.
            operation: of the caller.
            evict: drops about N bytes of buckets, copies or others; returns whether it dropped one.
            leased: returns how many bytes the leases hold, of copies or others.
            address: guest-physical, for the error.

        Raises:
            CacheFullError: what is mapped is leased, or in views that are kept.
        """
        if reservation.length > self.limit:
            raise CacheFullError(
                f"{reservation.length:#x} bytes at {address:#x} are more than {self.option} "
                f"{self.limit:#x}; map a smaller range, or raise {self.option}"
            )
        nested = self.is_nested(operation)
        grace, tries = (_GRACE_TRIES if FREE_THREADED else 0), _ROOM_TRIES
        try:
            while True:
                # First, because an operation that ends after this look has dropped its memory.
                busy = not nested and self._others_are_under_way(operation)
                if locked(self.lock, self._take, reservation, operation, nested):
                    return
                if self._is_turn(operation, nested) and (
                    evict(self.used + reservation.length - self.limit, self.copied)
                    or self.recount()
                ):
                    continue
                tries -= not busy
                if (
                    nested
                    or leased(self.copied) + reservation.length > self.limit
                    or (not tries and not grace)
                ):
                    raise CacheFullError(
                        f"no room for {reservation.length:#x} bytes at {address:#x}: "
                        f"{self.used:#x} of {self.option} {self.limit:#x} bytes are leased or in "
                        f"views that are kept; release leases, or raise {self.option}"
                    )
                self.waiting[operation] = None
                if not tries:  # without a GIL
                    grace, tries = grace - 1, 1
                    gc.collect()
                    self._sleep(operation)
                elif busy:
                    self._sleep(operation)
        finally:
            self.waiting.pop(operation, None)

    def _is_turn(self, operation: Operation, nested: bool) -> bool:
        return (
            nested
            or operation.exclusive
            or not self.waiting
            or next(iter([*self.waiting]), operation) is operation
        )

    def _take(self, reservation: Reservation, operation: Operation, nested: bool) -> bool:
        """Note a reservation if there is room, and it is this operation's turn; under the lock."""
        self.settle()
        if not self._is_turn(operation, nested):
            return False
        length = reservation.length
        used = self.used + length
        if used > self.limit:
            return False
        self.accounts[reservation] = length
        self.used = used
        return True

    def _others_are_under_way(self, operation: Operation) -> bool:
        """Tell whether another thread's operation may drop memory without this one's help."""
        ahead = True
        for other in [*self.waiting]:
            if other is operation:
                ahead = False
            elif ahead and other.thread != operation.thread:
                return True
        for other in [*self.operations]:
            if other.thread != operation.thread and not other.idle:
                return True
        return False

    def _sleep(self, operation: Operation) -> None:
        """Wait until an operation ends, or for a moment."""
        if operation.gate is None:
            operation.gate = queue.SimpleQueue()
        try:
            operation.idle = not operation.exclusive
            operation.gate.get(timeout=_WAIT_S)
        except queue.Empty:
            pass
        finally:
            operation.idle = False

    def wake(self) -> None:
        """Let waiting operations look again, and observers see what has happened.

        A call that is missed costs them a moment.
        """
        for operation in [*self.waiting, *(self.copies.waiting if self.copies else ())]:
            gate = operation.gate
            if gate is not None:
                gate.put(None)
        if self.stream is not None and self.stream.observations:
            self.stream.deliver()

    def keep(self, reservation: Reservation, mapping: Mapping) -> None:
        """Turn a reservation into the account of a mapping; called under the lock."""
        mapping.copied = self.copied
        mapping.notify(self._hints)
        record = mapping.record
        # Mostly the same number, and one object less; a window has room under two budgets.
        length, full = reservation.length, mapping.length
        self.accounts[record] = full if length == full else length
        del self.accounts[reservation]
        self.maps += 1

    def end(self, reservation: Reservation) -> None:
        """Give back the room of a reservation that has ended, unless a mapping has it now."""
        if reservation in self.accounts:
            locked(self.lock, self._drop, reservation)

    def _drop(self, entry: LiveMapping | Reservation) -> None:
        """Remove an account, if it is still there; called under the lock."""
        if entry in self.accounts:
            used = self.used - self.accounts[entry]
            del self.accounts[entry]
            self.used = used

    def settle(self) -> None:
        """Take unmapped memory off the accounts, as far as hints name it; under the lock."""
        while self.freed:
            try:
                record = self.freed.popleft()
            except IndexError:  # a signal handler has just taken the last one
                return
            self._drop(record)

    def recount(self) -> bool:
        """Find unmapped memory that no hint names; return whether that made room."""
        mappings.sweep()
        return locked(self.lock, self._recount)

    def _recount(self) -> bool:
        previous = self.used
        for entry in [*self.accounts]:
            if entry.ended if isinstance(entry, Reservation) else not entry.mapped:
                self._drop(entry)
        while True:
            used = self.used
            total = sum(self.accounts.values())
            if used == self.used:  # no signal handler has mapped or evicted during the sum
                self.used = total
                return total < previous

    def resident(self) -> tuple[int, int]:
        """Return the bytes that are mapped, and how many mappings they are; under the lock."""
        mapped = [
            length
            for record, length in [*self.accounts.items()]
            if not isinstance(record, Reservation)
        ]
        return sum(mapped), len(mapped)

    def forget_parent(self) -> None:
        """In a forked child: the lock may be held by a thread of the parent that is not here."""
        self.lock = threading.RLock()
        self.operations.clear()
        self.waiting.clear()
        if self.copies is not None:
            self.copies.lock = self.lock
            self.copies.waiting.clear()
