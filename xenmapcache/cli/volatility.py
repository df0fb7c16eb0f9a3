"""``xenmapcache volatility``: Volatility 3 on a guest's memory."""

from __future__ import annotations

import argparse
import sys

from ..extras import require
from .arguments import add_source, describe
from .sources import open_cache, opening, usage_errors

_MAX_RESIDENT = "32GiB"


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Give the command's parser its help and its arguments."""
    describe(
        parser,
        "Run Volatility 3 on a guest, live or saved. Holes stay holes: reads of them fail, and\n"
        "scans skip them and nothing else. Options of this command come before the source; all\n"
        "arguments after it are Volatility's.",
        "  xenmapcache volatility guest.core banners.Banners\n"
        "  xenmapcache volatility xen:web -q -s symbols linux.pslist.PsList\n"
        "exit status: Volatility's; 2 for an error",
        json=None,
    )
    add_source(parser)
    parser.add_argument(
        "arguments",
        metavar="ARGUMENT",
        nargs=argparse.REMAINDER,
        help="options and a plug-in, as for the command vol",
    )


def run(options: argparse.Namespace) -> int:
    """Run Volatility. Returns the exit status."""
    command = require("volatility3.cli", "volatility3", "volatility")
    from ..adapters.volatility import register

    with open_cache(options.source, max_resident=_MAX_RESIDENT, **opening(options)) as cache:
        with usage_errors():
            location = register(cache, options.source, **opening(options))
        command.CommandLine.CLI_NAME = "xenmapcache volatility SOURCE"
        sys.argv[:] = ["volatility", "--single-location", location, *options.arguments]
        command.main()
    return 0
