"""The story that ``xenmapcache demo`` tells: a guest balloons while DMA is under way."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator, Iterator
from typing import NamedTuple, Self

from ..address import KiB, MiB
from ..backend import open_backend
from ..cache import DmaDirection, Invalidation, LeaseInfo, MapCache, OnStale
from ..mock import PAGES_PER_INVALIDATE, MockHypervisor
from ..observe.recording import Entry

_MEMORY = 32 * MiB
_BALLOON = 4 * MiB, 4 * MiB
_VIDEO, _SECTOR, _QUEUE, _PACKET, _PLAIN = 0x1800000, 0x500E00, 0x2FF800, 0x600000, 0x700000
_OLD_PACKET, _NEW_PACKET = b"old packet", b"new packet"


class Outcome(NamedTuple):
    """One transfer after the guest has ballooned: what one side sent and the other received."""

    owner: str
    direction: str
    sent: str
    received: str
    outcome: str


class Step(NamedTuple):
    """One step of the story: for scripts (key, facts) and for people (the others)."""

    key: str
    facts: object
    title: str
    text: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    verdict: str = ""


class _Recorder(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())

    def count(self, text: str) -> int:
        return sum(text in message for message in self.messages)


@contextlib.contextmanager
def recorded() -> Iterator[_Recorder]:
    """Keep the library's warnings for the story, and off stderr."""
    logger, recorder = logging.getLogger("xenmapcache"), _Recorder()
    previous = logger.level, logger.propagate, logger.disabled
    logger.level, logger.propagate, logger.disabled = logging.WARNING, False, False
    logger.addHandler(recorder)
    try:
        yield recorder
    finally:
        logger.removeHandler(recorder)
        logger.level, logger.propagate, logger.disabled = previous


class _Machine:
    """A guest, its device model's cache, and the devices' leases."""

    def __init__(self, on_stale: OnStale, events: list[Entry]) -> None:
        self.guest = MockHypervisor().create_domain(memory=_MEMORY)
        self.backend = open_backend("mock", domain=self.guest)
        self.cache = cache = MapCache(self.backend, on_stale=on_stale)
        stream = events[-1].stream + 1 if events else 0
        cache.observe(lambda event: events.append(Entry(stream, event)))
        self.invalidations: list[Invalidation] = []
        self.guest.on_invalidate(lambda: self.invalidations.append(cache.invalidate()))
        self.guest.write(_PACKET, _OLD_PACKET)
        self.guest.write(_PLAIN, b"before")
        cache.read(_PLAIN, 6)  # resident from here on, so a stale read would be seen later
        dma, direction = cache.map_dma, DmaDirection
        self.video = cache.map_device(_VIDEO, 8 * MiB, owner="vga")
        self.sector = dma(_SECTOR, 512, owner="ide0", direction=direction.FROM_DEVICE)
        self.queue = dma(_QUEUE, 4 * KiB, owner="ahci0", direction=direction.BIDIRECTIONAL)
        self.packet = dma(_PACKET, 1514, owner="e1000", direction=direction.TO_DEVICE)

    def finish(self) -> list[Outcome]:
        """Let guest and devices continue after the balloon, and end the transfers."""
        guest = self.guest
        guest.write(_PACKET, _NEW_PACKET)
        guest.write(_PLAIN, b"after")
        written = []
        for lease, data in (
            (self.video, b"pixels"),
            (self.sector, b"disk sector"),
            (self.queue, b"completion"),
        ):
            lease.view[: len(data)] = data
            written.append((lease, data))
        sent = bytes(self.packet.view[: len(_NEW_PACKET)])
        for lease in (self.sector, self.queue, self.packet):
            lease.release()
        to_device, to_guest = "guest -> device", "device -> guest"
        outcomes = [
            _outcome(lease.owner, to_guest, data, guest.read(lease.address, len(data)))
            for lease, data in written
        ]
        outcomes.append(_outcome("e1000", to_device, _NEW_PACKET, sent))
        plain = self.cache.read(_PLAIN, 5)
        return [*outcomes, _outcome("(plain read)", to_device, b"after", plain)]

    def close(self) -> None:
        self.video.release()
        self.cache.close()
        self.backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cache.close(force=True)  # nobody reads the story to its end
        self.backend.close()


def _outcome(owner: str, direction: str, sent: bytes, received: bytes) -> Outcome:
    verdict = "arrived" if sent == received else "LOST" if not any(received) else "OLD DATA"
    text = received.decode() if any(received) else "zeros"
    return Outcome(owner, direction, sent.decode(), text, verdict)


def _lease_facts(info: LeaseInfo) -> dict[str, object]:
    facts = info._asdict() | {
        "kind": info.kind.value,
        "direction": info.direction and info.direction.value,
    }
    del facts["id"], facts["origin"]
    return facts


def _lease_row(info: LeaseInfo) -> tuple[str, ...]:
    direction = info.direction.value if info.direction else "-"
    return info.kind.name, info.owner, f"{info.address:#x}", f"{info.length:#x}", direction


_LEASE_HEADER = ("kind", "owner", "address", "length", "direction")
_OUTCOME_HEADER = ("owner", "transfer", "sent", "received", "outcome")


def story(log: _Recorder, events: list[Entry] | None = None) -> Generator[Step, None, None]:
    """Yield the steps, as they happen.

    Args:
        log: of the library's warnings.
        events: takes what happens in the caches; the second cache's stream is number 1.
    """
    events = [] if events is None else events
    with _Machine("warn", events) as machine:
        leases = machine.cache.leases()
        stats = machine.cache.stats()
        yield Step(
            "leases",
            [_lease_facts(info) for info in leases],
            "1. A guest, and the device model that maps its memory",
            f"{_MEMORY // MiB} MiB of guest memory, {stats.resident_buckets} buckets of 1 MiB "
            "mapped. These leases are held:",
            _LEASE_HEADER,
            [_lease_row(info) for info in leases],
        )

        machine.guest.balloon_out(*_BALLOON)
        burst, last = machine.invalidations, machine.invalidations[-1]
        warned = log.count("still held")
        yield Step(
            "balloon",
            {
                "address": _BALLOON[0],
                "length": _BALLOON[1],
                "invalidate_requests": len(burst),
                "dropped_buckets": sum(each.dropped_buckets for each in burst),
                "warnings_logged": warned,
                "log": list(log.messages),
                "device": [_lease_facts(info) for info in last.device],
                "dma": [_lease_facts(info) for info in last.dma],
            },
            f"2. The guest balloons {_BALLOON[1] // MiB} MiB out",
            f"Xen asks {len(burst)} times for all mappings to go, once per {PAGES_PER_INVALIDATE} "
            f"pages. {burst[0].dropped_buckets} buckets are dropped. Device memory stays, which is "
            "harmless. DMA that is still held is a problem:",
            ("WARNING", *_LEASE_HEADER[1:], "age"),
            [("may be lost", *_lease_row(info)[1:], f"{info.age:.3f} s") for info in last.dma],
            f"{warned} warnings logged for {len(burst)} requests: one per DMA lease. "
            f"None for {last.device[0].owner}.",
        )

        machine.guest.balloon_in(*_BALLOON)
        outcomes = {"warn": machine.finish()}
        stale = log.count("released stale")
        yield Step(
            "finish",
            {"video_stale": machine.video.stale, "stale_releases_logged": stale},
            "3. It balloons in again, and the transfers end",
            "The guest has new, empty frames; leases in that range still show the old ones. ahci0 "
            "was lucky: its pages had stayed, but INVALIDATE does not say which pages go.",
            _OUTCOME_HEADER,
            list(outcomes["warn"]),
            f"{stale} warnings logged as the stale leases are released.",
        )
        yield from _copy_and_counters(machine, outcomes, events)


def _copy_and_counters(
    machine: _Machine, outcomes: dict[str, list[Outcome]], events: list[Entry]
) -> Iterator[Step]:
    with _Machine("copy", events) as other:
        other.guest.balloon_out(*_BALLOON)
        other.guest.balloon_in(*_BALLOON)
        outcomes["copy"] = other.finish()
        yield Step(
            "outcomes",
            {name: [each._asdict() for each in rows] for name, rows in outcomes.items()},
            '4. The same again, with MapCache(..., on_stale="copy")',
            "On release, what the device wrote is copied to the pages that the guest has now.",
            _OUTCOME_HEADER,
            list(outcomes["copy"]),
            "What a device has already read cannot be repaired: end such transfers before "
            "ballooning.",
        )
        counters = {"warn": machine.cache.stats(), "copy": other.cache.stats()}
        machine.close()
        other.close()
        yield Step(
            "stats",
            {name: stats._asdict() for name, stats in counters.items()},
            "5. What the caches counted",
            "The device lease is still held.",
            ("counter", *counters),
            [
                (name.replace("_", " "), *(f"{stats[position]:,}" for stats in counters.values()))
                for position, name in enumerate(counters["warn"]._fields)
            ],
        )
