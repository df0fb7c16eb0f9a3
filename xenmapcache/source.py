"""How a source of guest memory is named: ``xen:NAME``, ``core:FILE``, or just a file."""

from __future__ import annotations

import errno
import os
import stat
import struct
from typing import NamedTuple

from .backend import Backend, open_backend
from .errors import BackendUnavailableError

XL_PATH = os.environ.get("PATH", os.defpath) + ":/usr/local/sbin:/usr/sbin:/sbin"
KINDS = {
    "xen": "xen",
    "xenctrl": "xenctrl",
    "mock": "mock",
    "core": "coredump",
    "elf": "elfcore",
    "raw": "raw",
    "save": "save",
}
FORMS = "xen:DOMID, xen:NAME, mock:SIZE, core:FILE, elf:FILE, raw:FILE, save:FILE or a file"

_XL_TIMEOUT = 20
_SAVED_MAGICS = (b"Xen saved domain", b"LinuxGuestRecord", b"XenSavedDomain")
_LIME_MAGIC = b"EMiL"
_ELF_MAGIC = b"\x7fELF"
_ELF64_LITTLE = b"\x02\x01"
_ET_CORE = (b"\4\0", b"\0\4")
_SECTIONS = struct.Struct("<Q10x3H")
"""e_shoff, and from 0x3a on e_shentsize, e_shnum, e_shstrndx; at 0x28 of an ELF64 header."""
_NAMES_OF_SECTION = struct.Struct("<QQ")
"""sh_offset and sh_size; at 0x18 of an ELF64 section header."""
_MOST_NAMES = 1 << 16
_FAR = 1 << 62
"""Beyond any file; pread refuses what is still farther."""


class Source(NamedTuple):
    """What a name stands for: a backend and the option that says which. Immutable."""

    backend: str
    options: dict[str, object]


def open_source(spec: str | os.PathLike[str], **options: object) -> Backend:
    """Open a source of guest memory by the name that people give it.

    Args:
        spec: ``xen:DOMID``, ``xen:NAME`` and ``xenctrl:...`` likewise, ``mock:SIZE``,
            ``core:FILE`` (of ``xl dump-core``), ``elf:FILE`` (another ELF core),
            ``raw:FILE`` (flat, or LiME), ``save:FILE`` (of ``xl save``); or a path, whose
            format is recognised by its content. Write ``./xen:3`` for a file of that name.
        **options: more options of the backend, as for :func:`open_backend`.

    Returns:
        An open backend; close it when its caches are closed.

    Raises:
        ValueError: it names nothing that is there, or the file's format is not recognised;
            the message says what is there, and what to write.
        OSError: the file cannot be opened.
        TypeError, XenMapCacheError: as :func:`open_backend`.
    """
    name, found = parse_source(spec)
    return open_backend(name, **found, **options)


def parse_source(spec: str | os.PathLike[str]) -> Source:
    """Return what a name stands for; raises what :func:`open_source` does, but opens nothing."""
    text = os.fspath(spec)
    kind, colon, rest = text.partition(":")
    if not colon or kind not in KINDS:
        return Source(recognise(text), {"path": text})
    if not rest:
        raise ValueError(f"{text!r} does not say which: write {FORMS}")
    if kind == "mock":
        return Source("mock", {"memory": rest})
    if kind in ("xen", "xenctrl"):
        return Source(kind, {"domid": int(rest) if rest.isdecimal() else find_domain(rest)})
    return Source(KINDS[kind], {"path": rest})


def recognise(path: str) -> str:
    """Return the name of the backend for a file, going by its content.

    Raises:
        ValueError: it is none of the formats.
        OSError: it cannot be read.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        if ":" in path and "/" not in path:
            raise ValueError(f"there is no source {path!r}: write {FORMS}") from None
        raise
    try:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError(f"{path} is no regular file: copy it to one first")
        header = os.pread(fd, 64, 0)
        if header.startswith(_SAVED_MAGICS):
            return "save"
        if header.startswith(_LIME_MAGIC):
            return "raw"
        if header.startswith(_ELF_MAGIC) and header[16:18] in _ET_CORE:
            return "coredump" if b"\0.xen_pages\0" in _section_names(fd, header) else "elfcore"
    finally:
        os.close(fd)
    raise ValueError(
        f"{path} is no dump that is known (xl dump-core, xl save, ELF core, LiME): "
        f"write raw:{path} if it is a flat image"
    )


def _section_names(fd: int, header: bytes) -> bytes:
    """Return the names of an ELF64 file's sections as they lie in it; nothing if they do not."""
    if header[4:6] != _ELF64_LITTLE or len(header) < 64:
        return b""
    start, size, count, index = _SECTIONS.unpack_from(header, 0x28)
    section = os.pread(fd, 64, min(start + size * index, _FAR)) if index < count else b""
    if len(section) < 64:
        return b""
    offset, length = _NAMES_OF_SECTION.unpack_from(section, 0x18)
    return os.pread(fd, min(length, _MOST_NAMES), min(offset, _FAR))


def find_domain(name: str) -> int:
    """Return the number of the domain of that name, as ``xl`` knows it.

    Raises:
        BackendUnavailableError: there is no ``xl``, or it does not work here.
        ValueError: there is no such domain; the message says which there are.
    """
    status, answer = _xl("domid", name)
    if not status and answer.strip().isdecimal():
        return int(answer)
    status, answer = _xl("list")
    if status:
        complaint = " ".join(answer.split())
        raise BackendUnavailableError(
            f"domain {name!r} cannot be looked up: xl failed with status {status} ({complaint}): "
            "run it as root in Dom0, or name the domain by its number"
        )
    # The name comes first and may hold anything.
    lines = (line.rsplit(maxsplit=5) for line in answer.splitlines()[1:])
    names = [fields[0].strip() for fields in lines if len(fields) == 6]
    raise ValueError(f"there is no domain {name!r}: there are {', '.join(names) or 'none'}")


def _xl(*arguments: str) -> tuple[int, str]:
    """Run ``xl``; return its status, and what it says: to stdout, or to stderr if it failed."""
    import shutil  # these two take longer than all else here, and files need neither
    import subprocess

    xl = shutil.which("xl", path=XL_PATH)
    if xl is None:
        raise BackendUnavailableError(
            f"domain {arguments[-1]!r} cannot be looked up: xl is not installed: "
            "run it in Dom0, or name the domain by its number"
        )
    try:
        done = subprocess.run(  # noqa: S603 - no shell reads the name
            [xl, *arguments], capture_output=True, timeout=_XL_TIMEOUT, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BackendUnavailableError(f"xl {' '.join(arguments)} failed: {error}") from error
    return done.returncode, (done.stderr if done.returncode else done.stdout).decode(
        errors="replace"
    )
