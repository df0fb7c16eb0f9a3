"""GuestEnd: stops a server when its guest ends, which no request tells."""

from __future__ import annotations

import logging
import threading
from types import TracebackType
from typing import Self

from ..errors import XenMapCacheError
from ..logs import safely
from .server import IoreqServer

logger = logging.getLogger("xenmapcache.devicemodel")

_INTERVAL_S = 1.0


class GuestEnd:
    """Stops a server when its guest was destroyed, for a ``with`` block.

        with server, GuestEnd(server) as end:
            server.serve_forever()
        print(end.ended)

    A thread of its own asks every second. Close the cache soon after: Xen keeps a guest whose
    memory is mapped.

    Args:
        server: is stopped by :meth:`IoreqServer.stop`.

    Attributes:
        ended: the guest has ended.

    Synchronization: one ``with`` block, and no second one.
    """

    def __init__(self, server: IoreqServer) -> None:
        self.ended = False
        self._server = server
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._run, name=f"end of domain {server.domid}", daemon=True
        )

    def _run(self) -> None:
        backend = self._server.cache.backend
        try:
            while not self._stop.wait(_INTERVAL_S):
                if backend.has_ended():
                    self.ended = True
                    self._server.stop()
                    return
        except XenMapCacheError as error:
            safely(
                logger.warning,
                "domain %d: whether the guest has ended cannot be told: %s; stop the program when "
                "it has, because Xen keeps a guest whose memory is mapped",
                self._server.domid,
                error,
            )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
