"""A vCPU as its device model sees it."""

from __future__ import annotations

from typing import Protocol

from ..ioreq import RequestSlot
from .dispatch import Job


class Line(Protocol):
    """What sends events to vCPUs: the server's link, or a dead server's."""

    def notify(self, port: int) -> None:
        """Tell the other end of a port to look."""


class Channel:
    """A vCPU's slot, its event channel at this end, and what is known of its request."""

    __slots__ = ("job", "line", "port", "slot")

    def __init__(self, slot: RequestSlot, port: int, line: Line) -> None:
        self.slot = slot
        self.port = port
        self.line = line
        self.job: Job | None = None

    def notify(self) -> None:
        """Have the vCPU look at its slot."""
        self.line.notify(self.port)
