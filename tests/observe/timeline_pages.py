"""Recordings and pages for the tests of the timeline."""

from __future__ import annotations

import base64
import gzip
import json
import random
import re
from pathlib import Path
from typing import Any, Final

from tests.observe.recordings import START
from xenmapcache.events import (
    BucketDropped,
    BucketMapped,
    CacheOpened,
    Event,
    Invalidated,
    LeaseReleased,
    LeaseTaken,
    Quiesced,
    RequestHandled,
)
from xenmapcache.observe.recording import write_recording

HOSTILE: Final = "</script><img src=x onerror=alert(1)>&amp;\x00\x1b[31m%{x}$\\frac"
"""An owner who would like to run a script in the page, and to move the terminal's cursor."""

_MIB: Final = 1 << 20
_WAYS: Final = ("to-device", "from-device", "bidirectional")


def busy(count: int, seed: int = 3) -> list[Event]:
    """Return events of a device model whose guest balloons now and then."""
    choice = random.Random(seed)
    time = START
    events: list[Event] = [
        CacheOpened(time, 32768, "xen domain 3 (web)", _MIB),
        LeaseTaken(time, 0, "device", 0xF0000000, 8 * _MIB, "vga", None, "MainThread", False),
    ]
    owners = [f"disk{number}" for number in range(6)] + ["e1000"]
    held: dict[int, bool] = {}
    mapped: set[int] = set()
    number = 0
    while len(events) < count:
        time += choice.randrange(1_000, 200_000)
        kind = choice.random()
        address = choice.randrange(64) * _MIB
        if kind < 0.33:
            lease = len(events)
            held[lease] = False
            events.append(
                LeaseTaken(
                    time, lease, "dma", address + 0x1000 * choice.randrange(256), 0x1000,
                    choice.choice(owners), choice.choice(_WAYS), "MainThread", False,
                )
            )  # fmt: skip
        elif kind < 0.66 and held:
            lease = next(iter(held))
            stale = held.pop(lease)
            lost = int(stale and choice.random() < 0.1)
            events.append(LeaseReleased(time, lease, stale, 0, lost))
        elif kind < 0.9:
            events.append(
                RequestHandled(time, 0, 0, True, 0x3F8, 1, choice.randrange(2_000, 80_000))
            )
        elif address in mapped:
            mapped.discard(address)
            events.append(BucketDropped(time, address, _MIB, "evicted"))
        else:
            mapped.add(address)
            events.append(BucketMapped(time, address, _MIB, 30_000, None, 0))
        if choice.random() < 10 / count:
            for _ in range(choice.randrange(1, 30)):
                number += 1
                time += 20_000
                events.append(Quiesced(time - 15_000, 10_000))
                events.append(Invalidated(time, number, len(mapped), tuple(held), 5_000))
                mapped.clear()
            held = dict.fromkeys(held, True)
    return events


def write(path: Path, *events: Event, source: str = "python disk.py") -> Path:
    """Write a recording; return its path."""
    with write_recording(path, source) as recording:
        recording.write(events)
    return path


def numbers(page: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a page's script draws at first, and the details."""
    found = []
    for name in ("data", "details"):
        match = re.search(f'<script id="{name}" type="application/gzip">([A-Za-z0-9+/=]*)<', page)
        assert match
        found.append(json.loads(gzip.decompress(base64.b64decode(match[1]))))
    return found[0], found[1]
