"""A program that uses the package. ``make lint`` checks that its types are found once installed."""

from __future__ import annotations

from typing import assert_type

from xenmapcache import DmaDirection, MapCache, open_backend


def main() -> None:
    """Use the cache and a lease."""
    with open_backend("mock", memory="1M") as backend, MapCache(backend) as cache:
        assert_type(cache.read(0, 1), bytes)
        with cache.map_dma(0, 1, owner="disk", direction=DmaDirection.TO_DEVICE) as lease:
            assert_type(lease.view, memoryview)


if __name__ == "__main__":
    main()
