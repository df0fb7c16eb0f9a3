"""The rows of the matrix: how guest memory is kept, or in use by a call that has not ended."""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from xenmapcache import DmaDirection, GuestMemory, Lease, XenMapCacheError

from .table import VIEWS
from .world import BUCKET, MOVED, NEEDLE, NEEDLES, PLACE, UNDER_WAY, World, content

SIZE = 0x40
LONG = 4 * BUCKET
FROM_DEVICE = DmaDirection.FROM_DEVICE
_READ = {"x86_64": "0", "aarch64": "63"}
"""The number of the system call."""


def named(data: bytes, address: int, moved: int | None = None) -> str:
    """Return in the table's words what a holder sees."""
    if data == content(address, len(data)):
        return "bytes"
    if moved is not None and data == content(moved, len(data)):
        return "new bytes"
    return "zeros" if data == bytes(len(data)) else f"unexpected {data[:16]!r}..."


class Hold:
    """Something that is kept. ``moves``: by replace()."""

    moves = False

    def __init__(self, world: World) -> None:
        self.world = world

    def use(self) -> str:
        """Look at it, and at what it shows."""
        raise NotImplementedError

    def in_child(self) -> str:
        """The same, in a forked child."""
        return self.use()

    def drop(self) -> None:
        """Give back what has to be given back."""


class HeldView(Hold):
    """A view, or what was made of it; the lease has ended, unless it is a device's."""

    def __init__(self, world: World, kind: str, *, moves: bool) -> None:
        super().__init__(world)
        self.moves = moves
        if moves:
            lease = world.cache.map_device(PLACE, SIZE, owner="kept")
        else:
            lease = world.cache.map_dma(PLACE, SIZE, owner="kept", direction=FROM_DEVICE)
        self.lease: Lease | None = lease if moves else None
        self.kept: Any = self._of(lease.view, kind)
        if not moves:
            lease.release()

    @staticmethod
    def _of(view: memoryview, kind: str) -> memoryview | ctypes.Structure:
        if kind == "slice":
            return view[8:56][8:32]
        if kind == "ctypes structure":

            class Layout(ctypes.LittleEndianStructure):
                _fields_ = (("first", ctypes.c_uint64), ("rest", ctypes.c_uint8 * (SIZE - 8)))

            return Layout.from_buffer(view)
        return view.cast("Q", (4, SIZE // 32)) if kind == "cast array" else view

    def use(self) -> str:
        with memoryview(self.kept) as view, view.cast("B") as kept:
            seen = named(bytes(kept), PLACE, MOVED)
            kept[:] = b"w" * len(kept)
            assert bytes(kept) == b"w" * len(kept)
        return seen

    def drop(self) -> None:
        if self.lease is not None and not self.lease.released:
            self.lease.release()


class HeldLease(Hold):
    """A lease; its view is taken when it is used."""

    def __init__(self, world: World, kind: str) -> None:
        super().__init__(world)
        self.moves = kind == "device lease"
        if self.moves:
            self.lease = world.cache.map_device(PLACE, SIZE, owner="kept")
        else:
            self.lease = world.cache.map_dma(PLACE, SIZE, owner="kept")

    def use(self) -> str:
        return named(bytes(self.lease.view), PLACE, MOVED)

    def drop(self) -> None:
        if not self.lease.released:
            self.lease.release()


class HeldIterator(Hold):
    """An iterator that has given its first piece or match."""

    def __init__(self, world: World, kind: str) -> None:
        super().__init__(world)
        self.is_find = kind.startswith("find")
        self.items: Iterator[Any]
        if self.is_find:
            first, last = NEEDLES
            memory = GuestMemory(world.cache)
            self.items = memory.find(NEEDLE, first, last - first + 0x1000)
            assert next(self.items) == (NEEDLES[0], NEEDLE)
        else:
            self.items = world.cache.views(UNDER_WAY, 2 * BUCKET)
            assert bytes(next(self.items)) == content(UNDER_WAY, BUCKET)

    def use(self) -> str:
        if self.is_find:
            found = list(self.items)
            return {(): "no match", ((NEEDLES[1], NEEDLE),): "bytes"}[tuple(found)]
        return named(b"".join(bytes(view) for view in self.items), UNDER_WAY + BUCKET)


class UnderWay(Hold):
    """Something that another thread does, and that has begun. It is ended by using it."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.outcome = "nothing"
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.start()

    def start(self) -> None:
        """Start the thread and wait until it cannot go on."""
        raise NotImplementedError

    def work(self) -> str:
        """What the thread does."""
        raise NotImplementedError

    def finish(self) -> None:
        """Let it come to its end."""
        raise NotImplementedError

    def nudge(self) -> None:
        """Let it continue, and do not wait for it."""
        self.finish()

    def _run(self) -> None:
        try:
            self.outcome = self.work()
        except XenMapCacheError as error:
            self.outcome = type(error).__name__

    def use(self) -> str:
        self.finish()
        self.thread.join()
        return self.outcome


class CallUnderWay(UnderWay):
    """A call of the cache, whose thread is in the library."""

    def __init__(self, world: World, kind: str) -> None:
        self.kind = kind.split()[0]
        super().__init__(world)

    def start(self) -> None:
        self.world.block()
        self.thread.start()
        self.world.wait_until_blocked()

    def finish(self) -> None:
        self.world.unblock()

    def work(self) -> str:
        cache = self.world.cache
        if self.kind == "read":
            return named(cache.read(UNDER_WAY, SIZE), UNDER_WAY)
        if self.kind == "write":
            cache.write(UNDER_WAY, b"written")
            return {b"written": "bytes"}.get(cache.read(UNDER_WAY, 7), "not written")
        with cache.map_dma(UNDER_WAY, SIZE, owner="under way") as lease:
            return named(bytes(lease.view), UNDER_WAY)

    def in_child(self) -> str:
        return named(self.world.cache.read(UNDER_WAY, SIZE), UNDER_WAY)


class KernelUnderWay(UnderWay):
    """A system call that reads or fills a view, and that the kernel has not ended."""

    def __init__(self, world: World, kind: str) -> None:
        self.kind = kind.partition("(")[0]
        with world.cache.map_dma(UNDER_WAY, LONG, owner="io", direction=FROM_DEVICE) as lease:
            self.view = lease.view
        self.ends: list[Any] = []
        super().__init__(world)

    def start(self) -> None:
        if self.kind == "sendmsg":
            ours, theirs = socket.socketpair()
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            self.call: Callable[[], int] = lambda: ours.sendmsg([self.view])
            self.ends = [theirs, ours]
        else:
            source, target = os.pipe()
            fcntl.fcntl(target, fcntl.F_SETPIPE_SZ, 4096)
            reading = os.fdopen(source, "rb")
            writing = os.fdopen(target, "wb", buffering=0)
            self.ends = [reading, writing]
            if self.kind == "writev":
                self.call = lambda: os.writev(writing.fileno(), [self.view])
            else:
                self.call = lambda: reading.readinto(self.view)
        self.thread.start()
        if self.kind == "readinto":
            self._wait_for_read()
        else:
            select.select([self.ends[0]], [], [])

    def _wait_for_read(self) -> None:
        """Wait until the thread is in read(2)."""
        while not (task := self.thread.native_id):
            time.sleep(0.001)
        file = Path(f"/proc/self/task/{task}/syscall")
        number = _READ[platform.machine()]
        while file.read_text().split()[0] != number:
            time.sleep(0.001)

    def work(self) -> str:
        return {LONG: "bytes"}.get(self.call(), "less than all")

    def finish(self) -> None:
        other = self.ends[0]
        if self.kind == "readinto":
            data = bytes(LONG)[:-1] + b"!"
            while data:  # in pieces, as the pipe is small
                data = data[os.write(self.ends[1].fileno(), data) :]
            self.thread.join()
            assert bytes(self.view[-2:]) == b"\0!"
            return
        got = b""
        while len(got) < LONG:
            got += os.read(other.fileno(), LONG)
        assert got == content(UNDER_WAY, LONG)

    def nudge(self) -> None:
        if self.kind == "readinto":
            os.write(self.ends[1].fileno(), b"some")
        else:
            os.read(self.ends[0].fileno(), 4096)

    def in_child(self) -> str:
        return named(bytes(self.view), UNDER_WAY)

    def drop(self) -> None:
        for end in self.ends:
            end.close()


def take(world: World, row: str, *, moves: bool) -> Hold:
    """Return what a row keeps. ``moves``: replace() is about to move it, where it can."""
    if row in VIEWS:
        return HeldView(world, row, moves=moves)
    if row.endswith(" lease"):
        return HeldLease(world, row)
    if row.endswith(" half-way"):
        return HeldIterator(world, row)
    return (KernelUnderWay if "(" in row else CallUnderWay)(world, row)
