"""A PCI function on the mock: what a guest reads, and which claims follow what it writes."""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from typing import Any

import pytest

from tests.devicemodel.pcidriver import (
    BDF,
    COMMAND,
    INTX_DISABLE,
    IO,
    MASTER,
    MEMORY,
    ONES,
    STATUS,
    Claims,
    FoundBar,
    PciDriver,
    claims_of,
    new,
    raised,
)
from tests.kit import Memory, in_thread, link_of, wait_for_the_log
from xenmapcache import (
    ClosedError,
    MapCache,
    MockDomain,
    MockHypervisor,
    XenCallError,
    open_backend,
)
from xenmapcache.devicemodel import IoreqServer
from xenmapcache.devicemodel.pci import PciBus, PciFunction, bars
from xenmapcache.devicemodel.regions import Region
from xenmapcache.errors import UnsupportedOperationError
from xenmapcache.ioreq import RequestKind, bdf_number

MMIO, PCI, PORT = RequestKind.MMIO, RequestKind.PCI_CONFIG, RequestKind.PORT
HERE = (PCI, bdf_number(BDF), bdf_number(BDF))
LOW, HIGH, PORTS = 0x1000_0000, 0x1_0000_0000, 0x1000


@pytest.fixture
def function(served: IoreqServer) -> PciFunction:
    """A function with a BAR of each kind, plugged."""
    function = new(served)
    function.add_bar(0, 4096, Memory())
    function.add_bar(1, 0x2000, Memory(), kind="mmio64", prefetchable=True)
    function.add_bar(3, 32, Memory(), kind="io")
    function.plug()
    return function


@pytest.fixture
def driver(guest: MockDomain, function: PciFunction) -> PciDriver:
    return PciDriver(guest)


def place_all(driver: PciDriver) -> None:
    driver.place_bar(0, LOW)
    driver.place_bar(1, HIGH)
    driver.place_bar(3, PORTS)


DECODED: Claims = {
    HERE,
    (MMIO, LOW, LOW + 0xFFF),
    (MMIO, HIGH, HIGH + 0x1FFF),
    (PORT, PORTS, PORTS + 31),
}


# --- what a guest reads ---------------------------------------------------------------------------


def test_identity(guest: MockDomain, served: IoreqServer) -> None:
    """Each number of the description stands where the specification puts it."""
    function = new(served, interrupt_pin=2)
    function.plug()
    driver = PciDriver(guest)
    assert driver.read(0) == 0x1041_1AF4
    assert driver.read(0x08) == 0x0200_005A
    assert driver.read(0x0C) == 0
    assert driver.read(0x2C) == 0x5678_1234
    assert driver.read(0x3C, 2) == 0x0200
    assert driver.read(STATUS, 2) == 0
    assert driver.read(0xFC) == 0
    assert driver.read(0xFE, 4) == 0


def test_what_a_guest_may_write(driver: PciDriver) -> None:
    """The identity stays; the command register, latency and interrupt line change."""
    for offset in range(0, 0x40, 4):
        if not 0x10 <= offset < 0x28:
            driver.write(offset, ONES)
    assert driver.read(0) == 0x1041_1AF4
    assert driver.read(COMMAND, 2) == IO | MEMORY | MASTER | 0x100 | INTX_DISABLE
    assert driver.read(0x08) == 0x0200_005A
    assert driver.read(0x0C) == 0x0000_FFFF
    assert driver.read(0x3C) == 0x0000_00FF


def test_a_function_decodes_what_it_has(guest: MockDomain, served: IoreqServer) -> None:
    """Without BARs of a kind, the guest cannot turn their decoding on."""
    new(served).plug()
    driver = PciDriver(guest)
    driver.command(IO | MEMORY)
    assert driver.read(COMMAND, 2) == 0


def test_there_is_no_extended_space(driver: PciDriver) -> None:
    """From byte 256 on, reads are all ones, and writes have no effect and no line in the log."""
    driver.write(0x100, 0)
    assert driver.read(0x100) == ONES
    assert driver.read(0xFFE, 2) == 0xFFFF


def test_functions_of_one_device(guest: MockDomain, served: IoreqServer) -> None:
    """Function 0 says whether there are others."""
    new(served, multifunction=True).plug()
    new(served, "00:05.1").plug()
    assert [PciDriver(guest, f"0000:00:05.{n}").read(0x0E, 1) for n in range(2)] == [0x80, 0]


# --- capabilities ---------------------------------------------------------------------------------


def test_capabilities_are_a_list(guest: MockDomain, served: IoreqServer) -> None:
    """In the order in which they were added, aligned, and with their writable bits."""
    function = new(served)
    first = function.add_capability(0x09, b"\x05abc", b"\0\x0f")
    second = function.add_capability(0x0A, bytes(10))
    function.plug()
    driver = PciDriver(guest)
    assert driver.capabilities() == [(first, 9), (second, 10)] == [(0x40, 9), (0x48, 10)]
    driver.write(first + 2, ONES)
    assert driver.read(first + 2) == int.from_bytes(b"\x05\x6fbc", "little")


@pytest.mark.parametrize(
    ("identifier", "body", "writable"),
    [(9, b"", b""), (9, bytes(191), b""), (9, b"ab", b"abc"), (256, b"a", b""), (-1, b"a", b"")],
)
def test_a_capability_that_cannot_be(
    server: IoreqServer, identifier: int, body: bytes, writable: bytes
) -> None:
    """It is refused, and the list stays as it was."""
    function = new(server)
    with pytest.raises(ValueError, match="capability"):
        function.add_capability(identifier, body, writable)
    assert function.add_capability(9, bytes(190)) == 0x40
    with pytest.raises(ValueError, match=r"capability 0xa: its 1 bytes must fit 0x102\.\.0x100"):
        function.add_capability(10, b"a")


# --- BARs -----------------------------------------------------------------------------------------


def test_linux_finds_sizes_and_claims_follow(guest: MockDomain, driver: PciDriver) -> None:
    """Sizing, placing and decoding as Linux does: three claims, and the devices answer."""
    assert [driver.size_bar(number) for number in (0, 1, 3, 4)] == [
        FoundBar(4096, 0x0),
        FoundBar(0x2000, 0xC),
        FoundBar(32, 0x1),
        None,
    ]
    place_all(driver)
    assert claims_of(guest) == {HERE}
    driver.command(MEMORY)
    assert claims_of(guest) == DECODED - {(PORT, PORTS, PORTS + 31)}
    driver.command(IO | MEMORY | MASTER)
    assert claims_of(guest) == DECODED
    guest.mmio_write(LOW + 8, 0x1234)
    guest.mmio_write(HIGH + 0xFF8, 0x55, 8)
    guest.port_out(PORTS + 4, 7, 1)
    found = guest.mmio_read(LOW + 8), guest.mmio_read(HIGH + 0xFF8, 8), guest.port_in(PORTS + 4, 1)
    assert found == (0x1234, 0x55, 7)


def test_toggling_is_quiet_and_cheap(
    guest: MockDomain,
    driver: PciDriver,
    served: IoreqServer,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sizing under decoding costs one claim and one release for each BAR and turn, no line."""
    place_all(driver)
    driver.command(IO | MEMORY)
    calls: list[str] = []
    link = link_of(served)

    def counted(name: str) -> Callable[..., None]:
        real: Callable[..., None] = getattr(link, name)

        def call(*arguments: object) -> None:
            calls.append(name)
            real(*arguments)

        return call

    for name in ("claim", "unclaim"):
        monkeypatch.setattr(link, name, counted(name))
    for number in (0, 1, 3):
        driver.size_bar(number)
    driver.write(COMMAND, IO | MEMORY, 2)
    driver.write(0x3C, 5, 1)
    assert sorted(calls) == ["claim"] * 9 + ["unclaim"] * 9
    assert (claims_of(guest), served.failures, caplog.records) == (DECODED, 0, [])


def test_sizing_while_decoding_is_quiet(
    guest: MockDomain, driver: PciDriver, served: IoreqServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A register of all ones asks for the size: it is not claimed, and not a mistake."""
    place_all(driver)
    driver.command(IO | MEMORY)
    for offset in (0x10, 0x14, 0x18, 0x1C):
        before = driver.read(offset)
        driver.write(offset, ONES)
        assert claims_of(guest) < DECODED | {(MMIO, 0x1_FFFF_E000, 0x1_FFFF_FFFF)}
        driver.write(offset, before)
    assert claims_of(guest) == DECODED
    wait_for_the_log(served)
    assert (served.failures, caplog.records) == (0, [])


def test_a_64_bit_bar_moves_half_by_half(guest: MockDomain, driver: PciDriver) -> None:
    """While the guest decodes it, the claim follows each half, and ends at the right place."""
    driver.command(MEMORY)
    driver.place_bar(1, 0x8000_0000)
    assert (MMIO, 0x8000_0000, 0x8000_1FFF) in claims_of(guest)
    driver.place_bar(1, 0x5_4000_0000)
    assert claims_of(guest) == {HERE, (MMIO, 0x5_4000_0000, 0x5_4000_1FFF)}
    driver.command(0)
    driver.place_bar(1, HIGH)
    assert claims_of(guest) == {HERE}


def test_a_bar_of_more_than_4_gib(guest: MockDomain, served: IoreqServer) -> None:
    """Its lower half has flags only."""
    function = new(served)
    function.add_bar(0, 1 << 33, Memory(), kind="mmio64")
    function.plug()
    driver = PciDriver(guest)
    assert driver.size_bar(0) == FoundBar(1 << 33, 0x4)
    driver.place_bar(0, 1 << 40)
    driver.command(MEMORY)
    assert (MMIO, 1 << 40, (1 << 40) + (1 << 33) - 1) in claims_of(guest)
    driver.place_bar(0, (1 << 52) - (1 << 33))
    assert len(claims_of(guest)) == 2


def test_bars_exchange_their_addresses(guest: MockDomain, driver: PciDriver) -> None:
    """With decoding on, the write that makes room makes both claims right."""
    driver.place_bar(0, LOW)
    driver.place_bar(1, LOW + 0x10000)
    driver.command(MEMORY)
    driver.write(0x10, LOW + 0x10000)
    assert len(claims_of(guest)) == 2
    driver.write(0x14, LOW)
    assert claims_of(guest) == {
        HERE,
        (MMIO, LOW + 0x10000, LOW + 0x10FFF),
        (MMIO, LOW, LOW + 0x1FFF),
    }


@pytest.mark.parametrize(
    ("number", "address", "problem"),
    [
        (0, 0, "BAR 0 at 0x0..0x1000 is not claimed: the guest decodes it without an address"),
        (1, 1 << 52, "is not claimed: it ends beyond 0x10000000000000"),
        (3, 0x10000, "BAR 3 at 0x10000..0x10020 is not claimed: it ends beyond 0x10000"),
        (3, 0x620, "is not claimed: <PORT region 0x620..0x640> overlaps <PORT region 0x630..0x631"),
    ],
)
def test_a_place_that_is_none_is_reported_once(
    guest: MockDomain,
    driver: PciDriver,
    served: IoreqServer,
    caplog: pytest.LogCaptureFixture,
    number: int,
    address: int,
    problem: str,
) -> None:
    """The guest's write counts; the BAR is not claimed; the log has one line, until it is reset."""
    served.claim_ports(0x630, 1)
    place_all(driver)
    driver.place_bar(number, address)
    for _ in range(10):
        driver.command(IO | MEMORY)
        driver.command(0)
    driver.command(IO | MEMORY)
    assert len(claims_of(guest) & DECODED) == 3
    wait_for_the_log(served)
    assert [problem in record.getMessage() for record in caplog.records] == [True]
    assert served.failures == 1
    place_all(driver)
    assert claims_of(guest) >= DECODED


def test_a_claim_that_xen_refuses(
    guest: MockDomain, driver: PciDriver, served: IoreqServer, caplog: pytest.LogCaptureFixture
) -> None:
    """The other BARs are claimed; the next write tries it again."""
    place_all(driver)
    guest.inject_fault("claim", errno=errno.ENOSPC)
    driver.command(IO | MEMORY)
    assert claims_of(guest) == DECODED - {(MMIO, LOW, LOW + 0xFFF)}
    driver.command(IO | MEMORY)
    assert claims_of(guest) == DECODED
    wait_for_the_log(served)
    assert "BAR 0 at 0x10000000..0x10001000 is not claimed: " in caplog.text
    assert served.failures == 1


def test_a_release_that_xen_refuses(
    guest: MockDomain,
    driver: PciDriver,
    served: IoreqServer,
    function: PciFunction,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The claim stays, is reported, and is released at the next write or `unplug`."""
    place_all(driver)
    driver.command(IO | MEMORY)
    with monkeypatch.context() as patch:

        def refuse(*_: object) -> None:
            raise XenCallError("unclaim", 1, errno.EBUSY)

        patch.setattr(link_of(served), "unclaim", refuse)
        driver.command(0)
        wait_for_the_log(served)
        assert "BAR 0 at 0x10000000..0x10001000 is still claimed at 0x10000000" in caplog.text
        assert claims_of(guest) == DECODED
        with pytest.raises(XenCallError):
            function.unplug()
        assert "not plugged" not in repr(function)
    function.unplug()
    assert claims_of(guest) == set()


@pytest.mark.parametrize(
    ("number", "size", "options", "message"),
    [
        (6, 4096, {}, r"BAR 6 must be in 0\.\.5 for mmio32"),
        (-1, 4096, {}, r"BAR -1 must be in 0\.\.5"),
        (5, 4096, {"kind": "mmio64"}, r"BAR 5 must be in 0\.\.4 for mmio64"),
        (0, 4096, {"kind": "rom"}, "kind 'rom' must be one of mmio32, mmio64, io"),
        (0, 0, {}, "size 0x0 must be a power of 2"),
        (0, 0x1800, {}, "size 0x1800 must be a power of 2"),
        (0, 8, {}, r"size 0x8 must be a power of 2 in 0x10\.\."),
        (0, 1 << 32, {}, "size 0x100000000 must be a power of 2"),
        (0, 512, {"kind": "io"}, r"size 0x200 must be a power of 2 in 0x4\.\.0x100 for io"),
        (0, 16, {"kind": "io", "prefetchable": True}, "ports cannot be prefetchable"),
        (3, 4096, {}, "register bar3 overlaps register bar2"),
        (2, 4096, {}, "register bar2 was added before"),
    ],
)
def test_a_bar_that_cannot_be(
    server: IoreqServer, number: int, size: int, options: dict[str, Any], message: str
) -> None:
    """The author of a device is told at once."""
    function = new(server)
    function.add_bar(2, 4096, Memory(), kind="mmio64")
    with pytest.raises(ValueError, match=message):
        function.add_bar(number, size, Memory(), **options)


def test_a_device_without_methods(server: IoreqServer) -> None:
    """It is refused when the BAR is added, not when a guest decodes it."""
    with pytest.raises(TypeError, match="BAR 0: device .* has neither read"):
        new(server).add_bar(0, 4096, object())  # type: ignore[arg-type] # wrong on purpose


# --- interrupt pin --------------------------------------------------------------------------------


def test_the_pin_follows_device_and_guest(guest: MockDomain, served: IoreqServer) -> None:
    """The status bit shows the device's level, the line also the guest's choice."""
    function = new(served, interrupt_pin=2)
    function.plug()
    driver = PciDriver(guest)
    function.set_interrupt(True)
    function.set_interrupt(True)
    assert driver.read(STATUS, 2) == 0x8
    driver.command(INTX_DISABLE)
    assert driver.read(STATUS, 2) == 0x8
    driver.command(0)
    function.set_interrupt(False)
    driver.command(INTX_DISABLE)
    function.set_interrupt(True)
    assert driver.read(COMMAND) == 0x8_0000 | INTX_DISABLE
    assert raised(guest) == [(1, True), (1, False), (1, True), (1, False)]


@pytest.mark.parametrize("pin", [-1, 5])
def test_a_pin_that_cannot_be(server: IoreqServer, pin: int) -> None:
    """INTA is 1, INTD is 4."""
    with pytest.raises(ValueError, match=f"interrupt_pin must be 0 .* to 4, not {pin}"):
        new(server, interrupt_pin=pin)


def test_a_function_without_a_pin(served: IoreqServer) -> None:
    """The device is told that it has none."""
    with pytest.raises(ValueError, match=r"0000:00:05\.0 has no interrupt pin"):
        new(served).set_interrupt(True)


def test_a_pvh_guest_has_no_pins() -> None:
    """The server refuses, and the guest's own writes stay harmless."""
    guest = MockHypervisor().create_domain(memory="1M", type="pvh")
    with open_backend("mock", domain=guest) as backend, MapCache(backend) as cache:
        with IoreqServer(guest, cache) as server, server.serving():
            function = new(server, interrupt_pin=1)
            function.plug()
            with pytest.raises(UnsupportedOperationError, match="no interrupt lines"):
                function.set_interrupt(True)
            PciDriver(guest).command(INTX_DISABLE)
            assert server.failures == 0
    assert guest.interrupts == []


# --- life -----------------------------------------------------------------------------------------


def test_unplug_and_plug_again(guest: MockDomain, driver: PciDriver, function: PciFunction) -> None:
    """Without it the guest reads all ones; plugged again, it is as new."""
    place_all(driver)
    driver.command(IO | MEMORY)
    driver.write(0x3C, 9, 1)
    function.unplug()
    function.unplug()
    assert (claims_of(guest), driver.read(0), guest.mmio_read(LOW)) == (set(), ONES, ONES)
    function.plug()
    assert claims_of(guest) == {HERE}
    assert (driver.read(0), driver.read(COMMAND), driver.read(0x10), driver.read(0x3C)) == (
        0x1041_1AF4,
        0,
        0,
        0,
    )


def test_reset_releases_and_lowers(guest: MockDomain, served: IoreqServer) -> None:
    """Nothing is decoded, the line is low, and the guest can set it up again."""
    function = new(served, interrupt_pin=1)
    function.add_bar(0, 4096, Memory())
    function.plug()
    driver = PciDriver(guest)
    driver.place_bar(0, LOW)
    driver.command(MEMORY)
    function.set_interrupt(True)
    function.reset()
    assert claims_of(guest) == {HERE}
    assert driver.read(COMMAND) == 0
    assert raised(guest) == [(0, True), (0, False)]
    driver.place_bar(0, LOW)
    driver.command(MEMORY)
    assert len(claims_of(guest)) == 2


def test_reset_before_plug(guest: MockDomain, served: IoreqServer) -> None:
    """A function that is not plugged stays so."""
    new(served).reset()
    assert claims_of(guest) == set()


@pytest.mark.parametrize("action", ["reset", "unplug"])
def test_a_handler_can_end_its_own_bar(guest: MockDomain, served: IoreqServer, action: str) -> None:
    """The write that asks for it is answered, and the claim is gone then."""
    function = new(served)

    class Control:
        def write(self, offset: int, size: int, value: int) -> None:
            getattr(function, action)()

    function.add_bar(0, 4096, Control())
    function.plug()
    driver = PciDriver(guest)
    driver.place_bar(0, LOW)
    driver.command(MEMORY)
    guest.mmio_write(LOW, 1)
    assert claims_of(guest) == ({HERE} if action == "reset" else set())
    assert served.failures == 0


def test_unplug_waits_for_a_handler_that_runs(guest: MockDomain, served: IoreqServer) -> None:
    """A write of the command register that is under way leaves no claim."""
    function = new(served)
    function.add_bar(0, 4096, Memory())
    function.plug()
    driver = PciDriver(guest)
    driver.place_bar(0, LOW)
    unplugs: list[Any] = []
    real = function._place

    def place() -> str:
        unplugs.append(in_thread(function.unplug))
        problems = real()
        assert unplugs[0][0].is_alive()
        return problems

    function._place = place  # type: ignore[method-assign] # for this test
    driver.command(MEMORY)
    unplugs[0][0].join()
    assert (claims_of(guest), served.failures) == (set(), 0)


def test_it_is_described_before_it_is_plugged(function: PciFunction) -> None:
    """A guest that has seen it relies on what it saw."""
    additions: list[Callable[[], object]] = [
        lambda: function.add_bar(4, 4096, Memory()),
        lambda: function.add_capability(9, b"a"),
        lambda: function.add_msix(4, 1),
        lambda: function.add_msi(),
        function.plug,
    ]
    for add in additions:
        with pytest.raises(ValueError, match=r"05\.0 of domain 1, plugged>: it is plugged"):
            add()


def test_one_place_has_one_function(guest: MockDomain, served: IoreqServer) -> None:
    """The second one is refused, and can be plugged when the first has gone."""
    first, second = new(served), new(served)
    first.plug()
    with pytest.raises(ValueError, match=r"overlaps <PCI_CONFIG region 0000:00:05\.0>"):
        second.plug()
    second.unplug()
    first.unplug()
    second.plug()
    assert claims_of(guest) == {HERE}


def test_after_the_server(guest: MockDomain, server: IoreqServer) -> None:
    """A closed server has released everything: `unplug` accepts that, and `plug` does not."""
    function = new(server, interrupt_pin=1)
    function.add_bar(0, 4096, Memory())
    function.plug()
    with server, server.serving():
        driver = PciDriver(guest)
        driver.place_bar(0, LOW)
        driver.command(MEMORY)
        function.set_interrupt(True)
    function.unplug()
    with pytest.raises(ClosedError):
        function.plug()


def test_a_bdf_without_segment(server: IoreqServer) -> None:
    """It is shown in full; what names no function is refused."""
    assert repr(new(server, "00:05.0")) == "<PciFunction 0000:00:05.0 of domain 1, not plugged>"
    with pytest.raises(ValueError, match="must name a PCI function"):
        new(server, "5.0")
    with pytest.raises(ValueError, match="register vendor: value 0x10000 and mask 0x0 must fit"):
        PciFunction(server, BDF, vendor=0x10000, device=0, class_code=0)
    for code in (0xFF, 0x200, 0xFFFF):
        with pytest.raises(ValueError, match="must have the class in bits 16 to 23"):
            PciFunction(server, BDF, vendor=1, device=0, class_code=code)
    for code in (0, 0x100, 0x10000, 0xFF0000):
        PciFunction(server, BDF, vendor=1, device=0, class_code=code)


# --- the bus --------------------------------------------------------------------------------------


def test_linux_finds_the_bus(guest: MockDomain, served: IoreqServer) -> None:
    """Its probe: a byte to 0xcfb, the address reads back, and bus 0 has a host bridge."""
    bus = PciBus(served)
    bus.plug()
    guest.port_out(0xCFB, 0x01, 1)
    before = guest.port_in(0xCF8)
    guest.port_out(0xCF8, 0x8000_0000)
    assert guest.port_in(0xCF8) == 0x8000_0000
    guest.port_out(0xCF8, before)
    assert PciDriver(guest, "0000:00:00.0").read(0x0A, 2) == 0x0600
    assert served.failures == 0
    bus.unplug()
    bus.unplug()
    assert (claims_of(guest), guest.port_in(0xCF8)) == (set(), ONES)
    bus.plug()


def test_a_scan_of_all_buses_is_not_served(guest: MockDomain, served: IoreqServer) -> None:
    """What Linux reads before it looks for the bus costs a few requests; the bus is found then."""
    PciBus(served).plug()
    bridge = PciDriver(guest, "0000:00:00.0")
    for _ in range(3):
        before = served.requests
        for place in range(0x8000_0000, 0x8010_0000, 0x800):
            guest.port_out(0xCF8, place)
            assert guest.port_in(0xCFC) == (0x1237_8086 if place == 0x8000_0000 else ONES)
        assert served.requests - before <= 64 + 1
        assert guest.port_in(0xCF8) == ONES
        assert bridge.read(0x0A, 2) == 0x0600
        guest.port_out(0xCFB, 0x01, 1)
        assert guest.port_in(0xCF8) == 0x0100_0000
        guest.port_out(0xCF8, 0x8000_0000)
        assert guest.port_in(0xCF8) == 0x8000_0000
    assert served.failures == 0


def test_an_address_that_is_read_each_time(guest: MockDomain, served: IoreqServer) -> None:
    """A kernel that keeps and restores the address always finds it."""
    PciBus(served).plug()
    for _ in range(100):
        before = guest.port_in(0xCF8)
        guest.port_out(0xCF8, 0x8000_0008)
        assert guest.port_in(0xCFC) >> 8 == 0x060000
        guest.port_out(0xCF8, before)
    assert guest.port_in(0xCF8) == 0


@pytest.mark.parametrize("scan", [0, 64])
def test_the_bus_is_unplugged_amid_a_scan(
    guest: MockDomain, served: IoreqServer, monkeypatch: pytest.MonkeyPatch, scan: int
) -> None:
    """The handler that would claim another part of the port claims nothing then."""
    bus = PciBus(served)
    bus.plug()
    for _ in range(scan):
        guest.port_out(0xCF8, 0x8000_0000)
    real = bars.release

    def release(region: Region) -> None:
        guest.port_out(0xCFB, 1, 1)
        for _ in range(64):
            guest.port_out(0xCF8, 0x8000_0000)
        real(region)

    monkeypatch.setattr("xenmapcache.devicemodel.pci.bus.release", release)
    bus.unplug()
    assert (claims_of(guest), served.failures) == (set(), 0)


def test_a_bus_that_cannot_be_plugged(guest: MockDomain, served: IoreqServer) -> None:
    """Nothing of it stays."""
    other = served.claim_pci("0000:00:00.0", Memory())
    bus = PciBus(served)
    with pytest.raises(ValueError, match="overlaps"):
        bus.plug()
    assert claims_of(guest) == {(PCI, 0, 0)}
    other.release()
    bus.plug()
    with pytest.raises(ValueError, match="overlaps"):
        bus.plug()
    assert len(claims_of(guest)) == 2


def test_structs_are_little_endian(guest: MockDomain, served: IoreqServer) -> None:
    """A capability's body is what the guest reads, byte by byte."""
    function = new(served)
    at = function.add_capability(9, struct.pack("<HI", 0x1122, 0x33445566))
    function.plug()
    driver = PciDriver(guest)
    assert bytes(driver.read(at + 2 + n, 1) for n in range(6)) == b"\x22\x11\x66\x55\x44\x33"
