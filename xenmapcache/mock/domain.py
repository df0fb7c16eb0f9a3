"""A mock guest: its p2m, its memory seen from inside, ballooning, and faults on demand."""

from __future__ import annotations

import errno as _errno
import os
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from ..address import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, check_range, page_span
from ..binding import libc
from ..errors import FaultError, MappingLostError, XenCallError
from ..mapping import Mapping
from .instructions import Instructions

if TYPE_CHECKING:
    from .hypervisor import MockHypervisor
    from .kernel import LoadedElf

_ABSENT = -1
_IOREQ_CALLS = ("create_ioreq_server", "claim", "bind")
_CALLS = ("map", "remap", "mark_dirty", *_IOREQ_CALLS)
_LOG_LENGTH = 1 << 16

PAGES_PER_INVALIDATE = 84
"""How many pages a guest gives up between two INVALIDATE requests, as seen on Xen 4.17."""


class Call(NamedTuple):
    """A call that the mock received. ``errno`` is 0 if it succeeded; gfn is None for an unmap."""

    name: str
    gfn: int | None
    pages: int
    errno: int


class _ArmedFault:
    def __init__(
        self, call: str, errno: int, nth: int, gfn: int | None, delay: float, repeat: bool
    ) -> None:
        self.call, self.errno, self.gfn = call, errno, gfn
        self.delay, self.repeat = delay, repeat
        self.calls_to_pass = nth - 1


class MockDomain(Instructions):
    """A guest. Make it with :meth:`MockHypervisor.create_domain`.

    Attributes:
        domid: its number.
        vcpus: how many it has.
        interrupts: what device models raised, in order, as ``(kind, details)``.
        patience: how long a vCPU waits for a device model before TimeoutError, in seconds.
        dirty: frame numbers that were reported as written, until you clear it.
        invalidations: how many INVALIDATE requests it has sent.

    Synchronization: all methods may be called in any threads. Listeners run in the
    thread that balloons, which waits for them as a vCPU waits for its device model.
    """

    def __init__(
        self,
        hypervisor: MockHypervisor,
        domid: int,
        pages: int,
        holes: Iterable[tuple[int, int]],
        vcpus: int,
    ) -> None:
        super().__init__(domid, vcpus)
        self._calls: deque[tuple[str, int | None, int, int]] = deque(maxlen=_LOG_LENGTH)
        self.dirty: set[int] = set()
        self.invalidations = 0
        self._hypervisor = hypervisor
        self._lock = threading.RLock()
        self._listeners: list[Callable[[], object]] = []
        self._faults: list[_ArmedFault] = []
        self._destroyed = False
        self._mapped: set[int] = set()  # host addresses; a number would not count in two threads
        first = hypervisor.allocate(pages)
        self._p2m = array("q", range(first, first + pages))
        for address, length in holes:
            gfn, count = self._pages(address, length)
            self._p2m[gfn : gfn + count] = array("q", [_ABSENT]) * count

    @property
    def calls(self) -> tuple[Call, ...]:
        """The last 65,536 calls about it, in order."""
        return tuple(map(Call._make, self._calls.copy()))

    @property
    def memory_end(self) -> int:
        """One past the highest guest address that can be there, in bytes."""
        return len(self._p2m) << PAGE_SHIFT

    # --- the guest's side -------------------------------------------------------

    def read(self, address: int, length: int) -> bytes:
        """Return what the guest sees, never through a mapping.

        Raises:
            FaultError: a page is not there.
        """
        spans = self._spans(address, length)
        return b"".join(os.pread(self._hypervisor.fd, size, offset) for offset, size in spans)

    def write(self, address: int, data: bytes) -> None:
        """Write as the guest does.

        Raises:
            FaultError: a page is not there; nothing has changed.
        """
        position = 0
        for offset, size in self._spans(address, len(data)):
            os.pwrite(self._hypervisor.fd, data[position : position + size], offset)
            position += size

    def load_elf(self, path: str | os.PathLike[str]) -> LoadedElf:
        """Put an ELF kernel's segments at their physical addresses. Nothing is run.

        Args:
            path: of an ELF file of 64 or 32 bits, for example a ``vmlinux``.

        Returns:
            Its symbols: guest-physical addresses by name, and what was loaded where.

        Raises:
            FaultError: a segment lies where there is no memory; nothing has changed.
            BackendUnavailableError: pyelftools is not installed.
            CorruptImageError: that is no ELF file to load, or it contradicts the format.
            OSError, ValueError: it cannot be opened, or is no regular file.
        """
        from .kernel import KernelFile  # what reads files is not needed by most

        with KernelFile(path) as kernel:
            symbols = kernel.loaded()
            for segment in kernel.segments:
                self._spans(segment.physical, segment.memory_size)
            for segment in kernel.segments:
                for address, data in kernel.content(segment):
                    self.write(address, data)
            return symbols

    def balloon_out(self, address: int, length: int, *, vcpu: int = 0) -> None:
        """Give pages up, as a guest's balloon driver does, with Xen's burst of INVALIDATEs.

        Pages that are not there are passed over. Every ioreq server and every listener
        is asked after each 84 pages, and for what remains.

        Args:
            address: guest-physical, page-aligned.
            length: in bytes, whole pages.
            vcpu: which one does it, and waits.

        Raises:
            TimeoutError: a device model has not answered in :attr:`patience` seconds.
        """
        gfn, count = self._pages(address, length)
        pending = 0
        for page in range(gfn, gfn + count):
            with self._lock:
                present = self._p2m[page] != _ABSENT
                self._p2m[page] = _ABSENT
            pending += present
            if pending == PAGES_PER_INVALIDATE:
                self.send_invalidate(vcpu=vcpu)
                pending = 0
        if pending:
            self.send_invalidate(vcpu=vcpu)

    def balloon_in(self, address: int, length: int) -> None:
        """Get new, zeroed frames for pages that are not there. Sends no INVALIDATE, as Xen.

        Args:
            address: guest-physical, page-aligned; may lie beyond the end.
            length: in bytes, whole pages.
        """
        gfn, count = self._pages(address, length, grow=True)
        with self._lock:
            for page in range(gfn, gfn + count):
                if self._p2m[page] == _ABSENT:
                    self._p2m[page] = self._hypervisor.allocate(1)

    def send_invalidate(self, *, vcpu: int = 0) -> None:
        """Ask every ioreq server and listener to drop its mappings, and wait for them.

        Raises:
            TimeoutError: a device model has not answered in :attr:`patience` seconds.
        """
        self.invalidations += 1
        # Servers first: their callbacks may have DMA to finish in a cache that listens too.
        self._broadcast_invalidate(vcpu)
        for listener in list(self._listeners):
            listener()

    def destroy(self) -> None:
        """End the domain. Its memory lives on where it is mapped.

        As on Xen, it is dying for as long as anything is mapped: pages that are asked
        for are not there (EINVAL). After that there is no such domain (ESRCH).
        """
        self._destroyed = True
        for server in list(self.ioreq_servers.values()):
            server.destroy()
        self._p2m = array("q")

    # --- the tester's side ------------------------------------------------------

    def on_invalidate(self, listener: Callable[[], object]) -> None:
        """Have ``listener()`` called on each INVALIDATE, for example ``cache.invalidate``.

        For a cache without an ioreq server; one with a server is asked through that.
        """
        self._listeners.append(listener)

    def arm(
        self,
        call: str,
        *,
        errno: int = 0,
        nth: int = 1,
        gfn: int | None = None,
        delay: float = 0.0,
        repeat: bool = False,
    ) -> None:
        """Make a call fail, or slow.

        Args:
            call: ``"map"``, ``"remap"``, ``"mark_dirty"``, ``"create_ioreq_server"``,
                ``"claim"`` or ``"bind"``.
            errno: what it fails with; 0 makes it succeed (slowly).
            nth: which such call from now on, counted from 1.
            gfn: only calls about this frame; for ``"map"`` only this page of it fails.
            delay: seconds that the call takes before anything else.
            repeat: every such call from then on, not just one.

        Raises:
            ValueError: there is no such call or errno, or ``nth`` is not positive.
        """
        if call not in _CALLS:
            raise ValueError(f"call {call!r} is none of {_CALLS}")
        if nth < 1:
            raise ValueError(f"nth {nth}: calls are counted from 1")
        if errno and errno not in _errno.errorcode:
            raise ValueError(f"errno {errno} is none of this system's, which are positive")
        self._faults.append(_ArmedFault(call, errno, nth, gfn, delay, repeat))

    def disarm(self) -> None:
        """Forget all armed faults."""
        self._faults.clear()

    # --- the hypervisor's side, for the backend -----------------------------------

    def map(self, gfn: int, count: int, writable: bool) -> tuple[int, bytes | None]:
        """Map pages as ``xenforeignmemory_map`` does; returns address and errnos."""
        page_errors = self._enter("map", gfn, count)
        with self._lock:
            frames = self._p2m[gfn : gfn + count]
            frames.extend([_ABSENT] * (count - len(frames)))
            for page in page_errors:
                frames[page - gfn] = _ABSENT
            address = self._map_frames(frames, writable)
        self._calls.append(("map", gfn, count, 0))
        self._mapped.add(address)
        if _ABSENT not in frames:
            return address, None
        errors = bytearray(_errno.EINVAL if frame == _ABSENT else 0 for frame in frames)
        for page, errno in page_errors.items():
            errors[page - gfn] = errno
        return address, bytes(errors)

    def remap(self, mapping: Mapping, gfn: int) -> None:
        """Map other pages over a mapping; a failure loses its memory, as with Xen."""
        with self._lock:
            frames = self._p2m[gfn : gfn + mapping.count]
            if len(frames) < mapping.count or _ABSENT in frames:
                position = frames.index(_ABSENT) if _ABSENT in frames else len(frames)
                raise FaultError(
                    (gfn + position) << PAGE_SHIFT,
                    (mapping.count - position) << PAGE_SHIFT,
                    _errno.EINVAL,
                )
            try:
                self._enter("remap", gfn, mapping.count)
            except XenCallError as error:
                libc.cover(mapping.address, mapping.length, replace=True)
                raise MappingLostError(error.call, self.domid, error.errno, "injected") from None
            self._map_frames(frames, mapping.writable, mapping)
        self._calls.append(("remap", gfn, mapping.count, 0))

    def unmap(self, address: int, length: int) -> None:
        """Unmap, and note it. Takes no lock: finalizers call it."""
        self._mapped.discard(address)  # before another thread can be given the same address
        libc.unmap(address, length)
        self._calls.append(("unmap", None, length >> PAGE_SHIFT, 0))

    def mark_dirty(self, gfn: int, count: int) -> None:
        """Note that pages were written."""
        if self._faults:
            self._enter("mark_dirty", gfn, count)
        self.dirty.update(range(gfn, gfn + count))
        self._calls.append(("mark_dirty", gfn, count, 0))

    def enter_ioreq_call(self, call: str) -> None:
        """Apply armed faults to a call of a device model."""
        if self._faults:
            self._enter(call, 0, 1)

    def _enter(self, call: str, gfn: int, count: int) -> dict[int, int]:
        """Apply armed faults to a call: be slow, raise, or return the errno of single pages."""
        page_errors = {}
        errno = 0
        delay = 0.0
        with self._lock:
            for fault in list(self._faults):
                if fault.call != call or not (fault.gfn is None or gfn <= fault.gfn < gfn + count):
                    continue
                if fault.calls_to_pass:
                    fault.calls_to_pass -= 1
                    continue
                if not fault.repeat:
                    self._faults.remove(fault)
                delay += fault.delay
                if fault.gfn is not None and call == "map" and fault.errno:
                    page_errors[fault.gfn] = fault.errno
                else:
                    errno = errno or fault.errno
        if delay:
            time.sleep(delay)
        hint = "injected"
        if self._destroyed and not self._mapped and call == "map":
            errno, hint = _errno.ESRCH, "there is no such domain"
        if errno:
            self._calls.append((call, gfn, count, errno))
            raise XenCallError(f"mock_{call}", self.domid, errno, hint)
        return page_errors

    def _map_frames(
        self, frames: array[int], writable: bool, mapping: Mapping | None = None
    ) -> int:
        """Map frames, over a mapping if one is given, and return the host address."""
        address = mapping.address if mapping else None
        fd = self._hypervisor.fd
        runs = list(_runs(frames))
        length = len(frames) << PAGE_SHIFT
        whole = len(runs) == 1 and runs[0][1] != _ABSENT
        if whole:
            offset = runs[0][1] << PAGE_SHIFT
            address = libc.map_file(fd, offset, length, writable=writable, address=address)
        elif address is None:  # or all is there, and each run takes the place of what is seen now
            address = libc.reserve(length)
        try:
            for position, frame, count in () if whole else runs:
                if frame != _ABSENT:
                    libc.map_file(
                        fd,
                        frame << PAGE_SHIFT,
                        count << PAGE_SHIFT,
                        writable=writable,
                        address=address + (position << PAGE_SHIFT),
                    )
            libc.dont_fork(address, length)
        except XenCallError as error:
            if not mapping:
                libc.unmap(address, length)
                raise
            libc.cover(address, length, replace=True)
            raise MappingLostError("mock_remap", self.domid, error.errno, error.hint) from error
        return address

    def _pages(self, address: int, length: int, *, grow: bool = False) -> tuple[int, int]:
        address, length = check_range(address, length)
        if (address | length) & PAGE_MASK:
            raise ValueError(f"{address:#x}, {length:#x}: the mock's pages are whole, of 4 KiB")
        gfn, count = page_span(address, length)
        missing = gfn + count - len(self._p2m)
        if missing > 0 and not grow:
            raise ValueError(
                f"{address:#x}..{address + length:#x} ends beyond the domain's memory, "
                f"{self.memory_end:#x}"
            )
        if missing > 0:
            self._p2m.extend([_ABSENT] * missing)
        return gfn, count

    def _spans(self, address: int, length: int) -> list[tuple[int, int]]:
        """Return ``(offset in the memfd, size)`` for each page of a range."""
        address, length = check_range(address, length, empty=True)
        spans = []
        end = address + length
        with self._lock:
            while address < end:
                gfn = address >> PAGE_SHIFT
                frame = self._p2m[gfn] if gfn < len(self._p2m) else _ABSENT
                if frame == _ABSENT:
                    raise FaultError(address, end - address, _errno.EINVAL)
                size = min(PAGE_SIZE - (address & PAGE_MASK), end - address)
                spans.append(((frame << PAGE_SHIFT) + (address & PAGE_MASK), size))
                address += size
        return spans


def _runs(frames: array[int]) -> Iterator[tuple[int, int, int]]:
    """Yield ``(position, first frame, count)`` of consecutive or consecutively absent frames."""
    first, total = frames[0], len(frames)
    if first != _ABSENT and frames == array("q", range(first, first + total)):
        yield 0, first, total
        return
    start = 0
    for position in range(1, total + 1):
        if position < total:
            previous, frame = frames[position - 1], frames[position]
            if frame == (_ABSENT if previous == _ABSENT else previous + 1):
                continue
        yield start, frames[start], position - start
        start = position
