"""Code of a mock guest in threads: which vCPU it runs on, and where its exceptions go."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from tests.kit import Memory
from xenmapcache import MapCache, MockDomain, MockHypervisor, open_backend
from xenmapcache.devicemodel import IoreqServer
from xenmapcache.events import RequestHandled

PORT = 0x510


@pytest.fixture
def guest() -> MockDomain:
    return MockHypervisor().create_domain(memory="1M", vcpus=3)


@pytest.fixture
def hold() -> Iterator[threading.Event]:
    """What code of a guest waits for; set when the test ends."""
    event = threading.Event()
    yield event
    event.set()


def test_a_result_comes_back(guest: MockDomain) -> None:
    """With positional and keyword arguments, and as often as it is asked for."""
    code = guest.spawn(1, guest.port_in, PORT, size=2)
    assert (code.result(), code.result()) == (0xFFFF, 0xFFFF)
    assert repr(code) == "<GuestCode port_in on <Vcpu 1 of mock domain 1>, done>"
    guest.join()


def test_instructions_run_on_the_vcpu(guest: MockDomain) -> None:
    """Those that name no vCPU take the one that the code was given; others stay as they are."""
    handled: list[int | None] = []

    def observe(event: object) -> None:
        if isinstance(event, RequestHandled):
            handled.append(event.vcpu)

    def code(vcpus: list[int | None]) -> None:
        for vcpu in vcpus:
            guest.port_in(PORT, vcpu=vcpu)

    with open_backend("mock", domain=guest) as backend, MapCache(backend) as cache:
        server = IoreqServer(guest, cache)
        server.claim_ports(PORT, 4, Memory())
        with server, server.serving(), server.observe(observe):
            guest.spawn(2, code, [None, 1]).result()
            code([None])
            guest.spawn(1, guest.balloon_out, 0x1000, 0x1000).result()
    assert handled[:4] == [2, 1, 0, 1]


def test_a_vcpu_of_another_guest_is_not_taken(guest: MockDomain) -> None:
    """Code of one guest that drives another one uses that guest's first vCPU."""
    other = MockHypervisor().create_domain(memory="64k")
    assert guest.spawn(2, other.vcpu_at, None).result() is other.vcpu[0]
    assert guest.spawn(2, guest.vcpu_at, None).result() is guest.vcpu[2]


def fail(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize("error", [KeyError("a"), SystemExit(3), AssertionError("no")])
def test_an_exception_is_passed_on_once(guest: MockDomain, error: BaseException) -> None:
    """By result(); join() does not raise it again."""
    code = guest.spawn(0, fail, error)
    with pytest.raises(type(error)) as caught:
        code.result()
    assert caught.value is error
    assert "failed" in repr(code)
    guest.join()


def test_join_passes_on_what_nobody_asked_for(guest: MockDomain) -> None:
    """One exception as it is, several as a group, and each once."""
    guest.spawn(0, fail, KeyError("a"))
    guest.spawn(1, guest.port_in, PORT)
    with pytest.raises(KeyError, match="a"):
        guest.join()
    guest.spawn(0, fail, KeyError("b"))
    guest.spawn(1, fail, ValueError("c"))
    with pytest.raises(BaseExceptionGroup, match="code of the guest failed") as caught:
        guest.join()
    assert [type(each) for each in caught.value.exceptions] == [KeyError, ValueError]
    guest.join()


@pytest.mark.parametrize("wait", ["result", "join"])
def test_code_that_does_not_end_is_named(
    guest: MockDomain, hold: threading.Event, wait: str
) -> None:
    """A wait ends with its timeout, and the error says which code runs on which vCPU."""
    code = guest.spawn(1, hold.wait)
    waits: dict[str, Callable[[float], object]] = {"result": code.result, "join": guest.join}
    with pytest.raises(TimeoutError, match="GuestCode wait on <Vcpu 1 .*running> has not ended"):
        waits[wait](0.01)
    hold.set()
    assert code.result()


def test_a_vcpu_that_does_not_exist_runs_nothing(guest: MockDomain) -> None:
    """It is refused before a thread starts."""
    with pytest.raises(ValueError, match=r"vCPU 3 must be in 0\.\.2"):
        guest.spawn(3, guest.port_in, PORT)
    guest.join()
