"""Granted pages: memory that a guest lends to this domain, page by page, for one request.

A guest that lends its buffers to a device by Xen's grants names them by addresses with bit 63 set:
``1 << 63 | reference << 12 | offset``. Consecutive pages have consecutive references. A
:class:`GrantSource` maps them for leases, and copies them for small reads and writes.
"""

from .address import GRANT_BIT, grant_address, is_granted
from .source import MAX_MAPPED, MAX_REFS, GrantMapping, GrantSource

__all__ = [
    "GRANT_BIT",
    "MAX_MAPPED",
    "MAX_REFS",
    "GrantMapping",
    "GrantSource",
    "grant_address",
    "is_granted",
]
