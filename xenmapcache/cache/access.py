"""Access: reads and writes that the hit path does not serve, and checks of ranges."""

from __future__ import annotations

import errno
from array import array
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from ..address import ADDRESS_LIMIT, PAGE_MASK, PAGE_SHIFT, MiB, as_int, page_span
from ..backend import Backend
from ..errors import (
    CacheFullError,
    EmptyRangeError,
    FaultError,
    UnsupportedOperationError,
    XenMapCacheError,
)
from ..grants import GrantSource, is_granted
from ..mapping import Mapping
from .buckets import BucketTable
from .budget import Budget, Operation
from .dirty import DirtyPages
from .mapper import Mapper

if TYPE_CHECKING:
    from typing_extensions import Buffer

_LOOK_FIRST_BYTES = 64 * MiB
_MAPPED_BYTES = 64 * MiB
"""A range up to that is mapped to find its pages; of a longer one the source is asked first."""
_OWNERS = (bytes, bytearray, array)
"""Exporters whose memory is Python's own, so that no guest page can be in it."""


def check_guest_range(
    address: object, length: object, known_hole: Callable[[int, int], int], *, empty: bool = True
) -> tuple[int, int]:
    """Return ``(address, length)`` as ints if guest memory may be there.

    Args:
        address: guest-physical, in bytes.
        length: in bytes.
        known_hole: :meth:`Access.known_hole`.
        empty: whether a length of zero is allowed.

    Raises:
        TypeError: one of them is not an int.
        ValueError: one of them is negative.
        FaultError: the range ends beyond a 52-bit address space, or is empty.
    """
    first = as_int("address", address)
    count = as_int("length", length)
    if first < 0:
        raise ValueError(f"address {first:#x} is negative; guest addresses begin at 0")
    if count < 0:
        raise ValueError(f"length {count:#x} at address {first:#x} is negative")
    if count == 0 and not empty:
        raise EmptyRangeError(first, 0, errno.EINVAL)
    end = first + count
    if end > ADDRESS_LIMIT and count:
        room = ADDRESS_LIMIT - first
        bad = max(first, known_hole(first, room)) if room > 0 else first
        raise FaultError(bad, end - bad, errno.EINVAL)
    return first, count


def bytes_of(name: str, buffer: Buffer) -> memoryview:
    """Return the bytes of a buffer, or a memoryview that is not contiguous."""
    try:
        view = memoryview(buffer)
    except TypeError:
        raise TypeError(
            f"{name} must be bytes or another buffer, not {type(buffer).__name__}"
        ) from None
    if view.nbytes == 0:
        return memoryview(bytearray()) if not view.readonly else memoryview(b"")
    return view.cast("B") if view.c_contiguous else view


def may_be_guest_memory(view: memoryview) -> bool:
    """Tell whether a buffer may lie in pages of a guest, which have other addresses as well."""
    owner: object = view.obj
    while type(owner).__name__ == "ndarray":  # NumPy's, which need not be installed
        base = owner.base  # type: ignore[attr-defined] # an array has it
        if base is None:
            return False
        owner = base.obj if isinstance(base, memoryview) else base
    return not isinstance(owner, _OWNERS)


class Access:
    """Reads and writes that need more than a look-up.

    Attributes:
        grants: the pages that the guest has granted, which are copied; or None.

    Synchronization: all methods are called in any thread, without the lock.
    """

    def __init__(
        self,
        backend: Backend,
        table: BucketTable,
        mapper: Mapper,
        budget: Budget,
        dirty: DirtyPages,
    ) -> None:
        self._backend = backend
        self._table = table
        self._mapper = mapper
        self._budget = budget
        self._dirty = dirty
        self.grants: GrantSource | None = None

    def memory_end(self) -> int | None:
        """Return where the source's memory ends, or None."""
        return self._backend.memory_end

    def known_hole(self, address: int, length: int) -> int:
        """Return where a range, in which a page is missing, has its first one; no map call is made.

        If the source does not know that, where its memory ends; if not even that, where the range
        does.
        """
        gfn, count = page_span(address, length)
        known = self._backend.present(gfn, count)
        if known is not None:
            first, pages = next(known, (gfn, 0))
            return (gfn if first > gfn else first + pages) << PAGE_SHIFT
        end = self._backend.memory_end
        return address + length if end is None or end <= address else end

    def read(self, address: int, length: int, fill: int | None = None) -> bytes:
        """Return guest memory; see :meth:`MapCache.read`."""
        if self.grants is not None and self._is_granted(address):
            return self.grants.read(address, as_int("length", length))
        if fill is not None:
            return self._read_filled(address, length, fill)
        address, length = check_guest_range(address, length, self.known_hole)
        if length > _LOOK_FIRST_BYTES:  # and it all has to exist: look before copying so much
            self.check_ends(address, length)
            if not self._is_known(address, length):
                for _ in self._mapper.pieces(address, length, lambda *_: None):
                    pass
        return b"".join(list(self._mapper.pieces(address, length, _copy)))

    def _is_granted(self, address: object) -> bool:
        """Tell whether an address names granted pages, in a cache that is open."""
        self._table.check_open()
        return is_granted(as_int("address", address))

    def _is_known(self, address: int, length: int) -> bool:
        """Tell whether the source knows, without mapping, that a range is there completely."""
        span = page_span(address, length)
        known = self._backend.present(*span)
        return known is not None and next(known, None) == span

    def check_ends(self, address: int, length: int) -> None:
        """Raise FaultError if the first or the last page of a range is missing.

        It takes two map calls. A guest that names a range beyond its memory costs the same.
        If one of these pages is refused, XenCallError.

        The error names the first missing page of the range if the source knows without mapping
        which pages exist. Otherwise it names the first page, the end of memory if that is known
        and inside the range, or the last page.
        """
        self._table.check_open()
        operation = Operation()
        end = address + length
        last = end - 1 & ~PAGE_MASK
        try:
            self._budget.operations[operation] = None
            for part in (address, max(address, last)):
                error = self._error_at(part >> PAGE_SHIFT, operation)
                if error:
                    bad = min(part, max(address, self.known_hole(address, length)))
                    raise FaultError(bad, end - bad, error)
        finally:
            self._budget.operations.pop(operation, None)
            self._budget.wake()

    def _error_at(self, gfn: int, operation: Operation) -> int:
        mapping = self._mapper.map(gfn, 1, operation, writable=False)
        refusal, errors = mapping.refusal(), mapping.errors
        del mapping  # no traceback is to keep the memory
        if refusal is not None:
            raise refusal
        return errors[0] if errors is not None else 0

    def map_pages(self, gfn: int, count: int) -> Mapping:
        """Map pages apart from the buckets; see :meth:`MapCache.map_pages`."""
        operation = Operation()
        try:
            self._budget.operations[operation] = None
            self._table.check_open()
            mapping = self._mapper.map(gfn, count, operation, writable=False)
            refusal = mapping.refusal()
            if refusal is None:
                return mapping
            try:
                raise refusal
            finally:
                del mapping, refusal  # no traceback is to keep the memory
        finally:
            self._budget.operations.pop(operation, None)
            self._budget.wake()

    def _read_filled(self, address: int, length: int, fill: int) -> bytes:
        """Return guest memory, with a byte in the place of those of missing pages."""
        byte = as_int("fill", fill)
        if not 0 <= byte <= 0xFF:
            raise ValueError(f"fill must be a byte, 0 to 255, not {byte}")
        address, length = as_int("address", address), as_int("length", length)
        if min(address, length) < 0:
            check_guest_range(address, length, self.known_hole)  # which raises
        self._table.check_open()
        end, known_end = address + length, self.memory_end()
        stop = max(address, min(end, ADDRESS_LIMIT if known_end is None else known_end))
        runs = [(address, stop)]
        known = self._backend.present(*page_span(address, stop - address)) if stop > address else ()
        if known is not None:
            runs = [
                (max(address, gfn << PAGE_SHIFT), min(stop, gfn + pages << PAGE_SHIFT))
                for gfn, pages in known
            ]
        missing = length - sum(last - first for first, last in runs)
        self._check_missing(missing, address, length)
        parts: list[bytes] = []
        position = address
        for first, last in runs:
            parts += _filling(byte, first - position)
            position = first
            while position < last:
                count = min(self._table.size - (position & self._table.mask), last - position)
                data, holes = self._filled_piece(position, count, byte)
                parts.append(data)
                missing += holes
                self._check_missing(missing, address, length)
                position += count
        parts += _filling(byte, end - position)
        return b"".join(parts)

    def _check_missing(self, missing: int, address: int, length: int) -> None:
        """Refuse to make up more memory than may be mapped: a guest may choose the range."""
        if missing > self._budget.limit:
            raise CacheFullError(
                f"at least {missing:#x} of {length:#x} bytes at {address:#x} are missing, and "
                f"`fill` gives at most max_resident, {self._budget.limit:#x} bytes; "
                "read smaller ranges"
            )

    def _filled_piece(self, address: int, count: int, byte: int) -> tuple[bytes, int]:
        """Return the part of a range in one bucket, and how many bytes of it are missing."""
        table, budget, operation = self._table, self._budget, Operation()
        start = address & table.mask
        try:
            budget.operations[operation] = None
            # Without a name for the mapping: no frame is to hold it afterwards.
            return _copy_filled(
                self._mapper.fetch(address >> table.shift, start, count, operation, holes=True)[1],
                start,
                count,
                byte,
            )
        finally:
            budget.operations.pop(operation, None)
            budget.wake()

    def read_into(self, address: int, target: memoryview, fill: int | None = None) -> None:
        """Fill a contiguous, writable buffer; see :meth:`MapCache.read_into`."""
        if self.grants is not None and self._is_granted(address):
            target[:] = self.grants.read(address, target.nbytes)
            return
        if fill is not None:
            target[:] = self._read_filled(address, target.nbytes, fill)
            return
        address, length = check_guest_range(address, target.nbytes, self.known_hole)
        operation = Operation()
        try:
            self._budget.operations[operation] = None
            self._copy_out(address, length, target, operation)
        finally:
            self._budget.operations.pop(operation, None)
            self._budget.wake()

    def _copy_out(
        self, address: int, length: int, target: memoryview, operation: Operation
    ) -> None:
        """Copy guest memory; a frame of its own, which holds no mapping when it has ended."""
        pieces = self._mapper.hold(address, length, operation)
        if may_be_guest_memory(target):
            # All bytes are read before the first one changes, as memmove would have it.
            target[:] = b"".join([_copy(*piece) for piece in pieces])
            return
        position = 0
        for mapping, start, count in pieces:
            target[position : position + count] = mapping.view(start, count)
            position += count

    def write(self, address: int, data: Buffer) -> None:
        """Change guest memory; see :meth:`MapCache.write`."""
        source = bytes_of("data", data)
        if not source.c_contiguous or may_be_guest_memory(source):
            # A copy, because a page that is both read and written may have two host addresses.
            source = memoryview(source.tobytes())
        if self.grants is not None and self._is_granted(address):
            self.grants.write(address, source)
            return
        if not self._table.writes:
            raise UnsupportedOperationError(f"the backend {self._backend.name!r} is read-only")
        address, length = check_guest_range(address, source.nbytes, self.known_hole)
        self._dirty.settle_quietly()
        operation = Operation()
        try:
            self._budget.operations[operation] = None
            self._copy_in(address, length, source, operation)
        finally:
            self._budget.operations.pop(operation, None)
            self._budget.wake()

    def _copy_in(self, address: int, length: int, source: memoryview, operation: Operation) -> None:
        """Copy to guest memory, and report the pages; a frame of its own as above."""
        reached = 0
        try:
            for mapping, start, count in self._mapper.hold(address, length, operation):
                position, reached = reached, reached + count
                mapping.view(start, count)[:] = source[position:reached]
            if reached and self._dirty.mark is not None:
                del mapping  # no traceback is to keep the memory
                self._dirty.mark(*page_span(address, reached))
        except XenMapCacheError:
            raise
        except BaseException:
            if reached:
                gfn = address >> PAGE_SHIFT
                end = address + reached + PAGE_MASK >> PAGE_SHIFT
                self._dirty.owed.append((gfn, end - gfn))
                self._dirty.settle_quietly()
            raise

    def present(self, address: int, length: int) -> Iterator[tuple[int, int]]:
        """Yield the present parts of a range; see :meth:`MapCache.present`."""
        self._table.check_open()
        end = address + length
        known = self._backend.present(*page_span(address, length)) if length else None
        if known is not None:
            for gfn, pages in known:
                first = max(address, gfn << PAGE_SHIFT)
                yield first, min(end, (gfn + pages) << PAGE_SHIFT) - first
            return
        run = reached = address  # where the run that is being extended began, and may go on
        for first, last in self._parts(address, end):
            if first > reached:
                if run < reached:
                    yield run, reached - run
                run = first
            for position, errors in self._errors(first, last):
                if errors is None:
                    continue
                for page, error in enumerate(errors):
                    page_address = max(first, (position & ~PAGE_MASK) + (page << PAGE_SHIFT))
                    if error:
                        if run < page_address:
                            yield run, page_address - run
                        run = (page_address | PAGE_MASK) + 1
            reached = last
        if run < reached:
            yield run, reached - run

    def _parts(self, address: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield the ``(start, end)`` in a range where pages may be, in ascending order."""
        if end - address <= _MAPPED_BYTES:
            yield address, end
            return
        for gfn, pages in self._backend.extents(*page_span(address, end - address)):
            yield max(address, gfn << PAGE_SHIFT), min(end, gfn + pages << PAGE_SHIFT)

    def _errors(self, address: int, end: int) -> Iterator[tuple[int, bytes | None]]:
        """Yield the address of each bucket's part of a range, and the errnos of its pages."""
        table = self._table
        while address < end:
            operation = Operation()
            start = address & table.mask
            count = min(table.size - start, end - address)
            try:
                self._budget.operations[operation] = None
                index = address >> table.shift
                errors = self._mapper.fetch(index, start, count, operation, holes=True)[1].errors
            finally:
                self._budget.operations.pop(operation, None)
            pages = slice(start >> PAGE_SHIFT, start + count + PAGE_MASK >> PAGE_SHIFT)
            yield address, None if errors is None else errors[pages]
            address += count


def _copy(mapping: Mapping, start: int, count: int) -> bytes:
    return mapping.memory[start : start + count]


def _copy_filled(mapping: Mapping, start: int, count: int, byte: int) -> tuple[bytes, int]:
    """Return a range of a mapping, and how many bytes of it are missing and replaced."""
    errors = mapping.errors
    if errors is None or mapping.valid(start, count):
        return mapping.memory[start : start + count], 0
    data, missing = bytearray([byte]) * count, count
    end = start + count
    while start < end:
        stop = min((start | PAGE_MASK) + 1, end)
        if not errors[start >> PAGE_SHIFT]:
            data[start - end + count : stop - end + count] = mapping.memory[start:stop]
            missing -= stop - start
        start = stop
    return bytes(data), missing


def _filling(byte: int, count: int) -> list[bytes]:
    """Return `count` times the same byte, as parts that are the same object."""
    block = bytes([byte]) * min(count, MiB)
    return [block] * (count // MiB) + [block[: count % MiB]] if count else []
