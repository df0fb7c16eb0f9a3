"""Scatter-gather lists: several ranges of guest memory, leased together and used as one."""

# Theory of operation
#
# Segments is in one of two states. `_leases` alone says which:
#
#   empty   nothing is leased: before `with`, and after a release
#   held    it has every lease of the list; a release that failed has ended some of them
#
#   empty --with: take all, or none--> held --release--> empty
#                                       ^---'  a release that failed: what is still held stays
#
# Rules
#   1. All leases are taken by one call into C, which keeps each lease as soon as it exists. So a
#      signal handler that raises while they are taken loses none: `__enter__` releases them.
#   2. A release looks at each lease, and skips those that have ended. So it can be repeated after
#      an interrupt or an error, and it reports only what it did itself.
#   3. What a file gives or takes is counted by the kernel. Nothing here guesses: a short transfer
#      goes on where the kernel stopped, and ends when the kernel moves nothing.

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import partial
from itertools import accumulate, starmap
from types import TracebackType
from typing import TYPE_CHECKING, Self

from ..address import as_int
from ..cache import DmaDirection, Lease, MapCache
from ..cache.info import as_direction
from ..errors import LeaseError

if TYPE_CHECKING:
    from typing_extensions import Buffer

_MAX_VIEWS = os.sysconf("SC_IOV_MAX")
"""How many buffers one call of preadv or pwritev takes."""

Move = Callable[[int, list[memoryview], int], int]


class Pieces:
    """Bytes that are in several places, in order: a part of a scatter-gather list.

    A slice of it, counted in bytes, is one as well, and shows the same memory. It is valid for as
    long as the leases of its :class:`Segments` are held.

    Synchronization: as a list of memoryviews; the guest may write the bytes at any time.
    """

    __slots__ = ("_views",)

    def __init__(self, views: list[memoryview]) -> None:
        self._views = views

    @property
    def views(self) -> list[memoryview]:
        """A view of each piece, for ``os.preadv``, ``socket.sendmsg`` and the like."""
        return self._views.copy()  # without memory, list() loses a reference before CPython 3.13

    def __len__(self) -> int:
        return sum(map(len, self._views))

    def __getitem__(self, part: slice) -> Pieces:
        start, stop = self._bounds(part)
        found = []
        for view in self._views:
            if max(start, 0) < min(stop, len(view)):
                found.append(view[max(start, 0) : stop])
            start, stop = start - len(view), stop - len(view)
        return Pieces(found)

    def __setitem__(self, part: slice, data: Buffer) -> None:
        rest = memoryview(data).cast("B")
        target = self[part]
        if len(rest) != len(target):
            raise ValueError(f"{len(rest)} bytes do not fit a slice of {len(target)} bytes")
        for view in target.views:
            view[:] = rest[: len(view)]
            rest = rest[len(view) :]

    def _bounds(self, part: slice) -> tuple[int, int]:
        if not isinstance(part, slice):
            raise TypeError(f"the index must be a slice, as [0:16], not {part!r}")
        start, stop, step = part.indices(len(self))
        if step != 1:
            raise ValueError(f"the step of a slice must be 1, not {step}")
        return start, max(start, stop)

    def tobytes(self) -> bytes:
        """Return a copy of the bytes."""
        return b"".join(self._views)

    def read_from(self, fd: int, offset: int) -> int:
        """Read from a file into guest memory, without a copy in between.

        Args:
            fd: the file's descriptor.
            offset: where in the file.

        Returns:
            How many bytes were read: fewer than ``len()`` only at the file's end.

        Raises:
            TypeError: it was leased TO_DEVICE.
            OSError: the file cannot be read there; a part may have been read.
        """
        if any(view.readonly for view in self._views):
            raise TypeError(
                f"the device only reads these {len(self)} bytes, because they were leased with "
                "direction TO_DEVICE; lease them with FROM_DEVICE to read a file into them"
            )
        return _move_all(os.preadv, self._views, fd, offset)

    def write_to(self, fd: int, offset: int) -> int:
        """Write guest memory to a file, without a copy in between.

        Args:
            fd: the file's descriptor.
            offset: where in the file.

        Returns:
            How many bytes were written: fewer than ``len()`` only if the file stops taking
            them and gives no error.

        Raises:
            OSError: the file cannot be written there; a part may have been written.
        """
        return _move_all(os.pwritev, self._views, fd, offset)


class Segments(Pieces):
    """The ranges of a scatter-gather list, leased for a ``with`` block: all, or on an error none.

    Made by :meth:`GuestMemory.segments`. Its bytes are numbered across all ranges: ``len()``,
    slices, :meth:`read_from` and :meth:`write_to` do not see where one range ends. A range of
    length 0 has an empty view and no lease.

        with memory.segments(ranges, owner="disk0", direction="from-device") as segments:
            count = segments.read_from(disk, sector * 512)
            segments.release(written=count)

    If a signal handler raises while the leases are taken, those that were taken are released. If
    it raises while they are released, the others are still held, and :meth:`release` ends them.

    Synchronization: one thread at a time.
    """

    __slots__ = ("_cache", "_direction", "_leases", "_owner", "_ranges", "_starts")

    def __init__(
        self,
        cache: MapCache,
        ranges: Iterable[tuple[int, int]],
        owner: str,
        direction: DmaDirection | str,
    ) -> None:
        super().__init__([])
        self._cache = cache
        self._ranges = ranges
        self._owner = owner
        self._direction = as_direction(direction)
        self._leases: list[Lease] = []
        self._starts: list[int] = []  # where the bytes of each lease begin in the list, and the end

    @property
    def leases(self) -> tuple[Lease, ...]:
        """The leases that are held, in the order of the ranges."""
        return tuple(lease for lease in self._leases if not lease.released)

    def __enter__(self) -> Self:
        if self._leases and self.leases:
            raise LeaseError(f"the list is leased already: {self._leases[0]!r}; release it first")
        pairs = [(address, as_int("length", length)) for address, length in self._ranges]
        if not pairs:
            return self
        wanted = [pair for pair in pairs if pair[1]]
        take = partial(self._cache.map_dma, owner=self._owner, direction=self._direction)
        try:
            leases: list[Lease] = []
            self._leases = leases
            self._starts = list(accumulate((length for _, length in wanted), initial=0))
            leases.extend(starmap(take, wanted))
            given = iter(leases)
            empty = memoryview(bytearray())
            if self._direction is DmaDirection.TO_DEVICE:
                empty = empty.toreadonly()
            self._views = [next(given).view if length else empty for _, length in pairs]
        except BaseException as error:
            self._end(None, error)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end(None, error)

    def release(self, *, written: int | None = None) -> None:
        """Release all leases, the last one first, also if one of them raises. Can be repeated.

        Args:
            written: how many bytes, from the first one on, may have been written; only their
                pages are reported dirty. None if all may have been.

        Raises:
            ValueError: ``written`` is negative, or more than the list has.
            XenMapCacheError: as :meth:`Lease.release`; the first one of several. What is still
                held then stays in :attr:`leases`.
        """
        if written is not None and self._leases:
            total = self._starts[-1]
            if not 0 <= as_int("written", written) <= total:
                raise ValueError(f"written must be 0 to {total}, the list's bytes, not {written}")
        self._end(written, None)

    def _end(self, written: int | None, error: BaseException | None) -> None:
        """Release what is held; after an error the frames on the stack may use views rightly."""
        self._views = []
        if not self._leases:
            return
        failure: Exception | None = None
        for start, lease in reversed([*zip(self._starts, self._leases, strict=False)]):
            try:
                if lease.released:
                    continue
                if error is not None:
                    lease.__exit__(type(error), error, None)
                elif written is None:
                    lease.release()
                else:
                    lease.release(written=min(max(written - start, 0), lease.length))
            except Exception as each:  # raised below, when the others are released
                failure = failure or each
        if not self.leases:
            self._leases = []
        try:
            if failure is not None:
                raise failure
        finally:
            del failure  # its traceback holds this frame


def _move_all(move: Move, views: list[memoryview], fd: int, offset: int) -> int:
    """Call preadv or pwritev until all is moved, or until a call moves nothing."""
    remaining = [view for view in views if view]
    moved = first = 0
    while first < len(remaining):
        count = move(fd, remaining[first : first + _MAX_VIEWS], offset + moved)
        if not count:
            break
        moved += count
        while first < len(remaining) and count >= len(remaining[first]):
            count -= len(remaining[first])
            first += 1
        if count:
            remaining[first] = remaining[first][count:]
    return moved
