"""A process that is asked again and again, for a live view."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from .asking import ask

if TYPE_CHECKING:
    from .snapshot import Snapshot

_SAME_START_NS: Final = 1_000_000_000
"""The start of one process may differ that much between two monitors, because clocks are set."""


class Watch:
    """A process that is asked again and again.

    Attributes:
        current: its last answer.
        previous: the one before, if there is one.
        problem: why the last question had no answer; empty if it had.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self.current = snapshot
        self.previous: Snapshot | None = None
        self.problem = ""

    def ask(self) -> bool:
        """Ask the process. Return whether it can still be asked."""
        pid = self.current.pid
        answers = ask([pid]).answers
        if not answers:
            state = "has no monitor any longer" if _exists(pid) else "has ended"
            self.problem = f"process {pid} {state}"
            return False
        snapshot = answers[0].snapshot
        if snapshot is None:
            self.problem = f"process {pid} {answers[0].problem}; this is its last answer"
        elif abs(snapshot.started_ns - self.current.started_ns) > _SAME_START_NS:
            self.problem = f"process {pid} has ended, and another one has its number"
            return False
        else:
            self.previous, self.current, self.problem = self.current, snapshot, ""
        return True


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
