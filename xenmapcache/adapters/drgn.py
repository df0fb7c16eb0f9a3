"""A drgn program whose memory is a guest's, live or saved."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..address import ADDRESS_LIMIT, MiB
from ..cache import MapCache
from ..errors import FaultError, UnsupportedOperationError
from ..extras import require
from ..guest.vmcoreinfo import find_vmcoreinfo

if TYPE_CHECKING:
    from typing_extensions import Buffer

logger = logging.getLogger("xenmapcache")

Reader = Callable[[int, int, int, bool], "Buffer"]
"""What drgn calls to read: ``(address, count, offset in the segment, whether physical)``."""

_ARCHITECTURES = {"x86-64": "X86_64", "x86-32": "I386", "arm": "AARCH64"}
"""Of a backend's ``machine``; other machines have drgn's own names, as ``uname -m`` has them."""
_SMALL_BYTES = 4096
"""Up to this size, a copy takes less time than a view."""
_LARGEST_KEPT_BYTES = 4 * MiB


def program(cache: MapCache, *, vmcoreinfo: str | None = None, length: int | None = None) -> Any:  # noqa: ANN401 - drgn need not be installed
    """Return a ``drgn.Program`` that reads a guest's memory through a cache.

    Physical addresses are the guest's. A missing page is a ``drgn.FaultError`` with its address.
    If the guest is Linux, virtual addresses are translated by the guest's own page tables. drgn
    takes these from VMCOREINFO, which is a note of the source or is looked for in memory. Without
    it a WARNING is logged, and only physical addresses can be read. Symbols are not loaded: call
    ``load_default_debug_info()`` or ``load_debug_info()`` of the program.

    The program reads until the cache is closed; after that it raises ClosedError. What the guest
    or an invalidation changes, the next read shows.

    Args:
        cache: over any source. A live guest is one to drgn, too.
        vmcoreinfo: the VMCOREINFO text to use; empty: none.
        length: how far to look for VMCOREINFO, in bytes; None: to the end of memory.

    Raises:
        BackendUnavailableError: drgn is not installed.
        UnsupportedOperationError: drgn does not know the guest's machine.
        ValueError: drgn refuses the VMCOREINFO text; or the source does not know its end, and
            neither a length nor a text is given.
        XenMapCacheError: others as :meth:`MapCache.read`, but for missing pages.
    """
    drgn: Any = require("drgn", "drgn", "drgn")
    text = _vmcoreinfo(cache, length) if vmcoreinfo is None else vmcoreinfo
    made = drgn.Program(_platform(drgn, cache))
    made.add_memory_segment(0, ADDRESS_LIMIT, reader(cache, drgn.FaultError), physical=True)
    if text:
        live = getattr(cache.backend, "domid", None) is not None
        try:
            made.set_linux_kernel_custom(text, live)
        except (getattr(drgn, "BadDataError", ValueError), ValueError, OverflowError) as error:
            raise ValueError(
                f"drgn refuses the guest's VMCOREINFO: {error}; give another text, or an empty "
                "one for physical addresses only"
            ) from error
    return made


def reader(cache: MapCache, fault: Callable[[str, int], Exception]) -> Reader:
    """Return a callback that reads guest memory.

    It returns views where that saves a copy. A range over several buckets is copied together in a
    buffer of the thread that reads, which its next read of such a range overwrites.

    Args:
        cache: the cache to read through.
        fault: makes the exception for a missing page, from a message and an address.
    """
    read, views = cache.read, cache.views
    local = threading.local()

    def join(count: int, first: memoryview, rest: Any) -> Buffer:  # noqa: ANN401 - an iterator of views
        """Return a range of several buckets in one buffer.

        While a buffer is being filled it is not in the list. So a read in a signal handler or a
        finalizer, which comes in between, takes another one.
        """
        kept: list[bytearray] = local.__dict__.setdefault("buffers", [])
        buffer = kept.pop() if kept else bytearray()
        if len(buffer) < count:
            buffer = bytearray(count)
        target = memoryview(buffer)[:count]
        position = len(first)
        target[:position] = first
        del first
        for view in rest:
            target[position : position + len(view)] = view
            position += len(view)
            del view  # or there may be no room for the next one
        if len(buffer) <= _LARGEST_KEPT_BYTES:
            kept[:] = [buffer]
        return target

    def callback(address: int, count: int, offset: int, physical: bool) -> Buffer:  # noqa: ARG001 - drgn's
        try:
            if count <= _SMALL_BYTES:
                return read(address, count)
            parts = views(address, count)
            first = next(parts)
            return first if len(first) == count else join(count, first, parts)
        except FaultError as error:
            raise fault(str(error), error.address) from None

    return callback


def _platform(drgn: Any, cache: MapCache) -> Any:  # noqa: ANN401 - drgn need not be installed
    """Return the guest's platform; of a source that does not say, this machine's."""
    machine = getattr(cache.backend, "machine", None)
    if not machine:
        return drgn.host_platform
    name = _ARCHITECTURES.get(machine, machine.upper())
    if name not in drgn.Architecture.__members__:
        raise UnsupportedOperationError(f"drgn does not know the guest's machine, {machine!r}")
    return drgn.Platform(drgn.Architecture[name])


def _vmcoreinfo(cache: MapCache, length: int | None) -> str:
    """Return the text of the source's note, or that in the guest's memory; empty without any."""
    text = cache.backend.describe().get("vmcoreinfo")
    if isinstance(text, str):
        return text
    found = find_vmcoreinfo(cache, 0, length)
    if found is not None:
        return found.text
    logger.warning(
        "no VMCOREINFO was found in the guest's memory, as a Linux guest has it: drgn cannot "
        "translate virtual addresses; physical ones can be read"
    )
    return ""
