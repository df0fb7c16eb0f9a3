"""What a device model costs on a real Xen. Nothing here fails because it is slow."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.xen.agent import MEMORY
from tests.xen.conftest import Recorder, Serve, Served, balloon, load_example
from xenmapcache import DmaDirection, MapCache
from xenmapcache.address import MiB
from xenmapcache.cache import Invalidation
from xenmapcache.cache.lease import Lease

pytestmark = [pytest.mark.xen, pytest.mark.slow, pytest.mark.benchmark]

PORT = 0x510
Record = Callable[[str, object], None]


class MapPerAccess(MapCache):
    """Maps and unmaps for each transfer, as a device model without a cache does."""

    def map_dma(
        self,
        address: int,
        length: int,
        *,
        owner: str,
        direction: DmaDirection | str = DmaDirection.BIDIRECTIONAL,
    ) -> Lease:
        """Make a mapping that dies with its release."""
        writable = DmaDirection(direction) is not DmaDirection.TO_DEVICE
        return self.map_device(address, length, owner=owner, writable=writable)


class Timed(MapCache):
    """Notes how long each invalidation takes."""

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)  # type: ignore[arg-type] # whatever it takes
        self.times: list[float] = []

    def invalidate(self) -> Invalidation:
        """As ever, timed."""
        started = time.perf_counter()
        try:
            return super().invalidate()
        finally:
            self.times.append(time.perf_counter() - started)


def test_round_trips(served: Served, record_property: Record) -> None:
    """How many requests a second a guest gets answered."""
    count = 1000
    served.server.claim_ports(PORT, 4, Recorder())
    answered = served.server.requests
    seconds = served.agent.loop(PORT, count)
    assert served.server.requests >= answered + count
    record_property(
        "measured",
        f"{count / seconds:.0f} ioreq round trips a second ({seconds / count * 1e6:.0f} us each)",
    )


def test_map_per_access(serve: Serve, tmp_path: Path, record_property: Record) -> None:
    """The block device's work with the cache and without it, and the calls to map of each."""
    length = 2 * MiB
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(length))
    maps, times, work = [], [], []
    for kind in (MapCache, MapPerAccess):
        with serve(kind) as served:
            with load_example("block_device").BlockDevice(served.server, served.cache, disk):
                before = served.cache.stats().maps
                started = time.perf_counter()
                written, read, writes, reads = served.agent.use_disk(PORT, length, most=64)
                times.append(time.perf_counter() - started)
                maps.append(served.cache.stats().maps - before)
                work.append(writes + reads)
                assert written == read
    assert work[0] == work[1] == maps[1]
    assert maps[0] < maps[1]
    record_property(
        "measured",
        f"{work[0]} transfers, {2 * length // MiB} MiB: with the cache {maps[0]} calls to map and "
        f"{times[0]:.1f} s, mapped for each {maps[1]} calls and {times[1]:.1f} s: "
        f"1 to {times[1] / times[0]:.2f}",
    )


def test_a_burst_of_invalidates(serve: Serve, record_property: Record) -> None:
    """A guest that gives up memory asks many times; each costs one flush."""
    with serve(Timed) as served:
        cache = served.cache
        assert isinstance(cache, Timed)

        buckets = range(16 * MiB, 64 * MiB, MiB)
        for address in buckets:
            cache.read(address, 1)
        cache.times.clear()
        balloon(served, MEMORY - 28)
        count = served.server.invalidations
        assert len(cache.times) == count > 10
        ordered = sorted(cache.times)
        record_property(
            "measured",
            f"28 MiB in {count} INVALIDATEs; dropping all mappings took "
            f"{statistics.median(ordered) * 1e6:.0f} us (median), {ordered[-1] * 1e6:.0f} us "
            f"(worst, {len(buckets)} buckets), {sum(ordered) * 1e3:.1f} ms altogether",
        )
