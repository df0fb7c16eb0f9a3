"""Three ways to map guest memory for DMA, with the same two methods.

Each works on a mock guest of its own, whose map calls are counted. The model of QEMU's policy is
written from what is known of it, not from its code.
"""

from __future__ import annotations

import abc
from typing import ClassVar, Generic, TypeVar

from xenmapcache import DmaDirection, Lease, MapCache, Mapping, MockHypervisor
from xenmapcache.address import PAGE_SHIFT, MiB, page_span
from xenmapcache.backends.mock import MockBackend

Token = TypeVar("Token")


class CountingBackend(MockBackend):
    """A mock guest that counts how often it is asked to map."""

    def __init__(self, memory: int) -> None:
        super().__init__(domain=MockHypervisor().create_domain(memory=memory))
        self.maps = 0

    def map(self, gfn: int, count: int, *, writable: bool) -> Mapping:
        self.maps += 1
        return super().map(gfn, count, writable=writable)


class Policy(abc.ABC, Generic[Token]):
    """When memory is mapped and unmapped. All leases are for reading: nothing is marked dirty."""

    name: ClassVar[str]

    def __init__(self, memory: int) -> None:
        self.backend = CountingBackend(memory)

    @property
    def maps(self) -> int:
        """How often memory was mapped so far."""
        return self.backend.maps

    @abc.abstractmethod
    def lease(self, address: int, length: int) -> Token:
        """Have guest memory mapped until the release."""

    @abc.abstractmethod
    def release(self, token: Token) -> None:
        """Give back what ``lease`` returned."""

    @abc.abstractmethod
    def close(self) -> None:
        """Release every mapping."""


class Ours(Policy[Lease]):
    """A map cache, with its defaults."""

    name = "ours"

    def __init__(
        self, memory: int, bucket_shift: int = 20, max_resident: int | str = "32GiB"
    ) -> None:
        super().__init__(memory)
        self.cache = MapCache(self.backend, bucket_shift=bucket_shift, max_resident=max_resident)

    def lease(self, address: int, length: int) -> Lease:
        return self.cache.map_dma(address, length, owner="bench", direction=DmaDirection.TO_DEVICE)

    def release(self, token: Lease) -> None:
        token.release()

    def close(self) -> None:
        self.cache.close()


class PerAccess(Policy[Mapping]):
    """Each access maps its pages, and its end unmaps them."""

    name = "map per access"

    def lease(self, address: int, length: int) -> Mapping:
        gfn, count = page_span(address, length)
        return self.backend.map(gfn, count, writable=False)

    def release(self, token: Mapping) -> None:
        """The caller drops it, which unmaps it."""

    def close(self) -> None:
        self.backend.close()


class _Entry:
    __slots__ = ("key", "locks", "mapping")

    def __init__(self, key: tuple[int, int], mapping: Mapping) -> None:
        self.key, self.mapping, self.locks = key, mapping, 0


class QemuModel(Policy[_Entry]):
    """What QEMU does with DMA since 2024: an entry lives as long as it is locked.

    An entry is found by its first bucket and its size, in whole buckets of 1 MiB: an access over a
    bucket's edge has a larger entry of its own, which only another one like it can share.
    """

    name = "QEMU's policy"

    def __init__(self, memory: int) -> None:
        super().__init__(memory)
        self._entries: dict[tuple[int, int], _Entry] = {}

    def lease(self, address: int, length: int) -> _Entry:
        index, start = divmod(address, MiB)
        buckets = -(-(start + length) // MiB)
        entry = self._entries.get((index, buckets))
        if entry is None:
            pages = MiB >> PAGE_SHIFT
            mapping = self.backend.map(index * pages, buckets * pages, writable=False)
            entry = self._entries[index, buckets] = _Entry((index, buckets), mapping)
        entry.locks += 1
        return entry

    def release(self, token: _Entry) -> None:
        token.locks -= 1
        if not token.locks:
            del self._entries[token.key]

    def close(self) -> None:
        self._entries.clear()
        self.backend.close()
