"""A device model in a process of its own: `python -m tests.xen.model DOMID ...`.

It says `ready`, and `ended N` when it was told to end; N is what `serve_forever` returned.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import threading
from typing import Final

from xenmapcache import Backend, MapCache, XenCallError, open_backend
from xenmapcache.devicemodel import IoreqServer

PORT: Final = 0x740
COUNT, STUCK, OWN, OTHER, STORED = range(0, 20, 4)
"""Ports: a number that counts INVALIDATEs; one that never answers, unless the model recovers;
whether memory of the guest can be read, and of another one (0, or the errno); and what was written
there, with the number of writes in its upper half."""
GREETING: Final = 0x5A5A0000


class Model:
    """The device."""

    def __init__(self, server: IoreqServer, other: Backend | None, *, recovers: bool) -> None:
        self._server = server
        self._other = other
        self._recovers = recovers
        self._stored = 0

    def read(self, offset: int, size: int) -> int:
        """Answer with the lowest bytes of a port's number, or not."""
        return self._number(offset) & (1 << 8 * size) - 1

    def _number(self, offset: int) -> int:
        match offset:
            case 0:
                return GREETING + self._server.invalidations
            case 4 if self._recovers:
                return GREETING - 1
            case 4:
                say("asked")
                threading.Event().wait()
            case 8:
                return len(self._server.cache.read(0x1000, 4))
            case 12 if self._other is not None:
                try:
                    self._other.map(0, 1, writable=False)
                except XenCallError as error:
                    return error.errno
                return 0
            case 16:
                return self._stored
        raise LookupError(f"nothing at {offset}")

    def write(self, offset: int, size: int, value: int) -> None:
        """Store a number, or refuse."""
        if offset == STORED:
            self._stored = (self._stored + 0x10000) & ~0xFFFF | value
            return
        raise LookupError(f"nothing at {offset}")


def say(text: str) -> None:
    """Tell the test."""
    # Not print(): a signal handler says something, too, and may interrupt it.
    os.write(1, f"{text}\n".encode())


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser()
    parser.add_argument("domid", type=int)
    parser.add_argument("--other", type=int, help="another domain, opened before rights go")
    parser.add_argument("--restrict", action="store_true")
    parser.add_argument("--recover", action="store_true")
    options = parser.parse_args()
    logging.basicConfig()
    with contextlib.ExitStack() as stack:
        other = None
        if options.other is not None:
            other = stack.enter_context(open_backend("xen", domid=options.other))
        backend = stack.enter_context(open_backend("xen", domid=options.domid))
        cache = stack.enter_context(MapCache(backend))
        server = IoreqServer(
            options.domid, cache, restrict=options.restrict, recover=options.recover
        )
        server.claim_ports(PORT, 20, Model(server, other, recovers=options.recover))
        stack.enter_context(server)
        signal.signal(signal.SIGUSR1, lambda *_: say(f"requests {server.requests}"))
        say("ready")
        ended = server.serve_forever()
    say(f"ended {ended}")


if __name__ == "__main__":
    main()
