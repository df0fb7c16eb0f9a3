"""How a source of guest memory is named: ``xen:NAME``, ``coredump:FILE``, or just a file."""

from __future__ import annotations

import errno
import os
import re
import stat
from typing import NamedTuple

from .address import PAGE_MASK, PAGE_SIZE, parse_size
from .backend import Backend, open_backend
from .binding.hints import in_dom0
from .errors import BackendUnavailableError, WrongFormatError
from .escape import printable
from .formats import signatures

XL_PATH = os.environ.get("PATH", os.defpath) + ":/usr/local/sbin:/usr/sbin:/sbin"
LIVE, FILES = ("xen", "xenctrl"), signatures.BACKENDS
"""The backends that are named by a domain, and those that are named by a file."""
FORMS = (
    "xen:DOMID, xen:NAME, mock:SIZE, coredump:FILE, elfcore:FILE, kdump:FILE, raw:FILE, save:FILE "
    "or a file"
)

_XL_TIMEOUT_S = 20
_NUMBER = r"(?:0x[0-9a-f]+|\d+)[kmgt]?(?:i?b)?"
_RANGE = rf"{_NUMBER}\+{_NUMBER}"
_PLACED = re.compile(
    rf"(?P<path>.+)@(?:(?P<address>{_NUMBER})|(?P<ranges>{_RANGE}(?:,{_RANGE})*))",
    re.IGNORECASE | re.DOTALL,
)
"""A flat image's path, and where in the guest its memory belongs."""


class Source(NamedTuple):
    """What a name stands for: a backend and the option that says which. Immutable."""

    backend: str
    options: dict[str, object]


def open_source(spec: str | os.PathLike[str], **options: object) -> Backend:
    """Open a source of guest memory by its name.

    Args:
        spec: a backend's name and what it opens: ``xen:DOMID`` or ``xen:NAME``,
            ``xenctrl:DOMID``, ``mock:SIZE``, ``coredump:FILE`` (of ``xl dump-core``),
            ``elfcore:FILE`` (another ELF core), ``kdump:FILE`` (makedumpfile's compressed
            format), ``raw:FILE`` (a flat image, or LiME), ``save:FILE`` (of ``xl save``);
            or a path, whose format is recognised by its content. Write ``./xen:3`` for a file
            of that name. ``raw:FILE@ADDRESS`` says where a flat image belongs;
            ``raw:FILE@ADDRESS+LENGTH,ADDRESS+LENGTH`` which ranges lie in it, one after the
            other.
        **options: more options of the backend, as for :func:`open_backend`.

    Returns:
        An open backend; close it when its caches are closed.

    Raises:
        ValueError: it names nothing that exists, or the file's format is not recognised;
            the message says what to write.
        WrongFormatError: no backend reads the file's format; the message says what does.
        OSError: the file cannot be opened.
        TypeError, XenMapCacheError: as :func:`open_backend`.
    """
    name, found = parse_source(spec)
    return open_backend(name, **found, **options)


def parse_source(spec: str | os.PathLike[str]) -> Source:
    """Return what a name stands for. Opens nothing, and raises what :func:`open_source` does."""
    text = os.fspath(spec)
    name, colon, rest = text.partition(":")
    if not colon or name not in (*LIVE, *FILES, "mock"):
        return Source(recognise(text), {"path": text})
    if not rest:
        form = {"mock": "mock:SIZE"}.get(name, f"{name}:FILE")
        if name in LIVE:
            raise ValueError(f"{text!r} names no domain; write {name}:DOMID or {name}:NAME")
        raise ValueError(f"{text!r} is incomplete; write {form}")
    if name == "mock":
        return Source("mock", {"memory": rest})
    if name in LIVE:
        return Source(name, {"domid": int(rest) if rest.isdecimal() else find_domain(rest)})
    return Source(name, _flat_image(rest) if name == "raw" else {"path": rest})


def _flat_image(text: str) -> dict[str, object]:
    """Return the options of the backend ``"raw"`` for a path, and a place after it.

    Raises:
        ValueError: an address or a length is not one of whole pages.
    """
    match = _PLACED.fullmatch(text)
    if match is None:
        path, at, place = text.rpartition("@")
        if at and not os.path.lexists(text) and os.path.lexists(path):
            raise ValueError(
                f"raw:{printable(text)}: {printable(place)} must be ADDRESS, or "
                "ADDRESS+LENGTH,ADDRESS+LENGTH"
            )
        return {"path": text}
    try:
        if match["address"]:
            return {"path": match["path"], "address": _page_multiple(match["address"])}
        ranges = [
            (_page_multiple(address), _page_multiple(length))
            for address, _, length in (each.partition("+") for each in match["ranges"].split(","))
        ]
    except ValueError as error:
        raise ValueError(
            f"raw:{printable(text)}: {error}. If the file's name ends so, write "
            f"raw:{printable(text)}@0"
        ) from None
    return {"path": match["path"], "ranges": ranges}


def _page_multiple(text: str) -> int:
    number = parse_size(text)
    if number & PAGE_MASK:
        raise ValueError(f"{number:#x} must be a multiple of {PAGE_SIZE:#x}")
    return number


def recognise(path: str) -> str:
    """Return the name of the backend for a file, according to its content.

    Raises:
        WrongFormatError: no backend reads its format.
        ValueError: its format is not recognised, or the path is not a regular file.
        OSError: it cannot be read.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        if ":" in path and "/" not in path:
            raise ValueError(f"{path!r} is neither a source nor a file; write {FORMS}") from None
        raise
    try:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError(f"{printable(path)} is not a regular file; copy it to one first")
        found = signatures.recognise(lambda offset, length: os.pread(fd, length, offset))
    finally:
        os.close(fd)
    if found is None:
        raise ValueError(
            f"{printable(path)}: unrecognised format; known are xl dump-core, xl save, ELF core, "
            f"KDUMP and LiME. Write raw:{printable(path)} only for a flat image"
        )
    if not found.backend:
        raise WrongFormatError(f"{path} is {found.format}: {found.remedy}")
    return found.backend


def find_domain(name: str) -> int:
    """Return the number of a domain that ``xl`` knows by a name.

    Raises:
        BackendUnavailableError: ``xl`` is not installed, or does not work here.
        ValueError: no domain has that name; the message lists those that exist.
    """
    status, answer = _xl("domid", name)
    if not status and answer.strip().isdecimal():
        return int(answer)
    status, answer = _xl("list")
    if status:
        complaint = " ".join(answer.split())
        raise BackendUnavailableError(
            f"domain {name!r} cannot be looked up: xl failed with status {status} ({complaint}): "
            f"run it {in_dom0()}, or give the domain's number"
        )
    # The name comes first and may have any characters.
    lines = (line.rsplit(maxsplit=5) for line in answer.splitlines()[1:])
    names = [fields[0].strip() for fields in lines if len(fields) == 6]
    known = printable(", ".join(names)) or "none"
    raise ValueError(f"no domain is named {name!r}; xl lists {known}")


def _xl(*arguments: str) -> tuple[int, str]:
    """Run ``xl``. Return its status, and its output: stdout, or stderr if it failed."""
    import shutil  # these two take longer than all else here, and files need neither
    import subprocess

    xl = shutil.which("xl", path=XL_PATH)
    if xl is None:
        raise BackendUnavailableError(
            f"domain {arguments[-1]!r} cannot be looked up: xl is not installed: "
            "run it in Dom0, or give the domain's number"
        )
    try:
        done = subprocess.run(  # noqa: S603 - no shell reads the name
            [xl, *arguments], capture_output=True, timeout=_XL_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BackendUnavailableError(f"xl {' '.join(arguments)} failed: {error}") from error
    return done.returncode, (done.stderr if done.returncode else done.stdout).decode(
        errors="replace"
    )
