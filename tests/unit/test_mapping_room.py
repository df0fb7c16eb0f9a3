"""How much of a live guest a cache maps by default."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fake_xen import DOMID
from tests.fake_xen.fixtures import MakeFake
from tests.fake_xen.fixtures import make_fake as make_fake
from xenmapcache import MapCache, open_backend
from xenmapcache.address import GiB, MiB
from xenmapcache.backend import RoomUser
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


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Have no garbage collected but that to which the last reference is gone."""
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def gibibyte(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Have Dom0 be of Arm, with 1 GiB available."""
    for name, text in (("GUEST_TYPE", "Xen\n"), ("MEMINFO", MEMINFO.format(1 << 20))):
        file = tmp_path / name
        file.write_text(text)
        monkeypatch.setattr(room, name, file)


@pytest.mark.usefixtures("gibibyte")
def test_caches_of_one_process_leave_room_for_each_other(make_fake: MakeFake) -> None:
    """Each gets a quarter of what the others may not map, so that all of them get less than all."""
    with open_backend("xen", domid=DOMID, library=make_fake().library) as backend:
        first = MapCache(backend)
        second = MapCache(backend)
        assert [first.max_resident, second.max_resident] == [256 * MiB, 192 * MiB]
        assert backend.mapping_room == 144 * MiB
        many = [MapCache(backend) for _ in range(5)]
        assert sum(cache.max_resident for cache in (first, second, *many)) < GiB
        assert many[-1].max_resident == backend.mapping_room == 64 * MiB


@pytest.mark.usefixtures("gibibyte", "no_collector")
def test_what_counts_of_another_cache(make_fake: MakeFake) -> None:
    """What it may still map: the available memory tells of the rest. A closed one maps nothing."""
    with open_backend("xen", domid=DOMID, library=make_fake().library) as backend:
        given = MapCache(backend, max_resident="512MiB")
        assert backend.mapping_room == 128 * MiB
        given.read(0, 1)
        mapped = given.stats().resident_bytes
        assert mapped > 0
        assert backend.mapping_room == 128 * MiB + mapped // 4
        given.close()
        assert backend.mapping_room == 256 * MiB
        MapCache(backend)  # is dropped at once, without waiting for the collector
        assert backend.mapping_room == 256 * MiB


@pytest.mark.usefixtures("gibibyte")
def test_two_threads_that_make_caches_at_once(
    make_fake: MakeFake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that is being made counts already, with the most that it can get."""
    with open_backend("xen", domid=DOMID, library=make_fake().library) as backend:
        part_of, amid = room._part_of, list[int]()

        def interrupted(available: int, new: RoomUser | None = None) -> int:
            if not amid:
                amid.append(0)
                amid[0] = MapCache(backend).max_resident
            return part_of(available, new)

        monkeypatch.setattr(room, "_part_of", interrupted)
        outer = MapCache(backend)
        assert amid == [192 * MiB]
        assert outer.max_resident == 256 * MiB
