"""Search of guest memory by YARA's rules. Needs the package yara-python."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

from ..address import as_int
from ..cache import MapCache
from ..extras import require
from .search import checked_range, texts

logger = logging.getLogger("xenmapcache")

_CONTEXT_BYTES = 16
"""How much before a chunk a rule can see, for ``fullword`` and ``\\b``."""


class YaraMatch(NamedTuple):
    """A string of a rule that was found. Immutable.

    Attributes:
        address: guest-physical.
        data: what was found.
        rule: the rule's name.
        string: the string's name, such as ``$a``.
        tags: of the rule.
    """

    address: int
    data: bytes
    rule: str
    string: str
    tags: tuple[str, ...]


def find_yara(
    cache: MapCache,
    rules: Any,  # noqa: ANN401 - yara need not be installed
    address: int,
    length: int | None,
    max_match: int,
) -> Iterator[YaraMatch]:
    """Return an iterator of matches; see :meth:`GuestMemory.find_yara`."""
    yara = require("yara", "yara-python", "yara")
    if not isinstance(rules, yara.Rules):
        raise TypeError(f"rules must be what yara.compile() returns, not {rules!r}")
    if as_int("max_match", max_match) < 1:
        raise ValueError(f"max_match must be at least 1, not {max_match}")
    go_on = int(yara.CALLBACK_CONTINUE)
    return _find(cache, rules, *checked_range(cache, address, length), max_match, go_on)


def _find(
    cache: MapCache,
    rules: Any,  # noqa: ANN401 - yara need not be installed
    address: int,
    end: int,
    max_match: int,
    go_on: int,
) -> Iterator[YaraMatch]:
    before, edge = b"", -1  # what lies in front of an address
    for base, text, size, limit in texts(cache, address, end, max_match):
        with memoryview(text) as everything:
            data = b"".join((before if base == edge else b"", everything[:size]))
        skipped = len(data) - size
        stop = skipped + min(size, limit)  # the next text has what begins later

        def warn(_: int, what: object, base: int = base) -> int:
            logger.warning("YARA leaves out matches in the MiB at %#x, too many: %s", base, what)
            return go_on

        found = rules.match(data=data, warnings_callback=warn)
        yield from sorted(_matches(found, data, base - skipped, skipped, stop))
        before, edge = data[max(0, stop - _CONTEXT_BYTES) : stop], base + limit


def _matches(found: Any, data: bytes, base: int, first: int, stop: int) -> Iterator[YaraMatch]:  # noqa: ANN401 - yara's
    """Yield the matches that begin between two offsets of a chunk."""
    for match in found:
        tags = tuple(match.tags)
        for string in match.strings:
            for each in string.instances:
                at = each.offset
                if first <= at < stop:
                    text = data[at : at + each.matched_length]
                    yield YaraMatch(base + at, text, match.rule, string.identifier, tags)
