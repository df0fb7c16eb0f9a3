"""AddressSpace: a guest's virtual addresses, through its page tables.

A guest writes its own page tables, and may write anything into them: tables that lead to
themselves, or nowhere. So no walk is longer than the levels, :meth:`AddressSpace.read` is bounded
by the guest's memory, and :meth:`AddressSpace.regions` enters no table that it is in already, none
again that led to nothing, and no more than a given number of tables.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Iterator
from typing import Final, Literal, cast

from ..address import ADDRESS_LIMIT, PAGE_MASK, PAGE_SIZE, as_int
from ..cache import MapCache
from ..errors import CacheFullError, FaultError, TranslationError, XenMapCacheError
from ..formats.pagetables import ENTRY_BYTES, NOT_MAPPED, PRESENT, TABLE, Rights, shape_of
from ..formats.vmcoreinfo import VmcoreInfo
from . import tablewalk
from .roots import layout_of_kernel, registers_of_cpu
from .virtual import MappedPage, Region, Step, as_array, merged, missing_page

__all__ = ["NOT_MAPPED", "AddressSpace", "MappedPage", "Region", "Rights", "Step", "missing_page"]

_VIRTUAL_END: Final = 1 << 64
_INDEX_MASK: Final = 0xFF8
"""Of an address that was shifted: the offset of its entry in a table."""
_MAX_TABLES: Final = 1 << 22
_ENTRY: Final = struct.Struct("<Q")
_LOOK: Final = "check the address, and that the root is that of its process or kernel"

_from_bytes = int.from_bytes


class AddressSpace:
    """Virtual addresses of a guest's process or kernel, by its page tables.

    The tables are read from the cache at each call: what a live guest changes is seen, and a
    call during a change may fail or give the old page.

    Args:
        cache: the cache to go through; it stays yours to close.
        root: guest-physical address of the first table: CR3, or TTBR0 or TTBR1 on arm64. Bits
            that are not part of an address are ignored.
        levels: of the tables: 4 or 5 on x86-64, 3 or 4 on arm64 (39 or 48 bits of address).
        machine: ``"x86-64"`` or ``"arm64"``, the latter with pages of 4 KiB.
        half: which addresses an arm64 root is for: ``"upper"``, the kernel's (TTBR1), or
            ``"lower"``, the processes' (TTBR0). x86-64 has both halves in one.

    Attributes:
        cache: as given.
        root: without the bits that are not part of an address.
        levels: as given.
        machine: as given.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has another value.

    Methods take any address from 0 to ``2**64 - 1``, as a guest may have chosen it. They succeed
    or raise a subclass of XenMapCacheError; ValueError and TypeError say that the program is
    wrong.

    Synchronization: as the cache; objects do not change.
    """

    def __init__(
        self,
        cache: MapCache,
        root: int,
        *,
        levels: int = 4,
        machine: str = "x86-64",
        half: Literal["upper", "lower"] = "upper",
    ) -> None:
        if not isinstance(cache, MapCache):
            raise TypeError(
                f"cache must be a MapCache, not {cache!r}; over a backend write "
                "AddressSpace(MapCache(backend), root)"
            )
        if half not in ("upper", "lower"):
            raise ValueError(f"half must be 'upper' or 'lower', not {half!r}")
        self._shape = shape = shape_of(machine, levels)
        number = as_int("root", root)
        if not 0 <= number < _VIRTUAL_END:
            raise ValueError(f"root must be an address from 0 to 2**64 - 1, not {number:#x}")
        self.cache = cache
        self.machine = machine
        self.levels = levels
        self.root = number & shape.address_mask
        # Where addresses are: x86-64 has the two ranges whose highest bits are all the same.
        bits = shape.bits if machine == "arm64" else shape.bits - 1
        lower, upper = (0, 1 << bits), (_VIRTUAL_END - (1 << bits), _VIRTUAL_END)
        halves = {"upper": [upper], "lower": [lower]}
        self._halves = halves[half] if machine == "arm64" else [lower, upper]
        self._top_shift = bits
        self._tops = tuple(start >> bits for start, _ in self._halves)
        # Of each level: what brings its index to the place of an entry's offset in the table.
        self._index_shifts = tuple(level.shift - 3 for level in shape.levels)
        self._last_offsets = {level.shift - 3: (1 << level.shift) - 1 for level in shape.levels}
        self._buckets = table = cache._table  # noqa: SLF001 - reads cost a call for each level
        self._constants = (
            *(shape.address_mask, shape.table_test, shape.table_value),
            *(table.shift, table.mask),
        )

    @classmethod
    def of_kernel(cls, cache: MapCache, info: VmcoreInfo | None = None) -> AddressSpace:
        """Return the address space of a Linux guest's kernel.

        Args:
            cache: as for the class.
            info: as :func:`find_vmcoreinfo` returns it; None: search for it.

        Raises:
            UnsupportedOperationError: the guest has no VMCOREINFO, or not what is needed.
            ValueError, XenMapCacheError: as :func:`find_vmcoreinfo`.
        """
        layout = layout_of_kernel(cache, info)
        return cls(cache, layout.root, levels=layout.levels, machine=layout.machine)

    @classmethod
    def of_cpu(cls, cache: MapCache, cpu: int = 0) -> AddressSpace:
        """Return the address space that an x86-64 CPU was using: of a process, or the kernel.

        Dumps of QEMU's (ELF and KDUMP) and of ``xl dump-core`` have the registers of CPUs.

        Args:
            cache: as for the class.
            cpu: its number, from 0.

        Raises:
            UnsupportedOperationError: the source has no registers, or the CPU does not use
                page tables with 4 or 5 levels.
            ValueError: there is no such CPU.
        """
        state = registers_of_cpu(cache, cpu)
        return cls(cache, state.cr3, levels=state.levels)

    def __repr__(self) -> str:
        return (
            f"<AddressSpace of {self.cache.backend!r}: {self.machine}, {self.levels} levels, "
            f"root {self.root:#x}>"
        )

    def translate(self, address: int) -> int:
        """Return the guest-physical address of a virtual address. The page need not exist.

        Raises:
            TranslationError: it is not mapped; the error has the level and the entry.
            ValueError, TypeError: ``address`` is negative, or not an int.
            XenMapCacheError: others as :meth:`MapCache.read`.
        """
        if type(address) is not int or address >> self._top_shift not in self._tops:
            address = self._check_address(address)
        # As MapCache.read finds a hot bucket. No call is in the block, and so no exception of a
        # signal handler is taken for a miss.
        readable = self._buckets.generation.readable
        mask, test, value, bucket_shift, bucket_mask = self._constants
        entry, shift = self.root, 0
        for shift in self._index_shifts:
            table = entry & mask
            start = table & bucket_mask | address >> shift & 0xFF8  # as _INDEX_MASK
            try:
                data = readable[table >> bucket_shift][start : start + 8]
            except KeyError:
                data = self._read_entry(address, shift, table)
            entry = _from_bytes(data, "little")
            if entry & test != value:
                depth = self._index_shifts.index(shift)
                if not self._shape.maps_page(depth, entry):
                    raise self._not_mapped(address, depth, entry, table | start & PAGE_MASK)
                break
        last = self._last_offsets[shift]
        return entry & mask & ~last | address & last

    def walk(self, address: int) -> Iterator[Step]:
        """Yield what each level's entry is, from the root to the page.

        Raises:
            TranslationError: as :meth:`translate`, after the step of the entry that fails.
        """
        address = self._check_address(address)
        shape, depth, entry, denied = self._shape, 0, self.root, 0
        while True:  # the last level has no tables below it
            level = shape.levels[depth]
            shift = self._index_shifts[depth]
            table = entry & shape.address_mask
            place = table | address >> shift & _INDEX_MASK
            entry = _from_bytes(self._read_entry(address, shift, table), "little")
            if shape.maps_page(depth, entry):
                last = self._last_offsets[shift]
                physical = entry & shape.address_mask & ~last | address & last
                page = MappedPage(physical, last + 1, shape.rights(denied, entry))
                yield Step(level.name, place, entry, page)
                return
            yield Step(level.name, place, entry, None)
            if not shape.has_table(depth, entry):
                raise self._not_mapped(address, depth, entry, place)
            denied = shape.denied(denied, entry)
            depth += 1

    def translate_many(self, addresses: Iterable[int]) -> array[int]:
        """Return the guest-physical addresses of many virtual addresses, in their order.

        Tables are read as a whole, and once for addresses that follow each other in the sorted
        order. With NumPy (the extra ``fast``), all addresses of a table are looked up in one step.

        Args:
            addresses: any iterable; a NumPy array of ``uint64`` or an ``array("Q")`` is fastest.

        Returns:
            An ``array("Q")``, over which ``numpy.frombuffer`` needs no copy. An address that is
            not mapped gives ``addressspace.NOT_MAPPED``, which is ``2**64 - 1``;
            :meth:`translate` says why.

        Raises:
            ValueError, TypeError: an address is not from 0 to ``2**64 - 1``, or not an int.
            XenMapCacheError: as :meth:`MapCache.read`, but for missing pages.
        """
        return tablewalk.translate(
            as_array(addresses), self.root, self._shape, self._halves, self._table
        )

    def physical_ranges(self, address: int, length: int) -> Iterator[tuple[int, int]]:
        """Yield ``(guest-physical address, length)`` of a range, in its order, merged.

        Nothing bounds how much a guest can map, so a large length may give as many ranges.

        Raises:
            TranslationError: a page is not mapped, when its turn has come.
            ValueError, TypeError: an argument is negative, or not an int.
        """
        start, count = self._check_range(address, length)
        if count and (start & PAGE_MASK) + count <= PAGE_SIZE:
            yield self.translate(start), count
            return
        first = size = 0
        try:
            for physical, step in self._pages_of(start, start + count):
                if size and physical == first + size:
                    size += step
                else:
                    if size:
                        yield first, size
                    first, size = physical, step
        except XenMapCacheError:
            if size:
                yield first, size
            raise
        if size:
            yield first, size

    def _pages_of(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield ``(guest-physical address, length)`` of the part of each page in a range."""
        mask, last_test = self._shape.address_mask, self._shape.last_test
        while start < end:
            *_, step = self.walk(start)
            page = cast(MappedPage, step.page)  # the walk raises if there is none
            length = min(page.size - (start & page.size - 1), end - start)
            yield page.physical, length
            start += length
            if page.size > PAGE_SIZE:
                continue
            # The entries of the next pages are next to it, up to the end of the table.
            place = step.entry_address + ENTRY_BYTES
            count = min((end - start + PAGE_MASK) // PAGE_SIZE, -place % PAGE_SIZE // ENTRY_BYTES)
            entries = self.cache.read(place, count * ENTRY_BYTES) if count else b""
            for (entry,) in _ENTRY.iter_unpack(entries):
                if entry & last_test != last_test:
                    break
                length = min(PAGE_SIZE, end - start)
                yield entry & mask, length
                start += length

    def read(self, address: int, length: int) -> bytes:
        """Return memory at virtual addresses.

        Args:
            address: virtual, in bytes.
            length: in bytes; at most what the guest has of memory, and ``max_resident``.

        Raises:
            TranslationError: a page is not mapped, or is missing.
            CacheFullError: ``length`` is more than that.
            ValueError, TypeError: an argument is negative, or not an int.
            XenMapCacheError: others as :meth:`MapCache.read`.
        """
        start, count = self._check_range(address, length)
        most = min(self.cache.max_resident, self.cache.memory_end or ADDRESS_LIMIT)
        if count > most:
            raise CacheFullError(
                f"{count:#x} bytes at virtual address {start:#x}: a read is limited to {most:#x} "
                "bytes, the guest's memory or max_resident; read in parts"
            )
        parts = []
        for physical, size in self.physical_ranges(start, count):
            try:
                parts.append(self.cache.read(physical, size))
            except FaultError as fault:
                missing = start + fault.address - physical
                raise missing_page(missing, fault.address) from fault
            start += size
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_cstring(self, address: int, max_length: int = 4096) -> bytes:
        """Return the bytes before the next zero byte.

        Args:
            address: virtual, in bytes.
            max_length: how many bytes may come before the zero byte.

        Raises:
            ValueError: there is no zero byte in ``max_length + 1`` bytes; or as :meth:`read`.
            XenMapCacheError: as :meth:`read`, for pages before a zero byte has come.
        """
        position = as_int("address", address)
        limit = as_int("max_length", max_length) + 1
        if limit < 1:
            raise ValueError(f"max_length must be at least 0, not {max_length}")
        end = position + limit
        found = bytearray()
        while position < end:
            # Up to the page's end: the page after the string need not exist.
            step = min(PAGE_SIZE - (position & PAGE_MASK), end - position)
            head, zero, _ = self.read(position, step).partition(b"\0")
            found += head
            if zero:
                return bytes(found)
            position += step
        raise ValueError(f"no zero byte in {limit} bytes at virtual address {address:#x}")

    def regions(
        self, start: int = 0, end: int = _VIRTUAL_END, *, max_tables: int = _MAX_TABLES
    ) -> Iterator[Region]:
        """Yield the mapped ranges in ascending order, merged where they follow each other.

        It is lazy: tables are read when they are needed for the next region. A guest can map its
        pages again and again, so there may be more regions than you want to wait for. Left out
        is what is reached through a missing table, through a table that leads back to itself,
        and through one that led to nothing before. So the next region is found, or the end, after
        each of the guest's tables was read once for each level.

        Args:
            start: where to begin, virtual.
            end: one past the last address.
            max_tables: how many tables are read before it gives up.

        Raises:
            TranslationError: ``max_tables`` were read, and there is more.
            ValueError, TypeError: an argument is not an int from 0 to ``2**64``.
            XenMapCacheError: as :meth:`MapCache.read`, but for missing pages.
        """
        first, last = as_int("start", start), as_int("end", end)
        if not 0 <= first <= last <= _VIRTUAL_END:
            raise ValueError(
                f"start and end must be 0 <= start <= end <= 2**64, not {first:#x} and {last:#x}"
            )
        return merged(self._pages(first, last, as_int("max_tables", max_tables)))

    def _pages(self, start: int, end: int, max_tables: int) -> Iterator[Region]:
        scan = tablewalk.Scan(self._shape, self._table, max_tables)
        for low, high in self._halves:
            first, last = max(start, low), min(end, high)
            if first < last:
                # The root has entries for 2**bits bytes; on x86-64, half of them for each half.
                base = high - (1 << self._shape.bits) if low else 0
                for page in scan.pages(self.root, base, first, last):
                    yield Region(*page)

    def _table(self, address: int) -> bytes | None:
        """Return a table, or None if its page is missing."""
        memory_end = self.cache.memory_end
        if memory_end is not None and address >= memory_end:
            return None  # without a call into Xen, as a guest can have many such entries
        try:
            return self.cache.read(address, TABLE.size)
        except FaultError:
            return None

    def _read_entry(self, address: int, shift: int, table: int) -> bytes:
        place = table | address >> shift & _INDEX_MASK
        try:
            return self.cache.read(place, ENTRY_BYTES)
        except FaultError as fault:
            raise TranslationError(
                address,
                f"the source has no page there to read the entry from; {_LOOK}",
                self._shape.levels[self._index_shifts.index(shift)].name,
                None,
                place,
            ) from fault

    def _check_range(self, address: int, length: int) -> tuple[int, int]:
        start, count = as_int("address", address), as_int("length", length)
        if count < 0:
            raise ValueError(f"length {count:#x} at virtual address {start:#x} is negative")
        if start < 0:
            raise ValueError(f"virtual address {start:#x} is negative")
        return start, count

    def _check_address(self, address: object) -> int:
        """Return an address as an int, if the tables have a place for it."""
        number = as_int("address", address)
        if number < 0:
            raise ValueError(f"virtual address {number:#x} is negative")
        if number >> self._top_shift not in self._tops:
            ranges = " and ".join(f"{low:#x} to {high - 1:#x}" for low, high in self._halves)
            raise TranslationError(
                number, f"{self.machine} tables of {self.levels} levels have {ranges}; {_LOOK}"
            )
        return number

    def _not_mapped(self, address: int, depth: int, entry: int, place: int) -> TranslationError:
        name = self._shape.levels[depth].name
        if entry & PRESENT:
            return TranslationError(
                address, f"the entry is reserved at this level; {_LOOK}", name, entry, place
            )
        return TranslationError(
            address, f"not present, so nothing is mapped there; {_LOOK}", name, entry, place
        )
