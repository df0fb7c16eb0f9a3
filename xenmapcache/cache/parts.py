"""What a map cache is made of: its options are checked, and its parts are built in order."""

from __future__ import annotations

from ..address import MiB, parse_size
from ..backend import Backend, Capability
from ..grants import GrantSource
from .access import Access
from .ages import AgeWatch
from .buckets import BucketTable, check_bucket_shift
from .budget import Budget
from .dirty import DirtyPages
from .info import OnStale
from .leasing import Leasing
from .mapper import Mapper
from .moving import Mover
from .registry import LeaseRegistry
from .stale import StalePolicy, check_policy
from .window import Windows

_MAX_COPIES_BYTES = 256 * MiB


class Parts:
    """The parts of one cache. A part is given those that it uses, and knows no others.

    Args: as of :class:`MapCache`.

    Raises:
        TypeError, ValueError, UnsupportedOperationError: as :class:`MapCache`.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        bucket_shift: int,
        max_resident: int | str | None,
        max_copies: int | str | None,
        max_lease: int | str | None,
        on_stale: OnStale,
        record_origin: bool,
        warn_age: float | None,
        strict_views: bool,
        grants: GrantSource | None,
    ) -> None:
        if not isinstance(backend, Backend):
            raise TypeError(
                f"backend must be a Backend, as open_backend() returns, not "
                f"{type(backend).__name__}"
            )
        check_policy(on_stale, backend)
        self.budget = budget = Budget(0)
        room = backend.share_room(budget)
        limit = room if max_resident is None else parse_size(max_resident)
        budget.limit = limit
        copy_limit = None if max_copies is None else parse_size(max_copies)
        shift = check_bucket_shift(bucket_shift, limit, copy_limit)
        longest = limit if max_lease is None else parse_size(max_lease)
        if longest < 1:
            raise ValueError("max_lease must be at least 1 byte, not 0")
        self.copies = copies = _copies_budget(copy_limit, shift, budget)
        self.table = table = BucketTable(budget, shift, Capability.WRITE in backend.capabilities)
        budget.stream = table.stream
        table.stream.guards.append(budget.is_inside)
        self.dirty = dirty = DirtyPages(backend, table.stream)
        self.registry = registry = LeaseRegistry(table, dirty)
        self.mapper = mapper = Mapper(backend, table, budget, copies, registry.leased_bytes)
        registry.policy = StalePolicy(on_stale, backend, mapper, budget)
        self.access = access = Access(backend, table, mapper, budget, dirty)
        self.leasing = leasing = Leasing(
            backend, table, mapper, budget, registry, access, longest, record_origin
        )
        leasing.strict_views = strict_views
        if warn_age is not None:
            leasing.ages = AgeWatch(registry, warn_age)
        if not isinstance(grants, GrantSource | None):
            raise TypeError(
                "grants must be a GrantSource, as backend.open_grants() returns, not "
                f"{type(grants).__name__}"
            )
        access.grants = leasing.grants = grants
        self.windows = Windows(backend, table, mapper, budget, copies, registry, access, leasing)
        self.mover = Mover(backend, table, mapper, budget, dirty, registry, access)


def _copies_budget(limit: int | None, shift: int, budget: Budget) -> Budget:
    """Return the account of copies; an error about it names the option that is to be raised."""
    if limit is not None:
        return Budget(limit, "max_copies", mapped=budget)
    limit = max(min(budget.limit, _MAX_COPIES_BYTES), 1 << shift)
    option = "max_resident" if limit == budget.limit else "max_copies"
    return Budget(limit, option, mapped=budget)
