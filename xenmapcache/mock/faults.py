"""FaultPlan: which calls fail or are slow, and the log of all calls about a domain."""

from __future__ import annotations

import errno as _errno
import math
import threading
import time
from collections import deque
from typing import NamedTuple

from ..address import as_int
from ..errors import XenCallError

CALLS = ("map", "remap", "mark_dirty", "create_ioreq_server", "claim", "bind")
"""The calls that can be made to fail."""
_LOG_LENGTH = 1 << 16


class Call(NamedTuple):
    """A call that the mock received. ``errno`` is 0 if it succeeded; gfn is None for an unmap."""

    name: str
    gfn: int | None
    pages: int
    errno: int


class InjectedFault:
    """A fault that waits for its call."""

    __slots__ = ("call", "calls_to_pass", "delay", "errno", "gfn", "repeat")

    def __init__(
        self, call: str, errno: int, nth: int, gfn: int | None, delay: float, repeat: bool
    ) -> None:
        self.call, self.errno, self.gfn = call, errno, gfn
        self.delay, self.repeat = delay, repeat
        self.calls_to_pass = nth - 1

    def concerns(self, call: str, gfn: int, count: int) -> bool:
        """Return whether the fault is for a call about some pages."""
        return self.call == call and (self.gfn is None or gfn <= self.gfn < gfn + count)


class FaultPlan:
    """The injected faults of a domain, and the log of calls.

    Args:
        domid: the domain, for errors.

    Synchronization: all methods may be called in any threads and signal handlers.
    """

    def __init__(self, domid: int) -> None:
        self._domid = domid
        self._lock = threading.RLock()
        self._faults: list[InjectedFault] = []
        self._log: deque[tuple[str, int | None, int, int]] = deque(maxlen=_LOG_LENGTH)

    @property
    def pending(self) -> tuple[InjectedFault, ...]:
        """The faults that have not happened yet, and those that repeat."""
        return tuple(self._faults)

    @property
    def calls(self) -> tuple[Call, ...]:
        """The last 65,536 calls, in order."""
        return tuple(map(Call._make, self._log.copy()))

    def inject(
        self,
        call: str,
        *,
        errno: int = 0,
        nth: int = 1,
        gfn: int | None = None,
        delay: float = 0.0,
        repeat: bool = False,
    ) -> None:
        """Make a call fail, or slow; see :meth:`.MockDomain.inject_fault`."""
        if call not in CALLS:
            raise ValueError(f"call {call!r} must be one of {CALLS}")
        nth, errno = as_int("nth", nth), as_int("errno", errno)
        if nth < 1:
            raise ValueError(f"nth must be at least 1, not {nth}: calls are counted from 1")
        if errno and errno not in _errno.errorcode:
            raise ValueError(f"errno {errno} must be one of this system's, which are positive")
        if not (math.isfinite(delay) and 0 <= delay <= threading.TIMEOUT_MAX):
            raise ValueError(f"delay must be a number of seconds from 0 on, not {delay}")
        if not errno and not delay:
            raise ValueError(
                f"a fault of {call!r} needs an errno to fail with, or a delay; it has neither"
            )
        gfn = None if gfn is None else as_int("gfn", gfn)
        self._faults.append(InjectedFault(call, errno, nth, gfn, delay, repeat))

    def clear(self) -> None:
        """Forget all injected faults."""
        self._faults.clear()

    def note(self, call: str, gfn: int | None, pages: int, errno: int = 0) -> None:
        """Append a call to the log."""
        self._log.append((call, gfn, pages, errno))

    def apply(self, call: str, gfn: int = 0, count: int = 1) -> dict[int, int]:
        """Apply the injected faults to a call: be slow, raise, or return the errno of single pages.

        Raises:
            XenCallError: a fault was injected.
        """
        if not self._faults:
            return {}
        page_errors = {}
        errno = 0
        delay = 0.0
        with self._lock:
            for fault in list(self._faults):
                if not fault.concerns(call, gfn, count):
                    continue
                if fault.calls_to_pass:
                    fault.calls_to_pass -= 1
                    continue
                if not fault.repeat and fault in self._faults:
                    self._faults.remove(fault)
                delay += fault.delay
                if fault.gfn is not None and call == "map" and fault.errno:
                    page_errors[fault.gfn] = fault.errno
                else:
                    errno = errno or fault.errno
        if delay:
            time.sleep(delay)
        if errno:
            raise self.failed(call, gfn, count, errno, "injected")
        return page_errors

    def failed(self, call: str, gfn: int, count: int, errno: int, hint: str) -> XenCallError:
        """Log a call that failed, and return its error."""
        self.note(call, gfn, count, errno)
        return XenCallError(f"mock_{call}", self._domid, errno, hint)
