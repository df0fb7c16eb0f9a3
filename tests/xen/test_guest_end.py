"""A guest that is destroyed ends what serves it, and is gone when nothing maps it any longer."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from tests.xen.conftest import wait_for, xl
from tests.xen.lab.platform import Platform
from xenmapcache import MapCache, open_backend
from xenmapcache.devicemodel import IoreqServer

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
