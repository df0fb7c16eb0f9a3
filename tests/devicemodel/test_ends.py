"""Ends that go wrong: a paused guest, a close in another thread, an interrupted step."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import queue
import signal
import threading
import time

import pytest

from tests.kit import connection_of, in_thread, link_of, wait_for_requests
from xenmapcache import ClosedError, MapCache, MockDomain, XenCallError
from xenmapcache.devicemodel import IoreqServer, ending
from xenmapcache.devicemodel.connection import Connection
from xenmapcache.devicemodel.dispatch import Job
from xenmapcache.devicemodel.signals import CaughtSignals
from xenmapcache.devicemodel.watch import Watcher
from xenmapcache.ioreq import Request, RequestKind, RequestSlot, State
from xenmapcache.mock.ioreq_server import MockIoreqServer

PORT, ONES = 0x510, 0xFFFFFFFF


def test_close_waits_for_a_paused_guest(guest: MockDomain, server: IoreqServer) -> None:
    """An answer is taken when the guest goes on, and only then the server is destroyed."""
    server.claim_ports(PORT, 4).read(lambda offset, size: 5)
    server.open()
    thread, seen = in_thread(lambda: guest.port_in(PORT))
    wait_for_requests(server)
    guest.pause()
    closing, _ = in_thread(server.close)
    page = link_of(server).page
    while RequestSlot(page, 0).state != State.RESPONSE_READY:
        time.sleep(0.001)
    assert guest.ioreq_servers != {}
    guest.unpause()
    thread.join()
    closing.join()
    assert (seen, server.lost_answers, server.failures) == ([5], 0, 0)


def test_close_waits_for_as_long_as_the_guest_is_paused(
    guest: MockDomain, server: IoreqServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the pause lasts longer than a vCPU that runs may take."""
    looked: list[bool] = []
    monkeypatch.setattr(ending, "_TAKE_S", 0.2)

    def paused(_: MockIoreqServer) -> bool:
        looked.append(guest.paused)
        return guest.paused

    monkeypatch.setattr(MockIoreqServer, "paused", property(paused))
    server.claim_ports(PORT, 4).read(lambda offset, size: 5)
    server.open()
    thread, seen = in_thread(lambda: guest.port_in(PORT))
    wait_for_requests(server)
    guest.pause()
    closing, _ = in_thread(server.close)
    while looked.count(True) < 3:
        os.sched_yield()
    assert guest.ioreq_servers != {}
    guest.unpause()
    thread.join()
    closing.join()
    assert (seen, server.lost_answers, server.failures) == ([5], 0, 0)


def test_close_does_not_wait_long_for_a_vcpu_that_runs(
    server: IoreqServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If the domain is not paused, the vCPU has a second, not the caller's limit."""
    monkeypatch.setattr(ending, "_TAKE_S", 0.01)
    monkeypatch.setattr(ending, "_untaken", lambda connection: 1)
    server.open()
    server.close()
    assert (server.lost_answers, server.failures) == (1, 1)
    assert " s: 1; its vCPUs did not run in that time" in caplog.text


def test_an_answer_that_nobody_takes_is_counted(
    guest: MockDomain, cache: MapCache, caplog: pytest.LogCaptureFixture
) -> None:
    """After the caller's limit the server is destroyed, and the log says what was lost."""
    server = IoreqServer(guest, cache, answer_timeout=0.05)
    server.claim_ports(PORT, 4).read(lambda offset, size: 5)
    server.open()
    thread, _ = in_thread(lambda: guest.port_in(PORT))
    wait_for_requests(server)
    guest.pause()
    with caplog.at_level(logging.WARNING):
        server.close()
    assert (server.lost_answers, server.failures) == (1, 1)
    assert "domain 1: answers lost, because their vCPUs did not take them in " in caplog.text
    assert " s: 1; unpause the domain before the server is closed" in caplog.text
    guest.unpause()
    thread.join()


def test_close_in_another_thread_ends_serving(
    guest: MockDomain, server: IoreqServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever close comes between the event and the round: serve_forever returns None."""
    results: list[object] = []
    server.open()
    polled, go = threading.Event(), threading.Event()
    real = server._runtime.round

    def late(*, defer: bool = False) -> int | None:
        polled.set()
        assert go.wait(20)
        return real(defer=defer)

    monkeypatch.setattr(server._runtime, "round", late)
    thread = threading.Thread(target=lambda: results.append(server.serve_forever()))
    thread.start()
    assert polled.wait(20)
    server.close()
    go.set()
    thread.join()
    assert results == [None]


@pytest.mark.parametrize("method", ["serve_forever", "serving", "serve_async"])
def test_a_server_that_a_thread_serves(server: IoreqServer, method: str) -> None:
    """A second loop would never end: the two would share a wake-up. It is refused."""
    with server:
        with server.serving():
            served = getattr(server, method)
            with pytest.raises(RuntimeError, match="a thread of its `with server.serving"):
                if method == "serving":
                    served().__enter__()
                elif method == "serve_async":
                    asyncio.run(served())
                else:
                    served()
        with server.serving():  # that thread has ended
            pass


def test_a_round_that_waits_for_a_close(guest: MockDomain, server: IoreqServer) -> None:
    """It finds the server closed when it gets the lock, and says so without an error."""
    server.open()
    results: list[object] = []
    with server._runtime.lock:
        thread, results = in_thread(server._runtime.round)
        server.close()
    thread.join()
    assert results == [None]
    with pytest.raises(ClosedError):
        server.process_pending()


def test_close_in_another_thread_ends_asyncio(guest: MockDomain, server: IoreqServer) -> None:
    """Serve_async returns what serve_forever does."""

    async def main() -> int | None:
        task = asyncio.create_task(server.serve_async())
        await asyncio.sleep(0)
        thread, _ = in_thread(server.close)
        result = await asyncio.wait_for(task, 20)
        thread.join()
        return result

    server.open()
    assert asyncio.run(main()) is None


def test_two_threads_close_at_once(guest: MockDomain, server: IoreqServer) -> None:
    """Both return when the server is closed, and the callbacks are called once."""
    calls: list[int] = []

    def slow() -> None:
        calls.append(1)
        time.sleep(0.01)

    server.on_quiesce(slow)
    server.open()
    threads = [in_thread(server.close) for _ in range(2)]
    for thread, _ in threads:
        thread.join()
    assert (calls, guest.ioreq_servers) == ([1], {})


def test_a_close_during_which_the_watcher_gives_up(
    guest: MockDomain, server: IoreqServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The close stops its own steps, and returns when the watcher has destroyed the server."""
    server.open()
    connection = connection_of(server)
    real, waits = server._runtime.ending, []

    def begun_by_the_watcher(_: Connection) -> list[BaseException]:
        connection.closed = True
        return []

    def sleep(_: float) -> None:
        waits.append(guest.ioreq_servers.copy())
        real.give_up(connection)

    monkeypatch.setattr(real, "close", begun_by_the_watcher)
    monkeypatch.setattr(time, "sleep", sleep)
    server.close()
    assert (len(waits), guest.ioreq_servers) == (1, {})


@pytest.mark.parametrize("step", ["disable", "close"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_step_is_done_again(
    guest: MockDomain,
    server: IoreqServer,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    error: type[BaseException],
) -> None:
    """One interrupt in a close loses nothing, and is raised after it."""
    server.claim_ports(PORT, 4).read(lambda offset, size: 5)
    server.open()
    thread, seen = in_thread(lambda: guest.port_in(PORT))
    wait_for_requests(server)
    link = link_of(server)
    real, errors = getattr(link, step), [error()]

    def interrupted(**options: object) -> None:
        if errors:
            raise errors.pop()
        real(**options)

    monkeypatch.setattr(link, step, interrupted)
    with pytest.raises(error):
        server.close()
    thread.join()
    assert (seen, guest.ioreq_servers) == ([5], {})


def test_what_stays_open_is_closed_by_the_next_call(
    guest: MockDomain, server: IoreqServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a close is interrupted again and again, the server can still be closed."""
    server.open()
    link = link_of(server)

    def interrupt(**_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(link, "close", interrupt)
        with pytest.raises(KeyboardInterrupt):
            server.close()
    assert guest.ioreq_servers != {}
    server.close()
    assert guest.ioreq_servers == {}


def test_an_interrupt_between_two_steps(
    guest: MockDomain, server: IoreqServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps are all done again, and each can be repeated."""
    server.open()
    real, errors = ending._insist, [KeyboardInterrupt()]

    def interrupted(*arguments: object) -> None:
        real(*arguments)  # type: ignore[arg-type] # as it was called
        if errors:
            raise errors.pop()

    monkeypatch.setattr(ending, "_insist", interrupted)
    with pytest.raises(KeyboardInterrupt):
        server.close()
    assert guest.ioreq_servers == {}


# --- what an interrupt leaves behind in a round -----------------------------------------


@pytest.mark.parametrize("returned", [False, True])
def test_a_slot_that_an_interrupt_left(
    guest: MockDomain, server: IoreqServer, returned: bool
) -> None:
    """A value that a handler has returned is the answer; a handler not called is called."""

    def six(offset: int, size: int) -> int:
        return 6

    server.claim_ports(PORT, 4).read(lambda offset, size: 5)
    with server:
        server.process_pending()
        thread, seen = in_thread(lambda: guest.port_in(PORT))
        wait_for_requests(server)
        connection = connection_of(server)
        (channel,) = [c for c in connection.channels.values() if c.slot.state == State.READY]
        channel.job = Job(channel.slot.request())
        channel.slot.begin()
        if returned:
            channel.job.call(six, 0, 4)
        connection._unsettled = True
        assert server.process_pending() == 1
        thread.join()
    assert (seen, server.failures) == ([6 if returned else 5], 0)


def test_a_request_that_is_never_begun_is_given_up(guest: MockDomain, server: IoreqServer) -> None:
    """After three interrupts before its handler the vCPU reads all ones."""
    server.claim_ports(PORT, 4).read(lambda offset, size: 5)
    with server:
        server.process_pending()
        thread, seen = in_thread(lambda: guest.port_in(PORT))
        wait_for_requests(server)
        real = server._dispatcher.perform
        tries: list[Job] = []

        def perform(job: Job) -> None:
            tries.append(job)
            raise MemoryError

        server._dispatcher.perform = perform  # type: ignore[method-assign] # for this test alone
        for _ in range(3):
            with pytest.raises(MemoryError):
                while not seen:
                    server.process_pending()
        server._dispatcher.perform = real  # type: ignore[method-assign] # as it was
        server.process_pending()
        thread.join()
    assert (len(tries), seen, server.failures) == (3, [ONES], 1)


def test_every_port_is_unmasked_after_an_interrupt(
    guest: MockDomain, server: IoreqServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupt between the event and the unmasking does not hide later requests."""
    server.claim_ports(PORT, 4).read(lambda offset, size: 5)
    with server:
        server.process_pending()
        link = link_of(server)
        real, errors = link.unmask, [KeyboardInterrupt()]

        def interrupted(port: int) -> None:
            if errors:
                raise errors.pop()
            real(port)

        monkeypatch.setattr(link, "unmask", interrupted)
        results: list[int] = []

        def work() -> None:
            results.extend(guest.port_in(PORT) for _ in range(3))

        thread, _ = in_thread(work)
        with pytest.raises(KeyboardInterrupt):
            while True:
                server.process_pending()
        while len(results) < 3:
            server.process_pending()
        thread.join()
    assert results == [5, 5, 5]


def test_a_link_that_cannot_be_closed(
    guest: MockDomain, server: IoreqServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Xen's error is raised once, and the server counts as closed."""
    server.open()
    link = link_of(server)
    real = link.close

    def fail(**_: object) -> None:
        real()
        raise XenCallError("destroy", 1, errno.EPERM)

    monkeypatch.setattr(link, "close", fail)
    with pytest.raises(XenCallError):
        server.close()
    assert repr(server) == "<IoreqServer of domain 1, closed>"


def test_an_open_that_is_interrupted_before_there_is_a_connection(
    guest: MockDomain, server: IoreqServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The link that was made is closed."""

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("xenmapcache.devicemodel.server.Connection", fail)
    with pytest.raises(KeyboardInterrupt):
        server.open()
    assert guest.ioreq_servers == {}


def test_a_step_that_is_interrupted_before_it_begins(
    guest: MockDomain, server: IoreqServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupts again and again, before any step: the close is not done, and can be repeated."""
    server.open()
    with monkeypatch.context() as patch:

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(ending.Ending, "_close", interrupt)
        with pytest.raises(KeyboardInterrupt):
            server.close()
    server.close()
    assert guest.ioreq_servers == {}


def test_a_buffered_write_that_was_consumed_and_not_begun(
    guest: MockDomain, server: IoreqServer
) -> None:
    """It is carried out by the next round, before those after it; a third interrupt loses it."""
    written: list[int] = []
    server.claim_mmio(0xA0000, 4).write(lambda offset, size, value: written.append(value))
    with server:
        server.process_pending()
        guest.mmio_write(0xA0000, 1, buffered=True)
        guest.mmio_write(0xA0000, 2, buffered=True)
        real = server._dispatcher.perform

        def interrupt(job: Job) -> None:
            raise KeyboardInterrupt

        server._dispatcher.perform = interrupt  # type: ignore[method-assign] # for this test alone
        with pytest.raises(KeyboardInterrupt):
            server.process_pending()
        server._dispatcher.perform = real  # type: ignore[method-assign] # as it was
        assert server.process_pending() == 1
        assert (written, server.requests) == ([1, 2], 2)
        ring = connection_of(server)._ring
        assert ring is not None
        peeked = Job(server_request(), ring.read_pointer)  # and not consumed
        connection_of(server)._ring_job = (ring, peeked)
        connection_of(server)._unsettled = True
        assert server.process_pending() == 0
        assert written == [1, 2]


def server_request() -> Request:
    return Request(None, RequestKind.MMIO, False, 0xA0000, 9, 4)


def ring_of(server: IoreqServer) -> memoryview:
    ring = link_of(server).ring
    assert ring is not None
    return ring


def test_a_buffered_handler_that_serves_the_rest(guest: MockDomain, server: IoreqServer) -> None:
    """What it has served itself is not served again, and not out of order."""
    written: list[int] = []

    def write(offset: int, size: int, value: int) -> None:
        written.append(value)
        if value == 1:
            guest.mmio_write(0xA0000, 4, buffered=True)
            server.process_pending()

    server.claim_mmio(0xA0000, 4).write(write)
    with server:
        server.process_pending()
        for value in (1, 2, 3):
            guest.mmio_write(0xA0000, value, buffered=True)
        assert server.process_pending() == 4
    assert written == [1, 2, 3, 4]


@pytest.mark.slow
def test_who_answers_is_decided_once(guest: MockDomain, server: IoreqServer) -> None:
    """A handler's thread leaves alone what was given up, and the other way round."""
    with server:
        server.process_pending()
        mock = guest.ioreq_servers[server.id]
        connection = connection_of(server)
        (channel,) = [c for c in connection.channels.values() if c.slot.vcpu == 0]
        mock.send(0, server_request()._replace(vcpu=0))
        channel.slot.begin()
        channel.job = Job(channel.slot.request())
        channel.job.answerer["who"] = "given up"
        connection._tell(channel, channel.job)
        assert channel.slot.state == State.INPROCESS
        channel.job.answerer["who"] = "server"
        server._runtime.ending._give_up_on(connection, channel)
        assert channel.slot.state == State.RESPONSE_READY
        assert mock.wait(0, 20) is not None


def test_the_server_answers_while_it_is_given_up(
    guest: MockDomain, server: IoreqServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that gives up waits for an answer that is just being given."""
    with server:
        server.process_pending()
        mock = guest.ioreq_servers[server.id]
        connection = connection_of(server)
        (channel,) = [c for c in connection.channels.values() if c.slot.vcpu == 0]
        mock.send(0, server_request()._replace(vcpu=0))
        channel.slot.begin()
        channel.job = Job(channel.slot.request())
        channel.job.answerer["who"] = "server"
        monkeypatch.setattr(time, "sleep", lambda _: channel.slot.answer(5))
        server._runtime.ending._give_up_on(connection, channel)
        monkeypatch.undo()
        assert mock.wait(0, 20) == 5


def test_a_slot_that_nobody_knows_at_the_end(guest: MockDomain, server: IoreqServer) -> None:
    """A request that is begun, without a job, is answered with all ones by the close."""
    server.open()
    mock = guest.ioreq_servers[server.id]
    connection = connection_of(server)
    (channel,) = [c for c in connection.channels.values() if c.slot.vcpu == 0]
    mock.send(0, Request(0, RequestKind.PORT, True, PORT, 0, 4))
    channel.slot.begin()
    thread, seen = in_thread(lambda: mock.wait(0, 20))
    server._runtime.ending._answer_all(connection)
    thread.join()
    assert (seen, server.failures) == ([ONES], 1)
    server.close()


def test_a_close_during_the_first_round_of_asyncio(guest: MockDomain, server: IoreqServer) -> None:
    """A deferred INVALIDATE that was closed in between needs no end."""
    with server:
        connection = connection_of(server)
        connection.finish_deferred()
        asyncio.run(server._runtime.finish_deferred())
        assert not server._runtime.is_deferred()
    asyncio.run(server._runtime.quiesce_async())
    server._runtime.give_up_later()
    server._runtime.keep_on()


def test_a_request_that_comes_after_the_settling(guest: MockDomain, server: IoreqServer) -> None:
    """It was on its way when the server was disabled, and is answered before the server goes."""
    server.open()
    mock = guest.ioreq_servers[server.id]
    mock.send(0, Request(0, RequestKind.PORT, True, PORT, 0, 4))
    thread, seen = in_thread(lambda: mock.wait(0, 20))
    server._runtime.ending._answer_all(connection_of(server))
    thread.join()
    assert seen == [ONES]
    server.close()


def test_a_round_of_a_server_whose_callbacks_are_awaited(
    guest: MockDomain, server: IoreqServer
) -> None:
    """Nothing else is served until then; a close does not wait for them."""
    with server:
        connection = connection_of(server)
        (channel,) = [c for c in connection.channels.values() if c.slot.vcpu == 0]
        connection.deferred = channel
        assert connection.process() == 0


def test_closed_between_the_check_and_the_round(
    guest: MockDomain, server: IoreqServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Process_pending says that the server is closed."""
    server.open()
    monkeypatch.setattr(server._runtime, "round", server.close)
    with pytest.raises(ClosedError, match="closed"):
        server.process_pending()


def stop_when_caught() -> None:
    """Send SIGTERM as soon as it is caught: before that it ends this process."""
    while signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGTERM)


def test_signals_of_a_program_that_serves(server: IoreqServer) -> None:
    """SIGTERM while it serves in this thread: the loop ends, and nothing is given up."""
    previous = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with server:
            thread = threading.Thread(target=stop_when_caught, daemon=True)
            thread.start()
            assert server.serve_forever() == signal.SIGTERM
            thread.join()
            assert connection_of(server).calls.watcher.deadline is None
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_a_second_signal_in_one_block() -> None:
    """It raises KeyboardInterrupt, and the first one is the one that counts."""
    firsts: list[int] = []
    previous = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with CaughtSignals(lambda: firsts.append(1)) as signals:
            signal.raise_signal(signal.SIGTERM)
            with pytest.raises(KeyboardInterrupt, match="SIGTERM came twice"):
                signal.raise_signal(signal.SIGTERM)
        assert (firsts, signals.caught) == ([1], [signal.SIGTERM])
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_a_job_that_begins_while_the_watcher_ends(server: IoreqServer) -> None:
    """The watcher looks again before it goes, and another one looks then."""
    job = Job(None)
    jobs = iter([None, job, None, None])
    looked: queue.SimpleQueue[Job | None] = queue.SimpleQueue()

    def current() -> Job | None:
        looked.put(each := next(jobs))
        return each

    watcher = Watcher(1, server.cache, current, lambda: None)
    watcher._idle.clear()  # as for a thread that runs
    watcher._run()
    assert [looked.get(timeout=10) for _ in range(4)] == [None, job, None, None]


def test_a_child_uses_no_server(server: IoreqServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it calls says whose the server is."""
    with server, monkeypatch.context() as patch:
        patch.setattr(server._runtime, "_pid", 0)
        with pytest.raises(ClosedError, match="belongs to process 0, which forked"):
            server.process_pending()


def test_an_answer_can_be_repeated(guest: MockDomain, cache: MapCache) -> None:
    """Counted once, put into the slot once, and notified as often as it takes."""
    with IoreqServer(guest, cache) as server:  # without a ring
        server.process_pending()
        mock = guest.ioreq_servers[server.id]
        connection = connection_of(server)
        (channel,) = [c for c in connection.channels.values() if c.slot.vcpu == 0]
        mock.send(0, Request(0, RequestKind.PORT, True, PORT, 0, 4))
        channel.slot.begin()
        channel.job = Job(channel.slot.request())
        channel.job.counted = True
        connection._tell(channel, channel.job)
        connection._tell(channel, channel.job)
        connection._unsettled = True
        server.process_pending()
        assert mock.wait(0, 20) == ONES
    assert server.requests == 0


def test_a_value_that_was_returned_is_no_failure(guest: MockDomain, server: IoreqServer) -> None:
    """The close that answers in the place of an interrupted round knows what the handler said."""
    server.open()
    mock = guest.ioreq_servers[server.id]
    connection = connection_of(server)
    (channel,) = [c for c in connection.channels.values() if c.slot.vcpu == 0]
    mock.send(0, Request(0, RequestKind.PORT, True, PORT, 0, 4))
    channel.slot.begin()
    channel.job = Job(channel.slot.request())
    channel.job.calls, channel.job.values = 1, [6]
    server._runtime.ending._answer_all(connection)
    assert (mock.wait(0, 20), server.failures) == (6, 0)
    server.close()
