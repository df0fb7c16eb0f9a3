"""Operations of a cache that is observed: the events that are seen say what it is like."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from tests.property.replay import Replay
from xenmapcache import CacheFullError, record
from xenmapcache.events import Event
from xenmapcache.observe.recorder import Recorder
from xenmapcache.observe.recording import read
from xenmapcache.stream import Observation

from . import caches
from .caches import BUCKET_SHIFT, PAGE, CacheWorld
from .injector import Outcome
from .world import Operation


class ObservedWorld(CacheWorld):
    """A cache, and a list of its events.

    Attributes:
        events: what the observer was called with. It is a list's method: an interrupt comes
            before or after it.
        observers: how many there are.
        attached: whether they still are: a MemoryError of an observer detaches it.
        observation, brief: an observer and a recorder that the operation made.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.events: list[Event] = []
        self.observation: Observation | None = None
        self.brief: Recorder | None = None
        self.observe()
        self.observers = len(self.cache.stream.observations)
        self.attached = True

    def observe(self) -> None:
        """Attach the observer."""
        self.cache.observe(self.events.append)

    def seen(self) -> list[Event]:
        """Return the events so far."""
        return self.events

    def check(self, outcome: Outcome) -> None:
        """Compare what follows from the events with what there is."""
        super().check(outcome)
        with self.noting("delivering"):
            self.cache.stats()
        self.attached = self.attached and len(self.cache.stream.observations) == self.observers
        if self.attached and not self.closed:
            self.check_events()

    def check_events(self) -> None:
        """Find events that are missing, double or out of order."""
        replay = Replay()
        for event in self.seen():
            with self.noting(f"a {type(event).__name__}"):
                replay(event)
        held = {info.id for info in self.cache.leases()}
        if replay.leases.keys() != held:
            self.problem("the events say that other leases are held")
        buckets = {index << BUCKET_SHIFT for index in self.cache._table.generation.buckets}
        if replay.buckets.keys() != buckets:
            self.problem("the events say that other buckets are mapped")

    def end(self) -> None:
        """Close, after which the events say that nothing is held."""
        super().end()
        if self.problems or not self.attached or self.handled == "close":
            return  # a lease that a call was about to release when it was closed ends after that
        replay = Replay()
        for event in self.seen():
            with self.noting(f"at the end, a {type(event).__name__}"):
                replay(event)
        if replay.leases or replay.buckets:
            self.problem("at the end, the events say that something is left")


class GuardedWorld(ObservedWorld):
    """A cache with two observers. The second one looks whether its thread holds a lock."""

    def observe(self) -> None:
        """Attach both."""
        super().observe()
        self.cache.observe(self.look)

    def look(self, event: Event) -> None:
        """Note that it is called where it must not be."""
        if self.cache._budget.is_inside():
            self.problem(f"an observer is told of {type(event).__name__} under a lock")


class RecordedWorld(ObservedWorld):
    """A cache that is recorded."""

    def observe(self) -> None:
        """Begin the recording."""
        self.path = self.folder / "recording"
        self.recorder: Recorder | None = record(self.cache, self.path, "1MiB")

    def seen(self) -> list[Event]:
        """Return what is in the file."""
        recording = read(self.path)
        events = list(recording)
        if recording.damaged:
            self.problem(f"the recording is damaged: {recording.examples}")
        return events

    def end(self) -> None:
        """Close the recorder, too."""
        super().end()
        if self.recorder is not None:
            self.recorder.detach()
        self.recorder = None


def lease_once(world: CacheWorld) -> None:
    """Take a lease and release it."""
    world.cache.map_dma(PAGE, 64, owner="interrupted").release()


def lease_again(world: CacheWorld) -> None:
    """Do it again."""
    if not world.closed:
        with world.noting("a second lease", CacheFullError):
            lease_once(world)


def close(world: ObservedWorld) -> None:
    """Close, whatever is held."""
    caches.close(world, force=True)


def observe(world: ObservedWorld) -> None:
    """Attach a further observer, and detach it."""
    world.observation = world.cache.observe(_ignore)
    world.observation.detach()


def observe_again(world: ObservedWorld) -> None:
    """Detach what was attached; then nobody else is."""
    if world.observation is not None:
        world.observation.detach()
    if not world.closed:
        with world.noting("a second observer"):
            observe(world)
    left = [each.observer for each in world.cache.stream.observations]
    if left != [world.events.append]:
        world.problem(f"observers are left: {left}")


def record_briefly(world: ObservedWorld) -> None:
    """Record one lease."""
    world.brief = record(world.cache, world.folder / "brief", "1MiB")
    with world.brief:
        lease_once(world)


def record_again(world: ObservedWorld) -> None:
    """Record another one: the file of the first is free."""
    if world.brief is not None:
        world.brief.detach()
    if world.closed:
        return  # a recorder leaves the stream of a closed cache alone
    left = [each.observer for each in world.cache.stream.observations]
    if left != [world.events.append]:
        world.problem(f"observers are left: {left}")
    with world.noting("a second recording"):
        record_briefly(world)
        recorded = Replay()
        for event in read(world.folder / "brief"):
            recorded(event)


def _ignore(event: Event) -> None:
    pass


# An Exception in the middle of an observer is taken for the observer's, which is detached. So
# "error", "allocation" and "depth" are left out.
HANDLERS: Final = (
    "interrupt", "read", "write", "evict", "invalidate", "close", "fork",
)  # fmt: skip


def operation(name: str, world: Any, act: Any, prepare: Any, again: Any) -> Operation:  # noqa: ANN401 - fields of Operation
    """Return a row of the table."""
    return Operation(name, world, act, HANDLERS, prepare, again)


OPERATIONS: Final = (
    operation("observe.lease-miss", ObservedWorld, lease_once, None, lease_again),
    operation("observe.lease-hit", ObservedWorld, lease_once, caches.once, lease_again),
    operation("observe.lease-two", GuardedWorld, lease_once, caches.fill, lease_again),
    operation("observe.lease-recorded", RecordedWorld, lease_once, caches.once, lease_again),
    operation(
        "observe.invalidate", ObservedWorld, caches.invalidate, caches.hold_all, caches.invalidate
    ),
    operation(
        "observe.invalidate-recorded",
        RecordedWorld,
        caches.invalidate,
        caches.hold_all,
        caches.invalidate,
    ),
    operation("observe.close-force", ObservedWorld, close, caches.hold_all, caches.close_again),
    operation("observe.detach", ObservedWorld, observe, caches.hold_all, observe_again),
    operation("observe.record", ObservedWorld, record_briefly, caches.once, record_again),
)
