"""Operations of scatter-gather lists and of a DMA engine: no lease is lost, and no transfer."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from xenmapcache import GuestMemory
from xenmapcache.devicemodel import DmaEngine, DmaStatus, DmaTransfer
from xenmapcache.guest import Segments

from .caches import PAGE
from .servers import ServerWorld, give_up
from .world import Operation

RANGES: Final = [(4 * PAGE, 16), (6 * PAGE - 8, 16), (8 * PAGE, 0)]
DATA: Final = bytes(range(32))


def move(memory: Segments) -> int:
    """Fill memory, as a device does."""
    memory[:] = DATA
    return len(memory)


class TransferWorld(ServerWorld):
    """A guest and its server, with a DMA engine and a scatter-gather list.

    Attributes:
        ended: the transfers whose end was told.
    """

    def __init__(self, folder: Path, ask: Callable[[Any], object] | None = None) -> None:
        super().__init__(folder, ask)
        self.engine = DmaEngine(self.server, name="disk0", drain_timeout=5.0)
        self.segments = GuestMemory(self.cache).segments(RANGES, owner="list")
        self.ended: list[DmaTransfer] = []

    def submit(self, work: Callable[[Segments], int] = move) -> DmaTransfer:
        """Submit a transfer that fills its memory."""
        return self.engine.submit(RANGES, "from-device", work, on_end=self.ended.append)

    def move_late(self, memory: Segments) -> int:
        """Fill memory when the operation waits for it, or after a moment."""
        end = time.monotonic() + 0.01
        while not self.engine._table.waits and time.monotonic() < end:
            os.sched_yield()
        return move(memory)

    def end(self) -> None:
        """Close everything; no lease is held then."""
        for _ in range(2):
            with self.noting("close() of the engine"):
                self.engine.close()
        if leases := self.cache.leases():
            self.problem(f"leases are held: {leases}")
        self.check_locks(self.engine)
        super().end()


def start(world: TransferWorld) -> None:
    """Have the server open."""
    world.start()


def submitted(world: TransferWorld) -> None:
    """Have a transfer under way."""
    world.start()
    world.result = world.submit(world.move_late)


def submit(world: TransferWorld) -> None:
    """Submit a transfer."""
    world.result = world.submit()


def submit_again(world: TransferWorld) -> None:
    """The transfer is carried out if it was accepted; another one is in any case."""
    with world.noting("a drain"):
        world.engine.drain()
    count = len(world.ended)
    if world.result is not None and not world.closed and count != 1:
        world.problem(f"the transfer was accepted, and its end was told {count} times")
    if count > 1:
        world.problem("the transfer was carried out twice")
    check_another(world)


def check_another(world: TransferWorld) -> None:
    """Find out whether the engine still works."""
    count = len(world.ended)
    if world.closed:
        return
    with world.noting("another transfer"):
        transfer = world.submit()
        world.engine.drain()
        if transfer.status is not DmaStatus.DONE or len(world.ended) != count + 1:
            world.problem(
                f"another transfer is {transfer!r}, and {len(world.ended)} ends were told"
            )
        if world.domain.read(4 * PAGE, 16) + world.domain.read(6 * PAGE - 8, 16) != DATA:
            world.problem("the data of another transfer did not reach the guest")


def drain_again(world: TransferWorld) -> None:
    """Drain again: the transfer has ended."""
    with world.noting("a second drain"):
        world.engine.drain()
    if not world.closed and [each.status for each in world.ended] != [DmaStatus.DONE]:
        world.problem(f"after a drain the transfer is {world.result!r}, ends: {world.ended}")
    check_another(world)


def cancel_again(world: TransferWorld) -> None:
    """Cancel again: nothing is under way."""
    with world.noting("a second cancel"):
        world.engine.cancel()
    if world.engine.transfers:
        world.problem(f"after a cancel there are {world.engine.transfers}")
    check_another(world)


def close_again(world: TransferWorld) -> None:
    """Close again: nothing is under way."""
    with world.noting("a second close"):
        world.engine.close()
    if world.engine.transfers:
        world.problem(f"after a close there are {world.engine.transfers}")


def process(world: TransferWorld) -> None:
    """Answer an INVALIDATE while a transfer is under way."""
    world.server.process_pending()


def process_again(world: TransferWorld) -> None:
    """Go on serving: the vCPU goes on, and so does the engine."""
    world.serve_until_answered()
    drain_again(world)


def lease_list(world: TransferWorld) -> None:
    """Lease the list, fill it, and release it."""
    with world.segments as segments:
        segments[:] = DATA


def lease_list_again(world: TransferWorld) -> None:
    """Release what is left, and do it again."""
    with world.noting("a second release"):
        world.segments.release()
    if leases := world.cache.leases():
        world.problem(f"after a release there are {leases}")
    with world.noting("a second lease of the list"):
        lease_list(world)
    if world.domain.read(4 * PAGE, 16) + world.domain.read(6 * PAGE - 8, 16) != DATA:
        world.problem("the data did not reach the guest")


HANDLERS: Final = ("interrupt", "error", "read", "write", "evict", "close", "fork")
LIST_HANDLERS: Final = ("interrupt", "error", "read", "write", "evict", "fork", "allocation")


def operation(
    name: str,
    act: Callable[[Any], object],
    prepare: Callable[[Any], object],
    again: Callable[[Any], object],
    handlers: tuple[str, ...] = HANDLERS,
    ask: Callable[[Any], object] | None = None,
) -> Operation:
    """Return a row of the table."""
    return Operation(name, lambda folder: TransferWorld(folder, ask), act, handlers, prepare, again)


OPERATIONS: Final = (
    operation("segments.lease", lease_list, start, lease_list_again, LIST_HANDLERS),
    operation("dma.submit", submit, start, submit_again),
    operation("dma.drain", lambda w: w.engine.drain(), submitted, drain_again),
    operation("dma.cancel", lambda w: w.engine.cancel(), submitted, cancel_again),
    operation("dma.close", lambda w: w.engine.close(), submitted, close_again),
    operation("dma.process-invalidate", process, submitted, process_again, HANDLERS, give_up),
)
