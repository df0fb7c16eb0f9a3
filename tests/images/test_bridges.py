"""A real Linux guest in drgn, Volatility 3 and YARA, from every form of its memory."""

from __future__ import annotations

import re
import struct
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.images import tools, xl_files
from tests.images.lab import FORMS, Images
from tests.images.lab.machine import MEMORY_BYTES
from tests.images.test_kdump_lab import file_of
from tests.images.test_write_tools import KERNEL_MAP, debug_kernel_of, processes
from xenmapcache import (
    GuestMemory,
    MapCache,
    MockHypervisor,
    find_vmcoreinfo,
    open_backend,
    open_cache,
    write_coredump,
    write_lime,
)
from xenmapcache.address import PAGE_SHIFT, MiB

pytestmark = pytest.mark.images

OURS = ("coredump", "lime", "save", "live")
"""Forms that QEMU and makedumpfile do not write; the last one is a guest of the mock."""
READ = [
    form.file
    for form in FORMS
    if form.file.endswith((".elf", ".kdump", ".raw")) and "split" not in form.file
]
BANNER = re.compile(rb"Linux version [0-9.]+[^\n\0]+")
RULES = "rule linux { strings: $a = /Linux version [0-9.]{5,9}/ condition: $a }"


def chunks(cache: MapCache) -> Iterator[tuple[int, bytes]]:
    """Yield the memory of the guest by its addresses, up to 1 MiB at once."""
    for start, length in cache.present(0, MEMORY_BYTES):
        for address in range(start, start + length, MiB):
            yield address, cache.read(address, min(MiB, start + length - address))


def xl_save(cache: MapCache) -> bytes:
    """Return a file of xl save."""
    records = []
    for address, data in chunks(cache):
        gfns = range(address >> PAGE_SHIFT, address + len(data) >> PAGE_SHIFT)
        head = struct.pack(f"<II{len(gfns)}Q", len(gfns), 0, *gfns)
        records.append(xl_files.record(xl_files.PAGE_DATA, head + data))
    return xl_files.save(*records)


@contextmanager
def opened(lab_images: Images, form: str, folder: Path) -> Iterator[MapCache]:
    """Open a form of the guest's memory."""
    with ExitStack() as stack:
        path = folder / f"guest.{form}"
        if form not in OURS:
            path = file_of(lab_images, form)
            yield stack.enter_context(open_cache(f"raw:{path}" if path.suffix == ".raw" else path))
            return
        elf = stack.enter_context(open_cache(lab_images.path("plain.elf")))
        if form == "live":
            guest = MockHypervisor().create_domain(memory=MEMORY_BYTES)
            for address, data in chunks(elf):
                guest.write(address, data)
            backend = stack.enter_context(open_backend("mock", domain=guest))
            yield stack.enter_context(MapCache(backend))
            return
        if form == "save":
            path.write_bytes(xl_save(elf))
        else:
            {"coredump": write_coredump, "lime": write_lime}[form](elf, path)
        yield stack.enter_context(open_cache(path))


@pytest.fixture(params=[*READ, *OURS])
def cache(request: pytest.FixtureRequest, lab_images: Images, tmp_path: Path) -> Iterator[MapCache]:
    """Each form of the guest's memory."""
    with opened(lab_images, request.param, tmp_path) as cache:
        yield cache


@pytest.fixture(scope="module")
def banners(lab_images: Images) -> dict[int, str]:
    """The lines of Volatility's plug-in, of QEMU's ELF core."""
    with open_cache(lab_images.path("plain.elf")) as cache:
        return banners_in(cache)


def banners_in(cache: MapCache) -> dict[int, str]:
    """Return what ``banners.Banners`` finds, by address."""
    plugin = tools.module("volatility3.plugins.banners", "volatility3")
    physical = tools.module("volatility3.framework.layers.physical", "volatility3")
    contexts = tools.module("volatility3.framework.contexts", "volatility3")
    bridge = tools.module("xenmapcache.adapters.volatility", "volatility3")
    context = contexts.Context()
    context.config["file.location"] = bridge.register(cache, "the cache is there")
    context.add_layer(physical.FileLayer(context, "file", "FileLayer"))
    layer = bridge.XenMapCacheStacker.stack(context, "FileLayer")
    context.add_layer(layer)
    return dict(plugin.Banners.locate_banners(context, layer.name))


def test_banners_are_the_same(cache: MapCache, banners: dict[int, str]) -> None:
    """Volatility's first plug-in prints the same lines for all forms."""
    assert len(banners) >= 2
    assert banners_in(cache) == banners


def test_the_command_prints_the_banners(lab_images: Images, banners: dict[int, str]) -> None:
    """``xenmapcache volatility`` as it is typed."""
    command = [sys.executable, "-m", "xenmapcache", "volatility"]
    said = tools.run(*command, lab_images.path("plain.elf"), "-q", "--offline", "banners.Banners")
    lines = [line.partition("\t") for line in said.splitlines() if line.startswith("0x")]
    assert {int(address, 16): banner for address, _, banner in lines} == banners


def test_drgn(cache: MapCache) -> None:
    """With drgn: it finds the kernel, and reads its banner through page tables of five levels."""
    drgn = tools.module("drgn", "drgn")
    program = tools.module("xenmapcache.adapters.drgn", "drgn").program(cache)
    found = find_vmcoreinfo(cache)
    assert found is not None
    release = found.value("OSRELEASE") or ""
    assert program["UTS_RELEASE"].string_().decode() == release
    offset = KERNEL_MAP - int(found.value("NUMBER(phys_base)") or "")
    text = int(found.value("SYMBOL(_stext)") or "", 16)
    place = next(
        address
        for address, _ in GuestMemory(cache).find(BANNER)
        if address + offset > text  # other copies are in the kernel's log
    )
    banner = b"Linux version " + release.encode()
    assert program.read(place + offset, len(banner)) == banner
    with pytest.raises(drgn.FaultError):
        program.read(0x1000, 8)


def test_drgn_lists_tasks(cache: MapCache, lab_images: Images) -> None:
    """With the kernel's debug package: each process that the guest itself has listed."""
    tools.module("drgn", "drgn")
    program = tools.module("xenmapcache.adapters.drgn", "drgn").program(cache)
    program.load_debug_info([debug_kernel_of(data for _, data in chunks(cache))])
    helpers = tools.module("drgn.helpers.linux.pid", "drgn")
    tasks: dict[int, str] = {
        task.pid.value_(): task.comm.string_().decode() for task in helpers.for_each_task(program)
    }
    listed = processes(lab_images)
    assert len(listed) > 20
    for pid, name in listed.items():
        assert tasks[pid].startswith(name.partition("/")[0][:15]), (pid, name, tasks[pid])


def test_yara(cache: MapCache) -> None:
    """YARA finds each string where a search for the same expression finds it."""
    yara: Any = tools.module("yara", "yara-python")
    memory = GuestMemory(cache)
    found = memory.find_yara(yara.compile(source=RULES))
    expected = list(memory.find(re.compile(rb"Linux version [0-9.]{5,9}")))
    assert len(expected) >= 2
    assert [each.address for each in found] == [address for address, _ in expected]
