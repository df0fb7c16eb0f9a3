"""What the errnos of Xen's calls mean, and what to do about them."""

from __future__ import annotations

import errno as _errno
import os

_ENOSYS = (
    "the hypervisor or the kernel does not have that call: use libraries of the Xen release that "
    "runs (library=, LD_LIBRARY_PATH), and a kernel with Xen's privileged commands"
)

HINTS = {
    _errno.ENOMEM: "out of memory, of address space (ulimit -v) or of mappings "
    "(sysctl vm.max_map_count), or the range is in use by another mapping",
    _errno.EACCES: "the hypervisor's security policy (XSM, Flask) forbids it: `xl dmesg` shows "
    "the denial, `xl getenforce` the mode; let the policy allow this domain to map that one",
    _errno.EPERM: "no right to that domain: the handle is restricted to another one, or the "
    "hypervisor's policy (XSM) forbids it, or this domain is not privileged",
    _errno.ENOSYS: _ENOSYS,
    _errno.ESRCH: "there is no such domain (see xl list), or it is this one, whose own memory "
    "cannot be mapped this way",
    _errno.EINVAL: "the hypervisor or kernel refused the arguments",
}
"""Of a call that failed as a whole."""

PAGE_HINTS = {
    _errno.ENOMEM: "the hypervisor or this domain's kernel has no memory to map the page: free "
    "some (xl info, free -m), release leases, or lower max_resident",
    _errno.EACCES: HINTS[_errno.EACCES],
    _errno.EPERM: f"{HINTS[_errno.EPERM]}; or the guest is PV, and has no guest-physical memory",
    _errno.ENOSYS: _ENOSYS,
}
"""Of a single page. Each of these errnos is a refusal: it does not say that there is no page."""


def in_dom0() -> str:
    """Return where to run, and as whom if that is not yet so: ``as root in Dom0``."""
    return "in Dom0" if os.geteuid() == 0 else "as root in Dom0"


def permission_remedy(node: object, errno: int) -> str:
    """Return what to do if a device node may not be opened (EACCES or EPERM).

    Root may open every node, unless the kernel was told otherwise: a cgroup's device rules give
    EPERM, the rest gives EACCES.
    """
    if os.geteuid() != 0:
        return f"run {in_dom0()}"
    if errno == _errno.EPERM:
        return (
            "root is refused by device rules, as those of a container or a systemd unit; let them "
            f"allow the node (docker run --device {node}, DeviceAllow=), or run it outside"
        )
    return (
        "root is refused by a security module (SELinux, AppArmor), by a mount with nodev, or as a "
        "container's root; run it outside of the container, or see the kernel's log"
    )


def install_remedy(package: str) -> str:
    """Return what to do if a library is not found, or is not the right one."""
    return (
        f"install your distribution's Xen libraries (a package like {package}), or name the file "
        "with library= or its folder in LD_LIBRARY_PATH"
    )
