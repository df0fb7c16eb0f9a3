"""Negotiation: the steps of a driver's set-up, which are the same on each transport."""

from __future__ import annotations

from .device import VirtioDevice

DRIVER_OK, FEATURES_OK, NEEDS_RESET = 4, 8, 0x40
"""Bits of the status. The driver writes all but NEEDS_RESET."""
USED, CHANGED = 1, 2
"""Bits of the interrupt status."""
_LOW = 0xFFFFFFFF
_HALVES = 2


class Negotiation:
    """The status register, and the features that driver and device agree on.

        0 --ACKNOWLEDGE, DRIVER--> FEATURES_OK --queues ready--> DRIVER_OK --0 is written--> 0

    Whatever the driver writes is kept only if the step that it is in allows it. Else it has no
    effect.

    Args:
        device: offers features, and takes what was agreed on.

    Attributes:
        status: as the driver has written it.
        features: as the driver has written them, whether or not they are agreed on.
        needs_reset: the device is broken until the driver resets it.

    Synchronization: the thread that serves; any thread may set ``needs_reset`` and read.
    """

    def __init__(self, device: VirtioDevice) -> None:
        self._device = device
        self.status = self.features = 0
        self.needs_reset = False

    @property
    def shown(self) -> int:
        """The status as the driver reads it."""
        return self.status | (NEEDS_RESET if self.needs_reset else 0)

    @property
    def is_running(self) -> bool:
        """Whether the driver has set DRIVER_OK."""
        return bool(self.status & DRIVER_OK)

    @property
    def is_agreed(self) -> bool:
        """Whether the features are settled, so that queues may be set up."""
        return bool(self.status & FEATURES_OK)

    def offered(self, half: int) -> int:
        """Return 32 of the features that the device offers; there are none in further halves."""
        return _half_of(self._device.features, half)

    def wanted(self, half: int) -> int:
        """Return 32 of the features that the driver has written."""
        return _half_of(self.features, half)

    def want(self, half: int, value: int) -> None:
        """Take 32 of the driver's features, unless they are settled."""
        if half < _HALVES and not self.is_agreed:
            self.features = self.features & ~(_LOW << 32 * half) | value << 32 * half

    def advance(self, value: int) -> None:
        """Take bits of the status, which are only added; FEATURES_OK if the device agrees."""
        value = (self.status | value) & ~NEEDS_RESET
        if value & FEATURES_OK & ~self.status and not self._device.negotiate(self.features):
            value &= ~FEATURES_OK
        self.status = value

    def restore(self, status: int, features: int) -> None:
        """Continue with what a driver has agreed on with another process.

        Raises:
            ValueError: the device does not offer that any longer.
        """
        if status & FEATURES_OK and not self._device.negotiate(features):
            raise ValueError(
                f"the driver has accepted features {features:#x}, and {self._device!r} offers "
                f"{self._device.features:#x}; make it as it was before, or restart the guest"
            )
        self.status, self.features = status, features


def _half_of(features: int, half: int) -> int:
    return features >> 32 * half & _LOW if half < _HALVES else 0
