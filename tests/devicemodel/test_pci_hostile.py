"""A guest that writes anything anywhere in a PCI function: answered, bounded, and no claim left."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.devicemodel.pcidriver import BDF, PciDriver, claims_of
from tests.effort import examples
from tests.kit import Memory, ask, wait_for_the_log
from xenmapcache import MapCache, MockDomain, MockHypervisor, open_backend
from xenmapcache.devicemodel import IoreqServer, report
from xenmapcache.devicemodel.pci import PciFunction
from xenmapcache.devicemodel.registers import RegisterBank
from xenmapcache.ioreq import BUS_OFFSET, Request, RequestKind, bdf_number

CONFIG = bdf_number(BDF) << BUS_OFFSET
ADDRESSES = (0, 0x1000, 0xE000_0000, 0xFFFF_F000, 0xFFFF_FFFF, 0xC)


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[MockDomain, IoreqServer]]:
    """One guest and one server for all examples."""
    guest = MockHypervisor().create_domain(memory="1M", vcpus=1)
    guest.vcpu_timeout = 20.0
    with open_backend("mock", domain=guest) as backend, MapCache(backend) as cache:
        server = IoreqServer(guest, cache)
        with server, server.serving():
            yield guest, server


def full(server: IoreqServer) -> PciFunction:
    """Return a function that has everything."""
    bank = RegisterBank("bank", 64, sizes=(1, 4))
    bank.add("control", 0, 4, mask=0xFFFF)
    bank.add("clock", 8, 8, read=lambda: 5)
    function = PciFunction(
        server, BDF, vendor=0x1AF4, device=0x1041, class_code=0x020000, interrupt_pin=1
    )
    function.add_bar(0, 64, bank)
    function.add_bar(1, 4096, Memory(), kind="mmio64", prefetchable=True)
    function.add_bar(3, 32, Memory(), kind="io")
    function.add_msix(4, 3)
    function.add_msi(2)
    function.add_capability(9, bytes(14), b"\xff" * 14)
    return function


WORDS = st.one_of(st.sampled_from(ADDRESSES), st.integers(0, (1 << 32) - 1))
OFFSETS = st.one_of(
    st.sampled_from([4, 5, 0x10, 0x14, 0x18, 0x1C, 0x20, 0x42, 0x4E]), st.integers(0, 0x104)
)
CONFIG_STEPS = st.tuples(
    st.just("config"), st.booleans(), OFFSETS, st.sampled_from([1, 2, 4, 4, 8]), WORDS
)
BAR_STEPS = st.tuples(
    st.just("bar"),
    st.booleans(),
    st.integers(0, 80),
    st.sampled_from([1, 2, 4, 4, 8]),
    st.integers(0, (1 << 64) - 1),
)
DEVICE_STEPS = st.tuples(
    st.just("device"), st.booleans(), st.integers(0, 2), st.just(0), st.just(0)
)


@settings(
    max_examples=examples(150),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(st.one_of(CONFIG_STEPS, CONFIG_STEPS, BAR_STEPS, DEVICE_STEPS), max_size=40))
def test_any_accesses_are_answered(
    served: tuple[MockDomain, IoreqServer],
    caplog: pytest.LogCaptureFixture,
    steps: list[tuple[str, bool, int, int, int]],
) -> None:
    """No traceback, at most one claim for each BAR, none after `unplug`, and 0xff at the end."""
    guest, server = served
    function = full(server)
    function.plug()
    caplog.clear()
    guest.interrupts.clear()
    before = server.requests
    sent = 0
    # Decoding is on from the start, so that wrong addresses are claimed.
    ask(guest, server, Request(0, RequestKind.PCI_CONFIG, False, CONFIG | 4, 7, 2))
    for what, is_read, offset, size, value in steps:
        if what == "device":
            function.set_interrupt(is_read)
            for messages in function._messages:
                messages.notify(offset % messages.vectors)
            continue
        kind, address = RequestKind.PCI_CONFIG, CONFIG | offset
        if what == "bar":
            claims = [c for c in claims_of(guest) if c[0] != kind]
            if not claims:
                continue
            kind, first, _ = claims[value % len(claims)]
            address = first + offset
        answer = ask(guest, server, Request(0, kind, is_read, address, value, size))
        assert answer is not None
        sent += 1
        assert len(claims_of(guest)) <= 5
    assert server.requests == before + sent + 1
    function.unplug()
    assert claims_of(guest) == set()
    wait_for_the_log(server)
    assert "Traceback" not in caplog.text
    assert len(guest.interrupts) <= 8 * len(steps)


def test_a_guest_that_moves_bars_fills_no_log(
    served: tuple[MockDomain, IoreqServer], caplog: pytest.LogCaptureFixture
) -> None:
    """A thousand wrong places have one line for each BAR, and a few of the region."""
    guest, server = served
    function = full(server)
    function.plug()
    driver = PciDriver(guest)
    driver.command(7)
    for number in range(1000):
        driver.write(0x10, 0)
        driver.write(0x1C, 0x10000 + 32 * number)
    function.unplug()
    wait_for_the_log(server)
    assert len(caplog.records) <= 2 * report._BURST
    assert len(caplog.text) < 5000
    assert claims_of(guest) == set()


def test_unplug_while_the_guest_writes(served: tuple[MockDomain, IoreqServer]) -> None:
    """However the two meet, nothing hangs, and no claim is left."""
    guest, server = served
    function = full(server)
    driver = PciDriver(guest)
    done = threading.Event()

    def toggle() -> None:
        while not done.is_set():
            driver.write(0x10, 0xE000_0000)
            driver.command(7)
            driver.command(0)

    vcpu = threading.Thread(target=toggle)
    vcpu.start()
    try:
        for _ in range(100):
            function.plug()
            function.reset()
            function.unplug()
            assert claims_of(guest) == set()
    finally:
        done.set()
        vcpu.join()
    assert claims_of(guest) == set()
