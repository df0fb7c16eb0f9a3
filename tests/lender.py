"""A guest that lends pages: a mock, or the stand-in for Xen's library, seen from both sides."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from tests.fake_xen import DOMID, need
from tests.fake_xen.fixtures import MakeFake, make_fake
from xenmapcache import (
    MapCache,
    MockHypervisor,
    open_backend,
)
from xenmapcache.address import PAGE_SIZE
from xenmapcache.backend import Backend
from xenmapcache.grants import GRANT_BIT, GrantSource, grant_address

__all__ = ["cache", "grants", "lender", "make_fake", "ref_of"]

KINDS = ["mock", "cffi", "ctypes"]


@dataclass
class Lender:
    """A guest that lends pages, seen from both sides.

    Attributes:
        backend: over it.
        grant: lends a page, as a reference that follows the last one.
        revoke: takes a grant back that is not mapped.
        is_mapped: whether a granted page is mapped.
        read, write: as the guest does.
        domid: its number.
        misuses: how often the library was used wrongly.
    """

    backend: Backend
    grant: Callable[[int, bool], int]
    revoke: Callable[[int], object]
    is_mapped: Callable[[int], bool]
    read: Callable[[int, int], bytes]
    write: Callable[[int, bytes], object]
    domid: int
    misuses: Callable[[], int] = int

    def lend(self, count: int = 1, *, gfn: int = 1, readonly: bool = False) -> int:
        """Grant consecutive pages that say which they are, and return the address of the first."""
        refs = []
        for number in range(gfn, gfn + count):
            self.write(number * PAGE_SIZE, b"page %02d" % number)
            refs.append(self.grant(number, readonly))
        assert refs == [*range(refs[0], refs[0] + count)]
        return grant_address(refs[0])


@pytest.fixture(params=KINDS)
def lender(request: pytest.FixtureRequest, make_fake: MakeFake) -> Iterator[Lender]:
    """A guest of 64 pages."""
    gc.collect()
    if request.param == "mock":
        guest = MockHypervisor().create_domain(memory=64 * PAGE_SIZE)
        with open_backend("mock", domain=guest) as backend:
            yield Lender(
                backend,
                lambda gfn, readonly: guest.grants.grant(gfn, readonly=readonly),
                guest.grants.revoke,
                guest.grants.is_mapped,
                guest.read,
                guest.write,
                guest.domid,
            )
        return
    if request.param == "cffi":
        need("_cffi_backend")
    fake = make_fake()
    refs = iter(range(8, 128))

    def grant(gfn: int, readonly: bool) -> int:
        ref = next(refs)
        fake.grant(ref, gfn, readonly=readonly)
        return ref

    with open_backend("xen", domid=DOMID, binding=request.param, library=fake.library) as backend:
        yield Lender(
            backend,
            grant,
            fake.revoke,
            lambda ref: fake.granted(ref) > 0,
            fake.read,
            fake.write,
            DOMID,
            lambda: fake.misuses,
        )
    assert fake.misuses == 0


@pytest.fixture
def grants(lender: Lender) -> Iterator[GrantSource]:
    """The guest's grants, of which eight may be mapped at a time, and four in one lease."""
    grants = lender.backend.open_grants(max_refs=4, max_mapped=8)
    yield grants
    grants.close(force=True)


@pytest.fixture
def cache(lender: Lender, grants: GrantSource) -> Iterator[MapCache]:
    """A cache that knows the grants."""
    cache = MapCache(lender.backend, bucket_shift=14, grants=grants)
    yield cache
    cache.close(force=True)


def ref_of(address: int) -> int:
    return (address & ~GRANT_BIT) // PAGE_SIZE
