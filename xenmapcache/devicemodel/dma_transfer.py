"""DmaTransfer: one transfer of a DMA engine, from its submission to its end."""

from __future__ import annotations

import enum
import threading
from collections.abc import Awaitable, Callable
from time import monotonic

from ..cache import DmaDirection
from ..guest.scatter import Segments
from .gate import Transfer

Ranges = tuple[tuple[int, int], ...]
Result = int | None


class DmaStatus(enum.Enum):
    """How far a transfer has come.

    WAITING: accepted; it has no lease. RUNNING: its leases are being taken, held or released.
    DONE: its work has returned. FAILED: it could not be carried out. CANCELLED: the device was
    reset, or the engine or the server closed, before its end.
    """

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class DmaRecord:
    """A transfer as its engine keeps it. The handle that devices hold only points to it.

    Attributes:
        number, name, ranges, direction, error, result, segments: see DmaTransfer.
        work: what moves the data.
        on_end: is called at the end, or None.
        group: what it belongs to, or None.
        status: set only by the thread or task that has claimed it.
        since: when it was accepted or begun, as :func:`time.monotonic` counts.
        cancelled: it is not to be begun, and its end is not to be told.
        unclaimed: holds one token until a thread or task takes it.
        passage: through the server's gate, or None.
        carrier: the thread's number, or the task, that carries it out.
        thread_name: of that thread.
    """

    __slots__ = (
        "cancelled",
        "carrier",
        "direction",
        "error",
        "group",
        "name",
        "number",
        "on_end",
        "passage",
        "ranges",
        "result",
        "segments",
        "since",
        "status",
        "thread_name",
        "unclaimed",
        "work",
    )

    def __init__(
        self,
        number: int,
        name: str,
        ranges: Ranges,
        direction: DmaDirection,
        work: Callable[[Segments], Result | Awaitable[Result]],
        on_end: Callable[[DmaTransfer], object] | None,
        group: object = None,
    ) -> None:
        self.group = group
        self.number = number
        self.name = name
        self.ranges = ranges
        self.direction = direction
        self.work = work
        self.on_end = on_end
        self.status = DmaStatus.WAITING
        self.since = monotonic()
        self.error: BaseException | None = None
        self.result: Result = None
        self.segments: Segments | None = None
        self.cancelled = False
        self.unclaimed: list[None] = [None]
        self.passage: Transfer | None = None
        self.carrier: object = None
        self.thread_name = ""

    def claim(self) -> bool:
        """Return whether it is this caller's now; for one caller only."""
        try:
            self.unclaimed.pop()
        except IndexError:
            return False
        return True

    def is_wanted(self, group: object) -> bool:
        """Return whether a wait for a group has to wait for it.

        If it was cancelled and nobody has claimed it, it never begins. Its turn may come late,
        because the workers may be busy with transfers of other groups.
        """
        return self.group is group and not (self.cancelled and self.unclaimed)

    def begin(self) -> None:
        """Note that its leases are about to be taken."""
        self.since = monotonic()
        self.status = DmaStatus.RUNNING

    def carry_in_this_thread(self) -> None:
        """Note the thread that carries it out."""
        self.carrier = threading.get_ident()
        self.thread_name = threading.current_thread().name

    def is_cancelled(self) -> bool:
        """Return whether it is not to be begun, by now."""
        return self.cancelled

    @property
    def is_inside(self) -> bool:
        """Whether it may have leases."""
        passage = self.passage
        return passage is not None and passage.inside

    def __str__(self) -> str:
        size = sum(length for _, length in self.ranges)
        place = f" from {self.ranges[0][0]:#x}" if self.ranges else ""
        text = (
            f"transfer {self.number} of {self.name!r}, {self.direction.value}, {size} bytes "
            f"in {len(self.ranges)} ranges{place}: {self.status.value}"
        )
        if self.status in (DmaStatus.WAITING, DmaStatus.RUNNING):
            text += f" for {monotonic() - self.since:.1f} s"
        return f"{text} in thread {self.thread_name!r}" if self.thread_name else text


class DmaTransfer:
    """A transfer that a DMA engine has accepted; :meth:`DmaEngine.submit` returns one.

    Synchronization: read it in any thread. Only the engine changes it.
    """

    __slots__ = ("_record",)

    def __init__(self, record: DmaRecord) -> None:
        self._record = record

    def __repr__(self) -> str:
        return f"<{self._record}>"

    @property
    def number(self) -> int:
        """Counts the transfers of an engine, from 1 on."""
        return self._record.number

    @property
    def ranges(self) -> Ranges:
        """The ``(address, length)`` pairs that were submitted."""
        return self._record.ranges

    @property
    def direction(self) -> DmaDirection:
        """Which way the data goes."""
        return self._record.direction

    @property
    def status(self) -> DmaStatus:
        """How far it has come. DONE and FAILED are set before ``on_end`` is called."""
        record = self._record
        if record.cancelled and record.status is DmaStatus.WAITING:
            return DmaStatus.CANCELLED
        return record.status

    @property
    def error(self) -> BaseException | None:
        """Why it failed or was cancelled, or None. The log has the traceback."""
        return self._record.error

    @property
    def result(self) -> Result:
        """What the work has returned: how many bytes it moved, or None."""
        return self._record.result

    @property
    def segments(self) -> Segments | None:
        """The leases; None before they are taken. Not empty at the end if a release failed."""
        return self._record.segments
