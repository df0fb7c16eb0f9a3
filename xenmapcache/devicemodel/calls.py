"""Foreign code that a server calls: which runs now, for how long, and what it raises."""

# Theory of operation
#
# Handlers, callbacks and log handlers are foreign code. Each runs for a job. A handler may serve
# its own server, so that another handler runs further down its stack: the jobs form a chain
# (`current`, `Job.outer`). Each frame restores what it found, so that one interrupted frame
# leaves nothing behind.

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from ..cache import MapCache
from ..stream import now
from .dispatch import Dispatcher, Job, RequestError
from .report import FailureLog, Tally, handled
from .watch import Watcher


class CallChain:
    """The handlers and callbacks of one connection that run.

    Args:
        domid: for messages.
        cache: whose leases the watcher names.
        dispatcher: what requests do.
        tally: counts the failures.
        give_up: is called if foreign code still runs at the watcher's deadline.

    Attributes:
        current: the job whose handler runs, or None. The innermost one, if several do.
        thread: the thread that runs it, or that has run the last one.
        watcher: names what runs for long.
        log: of what foreign code raised.

    Synchronization: under the server's lock; any thread may look at ``current``.
    """

    def __init__(
        self,
        domid: int,
        cache: MapCache,
        dispatcher: Dispatcher,
        tally: Tally,
        give_up: Callable[[], None],
    ) -> None:
        self.current: Job | None = None
        self.thread: int | None = None
        self.watcher = Watcher(domid, cache, lambda: self.current, give_up)
        self.log = FailureLog(domid, tally)
        self._dispatcher = dispatcher

    def is_running(self, job: Job | None) -> bool:
        """Return whether a handler that runs further up this stack serves a job."""
        each = self.current
        while each is not None:
            if each is job:
                return True
            each = each.outer
        return False

    def run(self, job: Job, vcpu: int) -> None:
        """Carry out a job; what its handler raises is kept in it."""
        outer = self.current
        job.outer = outer
        job.attempts += 1
        began = now() if self._dispatcher.stream.observations else None
        complete = False
        try:
            self.current = job
            self.watcher.begin()
            self._dispatcher.perform(job)
            complete = True
        except Exception as error:
            if not (job.running or isinstance(error, RequestError)):
                raise  # a signal handler's, while no handler ran
            self.log.note(job, error)
            complete = True
        finally:
            self.current = outer
            if began is not None and (complete or job.calls):
                self.tell_handled(job, vcpu, began)

    def tell_handled(self, job: Job, vcpu: int, began: int) -> None:
        """Tell the observers of a request, once."""
        told, job.told = job.told, True
        if not told and job.request is not None:
            self._dispatcher.stream.put(handled(job, vcpu, began))

    def quiesce(self) -> None:
        """Call the callbacks of on_quiesce, outside of a request."""
        outer, thread = self.current, self.thread
        job = Job(None)
        try:
            self.thread = threading.get_ident()
            job.outer = outer
            self.current = job
            self.watcher.begin()
            self._dispatcher.quiesce(job)
        except RequestError as error:
            self.log.note(job, error)
        finally:
            self.current, self.thread = outer, thread

    async def quiesce_async(self, job: Job) -> None:
        """Await the callbacks of on_quiesce."""
        outer = self.current
        job.outer = outer
        try:
            self.thread = threading.get_ident()
            self.current = job
            self.watcher.begin()
            await self._dispatcher.quiesce_async(job)
        except RequestError as error:
            self.log.note(job, error)
        finally:
            self.current = outer

    def report(self) -> None:
        """Log the failures; log handlers are foreign code as well."""
        outer, thread = self.current, self.thread
        job = Job(None)
        job.calling = logging.Logger.handle
        try:
            self.thread = threading.get_ident()
            self.current = job
            self.log.report()
        finally:
            self.current, self.thread = outer, thread
