"""libxentoolcore, checked: giving up rights.

Follows ``xentoolcore.h``, VERS_1.0.
"""

from __future__ import annotations

from .declarations import TOOL_CORE
from .handle import failure
from .library import load
from .loader import get_loader

RESTRICT = "xentoolcore_restrict_all"


def restrict_all(domid: int, *, binding: str | None = None, library: str | None = None) -> None:
    """Let the handles of Xen's libraries that are open in this process affect one domain only.

    There is no way back. It concerns all libraries that libxentoolcore knows of, by whatever
    code they were opened. Handles of privcmd and event channels continue to work for that
    domain; those of grants, hypercalls and xenstore stop working. Handles that are opened
    later are not restricted.

    Args:
        domid: the domain.
        binding: ``"cffi"`` or ``"ctypes"``; None takes cffi if it is there.
        library: a SONAME or path to load instead of ``libxentoolcore.so.1``.

    Raises:
        BackendUnavailableError: no library.
        XenCallError: it failed; some handles may be restricted and others not.
    """
    _, functions = load(TOOL_CORE, get_loader(binding), library, (RESTRICT,))
    result, errno = functions[RESTRICT](domid)
    if result < 0:
        raise failure(RESTRICT, domid, errno)
