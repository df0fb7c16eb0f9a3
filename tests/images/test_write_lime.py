"""write_lime(): every byte comes back, and each header is as LiME writes it."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from xenmapcache import MapCache, MockHypervisor, open_backend, write_lime
from xenmapcache.address import PAGE_SIZE, MiB

from . import linux_guest


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "guest.lime"


@pytest.mark.parametrize("cached", [True, False])
def test_every_byte_comes_back(file: Path, cached: bool) -> None:
    """From a live guest to the file and back: all pages equal, all holes holes."""
    guest = linux_guest.create()
    with open_backend("mock", domain=guest) as live, MapCache(live) as cache:
        written = write_lime(cache if cached else live, file)
        present = list(cache.present(0, guest.memory_end))
    with open_backend("raw", path=file) as backend, MapCache(backend) as cache:
        assert list(cache.present(0, cache.memory_end or 0)) == present
        for address, length in present:
            assert cache.read(address, length) == guest.read(address, length)
    assert written == sum(length for _, length in present) // PAGE_SIZE
    assert file.stat().st_mode & 0o777 == 0o600


def test_the_headers(file: Path) -> None:
    """Magic, version, first and last address, and eight zeros, before each range."""
    guest = MockHypervisor().create_domain(memory="4M", holes=[(0x3000, 0x1000)])
    guest.write(0x1000, b"one")
    guest.write(0x4000, b"two")
    with open_backend("mock", domain=guest) as source:
        assert write_lime(source, file, length=0x6000) == 5
    data = file.read_bytes()
    assert struct.unpack_from("<IIQQQ", data) == (0x4C694D45, 1, 0, 0x2FFF, 0)
    assert data[32 + 0x1000 :].startswith(b"one")
    second = 32 + 0x3000
    assert struct.unpack_from("<IIQQQ", data, second) == (0x4C694D45, 1, 0x4000, 0x5FFF, 0)
    assert data[second + 32 :].startswith(b"two")
    assert len(data) == second + 32 + 0x2000


def test_memory_that_begins_with_a_hole(file: Path) -> None:
    """The first range begins where the first page is."""
    guest = MockHypervisor().create_domain(memory="4M", holes=[(0, 0x1000)])
    with open_backend("mock", domain=guest) as source:
        assert write_lime(source, file, length=0x3000) == 2
        assert struct.unpack_from("<IIQQQ", file.read_bytes())[2:4] == (0x1000, 0x2FFF)
        assert write_lime(source, file, length=0x1000) == 0
    assert file.read_bytes() == b""


def test_zeros_take_no_room(file: Path) -> None:
    """Pages of zeros are gaps in the file, the last ones too."""
    guest = MockHypervisor().create_domain(memory="64M")
    guest.write(32 * MiB, b"the only page")
    with open_backend("mock", domain=guest) as source:
        write_lime(source, file)
    assert file.stat().st_size == 64 * MiB + 32
    assert file.stat().st_blocks * 512 < MiB


def test_an_end_leaves_nothing(file: Path) -> None:
    """What the callback raises ends the work, and no file is there."""

    def stop(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with open_backend("mock", memory="4M") as source:
        with pytest.raises(KeyboardInterrupt):
            write_lime(source, file, progress=stop)
    assert os.listdir(file.parent) == []
