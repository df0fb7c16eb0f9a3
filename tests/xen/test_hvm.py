"""An HVM guest with two device models, QEMU's and ours, from its firmware's first instruction on.

One guest is booted for all tests of this file. Its script ends before the first test begins.
"""

from __future__ import annotations

import json
import logging
import re
import signal
import subprocess
import sys
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from errno import EPERM
from pathlib import Path
from typing import Any

import pytest

from tests.xen import model
from tests.xen import stock_guest as stock
from tests.xen.conftest import EXAMPLES, Recorder, wait_for
from tests.xen.control import held_still
from tests.xen.stock_guest import MEMORY, NAME, StockGuest, stock_guest
from xenmapcache import DmaDirection, FaultError, MapCache, open_backend
from xenmapcache.address import KiB, MiB
from xenmapcache.cache.lease import Lease
from xenmapcache.devicemodel import IoreqServer
from xenmapcache.devicemodel.pci import PciFunction
from xenmapcache.events import Event, RequestHandled
from xenmapcache.ioreq import RequestKind

pytestmark = [pytest.mark.xen, pytest.mark.slow]  # Linux boots in 20 s on 4.20, in 60 s on 4.17

BDF = "0000:00:06.0"
VGA_WINDOW, VGA_BYTES = 0xA0000, 128 * KiB
VIDEO_SIZE = 16 * MiB
"""The memory of the screen. QEMU makes it after the RAM, and hvmloader has it moved to a BAR."""
WIDTH, HEIGHT = 800, 600
MARK_AT = 12 * MiB
"""In the memory of the screen, beyond what is shown."""
MARK = b"drawn before the firmware ran"
PORTS = " ".join(str(model.PORT + at) for at in (model.COUNT, model.OWN, model.OTHER, model.STUCK))
VGA_PORT = 0x3CC
"""QEMU's: the VGA's miscellaneous output register."""
LOOKED_AT = (*range(0, 4 * MiB, MiB), *range((MEMORY - 4) * MiB, MEMORY * MiB, MiB))
SCRIPT = f"""
bar() {{ head -n 1 /sys/bus/pci/devices/$1/resource | cut -d' ' -f1; }}
ours=$(bar {BDF})
echo 1 > /sys/bus/pci/devices/{BDF}/enable
echo "STOCK ids $(cat /sys/bus/pci/devices/*/vendor | tr '\\n' ' ')"
echo "STOCK memory $(devmem $ours 32)"
devmem $((ours + 8)) 32 0x89abcdef
date -s "2031-05-05 12:00:00" > /dev/null
hwclock -w -u
printf '\\033[2J\\033[H\\033[?25l\\033[41m' > /dev/tty1
for line in $(seq 50); do printf '%-100s' "$line xenmapcache" > /dev/tty1; done
(while true; do printf '\\033[H%s' "$(date)" > /dev/tty1; sleep 1; done) &
for device in $(ls /sys/bus/pci/devices); do
    grep -q 0x0300 /sys/bus/pci/devices/$device/class && echo "STOCK video $(bar $device)"
done
echo "STOCK screen $(cd /sys/class/graphics/fb0; cat virtual_size stride | tr '\\n' ' ')"
port() {{ dd if=/dev/port bs=1 count=1 skip=$1 2>/dev/null; }}
(
    while sleep 1; do
        now="$(for at in {PORTS} {VGA_PORT}; do port $at; done | hexdump -v -e '5/1 " %02x"')"
        [ "$now" = "$last" ] || echo "STOCK ports$now"
        last=$now
    done
) &
"""


@dataclass
class Booted:
    """The guest, and what happened while it booted."""

    guest: StockGuest
    cache: MapCache
    server: IoreqServer
    function: PciFunction
    device: Recorder
    screen: Lease
    dma: list[Lease]
    warnings: list[str]
    video: int = 0
    kinds: Counter[RequestKind] = field(default_factory=Counter)


class Warnings(logging.Handler):
    """Keeps warnings of the cache."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one."""
        if record.name == "xenmapcache":
            self.texts.append(record.getMessage())


@contextmanager
def watched(booted: Booted) -> Iterator[None]:
    """Count requests, and map some of the guest's memory again after each INVALIDATE."""
    invalidated, ended = threading.Event(), threading.Event()

    def see(event: Event) -> None:
        if isinstance(event, RequestHandled):
            booted.kinds[RequestKind(event.kind)] += 1
            if event.kind == RequestKind.INVALIDATE:
                invalidated.set()

    def look() -> None:
        while not ended.is_set():
            for address in LOOKED_AT:
                with suppress(FaultError):
                    booted.cache.read(address, 8)
            invalidated.wait()
            invalidated.clear()

    thread = threading.Thread(target=look)
    thread.start()
    try:
        with booted.server.observe(see):
            yield
    finally:
        ended.set()
        invalidated.set()
        thread.join(60)


@pytest.fixture(scope="module")
def booted(guest_console: Callable[[str], str], hvm_guests: None) -> Iterator[Booted]:
    """The guest, whose script has ended."""
    if reason := stock.missing():
        pytest.skip(reason)
    with ExitStack() as stack:
        guest = stack.enter_context(
            stock_guest(
                SCRIPT,
                guest_console,
                guest_type="hvm",
                vcpus=1,
                arguments="vga=0x343",
                device_model_args=["-trace", "handle_ioreq"],
            )
        )
        backend = stack.enter_context(open_backend("xen", domid=guest.domid))
        cache = MapCache(backend)
        stack.callback(cache.close, force=True)
        warnings = Warnings()
        logging.getLogger("xenmapcache").addHandler(warnings)
        stack.callback(logging.getLogger("xenmapcache").removeHandler, warnings)
        server = IoreqServer(guest.domid, cache, buffered=True)
        device = Recorder()
        function = PciFunction(server, BDF, vendor=0x1B36, device=0x10F0, class_code=0xFF0000)
        function.add_bar(0, 4096, device)
        function.plug()
        server.claim_mmio(VGA_WINDOW, VGA_BYTES, Recorder())
        place = next(at for at, size in cache.present(MEMORY * MiB, 32 * MiB) if size >= VIDEO_SIZE)
        screen = cache.map_device(place, VIDEO_SIZE, owner="screen")
        screen.view[MARK_AT : MARK_AT + len(MARK)] = MARK
        dma = [
            cache.map_dma(8 * MiB, 512, owner=f"disk{direction.value}", direction=direction)
            for direction in DmaDirection
        ]
        booted = Booted(guest, cache, server, function, device, screen, dma, warnings.texts)
        stack.enter_context(server)
        stack.enter_context(watched(booted))
        stack.enter_context(server.serving())
        guest.unpause()
        guest.wait("end")
        booted.video = int(guest.wait("video"), 16)
        yield booted


def qemu_log(domain: str) -> dict[str, Any]:
    """What `xenmapcache qemu-log` tells of the guest's QEMU."""
    log = Path(f"/var/log/xen/qemu-dm-{domain}.log")
    command = [sys.executable, "-m", "xenmapcache", "qemu-log", "--json", str(log)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (file,) = json.loads(done.stdout)["files"]
    return dict(file)


def invalidations_of_qemu() -> int:
    """How many INVALIDATEs the log of the guest's QEMU has."""
    return int(qemu_log(NAME)["invalidations"]["count"])


def test_a_device_next_to_qemus(booted: Booted) -> None:
    """Firmware and Linux find our PCI function on QEMU's bus, and its BAR is served by us."""
    assert {"0x8086", "0x1234", "0x1b36"} <= set(booted.guest.wait("ids").split())
    ((offset, size, value),) = booted.device.reads
    assert (offset, size) == (0, 4)
    assert int(booted.guest.wait("memory"), 16) == value
    assert booted.device.writes == [(8, 4, 0x89ABCDEF)]
    assert booted.kinds[RequestKind.PCI_CONFIG] > 100
    assert (booted.server.failures, booted.server.lost_answers) == (0, 0)


def test_buffered_requests(booted: Booted, record_property: Callable[[str, object], None]) -> None:
    """What the firmware writes to the screen comes through the ring; so does a change of clock."""
    assert booted.server.buffered_requests > 50
    assert booted.kinds[RequestKind.TIMEOFFSET] >= 1
    record_property(
        "measured",
        f"{booted.server.buffered_requests} of {booted.server.requests} requests were buffered: "
        + ", ".join(f"{count} {kind.name}" for kind, count in booted.kinds.items()),
    )


def test_no_invalidate_is_lost(
    booted: Booted, record_property: Callable[[str, object], None]
) -> None:
    """QEMU and our server get the same INVALIDATEs; what was mapped in between is not stale."""
    asked = booted.server.invalidations
    assert invalidations_of_qemu() == asked == booted.kinds[RequestKind.INVALIDATE]
    assert asked > 20
    with held_still(booted.guest.domid):
        for address in LOOKED_AT:
            fresh = booted.cache.backend.map(address >> 12, 256, writable=False)
            for offset in range(0, MiB, 4096):
                if fresh.valid(offset, 4096):
                    now = fresh.memory[offset : offset + 4096]
                    assert booted.cache.read(address + offset, 4096) == now, hex(address + offset)
    record_property("measured", f"{asked} INVALIDATEs while an HVM guest boots")


def test_dma_across_them_is_reported(booted: Booted) -> None:
    """Each DMA lease is warned of once, at the first INVALIDATE; a device lease never."""
    assert len(booted.warnings) == len(booted.dma)
    for lease, warning in zip(booted.dma, booted.warnings, strict=True):
        assert f"DMA lease of '{lease.owner}'" in warning
        assert lease.stale
    assert not booted.screen.stale


def test_the_screen_moves(booted: Booted) -> None:
    """`replace` follows the screen's memory to where hvmloader has moved it: the same pages."""
    screen = booted.screen
    old, place = screen.address, screen.host_address
    with pytest.raises(FaultError):
        booted.cache.read(old, 8)
    booted.cache.replace(old, booted.video, screen.length)
    assert (screen.address, screen.host_address, screen.stale) == (booted.video, place, False)
    assert bytes(screen.view[MARK_AT : MARK_AT + len(MARK)]) == MARK
    assert booted.cache.read(booted.video + MARK_AT, len(MARK)) == MARK


def test_what_is_drawn_is_tracked(booted: Booted) -> None:
    """`track_dirty_vram` tells which pages of the screen the guest has written, and no others."""
    backend, (gfn, count) = booted.cache.backend, (booted.video >> 12, WIDTH * HEIGHT * 4 >> 12)
    assert backend.track_dirty_vram(gfn, count) == [(gfn, count)]
    drawn: set[int] = set()

    def has_drawn() -> bool:
        for first, pages in backend.track_dirty_vram(gfn, count):
            drawn.update(range(first - gfn, first - gfn + pages))
        return len(drawn) > 4

    wait_for(has_drawn, "the guest's clock was drawn")
    rows = {page * 4096 // (WIDTH * 4) for page in drawn}
    assert max(rows) < 32, rows
    backend.track_dirty_vram(0, 0)


def test_a_picture_of_the_console(booted: Booted, tmp_path: Path) -> None:
    """examples/framebuffer.py saves what a real Linux shows: white text on red."""
    assert booted.guest.wait("screen").split() == ["800,600", str(WIDTH * 4)]
    picture = tmp_path / "screen.png"
    script = EXAMPLES / "framebuffer.py"
    command = [sys.executable, str(script), "--domid", str(booted.guest.domid)]
    command += ["--address", hex(booted.video), "--width", str(WIDTH), "--height", str(HEIGHT)]
    subprocess.run([*command, "-o", str(picture)], check=True, timeout=120)
    rows = pixels(picture)
    colours = Counter(row[i : i + 3] for row in rows for i in range(0, len(row), 3))
    (red, most), (white, _) = colours.most_common(2)
    assert red == bytes([0xAA, 0, 0])
    assert white == bytes([0xAA] * 3)
    assert most > WIDTH * HEIGHT // 2


@contextmanager
def modelled(booted: Booted, errors: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """Run tests/xen/model.py as the guest's third device model; what it logs goes to a file."""
    command = [sys.executable, "-m", "tests.xen.model", str(booted.guest.domid), *options]
    with (
        errors.open("w") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        try:
            assert line_of(process) == "ready", errors.read_text()
            yield process
        finally:
            process.kill()


def line_of(process: subprocess.Popen[str]) -> str:
    """The next line that it prints; '' if it ends or has nothing to say."""
    assert process.stdout is not None
    timer = threading.Timer(120, process.kill)
    timer.start()
    try:
        return process.stdout.readline().strip()
    finally:
        timer.cancel()


def wait_for_ports(booted: Booted, wanted: str, since: int) -> None:
    """Wait until the guest has read this from the model's ports, and what QEMU has from QEMU's."""
    pattern = re.compile(f"ports {wanted} (?!ff)[0-9a-f]{{2}}")

    def has_read() -> bool:
        return any(pattern.fullmatch(line) for line in booted.guest.said()[since:])

    try:
        wait_for(has_read, f"the guest has read {wanted}", 120)
    except AssertionError as error:
        raise AssertionError(f"{error}; it has read {booted.guest.said()[since:]}") from None


def balloon(booted: Booted, mib: int) -> None:
    """Tell the guest to change its memory by this much."""
    target = f"/local/domain/{booted.guest.domid}/memory/target"
    now = int(subprocess.check_output(["xenstore-read", target]))
    subprocess.run(["xenstore-write", target, str(now + mib * 1024)], check=True)


def test_a_restricted_process_next_to_qemu(booted: Booted, live_domid: int, tmp_path: Path) -> None:
    """A process without rights to other domains serves an HVM guest, and INVALIDATE too."""
    log, since = tmp_path / "log", len(booted.guest.said())
    others = f"04 {EPERM:02x} ff"  # of its own memory; of another domain's; from STUCK
    options = ("--restrict", "--recover", f"--other={live_domid}")
    with modelled(booted, log, *options) as process:
        wait_for_ports(booted, f"00 {others}", since)
        balloon(booted, -8)
        try:
            wait_for_ports(booted, f"(?!00)[0-9a-f]{{2}} {others}", since)
        finally:
            balloon(booted, 8)
        process.terminate()
        assert line_of(process) == f"ended {int(signal.SIGTERM)}", log.read_text()
    assert log.read_text() == ""  # no read has failed


def test_recover_next_to_qemu(booted: Booted, live_domid: int, tmp_path: Path) -> None:
    """A killed process's server is taken over, with the vCPU that waits; QEMU's and ours are not.

    The guest has one vCPU, so QEMU and our server get nothing from it until it is answered.
    """
    log, since = tmp_path / "log", len(booted.guest.said())
    with modelled(booted, tmp_path / "first") as process:
        assert line_of(process) == "asked"
        process.kill()
        process.wait(60)
    with modelled(booted, log, "--recover", f"--other={live_domid}") as process:
        wait_for_ports(booted, "00 04 00 ff", since)
        process.terminate()
        assert line_of(process) == f"ended {int(signal.SIGTERM)}"
    (warning,) = log.read_text().splitlines()
    assert re.search("takes over ioreq server [2-9] of .*; vCPUs that wait: 1$", warning), warning
    told, asked = invalidations_of_qemu(), booted.server.invalidations
    assert told == asked
    balloon(booted, -8)
    try:
        wait_for(lambda: booted.server.invalidations > asked, "an INVALIDATE for our server")
        wait_for(lambda: invalidations_of_qemu() > told, "an INVALIDATE for QEMU")
    finally:
        balloon(booted, 8)
    assert (booted.server.failures, booted.server.lost_answers) == (0, 0)


def pixels(picture: Path) -> list[bytes]:
    """The rows of a PNG as the example writes it, three bytes a pixel."""
    data = picture.read_bytes()
    start = data.index(b"IDAT")
    length = int.from_bytes(data[start - 4 : start], "big")
    raw = zlib.decompress(data[start + 4 : start + 4 + length])
    stride = WIDTH * 3 + 1
    return [raw[at + 1 : at + stride] for at in range(0, len(raw), stride)]
