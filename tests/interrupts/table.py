"""The table: every operation, and what is known not to hold yet."""

from __future__ import annotations

import re
import sys
from typing import Final, NamedTuple

from . import bindings, caches, grants, images, mocks, observers, servers, transfers
from .world import Operation

OPERATIONS: Final[dict[str, Operation]] = {
    operation.name: operation
    for module in (caches, observers, images, servers, transfers, mocks, bindings, grants)
    for operation in module.OPERATIONS
}


class Expected(NamedTuple):
    """A kind of finding that is known.

    Attributes:
        pattern: a regular expression, found in the finding as it is printed.
        example: an operation and a handler some of whose points show it. If none does any more,
            a test fails: remove the entry.
        reason: why it is so.
    """

    pattern: str
    example: tuple[str, str]
    reason: str


EXPECTED: Final = (
    Expected(
        r"(cffi|ctypes)_loader\.py:\d+ in .*call: .*, (allocation|depth): "
        r"(\d more|xenforeignmemory_open)",
        ("cache.read-miss", "allocation"),
        "C has mapped, and Python cannot make the number that says where: nobody can unmap it",
    ),
    Expected(
        r"buckets\.py:\d+ in retire: image\.invalidate, allocation: another thread's read .*Full",
        ("image.invalidate", "allocation"),
        "the traceback of the MemoryError holds the old generation, and so its mappings",
    ),
    Expected(
        r"in _mapped_areas: .*, allocation: raised RuntimeError\(.can't allocate read lock",
        ("binding.remap-cffi", "allocation"),
        "CPython says so if it has no memory for the lock of a file that it opens",
    ),
    *(
        (
            Expected(
                r"/(caches?|mock)[/.].*py:\d+ in .*, allocation: \d more descriptors",
                ("cache.close-force", "allocation"),
                "without memory for the frame of a comprehension, CPython 3.11 loses a reference "
                "to what it goes through; 3.12 has no such frame",
            ),
            Expected(
                r"in _bind: binding\.open-ctypes, allocation: raised TypeError\('_argtypes_ must",
                ("binding.open-ctypes", "allocation"),
                "ctypes says so if it has no memory for the types of a function's arguments",
            ),
            Expected(
                r"in lease_list: segments\.lease, allocation: \d more descriptors",
                ("segments.lease", "allocation"),
                "without memory for a cell of a function, here of one that its comprehensions use, "
                "CPython loses a reference to an argument; in 3.12 the function has no cells",
            ),
        )
        if sys.version_info < (3, 12)
        else ()
    ),
)
"""Kinds of findings that are known today."""


def is_known(finding: str) -> bool:
    """Tell whether a finding, as it is printed, is of a known kind."""
    return any(re.search(expected.pattern, finding) for expected in EXPECTED)
