"""Foreign code that runs for long: who says so, and who gives it up.

Python cannot interrupt a handler that never returns. But a thread can say which one it is, and
once the server is to be closed, it can answer the vCPUs in its place. Both is done by a
thread. It is started with the first handler, and ends when it looks and no handler runs: so a
server that has nothing to do has no such thread.
"""

# Theory of operation
#
# A signal handler may raise, close the server or fork while this starts or wakes the thread. So
# nothing here uses `threading.Thread` or `threading.Event`, which take locks in Python code. The
# right to run a thread is a token in a list. Taking it and starting the thread are one call into
# C, and no signal handler runs in between. The thread waits at a C queue. It puts the token back
# when no handler runs, and looks again: a handler that began in between has found no token.
# A thread that was stopped keeps the token: no other one starts.

from __future__ import annotations

import contextlib
import logging
import queue
from collections.abc import Callable
from functools import partial
from time import monotonic

from ..cache import MapCache
from ..cache.starting import start_once
from ..logs import safely
from .dispatch import Job

logger = logging.getLogger("xenmapcache.devicemodel")

_FIRST_S, _NEXT_S = 1.0, 10.0
"""Seconds after which a handler is named, and the interval of the next warnings."""
_MAX_LEASES = 8
"""Leases that one warning names."""


class Watcher:
    """Names foreign code that runs for long, and gives it up at a deadline.

    Args:
        domid: for messages.
        cache: whose leases are named.
        current: returns the job that runs now, or None.
        give_up: is called once the deadline has passed and foreign code still runs.

    Attributes:
        deadline: when to give up, as :func:`time.monotonic` counts; None for never.
        stop: ends the thread soon. It is C code: nothing interrupts it. It does not wait for the
            thread, because that may be the caller.
    """

    def __init__(
        self,
        domid: int,
        cache: MapCache,
        current: Callable[[], Job | None],
        give_up: Callable[[], None],
    ) -> None:
        self.deadline: float | None = None
        self._domid = domid
        self._cache = cache
        self._current = current
        self._give_up = give_up
        self._idle: list[None] = [None]
        self._look: queue.SimpleQueue[bool] = queue.SimpleQueue()  # whether to end
        self.stop = partial(self._look.put, True)

    def begin(self) -> None:
        """Make sure that a thread looks at the job that has just begun."""
        start_once(self._idle, self._run)

    def give_up_at(self, deadline: float | None) -> None:
        """Set the deadline; None takes it back."""
        self.deadline = deadline
        if deadline is not None:
            self._look.put(False)

    def _run(self) -> None:
        named: Job | None = None
        due = 0.0
        while True:
            job = self._current()
            if job is None:
                self._idle.append(None)
                if self._current() is not None:
                    self.begin()
                return
            now = monotonic()
            if job is not named:
                named, due = job, job.since + _FIRST_S
            if now >= due:
                self._name(job, now - job.since)
                due = now + _NEXT_S
            if self.deadline is not None and now >= self.deadline:
                self._give_up()
                return
            until = due if self.deadline is None else min(due, self.deadline)
            with contextlib.suppress(queue.Empty):
                if self._look.get(timeout=max(until - now, 0.001)):
                    return

    def _name(self, job: Job, seconds: float) -> None:
        safely(
            logger.warning,
            "domain %d: %s has run for %.1f s%s; leases held: %s",
            self._domid,
            describe(job),
            seconds,
            "; its vCPU waits" if job.request is not None and job.request.vcpu is not None else "",
            leases_of(self._cache),
        )


def describe(job: Job) -> str:
    """Return the foreign code of a job in words."""
    name = getattr(job.calling, "__qualname__", None) or repr(job.calling)
    subject = f" for {job.request}" if job.request is not None else ""
    return f"{name}{subject}"


def leases_of(cache: MapCache) -> str:
    """Return the leases that are held, in words."""
    leases: list[str] = ["unknown"]
    with contextlib.suppress(Exception):
        leases = [repr(lease) for lease in cache.leases()]
    shown = ", ".join(leases[:_MAX_LEASES]) or "none"
    more = len(leases) - _MAX_LEASES
    return f"{shown} and {more} more" if more > 0 else shown
