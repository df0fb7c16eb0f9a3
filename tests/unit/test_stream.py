"""The stream: observers come and go, raise, are interrupted, and use what they observe."""

from __future__ import annotations

import logging
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator

import pytest

from tests.fake_xen.child import in_child
from xenmapcache import stream as module
from xenmapcache.events import CacheClosed, CacheOpened, Event, EventsLost
from xenmapcache.stream import EventStream, QueueObserver, Shortcut, announce, new_hooks


def event(number: int) -> Event:
    return CacheClosed(number)


def times(events: list[Event]) -> list[int | None]:
    return [each.time for each in events if isinstance(each, CacheClosed)]


class Interrupt(BaseException):
    """As KeyboardInterrupt, which pytest would take for the user's."""


@pytest.fixture
def stream() -> EventStream:
    return EventStream()


def tell(stream: EventStream, *numbers: int) -> None:
    for number in numbers:
        stream.put(event(number))
    stream.deliver()


def test_several_observers_in_order(stream: EventStream) -> None:
    """Each gets all events from its attachment to its end, in order."""
    first: list[Event] = []
    second: list[Event] = []
    with stream.attach(first.append) as observation:
        tell(stream, 1, 2)
        with stream.attach(second.append):
            stream.put(event(3))
        observation.detach()
        tell(stream, 4)
    observation.detach()
    assert times(first) == [1, 2, 3]
    assert times(second) == [3]
    assert not stream.observations


def test_what_cannot_be_called(stream: EventStream) -> None:
    with pytest.raises(TypeError, match="cannot be called"):
        stream.attach(3)  # type: ignore[arg-type] # that is the test
    assert not stream.observations


def test_what_is_so_already_comes_first(stream: EventStream) -> None:
    """Also before what is put in while it is collected; and if that fails, nobody is attached."""
    got: list[Event] = []

    def snapshot() -> Iterator[Event]:
        yield CacheOpened(1, 2)
        tell(stream, 3)

    stream.attach(got.append, snapshot)
    assert got == [CacheOpened(1, 2), event(3)]

    def broken() -> Iterator[Event]:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        stream.attach(got.append, broken)
    assert len(stream.observations) == 1


def test_one_that_detaches_itself(stream: EventStream) -> None:
    """It is not called again, even if more is queued."""
    got: list[Event] = []
    others: list[Event] = []

    def observe(each: Event) -> None:
        got.append(each)
        observation.detach()

    observation = stream.attach(observe)
    stream.attach(others.append)
    tell(stream, 1, 2)
    assert (times(got), times(others)) == ([1], [1, 2])


def test_one_that_raises(stream: EventStream, caplog: pytest.LogCaptureFixture) -> None:
    """It is detached with a WARNING, and disturbs nobody."""

    def broken(each: Event) -> None:
        raise ValueError("broken")

    got: list[Event] = []
    stream.attach(broken)
    stream.attach(got.append)
    tell(stream, 1, 2)
    assert times(got) == [1, 2]
    assert len(stream.observations) == 1
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "is detached: ValueError('broken')" in caplog.text


@pytest.mark.parametrize("shown", [True, False])
def test_logging_that_raises_too(
    stream: EventStream,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    shown: bool,
) -> None:
    """As logging would do it: it is printed, unless that is switched off."""

    def broken(*_: object) -> None:
        raise ValueError("broken")

    got: list[Event] = []
    monkeypatch.setattr(module.logger, "warning", broken)
    monkeypatch.setattr(logging, "raiseExceptions", shown)
    stream.attach(broken)
    stream.attach(got.append)
    tell(stream, 1)
    assert times(got) == [1]
    assert ("ValueError: broken" in capsys.readouterr().err) == shown


def test_an_interrupt_of_an_observer(stream: EventStream) -> None:
    """The others get the event; then it is raised; who was interrupted stays attached."""
    got: list[Event] = []
    others: list[Event] = []

    def interrupted(each: Event) -> None:
        got.append(each)
        if len(got) == 1:
            raise Interrupt

    stream.attach(interrupted)
    stream.attach(others.append)
    stream.put(event(1))
    stream.put(event(2))
    with pytest.raises(Interrupt):
        stream.deliver()
    assert (times(got), times(others)) == ([1], [1, 2])
    tell(stream, 3)
    assert (times(got), times(others)) == ([1, 2, 3], [1, 2, 3])


def test_an_observer_that_causes_events(stream: EventStream) -> None:
    """They are queued, and come when it has returned."""
    order: list[object] = []

    def observe(each: Event) -> None:
        order.append(("begin", each.time))  # type: ignore[union-attr] # all here have one
        if len(order) < 4:
            tell(stream, 2)
        order.append(("end", each.time))  # type: ignore[union-attr] # as above

    stream.attach(observe)
    tell(stream, 1)
    assert (
        order
        == [("begin", 1), ("end", 1), ("begin", 2), ("end", 2), ("begin", 2), ("end", 2)][
            : len(order)
        ]
    )
    assert len(order) >= 4


def test_a_guard(stream: EventStream) -> None:
    """While this thread holds a lock, events are queued only."""
    got: list[Event] = []
    lock = threading.RLock()
    stream.guards.append(lock._is_owned)  # type: ignore[attr-defined] # as the cache asks
    stream.attach(got.append)
    with lock:
        tell(stream, 1)
        assert not got
    stream.deliver()
    assert times(got) == [1]


def test_a_signal_handler_in_an_observer(stream: EventStream) -> None:
    """What it puts in comes after what the observer has now."""
    order: list[object] = []

    def observe(each: Event) -> None:
        order.append(each)
        if each == event(1):
            signal.raise_signal(signal.SIGUSR1)
        order.append(each)

    former = signal.signal(signal.SIGUSR1, lambda *_: tell(stream, 2))
    try:
        stream.attach(observe)
        tell(stream, 1)
    finally:
        signal.signal(signal.SIGUSR1, former)
    assert order == [event(1), event(1), event(2), event(2)]


def test_a_queue_that_is_full(stream: EventStream, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit is counted where it is missing."""
    monkeypatch.setattr(module, "MAX_QUEUED", 2)
    got: list[Event] = []
    busy = [True]
    stream.attach(got.append)
    stream.guards.append(lambda: busy[0])
    tell(stream, 1, 2, 3, 4)
    busy[0] = False
    stream.deliver()
    tell(stream, 5)
    assert times(got) == [1, 2, 5]
    lost = got[2]
    assert isinstance(lost, EventsLost)
    assert lost.lost == 2


def test_room_again_before_a_delivery(stream: EventStream, monkeypatch: pytest.MonkeyPatch) -> None:
    """An observer that is called makes room: what it causes then follows the loss."""
    monkeypatch.setattr(module, "MAX_QUEUED", 2)
    got: list[Event] = []

    def observe(each: Event) -> None:
        got.append(each)
        if each == event(1):
            tell(stream, 3, 4, 5)
        elif each == event(2):
            tell(stream, 6)

    stream.attach(observe)
    tell(stream, 1, 2)
    assert times(got) == [1, 2, 3, 6]
    assert [each.lost for each in got if isinstance(each, EventsLost)] == [2]


def test_many_threads(stream: EventStream) -> None:
    """No event is lost or stays queued, and each thread's order is kept."""
    got: list[Event] = []
    stream.attach(got.append)
    barrier = threading.Barrier(4)

    def work(first: int) -> None:
        barrier.wait()
        for number in range(first, first + 1000):
            tell(stream, number)
            if number % 100 == 0:
                stream.attach(lambda each: None).detach()

    threads = [threading.Thread(target=work, args=(1000 * each,)) for each in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [time for time in times(got) if time is not None]
    assert sorted(found) == list(range(4000))
    for first in range(0, 4000, 1000):
        mine = [number for number in found if first <= number < first + 1000]
        assert mine == sorted(mine)


def test_a_delivery_in_another_thread(stream: EventStream) -> None:
    """This thread only queues; the other one looks again and finds it."""
    got: list[Event] = []
    begun, go_on = threading.Event(), threading.Event()

    def observe(each: Event) -> None:
        got.append(each)
        begun.set()
        go_on.wait(10)

    stream.attach(observe)
    thread = threading.Thread(target=tell, args=(stream, 1))
    thread.start()
    assert begun.wait(10)
    tell(stream, 2)
    assert times(got) == [1]
    go_on.set()
    thread.join()
    assert times(got) == [1, 2]


def test_an_event_that_comes_as_the_turn_ends(stream: EventStream) -> None:
    """Who finds the turn taken relies on its owner, who looks again."""
    got: list[Event] = []
    stream.attach(got.append)

    class Turn:
        def __init__(self) -> None:
            self.left = 1

        def acquire(self, blocking: bool) -> bool:
            return True

        def release(self) -> None:
            if self.left:
                self.left -= 1
                stream.put(event(2))  # as a thread that found it taken

    stream._turn = Turn()  # type: ignore[assignment] # a stand-in
    tell(stream, 1)
    assert times(got) == [1, 2]


def test_a_forked_child(stream: EventStream) -> None:
    """It has no observers: they are the parent's."""
    got: list[Event] = []
    stream.attach(got.append)

    def work() -> bool:
        assert not stream.observations
        tell(stream, 1)
        stream.attach(got.append)
        tell(stream, 2)
        return times(got) == [2]

    assert in_child(work) == 0
    tell(stream, 3)
    assert times(got) == [3]
    stream.forget()
    assert not stream.observations


def test_hooks(stream: EventStream, caplog: pytest.LogCaptureFixture) -> None:
    """Each is called; one that raises is logged."""
    got: list[Event] = []

    def broken(_: object) -> None:
        raise ValueError("broken")

    hooks = [broken, lambda observe: observe(got.append)]
    new_hooks[:0] = hooks
    try:
        announce(stream.attach)
    finally:
        del new_hooks[: len(hooks)]
    tell(stream, 1)
    assert times(got) == [1]
    assert "new_hooks" in caplog.text
    assert "ValueError: broken" in caplog.text


def test_who_detaches_itself_may_raise(
    stream: EventStream, caplog: pytest.LogCaptureFixture
) -> None:
    """It is detached already, so no WARNING names it."""
    got: list[Event] = []

    def leave(each: Event) -> None:
        observation.detach()
        raise ValueError("as I leave")

    observation = stream.attach(leave)
    stream.attach(got.append)
    tell(stream, 1, 2)
    assert times(got) == [1, 2]
    assert caplog.messages == []


def test_a_loss_is_told_once(stream: EventStream) -> None:
    """Two threads that see it do not tell it twice."""
    got: list[Event] = []
    observation = stream.attach(got.append)
    observation.lost = 3
    for _ in range(2):
        stream._tell_lost(observation)
    tell(stream, 1)
    assert [each.lost for each in got if isinstance(each, EventsLost)] == [3]


class Broken(logging.Filter):
    """What a program adds to the log may raise."""

    def filter(self, record: logging.LogRecord) -> bool:
        raise RuntimeError("the filter is broken")


def test_a_hook_and_a_log_filter_that_raise(
    stream: EventStream, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cache is made all the same, and the next hook is called."""
    got: list[object] = []
    hooks = [lambda observe: observe(1 // 0), got.append]
    new_hooks[:0] = hooks
    logger, broken = logging.getLogger("xenmapcache"), Broken()
    logger.addFilter(broken)
    try:
        announce(stream.attach)
    finally:
        logger.removeFilter(broken)
        del new_hooks[: len(hooks)]
    assert got == [stream.attach]
    assert "the filter is broken" in capsys.readouterr().err


class Drainer(QueueObserver):
    """Takes events until it is told not to.

    Attributes:
        got: the events.
        work: is called before each, once.
        busy: it cannot take any now.
    """

    def __init__(self, shortcut: Callable[[deque[Event]], Shortcut] | None = None) -> None:
        super().__init__(self.take, shortcut)
        self.got: list[Event] = []
        self.work: Callable[[], object] | None = None
        self.busy = False

    def take(self, queue: deque[Event]) -> bool:
        while queue and not self.busy:
            work, self.work = self.work, None
            if work is not None:
                work()
            self.got.append(queue.popleft())
        return not self.busy


class Told:
    """What an event is about."""

    told: bool | None = False


def test_one_that_takes_from_the_queue(stream: EventStream) -> None:
    """Alone or with another one, it gets what is put in, in order."""
    drainer = Drainer()
    others: list[Event] = []
    drainer(event(0))
    with stream.attach(drainer):
        stream.put(event(1))
        tell(stream, 2)
        with stream.attach(others.append):
            tell(stream, 3)
            tell(stream, 4)
        tell(stream, 5)
    tell(stream, 6)
    assert (times(drainer.got), times(others)) == ([0, 1, 2, 3, 4, 5], [3, 4])


def test_one_that_is_busy(stream: EventStream, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its events wait, and too many are counted; then it is as before."""
    monkeypatch.setattr(module, "MAX_QUEUED", 3)
    drainer = Drainer()
    stream.attach(drainer)
    drainer.busy = True
    for number in range(5):
        tell(stream, number)
    drainer.busy = False
    stream.deliver()
    (lost,) = [each for each in drainer.got if isinstance(each, EventsLost)]
    assert (times(drainer.got), lost.lost) == ([0, 1, 2], 2)
    assert stream._sole is not None
    tell(stream, 5)
    assert drainer.got[-1] == event(5)


@pytest.mark.parametrize("error", [Interrupt, ValueError])
def test_one_that_fails_on_the_way(
    error: type[BaseException], stream: EventStream, caplog: pytest.LogCaptureFixture
) -> None:
    """The event is still queued. If it fails again, with an Exception, it is detached."""
    drainer = Drainer()
    stream.attach(drainer)

    def fail() -> None:
        drainer.work = fail if error is ValueError else None
        raise error

    drainer.work = fail
    if error is Interrupt:
        with pytest.raises(Interrupt):
            tell(stream, 1)
        stream.deliver()
        assert times(drainer.got) == [1]
    else:
        tell(stream, 1)
        assert not stream.observations
        assert "is detached" in caplog.text


@pytest.mark.parametrize("observers", [1, 2])
@pytest.mark.parametrize("takes", [True, False])
def test_the_end_of_what_nobody_knows(stream: EventStream, observers: int, takes: bool) -> None:
    """It is not told; nor is its beginning, which would come later."""
    drainer = Drainer()
    got: list[Event] = []
    for _ in range(observers):
        stream.attach(drainer if takes else got.append)
    subject = Told()
    stream.put(event(1), subject, False)
    stream.put(event(2), subject, True)
    known = Told()
    for number, begins in ((3, True), (4, False), (5, False)):
        stream.put(event(number), known, begins)
    stream.deliver()
    assert known.told in (False, None)
    assert set(times(got + drainer.got)) == {3, 4}
    assert len(got + drainer.got) == 2 * observers


def store(*_: object) -> bool:
    """Store an event by its values."""
    return True


def offered(stream: EventStream) -> Shortcut | None:
    """Return the shortcut that a step finds."""
    return stream.shortcut


def test_a_shortcut_is_that_of_the_only_observer(
    stream: EventStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is unset before another one attaches, while events are missing, and in a forked child."""
    monkeypatch.setattr(module, "MAX_QUEUED", 1)
    shortcut = Shortcut(store, store, store)
    drainer = Drainer(lambda _: shortcut)

    def snapshot() -> Iterator[Event]:
        assert offered(stream) is None
        yield event(1)

    with stream.attach(drainer):
        assert offered(stream) is shortcut
        with stream.attach(lambda _: None, snapshot):
            assert offered(stream) is None
        assert offered(stream) is shortcut
        drainer.busy = True
        tell(stream, 1, 2)
        assert offered(stream) is None
        drainer.busy = False
        stream.deliver()
        assert offered(stream) is shortcut
        monkeypatch.setattr(module, "HAS_GIL", False)
        stream.forget()
        assert offered(stream) is None
        stream.attach(drainer)
        assert offered(stream) is None
