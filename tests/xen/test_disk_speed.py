"""Our disk and QEMU's own virtio-blk in the same HVM guest. Nothing here fails for being slow."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.xen import stock_guest as stock
from tests.xen.stock_guest import WAITING, stock_guest
from xenmapcache import MapCache, open_backend
from xenmapcache.address import KiB, MiB
from xenmapcache.devicemodel import IoreqServer
from xenmapcache.devicemodel.virtio import VirtioBlock, VirtioPci

pytestmark = [pytest.mark.xen, pytest.mark.slow]

OURS, QEMUS = "ours", "qemu"
LENGTH = 64 * MiB
ROUNDS = 7
LOADS = {
    f"{name}, {way}": (way, order, size, depth)
    for name, order, size, depth in (
        ("4 KiB random, depth 1", "random", 4 * KiB, 1),
        ("4 KiB random, depth 32", "random", 4 * KiB, 32),
        ("1 MiB sequential", "sequential", MiB, 1),
    )
    for way in ("read", "write")
}
"""What is measured, and the arguments of tests/xen/guest/load.c."""


def script(load: tuple[str, str, int, int]) -> str:
    """Each round measures both disks, in turns: this machine may have other work."""
    way, order, size, depth = load
    arguments = f"{way} {order} {size} {depth} 1500"
    return f"""
for round in $(seq {ROUNDS}); do
    for disk in vda vdb; do
        echo "STOCK {arguments} $(cat /sys/block/$disk/serial) $(load /dev/$disk {arguments})"
    done
done
"""


def test_the_disk_against_qemus(
    guest_console: Callable[[str], str],
    hvm_guests: None,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """Requests a second and MB/s of our disk as ratios to QEMU's, with their spread."""
    if reason := stock.missing():
        pytest.skip(reason)
    files = {name: tmp_path / name for name in (OURS, QEMUS)}
    for path in files.values():
        path.write_bytes(bytes(LENGTH))
    qemu = ["-drive", f"file={files[QEMUS]},if=none,id=other,format=raw"]
    qemu += ["-device", f"virtio-blk-pci,drive=other,serial={QEMUS},addr=07,disable-legacy=on"]
    both = WAITING + WAITING.replace("vda", "vdb")
    with (
        stock_guest(
            both + "".join(map(script, LOADS.values())),
            guest_console,
            "load",
            guest_type="hvm",
            device_model_args=qemu,
        ) as guest,
        open_backend("xen", domid=guest.domid) as backend,
        MapCache(backend) as cache,
        files[OURS].open("r+b") as file,
    ):
        server = IoreqServer(guest.domid, cache)
        with VirtioBlock(server, file, serial=OURS) as block:
            VirtioPci(server, "0000:00:05.0", block).plug()
            with server, server.serving():
                guest.unpause()
                guest.wait("end", 280)
        assert server.failures == 0
    for name, (way, order, size, depth) in LOADS.items():
        rates: dict[str, list[float]] = {OURS: [], QEMUS: []}
        for line in guest.said():
            words = line.split()
            if words[:4] == [way, order, str(size), str(depth)]:
                requests, microseconds = map(int, words[6:])
                rates[words[5]].append(requests / microseconds * 1e6)
        ratios = sorted(mine / other for mine, other in zip(rates[OURS], rates[QEMUS], strict=True))
        assert len(ratios) == ROUNDS
        mine, other = (statistics.median(rates[disk]) for disk in (OURS, QEMUS))
        record_property(
            "measured",
            f"{name}: ours {mine:.0f}/s ({mine * size / 1e6:.1f} MB/s), QEMU's {other:.0f}/s "
            f"({other * size / 1e6:.1f} MB/s): {statistics.median(ratios):.2f} of QEMU's "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f} in {ROUNDS} rounds)",
        )
