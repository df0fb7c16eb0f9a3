"""MockDomain: a mock guest, seen from inside, from its device models, and by its tester."""

from __future__ import annotations

import errno as _errno
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from .. import mapping as _mapping
from ..address import PAGE_SHIFT, as_int
from ..errors import MappingLostError, XenCallError
from ..ioreq import SLOT_SIZE
from ..mapping import LiveMapping, Mapping, PageErrors
from .faults import Call, FaultPlan
from .frames import Frames
from .grants import GuestGrants
from .guest_code import RunsCode
from .interrupts import HasInterrupts
from .ioreq_server import MAX_VCPUS, MockIoreqServer
from .p2m import P2m, lose, merged, whole_pages
from .saving import MockImage
from .vcpu import Vcpu
from .waiting import Gate

if TYPE_CHECKING:
    from .kernel import LoadedElf

MAX_IOREQ_SERVERS = 8
"""Xen allows a domain this many."""

PAGES_PER_INVALIDATE = 84
"""How many pages a guest gives up between two INVALIDATE requests, as seen on Xen 4.17."""


class MockDomain(RunsCode, HasInterrupts):
    """A guest. Make it with :meth:`.MockHypervisor.create_domain`.

    Attributes:
        domid: its number.
        type: ``"hvm"``, ``"pvh"`` or ``"pv"``. As on Xen, memory of a PV guest cannot be mapped by
            frame number, and it has no ioreq servers.
        machine: ``"x86-64"`` or ``"arm64"``. An arm64 guest has no ports and no PCI bus.
        vcpus: how many vCPUs it has.
        vcpu: the vCPUs; ``guest.vcpu[1].port_in(0x700)``. The methods of :class:`.Vcpu` are methods
            of the domain, too, with an argument ``vcpu=``.
        vcpu_timeout: how long a vCPU waits for a device model before TimeoutError, in seconds.
            A real one waits for ever.
        ioreq_servers: the ioreq servers, by id.
        interrupts: what device models raised, in order: named tuples, of :class:`.MsiInterrupt`,
            :class:`.IsaInterrupt`, :class:`.IntxInterrupt` and :class:`.SpiInterrupt`.
        crashed: why Xen would have ended the guest, or an empty string.
        pci_cf8: what the guest has written to port 0xcf8 last, to select a PCI register.
        dirty_gfns: frame numbers that were reported as written, until you clear the set.
        invalidations: how many INVALIDATE requests the guest has sent.
        p2m: which frame is at which guest frame number.
        faults: the injected faults, and the log of calls.
        grants: the pages that the guest has granted, as :class:`.GuestGrants`.
        gate: closed while the domain is paused or suspended.

    Synchronization: all methods may be called in any threads and signal handlers. Listeners run
    in the thread that balloons, which waits for them as a vCPU waits for its device model. In
    a forked child all that needs the guest raises ClosedError.
    """

    def __init__(
        self,
        frames: Frames,
        domid: int,
        pages: int,
        holes: Iterable[tuple[int, int]],
        *,
        vcpus: int,
        type: str,  # noqa: A002 - the word that xl uses
        machine: str,
    ) -> None:
        vcpus = as_int("vcpus", vcpus)
        if not 1 <= vcpus <= MAX_VCPUS:
            raise ValueError(
                f"vcpus must be 1 to {MAX_VCPUS}, not {vcpus}: each vCPU has a slot of {SLOT_SIZE} "
                f"bytes in the one page that an ioreq server shares with Xen"
            )
        super().__init__()
        self.domid = domid
        self.type = type
        self.machine = machine
        self.vcpus = vcpus
        self.vcpu_timeout = 10.0
        self.ioreq_servers: dict[int, MockIoreqServer] = {}
        self.crashed = ""
        self.pci_cf8 = 0
        self.dirty_gfns: set[int] = set()
        self.invalidations = 0
        self.faults = FaultPlan(domid)
        self.gate = Gate()
        self.p2m = P2m(frames, domid, pages)
        self.grants = GuestGrants(self.p2m, self.faults, domid)
        for address, length in holes:
            self.p2m.remove(*self._pages(address, length))
        self.vcpu = tuple(Vcpu(self, number) for number in range(vcpus))
        self._listeners: list[Callable[[], object]] = []
        self._destroyed = False
        self._invalidate_due = False
        self._records: dict[LiveMapping, None] = {}
        self._unmapped: deque[LiveMapping] = deque()  # hints: a finalizer may lose one
        self._hints = (self._unmapped,)

    def __repr__(self) -> str:
        return f"<MockDomain {self.domid}, {self.type}, {self.memory_end:#x} bytes, {self.state}>"

    @property
    def calls(self) -> tuple[Call, ...]:
        """The last 65,536 calls about it, in order."""
        _mapping.sweep()
        self._note_unmaps()
        return self.faults.calls

    @property
    def memory_end(self) -> int:
        """One past the highest guest address that can be there, in bytes."""
        return self.p2m.end << PAGE_SHIFT

    @property
    def state(self) -> str:
        """``"running"``, ``"paused"``, ``"suspended"``, ``"dying"`` or ``"gone"``.

        A domain that was destroyed is dying for as long as its memory is mapped; then it is gone.
        """
        if self._destroyed:
            return "dying" if self.mapped_pieces else "gone"
        for reason in ("suspended", "paused"):
            if reason in self.gate.reasons:
                return reason
        return "running"

    # --- the guest's side -------------------------------------------------------

    def read(self, address: int, length: int) -> bytes:
        """Return what the guest sees, never through a mapping.

        Raises:
            FaultError: a page is not there.
        """
        return self.p2m.read(address, length)

    def write(self, address: int, data: bytes) -> None:
        """Write as the guest does.

        Raises:
            FaultError: a page is not there; nothing has changed.
        """
        self.p2m.write(address, data)

    def load_elf(self, path: str | os.PathLike[str]) -> LoadedElf:
        """Put an ELF kernel's segments at their physical addresses. Nothing is run.

        Args:
            path: of an ELF file of 64 or 32 bits, for example a ``vmlinux``.

        Returns:
            Its symbols: guest-physical addresses by name, and what was loaded where.

        Raises:
            FaultError: a segment lies where there is no memory; nothing has changed.
            BackendUnavailableError: pyelftools is not installed.
            CorruptImageError: the file is not an ELF file to load, or contradicts the format.
            OSError, ValueError: it cannot be opened, or is not a regular file.
        """
        from .kernel import KernelFile  # most users need nothing that reads files

        with KernelFile(path) as kernel:
            symbols = kernel.loaded()
            for segment in kernel.segments:
                self.p2m.pieces(segment.physical, segment.memory_size)
            for segment in kernel.segments:
                for address, data in kernel.content(segment):
                    self.write(address, data)
            return symbols

    def balloon_out(self, address: int, length: int, *, vcpu: int | None = None) -> None:
        """Give pages up, as a guest's balloon driver does, with Xen's burst of INVALIDATEs.

        Absent pages are skipped. Every ioreq server and every listener
        is asked after each 84 pages, and for what remains. If that is interrupted, the next
        call sends the INVALIDATE that is due.

        Args:
            address: guest-physical, page-aligned.
            length: in bytes, whole pages.
            vcpu: which one does it, and waits.

        Raises:
            TimeoutError: a device model has not answered in :attr:`vcpu_timeout` seconds.
        """
        pending = 0
        for gfn, _, count in self.p2m.runs(*self._pages(address, length)):
            first, end = gfn, gfn + count
            while first < end:
                part = min(end - first, PAGES_PER_INVALIDATE - pending)
                self._invalidate_due = True
                pending += self.p2m.remove(first, part)
                first += part
                if pending == PAGES_PER_INVALIDATE:
                    self.send_invalidate(vcpu=vcpu)
                    pending = 0
        if pending or self._invalidate_due:
            self.send_invalidate(vcpu=vcpu)

    def balloon_in(self, address: int, length: int) -> None:
        """Get new, zeroed frames for pages that are not there. Sends no INVALIDATE, as Xen.

        Args:
            address: guest-physical, page-aligned; may lie beyond the end.
            length: in bytes, whole pages.
        """
        self.p2m.add(*whole_pages(address, length))

    def send_invalidate(self, *, vcpu: int | None = None) -> None:
        """Ask every ioreq server and listener to drop its mappings, and wait for them.

        Raises:
            TimeoutError: a device model has not answered in :attr:`vcpu_timeout` seconds.
        """
        each = self.vcpu_at(vcpu)
        self.invalidations += 1
        # Servers first: their callbacks may have DMA to finish in a cache that listens too.
        each.send_invalidate()
        for listener in list(self._listeners):
            listener()
        self._invalidate_due = False

    def destroy(self) -> None:
        """End the domain. Its memory lives on where it is mapped.

        As on Xen, it is dying for as long as anything is mapped: pages that are asked
        for are not there (EINVAL). After that there is no such domain (ESRCH).
        """
        self._destroyed = self.grants.destroyed = True
        for server in list(self.ioreq_servers.values()):
            server.destroy()
        self.p2m.clear()

    # --- the toolstack's side ---------------------------------------------------

    @property
    def paused(self) -> bool:
        """Whether its vCPUs stand still: the domain is paused or suspended."""
        return bool(self.gate.reasons)

    def pause(self) -> None:
        """Stop the vCPUs, as ``xl pause``. Idempotent.

        A vCPU that waits for a device model does not take its answer before :meth:`unpause`. If the
        ioreq server is destroyed before that, the vCPU goes on without the answer. :meth:`read` and
        :meth:`write` work as before: they are the tester's, not instructions of a vCPU.
        """
        self.gate.close("paused")

    def unpause(self) -> None:
        """Let the vCPUs go on, as ``xl unpause``."""
        self.gate.open("paused")

    def suspend(self) -> MockImage:
        """Stop the vCPUs, as ``xl save`` does before it copies the memory.

        Returns:
            The image, still empty: its method :meth:`~.MockImage.send` copies pages. Whatever a
            device model writes during that is in the image only if its page is sent later.
        """
        self.p2m.frames.check_process()
        self.gate.close("suspended")
        kind = {"type": self.type, "machine": self.machine, "vcpus": self.vcpus}
        return MockImage(self.p2m, self.dirty_gfns, kind)

    def resume(self) -> None:
        """Let the vCPUs of a suspended domain go on, as after ``xl save -c``."""
        self.gate.open("suspended")

    # --- the tester's side ------------------------------------------------------

    def on_invalidate(self, listener: Callable[[], object]) -> None:
        """Have ``listener()`` called on each INVALIDATE, for example ``cache.invalidate``.

        For a cache without an ioreq server; one with a server is asked through that.
        """
        self._listeners.append(listener)

    def inject_fault(
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
            ValueError: there is no such call or errno, ``nth`` is not positive, ``delay`` is
                negative, or there is neither an errno nor a delay.
        """
        self.faults.inject(call, errno=errno, nth=nth, gfn=gfn, delay=delay, repeat=repeat)

    def clear_faults(self) -> None:
        """Forget all injected faults."""
        self.faults.clear()

    # --- the hypervisor's side ----------------------------------------------------

    @property
    def mapped_pieces(self) -> int:
        """How many pieces of its memory are mapped in this process."""
        _mapping.sweep()
        self._note_unmaps()
        return sum(record.mapped for record in list(self._records)) + self.grants.mappings

    def _note_unmaps(self) -> None:
        """Log what finalizers have unmapped."""
        while self._unmapped:
            with suppress(IndexError):  # another thread has taken it
                record = self._unmapped.popleft()
                self._records.pop(record, None)
                self.faults.note("unmap", None, record.length >> PAGE_SHIFT)

    def map(self, gfn: int, count: int, writable: bool) -> Mapping:
        """Map pages as ``xenforeignmemory_map`` does.

        Raises:
            XenCallError: a fault was injected, there is no such domain, or the kernel refused.
        """
        page_errors = self._faults_of_map(gfn, count)
        mapping = self.p2m.map(gfn, count, writable, page_errors)
        self._records[mapping.record] = None
        mapping.notify(self._hints)
        self.faults.note("map", gfn, count)
        return mapping

    def map_into(self, mapping: Mapping, gfn: int, count: int) -> PageErrors | None:
        """Map pages over a part of a window; return their errnos, or None if all are there.

        Raises:
            XenCallError: as :meth:`map`.
        """
        page_errors = self._faults_of_map(gfn, count)
        if mapping.record not in self._records:
            self._records[mapping.record] = None
            mapping.notify(self._hints)
        errors = self.p2m.map_into(mapping, gfn, count, page_errors)
        self.faults.note("map", gfn, count)
        return errors

    def _faults_of_map(self, gfn: int, count: int) -> dict[int, int]:
        """Return the errnos of pages whose mapping fails although they are there, or raise."""
        self._note_unmaps()
        page_errors = self.faults.apply("map", gfn, count)
        if self._destroyed and not self.mapped_pieces:
            raise self.faults.failed("map", gfn, count, _errno.ESRCH, "there is no such domain")
        if self.type == "pv":
            page_errors = dict.fromkeys(range(gfn, gfn + count), _errno.EINVAL) | page_errors
        return page_errors

    def present(self, gfn: int, count: int) -> Iterator[tuple[int, int]] | None:
        """Return ``(gfn, pages)`` of each run of present pages; None if only mapping shows them."""
        if self.faults.pending or self._destroyed or self.type == "pv":
            return None
        return self.extents(gfn, count)

    def extents(self, gfn: int, count: int) -> Iterator[tuple[int, int]]:
        """Return ``(gfn, pages)`` of the parts of a range in which pages may be, as Xen tells."""
        if self._destroyed or self.type == "pv":
            return iter([(gfn, count)])
        return ((start, pages) for start, _, pages in merged(self.p2m.runs(gfn, count)))

    def remap(self, mapping: Mapping, gfn: int) -> None:
        """Map other pages over a mapping; a failure loses its memory, as with Xen."""
        self._note_unmaps()
        self.p2m.check_present(gfn, mapping.count)
        try:
            self.faults.apply("remap", gfn, mapping.count)
        except XenCallError as error:
            lose(mapping)
            raise MappingLostError(error.call, self.domid, error.errno, "injected") from None
        self.p2m.remap(mapping, gfn)
        self.faults.note("remap", gfn, mapping.count)

    def mark_dirty(self, gfn: int, count: int) -> None:
        """Note that pages were written.

        Raises:
            XenCallError: a fault was injected, or the pages lie beyond the end of memory.
        """
        self._note_unmaps()
        self.faults.apply("mark_dirty", gfn, count)
        if gfn + count > self.p2m.end:
            hint = f"memory ends at {self.memory_end:#x}"
            raise self.faults.failed("mark_dirty", gfn, count, _errno.EINVAL, hint)
        self.dirty_gfns.update(range(gfn, gfn + count))
        self.faults.note("mark_dirty", gfn, count)

    def open_ioreq_server(self, *, buffered: bool, recover: bool = False) -> MockIoreqServer:
        """Create an ioreq server, as libxendevicemodel does.

        Args:
            buffered: with a ring for buffered requests.
            recover: take over the servers whose device models were killed.

        Raises:
            XenCallError: the domain has eight, is a PV guest, or a fault was injected.
        """
        self.p2m.frames.check_process()
        self.faults.apply("create_ioreq_server")
        call = "mock_create_ioreq_server"
        if self.type == "pv":
            hint = "a PV guest has no ioreq servers"
            raise XenCallError(call, self.domid, _errno.EINVAL, hint)
        free = [number for number in range(MAX_IOREQ_SERVERS) if number not in self.ioreq_servers]
        if not free:
            hint = f"it has {MAX_IOREQ_SERVERS}, and Xen allows no further one"
            raise XenCallError(call, self.domid, _errno.ENOSPC, hint)
        abandoned = [each for each in self.ioreq_servers.values() if each.is_abandoned]
        server = MockIoreqServer(self, free[0], buffered, abandoned if recover else [])
        self.ioreq_servers[free[0]] = server
        return server

    def _pages(self, address: int, length: int) -> tuple[int, int]:
        gfn, count = whole_pages(address, length)
        if gfn + count > self.p2m.end:
            raise ValueError(
                f"{gfn << PAGE_SHIFT:#x}..{gfn + count << PAGE_SHIFT:#x} ends beyond the domain's "
                f"memory, {self.memory_end:#x}"
            )
        return gfn, count
