"""A guest for one cell of the matrix: on the mock, or on the stand-in for Xen's library."""

from __future__ import annotations

import abc
import errno
import os
import threading
from pathlib import Path

from tests.fake_xen import DOMID, Behaviour, FakeXen
from xenmapcache import Backend, MapCache, MockHypervisor, open_backend
from xenmapcache.address import PAGE_SHIFT, PAGE_SIZE
from xenmapcache.mapping import Mapping

PAGES = 4096
SHIFT = 14
BUCKET = 1 << SHIFT
RESIDENT = 16 * BUCKET
LARGE = 8 << 20
"""More than Python may need of address space for itself."""
NEEDLE = b"needle!!"
NEEDLES = (0x2C2000, 0x310000)
"""Further apart than may be resident."""
PLACE, MOVED = 0x20000, 0x30000
"""Where what is kept lies, and where replace() puts it."""
UNDER_WAY = 0x100000
"""Where calls are at work, in another thread."""
ELSEWHERE = 0x200000
"""Where the events go that need memory of their own."""


_FILLED = [(PLACE, 0x1000), (MOVED, 0x1000), (UNDER_WAY, 4 * BUCKET), (ELSEWHERE, 0x1000)]
_FILLED += [(needle, 0x1000) for needle in NEEDLES]


def content(address: int, length: int) -> bytes:
    """Return what the guest has there, where it is filled: each page's number, over and over."""
    first = address >> PAGE_SHIFT
    pages = range(first, (address + length + PAGE_SIZE - 1) >> PAGE_SHIFT)
    text = b"".join((b"%07d " % gfn) * (PAGE_SIZE // 8) for gfn in pages)
    text = text[address - (first << PAGE_SHIFT) :][:length]
    return NEEDLE + text[8:] if address in NEEDLES else text


class World(abc.ABC):
    """A guest, a backend and a cache."""

    backend: Backend

    def __init__(self) -> None:
        for address, length in _FILLED:
            self.write(address, content(address, length))
        self.cache = MapCache(
            self.backend, bucket_shift=SHIFT, max_resident=RESIDENT, on_stale="copy"
        )

    @property
    @abc.abstractmethod
    def inode(self) -> int:
        """Of guest memory."""

    def mappings(self) -> int:
        """Return how many pieces of guest memory this process has mapped."""
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
        return sum(int(line.split()[4]) == self.inode for line in lines)

    @abc.abstractmethod
    def write(self, address: int, data: bytes) -> None:
        """Write as the guest does."""

    @abc.abstractmethod
    def block(self) -> None:
        """Let the next map block."""

    @abc.abstractmethod
    def wait_until_blocked(self) -> None:
        """Wait for it to have begun."""

    @abc.abstractmethod
    def unblock(self) -> None:
        """Let it continue."""

    @abc.abstractmethod
    def end(self) -> None:
        """Destroy the guest; it is dying, as long as it is mapped."""

    @abc.abstractmethod
    def lose(self) -> None:
        """Let the next replace() lose the memory that was there."""


class MockWorld(World):
    """On the mock."""

    def __init__(self) -> None:
        self.domain = MockHypervisor().create_domain(memory=PAGES << PAGE_SHIFT)
        self.backend = open_backend("mock", domain=self.domain)
        self._entered, self._go = threading.Event(), threading.Event()
        super().__init__()

    @property
    def inode(self) -> int:
        return os.fstat(self.domain.p2m.frames.fileno()).st_ino

    def write(self, address: int, data: bytes) -> None:
        self.domain.write(address, data)

    def block(self) -> None:
        original = self.domain.map

        def slow(gfn: int, count: int, writable: bool) -> Mapping:
            self.domain.map = original  # type: ignore[method-assign] # this call only
            self._entered.set()
            self._go.wait()
            return original(gfn, count, writable)

        self.domain.map = slow  # type: ignore[method-assign] # for the next call

    def wait_until_blocked(self) -> None:
        self._entered.wait()

    def unblock(self) -> None:
        self._go.set()

    def end(self) -> None:
        self.domain.destroy()

    def lose(self) -> None:
        self.domain.inject_fault("remap", errno=errno.ENOMEM)


class FakeWorld(World):
    """On the stand-in, through one of the loaders."""

    def __init__(self, binding: str, library: Path, folder: Path) -> None:
        self.fake = FakeXen(library, folder, pages=PAGES)
        self.backend = open_backend("xen", domid=DOMID, binding=binding, library=self.fake.library)
        super().__init__()

    @property
    def inode(self) -> int:
        return self.fake.inode

    def write(self, address: int, data: bytes) -> None:
        self.fake.write(address, data)

    def block(self) -> None:
        self.fake.plan("xenforeignmemory_map2", Behaviour.BLOCK)

    def wait_until_blocked(self) -> None:
        self.fake.wait_until_blocked()

    def unblock(self) -> None:
        self.fake.unblock()

    def end(self) -> None:
        self.fake.set_error(errno.EINVAL, 0, PAGES)

    def lose(self) -> None:
        # The second, as replace() looks at the new pages first.
        self.fake.plan("xenforeignmemory_map2", Behaviour.DROP, errno.ENOMEM, nth=2)
