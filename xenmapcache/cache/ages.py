"""DMA leases that are held for too long: a WARNING names each one, once, while it is held."""

# Theory of operation
#
# A thread sleeps until a lease may be too old, and ends when it looks and no lease can become so.
# The next lease starts another one. It sleeps before it looks for the first time, and never less
# than a tenth of the age between two looks: so however many leases come and go, an age sees at
# most ten looks, and one thread started.
#
# The thread has a weak reference to the registry. When the registry dies, the reference's callback
# (a method in C) wakes the thread, which ends. Without that hint it ends at its next look.
#
# The right to run the thread is a token in a list. Taking it and starting the thread are one call
# into C, and no signal handler runs in between. The thread puts the token back before it ends, and
# looks again: a lease that was granted in between has found no token. In a forked child there is
# neither a thread nor a token; nobody misses them, because the child takes no leases.

from __future__ import annotations

import logging
import queue
import threading
import time
import weakref
from collections.abc import Callable

from ..logs import safely
from .info import LeaseKind
from .registry import LeaseRegistry
from .starting import start_once

logger = logging.getLogger("xenmapcache")
_DMA = LeaseKind.DMA
_LOOKS = 10
"""How many looks there are at most while a lease grows too old."""


def check_age(warn_age: float) -> float:
    """Return an age in seconds as a float.

    Raises:
        TypeError: it is not a number.
        ValueError: it is not above 0, or longer than a thread can wait.
    """
    if isinstance(warn_age, bool) or not isinstance(warn_age, int | float):
        raise TypeError(f"warn_age must be a number of seconds, not {type(warn_age).__name__}")
    if not 0 < warn_age <= threading.TIMEOUT_MAX:
        raise ValueError(
            f"warn_age must be above 0 and at most {threading.TIMEOUT_MAX:.0f} seconds, "
            f"not {warn_age!r}"
        )
    return float(warn_age)


class AgeWatch:
    """Warns of DMA leases that are held for longer than an age.

    Args:
        registry: of the leases; only a weak reference to it is kept.
        warn_age: in seconds.
        clock: what counts the leases' ages.

    Synchronization: any thread may call :meth:`begin`.
    """

    def __init__(
        self,
        registry: LeaseRegistry,
        warn_age: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.warn_age = check_age(warn_age)
        self._clock = clock
        self._wake: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._registry = weakref.ref(registry, self._wake.put)
        self._idle: list[None] = [None]

    def begin(self) -> None:
        """Make sure that a thread looks at the lease that was just granted.

        If no thread can be started, the lease is granted all the same; the next one tries again.
        """
        start_once(self._idle, self._run)

    def look(self) -> float | None:
        """Warn of each DMA lease that is too old by now, once. For one thread at a time.

        Returns:
            Seconds until another one that is held is too old; None if there is none.
        """
        registry = self._registry()
        if registry is None or registry.table.forked:
            return None
        now = self._clock()
        for record in registry.held(_DMA):
            if now - record.since >= self.warn_age and not record.aged:
                record.aged = True
                if record.view is not None:  # or another thread has released it
                    info = record.info(registry.table.generation.sequence)
                    text = "held for longer than warn_age, %g s: %s"
                    safely(logger.warning, text, self.warn_age, info)  # the others get theirs
        return self._due(registry, now)

    def _due(self, registry: LeaseRegistry, now: float) -> float | None:
        """Return the seconds until the next lease is too old that no WARNING has named, or None."""
        since = [record.since for record in registry.held(_DMA) if not record.aged]
        return min(since) + self.warn_age - now if since else None

    def _run(self) -> None:
        pause = self.warn_age
        try:
            while not self._ended(pause):
                due = self.look()
                if due is None:
                    break
                pause = max(due, self.warn_age / _LOOKS)
        finally:
            self._idle.append(None)
        registry = self._registry()
        if registry is not None and self._due(registry, self._clock()) is not None:
            self.begin()

    def _ended(self, seconds: float) -> bool:
        """Wait; return whether the registry has died."""
        try:
            self._wake.get(timeout=seconds)
        except queue.Empty:
            return False
        return True
