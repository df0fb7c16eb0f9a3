"""Control registers of x86-64 processors: which page tables they use."""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

_XEN_CONTROLS: Final = struct.Struct("<5Q")
"""CR0, nothing, CR2, CR3, CR4."""
_XEN_CONTROLS_OFFSET: Final = 4984
"""``ctrlreg`` in ``vcpu_guest_context_t``."""
_CR0_PAGING, _CR4_LONG_ADDRESSES = 1 << 31, 1 << 12


class ControlRegisters(NamedTuple):
    """What a processor's control registers say of page tables. Immutable.

    Attributes:
        cr0, cr3, cr4: the registers.
    """

    cr0: int
    cr3: int
    cr4: int

    @property
    def paging(self) -> bool:
        """Whether the processor translates addresses."""
        return bool(self.cr0 & _CR0_PAGING)

    @property
    def levels(self) -> int:
        """How many levels its page tables have, 4 or 5, in 64-bit mode."""
        return 5 if self.cr4 & _CR4_LONG_ADDRESSES else 4


def of_xen_context(context: bytes) -> ControlRegisters:
    """Return the registers of Xen's ``vcpu_guest_context_t`` for x86-64."""
    cr0, _, _, cr3, cr4 = _XEN_CONTROLS.unpack_from(context, _XEN_CONTROLS_OFFSET)
    return ControlRegisters(cr0, cr3, cr4)
