"""libxengnttab: what C receives, what comes back, what is raised."""

from __future__ import annotations

import ctypes
import errno
from array import array
from collections.abc import Callable
from functools import partial

import pytest

from tests.binding.test_declarations import need_header, run_gcc
from tests.fake_xen import DOMID, Behaviour, FakeXen, real_library
from tests.fake_xen.fixtures import MakeFake
from xenmapcache.address import PAGE_SIZE
from xenmapcache.binding import granttable, libc
from xenmapcache.binding.declarations import GRANT_TABLE
from xenmapcache.binding.granttable import COPY, FD, MAP, UNMAP_IOCTL, GrantTable
from xenmapcache.errors import ClosedError, UnsupportedOperationError, XenCallError

REFS = array("I", [9, 8, 11])


@pytest.fixture(autouse=True)
def _granted(fake: FakeXen) -> None:
    """References 8 to 11 are pages 1 to 4, of which the last is granted read-only."""
    for ref, gfn in ((8, 1), (9, 2), (10, 3)):
        fake.grant(ref, gfn)
    fake.grant(11, 4, readonly=True)
    for gfn in range(1, 5):
        fake.write(gfn * PAGE_SIZE, b"page %d" % gfn)


def give_back(grants: GrantTable, index: int, count: int, token: list[None]) -> tuple[bool, bool]:
    """Give grants back; return what that returned, and whether it called `done`."""
    ended = [0]
    known = grants.give_back(index, count, token, ended.clear)
    return known, not ended


def test_pages_are_mapped_in_order(grants: GrantTable, fake: FakeXen) -> None:
    """One call maps all references in one piece, and unmap gives them back."""
    found: list[int] = []
    address = grants.map(DOMID, REFS, libc.PROT_READ, result_out=found)
    assert found == [address]
    assert [ctypes.string_at(address + page * PAGE_SIZE) for page in range(3)] == [
        b"page 2",
        b"page 1",
        b"page 4",
    ]
    assert fake.calls[-1].arguments[1:] == (3, DOMID, 9, libc.PROT_READ)
    assert [fake.granted(ref) for ref in range(8, 12)] == [1, 1, 0, 1]
    with pytest.raises(XenCallError) as caught:
        grants.unmap(address, 2)
    assert (caught.value.call, caught.value.errno) == ("xengnttab_unmap", errno.EINVAL)
    grants.unmap(address, 3)
    assert not any(fake.granted(ref) for ref in range(8, 12))


@pytest.mark.parametrize(
    ("refs", "domid", "prot"),
    [
        ([8, 50, 9], DOMID, libc.PROT_READ),
        ([11], DOMID, libc.READ_WRITE),
        ([8], DOMID + 1, libc.PROT_READ),
        ([], DOMID, libc.PROT_READ),
    ],
    ids=["one is not granted", "read-only for writing", "another domain", "none"],
)
def test_all_or_none(
    grants: GrantTable, fake: FakeXen, refs: list[int], domid: int, prot: int
) -> None:
    """A reference that cannot be mapped fails the call, and no page of it is mapped."""
    with pytest.raises(XenCallError) as caught:
        grants.map(domid, array("I", refs), prot)
    assert (caught.value.call, caught.value.domid) == (MAP, domid)
    assert caught.value.errno == errno.EINVAL
    assert not any(fake.granted(ref) for ref in range(8, 12))


def test_memory_goes_first_and_the_grants_after_it(grants: GrantTable, fake: FakeXen) -> None:
    """Grants whose memory was covered are given back by their index, once."""
    address = grants.map(DOMID, REFS, libc.PROT_READ)
    index = grants.index(address)
    assert libc.map_zeros_over(address, 3 * PAGE_SIZE, replace=True)
    assert fake.granted(8) == 1
    token: list[None] = [None]
    assert give_back(grants, index, 3, token) == (True, True)
    assert (fake.granted(8), token) == (0, [])
    other = grants.map(DOMID, array("I", [10]), libc.PROT_READ)
    assert grants.index(other) == index  # it is used again, so a second time would be wrong
    assert give_back(grants, index, 1, token) == (True, False)
    assert fake.granted(10) == 1
    libc.unmap(address, 3 * PAGE_SIZE)
    grants.unmap(other, 1)


def test_a_failure_puts_the_token_back(grants: GrantTable, fake: FakeXen) -> None:
    """What the kernel has refused can be tried again; what it does not know has ended."""
    address = grants.map(DOMID, array("I", [8]), libc.READ_WRITE)
    index, token = grants.index(address), [None]
    fake.plan("ioctl", Behaviour.FAIL, errno.EIO)
    with pytest.raises(XenCallError) as caught:
        give_back(grants, index, 1, token)
    assert (caught.value.call, caught.value.errno, token) == (UNMAP_IOCTL, errno.EIO, [None])
    fake.plan(FD, Behaviour.FAIL, errno.EBADF)
    with pytest.raises(XenCallError):
        give_back(grants, index, 1, token)
    assert (fake.granted(8), token) == (1, [None])
    grants.unmap(address, 1)
    assert give_back(grants, index, 1, token) == (False, True)
    assert token == []


def test_arguments_that_cannot_be_converted(
    grants: GrantTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If ctypes cannot make the call, its cause is raised, and the token is put back."""

    def fail(*_: object) -> int:
        raise ctypes.ArgumentError("argument 1: MemoryError: ")

    token: list[None] = [None]
    monkeypatch.setattr(grants, "_ioctl", fail)
    with pytest.raises(MemoryError):
        give_back(grants, 0, 1, token)
    assert token == [None]


def test_no_index(grants: GrantTable) -> None:
    """Where no mapping of grants begins, there is no index."""
    with pytest.raises(XenCallError) as caught:
        grants.index(PAGE_SIZE)
    assert caught.value.errno == errno.EINVAL


def test_copies(grants: GrantTable, fake: FakeXen) -> None:
    """Parts of pages are copied both ways without a mapping, each with a status of its own."""
    buffer = bytearray(12)
    parts = [(9, 0, 6), (8, 0, 6)]
    assert grants.copy(DOMID, parts, buffer, to_guest=False) == [0, 0]
    assert buffer == b"page 2page 1"
    parts = [(11, 0, 4), (50, 0, 4), (10, PAGE_SIZE - 4, 4)]
    assert grants.copy(DOMID, parts, bytearray(b"onlylast"[:4] * 3), to_guest=True) == [-1, -3, 0]
    assert fake.read(4 * PAGE_SIZE - 4, 4) == b"only"
    assert fake.read(4 * PAGE_SIZE, 6) == b"page 4"
    assert grants.copy(DOMID + 1, [(8, 0, 1)], bytearray(1), to_guest=False) == [-2]
    assert not any(fake.granted(ref) for ref in range(8, 12))


def test_copies_that_are_refused(grants: GrantTable, fake: FakeXen) -> None:
    """A part over a page's end, a failed call, and parts that do not fit the buffer."""
    for offset, planned in ((PAGE_SIZE - 1, 0), (0, errno.ENOMEM)):
        if planned:
            fake.plan(COPY, Behaviour.FAIL, planned)
        with pytest.raises(XenCallError) as caught:
            grants.copy(DOMID, [(8, offset, 2)], bytearray(2), to_guest=False)
        assert (caught.value.call, caught.value.domid) == (COPY, DOMID)
        assert caught.value.errno == (planned or errno.EINVAL)
    with pytest.raises(ValueError, match="must be 3 bytes"):
        grants.copy(DOMID, [(8, 0, 2)], bytearray(3), to_guest=False)


@pytest.mark.parametrize(
    "use",
    [
        lambda grants: grants.map(DOMID, REFS, libc.PROT_READ),
        lambda grants: grants.unmap(PAGE_SIZE, 1),
        lambda grants: grants.index(PAGE_SIZE),
        lambda grants: grants.give_back(0, 1, [None], int),
        lambda grants: grants.copy(DOMID, [(8, 0, 1)], bytearray(1), to_guest=False),
    ],
    ids=["map", "unmap", "index", "give_back", "copy"],
)
def test_closed(grants: GrantTable, use: Callable[[GrantTable], object]) -> None:
    """A closed handle makes no call."""
    grants.close()
    with pytest.raises(ClosedError):
        use(grants)


def test_an_older_library(make_fake: MakeFake, binding: str) -> None:
    """VERS_1.0 maps and unmaps; what it lacks is named."""
    fake = make_fake("OLD")
    fake.grant(8, 1)
    with GrantTable(binding=binding, library=fake.library) as grants:
        address = grants.map(DOMID, array("I", [8]), libc.PROT_READ)
        for lacking, use in (
            (FD, partial(grants.index, address)),
            (FD, partial(grants.give_back, 0, 1, [None], int)),
            (COPY, partial(grants.copy, DOMID, [(8, 0, 1)], bytearray(1), to_guest=False)),
        ):
            with pytest.raises(UnsupportedOperationError, match=lacking):
                use()
        grants.unmap(address, 1)


def test_the_real_library_leads_to_ioctl() -> None:
    """Looked up in the real library, the ioctl is libc's."""
    library = ctypes.CDLL(real_library(GRANT_TABLE))
    assert ctypes.cast(library["ioctl"], ctypes.c_void_p).value == (
        ctypes.cast(ctypes.CDLL(None)["ioctl"], ctypes.c_void_p).value
    )


def test_structures_and_numbers() -> None:
    """What the copy and both ioctls are given has the sizes and fields of the real headers."""
    need_header(GRANT_TABLE)
    header = f"""#include <sys/ioctl.h>
#include <stddef.h>
#include <stdint.h>
{GRANT_TABLE.includes}
#include <xen/grant_table.h>
#include <xen/gntdev.h>
"""
    if run_gcc(["-fsyntax-only"], header):
        pytest.skip("xen/gntdev.h of Linux is not installed")
    segment = "xengnttab_grant_copy_segment_t"
    source = f"""{header}
_Static_assert(IOCTL_GNTDEV_UNMAP_GRANT_REF == {granttable._UNMAP_NUMBER}, "unmap");
_Static_assert(IOCTL_GNTDEV_GET_OFFSET_FOR_VADDR == {granttable._OFFSET_NUMBER}, "offset");
_Static_assert(offsetof(struct ioctl_gntdev_unmap_grant_ref, count) == 8, "count");
_Static_assert(offsetof(struct ioctl_gntdev_get_offset_for_vaddr, offset) == 8, "offset");
_Static_assert(sizeof({segment}) == {granttable._TO_GUEST.size}, "size");
_Static_assert(sizeof({segment}) == {granttable._FROM_GUEST.size}, "size");
_Static_assert(offsetof({segment}, source.foreign.offset) == 4, "source");
_Static_assert(offsetof({segment}, source.foreign.domid) == 6, "source");
_Static_assert(offsetof({segment}, dest.virt) == 8, "dest");
_Static_assert(offsetof({segment}, dest.foreign.domid) == 14, "dest");
_Static_assert(offsetof({segment}, len) == 16, "len");
_Static_assert(offsetof({segment}, flags) == 18, "flags");
_Static_assert(offsetof({segment}, status) == 20, "status");
_Static_assert(GNTCOPY_source_gref == {granttable._SOURCE_IS_GRANT}, "flag");
_Static_assert(GNTCOPY_dest_gref == {granttable._DEST_IS_GRANT}, "flag");
"""
    assert run_gcc(["-fsyntax-only"], source) == ""
