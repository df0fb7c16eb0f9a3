"""MsiCapability: the plain MSI capability of a PCI function."""

from __future__ import annotations

import struct

from ...address import as_int
from ...cache.locked import locked
from ..server import IoreqServer
from .messages import MessageInterrupts, is_pirq

MSI_ID = 0x05
_MSI = struct.Struct("<HQHHII")
"""Control, address, data, reserved, masks, pending bits."""
_MSI_ENABLE, _MSI_64BIT, _MSI_MASKS = 0x1, 0x80, 0x100
_CAPABLE_SHIFT, _USED_SHIFT, _LOG2 = 1, 4, 0x7
_MSI_VECTORS = (1, 2, 4, 8, 16, 32)


class MsiCapability(MessageInterrupts):
    """The plain MSI capability of a PCI function: 64-bit addresses, and a mask for each vector.

    Made by :meth:`PciFunction.add_msi`. A guest may use fewer vectors than the function has, as
    Linux mostly does. Then several vectors send the same message.
    """

    def __init__(self, server: IoreqServer, name: str, vectors: int) -> None:
        if as_int("vectors", vectors) not in _MSI_VECTORS:
            raise ValueError(f"{name}: vectors must be one of {_MSI_VECTORS}, not {vectors}")
        super().__init__(server, name, vectors)
        capable = (vectors.bit_length() - 1) << _CAPABLE_SHIFT
        self._initial = _MSI.pack(_MSI_64BIT | _MSI_MASKS | capable, 0, 0, 0, 0, 0)
        self._body = self._initial

    @property
    def body(self) -> bytes:
        """The capability, without its first two bytes."""
        return self._initial

    @property
    def writable(self) -> bytes:
        """The bits of :attr:`body` that the guest can change."""
        control = _MSI_ENABLE | _LOG2 << _USED_SHIFT
        masks = (1 << self.vectors) - 1
        return _MSI.pack(control, (1 << 64) - 4, 0xFFFF, 0, masks, 0)

    def reset(self) -> None:
        """Disable it, and forget what the guest has programmed."""
        locked(self._lock, self._clear)

    def _clear(self) -> None:
        self._body = self._initial
        self._pending.clear()

    @property
    def state_length(self) -> int:
        """See :meth:`save`."""
        return _MSI.size

    def save(self) -> bytes:
        """Return the capability as the guest reads it."""
        return self.value().to_bytes(_MSI.size, "little")

    def restore(self, data: bytes) -> None:
        """Have what was saved."""
        locked(self._lock, self._restore, data)

    def _restore(self, data: bytes) -> None:
        writable = int.from_bytes(self.writable, "little")
        fixed = int.from_bytes(self._initial, "little")
        body = fixed & ~writable | int.from_bytes(data, "little") & writable
        self._body = body.to_bytes(_MSI.size, "little")
        self._pending.clear()
        self._set_pending(int.from_bytes(data[-4:], "little"))

    @property
    def enabled(self) -> bool:
        """Whether the guest has enabled MSI; if not, a device uses INTx, or nothing."""
        return bool(self._body[0] & _MSI_ENABLE)

    def value(self) -> int:
        """Return the capability as the guest reads it, with the pending bits."""
        pending = locked(self._lock, self._pending_bits)
        return int.from_bytes(self._body, "little") | pending << 8 * (_MSI.size - 4)

    def written(self, capability: int) -> None:
        """Take the capability as the guest has written it."""
        locked(self._lock, self._write, capability.to_bytes(_MSI.size, "little"))

    def _write(self, body: bytes) -> None:
        self._body = body
        self._send_allowed(self._pending)

    def _message(self, vector: int) -> tuple[int, int] | None:
        control, address, data, _, masks, _ = _MSI.unpack(self._body)
        if is_pirq(data):
            return address, data
        used = min(1 << (control >> _USED_SHIFT & _LOG2), self.vectors)
        vector %= used
        return None if masks >> vector & 1 else (address, data & ~(used - 1) | vector)
