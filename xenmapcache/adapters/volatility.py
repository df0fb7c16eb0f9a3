"""A Volatility 3 layer over a map cache, with a guest's holes as they are.

Importing this module needs Volatility 3, and makes the layer known to it: Volatility finds the
subclasses of its own classes.

Volatility stacks layers. It opens the location that the user names as a file; a stacker then
offers a layer on top of it. For a location of ours the file is empty, and the stacker's layer does
not read it: it reads through a cache, which :func:`register` has been given or which is opened
when the layer reads first. Volatility copies layers and may hand them to other processes.
Therefore a layer holds the location only.
"""

from __future__ import annotations

import copy
import io
import logging
import os
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from typing import Any

from volatility3.framework import exceptions
from volatility3.framework.configuration import requirements
from volatility3.framework.interfaces.automagic import StackerLayerInterface
from volatility3.framework.interfaces.configuration import path_join
from volatility3.framework.interfaces.layers import DataLayerInterface
from volatility3.framework.layers.physical import FileLayer
from volatility3.framework.layers.resources import VolatilityHandler

from ..cache import MapCache, open_cache
from ..errors import FaultError, XenMapCacheError

logger = logging.getLogger("xenmapcache")

SCHEME = "xenmapcache"
_EMPTY_FILE_BYTES = 4096
"""Volatility takes the logarithm of a file's size."""

_caches: dict[tuple[int, str], MapCache] = {}
"""By process and location: a forked process cannot use its parent's."""

Chunk = tuple[list[tuple[str, int, int]], int]
"""What Volatility scans at once: parts ``(layer, address, length)``, and where they end."""


def register(cache: MapCache, source: str, **options: object) -> str:
    """Return the location under which Volatility finds a cache; for ``--single-location``.

    Args:
        cache: stays yours to close, after Volatility has ended.
        source: how another process of Volatility's opens the source, as for
            :func:`.open_source`.
        **options: for that, too.

    Raises:
        ValueError: the source does not know where its memory ends, or has no memory.
    """
    if not cache.memory_end:
        raise ValueError(
            "this source does not know where its memory ends, or has none: Volatility needs a size"
        )
    query = {"source": source} | {name: str(int(bool(each))) for name, each in options.items()}
    location = f"{SCHEME}:///?{urllib.parse.urlencode(query)}"
    _caches[os.getpid(), location] = cache
    return location


def _cache_at(location: str) -> MapCache:
    """Return the cache for a location; in a process that has none, open it."""
    key = os.getpid(), location
    if key not in _caches:
        query: dict[str, Any] = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(location).query))
        source = query.pop("source", "")
        _caches[key] = open_cache(source, **{name: each == "1" for name, each in query.items()})
    return _caches[key]


class XenMapCacheHandler(VolatilityHandler):  # type: ignore[misc] # has no types
    """Opens a location of ours, as an empty file."""

    @classmethod
    def non_cached_schemes(cls) -> list[str]:
        """Return the schemes of which Volatility is to keep no copy."""
        return [SCHEME]

    @staticmethod
    def default_open(req: urllib.request.Request) -> io.BytesIO | None:
        """Return a file for a location of ours, and None for others."""
        return io.BytesIO(bytes(_EMPTY_FILE_BYTES)) if req.type == SCHEME else None


class XenMapCacheStacker(StackerLayerInterface):  # type: ignore[misc] # has no types
    """Puts the layer on the file of a location of ours, before other stackers look at the file."""

    stack_order = 1

    @classmethod
    def stack(
        cls,
        context: Any,  # noqa: ANN401 - Volatility's types
        layer_name: str,
        progress_callback: Any = None,  # noqa: ANN401, ARG003 - Volatility's
    ) -> DataLayerInterface | None:
        """Return the layer for a location of ours, and None for others."""
        layer = context.layers[layer_name]
        if not isinstance(layer, FileLayer) or not layer.location.startswith(f"{SCHEME}:"):
            return None
        name = context.layers.free_layer_name("XenMapCacheLayer")
        path = path_join("automagic", "layer_stacker", name)
        context.config[path_join(path, "location")] = layer.location
        return XenMapCacheLayer(context, path, name)


class XenMapCacheLayer(DataLayerInterface):  # type: ignore[misc] # has no types
    """A guest's physical memory. Holes are invalid addresses.

    Args:
        context: Volatility's.
        config_path: where the context has the layer's location.
        name: of the layer.
        metadata: Volatility's.
    """

    def __init__(
        self,
        context: Any,  # noqa: ANN401 - Volatility's types
        config_path: str,
        name: str,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(context, config_path, name, metadata)
        self._location: str = self.config["location"]

    @classmethod
    def get_requirements(cls) -> list[Any]:
        """Return what the configuration has to say: the location."""
        return [requirements.StringRequirement("location", "What register() returned")]

    @property
    def location(self) -> str:
        """The location of the guest."""
        return self._location

    @property
    def minimum_address(self) -> int:
        """The first address."""
        return 0

    @property
    def maximum_address(self) -> int:
        """The last address that may exist."""
        return (self._cache.memory_end or 1) - 1

    @property
    def _cache(self) -> MapCache:
        return _cache_at(self._location)

    def is_valid(self, offset: int, length: int = 1) -> bool:
        """Tell whether all pages of a range exist.

        Raises:
            ValueError: the length is not positive.
        """
        if length <= 0:
            raise ValueError(f"length must be positive, not {length}")
        if offset < 0:
            return False
        return next(self._cache.present(offset, length), None) == (offset, length)

    def read(self, offset: int, length: int, pad: bool = False) -> bytes:
        """Return a range of memory.

        Args:
            offset: guest-physical, in bytes.
            length: in bytes.
            pad: return zeros for missing pages.

        Raises:
            InvalidAddressException: a page is missing, and `pad` is not set.
            XenMapCacheError: others as :meth:`MapCache.read`; logged, too.
        """
        if offset < 0 or length < 0:
            raise exceptions.InvalidAddressException(self.name, offset, "negative address")
        try:
            return self._cache.read(offset, length, fill=0 if pad else None)
        except FaultError as error:
            raise exceptions.InvalidAddressException(
                self.name, error.address, str(error)
            ) from error
        except XenMapCacheError as error:
            # Because Volatility ends a scan at any exception, and prints nothing.
            logger.error("%s at %#x cannot be read: %s", self.name, offset, error)
            raise

    def write(self, offset: int, data: bytes) -> None:  # noqa: ARG002 - Volatility's
        """Refuse to write, because a guest may be running.

        Raises:
            LayerException: always.
        """
        raise exceptions.LayerException(
            self.name, f"{self.name} is read-only; nothing is written to {offset:#x}"
        )

    def _scan_iterator(
        self,
        scanner: Any,  # noqa: ANN401 - Volatility's types
        sections: Iterable[tuple[int, int]],
    ) -> Iterator[Chunk]:
        """Yield the present memory of some sections, in chunks that overlap and have no holes."""
        for start, length in sections:
            # Volatility's sections end at the last address, not after it.
            last = start + length == self.maximum_address
            for first, size in self._present(start, length + last):
                end = first + size
                for position in range(first, end, scanner.chunk_size):
                    stop = min(end, position + scanner.chunk_size + scanner.overlap)
                    yield [(self.name, position, stop - position)], stop

    def _scan_chunk(self, scanner: Any, progress: Any, iterator_value: Chunk) -> list[Any]:  # noqa: ANN401 - Volatility's types
        """Return what a scanner finds in a chunk. Pages that have vanished are skipped."""
        ((_, start, length),), progress.value = iterator_value
        try:
            return list(scanner(self.read(start, length), start))
        except exceptions.InvalidAddressException:
            found = []
            for first, data in self._rest(start, length):
                part = copy.copy(scanner)
                part.chunk_size = start + scanner.chunk_size - first  # what is after is not its
                if part.chunk_size > 0:
                    found += part(data, first)
            return found

    def _rest(self, start: int, length: int) -> Iterator[tuple[int, bytes]]:
        """Yield the memory of a range in which pages vanish, without those."""
        for first, size in self._present(start, length):
            try:
                yield first, self.read(first, size)
            except exceptions.InvalidAddressException:
                logger.warning("%#x bytes at %#x vanished during the scan", size, first)

    def _present(self, start: int, length: int) -> Iterator[tuple[int, int]]:
        """Yield ``(address, length)`` of the present parts of a range; none touches the next."""
        first = end = start
        for address, size in self._cache.present(start, length):
            if address != end:
                if end > first:
                    yield first, end - first
                first = address
            end = address + size
        if end > first:
            yield first, end - first
