"""What is checked before a server opens, and how it is created."""

from __future__ import annotations

from ..arch import ARCHITECTURES, Architecture
from ..binding.fence import host_architecture
from ..cache import MapCache
from ..errors import UnsupportedOperationError
from .guest_type import GUEST_TYPES
from .link import HypervisorLink, IoreqDomain


def check_pair(domain: int | IoreqDomain, cache: MapCache) -> None:
    """Refuse a server and a cache that are not of the same domain."""
    if isinstance(domain, bool) or not isinstance(domain, int | IoreqDomain):
        raise TypeError(f"domain must be a domid or a MockDomain, not {domain!r}")
    if not isinstance(cache, MapCache):
        raise TypeError(f"cache must be a MapCache, not {type(cache).__name__}")
    domid = domain if isinstance(domain, int) else domain.domid
    mapped = getattr(cache.backend, "domid", domid)
    if mapped != domid:
        raise ValueError(
            f"the cache maps domain {mapped}, but the server is for domain {domid}; "
            "both must be of one domain"
        )
    mock = getattr(cache.backend, "domain", domain)  # two may have one number
    if mock is domain:
        return
    if isinstance(domain, int):
        raise ValueError(
            f"domain {domain} is a live domain's number, but the cache maps a MockDomain; "
            "pass that MockDomain"
        )
    raise ValueError(
        f"the cache maps another domain {domid} than {domain!r}, of another hypervisor; "
        "pass the MockDomain that the cache maps"
    )


def architecture_of(domain: int | IoreqDomain, *, buffered: bool) -> Architecture:
    """Return a guest's architecture: a live guest has its host's.

    Raises:
        UnsupportedOperationError: guests of this architecture cannot be served, or have no
            buffered requests, and a server of them is to take some.
    """
    architecture = host_architecture() if isinstance(domain, int) else ARCHITECTURES[domain.machine]
    if buffered and architecture.mmio_only:
        raise UnsupportedOperationError(
            f"IoreqServer(buffered=True): Xen sends no buffered requests of an {architecture.name} "
            "guest, but all its requests one by one; leave buffered= out"
        )
    return architecture


def connect(
    domain: int | IoreqDomain, buffered: bool, *, recover: bool, binding: str | None
) -> HypervisorLink:
    """Create the server at its hypervisor."""
    if not isinstance(domain, int):
        return domain.open_ioreq_server(buffered=buffered, recover=recover)
    from .xen import XenLink

    return XenLink(domain, buffered=buffered, recover=recover, binding=binding)


def check_options(guest_type: str | None, quiesce_timeout: float, answer_timeout: float) -> None:
    """Refuse values that no server can have."""
    if guest_type is not None and guest_type not in GUEST_TYPES:
        raise ValueError(f"guest_type {guest_type!r} must be one of {', '.join(GUEST_TYPES)}")
    if not (quiesce_timeout >= 0 and answer_timeout >= 0):
        raise ValueError(
            f"quiesce_timeout {quiesce_timeout} and answer_timeout {answer_timeout} must be "
            "0 or more seconds"
        )


def agreed_type(domid: int, told: str | None, stated: str | None) -> str | None:
    """Return a guest's type; None if neither the toolstack nor the program says it.

    Raises:
        ValueError: they contradict each other.
    """
    if told is not None and stated is not None and told != stated:
        raise ValueError(
            f"guest_type {stated!r}: Xen's toolstack says that domain {domid} is {told!r}"
        )
    return told or stated
