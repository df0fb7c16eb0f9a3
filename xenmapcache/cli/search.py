"""``xenmapcache find`` and ``xenmapcache strings``."""

from __future__ import annotations

import argparse
import json
import re
import sys
from itertools import islice

from ..address import ADDRESS_LIMIT
from ..cache import MapCache
from ..guest import GuestMemory
from .hexdump import Hexdump
from .output import printable
from .parser import CommandError
from .session import extent, opened, refusals

_LINE = 16


def find(options: argparse.Namespace) -> int:
    """Print what is found. Returns 0, or 1 if that is nothing."""
    pattern = _pattern(options)
    with opened(options.source) as cache:
        start, end = extent(options.start, options.length, cache)
        with refusals():
            found = GuestMemory(cache).find(pattern, start, end - start)
        count = 0
        for address, match in islice(found, options.max and min(options.max, sys.maxsize)):
            count += 1
            if options.count:
                continue
            if options.json:
                print(json.dumps(_facts(cache, address, match, options)))
            elif options.context is not None:
                if count > 1:
                    print("--")
                _print_context(cache, address, len(match), options.context)
            else:
                print(f"{address:#010x}  {_shown(match, options)}")
    if options.count:
        print(json.dumps({"count": count}) if options.json else count)
    return 0 if count else 1


def _pattern(options: argparse.Namespace) -> bytes | re.Pattern[bytes]:
    text: str = options.pattern
    if options.hex:
        try:
            pattern = bytes.fromhex(text.removeprefix("0x").replace(":", " "))
        except ValueError:
            raise CommandError(f"{text!r} is not bytes in hex: write --hex 'de ad'") from None
    elif options.regex:
        try:
            return re.compile(text.encode("utf-8", "surrogateescape"))
        except (re.error, OverflowError, RecursionError) as error:
            raise CommandError(f"{text!r} is no regular expression: {error}") from None
    elif options.encoding == "utf-8":
        pattern = text.encode("utf-8", "surrogateescape")
    else:
        try:
            pattern = text.encode(options.encoding)
        except UnicodeEncodeError:
            raise CommandError(f"{text!r} is no text: search for bytes with --hex") from None
    if not pattern:
        raise CommandError("the pattern is empty, and so everywhere")
    return pattern


def _shown(match: bytes, options: argparse.Namespace) -> str:
    if options.hex:
        return match.hex(" ")
    return printable(match.decode(options.encoding, "backslashreplace"))


def _facts(
    cache: MapCache, address: int, match: bytes, options: argparse.Namespace
) -> dict[str, object]:
    facts: dict[str, object] = {
        "address": address,
        "length": len(match),
        "text": match.decode(options.encoding, "backslashreplace"),
        "hex": match.hex(),
    }
    if options.context is not None:
        behind = address + len(match)
        low, high = address - options.context, behind + options.context
        first, data = _around(cache, address, low, high)
        facts["before"] = data[: address - first].hex()
        facts["after"] = data[behind - first :].hex()
    return facts


def _around(cache: MapCache, address: int, low: int, high: int) -> tuple[int, bytes]:
    """Return what is there around an address, between two others, as far as there is no hole."""
    low, high = max(0, low), min(high, ADDRESS_LIMIT)
    for start, size in cache.present(low, high - low):
        if start <= address < start + size:
            return start, cache.read(start, size)
    return address, b""


def _print_context(cache: MapCache, address: int, length: int, context: int) -> None:
    low, high = address - context, address + length + context
    first, data = _around(cache, address, low - low % _LINE, high + -high % _LINE)
    dump = Hexdump(first, squeeze=False)
    print("\n".join([*dump.lines(data), *dump.end()][:-1]))


def strings(options: argparse.Namespace) -> int:
    """Print runs of printable characters. Returns 0, or 1 if there are none."""
    write = sys.stdout.write  # there are millions of them
    count = 0
    with opened(options.source) as cache:
        start, end = extent(options.start, options.length, cache)
        with refusals():
            found = GuestMemory(cache).strings(
                start, end - start, min_length=options.min, encoding=options.encoding
            )
        for address, text in found:
            count += 1
            if options.json:
                write(f"{json.dumps({'address': address, 'text': text})}\n")
            else:
                write(f"{address:#010x}  {text}\n")
    return 0 if count else 1
