"""Our disk next to QEMU's own virtio-blk, in one HVM guest: ``make bench-xen``.

Both disks are files in Dom0's memory, in a tmpfs: it cannot tell that a read need
not wait, so workers read ours. The guest's own driver uses them in turns, by
tests/xen/guest/load.c. Nothing here fails because it is slow.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.xen import stock_guest as stock
from tests.xen.stock_guest import StockGuest, stock_guest
from xenmapcache import MapCache, open_backend
from xenmapcache.address import KiB, MiB
from xenmapcache.backends.domain import DomainBackend
from xenmapcache.devicemodel import IoreqServer
from xenmapcache.devicemodel.virtio import VirtioBlock, VirtioPci, Virtqueue
from xenmapcache.events import Event, RequestHandled
from xenmapcache.ioreq import RequestKind

pytestmark = [pytest.mark.xen, pytest.mark.slow, pytest.mark.benchmark]

LENGTH = 32 * MiB
ROUNDS = 5
MILLISECONDS = 1000
"""For one kind of load, in one round, on one disk."""
SLOT = "0000:00:05.0"
QEMUS = [
    *("-drive", "file={file},if=none,id=qemus,format=raw,cache=writeback,aio=threads"),
    *("-device", "virtio-blk-pci,drive=qemus,serial=qemus,disable-legacy=on,class=0x018000"),
]
"""Not of the class that virtio-blk has by default: Linux on Xen has QEMU unplug all SCSI disks."""
LOADS = {
    "4 KiB, random, 1 at a time, read": f"read random {4 * KiB} 1",
    "4 KiB, random, 1 at a time, write": f"write random {4 * KiB} 1",
    "4 KiB, random, 32 at a time, read": f"read random {4 * KiB} 32",
    "4 KiB, random, 32 at a time, write": f"write random {4 * KiB} 32",
    "1 MiB, in order, read": f"read sequential {MiB} 1",
    "1 MiB, in order, write": f"write sequential {MiB} 1",
}
PROFILED = LOADS["4 KiB, random, 1 at a time, read"]
SCRIPT = f"""
disk() {{
    for found in /sys/block/vd*; do
        [ "$(cat $found/serial 2>/dev/null)" = $1 ] && echo /dev/${{found##*/}}
    done
}}
tries=0
until [ "$(disk ours)" ] && [ "$(disk qemus)" ] || [ $tries -ge 100 ]; do
    tries=$((tries + 1)); sleep 0.1
done
for round in $(seq {ROUNDS}); do
    while read what; do
        for name in ours qemus; do
            echo "STOCK $name $what: $(load $(disk $name) $what {MILLISECONDS} $round)"
        done
    done < /loads
done
echo "STOCK profile $(load $(disk ours) {PROFILED} {MILLISECONDS} 99)"
"""
PARTS: dict[str, tuple[type, str]] = {
    "take it from the ring": (Virtqueue, "pop"),
    "read its header": (VirtioBlock, "prepare"),
    "read the file, write to the guest": (VirtioBlock, "_peek"),
    "read the file into leased memory": (VirtioBlock, "_read"),
    "answer in the ring": (Virtqueue, "push"),
    "raise the interrupt": (VirtioPci, "interrupt_queue"),
}
"""What is done for a small read, and the method that does it."""
REPORTS = "report the pages that were written"
"""What several parts do; a hypercall for each, unless `log_dirty` is off."""


class Profile:
    """When each part of each request began, and how long it took, in ns."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._times: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
        for part, (owner, name) in {**PARTS, REPORTS: (DomainBackend, "mark_dirty")}.items():
            monkeypatch.setattr(owner, name, self._timed(part, getattr(owner, name)))

    def _timed(self, part: str, method: Callable[..., object]) -> Callable[..., object]:
        times = self._times[part]

        def timed(*arguments: object, **options: object) -> object:
            started = time.perf_counter_ns()
            try:
                return method(*arguments, **options)
            finally:
                times.append((started, time.perf_counter_ns() - started))

        return timed

    def see(self, event: Event) -> None:
        """Keep how long the handler of a notification took."""
        if isinstance(event, RequestHandled) and event.kind == RequestKind.MMIO:
            self._times["handler"].append((time.perf_counter_ns(), event.duration))

    def told(self, requests: int, microseconds: int) -> str:
        """Say where the time of the last requests has gone, on average.

        Args:
            requests: the guest's last ones, one at a time.
            microseconds: that they took in the guest.
        """
        whole = microseconds / requests
        first, _ = self._times["read its header"][-requests]

        def mean(part: str) -> float:
            return sum(taken for at, taken in self._times[part] if at >= first) / requests / 1000

        reports = sum(at >= first for at, _ in self._times[REPORTS]) / requests
        handler = mean("handler")
        lines = [f"one of {requests} reads of 4 KiB: {whole:.0f} us in the guest"]
        lines += [f"  {whole - handler:6.0f} us in the guest's kernel, in Xen, until we run"]
        lines += [f"  {handler:6.0f} us in the handler of its notification"]
        lines += ["the parts, in the handler, or in a worker if the file has to be waited for:"]
        lines += [f"  {mean(part):6.0f} us to {part}" for part in PARTS if mean(part)]
        lines += [f"  {mean(REPORTS):6.0f} us of these in {reports:.0f} calls to {REPORTS}"]
        return "\n".join(lines)


def results(guest: StockGuest, name: str, load: str) -> list[float]:
    """Requests a second in each round."""
    lines = [line for line in guest.said() if line.startswith(f"{name} {load}: ")]
    numbers = [line.rpartition(": ")[2].split() for line in lines]
    assert all(len(pair) == 2 for pair in numbers), lines
    return [int(requests) * 1e6 / int(microseconds) for requests, microseconds in numbers]


def compared(load: str, ours: list[float], qemus: list[float]) -> str:
    """Say how fast both disks were, and the ratio with its spread over the rounds."""
    ratios = sorted(one / other for one, other in zip(ours, qemus, strict=True))
    middle = statistics.median(ratios)
    size = int(load.split()[2])
    unit, factor = ("MB/s", size / 1e6) if size >= MiB else ("a second", 1)
    return (
        f"{statistics.median(ours) * factor:.0f} {unit}, QEMU's "
        f"{statistics.median(qemus) * factor:.0f}: {middle:.2f} ({ratios[0]:.2f} to "
        f"{ratios[-1]:.2f})"
    )


@pytest.mark.parametrize("reports", [True, False], ids=["reports", "no_reports"])
def test_next_to_qemus_disk(
    reports: bool,
    hvm_guests: None,
    guest_console: Callable[[str], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    """Requests and bytes a second of both disks, and a profile of one request of ours.

    QEMU reports written pages to Xen only while the guest is migrated; ours does so always, unless
    `log_dirty` is off.
    """
    if reason := stock.missing():
        pytest.skip(reason)
    files = {name: tmp_path / f"{name}.img" for name in ("ours", "qemus")}
    for path in files.values():
        path.write_bytes(bytes(LENGTH))
    profile = Profile(monkeypatch)
    loads = "cat > /loads <<END\n" + "".join(f"{load}\n" for load in LOADS.values()) + "END\n"
    arguments = [text.format(file=files["qemus"]) for text in QEMUS]
    with (
        stock_guest(
            loads + SCRIPT,
            guest_console,
            "load",
            guest_type="hvm",
            vcpus=1,
            device_model_args=arguments,
        ) as guest,
        open_backend("xen", domid=guest.domid) as backend,
        MapCache(backend) as cache,
        files["ours"].open("r+b") as file,
    ):
        backend.log_dirty = reports
        server = IoreqServer(guest.domid, cache)
        with VirtioBlock(server, file, serial="ours") as block:
            VirtioPci(server, SLOT, block).plug()
            with server, server.serving(), server.observe(profile.see):
                guest.unpause()
                requests, microseconds = map(int, guest.wait("profile", 280).split())
                guest.wait("end")
        assert server.failures == 0
    for what, load in LOADS.items():
        ours, qemus = results(guest, "ours", load), results(guest, "qemus", load)
        assert len(ours) == len(qemus) == ROUNDS
        record_property("measured", f"{what}: {compared(load, ours, qemus)}")
    record_property("measured", profile.told(requests, microseconds))
