"""Mapping: faults, and a finalizer that is right in whatever moment it runs."""

from __future__ import annotations

import ctypes
import errno
import gc
import os

import pytest

from xenmapcache import FaultError
from xenmapcache.address import PAGE_SIZE
from xenmapcache.binding import libc
from xenmapcache.mapping import Mapping, _finalize, _Finalizer, live_mappings


def mapping_at(address: int, count: int = 1, **options: object) -> Mapping:
    given = {"writable": True, "errors": None, "unmap": libc.unmap, **options}
    return Mapping(address, 0x100, count, **given)  # type: ignore[arg-type] # the test knows


def test_a_fault_names_the_first_hole_of_its_range() -> None:
    """Holes before the range are not its fault; the errno is that page's own."""
    errors = bytes([0, errno.EPERM, 0, errno.EINVAL, errno.ENOENT])
    mapping = mapping_at(libc.allocate(5 * PAGE_SIZE), 5, errors=errors)
    assert mapping.holes == 3
    assert not mapping.valid(2 * PAGE_SIZE + 8, PAGE_SIZE)
    with pytest.raises(FaultError) as caught:
        mapping.view(2 * PAGE_SIZE + 8, 3 * PAGE_SIZE - 8)
    fault = caught.value
    assert (fault.address, fault.length, fault.errno) == (0x103000, 2 * PAGE_SIZE, errno.EINVAL)


def test_an_address_that_is_used_again_at_once() -> None:
    """Another thread may map at the address in the moment after the unmap: both are unmapped."""
    gc.collect()  # what other tests left
    before = live_mappings()
    unmapped = []
    successors = []

    def unmap(address: int, length: int) -> None:
        libc.unmap(address, length)
        unmapped.append("first")
        assert libc.cover(address, length)
        successors.append(mapping_at(address, unmap=unmap_again))

    def unmap_again(address: int, length: int) -> None:
        libc.unmap(address, length)
        unmapped.append("second")

    mapping_at(libc.allocate(PAGE_SIZE), unmap=unmap)
    assert unmapped == ["first"]
    assert live_mappings() == before + 1
    successors.clear()
    assert unmapped == ["first", "second"]
    assert live_mappings() == before


def test_no_memory_for_the_books(monkeypatch: pytest.MonkeyPatch) -> None:
    """When Python has no memory for a mapping's finalizer, it is unmapped before that is raised."""

    def no_memory(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("xenmapcache.mapping._Finalizer", no_memory)
    unmapped = []
    address = libc.allocate(PAGE_SIZE)
    with pytest.raises(MemoryError):
        mapping_at(address, unmap=lambda *span: unmapped.append(span))
    assert unmapped == [(address, PAGE_SIZE)]
    with pytest.raises(MemoryError):  # who keeps the address to unmap it is not overtaken
        mapping_at(address, unmap=lambda *span: unmapped.append(span), left=[address])
    assert len(unmapped) == 1
    libc.unmap(address, PAGE_SIZE)


def test_a_finalizer_whose_making_was_interrupted() -> None:
    """It has no address yet, and touches nothing: who mapped unmaps."""
    before = live_mappings()
    memory = (ctypes.c_char * 8)()
    finalizer = _Finalizer(memory, _finalize)  # type: ignore[arg-type] # as good as any
    del memory
    assert finalizer() is None
    assert live_mappings() == before


def test_another_process_does_not_unmap(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a child that Python was not told of, what dies is left alone: it is not there."""
    unmapped: list[tuple[int, int]] = []
    address = libc.allocate(PAGE_SIZE)
    mapping = mapping_at(address, unmap=lambda *span: unmapped.append(span))
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 1)
        del mapping
    assert unmapped == []
    libc.unmap(address, PAGE_SIZE)


def test_it_is_unmapped_with_its_last_view() -> None:
    """Whole, and once."""
    unmapped: list[tuple[int, int]] = []
    address = libc.allocate(PAGE_SIZE)
    mapping = mapping_at(address, unmap=lambda *span: unmapped.append(span))
    view = mapping.view(8, 8)
    del mapping
    assert unmapped == []
    del view
    assert unmapped == [(address, PAGE_SIZE)]
    libc.unmap(address, PAGE_SIZE)


def test_who_maps_is_told_that_the_mapping_unmaps() -> None:
    """From then on nobody else may unmap, as a signal handler's exception would make it twice."""
    address = libc.allocate(PAGE_SIZE)
    left = [address]
    mapping = Mapping(address, 0, 1, writable=True, errors=None, unmap=libc.unmap, left=left)
    assert (left, mapping.address) == ([], address)
