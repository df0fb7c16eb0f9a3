"""The contract of a source of guest memory, and how one is opened by name."""

from __future__ import annotations

import abc
import enum
import errno as _errno
import os
from collections.abc import Iterator, Sequence
from importlib import import_module
from itertools import groupby
from typing import TYPE_CHECKING, ClassVar, NoReturn, Protocol, Self

from . import flat
from .address import PAGE_SHIFT, PAGE_SIZE, GiB
from .binding import libc
from .errors import UnsupportedOperationError
from .grants import MAX_MAPPED, MAX_REFS, GrantSource
from .mapping import Mapping, PageErrors

if TYPE_CHECKING:
    from typing_extensions import Buffer


_CHUNK_PAGES = 256


class Capability(enum.Flag):
    """What a source can do beyond being read."""

    NONE = 0
    WRITE = enum.auto()
    """Its memory can be written."""
    REMAP = enum.auto()
    """A mapping can be moved to other guest pages at the same host address."""
    DIRTY = enum.auto()
    """It wants to be told which pages were written."""


class RoomUser(Protocol):
    """What maps memory up to a limit: a cache's budget.

    Attributes:
        limit: in bytes.
    """

    limit: int

    @property
    def may_map(self) -> int:
        """How many bytes it may still map."""


class Backend(abc.ABC):
    """A source of guest memory. Also a context manager.

    Attributes:
        name: as given to :func:`open_backend`.
        capabilities: what it can do beyond mapping for reading.
        memory_end: one past the last guest address that may exist, or None if
            that is unknown.
        mapping_room: how many bytes of it a cache maps at most, unless ``max_resident`` is given.
            Of a live guest whose pages take Dom0's memory, what a cache gets that is made now.
        log_dirty: whether :meth:`mark_dirty` reports written pages. Set it to False while the
            guest is not being migrated, to save a hypercall per write. Without
            :attr:`Capability.DIRTY` it has no effect.

    Synchronization: all methods may be called in any threads at once.
    """

    name: ClassVar[str]
    capabilities: Capability = Capability.NONE
    memory_end: int | None = None
    mapping_room: int = 32 * GiB
    log_dirty: bool = True

    def __repr__(self) -> str:
        """Name the class, what it belongs to, and its size if that is known without a call."""
        known = vars(self)
        if "path" in known:
            what = repr(os.fspath(known["path"]))
        else:
            what = f"domain {known['domid']}" if "domid" in known else self.name
        # A property is cheap; of a live domain the end is asked for once, and then kept.
        cheap = "memory_end" in known or isinstance(vars(type(self)).get("memory_end"), property)
        end = self.memory_end if cheap else None
        size = "" if end is None else f", memory end {end:#x}"
        return f"<{type(self).__name__} of {what}{size}>"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} cannot be copied or pickled; open the source again"
        )

    @abc.abstractmethod
    def map(self, gfn: int, count: int, *, writable: bool) -> Mapping:
        """Map consecutive guest pages.

        Args:
            gfn: the first guest frame number.
            count: pages, at least one.
            writable: map for writing too; only with :attr:`Capability.WRITE`.

        Returns:
            A mapping, in which pages that are not there, or were refused, carry their errno;
            see :meth:`.Mapping.refusal`.

        Raises:
            XenCallError: the call failed as a whole.
            ClosedError: the backend is closed.
        """

    def share_room(self, user: RoomUser) -> int:  # noqa: ARG002 - a contract
        """Return :attr:`mapping_room` for a new cache, and count on what that cache may map.

        Args:
            user: of the new cache. Its limit may be set, and what it may still map is taken off
                the room of caches that are made later, for as long as it lives.
        """
        return self.mapping_room

    def present(self, gfn: int, count: int) -> Iterator[tuple[int, int]] | None:  # noqa: ARG002 - a contract
        """Return the runs of pages that exist in a range.

        Returns:
            An iterator of ``(gfn, pages)``, one for each run, in ascending order; runs do not
            touch. None if only mapping shows which pages exist.
        """
        return None

    def extents(self, gfn: int, count: int) -> Iterator[tuple[int, int]]:
        """Return where in a range pages may be: who maps to find pages need not map elsewhere.

        By default what :meth:`present` tells, or the whole range. A live guest is asked about
        (:class:`.xen.XenBackend`), which takes some calls.

        Returns:
            An iterator of ``(gfn, pages)`` in ascending order. A part may have holes.
        """
        known = self.present(gfn, count)
        return iter([(gfn, count)]) if known is None else known

    def survey(self, gfn: int, count: int) -> Iterator[tuple[int, int]] | None:
        """Return the runs of pages that exist in a range, after some calls if need be.

        By default what :meth:`present` tells, which makes no call.

        Returns:
            As :meth:`present`.
        """
        return self.present(gfn, count)

    def copies(self, gfn: int, count: int) -> bool:  # noqa: ARG002 - a contract
        """Tell whether :meth:`map` would copy a range of pages into memory of this process.

        A cache bounds such copies by ``max_copies``, because the kernel cannot take their memory
        back, as it can where a file is mapped. By default False: pages are mapped.
        """
        return False

    def map_into(self, mapping: Mapping, gfn: int, count: int) -> PageErrors | None:
        """Map guest pages for reading, or copy them, over a part of a window.

        By default the pages are copied from what :meth:`map` returns. A source that can map at a
        given host address does so, and says in :meth:`copied_pages` what it copies.

        Args:
            mapping: zeros of :mod:`.flat`, at the guest page ``mapping.gfn``; no one else sees it.
            gfn: the first guest frame number.
            count: pages, at least one. Pages that are not there, or were refused, stay zeros.

        Returns:
            The errnos of the pages; None if all are there.

        Raises:
            XenCallError: the call failed as a whole; EAGAIN: :meth:`copied_pages` has changed.
                Nobody uses the mapping then.
            ClosedError: the backend is closed.
        """
        errors = bytearray()
        last: PageErrors | None = None
        for first in range(gfn, gfn + count, _CHUNK_PAGES):
            pages = min(_CHUNK_PAGES, gfn + count - first)
            source = self.map(first, pages, writable=False)
            _copy_valid(source, mapping)
            last = source.errors or last
            errors += source.errors or bytes(pages)
            del source
        return None if last is None else PageErrors(bytes(errors), last.call, last.domid)

    def copied_pages(self, gfn: int, count: int) -> int:
        """Return how many pages of a range :meth:`map_into` copies, or more if that is unknown."""
        known = self.present(gfn, count)
        return count if known is None else sum([pages for _, pages in known])

    def read_pages(self, gfn: int, buffer: memoryview) -> bool:  # noqa: ARG002 - a contract
        """Fill a buffer from consecutive pages, if that is quicker than mapping them.

        Those who look at much memory once (a search, a copy) ask for it before they map.

        Args:
            gfn: the first guest frame number.
            buffer: of bytes, writable and contiguous; its size is a multiple of a page's.

        Returns:
            False if the pages have to be mapped: always, unless a backend says otherwise, and
            if a page is missing. The buffer may have changed.

        Raises:
            XenMapCacheError: as :meth:`map` raises.
        """
        return False

    def describe(self) -> dict[str, object]:
        """Return what else is known of the source, by name: its notes, versions and the like.

        Values are what JSON can hold: numbers, text, lists and dictionaries of such.
        """
        return {}

    def remap(self, mapping: Mapping, gfn: int) -> None:  # noqa: ARG002 - a contract
        """Let a mapping show other guest pages, at the host address that it has.

        All pages must be there. On an error the mapping shows what it showed before,
        unless the exception says that its memory is lost.

        Args:
            mapping: one that this backend made.
            gfn: the first of ``mapping.count`` guest frames.

        Raises:
            UnsupportedOperationError: it has no :attr:`Capability.REMAP`.
            FaultError: a page is not there.
            XenCallError: the call failed; MappingLostError if the old memory is gone.
        """
        raise UnsupportedOperationError(
            f"the backend {self.name!r} cannot move a mapping at a fixed host address"
        )

    def mark_dirty(self, gfn: int, count: int) -> None:  # noqa: ARG002 - a contract
        """Take note that guest pages were written; only with :attr:`Capability.DIRTY`.

        Raises:
            UnsupportedOperationError: it has no :attr:`Capability.DIRTY`.
            XenCallError: it could not be noted.
        """
        raise UnsupportedOperationError(f"the backend {self.name!r} keeps no dirty pages")

    def track_dirty_vram(self, gfn: int, count: int) -> list[tuple[int, int]]:  # noqa: ARG002 - a contract
        """Return which pages of a screen the guest has written since the last call.

        The first call, and each one for another range, returns the complete range. There is one
        range for each guest, for all who track one: QEMU tracks the screen that it shows.

        Args:
            gfn: first frame number of the range.
            count: pages; 0 ends the tracking.

        Returns:
            Runs of pages, as (gfn, count), in ascending order; runs do not touch.

        Raises:
            UnsupportedOperationError: the source has no guest that runs, or cannot track it.
            XenCallError: it failed.
        """
        raise UnsupportedOperationError(
            f"the backend {self.name!r} has no running guest whose writes could be tracked"
        )

    def pause(self) -> None:
        """Stop the guest's vCPUs, so that its memory stays as it is, until :meth:`unpause`.

        Call :meth:`unpause` before :meth:`close`, whatever happens, also if this is interrupted: a
        guest that is still paused when the process ends stays paused.
        Devices may write to memory all the same. Idempotent.

        Raises:
            UnsupportedOperationError: the source has no guest that runs, or cannot pause it.
            BackendUnavailableError, XenCallError: it could not be paused.
        """
        raise UnsupportedOperationError(
            f"the backend {self.name!r} has no running guest that could be paused"
        )

    def unpause(self) -> None:  # noqa: B027 - without a pause, nothing is to be undone
        """Undo :meth:`pause`; without one before, nothing is done.

        A guest that was paused before this source paused it stays paused. One that no longer
        exists raises nothing.

        Raises:
            XenCallError: the guest could not be unpaused; call this again, or use ``xl unpause``.
        """

    def open_grants(
        self,
        *,
        max_refs: int = MAX_REFS,  # noqa: ARG002 - a contract
        max_mapped: int = MAX_MAPPED,  # noqa: ARG002 - a contract
    ) -> GrantSource:
        """Open the pages that the guest has granted, for ``MapCache(backend, grants=)``.

        Args:
            max_refs: how many pages one lease or one copy may have.
            max_mapped: how many grants may be mapped at a time.

        Returns:
            A source to close, after the cache that uses it.

        Raises:
            UnsupportedOperationError: the source has no guest that runs.
            BackendUnavailableError: libxengnttab or its device is missing.
            ValueError: a bound is less than 1.
        """
        raise UnsupportedOperationError(
            f"the backend {self.name!r} has no running guest that could grant pages"
        )

    def has_ended(self) -> bool:
        """Tell whether the guest has ended, so that its memory is not that of a guest any more.

        A domain that was destroyed lives on for as long as a process maps its memory; it has
        ended, too. One that has shut down or crashed has not, if the toolstack keeps it. By
        default False: what is saved in a file does not end.

        Raises:
            BackendUnavailableError, UnsupportedOperationError, XenCallError: that cannot be told.
        """
        return False

    @abc.abstractmethod
    def close(self) -> None:
        """Refuse further map calls. Existing mappings live on. Idempotent."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_BACKENDS = {
    "coredump": ".backends.coredump:CoredumpBackend",
    "elfcore": ".backends.elfcore:ElfCoreBackend",
    "kdump": ".backends.kdump:KdumpBackend",
    "mock": ".backends.mock:MockBackend",
    "raw": ".backends.raw:RawBackend",
    "save": ".backends.save:SaveBackend",
    "xen": ".backends.xen:XenBackend",
    "xenctrl": ".backends.xenctrl:XenControlBackend",
}


def open_backend(name: str, **options: object) -> Backend:
    """Open a source of guest memory.

    Args:
        name: ``"xen"`` (libxenforeignmemory), ``"xenctrl"`` (libxenctrl's legacy call) or
            ``"mock"``; of files ``"coredump"``, ``"elfcore"``, ``"kdump"``, ``"raw"`` or
            ``"save"``.
        **options: ``domid=`` for the first two; ``domain=`` or ``memory=`` for the mock;
            ``path=`` for files. See the backend's own class for all of them.

    Returns:
        An open backend; close it when its caches are closed.

    Raises:
        ValueError: there is no backend of that name.
        TypeError: an option is unknown to it or missing.
        BackendUnavailableError: it cannot work here; the message says why.
        XenCallError: Xen refused; for example there is no such domain.
        CorruptImageError: a file contradicts its format.
    """
    if not isinstance(name, str) or name not in _BACKENDS:
        known = ", ".join(map(repr, sorted(_BACKENDS)))
        raise ValueError(f"backend {name!r} is unknown; known are {known}")
    module, _, class_name = _BACKENDS[name].partition(":")
    kind: type[Backend] = getattr(import_module(module, __package__), class_name)
    _check_options(name, kind, options)
    return kind(**options)


def _check_options(name: str, kind: type[Backend], options: dict[str, object]) -> None:
    """Raise TypeError for an option that a backend does not have, or that is missing."""
    function = vars(kind)["__init__"]  # not through `inspect`, whose import takes longer
    code = function.__code__
    known = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
    taken = ", ".join(f"{option}=" for option in known)
    for option in options:
        if option not in known:
            raise TypeError(f"backend {name!r} has no option {option!r}; it takes {taken}")
    for option in known:
        if option not in (function.__kwdefaults__ or {}) and option not in options:
            raise TypeError(f"backend {name!r} needs the option {option}=; it takes {taken}")


def _copy_valid(source: Mapping, target: Mapping) -> None:
    """Copy the valid pages of a mapping into a window; a frame of its own, which ends with it."""
    start = source.gfn - target.gfn << PAGE_SHIFT
    memory = flat.writable(target, start, source.length)
    first = 0
    for bad, group in groupby(source.errors or bytes(source.count), bool):
        end = first + (len(list(group)) << PAGE_SHIFT)
        if not bad:
            memory[first:end] = source.view(first, end - first)
        first = end


def copy_pages(gfn: int, pages: Sequence[Buffer | None]) -> Mapping:
    """Return a mapping that holds copies of guest pages; for backends that cannot map.

    Args:
        gfn: the first guest frame number.
        pages: for each page its 4096 bytes, or None if the page is missing.

    Returns:
        A read-only mapping in memory of this process. Missing pages have the errno EINVAL.

    Raises:
        ValueError: there are no pages, or one of them is not 4096 bytes long.
        XenCallError: there is no memory.
    """
    length = len(pages) << PAGE_SHIFT
    for number, page in enumerate(pages, gfn):
        if page is not None and memoryview(page).nbytes != PAGE_SIZE:
            size = memoryview(page).nbytes
            raise ValueError(f"page {number:#x} must be {PAGE_SIZE} bytes long, not {size}")
    if not length:
        raise ValueError("pages must be at least one page, not none")
    missing = bytes([_errno.EINVAL * (page is None) for page in pages])
    errors = missing if any(missing) else None
    allocated: list[int] = []
    try:
        address = libc.allocate(length, at_once=errors is None, result_out=allocated)
        mapping = Mapping(
            address, gfn, len(pages), writable=False, errors=errors, result_out=allocated
        )
    finally:
        for left in allocated:  # interrupted, and no mapping has taken the memory over
            libc.munmap(left, length)
    libc.dont_fork(address, length)
    memory = memoryview(mapping.memory).cast("B")  # writable, as the mapping's own is not
    for number, page in enumerate(pages):
        if page is not None:
            memory[number << PAGE_SHIFT : (number + 1) << PAGE_SHIFT] = memoryview(page).cast("B")
    return mapping
