"""Load a kernel into a mock guest, and read its banner out of the guest's memory.

Nothing boots. ``--kernel vmlinux`` takes a real one (an ELF file; a ``vmlinuz`` has to be
unpacked first, with Linux's ``scripts/extract-vmlinux``). Without it, a small ELF file that is
laid out as a kernel is written and loaded.
"""

import argparse
import re
import struct
import tempfile
from pathlib import Path

from xenmapcache import GuestMemory, MapCache, MockHypervisor, open_backend

BANNER = re.compile(rb"Linux version \d[ -~]+")
TEXT = b"Linux version 6.1.0-example (nobody@nowhere) (gcc-12) #1 SMP\n\0"
VIRTUAL, PHYSICAL = 0xFFFFFFFF81000000, 0x1000000  # where x86-64's kernels are linked to and put


def write_kernel(path: Path) -> None:
    """Write an ELF file of one segment, with the banner in it and a symbol for that."""
    banner = 0x1A0
    segment = b"\xf4".ljust(banner, b"\x90") + TEXT  # hlt, and nops after it
    names = b"\0.symtab\0.strtab\0.shstrtab\0"
    strings = b"\0linux_banner\0"
    symbols = bytes(24) + struct.pack(
        "<IBBHQQ", 1, 0x11, 0, 1, VIRTUAL + banner, len(TEXT)
    )  # global, an object, in section 1
    start = 0x1000
    where = start + len(segment)
    contents = [segment, symbols, strings, names]
    offsets = [start, where, where + len(symbols), where + len(symbols) + len(strings)]
    table = offsets[-1] + len(names)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\2\1\1",
        *(2, 62, 1, PHYSICAL, 64, table, 0, 64, 56, 1, 64, 5, 4),
    )
    program = struct.pack(
        "<IIQQQQQQ", 1, 5, start, VIRTUAL, PHYSICAL, len(segment), 0x8000, start
    )  # bytes that the file lacks of 0x8000 are zeros
    kinds = [(0, 1, 0, 0), (1, 2, 3, 24), (9, 3, 0, 0), (17, 3, 0, 0)]  # name, type, link, entry
    sections = bytes(64)
    for (name, kind, link, entry), offset, content in zip(kinds, offsets, contents, strict=True):
        sections += struct.pack(
            "<IIQQQQIIQQ", name, kind, 0, 0, offset, len(content), link, 1, 1, entry
        )
    path.write_bytes((header + program).ljust(start, b"\0") + b"".join(contents) + sections)


def report(kernel: Path) -> None:
    """Load a kernel and print what is found in the guest."""
    guest = MockHypervisor().create_domain(memory="256M")
    symbols = guest.load_elf(kernel)
    for address, length in symbols.segments:
        print(f"segment at {address:#x}, {length:#x} bytes")
    with open_backend("mock", domain=guest) as backend, MapCache(backend) as cache:
        memory = GuestMemory(cache)
        place = symbols.get("linux_banner")
        if place is None:  # Debian's kernels are stripped
            print(f"{len(symbols)} symbols, no linux_banner among them: searching")
            place = next((found for found, _ in memory.find(BANNER)), None)
        if place is None:
            raise SystemExit(f"there is no banner in {kernel}")
        print(f"linux_banner at {place:#x}: {memory.read_cstring(place).decode().strip()}")


def main() -> None:
    """Take the kernel that was given, or write one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernel", type=Path, metavar="VMLINUX", help="an ELF kernel")
    kernel = parser.parse_args().kernel
    if kernel is not None:
        report(kernel)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "vmlinux")
        write_kernel(path)
        report(path)


if __name__ == "__main__":
    main()
