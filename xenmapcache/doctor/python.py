"""Python and the binding."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib import import_module

from .. import __version__
from .finding import Finding


def check_python() -> Iterator[Finding]:
    """Look at Python and the binding."""
    section = "Python"
    version = f"{platform.python_implementation()} {platform.python_version()}"
    yield Finding(section, "xenmapcache", "ok", f"{__version__}, {version}, {platform.machine()}")
    try:
        import_module("xenmapcache.binding.cffi_loader")
        number = import_module("_cffi_backend").__version__
    except ImportError as error:
        text = f"ctypes (cffi cannot be imported: {error})"
        remedy = "it works as well, only slower; for the other: pip install cffi"
        yield Finding(section, "binding", "note", text, remedy, {"name": "ctypes"})
        return
    text = f"cffi {number} (preferred to ctypes)"
    yield Finding(section, "binding", "ok", text, "", {"name": "cffi"})
