"""Booting an image, and reading what it says while it runs."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from .image import Image
from .platform import ARM, X86, Platform
from .prerequisites import tool

TAIL: Final = 40
# QEMU now and then forgets an interrupt: entering a guest (helper_vmrun) it changes the set of
# pending ones without the lock under which devices add theirs. If that was the timer's, nothing in
# the machine goes on, for minutes; the next interrupt, of whatever device, brings it back. So there
# are two each second: a character for the console, XON, which a terminal swallows, and a key that
# does nothing. The character alone does not do: if this machine has other work, Xen 4.20 finds that
# an interrupt of the console took long, and from then on looks for characters by a timer.
KICK: Final = b"\x11"
KEY: Final = {
    "execute": "send-key",
    "arguments": {"keys": [{"type": "qcode", "data": "ctrl"}], "hold-time": 10},
}
"""For QEMU's machine protocol (QMP). An Arm machine has no keyboard, and drops it."""
# What costs time under emulation and protects nobody here is off. A crash ends in a reboot, and
# a reboot ends QEMU.
XEN: Final = "loglvl=warning guest_loglvl=warning bootscrub=0"
XEN_X86: Final = (
    f"{XEN} dom0_mem=1280M,max:1280M console=com1 com1=115200,8n1"
    " spec-ctrl=no xpti=no pv-l1tf=no watchdog=0"
)
XEN_ARM: Final = f"{XEN} dom0_mem=1024M console=dtuart"
LINUX: Final = "console=hvc0 loglevel=4 panic=1 nokaslr mitigations=off"
# A PVH Dom0 needs an IOMMU, and devices whose DMA goes through it: without, Linux hangs.
IOMMU: Final = ["-machine", "q35", "-device", "amd-iommu"]
BEHIND_IOMMU: Final = ",iommu_platform=on,disable-legacy=on,disable-modern=off"


class LabError(Exception):
    """The machine died, fell silent or took too long; the text ends with its console's end."""


class Machine:
    """A running emulator; a context manager, since what it starts must not outlive the session.

    `lines()` yields what Dom0 writes to its channel. The console is collected separately.

    Args:
        image: what to boot.
        payload: a tar file that becomes Dom0's second disk.
        mode: "shell" connects the terminal to Dom0's console and starts a shell there.
        echo: file descriptor the console is copied to.

    Synchronization: one thread may iterate; two threads of our own read the pipes, so that Dom0
    never waits for us, and one keeps it awake.
    """

    def __init__(
        self,
        image: Image,
        payload: Path | None = None,
        *,
        mode: str = "",
        echo: int | None = None,
    ) -> None:
        self._queue: queue.Queue[str | None] = queue.Queue()
        self._tail: deque[str] = deque(maxlen=2000)
        self._echo = echo
        self._activity = time.monotonic()
        self._snapshots = tempfile.TemporaryDirectory(prefix="xenmapcache-lab-")
        interactive = mode == "shell"
        channel, channel_in = os.pipe()
        console, console_in = os.pipe()
        self._monitor, monitor_in = socket.socketpair()
        serial = "mon:stdio" if interactive else "stdio"
        try:
            self._process = subprocess.Popen(
                [
                    # The kernel ends the emulator when we die, however we die.
                    *(tool("setpriv"), "--pdeathsig", "KILL"),
                    tool(image.platform.architecture.emulator),
                    *_arguments(image, payload, serial, f"/dev/fd/{channel_in}", mode),
                    *("-chardev", f"socket,id=monitor,fd={monitor_in.fileno()}"),
                    *("-mon", "chardev=monitor,mode=control"),
                ],
                stdin=None if interactive else subprocess.PIPE,
                stdout=None if interactive else console_in,
                stderr=None if interactive else console_in,
                pass_fds=(channel_in, monitor_in.fileno()),
                # Ctrl-C is ours to handle: reaching QEMU, it would look like a crash.
                start_new_session=not interactive,
                # QEMU keeps what the machine writes in an unlinked file there.
                env={**os.environ, "TMPDIR": self._snapshots.name},
            )
        finally:
            os.close(channel_in)
            os.close(console_in)
            monitor_in.close()
        # The kernel may schedule each session as a group (sched_autogroup), and our niceness counts
        # only within it: the group gets it, too.
        with contextlib.suppress(OSError):  # such groups are off, or only root may
            Path(f"/proc/{self._process.pid}/autogroup").write_text(str(os.nice(0)))
        self._closed = threading.Event()
        self._threads = [
            threading.Thread(target=self._read_channel, args=(channel,), daemon=True),
            threading.Thread(target=self._read_console, args=(console,), daemon=True),
            threading.Thread(target=self._kick, daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def lines(self, *, deadline: float, idle: float) -> Iterator[str]:
        """Yield the channel's lines until the machine powers itself off.

        Args:
            deadline: seconds for the whole, from now.
            idle: seconds without a sign of life on channel and console.

        Raises:
            LabError: one of the two has passed.
        """
        end = time.monotonic() + deadline
        while True:
            try:
                line = self._queue.get(timeout=0.5)
            except queue.Empty:
                now = time.monotonic()
                if now > end:
                    raise self.error(f"not finished after {deadline:.0f} s") from None
                if now - self._activity > idle:
                    raise self.error(f"no sign of life for {idle:.0f} s") from None
                continue
            if line is None:
                self._process.wait()
                return
            yield line

    def error(self, text: str) -> LabError:
        """An error about this machine; the machine is stopped, so that its console is complete."""
        self.close()
        return LabError(f"{text}; the console's last lines:\n{self.tail()}")

    def tail(self, count: int = TAIL) -> str:
        """The console's last `count` lines."""
        return "\n".join(list(self._tail)[-count:])

    def wait(self) -> int:
        """Wait until the machine powers itself off (interactive use)."""
        return self._process.wait()

    def close(self) -> None:
        """Stop the machine if it still runs. May be called again."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._closed.set()
        for thread in self._threads:
            thread.join()
        self._monitor.close()
        self._snapshots.cleanup()

    def _kick(self) -> None:
        keyboard = self._process.stdin
        if keyboard is None:
            return
        self._monitor.setblocking(False)
        with contextlib.suppress(ConnectionError), keyboard:
            self._tell({"execute": "qmp_capabilities"})
            while not self._closed.wait(1):
                os.write(keyboard.fileno(), KICK)
                self._tell(KEY)

    def _tell(self, command: Mapping[str, object]) -> None:
        """Give QEMU a command, and read what it has answered to those before."""
        with contextlib.suppress(BlockingIOError):
            while self._monitor.recv(4096):
                pass
        with contextlib.suppress(BlockingIOError):
            self._monitor.send(json.dumps(command).encode() + b"\n")

    def _read_channel(self, descriptor: int) -> None:
        with open(descriptor, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                self._activity = time.monotonic()
                self._queue.put(line.rstrip("\n"))
        self._queue.put(None)

    def _read_console(self, descriptor: int) -> None:
        with open(descriptor, encoding="utf-8", errors="replace", newline="\n") as lines:
            for line in lines:
                self._activity = time.monotonic()
                self._tail.append(line.rstrip("\r\n"))
                if self._echo is not None:
                    os.write(self._echo, line.encode())


def _arguments(
    image: Image, payload: Path | None, serial: str, channel: str, mode: str
) -> list[str]:
    linux = f"{LINUX} lab.guest={image.platform.guest}" + (f" lab={mode}" if mode else "")
    iommu = BEHIND_IOMMU if image.platform.dom0 == "pvh" else ""
    arguments = ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    # One processor: with two, in QEMU 7.2, guests now and then triple-faulted while they booted,
    # most with Xen's own registers in their state (8 of some 50 guests; with one, none of 54).
    arguments += ["-m", "2048", "-smp", "1", "-accel", "tcg", "-kernel", str(image.hypervisor)]
    # QEMU separates options by commas, and wants those of a file's name doubled.
    kernel, initial = (str(path).replace(",", ",,") for path in (image.kernel, image.ramdisk))
    arguments += MACHINES[image.platform.architecture.name](image.platform, kernel, linux, initial)
    arguments += ["-serial", serial, "-device", f"virtio-serial-pci{iommu}"]
    arguments += ["-chardev", f"file,id=channel,path={channel}"]
    arguments += ["-device", "virtserialport,chardev=channel"]
    for name, disk in (("vda", image.root), ("vdb", payload)):
        if disk is not None:
            path = str(disk).replace(",", ",,")
            options = f"id={name},if=none,format=raw,snapshot=on,cache=unsafe"
            arguments += ["-drive", f"file={path},{options}"]
            arguments += ["-device", f"virtio-blk-pci,drive={name}{iommu}"]
    return arguments


def _x86(platform: Platform, kernel: str, linux: str, initial: str) -> list[str]:
    """A PC, whose multiboot loader takes Dom0's kernel and ramdisk as modules."""
    pvh = platform.dom0 == "pvh"
    # +npt: without nested paging Xen has no HAP, and Debian's Xen has no shadow paging, so there
    # would be no PVH guests.
    return [
        *(IOMMU if pvh else []),
        *("-cpu", "qemu64,+svm,+npt"),
        *("-append", f"{XEN_X86} dom0=pvh" if pvh else XEN_X86),
        *("-initrd", f"{kernel} {linux},{initial}"),
    ]


def _arm(_platform: Platform, kernel: str, linux: str, initial: str) -> list[str]:
    """A board whose device tree names Dom0's kernel and ramdisk, where the loader has put them."""
    return [
        *("-machine", "virt,virtualization=on,gic-version=3", "-cpu", "cortex-a53"),
        *("-append", XEN_ARM),
        *("-device", f"guest-loader,addr=0x49000000,kernel={kernel},bootargs={linux}"),
        *("-device", f"guest-loader,addr=0x4d000000,initrd={initial}"),
    ]


MACHINES: Final = {X86.name: _x86, ARM.name: _arm}
