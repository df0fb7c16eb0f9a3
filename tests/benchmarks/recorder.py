"""What a recorder costs: ``python -m tests.benchmarks.recorder``, pinned to one processor.

``map_dma`` and ``release``, with their events recorded, are compared with the same without events,
in turn and in one run. The times of a single event are those of the recorder alone.

Exit status: 1 if the ratio is above the limit.
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path

from tests.benchmarks.timing import pin, ratio, seconds
from tests.observe.recordings import START, released, taken
from xenmapcache import MapCache, open_backend, record
from xenmapcache.events import BucketMapped, Event, PagesDirtied, RequestHandled
from xenmapcache.observe.recorder import Recorder
from xenmapcache.stream import EventStream

LIMIT = 2.0
TIMES = 5000
ROUNDS = 15
DMA_TIMES = 300
DMA_ROUNDS = 300
EVENTS: dict[str, Event] = {
    "lease taken": taken(),
    "lease released": released(),
    "pages dirtied": PagesDirtied(START, 0x5000, 0x1000),
    "request handled": RequestHandled(START, 0, 0, True, 0x3F8, 1, 900),
    "bucket mapped": BucketMapped(START, 0, 1 << 20, 30_000, 0x7F0000000000, 0),
}


def main() -> int:
    pin()
    with tempfile.TemporaryDirectory() as folder:
        for name, event in EVENTS.items():
            print(f"{name:16} {event_ns(Path(folder) / name, event):6.0f} ns")
        figure = dma_ratio(Path(folder) / "dma")
    print(f"map_dma + release with a recorder / without: {figure:.2f}, at most {LIMIT}")
    return figure > LIMIT


def event_ns(path: Path, event: Event) -> float:
    """Return the time of storing one event, in ns."""
    stream = EventStream()
    with Recorder(path) as recorder:
        recorder.add(stream.attach)
        observation = next(iter(stream.observations))
        queue, drain = observation.queue, observation.drain
        assert drain is not None

        def work() -> None:
            for _ in range(TIMES):
                queue.append(event)
                drain(queue)

        return min(seconds(work) for _ in range(ROUNDS)) / TIMES * 1e9


def dma_ratio(path: Path) -> float:
    """Return the time of DMA with a recorder over that without one: three events each time."""
    with (
        MapCache(open_backend("mock", memory="4M")) as recorded,
        MapCache(open_backend("mock", memory="4M")) as bare,
        record(recorded, path),
    ):
        return ratio(partial(transfer, recorded), partial(transfer, bare), DMA_ROUNDS)


def transfer(cache: MapCache) -> None:
    """Take leases and release them."""
    map_dma = cache.map_dma
    for _ in range(DMA_TIMES):
        map_dma(0x5000, 0x1000, owner="bench").release()


if __name__ == "__main__":
    sys.exit(main())
