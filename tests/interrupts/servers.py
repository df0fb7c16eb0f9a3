"""Operations of an ioreq server: every vCPU is answered, and no request is lost."""

from __future__ import annotations

import atexit
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Final

from xenmapcache import MapCache, MockHypervisor, open_backend
from xenmapcache.devicemodel import IoreqServer
from xenmapcache.devicemodel.calls import CallChain
from xenmapcache.errors import ClosedError
from xenmapcache.ioreq import RequestKind

from .caches import PAGE
from .injector import Outcome
from .world import Operation, World

ANSWER_LIMIT: Final = 2.0
"""Seconds after which a vCPU that nobody answers gives up."""
PORT: Final = 0x100
MMIO: Final = 0xA0000
"""Of a screen: the ring has room for an address of 20 bits."""
DATA: Final = 0x1234
ONES: Final = 0xFFFFFFFF


class ServerWorld(World):
    """A guest, its server with a port and a range of MMIO, and perhaps a vCPU that waits.

    Attributes:
        ask: what the vCPU does.
        calls: what the device's handlers were called with.
        answers: what the vCPU got.
    """

    permitted: ClassVar = {"close": (ClosedError,)}

    def __init__(self, folder: Path, ask: Callable[[ServerWorld], object] | None = None) -> None:
        super().__init__(folder)
        self.domain = MockHypervisor().create_domain(memory="64K")
        self.domain.vcpu_timeout = ANSWER_LIMIT
        self.backend = open_backend("mock", domain=self.domain)
        self.cache = MapCache(self.backend, bucket_shift=12)
        self.calls: list[object] = []
        self.during_handler = False  # the signal came while a handler of the device ran
        self.during_request = False  # it came while a request was carried out
        self.answers: list[object] = []
        self.quiesced = 0
        self.closed = False
        self.ask = ask
        self.vcpu: threading.Thread | None = None
        self.server = self.make_server()

    def make_server(self, recover: bool = False) -> IoreqServer:
        """Return a server with the devices, which is not open."""
        server = IoreqServer(self.domain, self.cache, buffered=True, recover=recover)
        ports = server.claim_ports(PORT, 4)
        ports.read(self.on_read)
        ports.write(self.on_port_write)
        mmio = server.claim_mmio(MMIO, PAGE)
        mmio.write(self.on_mmio_write)
        server.on_quiesce(self.on_quiesce)
        return server

    def on_read(self, offset: int, size: int) -> int:
        """Answer a read of the port."""
        self.calls.append("read")
        return DATA

    def on_port_write(self, offset: int, size: int, value: int) -> None:
        """Note a write of the port."""
        self.calls.append(("port", value))

    def on_mmio_write(self, offset: int, size: int, value: int) -> None:
        """Note a write of the range."""
        self.calls.append(("mmio", value))

    def on_quiesce(self) -> None:
        """Count."""
        self.quiesced += 1

    def start(self) -> None:
        """Open the server, and let the vCPU do its instruction until it waits."""
        self.server.open()
        self.server.process_pending()
        if self.ask is not None:
            self.let_ask(self.ask)

    def let_ask(self, ask: Callable[[ServerWorld], object]) -> None:
        """Let the vCPU do its instruction until it waits."""
        self.vcpu = threading.Thread(target=self._run, args=(ask,), daemon=True)
        self.vcpu.start()
        end = time.monotonic() + 5
        while not self.waiting() and time.monotonic() < end:
            time.sleep(0.0001)
        time.sleep(0.0003)  # the event comes after the slot

    def waiting(self) -> bool:
        """Tell whether the vCPU has written its request."""
        servers = list(self.domain.ioreq_servers.values())
        # The state is the low half of byte 30 of a vCPU's slot (struct ioreq in hvm/ioreq.h).
        return bool(servers) and bool(servers[0].page[30] & 0xF)

    def _run(self, ask: Callable[[ServerWorld], object]) -> None:
        try:
            self.answers.append(ask(self))
        except BaseException as error:
            self.answers.append(type(error).__name__)

    # --- handlers ---------------------------------------------------------------------

    def handle(self, name: str) -> None:
        """Note whether a handler of the device is interrupted, and do what the signal's does."""
        codes = [frame.f_code for frame, _ in traceback.walk_stack(None)]
        self.during_handler = self.during_handler or not _DEVICE.isdisjoint(codes)
        self.during_request = self.during_request or CallChain.run.__code__ in codes
        super().handle(name)

    def handle_read(self) -> None:
        """Read guest memory."""
        self.cache.read(2 * PAGE, 8)

    def handle_write(self) -> None:
        """Write guest memory."""
        self.cache.write(2 * PAGE, b"handler!")

    def handle_evict(self) -> None:
        """Read all there is."""
        for page in range(2, 16):
            self.cache.read(page * PAGE, 8)

    def handle_invalidate(self) -> None:
        """Invalidate the cache."""
        self.cache.invalidate()

    def handle_close(self) -> None:
        """Close the server."""
        self.closed = True
        self.server.close()

    def handle_stop(self) -> None:
        """Stop serving."""
        self.server.stop()

    # --- checks -------------------------------------------------------------------------

    def may_not_swallow(self, handler: str) -> bool:
        """A device's handler may be interrupted: an Exception of its is logged, and that is all."""
        return handler == "interrupt" and super().may_not_swallow(handler)

    def check(self, outcome: Outcome) -> None:
        """Find held locks, other than that of the vCPU that waits."""
        self.check_locks(self.server, self.cache, self.backend, but="._busy")
        self.in_thread("read of the cache", lambda: self.cache.read(3 * PAGE, 8))

    def serve_until_answered(self) -> None:
        """Call what a server's loop calls until the vCPU has gone on."""
        end = time.monotonic() + 2 * ANSWER_LIMIT
        while self.vcpu is not None and self.vcpu.is_alive() and time.monotonic() < end:
            if not self.closed:
                with self.noting("process_pending()", ClosedError):
                    self.server.process_pending()
            self.vcpu.join(0.0003)

    def end(self) -> None:
        """Close twice: no vCPU waits then, and no server is left in the domain."""
        for _ in range(2):
            with self.noting("close()"):
                self.server.close()
        if self.vcpu is not None:
            self.vcpu.join(2 * ANSWER_LIMIT)
            if self.vcpu.is_alive() or "TimeoutError" in self.answers:
                self.problem(f"the vCPU was not answered (handlers: {self.calls})")
        if self.domain.ioreq_servers:
            self.problem("after a second close() there is a server in the domain")
        if getattr(self.domain, "crashed", None):
            self.problem(f"the guest crashed: {self.domain.crashed}")
        self.check_locks(self.server, self.domain)
        atexit.unregister(self.server.close)
        self.cache.close(force=True)
        self.backend.close()


class HeirWorld(ServerWorld):
    """A vCPU waits at a server whose process was killed, and the next one is to take it over."""

    def __init__(self, folder: Path, ask: Callable[[ServerWorld], object] | None = None) -> None:
        super().__init__(folder, ask)
        dead = self.domain.open_ioreq_server(buffered=True)
        dead.enable()
        dead.claim(RequestKind.PORT, PORT, PORT + 3)
        dead.claim(RequestKind.MMIO, MMIO, MMIO + PAGE - 1)
        dead.kill()
        assert ask is not None
        self.let_ask(ask)

    def make_server(self, recover: bool = True) -> IoreqServer:
        """Return one that takes over."""
        return super().make_server(recover)

    def start(self) -> None:
        """Take over; the vCPU is not answered yet."""
        self.server.open()


_DEVICE: Final = {
    method.__code__
    for method in (
        ServerWorld.on_read,
        ServerWorld.on_port_write,
        ServerWorld.on_mmio_write,
        ServerWorld.on_quiesce,
    )
}


def asking(
    ask: Callable[[Any], object] | None, world: type[ServerWorld]
) -> Callable[[Path], ServerWorld]:
    """Return a maker of worlds whose vCPU does that."""
    return lambda folder: world(folder, ask)


def port_in(world: ServerWorld) -> object:
    """Read the port."""
    return world.domain.port_in(PORT, 4)


def port_out(world: ServerWorld) -> object:
    """Write the port."""
    world.domain.port_out(PORT, 5)
    return None


def give_up(world: ServerWorld) -> object:
    """Give up a page: Xen sends INVALIDATE."""
    world.domain.balloon_out(PAGE, PAGE)
    return None


def buffered(world: ServerWorld) -> object:
    """Write twice through the ring, then once for an answer."""
    world.domain.mmio_write(MMIO, 7, buffered=True)
    world.domain.mmio_write(MMIO, 8, 8, buffered=True)
    world.domain.port_out(PORT, 5)
    return None


def start(world: ServerWorld) -> None:
    """Have the server open, and the vCPU waiting."""
    world.start()


def process(world: ServerWorld) -> None:
    """Answer what waits."""
    world.server.process_pending()


def process_again(world: ServerWorld) -> None:
    """Go on serving: the vCPU gets what it asked for, and nothing is done twice or not at all."""
    world.serve_until_answered()
    interrupted = world.handled in ("error", "interrupt") or not world.handled
    if world.closed:
        return
    if world.ask is port_in and world.answers != [DATA]:
        if not (interrupted and world.answers == [ONES]):
            world.problem(f"the vCPU read {world.answers}, the handler was called: {world.calls}")
        elif "read" in world.calls and not world.during_handler:
            world.problem("the device's handler has run, and the vCPU got all ones")
    wanted: dict[object, list[object]] = {
        port_out: [("port", 5)],
        buffered: [("mmio", 7), ("mmio", 8), ("port", 5)],
    }
    calls = wanted.get(world.ask)
    if calls is not None and world.calls != calls and not world.during_handler:
        world.problem(f"handlers were called with {world.calls} instead of {calls}")
    if world.ask is give_up and not world.quiesced and not world.during_handler:
        world.problem("INVALIDATE was answered, and on_quiesce was not called")


def open_server(world: ServerWorld) -> None:
    """Open."""
    world.server.open()


def opened_again(world: ServerWorld) -> None:
    """An interrupted open leaves nothing, or a server that serves."""
    servers = list(world.domain.ioreq_servers)
    try:
        number: int | None = world.server.id
    except ClosedError:
        number = None
    if servers != ([] if number is None else [number]):
        world.problem(f"after open() the domain has servers {servers}, this one is {number}")


def close(world: ServerWorld) -> None:
    """Close, while the vCPU waits."""
    world.closed = True
    world.server.close()


def close_again(world: ServerWorld) -> None:
    """Close again; the vCPU has got its answer by then."""
    with world.noting("a second close()"):
        world.server.close()
    if world.vcpu is not None:
        world.vcpu.join(2 * ANSWER_LIMIT)
    if world.answers not in ([DATA], [ONES]):
        world.problem(f"after close() the vCPU has {world.answers}")


def claim(world: ServerWorld) -> None:
    """Claim more ports."""
    world.result = world.server.claim_ports(0x300, 4)


def claim_again(world: ServerWorld) -> None:
    """Claim them again, unless they are claimed: either way they can be released."""
    if world.closed:
        return
    region = world.result
    if region is None:
        try:
            region = world.server.claim_ports(0x300, 4)
        except ValueError:
            return  # it was claimed, but the interrupted caller has no handle of it
    with world.noting("a release of the claimed region"):
        region.release()
    with world.noting("a second claim"):
        world.server.claim_ports(0x300, 4)


def release(world: ServerWorld) -> None:
    """Release them."""
    world.result.release()


def release_again(world: ServerWorld) -> None:
    """Release again, and claim again."""
    if world.closed:
        return
    with world.noting("a second release", ValueError, KeyError, ClosedError):
        world.result.release()
    with world.noting("a claim of what was released"):
        world.server.claim_ports(0x300, 4)


def claimed(world: ServerWorld) -> None:
    """Have the server open, and ports claimed."""
    start(world)
    claim(world)


def take_over_again(world: ServerWorld) -> None:
    """Whatever became of the server, it or another one answers the vCPU.

    A request amid which the server is closed is given up.
    """
    if world.closed and world.during_request:
        world.closed = False
        world.serve_until_answered()
        return
    try:
        _ = world.server.id
    except ClosedError:
        world.closed = False
        world.server = world.make_server()
        with world.noting("a second take-over"):
            world.server.open()
    process_again(world)


HANDLERS: Final = ("interrupt", "error", "read", "write", "evict", "invalidate", "close", "fork")


def operation(
    name: str,
    ask: Callable[[Any], object] | None,
    act: Callable[[Any], object],
    prepare: Callable[[Any], object] | None = start,
    again: Callable[[Any], object] | None = process_again,
    world: type[ServerWorld] = ServerWorld,
) -> Operation:
    """Return a row of the table."""
    return Operation(name, asking(ask, world), act, HANDLERS, prepare, again)


OPERATIONS: Final = (
    operation("server.open", None, open_server, None, opened_again),
    operation("server.close", port_in, close, start, close_again),
    operation("server.process-read", port_in, process),
    operation("server.process-write", port_out, process),
    operation("server.process-invalidate", give_up, process),
    operation("server.process-buffered", buffered, process),
    operation("server.claim", None, claim, start, claim_again),
    operation("server.release", None, release, claimed, release_again),
    operation(
        "server.take-over-read", port_in, open_server, None, take_over_again, world=HeirWorld
    ),
    operation(
        "server.take-over-buffered", buffered, open_server, None, take_over_again, world=HeirWorld
    ),
    operation("server.inherited-write", port_out, process, start, take_over_again, world=HeirWorld),
    operation(
        "server.inherited-buffered", buffered, process, start, take_over_again, world=HeirWorld
    ),
    operation("server.stop", None, lambda w: w.server.stop(), start, None),
)
