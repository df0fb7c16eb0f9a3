"""The contract of a source of grants, and what it does with whichever hypervisor."""

# Theory of operation
#
# Reference counts decide when foreign memory is unmapped; granted memory is the one exception. A
# Linux guest takes a grant back as soon as its request has completed. If the page is still mapped
# then, the guest disables the device. So a lease ends its grants when it is released, although a
# view of it may be kept.
#
# munmap alone does not end a grant: the kernel keeps it until it is given back by its index, or
# until the descriptor is closed. To give it back leaves memory where it is, so both are needed:
#
#   mapped --private zeros are mapped over it--> covered --given back by its index--> ended
#   mapped --its last reference dropped: munmap--> gone ---given back at the next call--^
#
# A kept view shows the zeros. They are an ordinary Mapping's memory, which reference counts unmap.
#
# Rules
#   1. The address is never free while a view may be kept: the zeros replace the memory in one step
#      (MAP_FIXED). That may be repeated for as long as there is a reference to the memory.
#   2. An index is given back once. The kernel uses it again, so a second time would end the grants
#      of another lease. GrantTable.give_back makes this and the end of the record one step.
#   3. A record is stored before the map call, and dropped when its grants have ended. So whatever
#      interrupts, either the record or the map call's own list says what is left to be done.
#   4. The sum of all records is compared with max_mapped after the own record was stored. Two
#      threads that reach the bound together may both be refused; it is never exceeded.
#   5. A forked child neither covers nor gives back: the grants are its parent's. No mapping gets a
#      record in the table of mapping.py before it is kept out of children, so each memory that a
#      view can show has private zeros in a child. In a PVH Dom0 the kernel would leave it there. A
#      child that another thread forks between the map call and that step inherits memory that its
#      code does not know; it keeps these grants mapped until it ends or executes a program.

from __future__ import annotations

import abc
import errno as _errno
import logging
import os
from array import array
from collections.abc import Callable, Sequence
from functools import partial
from typing import Self

from ..address import PAGE_SHIFT, as_int
from ..binding import libc
from ..errors import (
    CacheFullError,
    ClosedError,
    EmptyRangeError,
    GrantError,
    LeaseError,
    XenCallError,
)
from ..logs import safely
from ..mapping import LiveMapping, Mapping
from .address import Part, grant_address, parts, references

logger = logging.getLogger("xenmapcache")

MAX_REFS = 1024
"""How many pages one lease or copy may have, unless a source is opened with another bound."""
MAX_MAPPED = 1 << 15
"""How many grants may be mapped at a time, likewise; Linux's own bound is twice that."""
_NAMED = 10

_NOT_GRANTED = (
    "the guest has not granted all of them, has taken one back, has granted one read-only that is "
    "to be written, or has ended; or one is mapped too often"
)
_STATUSES = {
    -1: (_errno.EACCES, "refused; it may be granted read-only"),
    -3: (_errno.EINVAL, "the guest has not granted it, or has taken it back"),
    -8: (_errno.EPERM, "it may be granted to another domain"),
    -9: (_errno.EINVAL, "there is no page: the guest has given it up, or is being destroyed"),
}
"""Errno and meaning of a copy's status if the guest is the reason; from GNTST_general_error on."""
_OTHER_STATUSES = {
    -2: (_errno.ESRCH, "there is no such domain"),
    -12: (_errno.EAGAIN, "the page is paged out; try again"),
}


class Held:
    """Grants that are mapped, or about to be.

    Attributes:
        first, count: the references.
        address: a list: what the map call returned, until a Mapping has taken it over.
        index: what the kernel calls these grants; negative until that is known.
        live: the record of their memory; None before.
        covered: whether private zeros may have taken the place of the memory.
        token: a list with one element, which the call that gives them back takes out.
    """

    __slots__ = ("address", "count", "covered", "first", "index", "live", "token")

    def __init__(self, first: int, count: int) -> None:
        self.first = first
        self.count = count
        self.address: list[int] = []
        self.index = -1
        self.live: LiveMapping | None = None
        self.covered = False
        self.token: list[None] = [None]

    def __str__(self) -> str:
        last = self.first + self.count - 1
        return f"reference {last}" if self.count == 1 else f"references {self.first} to {last}"


class GrantMapping(Mapping):
    """Granted pages, mapped in one piece. Made by :meth:`GrantSource.map`.

    Attributes:
        give_back: ends the grants, and puts private zeros in the place of the memory. Can be
            repeated. In a forked child it does nothing.
        held: the grants.
    """

    __slots__ = ("give_back", "held")

    give_back: Callable[[], None]
    held: Held

    @property
    def covered(self) -> bool:
        """Whether it may show private zeros: giving the grants back has begun."""
        return self.held.covered


class GrantSource(abc.ABC):
    """The pages that one guest has granted. Also a context manager.

    Open one with :meth:`.Backend.open_grants`, and hand it to ``MapCache(backend, grants=)``. Close
    it after the cache.

    Args:
        domid: the guest.
        max_refs: how many pages one lease or one copy may have.
        max_mapped: how many grants may be mapped at a time.

    Raises:
        ValueError: a bound is less than 1.

    Synchronization: all methods may be called in any threads. In a forked child they raise
    ClosedError.
    """

    copy_call: str
    """The function that copies, for errors."""

    def __init__(
        self, domid: int, *, max_refs: int = MAX_REFS, max_mapped: int = MAX_MAPPED
    ) -> None:
        for name, bound in (("max_refs", max_refs), ("max_mapped", max_mapped)):
            if as_int(name, bound) < 1:
                raise ValueError(f"{name} must be at least 1, not {bound}")
        self.domid = domid
        self.max_refs = max_refs
        self.max_mapped = max_mapped
        self._held: dict[Held, None] = {}
        self._pid = os.getpid()
        self._closed = False

    def __repr__(self) -> str:
        state = "closed " if self._closed else ""
        return f"<{state}{type(self).__name__} of domain {self.domid}: {self.mapped} mapped>"

    @property
    def mapped(self) -> int:
        """How many grants are mapped now."""
        total = 0
        for held in [*self._held]:  # a loop: CPython 3.11 loses references in a comprehension
            total += held.count
        return total

    # --- for leases -----------------------------------------------------------------

    def map(
        self, address: int, length: int, *, writable: bool, result_out: list[GrantMapping]
    ) -> GrantMapping:
        """Map all granted pages of a range, or on an error none.

        Args:
            address: with bit 63.
            length: in bytes.
            writable: map for writing too; pages that were granted read-only are refused then.
            result_out: a list that gets the mapping, for a caller that is interrupted.

        Returns:
            The mapping. Its caller ends it by ``give_back``.

        Raises:
            FaultError: no reference is so large; EmptyRangeError for a length of 0.
            GrantError: a page is not granted, or not for writing. Xen does not say which.
            XenCallError: the call failed for another reason.
            CacheFullError: more pages than ``max_refs``, or than ``max_mapped`` leaves.
            ClosedError: the source is closed, or belongs to the parent process.
        """
        first, count = self._check_length(address, length)
        if not count:
            raise EmptyRangeError(address, 0, _errno.EINVAL)
        self._sweep()
        held = Held(first, count)
        try:
            self._held[held] = None
            self._check_open()  # close() marks the source, and then looks at what is held
            total = self.mapped
            if total > self.max_mapped:
                raise CacheFullError(
                    f"domain {self.domid}: with {held}, {total} grants would be mapped, and "
                    f"max_mapped is {self.max_mapped}; release leases, or raise max_mapped"
                )
            mapping = self._make(held, address, length, writable)
            self._check_open()  # it may have found this before there was a mapping to end
            result_out.append(mapping)
            return mapping
        except BaseException:
            self._undo(held)
            raise

    def _make(self, held: Held, address: int, length: int, writable: bool) -> GrantMapping:
        refs = array("I", range(held.first, held.first + held.count))
        try:
            host_address = self._map(refs, writable, held.address)
        except XenCallError as error:
            call, errno = error.call, error.errno
            if errno != _errno.EINVAL:
                raise XenCallError(call, self.domid, errno, f"{held}: {error.hint}") from None
            hint = f"{held}: {_NOT_GRANTED}"
            raise GrantError(address, length, errno, self.domid, call, hint) from None
        libc.dont_fork(host_address, held.count << PAGE_SHIFT)
        held.index = self._index(host_address)
        mapping = GrantMapping(
            host_address,
            address >> PAGE_SHIFT,
            held.count,
            writable=writable,
            errors=None,
            result_out=held.address,
            domid=self.domid,
        )
        mapping.held, mapping.give_back = held, partial(self._end, held)
        held.live = mapping.record
        return mapping

    def _undo(self, held: Held) -> None:
        """End what a failed or interrupted call has mapped."""
        for address in filter(None, held.address[-1:]):  # no Mapping has taken it over
            self._unmap(address, held)
        held.address.clear()
        if held.index < 0:
            self._held.pop(held, None)
        self._end(held)

    def _end(self, held: Held) -> None:
        """Cover the memory of grants, and give them back. May be repeated."""
        if os.getpid() != self._pid or held not in self._held:
            return
        live = held.live
        memory = None if live is None else live()  # keeps the address ours
        if live is not None and memory is not None:
            held.covered = True
            try:
                _cover(live.address, live.length, self.domid)
            except XenCallError:
                held.covered = False
                raise
        if held.index >= 0:
            self._give_back(held)

    def _sweep(self) -> None:
        """Give back the grants whose memory was unmapped because nobody referred to it."""
        for held in [*self._held]:
            if held.live is not None and not held.live.mapped:
                self._give_back(held)

    # --- copies ---------------------------------------------------------------------

    def read(self, address: int, length: int) -> bytes:
        """Return granted memory, copied by Xen: for one page that is quicker than to map it.

        Args:
            address: with bit 63.
            length: in bytes.

        Raises:
            GrantError: a page is not granted, or not for writing; it says which.
            XenCallError: the call failed for another reason.
            FaultError, CacheFullError, ClosedError: as :meth:`map`.
            UnsupportedOperationError: the library is older than VERS_1.1.
        """
        self._check_length(address, length)  # before memory is taken: a guest may choose it
        buffer = bytearray(length)
        self._transfer(address, buffer, to_guest=False)
        return bytes(buffer)

    def write(self, address: int, data: bytes | memoryview) -> None:
        """Write to granted memory; what it raises is as of :meth:`read`.

        On an error, the pages before the one that is named may be written.
        """
        self._check_length(address, memoryview(data).nbytes)
        self._transfer(address, bytearray(data), to_guest=True)

    def _transfer(self, address: int, buffer: bytearray, *, to_guest: bool) -> None:
        if not buffer:
            return
        pages = [*parts(address, len(buffer))]
        for part, status in zip(pages, self._copy(pages, buffer, to_guest), strict=True):
            if status:
                raise self._refused(part, status, address + len(buffer))

    def _refused(self, part: Part, status: int, end: int) -> GrantError | XenCallError:
        """Return the error of a part of a copy that ends at an address."""
        call, bad = self.copy_call, grant_address(part.ref, part.offset)
        if status in _STATUSES:
            errno, meaning = _STATUSES[status]
            hint = f"reference {part.ref}: {meaning} (status {status})"
            return GrantError(bad, end - bad, errno, self.domid, call, hint)
        errno, meaning = _OTHER_STATUSES.get(status, (_errno.EIO, "Xen refused it"))
        hint = f"reference {part.ref}: {meaning} (status {status})"
        return XenCallError(call, self.domid, errno, hint, address=bad)

    # --- life -----------------------------------------------------------------------

    def close(self, *, force: bool = False) -> None:
        """Refuse further calls. Idempotent.

        Args:
            force: end the grants that are mapped, too, with a WARNING each. Kept views show zeros.

        Raises:
            LeaseError: grants are mapped; nothing has changed.
        """
        if os.getpid() != self._pid:
            return
        self._sweep()
        held = [*self._held]
        if held and not force and not self._closed:
            named = "; ".join(map(str, held[:_NAMED]))
            raise LeaseError(
                f"{self.mapped} grants of domain {self.domid} are mapped: {named}"
                f"{' and more' * (len(held) > _NAMED)}. Release their leases, or close(force=True)"
            )
        self._closed = True
        for each in [*self._held]:
            self._end(each)
            safely(logger.warning, "domain %d: closed by force, still mapped: %s", self.domid, each)
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        # An exception on its way out is worth more than a complaint about its leases.
        self.close(force=error is not None)

    def _check_length(self, address: int, length: int) -> tuple[int, int]:
        """Return the references of a range that is not too long."""
        self._check_open()
        first, count = references(address, length)
        if count > self.max_refs:
            raise CacheFullError(
                f"domain {self.domid}: {count} granted pages at {address:#x} are more than "
                f"max_refs {self.max_refs}; use a smaller range, or raise max_refs"
            )
        return first, count

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"the grants of domain {self.domid} are closed")
        if os.getpid() != self._pid:
            raise ClosedError(
                f"these grants of domain {self.domid} belong to process {self._pid}, which forked "
                "this one: open a source of your own after the fork"
            )

    # --- what a hypervisor does -------------------------------------------------------

    @abc.abstractmethod
    def _map(self, refs: array[int], writable: bool, result_out: list[int]) -> int:
        """Map pages in one piece; return the host address, which the list gets as well."""

    @abc.abstractmethod
    def _index(self, address: int) -> int:
        """Return the index of the grants that are mapped at a host address."""

    @abc.abstractmethod
    def _unmap(self, address: int, held: Held) -> None:
        """Unmap memory that nobody has seen, give its grants back, and drop the record."""

    @abc.abstractmethod
    def _give_back(self, held: Held) -> None:
        """Give grants back by their index, and drop the record, in one step."""

    @abc.abstractmethod
    def _copy(self, parts: Sequence[Part], buffer: bytearray, to_guest: bool) -> list[int]:
        """Copy; return the status of each part."""

    @abc.abstractmethod
    def _close(self) -> None:
        """Close what was opened."""


def _cover(address: int, length: int, domid: int) -> None:
    """Put private zeros in the place of granted memory."""
    if libc.map_zeros_over(address, length, replace=True):
        return
    # The kernel checks its limits before it unmaps. Had it failed later, there would be a gap.
    if not libc.map_zeros_over(address, length):
        raise XenCallError("mmap", domid, _errno.ENOMEM, libc.ENOMEM_HINT)
