"""``xenmapcache disk``: a file as a guest's disk, without QEMU."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .arguments import FILES, CommandError, describe
from .output import flush, print_json, print_line, print_note, size
from .sources import usage_errors

if TYPE_CHECKING:
    from ..backend import Backend
    from ..devicemodel import IoreqServer
    from ..devicemodel.link import IoreqDomain
    from ..devicemodel.virtio import VirtioBlock

_SLOTS = {"pvh": "0000:00:01.0", "hvm": "0000:00:05.0"}
"""Where the disk is by default: QEMU has the first slots of an HVM guest."""
_ARGUMENTS = "pci=noacpi"


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Give the command's parser its help and its arguments."""
    describe(
        parser,
        "Serve a file as a guest's disk over virtio-pci. The guest's own drivers find the disk\n"
        "(in Linux virtio_pci and virtio_blk, as /dev/vda). A PVH guest needs no QEMU for it.\n"
        "Run the command in Dom0, as root. Start it while the guest is paused, because the guest\n"
        "scans its bus only once. The disk has the complete sectors (512 bytes) of the file. The\n"
        "command ends when the guest has ended, and on Ctrl-C and SIGTERM.\n"
        "\n"
        "The disk is a PCI device. An Arm guest has no PCI bus here, so the command refuses it: a\n"
        "short Python program serves it the same disk by virtio-mmio (docs/device-models-live.md,\n"
        "Arm).",
        f'  # in web.cfg: type = "pvh", extra = "root=/dev/vda {_ARGUMENTS}"\n'
        "  xl create -p web.cfg\n"
        "  xenmapcache disk web web.img --record /run/web.record &\n"
        "  xl unpause web\n"
        "exit status: 0 when the guest has ended or after SIGTERM, 130 after Ctrl-C,\n"
        "2 for an error",
    )
    parser.add_argument("guest", metavar="GUEST", help="the guest's name or number")
    file = parser.add_argument("file", metavar="FILE", help="the disk: a file or block device")
    file.complete = FILES  # type: ignore[attr-defined] # shtab's way
    parser.add_argument(
        "--read-only",
        action="store_true",
        help="refuse writes; several guests may then share the file",
    )
    parser.add_argument(
        "--type",
        choices=tuple(_SLOTS),
        help="the guest's type (default: the toolstack's answer)",
    )
    parser.add_argument(
        "--bdf",
        metavar="BDF",
        help=f"the disk's place on the PCI bus (default: {_SLOTS['pvh']} of a PVH guest, "
        f"{_SLOTS['hvm']} of an HVM guest)",
    )
    record = parser.add_argument(
        "--record",
        metavar="PATH",
        help="keep the disk's state in this file, in /run: after the command has ended or was "
        "killed, start it again in the same way, and the guest continues. Without it, the guest "
        "waits for its disk for ever",
    )
    record.complete = FILES  # type: ignore[attr-defined] # shtab's way
    parser.add_argument(
        "--serial", default="", help="the serial number that the guest sees, up to 20 characters"
    )


def run(options: argparse.Namespace) -> int:
    """Serve the disk until the guest ends. Returns the exit status."""
    from ..cache import MapCache
    from ..devicemodel import IoreqServer
    from ..devicemodel.virtio import VirtioBlock

    with contextlib.ExitStack() as stack:
        fd = stack.enter_context(_opened(options.file, options.read_only))
        domain, backend = open_guest(options.guest)
        stack.enter_context(backend)
        cache = stack.enter_context(MapCache(backend))
        kind = _kind(options, domain)
        server = IoreqServer(domain, cache, recover=True, guest_type=options.type)
        with usage_errors():
            disk = VirtioBlock(
                server,
                fd,
                read_only=options.read_only,
                serial=options.serial,
                record=options.record,
            )
            stack.enter_context(disk)
            bdf = _place(options.bdf, kind)
            _plug(server, disk, kind, bdf)
            stack.enter_context(server)
            disk.resume()
        _show(options, server.domid, disk, kind, bdf)
        note = f"domain {server.domid} has ended"
        number = server.serve_forever(on_end=lambda: print_note(note))
    return 128 + number if number == signal.SIGINT else 0


def open_guest(guest: str) -> tuple[int | IoreqDomain, Backend]:
    """Return what a server takes as the guest, and the open source of its memory."""
    from ..backend import open_backend
    from ..source import parse_source

    with usage_errors():
        name, found = parse_source(guest if guest.startswith("xen:") else f"xen:{guest}")
        backend = open_backend(name, **found)
    return int(str(found["domid"])), backend


@contextlib.contextmanager
def _opened(path: str, read_only: bool) -> Iterator[int]:
    """Open the disk's file for a ``with`` block, so that no other process serves it as well."""
    fd = os.open(path, os.O_CLOEXEC | (os.O_RDONLY if read_only else os.O_RDWR))
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_NB | (fcntl.LOCK_SH if read_only else fcntl.LOCK_EX))
        except BlockingIOError:
            raise CommandError(
                f"{path} is in use by another process; two guests may share it with --read-only"
            ) from None
        yield fd
    finally:
        os.close(fd)


def _kind(options: argparse.Namespace, domain: int | IoreqDomain) -> str:
    """Return whether the guest is PVH or HVM."""
    from ..devicemodel.guest_type import guest_type
    from ..devicemodel.opening import architecture_of

    if architecture_of(domain, buffered=False).mmio_only:
        raise CommandError(
            "this command makes a PCI device, and an Arm guest has no PCI bus here; serve it a "
            "VirtioBlock by VirtioMmio from Python (see docs/device-models-live.md, Arm)"
        )
    kind = options.type or (guest_type(domain) if isinstance(domain, int) else "pvh")
    if kind is None:
        raise CommandError(
            f"the toolstack does not say what domain {domain} is; give --type pvh or --type hvm"
        )
    if kind not in _SLOTS:
        raise CommandError(f"domain {domain} is a PV guest; only PVH and HVM guests have a PCI bus")
    return str(kind)


def _place(wanted: str | None, kind: str) -> str:
    """Return where the disk is on the guest's bus."""
    from ..ioreq import parse_bdf

    if wanted is None:
        return _SLOTS[kind]
    segment, bus, device, function = parse_bdf(wanted)
    if kind == "pvh" and (segment or bus or not device or function):
        raise CommandError(
            f"--bdf {wanted}: a PVH guest has one bus, with the host bridge at 0000:00:00.0, and "
            f"looks at function 0 of each device; give 0000:00:01.0 to 0000:00:1f.0"
        )
    return wanted


def _plug(server: IoreqServer, disk: VirtioBlock, kind: str, bdf: str) -> None:
    """Put the disk on the guest's bus, and give a PVH guest a bus for it."""
    from ..devicemodel import PciBus
    from ..devicemodel.virtio import VirtioPci

    if kind == "pvh":
        PciBus(server).plug()
    VirtioPci(server, bdf, disk).plug()


def _show(options: argparse.Namespace, domid: int, disk: VirtioBlock, kind: str, bdf: str) -> None:
    """Say what is served, and what the guest needs."""
    unpause = f"xl unpause {options.guest.removeprefix('xen:')}"
    arguments = _ARGUMENTS if kind == "pvh" else ""
    if options.json:
        print_json(
            {
                "domid": domid,
                "file": options.file,
                "sectors": disk.sectors,
                "read_only": options.read_only,
                "bdf": bdf,
                "kernel_arguments": arguments,
                "unpause": unpause,
            }
        )
    else:
        print_line(f"domain {domid}: {options.file}, {size(disk.sectors * 512)}, at {bdf}")
        if arguments:
            print_line(f'the guest\'s configuration needs: extra = "... {arguments}"')
        print_line("the guest was created by:        xl create -p FILE.cfg")
        print_line(f"now run:                         {unpause}")
    flush()
