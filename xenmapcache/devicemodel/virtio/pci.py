"""VirtioPci: the virtio-pci transport of virtio 1.x, without its legacy interface."""

# Theory of operation
#
# One BAR has four areas, and a capability says where each one is:
#
#   common    features, status, and the registers of the selected queue
#   isr       which interrupt is raised; reading it lowers the line
#   device    the device's own configuration space
#   notify    4 bytes for each queue; a write says that there are requests
#
# A fifth capability is a window: a guest reaches the areas by configuration space alone.
#
# Rules
#   1. The driver's steps are those of `negotiation.py`. So a queue is started once, with features
#      that were negotiated.
#   2. The registers of a queue are one set, which shows the selected queue. Selecting another
#      one, and each write, loads them from that queue. So a queue that does not exist, or is
#      enabled, keeps what it had.
#   3. With MSI-X enabled, each queue and the configuration have a vector of their own. Without,
#      they share the pin. The bits of isr and the level of the pin change under one lock, in any
#      thread: the level is "isr is not 0". The lock is held during the call to Xen, as for
#      messages.
#   4. If a reset times out, the status stays as it was, and each read of the status tries again:
#      a driver that has written 0 reads the status until it is 0, and writes nothing else. A record
#      has a status of 0 from the beginning of a reset on, so the next process ends it.
#   5. With a record, each write that changes a register is kept there before it is answered. Isr
#      and pending messages are not, because the next process interrupts for each queue.

from __future__ import annotations

import contextlib
import struct
import threading
from functools import partial

from ...cache.locked import locked
from ...errors import CorruptImageError
from ..pci.function import PciFunction
from ..registers import RegisterBank
from ..server import IoreqServer
from .device import VirtioDevice
from .negotiation import CHANGED, DRIVER_OK, USED, Negotiation
from .record import DeviceRecord

NO_VECTOR = 0xFFFF

_VENDOR, _FIRST_DEVICE, _SUBSYSTEM = 0x1AF4, 0x1040, 0x1100
_UNASSIGNED_CLASS = 0xFF0000
_MSIX_BAR, _BAR = 1, 4
_COMMON, _ISR, _DEVICE, _NOTIFY = 0x0000, 0x1000, 0x2000, 0x3000
_COMMON_BYTES, _ISR_BYTES, _NOTIFY_BYTES = 0x38, 1, 4
_CAPABILITY = 0x09
_COMMON_TYPE, _NOTIFY_TYPE, _ISR_TYPE, _DEVICE_TYPE, _WINDOW_TYPE = 1, 2, 3, 4, 5
_BODY = struct.Struct("<BBBxxxII")
"""Length of the capability, type, BAR; offset and length of the area."""
_BODY_BYTES = 16
_STATE = struct.Struct("<BQ")
"""What a process that goes on needs besides registers: the status, and the driver's features."""
_QUEUE_STATE = struct.Struct("<HHHQQQ")
"""A queue's registers, in the order of ``_QUEUE_REGISTERS``."""
_LOW = 0xFFFFFFFF
_QUEUE_REGISTERS = {
    "size": (0x18, 2),
    "vector": (0x1A, 2),
    "enabled": (0x1C, 2),
    "descriptors": (0x20, 8),
    "driver": (0x28, 8),
    "device": (0x30, 8),
}
"""The registers of the selected queue: offset and size."""


class VirtioPci:
    """A virtio device as a PCI function, for the driver that a guest has already.

        with VirtioBlock(server, file) as disk:
            VirtioPci(server, "0000:00:05.0", disk).plug()
            with server:
                server.serve_forever()

    The device has MSI-X. A PVH guest has nothing else, and needs a :class:`.PciBus` besides.
    Follows virtio 1.2, section 4.1.

    Args:
        server: whose guest has the driver.
        bdf: as ``"0000:00:05.0"``.
        device: gets what the driver does; its ``transport`` becomes this one.
        class_code: 24 bits, for firmware; drivers do not look at it.
        interrupt_pin: 1 (INTA) to 4, for drivers without MSI-X in an HVM guest; 0 for none.

    If the device has a record, the registers are kept there, and those of a process that was
    killed are taken over. Then call ``device.resume()`` when the server is open.

    Attributes:
        function: the PCI function.

    Raises:
        ValueError: the device's record is of a driver that has accepted other features.
        CorruptImageError: the record is of another transport.

    Synchronization: the guest's accesses come in the thread that serves; the device may call
    :meth:`interrupt_queue` and its siblings in any thread; ``plug`` and ``unplug`` one at a time.
    """

    repeatable = True  # no write of a driver counts: each one sets what is to be

    def __init__(
        self,
        server: IoreqServer,
        bdf: str,
        device: VirtioDevice,
        *,
        class_code: int = _UNASSIGNED_CLASS,
        interrupt_pin: int = 0,
    ) -> None:
        self._device = device
        self._lock = threading.RLock()
        self._isr = self._generation = 0
        self.function = PciFunction(
            server,
            bdf,
            vendor=_VENDOR,
            device=_FIRST_DEVICE + device.device_id,
            class_code=class_code,
            revision=1,
            subsystem=(_VENDOR, _SUBSYSTEM),
            interrupt_pin=interrupt_pin,
        )
        self._has_pin = interrupt_pin > 0
        self._add_registers(f"virtio device {device.name!r}")
        self._add_capabilities()
        self._forget()
        device.transport = self
        if device.record is not None:
            self._restore(device.record)
            self._save()
            self.function.on_write = self._save

    def __repr__(self) -> str:
        return f"<VirtioPci {self.function.bdf}, status {self._driver.shown:#x}, {self._device!r}>"

    def _add_registers(self, name: str) -> None:
        """Make the common area: each register at the offset of virtio_pci_common_cfg."""
        bank = self._common = RegisterBank(name, _COMMON_BYTES)
        self._device_half = bank.add("device_feature_select", 0x00, 4, mask=_LOW)
        bank.add(
            "device_feature", 0x04, 4, read=lambda: self._driver.offered(self._device_half.value)
        )
        self._driver_half = bank.add("driver_feature_select", 0x08, 4, mask=_LOW)
        bank.add(
            "driver_feature",
            0x0C,
            4,
            read=lambda: self._driver.wanted(self._driver_half.value),
            write=lambda value: self._driver.want(self._driver_half.value, value),
        )
        self._config_vector = bank.add(
            "config_msix_vector", 0x10, 2, value=NO_VECTOR, write=self._write_config_vector
        )
        bank.add("num_queues", 0x12, 2, value=len(self._device.queue_sizes))
        bank.add("device_status", 0x14, 1, read=self._read_status, write=self._write_status)
        bank.add("config_generation", 0x15, 1, read=lambda: self._generation)
        self._selected = bank.add("queue_select", 0x16, 2, write=lambda _: self._show_queue())
        self._queue_registers = {
            field: bank.add(f"queue_{field}", offset, size, write=partial(self._write_queue, field))
            for field, (offset, size) in _QUEUE_REGISTERS.items()
        }
        bank.add("queue_notify_off", 0x1E, 2, read=lambda: self._selected.value)

    def _add_capabilities(self) -> None:
        queues = len(self._device.queue_sizes)
        length = 1 << (_NOTIFY + _NOTIFY_BYTES * queues - 1).bit_length()
        function = self.function
        function.add_bar(_BAR, length, self)
        self._length = length
        self._msix = function.add_msix(_MSIX_BAR, queues + 1)
        for number, offset, size in (
            (_COMMON_TYPE, _COMMON, _COMMON_BYTES),
            (_ISR_TYPE, _ISR, _ISR_BYTES),
            (_DEVICE_TYPE, _DEVICE, _NOTIFY - _DEVICE),
        ):
            body = _BODY.pack(_BODY_BYTES, number, _BAR, offset, size)
            function.add_capability(_CAPABILITY, body)
        body = _BODY.pack(_BODY_BYTES + 4, _NOTIFY_TYPE, _BAR, _NOTIFY, length - _NOTIFY)
        function.add_capability(_CAPABILITY, body + _NOTIFY_BYTES.to_bytes(4, "little"))
        # The window is the last capability, because its data follows as a register of its own.
        body = _BODY.pack(_BODY_BYTES + 4, _WINDOW_TYPE, 0, 0, 0)
        writable = _BODY.pack(0, 0, 0xFF, _LOW, _LOW)
        self._window_at = function.add_capability(_CAPABILITY, body, writable)
        function.config.add(
            "window",
            self._window_at + _BODY_BYTES,
            4,
            read=self._read_window,
            write=self._write_window,
        )

    def _forget(self) -> None:
        self._driver = Negotiation(self._device)
        self._reset_due = False
        self._common.reset()
        self._queues = [
            {"size": size, "vector": NO_VECTOR, "enabled": 0}
            | dict.fromkeys(("descriptors", "driver", "device"), 0)
            for size in self._device.queue_sizes
        ]
        self._show_queue()

    # --- what outlives a kill -------------------------------------------------------------------

    def _save(self) -> None:
        """Keep what the driver has written. Which queues are in use is a part of the record."""
        if self._device.record is not None:
            driver = self._driver
            state = _STATE.pack(0 if self._reset_due else driver.status, driver.features)
            queues = [_QUEUE_STATE.pack(*queue.values()) for queue in self._queues]
            parts = [state, self._common.save(), *queues, self.function.save()]
            self._device.record.save(b"".join(parts))

    def _restore(self, record: DeviceRecord) -> None:
        """Take the registers over from a process that was killed."""
        state = record.load()
        if not state:
            return
        queues_at = _STATE.size + _COMMON_BYTES
        end = queues_at + _QUEUE_STATE.size * len(self._queues)
        if len(state) != end + len(self.function.save()):
            raise CorruptImageError(
                f"the device's record has {len(state)} bytes of registers, but virtio-pci has "
                f"{end + len(self.function.save())}: another transport has made it; remove it, "
                "and restart the guest"
            )
        self.function.restore(state[end:])
        status, features = _STATE.unpack_from(state)
        in_use = [each.addresses is not None for each in record.queues]
        if not status or (status & DRIVER_OK and not any(in_use)):
            record.clear()  # it was killed amid a reset
            return
        self._driver.restore(status, features)
        self._common.restore(state[_STATE.size : queues_at])
        saved = _QUEUE_STATE.iter_unpack(state[queues_at:end])
        for queue, enabled, values in zip(self._queues, in_use, saved, strict=True):
            queue |= dict(zip(queue, values, strict=True)) | {"enabled": int(enabled)}
        self._show_queue()

    # --- life -----------------------------------------------------------------------------------

    def plug(self) -> None:
        """Let the guest find the device; raises as :meth:`PciFunction.plug`."""
        self.function.plug()

    def unplug(self) -> None:
        """Take the device away from the guest, and reset it. Can be repeated.

        Do not call it before an end after which another process is to continue with the record.

        Raises:
            TimeoutError: a request is still under way; call it again.
            XenCallError: Xen refused; call it again.
        """
        self.function.unplug()
        self._reset()
        self._save()

    def _reset(self) -> None:
        self._device.reset()
        self._forget()
        self._read_isr()

    # --- what the device calls ------------------------------------------------------------------

    @property
    def is_running(self) -> bool:
        """Whether the driver has set DRIVER_OK."""
        return self._driver.is_running

    def interrupt_queue(self, index: int) -> None:
        """Tell the driver that a queue has used buffers."""
        self._interrupt(self._queues[index]["vector"], USED)

    def interrupt_config(self) -> None:
        """Tell the driver that the configuration has changed."""
        self._generation = self._generation + 1 & 0xFF
        self._interrupt(self._config_vector.value, CHANGED)

    def needs_reset(self) -> None:
        """Set NEEDS_RESET, and tell the driver."""
        self._driver.needs_reset = True
        self._interrupt(self._config_vector.value, CHANGED)

    def set_line(self) -> None:
        """Set the pin to its level, if the device has one."""
        if self._has_pin:
            locked(self._lock, self._set_pin)

    def _set_pin(self) -> None:
        self.function.set_interrupt(self._isr != 0)

    def _interrupt(self, vector: int, bit: int) -> None:
        if not self._msix.enabled:
            locked(self._lock, self._change_isr, bit)
        elif vector != NO_VECTOR:
            self._msix.notify(vector)

    def _change_isr(self, raised: int) -> int:
        """Raise a bit, or with 0 take all of them; return those before."""
        before = self._isr
        self._isr = before | raised if raised else 0
        if self._has_pin:
            self._set_pin()
        return before

    def _read_isr(self) -> int:
        return locked(self._lock, self._change_isr, 0)

    # --- the areas of the BAR -------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """Read an area; a handler."""
        if offset >= _NOTIFY:
            return 0
        if offset >= _DEVICE:
            return self._device.read_config(offset - _DEVICE, size)
        if offset >= _ISR:
            return self._read_isr() if offset == _ISR else 0
        return self._common.read(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Write an area; a handler."""
        if offset >= _NOTIFY:
            index = (offset - _NOTIFY) // _NOTIFY_BYTES
            if self.is_running and index < len(self._queues):
                self._device.notify_queue(index)
        elif offset >= _DEVICE:
            self._device.write_config(offset - _DEVICE, size, value)
        elif offset < _ISR:
            try:
                self._common.write(offset, size, value)
            finally:
                self._save()

    # --- the window in configuration space ------------------------------------------------------

    def _window(self) -> tuple[int, int] | None:
        """Return the offset and the size that the driver has put into the window."""
        config = self.function.config
        bar = config.read(self._window_at + 4, 1)
        offset, size = (config.read(self._window_at + at, 4) for at in (8, 12))
        if bar != _BAR or size not in (1, 2, 4) or offset % size or offset >= self._length:
            return None
        return offset, size

    def _read_window(self) -> int:
        window = self._window()
        return _LOW if window is None else self.read(*window)

    def _write_window(self, value: int) -> None:
        window = self._window()
        if window is not None:
            offset, size = window
            self.write(offset, size, value & (1 << 8 * size) - 1)

    # --- the common area ------------------------------------------------------------------------

    def _read_status(self) -> int:
        if self._reset_due:
            with contextlib.suppress(TimeoutError):  # reported when the driver has written 0
                self._reset()
                self._save()
        return self._driver.shown

    def _write_status(self, value: int) -> None:
        if not value:
            self._reset_due = True
            self._save()
            self._reset()
            return
        if not self._reset_due:
            self._driver.advance(value)

    def _write_config_vector(self, value: int) -> None:
        self._config_vector.value = self._vector(value)

    def _vector(self, value: int) -> int:
        return value if value < self._msix.vectors else NO_VECTOR

    def _show_queue(self) -> None:
        """Load the registers from the selected queue."""
        index = self._selected.value
        queue = self._queues[index] if index < len(self._queues) else {"vector": NO_VECTOR}
        for field, register in self._queue_registers.items():
            register.value = queue.get(field, 0)

    def _write_queue(self, field: str, value: int) -> None:
        index = self._selected.value
        if index < len(self._queues):
            queue = self._queues[index]
            if field == "vector":
                queue[field] = self._vector(value)
            elif field == "enabled":
                self._enable(index, value)
            elif not queue["enabled"]:
                queue[field] = value
        self._show_queue()

    def _enable(self, index: int, value: int) -> None:
        queue = self._queues[index]
        if value == 1 and not queue["enabled"] and self._driver.is_agreed:
            queue["enabled"] = 1
            areas = {area: queue[area] for area in ("descriptors", "driver", "device")}
            self._device.start_queue(index, size=queue["size"], **areas)
