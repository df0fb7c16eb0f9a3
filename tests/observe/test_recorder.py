"""The recorder: events in a shared mapping, of which two halves take turns."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.observe.recordings import EVENTS, START, released, taken
from xenmapcache import record, stream
from xenmapcache.errors import ClosedError
from xenmapcache.events import (
    BucketDropped,
    BucketMapped,
    CacheClosed,
    CacheOpened,
    Event,
    Invalidated,
    RequestHandled,
    ServerClosed,
    ServerOpened,
)
from xenmapcache.observe import eventlines, halves, pen
from xenmapcache.observe import recorder as module
from xenmapcache.observe.eventlines import encode
from xenmapcache.observe.halves import Halves
from xenmapcache.observe.recorder import ProcessRecorder, Recorder
from xenmapcache.observe.recording import read
from xenmapcache.stream import EventStream, Observation, Observer

MiB = 1 << 20
TIMED = [event for event in EVENTS if getattr(event, "time", None) is not None]


class Cache:
    """A stream to observe, as caches and servers have it."""

    def __init__(self) -> None:
        self.stream = EventStream()

    def observe(self, observer: Observer) -> Observation:
        return self.stream.attach(observer)

    def tell(self, *events: Event) -> None:
        for event in events:
            self.stream.put(event)
        self.stream.deliver()


@pytest.fixture
def cache() -> Cache:
    return Cache()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.jsonl"


def in_child(work: Callable[[], object]) -> int:
    """Fork, do some work in the child, and return its status."""
    child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def test_events_are_in_the_file_at_once(cache: Cache, path: Path) -> None:
    """Before the recorder is detached. After that the file ends with the last line."""
    with record(cache, path) as recorder:
        assert repr(recorder) == f"<recorder of {str(path)!r}>"
        assert path.stat().st_size == 64 * MiB
        assert path.stat().st_blocks * 512 <= 2 * MiB
        assert path.stat().st_mode & 0o777 == 0o600
        cache.tell(*TIMED)
        assert list(read(path)) == TIMED
    cache.tell(taken())
    recorder.detach()
    assert list(read(path)) == TIMED
    assert path.read_bytes().endswith(encode(TIMED[-1]))
    header = read(path)
    next(iter(header))
    assert header.headers[0].pid == os.getpid()


def test_several_streams(path: Path) -> None:
    """Each has a number. A lease of one stream is another than that of the next one."""
    caches = [Cache(), Cache()]
    with Recorder(path, "1MiB") as recorder:
        for each in caches:
            recorder.add(each.observe)
        for each in caches:
            each.tell(taken(), released(), *TIMED)
        assert [entry.stream for entry in read(path).entries()] == [0] * 19 + [1] * 19
    with pytest.raises(ClosedError, match="make another one"):
        recorder.add(caches[0].observe)


def test_frequent_events_are_as_the_others(cache: Cache, path: Path) -> None:
    """Their lines come from templates, which are made again if there are too many."""
    events = [
        event
        for number in range(5)
        for event in (
            taken(number, f"%s {number % 2}"),
            taken(number, f"{number}")._replace(direction=None, kind="device", stale=True),
            released(number),
            RequestHandled(START, number % 3, 0, True, number, 1, number, None, "%d"),
        )
    ]
    with pytest.MonkeyPatch.context() as patch, record(cache, path):
        patch.setattr(pen, "_MAX_TEMPLATES", 3)
        cache.tell(*events)
        assert list(read(path)) == events


def test_a_killed_process_has_written_everything(path: Path) -> None:
    """SIGKILL right after the last event loses nothing."""

    def work() -> None:
        cache = Cache()
        record(cache, path)
        cache.tell(*TIMED)
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(work) == signal.SIGKILL
    assert list(read(path)) == TIMED


def test_the_halves_take_turns(cache: Cache, path: Path) -> None:
    """The file does not grow. What is held, mapped and open is restated in each half."""
    opened = CacheOpened(START, 9)
    bucket = BucketMapped(START, 0, MiB, 5, None)
    gone = BucketMapped(START, MiB, MiB, 5, None)
    with record(cache, path, limit=MiB):
        cache.tell(opened, bucket, gone, BucketDropped(START, MiB, MiB, "evicted"), taken(0, "old"))
        for turn in range(1, 5):
            found = read(path)
            events = list(found)
            while found.headers[-1].number < turn:
                for lease in range(1, 700):
                    cache.tell(taken(lease), released(lease))
                events = list(found)
            assert found.overwritten == (turn > 1)
            assert [header.number for header in found.headers] == [turn - 1, turn]
            assert found.headers[-1].restated in (3, 4)
            # A reader sees each once, whatever was overwritten, and the rest without a gap.
            assert (
                events.count(opened) == events.count(bucket) == events.count(taken(0, "old")) == 1
            )
            numbers = [
                event.lease for event in events if event == released(getattr(event, "lease", 0))
            ]
            assert all((b - a) % 699 == 1 for a, b in pairwise(numbers))
            assert (found.damaged, found.left_out) == (0, 0)
            assert gone not in events or turn == 1
        assert path.stat().st_size == MiB
    assert path.stat().st_size == MiB


@pytest.mark.parametrize("end", [Invalidated(START, 1), CacheClosed(START)])
def test_dropped_buckets_are_not_restated(end: Event, path: Path) -> None:
    """After INVALIDATE, and when a cache was closed; other streams keep theirs."""
    caches = Cache(), Cache()
    with Recorder(path, MiB) as recorder:
        for each in caches:
            recorder.add(each.observe)
            each.tell(BucketMapped(START, 0, MiB, 5, None))
        caches[0].tell(end)
        fill(recorder)
        header = read(path)
        list(header)
        assert header.headers[-1].restated == 1


def fill(recorder: Recorder) -> None:
    """Store events until the other half begins."""
    other = Cache()
    recorder.add(other.observe)
    for _ in range(40_000):
        other.tell(released())
        if recorder.halves.number:
            return


def test_too_much_to_restate_is_counted(
    cache: Cache, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quarter of a half is for that, and the table that is kept is bounded."""
    monkeypatch.setattr(module, "_MAX_RESTATED", 2000)
    with record(cache, path, MiB) as recorder:
        cache.tell(*map(taken, range(2500)))
        fill(recorder)
        found = read(path)
        assert len({event for event in found if event != released()}) == 2500
    assert 0 < found.left_out == 2000 - found.headers[-1].restated


def test_a_half_that_is_torn(cache: Cache, path: Path) -> None:
    """Lines of the turn before, beyond the damage, are told from new ones by their times."""
    with record(cache, path, MiB) as recorder:
        while recorder.halves.number < 2:
            cache.tell(released(at=START))
        position = recorder.halves.position
        cache.tell(taken())
        found = read(path)
        whole = list(found)
        with path.open("rb+") as file:  # as if the store had ended in the middle of a line
            file.seek(position + 10)
            file.write(b'"damage"')
            file.seek(position + len(encode(taken())))
            file.write(b"#")
        assert list(found) == whole[:-1]
        assert found.headers[-1].number == found.damaged == 2


def test_a_damaged_first_half_is_left_out(cache: Cache, path: Path) -> None:
    """The other half is found without the first line of the file."""
    with record(cache, path, MiB) as recorder:
        while not recorder.halves.number:
            cache.tell(released())
        cache.tell(taken())
        with path.open("rb+") as file:
            file.write(b"\0" * 100)
        found = read(path)
        assert taken() in list(found)
        assert [header.number for header in found.headers] == [1]


def test_a_batch_larger_than_the_growth_is_stored(cache: Cache, path: Path) -> None:
    """A store may need more than one step of space."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(halves, "_GROWTH_BYTES", 16)
        with record(cache, path, MiB):
            cache.tell(*TIMED)
            assert list(read(path)) == TIMED


def refuse(*_: object) -> None:
    """Be a full disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_ends_the_recording(
    cache: Cache, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The stream detaches the recorder, with a WARNING that names the file."""
    monkeypatch.setattr(halves, "_GROWTH_BYTES", 4096)

    with record(cache, path):
        monkeypatch.setattr(os, "posix_fallocate", refuse)
        cache.tell(*[taken(number) for number in range(50)])
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "No space left" in caplog.text
    assert str(path) in caplog.text
    assert len(list(read(path))) > 5


def test_other_files_are_left_alone(cache: Cache, path: Path, tmp_path: Path) -> None:
    """So is a link, and a recording that another recorder writes. A finished one is replaced."""
    other = tmp_path / "other"
    other.write_text("precious")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nothing")
    for name in (other, link, tmp_path):
        with pytest.raises(OSError, match="File exists|not written|directory|link"):
            record(cache, name)
    assert other.read_text() == "precious"
    assert not (tmp_path / "nothing").exists()
    with record(cache, path), pytest.raises(FileExistsError, match="still writes"):
        record(cache, path)
    with record(cache, path):
        cache.tell(taken())
        assert list(read(path)) == [taken()]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["link", "other", "run.jsonl"]


@pytest.mark.parametrize("limit", [0, "1023KiB", 1 << 41, "nonsense"])
def test_limits(cache: Cache, path: Path, limit: int | str) -> None:
    with pytest.raises(ValueError, match="limit must be|nonsense"):
        record(cache, path, limit)
    assert not path.exists()


def test_a_cache_that_cannot_be_observed(path: Path) -> None:
    """The file is closed again, so that the next recorder can have its name."""

    class Closed(Cache):
        def observe(self, observer: Observer) -> Observation:
            raise ClosedError(str(observer))

    for _ in range(2):
        with pytest.raises(ClosedError):
            record(Closed(), path)


class Amid:
    """Has something done while room is made for a line, as if a signal came."""

    def __init__(self, recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
        self.halves = recorder.halves
        self.work: Callable[[], object] | None = None
        self.allocate = Halves._allocate
        monkeypatch.setattr(Halves, "_allocate", self)

    def __call__(self, begin: int, end: int) -> None:
        work, self.work = self.work, None
        if work is not None:
            work()
        self.allocate(self.halves, begin, end)


def fill_up(recorder: Recorder) -> None:
    """Have the next line find no room."""
    recorder.halves._end = recorder.halves.limit = recorder.halves.position


def test_an_event_that_comes_while_room_is_made_waits(
    cache: Cache, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal handler or a finalizer brings it, of this stream or of another one."""
    other = Cache()
    with record(cache, path) as recorder:
        recorder.add(other.observe)
        amid = Amid(recorder, monkeypatch)
        fill_up(recorder)

        def work() -> None:
            cache.tell(taken(2))
            other.tell(taken(3))
            other.tell(released(3))
            assert list(read(path)) == []

        amid.work = work
        cache.tell(taken(1))
        assert [*read(path)] == [taken(3), released(3), taken(1), taken(2)]
        other.tell(taken(4))
        assert [*read(path)][-1] == taken(4)


def test_an_interrupt_while_room_is_made(
    cache: Cache, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No event is lost; the next one, of the same stream or another one, is stored after it."""
    other = Cache()
    with record(cache, path) as recorder:
        recorder.add(other.observe)
        amid = Amid(recorder, monkeypatch)
        for number, tell in enumerate([cache.tell, other.tell]):
            fill_up(recorder)

            def interrupt() -> None:
                raise KeyboardInterrupt

            amid.work = interrupt
            with pytest.raises(KeyboardInterrupt):
                tell(taken(number))
        cache.tell(taken(2))
    assert sorted(read(path), key=str) == [taken(0), taken(1), taken(2)]


def test_a_turn_that_is_interrupted_has_not_begun(
    cache: Cache, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was in the file before stays readable."""
    with record(cache, path, MiB) as recorder:
        amid = Amid(recorder, monkeypatch)
        cache.tell(taken(1))
        recorder.halves._end = recorder.halves.limit = recorder.halves.position
        recorder.halves._end = MiB // 2
        while recorder.halves.number == 0 and amid.work is None:
            if recorder.halves.position > MiB // 2 - 4096:

                def interrupt() -> None:
                    raise KeyboardInterrupt

                amid.work = interrupt
            else:
                cache.tell(released(5))
        with pytest.raises(KeyboardInterrupt):
            for _ in range(100):
                cache.tell(released(5))
        assert recorder.halves.number == 0
        assert next(iter(read(path))) == taken(1)
        cache.tell(released(1))
        assert recorder.halves.number == 1
        assert [*read(path)][-1] == released(1)


@pytest.mark.parametrize("raises", [True, False])
def test_an_interrupt_amid_a_line(
    cache: Cache, path: Path, monkeypatch: pytest.MonkeyPatch, *, raises: bool
) -> None:
    """The event stays queued until it is stored, once; a nested one comes after it."""
    with record(cache, path) as recorder:
        make = eventlines.template

        def interrupted(*arguments: Any) -> bytes:  # noqa: ANN401 - those of another function
            monkeypatch.setattr(pen, "template", make)
            cache.tell(released(1))
            for each in cache.stream.observations:  # as another stream's pen that has made room
                assert each.drain is not None
                each.drain(each.queue)
            if raises:
                raise KeyboardInterrupt
            return make(*arguments)

        monkeypatch.setattr(pen, "template", interrupted)
        with pytest.raises(KeyboardInterrupt) if raises else contextlib.nullcontext():
            cache.tell(taken(1))
        assert [*read(path)] == [taken(1), released(1)]
        assert recorder.held == {}


def test_closing_while_room_is_made(
    cache: Cache, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who makes the room closes the file; what waits is left out."""
    recorder = record(cache, path)
    cache.tell(taken(1))
    amid = Amid(recorder, monkeypatch)
    fill_up(recorder)
    closed = []

    def work() -> None:
        recorder.detach()
        closed.append(recorder.halves.closed)

    amid.work = work
    cache.tell(taken(2))
    assert closed == [False]
    assert recorder.halves.closed
    assert list(read(path)) == [taken(1)]
    recorder.detach()


def test_detaching_twice_completes_the_first(
    cache: Cache, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupt of the first leaves no stream attached after the second."""
    recorder = record(cache, path)
    detach = Observation.detach

    def interrupted(_: Observation) -> None:
        monkeypatch.setattr(Observation, "detach", detach)
        raise KeyboardInterrupt

    monkeypatch.setattr(Observation, "detach", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recorder.detach()
    recorder.detach()
    assert not cache.stream.observations
    assert recorder.halves.closed


@pytest.mark.parametrize("has_gil", [True, False])
def test_threads(path: Path, monkeypatch: pytest.MonkeyPatch, *, has_gil: bool) -> None:
    """Each has a stream; every event arrives, and each stream's are in order."""
    monkeypatch.setattr(pen, "HAS_GIL", has_gil)
    monkeypatch.setattr(stream, "HAS_GIL", has_gil)
    caches = [Cache() for _ in range(4)]
    with Recorder(path) as recorder:
        for each in caches:
            recorder.add(each.observe)

        def work(cache: Cache) -> None:
            for number in range(300):
                cache.tell(taken(number))

        threads = [threading.Thread(target=work, args=(each,)) for each in caches]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    entries = list(read(path).entries())
    for number in range(4):
        found = [entry.event for entry in entries if entry.stream == number]
        assert found == [taken(lease) for lease in range(300)]


def test_a_forked_child_does_not_record(cache: Cache, path: Path) -> None:
    """What it does changes nothing in its parent's file, which the parent still writes."""
    with record(cache, path) as recorder:
        cache.tell(taken(1))

        def work() -> None:
            cache.tell(taken(2))
            recorder.detach()

        assert in_child(work) == 0
        cache.tell(taken(3))
    assert list(read(path)) == [taken(1), taken(3)]


def test_forgetting(cache: Cache, path: Path) -> None:
    """As the child of a fork does it, but here."""
    recorder = record(cache, path)
    module._after_fork_in_child()
    cache.tell(taken(2))
    recorder.detach()
    assert list(read(path)) == []


def test_a_file_for_each_process(tmp_path: Path) -> None:
    """A forked child makes its own, when it makes a cache."""
    recorder = ProcessRecorder(f"{tmp_path}/run")

    def work() -> None:
        cache = Cache()
        recorder(cache.observe)
        cache.tell(taken(os.getpid()))

    work()
    work()
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    mine, its = (list(read(f"{tmp_path}/run.{pid}")) for pid in (os.getpid(), child))
    assert mine == [taken(os.getpid())] * 2
    assert its == [taken(child)]
    recorder._after_fork_in_child()
    work()
    assert len(list(read(f"{tmp_path}/run.{os.getpid()}"))) == 3


def test_a_file_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It says so once, and the program goes on."""
    recorder = ProcessRecorder(f"{tmp_path}/missing/run")
    cache = Cache()
    with caplog.at_level(logging.WARNING):
        recorder(cache.observe)
        recorder(cache.observe)
        cache.tell(taken())
    assert len(caplog.records) == 1
    assert "nothing is recorded" in caplog.text
    assert "missing" in caplog.text


@pytest.mark.parametrize(
    ("opened", "closed"),
    [(CacheOpened(START, 1), CacheClosed(START)), (ServerOpened(START, 3), ServerClosed(START))],
)
def test_closed_caches_and_servers_are_forgotten(
    cache: Cache, path: Path, opened: Event, closed: Event
) -> None:
    """A program that makes one after the other does not collect their streams."""
    with Recorder(path, MiB) as recorder:
        for _ in range(9):
            recorder.add(cache.observe)
            cache.tell(opened)
            assert any(state.opened for state in recorder.states.values())
            cache.tell(closed)
        assert not recorder._observations
        assert not any(state.opened for state in recorder.states.values())
    cache.tell(released())  # such a stream is not detached, but is not listened to either
    assert not any(each.queue for each in cache.stream.observations)


PROGRAM = """
import os, sys
from xenmapcache.stream import EventStream, new_hooks
from tests.observe.recordings import taken
stream = EventStream()
for hook in new_hooks:
    hook(stream.attach)
stream.put(taken())
stream.deliver()
print(os.getpid())
"""


def test_any_program_can_be_recorded(tmp_path: Path) -> None:
    """Without changing it: the variable sets a hook, which caches and servers call."""
    environment = {**os.environ, "XENMAPCACHE_RECORD": f"{tmp_path}/run"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    recording = read(f"{tmp_path}/run.{done.stdout.strip()}")
    assert list(recording) == [taken()]
    assert recording.headers[0].source == "-c"
