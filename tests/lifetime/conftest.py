"""Scripts that would crash or hang run as a user's would: unmeasured."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep coverage out of them: its lock, held by a thread at a fork, would stop the child."""
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
