"""Where a guest's page tables begin: as its kernel says, or as one of its CPUs was using them."""

from __future__ import annotations

from ..address import as_int
from ..cache import MapCache
from ..errors import UnsupportedOperationError
from ..formats.control_registers import ControlRegisters
from ..formats.cpu_notes import registers
from ..formats.kernel_layout import KernelLayout, kernel_layout
from ..formats.vmcoreinfo import VmcoreInfo
from .vmcoreinfo import find_vmcoreinfo


def layout_of_kernel(cache: MapCache, info: VmcoreInfo | None) -> KernelLayout:
    """Return the root of a kernel's tables, and their shape; see :meth:`AddressSpace.of_kernel`."""
    found = find_vmcoreinfo(cache) if info is None else info
    if found is None:
        raise UnsupportedOperationError(
            "the guest's memory has no VMCOREINFO, so it is not Linux, or is incomplete; "
            "give the root and the number of levels, or take them from a CPU's registers"
        )
    return kernel_layout(found)


def registers_of_cpu(cache: MapCache, cpu: int) -> ControlRegisters:
    """Return the registers of a CPU that uses page tables; see :meth:`AddressSpace.of_cpu`."""
    found = _control_registers(cache)
    number = as_int("cpu", cpu)
    if not found:
        raise UnsupportedOperationError(
            f"the backend {cache.backend.name!r} has no control registers of x86-64 CPUs; "
            "give the root and the number of levels, or take them from VMCOREINFO"
        )
    if not 0 <= number < len(found):
        raise ValueError(f"cpu must be 0 to {len(found) - 1}, not {number}")
    state = found[number]
    if not state.paging:
        raise UnsupportedOperationError(
            f"CPU {number} does not translate addresses: its CR0 is {state.cr0:#x}; "
            "give the root and the number of levels, or another CPU"
        )
    return state


def _control_registers(cache: MapCache) -> tuple[ControlRegisters, ...]:
    """Return the control registers of each CPU, as far as the source has them."""
    backend = cache.backend
    own = getattr(backend, "control_registers", None)
    if own is not None:
        return tuple(own())
    return tuple(
        ControlRegisters(cpu["cr0"], cpu["cr3"], cpu["cr4"])
        for cpu in registers(getattr(backend, "notes", ()))
        if "cr3" in cpu
    )
