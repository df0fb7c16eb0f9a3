"""DmaEngine: transfers between a device and guest memory, in threads of their own."""

# Theory of operation
#
# A transfer (`DmaRecord`) is in one of these states:
#
#   waiting    in `live`; its token is in `unclaimed`. It has no lease.
#   claimed    a worker has the token. It waits at the server's gate while the guest is saved.
#   inside     through the gate: the worker takes the leases, calls the work, releases the leases,
#              sets the status, calls `on_end`, and leaves the gate
#   ended      not in `live`
#
#   waiting --a worker takes the token--> claimed --gate--> inside --> ended (done, failed)
#      ^--- a hold began in between ---------'  '--cancelled, or the server is closed--> ended
#
# Who may change what
#   1. A transfer is accepted by `submit`: one call into C stores it, wakes a worker, and starts
#      one if fewer than `workers` run. No signal handler runs in between. So after an interrupt
#      a transfer was not accepted, or a worker carries it out.
#   2. From the claim on, only the worker that claimed a transfer changes it. A worker is never
#      the main thread, so a signal handler never interrupts one. The worker that takes leases
#      releases them, in one `with` block.
#   3. Every other thread stores only `cancelled = True`, and waits.
#
# Races, and what decides them
#   - A submission and the end of the last worker. The worker puts its token back, and looks at
#     `live` again. `submit` stores the transfer, and then looks for a token.
#   - An INVALIDATE and a submission in another thread. `hold` notes which transfers were
#     accepted; later ones do not begin until the cache has dropped its mappings, which its
#     number of invalidations tells. A worker claims first and then looks at the hold, `hold`
#     stores first and then looks at the claims: so one of them sees the other.
#   - A drain and `suspend`. Transfers that are held at the gate have no leases. So while the
#     server is suspended a drain waits only for those inside.
#   - A reset and the end of a transfer. `cancel` sets the mark, and then waits for the worker. An
#     `on_end` that had begun returns before `cancel` does; no other one is called.
#
# Waits, and their ends
#   a worker for a transfer    `_IDLE_S`; then the thread ends, and the next submission starts one
#   a worker at the gate       `resume()` or `close()` of the server
#   a worker for an INVALIDATE     until the mappings are dropped, or the server is closed
#   drain, cancel, close       `drain_timeout`; then TimeoutError, which names the transfers

from __future__ import annotations

import _thread
import contextlib
import queue
import threading
from collections.abc import Callable, Iterable
from functools import partial
from operator import call
from typing import Self

from ..address import as_int
from ..cache import DmaDirection
from ..cache.starting import start_once
from ..errors import ClosedError
from ..guest.scatter import Segments
from .dma_table import TransferTable, Wait
from .dma_transfer import DmaRecord, DmaTransfer, Result
from .server import IoreqServer

_IDLE_S = 5.0
"""How long a worker without work waits before it ends."""
_HELD_S = 0.001
"""How often a worker looks whether an INVALIDATE is over."""

_call: Callable[[Callable[[], object]], object] = call
_Done = list[object]  # a name, because a test puts a list there that is interrupted


class DmaEngine:
    """Carries out a device's transfers in worker threads. Also a context manager.

    The engine takes the leases of a transfer, calls its work with them, and releases them. It
    registers itself with :meth:`IoreqServer.on_quiesce`: no lease is held while an INVALIDATE
    drops the mappings, and accepted transfers end before the server does. Transfers wait while
    the guest is saved.

        engine = DmaEngine(server, name="disk0")
        engine.submit(ranges, "from-device", partial(Segments.read_from, fd=fd, offset=0), on_end=f)

    Args:
        server: whose guest's memory is transferred, through the server's cache.
        name: the device's, for reports: the owner of the leases.
        workers: how many transfers run at the same time. With one, they run in order.
        limit: how many transfers may be under way, so that a guest cannot fill this process's
            memory. A transfer is under way until its ``on_end`` has returned, although the guest
            may submit the next one earlier, after an interrupt.
        drain_timeout: how long an INVALIDATE, :meth:`drain`, :meth:`cancel` and :meth:`close` wait
            for transfers, in seconds. Keep it below the server's ``quiesce_timeout``, because
            ``server.close()`` gives up a callback that takes longer.

    Synchronization: any thread, handlers included. Work and ``on_end`` run in workers, several at
    a time if there are several workers.
    """

    def __init__(
        self,
        server: IoreqServer,
        *,
        name: str = "dma",
        workers: int = 1,
        limit: int = 256,
        drain_timeout: float = 5.0,
    ) -> None:
        if as_int("workers", workers) < 1:
            raise ValueError(f"workers must be at least 1 thread, not {workers}")
        self._table = TransferTable(server, name, limit, drain_timeout)
        self._workers = workers
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._idle: list[None] = [None] * workers
        self._start = partial(_thread.start_new_thread, self._run, ())
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

    # --- submission -----------------------------------------------------------------------------

    def submit(
        self,
        ranges: Iterable[tuple[int, int]],
        direction: DmaDirection | str,
        work: Callable[[Segments], Result],
        *,
        on_end: Callable[[DmaTransfer], object] | None = None,
        group: object = None,
    ) -> DmaTransfer:
        """Accept a transfer, without waiting.

        If the transfer itself fails, for example because the guest chose an address without
        memory, nothing is raised here: the transfer's status becomes FAILED.

        Args:
            ranges: ``(address, length)`` pairs. They may be hostile; limit their number.
            direction: of the data, as for :meth:`MapCache.map_dma`.
            work: is called with the leased :class:`Segments`. It returns how many bytes it wrote
                to guest memory, from the first one on: only their pages are reported dirty. None
                if all may have been written. It must leave no view in use.
            on_end: is called with the transfer once its leases are released, DONE or FAILED: tell
                the guest, and raise the interrupt. It is not called for CANCELLED.
            group: what the transfer belongs to, such as a queue, for :meth:`drain` and
                :meth:`cancel`.

        Raises:
            QueueFullError: ``limit`` transfers are under way.
            ClosedError: the server is not open, or the engine is closed.
            RuntimeError: no thread can be started.
            TypeError, ValueError: an argument is wrong.
        """
        table = self._table
        record = table.make(ranges, direction, work, on_end, group)
        accepted = self._accept(record)
        if not accepted and len(self._idle) == self._workers and record.claim():
            table.finish(record)
            raise RuntimeError(f"{table}: no thread can be started for {record}")
        return DmaTransfer(record)

    def _accept(self, record: DmaRecord) -> bool:
        """Store a transfer, and have a worker for it; return whether there is one.

        All of it is one call into C; see rule 1 above.
        """
        done = _Done()
        store = partial(self._table.live.__setitem__, record.number, record)
        steps: tuple[Callable[[], object], ...] = (
            store,
            partial(self._wake.put, None),
            self._idle.pop,
            self._start,
        )
        try:
            done.extend(map(_call, steps))
        except IndexError:
            if len(done) != 2:
                raise  # a signal handler's
        except RuntimeError:
            if len(done) != 3:
                raise
            return False
        finally:
            if len(done) == 3:
                self._idle.append(None)
        return True

    # --- workers --------------------------------------------------------------------------------

    def _run(self) -> None:
        threading.current_thread().name = f"{self._table.name} worker"
        try:
            while self._serve():
                pass
        except BaseException as error:
            self._table.died(error)
        finally:
            self._idle.append(None)
        # What was accepted before the token was back has found none.
        if self._table.is_holding():
            start_once(self._idle, self._run)

    def _serve(self) -> bool:
        """Carry out a transfer, or wait for one; return whether to go on."""
        table = self._table
        record = table.next()
        if record is not None:
            self._carry_out(record)
            return True
        held = table.is_holding()
        if table.closed and not held:
            return False
        try:
            self._wake.get(timeout=_HELD_S if held else _IDLE_S)
        except queue.Empty:
            return held
        return True

    def _carry_out(self, record: DmaRecord) -> None:
        """Do all of a transfer, in the worker that has claimed it."""
        table = self._table
        record.carry_in_this_thread()
        try:
            if record.is_cancelled():
                return
            with table.passage(record):  # waits while the guest is saved
                if record.is_cancelled():
                    return
                try:
                    with table.begin(record) as segments:
                        record.result = record.work(segments)  # type: ignore[assignment] # not awaited here
                        segments.release(written=record.result)
                except BaseException as error:
                    record.error = error
                table.settle(record)
        except ClosedError as error:
            record.error, record.cancelled = error, True
        finally:
            table.finish(record)

    # --- waiting --------------------------------------------------------------------------------

    def drain(self, timeout: float | None = None, *, group: object = None) -> None:
        """Wait until the transfers that were accepted have ended. Can be repeated.

        While the server is suspended it waits only for those that have leases. A transfer's own
        work and ``on_end`` do not wait for themselves.

        Args:
            timeout: in seconds; by default ``drain_timeout``.
            group: wait only for the transfers that were submitted with this object.

        Raises:
            TimeoutError: some are still under way; the message names them.
        """
        self._wait("drain", timeout, [*self._table.live.values()], group)

    def cancel(self, timeout: float | None = None, *, group: object = None) -> None:
        """Cancel all transfers, for a reset of the device. Can be repeated.

        Those that have not begun never begin. Those under way end, because Python cannot interrupt
        a thread; this waits for them. When it returns, no lease is held, and no ``on_end`` of
        theirs is called any longer.

        Args:
            timeout: in seconds; by default ``drain_timeout``.
            group: cancel only the transfers that were submitted with this object.

        Raises:
            TimeoutError: some are still under way; the message names them. They are cancelled, but
                an ``on_end`` may be running.
        """
        self._wait("cancel", timeout, self._table.cancel(group), group)

    def close(self) -> None:
        """Accept no further transfers, and wait until those under way have ended. Can be repeated.

        What has not begun after ``drain_timeout``, or waits because the guest is being saved, is
        cancelled.

        Raises:
            TimeoutError: some are still under way; the message names them.
        """
        self._table.closed = True
        try:
            self.drain()
        finally:
            self._table.end()
            for _ in range(self._workers):
                self._wake.put(None)  # workers that have nothing to do end now

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _quiesce(self) -> None:
        """Have no lease from here until the mappings are dropped: the server's callback."""
        self._wait("INVALIDATE", None, self._table.hold())

    def _wait(
        self,
        purpose: str,
        timeout: float | None,
        accepted: list[DmaRecord],
        group: object = None,
    ) -> None:
        changed: queue.SimpleQueue[None] = queue.SimpleQueue()
        wake = partial(_put_once, changed)
        me = threading.get_ident()
        wait = Wait(self._table, purpose, timeout, accepted, me, wake, group)
        try:
            self._table.waits.append(wait)
            while pause := wait.pause():
                with contextlib.suppress(queue.Empty):
                    changed.get(timeout=pause)
        finally:
            with contextlib.suppress(ValueError):
                self._table.waits.remove(wait)


def _put_once(changed: queue.SimpleQueue[None]) -> None:
    """Wake a waiter; one that an interrupt has left in the list collects no more than this."""
    if changed.empty():
        changed.put(None)
