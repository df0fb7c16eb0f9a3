"""What the tests have Xen do to a guest besides mapping its memory, through libxenctrl."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple


class Control(NamedTuple):
    """An open libxenctrl."""

    library: ctypes.CDLL
    handle: ctypes.c_void_p
    path: Path

    def call(self, name: str, *arguments: object) -> None:
        """Call a function that returns 0 when it succeeds; it must."""
        result = getattr(self.library, name)(self.handle, *arguments)
        assert result == 0, f"{name}: {os.strerror(ctypes.get_errno())}"


@contextmanager
def control() -> Iterator[Control]:
    """Open libxenctrl."""
    path, *_ = sorted(Path("/usr/lib").glob("*-linux-gnu/libxenctrl.so.*.*"))
    library = ctypes.CDLL(str(path), use_errno=True)
    library.xc_interface_open.restype = ctypes.c_void_p
    handle = ctypes.c_void_p(library.xc_interface_open(None, None, 0))
    assert handle.value is not None, os.strerror(ctypes.get_errno())
    try:
        yield Control(library, handle, path)
    finally:
        library.xc_interface_close(handle)


@contextmanager
def held_still(domid: int) -> Iterator[None]:
    """Keep a guest from running, so that two looks at its memory see the same.

    One hypercall each, where ``xl pause`` starts a process, which takes long under emulation.
    """
    with control() as xen:
        xen.call("xc_domain_pause", ctypes.c_uint32(domid))
        try:
            yield
        finally:
            xen.call("xc_domain_unpause", ctypes.c_uint32(domid))
