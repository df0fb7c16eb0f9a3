"""QEMU's logs, written as the facts about its forms say: lines, and the binary form."""

from __future__ import annotations

import struct
from pathlib import Path

REAL = Path(__file__).parents[3] / "shared" / "data"
"""Logs of a lab, where they are kept next to the checkout."""

HELD = (
    "Locked DMA mapping while invalidating mapcache! 00000000000000af -> 0x7fe1cca01800 is present"
)
INVALIDATE = (
    "handle_ioreq I/O=0x7fff1b826010 type=8 dir=0 df=0 ptr=0 port=0x0 data=0x0 count=0 size=4"
)


def hit(address: int, host: int = 0x7F00_0000_0000) -> list[str]:
    return [f"xen_map_cache want {address:#x}", f"xen_map_cache_return {host + address:#x}"]


def miss(address: int, host: int = 0x7F00_0000_0000, shift: int = 20) -> list[str]:
    first, last = hit(address, host)
    return [first, f"xen_remap_bucket index {address >> shift:#x}", last]


def ioreq(kind: int, address: int, *, read: bool = False, data: int = 0) -> str:
    return (
        f"handle_ioreq I/O=0x7ffe853c3100 type={kind} dir={read:d} df=0 ptr=0 port={address:#x} "
        f"data={data:#x} count=1 size=1"
    )


def text(*lines: str, prefix: str = "") -> bytes:
    """Return a log; the prefix may have ``{}`` for microseconds that count up."""
    return "".join(f"{prefix.format(number)}{line}\n" for number, line in enumerate(lines)).encode()


PREFIXES = {"plain": "", "pid": "223@1795888038.{:06}:", "iso": "2025-07-21T18:43:28.{:06}Z "}


def header(version: int = 4, mark: str = "<") -> bytes:
    return struct.pack(f"{mark}QQQ", 0xFFFFFFFFFFFFFFFF, 0xF2B177CB0AA429B4, version)


def mapping(number: int, name: str, mark: str = "<") -> bytes:
    return struct.pack(f"{mark}QQL", 0, number, len(name)) + name.encode()


def record(number: int, time: int, *numbers: int, mark: str = "<") -> bytes:
    size = 24 + 8 * len(numbers)
    return struct.pack(f"{mark}QQQII{len(numbers)}Q", 1, number, time, size, 77, *numbers)


NUMBERS = {
    name: number
    for number, name in enumerate(
        (
            "some_other_event", "xen_map_cache", "xen_remap_bucket", "xen_map_cache_return",
            "handle_ioreq", "xen_invalidate_map_cache", "xen_map_cache_init",
        )
    )
}  # fmt: skip


def trace(*events: tuple[str, int, tuple[int, ...]], mark: str = "<") -> bytes:
    """Return a binary trace of events: name, time in ns, numbers."""
    begin = header(mark=mark) + b"".join(mapping(NUMBERS[name], name, mark) for name in NUMBERS)
    return begin + b"".join(
        record(NUMBERS[name], time, *numbers, mark=mark) for name, time, numbers in events
    )
