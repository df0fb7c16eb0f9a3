"""A mock guest's PCI code: scanning, sizing, addresses, capabilities, MSI-X and INTx."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kit import Memory, in_thread
from tests.toy_pci import COMMAND, PIN, ToyFunction, ToyMsix
from xenmapcache import DeviceError, MapCache, MockDomain, MockHypervisor, open_backend
from xenmapcache.devicemodel import IoreqServer
from xenmapcache.mock import PciDevice, PciDriver

PCI, IDENT, CLASS = "0000:00:05.0", 0x1001_1AF4, 0x018000


@pytest.fixture
def guest() -> MockDomain:
    return MockHypervisor().create_domain(memory="1M", vcpus=2)


@pytest.fixture
def server(guest: MockDomain) -> Iterator[IoreqServer]:
    """An open server, which a thread serves."""
    with open_backend("mock", domain=guest) as backend, MapCache(backend) as cache:
        with (server := IoreqServer(guest, cache)), server.serving():
            yield server
        assert not server.failures


@pytest.fixture
def function(server: IoreqServer) -> ToyFunction:
    return ToyFunction(server, PCI, IDENT, CLASS)


@pytest.fixture
def driver(guest: MockDomain, server: IoreqServer) -> PciDriver:
    return PciDriver(guest)


# --- scanning --------------------------------------------------------------------------------


def test_a_scan_finds_functions(driver: PciDriver, server: IoreqServer) -> None:
    """Other functions of a device are found only if function 0 says that it has several."""
    for bdf in ("00:00.0", "00:03.0", "00:03.2", "00:04.0", "00:04.1", "00:06.1", "01:00.0"):
        function = ToyFunction(server, bdf, IDENT, CLASS)
        function.config[0x0E] = 0x80 if bdf == "00:03.0" else 0
    found = driver.scan()
    assert [each.bdf[5:] for each in found] == ["00:00.0", "00:03.0", "00:03.2", "00:04.0"]
    assert repr(found[0]) == "<PciDevice 0000:00:00.0 1af4:1001, class 018000>"
    assert repr(driver) == "<PciDriver of mock domain 1>"


def test_an_empty_bus_has_no_functions(driver: PciDriver) -> None:
    """All ones mean that nothing is there."""
    assert driver.scan() == []
    with pytest.raises(DeviceError, match="00:05.0: no PCI function answers"):
        driver.find("00:05.0")


def test_accesses_run_on_the_drivers_vcpu(guest: MockDomain, function: ToyFunction) -> None:
    """One that it was given; else the one whose code the thread runs."""
    with pytest.raises(ValueError, match=r"vCPU 2 must be in 0\.\.1"):
        PciDriver(guest, vcpu=2)
    with guest.vcpu[1]._busy:
        assert PciDriver(guest).find(PCI).vendor_id == 0x1AF4
        guest.vcpu_timeout = 0.01
        with pytest.raises(TimeoutError, match="vCPU 1 .* is busy"):
            PciDriver(guest, vcpu=1).scan()
        with pytest.raises(TimeoutError, match="vCPU 1 .* is busy"):
            guest.spawn(1, PciDriver(guest).scan).result()


@pytest.mark.parametrize(
    ("bdf", "offset", "size", "message"),
    [
        (PCI, 256, 4, "4 bytes at 0x100 must be 1, 2 or 4 within a register"),
        (PCI, -4, 4, "4 bytes at -0x4 must be"),
        (PCI, 3, 2, "2 bytes at 0x3 must be"),
        (PCI, 0, 8, "8 bytes at 0x0 must be"),
        ("0001:00:05.0", 0, 4, "reach segment 0 only"),
    ],
)
def test_what_the_ports_cannot_reach_is_refused(
    driver: PciDriver, bdf: str, offset: int, size: int, message: str
) -> None:
    """Extended configuration space, accesses across registers, and other segments."""
    with pytest.raises(ValueError, match=message):
        driver.read_config(bdf, offset, size)


# --- base address registers --------------------------------------------------------------------


def three_bars(function: ToyFunction) -> Memory:
    """Give a function an I/O BAR, a 32-bit and a 64-bit one; return the device in all of them."""
    device = Memory()
    function.add_bar(0, 0x20, device, flags=1)
    function.add_bar(1, 0x1000, device)
    function.add_bar(4, 0x4000, device, flags=0xC)
    return device


def test_bars_are_sized_as_linux_does(driver: PciDriver, function: ToyFunction) -> None:
    """With decoding off, by all ones; then each register is as it was."""
    three_bars(function)
    function.config[COMMAND] = 3
    before = bytes(function.config)
    bars = driver.find(PCI).bars
    assert {number: (bar.kind, bar.size, bar.prefetchable) for number, bar in bars.items()} == {
        0: ("io", 0x20, False),
        1: ("mmio32", 0x1000, False),
        4: ("mmio64", 0x4000, True),
    }
    assert function.config == before
    assert function.writes[0] == (COMMAND, 2, 0)
    assert function.writes[-1] == (COMMAND, 2, 3)
    ones = [offset for offset, _, value in function.writes if value == 0xFFFFFFFF]
    assert ones == [0x10, 0x14, 0x18, 0x1C, 0x20, 0x24]


def test_enabled_bars_reach_the_device(driver: PciDriver, function: ToyFunction) -> None:
    """Addresses are aligned, above 4 GiB for 64-bit BARs, and work for reads and writes."""
    device = three_bars(function)
    found = driver.find(PCI)
    found.enable()
    assert [bar.address for bar in found.bars.values()] == [0x1000, 0xE0000000, 0x100000000]
    assert function.get(COMMAND, 2) == 7
    for number in found.bars:
        found.write_bar(number, 4, 0x10 + number)
        assert found.read_bar(number, 4, 1) == 0x10 + number
    found.write_bar(4, 8, 0x1122334455667788, 8)
    assert found.read_bar(4, 8, 8) == 0x1122334455667788
    found.disable()
    accesses = len(device.accesses)
    assert (found.read_bar(1, 4), len(device.accesses)) == (0xFFFFFFFF, accesses)
    found.enable()
    assert found.read_bar(1, 4) == 0x14


def test_a_bar_can_be_moved(driver: PciDriver, function: ToyFunction) -> None:
    """Decoding is off while both halves are written, and as before afterwards."""
    three_bars(function)
    found = driver.find(PCI)
    found.enable()
    found.write_bar(4, 0, 5)
    del function.writes[:]
    found.place_bar(4, 0x3_8000_0000)
    assert (found.read_bar(4, 0), function.get(COMMAND, 2)) == (5, 7)
    assert function.writes == [
        (COMMAND, 2, 4),
        (0x20, 4, 0x80000000),
        (0x24, 4, 3),
        (COMMAND, 2, 7),
    ]


def test_addresses_avoid_ram(server: IoreqServer, guest: MockDomain) -> None:
    """A BAR is placed after RAM that lies in its window, aligned to its size."""
    guest.balloon_in(0xE0000000, 0x1000)
    guest.balloon_in(0xE0005000, 0x1000)
    function = ToyFunction(server, PCI, IDENT, CLASS)
    function.add_bar(0, 0x4000, Memory())
    function.add_bar(1, 0x1000, Memory())
    function.add_bar(2, 0x8000, Memory())
    found = PciDriver(guest).find(PCI)
    found.enable()
    assert [bar.address for bar in found.bars.values()] == [0xE0008000, 0xE000C000, 0xE0010000]


def test_a_window_can_be_full(driver: PciDriver, function: ToyFunction) -> None:
    """The error names what was wanted."""
    function.add_bar(0, 1 << 29, Memory())
    with pytest.raises(DeviceError, match=r"no room for a BAR of 0x20000000 bytes \(mmio32\)"):
        driver.find(PCI).enable()


@pytest.mark.parametrize(
    ("flags", "mask", "kept"),
    [(0, 0xFFFF0FF0, 0xFFFF0FF0), (0, 0x00FFF000, 0xFFF000), (1, 0xFF0F, 0xFF0C), (2, 0, 0)],
)
def test_a_bar_that_tells_no_size_is_named(
    driver: PciDriver, function: ToyFunction, flags: int, mask: int, kept: int
) -> None:
    """Write masks with holes, too short, or of a register whose address is fixed at 0."""
    function.put(0x10, flags, 4)
    function.masks[0x10:0x14] = mask.to_bytes(4, "little")
    with pytest.raises(DeviceError, match=f"BAR 0 keeps {kept:#x} of all ones"):
        driver.find(PCI)


def test_a_bar_that_does_not_keep_its_address_is_named(
    driver: PciDriver, function: ToyFunction
) -> None:
    """It is read back, as Linux does."""
    function.add_bar(0, 0x1000, Memory())
    found = driver.find(PCI)
    function.masks[0x13] = 0
    with pytest.raises(DeviceError, match="BAR 0 does not keep address 0xe0000000"):
        found.enable()


def test_a_bridge_has_two_bars(driver: PciDriver, function: ToyFunction) -> None:
    """Registers from 0x18 on are something else there, and unknown headers have no BARs."""
    function.add_bar(1, 0x1000, Memory())
    function.add_bar(2, 0x1000, Memory())
    function.config[0x0E] = 1
    assert [*driver.find(PCI).bars] == [1]
    function.config[0x0E] = 2
    assert [*driver.find(PCI).bars] == []


def test_a_bar_that_cannot_be_used_is_named(driver: PciDriver, function: ToyFunction) -> None:
    """One that does not exist, and one without an address."""
    function.add_bar(1, 0x1000, Memory())
    found = driver.find(PCI)
    with pytest.raises(DeviceError, match=r"00:05.0: it has no BAR 0; it has \[1\]"):
        found.read_bar(0, 0)
    with pytest.raises(DeviceError, match="BAR 1 has no address; call enable"):
        found.write_bar(1, 0, 5)


# --- capabilities and interrupts ------------------------------------------------------------------


@pytest.fixture
def msix(function: ToyFunction) -> ToyMsix:
    return ToyMsix(function, 1, 4)


@pytest.fixture
def found(driver: PciDriver, msix: ToyMsix) -> PciDevice:
    """The function with its MSI-X table, enabled."""
    found = driver.find(PCI)
    found.enable()
    return found


def test_capabilities_are_listed_in_order(driver: PciDriver, function: ToyFunction) -> None:
    """As the function links them; none if its status says that it has no list."""
    offsets = [function.add_capability(number, bytes(6)) for number in (9, 5, 9)]
    found = driver.find(PCI)
    assert found.capabilities() == [*zip((9, 5, 9), offsets, strict=True)]
    assert [found.find_capability(number) for number in (9, 5)] == offsets[:2]
    function.config[6] = 0
    assert found.capabilities() == []
    with pytest.raises(DeviceError, match="it has no capability 0x9"):
        found.find_capability(9)


def test_a_loop_of_capabilities_ends(driver: PciDriver, function: ToyFunction) -> None:
    """It is named instead of being followed for ever."""
    offset = function.add_capability(9, bytes(2))
    function.config[offset + 1] = offset
    with pytest.raises(DeviceError, match="the list of capabilities has a loop"):
        driver.find(PCI).capabilities()


def test_msix_vectors_are_programmed_and_unmasked(
    guest: MockDomain, found: PciDevice, msix: ToyMsix
) -> None:
    """Each has a message of its own; entries that are not used stay masked; INTx is off."""
    first, second = found.enable_msix(2)
    assert (first.address, first.data, second.data) == (0xFEE00000, 0x21, 0x22)
    assert repr(first).startswith("<MsiVector 0xfee00000, 0x21 of <PciDevice 0000:00:05.0")
    assert [msix.table[16 * entry + 12] for entry in range(4)] == [0, 0, 1, 1]
    assert found.read_config(COMMAND, 2) & 0x400
    assert msix.fire(1)
    second.wait()
    assert guest.interrupts == [("msi", 0xFEE00000, 0x22)]
    second.mask()
    assert not msix.fire(1)
    second.unmask()
    thread, _ = in_thread(second.wait)
    assert msix.fire(1)
    thread.join()
    found.disable_msix()
    assert not msix.fire(1)
    assert not found.read_config(COMMAND, 2) & 0x400


def test_the_table_is_masked_before_it_is_programmed(
    found: PciDevice, function: ToyFunction, msix: ToyMsix
) -> None:
    """The function is enabled with all vectors masked, and unmasked as a whole afterwards."""
    del function.writes[:]
    found.enable_msix(1)
    control = [value for offset, _, value in function.writes if offset == msix.control]
    assert control == [0xC000, 0x8000]


def test_xens_pirqs_stay_masked(guest: MockDomain, found: PciDevice, msix: ToyMsix) -> None:
    """Vector 0, the pirq in all 64 bits of the address, and the mask bit of the entry set."""
    first, second = found.enable_msix(2, pirq=0x1FF)
    assert (first.address, first.data) == (0x100_FEEFF000, 0x700)
    assert (second.address, second.data) == (0x200_FEE00000, 0x700)
    assert msix.table[12] == 1
    assert msix.fire(0)
    first.wait()
    with pytest.raises(TimeoutError, match="no interrupt"):
        second.wait(0)


def test_vectors_go_to_the_next_vcpu_when_one_has_no_more(guest: MockDomain) -> None:
    """A message is never used twice; with all vCPUs' vectors taken, the driver says so."""
    driver = PciDriver(guest)
    messages = [driver.message(None) for _ in range(2 * 0xCE)]
    assert len(set(messages)) == 2 * 0xCE
    assert messages[0xCE] == (0xFEE02000, 0x21)
    with pytest.raises(DeviceError, match="all 206 interrupt vectors of each vCPU are taken"):
        driver.message(None)


@pytest.mark.parametrize("vectors", [0, 5])
def test_more_vectors_than_the_table_has_are_refused(found: PciDevice, vectors: int) -> None:
    """Nothing is enabled then."""
    with pytest.raises(DeviceError, match=f"{vectors} MSI-X vectors must be 1 to 4"):
        found.enable_msix(vectors)


MSI_LAYOUTS = {"32 bits": (0, 8, None), "64 bits": (0x80, 12, None), "masks": (0x180, 12, 16)}


@pytest.mark.parametrize("name", MSI_LAYOUTS)
@pytest.mark.parametrize("pirq", [None, 54])
def test_plain_msi_is_programmed(
    driver: PciDriver, function: ToyFunction, name: str, pirq: int | None
) -> None:
    """One message, where the capability has room for it; masks are set with a pirq only."""
    control, data, masks = MSI_LAYOUTS[name]
    start = function.add_capability(5, (control | 0x0A).to_bytes(2, "little") + bytes(18))
    function.masks[start + 2 : start + 20] = b"\x71" + b"\0" + b"\xff" * 16
    found = driver.find(PCI)
    vector = found.enable_msi(pirq=pirq)
    message = (0xFEE36000, 0x700) if pirq else (0xFEE00000, 0x21)
    assert (vector.address, vector.data) == message
    assert (function.get(start + 4, 4), function.get(start + data, 2)) == message
    assert function.get(start + 2, 2) == control | 0x0B
    assert found.read_config(COMMAND, 2) & 0x400
    if masks:
        assert function.get(start + masks, 4) == bool(pirq)
        vector.mask()
        assert function.get(start + masks, 4) == 1
    else:
        with pytest.raises(DeviceError, match="its MSI capability has no mask bits"):
            vector.unmask()
    found.disable_msi()
    assert not function.get(start + 2, 1) & 1
    assert not found.read_config(COMMAND, 2) & 0x400


def test_an_address_that_plain_msi_cannot_hold_is_named(
    driver: PciDriver, function: ToyFunction
) -> None:
    """A pirq above 255 needs 64 bits."""
    function.add_capability(5, bytes(12))
    with pytest.raises(DeviceError, match="MSI address 0x100fee2c000 does not fit its 32 bits"):
        driver.find(PCI).enable_msi(pirq=300)


def test_an_interrupt_pin_is_waited_for(
    driver: PciDriver, function: ToyFunction, server: IoreqServer
) -> None:
    """Until its level is high: a pin that was raised and lowered does not count."""
    found = driver.find(PCI)
    with pytest.raises(DeviceError, match="it has no interrupt pin, because its pin is 0"):
        found.wait_for_intx()
    function.config[PIN] = 2
    for level in (True, False):
        server.set_pci_intx(PCI, 1, level)
    with pytest.raises(TimeoutError, match="no interrupt"):
        found.wait_for_intx(0)
    thread, _ = in_thread(found.wait_for_intx)
    server.set_pci_intx(PCI, 1, True)
    thread.join()
    found.wait_for_intx(0)
