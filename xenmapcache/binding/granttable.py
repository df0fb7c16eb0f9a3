"""libxengnttab, checked: pages that a guest has granted are mapped, copied, and given back.

Follows ``xengnttab.h``, VERS_1.0 to 1.2, ``xen/grant_table.h`` and Linux's ``xen/gntdev.h``.
"""

# Theory of operation
#
# To unmap granted memory takes two steps in the kernel: munmap, and the ioctl UNMAP_GRANT_REF with
# the index that the kernel gave to these grants. xengnttab_unmap does both, and leaves the address
# free for another thread. Where views may be kept, private zeros take the place of the memory
# first, and only the ioctl is left: `give_back`. The library has no function for it.
#
# The kernel uses an index again as soon as it was given back. So each index is given back once: a
# token is taken, the ioctl made and the record dropped by one call into C, and no signal handler
# comes in between. That is why `ioctl` is a function of ctypes, whichever loader is used. It is
# looked up in the library, which finds libc's; a stand-in has its own.

from __future__ import annotations

import ctypes
import errno as _errno
import struct
from array import array
from collections.abc import Callable, Sequence
from functools import partial
from operator import call
from pathlib import Path

from .ctypes_loader import cause_of
from .declarations import GRANT_TABLE
from .handle import Handle

MAP, COPY, FD = "xengnttab_map_domain_grant_refs", "xengnttab_grant_copy", "xengnttab_fd"
UNMAP_IOCTL = "IOCTL_GNTDEV_UNMAP_GRANT_REF"
OFFSET_IOCTL = "IOCTL_GNTDEV_GET_OFFSET_FOR_VADDR"

# struct ioctl_gntdev_unmap_grant_ref: u64 index, u32 count, u32 pad
_UNMAP = struct.Struct("=QII")
# struct ioctl_gntdev_get_offset_for_vaddr: u64 vaddr, u64 offset, u32 count, u32 pad
_OFFSET = struct.Struct("=QQII")
_UNMAP_NUMBER = _UNMAP.size << 16 | ord("G") << 8 | 1
_OFFSET_NUMBER = _OFFSET.size << 16 | ord("G") << 8 | 2

# struct xengnttab_grant_copy_segment: union source, union dest, u16 len, u16 flags, s16 status. A
# union is {u32 ref, u16 offset, u16 domid} or an address.
_FROM_GUEST = struct.Struct("=IHHQHHhxx")
_TO_GUEST = struct.Struct("=QIHHHHhxx")
_SOURCE_IS_GRANT, _DEST_IS_GRANT = 1, 2
_STATUS = struct.Struct("=20xhxx")

_call: Callable[[Callable[[], object]], object] = call


class GrantTable(Handle):
    """A ``xengnttab_handle``; see :class:`.handle.Handle` for arguments and errors.

    A handle that was opened before :func:`.toolcore.restrict_all` cannot be used after it.
    """

    declared = GRANT_TABLE
    open_call = "xengnttab_open"
    close_call = "xengnttab_close"
    required = (MAP,)
    nodes = (Path("/dev/xen/gntdev"),)
    module = "xen-gntdev"

    def __init__(self, *, binding: str | None = None, library: str | None = None) -> None:
        super().__init__(binding=binding, library=library)
        self._ioctl = ctypes.CDLL(self.path, use_errno=True)["ioctl"]
        self._ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]
        self._ioctl.restype = ctypes.c_int

    def map(
        self, domid: int, refs: array[int], prot: int, *, result_out: list[int] | None = None
    ) -> int:
        """Map the pages of grant references in one piece: all, or on an error none.

        Args:
            domid: the domain that has granted them.
            refs: an ``array("I")`` of references.
            prot: PROT_ flags; a page that was granted read-only cannot be mapped for writing.
            result_out: a list that gets the host address, for a caller that is interrupted.

        Returns:
            The host address.

        Raises:
            XenCallError: it failed, with EINVAL whatever the reason is.
        """
        result, errno = self.call(MAP, len(refs), domid, refs, prot, result_out=result_out)
        if not result:
            raise self.fail(MAP, domid, errno)
        return result

    def unmap(self, address: int, count: int) -> None:
        """Unmap a complete mapping, give its grants back, and leave the address free.

        Raises:
            XenCallError: it failed; EINVAL: no mapping of ``count`` pages begins there.
        """
        self.check("xengnttab_unmap", None, address, count)

    def index(self, address: int) -> int:
        """Return the kernel's index of the grants that are mapped at a host address.

        Raises:
            XenCallError: no mapping of grants begins there.
            UnsupportedOperationError: the library is older than VERS_1.2.
        """
        structure = bytearray(_OFFSET.pack(address, 0, 0, 0))
        buffer = (ctypes.c_char * _OFFSET.size).from_buffer(structure)
        ctypes.set_errno(0)
        opened = self._opened  # keeps the descriptor open
        try:
            if self._ioctl(self.fileno(), _OFFSET_NUMBER, buffer) < 0:
                raise self.fail(OFFSET_IOCTL, None, ctypes.get_errno())
        finally:
            del opened  # or a traceback that is kept would keep the handle open
        return int(_OFFSET.unpack(structure)[1])

    def give_back(
        self, index: int, count: int, token: list[None], done: Callable[[], object]
    ) -> bool:
        """Give grants back whose memory is no longer mapped.

        Args:
            index: as :meth:`index` returned it, when they were mapped.
            count: pages.
            token: a list with one element, which the call that gives them back takes out. If it
                fails, the element is put back.
            done: a C function, called when they are given back. It returns something false.

        Returns:
            False if the kernel does not know them: other code has given them back. If another call
            has the token, nothing is done.

        Raises:
            XenCallError: it failed, and changed nothing.
            ClosedError: the handle is closed, or belongs to the parent process.
            UnsupportedOperationError: the library is older than VERS_1.2.
        """
        opened = self._opened  # keeps the descriptor open
        structure = ctypes.create_string_buffer(_UNMAP.pack(index, count, 0), _UNMAP.size)
        ended = [0]  # emptied when the kernel has them back
        waiting = [0]  # emptied together with the taking of the token
        try:
            steps: list[Callable[[], object]] = [
                token.pop,
                waiting.pop,
                partial(self._ioctl, self.fileno(), _UNMAP_NUMBER, structure),
                ended.pop,
                done,
            ]
            ctypes.set_errno(0)
            any(map(_call, steps))  # ends with the first step that returns something true
            errno = ctypes.get_errno()
            if ended and not waiting:
                if errno != _errno.ENOENT:
                    raise self.fail(UNMAP_IOCTL, None, errno)
                ended.clear()  # a child that C code has forked may have given them back
                done()
                return False
            return True
        except IndexError:
            return True  # another call has the token
        except ctypes.ArgumentError as error:
            raise cause_of(error) from error
        finally:
            if ended and not waiting:
                token.append(None)
            del opened  # or a traceback that is kept would keep the handle open

    def fileno(self) -> int:
        """Return the file descriptor of ``/dev/xen/gntdev``, which belongs to this handle.

        Raises:
            XenCallError: it failed.
            UnsupportedOperationError: the library is older than VERS_1.2.
        """
        return self.check(FD, None)

    def copy(
        self,
        domid: int,
        parts: Sequence[tuple[int, int, int]],
        buffer: bytearray,
        *,
        to_guest: bool,
    ) -> list[int]:
        """Copy between a buffer and granted pages, without mapping them.

        Args:
            domid: the domain that has granted them.
            parts: ``(reference, offset, length)`` of granted pages, in the order of the buffer;
                none crosses a page's end.
            buffer: it is kept, and keeps its size, during the call.
            to_guest: copy from the buffer to the pages.

        Returns:
            The status of each part: 0, or a negative GNTST_ number.

        Raises:
            ValueError: the parts are not as long as the buffer.
            XenCallError: the call failed as a whole; parts may have been copied.
            UnsupportedOperationError: the library is older than VERS_1.1.
        """
        if sum([length for _, _, length in parts]) != len(buffer):
            raise ValueError(f"the parts must be {len(buffer)} bytes, the buffer's size, together")
        # SAFETY: the array keeps the buffer, and the buffer its memory, until this returns.
        memory = (ctypes.c_char * len(buffer)).from_buffer(buffer)
        local = ctypes.addressof(memory)
        segments = bytearray()
        for ref, offset, length in parts:
            if to_guest:
                segments += _TO_GUEST.pack(local, ref, offset, domid, length, _DEST_IS_GRANT, 0)
            else:
                segments += _FROM_GUEST.pack(ref, offset, domid, local, length, _SOURCE_IS_GRANT, 0)
            local += length
        self.check(COPY, domid, len(parts), segments)
        del memory
        return [status for (status,) in _STATUS.iter_unpack(segments)]
