"""The mock's machine: frames of memory, and the domains that own them."""

from __future__ import annotations

import fcntl
import os
import threading
import weakref
from collections.abc import Iterable

from ..address import ADDRESS_LIMIT, PAGE_MASK, PAGE_SHIFT, parse_size
from .domain import MockDomain


class MockHypervisor:
    """The machine: frames in a memfd, and domains. Its memory goes when nothing shows it.

    Attributes:
        fd: the memfd that holds all frames.
        domains: by domid.
    """

    def __init__(self) -> None:
        self.fd = os.memfd_create("xenmapcache-mock", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        # Nobody can make it shorter under a mapping, whose pages would be a SIGBUS then.
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
        # At exit the kernel closes: what runs later there may still use it.
        weakref.finalize(self, os.close, self.fd).atexit = False
        self.domains: dict[int, MockDomain] = {}
        self._frames = 0
        self._lock = threading.Lock()

    def create_domain(
        self,
        *,
        memory: int | str = "64M",
        holes: Iterable[tuple[int, int]] = (),
        vcpus: int = 1,
    ) -> MockDomain:
        """Create a guest, its memory zeroed.

        Args:
            memory: its size in bytes, whole pages, or as ``"256M"``.
            holes: ``(address, length)`` pairs, page-aligned, that are not there.
            vcpus: how many it has.

        Raises:
            ValueError: not whole pages, a hole beyond the end, or no vCPU.
        """
        size = parse_size(memory)
        if not 0 < size <= ADDRESS_LIMIT or size & PAGE_MASK:
            raise ValueError(f"memory {size:#x} is not a number of whole pages of 4 KiB")
        domid = len(self.domains) + 1
        domain = MockDomain(self, domid, size >> PAGE_SHIFT, holes, vcpus)
        self.domains[domid] = domain
        return domain

    def allocate(self, count: int) -> int:
        """Return the first of ``count`` new frames. Frames are never used again."""
        with self._lock:
            first = self._frames
            self._frames += count
            os.ftruncate(self.fd, self._frames << PAGE_SHIFT)
        return first
