"""``xenmapcache dump``: a guest's memory in a file."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from ..address import PAGE_SHIFT, check_range
from ..backend import Backend
from ..backends.image import ImageBackend
from ..cache import MapCache
from ..errors import XenMapCacheError
from ..files.atomic import new_file
from ..source import LIVE
from .arguments import FILES, CommandError, add_range, add_source, check_output, describe
from .ending import Ending
from .output import Report, print_json, print_line, progress, size
from .sources import address_range, open_cache, opening, present, usage_errors, views

_WRITERS = {"coredump": "write_coredump", "lime": "write_lime", "vmcore": "write_vmcore"}
"""The formats besides raw: the module of ``writers``, and its function."""


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Give the command's parser its help and its arguments."""
    describe(
        parser,
        "Copy memory to a file. The file appears when the copy is complete. Only its owner can\n"
        "read it. Formats:\n"
        "  raw       an address is an offset from --start; holes take no room and read as zeros\n"
        "  vmcore    an ELF core for drgn, crash, makedumpfile, gdb and Volatility\n"
        "  lime      for Volatility and other forensic tools\n"
        "  coredump  as xl dump-core writes it\n"
        "All but raw keep holes apart from zeros. A guest that runs changes its memory during the\n"
        "copy: --pause gives a consistent dump. If the command is killed by SIGKILL, the guest\n"
        "stays paused until you run xl unpause.",
        "  xenmapcache dump xen:web -o web.vmcore --format vmcore --pause\n"
        "  xenmapcache dump guest.save -o guest.raw\n"
        "  xenmapcache dump guest.core -o low.raw --length 1MiB\n"
        "exit status: 0, 2 for an error, 130 when interrupted",
    )
    add_source(parser)
    output = parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="FILE",
        help="output file; another file of that name is replaced",
    )
    output.complete = FILES  # type: ignore[attr-defined] # shtab's way
    parser.add_argument(
        "--format", choices=["raw", *_WRITERS], default="raw", help="(default: %(default)s)"
    )
    parser.add_argument("--pause", action="store_true", help="pause a live guest during the copy")
    add_range(parser)


def run(options: argparse.Namespace) -> int:
    """Write the file. Returns the exit status."""
    path: str = options.output
    if path == "-":
        raise CommandError("a dump cannot go to stdout; for a file of the name -, write ./-")
    if Path(path).exists() and not Path(path).is_file():
        raise CommandError(f"{path} is not a regular file; write to a file, and copy that one")
    if options.format != "raw" and options.start:
        raise CommandError(
            f"a {options.format} file begins at address 0; use --format raw with --start"
        )
    with open_cache(options.source, **opening(options)) as cache, Ending() as ending:
        if isinstance(cache.backend, ImageBackend):
            check_output(path, cache.backend.path)
        live = cache.backend.name in (*LIVE, "mock")
        if options.pause and not live:
            raise CommandError(f"{options.source} is not a live guest; leave out --pause")
        start, end = address_range(options.start, options.length, cache)
        began = time.monotonic()
        with progress(f"dumping {options.source}") as report:

            def checked(done: int, total: int) -> None:
                ending.check()
                report(done, total)

            def write() -> int:
                return _write(options.format, cache, start, end, path, checked)

            if options.pause:
                backend = cache.backend
                pages = ending.run_between(backend.pause, write, lambda: _unpause(backend))
            else:
                pages = write()
        seconds = time.monotonic() - began
    _report(options, pages, seconds, live=live)
    return 0


def _write(form: str, cache: MapCache, start: int, end: int, path: str, report: Report) -> int:
    """Write the file; return the number of pages."""
    if form == "raw":
        return _write_raw(cache, start, end, path, report)
    module = import_module(f"..writers.{form}", __package__)
    write: Callable[..., int] = getattr(module, _WRITERS[form])
    with usage_errors():
        return write(cache, path, length=end, progress=report)


def _unpause(backend: Backend) -> None:
    try:
        backend.unpause()
    except XenMapCacheError as error:
        domid = getattr(backend, "domid", "")
        raise CommandError(f"the guest is still paused: {error}; run xl unpause {domid}") from error


def _report(options: argparse.Namespace, pages: int, seconds: float, *, live: bool) -> None:
    """Print what was written, on a terminal or as JSON."""
    path: str = options.output
    if options.json:
        facts = {"file": path, "format": options.format, "pages": pages, "seconds": seconds}
        print_json(facts | ({"paused": options.pause} if live else {}))
    elif sys.stdout.isatty():
        total = pages << PAGE_SHIFT
        rate = size(int(total / max(seconds, 1e-6)))
        print_line(f"{path}: {pages} pages, {size(total)} in {seconds:.1f} s, {rate}/s")
        if live and not options.pause:
            print_line(
                f"the guest ran during these {seconds:.1f} s, so pages are of different moments; "
                "--pause gives a consistent dump"
            )


def _write_raw(cache: MapCache, start: int, end: int, path: str, report: Report) -> int:
    """Write a sparse file in which an address is an offset; return the number of pages."""
    written = 0
    with usage_errors():
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
