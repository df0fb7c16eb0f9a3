"""A full memory fence as a Python callable, for processors that reorder loads and stores.

Xen's device models put barriers between the state of a request and its fields. Python has none
to offer, so this takes C's, or brings its own.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Callable
from functools import cache, partial

from ..arch import ARCHITECTURES, Architecture
from ..errors import UnsupportedOperationError
from . import libc

LIBATOMIC = "libatomic.so.1"
_SEQ_CST = 5
"""``memory_order_seq_cst`` of ``stdatomic.h``."""


def host_architecture() -> Architecture:
    """Return this machine's architecture, which is its guests' as well.

    Raises:
        UnsupportedOperationError: this package cannot serve guests of such a machine.
    """
    machine = platform.machine()
    for architecture in ARCHITECTURES.values():
        if machine in architecture.machines:
            return architecture
    raise UnsupportedOperationError(
        f"serving needs {' or '.join(ARCHITECTURES)}, not {machine}: answers must reach the guest "
        "in order, and no fence for this processor is known; run the device model on such a host"
    )


@cache
def find_fence(architecture: Architecture, library: str = LIBATOMIC) -> Callable[[], object] | None:
    """Return a full memory fence; None where the processor keeps the order itself.

    It is ``atomic_thread_fence`` of libatomic, or else the architecture's own few bytes.
    The interpreter lock is held during the call, which takes less time than releasing it.

    Args:
        architecture: of this process.
        library: libatomic's SONAME, or a path.

    Raises:
        UnsupportedOperationError: there is no libatomic, and the own bytes cannot be executed.
    """
    if not architecture.fence_code:
        return None
    try:
        function = ctypes.PyDLL(library)["atomic_thread_fence"]
    except (OSError, AttributeError) as missing:
        return _own_fence(architecture, missing)
    function.argtypes, function.restype = [ctypes.c_int], None
    return partial(function, _SEQ_CST)


def _own_fence(architecture: Architecture, missing: Exception) -> Callable[[], object]:
    """Return a function of the architecture's own machine code."""
    try:
        if sys.maxsize < 1 << 32:
            raise OSError("this Python is a 32-bit program, and the code is of 64 bits")
        return map_function(architecture.fence_code)
    except OSError as error:
        raise UnsupportedOperationError(
            f"serving on {architecture.name}: no memory fence: {missing}, and the package's own "
            f"code cannot be executed ({error}); install libatomic (Debian: apt install "
            "libatomic1)"
        ) from error


def map_function(code: bytes) -> Callable[[], object]:
    """Return machine code as a function without arguments. It stays mapped permanently.

    The memory is a file's and is never writable and executable at once: so security modules
    allow it, and the kernel makes the instruction cache coherent when it maps the page.

    Raises:
        OSError: the kernel refuses the file, or to map it for execution.
    """
    fd = os.memfd_create("xenmapcache-fence", os.MFD_CLOEXEC)
    try:
        os.write(fd, code)
        address = libc.map_code(fd, len(code))
    finally:
        os.close(fd)
    return ctypes.PYFUNCTYPE(None)(address)
