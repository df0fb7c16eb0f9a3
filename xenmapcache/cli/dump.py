"""``xenmapcache dump``: a guest's memory in a file."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from ..address import PAGE_SHIFT, check_range
from ..atomicfile import new_file
from ..cache import MapCache
from .output import Report, print_json, progress, size
from .parser import CommandError
from .session import extent, opened, present, refusals, views


def run(options: argparse.Namespace) -> int:
    """Write the file. Returns the exit status."""
    path: str = options.output
    if Path(path).exists() and not Path(path).is_file():
        raise CommandError(f"{path} is no regular file: write to a file, and copy it from there")
    if options.format == "coredump" and options.start:
        raise CommandError("a coredump begins at address 0: use --format raw with --start")
    with opened(options.source) as cache, _terminated():
        start, end = extent(options.start, options.length, cache)
        began = time.monotonic()
        with progress(f"dumping {options.source}") as report:
            if options.format == "raw":
                pages = _write_raw(cache, start, end, path, report)
            else:
                from ..coredump_writer import write_coredump

                with refusals():
                    pages = write_coredump(cache, path, length=end, progress=report)
        seconds = time.monotonic() - began
    if options.json:
        facts = {"file": path, "format": options.format, "pages": pages, "seconds": seconds}
        print_json(facts)
    elif sys.stdout.isatty():
        total = pages << PAGE_SHIFT
        rate = size(int(total / max(seconds, 1e-6)))
        print(f"{path}: {pages} pages, {size(total)} in {seconds:.1f} s, {rate}/s")
    return 0


def _write_raw(cache: MapCache, start: int, end: int, path: str, report: Report) -> int:
    """Write a sparse file in which an address is an offset; return the number of pages."""
    written = 0
    with refusals():
        check_range(start, end - start, empty=True)
    with new_file(path) as fd:
        os.ftruncate(fd, end - start)
        for first, last in present(cache, start, end):
            for address, view in views(cache, first, last):
                done = 0
                while done < len(view):
                    done += os.pwrite(fd, view[done:], address - start + done)
                written += done
                report(address + done - start, end - start)
                del view
        report(end - start, end - start)
    return written + (1 << PAGE_SHIFT) - 1 >> PAGE_SHIFT


@contextlib.contextmanager
def _terminated() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the command as Ctrl-C does, so that it cleans up."""

    def stop(number: int, _: object) -> None:
        sys.exit(128 + number)

    before = {each: signal.signal(each, stop) for each in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
