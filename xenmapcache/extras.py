"""Optional packages, which are imported when they are used."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from .errors import BackendUnavailableError


def require(module: str, package: str, extra: str) -> ModuleType:
    """Return a module of an optional package.

    Args:
        module: its name.
        package: which package has it.
        extra: of this package, which installs that one.

    Raises:
        BackendUnavailableError: it cannot be imported; the message says what to install.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise BackendUnavailableError(
            f"the package {package} is needed: pip install {package}, or 'xenmapcache[{extra}]' "
            f"({error})"
        ) from error
