"""``xenmapcache find``: text, bytes, a regular expression or YARA's rules in a guest's memory."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from ..address import ADDRESS_LIMIT
from ..cache import MapCache
from ..escape import printable
from ..extras import require
from ..guest import GuestMemory
from .arguments import CommandError, add_range, add_source, describe, positive, size
from .hexdump import Hexdump
from .output import place, print_json_line, print_line, print_lines
from .sources import address_range, open_cache, opening, usage_errors

if TYPE_CHECKING:
    from ..guest.yara import YaraMatch

_Found = tuple[int, bytes, dict[str, object]]
"""Where it is, what was found, and which of YARA's rules found it; empty without rules."""
_Search = Callable[[GuestMemory, int, int], Iterator[_Found]]

_LINE = 16
_MAX_MATCH = 4096


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Give the command's parser its help and its arguments."""
    describe(
        parser,
        "Search memory. Holes are skipped. Each match is a line: its address, and what was\n"
        "found. A regular expression follows Python's re, over bytes; matches longer than\n"
        "4 KiB may be reported only in part. YARA judges its rules for each MiB on its own.",
        "  xenmapcache find guest.core 'Linux version'\n"
        "  xenmapcache find guest.core --hex 'de ad be ef' --context 32\n"
        "  xenmapcache find guest.core --hex '0f 01 ?? c3' --count\n"
        "  xenmapcache find guest.core --regex 'root:[^:]*:0:0:' --max-count 1\n"
        "  xenmapcache find guest.core password --ignore-case --encoding utf-16le --count\n"
        "  xenmapcache find xen:web --yara rules.yar\n"
        "exit status: 0 if something was found, 1 if not, 2 for an error",
        json="print a JSON object for each match, one a line",
    )
    add_source(parser)
    parser.add_argument("pattern", metavar="PATTERN", help="text, unless an option says otherwise")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--hex", action="store_true", help="PATTERN is bytes in hex; ?? is any byte")
    kind.add_argument("--regex", action="store_true", help="PATTERN is a regular expression")
    kind.add_argument("--yara", action="store_true", help="PATTERN is a file of YARA's rules")
    kind.add_argument(
        "--encoding",
        choices=["utf-8", "utf-16le"],
        default="utf-8",
        help="of the text in the guest (default: %(default)s)",
    )
    parser.add_argument(
        "-i", "--ignore-case", action="store_true", help="ignore the case of ASCII letters"
    )
    add_range(parser)
    parser.add_argument(
        "-m", "--max-count", type=positive, metavar="N", help="stop after N matches"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--context", type=size, metavar="SIZE", help="a hexdump with SIZE bytes on each side"
    )
    what.add_argument("-c", "--count", action="store_true", help="print only the number of matches")


def run(options: argparse.Namespace) -> int:
    """Print what is found. Returns 0, or 1 if nothing was found."""
    search = _search(options)
    with open_cache(options.source, **opening(options)) as cache:
        start, end = address_range(options.start, options.length, cache)
        with usage_errors():
            found = search(GuestMemory(cache), start, end - start)
        count = 0
        limit = options.max_count and min(options.max_count, sys.maxsize)
        for address, match, rule in islice(found, limit):
            count += 1
            if options.count:
                continue
            if options.json:
                print_json_line(_facts(cache, address, match, options) | rule)
            elif options.context is not None:
                if count > 1:
                    print_line("--")
                _print_context(cache, address, len(match), options.context)
            else:
                name = f"{rule['rule']} {rule['string']}  " if rule else ""
                print_line(f"{address:#010x}  {name}{_shown(match, options)}")
    if options.count:
        if options.json:
            print_json_line({"count": count})
        else:
            print_line(str(count))
    return 0 if count else 1


def _search(options: argparse.Namespace) -> _Search:
    """Return the search that the options describe."""
    if options.yara:
        return _yara_search(options)
    pattern = _pattern(options)
    longest = max(_MAX_MATCH, len(options.pattern))

    def search(memory: GuestMemory, start: int, length: int) -> Iterator[_Found]:
        found = memory.find(pattern, start, length, max_match=longest)
        return ((address, match, {}) for address, match in found)

    return search


def _yara_search(options: argparse.Namespace) -> _Search:
    yara: Any = require("yara", "yara-python", "yara")
    path: str = options.pattern
    if options.ignore_case:
        raise CommandError("--ignore-case: write nocase after the strings of the rules")
    with open(path, "rb"):  # noqa: PTH123 - so that the error names it as the user does
        pass
    try:
        rules = yara.compile(filepath=path)
    except (yara.Error, UnicodeError) as error:
        raise CommandError(f"{path}: YARA cannot compile the rules: {error}") from error

    def search(memory: GuestMemory, start: int, length: int) -> Iterator[_Found]:
        return described(memory.find_yara(rules, start, length, max_match=_MAX_MATCH))

    def described(found: Iterator[YaraMatch]) -> Iterator[_Found]:
        try:
            for each in found:
                rule: dict[str, object] = {
                    "rule": each.rule,
                    "string": each.string,
                    "tags": list(each.tags),
                }
                yield each.address, each.data, rule
        except yara.Error as error:
            raise CommandError(f"{path}: YARA failed: {error}") from error

    return search


def _pattern(options: argparse.Namespace) -> bytes | re.Pattern[bytes]:
    text: str = options.pattern
    flags = re.IGNORECASE if options.ignore_case else re.NOFLAG
    if options.regex:
        try:
            return re.compile(text.encode("utf-8", "surrogateescape"), flags)
        except (re.error, OverflowError, RecursionError) as error:
            raise CommandError(f"{text!r} is not a regular expression: {error}") from None
    if options.hex and "?" in text:
        return _wildcards(text, options)
    pattern = _literal(text, options)
    if not pattern:
        raise CommandError("the pattern is empty, so it would match at every address")
    return re.compile(re.escape(pattern), flags) if options.ignore_case else pattern


def _wildcards(text: str, options: argparse.Namespace) -> re.Pattern[bytes]:
    """Return an expression for bytes in hex, some of which may be anything."""
    parts = _hex_parts(text).split("??")
    values = [_hex_bytes(part, text, options) for part in parts]
    if not any(values):
        raise CommandError(f"{text!r} has no byte to look for, so it would match at every address")
    expression = b".".join(b"".join(b"\\x%02x" % byte for byte in value) for value in values)
    return re.compile(expression, re.DOTALL)


def _hex_parts(text: str) -> str:
    return text.removeprefix("0x").replace(":", " ")


def _hex_bytes(part: str, text: str, options: argparse.Namespace) -> bytes:
    if options.ignore_case:
        raise CommandError("--ignore-case: bytes in hex have no case; search for text")
    try:
        return bytes.fromhex(part)
    except ValueError:
        raise CommandError(
            f"{text!r} is not bytes in hex; write --hex 'de ad', or 'de ?? ad' for any byte"
        ) from None


def _literal(text: str, options: argparse.Namespace) -> bytes:
    if options.hex:
        return _hex_bytes(_hex_parts(text), text, options)
    if options.encoding == "utf-8":
        return text.encode("utf-8", "surrogateescape")
    try:
        return text.encode(options.encoding)
    except UnicodeEncodeError:
        raise CommandError(f"{text!r} is not text; search for bytes with --hex") from None


def _shown(match: bytes, options: argparse.Namespace) -> str:
    if options.hex:
        return match.hex(" ")
    return printable(match.decode(options.encoding, "backslashreplace"))


def _facts(
    cache: MapCache, address: int, match: bytes, options: argparse.Namespace
) -> dict[str, object]:
    facts: dict[str, object] = {
        **place(address),
        "length": len(match),
        "text": match.decode(options.encoding, "backslashreplace"),
        "hex": match.hex(),
    }
    if options.context is not None:
        end = address + len(match)
        low, high = address - options.context, end + options.context
        first, data = _around(cache, address, low, high)
        facts["before"] = data[: address - first].hex()
        facts["after"] = data[end - first :].hex()
    return facts


def _around(cache: MapCache, address: int, low: int, high: int) -> tuple[int, bytes]:
    """Return the memory around an address, between two others, up to the next holes."""
    low, high = max(0, low), min(high, ADDRESS_LIMIT)
    for start, length in cache.present(low, high - low):
        if start <= address < start + length:
            return start, cache.read(start, length)
    return address, b""


def _print_context(cache: MapCache, address: int, length: int, context: int) -> None:
    low, high = address - context, address + length + context
    first, data = _around(cache, address, low - low % _LINE, high + -high % _LINE)
    dump = Hexdump(first, squeeze=False)
    print_lines([*chain.from_iterable(dump.blocks(data)), *dump.end()][:-1])
