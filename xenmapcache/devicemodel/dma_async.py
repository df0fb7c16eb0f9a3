"""AsyncDmaEngine: transfers between a device and guest memory, in an asyncio event loop."""

# Theory of operation
#
# The states of a transfer, and the rules, are those of `dma.py`; a runner, which is a task, stands
# for a worker. Everything happens in the thread of the event loop. So between two `await` nothing
# else runs, and `next`, `claim` and the end of a runner cannot overlap.
#
# A transfer that is cancelled while its work awaits gets CancelledError there. The runner catches
# it after the leases are released, and goes on with the next transfer. A CancelledError that
# nobody here has asked for ends the runner: the loop itself is ending.

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import Awaitable, Callable, Iterable
from typing import Self

from ..address import as_int
from ..cache import DmaDirection
from ..errors import ClosedError
from ..guest.scatter import Segments
from .dma_table import TransferTable, Wait
from .dma_transfer import DmaRecord, DmaTransfer, Result
from .server import IoreqServer

_HELD_S = 0.001
"""How often a runner looks whether an INVALIDATE, or the saving of the guest, is over."""


class AsyncDmaEngine:
    """Carries out a device's transfers in the event loop. Also an async context manager.

    As :class:`DmaEngine`, for a server that runs with :meth:`IoreqServer.serve_async`, and for
    work that awaits, such as a socket's. Its callback of :meth:`IoreqServer.on_quiesce` is
    ``async def``, so only ``serve_async`` can serve, and the guest cannot be saved with
    :meth:`IoreqServer.suspend`. For files take a :class:`DmaEngine`, which works there too.

    Args:
        server, name, limit, drain_timeout: as of :class:`DmaEngine`.
        concurrency: how many transfers run at the same time.

    Synchronization: the thread of the event loop.
    """

    def __init__(
        self,
        server: IoreqServer,
        *,
        name: str = "dma",
        concurrency: int = 32,
        limit: int = 256,
        drain_timeout: float = 5.0,
    ) -> None:
        if as_int("concurrency", concurrency) < 1:
            raise ValueError(f"concurrency must be at least 1 transfer, not {concurrency}")
        self._table = TransferTable(server, name, limit, drain_timeout)
        self._concurrency = concurrency
        self._runners: set[asyncio.Task[None]] = set()
        server.on_quiesce(self._quiesce)

    def __repr__(self) -> str:
        return repr(self._table)

    @property
    def transfers(self) -> tuple[DmaTransfer, ...]:
        """The transfers that have not ended, oldest first."""
        return tuple(map(DmaTransfer, [*self._table.live.values()]))

    @property
    def failures(self) -> int:
        """How many transfers have failed. The log has them, or their number."""
        return self._table.failures

    def submit(
        self,
        ranges: Iterable[tuple[int, int]],
        direction: DmaDirection | str,
        work: Callable[[Segments], Result | Awaitable[Result]],
        *,
        on_end: Callable[[DmaTransfer], object] | None = None,
        group: object = None,
    ) -> DmaTransfer:
        """Accept a transfer, without waiting; see :meth:`DmaEngine.submit`.

        Args:
            ranges: as there.
            direction: as there.
            work: is called with the leased :class:`Segments`; what it returns may be awaitable. The
                leases end with it, also if it is cancelled: a thread that it started must have
                ended by then.
            on_end: as there; a plain function.
            group: as there.

        Raises:
            QueueFullError, ClosedError, TypeError, ValueError: as there.
            RuntimeError: no event loop runs in this thread.
        """
        loop = asyncio.get_running_loop()
        record = self._table.make(ranges, direction, work, on_end, group)
        self._table.live[record.number] = record
        if len(self._runners) < self._concurrency:
            runner = loop.create_task(self._run())
            self._runners.add(runner)
            runner.add_done_callback(self._runners.discard)
        return DmaTransfer(record)

    async def _run(self) -> None:
        """Carry out transfers until none waits."""
        table = self._table
        while table.is_holding():
            record = None if table.is_suspended() else table.next()
            if record is None:
                await asyncio.sleep(_HELD_S)
            else:
                await self._carry_out(record)

    async def _carry_out(self, record: DmaRecord) -> None:
        """Do all of a transfer, in the runner that has claimed it."""
        table = self._table
        record.carrier = asyncio.current_task()
        try:
            if not record.cancelled:
                with table.passage(record):
                    await self._move(record)
                    table.settle(record)
        except ClosedError as error:
            record.error, record.cancelled = error, True
        finally:
            record.carrier = None
            table.finish(record)

    async def _move(self, record: DmaRecord) -> None:
        """Take the leases, await the work, and release the leases."""
        try:
            with self._table.begin(record) as segments:
                result = record.work(segments)
                record.result = await result if inspect.isawaitable(result) else result
                segments.release(written=record.result)
        except asyncio.CancelledError as error:
            record.error = error
            task = asyncio.current_task()
            if task is None or not record.cancelled:
                record.cancelled = True
                raise
            task.uncancel()
        except BaseException as error:
            record.error = error
            if not isinstance(error, Exception):
                self._table.settle(record)
                raise

    async def drain(self, timeout: float | None = None, *, group: object = None) -> None:
        """Wait until the transfers that were accepted have ended; see :meth:`DmaEngine.drain`.

        Raises:
            TimeoutError: some are still under way; the message names them.
        """
        await self._wait("drain", timeout, [*self._table.live.values()], group)

    def cancel(self, *, group: object = None) -> None:
        """Cancel all transfers, for a reset of the device. Can be repeated; does not wait.

        Those that have not begun never begin. The work of those under way gets CancelledError
        where it awaits, before any other of its code runs. No ``on_end`` of theirs is called.

        Args:
            group: cancel only the transfers that were submitted with this object.
        """
        self._interrupt(self._table.cancel(group))

    @staticmethod
    def _interrupt(records: list[DmaRecord]) -> None:
        for record in records:
            if isinstance(record.carrier, asyncio.Task):
                record.carrier.cancel()

    async def close(self) -> None:
        """Accept no further transfers, wait until those under way have ended; can be repeated.

        What is still under way after ``drain_timeout`` is cancelled.

        Raises:
            TimeoutError: as :meth:`drain`.
        """
        self._table.closed = True
        try:
            await self.drain()
        finally:
            self._interrupt(self._table.end())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _quiesce(self) -> None:
        """Have no lease from here until the mappings are dropped: the server's callback."""
        await self._wait("INVALIDATE", None, self._table.hold())

    async def _wait(
        self,
        purpose: str,
        timeout: float | None,
        accepted: list[DmaRecord],
        group: object = None,
    ) -> None:
        changed = asyncio.Event()
        task = asyncio.current_task()
        wait = Wait(self._table, purpose, timeout, accepted, task, changed.set, group)
        self._table.waits.append(wait)
        try:
            while pause := wait.pause():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await changed.wait()
                changed.clear()
        finally:
            self._table.waits.remove(wait)
