"""A stream of events: who has something to tell puts it in, and observers get it."""

# Theory of operation
#
# A step changes the state first, and then looks whether there is an observer. Its event goes into
# one queue for each observer (`put`), whatever lock the step holds. When the thread holds no lock
# any more, it hands over what is queued (`deliver`). So an observer runs after the step.
#
#   1. An event is put into all queues in one call into C, and what it is about is marked as told
#      right before. It is taken from a queue and handed over in one call, too. No signal handler
#      comes between: an interrupt neither loses an event nor hands it over twice.
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
#   6. A QueueObserver takes events from its queue itself, when it has done with them. If it is the
#      only observer, it may offer a shortcut: the most frequent events go past the queue. A
#      shortcut stores and marks without a call in between, takes no lock and calls no code of
#      others. So it is used under any lock, in any thread and in signal handlers. (Only with a GIL,
#      under which no thread comes between bytecodes that call nothing.) An observer that attaches
#      first unsets the shortcut, and then collects what is so already. A step that has found the
#      shortcut before that has changed the state before that, too: rule 4 holds.

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from itertools import repeat, starmap
from typing import Any, Final, Protocol, Self, TypeAlias
from weakref import WeakSet

from .events import WALL_CLOCK_OFFSET_NS, Event, EventsLost
from .logs import safely

Observer: TypeAlias = Callable[[Event], object]

new_hooks: list[Callable[[Callable[[Observer], Observation]], object]] = []
"""Functions to call with the method ``observe`` of each new cache and server, when it is ready."""

MAX_QUEUED = 10_000
"""How many events may wait for one observer."""

HAS_GIL: Final = getattr(sys, "_is_gil_enabled", lambda: True)()
"""Whether no other thread runs between two bytecodes that call nothing."""

logger = logging.getLogger("xenmapcache")


class Subject(Protocol):
    """What an event may be about.

    Attributes:
        told: whether observers know of it; None if it has ended before they did.
    """

    told: bool | None


class _Nothing:
    """The subject of an event that nobody asks about later."""

    __slots__ = ("told",)

    told: bool | None


_NOTHING: Final = _Nothing()
_NOTHING.told = True


class Shortcut:
    """What stores the most frequent events by their values: no event is made, and none is queued.

    Each function takes a subject and the values of the event's attributes in their order. It stores
    the event and marks the subject as :meth:`EventStream.put` does, and returns True. Or it returns
    False and has done nothing: something is queued that comes first, or there is no room. Then the
    event goes through the queue. What a signal handler raises leaves it, whatever the exception is,
    and so does a MemoryError; then, too, it has done nothing.

    Attributes:
        taken: stores a :class:`.LeaseTaken`, and marks the lease as known.
        released: stores a :class:`.LeaseReleased`, and marks the lease as not known.
        dirtied: stores a :class:`.PagesDirtied`. It has no subject, and takes the values alone.
    """

    __slots__ = ("dirtied", "released", "taken")

    def __init__(
        self,
        taken: Callable[[Subject, tuple[Any, ...]], bool],
        released: Callable[[Subject, tuple[Any, ...]], bool],
        dirtied: Callable[[tuple[Any, ...]], bool],
    ) -> None:
        self.taken = taken
        self.released = released
        self.dirtied = dirtied


class QueueObserver:
    """An observer that takes several events at once from the queue where they wait for it.

    Attributes:
        drain: takes events from the left of a queue until it is empty, and returns True; or returns
            False if it cannot now, and will do so later. An event leaves the queue in the moment
            when it has been handled, so that an interrupt loses none. It may be called inside of
            itself, and in several threads at once.
        shortcut: makes the shortcut past a queue; None if there is none.
    """

    __slots__ = ("drain", "shortcut")

    def __init__(
        self,
        drain: Callable[[deque[Event]], bool],
        shortcut: Callable[[deque[Event]], Shortcut] | None = None,
    ) -> None:
        self.drain = drain
        self.shortcut = shortcut

    def __call__(self, event: Event) -> None:
        """Take one event."""
        self.drain(deque((event,)))


class Observation:
    """An observer that is attached to a stream. Also a context manager, which detaches it.

    Attributes:
        observer: what is called with each event.

    Synchronization: any thread, signal handler or finalizer may detach it, the observer too.
    """

    __slots__ = ("_stream", "drain", "lost", "observer", "queue", "ready", "shortcut", "step")

    def __init__(self, stream: EventStream, observer: Observer) -> None:
        self._stream = stream
        self.observer = observer
        self.queue: deque[Event] = deque()
        self.lost = 0
        self.ready = False
        self.drain: Callable[[deque[Event]], bool] | None = None
        self.shortcut: Shortcut | None = None
        if isinstance(observer, QueueObserver):
            self.drain = observer.drain
            if observer.shortcut is not None:
                self.shortcut = observer.shortcut(self.queue)
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
    It delivers when it holds no lock any more (:meth:`deliver`). If it has one of the most frequent
    events, it tries the shortcut first.

    Attributes:
        observations: who observes; empty without observers, and then nothing is to be put.
        guards: each tells whether this thread may not run an observer now.
        shortcut: of the only observer, if it has one; otherwise None.

    Synchronization: any thread.
    """

    __slots__ = (
        "__weakref__",
        "_demoted",
        "_pending",
        "_sole",
        "_thread",
        "_turn",
        "guards",
        "observations",
        "shortcut",
    )

    def __init__(self) -> None:
        self.observations: dict[Observation, None] = {}
        self.guards: list[Callable[[], bool]] = []
        self._turn = threading.RLock()
        self._thread: int | None = None  # which delivers
        self._pending = False  # whether something may be queued
        self._sole: Observation | None = None  # if there is no other one
        self.shortcut: Shortcut | None = None
        self._demoted = False  # whether these two were unset, and may be set again
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
            self._sole = self.shortcut = None
            observation.queue.extendleft(reversed([*snapshot()]))
            observation.ready = True
            self._pending = True
            self._choose_sole()
            self.deliver()
        except BaseException:
            self.remove(observation)
            raise
        return observation

    def remove(self, observation: Observation) -> None:
        """Do not call an observer again."""
        # Nothing here calls: no signal handler comes between.
        if observation in self.observations:
            del self.observations[observation]
        self._sole = self.shortcut = None
        observation.ready = False
        observation.queue.clear()
        self._choose_sole()

    def _choose_sole(self) -> None:
        for observation in tuple(self.observations):
            only = {observation: None}
            # Below, no other thread comes between the comparison and the stores.
            ready = HAS_GIL and observation.ready and not observation.lost
            if ready and self.observations == only:
                self._sole = observation
                self.shortcut = observation.shortcut

    def put(self, event: Event, subject: Subject = _NOTHING, known: bool = True) -> None:
        """Queue an event for each observer. Takes no lock and calls no code of others.

        Args:
            event: what has happened.
            subject: what it is about, which is marked in the moment when the event is queued.
            known: the mark: whether observers know of it from then on. An event that says that it
                has ended is left out if they do not know it, and then they are not to hear of it:
                a signal handler ended it right before its first event.
        """
        sole = self._sole
        if sole is not None and len(sole.queue) < MAX_QUEUED:
            self._pending = True
            if subject.told is not None if known else subject.told:
                subject.told = known
                sole.queue.append(event)
            elif not known:
                subject.told = None
            return
        queues = []
        for observation in tuple(self.observations):
            if len(observation.queue) >= MAX_QUEUED and observation.ready:
                observation.lost += 1  # no call in here: no other thread counts in between
                self._sole = self.shortcut = None
                self._demoted = True
                continue
            if observation.lost:
                self._tell_lost(observation)
            queues.append(observation.queue)
        appended = map(_append, queues, repeat(event))
        self._pending = True
        if subject.told is not None if known else subject.told:
            subject.told = known
            _consume(appended)
        elif not known:
            subject.told = None
        self._pending = True  # after the event: who clears it looks at the queues afterwards

    @staticmethod
    def _tell_lost(observation: Observation) -> None:
        lost = observation.lost
        event = EventsLost(now(), lost)
        if lost and observation.lost == lost:  # otherwise another call has told
            observation.lost = 0
            observation.queue.append(event)

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
            complete = postponed = False
            try:
                if not self._turn.acquire(blocking=False):
                    complete = True  # the thread that has the turn looks again
                    return
                self._thread = me
                self._pending = False
                for observation in tuple(self.observations):
                    try:
                        if observation.drain is not None:
                            if observation.queue and observation.ready:
                                postponed |= not observation.drain(observation.queue)
                        else:
                            while observation.queue and observation.ready:
                                next(observation.step)
                        if observation.lost and observation.ready and not observation.queue:
                            self._pending = True  # for the loss is the next event
                            self._tell_lost(observation)
                    except Exception as error:
                        if observation.ready:  # otherwise it was detached, and has no queue left
                            self._expel(observation, error)
                    except BaseException as error:
                        interrupt = interrupt or error
                if interrupt is not None:
                    raise interrupt
                if postponed:
                    return
                if self._demoted:
                    self._demoted = False
                    self._choose_sole()
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
        self._sole = self.shortcut = None
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
_append = deque[Event].append
_consume = deque[object](maxlen=0).extend
_streams: WeakSet[EventStream] = WeakSet()


def _after_fork_in_child() -> None:
    for stream in list(_streams):
        stream.forget()


os.register_at_fork(after_in_child=_after_fork_in_child)
