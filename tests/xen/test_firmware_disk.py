"""The firmware of an HVM guest, SeaBIOS, boots from a disk of ours, with its own virtio driver."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.xen.conftest import Recorder, wait_for, xl
from xenmapcache import MapCache, open_backend
from xenmapcache.devicemodel import IoreqServer
from xenmapcache.devicemodel.virtio import VirtioBlock, VirtioPci

pytestmark = pytest.mark.xen

NAME = "firmware"
CONFIG = f"""
name = "{NAME}"
type = "hvm"
memory = 64
vcpus = 1
vga = "none"
on_crash = "destroy"
on_reboot = "destroy"
"""
SUM, DONE = 0x600, 0x604
SECTOR, READ, WRITTEN, COUNT = 512, 1, 128, 64
BOOT = bytes.fromhex(
    "31c0 8ed8 8ed0 bc007c"  #    registers and stack
    "be007d b442 cd13 7234"  #    INT 13h, AH=42h: read, as the packet at 0x7d00 says, to 0x10000
    "b80010 8ec0 31ff 6631c0 b90020"
    "26660305 83c704 e2f7"  #     add up the 32-bit words
    "ba0006 66ef"  #              the sum goes to port SUM
    "66c706087d80000000"  #       in the packet: sector WRITTEN
    "b280 b80043 cd13 7207"  #    INT 13h, AH=43h: write
    "ba0406 b80d60 ef"  #         0x600d goes to port DONE
    "f4 ebfd"
)
PACKET = struct.pack("<BxHHHQ", 16, COUNT, 0, 0x1000, READ)


@pytest.fixture
def guest(hvm_guests: None, tmp_path: Path) -> Iterator[int]:
    """A guest with nothing but its firmware, which has not run yet."""
    config = tmp_path / "firmware.cfg"
    config.write_text(CONFIG)
    xl("create", "-q", "-p", str(config))
    try:
        yield int(subprocess.check_output(["xl", "domid", NAME]))
    finally:
        subprocess.run(["xl", "destroy", NAME], capture_output=True, check=False)


def test_the_firmware_boots_from_the_disk(guest: int, tmp_path: Path) -> None:
    """The boot sector runs, reads 64 sectors, and writes them elsewhere."""
    data = os.urandom(COUNT * SECTOR)
    boot = BOOT.ljust(0x100, b"\0") + PACKET
    disk = tmp_path / "disk.img"
    with disk.open("w+b") as file:
        file.write(boot.ljust(SECTOR - 2, b"\0") + b"\x55\xaa" + data)
        file.truncate(1 << 20)
    device = Recorder()
    with (
        open_backend("xen", domid=guest) as backend,
        MapCache(backend) as cache,
        disk.open("r+b") as file,
    ):
        server = IoreqServer(guest, cache)
        with VirtioBlock(server, file) as block:
            VirtioPci(server, "0000:00:05.0", block, class_code=0x010000).plug()
            server.claim_ports(SUM, 8, device)
            with server, server.serving():
                xl("unpause", str(guest))
                wait_for(lambda: len(device.writes) == 2, "the boot sector is done", 120)
        assert server.failures == 0
    total = sum(struct.unpack(f"<{len(data) // 4}I", data)) & 0xFFFFFFFF
    assert device.writes == [(0, 4, total), (DONE - SUM, 2, 0x600D)]
    content = disk.read_bytes()
    assert content[WRITTEN * SECTOR :][: len(data)] == content[READ * SECTOR :][: len(data)] == data
