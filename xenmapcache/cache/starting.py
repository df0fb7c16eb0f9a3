"""Starts a thread unless it runs already; no signal handler can come in between."""

from __future__ import annotations

import _thread
from collections.abc import Callable
from functools import partial
from operator import call

_call: Callable[[Callable[[], object]], object] = call


def start_once(idle: list[None], run: Callable[[], None]) -> None:
    """Start a thread if its token is there. Taking it and starting are one call into C.

    If no thread can be started, the token is there again: the next call tries again.

    Args:
        idle: has one element, the token, while no thread runs; ``run`` puts it back.
        run: what the thread does.
    """
    if not idle:
        return
    done: list[object] = []
    start = partial(_thread.start_new_thread, run, ())
    both: tuple[Callable[[], object], ...] = (idle.pop, start)
    steps = map(_call, both)
    try:
        done.extend(steps)
    except (IndexError, RuntimeError):
        if done[1:]:
            raise  # a signal handler's: the thread has started
        # Another thread runs already. Or none can be made.
    finally:
        if done and not done[1:]:
            idle.append(None)
