"""Registers of a processor as an ELF core's PRSTATUS note has them, for x86-64."""

from __future__ import annotations

import struct

NOTE_NAME = "CORE"
NT_PRSTATUS = 1
CONTEXT_SIZE = 5168
"""Of Xen's ``vcpu_guest_context_t`` for x86-64."""

_USER_REGS = struct.Struct("<15Q2I9Q")
"""``cpu_user_regs``: r15 to rdi, error code, entry vector, then rip to gs."""
_USER_REGS_OFFSET = 520
_BASES = struct.Struct("<3Q")
"""fs_base, gs_base_kernel, gs_base_user."""
_BASES_OFFSET = 5144
_PRSTATUS = struct.Struct("<32xI76x27Q8x")
"""``pr_pid``, and the registers as Linux's ``user_regs_struct`` has them."""
_NO_SYSTEM_CALL = (1 << 64) - 1
_SELECTOR = 0xFFFF


def of_xen_context(context: bytes, vcpu: int) -> bytes | None:
    """Return a PRSTATUS note's data for a vCPU, or None if its registers are all zeros.

    Args:
        context: Xen's ``vcpu_guest_context_t`` for x86-64.
        vcpu: its number; the note names process ``vcpu + 1``, as QEMU's notes do.
    """
    registers = _USER_REGS.unpack_from(context, _USER_REGS_OFFSET)
    if not any(registers):
        return None  # never started, or written by a program that does not know registers
    general, (rip, cs, rflags, rsp, ss, es, ds, fs, gs) = registers[:15], registers[17:]
    fs_base, gs_base, gs_user = _BASES.unpack_from(context, _BASES_OFFSET)
    if cs & 3:  # in user mode, whose gs is the other one
        gs_base = gs_user
    selectors = [each & _SELECTOR for each in (ds, es, fs, gs)]
    return _PRSTATUS.pack(
        vcpu + 1, *general, _NO_SYSTEM_CALL, rip, cs & _SELECTOR, rflags, rsp, ss & _SELECTOR,
        fs_base, gs_base, *selectors,
    )  # fmt: skip
