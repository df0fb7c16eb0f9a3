"""What the backends of live Xen domains share, whichever library maps."""

from __future__ import annotations

import abc
import errno as _errno
import logging
from array import array
from collections.abc import Collection, Iterator
from functools import cached_property, partial
from pathlib import Path

from ..address import PAGE_MASK, PAGE_SHIFT, as_int, page_runs
from ..backend import Backend, Capability, RoomUser
from ..binding import libc
from ..binding.control import GET_INFO_LIST, MAXIMUM_GPFN, PAUSE, Control
from ..binding.declarations import CONTROL, DEVICE_MODEL, GRANT_TABLE, Library
from ..binding.devicemodel import DeviceModel
from ..binding.handle import Handle
from ..binding.hints import HINTS, PAGE_HINTS
from ..binding.loader import get_loader
from ..errors import BackendUnavailableError, UnsupportedOperationError, XenCallError
from ..grants import MAX_MAPPED, MAX_REFS
from ..grants.xen import XenGrants
from ..mapping import Mapping
from . import survey
from .room import mapping_room, share_room

logger = logging.getLogger("xenmapcache")

_DOMID_FIRST_RESERVED = 0x7FF0
_CAPABILITIES = Path("/proc/xen/capabilities")


def check_domid(domid: int) -> int:
    """Return a domain's number.

    Raises:
        TypeError: not an int.
        ValueError: not in 0..0x7fef, where domains have their numbers.
    """
    number = as_int("domid", domid)
    if not 0 <= number < _DOMID_FIRST_RESERVED:
        raise ValueError(f"domid {number} is not in 0..{_DOMID_FIRST_RESERVED - 1} (see xl list)")
    return number


def _is_own(domid: int) -> bool:
    try:
        return domid == 0 and "control_d" in _CAPABILITIES.read_text()
    except OSError:
        return False


class DomainBackend(Backend):
    """A live domain. Opening it maps one page, to learn whether it is there and may be mapped.

    It has :attr:`.Capability.DIRTY` where libxendevicemodel is there and Xen takes its
    reports of written pages: an HVM or PVH guest's. Where not, the logger ``xenmapcache``
    tells why, at INFO.

    Attributes:
        domid: the domain.
        binding: ``"cffi"`` or ``"ctypes"``.
        library: the file that the dynamic linker was asked for.
        log_dirty: whether written pages are reported to Xen (for migration). Set it to
            False while the guest is not being migrated, to save a hypercall per write.
    """

    capabilities = Capability.WRITE
    map_call: str

    def __init__(self, handle: Handle, domid: int) -> None:
        self.domid = domid
        self._handle = handle
        self.binding = handle.binding
        self.library = handle.path
        self.log_dirty = True
        self._device_model: DeviceModel | None = None
        self._pauser: Control | None = None
        self._pauses: list[int] = []  # 0 for each pause and unpause: odd while it is paused
        try:
            refusal = self.map(0, 1, writable=False).refusal()
            if refusal is not None:
                raise refusal
            self._device_model = self._open_device_model()
        except BaseException:
            handle.close()
            raise
        if self._device_model is not None:
            self.capabilities |= Capability.DIRTY

    def _open_device_model(self) -> DeviceModel | None:
        """Open what takes reports of written pages, after a report that changes nothing."""
        library = self._library_with(DEVICE_MODEL, DeviceModel.open_call)
        try:
            model = DeviceModel(binding=self.binding, library=library)
        except BackendUnavailableError as error:
            self._tell_why_not(error)
            return None
        try:
            model.modified_memory(self.domid, 0, 1)
        except BaseException as error:
            model.close()
            if not isinstance(error, XenCallError):
                raise
            self._tell_why_not(error)
            return None
        return model

    def _library_with(self, declared: Library, function: str) -> str | None:
        """Return the library that maps if it is a stand-in for another one, too."""
        functions = get_loader(self.binding).open(declared, self.library)
        return self.library if function in functions else None

    @cached_property
    def memory_end(self) -> int | None:  # type: ignore[override] # asked for when it is needed
        """One past the highest guest address that Xen has given out; None if libxenctrl is silent.

        Follows ``xc_domain_maximum_gpfn``. Asked for once; the logger ``xenmapcache`` tells
        at INFO why it is None.
        """
        library = self._library_with(CONTROL, MAXIMUM_GPFN)
        try:
            with Control(binding=self.binding, library=library) as control:
                return control.maximum_gfn(self.domid) + 1 << PAGE_SHIFT
        except (BackendUnavailableError, UnsupportedOperationError, XenCallError) as error:
            logger.info("domain %d: the end of its memory is not known: %s", self.domid, error)
            return None

    def extents(self, gfn: int, count: int) -> Iterator[tuple[int, int]]:
        """Return where in a range pages may be; see :meth:`Backend.extents`.

        Follows ``xc_domain_getinfolist`` and ``xc_get_pfn_type_batch`` of libxenctrl; on Arm, where
        Xen does not have the second one, some pages are mapped in its place. Parts are whole MiB.
        On x86 no page of the guest's memory is skipped; pages of Xen's own may be. On Arm a
        single page in a hole of 64 MiB is skipped if it is at neither end of a MiB.

        The whole range is returned, and the logger ``xenmapcache`` tells at INFO why, where
        libxenctrl is missing or may not be used, as after ``restrict``.
        """
        count = self._known_part(gfn, count)
        windows = self._windows(gfn, count)
        return iter([(gfn, count)]) if windows is None else survey.runs(windows, gfn, count)

    def survey(self, gfn: int, count: int) -> Iterator[tuple[int, int]] | None:
        """Return the runs of pages in a range, on x86; see :meth:`Backend.survey`.

        Follows the same functions as :meth:`extents`. Of the MiB that have a page, the frames
        without a page of the guest are mapped, to find those of Xen's own.
        """
        count = self._known_part(gfn, count)
        windows = self._windows(gfn, count)
        if not isinstance(windows, dict):
            return None
        survey.add_others(self._map_frames, windows)
        return survey.page_runs(windows, gfn, count)

    def _known_part(self, gfn: int, count: int) -> int:
        """Return how many pages of a range lie before the end of memory, if that is known."""
        if self.memory_end is None:
            return count
        return min(count, max(0, (self.memory_end >> PAGE_SHIFT) - gfn))

    def _windows(self, gfn: int, count: int) -> Collection[int] | None:
        """Return which windows of a range may have pages; None if all of them may.

        By Xen's word it is a dictionary, with what is known of each frame.
        """
        if self.memory_end is None:
            return None
        windows = survey.windows_of(gfn, count)
        library = self._library_with(CONTROL, GET_INFO_LIST)
        try:
            with Control(binding=self.binding, library=library) as control:
                pages = control.domain_state(self.domid).pages
                try:
                    look = partial(control.has_pages, self.domid)
                    return survey.by_count(look, windows, pages)
                except (UnsupportedOperationError, XenCallError):
                    return survey.by_ends(self._map_frames, windows, pages)
        except (BackendUnavailableError, UnsupportedOperationError, XenCallError) as error:
            logger.info("domain %d: all of its address space is mapped: %s", self.domid, error)
            return None

    def _map_frames(self, gfns: array[int]) -> bytes:
        """Tell of each frame whether it can be mapped, or is refused."""
        result_out: list[int] = []
        try:
            _, errors = self._map_pages(libc.PROT_READ, gfns, result_out)
        finally:
            for address in filter(None, result_out):
                libc.unmap(address, len(gfns) << PAGE_SHIFT)
        if errors is None:
            return bytes([1]) * len(gfns)
        return bytes([not error or error in PAGE_HINTS for error in errors])

    @property
    def mapping_room(self) -> int:  # type: ignore[override] # it changes with what is mapped
        """How many bytes a cache maps at most by default: less where that takes Dom0's memory."""
        return mapping_room()

    def share_room(self, user: RoomUser) -> int:
        """Return what a new cache maps at most; see :class:`Backend`."""
        return share_room(user)

    def _tell_why_not(self, reason: Exception) -> None:
        logger.info(
            "domain %d: written pages are not reported to Xen, so a migration may miss them: %s",
            self.domid,
            reason,
        )

    @abc.abstractmethod
    def _map_pages(
        self, prot: int, gfns: array[int], result_out: list[int]
    ) -> tuple[int, bytes | None]:
        """Map pages through the library; return the host address and the pages' errnos."""

    def map(self, gfn: int, count: int, *, writable: bool) -> Mapping:
        """Map guest pages; see :meth:`Backend.map`."""
        gfns = array("Q", range(gfn, gfn + count))
        result_out: list[int] = []  # the address, until the mapping has taken it over
        try:
            address, errors = self._map_pages(libc.protection(writable), gfns, result_out)
            if address & PAGE_MASK:
                result_out.clear()  # where pages begin there is not known
                hint = f"it returned {address:#x}, where no page begins"
                raise XenCallError(self.map_call, self.domid, _errno.EIO, hint)
            mapping = Mapping(
                address,
                gfn,
                count,
                writable=writable,
                errors=errors,
                result_out=result_out,
                call=self.map_call,
                domid=self.domid,
            )
        except BaseException:
            # Interrupted, by Ctrl-C, while Xen was mapping.
            for address in filter(None, result_out):
                libc.unmap(address, count << PAGE_SHIFT)
            raise
        # Xen does not fail the call for a domain that is not there: it fails each page.
        if errors is not None and (
            errors.count(_errno.ESRCH) == count
            or (errors.count(_errno.EPERM) == count and _is_own(self.domid))  # 4.20 on Arm
        ):
            raise self._no_domain()
        return mapping

    def _no_domain(self) -> XenCallError:
        if _is_own(self.domid):
            hint = "domain 0 is the one that this runs in; map another one (see xl list)"
        else:
            hint = HINTS[_errno.ESRCH]
        return XenCallError(self.map_call, self.domid, _errno.ESRCH, hint)

    def mark_dirty(self, gfn: int, count: int) -> None:
        """Report written pages to Xen if ``log_dirty``; see :meth:`Backend.mark_dirty`.

        Follows ``xendevicemodel_modified_memory``. A domain that is gone raises nothing:
        nothing of it will be migrated.
        """
        if self._device_model is None:
            super().mark_dirty(gfn, count)
        elif self.log_dirty:
            try:
                self._device_model.modified_memory(self.domid, gfn, count)
            except XenCallError as error:
                if error.errno != _errno.ESRCH:
                    raise

    def track_dirty_vram(self, gfn: int, count: int) -> list[tuple[int, int]]:
        """Return which pages the guest has written; see :meth:`Backend.track_dirty_vram`.

        Follows ``xendevicemodel_track_dirty_vram``. While the guest is being migrated, Xen keeps
        no track of its own, and each call returns the complete range.
        """
        if self._device_model is None:
            return super().track_dirty_vram(gfn, count)
        try:
            bitmap = self._device_model.track_dirty_vram(self.domid, gfn, count)
        except XenCallError as error:
            if error.errno != _errno.ENODATA:
                raise
            return page_runs(gfn, [True] * count)
        return page_runs(gfn, [bool(bitmap[at // 8] >> at % 8 & 1) for at in range(count)])

    def pause(self) -> None:
        """Stop the guest's vCPUs, as ``xl pause`` does; see :meth:`Backend.pause`.

        Follows ``xc_domain_pause`` of libxenctrl.
        """
        if self._pauses.count(0) % 2:
            return
        if self._pauser is None:  # kept open, so that unpausing needs nothing that may be missing
            library = self._library_with(CONTROL, PAUSE)
            self._pauser = Control(binding=self.binding, library=library)
        self._pauser.pause(self.domid, result_out=self._pauses)

    def unpause(self) -> None:
        """Let the guest's vCPUs run again; see :meth:`Backend.unpause`.

        Follows ``xc_domain_unpause`` of libxenctrl.
        """
        if self._pauser is not None and self._pauses.count(0) % 2:
            try:
                self._pauser.unpause(self.domid, result_out=self._pauses)
            except XenCallError as error:
                if error.errno != _errno.ESRCH:
                    raise
                self._pauses.append(0)

    def has_ended(self) -> bool:
        """Tell whether the domain was destroyed; see :meth:`Backend.has_ended`.

        Follows ``xc_domain_getinfolist`` of libxenctrl.
        """
        library = self._library_with(CONTROL, GET_INFO_LIST)
        try:
            with Control(binding=self.binding, library=library) as control:
                return control.domain_state(self.domid).dying
        except XenCallError as error:
            if error.errno != _errno.ESRCH:
                raise
            return True

    def open_grants(self, *, max_refs: int = MAX_REFS, max_mapped: int = MAX_MAPPED) -> XenGrants:
        """Open the pages that the guest has granted; see :meth:`Backend.open_grants`.

        Follows ``xengnttab_map_domain_grant_refs`` and ``xengnttab_grant_copy`` of libxengnttab.
        """
        return XenGrants(
            self.domid,
            max_refs=max_refs,
            max_mapped=max_mapped,
            binding=self.binding,
            library=self._library_with(GRANT_TABLE, "xengnttab_open"),
        )

    def close(self) -> None:
        """Close the libraries' handles; see :meth:`Backend.close`."""
        self._handle.close()
        for other in (self._device_model, self._pauser):
            if other is not None:
                other.close()
