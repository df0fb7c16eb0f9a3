"""Log lines whose failure is nobody else's: log handlers and filters are code of others."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Callable


def safely(log: Callable[..., None], *arguments: object, **options: object) -> None:
    """Log something; what a log handler or filter raises goes to stderr, as logging does it."""
    try:
        log(*arguments, **options)
    except Exception:
        if logging.raiseExceptions and sys.stderr is not None:
            traceback.print_exc()
