"""How a shared library becomes Python callables: the interface, and the choice of a loader.

There are two loaders with one interface: cffi (out-of-line, ABI mode: no compiler)
and, where cffi cannot be imported or where it is asked for, ctypes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

from .declarations import Library

logger = logging.getLogger("xenmapcache.binding")

Argument = Any
"""A number; an address as an int; None for NULL; bytes for a ``char *``; or a writable buffer."""

Function = Callable[..., tuple[int, int]]
"""A C function. Takes :data:`Argument` values and returns ``(result, errno)``.

Pointers are ints both ways and ``errno`` is the one that this call left. A number that
does not fit its C type is an OverflowError. The interpreter lock is released while the
function runs.

``left=``, a list, gets the result before a signal handler can raise: Ctrl-C during the
call comes when the function has returned, and what it returned would be lost.
"""


class Loader(Protocol):
    """Opens shared libraries and makes their functions callable."""

    name: str

    def open(self, library: Library, path: str) -> dict[str, Function]:
        """Load a library.

        Args:
            library: what it declares.
            path: a SONAME or a path; empty for the process itself.

        Returns:
            The declared functions that the library really exports.

        Raises:
            OSError: the dynamic linker could not load it.
        """
        ...


def get_loader(name: str | None = None) -> Loader:
    """Return the loader of that name; cffi, or else ctypes, when none is named.

    Raises:
        ValueError: there is no loader of that name.
        ImportError: cffi was asked for by name and cannot be imported.
    """
    if name not in (None, "cffi", "ctypes"):
        raise ValueError(f"binding {name!r} is unknown: it is 'cffi' or 'ctypes'")
    return _loader(name)


@cache
def _loader(name: str | None) -> Loader:
    if name != "ctypes":
        try:
            from .cffi_loader import CffiLoader
        except ImportError as error:
            if name == "cffi":
                raise
            logger.info("cffi cannot be imported (%s): binding through ctypes", error)
        else:
            return CffiLoader()
    from .ctypes_loader import CtypesLoader

    return CtypesLoader()
