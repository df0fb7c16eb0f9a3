"""The link of an ioreq server to live Xen: its pages, its event channels, its ranges."""

from __future__ import annotations

import contextlib
import ctypes
import errno as _errno
import select
from collections.abc import Callable
from functools import partial

from ..address import PAGE_SHIFT, PAGE_SIZE
from ..backends.domain import check_domid
from ..binding import libc
from ..binding.control import Control
from ..binding.devicemodel import DeviceModel
from ..binding.eventchannel import EventChannels
from ..binding.fence import find_fence, host_architecture
from ..binding.foreignmemory import ForeignMemory
from ..binding.toolcore import restrict_all
from ..errors import UnsupportedOperationError, XenCallError, XenMapCacheError
from ..ioreq import RequestKind, is_idle
from .guest_type import guest_type
from .link import Predecessor
from .recovery import XenPredecessor, bind_all

_RESOURCE_IOREQ_SERVER = 0
_RING_FRAME, _PAGE_FRAME = 0, 1
_MAX_IOREQ_SERVERS = 8


class XenLink:
    """An ioreq server of a live domain; see :class:`.link.HypervisorLink`.

    Follows ``xendevicemodel.h``, ``xenevtchn.h`` and, for the pages,
    ``xenforeignmemory.h`` (XENMEM_resource_ioreq_server, Xen 4.11).

    Raises:
        BackendUnavailableError: a library, Xen or the permission is missing.
        UnsupportedOperationError: the libraries are too old, Xen has no ioreq servers, or no
            fence can be had for this processor.
        XenCallError: Xen refused.
    """

    def __init__(
        self,
        domid: int,
        *,
        buffered: bool,
        recover: bool,
        binding: str | None,
    ) -> None:
        self.fence = find_fence(host_architecture())
        self._domid = check_domid(domid)
        self._binding = binding
        self._keeps_pages = self._destroyed = False
        self.predecessors: list[Predecessor] = []
        self.guest_type = guest_type(domid)  # before `restrict`, which may close the way
        with contextlib.ExitStack() as stack:
            self._model = stack.enter_context(DeviceModel(binding=binding))
            self._memory = ForeignMemory(binding=binding)
            stack.callback(self._close_memory)
            self._channels = stack.enter_context(EventChannels(binding=binding))
            stack.callback(self._close_predecessors)
            if recover:
                self._find_predecessors()
            self.id = self._create(buffered)
            stack.callback(self._ignoring_its_end, self._model.destroy_ioreq_server, self.id)
            first = _RING_FRAME if buffered else _PAGE_FRAME
            pages, unmap = self._map(self.id, first, _PAGE_FRAME + 1 - first)
            self._unmap_pages = [unmap]
            stack.callback(self._close_pages)
            self.ring = pages[:PAGE_SIZE] if buffered else None
            self.page = pages[-PAGE_SIZE:]
            self._events = select.poll()
            self._events.register(self._channels.fileno(), select.POLLIN)
            stack.pop_all()  # from here on it is for close()

    def _map(self, server: int, first: int, count: int) -> tuple[memoryview, Callable[[], None]]:
        """Map a server's pages from ``first`` on; return them, and what unmaps them."""
        resource, address = self._memory.map_resource(
            self._domid, _RESOURCE_IOREQ_SERVER, server, first, count, libc.protection(True)
        )
        # SAFETY: mapped just now, and unmapped when the server that looks at it is closed,
        # which never lets a view out.
        memory = (ctypes.c_char * (count << PAGE_SHIFT)).from_address(address)
        return memoryview(memory).cast("B"), partial(self._memory.unmap_resource, resource)

    def _find_predecessors(self) -> None:
        """Find the servers whose process has died; see :mod:`.recovery`."""
        for server in range(_MAX_IOREQ_SERVERS):
            with contextlib.ExitStack() as stack:
                mapped = stack.enter_context(contextlib.ExitStack())
                try:
                    page = self._map_until(mapped, server, _PAGE_FRAME)
                except XenCallError:
                    continue  # there is no such server, or one created by other code
                channels = stack.enter_context(EventChannels(binding=self._binding))
                ports = bind_all(page, self._domid, channels)
                if not ports:
                    continue
                ring = None
                with contextlib.suppress(XenCallError):  # it has no ring
                    ring = self._map_until(mapped, server, _RING_FRAME)
                destroy = self._model.destroy_ioreq_server
                self.predecessors.append(
                    XenPredecessor(
                        server,
                        page,
                        ring,
                        ports=ports,
                        channels=channels,
                        unmap=mapped.close,
                        disable=partial(self._set_state, server, False),
                        destroy=partial(self._ignoring_its_end, destroy, server),
                    )
                )
                stack.pop_all()  # it is the predecessor's

    def _map_until(self, stack: contextlib.ExitStack, server: int, frame: int) -> memoryview:
        """Map one page of a server until a stack is closed."""
        page, unmap = self._map(server, frame, 1)
        stack.callback(unmap)
        return page

    def _create(self, buffered: bool) -> int:
        """Create the server. If the domain has no room, an idle server of a dead process goes."""
        try:
            return self._model.create_ioreq_server(self._domid, buffered)
        except XenCallError as error:
            if error.errno == _errno.ENOSYS:
                raise UnsupportedOperationError(
                    f"domain {self._domid}: this Xen has no ioreq servers (ENOSYS), as those that "
                    "distributions build for Arm; build it with CONFIG_IOREQ_SERVER=y and boot it "
                    "(see docs/device-models-live.md, Arm)"
                ) from error
            idle = [each for each in self.predecessors if is_idle(each.page, each.ring)]
            if error.errno != _errno.ENOSPC or not idle:
                raise
        idle[0].disable()
        self.predecessors.remove(idle[0])
        idle[0].close()
        return self._model.create_ioreq_server(self._domid, buffered)

    def _set_state(self, server: int, enabled: bool) -> None:
        self._model.set_ioreq_server_state(self._domid, server, enabled)

    @property
    def paused(self) -> bool | None:
        """See :attr:`.link.HypervisorLink.paused`."""
        try:
            with Control(binding=self._binding) as control:
                state = control.domain_state(self._domid)
        except XenMapCacheError:
            return None
        return state.paused and not (state.dying or state.shut_down)

    def has_ended(self) -> bool:
        """See :meth:`.link.HypervisorLink.has_ended`.

        A dm_op on the own server: it needs neither a toolstack nor other rights than serving.
        """
        return not self._model.has_ioreq_server(self._domid, self.id)

    def nr_vcpus(self) -> int:
        """See :meth:`.link.HypervisorLink.nr_vcpus`."""
        return self._model.nr_vcpus(self._domid)

    def enable(self) -> None:
        """See :meth:`.link.HypervisorLink.enable`."""
        self._model.set_ioreq_server_state(self._domid, self.id, True)

    def disable(self) -> None:
        """See :meth:`.link.HypervisorLink.disable`."""
        self._ignoring_its_end(self._model.set_ioreq_server_state, self.id, False)

    def buffered_port(self) -> int:
        """See :meth:`.link.HypervisorLink.buffered_port`."""
        return self._model.buffered_port(self._domid, self.id)

    def bind(self, remote_port: int) -> int:
        """See :meth:`.link.HypervisorLink.bind`."""
        return self._channels.bind_interdomain(self._domid, remote_port)

    def claim(self, kind: RequestKind, first: int, last: int) -> None:
        """See :meth:`.link.HypervisorLink.claim`."""
        if kind is RequestKind.PCI_CONFIG:
            self._model.map_pcidev(self._domid, self.id, *_function(first))
        else:
            is_mmio = kind is RequestKind.MMIO
            self._model.map_io_range(self._domid, self.id, is_mmio, first, last)

    def unclaim(self, kind: RequestKind, first: int, last: int) -> None:
        """See :meth:`.link.HypervisorLink.unclaim`."""
        if kind is RequestKind.PCI_CONFIG:
            self._model.unmap_pcidev(self._domid, self.id, *_function(first))
        else:
            is_mmio = kind is RequestKind.MMIO
            self._model.unmap_io_range(self._domid, self.id, is_mmio, first, last)

    def fileno(self) -> int:
        """See :meth:`.link.HypervisorLink.fileno`."""
        return self._channels.fileno()

    def pending(self) -> int | None:
        """See :meth:`.link.HypervisorLink.pending`."""
        # Asked without looking first, libxenevtchn would block.
        return self._channels.pending() if self._events.poll(0) else None

    def unmask(self, port: int) -> None:
        """See :meth:`.link.HypervisorLink.unmask`."""
        self._channels.unmask(port)

    def notify(self, port: int) -> None:
        """See :meth:`.link.HypervisorLink.notify`."""
        self._channels.notify(port)

    def restrict(self) -> None:
        """See :meth:`.link.HypervisorLink.restrict`."""
        restrict_all(self._domid, binding=self._binding)

    def inject_msi(self, address: int, data: int) -> None:
        """See :meth:`.link.HypervisorLink.inject_msi`."""
        self._model.inject_msi(self._domid, address, data)

    def set_isa_irq(self, irq: int, level: bool) -> None:
        """See :meth:`.link.HypervisorLink.set_isa_irq`."""
        self._model.set_isa_irq_level(self._domid, irq, level)

    def set_pci_intx(self, function: tuple[int, int, int, int], pin: int, level: bool) -> None:
        """See :meth:`.link.HypervisorLink.set_pci_intx`."""
        segment, bus, device, _ = function
        self._model.set_pci_intx_level(self._domid, segment, bus, device, pin, level)

    def set_irq_level(self, irq: int, level: bool) -> None:
        """See :meth:`.link.HypervisorLink.set_irq_level`."""
        self._model.set_irq_level(self._domid, irq, level)

    def close(self, *, unmap: bool = True) -> None:
        """See :meth:`.link.HypervisorLink.close`."""
        self._keeps_pages = not unmap
        errors: list[Exception] = []
        # Each step can be repeated, because a signal handler may interrupt any of them.
        for step in (
            self._close_pages,
            self._destroy,
            self._close_predecessors,
            self._channels.close,
            self._close_memory,
            self._model.close,
        ):
            try:
                step()
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def _destroy(self) -> None:
        if not self._destroyed:
            self._ignoring_its_end(self._model.destroy_ioreq_server, self.id)
            self._destroyed = True

    def _close_predecessors(self) -> None:
        for each in self.predecessors:
            each.close(unmap=not self._keeps_pages)

    def unmap(self) -> None:
        """See :meth:`.link.HypervisorLink.unmap`."""
        self._keeps_pages = False
        self._close_predecessors()
        self._close_pages()
        self._memory.close()

    def _close_pages(self) -> None:
        if self._unmap_pages and not self._keeps_pages:
            self._unmap_pages.pop()()

    def _close_memory(self) -> None:
        if not self._keeps_pages:  # or they could not be unmapped later
            self._memory.close()

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
