"""Bar: a base address register, and the range that it claims while the guest decodes it."""

from __future__ import annotations

import contextlib
from typing import Literal, NamedTuple

from ...address import ADDRESS_LIMIT, as_int
from ...errors import ClosedError
from ...ioreq import RequestKind
from ..regions import Device, Region
from ..registers import RegisterBank
from ..server import IoreqServer

FIRST_BAR, BARS_END = 0x10, 0x28
BarKind = Literal["mmio32", "mmio64", "io"]

_BARS, _REGISTER_BYTES = 6, 4
_HALF = 0xFFFFFFFF
_PREFETCHABLE = 0x8


class _Space(NamedTuple):
    """What BARs of one kind have in common."""

    width: int
    """Registers that one takes."""
    flags: int
    """The lowest bits of the register."""
    command_bit: int
    """Which bit of the command register decodes them."""
    least: int
    most: int
    """The smallest and the largest size."""
    end: int
    """One past the last address."""


_SPACES: dict[str, _Space] = {
    # Because a register of all ones is how a guest asks for the size, no 32-bit BAR is claimed
    # up to the last byte below 4 GiB.
    "mmio32": _Space(1, 0x0, 0x2, 16, 1 << 31, (1 << 32) - 1),
    "mmio64": _Space(2, 0x4, 0x2, 16, 1 << 48, ADDRESS_LIMIT),
    "io": _Space(1, 0x1, 0x1, 4, 256, 1 << 16),
}


class Bar:
    """A base address register of a PCI function.

    Args:
        server: claims its range.
        config: the configuration space, which gets the register.
        number: 0 to 5; a 64-bit BAR takes the next register, too.
        size: in bytes, a power of 2.
        device: answers for the range.
        kind: ``"mmio32"``, ``"mmio64"`` or ``"io"``.
        prefetchable: whether the guest may map it so.

    Attributes:
        region: what is claimed, or None.
        command_bit: which bit of the command register decodes it.

    Raises:
        ValueError: there is no such BAR.
        TypeError: a device without either method.

    Synchronization: one thread at a time.
    """

    def __init__(
        self,
        server: IoreqServer,
        config: RegisterBank,
        number: int,
        size: int,
        device: Device,
        kind: BarKind,
        prefetchable: bool,
    ) -> None:
        name = f"{config.name}: BAR {number}"
        if kind not in _SPACES:
            raise ValueError(f"{name}: kind {kind!r} must be one of {', '.join(_SPACES)}")
        space = _SPACES[kind]
        if not 0 <= as_int("number", number) <= _BARS - space.width:
            raise ValueError(f"{name} must be in 0..{_BARS - space.width} for {kind}")
        if as_int("size", size).bit_count() != 1 or not space.least <= size <= space.most:
            raise ValueError(
                f"{name}: size {size:#x} must be a power of 2 in {space.least:#x}.."
                f"{space.most:#x} for {kind}"
            )
        try:
            Region(RequestKind.MMIO, 0, size, device, release)  # only to check the device
        except TypeError as error:
            raise TypeError(f"{name}: {error}") from None
        if prefetchable and kind == "io":
            raise ValueError(f"{name}: ports cannot be prefetchable")
        self.region: Region | None = None
        self.command_bit = space.command_bit
        self._claim = server.claim_ports if kind == "io" else server.claim_mmio
        self._name = f"BAR {number}"
        self._size = size
        self._device = device
        self._end = space.end
        self._mask = (1 << 32 * space.width) - size
        self._reported = False
        self._register = config.add(
            f"bar{number}",
            FIRST_BAR + _REGISTER_BYTES * number,
            _REGISTER_BYTES * space.width,
            value=space.flags | (_PREFETCHABLE if prefetchable else 0),
            mask=self._mask,
        )

    @property
    def address(self) -> int:
        """Where the guest has put it, whether it is decoded or not."""
        return self._register.value & self._mask

    def release(self, command: int) -> None:
        """Release the range, unless it is still where the guest wants it.

        Args:
            command: the command register.

        Raises:
            XenCallError: Xen refused; it stays claimed.
        """
        region = self.region
        if region is None or (command & self.command_bit and region.start == self.address):
            return
        release(region)
        self.region = None

    def claim(self, command: int) -> None:
        """Claim the range, if the guest decodes it and it is not claimed.

        Raises:
            ValueError: the range does not suit a BAR, or this server has claimed a part of it.
            XenCallError: Xen refused.
            ClosedError: the server is closed.
        """
        if self.region is not None or not command & self.command_bit:
            return
        address, end = self.address, self.address + self._size
        if not address:
            raise ValueError("the guest decodes it without an address")
        if end <= self._end:
            self.region = self._claim(address, self._size, self._device)
        elif not self._is_being_sized():
            raise ValueError(f"it ends beyond {self._end:#x}")

    def _is_being_sized(self) -> bool:
        """Return whether a half of the register is all ones: the guest asks for the size."""
        halves = [(self._mask >> shift & _HALF, self.address >> shift) for shift in (0, 32)]
        return any(mask and value & _HALF == mask for mask, value in halves)

    def report(self, error: Exception) -> str:
        """Return one line about a problem, and an empty one for all that follow it."""
        if self._reported:
            return ""
        self._reported = True
        place = f"{self._name} at {self.address:#x}..{self.address + self._size:#x}"
        held = f" is still claimed at {self.region.start:#x}" if self.region else " is not claimed"
        return f"{place}{held}: {error}"

    def reset(self) -> None:
        """Report the next problem again."""
        self._reported = False


def release(region: Region) -> None:
    """Release a claim, unless the server is closed and has released all of them.

    Raises:
        XenCallError: Xen refused.
    """
    with contextlib.suppress(ClosedError):
        region.release()
