"""How much work a piece of code does, in calls: a limit that no busy machine moves."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def calls_at_most(limit: int) -> Iterator[None]:
    """Fail a block as soon as it has made more calls, of Python's functions and of C's.

    Loops that call nothing are not seen. Coverage goes on measuring, which tracing would end.
    """
    calls = 0

    def count(_: FrameType, event: str, __: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")
        if calls > limit:
            raise AssertionError(f"more than {limit} calls")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        yield
    finally:
        sys.setprofile(before)
    assert calls <= limit, "that it was too many was kept quiet"
