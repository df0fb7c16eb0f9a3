"""Xen's libraries: which are installed, and which functions they have."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from ..binding.control import Control
from ..binding.declarations import (
    CONTROL,
    DEVICE_MODEL,
    EVENT_CHANNEL,
    FOREIGN_MEMORY,
    TOOL_CORE,
    TOOL_LOG,
    Library,
    prototypes,
)
from ..binding.devicemodel import DeviceModel
from ..binding.eventchannel import EventChannels
from ..binding.fence import LIBATOMIC, find_fence, host_architecture
from ..binding.foreignmemory import ForeignMemory
from ..binding.handle import Handle
from ..binding.hints import install_remedy
from ..binding.library import find_library
from ..errors import BackendUnavailableError, UnsupportedOperationError
from .finding import Finding, guarded

LIBRARIES = (FOREIGN_MEMORY, CONTROL, DEVICE_MODEL, EVENT_CHANNEL, TOOL_CORE, TOOL_LOG)
HANDLES: dict[str, type[Handle]] = {
    kind.declared.name: kind for kind in (ForeignMemory, Control, DeviceModel, EventChannels)
}
NEEDED_FOR = {
    DEVICE_MODEL.name: "for device models, and to write to a guest that is being migrated: ",
    EVENT_CHANNEL.name: "for device models: ",
    TOOL_CORE.name: "for device models that give up their rights: ",
}


def check_libraries() -> Iterator[Finding]:
    """Look at each of Xen's libraries, and at what reads their symbol versions."""
    for library in LIBRARIES:
        yield from guarded("Libraries", library.name, partial(_library, library))
    yield from guarded("Libraries", "memory fence", _fence)
    try:
        import_module("elftools")
    except ImportError:
        remedy = "pip install xenmapcache[elf]"
        text = "not shown: pyelftools is not installed"
        yield Finding("Libraries", "symbol versions", "note", text, remedy)


def _fence() -> Iterator[Finding]:
    """Look for the fence of processors that reorder loads and stores; x86 needs none."""
    try:
        fence = find_fence(host_architecture())
    except UnsupportedOperationError as error:
        remedy = f"for device models: install {LIBATOMIC} (Debian: apt install libatomic1)"
        yield Finding("Libraries", "memory fence", "note", f"none: {error}", remedy)
        return
    if fence is not None:
        origin = f"of {LIBATOMIC}" if isinstance(fence, partial) else "of the package's own code"
        yield Finding("Libraries", "memory fence", "ok", f"{origin}, for device models")


def _library(library: Library) -> Iterator[Finding]:
    # The backend that people use needs the first only.
    lacking: Literal["problem", "note"] = "problem" if library is LIBRARIES[0] else "note"
    try:
        asked = find_library(library)
        handle = ctypes.CDLL(asked)
    except (BackendUnavailableError, OSError) as error:
        text = f"not found: {library.soname}" if "*" in library.soname else f"not found: {error}"
        remedy = f"{NEEDED_FOR.get(library.name, '')}{install_remedy(library.package)}"
        yield Finding("Libraries", library.name, lacking, text, remedy, {"found": False})
        return
    declared = prototypes(library)
    missing = [name for name in declared if not hasattr(handle, name)]
    present = [name for name in declared if name not in missing]
    path = _file_of(handle, present[0]) if present else asked
    versions, defined = _symbol_versions(path)
    details: dict[str, object] = {
        "found": True,
        "asked": asked,
        "path": path,
        "versions": defined,
        "functions": {name: versions.get(name) for name in present},
        "missing": missing,
    }
    unknown = "unversioned" if find_spec("elftools") else "versions not shown"
    span = " to ".join(dict.fromkeys((*defined[:1], *defined[-1:]))) or unknown
    text = f"{path}, {span}, {len(present)} of {len(declared)} functions"
    if not missing:
        yield Finding("Libraries", library.name, "ok", text, "", details)
        return
    text += f"; missing: {', '.join(missing)}"
    kind = HANDLES.get(library.name)
    needed = {kind.open_call, kind.close_call, *kind.required} if kind else set(declared)
    if needed.isdisjoint(missing):
        yield Finding("Libraries", library.name, "note", text, "a newer Xen has them", details)
        return
    remedy = f"this is not {library.name}: {install_remedy(library.package)}"
    yield Finding("Libraries", library.name, lacking, text, remedy, details)


def _file_of(handle: ctypes.CDLL, function: str) -> str:
    """Return the file that a loaded function is in, with links resolved, as the kernel says."""
    address = ctypes.cast(getattr(handle, function), ctypes.c_void_p).value or 0
    for line in os.fsdecode(Path("/proc/self/maps").read_bytes()).splitlines():
        fields = line.split(maxsplit=5)
        first, end = (int(number, 16) for number in fields[0].split("-"))
        if first <= address < end and len(fields) > 5:
            return fields[5]
    return f"in memory at {address:#x}"


def _symbol_versions(path: str) -> tuple[dict[str, str], list[str]]:
    """Return the version of each function that a file exports, and the versions it defines."""
    try:
        from elftools.common.exceptions import ELFError
        from elftools.elf.elffile import ELFFile
        from elftools.elf.gnuversions import GNUVerDefSection, GNUVerSymSection
        from elftools.elf.sections import SymbolTableSection
    except ImportError:
        return {}, []
    try:
        with Path(path).open("rb") as file:
            elf = ELFFile(file)
            definitions = elf.get_section_by_name(".gnu.version_d")
            indexes = elf.get_section_by_name(".gnu.version")
            symbols = elf.get_section_by_name(".dynsym")
            if not (
                isinstance(definitions, GNUVerDefSection)
                and isinstance(indexes, GNUVerSymSection)
                and isinstance(symbols, SymbolTableSection)
            ):
                return {}, []
            # Index 1 is the file itself.
            names = {
                definition["vd_ndx"]: next(auxiliaries).name
                for definition, auxiliaries in definitions.iter_versions()
                if definition["vd_ndx"] > 1
            }
            versions = {}
            for position, symbol in enumerate(symbols.iter_symbols()):
                index = indexes.get_symbol(position)["ndx"]
                if isinstance(index, int) and symbol["st_shndx"] != "SHN_UNDEF":
                    versions[symbol.name] = names.get(index & 0x7FFF, "")
            return versions, list(names.values())
    except (OSError, ELFError):
        return {}, []
