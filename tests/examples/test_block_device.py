"""examples/block_device.py while its guest is saved and restored, on the mock."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples import block_device
from examples.block_device import READ, SECTOR_SIZE, WRITE, BlockDevice, Driver
from tests.kit import in_thread
from xenmapcache import MapCache, MockDomain, MockHypervisor, open_backend
from xenmapcache.devicemodel import IoreqServer

SOURCE, TARGET, SECTORS = 0x10_0000, 0x20_0000, 64


@pytest.fixture
def guest() -> MockDomain:
    guest = MockHypervisor().create_domain(memory="4M", vcpus=2)
    guest.write(SOURCE, b"".join(bytes([sector]) * SECTOR_SIZE for sector in range(1, SECTORS + 1)))
    return guest


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SECTORS * SECTOR_SIZE))
    return path


@pytest.fixture
def cache(guest: MockDomain) -> Iterator[MapCache]:
    with open_backend("mock", domain=guest) as backend, MapCache(backend) as cache:
        yield cache


def fill(driver: Driver, first: int) -> None:
    """Write one sector after the other, as long as it goes well."""
    for sector in range(first, SECTORS):
        if not driver.transfer(WRITE, sector, SOURCE + sector * SECTOR_SIZE, 1):
            return


def restored(guest: MockDomain, path: Path, state: str, first: int) -> int:
    """Let a restored guest go on; returns how many transfers its disk did."""
    with (
        open_backend("mock", domain=guest) as backend,
        MapCache(backend, on_stale="raise") as cache,
    ):
        server = IoreqServer(guest, cache)
        disk = BlockDevice(server, cache, path, state=json.loads(state))
        with disk, server, server.serving():
            driver = Driver(guest)
            assert driver.finish()
            fill(driver, first)
            assert driver.transfer(READ, 0, TARGET, SECTORS)
            assert server.failures == 0
        return disk.transfers


def test_saved_and_restored_in_use(guest: MockDomain, cache: MapCache, path: Path) -> None:
    """The image and the disk are of one moment, and the next process does what was not done."""
    server = IoreqServer(guest, cache, answer_timeout=0.01)  # a vCPU that stands still takes none
    with BlockDevice(server, cache, path) as disk, server, server.serving():
        thread, _ = in_thread(lambda: fill(Driver(guest), 0))
        while disk.transfers < 10:
            pass
        server.suspend()
        while disk.state()["pending"] is None:  # the guest runs until it has suspended itself
            pass
        image = guest.suspend()
        image.send()
        state = json.dumps(disk.state())
        content = path.read_bytes()
        server.close()
    assert json.loads(state) == disk.state()
    guest.resume()  # it sees no disk, and gives up
    thread.join()

    command, sector, address, _, count = json.loads(state)["pending"]
    assert (command, count, address) == (WRITE, 1, SOURCE + sector * SECTOR_SIZE)
    done = sector * SECTOR_SIZE
    assert content[:done] == image.read(SOURCE, done)
    assert not any(content[done:])
    assert path.read_bytes() == content

    successor = MockHypervisor().restore(image)
    transfers = restored(successor, path, state, sector + 1)
    assert transfers == SECTORS - sector + 1
    everything = image.read(SOURCE, SECTORS * SECTOR_SIZE)
    assert path.read_bytes() == successor.read(TARGET, len(everything)) == everything


def test_a_failure_is_handed_over(guest: MockDomain, cache: MapCache, path: Path) -> None:
    """A guest that had not yet looked at the status sees it after the restore."""
    server = IoreqServer(guest, cache)
    with BlockDevice(server, cache, path) as disk, server, server.serving():
        driver = Driver(guest)
        driver.start(READ, SECTORS, TARGET, 1)
        server.suspend()
        state = disk.state()
    assert state == {"registers": [SECTORS, TARGET, 0, 1], "pending": None, "failed": True}
    server = IoreqServer(guest, cache)
    with BlockDevice(server, cache, path, state=state), server, server.serving():
        assert not driver.finish()


def test_a_guest_that_balloons_while_transfers_wait(
    guest: MockDomain, cache: MapCache, path: Path
) -> None:
    """INVALIDATE waits for no transfer that waits for resume()."""
    server = IoreqServer(guest, cache)
    with BlockDevice(server, cache, path) as disk, server, server.serving():
        driver = Driver(guest)
        server.suspend()
        driver.start(WRITE, 3, SOURCE, 1)
        guest.balloon_out(0x30_0000, 0x1000)
        assert server.invalidations
        assert disk.state()["pending"] == [WRITE, 3, SOURCE, 0, 1]
        server.resume()
        assert driver.finish()
        assert cache.stats().stale_dma_released == 0
    assert path.read_bytes()[3 * SECTOR_SIZE :][:SECTOR_SIZE] == guest.read(SOURCE, SECTOR_SIZE)


def test_a_transfer_that_waits_ends_with_the_server(
    guest: MockDomain, cache: MapCache, path: Path
) -> None:
    """It stays pending, and nothing of it is done."""
    server = IoreqServer(guest, cache)
    with BlockDevice(server, cache, path) as disk, server, server.serving():
        server.suspend()
        Driver(guest).start(WRITE, 3, SOURCE, 1)
        closing = threading.Thread(target=server.close)
        closing.start()
        closing.join()
    assert disk.state()["pending"] == [WRITE, 3, SOURCE, 0, 1]
    assert not any(path.read_bytes())


def test_sigterm_while_the_state_is_kept(
    guest: MockDomain, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After `xl save` the guest has ended, and the server with it, when the signal comes."""
    kept = tmp_path / "disk.json"

    def ended(*arguments: object, **options: object) -> IoreqServer:
        server = IoreqServer(*arguments, **options)  # type: ignore[arg-type] # the example's
        server.stop()
        return server

    def interrupted(file: Path, text: str) -> None:
        signal.raise_signal(signal.SIGTERM)
        file.write_bytes(text.encode())

    monkeypatch.setattr(
        block_device, "open_backend", lambda *_, **__: open_backend("mock", domain=guest)
    )
    monkeypatch.setattr(block_device, "IoreqServer", ended)
    monkeypatch.setattr(Path, "write_text", interrupted)
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in numbers}
    signal.signal(signal.SIGTERM, lambda *_: pytest.fail("it would end the process"))
    try:
        block_device.serve(guest, str(path), kept)  # type: ignore[arg-type] # as a server takes it
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert json.loads(kept.read_bytes())["pending"] is None
