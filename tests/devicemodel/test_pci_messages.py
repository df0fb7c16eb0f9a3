"""MSI and MSI-X on the mock: which messages reach the guest, and none that is lost."""

from __future__ import annotations

import errno
import os
import struct
import threading

import pytest

from tests.devicemodel.pcidriver import BDF, MEMORY, PciDriver, raised
from tests.kit import connection_of, in_thread, link_of, wait_for_the_log
from xenmapcache import ClosedError, MockDomain, XenCallError
from xenmapcache.devicemodel import IoreqServer
from xenmapcache.devicemodel.pci import MsiCapability, MsixTable, PciFunction

MSIX, MSI, TABLE = 0x11, 0x05, 0x1000_0000
ENABLE, MASK_ALL = 0x8000, 0x4000
NATIVE = 0xFEE0_2000
PIRQ, PIRQ_DATA = 0x0000_0100_FEE3_6000, 0x700


@pytest.fixture
def function(served: IoreqServer) -> PciFunction:
    return PciFunction(served, BDF, vendor=0x1AF4, device=0x1041, class_code=0x020000)


@pytest.fixture
def table(guest: MockDomain, function: PciFunction) -> MsixTable:
    """An MSI-X table of four vectors, in a BAR that the guest decodes."""
    table = function.add_msix(1, vectors=4)
    function.plug()
    driver = PciDriver(guest)
    driver.place_bar(1, TABLE)
    driver.command(MEMORY)
    return table


class MsixDriver(PciDriver):
    """The guest's side of MSI-X."""

    guest: MockDomain

    def control(self, bits: int) -> None:
        self.write(self.capability(MSIX) + 2, bits, 2)

    def entry(self, vector: int, address: int, data: int, mask: int = 0) -> None:
        """Program a vector, and then its mask."""
        at = TABLE + 16 * vector
        self.guest.mmio_write(at + 8, data)
        self.guest.mmio_write(at, address, 8)
        self.mask(vector, mask)

    def mask(self, vector: int, mask: int) -> None:
        self.guest.mmio_write(TABLE + 16 * vector + 12, mask)

    @property
    def pending(self) -> int:
        return self.guest.mmio_read(TABLE + 16 * 4, 8)

    @property
    def messages(self) -> list[tuple[object, ...]]:
        return raised(self.guest)


@pytest.fixture
def driver(guest: MockDomain, table: MsixTable) -> MsixDriver:
    return MsixDriver(guest)


# --- MSI-X ----------------------------------------------------------------------------------------


def test_the_guest_finds_table_and_pending_bits(driver: MsixDriver) -> None:
    """The capability says how many vectors there are, and where; only two bits are writable."""
    at = driver.capability(MSIX)
    assert driver.read(at + 2, 2) == 3
    assert (driver.read(at + 4), driver.read(at + 8)) == (1, 64 | 1)
    driver.write(at, 0xFFFFFFFF)
    driver.write(at + 4, 0)
    assert (driver.read(at), driver.read(at + 4)) == (0xC003_0011, 1)


def test_entries_are_masked_at_first(guest: MockDomain, driver: MsixDriver) -> None:
    """The table reads back what was written, by four bytes and by eight."""
    assert guest.mmio_read(TABLE + 8, 8) == 1 << 32
    driver.entry(3, PIRQ, 0x41)
    assert guest.mmio_read(TABLE + 48, 8) == PIRQ
    assert [guest.mmio_read(TABLE + 48 + n) for n in (0, 4, 8, 12)] == [0xFEE36000, 0x100, 0x41, 0]


def test_a_message_is_sent(driver: MsixDriver, table: MsixTable) -> None:
    """Enabled and unmasked, with all 64 bits of the address."""
    driver.entry(2, PIRQ, 0x31)
    driver.control(ENABLE)
    table.notify(2)
    assert (driver.messages, driver.pending) == ([(PIRQ, 0x31)], 0)


def test_a_masked_vector_is_pending(driver: MsixDriver, table: MsixTable) -> None:
    """It is sent once when it is unmasked, however often the device had notified it."""
    driver.entry(1, NATIVE, 0x31, mask=1)
    driver.entry(2, NATIVE, 0x32)
    driver.control(ENABLE)
    for _ in range(3):
        table.notify(1)
    table.notify(2)
    assert (driver.messages, driver.pending) == ([(NATIVE, 0x32)], 2)
    driver.mask(1, 0)
    assert (driver.messages[1:], driver.pending) == ([(NATIVE, 0x31)], 0)


def test_the_function_mask_holds_all(driver: MsixDriver, table: MsixTable) -> None:
    """Whatever is unmasked goes out when the function is; a masked vector stays."""
    for vector in range(4):
        driver.entry(vector, NATIVE, 0x30 + vector, mask=vector == 3)
    driver.control(ENABLE | MASK_ALL)
    for vector in range(4):
        table.notify(vector)
    assert (driver.messages, driver.pending) == ([], 0xF)
    driver.mask(0, 0)
    assert driver.messages == []
    driver.control(ENABLE)
    assert sorted(driver.messages) == [(NATIVE, 0x30 + vector) for vector in range(3)]
    assert driver.pending == 8


def test_nothing_is_sent_before_it_is_enabled(driver: MsixDriver, table: MsixTable) -> None:
    """What was notified before goes out then."""
    driver.entry(0, NATIVE, 0x30)
    enabled = [table.enabled]
    table.notify(0)
    assert (driver.messages, driver.pending) == ([], 1)
    driver.control(ENABLE)
    assert [*enabled, table.enabled] == [False, True]
    assert driver.messages == [(NATIVE, 0x30)]
    driver.control(0)
    table.notify(0)
    assert len(driver.messages) == 1


def test_a_pirq_ignores_the_masks(driver: MsixDriver, table: MsixTable) -> None:
    """Linux never unmasks such a vector: it masks its event channel."""
    driver.entry(0, PIRQ, PIRQ_DATA, mask=1)
    driver.control(ENABLE | MASK_ALL)
    table.notify(0)
    assert driver.messages == [(PIRQ, PIRQ_DATA)]


def test_half_an_entry_is_no_pirq(guest: MockDomain, driver: MsixDriver, table: MsixTable) -> None:
    """While the data is still 0, a pending vector waits for the rest, and is not lost."""
    driver.control(ENABLE)
    table.notify(0)
    guest.mmio_write(TABLE, NATIVE, 8)
    assert driver.messages == []
    guest.mmio_write(TABLE + 8, 0x44)
    driver.mask(0, 0)
    assert driver.messages == [(NATIVE, 0x44)]


@pytest.mark.parametrize(("offset", "size"), [(0, 1), (2, 2), (12, 2), (2, 4), (4, 8), (66, 1)])
def test_other_accesses_are_mistakes(
    guest: MockDomain,
    driver: MsixDriver,
    served: IoreqServer,
    caplog: pytest.LogCaptureFixture,
    offset: int,
    size: int,
) -> None:
    """As the specification allows only four and eight bytes; one line each, nothing changes."""
    assert guest.mmio_read(TABLE + offset, size) == (1 << 8 * size) - 1
    guest.mmio_write(TABLE + offset, 0, size)
    wait_for_the_log(served)
    assert (served.failures, guest.mmio_read(TABLE + 8, 8)) == (2, 1 << 32)
    assert "bytes at" in caplog.text
    assert "Traceback" not in caplog.text


def test_pending_bits_are_read_only(
    guest: MockDomain, driver: MsixDriver, table: MsixTable
) -> None:
    """So is the rest of the BAR, which reads as 0."""
    table.notify(3)
    for offset in (64, 72, 0xFF8):
        guest.mmio_write(TABLE + offset, 0, 8)
    assert (driver.pending, guest.mmio_read(TABLE + 72, 8)) == (8, 0)
    assert guest.mmio_read(TABLE + 0xFF8, 8) == 0


@pytest.mark.parametrize(
    ("vectors", "length"), [(1, 4096), (254, 4096), (255, 8192), (2048, 65536)]
)
def test_the_bar_holds_table_and_pending_bits(
    served: IoreqServer, vectors: int, length: int
) -> None:
    """Its size is a power of two."""
    table = MsixTable(served, "x", vectors)
    assert table.length == length
    table.notify(vectors - 1)
    at = 16 * vectors + (vectors - 1) // 64 * 8
    assert table.read(at, 8) == 1 << (vectors - 1) % 64


def test_reset_disables(driver: MsixDriver, table: MsixTable, function: PciFunction) -> None:
    """Nothing is pending, each entry is empty and masked."""
    driver.entry(0, NATIVE, 0x30)
    driver.control(ENABLE | MASK_ALL)
    table.notify(0)
    function.reset()
    driver.place_bar(1, TABLE)
    driver.command(MEMORY)
    assert driver.pending == 0
    assert driver.guest.mmio_read(TABLE, 8) == 0
    driver.control(ENABLE)
    assert (driver.messages, driver.read(driver.capability(MSIX) + 2, 2)) == ([], ENABLE | 3)


@pytest.mark.parametrize("vectors", [0, 2049, -1])
def test_a_number_of_vectors_that_cannot_be(function: PciFunction, vectors: int) -> None:
    """MSI-X has 1 to 2048."""
    with pytest.raises(ValueError, match=f"vectors must be 1 to 2048, not {vectors}"):
        function.add_msix(0, vectors)


@pytest.mark.parametrize("vector", [4, -1])
def test_a_vector_that_is_none(table: MsixTable, vector: int) -> None:
    """The device is told at once."""
    with pytest.raises(ValueError, match=rf"vector {vector} must be in 0\.\.3"):
        table.notify(vector)


# --- what Xen refuses -----------------------------------------------------------------------------


@pytest.fixture
def refusing(served: IoreqServer, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Xen refuses every message, until the patch is undone."""

    def refuse(*_: object) -> None:
        raise XenCallError("inject_msi", 1, errno.EPERM)

    monkeypatch.setattr(link_of(served), "inject_msi", refuse)
    return monkeypatch


def test_a_refused_message_stays_pending(
    driver: MsixDriver,
    table: MsixTable,
    served: IoreqServer,
    refusing: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The device is not harmed; the log has one line; the guest's next write sends it."""
    driver.entry(0, 0x1000, 0x30)
    driver.control(ENABLE)
    for _ in range(5):
        table.notify(0)
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "PCI function 0000:00:05.0: vector 0 was not sent" in caplog.text
    driver.entry(0, 0x2000, 0x30)
    wait_for_the_log(served)
    assert served.failures == 3
    refusing.undo()
    driver.mask(0, 1)
    driver.entry(0, NATIVE, 0x30)
    assert (driver.messages, driver.pending) == ([(NATIVE, 0x30)], 0)


def test_before_the_server_is_open(server: IoreqServer) -> None:
    """A device that notifies too early is told, and the vector is pending."""
    table = MsixTable(server, "x", 1)
    table.written(ENABLE)
    table.write(8, 8, 0x30)
    with pytest.raises(ClosedError):
        table.notify()
    assert table.read(16, 8) == 1


# --- threads and interrupts -----------------------------------------------------------------------


def test_no_vector_is_lost_between_threads(
    driver: MsixDriver, table: MsixTable, served: IoreqServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers notify while a vCPU masks and unmasks: the last message sees all of their work."""
    done: list[int] = []
    seen: list[int] = []
    monkeypatch.setattr(link_of(served), "inject_msi", lambda *_: seen.append(len(done)))
    driver.entry(0, NATIVE, 0x30)
    driver.control(ENABLE)

    def work() -> None:
        for number in range(200):
            done.append(number)
            table.notify(0)

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        driver.mask(0, 1)
        driver.mask(0, 0)
    assert (seen[-1], driver.pending) == (600, 0)


def test_no_message_comes_after_the_mask(
    driver: MsixDriver, table: MsixTable, served: IoreqServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a message is being sent, the write that masks it waits."""
    sending, go_on = threading.Event(), threading.Event()
    order: list[str] = []

    def send(*_: object) -> None:
        sending.set()
        assert go_on.wait(20)
        order.append("sent")

    monkeypatch.setattr(link_of(served), "inject_msi", send)
    driver.entry(0, NATIVE, 0x30)
    driver.control(ENABLE)
    notifier, _ = in_thread(lambda: table.notify(0))
    assert sending.wait(20)

    def mask() -> None:
        driver.mask(0, 1)
        order.append("masked")

    vcpu, _ = in_thread(mask)
    while connection_of(served).current is None and vcpu.is_alive():
        os.sched_yield()
    go_on.set()
    notifier.join()
    vcpu.join()
    assert order == ["sent", "masked"]


def test_a_signal_handler_notifies_in_the_middle(
    driver: MsixDriver, table: MsixTable, served: IoreqServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that sends already has the lock, and both vectors are sent."""
    real = link_of(served).inject_msi

    def send(address: int, data: int) -> None:
        if data == 0x30:
            table.notify(1)
        real(address, data)

    monkeypatch.setattr(link_of(served), "inject_msi", send)
    for vector in range(2):
        driver.entry(vector, NATIVE, 0x30 + vector)
    driver.control(ENABLE)
    table.notify(0)
    assert driver.messages == [(NATIVE, 0x31), (NATIVE, 0x30)]


def test_an_interrupt_loses_no_vector(
    driver: MsixDriver, table: MsixTable, served: IoreqServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a signal handler cut off is sent with the guest's next write, perhaps again."""
    driver.entry(0, NATIVE, 0x30)
    driver.control(ENABLE)
    with monkeypatch.context() as patch:

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(link_of(served), "inject_msi", interrupt)
        with pytest.raises(KeyboardInterrupt):
            table.notify(0)
    assert driver.pending == 1
    driver.mask(0, 0)
    assert driver.messages == [(NATIVE, 0x30)]


# --- MSI ------------------------------------------------------------------------------------------


class MsiDriver(PciDriver):
    """The guest's side of plain MSI."""

    guest: MockDomain

    def program(self, address: int, data: int, masks: int = 0, used: int = 0) -> None:
        """Write address, data and masks, and then enable ``2 ** used`` vectors."""
        at = self.capability(MSI)
        self.write(at + 4, address & 0xFFFFFFFF)
        self.write(at + 8, address >> 32)
        self.write(at + 12, data, 2)
        self.write(at + 16, masks)
        self.write(at + 2, 1 | used << 4, 2)

    def masks(self, bits: int) -> None:
        self.write(self.capability(MSI) + 16, bits)

    @property
    def pending(self) -> int:
        return self.read(self.capability(MSI) + 20)

    @property
    def messages(self) -> list[tuple[object, ...]]:
        return raised(self.guest)


@pytest.fixture
def msi(function: PciFunction) -> MsiCapability:
    msi = function.add_msi(4)
    function.plug()
    return msi


@pytest.fixture
def msi_driver(guest: MockDomain, msi: MsiCapability) -> MsiDriver:
    return MsiDriver(guest)


def test_msi_as_the_guest_finds_it(msi_driver: MsiDriver) -> None:
    """64-bit addresses, masks, four vectors; what is reserved stays 0."""
    at = msi_driver.capability(MSI)
    assert msi_driver.read(at + 2, 2) == 0x184
    for offset in range(0, 24, 4):
        msi_driver.write(at + offset, 0xFFFFFFFF)
    found = b"".join(struct.pack("<I", msi_driver.read(at + offset)) for offset in range(0, 24, 4))
    assert struct.unpack("<2xHQIII", found) == (0x1F5, (1 << 64) - 4, 0xFFFF, 0xF, 0)


def test_msi_sends_the_vector_in_the_data(msi_driver: MsiDriver, msi: MsiCapability) -> None:
    """If the guest uses fewer vectors than there are, several share a message."""
    enabled = [msi.enabled]
    for used in (0, 1, 2, 7):
        msi_driver.program(PIRQ, 0x44, used=used)
        for vector in range(4):
            msi.notify(vector)
    assert [*enabled, msi.enabled] == [False, True]
    sent = [data for _, data in msi_driver.messages]
    assert sent == [0x44] * 4 + [0x44, 0x45] * 2 + [0x44, 0x45, 0x46, 0x47] * 2
    assert {address for address, _ in msi_driver.messages} == {PIRQ}


def test_a_masked_msi_is_pending(msi_driver: MsiDriver, msi: MsiCapability) -> None:
    """It is sent when it is unmasked; before it is enabled, it is pending, too."""
    msi.notify(1)
    assert msi_driver.pending == 2
    msi_driver.program(NATIVE, 0x44, masks=0x6, used=2)
    msi.notify(0)
    msi.notify(2)
    assert (msi_driver.messages, msi_driver.pending) == ([(NATIVE, 0x44)], 6)
    msi_driver.masks(0x4)
    assert (msi_driver.messages[1:], msi_driver.pending) == ([(NATIVE, 0x45)], 4)


def test_an_msi_of_a_pirq_ignores_the_masks(msi_driver: MsiDriver, msi: MsiCapability) -> None:
    """The data is the guest's, whatever the vector."""
    msi_driver.program(PIRQ, PIRQ_DATA, masks=0xF, used=2)
    msi.notify(2)
    assert msi_driver.messages == [(PIRQ, PIRQ_DATA)]


def test_msi_after_a_reset(
    msi_driver: MsiDriver, msi: MsiCapability, function: PciFunction
) -> None:
    """Disabled, unmasked, with nothing pending."""
    msi_driver.program(NATIVE, 0x44, masks=0xF)
    msi.notify(0)
    function.reset()
    assert (msi.enabled, msi_driver.pending, msi_driver.messages) == (False, 0, [])
    assert msi_driver.read(msi_driver.capability(MSI) + 2, 2) == 0x184


@pytest.mark.parametrize("vectors", [0, 3, 64])
def test_a_number_of_msi_vectors_that_cannot_be(function: PciFunction, vectors: int) -> None:
    """It is a power of two, up to 32."""
    with pytest.raises(ValueError, match=f"vectors must be one of .*32.*, not {vectors}"):
        function.add_msi(vectors)


def test_a_write_at_the_edge_of_the_space(function: PciFunction, guest: MockDomain) -> None:
    """A capability that a wide write reaches in part has the other part as it was."""
    msi = function.add_msi()
    function.plug()
    driver = MsiDriver(guest)
    driver.write(0x3E, 0xFFFFFFFF)
    assert (driver.read(0x40, 1), msi.enabled) == (MSI, False)
