"""The contract of a source of guest memory, and how one is opened by name."""

from __future__ import annotations

import abc
import enum
from collections.abc import Iterator
from importlib import import_module
from typing import ClassVar, Self

from .errors import UnsupportedOperationError
from .mapping import Mapping


class Capability(enum.Flag):
    """What a source can do beyond being read."""

    NONE = 0
    WRITE = enum.auto()
    """Its memory can be written."""
    REMAP = enum.auto()
    """A mapping can be moved to other guest pages at the same host address."""
    DIRTY = enum.auto()
    """It wants to be told which pages were written."""


class Backend(abc.ABC):
    """A source of guest memory. Also a context manager.

    Attributes:
        name: as given to :func:`open_backend`.
        capabilities: what it can do beyond mapping for reading.
        memory_end: one past the last guest address that may be there, or None if
            that is not known.

    Synchronization: all methods may be called in any threads at once.
    """

    name: ClassVar[str]
    capabilities: Capability = Capability.NONE
    memory_end: int | None = None

    @abc.abstractmethod
    def map(self, gfn: int, count: int, *, writable: bool) -> Mapping:
        """Map consecutive guest pages.

        Args:
            gfn: the first guest frame number.
            count: pages, at least one.
            writable: map for writing too; only with :attr:`Capability.WRITE`.

        Returns:
            A mapping, in which pages that are not there carry their errno.

        Raises:
            XenCallError: the call failed as a whole.
            ClosedError: the backend is closed.
        """

    def present(self, gfn: int, count: int) -> Iterator[tuple[int, int]] | None:  # noqa: ARG002 - a contract
        """Return ``(gfn, pages)`` of what is there of a range of pages, in order, apart.

        Returns:
            None if only mapping tells.
        """
        return None

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

    @abc.abstractmethod
    def close(self) -> None:
        """Map no more. Mappings that were made live on. Idempotent."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_BACKENDS = {
    "coredump": ".backends.coredump:CoredumpBackend",
    "elfcore": ".backends.elfcore:ElfCoreBackend",
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
            ``"mock"``; of files ``"coredump"``, ``"elfcore"``, ``"raw"`` or ``"save"``.
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
        raise ValueError(f"backend {name!r} is unknown: there are {known}")
    module, _, class_name = _BACKENDS[name].partition(":")
    backend: Backend = getattr(import_module(module, __package__), class_name)(**options)
    return backend
