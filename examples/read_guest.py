"""Read a guest: find its kernel's banner, read numbers and strings, see where its holes are.

Without options it reads a mock guest, into which it puts a banner first. As root in
Dom0, ``--domid N`` reads a live one (``xl domid NAME`` says its number).
"""

import argparse
import re
from itertools import islice

from xenmapcache import Backend, GuestMemory, MapCache, MockHypervisor, open_backend

BANNER = re.compile(rb"Linux version \d[ -~]+")
MOCK_BANNER = (
    b"Linux version 6.1.0-18-amd64 (debian-kernel@lists.debian.org) (gcc-12 (Debian 12.2.0-14) "
    b"12.2.0) #1 SMP PREEMPT_DYNAMIC Debian 6.1.76-1 (2024-02-01)\n\0"
)
SEARCH_LIVE = 2 << 30  # an Arm guest has nothing below 1 GiB
BASE_MEMORY = 0x413  # in the BIOS data area: KiB below the first hole, 0 without a BIOS


def open_mock() -> Backend:
    """Return a mock guest with a PC's hole below 1 MiB, a ballooned one, and a banner."""
    holes = [(0xA0000, 0x20000), (0x1400000, 0x200000)]
    guest = MockHypervisor().create_domain(memory="32M", holes=holes)
    guest.write(0, bytes.fromhex("53ff00f0") * 256)  # interrupt vectors, as a BIOS leaves them
    guest.write(BASE_MEMORY, (640).to_bytes(2, "little"))
    guest.write(0x1E00060, MOCK_BANNER)
    return open_backend("mock", domain=guest)


def report(memory: GuestMemory, length: int) -> None:
    """Print what is found below ``length``, in bytes."""
    ranges = list(islice(memory.cache.present(0, length), 10))
    first = ranges[0][0] if ranges else length
    if first == 0:  # on a PC
        print(f"base memory: {memory.read_u16(BASE_MEMORY)} KiB")
    if ranges:
        print(f"first 8 bytes, at {first:#x}: {memory.read_u64(first):#018x}")
    address, _ = next(memory.find(BANNER, first, length - first), (None, b""))
    if address is None:
        print(f"no kernel banner below {length:#x}")
    else:
        print(f"kernel banner at {address:#x}: {memory.read_cstring(address).decode().strip()}")
    print("present, at most 10 ranges:")
    for start, size in ranges:
        print(f"  {start:#011x}..{start + size:#011x}  {size >> 10:>8,} KiB")


def main() -> None:
    """Open the guest that was asked for and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--domid", type=int, metavar="N", help="read this live guest")
    source.add_argument("--mock", action="store_true", help="read a mock guest (the default)")
    domid = parser.parse_args().domid
    with (
        open_mock() if domid is None else open_backend("xen", domid=domid) as backend,
        MapCache(backend) as cache,
    ):
        report(GuestMemory(cache), cache.memory_end or SEARCH_LIVE)


if __name__ == "__main__":
    main()
