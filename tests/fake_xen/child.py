"""Work in a forked child, which cannot take the test run with it."""

from __future__ import annotations

import os
import signal
import traceback
import warnings
from collections.abc import Callable


def in_child(work: Callable[[], object], timeout: int = 30) -> int:
    """Run something in a forked child, for at most ``timeout`` seconds.

    Returns:
        0 if it returned True, 1 if anything else, 2 if it raised, negative if a signal killed it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that there are threads is the point
        pid = os.fork()
    if not pid:
        status = 2
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(timeout)
            status = 0 if work() is True else 1
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
