"""Mapping: faults, and a finalizer that is right in whatever moment it runs."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import inspect
import os
import sys
import weakref
from collections import deque

import pytest

from xenmapcache import FaultError
from xenmapcache.address import PAGE_SIZE
from xenmapcache.binding import libc
from xenmapcache.mapping import (
    LiveMapping,
    Mapping,
    _unmap,
    live_mappings,
    sweep,
)


def mapping_at(address: int, count: int = 1, **options: object) -> Mapping:
    given = {"writable": True, "errors": None, **options}
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
        assert libc.map_zeros_over(address, length)
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


def test_no_memory_for_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """If Python has no memory for a record, the memory is unmapped before that is raised."""

    def no_memory(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("xenmapcache.mapping.LiveMapping", no_memory)
    unmapped = []
    address = libc.allocate(PAGE_SIZE)
    with pytest.raises(MemoryError):
        mapping_at(address, unmap=lambda *span: unmapped.append(span))
    assert unmapped == [(address, PAGE_SIZE)]
    result = [address]
    with pytest.raises(MemoryError):  # a caller that keeps the address unmaps
        mapping_at(address, unmap=lambda *span: unmapped.append(span), result_out=result)
    assert (len(unmapped), result) == (1, [address])
    libc.unmap(address, PAGE_SIZE)


def test_a_record_whose_making_was_interrupted() -> None:
    """It has no address yet, and touches nothing: the caller that mapped unmaps."""
    before = live_mappings()
    memory = (ctypes.c_char * 8)()
    record = LiveMapping(memory, _unmap)  # type: ignore[arg-type] # as good as any
    del memory
    assert record() is None
    assert live_mappings() == before


def test_the_collector_does_not_know_the_memory() -> None:
    """Otherwise it would report the memory's end before finalizers of its cycle have run."""
    mapping = mapping_at(libc.allocate(PAGE_SIZE))
    assert not gc.is_tracked(mapping.memory)


class Keeper:
    """Is collected in a cycle, and uses the memory in its finalizer."""

    def __init__(self, view: memoryview, seen: list[bytes]) -> None:
        self.view = view
        self.seen = seen
        self.itself = self

    def __del__(self) -> None:
        self.seen.append(bytes(self.view[:4]))


def test_a_finalizer_of_a_cycle_sees_the_memory() -> None:
    """It is unmapped after the cycle's finalizers, and before the collector returns."""
    seen: list[bytes] = []
    unmapped: list[tuple[int, int]] = []
    address = libc.allocate(PAGE_SIZE)
    mapping = mapping_at(address, unmap=lambda *span: unmapped.append(span))
    mapping.bytes[:4] = b"here"
    Keeper(mapping.view(0, 8), seen)
    del mapping
    assert (seen, unmapped) == ([], [])
    gc.collect()
    assert (seen, unmapped) == ([b"here"], [(address, PAGE_SIZE)])
    libc.unmap(address, PAGE_SIZE)


def test_a_failed_unmap_is_tried_again() -> None:
    """The record stays in the table until the memory is unmapped."""
    results = [-1, -1, 0]
    before = live_mappings()
    address = libc.allocate(PAGE_SIZE)
    mapping = mapping_at(address, unmap=lambda *_: results.pop(0))
    record = mapping.record
    del mapping
    assert (record.mapped, len(results)) == (True, 2)
    assert sweep() == 0
    assert (live_mappings(), record.mapped, results) == (before, False, [])
    libc.unmap(address, PAGE_SIZE)


def test_memory_that_another_party_unmaps_is_left_alone() -> None:
    """The party that has the token unmaps; the record stays in the table until then."""
    unmapped: list[tuple[int, int]] = []
    address = libc.allocate(PAGE_SIZE)
    mapping = mapping_at(address, unmap=lambda *span: unmapped.append(span))
    record = mapping.record
    token = record.token.pop()
    del mapping
    assert (sweep(), record.mapped, unmapped) == (0, True, [])
    record.token.append(token)
    assert (sweep(), record.mapped, unmapped) == (1, False, [(address, PAGE_SIZE)])
    libc.unmap(address, PAGE_SIZE)


def test_a_full_collection_finds_what_a_lost_hint_has_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A signal handler that raises at the start of a finalizer: nothing else of ours runs later."""
    mapping = mapping_at(libc.allocate(PAGE_SIZE))
    record = mapping.record
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 1)  # the finalizer does nothing
        del mapping
    assert record.mapped
    gc.collect(0)
    young = record.mapped
    gc.collect()
    assert (young, record.mapped) == (True, False)


def test_what_the_memory_needs_is_kept_as_long() -> None:
    """A file's descriptor, say, is released after the memory has been unmapped."""
    kept = Keeper(memoryview(b"kept"), [])
    needed = weakref.ref(kept)
    mapping = mapping_at(libc.allocate(PAGE_SIZE), keeps=kept)
    del kept.itself  # no cycle
    del kept
    view = mapping.view(0, 1)
    del mapping
    kept_with_view = needed() is not None
    del view
    assert (kept_with_view, needed()) == (True, None)


def test_a_hint_follows_the_unmap() -> None:
    """So that accounts need not look at the table each time."""
    accounts: tuple[deque[LiveMapping], deque[LiveMapping]] = (deque(), deque())
    mapping = mapping_at(libc.allocate(PAGE_SIZE))
    for hints in accounts:  # of a cache and of the mock, say
        mapping.notify((hints,))
    record = mapping.record
    del mapping
    assert [list(hints) for hints in accounts] == [[record], [record]]


def test_no_stack_depth_loses_a_mapping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Near the recursion limit the hint may be lost; the table is swept."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    before = live_mappings()

    def drop_at(depth: int) -> None:
        if depth:
            drop_at(depth - 1)
        else:
            held.pop()

    held: list[Mapping] = []
    limit = sys.getrecursionlimit()
    here = len(inspect.stack())
    for depth in range(limit - here - 60, limit - here + 2):
        held.append(mapping_at(libc.allocate(PAGE_SIZE)))
        with contextlib.suppress(RecursionError):
            drop_at(depth)
        held.clear()
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
    result = [address]
    mapping = Mapping(address, 0, 1, writable=True, errors=None, result_out=result)
    assert (result, mapping.address) == ([], address)
