"""How much work a piece of code does, in calls: a limit that no busy machine moves."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def calls_at_most(limit: int) -> Iterator[None]:
    """Fail a block that makes more calls, of Python's functions and of C's, in this thread.

    Loops that call nothing are not seen. Coverage goes on measuring, which tracing would end.
    """
    calls = 0

    def count(_: FrameType, event: str, __: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before, collects = sys.getprofile(), gc.isenabled()
    gc.disable()  # the finalizers of what others have left are not this block's work
    sys.setprofile(count)
    try:
        yield
    finally:
        sys.setprofile(before)
        if collects:
            gc.enable()
    assert calls <= limit, f"{calls} calls, and no more than {limit} were to be made"
