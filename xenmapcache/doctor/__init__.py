"""What mapping a live guest needs: what is present on this machine, and how to fix the rest.

Each file checks one subject and yields :class:`.finding.Finding` s. Nothing is printed here.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from .devices import check_devices
from .finding import Finding, guarded
from .guest import check_guest
from .hypervisor import check_xen
from .libraries import check_libraries
from .python import check_python

__all__ = ["Finding", "examine"]


def examine(domid: int | None = None) -> Iterator[Finding]:
    """Yield everything that was found, section by section. Raises nothing.

    Args:
        domid: of the live guest to map; None selects the first one in ``xl list``.
    """
    yield from guarded("Python", "Python", check_python)
    yield from guarded("Libraries", "libraries", check_libraries)
    yield from guarded("Devices", "devices", check_devices)
    yield from guarded("Xen", "Xen", check_xen)
    yield from guarded("Live guest", "guest", partial(check_guest, domid))
