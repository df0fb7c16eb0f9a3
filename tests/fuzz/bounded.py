"""What tests of damaged files share: how many files there are, and what must hold for each."""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import HealthCheck, settings

from tests.effort import FUZZ
from tests.images.writers import check_parts
from xenmapcache.address import PAGE_SIZE
from xenmapcache.backends.elfcore import ElfCoreBackend
from xenmapcache.backends.raw import RawBackend

bounded = settings(
    max_examples=FUZZ,
    deadline=None,  # a limit in calls holds instead
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def write(path: Path, content: bytes) -> None:
    """Write a new file that was last changed long ago, or its backend would wait."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    os.utime(path, (1, 1))


def check_pages(backend: ElfCoreBackend | RawBackend, content: bytes) -> None:
    """Each page that is present is in the file, or is made of parts; they come in order."""
    check_parts(content, backend)
    in_parts = {run.gfn for run in backend.runs(0, 1 << 40) if run.fragments is not None}
    end = 0
    for gfn, count in backend.present(0, 1 << 40):
        assert end <= gfn
        end = gfn + count
        assert count <= 1 + len(content) // PAGE_SIZE + len(content) // 16
        mapping = backend.map(gfn, count, writable=False)
        assert mapping.errors is None
        for page in range(count):
            data = bytes(mapping.view(page * PAGE_SIZE, PAGE_SIZE))
            assert data in content or gfn + page in in_parts
    assert end * PAGE_SIZE == backend.memory_end
