"""The mock's p2m against a model, and what a signal handler or an interrupt may do to it."""

from __future__ import annotations

import errno
import os
import threading
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.effort import examples
from xenmapcache import FaultError, Mapping, MappingLostError, MockDomain, MockHypervisor
from xenmapcache.address import PAGE_SHIFT, PAGE_SIZE
from xenmapcache.binding import libc
from xenmapcache.errors import XenCallError
from xenmapcache.mock import p2m as p2m_module
from xenmapcache.mock.frames import Frames
from xenmapcache.mock.p2m import P2m

PAGES = 24
RANGE = st.tuples(st.integers(0, PAGES - 1), st.integers(1, 9))


class P2mMachine(RuleBasedStateMachine):
    """Pages are bytearrays that a page, and each mapping of it, share."""

    @initialize(holes=st.lists(RANGE, max_size=2))
    def create(self, holes: list[tuple[int, int]]) -> None:
        self.frames: list[bytearray | None] = [bytearray(PAGE_SIZE) for _ in range(PAGES)]
        self.kept: list[tuple[Mapping, list[bytearray | None]]] = []
        self.p2m = P2m(Frames(), 1, PAGES)
        for gfn, count in holes:
            self.remove((gfn, min(count, PAGES - gfn)))

    @rule(pages=RANGE)
    def remove(self, pages: tuple[int, int]) -> None:
        gfn, count = pages
        part = slice(gfn, gfn + count)
        there = [frame is not None for frame in self.frames[part]]
        assert self.p2m.remove(gfn, count) == sum(there)
        self.frames[part] = [None] * len(there)

    @rule(pages=RANGE)
    def add(self, pages: tuple[int, int]) -> None:
        gfn, count = pages
        self.p2m.add(gfn, count)
        self.frames += [None] * (gfn + count - len(self.frames))
        for page in range(gfn, gfn + count):
            if self.frames[page] is None:
                self.frames[page] = bytearray(PAGE_SIZE)

    @rule(address=st.integers(0, PAGES << PAGE_SHIFT), data=st.binary(max_size=3 * PAGE_SIZE))
    def write(self, address: int, data: bytes) -> None:
        gone = self.first_absent(address, len(data))
        try:
            self.p2m.write(address, data)
        except FaultError as fault:
            assert (fault.address, fault.length) == (gone, address + len(data) - (gone or 0))
            return
        assert gone is None
        for position, byte in enumerate(data, address):
            frame = self.frames[position >> PAGE_SHIFT]
            assert frame is not None
            frame[position % PAGE_SIZE] = byte

    def first_absent(self, address: int, length: int) -> int | None:
        """Return the first address of a range that is not there."""
        frames = dict(enumerate(self.frames))
        first = range(address, address + length)
        for page in range(address >> PAGE_SHIFT, (address + length - 1 >> PAGE_SHIFT) + 1):
            if length and frames.get(page) is None:
                return max(first.start, page << PAGE_SHIFT)
        return None

    @rule(pages=RANGE, writable=st.booleans(), failing=st.integers(0, PAGES))
    def map(self, pages: tuple[int, int], writable: bool, failing: int) -> None:
        gfn, count = pages
        page_errors = {failing: errno.ENOENT} if gfn <= failing < gfn + count else {}
        mapping = self.p2m.map(gfn, count, writable, page_errors)
        shown = [*self.frames, *[None] * 2 * PAGES][gfn : gfn + count]
        errors = bytes(0 if frame is not None else errno.EINVAL for frame in shown)
        if page_errors:
            errors = bytes((*errors[: failing - gfn], errno.ENOENT, *errors[failing - gfn + 1 :]))
            shown[failing - gfn] = None
        assert mapping.errors == (errors if any(errors) else None)
        self.kept = [*self.kept[-3:], (mapping, shown)]

    @precondition(lambda self: self.kept)
    @rule(gfn=st.integers(0, PAGES - 1))
    def remap(self, gfn: int) -> None:
        mapping, _ = self.kept[-1]
        if mapping.errors is not None:
            return
        shown = [*self.frames, *[None] * PAGES][gfn : gfn + mapping.count]
        try:
            self.p2m.check_present(gfn, mapping.count)
        except FaultError as fault:
            assert shown[(fault.address >> PAGE_SHIFT) - gfn] is None
            assert fault.address + fault.length == gfn + mapping.count << PAGE_SHIFT
            return
        assert None not in shown
        self.p2m.remap(mapping, gfn)
        self.kept[-1] = mapping, shown

    @invariant()
    def the_guest_and_all_mappings_see_their_frames(self) -> None:
        for gfn, frame in enumerate(self.frames):
            if frame is not None:
                assert self.p2m.read(gfn << PAGE_SHIFT, PAGE_SIZE) == frame
        for mapping, shown in self.kept:
            for position, frame in enumerate(shown):
                if frame is not None:
                    assert mapping.view(position << PAGE_SHIFT, PAGE_SIZE) == frame

    @invariant()
    def runs_are_apart_and_in_order(self) -> None:
        runs = self.p2m.runs(0, self.p2m.end)
        assert all(a[0] + a[2] <= b[0] for a, b in pairwise(runs))
        there = {page for gfn, _, count in runs for page in range(gfn, gfn + count)}
        assert there == {gfn for gfn, frame in enumerate(self.frames) if frame is not None}
        assert self.p2m.end == len(self.frames)


TestP2m = P2mMachine.TestCase
TestP2m.settings = settings(max_examples=examples(40), stateful_step_count=25, deadline=None)


def pieces_of_the_memfd() -> int:
    """Return how many mappings of a mock's memory this process has."""
    return Path("/proc/self/maps").read_text(encoding="utf-8").count("xenmapcache-mock")


@pytest.mark.parametrize(
    ("module", "function"),
    [(p2m_module, "Mapping"), (libc, "dont_fork"), (libc, "map_file")],
    ids=["before the Mapping", "before dont_fork", "in the middle of the runs"],
)
def test_an_interrupt_while_mapping_leaks_nothing(
    monkeypatch: pytest.MonkeyPatch, module: object, function: str
) -> None:
    """Until a Mapping has taken over the duty to unmap, the map call unmaps."""
    domain = MockHypervisor().create_domain(memory="64k", holes=[(0x4000, 0x1000)])

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    before = pieces_of_the_memfd()
    monkeypatch.setattr(module, function, interrupt)
    with pytest.raises(KeyboardInterrupt):
        domain.map(0, 16, writable=True)
    assert pieces_of_the_memfd() == before
    assert domain.mapped_pieces == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt(), XenCallError("mmap", None, errno.ENOMEM)])
def test_a_move_that_does_not_end_loses_the_memory(
    monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """Half old and half new pages are worse than zeros."""
    domain = MockHypervisor().create_domain(memory="64k")
    domain.balloon_out(0x9000, 0x1000)
    domain.balloon_in(0x9000, 0x1000)  # so that the move takes three calls
    mapping = domain.map(0, 4, writable=True)
    domain.write(0, b"old")
    domain.write(0x8000, b"of the new place")
    original = libc.map_file

    def once(*arguments: int, **options: object) -> int:
        if arguments[1] != 8 << PAGE_SHIFT:
            raise error
        return original(*arguments, **options)  # type: ignore[arg-type] # as they came

    monkeypatch.setattr(libc, "map_file", once)
    with pytest.raises((KeyboardInterrupt, MappingLostError)):
        domain.remap(mapping, 8)
    assert mapping.view(0, 4 * PAGE_SIZE) == bytes(4 * PAGE_SIZE)
    mapping.view(0, 3)[:] = b"new"
    assert domain.read(0, 3) == b"old"


def test_a_page_that_vanishes_during_a_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """A view never meets it: the memory is lost, with an error."""
    domain = MockHypervisor().create_domain(memory="64k")
    mapping = domain.map(0, 4, writable=True)
    monkeypatch.setattr(domain.p2m, "check_present", lambda *_: domain.p2m.remove(9, 1))
    with pytest.raises(MappingLostError, match="a page vanished during the move"):
        domain.remap(mapping, 8)
    assert mapping.view(0, PAGE_SIZE) == bytes(PAGE_SIZE)


def test_a_signal_handler_may_balloon_while_its_thread_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither change is lost, and nobody waits for a lock that this thread has."""
    p2m = P2m(Frames(), 1, 8)
    p2m.remove(0, 8)
    allocate = p2m.frames.allocate

    def interrupted(count: int) -> int:
        monkeypatch.setattr(p2m.frames, "allocate", allocate)
        p2m.add(6, 1)  # what the handler does
        p2m.write(6 << PAGE_SHIFT, b"handler")
        return allocate(count)

    monkeypatch.setattr(p2m.frames, "allocate", interrupted)
    p2m.add(0, 8)
    assert p2m.read(6 << PAGE_SHIFT, 7) == b"handler"
    assert p2m.remove(0, 8) == 8


def test_a_signal_handler_may_take_frames_while_its_thread_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The file is then longer than its thread wants, and cannot be made shorter."""
    frames = Frames()
    fstat = os.fstat
    taken: list[int] = []

    def interrupted(fd: int) -> os.stat_result:
        state = fstat(fd)
        monkeypatch.setattr(os, "fstat", fstat)
        taken.append(frames.allocate(4))
        return state

    monkeypatch.setattr(os, "fstat", interrupted)
    assert frames.allocate(2) == 0
    assert taken == [2]
    assert fstat(frames.fileno()).st_size == 6 * PAGE_SIZE


def test_threads_that_balloon_lose_no_page() -> None:
    """Each thread's changes arrive."""
    p2m = P2m(Frames(), 1, 64)

    def balloon(first: int) -> None:
        for _ in range(50):
            for gfn in range(first, 64, 4):
                assert p2m.remove(gfn, 1) == 1
                p2m.add(gfn, 1)

    threads = [threading.Thread(target=balloon, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert p2m.remove(0, 64) == 64


def test_the_machine_has_an_end() -> None:
    """Frames are never used again, and their numbers stay below 2**50."""
    frames = Frames()
    with pytest.raises(ValueError, match="has no 0x4000000000001 frames left"):
        frames.allocate((1 << 50) + 1)


def test_large_pieces_are_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel reads and writes less than 2 GiB in one call."""
    domain = MockHypervisor().create_domain(memory="64k")
    monkeypatch.setattr("xenmapcache.mock.frames._CHUNK_BYTES", 5)
    domain.write(0x1FF8, b"in several parts")
    assert domain.read(0x1FF8, 16) == b"in several parts"
    assert bytes(domain.map(1, 2, writable=False).view(0xFF8, 16)) == b"in several parts"


def test_a_guest_of_64_gib_costs_nothing() -> None:
    """Its table is one run, and its memory is there when it is touched."""
    domain = MockHypervisor().create_domain(memory="64G")
    assert len(domain.p2m.runs(0, domain.p2m.end)) == 1
    domain.write((64 << 30) - 3, b"end")
    mapping = domain.map(domain.p2m.end - 1, 1, writable=False)
    assert bytes(mapping.view(PAGE_SIZE - 3, 3)) == b"end"


@pytest.mark.parametrize("memory", ["65G", "1T", "4096T", 0, 4097, (64 << 30) + 4096])
def test_a_size_that_no_guest_has(memory: int | str) -> None:
    """Refused before anything is allocated."""
    with pytest.raises(
        ValueError, match="must be 0x1000 to 0x1000000000 bytes, a multiple of 0x1000, not 0x"
    ):
        MockHypervisor().create_domain(memory=memory)


def test_strings_that_no_server_answers_fill_in_parts() -> None:
    """A fill goes over runs and over blocks, and touches nothing else."""
    domain = MockHypervisor().create_domain(memory="4M")
    domain.balloon_out(0x200000, 0x1000)
    domain.balloon_in(0x200000, 0x1000)
    domain.p2m.fill(0x1001, 0x250000, 0xAB)
    assert domain.read(0x1000, 0x250002) == b"\0" + b"\xab" * 0x250000 + b"\0"


def test_the_table_of_mappings_does_not_grow(domain: MockDomain) -> None:
    """A record of what was unmapped is dropped with the next call."""
    for _ in range(300):
        domain.map(0, 1, writable=False)
    assert len(domain._records) == 1
    kept = [domain.map(0, 1, writable=False) for _ in range(100)]
    assert domain.mapped_pieces == len(kept) == len(domain._records)


def test_a_finalizer_that_could_not_tell(domain: MockDomain) -> None:
    """What it has unmapped does not count as mapped."""
    mapping = domain.map(0, 1, writable=False)
    mapping.record.hints = ()
    del mapping
    assert domain.mapped_pieces == 0
