"""VMCOREINFO: the text in which a Linux kernel describes itself for those who read its memory.

The kernel keeps it in a page of its own: lines of ``KEY=VALUE``, and zeros after them. Debuggers
take page tables and the place of the kernel from it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from ..address import ADDRESS_LIMIT, PAGE_SIZE

START = b"OSRELEASE="
"""How the text begins, at the beginning of a page."""
NOTE_NAME = "VMCOREINFO"
"""The name of the note that has the text, in an ELF core."""

_TEXT = re.compile(rb"(?:[A-Z][ -<>-~]*=[ -~]*\n)+")
_UTS_BYTES = 512
"""More than struct uts_namespace has before and in its strings."""
_KERNEL_MAP = 0xFFFFFFFF80000000
"""Where x86-64 kernels have their image: __START_KERNEL_map."""


class VmcoreInfo(NamedTuple):
    """A VMCOREINFO text that was found in a guest's memory. Immutable.

    Attributes:
        address: guest-physical, of its page.
        text: the lines.
    """

    address: int
    text: str

    def value(self, key: str) -> str | None:
        """Return the value of a line, such as ``NUMBER(phys_base)``; None if no line has it."""
        for line in self.text.splitlines():
            name, _, value = line.partition("=")
            if name == key:
                return value
        return None

    def describes(self, read: Callable[[int, int], bytes]) -> bool:
        """Tell whether the kernel that it describes is in memory, where it says.

        A guest that was rebooted may still have the page of the kernel before. Only kernels of
        x86-64 and arm64 can be checked; for others it is False.

        Args:
            read: returns a range of memory, or less where pages are missing.
        """
        place = self._uts_namespace()
        if place is None:
            return False
        release = self.value("OSRELEASE")
        return bool(release) and f"\0{release}\0".encode() in read(place, _UTS_BYTES)

    def _uts_namespace(self) -> int | None:
        """Return where ``init_uts_ns`` should be, which has the kernel's release, too."""
        try:
            symbol = int(self.value("SYMBOL(init_uts_ns)") or "", 16)
            offset = self.value("NUMBER(kimage_voffset)")  # arm64 kernels have it
            if offset is not None:
                place = symbol - int(offset, 16)
            else:
                place = symbol - _KERNEL_MAP + int(self.value("NUMBER(phys_base)") or "")
        except ValueError:
            return None
        return place if 0 <= place <= ADDRESS_LIMIT - _UTS_BYTES else None


def in_pages(data: bytes | bytearray, address: int) -> Iterator[VmcoreInfo]:
    """Yield the texts in some pages.

    Args:
        data: the pages.
        address: guest-physical, of the first one.
    """
    # A look at each page takes less time than a search through all of them.
    for position in range(0, len(data), PAGE_SIZE):
        if data.startswith(START, position):
            text = bytes(data[position : position + PAGE_SIZE]).partition(b"\0")[0]
            if len(text) == PAGE_SIZE:  # the kernel cuts off what does not fit
                text = text[: text.rfind(b"\n") + 1]
            if b"\nPAGESIZE=" in text and _TEXT.fullmatch(text):
                yield VmcoreInfo(address + position, text.decode("ascii"))


def choose(
    candidates: Iterable[VmcoreInfo], read: Callable[[int, int], bytes]
) -> VmcoreInfo | None:
    """Return the first text whose kernel is in memory, or the first one; None without any.

    Args:
        candidates: texts, in ascending order of address.
        read: as for :meth:`VmcoreInfo.describes`.
    """
    first = None
    for each in candidates:
        if each.describes(read):
            return each
        first = first or each
    return first
