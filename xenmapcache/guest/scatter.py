"""Scatter-gather lists: several ranges of guest memory, leased together."""

from __future__ import annotations

from collections.abc import Iterable

from ..cache import DmaDirection, Lease, MapCache


class Segments:
    """The ranges of a scatter-gather list, leased for a ``with`` block: all, or on an error none.

    Made by :meth:`GuestMemory.segments`. If a signal handler raises while the leases are taken,
    those that were taken are released. If it raises while they are released, the others stay
    in :meth:`MapCache.leases`.
    """

    __slots__ = ("_cache", "_direction", "_leases", "_owner", "_ranges")

    def __init__(
        self,
        cache: MapCache,
        ranges: Iterable[tuple[int, int]],
        owner: str,
        direction: DmaDirection | str,
    ) -> None:
        self._cache = cache
        self._ranges = ranges
        self._owner = owner
        self._direction = direction
        self._leases: list[Lease] = []

    def __enter__(self) -> list[memoryview]:
        map_dma, leases = self._cache.map_dma, self._leases
        try:
            for address, length in self._ranges:
                leases.append(
                    map_dma(address, length, owner=self._owner, direction=self._direction)
                )
            return [lease.view for lease in leases]
        except BaseException:
            self._release()
            raise

    def __exit__(self, *_: object) -> None:
        self._release()

    def _release(self) -> None:
        """Release all leases, the last one first, also if one of them raises."""
        failure: Exception | None = None
        for lease in reversed(self._leases):
            try:
                if not lease.released:
                    lease.release()
            except Exception as error:  # raised below, when the others are released
                failure = failure or error
        self._leases = []
        try:
            if failure is not None:
                raise failure
        finally:
            del failure  # its traceback holds this frame
