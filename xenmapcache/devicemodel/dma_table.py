"""The transfers of a DMA engine: which may begin, which are waited for, how one ends."""

from __future__ import annotations

import itertools
import logging
import os
import threading
from collections.abc import Awaitable, Callable, Iterable
from time import monotonic

from ..address import as_int
from ..cache import DmaDirection
from ..cache.info import as_direction
from ..cache.locked import locked
from ..errors import ClosedError, FaultError, QueueFullError
from ..guest.scatter import Segments
from ..logs import safely
from .dma_transfer import DmaRecord, DmaStatus, DmaTransfer, Result
from .gate import Transfer
from .report import FailureLog, Tally
from .server import IoreqServer

logger = logging.getLogger("xenmapcache.devicemodel")

_FIRST_S, _NEXT_S = 1.0, 10.0
"""Seconds after which a wait names what it waits for, and the interval of the next warnings."""
_MAX_NAMED = 8
"""Transfers that one line names."""
_AGAIN_S = 0.001
"""Shortest pause."""
_LOOK_S = 0.1
"""Longest pause of a wait: suspend() wakes nobody, and changes what has to be waited for."""


class Hold:
    """Holds transfers back that were submitted since an INVALIDATE began.

    Attributes:
        accepted: numbers of the transfers that came before.
        sequence: how many invalidations the cache had had.
        over: the cache has dropped its mappings since.
    """

    __slots__ = ("accepted", "over", "sequence")

    def __init__(self, accepted: frozenset[int], sequence: int) -> None:
        self.accepted = accepted
        self.sequence = sequence
        self.over = False


class TransferTable:
    """All transfers of an engine that have not ended. The theory of operation is in ``dma.py``.

    Args:
        server, name, limit, drain_timeout: of the engine.

    Attributes:
        server, name, drain_timeout: as given.
        live: the transfers, by number: oldest first.
        closed: the engine accepts none any longer.
        failures: how many have failed.
        waits: those under way; they are told when a transfer has ended.

    Synchronization: any thread. No method takes a lock that a signal handler can find held.
    """

    def __init__(self, server: IoreqServer, name: str, limit: int, drain_timeout: float) -> None:
        if not isinstance(server, IoreqServer):
            raise TypeError(f"server must be an IoreqServer, not {server!r}")
        if not isinstance(name, str):
            raise TypeError(f"name must be a str, not {type(name).__name__}")
        if as_int("limit", limit) < 1:
            raise ValueError(f"limit must be at least 1 transfer, not {limit}")
        if not 0 < drain_timeout <= threading.TIMEOUT_MAX:
            raise ValueError(
                f"drain_timeout must be above 0 and at most {threading.TIMEOUT_MAX:.0f} seconds, "
                f"not {drain_timeout!r}"
            )
        self.server = server
        self.name = name
        self.drain_timeout = drain_timeout
        self.live: dict[int, DmaRecord] = {}
        self.closed = False
        self.failures = 0
        self.waits: list[Wait] = []
        self._limit = limit
        self._hold: Hold | None = None
        self._next_number = itertools.count(1).__next__
        self._log = FailureLog(server.domid, Tally())
        self._log_lock = threading.RLock()
        self._pid = os.getpid()

    def __str__(self) -> str:
        return f"DMA engine {self.name!r} of domain {self.server.domid}"

    def __repr__(self) -> str:
        state = "closed, " if self.closed else ""
        return f"<{self}, {state}{len(self.live)} transfers under way>"

    # --- submission -----------------------------------------------------------------------------

    def make(
        self,
        ranges: Iterable[tuple[int, int]],
        direction: DmaDirection | str,
        work: Callable[[Segments], Result | Awaitable[Result]],
        on_end: Callable[[DmaTransfer], object] | None,
        group: object = None,
    ) -> DmaRecord:
        """Return a transfer that may be accepted. It is not in :attr:`live` yet."""
        if not callable(work):
            raise TypeError(f"work {work!r} cannot be called")
        if on_end is not None and not callable(on_end):
            raise TypeError(f"on_end {on_end!r} cannot be called")
        pairs = tuple((as_int("address", a), as_int("length", n)) for a, n in ranges)
        way = as_direction(direction)
        self.server.id  # noqa: B018 - raises ClosedError unless the server is open
        if self.closed:
            raise ClosedError(f"{self}: it is closed; make another engine")
        if len(self.live) >= self._limit:
            raise QueueFullError(
                f"{self}: {len(self.live)} transfers are under way, and its limit is "
                f"{self._limit}; tell the guest that the device is busy, or raise the limit: "
                f"{self.describe(self.live.values())}"
            )
        return DmaRecord(self._next_number(), self.name, pairs, way, work, on_end, group)

    # --- what may begin -------------------------------------------------------------------------

    def next(self) -> DmaRecord | None:
        """Claim the oldest transfer that may begin, or return None."""
        for record in [*self.live.values()]:
            if record.unclaimed and self._may_begin(record) and record.claim():
                # A hold that began since either finds the claim, and waits; or it is found here.
                if self._may_begin(record):
                    return record
                record.unclaimed.append(None)
        return None

    def is_holding(self) -> bool:
        """Return whether a transfer waits that cannot begin now."""
        return any(record.unclaimed for record in [*self.live.values()])

    def _may_begin(self, record: DmaRecord) -> bool:
        hold = self._hold
        if hold is None or hold.over or record.cancelled or record.number in hold.accepted:
            return True
        if self.server.cache.stats().invalidations == hold.sequence and self._is_open():
            return False
        hold.over = True
        return True

    def is_suspended(self) -> bool:
        """Return whether the gate is shut, and will be opened or closed."""
        return self.server.suspended and self._is_open()

    def _is_open(self) -> bool:
        try:
            self.server.id  # noqa: B018 - raises ClosedError unless the server is open
        except ClosedError:
            return False
        return True

    def hold(self) -> list[DmaRecord]:
        """Begin to hold back what is submitted from now on; return what came before."""
        sequence = self.server.cache.stats().invalidations
        records = [*self.live.values()]
        self._hold = Hold(frozenset(record.number for record in records), sequence)
        return records

    def cancel(self, group: object = None) -> list[DmaRecord]:
        """Have no transfer begin, and none tell its end; return all that have not ended.

        Args:
            group: if not None, only its transfers.
        """
        records = [each for each in [*self.live.values()] if group in (None, each.group)]
        for record in records:
            record.cancelled = True
        return records

    def end(self) -> list[DmaRecord]:
        """Cancel all transfers at the end of the engine, and log how many failures were not."""
        try:
            return self.cancel()
        finally:
            locked(self._log_lock, self._log.flush)

    # --- what is waited for ---------------------------------------------------------------------

    def busy(
        self, accepted: list[DmaRecord], carrier: object, group: object = None
    ) -> list[DmaRecord]:
        """Return the transfers that have to end before mappings may be dropped.

        Args:
            accepted: those that have to end although they have not begun.
            carrier: the thread or task that waits.
            group: if not None, only its transfers.
        """
        if os.getpid() != self._pid:
            return []  # they are the parent's
        suspended = self.server.suspended
        wanted = {record.number for record in accepted}
        found = []
        for record in [*self.live.values()]:
            if record.carrier is not None and record.carrier == carrier:
                continue  # its work, or its end, waits for itself
            if group is not None and not record.is_wanted(group):
                continue
            begun = record.is_inside if suspended else not record.unclaimed
            if begun or (record.number in wanted and not suspended):
                found.append(record)
        return found

    def describe(self, records: Iterable[DmaRecord]) -> str:
        """Return transfers in words."""
        texts = list(map(str, records))
        more = f"; and {len(texts) - _MAX_NAMED} more" if len(texts) > _MAX_NAMED else ""
        return "; ".join(texts[:_MAX_NAMED]) + more

    # --- the life of one transfer ---------------------------------------------------------------

    def passage(self, record: DmaRecord) -> Transfer:
        """Return the way through the server's gate, for a ``with`` block.

        Raises:
            ClosedError: the server is closed.
        """
        self.server.id  # noqa: B018 - raises ClosedError unless the server is open
        record.passage = passage = self.server.transfer()
        return passage

    def begin(self, record: DmaRecord) -> Segments:
        """Return the leases of a transfer, for a ``with`` block."""
        record.begin()
        record.segments = segments = Segments(
            self.server.cache, record.ranges, self.name, record.direction
        )
        return segments

    def settle(self, record: DmaRecord) -> None:
        """Set the status of a transfer whose leases are released, log a failure, tell the end."""
        error = record.error
        if record.cancelled:
            record.status = DmaStatus.CANCELLED
        else:
            record.status = DmaStatus.DONE if error is None else DmaStatus.FAILED
        if record.cancelled:
            return
        if error is not None:
            locked(self._log_lock, self._note_failure, record, error)
        if record.on_end is None:
            return
        try:
            record.on_end(DmaTransfer(record))
        except BaseException as failure:
            locked(self._log_lock, self._note_end_failure, record, failure)

    def _note_failure(self, record: DmaRecord, error: BaseException) -> None:
        self.failures += 1
        # The guest chose the address, and its device tells it.
        level = logging.INFO if isinstance(error, FaultError) else logging.ERROR
        self._log.line(f"DMA engine {self.name!r}", str(record), error, level)

    def _note_end_failure(self, record: DmaRecord, error: BaseException) -> None:
        self._log.line(
            f"DMA engine {self.name!r}", f"{record}: its on_end {record.on_end!r}", error
        )

    def died(self, error: BaseException) -> None:
        """Report a worker that ended by an exception of its own."""
        safely(
            logger.error,
            "%s: a worker died; its transfer counts as failed, and another worker goes on",
            self,
            exc_info=error,
        )

    def finish(self, record: DmaRecord) -> None:
        """Remove a transfer, whatever has become of it, and wake who waits. Can be repeated."""
        if record.status in (DmaStatus.WAITING, DmaStatus.RUNNING):
            record.status = DmaStatus.CANCELLED if record.cancelled else DmaStatus.FAILED
        if record.error is not None:
            record.error = record.error.with_traceback(None)  # its frames hold views
        self.live.pop(record.number, None)
        for wait in [*self.waits]:
            wait.ended(record.number)


class Wait:
    """A wait for transfers that has an end.

    Args:
        table: of the transfers.
        purpose: of the wait, for messages.
        timeout: in seconds; None takes the engine's ``drain_timeout``.
        accepted: transfers that have to end although they have not begun.
        carrier: the thread or task that waits; its own transfer does not wait for itself.
        wake: ends the pause of who waits.
        group: if not None, only its transfers are waited for.
    """

    def __init__(
        self,
        table: TransferTable,
        purpose: str,
        timeout: float | None,
        accepted: list[DmaRecord],
        carrier: object,
        wake: Callable[[], object],
        group: object = None,
    ) -> None:
        self._group = group
        self._table = table
        self._purpose = purpose
        self._timeout = table.drain_timeout if timeout is None else timeout
        self._accepted = accepted
        self._carrier = carrier
        self._wake = wake
        self._begin = monotonic()
        self._due = self._begin + _FIRST_S
        self._wanted: set[int] = set()

    def ended(self, number: int) -> None:
        """Wake who waits if the last transfer has ended that was still under way."""
        self._wanted.discard(number)
        if not self._wanted:
            self._wake()

    def pause(self) -> float:
        """Return for how many seconds to wait for a change; 0 if there is nothing to wait for.

        Raises:
            TimeoutError: the time is up.
        """
        # First all, then fewer: a transfer that ends from here on is found in one or the other.
        self._wanted = wanted = set(self._table.live)
        busy = self._table.busy(self._accepted, self._carrier, self._group)
        if not busy:
            return 0.0
        wanted.intersection_update([record.number for record in busy])
        now = monotonic()
        left = self._begin + self._timeout - now
        if left <= 0:
            raise TimeoutError(
                f"{self._table}: {self._purpose}: still under way after {self._timeout:g} s: "
                f"{self._table.describe(busy)}; an invalidation makes their leases stale. "
                "Have their work end sooner, or give the engine a longer drain_timeout"
            )
        if now >= self._due:
            self._due = now + _NEXT_S
            safely(
                logger.warning,
                "%s: %s: has waited %.1f s for: %s",
                self._table,
                self._purpose,
                now - self._begin,
                self._table.describe(busy),
            )
        return min(left, _LOOK_S if wanted else _AGAIN_S, max(self._due - now, _AGAIN_S))
