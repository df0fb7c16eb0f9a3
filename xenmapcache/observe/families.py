"""The metrics that are exported: their names, types, labels and meanings."""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

Kind = Literal["counter", "gauge", "histogram"]

_CACHE: Final = ("cache",)
_OWNER: Final = ("cache", "owner")
_LEASE: Final = ("cache", "owner", "kind")
_REQUEST: Final = ("cache", "kind")


class Family(NamedTuple):
    """A metric. Immutable.

    Attributes:
        name: as it is exported; of a histogram without ``_bucket``, ``_sum`` and ``_count``.
        kind: its type.
        labels: the names of its labels.
        meaning: one sentence.
    """

    name: str
    kind: Kind
    labels: tuple[str, ...]
    meaning: str


FAMILIES: Final = (
    # Of a cache, when it is asked.
    Family("xenmapcache_resident_bytes", "gauge", _CACHE, "Guest memory that is mapped."),
    Family("xenmapcache_resident_limit_bytes", "gauge", _CACHE, "Guest memory that may be mapped."),
    Family("xenmapcache_buckets", "gauge", _CACHE, "Buckets that an access finds."),
    Family("xenmapcache_maps_total", "counter", _CACHE, "Mappings made."),
    Family("xenmapcache_unmaps_total", "counter", _CACHE, "Mappings unmapped."),
    Family("xenmapcache_misses_total", "counter", _CACHE, "Buckets that had to be mapped."),
    Family(
        "xenmapcache_evictions_total", "counter", _CACHE, "Buckets dropped to stay under a limit."
    ),
    Family("xenmapcache_hole_faults_total", "counter", _CACHE, "Accesses that found no page."),
    Family(
        "xenmapcache_invalidations_total", "counter", _CACHE, "Times all mappings were dropped."
    ),
    Family(
        "xenmapcache_stats_age_seconds",
        "gauge",
        _CACHE,
        "Age of the metrics above: more than 0 if the cache did not answer in time.",
    ),
    # Of its leases, when it is asked.
    Family("xenmapcache_leases", "gauge", _LEASE, "Leases that are held."),
    Family("xenmapcache_leases_bytes", "gauge", _LEASE, "Lengths of the leases that are held."),
    Family(
        "xenmapcache_lease_oldest_age_seconds", "gauge", _LEASE, "Age of the oldest lease held."
    ),
    Family(
        "xenmapcache_stale_dma_leases",
        "gauge",
        _OWNER,
        "DMA leases that are stale and held: what the device writes may be lost.",
    ),
    # Of its leases, from events.
    Family("xenmapcache_leases_taken_total", "counter", _LEASE, "Leases taken."),
    Family("xenmapcache_leased_bytes_total", "counter", _LEASE, "Lengths of the leases taken."),
    Family("xenmapcache_lease_held_seconds", "histogram", _LEASE, "How long leases were held."),
    Family(
        "xenmapcache_stale_dma_released_total",
        "counter",
        _OWNER,
        "DMA leases that were stale when they were released.",
    ),
    Family(
        "xenmapcache_pages_copied_total",
        "counter",
        _OWNER,
        "Pages of stale leases that were copied to the guest.",
    ),
    Family(
        "xenmapcache_pages_lost_total",
        "counter",
        _OWNER,
        "Pages a device could have written that the guest may never see.",
    ),
    # Of an ioreq server.
    Family("xenmapcache_ioreqs_total", "counter", _REQUEST, "Requests handled."),
    Family("xenmapcache_ioreq_failures_total", "counter", _REQUEST, "Requests that failed."),
    Family("xenmapcache_ioreq_handler_seconds", "histogram", _REQUEST, "How long handlers ran."),
    Family(
        "xenmapcache_ioreq_in_progress_seconds",
        "gauge",
        _CACHE,
        "How long the current request has been handled; 0 without one.",
    ),
    Family(
        "xenmapcache_quiesce_seconds",
        "histogram",
        _CACHE,
        "How long the callbacks took that stop DMA before an invalidation.",
    ),
    Family(
        "xenmapcache_quiesce_failures_total", "counter", _CACHE, "Callbacks of these that failed."
    ),
    Family(
        "xenmapcache_quiesce_in_progress_seconds",
        "gauge",
        _CACHE,
        "How long the callbacks have run that are running; 0 without one.",
    ),
    Family(
        "xenmapcache_events_lost_total",
        "counter",
        _CACHE,
        "Events that these metrics do not count.",
    ),
)
"""Every metric, in the order of the output."""
