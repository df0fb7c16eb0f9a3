"""The emulated machine: boots Debian's cloud kernel, stops, and writes its memory."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, cast

from tests.xen.lab import ramdisk
from tests.xen.lab.prerequisites import LabUnavailableError, tool

MEMORY_BYTES: Final = 128 << 20
INIT: Final = Path(__file__).with_name("init")
KERNEL: Final = "linux-image-cloud-amd64"
_BOOT_S: Final = 300
_READY: Final = b"=== ready"
_MACHINE: Final = (
    "-machine", "q35", "-accel", "tcg", "-cpu", "max", "-m", str(MEMORY_BYTES >> 20), "-smp", "1",
    "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-vga", "std",
    "-device", "vmcoreinfo", "-append", "console=ttyS0 panic=1 loglevel=5 no_timer_check",
    "-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console", "-monitor", "none",
)  # fmt: skip
_ELF: Final = {"plain.elf": False, "paging.elf": True}
_KDUMP: Final = {
    "kdump-zlib": "flattened.kdump",
    "kdump-lzo": "flattened-lzo.kdump",
    "kdump-snappy": "flattened-snappy.kdump",
}


def write_images(folder: Path, work: Path) -> None:
    """Boot the guest and write what QEMU can write of its memory.

    Args:
        folder: for the images.
        work: an empty folder for all else.

    Raises:
        LabUnavailableError: the kernel cannot be downloaded, or the guest does not boot.
    """
    kernel = _unpack_guest(work)
    monitor = work / "monitor"
    arguments = (*_MACHINE, "-kernel", str(kernel), "-initrd", str(work / "ramdisk"))
    command = [
        # The kernel ends the emulator when we die, however we die.
        *(tool("setpriv"), "--pdeathsig", "KILL", tool("qemu-system-x86_64")),
        *(*arguments, "-qmp", f"unix:{monitor},server,nowait"),
    ]
    with (work / "stderr").open("w+b") as errors:
        machine = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors
        )
        try:
            _wait_until_ready(machine, folder / "serial.log")
            _dump(monitor, folder)
            machine.communicate(timeout=60)
        except (LabUnavailableError, OSError) as error:
            errors.seek(0)
            raise LabUnavailableError(f"{error}; {errors.read().decode()[-500:]}") from error
        finally:
            machine.kill()
            machine.communicate()


def _unpack_guest(work: Path) -> Path:
    """Download the kernel and busybox; make the ramdisk, and return the kernel."""
    depends = _run(work, "apt-cache", "depends", KERNEL).split()
    names = [name for name in depends if name.startswith("linux-image-") and name != KERNEL]
    if not names:
        raise LabUnavailableError(f"apt knows no {KERNEL}: run apt-get update")
    _run(work, "apt-get", "download", "-q", names[0], "busybox-static")
    for package in work.glob("*.deb"):
        _run(work, "dpkg", "-x", package.name, "tree")
    tree = work / "tree"
    (busybox,) = [path for path in tree.glob("**/bin/busybox") if path.is_file()]
    (module,) = tree.glob("**/qemu_fw_cfg.ko*")
    (kernel,) = tree.glob("boot/vmlinuz-*")
    packed = ramdisk.ramdisk(INIT.read_bytes(), busybox.read_bytes(), [ramdisk.module(module)])
    (work / "ramdisk").write_bytes(packed)
    return kernel


def _run(work: Path, *command: str) -> str:
    done = subprocess.run(
        [tool(command[0]), *command[1:]], cwd=work, text=True, capture_output=True, check=False
    )
    if done.returncode:
        lines = " ".join(done.stderr.splitlines()[-3:])
        raise LabUnavailableError(f"{' '.join(command)} failed: {lines}")
    return done.stdout


def _wait_until_ready(machine: subprocess.Popen[bytes], log: Path) -> None:
    """Copy the guest's console to a file until it says that it is ready."""
    assert machine.stdout is not None
    console = b""
    deadline = time.monotonic() + _BOOT_S
    with log.open("wb") as file:
        while _READY not in console:
            wait = max(0.0, deadline - time.monotonic())
            readable, _, _ = select.select([machine.stdout], [], [], wait)
            chunk = os.read(machine.stdout.fileno(), 1 << 16) if readable else b""
            if not chunk:
                raise LabUnavailableError(f"the guest does not boot: {console[-500:].decode()!r}")
            file.write(chunk)
            console += chunk


def _dump(monitor: Path, folder: Path) -> None:
    with _monitor(monitor) as qmp:
        qmp.command("qmp_capabilities")
        qmp.command("stop")
        for name, paging in _ELF.items():
            qmp.command("dump-guest-memory", paging=paging, protocol=f"file:{folder / name}")
        able = cast(dict[str, list[str]], qmp.command("query-dump-guest-memory-capability"))
        for kind in set(able["formats"]) & set(_KDUMP):
            protocol = f"file:{folder / _KDUMP[kind]}"
            qmp.command("dump-guest-memory", paging=False, protocol=protocol, format=kind)
        raw = str(folder / "guest.raw")
        qmp.command("pmemsave", val=0, size=MEMORY_BYTES, filename=raw)
        line = {"command-line": "info registers"}
        registers = qmp.command("human-monitor-command", **line)
        (folder / "registers.txt").write_text(str(registers))
        capability = {"capability": "events", "state": True}
        qmp.command("migrate-set-capabilities", capabilities=[capability])
        qmp.command("migrate", uri=f"exec:cat > '{folder / 'guest.migration'}'")
        qmp.wait_for_migration()
        qmp.command("quit")


@contextmanager
def _monitor(path: Path) -> Iterator[_Monitor]:
    with socket.socket(socket.AF_UNIX) as channel:
        channel.settimeout(_BOOT_S)
        channel.connect(str(path))
        with channel.makefile("rwb") as stream:
            yield _Monitor(cast(socket.SocketIO, stream))


class _Monitor:
    """QEMU's monitor protocol over a stream."""

    def __init__(self, stream: socket.SocketIO) -> None:
        self._stream = stream
        self._read()  # the greeting

    def command(self, name: str, **arguments: object) -> object:
        line = json.dumps({"execute": name, "arguments": arguments}) + "\n"
        self._stream.write(line.encode())
        self._stream.flush()
        while "event" in (answer := self._read()):
            pass
        if "return" not in answer:
            raise LabUnavailableError(f"QEMU refuses {name} {arguments}: {answer}")
        return answer["return"]

    def wait_for_migration(self) -> None:
        while True:
            event = self._read()
            if event.get("event") == "MIGRATION":
                status = cast(dict[str, str], event["data"])["status"]
                if status == "completed":
                    return
                if status == "failed":
                    raise LabUnavailableError("QEMU could not write a migration stream")

    def _read(self) -> dict[str, object]:
        line = self._stream.readline()
        if not line:
            raise LabUnavailableError("QEMU ended")
        return cast(dict[str, object], json.loads(line))
