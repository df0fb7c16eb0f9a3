"""``xenmapcache mount``: a guest's memory as files, for all other tools."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .arguments import add_source, describe
from .arguments import size as parse_size
from .output import print_json, print_line, size
from .sources import open_cache, opening, usage_errors

_MAX_RESIDENT = "1GiB"


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Give the command's parser its help and its arguments."""
    describe(
        parser,
        "Mount a folder with files that are a guest's memory, live or saved. Nothing is copied\n"
        "before it is read, and nothing can be written:\n"
        "  memory.raw    an address is an offset; holes read as zeros\n"
        "  memory.elf    an ELF core, as dump --format vmcore writes it\n"
        "  memory.lime   as dump --format lime writes it\n"
        "The command looks for present pages once, at the beginning. A page that a live guest\n"
        "gives up later cannot be read (EIO) in memory.elf and memory.lime; it is zeros in\n"
        "memory.raw.\n"
        "The command ends, and unmounts the folder, on Ctrl-C, SIGTERM, fusermount3 -u, and when\n"
        "a live guest ends. Only this user's processes can read the files.",
        "  mkdir /run/web && xenmapcache mount xen:web /run/web\n"
        "  crash vmlinux /run/web/memory.elf\n"
        "exit status: 0 when it is unmounted, 2 for an error",
    )
    add_source(parser)
    folder = parser.add_argument("folder", metavar="FOLDER", help="an empty folder")
    folder.complete = {"bash": "_shtab_compgen_dirs", "zsh": "_files -/", "tcsh": "d"}  # type: ignore[attr-defined] # shtab's way
    parser.add_argument(
        "--foreground",
        action="store_true",
        help="accepted for scripts; the command always stays in the foreground",
    )
    parser.add_argument(
        "--length",
        type=parse_size,
        metavar="SIZE",
        help="how far to go from address 0 (default: to the end of memory)",
    )


def run(options: argparse.Namespace) -> int:
    """Mount the folder until it is unmounted. Returns the exit status."""
    from ..adapters.mount import check_fuse, serve
    from ..adapters.virtual_files import VirtualFile, virtual_files

    folder = Path(options.folder)
    check_fuse(folder)  # before the source is looked through

    def show(files: list[VirtualFile]) -> None:
        if options.json:
            listed = [{"file": str(folder / file.name), "size": file.size} for file in files]
            print_json({"folder": str(folder), "files": listed})
        else:
            for file in files:
                print_line(f"{folder / file.name}: {size(file.size)}")
        sys.stdout.flush()

    with open_cache(options.source, max_resident=_MAX_RESIDENT, **opening(options)) as cache:
        with usage_errors():
            files = virtual_files(cache, options.length)
        serve(cache, files, folder, mounted=lambda: show(files))
    return 0
