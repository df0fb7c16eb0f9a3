"""What only a live guest can show, through both libraries and both loaders."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.xen.lab.platform import Platform
from xenmapcache import (
    ClosedError,
    DmaDirection,
    FaultError,
    GuestMemory,
    MapCache,
    Mapping,
    XenCallError,
    open_backend,
)
from xenmapcache.address import MiB

pytestmark = pytest.mark.xen

SOURCES = [(name, binding) for name in ("xen", "xenctrl") for binding in ("cffi", "ctypes")]
MARKER = re.compile(rb"XENMAPCACHE-MARKER-[0-9a-f]{16}")
PATIENCE = 60.0


@pytest.fixture(params=SOURCES, ids=["-".join(source) for source in SOURCES])
def cache(request: pytest.FixtureRequest, live_domid: int) -> Iterator[MapCache]:
    name, binding = request.param
    with open_backend(name, domid=live_domid, binding=binding) as backend:
        assert backend.binding == binding  # type: ignore[attr-defined] # a XenBackend's
        with MapCache(backend) as cache:
            yield cache


@pytest.fixture
def one_cache(live_domid: int) -> Iterator[MapCache]:
    """For what does not depend on the library."""
    with open_backend("xen", domid=live_domid) as backend, MapCache(backend) as cache:
        yield cache


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Wait until something is so; fail, saying what, if it never is."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen in {PATIENCE} s"
        time.sleep(0.1)


def test_the_kernels_banner_is_read(cache: MapCache, machine: Platform) -> None:
    """A live Linux guest's banner is found in its memory."""
    banner = re.compile(rb"Linux version \d+\.\d+[^\n\0]{10,}")
    found = GuestMemory(cache).find(banner, *machine.memory)
    _, text = next(found)
    assert b"gcc" in text or b"clang" in text


def test_the_guest_sees_what_is_written(
    one_cache: MapCache, live_domid: int, machine: Platform, guest_console: Callable[[str], str]
) -> None:
    """Text that the guest prints from its memory changes on its console when we change it."""
    name = subprocess.check_output(["xl", "domname", str(live_domid)], text=True).strip()
    if not MARKER.search(guest_console(name).encode()):
        pytest.skip(f"guest {name} is not the lab's: it prints no marker that could be changed")
    new = b"XENMAPCACHE-MARKER-" + os.urandom(8).hex().encode()
    memory = GuestMemory(one_cache)
    changed = 0
    for address, old in list(memory.find(MARKER, *machine.memory)):
        if one_cache.read(address, len(old)) == old:
            one_cache.write(address, new)
            changed += 1
    assert changed
    wait_for(lambda: new.decode() in guest_console(name), f"{new!r} on the guest's console")


def test_a_dma_lease_is_the_guests_memory(
    one_cache: MapCache, live_domid: int, machine: Platform
) -> None:
    """What is written through a lease is read through a mapping of the other library."""
    start, length = machine.memory
    address, _ = next(iter(one_cache.present(start + 16 * MiB, length - 16 * MiB)))
    address = next(
        page
        for page in range(address, address + 64 * MiB, 0x1000)
        if not any(one_cache.read(page, 0x1000))
    )
    with open_backend("xenctrl", domid=live_domid) as other, MapCache(other) as uncached:
        with one_cache.map_dma(
            address, 8, owner="test", direction=DmaDirection.FROM_DEVICE
        ) as lease:
            lease.view[:] = b"by lease"
            assert uncached.read(address, 8) == b"by lease"
            lease.view[:] = bytes(8)


def test_what_is_not_there_is_a_fault(cache: MapCache, machine: Platform) -> None:
    """Far beyond the end of RAM there is no page; the neighbourhood of the end is half-open."""
    with pytest.raises(FaultError) as caught:
        cache.read(1 << 40, 8)
    assert (caught.value.address, caught.value.errno) == (1 << 40, errno.EINVAL)
    ram, size = machine.memory
    *_, (address, length) = cache.present(ram, 4 * size)
    end = address + length
    assert cache.read(end - 8, 8) is not None
    for call in (lambda: cache.read(end - 8, 16), lambda: cache.map_dma(end - 8, 16, owner="t")):
        with pytest.raises(FaultError, match=f"no page at {end:#x}: "):
            call()


@pytest.mark.parametrize(("name", "binding"), SOURCES)
def test_no_such_domain(name: str, binding: str) -> None:
    """A domain that is not there, and one's own, are different errors that say what to do."""
    with pytest.raises(XenCallError, match="there is no such domain") as caught:
        open_backend(name, domid=32000, binding=binding)
    assert (caught.value.errno, caught.value.domid) == (errno.ESRCH, 32000)
    with pytest.raises(XenCallError, match="domain 0 is the one that this runs in"):
        open_backend(name, domid=0, binding=binding)


@pytest.mark.parametrize(("name", "binding"), SOURCES)
def test_a_mapping_survives_its_domain(
    name: str, binding: str, victim: int, machine: Platform
) -> None:
    """A destroyed domain's memory stays as it was where it is mapped, and nowhere else."""
    with open_backend(name, domid=victim, binding=binding) as backend:
        cache = MapCache(backend)
        start, _ = machine.memory
        address, length = max(cache.present(start, 64 * MiB), key=lambda run: run[1])
        wait_for(lambda: any(cache.read(address, length)), "the victim's first byte")
        lease = cache.map_dma(address, MiB - address % MiB, owner="test")
        kept = address - address % MiB + MiB
        cache.read(kept, 1)
        subprocess.run(["xl", "destroy", str(victim)], check=True, timeout=60)
        before = bytes(lease.view)
        assert cache.read(address, len(before)) == before
        lease.view[:4] = b"dead"
        assert cache.read(address, 4) == b"dead"
        # The domain is dying, but not gone while anything is mapped.
        with pytest.raises(FaultError, match=f"no page at {kept:#x}: EINVAL"):
            MapCache(backend, bucket_shift=12).read(kept, 1)
        lease.release()
        cache.close()

        def is_gone() -> bool:
            try:
                backend.map(start >> 12, 1, writable=False)
            except XenCallError as error:
                return error.errno == errno.ESRCH
            return False

        wait_for(is_gone, "the end of the domain")


def test_a_forked_child_is_kept_out(cache: MapCache, machine: Platform) -> None:
    """The child's view is zeros, its cache refuses; the parent's goes on."""
    address, _ = next(iter(cache.present(*machine.memory)))
    view = cache.map_dma(address, 64, owner="test", direction=DmaDirection.TO_DEVICE).view
    before = bytes(view)
    pid = os.fork()
    if not pid:
        status = 1
        try:
            cache.read(address, 64)
        except ClosedError:
            status = 2 if any(view) else 0
        os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    assert len(before) == 64
    assert len(bytes(view)) == 64
    cache.close(force=True)


def test_a_read_of_a_resident_bucket_makes_no_call(
    cache: MapCache, machine: Platform, record_property: Callable[[str, object], None]
) -> None:
    """Thousands of reads are one map call; the ratio to map, read, unmap is reported."""
    address, _ = max(cache.present(*machine.memory), key=lambda run: run[1])
    address += MiB - address % MiB
    cache.invalidate()
    maps = cache.stats().maps
    count = 5000
    started = time.perf_counter()
    for _ in range(count):
        cache.read(address, 8)
    cached = (time.perf_counter() - started) / count
    assert cache.stats().maps == maps + 1
    rounds = 50
    started = time.perf_counter()
    for _ in range(rounds):
        cache._backend.map(address >> 12, 1, writable=True).memory[:8]
    uncached = (time.perf_counter() - started) / rounds
    record_property(
        "measured",
        f"a cached read takes {cached * 1e6:.2f} us, map + read + unmap of one page "
        f"{uncached * 1e6:.0f} us: 1 to {uncached / cached:.0f}",
    )


def test_the_default_bound_spares_dom0(one_cache: MapCache, machine: Platform) -> None:
    """Where a mapped page may take one of Dom0's, a cache maps less than Dom0 has."""
    assert (one_cache.max_resident < memory_of_dom0()) == (machine.dom0 != "pv")


def memory_of_dom0() -> int:
    """Bytes that this domain's kernel has."""
    found = re.findall(r"MemTotal: +(\d+)", Path("/proc/meminfo").read_text())
    return int(found[0]) * 1024


@pytest.mark.slow
def test_the_kernels_own_limit_evicts(one_cache: MapCache, machine: Platform) -> None:
    """On Arm with Linux 6.12, less than 2 GiB fits: then buckets go, and no access fails."""
    if machine.dom0 == "pvh":
        pytest.skip("a PVH Dom0 maps 2 GiB, and that takes more than a minute")
    start, length = machine.memory
    backend, before = one_cache.backend, memory_of_dom0()
    held: list[Mapping] = []
    with contextlib.suppress(XenCallError):
        while len(held) < 16:
            held.append(backend.map(start >> 12, length >> 12, writable=False))
            if memory_of_dom0() < before:
                pytest.skip("here a mapping takes Dom0's memory, and the kernel would kill us")
    if len(held) == 16:
        pytest.skip("this kernel maps 2 GiB and more")
    for address, size in one_cache.present(start, length):
        for place in range(address, address + size - MiB, MiB):
            assert len(one_cache.read(place, MiB)) == MiB
    assert one_cache.stats().evictions


def test_doctor_maps_the_guest(live_domid: int) -> None:
    """In a Dom0 with a guest, doctor has nothing to fix, and its exit status says so."""
    command = [sys.executable, "-m", "xenmapcache", "doctor", "--json", "--domid", str(live_domid)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    findings = json.loads(done.stdout)["findings"]
    assert not [finding for finding in findings if finding["state"] == "problem"]


def test_the_example_reads_the_guest(live_domid: int) -> None:
    """examples/read_guest.py prints a live guest's banner."""
    script = Path(__file__).parents[2] / "examples" / "read_guest.py"
    command = [sys.executable, str(script), "--domid", str(live_domid)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Linux version " in done.stdout
