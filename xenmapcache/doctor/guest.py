"""A live guest: whether it can be mapped, and if not, what state it is in."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import suppress
from functools import partial

from ..address import PAGE_SIZE
from ..backend import Backend, open_backend
from ..binding.hints import HINTS
from ..devicemodel.guest_type import guest_type
from ..errors import BackendUnavailableError, FaultError, XenCallError, XenMapCacheError
from .finding import Finding, guarded
from .holders import find_holders
from .xl import xl, xl_list

BACKENDS = ("xen", "xenctrl")
GFNS_TO_TRY = (0, 0x100, 0x1000, 0x40000)
"""Where guests have memory: x86's at 0, though perhaps not all of it; Arm's from 1 GiB on."""
HAS_PV = os.uname().machine != "aarch64"
_SECTION = "Live guest"
_NO_PV = "a PV guest has no guest-physical memory; use a PVH or HVM guest"


def check_guest(domid: int | None) -> Iterator[Finding]:
    """Map a page of a live guest through each backend.

    Args:
        domid: of the guest; None selects the first one in ``xl list``.
    """
    if domid is None:
        domid, text = _first_guest()
        if domid is None:
            remedy = "start one (xl create), or name one: xenmapcache doctor --domid N"
            yield Finding(_SECTION, "guest", "problem", text, remedy)
            return
        yield Finding(_SECTION, "guest", "ok", text, "", {"domid": domid})
    else:
        yield Finding(_SECTION, "guest", "ok", f"domain {domid}, as asked", "", {"domid": domid})
    for name in BACKENDS:
        yield from guarded(_SECTION, f"backend {name!r}", partial(_map_page, name, domid))


def explain_no_pages(domid: int) -> tuple[str, str]:
    """Return why a live domain shows no page, and what to do.

    Of a dying domain Xen says the same as of a PV guest: no such page (EINVAL). ``xl list``
    and xenstore tell them apart.
    """
    if _is_dying(domid):
        holders = ", ".join(_processes_with_foreign_memory()) or "none that this user can see"
        return (
            f"domain {domid} is dying: it was destroyed, but a process still maps its memory",
            f"end the process that maps it; processes with foreign memory: {holders}",
        )
    kind = guest_type(domid)
    if kind in ("hvm", "pvh") or not HAS_PV:
        known = f", which is {kind.upper()}," if kind else ""
        return (
            f"domain {domid}{known} shows no page where most guests have memory",
            "look whether it is still being built or has given its memory up (xl list)",
        )
    return f"domain {domid} shows no page", _NO_PV


def _explain_refusal(domid: int, error: XenCallError) -> str:
    """Return what to do about a call or a page that Xen has refused."""
    if error.errno not in (errno.EACCES, errno.EPERM):
        return error.hint or "see the kernel's log and xl dmesg"
    kind = guest_type(domid)
    if error.errno == errno.EPERM and kind == "pv":
        return _NO_PV
    hint = HINTS[error.errno] if kind and error.address is not None else error.hint
    mode, _ = xl("getenforce")  # fails where Xen has no Flask
    known = f" (xl getenforce says {' '.join(mode.split())})" if mode.strip() else ""
    return f"{hint}{known}"


def _first_guest() -> tuple[int | None, str]:
    rows, problem = xl_list()
    guests = [row for row in rows if row[1] > 0]
    for name, domid, state in guests:
        if "d" not in state:
            return domid, f"domain {domid}, {name}, the first in xl list that is not dying"
    text = problem or "none is running, according to xl list"
    dying = ", ".join(str(domid) for _, domid, _ in guests)
    return None, f"{text}; dying: {dying}" if dying else text


def _is_dying(domid: int) -> bool:
    rows, _ = xl_list()
    return any(number == domid and "d" in state for _, number, state in rows)


def _processes_with_foreign_memory() -> Iterator[str]:
    """Yield ``PID (name)`` of each process that maps pages of some domain, as far as visible."""
    with suppress(OSError):  # there is no /proc
        for holder in find_holders().holders:
            if holder.keeps:
                yield f"{holder.pid} ({holder.name})"


def _map_page(name: str, domid: int) -> Iterator[Finding]:
    subject = f"backend {name!r}"
    try:
        with open_backend(name, domid=domid) as backend:
            gfn, length = _read_page(backend)
    except XenCallError as error:
        remedy = _explain_refusal(domid, error)
        text = str(error).removesuffix(f": {error.hint}")
    except BackendUnavailableError as error:
        text, _, remedy = str(error).rpartition(": ")  # what is missing: what to do
    except FaultError as error:
        reason, remedy = explain_no_pages(domid)
        text = f"{reason}: {error}"
    except XenMapCacheError as error:
        text, remedy = str(error), "see docs/troubleshooting.md"
    else:
        text = f"mapped gfn {gfn:#x}, read {length} bytes"
        yield Finding(_SECTION, subject, "ok", text, "", {"mapped": True, "gfn": gfn})
        return
    yield Finding(_SECTION, subject, "problem", text, remedy, {"mapped": False})


def _read_page(backend: Backend) -> tuple[int, int]:
    """Return the first present page of some that most guests have, and the length that was read."""
    *others, last = GFNS_TO_TRY
    for gfn in others:
        with suppress(FaultError):
            return gfn, len(bytes(backend.map(gfn, 1, writable=False).view(0, PAGE_SIZE)))
    return last, len(bytes(backend.map(last, 1, writable=False).view(0, PAGE_SIZE)))
