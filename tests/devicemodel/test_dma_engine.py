"""DmaEngine: leases around the work, the drain, resets, bounds, and workers that die."""

from __future__ import annotations

import logging
import os
import queue
import re
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.kit import in_thread, wait_for_the_log
from xenmapcache import (
    ClosedError,
    FaultError,
    MapCache,
    MockDomain,
    QueueFullError,
)
from xenmapcache.devicemodel import DmaEngine, DmaStatus, DmaTransfer, IoreqServer, dma, dma_table
from xenmapcache.devicemodel.dma_transfer import DmaRecord
from xenmapcache.guest import Segments

RANGES = [(0x5000, 512), (0x8000, 512)]
DONE, FAILED, CANCELLED = DmaStatus.DONE, DmaStatus.FAILED, DmaStatus.CANCELLED
WAITING, RUNNING = DmaStatus.WAITING, DmaStatus.RUNNING


@pytest.fixture
def engine(live: IoreqServer) -> Iterator[DmaEngine]:
    with DmaEngine(live, name="disk0") as engine:
        yield engine


class Blocked:
    """Work that does not return before it may, and writes then."""

    def __init__(self, data: bytes = b"data") -> None:
        self.data = data
        self.begun = threading.Event()
        self.go = threading.Event()

    def __call__(self, memory: Segments) -> int:
        self.begun.set()
        assert self.go.wait(20)
        memory[: len(self.data)] = self.data
        return len(self.data)


def spin_until(condition: Callable[[], object]) -> None:
    """Wait for what another thread does."""
    while not condition():
        os.sched_yield()


def none(memory: Segments) -> None:
    """Do nothing."""


def test_a_transfer(guest: MockDomain, cache: MapCache, engine: DmaEngine) -> None:
    """Its work gets the leases, and its end is told when they are released."""
    seen: list[object] = []

    def work(memory: Segments) -> int:
        seen.extend((info.owner, info.direction.value) for info in cache.leases() if info.direction)
        seen.append(threading.current_thread().name)
        memory[510:514] = b"data"
        return 514

    def on_end(transfer: DmaTransfer) -> None:
        seen.append((transfer.status, transfer.result, cache.leases()))

    transfer = engine.submit(RANGES, "from-device", work, on_end=on_end)
    engine.drain()
    assert seen == [("disk0", "from-device")] * 2 + ["disk0 worker", (DONE, 514, ())]
    assert (transfer.number, transfer.ranges, transfer.error) == (1, tuple(RANGES), None)
    assert transfer.direction.value == "from-device"
    assert transfer.segments is not None
    assert transfer.segments.leases == ()
    assert guest.read(0x51FE, 2) + guest.read(0x8000, 2) == b"data"
    assert engine.transfers == ()
    assert engine.failures == 0
    assert repr(transfer) == (
        "<transfer 1 of 'disk0', from-device, 1024 bytes in 2 ranges from 0x5000: done in thread "
        "'disk0 worker'>"
    )


@pytest.mark.parametrize(
    ("written", "dirty"), [(0, set()), (512, {5}), (513, {5, 8}), (None, {5, 8})]
)
def test_only_what_was_written_is_dirty(
    guest: MockDomain, engine: DmaEngine, written: int | None, dirty: set[int]
) -> None:
    """The work's result says how much that is; None means that it may be all."""
    engine.submit(RANGES, "from-device", lambda _: written)
    engine.drain()
    assert guest.dirty_gfns == dirty


def test_transfers_run_in_order_and_several_at_a_time(live: IoreqServer) -> None:
    """One worker takes them in order; with two, the second one does not wait for the first."""
    order: list[int] = []
    with DmaEngine(live) as engine:
        for _ in range(20):
            engine.submit([], "to-device", none, on_end=lambda each: order.append(each.number))
    assert order == list(range(1, 21))
    first = Blocked()
    with DmaEngine(live, workers=2) as engine:
        waits = engine.submit(RANGES, "from-device", first)
        engine.submit([], "to-device", none, on_end=lambda _: first.go.set())
    assert waits.status is DONE


class Unusual(BaseException):
    """Neither an Exception nor known to anything."""


@pytest.mark.parametrize("error", [ZeroDivisionError("zero"), Unusual("odd"), SystemExit(1)])
def test_what_work_raises_is_a_status(
    guest: MockDomain,
    cache: MapCache,
    engine: DmaEngine,
    caplog: pytest.LogCaptureFixture,
    error: BaseException,
) -> None:
    """The guest is told, the log says which transfer it was, and the worker goes on."""
    ended: list[DmaTransfer] = []

    def work(_: Segments) -> int:
        raise error

    failed = engine.submit(RANGES, "from-device", work, on_end=ended.append)
    good = engine.submit(RANGES, "from-device", none)
    engine.drain()
    assert [each.number for each in ended] == [1]
    assert (failed.status, failed.error, good.status) == (FAILED, error, DONE)
    assert error.__traceback__ is None, "its frames would keep views"
    assert engine.failures == 1
    assert cache.leases() == ()
    assert guest.dirty_gfns == {5, 8}, "nobody knows what the work has written"
    assert re.search(rf"domain 1: transfer 1 of 'disk0', .*: {type(error).__name__}", caplog.text)
    assert "in work" in caplog.text, "a traceback, because it is a bug of the device"


def test_what_the_guest_got_wrong_is_a_status(
    engine: DmaEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """Addresses without memory, lengths that cannot be: a line each, but five at most."""
    caplog.set_level(logging.INFO, "xenmapcache")
    hostile = [(0xA0000, 1), (1 << 64, 512), (0x5000, 1 << 40), (0x5000, -1), (-1, 1)]
    transfers = [engine.submit([pair], "from-device", none) for pair in hostile * 2]
    engine.drain()
    assert {each.status for each in transfers} == {FAILED}
    assert isinstance(transfers[0].error, FaultError)
    assert engine.failures == 10
    lines = [each for each in caplog.records if "of 'disk0'" in each.getMessage()]
    assert 5 <= len(lines) < 10
    assert (lines[0].levelname, lines[0].exc_info) == ("INFO", None)


def test_a_wrong_count_is_a_failure(cache: MapCache, engine: DmaEngine) -> None:
    """Work that says it wrote more than there is; the leases are released all the same."""
    transfer = engine.submit(RANGES, "from-device", lambda _: 1025)
    engine.drain()
    assert "written must be 0 to 1024" in str(transfer.error)
    assert cache.leases() == ()


def test_an_end_that_cannot_be_told_is_logged(
    engine: DmaEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """An on_end that raises changes neither the status nor what comes next."""

    def on_end(_: DmaTransfer) -> None:
        raise Unusual("no interrupt")

    transfers = [engine.submit(RANGES, "to-device", none, on_end=on_end) for _ in range(2)]
    engine.drain()
    assert [each.status for each in transfers] == [DONE, DONE]
    assert "its on_end <function" in caplog.text
    assert "Unusual: no interrupt" in caplog.text


# --- INVALIDATE -------------------------------------------------------------------------------


def test_no_lease_is_held_while_mappings_are_dropped(
    guest: MockDomain, cache: MapCache, live: IoreqServer, engine: DmaEngine
) -> None:
    """An INVALIDATE waits for what was accepted; what is submitted since waits for it."""
    first, order = Blocked(), []
    before = cache.stats().invalidations
    engine.submit(RANGES, "from-device", first)
    second = engine.submit(RANGES, "to-device", lambda _: order.append(cache.stats().invalidations))
    assert first.begun.wait(20)
    vcpu, _ = in_thread(lambda: guest.balloon_out(0x30_0000, 0x1000))
    spin_until(lambda: engine._table._hold is not None)
    third = engine.submit(RANGES, "to-device", lambda _: order.append(cache.stats().invalidations))
    assert live.invalidations == 1
    assert cache.stats().invalidations == before
    first.go.set()
    vcpu.join()
    engine.drain()
    assert (second.status, third.status) == (DONE, DONE)
    assert order == [before, before + 1]
    assert cache.stats().stale_dma_released == 0
    assert guest.read(0x5000, 4) == b"data"


def test_a_hold_that_comes_after_the_look_finds_the_claim(
    guest: MockDomain, engine: DmaEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that has claimed a transfer looks again, and gives it back."""
    table = engine._table
    looks: list[int] = []
    may_begin = table._may_begin

    def look(record: DmaRecord) -> bool:
        looks.append(record.number)
        if len(looks) == 1:
            table.live.clear()
            table.hold()  # by the thread that serves, between the two looks
            table.live[record.number] = record
            return True
        return may_begin(record)

    monkeypatch.setattr(table, "_may_begin", look)
    transfer = engine.submit(RANGES, "to-device", none)
    spin_until(lambda: len(looks) > 3)
    assert transfer.status is WAITING
    guest.send_invalidate()
    engine.drain()
    assert transfer.status is DONE


def test_a_group_is_waited_for_and_cancelled_alone(live: IoreqServer) -> None:
    """Transfers of other groups, and those without one, go on."""
    one, two = object(), object()
    work = Blocked()
    with DmaEngine(live, workers=2, drain_timeout=20) as engine:
        other = engine.submit(RANGES, "from-device", work, group=two)
        assert work.begun.wait(20)
        mine = engine.submit(RANGES, "from-device", none, group=one)
        engine.drain(group=one)
        assert (mine.status, other.status) == (DONE, RUNNING)
        engine.cancel(group=one)
        with pytest.raises(TimeoutError, match="drain: still under way"):
            engine.drain(0.01, group=two)
        work.go.set()
        engine.drain(group=two)
        assert other.status is DONE


def test_a_drain_waits_for_what_was_claimed_too_early(engine: DmaEngine) -> None:
    """A worker that has not seen the hold yet has a transfer that nobody has accepted."""
    table = engine._table
    record = table.make(RANGES, "from-device", none, None)
    table.hold()
    table.live[record.number] = record
    assert table.busy([], None) == []
    assert record.claim()
    assert table.busy([], None) == [record]
    table.finish(record)


def test_an_invalidate_that_waits_too_long_names_the_transfer(
    guest: MockDomain,
    cache: MapCache,
    live: IoreqServer,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The vCPU goes on after drain_timeout; a warning comes first, and both name the transfer."""
    monkeypatch.setattr(dma_table, "_FIRST_S", 0.0)
    work = Blocked()
    with DmaEngine(live, name="disk0", drain_timeout=0.05) as engine:
        transfer = engine.submit(RANGES, "from-device", work)
        assert work.begun.wait(20)
        guest.send_invalidate()
        wait_for_the_log(live)
        name = (
            r"transfer 1 of 'disk0', from-device, 1024 bytes in 2 ranges from 0x5000: running for "
            r"[0-9.]+ s in thread 'disk0 worker'"
        )
        begin = "DMA engine 'disk0' of domain 1: INVALIDATE: "
        assert re.search(rf"{begin}has waited [0-9.]+ s for: {name}", caplog.text)
        assert re.search(rf"{begin}still under way after 0.05 s: {name}; an inval", caplog.text)
        assert live.failures == 1
        work.go.set()
    assert transfer.status is DONE
    assert cache.stats().stale_dma_released == 2


def test_the_close_of_the_server_finishes_what_was_accepted(
    guest: MockDomain, server: IoreqServer
) -> None:
    """Its interrupt reaches the guest; what is submitted too late is cancelled, not forgotten."""
    work = Blocked()
    late: list[DmaTransfer] = []
    engine = DmaEngine(server, name="disk0")
    with server, server.serving():
        transfer = engine.submit(
            RANGES, "from-device", work, on_end=lambda _: server.inject_msi(0xFEE00000, 0x31)
        )
        assert work.begun.wait(20)
        closing, _ = in_thread(server.close)
        spin_until(lambda: engine._table._hold is not None)
        late.append(engine.submit(RANGES, "from-device", none))
        work.go.set()
        closing.join()
    spin_until(lambda: not engine.transfers)
    assert transfer.status is DONE
    assert guest.interrupts == [("msi", 0xFEE00000, 0x31)]
    assert guest.read(0x5000, 4) == b"data"
    assert late[0].status is CANCELLED
    assert isinstance(late[0].error, ClosedError)
    with pytest.raises(ClosedError):
        engine.submit(RANGES, "from-device", none)


def test_a_transfer_does_not_wait_for_itself(engine: DmaEngine, live: IoreqServer) -> None:
    """Its work may drain, and its end may close the server."""
    transfer = engine.submit(
        RANGES, "to-device", lambda _: engine.drain(), on_end=lambda _: live.close()
    )
    engine.drain()
    assert transfer.status is DONE
    assert "closed" in repr(live)


# --- saving the guest ---------------------------------------------------------------------------


def test_transfers_wait_while_the_guest_is_saved(
    guest: MockDomain, cache: MapCache, live: IoreqServer, engine: DmaEngine
) -> None:
    """They hold no lease, so nothing waits for them; after resume() they are carried out."""
    live.suspend()
    transfers = [engine.submit(RANGES, "from-device", none) for _ in range(2)]
    spin_until(lambda: engine._table.live[1].passage)
    guest.send_invalidate()
    engine.drain()
    assert [each.status for each in transfers] == [WAITING, WAITING]
    assert cache.leases() == ()
    live.resume()
    engine.drain()
    assert [each.status for each in transfers] == [DONE, DONE]


def test_a_reset_while_the_guest_is_saved(live: IoreqServer, engine: DmaEngine) -> None:
    """It does not wait for resume(), and what waited at the gate is not carried out after it."""
    begun: list[object] = []
    ended: list[object] = []
    live.suspend()
    transfers = [
        engine.submit(RANGES, "from-device", begun.append, on_end=ended.append) for _ in range(2)
    ]
    spin_until(lambda: engine._table.live[1].passage)
    engine.cancel()
    assert [each.status for each in transfers] == [CANCELLED, CANCELLED]
    live.resume()
    engine.drain()
    assert [each.status for each in transfers] == [CANCELLED, CANCELLED]
    assert begun == ended == []


def test_what_is_cancelled_does_not_go_to_the_gate(live: IoreqServer, engine: DmaEngine) -> None:
    """A worker that finds it has no reason to wait for resume()."""
    live.suspend()
    record = engine._table.make(RANGES, "from-device", none, None)
    record.cancelled = True
    engine._carry_out(record)
    assert record.status is CANCELLED
    assert record.passage is None


def test_a_server_that_is_closed_while_the_guest_is_saved(
    live: IoreqServer, engine: DmaEngine
) -> None:
    """The transfers are cancelled, and their ends are not told: the guest still waits for them."""
    ended: list[DmaTransfer] = []
    live.suspend()
    transfers = [engine.submit(RANGES, "from-device", none, on_end=ended.append) for _ in range(2)]
    spin_until(lambda: engine._table.live[1].passage)
    closing, _ = in_thread(live.close)
    closing.join()
    spin_until(lambda: not engine.transfers)
    assert [each.status for each in transfers] == [CANCELLED, CANCELLED]
    assert [type(each.error) for each in transfers] == [ClosedError, ClosedError]
    assert ended == []


# --- resets and the end --------------------------------------------------------------------------


def test_a_reset(cache: MapCache, engine: DmaEngine, caplog: pytest.LogCaptureFixture) -> None:
    """What has not begun never begins; what has begun ends without telling; later ones run."""
    work = Blocked()
    ended: list[DmaTransfer] = []
    running = engine.submit(RANGES, "from-device", work, on_end=ended.append)
    waiting = engine.submit(RANGES, "from-device", none, on_end=ended.append)
    assert work.begun.wait(20)
    assert (running.status, waiting.status) == (RUNNING, WAITING)
    with pytest.raises(TimeoutError, match=r"cancel: still under way after 0 s: transfer 1 of"):
        engine.cancel(0)
    assert (running.status, waiting.status) == (RUNNING, CANCELLED)
    work.go.set()
    engine.cancel()
    later = engine.submit(RANGES, "from-device", none, on_end=ended.append)
    engine.drain()
    assert (running.status, waiting.status, later.status) == (CANCELLED, CANCELLED, DONE)
    assert [each.number for each in ended] == [3]
    assert cache.leases() == ()
    assert not caplog.records


def test_a_reset_tells_of_no_failure(engine: DmaEngine, caplog: pytest.LogCaptureFixture) -> None:
    """What a transfer raises after it was cancelled interests nobody."""
    work = Blocked(bytes(2000))  # more than its memory takes
    transfer = engine.submit(RANGES, "from-device", work)
    assert work.begun.wait(20)
    with pytest.raises(TimeoutError):
        engine.cancel(0)
    work.go.set()
    engine.drain()
    assert (transfer.status, engine.failures) == (CANCELLED, 0)
    assert isinstance(transfer.error, ValueError)
    assert not caplog.records


def test_its_queue_is_bounded(live: IoreqServer) -> None:
    """A guest cannot fill this process's memory; the error names what is under way."""
    work = Blocked()
    with DmaEngine(live, name="disk0", limit=10) as engine:
        for _ in range(10):
            engine.submit(RANGES, "from-device", work)
        with pytest.raises(QueueFullError, match=r"10 transfers .* limit is 10.*; and 2 more"):
            engine.submit(RANGES, "from-device", work)
        assert len(engine.transfers) == 10
        work.go.set()
        engine.drain()
        engine.submit(RANGES, "from-device", work)


def test_close(live: IoreqServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits as long as it is told to, cancels the rest, and can be repeated."""
    monkeypatch.setattr(dma, "_IDLE_S", 1000.0)  # the workers end all the same
    work = Blocked()
    engine = DmaEngine(live, name="disk0", drain_timeout=0.05)
    running = engine.submit(RANGES, "from-device", work)
    waiting = engine.submit(RANGES, "from-device", none)
    assert work.begun.wait(20)
    with pytest.raises(TimeoutError, match=r"drain: still under way .*; transfer 2 of 'disk0'"):
        engine.close()
    assert waiting.status is CANCELLED
    with pytest.raises(ClosedError, match=r"DMA engine 'disk0' of domain 1: it is closed"):
        engine.submit(RANGES, "from-device", none)
    assert repr(engine) == "<DMA engine 'disk0' of domain 1, closed, 2 transfers under way>"
    work.go.set()
    spin_until(lambda: not engine.transfers)
    assert running.status is CANCELLED
    spin_until(lambda: engine._idle)  # the worker has ended
    engine.close()


def test_without_an_open_server_nothing_is_accepted(server: IoreqServer) -> None:
    """A lease that is taken before `open` would be stale."""
    engine = DmaEngine(server)
    with pytest.raises(ClosedError, match="use it inside `with server:`"):
        engine.submit(RANGES, "from-device", none)


def test_a_forked_child_waits_for_nothing(engine: DmaEngine) -> None:
    """The transfers are the parent's, and so are the workers."""
    work = Blocked()
    engine.submit(RANGES, "from-device", work)
    assert work.begun.wait(20)
    child = os.fork()
    if not child:
        code = 1
        try:
            engine.close()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    work.go.set()


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"workers": 0}, ValueError, "workers must be at least 1 thread, not 0"),
        ({"limit": 0}, ValueError, "limit must be at least 1 transfer, not 0"),
        ({"drain_timeout": 0}, ValueError, "drain_timeout must be above 0 and at most"),
        ({"name": b"disk"}, TypeError, "name must be a str, not bytes"),
    ],
)
def test_wrong_options(
    server: IoreqServer, options: dict[str, object], error: type[Exception], text: str
) -> None:
    """They are refused when the engine is made."""
    with pytest.raises(error, match=text):
        DmaEngine(server, **options)  # type: ignore[arg-type] # wrong on purpose


def test_wrong_arguments(cache: MapCache, engine: DmaEngine) -> None:
    """A device's own mistakes raise at once."""
    with pytest.raises(TypeError, match="server must be an IoreqServer, not <MapCache"):
        DmaEngine(cache)  # type: ignore[arg-type] # wrong on purpose
    with pytest.raises(TypeError, match="work None cannot be called"):
        engine.submit(RANGES, "from-device", None)  # type: ignore[arg-type] # wrong on purpose
    with pytest.raises(TypeError, match="on_end 3 cannot be called"):
        engine.submit(RANGES, "from-device", none, on_end=3)  # type: ignore[arg-type] # wrong on purpose
    with pytest.raises(ValueError, match="direction must be one of"):
        engine.submit(RANGES, "sideways", none)
    assert engine.transfers == ()


# --- workers ------------------------------------------------------------------------------------


def test_a_worker_without_work_ends(live: IoreqServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next transfer starts another one."""
    monkeypatch.setattr(dma, "_IDLE_S", 0.0)
    with DmaEngine(live) as engine:
        for _ in range(3):
            transfer = engine.submit(RANGES, "from-device", none)
            engine.drain()
            assert transfer.status is DONE
            spin_until(lambda: engine._idle)


def test_a_closed_engine_has_no_threads(live: IoreqServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that waits for work ends with its engine, and not later."""
    monkeypatch.setattr(dma, "_IDLE_S", 1000.0)
    with DmaEngine(live) as engine:
        engine.submit(RANGES, "from-device", none)
        engine.drain()
        assert not engine._idle
        spin_until(engine._wake.empty)  # it waits for the next one
    spin_until(lambda: engine._idle)


def test_a_transfer_that_comes_as_the_worker_ends(
    live: IoreqServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker has not put its token back yet, so it starts its own successor."""
    monkeypatch.setattr(dma, "_IDLE_S", 0.0)
    with DmaEngine(live) as engine:
        serve = engine._serve
        late: list[DmaTransfer] = []

        def last_look() -> bool:
            goes_on = serve()
            if not goes_on and not late:
                late.append(engine.submit(RANGES, "from-device", none))
            return goes_on

        monkeypatch.setattr(engine, "_serve", last_look)
        engine.submit(RANGES, "from-device", none)
        spin_until(lambda: late)
        engine.drain()
        assert late[0].status is DONE


def test_a_worker_that_dies_is_reported(
    engine: DmaEngine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one goes on; the transfer that was in its hands counts as failed."""
    table, settle = engine._table, engine._table.settle

    def broken(_: object) -> None:
        monkeypatch.setattr(table, "settle", settle)
        raise MemoryError("no room")

    work = Blocked()
    monkeypatch.setattr(table, "settle", broken)
    lost = engine.submit(RANGES, "from-device", work)
    good = engine.submit(RANGES, "from-device", none)
    work.go.set()
    engine.drain()
    assert (lost.status, good.status) == (FAILED, DONE)
    assert "DMA engine 'disk0' of domain 1: a worker died; its transfer counts" in caplog.text
    assert "MemoryError: no room" in caplog.text


def test_without_a_thread_nothing_is_accepted(
    engine: DmaEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """submit() says so, and works again later."""

    def no_thread() -> int:
        raise RuntimeError("can't start new thread")

    start = engine._start
    monkeypatch.setattr(engine, "_start", no_thread)
    with pytest.raises(RuntimeError, match=r"no thread can be started for transfer 1 of 'disk0'"):
        engine.submit(RANGES, "from-device", none)
    assert engine.transfers == ()
    monkeypatch.setattr(engine, "_start", start)
    transfer = engine.submit(RANGES, "from-device", none)
    engine.drain()
    assert transfer.status is DONE


def test_one_worker_is_enough_if_no_other_can_be_started(
    live: IoreqServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The transfer is accepted, and waits for that one."""
    work = Blocked()
    with DmaEngine(live, workers=2) as engine:
        engine.submit(RANGES, "from-device", work)

        def no_thread() -> int:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(engine, "_start", no_thread)
        transfer = engine.submit(RANGES, "from-device", none)
        work.go.set()
        engine.drain()
        assert transfer.status is DONE


@pytest.mark.parametrize("error", [IndexError, RuntimeError])
def test_a_signal_handler_that_raises_after_the_submission(
    engine: DmaEngine, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """Its error is not taken for a missing thread, and the transfer is carried out."""
    steps: list[object] = []

    class Steps(list[object]):
        """A list that is interrupted once it has everything."""

        def extend(self, values: object) -> None:
            super().extend(values)  # type: ignore[arg-type] # as of a list
            steps.append(len(self))
            raise error("of a signal handler")

    monkeypatch.setattr(dma, "_Done", Steps)
    with pytest.raises(error, match="of a signal handler"):
        engine.submit(RANGES, "from-device", none)
    assert steps == [4]
    engine.drain()
    assert engine.transfers == ()


def test_a_transfer_is_claimed_once(engine: DmaEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two workers that see the same one, the second takes the next one."""
    claim = DmaRecord.claim
    stolen: list[DmaRecord] = []

    def late(record: DmaRecord) -> bool:
        if not stolen:
            assert claim(record)  # by the other worker, between the look and the claim
            stolen.append(record)
        return claim(record)

    monkeypatch.setattr(DmaRecord, "claim", late)
    engine.submit(RANGES, "from-device", none)
    good = engine.submit(RANGES, "from-device", none)
    spin_until(lambda: good.status is DONE)
    assert stolen[0].status is WAITING
    engine._carry_out(stolen[0])
    engine.drain()


def test_a_waiter_that_nobody_waits_at_collects_nothing() -> None:
    """One that an interrupt has left in the list is woken once, however many transfers end."""
    changed: queue.SimpleQueue[None] = queue.SimpleQueue()
    for _ in range(3):
        dma._put_once(changed)
    assert changed.qsize() == 1
