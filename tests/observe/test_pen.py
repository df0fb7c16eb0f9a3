"""The pen's shortcut: leases and reports of pages are stored by their values, past the queue."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.observe.recordings import START, released, taken
from xenmapcache import MapCache, open_backend
from xenmapcache.events import (
    Event,
    LeaseReleased,
    LeaseTaken,
    PagesDirtied,
    RequestHandled,
)
from xenmapcache.observe.recorder import Recorder, record
from xenmapcache.observe.recording import read
from xenmapcache.stream import EventStream, Shortcut

DIRTIED = PagesDirtied(START, 0x5000, 0x1000)


class Subject:
    """What an event is about."""

    def __init__(self, told: bool | None) -> None:
        self.told = told


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.jsonl"


@pytest.fixture
def recorder(path: Path) -> Iterator[Recorder]:
    with Recorder(path, "1MiB") as made:
        yield made


@pytest.fixture
def stream(recorder: Recorder) -> EventStream:
    made = EventStream()
    recorder.add(made.attach)
    return made


@pytest.fixture
def shortcut(stream: EventStream) -> Shortcut:
    assert stream.shortcut is not None
    return stream.shortcut


def frequent(path: Path) -> list[Event]:
    """Return the events of a recording that a shortcut stores."""
    kinds = (LeaseTaken, LeaseReleased, PagesDirtied)
    return [event for event in read(path) if isinstance(event, kinds)]


def different(one: Event, other: Event) -> set[str]:
    """Return in which attributes two events of a class differ."""
    assert type(one) is type(other)
    return {name for name in one._fields if getattr(one, name) != getattr(other, name)}


def test_a_cache_uses_it(path: Path) -> None:
    """What it stores is what another observer hears; with another one, the queue is used."""
    heard: list[Event] = []
    with MapCache(open_backend("mock", memory="4M")) as cache, record(cache, path):
        for _ in range(2):
            cache.map_dma(0x5000, 0x1000, owner="disk").release()
            assert cache.stream.shortcut is not None
        alone = frequent(path)
        with cache.observe(heard.append):
            cache.map_dma(0x5000, 0x1000, owner="disk").release()
    both = frequent(path)
    kinds = [LeaseTaken, PagesDirtied, LeaseReleased]
    assert [*map(type, both)] == kinds * 3
    assert both[6:] == [event for event in heard if type(event) in kinds]
    for event, later in zip(alone[:3], both[6:], strict=True):
        assert different(event, later) <= {"time", "lease"}


def test_a_cache_whose_events_find_no_room(path: Path) -> None:
    """They come by the queue, in their order."""
    with MapCache(open_backend("mock", memory="4M")) as cache, record(cache, path) as recorder:
        cache.map_dma(0x5000, 0x1000, owner="disk").release()
        halves = recorder.halves
        halves._end = halves.limit = halves.position
        lease = cache.map_dma(0x5000, 0x1000, owner="disk")
        halves._end = halves.limit = halves.position
        lease.release()
    assert [*map(type, frequent(path))] == [LeaseTaken, PagesDirtied, LeaseReleased] * 2


def test_it_stores_and_marks(path: Path, recorder: Recorder, shortcut: Shortcut) -> None:
    """What is held is restated later; an end that nobody would understand is left out."""
    lease = Subject(told=False)
    assert shortcut.taken(lease, tuple(taken(1)))
    assert (lease.told, [*recorder.held]) == (True, [1])
    assert shortcut.dirtied(tuple(DIRTIED))
    assert shortcut.released(lease, tuple(released(1)))
    assert (lease.told, recorder.held) == (False, {})
    assert shortcut.released(lease, tuple(released(1)))
    assert lease.told is None
    assert shortcut.taken(lease, tuple(taken(1)))
    assert (lease.told, recorder.held) == (None, {})
    assert list(read(path)) == [taken(1), DIRTIED, released(1)]


def test_any_lease(path: Path, shortcut: Shortcut) -> None:
    """Also one that was stale, or lost pages, or that the recorder has forgotten."""
    odd = LeaseReleased(START, 7, stale=True, copied=2, lost=1)
    assert shortcut.released(Subject(told=True), tuple(odd))
    assert list(read(path)) == [odd]


@pytest.mark.parametrize("cause", ["queued", "full"])
def test_what_it_leaves_to_the_queue(
    path: Path, recorder: Recorder, stream: EventStream, shortcut: Shortcut, cause: str
) -> None:
    """Then nothing is stored or marked; the event takes its place in the queue."""
    first = RequestHandled(START, 0, 0, True, 0x3F8, 1, 900)
    if cause == "queued":
        stream.put(first)
    elif cause == "full":
        recorder.halves._end = recorder.halves.limit = recorder.halves.position
    lease, ending = Subject(told=False), Subject(told=True)
    assert not shortcut.taken(lease, tuple(taken(1)))
    assert not shortcut.released(ending, tuple(released(1)))
    assert not shortcut.dirtied(tuple(DIRTIED))
    assert (lease.told, ending.told, recorder.held) == (False, True, {})
    assert list(read(path)) == []
    stream.put(taken(1), lease)
    stream.deliver()
    assert list(read(path)) == [first, taken(1)][cause != "queued" :]


def test_a_closed_file_is_no_fault(recorder: Recorder, shortcut: Shortcut) -> None:
    """A thread may have found the shortcut right before the recorder was detached."""
    recorder.detach()
    lease, ending = Subject(told=False), Subject(told=True)
    assert not shortcut.taken(lease, tuple(taken(1)))
    assert not shortcut.released(ending, tuple(released(1)))
    assert not shortcut.dirtied(tuple(DIRTIED))
    assert (lease.told, ending.told, recorder.held) == (False, True, {})


def test_no_memory_for_what_is_held(path: Path) -> None:
    """The lease is not known then, is not restated later, and its line is overwritten."""

    class Full(dict[int, bytes]):
        def __setitem__(self, key: int, value: bytes) -> None:
            raise MemoryError

    stream, lease = EventStream(), Subject(told=False)
    with Recorder(path, "1MiB") as recorder:
        recorder.held = Full()
        recorder.add(stream.attach)
        shortcut = stream.shortcut
        assert shortcut is not None
        with pytest.raises(MemoryError):
            shortcut.taken(lease, tuple(taken(1)))
        assert (lease.told, recorder.held) == (False, {})
        assert shortcut.dirtied(tuple(DIRTIED))
    assert list(read(path)) == [DIRTIED]


def test_the_owner_of_a_lease_runs_no_code(path: Path) -> None:
    """A name of a class of its own is told as the text that it holds."""

    class Name(str):
        __slots__ = ()

        def __hash__(self) -> int:
            raise TypeError("no hash")

        def __str__(self) -> str:
            raise TypeError("no text")

    with MapCache(open_backend("mock", memory="4M")) as cache, record(cache, path):
        for lease in (
            cache.map_dma(0x5000, 0x1000, owner=Name("disk")),
            cache.map_device(0x5000, 0x1000, owner=Name("disk")),
            cache.window(0, 0x10000, owner=Name("disk")),
        ):
            assert type(lease.owner) is str
            lease.release()
    owners = [event.owner for event in read(path) if isinstance(event, LeaseTaken)]
    assert owners == ["disk"] * 3


@pytest.mark.parametrize("error", [TimeoutError, ValueError, MemoryError])
@pytest.mark.parametrize("name", ["taken", "released", "dirtied"])
def test_what_a_signal_handler_raises_goes_on(
    path: Path, shortcut: Shortcut, name: str, error: type[Exception]
) -> None:
    """Whatever it is: nothing of it is taken for a fault of the pen's."""

    class Number:
        """One in whose look a signal comes."""

        def __int__(self) -> int:
            signal.raise_signal(signal.SIGALRM)
            return START

    def on_time(number: int, frame: object) -> None:
        raise error("of a handler")

    subject = Subject(told=name == "released")
    late: dict[str, Callable[[], bool]] = {
        "taken": lambda: shortcut.taken(subject, taken(3)._replace(start=Number())),  # type: ignore[arg-type] # stands for an int
        "released": lambda: shortcut.released(subject, LeaseReleased(START, Number())),  # type: ignore[arg-type] # as above
        "dirtied": lambda: shortcut.dirtied(DIRTIED._replace(start=Number())),  # type: ignore[arg-type] # as above
    }
    before = signal.signal(signal.SIGALRM, on_time)
    try:
        with pytest.raises(error, match="of a handler"):
            late[name]()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert subject.told is (name == "released")
    assert frequent(path) == []
