"""The link of an ioreq server to live Xen: its pages, its event channels, its ranges."""

from __future__ import annotations

import contextlib
import ctypes
import errno as _errno
import logging
import platform
import select
import time
from collections.abc import Callable
from functools import partial

from ..address import PAGE_SHIFT, PAGE_SIZE
from ..backends.domain import check_domid
from ..binding import libc
from ..binding.devicemodel import DeviceModel
from ..binding.eventchannel import EventChannels
from ..binding.foreignmemory import ForeignMemory
from ..binding.toolcore import restrict_all
from ..errors import UnsupportedOperationError, XenCallError
from ..ioreq import (
    SLOT_SIZE,
    RequestKind,
    State,
    answer,
    decode,
    port_of,
    state_of,
)

logger = logging.getLogger("xenmapcache.devicemodel")

_RESOURCE_IOREQ_SERVER = 0
_RING_FRAME, _PAGE_FRAME = 0, 1
_MAX_IOREQ_SERVERS = 8
_PATIENCE = 0.1
_ORDERED = ("x86_64", "i386", "i686")


class XenLink:
    """An ioreq server of a live domain; see :class:`.link.Link`.

    Follows ``xendevicemodel.h``, ``xenevtchn.h`` and, for the pages,
    ``xenforeignmemory.h`` (XENMEM_resource_ioreq_server, Xen 4.11).

    Raises:
        BackendUnavailableError: a library, Xen or the permission is missing.
        UnsupportedOperationError: not on x86, or the libraries are too old.
        XenCallError: Xen refused.
    """

    def __init__(self, domid: int, *, buffered: bool, recover: bool, binding: str | None) -> None:
        if platform.machine() not in _ORDERED:
            raise UnsupportedOperationError(
                f"serving needs x86, not {platform.machine()}: answers must reach the guest in "
                "program order, and Python has no fence for other processors"
            )
        self._domid = check_domid(domid)
        self._binding = binding
        with contextlib.ExitStack() as stack:
            self._model = stack.enter_context(DeviceModel(binding=binding))
            self._memory = stack.enter_context(ForeignMemory(binding=binding))
            self._channels = stack.enter_context(EventChannels(binding=binding))
            if recover:
                self._recover()
            self.id = self._model.create_ioreq_server(domid, buffered)
            stack.callback(self._ignoring_its_end, self._model.destroy_ioreq_server, self.id)
            pages, unmap = self._map(self.id, _RING_FRAME if buffered else _PAGE_FRAME)
            stack.callback(unmap)
            self.ring = pages[:PAGE_SIZE] if buffered else None
            self.page = pages[-PAGE_SIZE:]
            self._events = select.poll()
            self._events.register(self._channels.fileno(), select.POLLIN)
            self._stack = stack.pop_all()

    def _map(self, server: int, first: int) -> tuple[memoryview, Callable[[], None]]:
        """Map a server's pages from ``first`` on; return them, and what unmaps them."""
        count = _PAGE_FRAME + 1 - first
        resource, address = self._memory.map_resource(
            self._domid, _RESOURCE_IOREQ_SERVER, server, first, count, libc.protection(True)
        )
        # SAFETY: mapped just now, and unmapped when the server that looks at it is closed,
        # which never lets a view out.
        memory = (ctypes.c_char * (count << PAGE_SHIFT)).from_address(address)
        return memoryview(memory).cast("B"), partial(self._memory.unmap_resource, resource)

    def _recover(self) -> None:
        """Clear away servers that nobody is connected to any more."""
        for server in range(_MAX_IOREQ_SERVERS):
            try:
                page, unmap = self._map(server, _PAGE_FRAME)
            except XenCallError:
                continue  # there is no such server, or one of another making
            try:
                waiting = self._release_vcpus(page)
            finally:
                unmap()
            if waiting is not None:
                self._model.destroy_ioreq_server(self._domid, server)
                logger.warning(
                    "domain %d: cleared away ioreq server %d of a dead process; %d vCPUs waited",
                    self._domid,
                    server,
                    waiting,
                )

    def _release_vcpus(self, page: memoryview) -> int | None:
        """Answer what waits at an abandoned server; None if it is not abandoned.

        The kernel closes a dead process's event channels, and Xen then lets others bind
        them; those of a process that lives are refused.
        """
        bound: dict[int, int] = {}
        # Unbinds all that it binds.
        with EventChannels(binding=self._binding) as channels:
            for vcpu in range(len(page) // SLOT_SIZE):
                if remote_port := port_of(page, vcpu):
                    try:
                        bound[vcpu] = channels.bind_interdomain(self._domid, remote_port)
                    except XenCallError:
                        return None
            waiting = [vcpu for vcpu in bound if state_of(page, vcpu) != State.NONE]
            for vcpu in waiting:
                if state_of(page, vcpu) != State.RESPONSE_READY:
                    answer(page, vcpu, decode(page, vcpu).all_ones)
                channels.notify(bound[vcpu])
            # Destroyed before it looks, a vCPU would not find its answer.
            end = time.monotonic() + _PATIENCE
            while time.monotonic() < end and any(state_of(page, vcpu) for vcpu in waiting):
                time.sleep(0.001)
        return len(waiting) if bound else None

    def enable(self) -> None:
        """See :meth:`.link.Link.enable`."""
        self._model.set_ioreq_server_state(self._domid, self.id, True)

    def disable(self) -> None:
        """See :meth:`.link.Link.disable`."""
        self._ignoring_its_end(self._model.set_ioreq_server_state, self.id, False)

    def buffered_port(self) -> int:
        """See :meth:`.link.Link.buffered_port`."""
        return self._model.buffered_port(self._domid, self.id)

    def bind(self, remote_port: int) -> int:
        """See :meth:`.link.Link.bind`."""
        return self._channels.bind_interdomain(self._domid, remote_port)

    def claim(self, kind: RequestKind, first: int, last: int) -> None:
        """See :meth:`.link.Link.claim`."""
        if kind is RequestKind.PCI_CONFIG:
            self._model.map_pcidev(self._domid, self.id, *_function(first))
        else:
            is_mmio = kind is RequestKind.MMIO
            self._model.map_io_range(self._domid, self.id, is_mmio, first, last)

    def unclaim(self, kind: RequestKind, first: int, last: int) -> None:
        """See :meth:`.link.Link.unclaim`."""
        if kind is RequestKind.PCI_CONFIG:
            self._model.unmap_pcidev(self._domid, self.id, *_function(first))
        else:
            is_mmio = kind is RequestKind.MMIO
            self._model.unmap_io_range(self._domid, self.id, is_mmio, first, last)

    def fileno(self) -> int:
        """See :meth:`.link.Link.fileno`."""
        return self._channels.fileno()

    def pending(self) -> int | None:
        """See :meth:`.link.Link.pending`."""
        # Asked without looking first, libxenevtchn would block.
        return self._channels.pending() if self._events.poll(0) else None

    def unmask(self, port: int) -> None:
        """See :meth:`.link.Link.unmask`."""
        self._channels.unmask(port)

    def notify(self, port: int) -> None:
        """See :meth:`.link.Link.notify`."""
        self._channels.notify(port)

    def restrict(self) -> None:
        """See :meth:`.link.Link.restrict`."""
        restrict_all(self._domid, binding=self._binding)

    def inject_msi(self, address: int, data: int) -> None:
        """See :meth:`.link.Link.inject_msi`."""
        self._model.inject_msi(self._domid, address, data)

    def set_isa_irq(self, irq: int, level: bool) -> None:
        """See :meth:`.link.Link.set_isa_irq`."""
        self._model.set_isa_irq_level(self._domid, irq, level)

    def set_pci_intx(self, function: tuple[int, int, int, int], pin: int, level: bool) -> None:
        """See :meth:`.link.Link.set_pci_intx`."""
        segment, bus, device, _ = function
        self._model.set_pci_intx_level(self._domid, segment, bus, device, pin, level)

    def close(self) -> None:
        """See :meth:`.link.Link.close`."""
        self._stack.close()

    def _ignoring_its_end(self, call: Callable[..., None], *arguments: object) -> None:
        """Call something about the server; a domain that has ended took the server with it.

        ENOENT: it is dying, and lives on for as long as we map its memory.
        """
        try:
            call(self._domid, *arguments)
        except XenCallError as error:
            if error.errno not in (_errno.ESRCH, _errno.ENOENT):
                raise


def _function(bdf: int) -> tuple[int, int, int, int]:
    return bdf >> 16, bdf >> 8 & 0xFF, bdf >> 3 & 0x1F, bdf & 7
