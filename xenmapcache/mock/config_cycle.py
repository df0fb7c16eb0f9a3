"""Ports 0xcf8 and 0xcfc: how Xen makes PCI configuration accesses of port accesses."""

# Theory of operation
#
# A guest selects a function and a register with a write of 4 bytes to port 0xcf8:
#
#   31      30..24   23..16   15..11    10..8      7..2       1..0
#   enable  0        bus      device    function   register   0
#
# Xen notes the value, one for the domain, and does nothing else about it: the same write goes on to
# the server that has claimed the port, if there is one, and a read is answered by that server or
# by nobody. While the enable bit is set, an access to 0xcfc..0xcff is an access to configuration
# space, and goes to the server that has claimed the function. It never goes to a server that has
# claimed the port.

from __future__ import annotations

from ..ioreq import BUS_OFFSET, Request, RequestKind

CONFIG_ADDRESS, CONFIG_DATA = 0xCF8, 0xCFC
CONFIG_ENABLE = 1 << 31


def selected(request: Request, previous: int) -> int:
    """Return what is selected after a request: another value if it is a write to 0xcf8."""
    if (
        request.kind == RequestKind.PORT
        and not (request.is_read or request.data_is_ptr)
        and (request.address, request.size) == (CONFIG_ADDRESS, 4)
    ):
        return request.data
    return previous


def translated(request: Request, config_address: int) -> Request:
    """Return a request as a server gets it: one for 0xcfc..0xcff is one for a PCI function."""
    if (
        request.kind != RequestKind.PORT
        or request.address & ~3 != CONFIG_DATA
        or not config_address & CONFIG_ENABLE
    ):
        return request
    bdf = config_address >> 8 & 0xFFFF
    offset = config_address & 0xFC | request.address & 3
    return request._replace(kind=RequestKind.PCI_CONFIG, address=bdf << BUS_OFFSET | offset)
