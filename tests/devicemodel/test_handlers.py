"""Handlers that raise, return nonsense, close or serve: what the guest sees all the same."""

from __future__ import annotations

import errno
import logging

import pytest

from tests.kit import (
    in_thread,
    link_of,
    put_state,
    wait_for_requests,
    wait_for_the_log,
)
from xenmapcache import (
    ClosedError,
    MockDomain,
    XenCallError,
)
from xenmapcache.devicemodel import IoreqServer
from xenmapcache.ioreq import State

PORT, MMIO, VGA, PCI = 0x510, 0xF000_0000, 0xA0000, "0000:00:05.0"
KIT = "xenmapcache.devicemodel"


def test_a_handler_that_raises(
    guest: MockDomain, live: IoreqServer, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged with its request; reads give all ones; the server goes on."""
    region = live.claim_ports(0x600, 4)

    @region.read
    def read(offset: int, size: int) -> int:
        raise KeyError("no register")

    @region.write
    def write(offset: int, size: int, value: int) -> None:
        raise OSError("disk on fire")

    assert guest.port_in(0x602, 2, vcpu=3) == 0xFFFF
    guest.port_out(0x600, 0xAB, 1)
    wait_for_the_log(live)
    first, second = (record for record in caplog.records if record.name == KIT)
    assert first.getMessage() == (
        "domain 1: vCPU 3: PORT read of 2 bytes at 0x602: failed: KeyError: 'no register'"
    )
    assert "KeyError: 'no register'" in caplog.text
    assert second.getMessage() == (
        "domain 1: vCPU 0: PORT write of 1 bytes at 0x600, data 0xab: failed: OSError: disk on fire"
    )
    assert {first.levelno, second.levelno} == {logging.ERROR}
    assert live.failures == 2
    assert guest.port_in(PORT) == 0


@pytest.mark.parametrize("value", [None, "1", 1.0, -1, 0x100])
def test_a_handler_that_returns_nonsense(
    guest: MockDomain, live: IoreqServer, value: object, caplog: pytest.LogCaptureFixture
) -> None:
    """A result that is not a number of that size is logged, and reads all ones."""
    live.claim_ports(0x600, 1).read(lambda offset, size: value)  # type: ignore[type-var] # wrong on purpose
    assert guest.port_in(0x600, 1) == 0xFF
    assert live.failures == 1
    wait_for_the_log(live)
    assert "PORT read of 1 bytes at 0x600: failed" in caplog.text


def test_a_read_handler_that_returns_none_is_named(
    guest: MockDomain, live: IoreqServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Without `return` the log names the handler, and what it must return."""

    def forgetful(offset: int, size: int) -> None:
        pass

    live.claim_ports(0x600, 1).read(forgetful)  # type: ignore[type-var] # wrong on purpose
    assert guest.port_in(0x600, 1) == 0xFF
    wait_for_the_log(live)
    assert "at 0x600: failed: read handler <function" in caplog.text
    assert "forgetful at 0x" in caplog.text
    assert "returned None; it must return the number that the guest reads" in caplog.text


def test_a_string_that_fails_in_the_middle(guest: MockDomain, live: IoreqServer) -> None:
    """What was read before arrives, the rest is all ones; the handler is not asked again."""
    values = iter([1, 2])
    calls: list[int] = []

    def read(offset: int, size: int) -> int:
        calls.append(offset)
        return next(values)

    live.claim_ports(0x600, 1).read(read)
    guest.port_in_string(0x600, 0x1000, 4, 1)
    assert guest.read(0x1000, 5) == b"\x01\x02\xff\xff\0"
    assert (len(calls), live.failures) == (3, 1)


@pytest.mark.parametrize("address", [VGA - 4, VGA, (1 << 64) - 4])
def test_data_that_is_not_there(
    guest: MockDomain, live: IoreqServer, address: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A string instruction over a hole, or no address at all, is answered and logged."""
    guest.port_out_string(PORT, address, 2)
    guest.port_in_string(PORT, address, 2)
    assert live.failures == 2
    wait_for_the_log(live)
    assert f"data at {address:#x}" in caplog.text
    assert guest.port_in(PORT) == 0


def test_an_interrupted_handler_has_answered(guest: MockDomain, server: IoreqServer) -> None:
    """A handler that is ended by KeyboardInterrupt reads all ones, and the interrupt goes on."""

    def read(offset: int, size: int) -> int:
        raise KeyboardInterrupt

    server.claim_ports(PORT, 4).read(read)
    with server:
        thread, seen = in_thread(lambda: guest.port_in(PORT))
        wait_for_requests(server)
        with pytest.raises(KeyboardInterrupt):
            server.process_pending()
        thread.join()
    assert seen == [0xFFFFFFFF]


@pytest.mark.slow
def test_a_vcpu_that_nobody_serves(guest: MockDomain, server: IoreqServer) -> None:
    """The mock's vCPU gives up with a reason, where a real one would wait for ever."""
    guest.vcpu_timeout = 0.01
    server.claim_ports(PORT, 4)
    with server:
        with pytest.raises(TimeoutError, match="vCPU 0 of mock domain 1 is stuck.*another thread"):
            guest.port_in(PORT)


def test_the_mock_notices_a_broken_protocol(guest: MockDomain, live: IoreqServer) -> None:
    """A state that goes astray would crash a real guest: here it raises."""
    mock = guest.ioreq_servers[live.id]
    put_state(mock.page, 2, State.INPROCESS)
    with pytest.raises(RuntimeError, match="Xen would crash the domain"):
        guest.port_in(PORT, vcpu=2)
    assert "vCPU 2" in guest.crashed
    put_state(mock.page, 2, State.NONE)


def test_a_handler_that_closes(guest: MockDomain, server: IoreqServer) -> None:
    """Its own request is answered with all ones, and serving ends."""

    def read(offset: int, size: int) -> int:
        server.close()
        return 5

    server.claim_ports(PORT, 4).read(read)
    with server, server.serving():
        assert guest.port_in(PORT) == 0xFFFFFFFF
    assert guest.ioreq_servers == {}
    assert server.failures == 1


def test_serving_needs_an_open_server(server: IoreqServer) -> None:
    """It says so at once, not when its block has ended."""
    with pytest.raises(ClosedError, match="use it inside `with server:`"), server.serving():
        pytest.fail("the block has begun")


def test_a_handler_that_stops(guest: MockDomain, server: IoreqServer) -> None:
    """Its request is answered with what it returns; then serve_forever returns."""

    def read(offset: int, size: int) -> int:
        server.stop()
        return 5

    server.claim_ports(PORT, 4).read(read)
    with server:
        thread, seen = in_thread(lambda: guest.port_in(PORT))
        assert server.serve_forever() is None
        thread.join()
    assert seen == [5]


def test_a_buffered_handler_that_serves(guest: MockDomain, server: IoreqServer) -> None:
    """It runs once, whatever it does itself; so does one that closes."""
    ran: list[int] = []

    def write(offset: int, size: int, value: int) -> None:
        ran.append(value)
        if value == 1:
            wait_for_requests(server)
            server.process_pending()
        else:
            server.close()

    server.claim_mmio(VGA, 4).write(write)
    server.claim_ports(PORT, 4).read(lambda offset, size: 5)
    with server:
        server.process_pending()
        guest.mmio_write(VGA, 1, buffered=True)
        thread, seen = in_thread(lambda: guest.port_in(PORT, vcpu=1))
        while server.process_pending() or not ran:
            pass
        thread.join()
        guest.mmio_write(VGA, 2, buffered=True)
        while not server._runtime.closed:
            server.process_pending()
    assert (ran, seen) == ([1, 2], [5])


@pytest.mark.parametrize("error", [KeyboardInterrupt(), XenCallError("notify", 1, errno.EIO)])
@pytest.mark.parametrize("goes_on", [False, True])
def test_a_notify_that_does_not_come_through(
    guest: MockDomain, server: IoreqServer, error: BaseException, goes_on: bool
) -> None:
    """Who was answered and not told is told when it serves again, or closes; others too."""
    server.claim_ports(PORT, 4).read(lambda offset, size: 5)
    with server:
        server.process_pending()
        threads = [in_thread(lambda v=v: guest.port_in(PORT, vcpu=v)) for v in range(4)]  # type: ignore[misc] # mypy cannot infer it
        wait_for_requests(server, 4)
        link = link_of(server)
        notify, errors = link.notify, [error]

        def fail_once(port: int) -> None:
            if errors:
                raise errors.pop()
            notify(port)

        link.notify = fail_once  # type: ignore[method-assign] # for this test alone
        if goes_on:
            with pytest.raises(type(error)):
                while True:  # an event follows its request
                    server.process_pending()
            while not all(seen for _, seen in threads):
                server.process_pending()
        else:
            with pytest.raises(type(error)):
                server.close()
    for thread, _ in threads:
        thread.join()
    seen = [each for _, (each,) in threads]
    assert seen == [5] * 4
