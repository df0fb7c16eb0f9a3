"""Take the pictures of docs/observing.md: the page of ``xenmapcache timeline`` in a browser.

    python docs/screenshots.py

It records a run of a mock guest with three devices, draws the recording, and has Chromium
(Debian's package, without a display) take pictures of the page. It needs the extra ``timeline``.
Look at the pictures before you commit them.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Final

from matplotlib.image import imread, imsave

from xenmapcache import DmaDirection, MapCache, MockHypervisor, open_backend, record
from xenmapcache.cli import main as xenmapcache
from xenmapcache.devicemodel import IoreqServer

OUT: Final = Path(__file__).parent / "_static"
SHOTS: Final = {
    "timeline-light.png": (1200, 1030, "1"),
    "timeline-dark.png": (1200, 600, "0"),
    "timeline-phone.png": (390, 1110, "1"),
}
"""Width, height, and the colour scheme as Blink numbers it."""
FRAME: Final = (
    "<!doctype html><style>body{{margin:0;background:#888}}iframe{{border:0}}</style>"
    '<iframe src="{page}" width="{width}" height="{height}"></iframe>'
)
"""Chromium's windows have a least width; a frame has none."""
_LEAST_WIDTH = 500

TO, FROM, BOTH = DmaDirection.TO_DEVICE, DmaDirection.FROM_DEVICE, DmaDirection.BIDIRECTIONAL


class Disk:
    """A disk that reads 64 KiB for each command. One of its transfers is slow."""

    def __init__(self, cache: MapCache) -> None:
        self._cache = cache
        self._commands = 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Begin a transfer."""
        del offset, size
        self._commands += 1
        lease = self._cache.map_dma(value, 0x10000, owner="disk0", direction=FROM)
        if self._commands == 12:
            threading.Timer(0.25, lease.release).start()
        else:
            time.sleep(0.004)
            lease.release()


def run(path: Path) -> None:
    """Record a second of a guest that boots, works, and balloons twice."""
    guest = MockHypervisor().create_domain(memory="64M")
    with open_backend("mock", domain=guest) as backend, MapCache(backend) as cache:
        server = IoreqServer(guest, cache)
        server.claim_ports(0x1F0, 8, Disk(cache))
        with record(cache, path) as recorder:
            recorder.add(server.observe)
            with server, server.serving():
                vga = cache.map_device(0xA00000, 0x20000, owner="vga")
                ring = cache.map_dma(0x3F12000, 0x1000, owner="net ring", direction=BOTH)
                for number in range(40):
                    guest.port_out(0x1F0, 0x100000 + number % 24 * 0x20000)
                    with cache.map_dma(
                        0x2000000 + number * 0x800, 0x800, owner="net", direction=TO
                    ):
                        time.sleep(0.003)
                    if number == 13:
                        guest.balloon_out(0x3000000, 0x400000)
                    elif number == 30:
                        guest.balloon_out(0x3400000, 0x200000)
                for lease in (ring, vga):
                    lease.release()
                while cache.leases():
                    time.sleep(0.01)


def take(page: Path, name: str) -> None:
    """Take one picture."""
    width, height, scheme = SHOTS[name]
    frame = page.with_name("frame.html")
    frame.write_text(FRAME.format(page=page.as_uri(), width=width, height=height))
    subprocess.run(  # noqa: S603 - the arguments are this script's
        [  # noqa: S607 - wherever the package has put it
            "chromium",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--virtual-time-budget=20000",
            f"--blink-settings=preferredColorScheme={scheme}",
            f"--user-data-dir={page.parent / 'profile'}",
            f"--window-size={max(width, _LEAST_WIDTH)},{height}",
            f"--screenshot={OUT / name}",
            frame.as_uri(),
        ],
        check=True,
        stderr=subprocess.DEVNULL,
        timeout=120,
    )
    if width < _LEAST_WIDTH:
        imsave(OUT / name, imread(OUT / name)[:, :width])


def main() -> int:
    """Record, draw, and take all pictures."""
    if not shutil.which("chromium"):
        print("docs/screenshots.py needs chromium: apt-get install chromium")  # noqa: T201 - a script
        return 1
    with tempfile.TemporaryDirectory() as folder:
        recording, page = Path(folder, "run.jsonl"), Path(folder, "run.html")
        run(recording)
        if status := xenmapcache(["timeline", str(recording), "-o", str(page)]):
            return status
        for name in SHOTS:
            take(page, name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
