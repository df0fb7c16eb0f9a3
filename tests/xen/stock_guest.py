"""A Linux guest with Debian's own drivers: what it does is a shell script of the test.

The script's lines that begin with ``STOCK`` are read from the guest's console. The guest is created
paused, so that a device model can take its place first.
"""

from __future__ import annotations

import hashlib
import re
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.xen.conftest import xl
from tests.xen.lab.guest_config import LAB, Setting, made_config
from tests.xen.lab.ramdisk import newc

NAME: Final = "stock"
MEMORY: Final = 256
"""MiB of RAM."""
PAYLOAD: Final = Path("/payload")
IMAGE: Final = Path("/run/stock.img")
CONFIG: Final = Path("/run/stock.cfg")
ARGUMENTS: Final = {"pvh": "pci=noacpi"}
"""What makes the kernel look at our bus."""
INIT: Final = b"""#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mkdir -p /sys /tmp
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t tmpfs tmp /tmp
/bin/busybox --install -s /bin
for module in /drivers/*; do insmod "$module"; done
echo "STOCK up"
. /script
echo "STOCK end"
while true; do sleep 1000; done
"""
WAITING: Final = """
tries=0
until [ -b /dev/vda ] || [ $tries -ge 300 ]; do tries=$((tries + 1)); sleep 0.1; done
"""
"""A part of a script: until the disk is there, for at most 30 s."""
ROUNDS: Final = 24
WORK: Final = f"""{WAITING}
for round in $(seq {ROUNDS}); do
    dd if=/dev/urandom of=/tmp/r bs=1M count=2 2>/dev/null
    dd if=/tmp/r of=/dev/vda bs=64k seek=$((round * 32)) oflag=direct 2>/dev/null
    dd if=/dev/vda of=/tmp/b bs=64k skip=$((round * 32)) count=32 iflag=direct 2>/dev/null
    cmp -s /tmp/r /tmp/b && echo "STOCK round $round"
done
"""
"""Writes to a disk without pause, and says which rounds can be read again as they were written."""
ALL_ROUNDS: Final = [f"round {number + 1}" for number in range(ROUNDS)]


def missing() -> str | None:
    """Why the guest cannot be had here, if so."""
    needed = (LAB / "guest.img", LAB / "drivers.img")
    absent = [str(path) for path in needed if not path.exists()]
    return (
        f"a guest with stock drivers is made of the lab's files: no {absent[0]}" if absent else None
    )


class StockGuest:
    """A guest that was created; it runs when it is unpaused."""

    def __init__(self, domid: int, console: Callable[[], str]) -> None:
        self.domid = domid
        self._console = console

    def unpause(self) -> None:
        """Let it run."""
        xl("unpause", str(self.domid))

    def said(self) -> list[str]:
        """Return what the script has printed after ``STOCK``, line by line, without the markers."""
        return re.findall(r"^STOCK (.*?)\r?$", self._console(), re.MULTILINE)

    def rounds(self) -> list[str]:
        """Return the rounds of ``WORK`` that were read as they were written."""
        return [line for line in self.said() if line.startswith("round")]

    def wait(self, start: str, patience: float = 240) -> str:
        """Wait for a line of the script that begins so, and return the rest of it."""
        deadline = time.monotonic() + patience
        while not (found := [line for line in self.said() if line.startswith(start)]):
            assert time.monotonic() < deadline, (
                f"in {patience} s the guest has not said {start!r}; its console:\n"
                f"{self._console()[-3000:]}"
            )
            time.sleep(0.5)  # the guest needs the processor more
        return found[-1].removeprefix(start).strip()


def sum_of(path: Path) -> str:
    """The MD5 sum of a file, as the guest's md5sum prints it."""
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


@contextmanager
def stock_guest(
    script: str,
    console: Callable[[str], str],
    *programs: str,
    guest_type: str = "pvh",
    arguments: str | None = None,
    configuration: str = "",
    **settings: Setting,
) -> Iterator[StockGuest]:
    """Create a guest, paused, that runs a script; it is destroyed at the end.

    Args:
        script: for its shell.
        console: returns what it has printed so far.
        programs: names of programs of tests/xen/guest, which it gets in /bin.
        guest_type: "pvh", without QEMU, or "hvm", with it.
        arguments: for its kernel; by default, what makes it look at our bus.
        configuration: more lines of it, for xl.
        settings: others than those of the lab's guests.
    """
    ours = newc(
        [
            ("init", stat.S_IFREG | 0o755, INIT),
            ("script", stat.S_IFREG | 0o644, script.encode()),
            *(
                (f"bin/{name}", stat.S_IFREG | 0o755, (PAYLOAD / name).read_bytes())
                for name in programs
            ),
        ]
    )
    images = [(LAB / name).read_bytes() for name in ("guest.img", "drivers.img")]
    IMAGE.write_bytes(b"".join(images) + ours)
    settings = {"vcpus": 2, "ramdisk": str(IMAGE), "name": NAME, **settings}
    extra = ARGUMENTS.get(guest_type, "") if arguments is None else arguments
    text = made_config(guest_type, memory=MEMORY, extra=extra, **settings)
    CONFIG.write_text(text + configuration)
    subprocess.run(["xl", "destroy", NAME], capture_output=True, check=False)
    log = Path(f"/var/log/xen/console/guest-{NAME}.log")
    before = len(console(NAME)) if log.exists() else 0
    xl("create", "-q", "-p", str(CONFIG))
    try:
        found = subprocess.run(["xl", "domid", NAME], capture_output=True, text=True, check=True)
        yield StockGuest(int(found.stdout), lambda: console(NAME)[before:])
    finally:
        subprocess.run(["xl", "destroy", NAME], capture_output=True, check=False)
