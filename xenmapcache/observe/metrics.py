"""Metrics of caches and ioreq servers for Prometheus; the extra ``metrics``.

    from prometheus_client import start_http_server
    from xenmapcache.observe import metrics

    metrics.export(cache, server)
    start_http_server(9742, addr="127.0.0.1")

:data:`DATA` is the folder of alert rules and of a dashboard for these metrics.

Two things are read when Prometheus asks: counters, by :meth:`.MapCache.stats`, and the leases that
are held. All else is counted from events. A program that is stuck is shown, too: nothing here
waits longer than ``ANSWER_SECONDS`` for a cache, and nothing waits for a server.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self, TypeAlias

from ..cache import CacheStats, MapCache
from ..devicemodel import IoreqServer
from ..escape import printable
from ..extras import require
from ..ioreq import RequestKind
from .counts import MAX_LABEL, Histogram, LeaseCounts, RequestCounts
from .families import FAMILIES

if TYPE_CHECKING:
    from prometheus_client.core import Metric
    from prometheus_client.registry import CollectorRegistry

    from ..devicemodel.connection import Connection
    from ..stream import Observation

DATA: Final = Path(__file__).with_name("data")
"""The folder with ``alerts.yml``, rules for Prometheus, and ``dashboard.json``, for Grafana."""

ANSWER_SECONDS: Final = 1.0
"""How long one collection waits for all caches together."""

Sample: TypeAlias = Callable[[str, tuple[str, ...], "float | Histogram"], None]
"""Adds a sample: the metric's name, the values of its labels, and the value."""

_collectors: weakref.WeakKeyDictionary[CollectorRegistry, Collector] = weakref.WeakKeyDictionary()
_making = threading.RLock()


def export(
    cache: MapCache,
    server: IoreqServer | None = None,
    registry: CollectorRegistry | None = None,
    *,
    name: str | None = None,
    max_owners: int = 64,
    owner_label: Callable[[str], str] | None = None,
) -> Export:
    """Add a cache, and its ioreq server, to what a registry collects.

    The export ends when it or the cache is closed, or when the cache is freed: the registry keeps
    neither the cache nor the server alive. Then all their metrics are gone from the output.

    Args:
        cache: whose metrics.
        server: the ioreq server of the same guest.
        registry: of prometheus_client; None takes its REGISTRY.
        name: the label ``cache`` of each metric, unique in the registry. By default it is
            ``domain 3``, or the path of a file.
        max_owners: how many owners have a label of their own, apart from ``other``. The first
            ones have; leases of all others are counted under ``other``.
        owner_label: makes the label of an owner's name. Give it if names contain something that
            a guest chooses, such as a number of a request. Labels are escaped, and shortened
            to 64 characters.

    Raises:
        BackendUnavailableError: prometheus_client is not installed.
        ClosedError: the cache is closed.
        ValueError: another cache of the registry has that name; ``max_owners`` is negative; or
            another collector of the registry has metrics of these names.

    Synchronization: any thread.
    """
    client = require("prometheus_client", "prometheus_client", "metrics")
    if max_owners < 0:
        raise ValueError(f"max_owners must be at least 0, not {max_owners}")
    registry = client.REGISTRY if registry is None else registry
    with _making:
        collector = _collectors.get(registry)
        if collector is None:
            collector = Collector()
            registry.register(collector)
            _collectors[registry] = collector
        made = Export(collector, cache, server, max_owners, owner_label)
        collector.add(made, name)
    made.attach(cache, server)
    return made


class Export:
    """A cache and its server in the output of a registry. Also a context manager, which closes it.

    Attributes:
        name: the label ``cache`` of each metric.

    Synchronization: any thread.
    """

    def __init__(
        self,
        collector: Collector,
        cache: MapCache,
        server: IoreqServer | None,
        max_owners: int,
        owner_label: Callable[[str], str] | None,
    ) -> None:
        self.name = ""
        self._collector = collector
        self._cache = weakref.ref(cache)
        self._server = None if server is None else weakref.ref(server)
        self._leases = LeaseCounts(max_owners, owner_label, self._held, self._leave)
        self._requests = RequestCounts()
        self._stats = _Stats(self._cache)
        self._observations: list[Observation] = []

    def attach(self, cache: MapCache, server: IoreqServer | None) -> None:
        """Observe the cache and the server."""
        try:
            self._observations.append(cache.observe(self._leases))
            if server is not None:
                self._observations.append(server.observe(self._requests))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Take the cache and the server out of the output. Idempotent."""
        self._collector.remove(self)
        while self._observations:
            self._observations.pop().detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_gone(self) -> bool:
        """Whether the cache was freed."""
        return self._cache() is None

    def default_name(self) -> str:
        """Return what the backend is known by."""
        cache = self._cache()
        backend = None if cache is None else cache.backend
        domid, path = getattr(backend, "domid", None), getattr(backend, "path", None)
        if domid is not None:
            return f"domain {domid}"
        return os.fsdecode(path) if path is not None else getattr(backend, "name", "cache")

    def ask(self) -> None:
        """Begin to read what takes the cache's lock."""
        self._stats.ask()

    def collect(self, sample: Sample, deadline: float) -> None:
        """Add all samples; wait for the cache until ``deadline`` of the monotonic clock."""
        cache = self._cache()
        if cache is None:
            return
        self._collect_stats(cache, sample, deadline)
        self._collect_held(cache, sample)
        self._collect_leases(sample)
        lost = self._leases.lost_events
        if self._server is not None:
            self._collect_requests(sample)
            lost += self._requests.lost_events
        sample("xenmapcache_events_lost_total", (self.name,), lost)

    def _leave(self) -> None:
        self._collector.remove(self)

    def _held(self) -> set[int]:
        cache = self._cache()
        return set() if cache is None else {lease.id for lease in cache.leases()}

    def _collect_stats(self, cache: MapCache, sample: Sample, deadline: float) -> None:
        labels = (self.name,)
        sample("xenmapcache_resident_limit_bytes", labels, cache.max_resident)
        stats, age = self._stats.answer(deadline)
        sample("xenmapcache_stats_age_seconds", labels, age)
        if stats is None:
            return
        sample("xenmapcache_resident_bytes", labels, stats.resident_bytes)
        sample("xenmapcache_buckets", labels, stats.resident_buckets)
        sample("xenmapcache_maps_total", labels, stats.maps)
        sample("xenmapcache_unmaps_total", labels, stats.unmaps)
        sample("xenmapcache_misses_total", labels, stats.misses)
        sample("xenmapcache_evictions_total", labels, stats.evictions)
        sample("xenmapcache_hole_faults_total", labels, stats.hole_faults)
        sample("xenmapcache_invalidations_total", labels, stats.invalidations)

    def _collect_held(self, cache: MapCache, sample: Sample) -> None:
        """Add what is known of the leases that are held; takes no lock."""
        numbers: dict[tuple[str, str], int] = defaultdict(int)
        lengths: dict[tuple[str, str], int] = defaultdict(int)
        ages: dict[tuple[str, str], float] = defaultdict(float)
        stale: dict[str, int] = defaultdict(int)
        for owner, counts in list(self._leases.owners.items()):
            for kind in list(counts.kinds):
                numbers[owner, kind] += 0  # what is held no longer is 0, instead of missing
                if kind == "dma":
                    stale[owner] += 0
        for lease in cache.leases():
            owner, kind = self._leases.label_of(lease.owner), lease.kind.value
            numbers[owner, kind] += 1
            lengths[owner, kind] += lease.length
            ages[owner, kind] = max(ages[owner, kind], lease.age)
            if kind == "dma":
                stale[owner] += lease.stale
        for (owner, kind), number in numbers.items():
            labels = (self.name, owner, kind)
            sample("xenmapcache_leases", labels, number)
            sample("xenmapcache_leases_bytes", labels, lengths[owner, kind])
            sample("xenmapcache_lease_oldest_age_seconds", labels, ages[owner, kind])
        for owner, number in stale.items():
            sample("xenmapcache_stale_dma_leases", (self.name, owner), number)

    def _collect_leases(self, sample: Sample) -> None:
        for owner, counts in list(self._leases.owners.items()):
            for kind, each in list(counts.kinds.items()):
                labels = (self.name, owner, kind)
                sample("xenmapcache_leases_taken_total", labels, each.taken)
                sample("xenmapcache_leased_bytes_total", labels, each.bytes)
                sample("xenmapcache_lease_held_seconds", labels, each.held)
            labels_of_owner = (self.name, owner)
            sample("xenmapcache_stale_dma_released_total", labels_of_owner, counts.stale_released)
            sample("xenmapcache_pages_copied_total", labels_of_owner, counts.copied)
            sample("xenmapcache_pages_lost_total", labels_of_owner, counts.lost)

    def _collect_requests(self, sample: Sample) -> None:
        labels, requests = (self.name,), self._requests
        for kind, number in requests.requests.items():
            sample("xenmapcache_ioreqs_total", (self.name, kind), number)
            sample("xenmapcache_ioreq_failures_total", (self.name, kind), requests.failures[kind])
            sample("xenmapcache_ioreq_handler_seconds", (self.name, kind), requests.handlers[kind])
        sample("xenmapcache_quiesce_seconds", labels, requests.quiesce)
        sample("xenmapcache_quiesce_failures_total", labels, requests.quiesce_failures)
        server = None if self._server is None else self._server()
        handler, quiesce = (0.0, 0.0) if server is None else in_progress(server)
        sample("xenmapcache_ioreq_in_progress_seconds", labels, handler)
        sample("xenmapcache_quiesce_in_progress_seconds", labels, quiesce)


def in_progress(server: IoreqServer) -> tuple[float, float]:
    """Return for how many seconds the current handler, and the callbacks of on_quiesce, have run.

    Takes no lock, because a server that is stuck holds its own.
    """
    connection: Connection | None = server._runtime.connection  # noqa: SLF001 - every public way waits
    job = None if connection is None else connection.current
    handler = quiesce = 0.0
    while job is not None:
        age = max(time.monotonic() - job.since, 0.0)
        request = job.request
        if job.calling != logging.Logger.handle and (
            request is None or request.kind == RequestKind.INVALIDATE
        ):
            quiesce = max(quiesce, age)
        else:
            handler = max(handler, age)
        job = job.outer
    return handler, quiesce


class _Stats:
    """The counters of a cache, read in a thread of its own, because that needs the cache's lock.

    Args:
        cache: weak.

    Synchronization: any thread. There is at most one thread that reads.
    """

    def __init__(self, cache: weakref.ref[MapCache]) -> None:
        self._cache = cache
        self._thread = threading.Thread()
        self._asked = 0.0
        self._known: tuple[float, CacheStats] | None = None

    def ask(self) -> None:
        """Begin to read, unless the last reading has not ended."""
        if not self._thread.is_alive():
            self._asked = time.monotonic()
            self._thread = threading.Thread(
                target=self._read, name="xenmapcache metrics", daemon=True
            )
            self._thread.start()

    def _read(self) -> None:
        cache = self._cache()
        if cache is not None:
            self._known = time.monotonic(), cache.stats()

    def answer(self, deadline: float) -> tuple[CacheStats | None, float]:
        """Return the counters and their age in seconds: 0, unless they could not be read now."""
        self._thread.join(max(deadline - time.monotonic(), 0.0))
        if self._known is None:
            return None, time.monotonic() - self._asked
        since, stats = self._known
        return stats, 0.0 if since >= self._asked else time.monotonic() - since


class Collector:
    """What a registry collects from: all exports that belong to it.

    Synchronization: any thread.
    """

    def __init__(self) -> None:
        self._exports: dict[str, Export] = {}

    def add(self, export: Export, name: str | None) -> None:
        """Add an export under a name, or under a free one; called by one thread at a time.

        Raises:
            ValueError: the name belongs to another one.
        """
        self._exports_now()
        wanted = printable(export.default_name() if name is None else name)[:MAX_LABEL]
        export.name, number = wanted, 1
        while self._exports.setdefault(export.name, export) is not export:
            if name is not None:
                raise ValueError(
                    f"metrics.export: the name {wanted!r} belongs to another cache of this "
                    "registry; give each its own name="
                )
            number += 1
            export.name = f"{wanted} #{number}"

    def remove(self, export: Export) -> None:
        """Take an export out. Idempotent."""
        if self._exports.get(export.name) is export:
            self._exports.pop(export.name, None)

    def _exports_now(self) -> list[Export]:
        for each in list(self._exports.values()):
            if each.is_gone:
                self.remove(each)
        return list(self._exports.values())

    def describe(self) -> Iterable[Metric]:
        """Return all metrics without samples, by which a registry knows their names."""
        return _Output().families.values()

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics that have samples."""
        exports = self._exports_now()
        deadline = time.monotonic() + ANSWER_SECONDS
        output = _Output()
        for each in exports:
            each.ask()
        for each in exports:
            each.collect(output.sample, deadline)
        yield from (family for family in output.families.values() if family.samples)


class _Output:
    """The metrics of one collection."""

    def __init__(self) -> None:
        core = require("prometheus_client.core", "prometheus_client", "metrics")
        makers: dict[str, Any] = {
            "counter": core.CounterMetricFamily,
            "gauge": core.GaugeMetricFamily,
            "histogram": core.HistogramMetricFamily,
        }
        self.families: dict[str, Any] = {
            each.name: makers[each.kind](each.name, each.meaning, labels=each.labels)
            for each in FAMILIES
        }

    def sample(self, name: str, labels: tuple[str, ...], value: float | Histogram) -> None:
        """Add a sample."""
        if isinstance(value, Histogram):
            buckets = [(bound_text(bound), count) for bound, count in value.buckets()]
            self.families[name].add_metric(labels, buckets, value.sum)
        else:
            self.families[name].add_metric(labels, value)


def bound_text(bound: float) -> str:
    """Return the label ``le`` of a bucket."""
    return "+Inf" if bound == float("inf") else str(bound)
