"""The whole command line, for argparse, the man page and completion in shells."""

from __future__ import annotations

import argparse

from .. import __version__
from . import (
    demo,
    diff,
    doctor,
    drgn,
    dump,
    events,
    find,
    holders,
    info,
    leases,
    mount,
    ps,
    qemu_log,
    read,
    strings,
    timeline,
    top,
    translate,
    volatility,
)
from .arguments import Parser

COMMANDS = (
    info,
    read,
    translate,
    find,
    strings,
    dump,
    diff,
    mount,
    drgn,
    volatility,
    qemu_log,
    events,
    timeline,
    holders,
    ps,
    leases,
    top,
    demo,
    doctor,
)
"""In the order of ``--help``. Each module has ``prepare_parser(commands)`` and ``run(options)``."""

_DESCRIPTION = "Work with a Xen guest's memory, live or saved."
_EPILOG = """examples:
  xenmapcache info xen:web                  which memory a live guest has
  xenmapcache find guest.core 'Linux version'
  xenmapcache read guest.core 0x1000 --length 64
  xenmapcache dump xen:web -o web.core --format coredump
  xenmapcache doctor --domid 3              what works here, and how to fix the rest

sources:
  xen:DOMID, xen:NAME      a live guest, in Dom0
  xenctrl:DOMID            the same, through the older library
  mock:SIZE                a mock guest of zeros
  coredump:FILE            xl dump-core
  elfcore:FILE             another ELF core: kdump, QEMU's dump-guest-memory
  kdump:FILE               makedumpfile's compressed format (KDUMP), flattened too
  raw:FILE                 a flat image that begins at address 0, or LiME
  raw:FILE@ADDRESS         a flat image that begins elsewhere
  raw:FILE@ADDRESS+LENGTH,ADDRESS+LENGTH
                           a flat image of ranges, which lie in it one after the other
  save:FILE                xl save; virsh save of a Xen guest; XenServer's suspend image
  FILE                     one of these; every format but a flat image is recognised

exit status: 0 for success, 1 if nothing was found or something differs, 2 for an error"""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = Parser(
        prog="xenmapcache",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.prepare_parser(commands)
    return parser
