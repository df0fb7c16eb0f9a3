"""The backend of a live domain through libxenctrl's legacy ``xc_map_foreign_bulk``."""

from __future__ import annotations

from array import array
from typing import ClassVar

from ..binding.control import MAP_BULK, Control
from .domain import DomainBackend, check_domid


class XenControlBackend(DomainBackend):
    """The backend ``"xenctrl"``; for root in Dom0. It cannot move a device lease.

    Args:
        domid: the domain's number (``xl domid NAME``).
        binding: ``"cffi"`` or ``"ctypes"``; None takes cffi if it is there.
        library: a path instead of the libxenctrl that is found.

    Raises:
        XenMapCacheError: as :class:`.xen.XenBackend`.
    """

    name: ClassVar[str] = "xenctrl"
    map_call = MAP_BULK

    def __init__(
        self, *, domid: int, binding: str | None = None, library: str | None = None
    ) -> None:
        domid = check_domid(domid)
        self._control = Control(binding=binding, library=library)
        super().__init__(self._control, domid)

    def _map_pages(
        self, prot: int, gfns: array[int], result_out: list[int]
    ) -> tuple[int, bytes | None]:
        return self._control.map(self.domid, prot, gfns, result_out=result_out)
