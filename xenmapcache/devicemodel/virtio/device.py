"""VirtioDevice: what all virtio devices share, between a transport and the queues."""

# Theory of operation
#
# The transport (virtio-pci, virtio-mmio) has the registers and calls the device:
#
#   negotiate --> start_queue, each --> notify_queue, often --> reset
#
# The way of a request:
#
#   notify_queue             the thread that serves the guest
#     pop, prepare           under the lock; what may be leased is known now
#     DmaEngine.submit       returns at once
#   job.work                 a worker, with the memory leased
#   job.end, push            the worker, under the lock; the leases are released
#   interrupt_queue          the worker, without the lock
#   pop ...                  the worker looks for further requests, if some may be left in the ring
#
# If `prepare` returns None, the request waits in `queue.kept`, in flight and without a lease.
# `retry` calls `prepare` again, in any thread. What `prepare` looks at may change without a lock,
# because `retry` is called after the change: it waits for a `prepare` that still saw the old state,
# and then finds the request that was kept.
#
# A request with `job.quick` is tried in the thread that serves first, which saves the hand-over. No
# INVALIDATE comes in between, because the same thread would handle it. Several requests are popped
# under one lock, and answered together under another one, because locks and memory fences cost as
# much as the rest of such a request.
#
# Rules
#   1. At most `limit` requests of a queue are under way. If there are more, they stay in the
#      guest's ring, and nobody is notified of new ones; the end of a request pops the next one.
#   2. One round pops at most as many requests as the queue has entries. So no round lasts for
#      ever, whatever the guest adds. The end of the last request begins the next round; so that
#      one is always a worker's. Kept requests do not count: they stay in flight, so a queue
#      has at most as many of them as entries.
#   3. The lock is held while the ring is changed. Transports and log handlers are called
#      without it.
#   4. A queue that a reset has stopped is not changed any longer: its requests end without a push.
#      Stopping it, and giving a request to the engine, are done under the lock. So a reset cancels
#      a request, or the request is not begun.
#   5. What the driver does wrong sets NEEDS_RESET, and nothing else. The device touches no ring
#      from then on, until it is reset. So does a subclass that raises in `prepare` or `end`,
#      because the request would have no answer.
#
# INVALIDATE and the end: the engine waits until accepted requests have ended, `push` included.
# So at that moment no lease is held, and nothing is written to memory of the guest's past.

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from functools import partial
from typing import Self

from ...address import as_int
from ...cache.locked import locked
from ...errors import ClosedError, XenMapCacheError
from ..dma import DmaEngine
from ..dma_transfer import DmaStatus, DmaTransfer
from ..server import IoreqServer
from .buffer import BrokenDriverError
from .guarded import Guarded
from .job import Done, Job, Taken
from .queue import ACCESS_PLATFORM, EVENT_IDX, INDIRECT_DESC, VERSION_1, Request, Virtqueue
from .record import DeviceRecord, QueueRecord

_BATCH = 16
"""Most requests that are popped under one lock. Their answers wait for the last of them."""


class VirtioDevice(Guarded):
    """The base of virtio devices. Also a context manager, which closes it.

    A subclass sets the class attributes, and overrides :meth:`prepare`. Pass the device to a
    transport, and enter the device before the server:

        with VirtioRng(server) as device:
            VirtioMmio(server, 0xFE000000, device, interrupt=partial(server.set_isa_irq, 7))
            with server:
                server.serve_forever()

    Args:
        server: whose guest has the driver.
        name: for reports: the owner of the leases.
        workers: how many requests are carried out at the same time.
        limit: how many requests of a queue may be under way.
        record: path of a file with the state that the next process needs if this one is killed, or
            None. Its file system must be empty after the machine's start, as ``/run`` is.

    Attributes:
        device_id: virtio's number of the kind of device.
        queue_sizes: most entries of each queue.
        features: the features that the driver is offered, 64 bits.
        negotiated: the features that the driver has accepted; 0 before that.
        config: the bytes of the configuration space.
        transport: of the device; the transport sets it.
        record: the open file, or None. The transport keeps its registers there. None once the
            device is closed, because the file may be another process's then.

    Raises:
        OSError: the record cannot be opened, or another process uses it.
        CorruptImageError: the record's file has other content.
        ValueError: ``limit`` or ``workers`` is less than 1.

    Synchronization: a transport calls the device in the thread that serves. Workers call the
    functions of a :class:`Job`: ``end`` one at a time, ``work`` several at a time.
    """

    device_id: int = 0
    queue_sizes: tuple[int, ...] = ()
    config: bytes = b""

    def __init__(
        self,
        server: IoreqServer,
        *,
        name: str,
        features: int = 0,
        workers: int = 1,
        limit: int = 64,
        record: str | os.PathLike[str] | None = None,
    ) -> None:
        if as_int("limit", limit) < 1:
            raise ValueError(f"limit must be at least 1 request, not {limit}")
        super().__init__(name, server.domid)
        # A transfer is in the engine's table until its `on_end` has submitted the next one. Another
        # process, with another limit, may have left one for each entry of a queue.
        most = sum(self.queue_sizes) + workers
        self._engine = DmaEngine(server, name=name, workers=workers, limit=most)
        self.features = features | INDIRECT_DESC | EVENT_IDX | VERSION_1
        if server.cache.grants is not None:
            self.features |= ACCESS_PLATFORM  # without it, Linux gives addresses of its memory
        self.negotiated = 0
        self._server = server
        self._limit = limit
        self._queues: dict[int, Virtqueue] = {}
        self.record: DeviceRecord | None = None
        if record is not None:
            self.record = DeviceRecord(record, server.domid, self.device_id, self.queue_sizes)

    def __repr__(self) -> str:
        state = "broken" if self._broken else f"{len(self._queues)} queues"
        return f"<{type(self).__name__} {self.name!r} of domain {self._server.domid}: {state}>"

    def prepare(self, request: Request) -> Job | None:
        """Return how to carry out a request: the device's own part.

        It is called under the device's lock, so it only reads a header.

        Returns:
            None if the request cannot be carried out yet, as a receive buffer when no data has
            come. The device keeps it, without a lease, until :meth:`retry`.

        Raises:
            BrokenDriverError: there is no place for an answer.
        """
        raise NotImplementedError(f"{type(self).__name__} must have prepare()")

    def retry(self, index: int) -> None:
        """Call :meth:`prepare` again for the requests of a queue that it has kept, oldest first.

        It stops at the first one that is kept again. Call it in any thread when something has come
        that requests wait for, but not in ``prepare`` or ``Job.end``, which hold the device's lock.

        Args:
            index: of the queue. One that is not in use has no requests.
        """
        while (found := self._guarded(self._prepare_kept, index)) is not None:
            self._submit(*found)

    def _prepare_kept(self, index: int) -> tuple[Virtqueue, Request, Job] | None:
        queue = self._queues.get(index)
        if self._broken or queue is None or queue.stopped or not queue.kept:
            return None
        job = self.prepare(queue.kept[0])
        return None if job is None else (queue, queue.kept.popleft(), job)

    # --- what a transport calls -----------------------------------------------------------------

    def read_config(self, offset: int, size: int) -> int:
        """Return a number in the configuration space; zeros beyond its end."""
        return int.from_bytes(self.config[offset : offset + size], "little")

    def write_config(self, offset: int, size: int, value: int) -> None:
        """Take what the driver writes to the configuration space: nothing, unless overridden."""

    def negotiate(self, features: int) -> bool:
        """Take the features that the driver wants, and return whether it can have them.

        They must have been offered, and VERSION_1 must be among them, because the legacy
        interface differs.
        """
        if features & ~self.features or not features & VERSION_1:
            return False
        self.negotiated = features
        return True

    def start_queue(
        self, index: int, *, size: int, descriptors: int, driver: int, device: int
    ) -> None:
        """Begin to use a queue that the driver has set up.

        Args:
            index: of the queue.
            size: entries, as the driver chose it.
            descriptors: guest-physical address of its descriptors.
            driver: guest-physical address of the driver area.
            device: guest-physical address of the device area.
        """
        self._guarded(self._start, index, size, descriptors, driver, device)

    def _start(self, index: int, size: int, descriptors: int, driver: int, device: int) -> None:
        if not index < len(self.queue_sizes) or index in self._queues:
            raise BrokenDriverError(f"queue {index} does not exist, or is in use")
        record = None if self.record is None else self.record.queues[index]
        addresses = {"descriptors": descriptors, "driver": driver, "device": device}
        queue = self._queue(index, size=size, **addresses, record=record)
        if record is not None:
            record.start(size=size, **addresses)
        self._queues[index] = queue

    def _queue(self, index: int, *, record: QueueRecord | None, **numbers: int) -> Virtqueue:
        if numbers["size"] > self.queue_sizes[index]:
            raise BrokenDriverError(
                f"queue {index}: its size {numbers['size']} must be at most "
                f"{self.queue_sizes[index]}"
            )
        cache, features, fence = self._server.cache, self.negotiated, self._server.fence
        return Virtqueue(cache, index, **numbers, features=features, fence=fence, record=record)

    def notify_queue(self, index: int) -> None:
        """Take the requests that the driver has made available."""
        queue = self._queues.get(index)
        if queue is None:
            return
        left, wanted = queue.size, False
        try:
            while left:
                taken = self._guarded(self._take, queue, min(left, _BATCH))
                if taken is None or not (taken.jobs or taken.kept):
                    return
                left -= len(taken.jobs)
                wanted |= self._begin(queue, taken.jobs, is_last=not left)
                if taken.error is not None:
                    self._give_up(taken.error)
                if taken.is_empty:
                    return
        finally:
            if wanted:
                self.transport.interrupt_queue(index)

    def _begin(self, queue: Virtqueue, jobs: list[tuple[Request, Job]], *, is_last: bool) -> bool:
        """Carry out what is quick, and give the rest to workers; return whether to interrupt."""
        done: list[Done] = []
        may_be_quick = not self._server.suspended
        for request, job in jobs:
            is_last_one = is_last and request is jobs[-1][0]
            if is_last_one or not may_be_quick or not self._do_quickly(request, job, done):
                self._submit(queue, request, job)
        return bool(done and self._guarded(self._complete, queue, done))

    def stop_queue(self, index: int) -> None:
        """Use a queue no longer. Its requests under way end first, without an answer.

        Raises:
            TimeoutError: as :meth:`reset`.
        """
        queue = self._queues.get(index)
        if queue is not None:
            locked(self._lock, self._stop, queue)
            if self.record is not None:
                self.record.queues[index].stop()
            self._engine.cancel(group=queue)
            del self._queues[index]

    def _stop(self, *queues: Virtqueue) -> None:
        for queue in queues:
            queue.stopped = True

    def reset(self) -> None:
        """Forget what the driver has set up. Requests under way end first, without an answer.

        Raises:
            TimeoutError: a request is still under way after the engine's time; call it again.
        """
        locked(self._lock, self._stop, *self._queues.values())
        if self.record is not None:
            self.record.clear()  # first: the driver may use the memory again after a time-out
        self._engine.cancel()
        self._queues = {}
        self.negotiated = 0
        self._broken = False

    # --- life -----------------------------------------------------------------------------------

    def resume(self) -> None:
        """Continue with the driver that another process has served, if the record has one.

        Call it when the server is open, and before it serves. What was in flight when that process
        was killed is carried out again, and each request is answered once.
        """
        if self.record is not None:
            self.transport.set_line()
        for index, record in enumerate(self.record.queues if self.record is not None else ()):
            addresses = record.addresses
            if addresses is None:
                continue
            found = self._guarded(self._resume, index, record, addresses)
            if found is None or not self.transport.is_running:
                continue
            queue, requests = found
            for request, job in requests:
                self._submit(queue, request, job)
            # The last interrupt and the last notification may be lost.
            self.transport.interrupt_queue(index)
            self._pump(queue)

    def _resume(
        self, index: int, record: QueueRecord, addresses: dict[str, int]
    ) -> tuple[Virtqueue, list[tuple[Request, Job]]]:
        queue = self._queue(index, **addresses, record=record)
        jobs: list[tuple[Request, Job]] = []
        for request in queue.resume():
            self._prepare(queue, request, jobs)
        self._queues[index] = queue
        return queue, jobs

    def close(self) -> None:
        """Wait until requests under way have ended. Can be repeated; close the server before.

        Raises:
            TimeoutError: some are still under way; the message names them. The record stays open:
                another process must not carry them out, too, before this one has ended.
        """
        try:
            self._engine.close()
            if self.record is not None:
                self.record.close()
                self.record = None
        finally:
            self._flush_log()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- requests -------------------------------------------------------------------------------

    def _pump(self, queue: Virtqueue) -> None:
        """Begin the requests that wait, as far as there is room: one round."""
        left = queue.size
        while left:
            taken = self._guarded(self._take, queue, 1)
            if taken is None or not (taken.jobs or taken.kept):
                return
            left -= len(taken.jobs)
            for request, job in taken.jobs:
                self._submit(queue, request, job)

    def _take(self, queue: Virtqueue, most: int) -> Taken:
        """Pop requests, if there are some, and room for them."""
        jobs: list[tuple[Request, Job]] = []
        kept = False
        for _ in range(most):
            if self._broken or queue.stopped or len(queue.in_flight) >= self._limit:
                break  # at the limit: `notifies` is False, because the last pop has found one
            try:
                request = queue.pop()
                if request is None:
                    return Taken(jobs, kept, is_empty=True)
                kept |= not self._prepare(queue, request, jobs)
            except Exception as error:
                if not jobs:
                    raise
                return Taken(jobs, kept, error=error)  # reported after those before it
        return Taken(jobs, kept)

    def _prepare(self, queue: Virtqueue, request: Request, jobs: list[tuple[Request, Job]]) -> bool:
        """Add a request and its job, or keep the request; return whether there is a job."""
        job = self.prepare(request)
        if job is None:
            queue.kept.append(request)
            return False
        jobs.append((request, job))
        return True

    def _do_quickly(self, request: Request, job: Job, done: list[Done]) -> bool:
        """Carry out a request in this thread; False if it has to be a worker's."""
        if job.quick is None:
            return False
        try:
            moved = job.quick(job.buffer)
        except (XenMapCacheError, OSError):
            return False  # a worker meets the same error, and reports it
        except Exception as error:
            self._give_up(error)  # a fault of the subclass, which the worker's way would hide
            return True
        if moved is None:
            return False
        done.append(Done(request, job.end, moved))
        return True

    def _submit(self, queue: Virtqueue, request: Request, job: Job) -> None:
        # On an error the request is lost: a reset timed out and left transfers, there are no
        # threads, or the job is wrong.
        self._guarded(self._give_to_engine, queue, request, job)

    def _give_to_engine(self, queue: Virtqueue, request: Request, job: Job) -> None:
        if queue.stopped:
            return
        buffer, work, end, _ = job
        on_end = partial(self._finish, queue, request, end)
        with contextlib.suppress(ClosedError):  # of the server: nobody waits for an answer
            self._engine.submit(buffer.ranges, buffer.direction, work, on_end=on_end, group=queue)

    def _finish(
        self,
        queue: Virtqueue,
        request: Request,
        end: Callable[[int | None], int],
        transfer: DmaTransfer,
    ) -> None:
        moved = transfer.result if transfer.status is DmaStatus.DONE else None
        try:
            if self._guarded(self._complete, queue, [Done(request, end, moved)]):
                self.transport.interrupt_queue(queue.index)
        finally:
            if not queue.notifies:
                self._pump(queue)

    def _complete(self, queue: Virtqueue, done: list[Done]) -> bool:
        """Answer requests, and return whether to interrupt."""
        if self._broken or queue.stopped:
            return False
        return queue.push(*[(request, end(moved)) for request, end, moved in done])
