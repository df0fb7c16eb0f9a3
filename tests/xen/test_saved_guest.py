"""Guests, saved by xl and by us, and looked at live: the same, page for page."""

from __future__ import annotations

import ctypes
import json
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.xen import agent as agents
from tests.xen.conftest import wait_for, xl
from tests.xen.control import control
from tests.xen.lab.platform import Platform
from xenmapcache import Backend, MapCache, open_source, write_coredump
from xenmapcache.address import PAGE_SHIFT, PAGE_SIZE, MiB

pytestmark = pytest.mark.xen

VICTIM = "victim"
MADE = "hand-made"
RAM = "96MiB"
"""Of the victim. From there to 4 GiB there is no memory, so one pass over that is enough."""
PAGES = {0, 1, 2, 5, *range(0x10, 0x98), *range(0xC0, 0x310), *range(0x400, 0x1000)}
"""Of the guest that is made by hand: page 0, holes, and nothing where a PC has none."""


@pytest.fixture(scope="module", autouse=True)
def _saves(machine: Platform) -> None:
    if not machine.architecture.saves:
        pytest.skip("libxl saves no guests on this machine")


class Saved(NamedTuple):
    """A guest that is paused, its pages, and its files; `xl` is what xl wrote of it."""

    name: str
    pages: set[int]
    xl: Path
    ours: Path


@pytest.fixture(scope="module")
def booted(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    guest_console: Callable[[str], str],
) -> Iterator[Saved]:
    """A Linux guest that was saved by `xl save` and stays paused; nothing of it changes."""
    if not agents.missing():  # with that guest running, each of these takes twice as long
        request.getfixturevalue("agent_guest").destroy()
    config: Path | None = request.config.getoption("victim_config")
    if config is None:
        pytest.skip("no guest to destroy given with --victim-config")
    folder = tmp_path_factory.mktemp("booted")
    xls, ours = folder / "xl.save", folder / "ours.core"
    Path("/var/log/xen/console/guest-victim.log").unlink(missing_ok=True)
    xl("create", "-q", str(config))
    try:
        # An HVM guest takes a minute, and longer next to other machines.
        wait_for(lambda: _talks(guest_console), "the victim has booted", 250)
        xl("save", "-p", VICTIM, str(xls))
        with open_source(f"xen:{VICTIM}") as backend:
            write_coredump(backend, ours)
            pages = gfns(backend)
        yield Saved(VICTIM, pages, xls, ours)
    finally:
        subprocess.run(["xl", "destroy", VICTIM], capture_output=True, timeout=120, check=False)
        for file in (xls, ours):
            file.unlink(missing_ok=True)  # Dom0's files lie in its memory


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, live_domid: int) -> Iterator[Saved]:
    """A guest of 16 MiB made by hand, dumped by `xl dump-core`.

    Of a guest that xl makes, `xl dump-core` maps one by one each of the million pages below
    its special pages at 4 GiB: under emulation that takes longer than all other tests.
    """
    folder = tmp_path_factory.mktemp("made")
    xls, ours = folder / "xl.core", folder / "ours.core"
    with hand_made() as domid:
        name = f"/local/domain/{domid}/name"
        subprocess.run(["xenstore-write", name, MADE], timeout=60, check=True)
        try:
            with open_source(f"xen:{MADE}") as backend, MapCache(backend) as cache:
                for gfn in PAGES:
                    cache.write(gfn << PAGE_SHIFT, (b"page %#07x." % gfn).ljust(16) * 256)
                write_coredump(backend, ours)
                pages = gfns(backend)
            xl("dump-core", MADE, str(xls))
            yield Saved(MADE, pages, xls, ours)
        finally:
            subprocess.run(["xenstore-rm", f"/local/domain/{domid}"], timeout=60, check=True)
            for file in (xls, ours):
                file.unlink(missing_ok=True)


def protected_mode() -> bytes:
    """Return a vCPU in 32-bit protected mode: struct hvm_hw_cpu of xen/arch-x86/hvm/save.h."""
    cpu = bytearray(1032)
    for place, form, value in (
        (640, "Q", 0x1000),  # rip
        (656, "Q", 0x11),  # cr0
        (720, "QQ", (0xFFFF0FF0, 0x400)),  # dr6, dr7
        (768, "4I", (0xFFFFFFFF,) * 4),  # limits of cs, ds, es, fs
        (788, "2I", (0xFFFFFFFF, 0x67)),  # of ss, tr
        (888, "4I", (0xC9B, 0xC93, 0xC93, 0xC93)),  # access rights likewise
        (908, "2I", (0xC93, 0x8B)),
    ):
        values = value if isinstance(value, tuple) else (value,)
        struct.pack_into(f"<{form}", cpu, place, *values)
    return bytes(cpu)


@contextmanager
def hand_made() -> Iterator[int]:
    """Make a PVH domain with memory and one vCPU that never runs (libxenctrl)."""
    with control() as xen:
        newer = "4.17" not in xen.path.name
        # struct xen_domctl_createdomain: ssidref, handle[16], flags (hvm, hap), iommu, vCPUs,
        # event channels, grant and maptrack frames, grant version, (altp2m,) vmtrace, cpupool,
        # emulation flags (local APIC), misc flags.
        fields = [0, 0, 0, 0, 0, 3, 0, 1, 1023, 4, 4, 1, *([0] if newer else []), 0, 0, 1, 0]
        config = (ctypes.c_uint32 * 64)(*fields)
        domain = ctypes.c_uint32(0)
        xen.call("xc_domain_create", ctypes.byref(domain), ctypes.byref(config))
        try:
            xen.call("xc_domain_setmaxmem", domain, ctypes.c_uint64(64 << 10))
            xen.call("xc_set_paging_mempool_size", domain, ctypes.c_uint64(4 << 20))
            xen.call("xc_domain_max_vcpus", domain, 1)
            gfns = (ctypes.c_uint64 * len(PAGES))(*sorted(PAGES))
            count = ctypes.c_ulong(len(PAGES))
            xen.call("xc_domain_populate_physmap_exact", domain, count, 0, 0, gfns)
            # Without a context of its vCPU, which has to have begun, nothing is dumped.
            get = xen.library.xc_domain_hvm_getcontext
            size = get(xen.handle, domain, None, 0)
            old = ctypes.create_string_buffer(size)
            get(xen.handle, domain, old, size)
            context = old.raw[:32] + struct.pack("<HHI", 2, 0, 1032) + protected_mode() + bytes(8)
            xen.call("xc_domain_hvm_setcontext", domain, context, len(context))
            yield domain.value
        finally:
            xen.library.xc_domain_destroy(xen.handle, domain)


def _talks(guest_console: Callable[[str], str]) -> bool:
    try:
        return "DOMU marker" in guest_console(VICTIM)
    except pytest.skip.Exception:
        return False  # not even a log yet


def gfns(backend: Backend) -> set[int]:
    """Return all pages that a source has. Of a guest up to 4 GiB that takes a minute."""
    assert backend.memory_end is not None
    with MapCache(backend) as cache:
        return {
            gfn
            for address, length in cache.present(0, backend.memory_end)
            for gfn in range(address >> PAGE_SHIFT, address + length >> PAGE_SHIFT)
        }


@pytest.mark.parametrize("kind", ["xl", "ours"])
@pytest.mark.parametrize("guest", ["booted", "made"])
def test_every_page_is_the_live_one(
    guest: str,
    kind: str,
    request: pytest.FixtureRequest,
    record_property: Callable[[str, object], None],
) -> None:
    """Each page of RAM in a file equals the live page; a file has all pages of RAM."""
    saved: Saved = request.getfixturevalue(guest)
    path: Path = getattr(saved, kind)
    with (
        open_source(f"xen:{saved.name}") as live,
        open_source(path) as image,
        open_source(saved.xl) as theirs,
    ):
        there, kept = saved.pages, gfns(image)
        # Xen's own pages that the guest has mapped (shared info, grants) are not its RAM: xl leaves
        # them out, and Xen goes on writing them.
        ram = gfns(theirs)
        with MapCache(live) as live_cache, MapCache(image) as image_cache:
            wrong = [
                gfn
                for gfn in sorted(there & kept & ram)
                if live_cache.read(gfn << PAGE_SHIFT, PAGE_SIZE)
                != image_cache.read(gfn << PAGE_SHIFT, PAGE_SIZE)
            ]
    missing, more = there - kept, kept - there
    record_property(
        "measured",
        f"{guest}, {path.name}: {len(there)} pages live, {len(kept)} in the file, {len(wrong)} "
        f"differ; missing {spans(missing)}, more {spans(more)}",
    )
    assert wrong == []
    if guest == "made":
        assert there == PAGES
    else:
        assert len(there) > 90 * MiB // PAGE_SIZE
    assert more == set()
    assert len(there - ram) <= (4 if guest == "booted" else 0)
    if (guest, kind) == ("booted", "xl"):
        assert missing == there - ram
    else:  # a survey does not look for Xen's own pages where the guest has no page of RAM
        assert missing <= there - ram


def spans(numbers: set[int]) -> str:
    """Return numbers as ranges, for people."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and found[-1][1] == number:
            found[-1][1] = number + 1
        else:
            found.append([number, number + 1])
    return ", ".join(f"{first:#x}..{end:#x}" for first, end in found) or "none"


def command(*arguments: object, status: int = 0) -> str:
    """Run the command line as a user does."""
    done = subprocess.run(
        [sys.executable, "-m", "xenmapcache", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert (done.returncode, done.stderr) == (status, ""), done.stdout[-500:]
    return done.stdout


def test_info_by_name(made: Saved) -> None:
    """`info xen:NAME` tells what the guest has; a core says which Xen it was."""
    live = json.loads(command("info", f"xen:{MADE}", "--json"))
    assert live["pages"] == len(PAGES)
    version = Path("/sys/hypervisor/version")
    running = ".".join((version / part).read_text().strip() for part in ("major", "minor"))
    core = json.loads(command("info", made.xl, "--json"))
    assert core["pages"] == len(PAGES)
    assert core["notes"]["xen_version"].startswith(running)


def test_find_by_name(booted: Saved) -> None:
    """`find` says the same of the live guest and of its files: where the kernel's banner is."""
    banner = "Linux version [0-9][^\\n]{20,40}"
    live, *files = (
        command("find", source, banner, "--regex", "--json", "--length", RAM)
        for source in (f"xen:{VICTIM}", booted.xl, booted.ours)
    )
    assert "Linux version " in json.loads(live.splitlines()[0])["text"]
    assert files == [live] * 2


def test_strings_by_name(booted: Saved) -> None:
    """`strings` of the live guest has the marker that the guest prints."""
    text = command("strings", f"xen:{VICTIM}", "--bytes", "30", "--length", RAM)
    assert re.search("XENMAPCACHE-MARKER-[0-9a-f]{16}", text)


def test_dump_by_name(made: Saved, tmp_path: Path) -> None:
    """`dump` of a live guest equals xl's own, and `diff` says so of file and guest."""
    target = tmp_path / "dump.core"
    command("dump", f"xen:{made.name}", "-o", target, "--format", "coredump")
    assert command("diff", target, made.xl) == ""
    assert command("diff", f"xen:{made.name}", target) == ""
    target.unlink()
