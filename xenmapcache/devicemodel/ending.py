"""The end of a connection: in order, or given up because foreign code never returns."""

from __future__ import annotations

import atexit
import logging
import os
import time
from collections.abc import Callable
from functools import partial

from ..cache import MapCache
from ..errors import XenMapCacheError
from ..ioreq import State
from ..logs import safely
from .channel import Channel
from .connection import Connection
from .dispatch import GuestError, Job, default_answer
from .watch import describe, leases_of

logger = logging.getLogger("xenmapcache.devicemodel")

_TRIES = 3
"""How often a step is done that signal handlers interrupt."""
_TAKE_S = 1.0
"""How long a vCPU of a domain that runs may take to see its answer."""
_REPORT_S = 1.0
"""How long a close waits for a log line that another thread writes."""
_GIVEN_UP = "given up"


class Ending:
    """Ends connections of one server.

    Args:
        domid: for messages.
        cache: dropped before the vCPUs are answered.
        answer_timeout: how long an answer waits for its vCPU before the server goes, in seconds.
        on_end: is called when the server is destroyed.

    Synchronization: under the server's lock, but for :meth:`give_up`.
    """

    def __init__(
        self, domid: int, cache: MapCache, answer_timeout: float, on_end: Callable[[], None]
    ) -> None:
        self._domid = domid
        self._cache = cache
        self._answer_timeout = answer_timeout
        self._on_end = on_end
        self._pid = os.getpid()
        self._may_give_up: list[bool] = [True]  # popped by the one thread that does it
        self._reports: list[Callable[[], None]] = []  # popped by the one thread that writes it
        self._reported = False

    def close(self, connection: Connection) -> list[BaseException]:
        """Get no further requests, carry out those that wait, and destroy the server.

        A step that a signal handler interrupts is done again. So one interrupt neither leaves a
        server behind nor loses a request.

        Returns:
            What went wrong, interrupts included.
        """
        errors: list[BaseException] = []
        for _ in range(_TRIES):
            try:
                self._close(connection, errors)
            except BaseException as error:
                errors.append(error)  # a signal handler's, between two steps
                continue
            break
        return errors

    def _close(self, connection: Connection, errors: list[BaseException]) -> None:
        for step in (
            connection.disable,
            connection.bind,
            connection.settle,
            connection.calls.quiesce,
            partial(self._answer_all, connection),
            partial(self._wait_until_taken, connection),
            partial(self._destroy, connection),
        ):
            if connection.closed:  # a handler has closed it
                break
            if os.getpid() != self._pid:
                return  # a child that a handler has just forked
            _insist(step, errors)

    def _destroy(self, connection: Connection) -> None:
        try:
            connection.link.close()
        except XenMapCacheError:
            connection.destroyed = True  # as far as it can be
            raise
        connection.destroyed = True

    def _answer_all(self, connection: Connection) -> None:
        """Answer each vCPU that still waits: its own handler may have called ``close``."""
        errors: list[Exception] = []
        for channel in connection.all_channels():
            try:
                self._answer_abandoned(connection, channel)
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def _answer_abandoned(self, connection: Connection, channel: Channel) -> None:
        """Answer for a handler that was interrupted, or that closes the server itself."""
        state = channel.slot.state
        if state == State.NONE:
            return
        if state == State.READY:
            channel.job = Job(channel.slot.request())
            channel.slot.begin()
            state = channel.slot.state
        if state != State.INPROCESS:
            channel.notify()
            return
        job = channel.job
        if job is None:
            job = channel.job = Job(channel.slot.request())
        if job.running or not job.calls:
            connection.calls.log.note(job, GuestError("it was given up before it was carried out"))
        connection.answer(channel, job)

    def _wait_until_taken(self, connection: Connection) -> None:
        """Wait until the vCPUs have taken their answers: destroying the server loses them.

        A paused vCPU takes its answer when the domain continues. So the limit is the caller's
        while the domain is paused, or while nobody can say whether it is.
        """
        start = running = time.monotonic()
        while (waiting := _untaken(connection)) and (
            waited := time.monotonic() - start
        ) < self._answer_timeout:
            # In most cases the answers have been taken long before that.
            if waited >= _TAKE_S and connection.link.paused is not False:
                running = time.monotonic()  # a vCPU that continues needs a moment, too
            if time.monotonic() - running >= _TAKE_S:
                break
            time.sleep(0.001 if waited < 0.1 else 0.02)
        if waiting:
            connection.tally.lost_answers += waiting
            connection.tally.failures += waiting
            safely(
                logger.warning,
                "domain %d: answers lost, because their vCPUs did not take them in %.1f s: %d; %s",
                self._domid,
                time.monotonic() - start,
                waiting,
                "its vCPUs did not run in that time"
                if connection.link.paused is False
                else "unpause the domain before the server is closed",
            )

    # --- giving up ------------------------------------------------------------------------------

    def give_up(self, connection: Connection) -> None:
        """Close the server while a handler that never returns holds the server's lock.

        Mappings are dropped, each vCPU is answered with all ones, and the server is destroyed.
        Its pages stay mapped, because that handler may return after all.
        """
        try:
            self._may_give_up.pop()
        except IndexError:
            return  # another thread does it
        # The end of Python does not wait for the watcher's thread.
        atexit.register(self.wait_for_report)
        job = connection.current
        connection.closed = True
        errors: list[Exception] = []
        channels = connection.all_channels()
        steps: list[Callable[[], object]] = [
            connection.disable,
            self._cache.invalidate,
            *(partial(self._give_up_on, connection, channel) for channel in channels),
            partial(self._wait_until_taken, connection),
            partial(connection.link.close, unmap=False),
            self._on_end,
        ]
        for step in steps:
            try:
                step()
            except Exception as error:
                errors.append(error)
        connection.kept_pages = True  # not before the last look at them
        connection.destroyed = True
        connection.calls.watcher.stop()
        self._reports.append(partial(self._log_given_up, job, errors))
        self._report()

    def _log_given_up(self, job: Job | None, errors: list[Exception]) -> None:
        safely(
            logger.error,
            "domain %d: the ioreq server was closed while foreign code still runs: %s; "
            "leases held: %s%s",
            self._domid,
            describe(job) if job is not None else "nothing",
            leases_of(self._cache),
            "".join(f"; {error}" for error in errors),
        )

    def _report(self) -> None:
        """Write the log line of :meth:`give_up`, unless another thread does it."""
        try:
            report = self._reports.pop()
        except IndexError:
            return
        try:
            report()
        finally:
            self._reported = True
            atexit.unregister(self.wait_for_report)

    def wait_for_report(self) -> None:
        """Return when the log has the line of :meth:`give_up`, if that was called.

        A log handler that does not return is not waited for.
        """
        end = time.monotonic() + _REPORT_S
        while not (self._may_give_up or self._reported or time.monotonic() >= end):
            if os.getpid() != self._pid:
                return  # the thread is the parent's
            self._report()
            time.sleep(0.001)

    def _give_up_on(self, connection: Connection, channel: Channel) -> None:
        """Answer one vCPU with all ones, unless its handler's thread answers it."""
        slot, job = channel.slot, channel.job
        if slot.state == State.READY:
            job = channel.job = Job(slot.request())
            slot.begin()
        if slot.state == State.INPROCESS:
            if job is not None and job.answerer.setdefault("who", _GIVEN_UP) is not _GIVEN_UP:
                end = time.monotonic() + _TAKE_S
                while slot.state == State.INPROCESS and time.monotonic() < end:
                    time.sleep(0.001)
            if slot.state == State.INPROCESS:
                connection.tally.requests += 1
                connection.tally.failures += 1
                slot.answer(default_answer(slot.request()))
        if slot.state != State.NONE:
            channel.notify()


def _untaken(connection: Connection) -> int:
    channels = connection.all_channels()
    return sum(channel.slot.state == State.RESPONSE_READY for channel in channels)


def _insist(step: Callable[[], object], errors: list[BaseException]) -> None:
    """Do a step, and do it again if a signal handler interrupts it."""
    for _ in range(_TRIES):
        try:
            step()
        except XenMapCacheError as error:
            errors.append(error)
        except BaseException as error:
            errors.append(error)
            continue
        return
