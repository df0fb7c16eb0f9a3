"""The guest that is written: its pages in order, and its ELF machine."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from itertools import groupby

from ..address import ADDRESS_LIMIT, PAGE_MASK, PAGE_SHIFT, MiB, page_span, parse_size
from ..backend import Backend
from ..cache import MapCache

Progress = Callable[[int, int], object]
"""Called as ``progress(done, total)``, in bytes of guest addresses."""

_CHUNK_BYTES = MiB


class Guest:
    """A source of guest memory from address 0 to an end.

    Args:
        source: an open source, or a cache over one.
        length: how far to go, in bytes or as ``"4GiB"``; None: to the end of memory.

    Attributes:
        backend: the source below a cache.
        end: one past the last address.

    Raises:
        TypeError, ValueError: an argument is wrong, or the source does not know its end and
            no length is given.
        ClosedError: the cache is closed.
    """

    def __init__(self, source: Backend | MapCache, length: int | str | None) -> None:
        self._cache = source if isinstance(source, MapCache) else None
        if self._cache is not None:
            list(self._cache.present(0, 0))  # raises if it is closed
        backend = source.backend if isinstance(source, MapCache) else source
        if not isinstance(backend, Backend):
            raise TypeError(f"source must be a Backend or a MapCache, not {type(backend).__name__}")
        end = backend.memory_end if length is None else parse_size(length)
        if end is None:
            raise ValueError("this source does not know where its memory ends: give a length")
        if end > ADDRESS_LIMIT:
            raise ValueError(
                f"length {end:#x} is beyond a 52-bit address space, {ADDRESS_LIMIT:#x}"
            )
        self.backend = backend
        self.end = end
        self._buffer = bytearray()

    def machine(self, name: str | None) -> str:
        """Return the name of a machine; by default the source's, or this machine's."""
        here = "arm" if platform.machine() in ("aarch64", "armv7l") else "x86-64"
        return name or getattr(self.backend, "machine", "") or here

    def known_runs(self) -> Iterator[tuple[int, int]] | None:
        """Return ``(gfn, pages)`` of each run of present pages; None if only mapping shows it."""
        count = self.end + PAGE_MASK >> PAGE_SHIFT
        return self.backend.present(0, count) if count else iter(())

    def extents(self) -> Iterator[tuple[int, int]]:
        """Return ``(gfn, pages)`` of the parts in which pages may be."""
        count = self.end + PAGE_MASK >> PAGE_SHIFT
        return self.backend.extents(0, count) if count else iter(())

    def pages(self, progress: Progress | None) -> Iterator[tuple[int, bytes | bytearray]]:
        """Yield ``(gfn, data)`` of present pages in ascending order, at most 1 MiB at once.

        The data are a copy: the guest may change a page between a look at it and a write. Use
        them before the next ones, which may be in the same buffer.

        Raises:
            XenMapCacheError: as mapping the source raises; XenCallError if a page was refused.
        """
        for gfn, count in self._chunks():
            if progress is not None:
                progress(min(gfn << PAGE_SHIFT, self.end), self.end)
            yield from self._copies(gfn, count)
        if progress is not None:
            progress(self.end, self.end)

    def read(self, address: int, length: int) -> bytes:
        """Return a range of memory; nothing if a page of it is missing."""
        gfn, count = page_span(address, length)
        data = b"".join(data for _, data in self._copies(gfn, count))
        start = address & PAGE_MASK
        return data[start : start + length] if len(data) == count << PAGE_SHIFT else b""

    def _chunks(self) -> Iterator[tuple[int, int]]:
        """Yield ``(gfn, pages)`` of chunks that are worth mapping."""
        cache = self._cache
        limits = () if cache is None else (cache.max_resident, cache.max_copies)
        room = min([_CHUNK_BYTES, *limits])
        step = room >> PAGE_SHIFT
        for first, pages in self.extents():
            for gfn in range(first, first + pages, step):
                yield gfn, min(step, first + pages - gfn)

    def _copies(self, gfn: int, count: int) -> Iterator[tuple[int, bytes | bytearray]]:
        """Yield ``(gfn, data)`` of the pages of a range that exist."""
        if len(self._buffer) != count << PAGE_SHIFT:
            self._buffer = bytearray(count << PAGE_SHIFT)
        if self.backend.read_pages(gfn, memoryview(self._buffer)):
            yield gfn, self._buffer
            return
        mapping = (
            self.backend.map(gfn, count, writable=False)
            if self._cache is None
            else self._cache.map_pages(gfn, count)
        )
        refusal = mapping.refusal()
        if refusal is not None:
            try:
                raise refusal
            finally:
                del mapping, refusal  # no traceback is to keep the memory
        errors = mapping.errors or bytes(count)
        first = 0
        for bad, group in groupby(errors, bool):
            stop = first + len(list(group))
            if not bad:
                yield gfn + first, mapping.memory[first << PAGE_SHIFT : stop << PAGE_SHIFT]
            first = stop
