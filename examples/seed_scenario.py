"""The scenario this package is made for: a guest balloons while a DMA mapping is held.

A device mapping (video memory) may stay mapped over that; a DMA mapping must not, and
is warned of, with its owner and address. Runs on the mock, without Xen.
"""

import logging
import sys

from xenmapcache import DmaDirection, MapCache, MockHypervisor, open_backend


def main() -> None:
    """Hold one mapping of each kind while the guest balloons."""
    logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(name)s: %(message)s")
    guest = MockHypervisor().create_domain(memory="16M")
    with open_backend("mock", domain=guest) as backend, MapCache(backend) as cache:
        guest.on_invalidate(cache.invalidate)  # what a device model does for each INVALIDATE

        video = cache.map_device(0xC00000, 0x400000, owner="vga")
        disk = cache.map_dma(0x345000, 512, owner="ide0", direction=DmaDirection.FROM_DEVICE)

        print("The guest gives 2 MiB up and gets them back:")
        guest.balloon_out(0x200000, 0x200000)
        guest.balloon_in(0x200000, 0x200000)
        print(f"{guest.invalidations} INVALIDATEs; stale: vga {video.stale}, ide0 {disk.stale}")

        print("The disk ends its transfer, too late:")
        disk.view[:11] = b"disk sector"
        disk.release()
        print(f"the guest sees {guest.read(0x345000, 11)!r}")

        print("Another transfer, mapped now, arrives:")
        with cache.map_dma(0x345000, 512, owner="ide0") as lease:
            lease.view[:11] = b"disk sector"
        print(f"the guest sees {guest.read(0x345000, 11)!r}")

        video.release()


if __name__ == "__main__":
    main()
