"""What happens in a map cache, as data: the events that caches, servers and QEMU's logs have.

An event is a value without behaviour. Who emits events does not know who reads them. Each event
has a time in nanoseconds: since the epoch if its source has a wall clock, otherwise since an
unknown start, or None if its source has no clock. Caches and servers read the monotonic clock,
and add what :data:`WALL_CLOCK_OFFSET_NS` was when the package was imported: their times never go
back. All addresses are guest-physical unless an attribute says otherwise, and all ranges are
half-open.

Sources that see millions of equal steps report them in batches, :class:`Accessed` and
:class:`RequestsHandled`. The steps of a batch happened before the event that follows it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

WALL_CLOCK_OFFSET_NS = time.time_ns() - time.monotonic_ns()
"""What turns ``time.monotonic_ns()`` into the time of an event: nanoseconds since the epoch."""


class CacheOpened(NamedTuple):
    """A map cache was made, or an observer was attached to one that exists. Immutable.

    Attributes:
        time: in ns.
        buckets: how many it may have mapped.
        source: what it maps, for people, such as ``xen domain 3 (web)``; None if it is unknown.
        bucket_size: in bytes; None if it is unknown.
    """

    time: int | None
    buckets: int
    source: str | None = None
    bucket_size: int | None = None


class CacheClosed(NamedTuple):
    """A map cache was closed: nothing is mapped any more, except for kept views. Immutable.

    Attributes:
        time: in ns.
    """

    time: int | None


class BucketMapped(NamedTuple):
    """A range of guest memory was mapped, because an access missed. Immutable.

    Attributes:
        time: in ns, of the access.
        start: of the bucket, in bytes.
        length: of the bucket, in bytes.
        duration: of the access that missed, in ns; None if it is unknown.
        host: where the bucket begins in the process; None if it is unknown.
        holes: how many bytes of it have no memory; None if it is unknown.
    """

    time: int | None
    start: int
    length: int
    duration: int | None
    host: int | None
    holes: int | None = None


class BucketDropped(NamedTuple):
    """A bucket is found by no access any more. A lease or a view may still keep it. Immutable.

    Attributes:
        time: in ns.
        start: of the bucket, in bytes.
        length: of the bucket, in bytes.
        reason: ``"evicted"``, ``"invalidated"``, ``"closed"`` or ``"replaced"`` by a new mapping.
    """

    time: int | None
    start: int
    length: int
    reason: str


class LeaseTaken(NamedTuple):
    """A lease was taken, or was held when an observer was attached. Immutable.

    Attributes:
        time: in ns, when it was taken.
        lease: its number, as :attr:`.LeaseInfo.id`.
        kind: ``"dma"``, ``"device"`` or ``"window"``.
        start: in bytes.
        length: in bytes.
        owner: the holder's name, as the holder chose it.
        direction: ``"to-device"`` and so on, of DMA; otherwise None.
        thread: the name of the thread that took it.
        stale: whether it was stale from the start.
        origin: ``file:line in function`` of the caller, innermost last, if the cache records it.
    """

    time: int | None
    lease: int
    kind: str
    start: int
    length: int
    owner: str
    direction: str | None
    thread: str
    stale: bool
    origin: tuple[str, ...] | None = None


class LeaseReleased(NamedTuple):
    """A lease has ended. Immutable.

    Attributes:
        time: in ns.
        lease: its number.
        stale: whether an invalidation had made it stale.
        copied: how many pages ``on_stale="copy"`` has copied to the guest.
        lost: how many pages a device could have written that the guest may never see. If
            ``close(force=True)`` has ended a stale lease, these are all of them: it copies nothing.
    """

    time: int | None
    lease: int
    stale: bool = False
    copied: int = 0
    lost: int = 0


class HoleFault(NamedTuple):
    """An access, or a lease, came to a page that the guest does not have. Immutable.

    Attributes:
        time: in ns.
        address: the first page's that is missing, in bytes.
    """

    time: int | None
    address: int


class PagesDirtied(NamedTuple):
    """Pages were reported to the source as written. Immutable.

    Attributes:
        time: in ns.
        start: in bytes; a page's.
        length: in bytes; whole pages.
    """

    time: int | None
    start: int
    length: int


class MapFailed(NamedTuple):
    """An access got no memory. Immutable.

    Attributes:
        time: in ns.
        address: that was wanted.
    """

    time: int | None
    address: int


class Accessed(NamedTuple):
    """A batch of accesses that were served without a map call. Immutable.

    Attributes:
        counts: how many, by the number of the MiB, in the order of the first access to each.
    """

    counts: Mapping[int, int]


class Invalidated(NamedTuple):
    """All mappings that no lease holds were dropped, because the guest's memory changed. Immutable.

    Attributes:
        time: in ns.
        number: which invalidation of this source it is, from 1 on.
        dropped: how many buckets it has dropped; None if it is unknown.
        held: the numbers of the DMA leases that were held across it.
        duration: in ns; None if it is unknown.
    """

    time: int | None
    number: int
    dropped: int | None = None
    held: tuple[int, ...] = ()
    duration: int | None = None


class LeaseHeld(NamedTuple):
    """A DMA lease of QEMU was held across an invalidation. Immutable.

    Attributes:
        time: in ns.
        start: of the bucket that the lease begins in, in bytes.
        length: of the bucket, in bytes.
        host: where the lease's memory is in the process; it identifies the lease.
        number: of the invalidation; 0 if the source does not show invalidations.
    """

    time: int | None
    start: int
    length: int
    host: int
    number: int


class BucketReplaced(NamedTuple):
    """Memory at one host address shows another guest address now. Immutable.

    In QEMU's logs it is a bucket, of a cache a lease that :meth:`.MapCache.replace` has moved.

    Attributes:
        time: in ns.
        old: address that was shown until now.
        new: address that it has now.
    """

    time: int | None
    old: int
    new: int


class RequestKey(NamedTuple):
    """What requests of a batch have in common. Immutable.

    Attributes:
        kind: a number of :class:`.RequestKind`, or one that this package does not know.
        is_read: whether data goes to the guest.
        address: a port; the first address of a page of MMIO; or ``bdf << 32 | offset``.
        data: what was written to a PCI function's configuration space; otherwise None.
    """

    kind: int
    is_read: bool
    address: int
    data: int | None


class RequestsHandled(NamedTuple):
    """A batch of ioreqs. Immutable.

    Attributes:
        counts: how many, by what they have in common.
    """

    counts: Mapping[RequestKey, int]


class RequestHandled(NamedTuple):
    """An ioreq server has handled one request. Immutable.

    Attributes:
        time: in ns, when the handler was called.
        vcpu: whose; -1 of a buffered request.
        kind: a number of :class:`.RequestKind`.
        is_read: whether data goes to the guest.
        address: a port or a guest-physical address; ``bdf << 32 | offset`` of a PCI function.
        size: in bytes.
        duration: of the handler, in ns.
        failure: what went wrong, as the log says it; None if it was handled.
        region: which region handled it, for people; None if there was none.
    """

    time: int | None
    vcpu: int
    kind: int
    is_read: bool
    address: int
    size: int
    duration: int
    failure: str | None = None
    region: str | None = None


class ServerOpened(NamedTuple):
    """An ioreq server was made, or an observer was attached to one that exists. Immutable.

    Attributes:
        time: in ns.
        domain: the number of the domain that it serves.
        source: what it is, for people; None if it is unknown.
    """

    time: int | None
    domain: int
    source: str | None = None


class ServerClosed(NamedTuple):
    """An ioreq server was closed: no request reaches it any more. Immutable.

    Attributes:
        time: in ns.
    """

    time: int | None


class Quiesced(NamedTuple):
    """An ioreq server has stopped DMA before an invalidation. Immutable.

    Attributes:
        time: in ns, when the first callback was called.
        duration: of all callbacks, in ns.
        failures: how many callbacks failed.
    """

    time: int | None
    duration: int
    failures: int = 0


class EventsLost(NamedTuple):
    """Events were left out here, because nobody took them in time. Immutable.

    Attributes:
        time: in ns.
        lost: how many.
    """

    time: int | None
    lost: int


Event: TypeAlias = (
    CacheOpened
    | CacheClosed
    | BucketMapped
    | BucketDropped
    | MapFailed
    | Accessed
    | LeaseTaken
    | LeaseReleased
    | HoleFault
    | PagesDirtied
    | Invalidated
    | LeaseHeld
    | BucketReplaced
    | ServerOpened
    | ServerClosed
    | RequestHandled
    | RequestsHandled
    | Quiesced
    | EventsLost
)
"""Every event."""
