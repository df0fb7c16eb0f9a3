"""The guest with the agent, and device models that serve it."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Final

import pytest

from tests.xen import agent as agents
from tests.xen.agent import Agent, AgentGuest
from tests.xen.lab.platform import Platform
from xenmapcache import Backend, MapCache, open_backend
from xenmapcache.devicemodel import IoreqServer


@dataclass
class Served:
    """A server in a thread of its own, through which the agent is given its orders."""

    domid: int
    machine: Platform
    backend: Backend
    cache: MapCache
    server: IoreqServer
    agent: Agent


@dataclass
class Recorder:
    """A device that answers with numbers of its own, and keeps what it was asked."""

    reads: list[tuple[int, int, int]] = field(default_factory=list)
    writes: list[tuple[int, int, int]] = field(default_factory=list)

    def read(self, offset: int, size: int) -> int:
        """Give a number that no read before was given, every byte of it another one."""
        start = 8 * len(self.reads) + 1
        value = int.from_bytes(bytes(i % 251 for i in range(start, start + size)), "little")
        self.reads.append((offset, size, value))
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        """Keep a number."""
        self.writes.append((offset, size, value))


EXAMPLES: Final = Path(__file__).parents[2] / "examples"
Serve = Callable[..., AbstractContextManager[Served]]
FAILED = pytest.StashKey[bool]()
AGENT = pytest.StashKey[AgentGuest]()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Let fixtures know whether their test has failed."""
    outcome = yield
    if outcome.get_result().failed:  # type: ignore[attr-defined] # pluggy sends it
        item.stash[FAILED] = True


@pytest.fixture(autouse=True)
def no_files_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Remove the files of a test: those of the lab's Dom0 lie in its memory.

    In a real Dom0, a test that has failed keeps its files.
    """
    folder = request.getfixturevalue("tmp_path") if "tmp_path" in request.fixturenames else None
    in_lab = request.config.getoption("xen_report") is not None
    yield
    if folder is not None and (in_lab or not request.node.stash.get(FAILED, False)):
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def hvm_guests(machine: Platform) -> None:
    """For a test that makes an HVM guest of its own, whatever the machine's other guests are."""
    if "hvm" not in machine.architecture.guests:
        pytest.skip("this machine has no HVM guests")
    if machine.dom0 != "pv":
        pytest.skip("QEMU for HVM guests has only been tried in a PV Dom0")


@pytest.fixture(scope="session")
def agent_guest(
    request: pytest.FixtureRequest, live_domid: int, machine: Platform
) -> Iterator[AgentGuest]:
    """The guest; it boots when its domid is first asked for, and again if it was destroyed."""
    if not machine.architecture.ports:
        pytest.skip("the agent is given its orders by I/O ports, and this machine has none")
    if reason := agents.missing():
        pytest.skip(reason)
    guest = AgentGuest(machine.guest)
    guest.destroy()  # of a pytest that died
    request.config.stash[AGENT] = guest
    yield guest
    del request.config.stash[AGENT]
    guest.destroy()


@pytest.fixture(autouse=True)
def agent_rests(request: pytest.FixtureRequest) -> None:
    """Leave the processor to those tests that have no use for the guest with the agent."""
    guest = request.config.stash.get(AGENT, None)
    if guest is None:
        return
    if "agent_guest" in request.fixturenames:
        guest.wake()
    else:
        guest.rest()


def boot(domid: int) -> None:
    """Serve a new guest until it takes orders.

    Firmware causes dozens of INVALIDATEs, and a test is to count those that it causes.
    """
    agent = Agent()
    with open_backend("xen", domid=domid) as backend, MapCache(backend) as cache:
        server = IoreqServer(domid, cache)
        server.claim_ports(agents.CONTROL, agents.PORTS, agent)
        with server, server.serving():
            agent.ping(agents.BOOT)


@pytest.fixture
def serve(
    agent_guest: AgentGuest, machine: Platform, request: pytest.FixtureRequest
) -> Iterator[Serve]:
    """Makes a server with the agent; takes the options of `MapCache`."""

    @contextmanager
    def serve(
        cache_type: type[MapCache] = MapCache,
        *,
        binding: str | None = None,
        buffered: bool = False,
        restored: bool = False,
        **options: object,
    ) -> Iterator[Served]:
        is_new = not agent_guest.exists
        domid = agent_guest.domid
        if is_new:
            boot(domid)
        agent = Agent()
        with contextlib.ExitStack() as stack:
            backend = stack.enter_context(open_backend("xen", domid=domid, binding=binding))
            cache = cache_type(backend, **options)  # type: ignore[arg-type] # the test knows
            stack.callback(cache.close, force=True)
            server = IoreqServer(domid, cache, binding=binding, buffered=buffered)
            server.claim_ports(agents.CONTROL, agents.PORTS, agent)
            stack.enter_context(server)
            stack.enter_context(server.serving())
            if not restored:  # if it is, it is paused, amid an order
                agent.ping(agents.BOOT)
            yield Served(domid, machine, backend, cache, server, agent)

    yield serve
    if request.node.stash.get(FAILED, False):
        agent_guest.destroy()  # the next test is to have a guest that nothing happened to


@pytest.fixture
def served(serve: Serve) -> Iterator[Served]:
    """One with a cache as it is by default."""
    with serve() as served:
        yield served


def wait_for(condition: Callable[[], bool], what: str, patience: float = 150) -> None:
    """Wait until something is so; fail, saying what, if it never is."""
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not so after {patience} s"
        time.sleep(0.02)


def set_memory(machine: Platform, name: str, mib: int) -> None:
    """Have a guest balloon; that takes a while after the command."""
    subprocess.run(machine.set_memory(name, mib), check=True, timeout=280)


def xl(*arguments: str) -> None:
    """Run xl, which must succeed."""
    subprocess.run(["xl", *arguments], check=True, timeout=280)


@contextmanager
def paused(domid: int) -> Iterator[None]:
    """Keep a guest from running, so that its memory stays as it is."""
    xl("pause", str(domid))
    try:
        yield
    finally:
        xl("unpause", str(domid))


def balloon(
    served: Served,
    mib: int,
    *,
    full: int | None = None,
    while_waiting: Callable[[], object] = lambda: None,
) -> None:
    """Have the guest give up memory until it has so much, and then take it all back.

    Args:
        served: the guest's server.
        mib: of RAM.
        full: what the agent's `total` was before, if it has begun to give up memory.
        while_waiting: called again and again until then.
    """
    full = served.agent.total() if full is None else full
    few = 512  # KiB that the guest's kernel may use for something else until then

    def reached(kib: int) -> bool:
        while_waiting()
        return abs(served.agent.total() - kib) <= few

    set_memory(served.machine, agents.NAME, mib)
    wait_for(lambda: reached(full - (agents.MEMORY - mib) * 1024), f"ballooned down to {mib} MiB")
    set_memory(served.machine, agents.NAME, agents.MEMORY)
    wait_for(lambda: reached(full), "ballooned up again")


def warnings_of(caplog: pytest.LogCaptureFixture, logger: str = "xenmapcache") -> list[str]:
    """What was logged there as a warning or worse."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == logger and record.levelno >= logging.WARNING
    ]


def load_example(name: str) -> ModuleType:
    """One of the examples, as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
