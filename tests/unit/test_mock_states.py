"""States of the mock's domains: paused, suspended, dying; types; device models that were killed."""

from __future__ import annotations

import errno
import gc
import os
import time
from collections.abc import Callable, Iterator
from threading import Thread

import pytest

from tests.kit import in_thread, put_state
from xenmapcache import (
    ClosedError,
    FaultError,
    MapCache,
    MockDomain,
    MockHypervisor,
    XenCallError,
    open_backend,
)
from xenmapcache.errors import UnsupportedOperationError
from xenmapcache.ioreq import Request, RequestKind, RequestSlot, State
from xenmapcache.mock.ioreq_server import MockIoreqServer
from xenmapcache.mock.waiting import Bell, Gate

PORT = 0x510
READ = Request(0, RequestKind.PORT, True, PORT, 0, 4)


@pytest.fixture
def guest() -> MockDomain:
    return MockHypervisor().create_domain(memory="1M", vcpus=2)


@pytest.fixture
def link(guest: MockDomain) -> Iterator[MockIoreqServer]:
    """An ioreq server that has claimed a port and is connected to both vCPUs."""
    yield (link := serve(guest))
    link.close()


def serve(guest: MockDomain, *, recover: bool = False) -> MockIoreqServer:
    link = guest.open_ioreq_server(buffered=False, recover=recover)
    link.enable()
    link.claim(RequestKind.PORT, PORT, PORT + 3)
    for port in (10, 11):
        link.bind(port)
    return link


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        os.sched_yield()


def answer(link: MockIoreqServer, data: int, vcpu: int = 0) -> None:
    slot = RequestSlot(link.page, vcpu)
    until(lambda: slot.state == State.READY)
    slot.begin()
    slot.answer(data)
    link.notify(110 + vcpu)


# --- paused ----------------------------------------------------------------------------


def test_a_paused_vcpu_does_not_take_its_answer(guest: MockDomain, link: MockIoreqServer) -> None:
    """It is told, and looks when the domain goes on."""
    thread, seen = in_thread(lambda: guest.port_in(PORT))
    until(lambda: RequestSlot(link.page, 0).state == State.READY)
    guest.pause()
    answer(link, 0x12345678)
    until(lambda: guest.gate._bells)  # it stands at the gate
    assert RequestSlot(link.page, 0).state == State.RESPONSE_READY
    assert (guest.paused, link.paused, guest.state) == (True, True, "paused")
    guest.unpause()
    thread.join()
    assert seen == [0x12345678]
    assert (guest.paused, link.paused, guest.state) == (False, False, "running")


def test_a_server_destroyed_while_its_vcpu_is_paused(
    guest: MockDomain, link: MockIoreqServer
) -> None:
    """The answer is lost, as on Xen: the guest reads what stood in the request."""
    thread, seen = in_thread(lambda: guest.port_in(PORT))
    until(lambda: RequestSlot(link.page, 0).state == State.READY)
    guest.pause()
    answer(link, 0x12345678)
    link.close()
    guest.unpause()
    thread.join()
    assert seen == [0]


@pytest.mark.parametrize(
    "instruction",
    [
        lambda guest: guest.port_in(PORT),
        lambda guest: guest.mmio_read(0x1000),
        lambda guest: guest.mmio_write(0x1000, 1),
        lambda guest: guest.balloon_out(0x1000, 0x1000),
    ],
)
def test_no_instruction_starts_while_paused(
    guest: MockDomain, link: MockIoreqServer, instruction: Callable[[MockDomain], object]
) -> None:
    """It waits for the domain to go on, but not for ever."""
    guest.vcpu_timeout = 0.01
    guest.pause()
    with pytest.raises(TimeoutError, match="cannot start an instruction: the domain is paused"):
        instruction(guest)
    assert RequestSlot(link.page, 0).state == State.NONE


def test_an_instruction_starts_when_the_domain_goes_on(guest: MockDomain) -> None:
    """Both reasons have to go: a suspended domain may have been paused, too."""
    guest.pause()
    guest.suspend()
    assert guest.state == "suspended"
    thread, seen = in_thread(lambda: guest.port_in(PORT, 1))
    until(lambda: guest.gate._bells)
    guest.unpause()
    assert not seen
    guest.resume()
    thread.join()
    assert seen == [0xFF]


def test_a_pause_is_no_time_of_the_device_model(guest: MockDomain, link: MockIoreqServer) -> None:
    """A vCPU whose time is up while it is paused gets all of it again."""
    link.send(0, READ)
    guest.pause()
    thread, seen = in_thread(lambda: link.wait(0, 0.5))
    until(lambda: guest.gate._bells)  # its half second was up
    guest.unpause()
    answer(link, 7)
    thread.join()
    assert seen == [7]


def test_a_domain_that_stays_paused(guest: MockDomain, link: MockIoreqServer) -> None:
    """Its vCPU says so."""
    link.send(0, READ)
    guest.pause()
    with pytest.raises(TimeoutError, match=r"cannot go on: the domain was paused for 0\.01 s"):
        link.wait(0, 0.01)


# --- killed -----------------------------------------------------------------------------


def test_a_killed_server_is_handed_over(guest: MockDomain, link: MockIoreqServer) -> None:
    """Its vCPU waits until the successor has answered in the old page and told it."""
    thread, seen = in_thread(lambda: guest.port_in(PORT, 2))
    until(lambda: RequestSlot(link.page, 0).state == State.READY)
    assert repr(link) == "<MockIoreqServer 0 of mock domain 1, enabled>"
    link.kill()
    assert repr(link) == "<MockIoreqServer 0 of mock domain 1, killed>"
    assert link.enabled
    second = serve(guest, recover=True)
    (old,) = second.predecessors
    assert (old.id, old.page, old.ring, old.ports) == (0, link.page, None, {0: 0, 1: 1})
    assert guest.ioreq_servers == {0: link, 1: second}
    old.disable()
    slot = RequestSlot(old.page, 0)
    slot.begin()
    slot.answer(0x1234)
    old.notify(old.ports[0])
    thread.join()
    assert seen == [0x1234]
    old.close()
    assert repr(link) == "<MockIoreqServer 0 of mock domain 1, destroyed>"
    second.close()
    assert guest.ioreq_servers == {}


def test_a_request_that_comes_after_the_kill(guest: MockDomain, link: MockIoreqServer) -> None:
    """Xen sends it to the dead server all the same; a disabled one gets none."""
    link.kill()
    thread, seen = in_thread(lambda: guest.port_in(PORT, 1))
    until(lambda: RequestSlot(link.page, 0).state == State.READY)
    second = guest.open_ioreq_server(buffered=False, recover=True)
    second.predecessors[0].disable()
    assert guest.port_in(PORT, 1, vcpu=1) == 0xFF
    second.close()
    thread_ends(link, thread)
    assert seen == [0]  # its server has gone: what stood in the request


def thread_ends(link: MockIoreqServer, thread: Thread) -> None:
    """Have a vCPU look at a server that was destroyed without an answer."""
    link.ring_bell(0)
    thread.join()


def test_who_is_found_by_the_next_one(guest: MockDomain, link: MockIoreqServer) -> None:
    """Only killed servers; those that a living successor has taken over are not found again."""
    second = guest.open_ioreq_server(buffered=True, recover=True)
    assert second.predecessors == []
    link.kill()
    second.kill()  # never enabled: it has no event channels
    third = serve(guest, recover=True)
    assert [each.id for each in third.predecessors] == [0]
    assert guest.open_ioreq_server(buffered=False, recover=True).predecessors == []
    third.kill()
    fourth = serve(guest, recover=True)
    assert [each.id for each in fourth.predecessors] == [0, 2]
    fourth.close()  # which has disabled none of them
    assert [each.id for each in serve(guest, recover=True).predecessors] == [0, 2]
    assert link.enabled


@pytest.mark.parametrize(
    "call",
    [
        lambda link: link.bind(10),
        lambda link: link.notify(110),
        lambda link: link.claim(RequestKind.PORT, 1, 2),
        lambda link: link.fileno(),
        lambda link: link.pending(),
    ],
)
def test_a_dead_device_model_does_nothing(
    guest: MockDomain, link: MockIoreqServer, call: Callable[[MockIoreqServer], object]
) -> None:
    """Its calls fail, and closing does not destroy the server."""
    link.kill()
    with pytest.raises(XenCallError) as caught:
        call(link)
    assert caught.value.errno == errno.EBADF
    link.disable()
    link.close(unmap=False)
    link.unmap()
    assert link.enabled
    assert guest.ioreq_servers == {0: link}


def test_an_interrupted_instruction_is_finished_before_the_next(
    guest: MockDomain, link: MockIoreqServer
) -> None:
    """A real vCPU could not have been interrupted: its request is carried out first."""
    guest.vcpu_timeout = 0.01
    with pytest.raises(TimeoutError, match="has not answered"):
        guest.port_in(PORT)
    guest.vcpu_timeout = 10
    thread, seen = in_thread(lambda: guest.port_in(PORT))
    answer(link, 1)
    until(lambda: RequestSlot(link.page, 0).state == State.READY)
    answer(link, 2)
    thread.join()
    assert seen == [2]
    assert not guest.crashed


def test_an_interrupted_instruction_leaves_its_vcpu_free(
    guest: MockDomain, link: MockIoreqServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever interrupts it."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(link, "send", interrupt)
        with pytest.raises(KeyboardInterrupt):
            guest.port_in(PORT)
    assert guest.port_in(PORT + 8, 1) == 0xFF
    link.send(0, READ)
    put_state(link.page, 0, State.NONE)  # interrupted before the request was ready
    thread, seen = in_thread(lambda: guest.port_in(PORT))
    answer(link, 3)
    thread.join()
    assert seen == [3]


def test_an_answer_that_an_interrupted_vcpu_was_told_of(
    guest: MockDomain, link: MockIoreqServer
) -> None:
    """It is taken before the next request is sent, though the device model tells only once."""
    link.send(0, READ)
    answer(link, 1)
    assert link._bells[0].wait(0)  # and here comes the interrupt
    thread, seen = in_thread(lambda: guest.port_in(PORT))
    answer(link, 2)
    thread.join()
    assert seen == [2]


def test_an_interrupted_balloon_owes_an_invalidate(
    guest: MockDomain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pages are gone, so the next call tells the device models."""
    told: list[int] = []
    guest.on_invalidate(lambda: told.append(1))

    def interrupt(*, vcpu: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(guest, "send_invalidate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            guest.balloon_out(0x1000, 0x1000)
    assert not told
    guest.balloon_out(0x1000, 0x1000)
    assert told == [1]
    guest.balloon_out(0x1000, 0x1000)
    assert told == [1]


def test_an_event_is_raised_and_masked_in_one_step(link: MockIoreqServer) -> None:
    """A signal handler that serves in between masks no port permanently and loses no event."""
    for port in (110, 111):  # binding has raised an event of each
        assert link.pending() == port
        link.unmask(port)
    with link._lock:  # what the handler finds: its own thread has the lock
        link.send(0, READ)
        assert link.pending() == 110
        link.unmask(110)
    assert link.pending() is None
    assert not link._masked


def test_a_server_ends_with_its_domain(guest: MockDomain, link: MockIoreqServer) -> None:
    """Its device model can claim nothing there any longer."""
    guest.destroy()
    with pytest.raises(XenCallError, match="the ioreq server was destroyed") as caught:
        link.claim(RequestKind.PORT, 1, 2)
    assert caught.value.errno == errno.ENOENT


# --- suspended ----------------------------------------------------------------------------


def test_an_image_is_torn_by_a_device_that_still_writes(guest: MockDomain) -> None:
    """Pages are copied when they are sent; a write to one that was sent is not in the image."""
    with open_backend("mock", domain=guest) as backend, MapCache(backend) as cache:
        cache.write(0x1000, b"old")
        cache.write(0x80000, b"old")
        image = guest.suspend()
        assert guest.state == "suspended"
        assert image.send(16) == 16
        cache.write(0x1000, b"new")
        cache.write(0x80000, b"new")
        complete = [image.complete]
        assert image.send() == 256 - 16
        complete.append(image.complete)
        assert complete == [False, True]
        assert (image.read(0x1000, 3), image.read(0x80000, 3)) == (b"old", b"new")
        guest.resume()
    assert guest.state == "running"
    assert guest.read(0x1000, 3) == b"new"


def test_a_log_dirty_round_sends_what_was_written(guest: MockDomain) -> None:
    """Reported pages are sent again, once, and those that were never sent are not."""
    image = guest.suspend()
    guest.dirty_gfns.clear()
    assert image.send(8) == 8
    guest.write(0x1000, b"new")
    guest.dirty_gfns.update({1, 100})
    assert image.send_dirty() == 1
    assert image.read(0x1000, 3) == b"new"
    assert image.send_dirty() == 0
    assert guest.dirty_gfns == {100}


def test_a_restored_guest(guest: MockDomain) -> None:
    """It has the image's memory, holes, type and vCPUs, and frames of its own."""
    guest.balloon_out(0x4000, 0x2000)
    guest.write(0x3FF0, b"before the hole.")
    guest.write(0xFFFFC, b"end.")
    hypervisor = MockHypervisor()
    image = guest.suspend()
    with pytest.raises(ValueError, match=r"not complete: call image\.send\(\) first"):
        hypervisor.restore(image)
    image.send()
    restored = hypervisor.restore(image)
    assert (restored.type, restored.vcpus, restored.memory_end) == ("hvm", 2, 1 << 20)
    assert restored.read(0x3FF0, 16) == b"before the hole."
    assert restored.read(0xFFFFC, 4) == b"end."
    with pytest.raises(FaultError, match="0x4000"):
        restored.read(0x3FF0, 17)
    restored.write(0x3FF0, b"another's memory")
    assert guest.read(0x3FF0, 16) == b"before the hole."


def test_what_an_image_does_not_hold(guest: MockDomain) -> None:
    """It names the first address that was not sent."""
    image = guest.suspend()
    image.send(2)
    assert image.read(0x1FFC, 0) == b""
    with pytest.raises(FaultError) as caught:
        image.read(0x1FFC, 8)
    assert (caught.value.address, caught.value.length) == (0x2000, 4)


# --- types and ends ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pvh", "pv"])
def test_interrupt_lines_are_for_hvm_guests(kind: str) -> None:
    """Nothing is recorded for a guest that has none; messages it has."""
    guest = MockHypervisor().create_domain(memory="64k", type=kind)
    link = MockIoreqServer(guest, 0, buffered=False)
    assert link.guest_type == kind
    calls: list[Callable[[], None]] = [
        lambda: link.set_isa_irq(3, True),
        lambda: link.set_pci_intx((0, 0, 5, 0), 0, True),
    ]
    for call in calls:
        with pytest.raises(UnsupportedOperationError, match=f"{kind.upper()} guest.*inject_msi"):
            call()
    link.inject_msi(0xFEE00000, 0x30)
    assert guest.interrupts == [("msi", 0xFEE00000, 0x30)]


def test_interrupt_lines_of_an_hvm_guest(guest: MockDomain, link: MockIoreqServer) -> None:
    """Recorded, in order; and a guest is one by default."""
    link.set_isa_irq(3, True)
    link.set_pci_intx((0, 0, 5, 0), 1, False)
    assert guest.interrupts == [("isa", 3, True), ("intx", "0000:00:05.0", 1, False)]
    assert guest.type == link.guest_type == "hvm"


def test_a_pv_guest_has_no_guest_physical_memory() -> None:
    """Each page fails with EINVAL, and there are no ioreq servers, as on Xen."""
    guest = MockHypervisor().create_domain(memory="64k", type="pv")
    guest.write(0, b"its own")
    with open_backend("mock", domain=guest) as backend, MapCache(backend) as cache:
        with pytest.raises(FaultError) as caught:
            cache.read(0, 1)
        assert backend.present(0, 1) is None
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(XenCallError, match="a PV guest has no ioreq servers"):
        guest.open_ioreq_server(buffered=False)
    assert guest.read(0, 7) == b"its own"


def test_the_end_of_a_domain(guest: MockDomain) -> None:
    """Dying for as long as its memory is mapped, then gone."""
    mapping = guest.map(0, 1, writable=False)
    guest.destroy()
    assert guest.state == "dying"
    assert repr(guest) == "<MockDomain 1, hvm, 0x100000 bytes, dying>"
    del mapping
    assert guest.state == "gone"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"type": "hvm64"}, "type must be one of .*, not 'hvm64'"),
        ({"vcpus": 129}, "vcpus must be 1 to 128, not 129"),
    ],
)
def test_no_such_guest(options: dict[str, object], message: str) -> None:
    """Refused by name."""
    with pytest.raises(ValueError, match=message):
        MockHypervisor().create_domain(**options)  # type: ignore[arg-type] # wrong on purpose


def test_it_says_what_it_is(guest: MockDomain) -> None:
    """In a traceback or a debugger."""
    assert repr(guest) == "<MockDomain 1, hvm, 0x100000 bytes, running>"
    assert repr(guest.vcpu[1]) == "<Vcpu 1 of mock domain 1>"
    assert repr(MockHypervisor()) == "<MockHypervisor with 0 domains>"
    assert repr(open_backend("mock", domain=guest)) == f"<MockBackend of {guest!r}>"


# --- reports of written pages ----------------------------------------------------------


def test_log_dirty_can_be_switched_off(guest: MockDomain) -> None:
    """As over Xen, while the guest is not being migrated."""
    with open_backend("mock", domain=guest) as backend, MapCache(backend) as cache:
        backend.log_dirty = False
        cache.write(0x1000, b"x")
        assert not guest.dirty_gfns
        backend.log_dirty = True
        cache.write(0x2000, b"x")
    assert guest.dirty_gfns == {2}


def test_pages_beyond_the_end_cannot_be_reported(guest: MockDomain) -> None:
    """Xen refuses them, however many they are."""
    for gfn, count in ((256, 1), (1, 1 << 32)):
        with pytest.raises(XenCallError, match="memory ends at 0x100000"):
            guest.mark_dirty(gfn, count)
    assert not guest.dirty_gfns
    assert guest.calls[-1] == ("mark_dirty", 1, 1 << 32, errno.EINVAL)


# --- other processes, finalizers, numbers --------------------------------------------------


def test_a_forked_child_leaves_the_parents_guest_alone(guest: MockDomain) -> None:
    """All that needs the guest is refused in the child."""
    calls: list[Callable[[], object]] = [
        lambda: guest.read(0, 1),
        lambda: guest.write(0, b"x"),
        lambda: guest.balloon_out(0, 0x1000),
        lambda: guest.balloon_in(0, 0x1000),
        lambda: guest.port_in(PORT),
        lambda: guest.open_ioreq_server(buffered=False),
        lambda: guest.suspend(),
    ]
    child = os.fork()
    if not child:
        refused = 0
        for call in calls:
            try:
                call()
            except ClosedError:
                refused += 1
        os._exit(refused)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == len(calls)
    assert guest.read(0, 1) == b"\0"


def test_a_finalizer_in_a_cycle_still_reads_the_guest() -> None:
    """The memfd is closed by reference counts, so after all finalizers."""
    seen: list[bytes] = []

    class Late:
        def __init__(self) -> None:
            self.guest = MockHypervisor().create_domain(memory="64k")
            self.guest.write(0, b"late")
            self.me = self

        def __del__(self) -> None:
            seen.append(self.guest.read(0, 4))

    Late()
    gc.collect()
    assert seen == [b"late"]


class Number:
    """As NumPy's integers."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


def test_numbers_of_other_types(guest: MockDomain, link: MockIoreqServer) -> None:
    """Whatever has __index__ is an int."""
    vcpu = Number(1)
    assert guest.port_in(Number(PORT + 8), Number(2), vcpu=vcpu) == 0xFFFF  # type: ignore[arg-type] # it works
    guest.mmio_write(Number(0x1000), Number(0x1234), Number(2))  # type: ignore[arg-type] # as well
    assert guest.mmio_read(Number(0x1000), Number(4)) == 0x1234  # type: ignore[arg-type] # as well
    assert guest.read(Number(0x1000), Number(2)) == b"\x34\x12"  # type: ignore[arg-type] # as well
    guest.port_in_string(PORT + 8, Number(0x2000), Number(3), 1)  # type: ignore[arg-type] # as well
    assert guest.read(0x2000, 4) == b"\xff\xff\xff\0"
    assert guest.pci_read("00:00.0", Number(4), 1) == 0xFF  # type: ignore[arg-type] # as well
    guest.inject_fault("map", errno=Number(errno.EIO), gfn=Number(3), nth=Number(1))  # type: ignore[arg-type] # as well
    mapping = guest.map(3, 1, writable=False)
    assert mapping.errors == bytes([errno.EIO])


@pytest.mark.parametrize("delay", [-1, float("nan"), float("inf")])
def test_no_call_takes_such_a_time(guest: MockDomain, delay: float) -> None:
    """Refused when the fault is injected, not when it happens."""
    with pytest.raises(ValueError, match="delay must be a number of seconds from 0 on"):
        guest.inject_fault("map", delay=delay)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda guest: guest.port_in_string(PORT, -1, 1), "address -0x1 must be in"),
        (lambda guest: guest.mmio_read(1 << 64), "address 0x10000000000000000 must be in"),
        (lambda guest: guest.mmio_fill(0x1000, 1, 1 << 32), "count 4294967296 must be in"),
    ],
)
def test_numbers_that_no_request_can_carry(
    guest: MockDomain, call: Callable[[MockDomain], object], message: str
) -> None:
    """A request has 64 bits for an address and 32 for a count."""
    with pytest.raises(ValueError, match=message):
        call(guest)


def test_strings_of_another_size_take_no_memory(guest: MockDomain) -> None:
    """Memory that is not there is found before anything is written or allocated."""
    guest.write(0, bytes(8))
    with pytest.raises(FaultError):
        guest.port_in_string(PORT, 0, (1 << 32) - 1, 4)
    assert guest.read(0, 8) == bytes(8)


# --- waiting -----------------------------------------------------------------------------


def test_a_bell_rings_once() -> None:
    """Rung twice before it is waited for, it wakes one time."""
    bell = Bell()
    bell.ring()
    bell.ring()
    assert bell.wait(0)
    assert not bell.wait(-1)


def test_a_gate_that_is_closed_again_stays_closed() -> None:
    """A waiter that was woken looks at the reasons again, and an opening is not missed."""
    gate = Gate()
    gate.close("first")
    gate.close("second")
    thread, seen = in_thread(lambda: gate.wait(10))
    until(lambda: gate._bells)
    gate.open("first")
    assert gate.reasons == ("second",)
    assert not gate.wait(0)
    gate.open("second")
    thread.join()
    assert seen == [True]
    assert not gate._bells
