"""Transport: what a virtio device needs of the registers through which its driver reaches it."""

from __future__ import annotations

from typing import Protocol


class Transport(Protocol):
    """What a device needs of its transport. Any thread may call it."""

    @property
    def is_running(self) -> bool:
        """Whether the driver has set DRIVER_OK. Before that, no buffer of it may be used."""

    def interrupt_queue(self, index: int) -> object:
        """Tell the driver that a queue has used buffers."""

    def interrupt_config(self) -> object:
        """Tell the driver that the configuration has changed."""

    def needs_reset(self) -> object:
        """Set NEEDS_RESET in the status, and tell the driver."""

    def set_line(self) -> object:
        """Set the interrupt line to its level, if there is one. Another process may have set it."""
