"""How much work is done: by a piece of code, in calls; and by the tests that can try more.

A limit in calls is one that no busy machine moves. The numbers are those of ``make test``. The
gates (``.ci/run``, ``.ci/nightly``, ``make coverage``) try more, by these variables:
``XENMAPCACHE_MODEL``, ``XENMAPCACHE_FUZZ``, ``XENMAPCACHE_EXAMPLES``, ``XENMAPCACHE_RACES``,
``XENMAPCACHE_BINDINGS``, ``XENMAPCACHE_LEAKS`` and ``XENMAPCACHE_INTERRUPTS``.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Final

MODEL: Final = int(os.environ.get("XENMAPCACHE_MODEL", "30"))
"""How many sequences of 50 events the model of a cache is compared in."""
FUZZ: Final = int(os.environ.get("XENMAPCACHE_FUZZ", "60"))
"""How many damaged files of each kind are read."""
RACES: Final = int(os.environ.get("XENMAPCACHE_RACES", "1"))
"""How many times as long threads and processes race that seldom meet; three times in the gates."""
LEAKS: Final = int(os.environ.get("XENMAPCACHE_LEAKS", "40000"))
"""How many operations are to leave nothing behind."""
BOTH_BINDINGS: Final = os.environ.get("XENMAPCACHE_BINDINGS", "one") == "both"
"""Whether the crash matrix has each cell of a live domain over cffi and over ctypes."""
EXAMPLES: Final = float(os.environ.get("XENMAPCACHE_EXAMPLES", "0.25"))
"""Which share of the usual number of examples hypothesis tries."""


def examples(usual: int) -> int:
    """Return how many examples a test tries, of a usual number of them."""
    return max(10, round(usual * EXAMPLES))


@contextlib.contextmanager
def calls_at_most(limit: int) -> Iterator[None]:
    """Fail a block that makes more calls, of Python's functions and of C's.

    Loops that call nothing are not seen. Coverage goes on measuring, which tracing would end.
    """
    calls = 0

    def count(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event in {"call", "c_call"}

    before, collects = sys.getprofile(), gc.isenabled()
    gc.disable()  # the finalizers of what others have left are not this block's work
    # Not by cProfile: since CPython 3.12 that counts the calls of other threads, too.
    sys.setprofile(count)
    try:
        yield
    finally:
        sys.setprofile(before)
        if collects:
            gc.enable()
    assert calls <= limit, f"{calls} calls, and no more than {limit} were to be made"
