"""A disk's DMA loop: data moves straight between a file and guest memory, without a copy.

Each request is a scatter-gather list. Its pieces are leased for just as long as one
``preadv`` or ``pwritev`` takes, so that the guest may balloon between any two
requests. In the end a checksum, taken from the guest's side, says whether all arrived.
"""

import os
import random
import tempfile
import zlib

from xenmapcache import (
    DmaDirection,
    GuestMemory,
    MapCache,
    MockDomain,
    MockHypervisor,
    open_backend,
)

SECTOR, DISK_SIZE, GUEST_SIZE = 512, 1 << 20, 16 << 20
REQUESTS, BALLOON_EVERY = 4000, 250

Ranges = list[tuple[int, int]]


def read_from_disk(memory: GuestMemory, disk: int, offset: int, ranges: Ranges) -> None:
    """Serve a guest's read request: fill its memory from the disk."""
    way = DmaDirection.FROM_DEVICE
    with memory.segments(ranges, owner="disk0 read", direction=way) as segments:
        segments.read_from(disk, offset)


def write_to_disk(memory: GuestMemory, disk: int, offset: int, ranges: Ranges) -> None:
    """Serve a guest's write request."""
    way = DmaDirection.TO_DEVICE
    with memory.segments(ranges, owner="disk0 write", direction=way) as segments:
        segments.write_to(disk, offset)


def make_request(rng: random.Random) -> tuple[int, Ranges]:
    """Return a place on the disk and 1 to 8 pieces of guest memory, which do not overlap."""
    pages = rng.sample(range(GUEST_SIZE >> 12), rng.randint(1, 8))
    ranges = [(page << 12, SECTOR * rng.randint(1, 8)) for page in pages]
    sectors = sum(length for _, length in ranges) // SECTOR
    return SECTOR * rng.randrange(DISK_SIZE // SECTOR - sectors), ranges


def guest_checksum(guest: MockDomain, ranges: Ranges) -> int:
    """Return the CRC-32 of what the guest itself sees."""
    return zlib.crc32(b"".join(guest.read(address, length) for address, length in ranges))


def main() -> None:
    """Serve requests, with ballooning between them, and verify each."""
    rng = random.Random(1)  # noqa: S311 - the same requests each time
    guest = MockHypervisor().create_domain(memory=GUEST_SIZE)
    pieces = moved = wrong = 0
    with (
        tempfile.TemporaryFile() as file,
        open_backend("mock", domain=guest) as backend,
        MapCache(backend) as cache,
    ):
        guest.on_invalidate(cache.invalidate)
        disk, memory = file.fileno(), GuestMemory(cache)
        os.pwrite(disk, rng.randbytes(DISK_SIZE), 0)
        for number in range(REQUESTS):
            offset, ranges = make_request(rng)
            length = sum(size for _, size in ranges)
            if number % 4:
                read_from_disk(memory, disk, offset, ranges)
            else:
                for address, size in ranges:
                    guest.write(address, rng.randbytes(size))
                write_to_disk(memory, disk, offset, ranges)
            on_disk = zlib.crc32(os.pread(disk, length, offset))
            wrong += guest_checksum(guest, ranges) != on_disk
            pieces, moved = pieces + len(ranges), moved + length
            if not (number + 1) % BALLOON_EVERY:
                place = rng.randrange(GUEST_SIZE >> 20) << 20
                guest.balloon_out(place, 1 << 20)
                guest.balloon_in(place, 1 << 20)
        stats = cache.stats()
    print(f"requests       {REQUESTS:>10,}  with a checksum that is wrong: {wrong}")
    print(f"pieces         {pieces:>10,}  each leased and released")
    print(f"bytes moved    {moved:>10,}")
    print(f"invalidations  {stats.invalidations:>10,}  that met DMA: {stats.stale_dma_released}")
    print(f"map calls      {stats.maps:>10,}  {stats.maps / REQUESTS:.3f} a request")


if __name__ == "__main__":
    main()
