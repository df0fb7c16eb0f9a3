"""examples/block_device.py serves a real Linux guest."""

from __future__ import annotations

import subprocess
import sys
import zlib
from errno import EIO
from pathlib import Path

import pytest

from tests.xen.agent import MEMORY, NAME, Operation
from tests.xen.conftest import EXAMPLES, Served, balloon, load_example, xl
from xenmapcache.address import PAGE_SIZE, MiB

pytestmark = pytest.mark.xen

PORT = 0x510
LENGTH = 8 * MiB


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A disk of zeros, larger than what the guest writes."""
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(LENGTH + MiB))
    return path


def test_the_program_serves_the_guest(served: Served, disk: Path) -> None:
    """8 MiB at mixed sizes come back as they were written, and are what the file holds."""
    agent = served.agent.on(1)
    command = [sys.executable, str(EXAMPLES / "block_device.py")]
    command += ["--domid", str(served.domid), "--disk", str(disk)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("serving domain")
            written, read, writes, reads = agent.use_disk(PORT, LENGTH, seed=3)
            process.terminate()
            assert process.wait(60) == 0
        finally:
            process.kill()
    assert written == read
    content = disk.read_bytes()
    assert zlib.crc32(content[:LENGTH]) == written
    assert content[LENGTH:] == bytes(MiB)
    assert min(writes, reads) > LENGTH // (256 * 512)
    assert agent.port_in(PORT) == 0xFFFFFFFF


def test_it_serves_while_the_guest_balloons(served: Served, disk: Path) -> None:
    """INVALIDATEs amid the transfers harm none of them."""
    server, full = served.server, served.agent.total()
    with load_example("block_device").BlockDevice(server, served.cache, disk):
        transfers = served.agent.start(Operation.DISK, PORT, LENGTH // 2, 256, 5)
        xl("mem-set", NAME, str(MEMORY - 20))
        written, read, _, _ = transfers.result(120)
        amid = server.invalidations
        balloon(served, MEMORY - 20, full=full)
    assert amid
    assert written == read
    assert zlib.crc32(disk.read_bytes()[: LENGTH // 2]) == written
    assert (server.failures, served.cache.stats().stale_dma) == (0, 0)


def test_a_transfer_without_memory(served: Served, disk: Path) -> None:
    """A transfer over a page that the guest has given up fails, and the next one does not."""
    agent = served.agent
    with load_example("block_device").BlockDevice(served.server, served.cache, disk):
        agent.give(20)
        with pytest.raises(OSError, match="Input/output error") as caught:
            agent.use_disk(PORT, 32 * PAGE_SIZE)
        assert caught.value.errno == EIO
        agent.take(20)
        written, read, _, _ = agent.use_disk(PORT, 32 * PAGE_SIZE)
        assert written == read
