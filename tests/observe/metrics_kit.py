"""What the tests of metrics share: a cache whose events are fed by hand, and its output."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest

from xenmapcache import Backend, MapCache, MockDomain
from xenmapcache.devicemodel import IoreqServer
from xenmapcache.events import Event
from xenmapcache.stream import EventStream, Observation, Observer

MS = 1_000_000
SECOND = 1000 * MS


class Fed:
    """A source of events that a test feeds."""

    def __init__(self) -> None:
        self.fed = EventStream()

    def observe(self, observer: Observer) -> Observation:
        """Have a function called with each event."""
        return self.fed.attach(observer)

    def feed(self, *events: Event) -> None:
        """Tell observers of events."""
        for event in events:
            self.fed.put(event)
        self.fed.deliver()


class FedCache(Fed, MapCache):
    """A cache whose observers get what a test feeds, and nothing else."""

    def __init__(self, backend: Backend) -> None:
        Fed.__init__(self)
        MapCache.__init__(self, backend, bucket_shift=16)


class FedServer(Fed, IoreqServer):
    """A server whose observers get what a test feeds, and nothing else."""

    def __init__(self, domain: MockDomain, cache: MapCache) -> None:
        Fed.__init__(self)
        IoreqServer.__init__(self, domain, cache)


def text(registry: CollectorRegistry) -> str:
    """Return the output of a registry."""
    return generate_latest(registry).decode()


def lines(registry: CollectorRegistry, name: str) -> list[str]:
    """Return the samples of a metric, without ``xenmapcache_``."""
    return [
        line.removeprefix("xenmapcache_")
        for line in text(registry).splitlines()
        if line.startswith(f"xenmapcache_{name}{{")
    ]
