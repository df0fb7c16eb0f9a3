"""Device models that serve a real Linux guest: what it does to ports and to device memory."""

from __future__ import annotations

import asyncio
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from errno import EPERM
from pathlib import Path

import pytest

from tests.xen import model
from tests.xen.agent import Operation
from tests.xen.conftest import Recorder, Serve, Served, wait_for, warnings_of, xl
from xenmapcache import MapCache, open_backend
from xenmapcache.address import MiB
from xenmapcache.devicemodel import IoreqServer

pytestmark = pytest.mark.xen

PORT = 0x700
MMIO = 0xF8000000
SIZES = (1, 2, 4)
COUNT = 5
EDGE = 2 * MiB
"""A place in the agent's buffer where one huge page ends and the next one begins, elsewhere."""
ONES = 0xFFFFFFFF


def joined(items: list[tuple[int, int, int]]) -> bytes:
    """The bytes of what a recorder was read or written, in its order."""
    return b"".join(value.to_bytes(size, "little") for _, size, value in items)


def turned(data: bytes, size: int, backward: bool) -> bytes:
    """Data in memory as a string instruction goes through it: its items in their order."""
    items = [data[i : i + size] for i in range(0, len(data), size)]
    return b"".join(reversed(items)) if backward else data


def string_places(size: int) -> list[int]:
    """Where a string is laid: over the edge of a page, with an item on the edge if it can be."""
    return [EDGE - 2 * size] if size == 1 else [EDGE - 2 * size, EDGE - 2 * size - 1]


# --- what a guest does ---------------------------------------------------------------


@pytest.mark.parametrize("cpu", [0, 1])
@pytest.mark.parametrize("binding", ["cffi", "ctypes"])
def test_ports(serve: Serve, cpu: int, binding: str) -> None:
    """`in` and `out` of every size, on either vCPU, with either binding, reach the device."""
    with serve(binding=binding) as served:
        agent, device = served.agent.on(cpu), Recorder()
        served.server.claim_ports(PORT, 0x10, device)
        for size in SIZES:
            read = agent.port_in(PORT + 4, size)
            assert device.reads[-1] == (4, size, read)
            agent.port_out(PORT + 8, 0x89ABCDEF, size)
            assert device.writes[-1] == (8, size, 0x89ABCDEF & (1 << 8 * size) - 1)
        assert (len(device.reads), len(device.writes)) == (len(SIZES), len(SIZES))


@pytest.mark.parametrize("cpu", [0, 1])
@pytest.mark.parametrize("backward", [False, True])
def test_port_strings(served: Served, cpu: int, backward: bool) -> None:
    """`rep ins` and `rep outs` move guest memory over a page's edge, both ways."""
    agent, device = served.agent.on(cpu), Recorder()
    served.server.claim_ports(PORT, 0x10, device)
    for size in SIZES:
        for place in string_places(size):
            length = COUNT * size
            agent.poke(EDGE - 32, b"\xee" * 64)
            agent.port_in_string(PORT, place, COUNT, size, backward=backward)
            came = turned(joined(device.reads), size, backward)
            around = bytearray(b"\xee" * 64)
            around[place - EDGE + 32 : place - EDGE + 32 + length] = came
            assert agent.peek(EDGE - 32, 64) == around
            agent.port_out_string(PORT, place, COUNT, size, backward=backward)
            assert turned(joined(device.writes), size, backward) == came
            assert {item[:2] for item in device.reads + device.writes} == {(0, size)}
            device.reads.clear()
            device.writes.clear()


@pytest.mark.parametrize("cpu", [0, 1])
def test_mmio(served: Served, cpu: int) -> None:
    """Loads and stores of every size, aligned or not, reach the device at the address."""
    agent, device = served.agent.on(cpu), Recorder()
    served.server.claim_mmio(MMIO, 0x2000, device)
    for size in (*SIZES, 8):
        for offset in (0x10, 0x1003):
            read = agent.load(MMIO + offset, size)
            assert device.reads == [(offset, size, read)]
            value = 0x8877665544332211 & (1 << 8 * size) - 1
            agent.store(MMIO + offset, value, size)
            assert device.writes == [(offset, size, value)]
            device.reads.clear()
            device.writes.clear()


@pytest.mark.parametrize("cpu", [0, 1])
@pytest.mark.parametrize("backward", [False, True])
def test_mmio_strings(served: Served, cpu: int, backward: bool) -> None:
    """`rep movs` and `rep stos` to and from device memory, over the edges of pages, both ways."""
    agent, device = served.agent.on(cpu), Recorder()
    served.server.claim_mmio(MMIO, 0x2000, device)
    for size in (*SIZES, 8):
        start = 0x1000 - 2 * size
        offsets = [start + i * size for i in range(COUNT)]
        steps = [(offset, size) for offset in (offsets[::-1] if backward else offsets)]
        for place in string_places(size):
            agent.load_string(MMIO + start, place, COUNT, size, backward=backward)
            assert [item[:2] for item in device.reads] == steps
            base = place & ~3
            length = (place - base + COUNT * size + 3) & ~3
            seen = agent.peek(base, length)[place - base :][: COUNT * size]
            assert seen == turned(joined(device.reads), size, backward)
            agent.store_string(MMIO + start, place, COUNT, size, backward=backward)
            assert [item[:2] for item in device.writes] == steps
            assert joined(device.writes) == joined(device.reads)
            device.reads.clear()
            device.writes.clear()
        value = 0x8877665544332211 & (1 << 8 * size) - 1
        agent.store_repeatedly(MMIO + start, value, COUNT, size, backward=backward)
        assert device.writes == [(*step, value) for step in steps]
        device.writes.clear()


def test_pci_config_space(served: Served) -> None:
    """What the guest does through 0xcf8 and 0xcfc reaches a PCI function's device."""
    agent, device = served.agent, Recorder()
    served.server.claim_pci("0000:00:05.0", device)
    agent.port_out(0xCF8, 1 << 31 | 5 << 11 | 0x10)
    read = agent.port_in(0xCFC)
    assert device.reads == [(0x10, 4, read)]
    agent.port_out(0xCFE, 0xABCD, 2)
    assert device.writes == [(0x12, 2, 0xABCD)]
    agent.port_out(0xCF8, 1 << 31 | 6 << 11)
    assert agent.port_in(0xCFC) == ONES


def test_what_nobody_claims(served: Served) -> None:
    """Ports that are not claimed, or no longer, read all ones; their neighbours are served."""
    agent, device = served.agent, Recorder()
    region = served.server.claim_ports(PORT, 4, device)
    assert agent.port_in(PORT + 4) == ONES
    assert not device.reads
    assert agent.port_in(PORT, 1) == device.reads[0][2]
    region.release()
    assert agent.port_in(PORT) == ONES
    assert len(device.reads) == 1


def test_both_vcpus_at_once(served: Served) -> None:
    """Two vCPUs that read at the same time both get every answer once, in order."""

    class Counter:
        def __init__(self) -> None:
            self.counts = {0: 0, 4: 0}

        def read(self, offset: int, size: int) -> int:
            self.counts[offset] += 1
            return self.counts[offset] - 1

        def write(self, offset: int, size: int, value: int) -> None:
            raise AssertionError("the guest only reads")

    served.server.claim_ports(PORT, 8, Counter())
    assert served.agent.count_on_both(PORT, 300) == (0, 0)
    assert not served.server.failures


def test_a_buffered_server(serve: Serve) -> None:
    """A server that takes buffered requests too serves the others as ever."""
    with serve(buffered=True) as served:
        device = Recorder()
        served.server.claim_ports(PORT, 4, device)
        for cpu in (0, 1):
            assert served.agent.on(cpu).port_in(PORT) == device.reads[-1][2]


# --- what goes wrong ------------------------------------------------------------------


def test_a_handler_that_raises(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    """The guest reads all ones and goes on; each failure is logged with its request."""
    agent, server = served.agent, served.server
    region = server.claim_ports(PORT, 8)

    @region.read
    def read(offset: int, size: int) -> int:
        if offset == 4:
            return 1 << 8 * size
        raise ZeroDivisionError("a fault of the device")

    @region.write
    def write(offset: int, size: int, value: int) -> None:
        raise ZeroDivisionError("a fault of the device")

    for size in SIZES:
        assert agent.port_in(PORT, size) == (1 << 8 * size) - 1
    assert agent.port_in(PORT + 4, 2) == 0xFFFF
    agent.port_out(PORT, 0x1234)
    agent.poke(0, bytes(16))
    agent.port_in_string(PORT, 0, 4)
    assert agent.peek(0, 16) == b"\xff" * 16
    assert server.failures == 6
    logged = warnings_of(caplog, "xenmapcache.devicemodel")
    assert len(logged) == 5  # a region's lines in ten seconds; the sixth is counted
    assert f"PORT write of 4 bytes at {PORT:#x}, data 0x1234" in logged[4]
    region.read(lambda offset, size: 7)
    assert agent.port_in(PORT) == 7


def test_closed_while_a_vcpu_waits(served: Served) -> None:
    """A server that is closed before it looked at a request answers it; the vCPU goes on."""
    device = Recorder()
    with MapCache(served.backend) as cache:
        server = IoreqServer(served.domid, cache)
        server.claim_ports(PORT, 4, device)
        with server:
            server.process_pending()  # Xen makes an event when a channel is bound
            answer = served.agent.start(Operation.IN, PORT, 4)
            assert select.select([server.fileno()], [], [], 60)[0], "no request"
            assert not answer.done()
        assert answer.result(60) == [device.reads[0][2]]
    assert served.agent.port_in(PORT) == ONES


def test_a_loop_of_ones_own(served: Served) -> None:
    """`fileno` tells when `process_pending` has something to answer, which it does at once."""
    with MapCache(served.backend) as cache:
        server = IoreqServer(served.domid, cache)
        server.claim_ports(PORT, 4, Recorder())
        with server:
            assert server.process_pending() == 0
            answer = served.agent.start(Operation.IN, PORT, 4)
            while not server.requests:
                assert select.select([server.fileno()], [], [], 60)[0], "no request"
                server.process_pending()
            assert answer.result(60) == [0x04030201]


def test_asyncio(served: Served) -> None:
    """In an event loop the device is served between other callbacks, INVALIDATE too."""
    agent, device = served.agent, Recorder()
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    async def main(server: IoreqServer) -> None:
        loop = asyncio.get_running_loop()
        serving = loop.create_task(server.serve_async())
        ticking = loop.create_task(tick())
        for _ in range(3):
            assert await loop.run_in_executor(None, agent.port_in, PORT) == device.reads[-1][2]
        await loop.run_in_executor(None, agent.renew, 0)
        ticking.cancel()
        server.stop()
        await serving

    with MapCache(served.backend) as cache:
        server = IoreqServer(served.domid, cache)
        server.claim_ports(PORT, 4, device)
        with server:
            asyncio.run(main(server))
            assert (len(device.reads), server.invalidations) == (3, 1)
    assert ticks
    assert agent.ping() in (0, 1)


def test_a_second_server(served: Served) -> None:
    """Two servers of one guest get what is theirs and every INVALIDATE; one may go."""
    agent, first, second = served.agent, Recorder(), Recorder()
    served.server.claim_ports(PORT, 4, first)
    with MapCache(served.backend) as cache:
        other = IoreqServer(served.domid, cache)
        other.claim_ports(PORT + 4, 4, second)
        with other, other.serving():
            assert other.id != served.server.id
            for cpu in (0, 1):
                agent.on(cpu).renew(cpu)
                assert agent.port_in(PORT) == first.reads[-1][2]
                assert agent.port_in(PORT + 4) == second.reads[-1][2]
                assert other.invalidations == served.server.invalidations == cpu + 1
        for cpu in (0, 1):
            assert agent.on(cpu).port_in(PORT) == first.reads[-1][2]
            assert agent.port_in(PORT + 4) == ONES
            agent.renew(cpu)
        assert (other.invalidations, served.server.invalidations) == (2, 4)


# --- processes ------------------------------------------------------------------------

Models = Callable[..., AbstractContextManager["subprocess.Popen[str]"]]


@pytest.fixture
def run_model(served: Served) -> Models:
    """Starts tests/xen/model.py on the guest; kills it at the end."""

    @contextmanager
    def run(*options: str) -> Iterator[subprocess.Popen[str]]:
        command = [sys.executable, "-m", "tests.xen.model", str(served.domid), *options]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert line_of(process) == "ready"
                yield process
            finally:
                process.kill()

    return run


def line_of(process: subprocess.Popen[str]) -> str:
    """The next line that it prints; '' if it ends or has nothing to say."""
    assert process.stdout is not None
    timer = threading.Timer(240, process.kill)
    timer.start()
    try:
        return process.stdout.readline().strip()
    finally:
        timer.cancel()


def end(process: subprocess.Popen[str]) -> None:
    """End it as an init system does, and see that it ends well."""
    process.terminate()
    assert line_of(process) == f"ended {int(signal.SIGTERM)}"
    assert process.wait(60) == 0


def test_sigterm(served: Served, run_model: Models) -> None:
    """SIGTERM ends `serve_forever`; the process destroys its server and exits with 0."""
    with run_model() as process:
        assert served.agent.port_in(model.PORT) == model.GREETING
        end(process)
        assert served.agent.port_in(model.PORT) == ONES


def test_killed_while_a_vcpu_waits(
    served: Served, run_model: Models, caplog: pytest.LogCaptureFixture
) -> None:
    """The next model carries out the read that the killed one had begun."""
    agent = served.agent.on(1)
    with run_model() as process:
        answer = agent.start(Operation.IN, model.PORT + model.STUCK, 4)
        assert line_of(process) == "asked"
        process.kill()
        process.wait(60)
    assert not answer.done()
    with run_model("--recover") as process:
        assert answer.result(60) == [model.GREETING - 1]
        assert agent.port_in(model.PORT) == model.GREETING
        agent.renew(0)
        assert agent.port_in(model.PORT) == model.GREETING + 1
        end(process)
    for cpu in (0, 1):
        agent.on(cpu).renew(cpu)
    assert served.server.invalidations == 3


def test_written_while_no_process_serves(served: Served, run_model: Models) -> None:
    """The next model carries the write out, and once."""
    agent = served.agent.on(1)
    with run_model() as process:
        assert agent.port_in(model.PORT) == model.GREETING
        process.kill()
        process.wait(60)
    written = agent.start(Operation.OUT, model.PORT + model.STORED, 4, 0x1234)
    with run_model("--recover") as process:
        written.result(60)
        assert agent.port_in(model.PORT + model.STORED) == 0x11234
        end(process)


RESTARTS = 6
ROUNDS = 5


@pytest.mark.parametrize(
    "number", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, ROUNDS))]
)
def test_killed_under_load_again_and_again(served: Served, run_model: Models, number: int) -> None:
    """A guest that uses the device without pause goes on after each of 30 kills and restarts.

    Five rounds of six: each start of Python takes seconds under emulation, and one test of all of
    them would take longer than the lab waits for a test that says nothing.
    """
    agent = served.agent.on(number % 2)
    reads = 1 << 18  # more than it comes to before the last kill
    loops: list[Future[list[int]]] = []
    for restart in range(RESTARTS):
        with run_model("--recover") as process:
            if not loops:
                loops.append(agent.start(Operation.LOOP, model.PORT, reads))
            before = agent_reads(process)
            wait_for(lambda: agent_reads(process) > before + 20, f"served after {restart} kills")  # noqa: B023 - called at once
            process.kill()
            process.wait(60)
        assert not loops[0].done()
    with run_model("--recover") as process:
        before = agent_reads(process)
        wait_for(lambda: agent_reads(process) > before + 20, "served by the last one")
        end(process)
    loops[0].result(600)  # all ones, quickly, until it ends


def agent_reads(process: subprocess.Popen[str]) -> int:
    """Ask a model by SIGUSR1 how many requests it has answered."""
    process.send_signal(signal.SIGUSR1)
    word, number = line_of(process).split()
    assert word == "requests"
    return int(number)


def test_closed_while_the_guest_is_paused(served: Served) -> None:
    """The answer is taken when the guest goes on, and only then the server is destroyed."""
    entered = threading.Event()

    def read(offset: int, size: int) -> int:
        entered.set()
        xl("pause", str(served.domid))
        return 0x12345678

    other = IoreqServer(served.domid, served.cache, answer_timeout=30.0)
    other.claim_ports(PORT, 4).read(read)
    other.open()
    thread = threading.Thread(target=other.serve_forever)
    thread.start()
    answer = served.agent.start(Operation.IN, PORT, 4)
    assert entered.wait(60)
    resume = threading.Timer(2.5, xl, ("unpause", str(served.domid)))
    resume.start()
    other.close()
    thread.join(60)
    resume.join()
    assert answer.result(60) == [0x12345678]
    assert other.lost_answers == 0


def test_saved_with_a_worker_that_writes(served: Served, tmp_path: Path) -> None:
    """Between suspend and resume nothing is written: both places of the image are of one moment."""
    low, high, stop = 0, 4 * MiB, threading.Event()

    def work() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            with served.server.transfer():
                for place in (low, high):
                    served.cache.write(served.agent.address(place), number.to_bytes(8, "little"))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        served.server.suspend()
        before = [served.cache.read(served.agent.address(place), 8) for place in (low, high)]
        image = tmp_path / "guest.save"
        xl("save", "-c", str(served.domid), str(image))
        addresses = [served.agent.address(place) for place in (low, high)]
        served.server.resume()
    finally:
        stop.set()
        thread.join(60)
    with open_backend("save", path=image) as backend, MapCache(backend) as cache:
        assert [cache.read(address, 8) for address in addresses] == before
    assert before[0] == before[1]


def test_close_in_another_thread(serve: Serve) -> None:
    """Serve_forever returns None, however busy the guest is."""
    with serve() as served:
        other = IoreqServer(served.domid, served.cache)
        other.claim_ports(PORT, 4).read(lambda offset, size: 5)
        other.open()
        results: list[object] = []
        thread = threading.Thread(target=lambda: results.append(other.serve_forever()))
        thread.start()
        loop = served.agent.on(1).start(Operation.LOOP, PORT, 2000)
        wait_for(lambda: other.requests > 100, "served")
        other.close()
        thread.join(60)
        loop.result(120)
        assert results == [None]


def test_a_restricted_server(served: Served, run_model: Models, live_domid: int) -> None:
    """A process without rights to other domains serves its own, and INVALIDATE too."""
    agent = served.agent
    with run_model("--restrict", f"--other={live_domid}") as process:
        for cpu in (0, 1):
            assert agent.on(cpu).port_in(model.PORT) == model.GREETING + cpu
            agent.renew(cpu)
            assert agent.port_in(model.PORT + model.OWN) == 4
        assert agent.port_in(model.PORT + model.OTHER) == EPERM
        end(process)
