"""Fixtures for tests of leases: what was logged, and each policy for stale ones."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest

from xenmapcache import Lease, LeaseKind, MapCache
from xenmapcache.cache.record import LeaseRecord


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """What was logged as a WARNING so far."""
    with caplog.at_level(logging.INFO, "xenmapcache"):
        yield lambda: [
            record.getMessage() for record in caplog.records if record.levelno == logging.WARNING
        ]


@pytest.fixture(params=["warn", "raise", "copy"])
def policy(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Refusal(logging.Filter):
    """Raises at the first record that it sees."""

    armed = True

    def filter(self, record: logging.LogRecord) -> bool:
        if self.armed:
            self.armed = False
            raise KeyboardInterrupt
        return True


@pytest.fixture
def interrupted() -> Iterator[None]:
    """The next warning is interrupted."""
    refusal = Refusal()
    logger = logging.getLogger("xenmapcache")
    logger.addFilter(refusal)
    yield
    logger.removeFilter(refusal)


@pytest.fixture
def overtaken(cache: MapCache, monkeypatch: pytest.MonkeyPatch) -> Callable[[Lease], None]:
    """A function that lets a lease be released by another thread right after it was looked up."""
    registry = cache._registry
    held = registry.held

    def overtake(lease: Lease) -> None:
        def released_since(only: LeaseKind | None = None) -> list[LeaseRecord]:
            found = held(only)
            if not lease.released:
                lease.release()
            return found

        monkeypatch.setattr(registry, "held", released_since)

    return overtake
