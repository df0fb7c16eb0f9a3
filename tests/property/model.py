"""A guest, and what others hold of it, as plain data: no cache, no mappings, nothing shared.

A page of the guest has a frame, or none. A frame is a bytearray: a lease that took it goes on
showing it when the page has another frame by then, and so an orphan is nothing special.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from xenmapcache import DmaDirection, LeaseInfo, LeaseKind

PAGE = 0x1000
PAGES = 11
"""Of the guest: half of its last bucket is beyond the end of memory."""
BUCKET = 2 * PAGE

Frame = bytearray


def pages_of(address: int, length: int) -> range:
    """Return the frame numbers that a range touches."""
    return range(address // PAGE, (address + length - 1) // PAGE + 1)


def rounded(address: int, length: int, unit: int) -> int:
    """Return the size of the whole units, pages or buckets, that a range touches."""
    return ((address + length + unit - 1) // unit - address // unit) * unit


@dataclass(eq=False)
class Window:
    """A range of guest memory as the new owner of its frames sees it."""

    address: int
    length: int
    frames: list[Frame]

    def content(self) -> bytes:
        """Return what is to be seen there."""
        start = self.address % PAGE
        return bytes(b"".join(self.frames)[start : start + self.length])

    def put(self, position: int, data: bytes) -> None:
        """Write from a position of it on."""
        start = self.address % PAGE + position
        while data:
            page, offset = divmod(start, PAGE)
            part, data = data[: PAGE - offset], data[PAGE - offset :]
            self.frames[page][offset : offset + len(part)] = part
            start += len(part)

    def parts(self) -> Iterator[tuple[int, int, bytes]]:
        """Yield ``(frame number, address, bytes)`` of the part of it in each page."""
        content = self.content()
        for gfn in pages_of(self.address, self.length):
            start = max(self.address, gfn * PAGE)
            end = min(self.address + self.length, (gfn + 1) * PAGE)
            yield gfn, start, content[start - self.address : end - self.address]


@dataclass(eq=False)
class Held(Window):
    """A lease that has not come back."""

    id: int
    kind: LeaseKind
    owner: str
    direction: DmaDirection | None
    writable: bool
    stale: bool = False
    warned: bool = False
    delivered: bool = False  # since the last invalidation
    undelivered: tuple[int, int, int] | None = None  # what a delivery could not reach

    @property
    def crosses(self) -> bool:
        """Whether it lies in more than one bucket."""
        return self.address % BUCKET + self.length > BUCKET

    def agrees_with(self, info: LeaseInfo) -> bool:
        """Tell whether that is what the cache should say of it."""
        said = (info.id, info.kind, info.address, info.length, info.owner, info.direction)
        known = (self.id, self.kind, self.address, self.length, self.owner, self.direction)
        return said == known and info.stale == self.stale


@dataclass
class Faults:
    """What an access may run into, as ``(address, bytes after it, errno)``, and whether it must."""

    possible: set[tuple[int, int, int]] = field(default_factory=set)
    certain: bool = False


class Model:
    """What is so.

    Attributes:
        frames: of each page, or None where the guest has given it up.
        paged: pages that fail to map for a while, and with which errno.
        seen: pages that a bucket may hold which was mapped before they were paged out.
        dirty: pages that were reported as written.
        held: leases, oldest first.
        warnings: what must have been logged: how it begins, and of which lease.
    """

    def __init__(self) -> None:
        self.frames: list[Frame | None] = [bytearray(PAGE) for _ in range(PAGES)]
        self.paged: dict[int, int] = {}
        self.seen: set[int] = set()
        self.dirty: set[int] = set()
        self.held: list[Held] = []
        self.warnings: Counter[tuple[str, int]] = Counter()

    # --- what an access finds ---

    def errno_of(self, gfn: int) -> int:
        """Return why a page cannot be mapped now, or 0."""
        there = gfn < PAGES and self.frames[gfn] is not None
        return self.paged.get(gfn, 0 if there else errno.EINVAL)

    def faults(self, address: int, length: int, *, again: bool = False) -> Faults:
        """Return what an access may run into, which begins now; ``again``: it maps for itself."""
        faults = Faults()
        for gfn in pages_of(address, length):
            if reason := self.errno_of(gfn):
                start = max(address, gfn * PAGE)
                faults.possible.add((start, address + length - start, reason))
                if again or gfn not in self.seen:
                    faults.certain = True
                    break
        if not again:
            first = address // BUCKET * BUCKET // PAGE
            around = range(first, first + rounded(address, length, BUCKET) // PAGE)
            self.seen |= {gfn for gfn in around if not self.errno_of(gfn)}
        return faults

    def take(self, address: int, length: int) -> Window:
        """Return a range as it is now; all of it is there."""
        frames = [self.frames[gfn] for gfn in pages_of(address, length)]
        return Window(address, length, [frame for frame in frames if frame is not None])

    # --- what the guest does ---

    def balloon_out(self, gfn: int) -> None:
        """Let a page go; its frame lives on if another party has taken it."""
        self.frames[gfn] = None

    def balloon_in(self, gfn: int) -> None:
        """Give a page a frame of zeros if it has none."""
        if self.frames[gfn] is None:
            self.frames[gfn] = bytearray(PAGE)

    # --- what becomes of leases ---

    def invalidate(self) -> None:
        """Make DMA leases stale and warn of each, once."""
        self.seen.clear()
        for lease in self.held:
            lease.delivered = False
            if lease.kind is LeaseKind.DMA:
                lease.stale = True
                if not lease.warned:
                    self.warnings["invalidation", lease.id] += 1
                    lease.warned = True

    def close(self) -> None:
        """Drop all leases by force, with a warning of each, and what a cache has seen."""
        self.mark_held()
        self.warnings.update(("closed by force, still held", lease.id) for lease in self.held)
        self.held.clear()
        self.seen.clear()

    def deliver(self, lease: Held) -> None:
        """Copy what a stale lease shows to the pages that the guest has now."""
        lease.undelivered = None
        for gfn, address, part in lease.parts():
            if reason := self.errno_of(gfn):
                after = lease.address + lease.length - address
                lease.undelivered = lease.undelivered or (address, after, reason)
            else:
                self.take(address, len(part)).put(0, part)
        lease.delivered = True

    def mark_held(self) -> int:
        """Note that all that may be under way was written; return how many leases that are."""
        under_way = [lease for lease in self.held if lease.writable]
        for lease in under_way:
            self.mark(lease.address, lease.length)
        return len(under_way)

    def mark(self, address: int, length: int) -> None:
        """Note that pages were written."""
        self.dirty |= set(pages_of(address, length))
