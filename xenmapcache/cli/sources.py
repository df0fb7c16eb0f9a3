"""What commands share: a cache over an open source, and the memory that the source has."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterable, Iterator

from ..address import PAGE_MASK, PAGE_SHIFT, MiB, page_span, parse_size
from ..backend import open_backend
from ..cache import MapCache
from ..errors import FaultError
from ..source import FILES, parse_source
from .arguments import CommandError
from .output import progress

MAX_RESIDENT = 64 * MiB
_WINDOW_BYTES = 16 * MiB
_SURVEYED_BYTES = 4 * MiB
"""A range up to that is mapped, which also shows what a survey skips."""
_COPY_BYTES = MiB
_WITH_ZEROS = ("elfcore", "kdump")


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Turn ValueErrors of the library into usage errors."""
    try:
        yield
    except (ValueError, OverflowError) as error:
        raise CommandError(str(error)) from error


@contextlib.contextmanager
def open_cache(
    spec: str,
    bucket_shift: int = 20,
    *,
    salvage: bool = False,
    zeros: bool = False,
    max_resident: int | str = MAX_RESIDENT,
) -> Iterator[MapCache]:
    """Open a source, with a progress bar if that takes long, and a cache over it.

    Args:
        spec: as for :func:`.open_source`.
        bucket_shift: of the cache.
        salvage: open the intact part of a file. It changes nothing of a live guest.
        zeros: the option of ELF cores and KDUMP. It changes nothing of other sources.
        max_resident: of the cache, if the source has room for it.
    """
    with contextlib.ExitStack() as stack:
        with usage_errors():
            name, options = parse_source(spec)
            if salvage and name in FILES:
                options["salvage"] = True
            if zeros and name in _WITH_ZEROS:
                options["zeros"] = True
            if name == "save":
                options["progress"] = stack.enter_context(progress(f"reading {spec}"))
            backend = open_backend(name, **options)
        stack.close()
        stack.enter_context(backend)
        limit = min(parse_size(max_resident), backend.mapping_room)
        cache = MapCache(backend, max_resident=limit, bucket_shift=bucket_shift)
        yield stack.enter_context(cache)


def opening(options: argparse.Namespace) -> dict[str, bool]:
    """Return the user's options of opening sources, for :func:`open_cache`."""
    return {"salvage": options.salvage, "zeros": options.zeros}


def address_range(start: int, length: int | None, *caches: MapCache) -> tuple[int, int]:
    """Return ``(start, end)``; the default end is the end of the largest source's memory."""
    if length is not None:
        return start, start + length
    end = 0
    for cache in caches:
        if cache.memory_end is None:
            raise CommandError(
                "this source does not know where its memory ends; give --length, such as 4GiB"
            )
        end = max(end, cache.memory_end)
    return start, max(start, end)


def present(cache: MapCache, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield ``(start, end)`` of present pages in a range, in order; one may touch the next."""
    indexed = cache.backend.present(0, 1) is not None
    if not indexed and cache.memory_end is not None:
        end = min(end, cache.memory_end)  # beyond it, where another guest has memory, is nothing
    with usage_errors():
        if not indexed and end - start > _SURVEYED_BYTES:
            span = page_span(start, end - start)
            known = cache.backend.survey(*span)
            if known is not None:
                yield from _addresses(known, start, end)
                return
            parts = _addresses(cache.backend.extents(*span), start, end)
        else:
            parts = iter([(start, end)])
        for first, last in parts:
            # If only mapping shows which pages are present, what was shown is still mapped when it
            # is read.
            step = max(1, last - first) if indexed else _WINDOW_BYTES
            for window in range(first, last, step):
                for address, length in cache.present(window, min(step, last - window)):
                    yield address, address + length


def _addresses(runs: Iterable[tuple[int, int]], start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield the addresses of runs of pages, cut to a range."""
    for gfn, pages in runs:
        yield max(start, gfn << PAGE_SHIFT), min(end, gfn + pages << PAGE_SHIFT)


def merge_adjacent(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Merge ranges that touch."""
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
    """Yield the memory of a range in parts, without pages that vanish on the way.

    Drop each part before you ask for the next: that may be in the same buffer.
    """
    buffer = memoryview(bytearray(min(_COPY_BYTES, max(0, end - start))))
    while start < end:
        edge = min((start | _COPY_BYTES - 1) + 1, end)
        copy = buffer[: edge - start]
        whole = not (start | edge) & PAGE_MASK
        if whole and cache.backend.read_pages(start >> PAGE_SHIFT, copy):
            yield start, copy
        else:
            yield from _mapped_views(cache, start, edge)
        start = edge


def _mapped_views(cache: MapCache, start: int, end: int) -> Iterator[tuple[int, memoryview]]:
    while start < end:
        try:
            for view in cache.views(start, end - start):
                yield start, view
                start += len(view)
                del view
        except FaultError as fault:
            start = (fault.address | PAGE_MASK) + 1
