r"""Text that others have written: made safe before a person or a log sees it.

Names of files, domains, owners and regions, and what lies in a guest or a dump, may contain
escape sequences. A terminal obeys them: they can rename the window, hide lines, or worse. Each
character that is not printable is therefore shown as Python writes it: ``\x1b``.

The command prints through one module that calls :func:`printable`. Exceptions of this package
call it for their messages. :func:`escape_logs` does it for everything the package logs.
"""

from __future__ import annotations

import logging
import traceback

LOGGERS = (
    "xenmapcache",
    "xenmapcache.binding",
    "xenmapcache.devicemodel",
    "xenmapcache.xen",
)
"""Every logger of the package. A filter of a logger does not see what its children log."""

_CHUNK_CHARACTERS = 1 << 16


def printable(text: str) -> str:
    """Return text in which each character that is not printable is escaped, line ends too."""
    if text.isprintable():
        return text
    chunks = []
    for start in range(0, len(text), _CHUNK_CHARACTERS):
        chunk = text[start : start + _CHUNK_CHARACTERS]
        if not chunk.isprintable():
            chunk = "".join(each if each.isprintable() else repr(each)[1:-1] for each in chunk)
        chunks.append(chunk)
    return "".join(chunks)


def printable_lines(text: str) -> str:
    """Return text in which lines stay lines, and all else is as :func:`printable` returns it."""
    return "\n".join(map(printable, text.split("\n")))


def escape_logs() -> None:
    """Let everything that the package logs be escaped, whatever handlers a program has."""
    for name in LOGGERS:
        logging.getLogger(name).addFilter(_escape_record)


class _Escaped:
    """An exception whose text is escaped when a handler asks for it, and no sooner.

    ``str()`` may call foreign code, whose errors a handler contains.
    """

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __str__(self) -> str:
        return printable(str(self._error))

    def __repr__(self) -> str:
        return printable(repr(self._error))


def _escape_record(record: logging.LogRecord) -> bool:
    """Escape a record's strings and exceptions, and its traceback; return True: log it."""
    if isinstance(record.args, tuple):
        record.args = tuple(map(_escaped, record.args))
    elif record.args:
        record.args = {name: _escaped(value) for name, value in record.args.items()}
    if record.exc_info and record.exc_info[1] is not None and not record.exc_text:
        try:
            lines = "".join(traceback.format_exception(record.exc_info[1]))
            record.exc_text = printable_lines(lines.rstrip("\n"))
        except Exception:  # of a __str__ of the user's
            record.exc_text = f"{type(record.exc_info[1]).__name__} whose text cannot be shown"
    return True


def _escaped(argument: object) -> object:
    if isinstance(argument, str):
        return printable(argument)
    return _Escaped(argument) if isinstance(argument, BaseException) else argument
