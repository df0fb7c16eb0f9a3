"""A guest's screen, saved as PNG: a device lease over its framebuffer, held for long.

A framebuffer is device memory. It is mapped once, for as long as the device lives, and
stays mapped while the guest balloons; when the guest moves it, ``replace`` lets the same
lease show the new place, at the same host address. Its pixels are 32 bits: blue, green,
red and one that is not used.

Without ``--domid`` a mock guest draws, balloons, and moves its framebuffer through a port.
In Dom0 it saves a real guest's screen:
``framebuffer.py --domid 3 --address 0xf1000000 --width 800 --height 600 --stride 3200 -o a.png``.
The address is that of BAR 0 of the guest's VGA device. hvmloader chooses it, so ask:
``xl qemu-monitor-command GUEST "info pci"`` in Dom0, or ``lspci -v -d ::0300`` in the guest.
The guest's /sys/class/graphics/fb0 has the size (``virtual_size``) and the stride.
"""

import argparse
import struct
import tempfile
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from xenmapcache import MapCache, MockDomain, MockHypervisor, open_backend
from xenmapcache.devicemodel import IoreqServer

PIXEL = 4
PORT = 0x520  # write: where the framebuffer is from now on; read: where it is


class Display:
    """A framebuffer of the guest, and the port through which the guest moves it."""

    def __init__(self, cache: MapCache, address: int, width: int, height: int, stride: int) -> None:
        if not 0 < width * PIXEL <= stride:
            raise ValueError(f"a row of {width} pixels does not fit a stride of {stride} bytes")
        self._cache = cache
        self.width, self.height, self._stride = width, height, stride
        self.lease = cache.map_device(address, stride * height, owner="display", writable=False)

    def read(self, offset: int, size: int) -> int:
        """Answer the guest's ``in``."""
        return self.lease.address

    def write(self, offset: int, size: int, value: int) -> None:
        """Take the guest's ``out``: its framebuffer is elsewhere now."""
        self._cache.replace(self.lease.address, value, self.lease.length)

    def rows(self) -> Iterator[bytes]:
        """Yield what each row shows now, three bytes a pixel: red, green, blue."""
        screen = self.lease.view
        for start in range(0, self._stride * self.height, self._stride):
            pixels = bytes(screen[start : start + self.width * PIXEL])
            row = bytearray(self.width * 3)
            row[0::3], row[1::3], row[2::3] = pixels[2::4], pixels[1::4], pixels[0::4]
            yield bytes(row)

    def save(self, file: Path) -> None:
        """Write what it shows as PNG."""
        # 8 bits a channel, RGB, no interlace; each row begins with its filter: none.
        header = struct.pack(">IIBBBBB", self.width, self.height, 8, 2, 0, 0, 0)
        picture = zlib.compress(b"".join(b"\0" + row for row in self.rows()))
        chunks = [(b"IHDR", header), (b"IDAT", picture), (b"IEND", b"")]
        with file.open("wb") as png:
            png.write(b"\x89PNG\r\n\x1a\n")
            for kind, data in chunks:
                checksum = zlib.crc32(kind + data)
                png.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum))

    def close(self) -> None:
        """Let the framebuffer go."""
        self.lease.release()


def draw(guest: MockDomain, address: int, radius: int) -> None:
    """Draw, as the guest, a disc over a night sky: 320 x 200 pixels in rows of 1536 bytes."""
    for y in range(200):
        row = bytearray()
        for x in range(320):
            inside = (x - 160) ** 2 + (y - 100) ** 2 < radius**2
            row += bytes((64, 224, 255, 0) if inside else (y // 2, 16, 0, 0))
        guest.write(address + 1536 * y, bytes(row))


def describe(display: Display) -> None:
    """Print a picture of a few letters, and a checksum of all pixels."""
    rows = list(display.rows())
    for row in rows[10::20]:
        letters = "".join(" #"[red > 127] for red in row[0 :: 3 * 8])
        print(f"    {letters}".rstrip())
    print(f"    checksum of the pixels: {zlib.crc32(b''.join(rows)):08x}")


def demonstrate(file: Path) -> None:
    """Show a mock guest's screen while it balloons, draws, and moves its framebuffer."""
    here, there = 0x100_0000, 0x280_0000
    guest = MockHypervisor().create_domain(memory="64M")
    with open_backend("mock", domain=guest) as backend, MapCache(backend) as cache:
        server = IoreqServer(guest, cache)
        display = Display(cache, here, 320, 200, 1536)
        server.claim_ports(PORT, 4, display)
        with server, server.serving():
            mapped = cache.stats().maps
            host_address = display.lease.host_address

            print("The guest draws:")
            draw(guest, here, 40)
            display.save(file)
            describe(display)

            print("It balloons 8 MiB out, next to the framebuffer, and draws again:")
            guest.balloon_out(0x200_0000, 0x80_0000)
            draw(guest, here, 80)
            display.save(file)
            describe(display)
            print(f"    {server.invalidations} times all mappings had to go, the lease stayed")

            print("It gets the memory back, and moves its framebuffer there:")
            guest.balloon_in(0x200_0000, 0x80_0000)
            draw(guest, there, 60)
            guest.port_out(PORT, there)
            display.save(file)
            describe(display)
            print(f"    the guest reads {guest.port_in(PORT):#x} from the port")
            same = display.lease.host_address == host_address
            print(f"    the host address is {'the same' if same else 'ANOTHER'}")
            print(f"    mappings made since the beginning: {cache.stats().maps - mapped}")
        display.close()


def main() -> None:
    """Save the screen of the guest that was asked for."""
    parser = argparse.ArgumentParser(description="Save a guest's screen as PNG.")
    parser.add_argument("--domid", type=int, metavar="N", help="a real guest; without it a mock")
    parser.add_argument("--address", type=partial(int, base=0), help="where its framebuffer is")
    parser.add_argument("--width", type=int, help="in pixels of 32 bits")
    parser.add_argument("--height", type=int, help="in rows")
    parser.add_argument("--stride", type=int, help="bytes from row to row (width * 4)")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="the picture")
    arguments = parser.parse_args()
    if arguments.domid is None:
        with tempfile.TemporaryDirectory() as folder:
            demonstrate(arguments.output or Path(folder, "screen.png"))
        return
    if None in (arguments.address, arguments.width, arguments.height, arguments.output):
        parser.error("--domid wants --address, --width, --height and --output")
    stride = arguments.stride or arguments.width * PIXEL
    with open_backend("xen", domid=arguments.domid) as backend, MapCache(backend) as cache:
        display = Display(cache, arguments.address, arguments.width, arguments.height, stride)
        display.save(arguments.output)
        display.close()


if __name__ == "__main__":
    main()
