"""Registers of processors: in the notes NT_PRSTATUS and QEMU's own, and in Xen's contexts.

All are of x86-64. A core has the notes of one type in the order of the processors.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from itertools import zip_longest

from .elf_notes import Note

_NT_PRSTATUS = 1
_PRSTATUS = struct.Struct("<112x27Q8x")
"""Linux's ``user_regs_struct`` lies in it at 112: r15 to gs."""
_PRSTATUS_PLACES = {"rip": 16, "rsp": 19, "rflags": 18, "cs": 17}
_QEMU = struct.Struct("<2I18Q240x6Q")
"""QEMU's ``QEMUX86CPUState``: version, size, rax to rflags, ten segments, cr0 to cr4, a base."""
_QEMU_VERSION = 1
_QEMU_PLACES = {
    "rip": 18,
    "rsp": 8,
    "rflags": 19,
    "cr0": 20,
    "cr2": 22,
    "cr3": 23,
    "cr4": 24,
}

_XEN_PLACES = {"rip": 520 + 128, "cs": 520 + 136, "rflags": 520 + 144, "rsp": 520 + 152}
"""Of ``user_regs``, in Xen's ``vcpu_guest_context_t``."""
_XEN_CONTROL = {"cr0": 4984, "cr2": 5000, "cr3": 5008, "cr4": 5016}
"""Of ``ctrlreg``."""

Registers = dict[str, int]


def registers(notes: Iterable[Note]) -> list[Registers]:
    """Return what notes say of each processor, by the registers' names, with its number as ``cpu``.

    A processor's two notes are merged. QEMU's note has control registers, too. Other notes are
    ignored.
    """
    status: list[Registers] = []
    states: list[Registers] = []
    for note in notes:
        data = bytes(note.data)
        if (note.name, note.note_type, len(data)) == ("CORE", _NT_PRSTATUS, _PRSTATUS.size):
            numbers = _PRSTATUS.unpack(data)
            status.append({name: numbers[place] for name, place in _PRSTATUS_PLACES.items()})
        elif note.name == "QEMU" and len(data) == _QEMU.size:
            numbers = _QEMU.unpack(data)
            if numbers[:2] == (_QEMU_VERSION, _QEMU.size):
                states.append({name: numbers[place] for name, place in _QEMU_PLACES.items()})
    nothing: Registers = {}
    pairs = zip_longest(status, states, fillvalue=nothing)
    return [{"cpu": number} | one | other for number, (one, other) in enumerate(pairs)]


def of_xen(contexts: Iterable[tuple[int, bytes]]) -> list[Registers]:
    """Return the registers of vCPUs, with the vCPU's number as ``cpu``.

    A vCPU whose registers are all zeros was never started, or its registers are not known; it is
    left out.

    Args:
        contexts: ``(vcpu, context)``; a context is Xen's ``vcpu_guest_context_t``.
    """
    found = []
    for vcpu, context in contexts:
        known = {
            name: int.from_bytes(context[place : place + 8], "little")
            for name, place in (_XEN_PLACES | _XEN_CONTROL).items()
        }
        known["cs"] &= 0xFFFF  # the rest says whether events are masked
        if any(known.values()):
            found.append({"cpu": vcpu} | known)
    return found
