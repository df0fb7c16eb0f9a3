"""A stream of events: who has something to tell puts it in, and observers get it."""

# Theory of operation
#
# A step changes the state first, and then looks whether there is an observer. Its event goes into
# one queue for each observer (`put`), whatever lock the step holds. When the thread holds no lock
# any more, it hands over what is queued (`deliver`). So an observer runs after the step.
#
#   1. An event is taken from a queue and handed over in one call into C. No signal handler comes
#      between the two: an interrupt neither loses an event nor hands it over twice.
#   2. One thread at a time delivers: the one that has `_turn`. It looks again after it has given
#      that up, because another thread may have put an event in and found the turn taken.
#   3. A thread that delivers already (in an observer that uses the cache, in a signal handler, in
#      a finalizer) only queues. So does one for which a guard says that it holds a lock, or is
#      inside of an operation: the end of that operation delivers.
#   4. An observer that is attached first gets what is so already. It observes before that is
#      collected. So what changes in between may be told twice, and nothing is left out.
#   5. An observer that raises an Exception is detached. Other exceptions, such as
#      KeyboardInterrupt, are not its fault: the other observers get their events, then it is raised
#      where the operation was called. The operation itself is complete.

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from itertools import repeat, starmap
from typing import Self, TypeAlias
from weakref import WeakSet

from .events import WALL_CLOCK_OFFSET_NS, Event, EventsLost
from .logs import safely

Observer: TypeAlias = Callable[[Event], object]

new_hooks: list[Callable[[Callable[[Observer], Observation]], object]] = []
"""Functions to call with the method ``observe`` of each new cache and server, when it is ready."""

MAX_QUEUED = 10_000
"""How many events may wait for one observer."""

logger = logging.getLogger("xenmapcache")


class Observation:
    """An observer that is attached to a stream. Also a context manager, which detaches it.

    Attributes:
        observer: what is called with each event.

    Synchronization: any thread, signal handler or finalizer may detach it, the observer too.
    """

    __slots__ = ("_stream", "lost", "observer", "queue", "ready", "step")

    def __init__(self, stream: EventStream, observer: Observer) -> None:
        self._stream = stream
        self.observer = observer
        self.queue: deque[Event] = deque()
        self.lost = 0
        self.ready = False
        # Its `next` takes an event from the queue and hands it over, in one call into C.
        self.step = map(observer, starmap(self.queue.popleft, repeat(())))

    def detach(self) -> None:
        """Deliver what is queued, then do not call the observer again. Idempotent; any thread.

        If another thread delivers at this moment, or this one is inside of an operation, what is
        queued is dropped. A call that has begun in another thread may still run.
        """
        try:
            self._stream.deliver()
        finally:
            self._stream.remove(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


class EventStream:
    """Hands events to observers.

    A step puts its event into the queues when it is done, whatever lock it holds (:meth:`put`).
    It delivers when it holds no lock any more (:meth:`deliver`).

    Attributes:
        observations: who observes; empty without observers, and then nothing is to be put.
        guards: each tells whether this thread may not run an observer now.

    Synchronization: any thread.
    """

    __slots__ = ("__weakref__", "_pending", "_thread", "_turn", "guards", "observations")

    def __init__(self) -> None:
        self.observations: dict[Observation, None] = {}
        self.guards: list[Callable[[], bool]] = []
        self._turn = threading.RLock()
        self._thread: int | None = None  # which delivers
        self._pending = False  # whether something may be queued
        _streams.add(self)

    def attach(
        self, observer: Observer, snapshot: Callable[[], Iterable[Event]] = tuple
    ) -> Observation:
        """Have a function called with what is so already, then with each event from now on.

        Args:
            observer: the function.
            snapshot: returns what it is to know first.

        Raises:
            TypeError: it cannot be called.
        """
        if not callable(observer):
            raise TypeError(f"observer {observer!r} cannot be called")
        observation = Observation(self, observer)
        try:
            self.observations[observation] = None
            observation.queue.extendleft(reversed([*snapshot()]))
            observation.ready = True
            self._pending = True
            self.deliver()
        except BaseException:
            self.remove(observation)
            raise
        return observation

    def remove(self, observation: Observation) -> None:
        """Do not call an observer again."""
        self.observations.pop(observation, None)
        observation.ready = False
        observation.queue.clear()

    def put(self, event: Event) -> None:
        """Queue an event for each observer. Takes no lock and calls no code of others."""
        for observation in tuple(self.observations):
            if len(observation.queue) >= MAX_QUEUED and observation.ready:
                observation.lost += 1  # no call in here: no other thread counts in between
                continue
            if observation.lost:
                self._tell_lost(observation)
            observation.queue.append(event)
        self._pending = True  # after the event: who clears it looks at the queues afterwards

    @staticmethod
    def _tell_lost(observation: Observation) -> None:
        lost, observation.lost = observation.lost, 0
        if lost:
            observation.queue.append(EventsLost(now(), lost))

    def deliver(self) -> None:
        """Hand over what is queued, unless that is being done already or this is not the time.

        Raises:
            BaseException: other than an Exception, of a signal handler that came to an observer.
        """
        me = _ident()
        while self._pending and self._thread != me:
            for guard in self.guards:
                if guard():
                    return
            interrupt: BaseException | None = None
            complete = False
            try:
                if not self._turn.acquire(blocking=False):
                    complete = True  # the thread that has the turn looks again
                    return
                self._thread = me
                self._pending = False
                for observation in tuple(self.observations):
                    try:
                        while observation.queue and observation.ready:
                            next(observation.step)
                        if observation.lost and observation.ready:
                            self._pending = True  # for the loss is the next event
                            self._tell_lost(observation)
                    except Exception as error:
                        if observation.ready:  # otherwise it was detached, and has no queue left
                            self._expel(observation, error)
                    except BaseException as error:
                        interrupt = interrupt or error
                if interrupt is not None:
                    raise interrupt
                complete = True
            finally:
                del interrupt  # its traceback holds this frame
                if not complete:
                    self._pending = True
                if self._thread == me:
                    self._thread = None
                try:  # noqa: SIM105 - one call into C, which nothing interrupts
                    self._turn.release()
                except RuntimeError:  # it is another thread's turn
                    pass

    def _expel(self, observation: Observation, error: Exception) -> None:
        self.remove(observation)
        safely(logger.warning, "observer %r is detached: %r", observation.observer, error)

    def forget(self) -> None:
        """In a forked child: the observers are the parent's."""
        self.observations.clear()
        self._turn = threading.RLock()
        self._thread = None


def now() -> int:
    """Return the time of an event that happens now, in ns."""
    return time.monotonic_ns() + WALL_CLOCK_OFFSET_NS


def announce(observe: Callable[[Observer], Observation]) -> None:
    """Tell each of :data:`new_hooks` of a new cache or server. What one raises is logged.

    The cache or server is made all the same, whatever a hook or a log handler does.
    """
    for hook in tuple(new_hooks):
        try:
            hook(observe)
        except Exception as error:
            safely(logger.error, "new_hooks: %r failed", hook, exc_info=error)


_ident = threading.get_ident
_streams: WeakSet[EventStream] = WeakSet()


def _after_fork_in_child() -> None:
    for stream in list(_streams):
        stream.forget()


os.register_at_fork(after_in_child=_after_fork_in_child)
