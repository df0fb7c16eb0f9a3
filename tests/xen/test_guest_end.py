"""A guest that is destroyed ends what serves it, and is gone when nothing maps it any longer."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from tests.xen import stock_guest as stock
from tests.xen.conftest import wait_for, xl
from tests.xen.lab.platform import Platform
from tests.xen.stock_guest import stock_guest
from xenmapcache import MapCache, open_backend
from xenmapcache.devicemodel import IoreqServer
from xenmapcache.source import find_domain

pytestmark = pytest.mark.xen

MMIO = 0xF0000000


@pytest.fixture(autouse=True)
def _lab(machine: Platform) -> None:
    if not machine.ioreq_servers:
        pytest.skip("this Xen has no ioreq servers")


def exists(domid: int) -> bool:
    """Return whether Xen still has a domain, be it dying."""
    done = subprocess.run(["xl", "list", str(domid)], capture_output=True, timeout=120, check=False)
    return done.returncode == 0


def test_serve_forever_ends_with_the_guest(victim: int, machine: Platform) -> None:
    """`on_end` is called, in the thread that serves; then the guest can go."""
    called: list[int] = []
    destroying = threading.Thread(target=xl, args=("destroy", str(victim)))
    with open_backend("xen", domid=victim) as backend, MapCache(backend) as cache:
        cache.read(machine.memory[0] + 0x100000, 8)  # so that it is mapped
        server = IoreqServer(victim, cache)
        server.claim_mmio(MMIO, 0x1000).read(lambda offset, size: 7)
        with server:
            assert server.nr_vcpus == 1
            destroying.start()
            assert server.serve_forever(on_end=lambda: called.append(threading.get_ident())) is None
    destroying.join(120)
    assert called == [threading.get_ident()]
    wait_for(lambda: not exists(victim), "the guest is gone")


def test_a_restricted_process_notices_it(victim: int, machine: Platform) -> None:
    """Its rights to libxenctrl are gone, and it needs none."""
    if not machine.architecture.ports:
        pytest.skip("tests/xen/model.py claims ports")
    command = [sys.executable, "-m", "tests.xen.model", str(victim), "--restrict"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            xl("destroy", str(victim))
            assert process.communicate(timeout=120)[0] == "ended None\n"
        finally:
            process.kill()
    assert process.returncode == 0
    wait_for(lambda: not exists(victim), "the guest is gone")


def test_a_server_follows_a_guest_that_reboots(
    machine: Platform, guest_console: Callable[[str], str]
) -> None:
    """The loop of docs/device-models-live.md serves the next domain before its guest runs."""
    if machine.guest != "pvh":
        pytest.skip("the guest of this test has no QEMU")
    if reason := stock.missing():
        pytest.skip(reason)
    script = f"""
    number=$(devmem {MMIO:#x} 32)
    echo "STOCK device $number"
    if [ $((number)) = 1 ]; then reboot -f; else poweroff -f; fi
    """
    domids: list[int] = []
    deadline = time.monotonic() + 240
    with stock_guest(script, guest_console, vcpus=1, on_reboot="restart") as guest:
        guest.unpause()
        while len(domids) < 2:
            assert time.monotonic() < deadline, f"served {domids}, and no other came"
            try:
                found = find_domain(stock.NAME)
            except ValueError:  # between two domains
                continue
            if found in domids:
                continue
            domids.append(found)
            with open_backend("xen", domid=found) as backend, MapCache(backend) as cache:
                backend.pause()
                server = IoreqServer(found, cache, recover=True)
                server.claim_mmio(MMIO, 0x1000).read(lambda offset, size: len(domids))
                with server:
                    backend.unpause()
                    assert server.serve_forever() is None
                assert server.failures == 0
        assert [line for line in guest.said() if line.startswith("device")] == [
            "device 0x00000001",
            "device 0x00000002",
        ]
