"""examples/block_device.py serves a real Linux guest."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from errno import EIO
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.xen.agent import MEMORY, NAME, Agent, AgentGuest, Operation
from tests.xen.conftest import (
    EXAMPLES,
    Serve,
    Served,
    balloon,
    load_example,
    set_memory,
    wait_for,
    xl,
)
from xenmapcache import MapCache, open_backend
from xenmapcache.address import PAGE_SHIFT, PAGE_SIZE, MiB

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
        set_memory(served.machine, NAME, MEMORY - 20)
        written, read, _, _ = transfers.result(120)
        amid = server.invalidations
        balloon(served, MEMORY - 20, full=full)
    assert amid
    assert written == read
    assert zlib.crc32(disk.read_bytes()[: LENGTH // 2]) == written
    assert (server.failures, served.cache.stats().stale_dma_released) == (0, 0)


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


class Image(NamedTuple):
    """A guest that was saved amid its work with the disk, and what the device was at."""

    file: Path
    agent: Agent  # the old one
    state: dict[str, list[int]]


@pytest.fixture
def saved_guest(agent_guest: AgentGuest) -> Iterator[AgentGuest]:
    """The guest; nobody after this test gets it, because it was restored."""
    yield agent_guest
    agent_guest.destroy()


@contextmanager
def restored(serve: Serve, agent: Agent, image: Path) -> Iterator[tuple[Served, Future[list[int]]]]:
    """Restore a guest and serve its agent; it is paused, amid an order of that other agent."""
    xl("restore", "-p", str(image))
    with serve(restored=True) as served:
        yield served, served.agent.adopt(agent)


def result(end: Future[list[int]], guest_console: Callable[[str], str]) -> list[int]:
    """Wait for what a restored guest says, or show what its kernel said."""
    try:
        return end.result(250)
    except TimeoutError:
        vcpus = subprocess.run(["xl", "vcpu-list", NAME], capture_output=True, text=True).stdout
        pytest.fail(f"the restored guest does not go on:\n{vcpus}{guest_console(NAME)[-1500:]}")


def content(image: Path, agent: Agent, length: int) -> bytes:
    """What the agent's buffer holds in an image."""
    with open_backend("save", path=image) as backend, MapCache(backend) as cache:
        gfns = agent.gfns()[: length // PAGE_SIZE]
        return b"".join(cache.read(gfn << PAGE_SHIFT, PAGE_SIZE) for gfn in gfns)


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["write", "read"])
def test_saved_and_restored_in_use(
    serve: Serve,
    saved_guest: AgentGuest,
    guest_console: Callable[[str], str],
    disk: Path,
    tmp_path: Path,
    direction: str,
) -> None:
    """Not a sector is lost, though the device had a command that it had not carried out."""
    example, image = load_example("block_device"), tmp_path / "guest.save"
    command = {"write": example.WRITE, "read": example.READ}[direction]
    with serve() as served:
        agent = served.agent
        agent.gfns()  # for later
        with example.BlockDevice(served.server, served.cache, disk) as old:
            agent.start(Operation.DISK, PORT, LENGTH, 64, 7)

            def is_amid() -> bool:
                pending = old.state()["pending"]
                return pending is not None and pending[0] == command and pending[1] > 4096

            wait_for(is_amid, "the guest uses the disk", 120)
            served.server.suspend()
            wait_for(lambda: old.state()["pending"] is not None, "a command is held back")
            xl("save", NAME, str(image))
            state = json.loads(json.dumps(old.state()))
            served.server.close()
            assert old.state() == state
        assert served.server.failures == 0
    assert state["pending"][0] == command

    moved = state["pending"][1] * 512
    in_memory, on_disk = content(image, agent, LENGTH), disk.read_bytes()
    assert in_memory[:moved] == on_disk[:moved]
    nothing = on_disk if direction == "write" else in_memory
    assert nothing[moved:LENGTH] == bytes(LENGTH - moved)

    with (
        restored(serve, agent, image) as (served, end),
        example.BlockDevice(served.server, served.cache, disk, state=state) as new,
    ):
        xl("unpause", NAME)
        written, read, writes, reads = result(end, guest_console)
        assert new.transfers < writes + reads
        assert (served.server.failures, served.cache.stats().stale_dma_released) == (0, 0)
        assert served.agent.checksum(0, LENGTH) == read
        assert content_of_guest(served, agent) == disk.read_bytes()[:LENGTH]
    assert written == read == zlib.crc32(disk.read_bytes()[:LENGTH])
    assert disk.read_bytes()[LENGTH:] == bytes(MiB)


def content_of_guest(served: Served, agent: Agent) -> bytes:
    """What the agent's buffer holds now."""
    gfns = agent.gfns()[: LENGTH // PAGE_SIZE]
    return b"".join(served.cache.read(gfn << PAGE_SHIFT, PAGE_SIZE) for gfn in gfns)


@pytest.mark.slow
def test_the_program_saved_and_restored(
    serve: Serve,
    saved_guest: AgentGuest,
    guest_console: Callable[[str], str],
    disk: Path,
    tmp_path: Path,
) -> None:
    """The same as an operator does it: SIGUSR1, xl save, SIGTERM, and a new process."""
    image, state = tmp_path / "guest.save", tmp_path / "disk.json"

    def program(domid: int) -> subprocess.Popen[str]:
        command = [sys.executable, str(EXAMPLES / "block_device.py"), "--domid", str(domid)]
        command += ["--disk", str(disk), "--state", str(state)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def says(process: subprocess.Popen[str], start: str) -> None:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(start)

    def ends(process: subprocess.Popen[str]) -> None:
        process.terminate()
        assert process.wait(60) == 0

    with serve() as served, program(served.domid) as process:
        try:
            says(process, "serving domain")
            agent = served.agent
            agent.start(Operation.DISK, PORT, LENGTH, 64, 9)
            wait_for(lambda: any(disk.read_bytes()[MiB : 2 * MiB]), "the guest uses the disk", 120)
            process.send_signal(signal.SIGUSR1)
            says(process, "suspended")
            xl("save", NAME, str(image))
            ends(process)
        finally:
            process.kill()
    assert json.loads(state.read_text())["pending"] is not None
    with (
        restored(serve, agent, image) as (served, end),
        program(served.domid) as process,
    ):
        try:
            says(process, "serving domain")
            assert not state.exists()
            xl("unpause", NAME)
            written, read, _, _ = result(end, guest_console)
            ends(process)
        finally:
            process.kill()
    assert written == read == zlib.crc32(disk.read_bytes()[:LENGTH])
    assert json.loads(state.read_text())["pending"] is None
