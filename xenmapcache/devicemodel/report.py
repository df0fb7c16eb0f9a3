"""What the log says of failures, and how often.

A guest chooses how often it does something wrong. So a region's lines are limited, and the next
line says how many were left out. Log handlers and filters are code of others: what they raise
ends here, because an answer must not depend on them.
"""

from __future__ import annotations

import logging
import traceback
from collections import deque
from time import monotonic
from typing import cast

from ..errors import FaultError
from ..events import RequestHandled
from ..ioreq import Request
from ..logs import safely
from ..stream import now
from .dispatch import Job, QuiesceError, RequestError

logger = logging.getLogger("xenmapcache.devicemodel")

_BURST = 5
"""Lines of one region in one interval."""
_INTERVAL_S = 10.0
_MAX_CODE_LINES = 1000
"""Lines of code whose traceback was logged and that are remembered."""


def handled(job: Job, vcpu: int, began: int) -> RequestHandled:
    """Return the event of a job that has a request, and that was carried out or has failed."""
    request = cast(Request, job.request)
    error = job.error
    kind = "" if isinstance(error, RequestError) else f"{type(error).__name__}: "
    return RequestHandled(
        began,
        vcpu,
        request.kind,
        request.is_read,
        request.address,
        request.size,
        now() - began,
        None if error is None else f"{kind}{error}",
        None if job.region is None else repr(job.region),
    )


class Tally:
    """What a server has done; it outlives the connection.

    Attributes:
        requests: how many requests were answered or carried out.
        buffered_requests: how many of them came through the ring, which needs no answer.
        failures: how many of them failed.
        lost_answers: how many answers no vCPU took before the server was destroyed.
    """

    __slots__ = ("buffered_requests", "failures", "lost_answers", "requests")

    def __init__(self) -> None:
        self.requests = self.buffered_requests = 0
        self.failures = 0
        self.lost_answers = 0


class _Budget:
    """How many lines one region may still log."""

    __slots__ = ("left", "omitted", "until")

    def __init__(self) -> None:
        self.left, self.omitted, self.until = 0, 0, 0.0


class FailureLog:
    """The log of a server's failures.

    Attributes:
        waiting: failures that were counted and not logged yet.

    Synchronization: one thread at a time.
    """

    def __init__(self, domid: int, tally: Tally) -> None:
        self.waiting: deque[tuple[Job, Exception]] = deque()
        self._domid = domid
        self._tally = tally
        self._budgets: dict[str, _Budget] = {}
        self._code_lines: set[tuple[str, int]] = set()

    def note(self, job: Job, error: Exception) -> None:
        """Count a failure now, and log it with the next :meth:`report`."""
        job.error = error
        self._tally.failures += len(error.failures) if isinstance(error, QuiesceError) else 1
        self.waiting.append((job, error))

    def report(self) -> None:
        """Log each failure: one line, and a traceback for each new line of code."""
        while self.waiting:
            job, error = self.waiting.popleft()
            if isinstance(error, QuiesceError):
                for callback, each in error.failures:
                    self.line("on_quiesce", f"on_quiesce: {callback!r} failed", each)
            else:
                region = repr(job.region) if job.region is not None else "no region"
                self.line(region, f"{job.request or 'buffered ring'}: failed", error)

    def line(
        self, region: str, text: str, error: BaseException, level: int = logging.ERROR
    ) -> None:
        """Log a failure, unless its region has logged too many."""
        traced = self._is_new(error)
        omitted = self._admit(region, traced)
        if omitted is None:
            return
        kind = "" if isinstance(error, RequestError) else f"{type(error).__name__}: "
        more = f" ({omitted} more failures of {region} were not logged)" if omitted else ""
        safely(
            logger.log,
            level,
            "domain %d: %s: %s%s%s",
            self._domid,
            text,
            kind,
            error,
            more,
            exc_info=error if traced else None,
        )

    def flush(self) -> None:
        """Log how many failures were not logged."""
        for region, budget in list(self._budgets.items()):
            if budget.omitted:
                safely(
                    logger.error,
                    "domain %d: %d more failures of %s were not logged",
                    self._domid,
                    budget.omitted,
                    region,
                )
                budget.omitted = 0

    def _is_new(self, error: BaseException) -> bool:
        """Return whether a traceback is worth its lines: a handler's bug, not seen before."""
        if isinstance(error, RequestError | FaultError):
            return False
        trace = traceback.extract_tb(error.__traceback__)
        place = (trace[-1].filename, trace[-1].lineno or 0) if trace else ("", 0)
        if place in self._code_lines or len(self._code_lines) >= _MAX_CODE_LINES:
            return False
        self._code_lines.add(place)
        return True

    def _admit(self, region: str, always: bool) -> int | None:
        """Return how many lines were left out before this one; None to leave it out, too."""
        budget = self._budgets.setdefault(region, _Budget())
        now = monotonic()
        if now >= budget.until:
            budget.left, budget.until = _BURST, now + _INTERVAL_S
        if budget.left <= 0 and not always:
            budget.omitted += 1
            return None
        budget.left -= 1
        omitted, budget.omitted = budget.omitted, 0
        return omitted
