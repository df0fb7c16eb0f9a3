"""The command line: what there is to say, for argparse, the man page and shells to read."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from .. import __version__
from ..address import parse_size

ERROR = 2

_Commands = Any
"""What ``add_subparsers`` returns; argparse has no public name for it."""
_FILES = {"bash": "_shtab_compgen_files", "zsh": "_files", "tcsh": "f"}
"""What shtab takes for an argument that is a file."""
_SOURCES = """sources:
  xen:DOMID, xen:NAME      a live guest, in Dom0 (xenctrl:... through the older library)
  mock:SIZE                a mock guest of zeros
  core:FILE                xl dump-core
  elf:FILE                 another ELF core: kdump, QEMU's dump-guest-memory
  raw:FILE                 memory as it is, or LiME
  save:FILE                xl save
  FILE                     one of these; the format is recognised, but for flat images"""


class CommandError(Exception):
    """What a user did wrong; the message says what to do."""


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line, as all others of the command."""

    def error(self, message: str) -> NoReturn:
        """Complain of wrong usage, and end with status 2."""
        line = " ".join(message.split("\n"))
        self.exit(ERROR, f"xenmapcache: error: {line} (see {self.prog} --help)\n")


def _domid(text: str) -> int:
    from ..backends.domain import check_domid

    try:
        return check_domid(int(text, 0))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def _byte(text: str) -> bytes:
    try:
        byte = bytes.fromhex(text)
    except ValueError:
        byte = b""
    if len(byte) != 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a byte in hex, as 00 or ff")
    return byte


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = Parser(
        prog="xenmapcache",
        description="Work with a Xen guest's memory, live or saved.",
        epilog="examples:\n"
        "  xenmapcache info xen:web                  what memory a live guest has\n"
        "  xenmapcache find guest.core 'Linux version'\n"
        "  xenmapcache read guest.core 0x1000 64\n"
        "  xenmapcache dump xen:web -o web.core --format coredump\n"
        "  xenmapcache doctor --domid 3              what works here, and what to do about "
        "the rest\n\n"
        f"{_SOURCES}\n\n"
        "exit status: 0 if all is well, 1 if nothing was found or something differs, 2 for an "
        "error",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (_info, _read, _find, _strings, _dump, _diff, _demo, _doctor):
        add(commands)
    return parser


def _command(
    commands: _Commands,
    name: str,
    run: str,
    summary: str,
    description: str,
    examples: str,
    *,
    tables: bool = False,
    json: str = "print one JSON object",
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help=json)
    parser.set_defaults(run=run, tables=tables)
    return parser


def _add_source(parser: argparse.ArgumentParser, name: str = "source") -> None:
    action = parser.add_argument(
        name, metavar=name.upper(), help="xen:NAME, core:FILE or a file; see xenmapcache --help"
    )
    action.complete = _FILES  # type: ignore[attr-defined] # shtab's way


def _add_range(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--start", type=_size, default=0, metavar="ADDRESS", help="where to begin (default: 0)"
    )
    parser.add_argument(
        "--length", type=_size, metavar="SIZE", help="how far to go (default: to the end)"
    )


def _info(commands: _Commands) -> None:
    parser = _command(
        commands,
        "info",
        "info:run",
        "what a source is, and which memory it has",
        "Tell what a source is, which ranges of memory it has, and what else it says of itself.",
        "  xenmapcache info guest.core\n"
        "  xenmapcache info --json xen:web | jq .ranges\n"
        "exit status: 0, 2 for an error",
        tables=True,
    )
    _add_source(parser)
    _add_range(parser)
    parser.add_argument("--all", action="store_true", help="all ranges, however many they are")


def _read(commands: _Commands) -> None:
    parser = _command(
        commands,
        "read",
        "read:run",
        "read memory: a hexdump on a terminal, the bytes into a pipe or file",
        "Read memory. On a terminal it is shown as hexdump -C does; a pipe or a file gets the\n"
        "bytes as they are. A page that is not there is an error, unless --fill says what to\n"
        "put in its place.",
        "  xenmapcache read guest.core 0x1000 64\n"
        "  xenmapcache read guest.core 1MiB 4k > page\n"
        "  xenmapcache read guest.core 0x9f000 8k --fill 00 --hexdump | less\n"
        "exit status: 0, 2 for an error or a page that is not there",
    )
    _add_source(parser)
    parser.add_argument("address", metavar="ADDRESS", type=_size, help="such as 0x1000 or 4k")
    parser.add_argument(
        "length", metavar="LENGTH", type=_size, nargs="?", default=256, help="(default: 256)"
    )
    parser.add_argument("--fill", type=_byte, metavar="XX", help="read this where no page is")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--raw", action="store_true", help="the bytes, on a terminal too")
    form.add_argument("--hexdump", action="store_true", help="a hexdump, into a pipe or file too")
    parser.add_argument(
        "--no-squeeze", action="store_true", help="show lines that repeat, instead of a *"
    )


def _find(commands: _Commands) -> None:
    parser = _command(
        commands,
        "find",
        "search:find",
        "search for text, bytes or a regular expression",
        "Search memory, passing over holes. Each match is a line: its address, and what was\n"
        "found. A regular expression is one of Python's re, over bytes; what is longer than\n"
        "4 KiB is found whole only by luck.",
        "  xenmapcache find guest.core 'Linux version'\n"
        "  xenmapcache find guest.core --hex 'de ad be ef' --context 32\n"
        "  xenmapcache find guest.core --regex 'root:[^:]*:0:0:' --max 1\n"
        "  xenmapcache find guest.core Password --encoding utf-16le --count\n"
        "exit status: 0 if it was found, 1 if not, 2 for an error",
        json="print a JSON object for each match, one a line",
    )
    _add_source(parser)
    parser.add_argument("pattern", metavar="PATTERN", help="text, unless an option says otherwise")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--hex", action="store_true", help="PATTERN is bytes in hex")
    kind.add_argument("--regex", action="store_true", help="PATTERN is a regular expression")
    kind.add_argument(
        "--encoding",
        choices=["utf-8", "utf-16le"],
        default="utf-8",
        help="of the text in the guest (default: %(default)s)",
    )
    _add_range(parser)
    parser.add_argument("--max", type=_positive, metavar="N", help="stop after so many matches")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--context", type=_size, metavar="SIZE", help="a hexdump with so many bytes around it"
    )
    what.add_argument("--count", action="store_true", help="only how many there are")


def _strings(commands: _Commands) -> None:
    parser = _command(
        commands,
        "strings",
        "search:strings",
        "printable text and where it lies",
        "Print runs of printable ASCII, each with its address.",
        "  xenmapcache strings guest.core | less\n"
        "  xenmapcache strings guest.core --min 8 --encoding utf-16le\n"
        "exit status: 0 if there are any, 1 if not, 2 for an error",
        json="print a JSON object for each, one a line",
    )
    _add_source(parser)
    parser.add_argument(
        "--min",
        type=_positive,
        default=4,
        metavar="N",
        help="characters, at least (default: %(default)s)",
    )
    parser.add_argument(
        "--encoding",
        choices=["ascii", "utf-16le"],
        default="ascii",
        help="one byte a character, or two (default: %(default)s)",
    )
    _add_range(parser)


def _dump(commands: _Commands) -> None:
    parser = _command(
        commands,
        "dump",
        "dump:run",
        "copy memory to a file",
        "Copy memory to a file, which is there when it is complete and not before, and is its\n"
        "owner's alone. In a raw file an address is an offset from --start, and holes take no\n"
        "room, but read as zeros; a coredump, as xl dump-core writes it, tells them apart.\n"
        "A guest that runs meanwhile changes: xl pause it for a dump that is consistent.",
        "  xenmapcache dump xen:web -o web.core --format coredump\n"
        "  xenmapcache dump guest.save -o guest.raw\n"
        "  xenmapcache dump guest.core -o low.raw --length 1MiB\n"
        "exit status: 0, 2 for an error, 130 when interrupted",
    )
    _add_source(parser)
    output = parser.add_argument(
        "-o", "--output", required=True, metavar="FILE", help="the file; one that is there is lost"
    )
    output.complete = _FILES  # type: ignore[attr-defined] # shtab's way
    parser.add_argument(
        "--format", choices=["raw", "coredump"], default="raw", help="(default: %(default)s)"
    )
    _add_range(parser)


def _diff(commands: _Commands) -> None:
    parser = _command(
        commands,
        "diff",
        "diff:run",
        "compare two sources",
        "Compare the memory of two sources, page by page, and print the ranges that differ or\n"
        "that only one of them has.",
        "  xenmapcache diff before.core after.core\n"
        "  xenmapcache diff before.core xen:web --bytes --start 0x1000 --length 4k\n"
        "  xenmapcache diff --quiet a.core b.core && echo equal\n"
        "exit status: 0 if they are equal, 1 if they differ, 2 for an error",
    )
    _add_source(parser, "first")
    _add_source(parser, "second")
    parser.add_argument("--bytes", action="store_true", help="the bytes that differ, in hex")
    parser.add_argument("--quiet", action="store_true", help="print nothing, only the status")
    _add_range(parser)


def _demo(commands: _Commands) -> None:
    _command(
        commands,
        "demo",
        "demo:run",
        "show what ballooning does to DMA, without Xen",
        "Play the story this package is about on a mock guest: a guest balloons\n"
        "while DMA is under way. Needs neither Xen nor root.",
        "  xenmapcache demo\n  xenmapcache demo --json | jq .outcomes.warn\nexit status: 0",
        tables=True,
    )


def _doctor(commands: _Commands) -> None:
    parser = _command(
        commands,
        "doctor",
        "doctor:run",
        "check libraries, devices, Xen and a live guest",
        "Check what mapping a live guest needs, and map one page of one.",
        "  xenmapcache doctor\n"
        "  xenmapcache doctor --domid $(xl domid NAME)\n"
        "  xenmapcache doctor --json | jq '.findings[] | select(.state == \"problem\")'\n"
        "exit status: 0 if a live guest was mapped, else 1",
        tables=True,
    )
    parser.add_argument(
        "--domid", type=_domid, metavar="N", help="map this guest (default: the first in xl list)"
    )
