"""A device whose metrics Prometheus scrapes: here the program scrapes itself, and prints a part.

The guest starts transfers through a port. One of them is still under way when the guest
balloons, which is a bug of the device: its lease is then stale. The metrics say whose lease it is,
while it is held and after it.

With ``--port 9742`` it goes on to serve until Ctrl-C, so that a real Prometheus can scrape it.
"""

import argparse
import logging
import sys
import threading
import urllib.request

from prometheus_client import start_http_server

from xenmapcache import DmaDirection, Lease, MapCache, MockHypervisor, open_backend
from xenmapcache.devicemodel import IoreqServer
from xenmapcache.observe import metrics

PORT = 0x300
START, FINISH = 1, 2  # what the guest writes to the port
SHOWN = (
    "xenmapcache_invalidations_total",
    "xenmapcache_leases{",
    "xenmapcache_stale_dma_leases",
    "xenmapcache_leases_taken_total",
    "xenmapcache_stale_dma_released_total",
    "xenmapcache_pages_lost_total",
)


class Disk:
    """Transfers that the guest starts and finishes."""

    def __init__(self, cache: MapCache) -> None:
        self._cache = cache
        self._leases: list[Lease] = []

    def write(self, offset: int, size: int, value: int) -> None:
        """Start a transfer to guest memory, or finish all of them."""
        if value == START:
            way = DmaDirection.FROM_DEVICE
            self._leases.append(self._cache.map_dma(0x1000, 4096, owner="disk0", direction=way))
        while value == FINISH and self._leases:
            self._leases.pop().release()


def show(url: str, *names: str) -> None:
    """Print a part of what Prometheus gets."""
    with urllib.request.urlopen(url) as answer:  # noqa: S310 - it is our own
        for line in answer.read().decode().splitlines():
            if line.startswith(names or SHOWN) and not line.endswith(" 0.0"):
                print(line)


def main(port: int) -> None:
    """Serve a mock guest and its metrics."""
    logging.basicConfig(stream=sys.stdout, format="log: %(message)s")
    guest = MockHypervisor().create_domain(memory="16M")
    with open_backend("mock", domain=guest) as backend, MapCache(backend) as cache:
        server = IoreqServer(guest, cache)
        server.claim_ports(PORT, 1, Disk(cache))
        metrics.export(cache, server, name="web")
        http, thread = start_http_server(port, addr="127.0.0.1")
        url = f"http://127.0.0.1:{http.server_port}/metrics"
        with server, server.serving():
            print("--- a transfer and its end")
            guest.port_out(PORT, START, 1)
            guest.port_out(PORT, FINISH, 1)
            show(url)
            print("--- the guest balloons during a transfer")
            guest.port_out(PORT, START, 1)
            guest.balloon_out(0x10_0000, 0x1000)
            show(url)
            print("--- the transfer has ended")
            guest.port_out(PORT, FINISH, 1)
            show(url)
            if port:
                print(f"--- {url} until Ctrl-C")
                threading.Event().wait()
        print("--- the server has ended")
        show(url, "xenmapcache_ioreqs_total")
        http.shutdown()
        http.server_close()
        thread.join()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--port", type=int, default=0, help="serve on this port until Ctrl-C")
    main(parser.parse_args().port)
