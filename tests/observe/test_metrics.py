"""What Prometheus gets of caches and servers, and what happens if a program is stuck."""

from __future__ import annotations

import gc
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Gauge, write_to_textfile
from prometheus_client.openmetrics.exposition import generate_latest as openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from tests.kit import in_thread
from tests.observe.metrics_kit import MS, SECOND, FedCache, FedServer, lines, text
from xenmapcache import (
    Backend,
    BackendUnavailableError,
    ClosedError,
    FaultError,
    Lease,
    LeaseKind,
    MapCache,
    MockDomain,
    open_backend,
)
from xenmapcache.devicemodel import IoreqServer
from xenmapcache.events import (
    CacheClosed,
    EventsLost,
    LeaseReleased,
    LeaseTaken,
    Quiesced,
    RequestHandled,
)
from xenmapcache.observe import metrics
from xenmapcache.observe.families import FAMILIES


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def fed(backend: Backend) -> Iterator[FedCache]:
    with FedCache(backend) as cache:
        yield cache
        cache.close(force=True)


@pytest.fixture
def server(domain: MockDomain, fed: FedCache) -> FedServer:
    return FedServer(domain, fed)


def wait_for(check: Callable[[], bool]) -> None:
    while not check():
        os.sched_yield()


# --- what is read -------------------------------------------------------------------------


def test_the_counters_of_a_cache(fed: FedCache, registry: CollectorRegistry) -> None:
    """They are those of stats(), when the registry collects."""
    metrics.export(fed, registry=registry, name="web")
    fed.read(0, 0x20000)
    fed.invalidate()
    stats = fed.stats()
    assert stats.maps == 2
    for name, value in (
        ("resident_bytes", stats.resident_bytes),
        ("resident_limit_bytes", fed.max_resident),
        ("buckets", 0),
        ("maps_total", 2),
        ("unmaps_total", stats.unmaps),
        ("misses_total", 2),
        ("evictions_total", 0),
        ("hole_faults_total", 0),
        ("invalidations_total", 1),
        ("stats_age_seconds", 0),
    ):
        assert registry.get_sample_value(f"xenmapcache_{name}", {"cache": "web"}) == value, name


def test_the_leases_that_are_held(fed: FedCache, registry: CollectorRegistry) -> None:
    """They are asked for, so they are right even if events were missed."""
    metrics.export(fed, registry=registry, name="web")
    fed.feed(LeaseTaken(SECOND, 1, "dma", 0, 0x100, "disk0", None, "", False))
    fed.feed(LeaseTaken(SECOND, 2, "device", 0, 0x100, "vga", None, "", False))
    lease = fed.map_dma(0x1000, 0x100, owner="disk0")
    fed.map_dma(0x2000, 0x100, owner="disk0").release()
    fed.map_dma(0x3000, 0x20, owner="new")
    fed.map_device(0x4000, 0x1000, owner="vga")
    fed.invalidate()
    assert lines(registry, "leases") == [
        'leases{cache="web",kind="dma",owner="disk0"} 1.0',
        'leases{cache="web",kind="device",owner="vga"} 1.0',
        'leases{cache="web",kind="dma",owner="other"} 1.0',
    ]
    assert [line.partition(" ")[2] for line in lines(registry, "leases_bytes")] == [
        "256.0",
        "4096.0",
        "32.0",
    ]
    assert lines(registry, "stale_dma_leases") == [
        'stale_dma_leases{cache="web",owner="disk0"} 1.0',
        'stale_dma_leases{cache="web",owner="other"} 1.0',
    ]
    labels = {"cache": "web", "owner": "disk0", "kind": "dma"}
    age = registry.get_sample_value("xenmapcache_lease_oldest_age_seconds", labels)
    assert age is not None
    assert 0 < age <= fed.leases()[0].age
    lease.release()
    assert lines(registry, "stale_dma_leases")[0].endswith(" 0.0")


def test_the_age_is_that_of_the_oldest_lease(
    fed: FedCache, registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the order of the leases."""
    metrics.export(fed, registry=registry, name="web")
    held = [
        SimpleNamespace(owner="disk0", kind=LeaseKind.DMA, length=1, age=age, stale=False)
        for age in (2.0, 5.0, 3.0)
    ]
    monkeypatch.setattr(fed, "leases", lambda: held)
    assert lines(registry, "lease_oldest_age_seconds") == [
        'lease_oldest_age_seconds{cache="web",kind="dma",owner="other"} 5.0'
    ]


def test_what_owners_did(fed: FedCache, registry: CollectorRegistry) -> None:
    """From events: taken, bytes, seconds, stale, copied, lost."""
    metrics.export(fed, registry=registry, name="web")
    fed.feed(
        LeaseTaken(SECOND, 1, "dma", 0, 0x100, 'disk "0"\n', "to-device", "", False),
        LeaseReleased(SECOND + 50 * MS, 1, stale=True, copied=2, lost=3),
        EventsLost(SECOND, 4),
    )
    lease = '{cache="web",kind="dma",owner="disk \\"0\\"\\\\n"}'
    owner = '{cache="web",owner="disk \\"0\\"\\\\n"}'
    assert lines(registry, "leases_taken_total") == [f"leases_taken_total{lease} 1.0"]
    assert lines(registry, "leased_bytes_total") == [f"leased_bytes_total{lease} 256.0"]
    assert lines(registry, "lease_held_seconds_sum") == [f"lease_held_seconds_sum{lease} 0.05"]
    assert lines(registry, "stale_dma_released_total") == [f"stale_dma_released_total{owner} 1.0"]
    assert lines(registry, "pages_copied_total") == [f"pages_copied_total{owner} 2.0"]
    assert lines(registry, "pages_lost_total") == [f"pages_lost_total{owner} 3.0"]
    assert lines(registry, "events_lost_total") == ['events_lost_total{cache="web"} 4.0']
    buckets = [line.split()[-1] for line in lines(registry, "lease_held_seconds_bucket")]
    assert buckets == ["0.0"] * 4 + ["1.0"] * 8


def test_what_a_server_did(fed: FedCache, server: FedServer, registry: CollectorRegistry) -> None:
    """Requests by kind, failures, and seconds; each kind exists from the start, at 0."""
    metrics.export(fed, server, registry, name="web")
    assert len(lines(registry, "ioreqs_total")) == 6
    server.feed(
        RequestHandled(SECOND, 0, 0, True, 0x300, 1, 200 * MS, "ValueError"),
        Quiesced(SECOND, 30 * MS, 1),
        EventsLost(SECOND, 1),
    )
    fed.feed(EventsLost(SECOND, 1))
    assert lines(registry, "ioreqs_total")[0] == 'ioreqs_total{cache="web",kind="port"} 1.0'
    assert lines(registry, "ioreq_failures_total")[0].endswith(" 1.0")
    labels = {"cache": "web", "kind": "port"}
    for bound, number in (("0.1", 0), ("0.5", 1), ("+Inf", 1)):
        name = "xenmapcache_ioreq_handler_seconds_bucket"
        assert registry.get_sample_value(name, labels | {"le": bound}) == number
    assert lines(registry, "quiesce_seconds_sum") == ['quiesce_seconds_sum{cache="web"} 0.03']
    assert lines(registry, "quiesce_failures_total")[0].endswith(" 1.0")
    assert lines(registry, "events_lost_total")[0].endswith(" 2.0")


def test_a_cache_without_a_server_has_no_metrics_of_one(
    cache: MapCache, registry: CollectorRegistry
) -> None:
    """A reader of memory serves no requests."""
    metrics.export(cache, registry=registry)
    assert "ioreq" not in text(registry)
    assert "quiesce" not in text(registry)


def test_the_output_follows_openmetrics(
    fed: FedCache, server: FedServer, registry: CollectorRegistry
) -> None:
    """Its strict parser reads all of it."""
    metrics.export(fed, server, registry)
    fed.feed(LeaseTaken(SECOND, 1, "dma", 0, 0x100, "disk0", None, "", False))
    parse: Any = text_string_to_metric_families
    write: Any = openmetrics
    found = list(parse(write(registry).decode()))
    assert len(found) == len(FAMILIES)


def test_events_of_a_cache_and_a_server(
    domain: MockDomain, backend: Backend, registry: CollectorRegistry
) -> None:
    """What really happens is counted: a lease that is held across an INVALIDATE, and requests."""
    cache = MapCache(backend, on_stale="copy")
    server = IoreqServer(domain, cache)
    metrics.export(cache, server, registry, name="web")
    leases: list[Lease] = []

    @server.claim_ports(0x300, 1).write
    def write(*_: int) -> None:
        leases.append(cache.map_dma(0x1000, 0x2000, owner="disk0"))

    @server.on_quiesce
    def fail() -> None:
        raise ValueError

    with server, server.serving():
        domain.port_out(0x300, 1, 1)
        domain.balloon_out(0x1000, 0x2000)
        domain.balloon_in(0x1000, 0x1000)
        leases[0].view[:] = b"x" * 0x2000
        with pytest.raises(FaultError, match="no page at 0x2000"):
            leases[0].release()
        wait_for(lambda: lines(registry, "quiesce_seconds_count")[0].endswith(" 1.0"))
        found = {
            name: [line.split()[-1] for line in lines(registry, f"{name}_total")]
            for name in (
                "leases_taken",
                "leased_bytes",
                "stale_dma_released",
                "pages_copied",
                "pages_lost",
                "quiesce_failures",
            )
        }
        requests = dict(line.split() for line in lines(registry, "ioreqs_total"))
        held = lines(registry, "lease_held_seconds_count")
    assert found == {
        "leases_taken": ["1.0"],
        "leased_bytes": ["8192.0"],
        "stale_dma_released": ["1.0"],
        "pages_copied": ["1.0"],
        "pages_lost": ["1.0"],
        "quiesce_failures": ["1.0"],
    }
    assert requests['ioreqs_total{cache="web",kind="port"}'] == "1.0"
    assert requests['ioreqs_total{cache="web",kind="invalidate"}'] == "1.0"
    assert held == ['lease_held_seconds_count{cache="web",kind="dma",owner="disk0"} 1.0']
    cache.close()
    assert text(registry) == ""


def test_the_number_of_series(
    fed: FedCache, server: FedServer, registry: CollectorRegistry
) -> None:
    """As the guide says: 11 of a cache, 4 of an owner, 19 of a kind of leases, 113 of a server."""

    def count() -> int:
        return sum(not line.startswith("#") for line in text(registry).splitlines())

    with metrics.export(fed, registry=registry):
        assert count() == 11
        fed.feed(LeaseTaken(SECOND, 1, "device", 0, 0x100, "disk0", None, "", False))
        assert count() == 11 + 4 - 1 + 19  # only DMA is stale
        fed.feed(LeaseTaken(SECOND, 2, "dma", 0, 0x100, "disk0", None, "", False))
        assert count() == 11 + 4 + 2 * 19
    with metrics.export(fed, server, registry):
        assert count() == 11 + 113


def test_a_textfile(fed: FedCache, registry: CollectorRegistry, tmp_path: Path) -> None:
    """What node_exporter reads is the same text."""
    metrics.export(fed, registry=registry)
    path = tmp_path / "xenmapcache.prom"
    write_to_textfile(str(path), registry)
    assert "xenmapcache_resident_bytes" in path.read_text(encoding="utf-8")


# --- names --------------------------------------------------------------------------------


def test_caches_have_names(domain: MockDomain, registry: CollectorRegistry, tmp_path: Path) -> None:
    """The domain's number, or the file's path; several caches of one have numbers."""
    path = tmp_path / "ram\n.raw"
    path.write_bytes(bytes(4096))
    with (
        open_backend("mock", domain=domain) as backend,
        open_backend("raw", path=path) as image,
        MapCache(backend) as first,
        MapCache(backend) as second,
        MapCache(image) as third,
    ):
        exports = [metrics.export(each, registry=registry) for each in (first, second, third)]
        names = [each.name for each in exports]
        assert names[:2] == [f"domain {domain.domid}", f"domain {domain.domid} #2"]
        assert names[2] == str(path).replace("\n", r"\n")[:64]
        with pytest.raises(ValueError, match="the name 'domain 1 #2' belongs to another cache"):
            metrics.export(third, registry=registry, name="domain 1 #2")
        assert len(lines(registry, "resident_bytes")) == 3


def test_a_backend_without_number_and_path_has_its_own_name(
    backend: Backend, registry: CollectorRegistry
) -> None:
    """Any backend may be exported."""
    del vars(backend)["domid"]
    with MapCache(backend) as cache:
        assert metrics.export(cache, registry=registry).name == "mock"


def test_a_name_that_is_free_again(cache: MapCache, registry: CollectorRegistry) -> None:
    """It can be given to another export, and the first one's second close takes nothing out."""
    with metrics.export(cache, registry=registry, name="web") as first:
        pass
    metrics.export(cache, registry=registry, name="web")
    first.close()
    assert len(lines(registry, "resident_bytes")) == 1


# --- the end ------------------------------------------------------------------------------


def test_a_closed_export_is_gone(fed: FedCache, registry: CollectorRegistry) -> None:
    """Nothing of it is in the output, and it observes no longer."""
    export = metrics.export(fed, registry=registry)
    assert len(fed.fed.observations) == 1
    export.close()
    export.close()
    assert text(registry) == ""
    assert len(fed.fed.observations) == 0


def test_a_closed_cache_is_gone(fed: FedCache, registry: CollectorRegistry) -> None:
    """Its last event takes it out of the output."""
    metrics.export(fed, registry=registry)
    fed.feed(CacheClosed(SECOND))
    assert text(registry) == ""


def test_a_freed_cache_is_gone(backend: Backend, registry: CollectorRegistry) -> None:
    """The registry does not keep it alive."""
    cache: MapCache | None = MapCache(backend)
    assert cache is not None
    export = metrics.export(cache, registry=registry, name="web")
    del cache
    gc.collect()
    assert export.is_gone
    assert export._held() == set()
    assert text(registry) == ""
    with MapCache(backend) as other:
        assert metrics.export(other, registry=registry, name="web").name == "web"


def test_a_cache_that_is_freed_while_it_is_collected(
    backend: Backend, registry: CollectorRegistry
) -> None:
    """It has no samples then."""
    cache: MapCache | None = MapCache(backend)
    assert cache is not None
    export = metrics.export(cache, registry=registry)
    del cache
    gc.collect()
    export.ask()
    export.collect(lambda *_: pytest.fail("a sample"), 0.0)
    assert export.default_name() == "cache"
    stats, _ = export._stats.answer(time.monotonic() + 60)
    assert stats is None


def test_a_server_that_is_freed(domain: MockDomain, fed: FedCache) -> None:
    """What it did stays in the output; it does nothing any more."""
    registry = CollectorRegistry()
    server: FedServer | None = FedServer(domain, fed)
    metrics.export(fed, server, registry)
    del server
    gc.collect()
    assert lines(registry, "ioreq_in_progress_seconds")[0].endswith(" 0.0")


# --- programs that are stuck ----------------------------------------------------------------


def test_a_cache_that_does_not_answer(
    fed: FedCache, registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output has its last counters, how old they are, and the leases of now."""
    monkeypatch.setattr(metrics, "ANSWER_SECONDS", 0.01)
    metrics.export(fed, registry=registry, name="web")
    fed.read(0, 1)
    lock = fed._budget.lock
    with lock:
        fed.map_dma(0, 0x10, owner="disk0")
        assert lines(registry, "resident_bytes") == []
        first = registry.get_sample_value("xenmapcache_stats_age_seconds", {"cache": "web"})
        assert first is not None
        assert first > 0
        assert lines(registry, "leases") == ['leases{cache="web",kind="dma",owner="other"} 1.0']
        assert [each.name for each in threading.enumerate()].count("xenmapcache metrics") == 1
    wait_for(lambda: lines(registry, "stats_age_seconds")[0].endswith(" 0.0"))
    with lock:
        assert lines(registry, "maps_total") == ['maps_total{cache="web"} 1.0']
        assert not lines(registry, "stats_age_seconds")[0].endswith(" 0.0")


@pytest.mark.parametrize("stuck", ["quiesce", "ioreq"])
def test_a_callback_or_handler_that_does_not_return(
    stuck: str,
    domain: MockDomain,
    fed: FedCache,
    server: FedServer,
    registry: CollectorRegistry,
) -> None:
    """It is visible while it runs, and no longer after it; the other one is not."""
    metrics.export(fed, server, registry, name="web")
    go_on = threading.Event()
    server.claim_ports(0x300, 1).write(lambda *_: go_on.wait())
    server.on_quiesce(go_on.wait)

    def ages() -> dict[str, float | None]:
        return {
            what: registry.get_sample_value(
                f"xenmapcache_{what}_in_progress_seconds", {"cache": "web"}
            )
            for what in ("quiesce", "ioreq")
        }

    with server, server.serving():
        assert ages() == {"quiesce": 0, "ioreq": 0}
        if stuck == "quiesce":
            thread, _ = in_thread(lambda: domain.balloon_out(0x10000, 0x1000))
        else:
            thread, _ = in_thread(lambda: domain.port_out(0x300, 1, 1))
        wait_for(lambda: ages()[stuck] != 0)
        assert {what: age != 0 for what, age in ages().items() if age != 0} == {stuck: True}
        go_on.set()
        thread.join()
        wait_for(lambda: ages()[stuck] == 0)


def test_a_log_handler_that_does_not_return_is_no_callback(
    domain: MockDomain, server: FedServer
) -> None:
    """While the server logs a failure, no callback of on_quiesce runs."""
    seen = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(metrics.in_progress(server))

    handler = Handler()
    logger = logging.getLogger("xenmapcache.devicemodel")
    logger.addHandler(handler)
    try:
        server.claim_ports(0x300, 1).read(lambda *_: 0x1FF)  # does not fit
        with server, server.serving():
            domain.port_in(0x300, 1)
            wait_for(lambda: bool(seen))
    finally:
        logger.removeHandler(handler)
    assert [(handler > 0, quiesce) for handler, quiesce in seen] == [(True, 0.0)]


# --- what is refused ------------------------------------------------------------------------


def test_without_the_package(cache: MapCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to install."""
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(BackendUnavailableError, match=r"'xenmapcache\[metrics\]'"):
        metrics.export(cache)


def test_a_closed_cache(cache: MapCache, registry: CollectorRegistry) -> None:
    """It cannot be exported, and leaves nothing in the output."""
    cache.close()
    with pytest.raises(ClosedError):
        metrics.export(cache, registry=registry)
    assert text(registry) == ""


def test_a_negative_number_of_owners(cache: MapCache, registry: CollectorRegistry) -> None:
    """It is refused at once."""
    with pytest.raises(ValueError, match="max_owners must be at least 0, not -1"):
        metrics.export(cache, registry=registry, max_owners=-1)


def test_metrics_of_others_with_such_names(cache: MapCache, registry: CollectorRegistry) -> None:
    """A registry does not have a metric twice."""
    Gauge("xenmapcache_resident_bytes", "of another program", registry=registry)
    with pytest.raises(ValueError, match="xenmapcache_resident_bytes"):
        metrics.export(cache, registry=registry)


def test_the_registry_of_the_process(cache: MapCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without another one it is taken."""
    registry = CollectorRegistry()
    client = ModuleType("prometheus_client")
    client.__dict__["REGISTRY"] = registry
    monkeypatch.setitem(sys.modules, "prometheus_client", client)
    with metrics.export(cache):
        assert lines(registry, "resident_bytes")
