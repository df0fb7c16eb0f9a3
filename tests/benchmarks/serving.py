"""How many requests a second a thread and an event loop serve, side by side in one run.

python -m tests.benchmarks.serving [REQUESTS]
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time

from xenmapcache import MapCache, MockDomain, MockHypervisor, open_backend
from xenmapcache.devicemodel import IoreqServer

PORT = 0x100
ROUNDS = 5
WANTED = 0.6
"""Of a thread's rate, what an event loop has to reach."""


def rate(requests: int, *, in_a_loop: bool) -> float:
    """Return the requests a second of one vCPU that reads a port without pause."""
    guest = MockHypervisor().create_domain(memory="1M")
    seconds: list[float] = []

    def ask(guest: MockDomain, server: IoreqServer) -> None:
        start = time.perf_counter()
        for _ in range(requests):
            guest.port_in(PORT)
        seconds.append(time.perf_counter() - start)
        server.stop()

    with open_backend("mock", domain=guest) as backend, MapCache(backend) as cache:
        server = IoreqServer(guest, cache)
        server.claim_ports(PORT, 4).read(lambda offset, size: 7)
        with server:
            vcpu = threading.Thread(target=ask, args=(guest, server))
            vcpu.start()
            if in_a_loop:
                asyncio.run(server.serve_async())
            else:
                server.serve_forever()
            vcpu.join()
    return requests / seconds[0]


def main(requests: int = 5000) -> float:
    """Print the best of a few rounds; return the event loop's share of the thread's rate."""
    thread = max(rate(requests, in_a_loop=False) for _ in range(ROUNDS))
    loop = max(rate(requests, in_a_loop=True) for _ in range(ROUNDS))
    sys.stdout.write(
        f"thread {thread:,.0f} requests/s, event loop {loop:,.0f}: {loop / thread:.2f} "
        f"(wanted: {WANTED})\n"
    )
    return loop / thread


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
