"""VirtioMmio: the virtio-mmio transport, version 2."""

# Theory of operation
#
# The driver reads and writes registers of 4 bytes at offsets up to 0xfc, and the device's
# configuration space from 0x100 on. The driver's steps are in
# `negotiation.py`.
#
# Rules
#   1. A queue is started once, with features that were negotiated.
#   2. If a reset times out, the status stays as it was, and the driver sees that.
#   3. The line's level is "interrupt status is not 0". Workers raise bits, the serving thread
#      clears them, and each calls the line without a lock. After a call, each looks whether the
#      level is still right, and calls again if it is not. So the last call tells the truth. In
#      between the line may be high for a moment without a bit: drivers ignore such an interrupt.

from __future__ import annotations

import struct
import threading
from collections.abc import Callable

from ...cache.locked import locked
from ...errors import CorruptImageError
from ..regions import Region
from ..server import IoreqServer
from .device import VirtioDevice
from .negotiation import CHANGED, DRIVER_OK, USED, Negotiation

MAGIC = 0x74726976
VENDOR = 0x004D4358
LENGTH = 0x200
"""Bytes of guest-physical addresses, configuration space included."""
CONFIG = 0x100

_LOW = 0xFFFFFFFF
_STATE = struct.Struct("<BQIII")
"""What a process that goes on needs: the status, the driver's features, and what is selected."""
_QUEUE_STATE = struct.Struct("<IQQQ")
"""What the driver has written about a queue: its size and addresses."""
_ADDRESSES = {
    0x080: ("descriptors", 0),
    0x084: ("descriptors", 32),
    0x090: ("driver", 0),
    0x094: ("driver", 32),
    0x0A0: ("device", 0),
    0x0A4: ("device", 32),
}
"""The registers of a queue's addresses: which area, and how far the half is shifted."""


class _Queue:
    """What the driver has written about a queue."""

    __slots__ = ("addresses", "ready", "size")

    def __init__(self) -> None:
        self.addresses = {"descriptors": 0, "driver": 0, "device": 0}
        self.size = 0
        self.ready = False


class VirtioMmio:
    """A device's registers in the guest's address space. It claims them at once.

    A guest finds it by its ACPI tables (``LNRO0005``) or device tree, or by the kernel argument
    ``virtio_mmio.device=`` if the kernel has it. Follows virtio 1.2, section 4.2.

    Args:
        server: whose guest has the driver.
        address: guest-physical, of 0x200 bytes without RAM.
        device: gets what the driver does; its ``transport`` becomes this one.
        interrupt: sets the level of the interrupt line, such as
            ``partial(server.set_isa_irq, 7)`` of an HVM guest, or of an Arm guest
            ``partial(server.set_irq_level, 40)``. Any thread calls it.

    Attributes:
        region: the claim; release it to unplug the device.

    Raises:
        ValueError: the device's record is of a driver that has accepted other features.
        CorruptImageError: the record is of another transport.

    Synchronization: the guest's accesses come in the thread that serves; the device may call
    :meth:`interrupt_queue` and its siblings in any thread.
    """

    repeatable = True  # no write of a driver counts: each one sets what is to be

    def __init__(
        self,
        server: IoreqServer,
        address: int,
        device: VirtioDevice,
        *,
        interrupt: Callable[[bool], object],
    ) -> None:
        self._device = device
        self._line = interrupt
        self._lock = threading.RLock()
        self._raised = self._generation = 0
        self._forget()
        device.transport = self
        self._restore()
        self.region: Region = server.claim_mmio(address, LENGTH, self)

    def __repr__(self) -> str:
        return f"<VirtioMmio at {self.region!r}, status {self._driver.shown:#x}, {self._device!r}>"

    def _forget(self) -> None:
        self._driver = Negotiation(self._device)
        self._device_half = self._driver_half = 0
        self._selected = 0
        self._queues = [_Queue() for _ in self._device.queue_sizes]

    # --- what outlives a kill -------------------------------------------------------------------

    def _save(self) -> None:
        if self._device.record is not None:
            selected = (self._device_half, self._driver_half, self._selected)
            state = _STATE.pack(self._driver.status, self._driver.features, *selected)
            queues = [
                _QUEUE_STATE.pack(each.size, *each.addresses.values()) for each in self._queues
            ]
            self._device.record.save(b"".join([state, *queues]))

    def _restore(self) -> None:
        """Take the registers over from a process that was killed."""
        record = self._device.record
        state = record.load() if record is not None else b""
        if record is None or not state:
            return
        length = _STATE.size + _QUEUE_STATE.size * len(self._queues)
        if len(state) != length:
            raise CorruptImageError(
                f"the device's record has {len(state)} bytes of registers, but virtio-mmio has "
                f"{length}: another transport has made it; remove it, and restart the guest"
            )
        status, features, *selected = _STATE.unpack_from(state)
        in_use = [each.addresses is not None for each in record.queues]
        if status & DRIVER_OK and not any(in_use):
            return  # it was killed amid a reset
        self._driver.restore(status, features)
        self._device_half, self._driver_half, self._selected = selected
        saved = _QUEUE_STATE.iter_unpack(state[_STATE.size :])
        for queue, ready, (size, *addresses) in zip(self._queues, in_use, saved, strict=True):
            queue.ready, queue.size = ready, size
            queue.addresses = dict(zip(queue.addresses, addresses, strict=True))

    # --- what the device calls ------------------------------------------------------------------

    @property
    def is_running(self) -> bool:
        """Whether the driver has set DRIVER_OK."""
        return self._driver.is_running

    def interrupt_queue(self, index: int) -> None:  # noqa: ARG002 - one line serves all queues
        """Tell the driver that a queue has used buffers; it looks at all of its queues."""
        self._raise(USED)

    def interrupt_config(self) -> None:
        """Tell the driver that the configuration has changed."""
        self._generation = self._generation + 1 & _LOW
        self._raise(CHANGED)

    def needs_reset(self) -> None:
        """Set NEEDS_RESET, and tell the driver."""
        self._driver.needs_reset = True
        self._raise(CHANGED)

    def _raise(self, bits: int) -> None:
        locked(self._lock, self._change, bits, 0)
        self.set_line()

    def _change(self, raised: int, cleared: int) -> None:
        self._raised = (self._raised | raised) & ~cleared

    def set_line(self) -> None:
        """Set the line to its level; see the rules above."""
        while True:
            level = self._raised != 0
            self._line(level)
            if level == (self._raised != 0):
                return

    # --- what the driver reads ------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """Return a register, or a part of the configuration space."""
        if offset >= CONFIG:
            return self._device.read_config(offset - CONFIG, size)
        if size != 4 or offset % 4:
            return 0
        reader = self._READERS.get(offset)
        return 0 if reader is None else reader(self)

    def _read_max_size(self) -> int:
        if self._selected < len(self._queues):
            return self._device.queue_sizes[self._selected]
        return 0

    def _read_ready(self) -> int:
        return int(self._selected < len(self._queues) and self._queues[self._selected].ready)

    _READERS: dict[int, Callable[[VirtioMmio], int]] = {  # noqa: RUF012 - never changed
        0x000: lambda _: MAGIC,
        0x004: lambda _: 2,
        0x008: lambda self: self._device.device_id,
        0x00C: lambda _: VENDOR,
        0x010: lambda self: self._driver.offered(self._device_half),
        0x034: _read_max_size,
        0x044: _read_ready,
        0x060: lambda self: self._raised,
        0x070: lambda self: self._driver.shown,
        # No shared memory: its length and address are all ones.
        0x0B0: lambda _: _LOW,
        0x0B4: lambda _: _LOW,
        0x0B8: lambda _: _LOW,
        0x0BC: lambda _: _LOW,
        0x0FC: lambda self: self._generation,
    }

    # --- what the driver writes -----------------------------------------------------------------

    def write(self, offset: int, size: int, value: int) -> None:
        """Take what the driver writes to a register or the configuration space."""
        if offset >= CONFIG:
            self._device.write_config(offset - CONFIG, size, value)
        elif size == 4 and offset in _ADDRESSES:
            self._write_address(*_ADDRESSES[offset], value)
        elif size == 4 and offset in self._WRITERS:
            self._WRITERS[offset](self, value)

    def _select_device_half(self, value: int) -> None:
        self._device_half = value
        self._save()

    def _select_driver_half(self, value: int) -> None:
        self._driver_half = value
        self._save()

    def _select_queue(self, value: int) -> None:
        self._selected = value
        self._save()

    def _write_features(self, value: int) -> None:
        self._driver.want(self._driver_half, value)
        self._save()

    def _open_queue(self) -> _Queue | None:
        """Return the selected queue if the driver may still set it up."""
        if self._selected < len(self._queues) and not self._queues[self._selected].ready:
            return self._queues[self._selected]
        return None

    def _write_size(self, value: int) -> None:
        queue = self._open_queue()
        if queue is not None:
            queue.size = value
            self._save()

    def _write_address(self, area: str, shift: int, value: int) -> None:
        queue = self._open_queue()
        if queue is not None:
            queue.addresses[area] = queue.addresses[area] & ~(_LOW << shift) | value << shift
            self._save()

    def _write_ready(self, value: int) -> None:
        queue = self._open_queue()
        if queue is not None and value == 1 and self._driver.is_agreed:
            queue.ready = True
            self._device.start_queue(self._selected, size=queue.size, **queue.addresses)
        elif queue is None and value == 0 and self._selected < len(self._queues):
            self._device.stop_queue(self._selected)
            self._queues[self._selected].ready = False

    def _notify(self, value: int) -> None:
        if self.is_running:
            self._device.notify_queue(value)

    def _acknowledge(self, value: int) -> None:
        locked(self._lock, self._change, 0, value)
        self.set_line()

    def _write_status(self, value: int) -> None:
        if not value & 0xFF:
            self._device.reset()
            self._forget()
            self._save()
            self._acknowledge(_LOW)
            return
        self._driver.advance(value & 0xFF)
        self._save()

    _WRITERS: dict[int, Callable[[VirtioMmio, int], None]] = {  # noqa: RUF012 - never changed
        0x014: _select_device_half,
        0x020: _write_features,
        0x024: _select_driver_half,
        0x030: _select_queue,
        0x038: _write_size,
        0x044: _write_ready,
        0x050: _notify,
        0x064: _acknowledge,
        0x070: _write_status,
    }
