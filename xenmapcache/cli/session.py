"""What commands share: an open source behind a cache, and the memory it has."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from ..address import PAGE_MASK, MiB
from ..backend import open_backend
from ..cache import MapCache
from ..errors import FaultError
from ..source import parse_source
from .output import progress
from .parser import CommandError

MAX_RESIDENT = 64 * MiB
_WINDOW = 16 * MiB


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Make what the library says of wrong arguments an error of the user's."""
    try:
        yield
    except (ValueError, OverflowError) as error:
        raise CommandError(str(error)) from error


@contextlib.contextmanager
def opened(spec: str) -> Iterator[MapCache]:
    """Open a source, with a progress bar where that takes long, and a cache over it."""
    with contextlib.ExitStack() as stack:
        with refusals():
            name, options = parse_source(spec)
            if name == "save":
                options["progress"] = stack.enter_context(progress(f"reading {spec}"))
            backend = open_backend(name, **options)
        stack.close()
        stack.enter_context(backend)
        yield stack.enter_context(MapCache(backend, max_resident=MAX_RESIDENT))


def extent(start: int, length: int | None, *caches: MapCache) -> tuple[int, int]:
    """Return the range that a command is about: to the end of the memory of the largest source."""
    if length is not None:
        return start, start + length
    end = 0
    for cache in caches:
        if cache.memory_end is None:
            raise CommandError(
                "this source does not know where its memory ends: give --length, such as 4GiB"
            )
        end = max(end, cache.memory_end)
    return start, max(start, end)


def present(cache: MapCache, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield ``(start, end)`` of what is there of a range, in order; one may follow another."""
    # Where only mapping tells, what is told is still mapped when it is read.
    indexed = cache.backend.present(0, 1) is not None
    step = max(1, end - start) if indexed else _WINDOW
    if not indexed and cache.memory_end is not None:
        end = min(end, cache.memory_end)  # what the other guest has behind it need not be tried
    with refusals():
        for window in range(start, end, step):
            for address, length in cache.present(window, min(step, end - window)):
                yield address, address + length


def joined(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Put ranges together that follow one another."""
    first = last = 0
    for start, end in ranges:
        if start != last:
            if last > first:
                yield first, last
            first = start
        last = end
    if last > first:
        yield first, last


def views(cache: MapCache, start: int, end: int) -> Iterator[tuple[int, memoryview]]:
    """Yield the memory of a range, bucket by bucket, without pages that have gone meanwhile."""
    while start < end:
        try:
            for view in cache.views(start, end - start):
                yield start, view
                start += len(view)
                del view
        except FaultError as fault:
            start = (fault.address | PAGE_MASK) + 1
