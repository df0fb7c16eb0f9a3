"""Signals, forks and exits of a program that serves."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

PROGRAM = """
import asyncio, os, signal, sys, threading, time, warnings
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & has it ignored
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
from xenmapcache import *
from xenmapcache.devicemodel import IoreqServer
guest = MockHypervisor().create_domain(memory="1M")
cache = MapCache(open_backend("mock", domain=guest))
server = IoreqServer(guest, cache)
region = server.claim_ports(0x510, 4)
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", PROGRAM + program]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_it_cleanly(number: str) -> None:
    """Serve_forever returns the signal; what the guest asked is answered, the server gone."""
    done = run(f"""
@region.read
def read(offset, size):
    os.kill(os.getpid(), signal.{number})
    return 7
seen = []
thread = threading.Thread(target=lambda: seen.append(guest.port_in(0x510)))
before = signal.getsignal(signal.{number})
with server:
    thread.start()
    ended = server.serve_forever()
thread.join()
assert signal.getsignal(signal.{number}) is before
print(signal.Signals(ended).name, seen, guest.ioreq_servers)
""")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{number} [7] {{}}\n", "")


def test_a_second_signal_interrupts_a_handler() -> None:
    """A handler that does not return is interrupted, its request answered with all ones."""
    done = run("""
import logging
@region.read
def read(offset, size):
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
    while True:
        time.sleep(1)
seen = []
thread = threading.Thread(target=lambda: seen.append(guest.port_in(0x510)))
try:
    with server:
        thread.start()
        server.serve_forever()
except KeyboardInterrupt as interrupt:
    thread.join()
    print(interrupt, seen)
""")
    assert (done.returncode, done.stdout, done.stderr) == (
        0,
        "SIGTERM came twice [4294967295]\n",
        "",
    )


def test_signals_that_somebody_handles_are_left_alone() -> None:
    """A program's own handler is called, and serving goes on."""
    done = run("""
signal.signal(signal.SIGTERM, lambda *_: (print("mine"), server.stop()))
@region.read
def read(offset, size):
    os.kill(os.getpid(), signal.SIGTERM)
    return 7
with server:
    thread = threading.Thread(target=guest.port_in, args=(0x510,))
    thread.start()
    print(server.serve_forever())
    thread.join()
""")
    assert (done.returncode, done.stdout, done.stderr) == (0, "mine\nNone\n", "")


def test_sigterm_ends_asyncio() -> None:
    """Serve_async returns on SIGTERM."""
    done = run("""
@region.read
def read(offset, size):
    os.kill(os.getpid(), signal.SIGTERM)
    return 7
seen = []
thread = threading.Thread(target=lambda: seen.append(guest.port_in(0x510)))
with server:
    thread.start()
    asyncio.run(server.serve_async())
thread.join()
print(seen, signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)
""")
    assert (done.returncode, done.stdout, done.stderr) == (0, "[7] True\n", "")


def test_an_exit_without_close() -> None:
    """A program that ends without closing closes all the same: no vCPU is left waiting."""
    done = run("""
import atexit
atexit.register(lambda: print(guest.ioreq_servers, server))
server.open()
sys.exit(3)
""")
    assert (done.returncode, done.stdout, done.stderr) == (
        3,
        "{} <IoreqServer of domain 1, closed>\n",
        "",
    )


def test_a_forked_child_is_kept_out() -> None:
    """A child cannot serve, and its end does not end the parent's server."""
    done = run("""
region.read(lambda offset, size: 7)
with server, server.serving():
    pid = os.fork()
    if not pid:
        try:
            server.process_pending()
        except ClosedError as error:
            server.close()
            os._exit("which forked" in str(error))
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), guest.port_in(0x510))
""")
    assert (done.returncode, done.stdout, done.stderr) == (0, "1 7\n", "")


def test_a_childs_stop_is_not_the_parents() -> None:
    """Stop in a child, and SIGTERM to a child that a handler forked, leave the parent alone."""
    done = run("""
@region.read
def read(offset, size):
    pid = os.fork()
    if not pid:
        server.stop()
        # Its own signal, so that it can come neither before Python keeps signals in a child nor
        # between the last look at them and a system call that would wait for it.
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(9)
    return -os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
@region.write
def write(offset, size, value):
    server.stop()
seen = []
def guest_does():
    seen.append(guest.port_in(0x510))
    seen.append(guest.port_in(0x510))
    guest.port_out(0x510, 1)
thread = threading.Thread(target=guest_does)
with server:
    thread.start()
    print(server.serve_forever(), seen)
    thread.join()
""")
    assert (done.returncode, done.stdout, done.stderr) == (0, "None [15, 15]\n", "")


def test_sigterm_waits_until_it_is_closed() -> None:
    """What waits at close is carried out before the signal has its way."""
    done = run("""
@region.read
def read(offset, size):
    os.kill(os.getpid(), signal.SIGTERM)
    return 7
seen = []
def guest_does():
    seen.append(guest.port_in(0x510))
    os.write(1, b"%r\\n" % seen)  # in one piece, or not at all
thread = threading.Thread(target=guest_does)
server.open()
thread.start()
while not guest.ioreq_servers[0].page[30]:
    os.sched_yield()
server.close()
print("not reached")
""")
    assert (done.returncode, done.stderr) == (-15, "")
    assert done.stdout in ("[7]\n", "")  # if it was not too late for the vCPU to say so


def test_sigterm_ends_all_servers_of_a_loop() -> None:
    """One signal, two servers in one asyncio loop: both return."""
    done = run("""
other = IoreqServer(guest, cache)
@region.read
def read(offset, size):
    os.kill(os.getpid(), signal.SIGTERM)
    return 7
async def main():
    await asyncio.gather(server.serve_async(), other.serve_async())
thread = threading.Thread(target=guest.port_in, args=(0x510,))
with server, other:
    thread.start()
    asyncio.run(main())
thread.join()
print(guest.ioreq_servers, signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)
""")
    assert (done.returncode, done.stdout, done.stderr) == (0, "{} True\n", "")


def test_a_signal_is_not_swallowed_by_a_handler_that_hangs() -> None:
    """SIGTERM closes the server after the quiesce timeout, although a handler does not return."""
    done = run("""
server = IoreqServer(guest, cache, quiesce_timeout=0.1)
@server.claim_ports(0x600, 4).read
def read(offset, size):
    os.kill(os.getpid(), signal.SIGTERM)
    while guest.ioreq_servers:
        time.sleep(0.001)
    return 7
seen = []
thread = threading.Thread(target=lambda: seen.append(guest.port_in(0x600)))
with server:
    thread.start()
    ended = server.serve_forever()
thread.join()
print(signal.Signals(ended).name, [hex(each) for each in seen], guest.ioreq_servers)
""")
    assert (done.returncode, done.stdout) == (0, "SIGTERM ['0xffffffff'] {}\n")
    assert "closed while foreign code still runs: read for vCPU 0" in done.stderr


def test_the_line_of_a_hung_handler_is_not_lost_at_the_end() -> None:
    """A thread for which Python does not wait writes it, and nobody calls close."""
    done = run("""
import logging
from xenmapcache.devicemodel import ending
def slow(record):
    if "closed while" in record.getMessage():
        while threading.main_thread().is_alive():
            time.sleep(0.001)
        for _ in range(100):
            time.sleep(0.001)
    return True
logging.getLogger("xenmapcache.devicemodel").addFilter(slow)
ending._REPORT_S = 60.0
server = IoreqServer(guest, cache, quiesce_timeout=0.1)
@server.claim_ports(0x600, 4).read
def read(offset, size):
    os.kill(os.getpid(), signal.SIGTERM)
    while guest.ioreq_servers:
        time.sleep(0.001)
    return 7
server.open()
thread = threading.Thread(target=lambda: guest.port_in(0x600))
thread.start()
server.serve_forever()
thread.join()
""")
    assert (done.returncode, done.stdout) == (0, "")
    assert "closed while foreign code still runs: read for vCPU 0" in done.stderr


def test_a_signal_that_interrupts_no_system_call_ends_it() -> None:
    """The interpreter looks for signals while it waits: another thread may have got one."""
    done = run("""
import pathlib
poll = ("7", "271", "73")  # and ppoll, by their numbers on x86-64 and arm64
main = threading.get_native_id()
def take():
    while pathlib.Path(f"/proc/self/task/{main}/syscall").read_text().split()[0] not in poll:
        time.sleep(0.001)
    signal.raise_signal(signal.SIGTERM)
thread = threading.Thread(target=take)
with server:
    thread.start()
    ended = server.serve_forever()
print(signal.Signals(ended).name)
""")
    assert (done.returncode, done.stdout, done.stderr) == (0, "SIGTERM\n", "")
