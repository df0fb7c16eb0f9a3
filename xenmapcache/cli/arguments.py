"""What the commands' arguments share: types, sources, ranges, and one way to describe a command."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..address import parse_size
from ..escape import printable_lines

ERROR = 2
_MAX_DIGITS = 9

FILES = {"bash": "_shtab_compgen_files", "zsh": "_files", "tcsh": "f"}
"""How shtab completes an argument that is a file."""


class CommandError(Exception):
    """A mistake of the user; the message says what to do."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as all other errors of the command are."""

    def error(self, message: str) -> NoReturn:
        """Report wrong usage, and end with status 2."""
        line = " ".join(message.split("\n"))
        self.exit(ERROR, f"xenmapcache: error: {line} (see {self.prog} --help)\n")

    def parse_args(  # type: ignore[override] # of argparse's overloads, the one that is used
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Parse a command line. Arguments that nobody knows are an error of the command's."""
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            options.usage_error(f"unrecognized arguments: {' '.join(unknown)}")
        return options

    def _print_message(self, message: str, file: Any = None) -> None:  # noqa: ANN401 - argparse's
        # Everything that argparse prints comes through here; arguments of the user are in it.
        super()._print_message(printable_lines(message), file)


def domid(text: str) -> int:
    """Return a domain number."""
    from ..backends.domain import check_domid

    try:
        value = int(text, 0)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be a domain's number; xl domid NAME prints it"
        ) from None
    try:
        return check_domid(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def size(text: str) -> int:
    """Return an address or a length, such as ``0x1000`` or ``4k``."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def positive(text: str) -> int:
    """Return a number of at least 1."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of at least 1")
    return int(text)


def number(text: str) -> int:
    """Return a number of at least 0."""
    if not text.isascii() or not text.isdecimal() or len(text) > _MAX_DIGITS:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of at least 0")
    return int(text)


def byte(text: str) -> bytes:
    """Return a byte that is written in hex."""
    try:
        value = bytes.fromhex(text)
    except ValueError:
        value = b""
    if len(value) != 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a byte in hex, such as 00 or ff")
    return value


def drawing(text: str) -> str:
    """Return the name of a page or of a drawing."""
    if not text.endswith((".html", ".svg")):
        raise argparse.ArgumentTypeError(f"{text!r} must end in .html or .svg")
    return text


def check_output(output: str, *inputs: str) -> None:
    """Refuse an output that is one of the files that are read, because it would replace that file.

    Raises:
        CommandError: it is one of them, also by another name.
    """
    for path in inputs:
        with contextlib.suppress(OSError):  # one of them does not exist
            if Path(output).samefile(path):
                raise CommandError(f"{output} is the file that is read; write to another file")


def describe(
    parser: argparse.ArgumentParser,
    description: str,
    examples: str,
    *,
    tables: bool = False,
    json: str | None = "print one JSON object",
) -> None:
    """Give a command's parser its help.

    Args:
        parser: the command's.
        description: a paragraph for its own ``--help``.
        examples: lines for its own ``--help``.
        tables: it prints tables, unless ``--json`` is given; they need rich.
        json: the help of ``--json``; None: the command prints what another program says.
    """
    parser.description = description
    parser.epilog = f"examples:\n{examples}"
    if json is not None:
        parser.add_argument("--json", action="store_true", help=json)
    parser.set_defaults(tables=tables, usage_error=parser.error)


def add_source(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add the arguments that name sources of guest memory, and the options of opening them."""
    for name in names or ("source",):
        action = parser.add_argument(
            name,
            metavar=name.upper(),
            help="xen:NAME, coredump:FILE or a file; see xenmapcache --help",
        )
        action.complete = FILES  # type: ignore[attr-defined] # shtab's way
    parser.add_argument(
        "--salvage",
        action="store_true",
        help="open the intact part of a truncated file; the missing part reads as holes",
    )
    parser.add_argument(
        "--zeros",
        action="store_true",
        help="read memory that an ELF core or KDUMP leaves out as zeros, not as holes "
        "(makedumpfile leaves out pages of zeros)",
    )


def add_range(parser: argparse.ArgumentParser) -> None:
    """Add the options that select a range of addresses."""
    parser.add_argument(
        "--start", type=size, default=0, metavar="ADDRESS", help="first address (default: 0)"
    )
    parser.add_argument(
        "--length",
        type=size,
        metavar="SIZE",
        help="length of the range (default: to the end of memory)",
    )
