"""DeviceRecord: what a device's next process needs, in a small file that outlives a kill."""

# Theory of operation
#
# The file is mapped, so each store is in it at once; a killed process loses none. It is of no use
# after the machine's next start, so it belongs to a file system that is empty then, such as /run.
#
#   header     magic, version, domid, device id, number of queues; which slot counts
#   2 slots    the transport's registers, as the transport has packed them
#   queues     each: in use, size, addresses, idx of the device area, the last head, and
#              one byte for each head: whether it is in flight
#
# Each store may be the last one. So the order of stores is the rule:
#
#   registers  into the slot that does not count, then that slot counts
#   start      all heads free, idx, addresses, then "in use"
#   pop        "in flight"; the driver's ring needs no store
#   push       last head; the driver's ring: entry, idx; "not in flight"; idx
#
# What the next process finds of a push (`QueueRecord.settle`):
#
#   idx in the ring == idx here        the last head was not given back, if it is in flight
#   idx in the ring == idx here + 1    it was: the rest of its push is done now
#
# Requests in flight are the entries of the ring right before the next one. So what was popped is
# idx plus their number, and is not stored.

from __future__ import annotations

import fcntl
import mmap
import os
import struct

from ...errors import CorruptImageError

_MAGIC = b"xmcvirtq"
_HEADER = struct.Struct("<8sIIII")
_SLOT_FLAG = _HEADER.size
_SLOTS = 64
_SLOT_BYTES = 4096
_LENGTH = struct.Struct("<H")
_QUEUES = _SLOTS + 2 * _SLOT_BYTES
_QUEUE = struct.Struct("<QQQI")
_ADDRESSES, _IN_USE, _LAST, _IDX, _HEADS = 0, 28, 30, 32, 40
_VERSION = 1
_U16 = struct.Struct("<H")


class QueueRecord:
    """A queue's part of the file.

    Args:
        memory: of the file.
        start: where its part begins.
        size: most entries of the queue.

    Synchronization: one thread at a time.
    """

    __slots__ = ("_memory", "_size", "_start")

    def __init__(self, memory: mmap.mmap, start: int, size: int) -> None:
        self._memory = memory
        self._start = start
        self._size = size

    @property
    def addresses(self) -> dict[str, int] | None:
        """What :meth:`VirtioDevice.start_queue` was called with; None if it is not in use."""
        if not self._memory[self._start + _IN_USE]:
            return None
        found = _QUEUE.unpack_from(self._memory, self._start + _ADDRESSES)
        return dict(zip(("descriptors", "driver", "device", "size"), found, strict=True))

    def start(self, *, size: int, descriptors: int, driver: int, device: int) -> None:
        """Note that the driver has set the queue up, and that nothing is in flight."""
        self.stop()
        heads = self._start + _HEADS
        self._memory[heads : heads + self._size] = bytes(self._size)
        self._put(_IDX, 0)
        _QUEUE.pack_into(self._memory, self._start + _ADDRESSES, descriptors, driver, device, size)
        self._memory[self._start + _IN_USE] = 1

    def stop(self) -> None:
        """Note that it is not in use."""
        self._memory[self._start + _IN_USE] = 0

    def begin(self, head: int) -> None:
        """Note that a request is in flight."""
        self._mark(head, 1)

    def publish(self, head: int) -> None:
        """Note which request is about to be given back."""
        self._put(_LAST, head)

    def end(self, head: int, idx: int) -> None:
        """Note that it was given back, and the device area's idx from then on."""
        self._mark(head, 0)
        self._put(_IDX, idx)

    def settle(self, idx: int) -> list[int] | None:
        """Complete what the last process was doing.

        Args:
            idx: in the device area, as it is now.

        Returns:
            The heads in flight; None if nobody but the driver can have written that idx.
        """
        known = self._get(_IDX)
        last = self._get(_LAST)
        if idx == known + 1 & 0xFFFF and last < self._size:
            self.end(last, idx)
        elif idx != known:
            return None
        flags = self._memory[self._start + _HEADS : self._start + _HEADS + self._size]
        return [head for head, flag in enumerate(flags) if flag]

    def _mark(self, head: int, flag: int) -> None:
        self._memory[self._start + _HEADS + head] = flag

    def _get(self, place: int) -> int:
        (value,) = _U16.unpack_from(self._memory, self._start + place)
        return int(value)

    def _put(self, place: int, value: int) -> None:
        _U16.pack_into(self._memory, self._start + place, value)


def _take(fd: int, path: str | os.PathLike[str], length: int) -> None:
    """Lock a file that is empty or a record: nobody else's content may be overwritten."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        text = "another process serves the device with this record; stop it, or name another file"
        raise BlockingIOError(error.errno, text, os.fspath(path)) from None
    # A process that was killed while it made the file has left nothing, or zeros.
    unfinished = {0: b"", length: bytes(len(_MAGIC))}.get(os.fstat(fd).st_size)
    if os.pread(fd, len(_MAGIC), 0) not in (_MAGIC, unfinished):
        raise CorruptImageError(
            f"{os.fspath(path)} is not the record of a virtio device, and would be overwritten; "
            "name another file, or remove it"
        )


class DeviceRecord:
    """A file with the state of a virtio device.

    If it is of the same domain and kind of device, its content stays; otherwise it begins empty.

    Args:
        path: of the file. It is made if it does not exist. Nobody else may write it.
        domid: of the guest.
        device_id: virtio's number of the kind of device.
        queue_sizes: most entries of each queue.

    Attributes:
        queues: the record of each queue.

    Raises:
        OSError: the file cannot be made, or another process uses it (BlockingIOError).
        CorruptImageError: the file has other content, which stays.

    Synchronization: one thread at a time.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        domid: int,
        device_id: int,
        queue_sizes: tuple[int, ...],
    ) -> None:
        starts, end = [], _QUEUES
        for size in queue_sizes:
            starts.append(end)
            end += _HEADS + -(-size // 8) * 8
        header = _HEADER.pack(_MAGIC, _VERSION, domid, device_id, len(queue_sizes))
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fd = os.open(path, flags, 0o600)
        try:
            _take(self._fd, path, end)
            kept = os.fstat(self._fd).st_size == end
            kept = kept and os.pread(self._fd, len(header), 0) == header
            if not kept:
                os.ftruncate(self._fd, 0)
                # Otherwise a store into a full file system would end this process.
                os.posix_fallocate(self._fd, 0, end)
            self._memory = mmap.mmap(self._fd, end)
        except BaseException:
            os.close(self._fd)
            raise
        self._memory[: len(header)] = header
        self.queues = tuple(
            QueueRecord(self._memory, start, size)
            for start, size in zip(starts, queue_sizes, strict=True)
        )

    def load(self) -> bytes:
        """Return what the transport has saved last; nothing if it has saved nothing.

        Raises:
            CorruptImageError: the file was written by others.
        """
        place = self._slot(self._memory[_SLOT_FLAG])
        (length,) = _LENGTH.unpack_from(self._memory, place)
        if length > _SLOT_BYTES - _LENGTH.size:
            raise CorruptImageError(
                f"the record of a device has {length} bytes of registers, at most "
                f"{_SLOT_BYTES - _LENGTH.size} fit; remove the file, and restart the guest"
            )
        return self._memory[place + _LENGTH.size : place + _LENGTH.size + length]

    def save(self, registers: bytes) -> None:
        """Keep the transport's registers; after a kill they are all new, or all as before.

        Raises:
            ValueError: they are more than 4094 bytes.
        """
        if len(registers) > _SLOT_BYTES - _LENGTH.size:
            raise ValueError(
                f"registers of {len(registers)} bytes must be at most {_SLOT_BYTES - _LENGTH.size}"
            )
        other = 1 - (self._memory[_SLOT_FLAG] & 1)
        data = _LENGTH.pack(len(registers)) + registers
        place = self._slot(other)
        self._memory[place : place + len(data)] = data
        self._memory[_SLOT_FLAG] = other

    def _slot(self, number: int) -> int:
        return _SLOTS + (number & 1) * _SLOT_BYTES

    def clear(self) -> None:
        """Note that no queue is in use."""
        for queue in self.queues:
            queue.stop()

    def close(self) -> None:
        """Let another process use the file. Its content stays. Can be repeated."""
        self._memory.close()
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
