"""Unpacking the pages of compressed dumps; with packages that may be missing, but for zlib."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from importlib import import_module
from types import ModuleType

from ..address import PAGE_SIZE
from ..errors import BackendUnavailableError
from .kdump import COMPRESSIONS, LZO, SNAPPY, ZLIB, ZSTD

Unpack = Callable[[bytes], bytes]
"""Returns the page; raises :class:`PageError`. For one thread at a time."""

_PACKAGES = {
    LZO: ("lzo", "python-lzo", "lzo"),
    SNAPPY: ("cramjam", "cramjam", "kdump"),
    ZSTD: ("zstandard", "zstandard", "kdump"),
}
"""Of each compression the module, its package, and this package's extra."""


class PageError(Exception):
    """Data do not unpack to a page; the text says why."""


def unpacker(compression: int, path: str) -> Unpack:
    """Return what unpacks the pages of a compression. Never gives more than a page.

    Args:
        compression: one of :data:`.kdump.COMPRESSIONS`, but not 0.
        path: the file's name, for messages.

    Raises:
        BackendUnavailableError: its package is not installed; the message says which.
    """
    if compression == ZLIB:
        return _zlib
    module, package, extra = _PACKAGES[compression]
    try:
        loaded = import_module(module)
    except ImportError as error:
        raise BackendUnavailableError(
            f"{path}: pages compressed with {COMPRESSIONS[compression]} need the package "
            f"{package}: pip install {package}, or 'xenmapcache[{extra}]' ({error})"
        ) from None
    return {LZO: _lzo, SNAPPY: _snappy, ZSTD: _zstd}[compression](loaded)


def _checked(page: bytes) -> bytes:
    if len(page) != PAGE_SIZE:
        raise PageError(f"it unpacks to {len(page):#x} bytes; expected {PAGE_SIZE:#x}")
    return page


def _zlib(data: bytes) -> bytes:
    stream = zlib.decompressobj()
    try:
        page = stream.decompress(data, PAGE_SIZE + 1)
    except zlib.error as error:
        raise PageError(str(error)) from None
    if not stream.eof and len(page) <= PAGE_SIZE:
        raise PageError("its zlib stream is truncated")
    return _checked(page)


def _lzo(lzo: ModuleType) -> Unpack:
    def unpack(data: bytes) -> bytes:
        try:
            page: bytes = lzo.decompress(data, False, PAGE_SIZE)
        except lzo.error as error:
            raise PageError(f"lzo: {error}") from None
        return _checked(page)

    return unpack


def _snappy(cramjam: ModuleType) -> Unpack:
    def unpack(data: bytes) -> bytes:
        page = bytearray(PAGE_SIZE)
        try:
            size = cramjam.snappy.decompress_raw_into(data, page)
        except cramjam.DecompressionError as error:
            raise PageError(str(error)) from None
        return _checked(bytes(page[:size]))

    return unpack


def _zstd(zstandard: ModuleType) -> Unpack:
    stream = zstandard.ZstdDecompressor(max_window_size=1 << 20)

    def unpack(data: bytes) -> bytes:
        try:
            size = zstandard.frame_content_size(data)
            if size not in (-1, PAGE_SIZE):  # of which the limit below would not be asked
                raise PageError(f"its zstd frame has {size:#x} bytes, not {PAGE_SIZE:#x}")
            page: bytes = stream.decompress(data, max_output_size=PAGE_SIZE)
        except zstandard.ZstdError as error:
            raise PageError(str(error)) from None
        return _checked(page)

    return unpack
