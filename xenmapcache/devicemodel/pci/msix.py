"""MsixTable: the MSI-X table and the pending bits of a PCI function."""

from __future__ import annotations

import struct
from collections.abc import Callable

from ...address import as_int
from ...cache.locked import locked
from ..dispatch import GuestError
from ..server import IoreqServer
from .messages import MessageInterrupts, is_pirq

MSIX_ID, MSIX_WRITABLE = 0x11, b"\x00\xc0"
_ENTRY = struct.Struct("<QII")
_MASKED = 0x1
_MSIX_CONTROL = struct.Struct("<HII")
_ENABLE, _FUNCTION_MASK = 0x8000, 0x4000
_MAX_VECTORS = 2048
_PAGE = 4096


class MsixTable(MessageInterrupts):
    """The MSI-X table and the pending bits of a PCI function, as the device of a BAR.

    Made by :meth:`PciFunction.add_msix`. The table is at 0; an entry has 16 bytes. The pending
    bits follow. As the PCI specification demands, accesses have 4 or 8 bytes and are aligned.

    Attributes:
        length: of the BAR, in bytes.
    """

    repeatable = True  # at worst a pending interrupt is raised twice

    def __init__(
        self,
        server: IoreqServer,
        name: str,
        vectors: int,
        on_write: Callable[[], object] = lambda: None,
    ) -> None:
        if not 1 <= as_int("vectors", vectors) <= _MAX_VECTORS:
            raise ValueError(f"{name}: vectors must be 1 to {_MAX_VECTORS}, not {vectors}")
        super().__init__(server, name, vectors)
        self._pending_at = _ENTRY.size * vectors
        used = self._pending_at + (vectors + 63) // 64 * 8
        self.length = max(_PAGE, 1 << (used - 1).bit_length())
        self._table = bytearray()
        self._control = 0
        self._on_write = on_write
        self.reset()

    def body(self, bar: int) -> bytes:
        """Return the capability, without its first two bytes, for a table in a BAR."""
        return _MSIX_CONTROL.pack(self.vectors - 1, bar, self._pending_at | bar)

    def reset(self) -> None:
        """Disable it: all entries are empty and masked, and no vector is pending."""
        locked(self._lock, self._clear)

    def _clear(self) -> None:
        self._table = bytearray(_ENTRY.pack(0, 0, _MASKED) * self.vectors)
        self._control = 0
        self._pending.clear()

    @property
    def state_length(self) -> int:
        """See :meth:`save`."""
        return 2 + self._pending_at + (self.vectors + 7) // 8

    def save(self) -> bytes:
        """Return the control bits, the table and the pending bits."""
        return locked(self._lock, self._save)

    def _save(self) -> bytes:
        pending = self._pending_bits().to_bytes((self.vectors + 7) // 8, "little")
        return self._control.to_bytes(2, "little") + self._table + pending

    def restore(self, data: bytes) -> None:
        """Have what was saved."""
        locked(self._lock, self._restore, data)

    def _restore(self, data: bytes) -> None:
        self._control = int.from_bytes(data[:2], "little")
        self._table = bytearray(data[2 : 2 + self._pending_at])
        self._pending.clear()
        self._set_pending(int.from_bytes(data[2 + self._pending_at :], "little"))

    @property
    def enabled(self) -> bool:
        """Whether the guest has enabled MSI-X; if not, a device uses INTx, or nothing."""
        return bool(self._control & _ENABLE)

    def written(self, capability: int) -> None:
        """Take what the guest wrote to the capability: the first two bytes are the control."""
        locked(self._lock, self._write_control, capability & 0xFFFF)

    def _write_control(self, control: int) -> None:
        self._control = control
        self._send_allowed(self._pending)

    def read(self, offset: int, size: int) -> int:
        """Read the table or the pending bits; a handler."""
        self._check(offset, size)
        if offset < self._pending_at:  # no other thread writes it
            return int.from_bytes(self._table[offset : offset + size], "little")
        pending = locked(self._lock, self._pending_bits)
        return pending >> 8 * (offset - self._pending_at) & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Write the table; a handler. The pending bits are read-only."""
        self._check(offset, size)
        if offset < self._pending_at:
            try:
                locked(self._lock, self._write_entry, offset, value.to_bytes(size, "little"))
            finally:
                self._on_write()

    def _write_entry(self, offset: int, data: bytes) -> None:
        self._table[offset : offset + len(data)] = data
        self._send_allowed([offset // _ENTRY.size])

    def _check(self, offset: int, size: int) -> None:
        if size not in (4, 8) or offset % size:
            raise GuestError(
                f"{self._name}: MSI-X table: {size} bytes at {offset:#x} must be 4 or 8, and "
                "aligned"
            )

    def _message(self, vector: int) -> tuple[int, int] | None:
        address, data, control = _ENTRY.unpack_from(self._table, _ENTRY.size * vector)
        masked = self._control & _FUNCTION_MASK or control & _MASKED
        return None if masked and not is_pirq(data) else (address, data)
