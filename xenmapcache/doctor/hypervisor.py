"""The hypervisor under this machine, and whether this is Dom0."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..binding.hints import in_dom0
from ..binding.library import xen_version
from .finding import Finding

HYPERVISOR, PROC_XEN = Path("/sys/hypervisor"), Path("/proc/xen")


def check_xen() -> Iterator[Finding]:
    """Look at the hypervisor under this machine, and whether this is Dom0."""
    elsewhere = f"run it {in_dom0()} of a Xen host"
    section, kind, version = "Xen", _read(HYPERVISOR / "type"), xen_version()
    if kind != "xen":
        text = f"this is {kind}, not Xen" if kind else "this machine does not run under Xen"
        yield Finding(section, "hypervisor", "problem", text, f"{elsewhere}; or use the mock")
    else:
        extra = _read(HYPERVISOR / "version" / "extra") or ""
        guest = _read(HYPERVISOR / "guest_type") or "unknown"
        details: dict[str, object] = {"version": version, "extra": extra, "guest_type": guest}
        text = f"Xen {version or 'of unknown version'}{extra}, this domain is {guest}"
        yield Finding(section, "hypervisor", "ok", text, "", details)
    capabilities = _read(PROC_XEN / "capabilities")
    subject = str(PROC_XEN / "capabilities")
    if capabilities is None:
        remedy = "mount -t xenfs xenfs /proc/xen" if kind == "xen" else elsewhere
        yield Finding(section, subject, "note", "missing", remedy)
    elif "control_d" in capabilities:
        yield Finding(section, subject, "ok", "control_d: this is Dom0")
    else:
        text = "no control_d: this is a guest, not Dom0"
        yield Finding(section, subject, "problem", text, elsewhere)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None
