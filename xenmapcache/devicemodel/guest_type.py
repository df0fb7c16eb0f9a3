"""What a live guest is: HVM, PVH or PV, as Xen's toolstack says.

``xl`` notes a guest's type in xenstore, under ``/libxl/DOMID/type``. This reads that one
entry by xenstore's own protocol, ``xen/io/xs_wire.h``, over the device that the kernel offers.
"""

from __future__ import annotations

import os
import select
import struct
from pathlib import Path
from time import monotonic

DEVICE = Path("/dev/xen/xenbus")

GUEST_TYPES = ("hvm", "pvh", "pv")

_HEADER = struct.Struct("<IIII")
"""struct xsd_sockmsg: type, req_id, tx_id, len."""
_XS_READ = 2
_MAX_REPLY = 4096
_TIMEOUT_S = 2.0


def guest_type(domid: int) -> str | None:
    """Return ``"hvm"``, ``"pvh"`` or ``"pv"``; None if the toolstack does not say.

    A guest that was not made by ``xl`` or libxl has no such entry.
    """
    try:
        value = read_xenstore(f"/libxl/{domid}/type")
    except OSError:
        return None
    return value if value in GUEST_TYPES else None


def read_xenstore(path: str) -> str:
    """Return an entry of xenstore.

    Raises:
        OSError: there is no xenstore or no such entry, or no answer came in time.
    """
    fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        name = path.encode() + b"\0"
        os.write(fd, _HEADER.pack(_XS_READ, 0, 0, len(name)) + name)
        end = monotonic() + _TIMEOUT_S
        kind, _, _, length = _HEADER.unpack(_receive(fd, _HEADER.size, end))
        value = _receive(fd, min(length, _MAX_REPLY), end)
    finally:
        os.close(fd)
    if kind != _XS_READ:
        raise OSError(f"xenstore has no {path}: {value!r}")
    return value.decode("ascii", "replace")


def _receive(fd: int, length: int, end: float) -> bytes:
    """Return ``length`` bytes of a reply."""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    data = b""
    while len(data) < length:
        left = end - monotonic()
        if left <= 0 or not poller.poll(left * 1000):
            raise TimeoutError("xenstore has not answered")
        chunk = os.read(fd, length - len(data))
        if not chunk:
            raise OSError("xenstore has closed the connection")
        data += chunk
    return data
