"""find_vmcoreinfo(): a Linux guest's description of itself, found and told from others."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.images import linux_guest
from xenmapcache import MapCache, MockDomain, MockHypervisor, find_vmcoreinfo, open_backend
from xenmapcache.address import ADDRESS_LIMIT, PAGE_SIZE
from xenmapcache.formats.vmcoreinfo import VmcoreInfo, in_pages


@pytest.fixture
def guest() -> MockDomain:
    """A guest of 8 MiB with a hole of a page, and nothing in it."""
    return MockHypervisor().create_domain(memory="8M", holes=[(0x5000, PAGE_SIZE)])


@pytest.fixture
def cache(guest: MockDomain) -> Iterator[MapCache]:
    with open_backend("mock", domain=guest) as backend, MapCache(backend) as cache:
        yield cache


def put(guest: MockDomain, address: int, text: str) -> None:
    guest.write(address, text.encode())


def test_it_is_found(guest: MockDomain, cache: MapCache) -> None:
    """At the beginning of a page, in any page; its values can be looked up."""
    assert find_vmcoreinfo(cache) is None
    put(guest, 0x7000, linux_guest.info())
    found = find_vmcoreinfo(cache)
    assert found == VmcoreInfo(0x7000, linux_guest.info())
    assert found.value("OSRELEASE") == linux_guest.RELEASE
    assert found.value("NUMBER(phys_base)") == str(linux_guest.PHYS_BASE)
    assert found.value("NUMBER(absent)") is None
    assert find_vmcoreinfo(cache, 0x7000, PAGE_SIZE) == found
    assert find_vmcoreinfo(cache, 0, 0x7000) is None
    assert find_vmcoreinfo(cache, 0x8000) is None


@pytest.mark.parametrize(
    "text",
    [
        "OSRELEASE=6.1\n",
        "OSRELEASE=6.1\nPAGESIZE=4096\nno value\n",
        "OSRELEASE=6.1\nPAGESIZE=4096\n=value\n",
        "OSRELEASE=6.1\nPAGESIZE=4096\nBUILD-ID=\x7f\n",
        "OSRELEASE=6.1\nPAGESIZE=4096\nBUILD-ID=\x1b[2J\n",
        "OSRELEASE=6.1\nPAGESIZE=4096\n\n",
        "OSRELEASE=6.1 PAGESIZE=4096\n",
    ],
    ids=["no page size", "no =", "no key", "delete", "escape", "empty line", "one line"],
)
def test_what_is_something_else(guest: MockDomain, cache: MapCache, text: str) -> None:
    """Text that only begins like it, as a program that looks for it has it, is skipped."""
    put(guest, 0x1000, text)
    put(guest, 0x2010, linux_guest.info())
    assert find_vmcoreinfo(cache) is None
    put(guest, 0x3000, linux_guest.info())
    found = find_vmcoreinfo(cache)
    assert found is not None
    assert found.address == 0x3000


def test_a_full_page(guest: MockDomain, cache: MapCache) -> None:
    """Of a text that fills its page, the last line, which the kernel has cut off, is left out."""
    text = linux_guest.info(more=4096 * "SYMBOL(a)=1\n")[:PAGE_SIZE]
    put(guest, 0x4000, text)
    assert not text.endswith("\n")
    found = find_vmcoreinfo(cache)
    assert found == VmcoreInfo(0x4000, text[: text.rindex("\n") + 1])


def test_the_kernel_in_memory_counts(guest: MockDomain, cache: MapCache) -> None:
    """Of several texts the one whose kernel is where it says; or the first, if none is."""
    put(guest, 0x1000, linux_guest.info("5.10.0-before"))
    put(guest, 0x2000, linux_guest.info())
    found = find_vmcoreinfo(cache)
    assert found is not None
    assert found.address == 0x1000
    guest.write(linux_guest.UTS, linux_guest.uts_namespace())
    found = find_vmcoreinfo(cache)
    assert found is not None
    assert (found.address, found.value("OSRELEASE")) == (0x2000, linux_guest.RELEASE)
    guest.write(linux_guest.UTS, linux_guest.uts_namespace(f"{linux_guest.RELEASE}-more"))
    found = find_vmcoreinfo(cache)
    assert found is not None
    assert found.address == 0x1000


@pytest.mark.parametrize(
    ("uts", "expected"), [(0x5000, False), (0x4F00, False), (0x6000, True)], ids=hex
)
def test_a_kernel_that_should_be_in_a_hole(
    guest: MockDomain, cache: MapCache, uts: int, expected: bool
) -> None:
    """A text that points to a missing page describes nothing, and nothing is raised."""
    guest.write(0x6000, linux_guest.uts_namespace("6.2"))
    put(guest, 0x1000, linux_guest.info("5.10.0-first"))
    put(guest, 0x2000, linux_guest.info("6.2", uts=uts))
    found = find_vmcoreinfo(cache)
    assert found is not None
    assert (found.address == 0x2000) is expected


@pytest.mark.parametrize(
    ("symbol", "base"),
    [
        ("", "0"),
        ("zzz", "0"),
        ("ffffffff80000000", ""),
        ("ffffffff80000000", "1e3"),
        ("ffffffff80000000", "-1"),
        ("ffffffff80000000", str(ADDRESS_LIMIT)),
        ("1", "0"),
        ("f" * 3000, "0"),
    ],
)
def test_numbers_of_a_hostile_guest(symbol: str, base: str) -> None:
    """Anything but a number that is a guest address is left alone."""
    text = f"OSRELEASE=6\nPAGESIZE=4096\nSYMBOL(init_uts_ns)={symbol}\nNUMBER(phys_base)={base}\n"

    def read(address: int, length: int) -> bytes:
        raise AssertionError(f"{address:#x} is read")

    assert not VmcoreInfo(0, text).describes(read)


@pytest.mark.parametrize(
    ("offset", "expected"),
    [("0xffff7fffc8000000", True), ("0xffff7fffc7fff000", False), ("", False), ("arm", False)],
)
def test_an_arm64_kernel(offset: str, expected: bool) -> None:
    """It says how far its image's virtual addresses are from the physical ones."""
    text = (
        "OSRELEASE=6.1\nPAGESIZE=4096\nSYMBOL(init_uts_ns)=ffff800009f01000\n"
        f"NUMBER(kimage_voffset)={offset}\n"
    )

    def read(address: int, length: int) -> bytes:
        return b"Linux\0web\0006.1\0" if address == 0x41F01000 else b"another one"

    assert VmcoreInfo(0, text).describes(read) is expected


def test_a_text_without_a_release() -> None:
    """An empty release would be found in any memory of zeros."""
    text = "OSRELEASE=\nSYMBOL(init_uts_ns)=ffffffff80000000\nNUMBER(phys_base)=0\n"
    assert not VmcoreInfo(0, text).describes(lambda address, length: bytes(length))


def test_pages_of_many_texts() -> None:
    """Each page is looked at, and the texts come in order; one inside a page does not count."""
    page = linux_guest.info().encode().ljust(PAGE_SIZE, b"\0")
    inside = bytes(16) + page[:-16]
    found = list(in_pages(page + inside + page, 0x10000))
    assert [each.address for each in found] == [0x10000, 0x12000]
