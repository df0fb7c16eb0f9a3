"""The whole command line, for argparse, the man page and completion in shells."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module
from typing import Any, Final

from .. import __version__
from .arguments import Parser

COMMANDS: Final = {
    "info": "show what a source is, and which memory it has",
    "read": "read memory: a hexdump on a terminal, the bytes into a pipe or file",
    "translate": "translate virtual addresses by the guest's page tables",
    "find": "search for text, bytes, a regular expression or YARA's rules",
    "strings": "list printable text and its addresses",
    "dump": "copy memory to a file",
    "diff": "compare two sources",
    "mount": "show memory as files, for crash, gdb and MemProcFS",
    "disk": "serve a file as a guest's disk, without QEMU",
    "drgn": "debug a guest's kernel with drgn",
    "volatility": "run a plug-in of Volatility 3",
    "qemu-log": "show what QEMU's log says about DMA, INVALIDATE and ioreqs",
    "events": "print what a recorder has written",
    "timeline": "draw what a recorder has written",
    "holders": "show which processes hold guests' memory",
    "ps": "show which processes use this package, and what they hold",
    "leases": "show which leases processes hold: whose, since when, and whether stale",
    "top": "watch what a process holds, live",
    "demo": "show what ballooning does to DMA, without Xen",
    "doctor": "check libraries, devices, Xen and a live guest",
}
"""Each command's line in ``--help``, in that order.

Its module, which has its name, has ``prepare_parser(parser)`` and ``run(options)``.
"""

_DESCRIPTION = "Work with a Xen guest's memory, live or saved."
_EPILOG = """examples:
  xenmapcache info xen:web                  which memory a live guest has
  xenmapcache find guest.core 'Linux version'
  xenmapcache read guest.core 0x1000 --length 64
  xenmapcache dump xen:web -o web.core --format coredump
  xenmapcache doctor --domid 3              what works here, and how to fix the rest
  xenmapcache disk --help                   a command's arguments and examples

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


class CommandParser(Parser):
    """A command's parser. It imports the command's module when it has something to parse.

    All modules together take as long as the rest of a start, and a process runs one command.
    """

    _prepared = False

    def parse_known_args(  # type: ignore[override] # of argparse's overloads, the one that is used
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse a command line, with the arguments that the module has."""
        self.prepare()
        return super().parse_known_args(args, namespace)

    def prepare(self) -> None:
        """Let the module add its arguments; the second time does nothing."""
        if not self._prepared:
            module_of(self.get_default("command")).prepare_parser(self)
            self._prepared = True


def module_of(command: str) -> Any:  # noqa: ANN401 - a module with two functions of known names
    """Return the module of a command."""
    return import_module(f".{command.replace('-', '_')}", __package__)


def make_parser(*, whole: bool = True) -> argparse.ArgumentParser:
    """Return the parser of the whole command line.

    Args:
        whole: with the arguments of all commands, as the man page and completion need it.
            Otherwise a command gets them when it is parsed.
    """
    parser = Parser(
        prog="xenmapcache",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=CommandParser
    )
    for name, summary in COMMANDS.items():
        command = commands.add_parser(
            name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.set_defaults(command=name)
        if whole:
            command.prepare()
    return parser
