"""Flat memory: a part that cannot be mapped leaves zeros, or the record is never unmapped whole."""

from __future__ import annotations

import errno
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fake_xen.child import in_child
from xenmapcache import XenCallError, flat
from xenmapcache.address import PAGE_SIZE
from xenmapcache.binding import libc
from xenmapcache.mapping import Mapping, live_mappings

PAGES = 8
LENGTH = PAGES * PAGE_SIZE


@pytest.fixture(autouse=True)
def _collected() -> None:
    """Nothing that earlier tests have left goes while a test counts mappings."""
    gc.collect()


def areas(mapping: Mapping) -> list[tuple[int, int, str]]:
    """Return ``(first page, end, permissions)`` of what is at a mapping's address."""
    found = []
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        span, permissions = line.split()[:2]
        start, end = (int(number, 16) - mapping.address for number in span.split("-"))
        start, end = max(0, start), min(LENGTH, end)
        if start < end:
            found.append((start // PAGE_SIZE, end // PAGE_SIZE, permissions))
    return found


class Call:
    """A map call over a part, which fails in a way."""

    def __init__(self, way: str) -> None:
        self.way = way
        self.taken: list[tuple[int, int]] = []

    def __call__(self, address: int, result_out: list[int]) -> None:
        """Map, or leave a gap, into which another thread may map."""
        length = 2 * PAGE_SIZE
        if self.way == "nothing was called":
            raise KeyboardInterrupt
        if self.way == "mapped":
            libc.allow_writes(address, length)
            result_out.append(address)
            raise KeyboardInterrupt
        if self.way != "nothing has changed":
            libc.munmap(address, length)
        if self.way == "taken":
            libc.mmap(address, length, libc.READ_WRITE, libc.PRIVATE_ZEROS | libc.MAP_FIXED, -1, 0)
            self.taken.append((address, length))
        if self.way == "taken in part":
            libc.mmap(
                address, PAGE_SIZE, libc.PROT_READ, libc.PRIVATE_ZEROS | libc.MAP_FIXED, -1, 0
            )
            self.taken.append((address, PAGE_SIZE))
        result_out.append(0)
        raise XenCallError("mmap", None, errno.ENOMEM)


@contextmanager
def failing(way: str) -> Iterator[Mapping]:
    """Yield memory over whose pages 3 and 4 something failed to be mapped."""
    mapping = flat.reserve(0, PAGES)
    call = Call(way)
    with pytest.raises((XenCallError, KeyboardInterrupt)):
        flat.place(mapping, 3 * PAGE_SIZE, 2 * PAGE_SIZE, call)
    yield mapping
    for address, length in call.taken:
        libc.unmap(address, length)


@pytest.mark.parametrize("way", ["nothing was called", "nothing has changed", "gap"])
def test_a_part_that_is_not_mapped_is_zeros(way: str) -> None:
    """Whether the failed call has removed them or not; the whole is unmapped once."""
    before = live_mappings()
    with failing(way) as mapping:
        found = areas(mapping)
        assert {permissions for _, _, permissions in found} == {"r--p"}
        assert sum(end - first for first, end, _ in found) == PAGES
        assert mapping.view(0, LENGTH) == bytes(LENGTH)
        assert live_mappings() == before + 1
        del mapping
    assert live_mappings() == before


def test_an_interrupt_after_the_call_changes_nothing() -> None:
    """The part is mapped, and belongs to the whole."""
    before = live_mappings()
    with failing("mapped") as mapping:
        assert areas(mapping)[1] == (3, 5, "rw-p")
        del mapping
    assert live_mappings() == before


@pytest.mark.parametrize("way", ["taken", "taken in part"])
def test_memory_of_others_is_never_unmapped(way: str) -> None:
    """If another thread may have got the address, the two sides alone are unmapped."""
    before = live_mappings()
    with failing(way) as mapping:
        assert mapping.abandoned
        assert live_mappings() == before
        kept = areas(mapping)
        assert kept == ([(3, 5, "rw-p")] if way == "taken" else [(3, 4, "r--p")])
        del mapping


def test_a_record_in_doubt_is_not_unmapped() -> None:
    """While the call is under way, a sweep leaves the memory alone, even without users."""
    before = live_mappings()
    mapping = flat.reserve(0, PAGES)
    record = mapping.record
    seen = []

    def call(address: int, result_out: list[int]) -> None:
        nonlocal mapping
        result_out.append(address)
        seen.append((record.token, record.mapped))

    flat.place(mapping, 0, PAGE_SIZE, call)
    assert seen == [([None], True)]  # given back by now: it is the same list
    del mapping
    assert live_mappings() == before


def test_what_was_placed_can_be_cleared() -> None:
    """Zeros replace it, and the whole stays one record."""
    mapping = flat.reserve(0, PAGES)
    flat.writable(mapping, 0, 2 * PAGE_SIZE)[:4] = b"copy"
    assert bytes(mapping.view(0, 4)) == b"copy"
    flat.clear(mapping, 0, 2 * PAGE_SIZE)
    assert mapping.view(0, 4) == bytes(4)


def test_there_is_no_address_space() -> None:
    """The error says so, and nothing is reserved."""
    before = live_mappings()
    with pytest.raises(XenCallError, match="mmap failed with ENOMEM"):
        flat.reserve(0, 1 << 40)
    assert live_mappings() == before


@pytest.mark.usefixtures("interrupted_making")
def test_an_interrupt_before_the_record_leaves_nothing() -> None:
    """The zeros are unmapped by the function that has taken them."""
    before = len(Path("/proc/self/maps").read_text(encoding="utf-8").splitlines())
    with pytest.raises(KeyboardInterrupt):
        flat.reserve(0, 1 << 20)
    after = len(Path("/proc/self/maps").read_text(encoding="utf-8").splitlines())
    assert after <= before + 1


@pytest.fixture
def interrupted_making(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt the making of the mapping."""

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(flat, "Mapping", interrupt)


def test_memory_that_cannot_be_made_writable(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of mprotect is an error, with a hint about the limits."""
    mapping = flat.reserve(0, PAGES)
    with pytest.raises(XenCallError, match="mprotect failed with ENOMEM.*max_map_count"):
        libc.allow_writes(0x1000, PAGE_SIZE)  # where nothing is mapped
    monkeypatch.setattr(libc, "functions", lambda: {"mprotect": lambda *_: (-1, errno.EACCES)})
    with pytest.raises(XenCallError, match="mprotect failed with EACCES"):
        flat.writable(mapping, 0, PAGE_SIZE)


def test_a_forked_child_finds_zeros() -> None:
    """All of it: what was copied, what was mapped, and what had been zeros."""
    mapping = flat.reserve(0, PAGES)
    flat.writable(mapping, 0, PAGE_SIZE)[:4] = b"copy"
    view = mapping.view(0, LENGTH)

    assert in_child(lambda: bytes(view) == bytes(LENGTH)) == 0
    assert bytes(view[:4]) == b"copy"
