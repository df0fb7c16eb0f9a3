"""The backend of a mock guest."""

from __future__ import annotations

import os
from typing import ClassVar

from ..backend import Backend, Capability
from ..errors import ClosedError
from ..mapping import Mapping
from ..mock import MockDomain, MockHypervisor


class MockBackend(Backend):
    """The backend ``"mock"``.

    Args:
        domain: a guest of a :class:`MockHypervisor`; or else
        memory: the size of one that is made for the purpose.

    Attributes:
        domain: the guest.
        domid: its number.

    Raises:
        TypeError: neither was given, or both.
    """

    name: ClassVar[str] = "mock"
    capabilities = Capability.WRITE | Capability.REMAP | Capability.DIRTY

    def __init__(
        self, *, domain: MockDomain | None = None, memory: int | str | None = None
    ) -> None:
        if (domain is None) == (memory is None):
            raise TypeError("the mock takes either domain= or memory=")
        if domain is None:
            assert memory is not None  # noqa: S101 - or the line above had raised
            domain = MockHypervisor().create_domain(memory=memory)
        if not isinstance(domain, MockDomain):
            raise TypeError(f"domain must be a MockDomain, not {type(domain).__name__}")
        self.domain = domain
        self.domid = domain.domid
        self._unmap = domain.unmap
        self._pid = os.getpid()
        self._closed = False

    @property
    def memory_end(self) -> int:  # type: ignore[override] # it grows
        """One past the highest guest address that can be there, in bytes."""
        return self.domain.memory_end

    def map(self, gfn: int, count: int, *, writable: bool) -> Mapping:
        """Map guest pages; see :meth:`Backend.map`."""
        self._check_open()
        address, errors = self.domain.map(gfn, count, writable)
        return Mapping(address, gfn, count, writable=writable, errors=errors, unmap=self._unmap)

    def remap(self, mapping: Mapping, gfn: int) -> None:
        """Let a mapping show other pages; see :meth:`Backend.remap`."""
        self._check_open()
        self.domain.remap(mapping, gfn)

    def mark_dirty(self, gfn: int, count: int) -> None:
        """Note written pages in ``domain.dirty``; see :meth:`Backend.mark_dirty`."""
        if self._closed:  # as the libraries' handles refuse it
            raise ClosedError("this mock backend is closed")
        self.domain.mark_dirty(gfn, count)

    def close(self) -> None:
        """Map no more; see :meth:`Backend.close`."""
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("this mock backend is closed")
        if os.getpid() != self._pid:
            raise ClosedError(
                f"this mock backend belongs to process {self._pid}, which forked this one"
            )
