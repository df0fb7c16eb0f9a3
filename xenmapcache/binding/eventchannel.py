"""libxenevtchn, checked: how Xen tells a device model that there is work, and the other way round.

Follows ``xenevtchn.h``, VERS_1.0.
"""

from __future__ import annotations

from pathlib import Path

from .declarations import EVENT_CHANNEL
from .handle import Handle


class EventChannels(Handle):
    """A ``xenevtchn_handle``; see :class:`.handle.Handle` for arguments and errors.

    Each method raises XenCallError when its call fails.

    Synchronization: one thread alone may wait and call :meth:`pending`, or it blocks on an
    event that another one took. All other methods may be called in any thread.
    """

    declared = EVENT_CHANNEL
    open_call = "xenevtchn_open"
    close_call = "xenevtchn_close"
    required = ("xenevtchn_pending",)
    nodes = (Path("/dev/xen/evtchn"),)
    module = "xen-evtchn"

    def fileno(self) -> int:
        """Return the file descriptor, readable when an event is pending.

        It belongs to this handle: poll it, and neither read nor close it.

        Raises:
            XenCallError: it failed.
        """
        return self.check("xenevtchn_fd", None)

    def bind_interdomain(self, domid: int, remote_port: int) -> int:
        """Connect a new port with a port of another domain.

        Args:
            domid: the other domain.
            remote_port: its port, which waits for a connection from here.

        Returns:
            The port here.

        Raises:
            XenCallError: it failed.
        """
        return self.check("xenevtchn_bind_interdomain", domid, domid, remote_port)

    def unbind(self, port: int) -> None:
        """Give a port up.

        Raises:
            XenCallError: it failed; ENOTCONN: this handle has not bound the port.
        """
        self.check("xenevtchn_unbind", None, port)

    def notify(self, port: int) -> None:
        """Send an event to the other end of a port.

        Raises:
            XenCallError: it failed; ENOTCONN: this handle has not bound the port.
        """
        self.check("xenevtchn_notify", None, port)

    def unmask(self, port: int) -> None:
        """Let a port's events come again, after :meth:`pending` returned it.

        Raises:
            XenCallError: it failed.
        """
        self.check("xenevtchn_unmask", None, port)

    def pending(self) -> int:
        """Return the next port that has an event, and mask it: no other comes before unmask.

        It may block where there is none: poll :meth:`fileno` before each call.

        Raises:
            XenCallError: it failed; EINTR: a signal came while it blocked.
        """
        return self.check("xenevtchn_pending", None)
