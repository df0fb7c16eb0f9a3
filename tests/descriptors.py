"""The descriptors of this process, to see that none is left open."""

from __future__ import annotations

import gc
import os


def open_files() -> int:
    """Return how many there are, without those that garbage of earlier tests still holds.

    Compare with ``<=``: a thread that an earlier test has ended may close one in between.
    """
    before = len(os.listdir("/proc/self/fd"))
    while True:  # what one collection finalizes may be what the next one can free
        gc.collect()
        now = len(os.listdir("/proc/self/fd"))
        if now >= before:
            return now
        before = now
