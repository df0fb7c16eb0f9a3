"""Fixtures for tests of leases: what was logged, and each policy for stale ones."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest


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
