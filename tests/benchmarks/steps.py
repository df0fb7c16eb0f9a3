"""A few kinds of work, timed in a process of their own: what ``before`` runs over two trees.

``python steps.py IMAGE TIMES`` prints JSON: seconds by work. IMAGE is a file of ``xl save``, and
much is done TIMES times. It uses
nothing of the tests, and only what old versions of the package have too.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

from xenmapcache import GuestMemory, Lease, MapCache, MockHypervisor, open_backend

PAGE = 4096
TIMES = 2_000


def timed(work: Callable[[], object], repeats: int = 1) -> float:
    """Return the best processor time."""
    times = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return min(times)


def dma() -> float:
    with MapCache(open_backend("mock", memory="4M")) as cache:
        map_dma = cache.map_dma

        def work() -> None:
            for _ in range(TIMES):
                map_dma(PAGE, PAGE, owner="bench").release()

        return timed(work, 9)


def holed() -> float:
    """Read from a bucket that has a hole elsewhere."""
    domain = MockHypervisor().create_domain(memory="1M", holes=[(8 * PAGE, PAGE)])
    with MapCache(open_backend("mock", domain=domain)) as cache:
        read = cache.read

        def work() -> None:
            for _ in range(TIMES):
                read(PAGE, 8)

        return timed(work, 9)


def misses() -> float:
    """Read round and round through twice what fits."""
    size = TIMES * PAGE
    backend = open_backend("mock", memory=size)
    with MapCache(backend, bucket_shift=12, max_resident=size // 2) as cache:

        def work() -> None:
            for address in range(0, size, PAGE):
                cache.read(address, 8)

        work()
        return timed(work, 3)


def misses_beside_leases() -> float:
    """The same, while half of what fits is leased."""
    size = TIMES * PAGE
    backend = open_backend("mock", memory=size)
    with MapCache(backend, bucket_shift=12, max_resident=size // 2) as cache:
        leases = [
            cache.map_dma(address, PAGE, owner="bench") for address in range(0, size // 4, PAGE)
        ]

        def work() -> None:
            for address in range(size // 4, size, PAGE):
                cache.read(address, 8)

        work()
        taken = timed(work, 3)
        for lease in leases:
            lease.release()
        return taken


def invalidation() -> float:
    size = TIMES * PAGE
    with MapCache(open_backend("mock", memory=size), bucket_shift=12) as cache:
        for address in range(0, size, PAGE):
            cache.read(address, 8)
        return timed(cache.invalidate)


def replacing() -> float:
    """Move a device lease to and fro, with 1,000 DMA leases held."""
    with MapCache(open_backend("mock", memory="4M")) as cache:
        leases: list[Lease] = [cache.map_dma(0, PAGE, owner="bench") for _ in range(1000)]
        leases.append(cache.map_device(0, PAGE, owner="bench"))

        def work() -> None:
            for _ in range(50):
                cache.replace(0, PAGE, PAGE)
                cache.replace(PAGE, 0, PAGE)

        taken = timed(work, 9)
        for lease in leases:
            lease.release()
        return taken


def resolving() -> float:
    """Resolve the pointer of the last of 1,000 leases."""
    with MapCache(open_backend("mock", memory="4M")) as cache:
        leases = [cache.map_dma(number * 512, 512, owner="bench") for number in range(1000)]
        pointer = leases[-1].host_address
        taken = timed(lambda: [cache.resolve(pointer) for _ in range(20)], 9)
        for lease in leases:
            lease.release()
        return taken


def first_search(image: str) -> float:
    """Search a saved guest of which nothing is resident yet."""
    with open_backend("save", path=image) as backend, MapCache(backend) as cache:
        memory = GuestMemory(cache)
        return timed(lambda: list(memory.find(b"no such text in there")))


def works(image: str) -> dict[str, Callable[[], float]]:
    return {
        "map_dma + release": dma,
        "read of a bucket with a hole": holed,
        "miss + eviction": misses,
        "the same, half of it leased": misses_beside_leases,
        "invalidate": invalidation,
        "replace with 1,000 leases": replacing,
        "resolve among 1,000 leases": resolving,
        "first search of a saved guest": lambda: first_search(image),
    }


if __name__ == "__main__":
    TIMES = int(sys.argv[2])
    print(json.dumps({name: work() for name, work in works(sys.argv[1]).items()}))
