"""A vCPU as its device model sees it."""

from __future__ import annotations

from ..ioreq import RequestSlot
from .dispatch import Job


class Channel:
    """A vCPU's slot, its event channel at this end, and what is known of its request."""

    __slots__ = ("job", "port", "slot")

    def __init__(self, slot: RequestSlot, port: int) -> None:
        self.slot = slot
        self.port = port
        self.job: Job | None = None
