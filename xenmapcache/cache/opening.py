"""Opening: from the name of a source to a cache that owns it."""

from __future__ import annotations

import os

from ..source import open_source
from .info import OnStale
from .mapcache import MapCache


def open_cache(
    spec: str | os.PathLike[str],
    *,
    bucket_shift: int = 20,
    max_resident: int | str | None = None,
    max_copies: int | str | None = None,
    max_lease: int | str | None = None,
    on_stale: OnStale = "warn",
    record_origin: bool = False,
    **options: object,
) -> MapCache:
    """Open a source of guest memory, and a cache over it that closes the source with itself.

        with open_cache("xen:web") as cache:
            header = cache.read(0, 64)

    Args:
        spec: the name of the source, as for :func:`open_source`: ``"xen:web"``, ``"guest.core"``.
        bucket_shift: log2 of a bucket's size; this and the next five as of :class:`MapCache`.
        max_resident: how much guest memory may be mapped at once; None: as the source suggests.
        max_copies: how much memory copies of a file's pages may take.
        max_lease: how long a lease may be.
        on_stale: what happens when a stale DMA lease is released.
        record_origin: record the stack where each lease is taken.
        **options: more options of the source, as for :func:`open_source`.

    Returns:
        An open cache. Its ``close`` closes the source too, when no lease is held.

    Raises:
        TypeError, ValueError, OSError, XenMapCacheError: as :func:`open_source` and
            :class:`MapCache`; nothing stays open.
    """
    backend = open_source(spec, **options)
    try:
        return MapCache(
            backend,
            bucket_shift=bucket_shift,
            max_resident=max_resident,
            max_copies=max_copies,
            max_lease=max_lease,
            on_stale=on_stale,
            record_origin=record_origin,
            owns_backend=True,
        )
    except BaseException:
        backend.close()
        raise
