"""How much of a live guest a cache maps by default."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fake_xen import DOMID
from tests.fake_xen.fixtures import MakeFake
from tests.fake_xen.fixtures import make_fake as make_fake
from xenmapcache import MapCache, open_backend
from xenmapcache.address import GiB, MiB
from xenmapcache.backends import room

MEMINFO = "MemTotal:  1048576 kB\nMemFree:  5 kB\nMemAvailable:  {} kB\n"


@pytest.mark.parametrize(
    ("kind", "meminfo", "expected"),
    [
        ("PV\n", MEMINFO.format(1 << 20), 32 * GiB),
        ("PVH\n", MEMINFO.format(1 << 20), 256 * MiB),
        ("Xen\n", MEMINFO.format(1 << 20), 256 * MiB),  # as on Arm
        ("Xen\n", MEMINFO.format(1 << 28), 32 * GiB),
        ("Xen\n", MEMINFO.format(1 << 10), 64 * MiB),
        ("Xen\n", "MemTotal: 5 kB\n", 32 * GiB),
        ("Xen\n", None, 32 * GiB),
        (None, MEMINFO.format(1 << 20), 32 * GiB),
    ],
)
def test_default_where_mapped_pages_take_memory(
    kind: str | None,
    meminfo: str | None,
    expected: int,
    make_fake: MakeFake,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """It is a quarter of the available memory, unless this is a PV Dom0 or nothing is known."""
    for name, text in (("GUEST_TYPE", kind), ("MEMINFO", meminfo)):
        file = tmp_path / name
        monkeypatch.setattr(room, name, file)
        if text is not None:
            file.write_text(text)
    with open_backend("xen", domid=DOMID, library=make_fake().library) as backend:
        assert MapCache(backend).max_resident == expected
        assert MapCache(backend, max_resident="5MiB").max_resident == 5 * MiB
