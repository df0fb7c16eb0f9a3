"""The choice of a loader, which turns the functions of a shared library into Python callables.

There are two loaders with one interface: cffi (out-of-line, ABI mode: no compiler), and ctypes
where cffi cannot be imported or where ctypes is asked for.
"""

from __future__ import annotations

import logging
from functools import cache

from .interface import Loader

logger = logging.getLogger("xenmapcache.binding")


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
