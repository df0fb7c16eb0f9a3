"""A Linux guest whose every move a test decides: its first process is tests/xen/guest/agent.c.

That program asks the device at CONTROL what to do. The device is an `Agent`, which a test claims
the ports for, on an ioreq server that it serves in another thread: each method lets the guest do
one thing and waits until it has.
"""

from __future__ import annotations

import os
import re
import stat
import subprocess
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from enum import IntEnum, auto
from pathlib import Path
from typing import Final

from tests.xen.lab.guest_config import LAB, made_config
from tests.xen.lab.ramdisk import newc

CONTROL: Final = 0x600
PORTS: Final = 12
NAME: Final = "agent"
CPUS: Final = 2
MEMORY: Final = 128
"""MiB of RAM."""
PROGRAM: Final = Path("/payload/agent")
# Debian's privcmd lets an ordinary guest make no hypercall unless it is told to.
INIT: Final = b"""#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mkdir /sys
/bin/busybox mount -t sysfs sys /sys
for module in /modules/*; do /bin/busybox insmod "$module" unrestricted=1; done
exec /bin/agent
"""
PATIENCE: Final = 90.0
BOOT: Final = 240.0
"""Seconds, on a machine that has other work: what takes longer has stopped."""


class Operation(IntEnum):
    """As in agent.c."""

    PING = auto()
    CPU = auto()
    FRAMES = auto()
    PEEK = auto()
    POKE = auto()
    FILL = auto()
    CHECKSUM = auto()
    IN = auto()
    OUT = auto()
    INS = auto()
    OUTS = auto()
    LOAD = auto()
    STORE = auto()
    MOVE_IN = auto()
    MOVE_OUT = auto()
    REPEAT_STORE = auto()
    DISK = auto()
    LOOP = auto()
    BOTH = auto()
    GIVE = auto()
    TAKE = auto()
    RENEW = auto()
    TOTAL = auto()


class Agent:
    """The device at CONTROL; a place in the guest's buffer is given by its offset in bytes.

    Synchronization: `read` and `write` are the server's, in any thread; the rest is for one thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ordered: tuple[Operation, deque[int], Future[list[int]]] | None = None
        self._running: Future[list[int]] | None = None
        self._arguments: deque[int] = deque()
        self._results: list[int] = []
        self._gfns: list[int] = []

    # --- the device -------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """What to do, or an argument of it."""
        with self._lock:
            if offset:
                return self._arguments.popleft() if self._arguments else 0
            if self._ordered is None:
                return 0
            operation, self._arguments, self._running = self._ordered
            self._ordered = None
            self._results = []
            return operation

    def write(self, offset: int, size: int, value: int) -> None:
        """What came of it."""
        with self._lock:
            if offset == 4:
                self._results.append(value)
                return
            running, self._running = self._running, None
        if running is None:
            return  # an order of another agent, before this one
        if value:
            running.set_exception(OSError(value, os.strerror(value)))
        else:
            running.set_result(self._results)

    def start(self, operation: Operation, *arguments: int) -> Future[list[int]]:
        """Let the guest begin with something; the future has its words when it has done it."""
        with self._lock:
            assert self._ordered is None, "the guest has not begun what it was told before"
            future: Future[list[int]] = Future()
            words = deque(argument & 0xFFFFFFFF for argument in arguments)
            self._ordered = operation, words, future
        return future

    def adopt(self, other: Agent | None = None) -> Future[list[int]]:
        """Take over what the guest does for an agent that is gone, with the words it was told."""
        with self._lock:
            self._running = Future()
            self._results = list(other._results) if other is not None else []
            return self._running

    def _do(self, operation: Operation, *arguments: int, patience: float = PATIENCE) -> list[int]:
        try:
            return self.start(operation, *arguments).result(patience)
        except TimeoutError:
            begun = "not begun it" if self._ordered else "begun it and not ended"
            raise TimeoutError(f"{operation.name}: in {patience} s the guest has {begun}") from None

    # --- orders -----------------------------------------------------------------

    def ping(self, patience: float = PATIENCE) -> int:
        """See that the guest is alive; returns the vCPU that answered."""
        word = int.from_bytes(os.urandom(4), "little")
        answer, cpu = self._do(Operation.PING, word, patience=patience)
        assert answer == word ^ 0xFFFFFFFF
        return cpu

    def on(self, cpu: int) -> Agent:
        """Go on on this vCPU; returns self."""
        self._do(Operation.CPU, cpu)
        assert self.ping() == cpu
        return self

    def gfns(self) -> list[int]:
        """The frame of each page of the buffer."""
        if not self._gfns:
            words = self._do(Operation.FRAMES)
            starts = words[0::2]
            for first, gfn, end in zip(starts, words[1::2], starts[1:], strict=False):
                self._gfns += range(gfn, gfn + end - first)
        return self._gfns

    def address(self, offset: int) -> int:
        """Where a place in the buffer is in the guest's memory."""
        return self.gfns()[offset >> 12] << 12 | offset & 0xFFF

    def peek(self, offset: int, length: int) -> bytes:
        """What the guest sees in its buffer; whole words of 4 bytes."""
        words = self._do(Operation.PEEK, offset, length)
        return b"".join(word.to_bytes(4, "little") for word in words)

    def poke(self, offset: int, data: bytes) -> None:
        """Let the guest write to its buffer; whole words of 4 bytes."""
        self._do(Operation.POKE, offset, len(data), *memoryview(data).cast("I"))

    def fill(self, offset: int, length: int, seed: int) -> None:
        """Let the guest write noise to its buffer."""
        self._do(Operation.FILL, offset, length, seed)

    def checksum(self, offset: int, length: int) -> int:
        """zlib.crc32 of what the guest sees in its buffer."""
        (value,) = self._do(Operation.CHECKSUM, offset, length)
        return value

    def port_in(self, port: int, size: int = 4) -> int:
        """Read a port."""
        (value,) = self._do(Operation.IN, port, size)
        return value

    def port_out(self, port: int, value: int, size: int = 4) -> None:
        """Write a port."""
        self._do(Operation.OUT, port, size, value)

    def port_in_string(
        self, port: int, offset: int, count: int, size: int = 4, *, backward: bool = False
    ) -> None:
        """`rep ins`: read a port into the buffer; backward begins with the last item."""
        self._do(Operation.INS, port, size, count, backward, offset)

    def port_out_string(
        self, port: int, offset: int, count: int, size: int = 4, *, backward: bool = False
    ) -> None:
        """`rep outs`: write the buffer to a port; backward begins with the last item."""
        self._do(Operation.OUTS, port, size, count, backward, offset)

    def load(self, address: int, size: int = 4) -> int:
        """Read device memory."""
        low, high = self._do(Operation.LOAD, *_halves(address), size)
        return low | high << 32

    def store(self, address: int, value: int, size: int = 4) -> None:
        """Write device memory."""
        self._do(Operation.STORE, *_halves(address), size, *_halves(value))

    def load_string(
        self, address: int, offset: int, count: int, size: int = 4, *, backward: bool = False
    ) -> None:
        """`rep movs` from device memory into the buffer."""
        self._do(Operation.MOVE_IN, *_halves(address), size, count, backward, offset)

    def store_string(
        self, address: int, offset: int, count: int, size: int = 4, *, backward: bool = False
    ) -> None:
        """`rep movs` from the buffer to device memory."""
        self._do(Operation.MOVE_OUT, *_halves(address), size, count, backward, offset)

    def store_repeatedly(
        self, address: int, value: int, count: int, size: int = 4, *, backward: bool = False
    ) -> None:
        """`rep stos`: one value, many times."""
        words = (*_halves(address), size, count, backward, *_halves(value))
        self._do(Operation.REPEAT_STORE, *words)

    def use_disk(
        self, port: int, length: int, *, most: int = 256, seed: int = 1, patience: float = 120
    ) -> tuple[int, int, int, int]:
        """Write noise to a block device, read it back; 1 to `most` sectors of 512 bytes at a time.

        Returns:
            The checksums of what was written and of what was read, and how many requests wrote
            and read.
        """
        written, read, writes, reads = self._do(
            Operation.DISK, port, length, most, seed, patience=patience
        )
        return written, read, writes, reads

    def loop(self, port: int, count: int, patience: float = 120) -> float:
        """Read a port many times; the seconds that this took by the guest's clock."""
        (microseconds,) = self._do(Operation.LOOP, port, count, patience=patience)
        return microseconds / 1e6

    def count_on_both(self, port: int, count: int, patience: float = 120) -> tuple[int, int]:
        """Read `port` on vCPU 0 and `port + 4` on vCPU 1 at once.

        Returns:
            How many reads were not 0, 1, 2... on vCPU 0; 0 if all were on vCPU 1.
        """
        wrong, status = self._do(Operation.BOTH, port, count, patience=patience)
        return wrong, status

    def give(self, page: int) -> None:
        """Give a page of the buffer up: its frame has no memory then."""
        self._do(Operation.GIVE, page)

    def take(self, page: int) -> None:
        """Take memory for a page that was given up, for the frame number that it had."""
        self._do(Operation.TAKE, page)

    def renew(self, page: int) -> None:
        """Give up a page and take another one for its frame number."""
        self._do(Operation.RENEW, page)

    def total(self) -> int:
        """KiB of memory that the guest's kernel has."""
        (kib,) = self._do(Operation.TOTAL)
        return kib


class AgentGuest:
    """The guest; `domid` creates it when it is not there.

    Args:
        guest_type: "pvh" or "hvm".
    """

    def __init__(self, guest_type: str) -> None:
        self._rests = False
        self._image = Path("/run/agent.img")
        self._config = Path("/run/agent.cfg")
        # Huge pages for the buffer, of which agent.c says why it wants them.
        self._text = made_config(
            guest_type,
            name=NAME,
            ramdisk=str(self._image),
            memory=MEMORY,
            vcpus=CPUS,
            extra="hugepages=5",
        )

    @property
    def exists(self) -> bool:
        """Whether it has been created."""
        return _xl("domid", NAME) is not None

    @property
    def domid(self) -> int:
        """Its number."""
        found = _xl("domid", NAME)
        if found is None:
            self._create()
            found = _xl("domid", NAME)
        assert found is not None, "the guest has died at once"
        return int(found)

    def _create(self) -> None:
        # The kernel unpacks one archive after the other: this one's init is the one that stays.
        ours = newc(
            [
                ("init", stat.S_IFREG | 0o755, INIT),
                ("bin/agent", stat.S_IFREG | 0o755, PROGRAM.read_bytes()),
            ]
        )
        self._image.write_bytes((LAB / "guest.img").read_bytes() + ours)
        self._config.write_text(self._text)
        if _xl("create", "-q", str(self._config)) is None:
            raise RuntimeError(f"xl create {self._config} failed")

    def rest(self) -> None:
        """Pause it until :meth:`wake`, if it is there: idle, it takes a sixth of the processor."""
        if not self._rests:
            _xl("pause", NAME)
            self._rests = True

    def wake(self) -> None:
        """Have it go on, if it rests."""
        if self._rests:
            _xl("unpause", NAME)
            self._rests = False

    def destroy(self) -> None:
        """Destroy it if it is there."""
        _xl("destroy", NAME)


def missing() -> str | None:
    """Why the guest cannot be had here, if so."""
    needed: Sequence[Path] = (PROGRAM, LAB / "guest.img")
    absent = [str(path) for path in needed if not path.exists()]
    return (
        f"the guest with the agent is made of the lab's files: no {absent[0]}" if absent else None
    )


def memory_of(name: str) -> int:
    """MiB of memory that Xen counts as a guest's."""
    listing = _xl("list", name)
    found = re.search(rf"^{name}\s+\d+\s+(\d+)", listing or "", re.MULTILINE)
    assert found is not None, f"no guest {name}"
    return int(found[1])


def _halves(value: int) -> tuple[int, int]:
    return value & 0xFFFFFFFF, value >> 32 & 0xFFFFFFFF


def _xl(*arguments: str) -> str | None:
    done = subprocess.run(
        ["xl", *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    return done.stdout if done.returncode == 0 else None
