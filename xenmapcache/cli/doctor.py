"""``xenmapcache doctor``: what mapping a live guest needs, what of it is here, and the remedies."""

from __future__ import annotations

import argparse
import ctypes
import grp
import os
import platform
import pwd
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Literal, NamedTuple

from .. import __version__
from ..address import PAGE_SIZE
from ..backend import Backend, open_backend
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
from ..binding.foreignmemory import ForeignMemory
from ..binding.handle import Handle, find_library, xen_version
from ..errors import BackendUnavailableError, FaultError, XenCallError, XenMapCacheError
from ..source import XL_PATH
from .output import Output, print_json

LIBRARIES = (FOREIGN_MEMORY, CONTROL, DEVICE_MODEL, EVENT_CHANNEL, TOOL_CORE, TOOL_LOG)
HANDLES: dict[str, type[Handle]] = {
    kind.declared.name: kind for kind in (ForeignMemory, Control, DeviceModel, EventChannels)
}
NEEDED_FOR = {
    DEVICE_MODEL.name: "for device models, and to write to a guest that is being migrated: ",
    EVENT_CHANNEL.name: "for device models: ",
    TOOL_CORE.name: "for device models that give up their rights: ",
}
BACKENDS = ("xen", "xenctrl")
HYPERVISOR = Path("/sys/hypervisor")
PROC_XEN = Path("/proc/xen")
DEV_XEN = Path("/dev/xen")
GFNS_TO_TRY = (0, 0x100, 0x1000)

_DOM0 = "run it as root in Dom0 of a Xen host"
_XL_TIMEOUT = 20


class Finding(NamedTuple):
    """One thing that was looked at. Immutable.

    Attributes:
        section: which part of the report it belongs to.
        subject: what was looked at.
        state: ``problem`` keeps a live guest from being mapped; a ``note`` does not.
        text: what was found.
        remedy: one line; empty where nothing need be done.
        details: more of it for scripts.
    """

    section: str
    subject: str
    state: Literal["ok", "problem", "note"]
    text: str
    remedy: str = ""
    details: dict[str, object] = {}  # noqa: RUF012 - of a NamedTuple, and never changed


# --- Python -------------------------------------------------------------------------


def check_python() -> Iterator[Finding]:
    """Look at Python and the binding."""
    section = "Python"
    version = f"{platform.python_implementation()} {platform.python_version()}"
    yield Finding(section, "xenmapcache", "ok", f"{__version__}, {version}, {platform.machine()}")
    try:
        import_module("xenmapcache.binding.cffi_loader")
        number = import_module("_cffi_backend").__version__
    except ImportError as error:
        text = f"ctypes (cffi cannot be imported: {error})"
        remedy = "it works as well, only slower; for the other: pip install cffi"
        yield Finding(section, "binding", "note", text, remedy, {"name": "ctypes"})
        return
    text = f"cffi {number} (preferred to ctypes)"
    yield Finding(section, "binding", "ok", text, "", {"name": "cffi"})


# --- libraries ----------------------------------------------------------------------


def check_libraries() -> Iterator[Finding]:
    """Look at each of Xen's libraries, and at what reads their symbol versions."""
    for library in LIBRARIES:
        yield from _guarded("Libraries", library.name, partial(_library, library))
    try:
        import_module("elftools")
    except ImportError:
        remedy = "pip install xenmapcache[elf]"
        text = "not shown: pyelftools is not installed"
        yield Finding("Libraries", "symbol versions", "note", text, remedy)


def _library(library: Library) -> Iterator[Finding]:
    # The backend that people use needs the first only.
    lacking: Literal["problem", "note"] = "problem" if library is LIBRARIES[0] else "note"
    try:
        asked = find_library(library)
        handle = ctypes.CDLL(asked)
    except (BackendUnavailableError, OSError) as error:
        text = f"not found: {library.soname}" if "*" in library.soname else f"not found: {error}"
        remedy = (
            f"{NEEDED_FOR.get(library.name, '')}install Debian's {library.package} "
            "or your distribution's Xen tools"
        )
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
    span = " to ".join(dict.fromkeys((*defined[:1], *defined[-1:]))) or "unversioned"
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
    remedy = f"this is not {library.name}: see LD_LIBRARY_PATH, or install {library.package}"
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


# --- devices ------------------------------------------------------------------------


def check_devices() -> Iterator[Finding]:
    """Look at the device nodes, by opening them."""
    new, old = DEV_XEN / "privcmd", PROC_XEN / "privcmd"
    # Xen's libraries take the old one only where there is no new one.
    takes_old = old.exists() and not new.exists()
    yield _node(new, "note" if takes_old else "problem", "modprobe xen-privcmd, in Dom0")
    remedy = "not needed if there is the one above; or mount -t xenfs xenfs /proc/xen"
    yield _node(old, "problem" if takes_old else "note", remedy)
    yield _node(DEV_XEN / "evtchn", "note", "needed for device models: modprobe xen-evtchn")
    yield _node(DEV_XEN / "gntdev", "note", "needed for grants only: modprobe xen-gntdev")


def _node(path: Path, lacking: Literal["problem", "note"], remedy: str) -> Finding:
    try:
        status = path.stat()
    except OSError as error:
        text = "missing" if isinstance(error, FileNotFoundError) else str(error.strerror)
        return Finding("Devices", str(path), lacking, text, remedy, {"exists": False})
    owner = _name(pwd.getpwuid, status.st_uid)
    text = f"{stat.filemode(status.st_mode)} {owner}:{_name(grp.getgrgid, status.st_gid)}"
    details: dict[str, object] = {"exists": True, "mode": f"{stat.S_IMODE(status.st_mode):04o}"}
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        text += f", cannot be opened by {_name(pwd.getpwuid, os.geteuid())}: {error.strerror}"
        remedy = "run as root in Dom0" if isinstance(error, PermissionError) else remedy
        return Finding("Devices", str(path), lacking, text, remedy, details | {"opens": False})
    return Finding("Devices", str(path), "ok", f"{text}, opens", "", details | {"opens": True})


def _name(look_up: Callable[[int], tuple[object, ...]], number: int) -> str:
    try:
        return str(look_up(number)[0])
    except KeyError:
        return str(number)


# --- Xen ----------------------------------------------------------------------------


def check_xen() -> Iterator[Finding]:
    """Look at the hypervisor under this machine, and whether this is Dom0."""
    section, kind, version = "Xen", _read(HYPERVISOR / "type"), xen_version()
    if kind != "xen":
        text = f"this is {kind}, not Xen" if kind else "this machine does not run under Xen"
        yield Finding(section, "hypervisor", "problem", text, f"{_DOM0}; or use the mock")
    else:
        extra = _read(HYPERVISOR / "version" / "extra") or ""
        guest = _read(HYPERVISOR / "guest_type") or "unknown"
        details: dict[str, object] = {"version": version, "extra": extra, "guest_type": guest}
        text = f"Xen {version or 'of unknown version'}{extra}, this domain is {guest}"
        yield Finding(section, "hypervisor", "ok", text, "", details)
    capabilities = _read(PROC_XEN / "capabilities")
    subject = str(PROC_XEN / "capabilities")
    if capabilities is None:
        remedy = "mount -t xenfs xenfs /proc/xen" if kind == "xen" else _DOM0
        yield Finding(section, subject, "note", "missing", remedy)
    elif "control_d" in capabilities:
        yield Finding(section, subject, "ok", "control_d: this is Dom0")
    else:
        text = "no control_d: this is a guest, not Dom0"
        yield Finding(section, subject, "problem", text, _DOM0)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None


# --- a live guest -------------------------------------------------------------------


def check_guest(domid: int | None) -> Iterator[Finding]:
    """Map a page of a live guest through each backend.

    Args:
        domid: of the guest; None takes the first that ``xl list`` shows.
    """
    section = "Live guest"
    if domid is None:
        domid, text = _first_guest()
        if domid is None:
            remedy = "start one (xl create), or name one: xenmapcache doctor --domid N"
            yield Finding(section, "guest", "problem", text, remedy)
            return
        yield Finding(section, "guest", "ok", text, "", {"domid": domid})
    else:
        yield Finding(section, "guest", "ok", f"domain {domid}, as asked", "", {"domid": domid})
    for name in BACKENDS:
        yield from _guarded(section, f"backend {name!r}", partial(_map_page, name, domid))


def _first_guest() -> tuple[int | None, str]:
    xl = shutil.which("xl", path=XL_PATH)
    if xl is None:
        return None, "none known: xl is not installed"
    try:
        listed = subprocess.run(  # noqa: S603 - it is xl, without words of anyone
            [xl, "list"], capture_output=True, timeout=_XL_TIMEOUT, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"none known: xl list failed: {error}"
    if listed.returncode:
        complaint = " ".join(listed.stderr.decode(errors="replace").split())
        return None, f"none known: xl list failed with status {listed.returncode}: {complaint}"
    for line in listed.stdout.decode(errors="replace").splitlines():
        fields = line.rsplit(maxsplit=5)  # the name comes first and may hold anything
        if len(fields) == 6 and fields[1].isdecimal() and int(fields[1]) > 0:
            return int(fields[1]), f"domain {fields[1]}, {fields[0].strip()}, the first in xl list"
    return None, "none is running, as xl list says"


def _map_page(name: str, domid: int) -> Iterator[Finding]:
    section, subject = "Live guest", f"backend {name!r}"
    try:
        with open_backend(name, domid=domid) as backend:
            gfn, size = _read_page(backend)
    except XenCallError as error:
        remedy = error.hint or "see the kernel's log and xl dmesg"
        text = str(error).removesuffix(f": {error.hint}")
    except BackendUnavailableError as error:
        text, _, remedy = str(error).rpartition(": ")  # what is missing: what to do
    except XenMapCacheError as error:
        text = str(error)
        remedy = "a PV guest has no guest-physical memory: try a PVH or HVM one"
    else:
        text = f"mapped gfn {gfn:#x}, read {size} bytes"
        yield Finding(section, subject, "ok", text, "", {"mapped": True, "gfn": gfn})
        return
    yield Finding(section, subject, "problem", text, remedy, {"mapped": False})


def _read_page(backend: Backend) -> tuple[int, int]:
    """Return the first page that is there of some that most guests have, and its size as read."""
    *others, last = GFNS_TO_TRY
    for gfn in others:
        with suppress(FaultError):
            return gfn, len(bytes(backend.map(gfn, 1, writable=False).view(0, PAGE_SIZE)))
    return last, len(bytes(backend.map(last, 1, writable=False).view(0, PAGE_SIZE)))


# --- the report ---------------------------------------------------------------------


def _guarded(
    section: str, subject: str, check: Callable[[], Iterable[Finding]]
) -> Iterator[Finding]:
    """Yield a check's findings; what it did not foresee is a finding too."""
    try:
        yield from check()
    except Exception as error:  # the doctor looks at broken machines
        text = f"the check failed: {type(error).__name__}: {error}"
        yield Finding(section, subject, "problem", text, "report this line to xenmapcache")


def examine(domid: int | None) -> Iterator[Finding]:
    """Yield everything that was found, section by section. Raises nothing."""
    yield from _guarded("Python", "Python", check_python)
    yield from _guarded("Libraries", "libraries", check_libraries)
    yield from _guarded("Devices", "devices", check_devices)
    yield from _guarded("Xen", "Xen", check_xen)
    yield from _guarded("Live guest", "guest", partial(check_guest, domid))


def run(options: argparse.Namespace) -> int:
    """Print the report. Returns 0 if a page of a live guest was mapped, else 1."""
    output = None if options.json else Output()
    findings = list(examine(options.domid))
    ready = any(finding.details.get("mapped") for finding in findings)
    if output is None:
        print_json({"ready": ready, "findings": [finding._asdict() for finding in findings]})
        return 0 if ready else 1
    for section in dict.fromkeys(finding.section for finding in findings):
        output.section(section)
        output.table(
            ("", "", ""),
            [
                (each.state, each.subject, "\n-> ".join(filter(None, (each.text, each.remedy))))
                for each in findings
                if each.section == section
            ],
        )
    problems = sum(finding.state == "problem" for finding in findings)
    if ready:
        output.section("A live guest was mapped.")
    else:
        plural = "" if problems == 1 else "s"
        output.section(f"No live guest was mapped: {problems} problem{plural}.")
        output.text("Without Xen: xenmapcache demo, or open_backend('mock', memory='256M').")
    return 0 if ready else 1
