"""Grants of a mock guest: what the guest lends, and how Xen and Linux would let it be used.

:class:`GuestGrants` is the guest's grant table, :class:`GrantDma` the driver's side of a device
that gets its buffers by grants, and :class:`MockGrants` what a device model maps and copies.
"""

from __future__ import annotations

import errno as _errno
import itertools
import logging
import threading
from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ..address import PAGE_MASK, PAGE_SHIFT, as_int, check_range, page_span
from ..binding import libc
from ..errors import XenCallError
from ..grants.address import Part, grant_address, references
from ..grants.source import MAX_MAPPED, MAX_REFS, GrantSource, Held
from .faults import FaultPlan
from .p2m import P2m

logger = logging.getLogger("xenmapcache")

_FIRST_REF = 8
"""Linux keeps those before it for the console and for xenstore."""
_MAX_GRANTS = 1 << 16
_MAX_PINS = 64
"""Xen maps one granted page this often; seen on Xen 4.17 and 4.20."""
_OKAY, _GENERAL_ERROR, _BAD_DOMAIN, _BAD_REF, _BAD_PAGE = 0, -1, -2, -3, -9


class Grant(NamedTuple):
    """A page that the guest lends."""

    gfn: int
    readonly: bool


class _Mapped:
    """Grants that are mapped.

    Attributes:
        frames: frame numbers by reference.
        address: host address; 0 until it is known.
    """

    __slots__ = ("address", "frames")

    def __init__(self, frames: dict[int, int]) -> None:
        self.frames = frames
        self.address = 0


class GuestGrants:
    """The grants of a mock guest; ``guest.grants``.

    As on Xen, the guest cannot take a grant back while its page is mapped. Until then a new map or
    copy of the reference finds the mapped frame, even if the guest has given the page up. The
    reference that was freed last is used first, and then names another page.

    Args:
        p2m: of the guest.
        faults: of the guest; they log the calls.
        domid: of the guest.

    Attributes:
        destroyed: whether the domain was destroyed, so that nothing further can be mapped.

    Synchronization: all methods may be called in any threads and signal handlers.
    """

    def __init__(self, p2m: P2m, faults: FaultPlan, domid: int) -> None:
        self.p2m = p2m
        self.faults = faults
        self.domid = domid
        self.destroyed = False
        self._grants: dict[int, Grant] = {}
        self._free: list[int] = []
        self._fresh = _FIRST_REF
        self._pending: dict[int, None] = {}
        self._mapped: dict[int, _Mapped] = {}
        self._next_index = itertools.count().__next__
        self._lock = threading.RLock()

    # --- the guest's side -----------------------------------------------------------

    def grant(self, gfn: int, count: int = 1, *, readonly: bool = False) -> int:
        """Grant pages to the device model's domain.

        Args:
            gfn: the first page.
            count: pages; several of them get consecutive references.
            readonly: the pages cannot be mapped for writing, or be copied to.

        Returns:
            The first reference.

        Raises:
            FaultError: a page is not there.
            ValueError: not a range of pages, or the guest's grant table is full.
        """
        check_range(as_int("gfn", gfn) << PAGE_SHIFT, as_int("count", count) << PAGE_SHIFT)
        self.p2m.frames.check_process()
        self.p2m.check_present(gfn, count)
        with self._lock:
            self._settle()
            if len(self._grants) + count > _MAX_GRANTS:
                raise ValueError(f"the mock's guest can grant {_MAX_GRANTS} pages at a time")
            first = self._allocate(count)
            for number in range(count):
                self._grants[first + number] = Grant(gfn + number, readonly)
            return first

    def _allocate(self, count: int) -> int:
        if count == 1 and self._free:
            return self._free.pop()
        free = sorted(self._free)
        for position in range(len(free) - count + 1):
            first = free[position]
            if free[position + count - 1] == first + count - 1:
                self._free = [ref for ref in self._free if not first <= ref < first + count]
                return first
        first = self._fresh
        self._fresh += count
        return first

    def revoke(self, ref: int, count: int = 1) -> bool:
        """Take grants back.

        Those that are mapped are taken back when their last mapping ends; until then they can still
        be mapped and copied.

        Returns:
            Whether all of them are taken back now.

        Raises:
            ValueError: one is not granted.
        """
        refs = range(ref, ref + count)
        with self._lock:
            for each in refs:
                if each not in self._grants:
                    raise ValueError(f"reference {each} is not granted")
            for each in refs:
                self._pending[each] = None
            self._settle()
            return self._pending.keys().isdisjoint(refs)

    def is_mapped(self, ref: int) -> bool:
        """Tell whether a granted page is mapped."""
        return self._pins(ref) > 0

    # --- the hypervisor's side --------------------------------------------------------

    @property
    def mappings(self) -> int:
        """How many mappings of its grants there are."""
        return len(self._mapped)

    def _pins(self, ref: int) -> int:
        pins = 0
        for each in [*self._mapped.values()]:  # CPython 3.11 loses references in a comprehension
            pins += ref in each.frames
        return pins

    def _settle(self) -> None:
        """Free what the guest has taken back, and what is no longer mapped."""
        with self._lock:
            for ref in [*self._pending]:
                if not self._pins(ref) and self._pending.pop(ref, ref) is None:
                    self._grants.pop(ref, None)
                    self._free.append(ref)

    def frame(self, ref: int) -> int | None:
        """Return the frame that a reference names; None if it is not granted, or not there."""
        self._settle()
        grant = self._grants.get(ref)
        if grant is None:
            return None
        for mapped in [*self._mapped.values()]:
            if ref in mapped.frames:
                return mapped.frames[ref]
        runs = self.p2m.runs(grant.gfn, 1)
        return runs[0][1] if runs else None

    def map(self, refs: Iterable[int], writable: bool, result_out: list[int]) -> None:
        """Map granted pages in one piece; the list gets the host address.

        Raises:
            XenCallError: EINVAL, whatever the reason is.
        """
        self.p2m.frames.check_process()
        frames: dict[int, int] = {}
        for ref in refs:
            frame = self.frame(ref)
            refused = frame is None or self.destroyed or self._pins(ref) >= _MAX_PINS
            if refused or (writable and self._grants[ref].readonly):
                self.faults.note("map_grants", ref, 1, _errno.EINVAL)
                raise XenCallError("mock_map_grants", self.domid, _errno.EINVAL)
            assert frame is not None  # noqa: S101 - refused otherwise
            frames[ref] = frame
        runs = [(position, frame, 1) for position, frame in enumerate(frames.values())]
        index, mapped = self._next_index(), _Mapped(frames)
        try:
            self._mapped[index] = mapped
            self.p2m.frames.map(runs, len(runs), writable, result_out)
            mapped.address = result_out[-1]
            self.faults.note("map_grants", min(frames), len(frames))
        except BaseException:
            self.unmap(index)
            raise

    def indexes(self, address: int) -> list[int]:
        """Return the numbers of the mappings that were made at a host address, the last one last.

        The memory of those before it was unmapped, and its grants were not given back yet.
        """
        found = []
        for index, each in [*self._mapped.items()]:  # as _pins()
            if each.address == address:
                found.append(index)
        return found

    def unmap(self, index: int) -> None:
        """End a mapping. May be repeated."""
        mapped = self._mapped.pop(index, None)
        if mapped is not None:
            self.faults.note("unmap_grants", min(mapped.frames), len(mapped.frames))
            self._settle()

    def copy(self, part: Part, local: memoryview, to_guest: bool) -> int:
        """Copy a part of a page; return the status that Xen gives for it."""
        self.p2m.frames.check_process()
        if self.destroyed:
            return _BAD_PAGE if self._mapped else _BAD_DOMAIN
        frame = self.frame(part.ref)
        if frame is None:
            return _BAD_REF if part.ref not in self._grants else _BAD_PAGE
        if to_guest and self._grants[part.ref].readonly:
            return _GENERAL_ERROR
        piece = [((frame << PAGE_SHIFT) + part.offset, part.length)]
        if to_guest:
            self.p2m.frames.write(piece, local)
        else:
            local[:] = self.p2m.frames.read(piece)
        return _OKAY


class GrantDma:
    """A Linux driver's buffers, which its device gets by grants.

    Follows what Linux does in ``drivers/xen/grant-dma-ops.c``.

    Attributes:
        broken: why the guest has disabled the device, or an empty string.
    """

    def __init__(self, grants: GuestGrants) -> None:
        self._grants = grants
        self.broken = ""

    def map(self, address: int, length: int, *, to_device: bool = False) -> int:
        """Grant the pages of a buffer for one request.

        Args:
            address: guest-physical, in bytes.
            length: in bytes, at least 1.
            to_device: the device only reads it.

        Returns:
            The address for the device.

        Raises:
            XenCallError: the device is broken.
            FaultError: a page is not there.
            ValueError: not a range of guest memory.
        """
        if self.broken:
            raise XenCallError("mock_grant_dma", self._grants.domid, _errno.EIO, self.broken)
        gfn, count = page_span(*check_range(address, length))
        ref = self._grants.grant(gfn, count, readonly=to_device)
        return grant_address(ref, address & PAGE_MASK)

    def unmap(self, address: int, length: int) -> None:
        """Take a buffer's grants back, when its request has completed.

        If a page is still mapped, the guest disables the device.
        """
        first, count = references(address, length)
        for ref in range(first, first + count):
            if self._grants.is_mapped(ref):
                self.broken = f"reference {ref} is still mapped: the guest has disabled the device"
                logger.warning("domain %d: %s", self._grants.domid, self.broken)
                return
        self._grants.revoke(first, count)


class MockGrants(GrantSource):
    """The grants of a mock guest, as a device model sees them.

    Args:
        grants: ``guest.grants``.
        max_refs: as of :class:`.GrantSource`.
        max_mapped: likewise.
    """

    copy_call = "mock_copy_grants"

    def __init__(
        self, grants: GuestGrants, *, max_refs: int = MAX_REFS, max_mapped: int = MAX_MAPPED
    ) -> None:
        super().__init__(grants.domid, max_refs=max_refs, max_mapped=max_mapped)
        self._grants = grants

    def _map(self, refs: array[int], writable: bool, result_out: list[int]) -> int:
        self._grants.map(refs, writable, result_out)
        return result_out[-1]

    def _index(self, address: int) -> int:
        return self._grants.indexes(address)[-1]

    def _unmap(self, address: int, held: Held) -> None:
        for index in self._grants.indexes(address):
            self._grants.unmap(index)
        libc.munmap(address, held.count << PAGE_SHIFT)
        self._held.pop(held, None)

    def _give_back(self, held: Held) -> None:
        self._grants.unmap(held.index)
        self._held.pop(held, None)

    def _copy(self, parts: Sequence[Part], buffer: bytearray, to_guest: bool) -> list[int]:
        statuses = []
        view = memoryview(buffer)
        for part in parts:
            statuses.append(self._grants.copy(part, view[: part.length], to_guest))
            view = view[part.length :]
        return statuses

    def _close(self) -> None:
        """Nothing was opened."""
